//! Requests that no client of ours would send, and the streams.

use std::sync::Arc;

use proptest::prelude::*;
use whimbrel_api::client::ClientConfig;
use whimbrel_api::event::Event;
use whimbrel_api::vm::VmAction;
use whimbrel_api::{ApiError, BODY_LIMIT_BYTES, ErrorCode};
use whimbrel_migration::preflight::Code;
use whimbrel_pki::certificate::Certificate;
use whimbrel_pki::identity::CONTROLLER_DNS_NAME;
use whimbrel_pki::key::PrivateKey;
use whimbrel_pki::tls::{self, Credentials};

use super::migrations::{to, two_hosts};
use super::rig::Rig;
use crate::fake_agent::Pace;

/// An HTTP client that sends whatever it is told to.
struct Raw {
    http: reqwest::Client,
    base: String,
}

impl Raw {
    fn new(rig: &Rig) -> Self {
        let config = ClientConfig::load(&rig.config().dir.join("client.toml")).unwrap();
        let credentials = Credentials {
            ca: Certificate::from_pem(&config.ca).unwrap(),
            certificate: Certificate::from_pem(&config.certificate).unwrap(),
            key: PrivateKey::from_pem(&config.key).unwrap(),
        };
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls::client_config(&credentials).unwrap())
            .resolve(CONTROLLER_DNS_NAME, rig.address)
            .no_proxy()
            .build()
            .unwrap();
        Self { http, base: format!("https://{CONTROLLER_DNS_NAME}:{}", rig.address.port()) }
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        body: impl Into<reqwest::Body>,
    ) -> (u16, ApiError) {
        let request = self.http.request(method.parse().unwrap(), format!("{}{path}", self.base));
        let answer = request.body(body).send().await.unwrap();
        let status = answer.status().as_u16();
        (status, answer.json().await.expect("every error is an ApiError"))
    }
}

