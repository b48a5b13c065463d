//! The agent's door, from outside.

use std::future::Future;
use std::sync::Arc;

use whimbrel_agent::Agent;
use whimbrel_api::agent::{HostReport, SharedToken};
use whimbrel_api::client::AgentClient;
use whimbrel_api::pool::{Network, Storage};
use whimbrel_api::vm::{StopRequest, VmAction, VmState};
use whimbrel_api::{ErrorCode, VmId};
use whimbrel_pki::files::{ControllerIdentity, HostIdentity, MonitorIdentity, OperatorIdentity};
use whimbrel_pki::identity::agent_dns_name;
use whimbrel_pki::tls::{self, Credentials};

use crate::place::{Place, definition, eventually, in_namespace};

/// Serves on the place's address while `during` happens, and ends as SIGTERM would end it.
pub(crate) fn serve<T, F: Future<Output = T>>(place: &Place, during: impl FnOnce() -> F) -> T {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let agent = Agent::prepare(place.config.clone()).await.unwrap();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let serving = tokio::spawn(agent.serve(async move { drop(ended.await) }));
        let listens = async || tokio::net::TcpStream::connect(place.config.listen).await.is_ok();
        eventually(listens).await;
        let outcome = during().await;
        drop(end);
        serving.await.unwrap().unwrap();
        outcome
    })
}

fn client(place: &Place, credentials: &Credentials) -> AgentClient {
    let tls = Arc::new(tls::client_config(credentials).unwrap());
    AgentClient::new(&place.config.name, &place.config.advertised(), tls).unwrap()
}

pub(crate) fn controller(place: &Place) -> AgentClient {
    client(place, &place.pool.controller.client())
}

#[test]
fn the_controller_makes_and_runs_a_vm() {
    in_namespace(|| {
        let place = Place::with_fake();
        serve(&place, async || {
            let client = controller(&place);
            let facts: HostReport = client.host().await.unwrap();
            assert_eq!(facts.name, place.config.name);
            assert!(facts.memory_total_bytes > 0 && facts.certificate_days_left > 300);
            let network =
                Network { name: "blue".parse().unwrap(), bridge: "wb0".to_owned(), uplink: None };
            client.put_network(&network).await.unwrap();
            let report = client.put_storage(&place.storage()).await.unwrap();
            assert!(report.trouble.is_none() && report.available_bytes > 0);
            let token = client.write_token(&place.storage().name).await.unwrap();
            let seen = client.token_seen(&place.storage().name, &token).await.unwrap();
            assert!(seen.seen);
            let other = SharedToken { token: "0".repeat(32) };
            assert!(!client.token_seen(&place.storage().name, &other).await.unwrap().seen);

            let asked = definition();
            let id = asked.id;
            assert_eq!(client.put_vm(&asked).await.unwrap().state, VmState::Stopped);
            let report = client.vm_action(id, VmAction::Start).await.unwrap();
            assert_eq!(report.state, VmState::Running);
            assert_eq!(client.vms().await.unwrap().len(), 1);
            let used = client.delete_storage(&place.storage().name).await.unwrap_err();
            assert_eq!(used.code, ErrorCode::InUse);
            let stopped = client.stop_vm(id, &StopRequest::default()).await.unwrap();
            assert_eq!(stopped.state, VmState::Stopped);
            client.delete_vm(id).await.unwrap();
            assert_eq!(client.vm(id).await.unwrap_err().code, ErrorCode::NotFound);
            client.delete_network(&network.name).await.unwrap();
            client.delete_storage(&place.storage().name).await.unwrap();
        });
    });
}

#[test]
fn nobody_else_may_call() {
    in_namespace(|| {
        let place = Place::with_fake();
        serve(&place, async || {
            let operator = OperatorIdentity::issue(&place.pool.authority, "ann").unwrap();
            let agent = HostIdentity::issue(&place.pool.authority, "b").unwrap();
            for credentials in [operator.client(), agent.client()] {
                let client = client(&place, &credentials);
                assert_eq!(client.host().await.unwrap_err().code, ErrorCode::NotAllowed);
                let delete = client.delete_vm(VmId::new()).await.unwrap_err();
                assert_eq!(delete.code, ErrorCode::NotAllowed);
            }
            let stranger = whimbrel_pki::authority::Authority::create().unwrap();
            let foreign = ControllerIdentity::issue(&stranger).unwrap();
            let refused = client(&place, &foreign.client()).host().await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::CertificateForeign);
        });
    });
}

#[test]
fn a_monitor_reads_metrics_and_nothing_else() {
    in_namespace(|| {
        let place = Place::with_fake();
        serve(&place, async || {
            let get = async |credentials: &Credentials, path: &str| {
                let http = reqwest::Client::builder()
                    .tls_backend_preconfigured(tls::client_config(credentials).unwrap())
                    .resolve(&agent_dns_name("a"), place.config.listen)
                    .no_proxy()
                    .build()
                    .unwrap();
                let port = place.config.listen.port();
                let url = format!("https://{}:{port}{path}", agent_dns_name("a"));
                let answer = http.get(url).send().await.unwrap();
                (answer.status().as_u16(), answer.text().await.unwrap())
            };
            controller(&place).put_storage(&place.storage()).await.unwrap();
            controller(&place).put_vm(&definition()).await.unwrap();
            let monitor = MonitorIdentity::issue(&place.pool.authority, "prometheus").unwrap();
            let (status, text) = get(&monitor.client(), "/metrics").await;
            assert_eq!(status, 200, "{text}");
            let value = |series: &str| -> f64 {
                let line = text.lines().find_map(|line| line.strip_prefix(series));
                line.expect(series).trim().parse().unwrap()
            };
            assert_eq!(value("whimbrel_agent_vms{state=\"stopped\"}"), 1.0);
            assert_eq!(value("whimbrel_agent_qemu_processes"), 0.0);
            assert_eq!(value("whimbrel_agent_ledger_answers"), 1.0);
            assert!(value("whimbrel_agent_certificate_days_left") > 300.0);
            // The storage and the VM were written; what was only read is not counted.
            let writes = value("whimbrel_agent_ledger_write_seconds_count");
            assert!((2.0..20.0).contains(&writes), "{text}");

            for path in ["/v1/host", "/v1/vms"] {
                let (status, text) = get(&monitor.client(), path).await;
                assert!(status == 403 && text.contains("monitor prometheus"), "{status} {text}");
            }
            let operator = OperatorIdentity::issue(&place.pool.authority, "ann").unwrap();
            let agent = HostIdentity::issue(&place.pool.authority, "b").unwrap();
            let owner = place.pool.controller.client();
            for other in [operator.client(), agent.client(), owner] {
                assert_eq!(get(&other, "/metrics").await.0, 403);
            }
        });
    });
}

#[test]
fn what_is_not_well_formed_is_refused_with_a_code() {
    in_namespace(|| {
        let place = Place::with_fake();
        serve(&place, async || {
            let credentials = place.pool.controller.client();
            let http = reqwest::Client::builder()
                .tls_backend_preconfigured(tls::client_config(&credentials).unwrap())
                .resolve(&agent_dns_name("a"), place.config.listen)
                .no_proxy()
                .build()
                .unwrap();
            let base = format!("https://{}:{}/v1", agent_dns_name("a"), place.config.listen.port());
            let put = async |path: &str, body: String| {
                let answer = http.put(format!("{base}{path}")).body(body).send().await.unwrap();
                let status = answer.status().as_u16();
                let error: whimbrel_api::ApiError = answer.json().await.unwrap();
                assert_eq!(error.code.status(), status, "{error}");
                error
            };
            let unknown =
                put("/storages/a", r#"{"name":"a","path":"/a","colour":"red"}"#.to_owned()).await;
            assert_eq!(unknown.code, ErrorCode::BadRequest);
            assert!(unknown.message.contains("colour"), "{unknown}");
            let storage =
                Storage { name: "b".parse().unwrap(), path: "/b".to_owned(), shared: false };
            let body = serde_json::to_string(&storage).unwrap();
            assert_eq!(put("/storages/a", body.clone()).await.code, ErrorCode::BadRequest);
            assert_eq!(put("/storages/B..", body).await.code, ErrorCode::BadName);
            assert_eq!(put("/vms/nonsense", "{}".to_owned()).await.code, ErrorCode::BadName);
            assert_eq!(put("/nothing", "{}".to_owned()).await.code, ErrorCode::NotFound);
            let huge = format!("{{\"name\":\"{}\"}}", "a".repeat(whimbrel_api::BODY_LIMIT_BYTES));
            assert_eq!(put("/storages/a", huge).await.code, ErrorCode::TooLarge);
            let relative = r#"{"name":"a","path":"a/../b"}"#.to_owned();
            assert_eq!(put("/storages/a", relative).await.code, ErrorCode::BadPath);
            let bridge = r#"{"name":"a","bridge":"a b"}"#.to_owned();
            assert_eq!(put("/networks/a", bridge).await.code, ErrorCode::BadName);
        });
    });
}

#[test]
fn the_console_shows_what_was_and_what_comes_to_every_reader() {
    in_namespace(|| {
        let place = Place::with_fake();
        serve(&place, async || {
            let client = controller(&place);
            client.put_storage(&place.storage()).await.unwrap();
            let asked = definition();
            client.put_vm(&asked).await.unwrap();
            let refused = client.console(asked.id).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::WrongState);
            client.vm_action(asked.id, VmAction::Start).await.unwrap();

            let mut first = client.console(asked.id).await.unwrap();
            let mut second = client.console(asked.id).await.unwrap();
            // The fake's console gives back what is typed.
            assert!(first.write(b"one").await);
            read_until(&mut first, "one").await;
            read_until(&mut second, "one").await;
            // What was, comes first.
            let mut third = client.console(asked.id).await.unwrap();
            read_until(&mut third, "one").await;
            client.stop_vm(asked.id, &StopRequest { force: true }).await.unwrap();
            assert_eq!(first.read().await, None);
        });
    });
}

async fn read_until(console: &mut whimbrel_api::client::Console, wanted: &str) {
    let mut text = String::new();
    while !text.contains(wanted) {
        let read = tokio::time::timeout(crate::place::PATIENCE, console.read()).await;
        text.push_str(&String::from_utf8(read.unwrap().expect("the console is open")).unwrap());
    }
}