#[tokio::test]
async fn bad_requests_are_told_what_is_bad() {
    let rig = Rig::new().await;
    let raw = Raw::new(&rig);
    let vm = |rest: &str| {
        let id = whimbrel_api::VmId::new();
        format!(r#"{{"id":"{id}","spec":{{"name":"a","memory":1073741824{rest}}}}}"#)
    };
    for (method, path, body, status, word) in [
        ("POST", "/v1/vms", vm(r#","colour":"red""#), 400, "colour"),
        ("POST", "/v1/vms", vm(r#","disk":[{"storage":"s","sise":1}]"#), 400, "sise"),
        ("POST", "/v1/vms", "{".into(), 400, "EOF"),
        ("POST", "/v1/vms", String::new(), 400, "id"),
        ("POST", "/v1/networks", r#"{"name":"Net","bridge":"b"}"#.into(), 400, "a-z"),
        ("POST", "/v1/networks", r#"{"name":"n","bridge":"a/b"}"#.into(), 400, "bridge"),
        ("POST", "/v1/storages", r#"{"name":"n","path":"/a/../b"}"#.into(), 400, "path"),
        ("POST", "/v1/join-tokens", r#"{"ttl":60}"#.into(), 400, "ttl"),
        ("POST", "/v1/vms/a/start", r#"{"now":true}"#.into(), 400, "now"),
        ("POST", "/v1/migrations", r#"{"vm":"a"}"#.into(), 400, "id"),
        ("GET", "/v1/migrations/nonsense", String::new(), 400, "UUID"),
        ("GET", "/v1/hosts/Host", String::new(), 400, "a-z"),
        ("GET", "/v1/vms/a/console", String::new(), 400, "WebSocket"),
        ("GET", "/v1/vms?colour=red", String::new(), 400, "`colour`"),
        ("GET", "/v1/vms/a?&now", String::new(), 400, "`now`"),
        ("POST", "/v1/join?fast=1", "{}".into(), 400, "`fast`"),
        ("GET", "/v1/nothing", String::new(), 404, "no such call"),
        ("DELETE", "/v1/vms", String::new(), 404, "no such call"),
        ("GET", "/", String::new(), 404, "no such call"),
    ] {
        let (found, error) = raw.send(method, path, body.clone()).await;
        assert_eq!(found, status, "{method} {path} {body}: {error}");
        assert!(error.message.contains(word), "{method} {path} {body}: {error}");
    }
    let (status, error) = raw.send("POST", "/v1/vms", vec![b' '; BODY_LIMIT_BYTES + 1]).await;
    assert_eq!((status, error.code), (413, ErrorCode::TooLarge));
}

/// What the command line refuses before it asks is refused here as well, for others speak to this side too.
#[tokio::test]
async fn bad_options_of_a_migration_are_refused_and_nothing_is_begun() {
    let (rig, _a, _b) = two_hosts().await;
    let raw = Raw::new(&rig);
    let big = "9223372036854775808";
    let numbers = [
        r#""max_downtime_ms":N"#,
        r#""bandwidth_bytes_per_s":N"#,
        r#""available_switchover_bandwidth_bytes_per_s":N"#,
        r#""parallel_connections":N"#,
        r#""postcopy":{"bandwidth_bytes_per_s":N}"#,
        r#""timeout":{"seconds":N}"#,
        r#""auto_converge":{"initial_percent":N}"#,
        r#""auto_converge":{"increment_percent":N}"#,
    ];
    let mut cases: Vec<(String, &str)> = Vec::new();
    for option in numbers {
        let named = |part: &&str| part.contains('_') || *part == "seconds";
        let field = option.split('"').rfind(named).unwrap();
        for bad in ["0", "-1", "\"NaN\"", "1e400", big, "1000000000000000000000"] {
            cases.push((option.replace('N', bad), field));
        }
    }
    for (option, field) in [
        (r#""parallel_connections":1000000"#, "parallel_connections"),
        (r#""timeout":{"seconds":2}"#, "timeout.seconds"),
        (r#""timeout":{"seconds":60,"then":"postcopy"}"#, "timeout.then"),
        (r#""compression":{"zlib_level":10}"#, "compression.zlib_level"),
        (r#""compression":{"zstd_level":21}"#, "compression.zstd_level"),
        (r#""compression":{"xbzrle_cache_bytes":3145728}"#, "compression.xbzrle_cache_bytes"),
        (r#""compression":{"methods":["mt"]}"#, "mt"),
        (r#""migrate_address":"127.0.0.1""#, "migrate_address"),
        (r#""mode":"fast""#, "fast"),
    ] {
        cases.push((option.to_owned(), field));
    }
    for (option, field) in cases {
        let id = whimbrel_api::MigrationId::new();
        let body = format!(
            r#"{{"id":"{id}","vm":"web01","destination":"host-b","options":{{{option}}}}}"#
        );
        let (status, error) = raw.send("POST", "/v1/migrations", body).await;
        assert_eq!(status, 400, "{option}: {error}");
        assert!(
            matches!(error.code, ErrorCode::OutOfRange | ErrorCode::BadRequest),
            "{option}: {error:?}"
        );
        let named = error.message.contains(field) || option.contains("1e400");
        assert!(named, "{option}: {error} does not name {field}");
    }
    assert!(rig.client.migrations().await.unwrap().is_empty(), "nothing was begun");

    rig.world.set_pace(Pace::Hangs);
    rig.client.migrate(&to("host-b")).await.unwrap();
    let second = rig.client.migrate(&to("host-b")).await.unwrap_err();
    // Which of the two depends on whether the source has begun.
    assert!(
        matches!(second.code, ErrorCode::Migrating | ErrorCode::PreflightRefused),
        "{second:?}"
    );
    assert!(second.verdicts.iter().all(|verdict| verdict.code == Code::AlreadyMigrating));
}

#[tokio::test]
async fn the_document_is_served_as_it_is_checked_in() {
    let rig = Rig::new().await;
    let raw = Raw::new(&rig);
    let answer = raw.http.get(format!("{}/v1/openapi.json", raw.base)).send().await.unwrap();
    assert_eq!(answer.headers()["content-type"], "application/json");
    let document: serde_json::Value = answer.json().await.unwrap();
    assert_eq!(document["info"]["title"], "Whimbrel");
}

#[tokio::test]
async fn events_begin_with_everything_and_go_on_with_changes() {
    let rig = Rig::new().await;
    let _agent = rig.host("host-a").await;
    rig.furnish().await;
    rig.create("web01", None).await;
    let mut events = rig.client.events().await.unwrap();
    let mut beginning = Vec::new();
    while !matches!(beginning.last(), Some(Event::Vm { .. })) {
        beginning.push(events.next().await.unwrap().unwrap());
    }
    let of_policies =
        |event: &Event| matches!(event, Event::Policy { .. } | Event::PolicyApplied { .. });
    beginning.retain(|event| !of_policies(event));
    assert!(matches!(
        &beginning[..],
        [Event::Host { .. }, Event::Network { .. }, Event::Storage { .. }, Event::Vm { .. }]
    ));
    rig.client.vm_action("web01", VmAction::Start).await.unwrap();
    let started = async {
        loop {
            match events.next().await.unwrap().unwrap() {
                Event::Vm { vm } if vm.state.word() == "running" => break,
                _ => {}
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), started).await.unwrap();
    // Far more than a reader may be behind: he is given everything again and misses nothing that lasts.
    let vm = rig.client.vm("web01").await.unwrap();
    for _ in 0..2_000 {
        rig.controller.events().publish(Event::Vm { vm: vm.clone() });
    }
    rig.client.stop_vm("web01", &Default::default()).await.unwrap();
    let stopped = async {
        loop {
            match events.next().await.unwrap().unwrap() {
                Event::Vm { vm } if vm.state.word() == "stopped" => break,
                _ => {}
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), stopped).await.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_body_makes_a_parser_panic(text in "\\PC{0,80}") {
        let _ = serde_json::from_str::<whimbrel_api::vm::CreateVm>(&text);
        let _ = serde_json::from_str::<whimbrel_api::migration::MigrateRequest>(&text);
        let _ = serde_json::from_str::<whimbrel_api::pool::JoinRequest>(&text);
    }

    #[test]
    fn every_field_that_is_not_known_is_named(field in "[a-z]{5,12}") {
        prop_assume!(!["memory", "vcpus", "machine"].contains(&field.as_str()));
        let json = format!(r#"{{"name":"a","memory":1,"{field}":1}}"#);
        let error = serde_json::from_str::<whimbrel_api::vm::VmSpec>(&json).unwrap_err();
        prop_assert!(error.to_string().contains(&field));
    }
}

/// Keeps the rig's client type in use where only raw requests are sent.
#[tokio::test]
async fn a_controller_of_nothing_lists_nothing() {
    let rig = Rig::new().await;
    let controller = Arc::clone(&rig.controller);
    assert!(controller.hosts().all().is_empty());
    assert!(rig.client.vms().await.unwrap().is_empty());
    assert!(rig.client.migrations().await.unwrap().is_empty());
}
