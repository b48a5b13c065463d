//! Certificates that are about to expire are renewed; those that have expired are told, with what to do.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::net::TcpListener;
use whimbrel_api::client::{PoolClient, Target};
use whimbrel_api::migration::{MigrateOptions, MigrateRequest};
use whimbrel_api::pool::Contact;
use whimbrel_api::vm::VmAction;
use whimbrel_api::{ErrorCode, MigrationId};
use whimbrel_pki::authority::{Authority, Role, Validity};
use whimbrel_pki::certificate::Certificate;
use whimbrel_pki::dial::{Endpoint, connect};
use whimbrel_pki::files::{ControllerIdentity, HostIdentity, HostKeys, OperatorIdentity};
use whimbrel_pki::identity::CONTROLLER_DNS_NAME;
use whimbrel_pki::key::PrivateKey;
use whimbrel_pki::tls::{self, Credentials};

use super::rig::{MACHINES, Rig, eventually, identity, name};
use crate::renewal;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A lifetime of a year that ended some days ago.
fn over(days_ago: u32) -> Validity {
    // An hour more than whole days, so that the count does not depend on the test's speed.
    let not_after = SystemTime::now() - DAY * days_ago - Duration::from_secs(3600);
    Validity { not_before: not_after - DAY * 365, not_after }
}

/// A lifetime of a year of which some days are left.
fn left(days: u32) -> Validity {
    let not_after = SystemTime::now() + DAY * days + Duration::from_secs(3600);
    Validity { not_before: not_after - DAY * 365, not_after }
}

fn authority(rig: &Rig) -> Authority {
    Authority::load(&rig.config().dir).unwrap()
}

/// What is shown at a door.
async fn shown(rig: &Rig, address: SocketAddr, server: &str) -> Certificate {
    let own = OperatorIdentity::issue(&authority(rig), "ann").unwrap().client();
    let config = Arc::new(tls::client_config(&own).unwrap());
    let stream = connect(&Endpoint::Tcp(address), server, config).await.unwrap();
    let certificates = stream.get_ref().1.peer_certificates().unwrap();
    Certificate::from_der(certificates[0].clone().into_owned()).unwrap()
}

async fn until_unreachable(rig: &Rig, host: &str) -> String {
    let said = async || match rig.client.host(&name(host)).await.unwrap().contact {
        Contact::Unreachable { why, .. } => Some(why),
        _ => None,
    };
    eventually(|| async {
        rig.nudge(host);
        said().await.is_some()
    })
    .await;
    said().await.unwrap()
}

#[tokio::test]
async fn a_hosts_certificates_are_renewed_in_time_and_for_its_keys() {
    let rig = Rig::new().await;
    let mut agent = rig.host("host-a").await;
    let fresh = shown(&rig, agent.address, "host-a.agent.whimbrel").await;
    rig.rounds(&agent).await;
    assert_eq!(agent.called("PUT /v1/certificates"), 0, "it is not time");

    agent
        .become_known_as(HostIdentity::issue_within(&authority(&rig), "host-a", left(100)).unwrap())
        .await;
    let old = shown(&rig, agent.address, "host-a.agent.whimbrel").await;
    assert!(old != fresh && old.days_left(SystemTime::now()) == 100);
    eventually(|| async {
        rig.nudge("host-a");
        let new = shown(&rig, agent.address, "host-a.agent.whimbrel").await;
        new.days_left(SystemTime::now()) > 300
    })
    .await;
    rig.rounds(&agent).await;
    assert_eq!(agent.called("PUT /v1/certificates"), 1, "once is enough");
    let facts = rig.client.host(&name("host-a")).await.unwrap().facts.unwrap();
    assert!(facts.certificate_days_left > 300);
}

#[tokio::test]
async fn an_expired_host_is_named_with_what_to_do_and_joins_again() {
    let rig = Rig::new().await;
    let _a = rig.host("host-a").await;
    let keys = HostKeys::generate().unwrap();
    let mut b = rig.joined_with("host-b", MACHINES, keys.clone()).await;
    rig.until_ready("host-b").await;
    rig.furnish().await;
    rig.create("web01", Some("host-a")).await;
    rig.client.vm_action("web01", VmAction::Start).await.unwrap();

    // The same keys all along, as on a host that was off for a year.
    let (agent_csr, qemu_csr) =
        (keys.agent_request_pem().unwrap(), keys.qemu_request_pem().unwrap());
    let issued =
        authority(&rig).issue_host_within("host-b", &agent_csr, &qemu_csr, over(3)).unwrap();
    b.become_known_as(HostIdentity::assemble(keys.clone(), &issued, "host-b").unwrap()).await;
    let why = until_unreachable(&rig, "host-b").await;
    assert!(why.contains("the certificate of host-b expired 3 days ago"), "{why}");
    assert!(why.contains("whimbrel pool join-token") && why.contains("on host-b"), "{why}");

    let to_b = MigrateRequest {
        id: MigrationId::new(),
        vm: "web01".into(),
        destination: name("host-b"),
        options: MigrateOptions::default(),
    };
    let refused = rig.client.migrate(&to_b).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::CertificateExpired);
    assert!(refused.message.contains("the certificate of host-b expired 3 days ago"), "{refused}");
    assert!(refused.hint.as_ref().unwrap().contains("--join TOKEN"), "{refused:?}");
    assert!(rig.client.migrations().await.unwrap().is_empty(), "nothing was begun");

    // Somebody else does not get the name; the holder of the keys does.
    let address = b.address.to_string();
    let taken = HostKeys::generate().unwrap();
    let stolen = rig.join(&rig.token().await, &taken, "host-b", &address).await.unwrap_err();
    assert_eq!(stolen.code, ErrorCode::Exists);
    let answer = rig.join(&rig.token().await, &keys, "host-b", &address).await.unwrap();
    b.become_known_as(identity(keys, answer, "host-b")).await;
    rig.until_ready("host-b").await;
    rig.client.migrate(&to_b).await.unwrap();
}

#[tokio::test]
async fn a_host_of_another_pool_is_named() {
    let rig = Rig::new().await;
    let mut b = rig.host("host-b").await;
    let foreign = Authority::create().unwrap();
    b.become_known_as(HostIdentity::issue(&foreign, "host-b").unwrap()).await;
    let why = until_unreachable(&rig, "host-b").await;
    assert!(why.contains("the certificate of host-b was not issued by this pool"), "{why}");
    assert!(why.contains("of the same pool"), "{why}");
}

#[tokio::test]
async fn an_operator_is_told_which_certificate_has_which_trouble() {
    let rig = Rig::new().await;
    let host = rig.host("host-a").await;
    let pool = authority(&rig);
    let issued = |within: Validity| {
        let key = PrivateKey::generate().unwrap();
        let subject = key.subject().unwrap();
        let certificate = pool.issue_within(Role::Operator("ann"), &subject, within).unwrap();
        Credentials { ca: pool.certificate().clone(), certificate, key }
    };
    let early = SystemTime::now() + DAY;
    let foreign = OperatorIdentity::issue(&Authority::create().unwrap(), "ann").unwrap().client();
    let disguised = Credentials { ca: pool.certificate().clone(), ..foreign.clone() };
    let of_host = HostIdentity::issue(&pool, "host-a").unwrap().server();
    let there = rig.address;
    let cases = [
        (
            issued(over(2)),
            there,
            ErrorCode::CertificateExpired,
            "operator ann expired 2 days ago",
            "whimbrel pool renew",
        ),
        (
            issued(Validity { not_before: early, not_after: early + DAY }),
            there,
            ErrorCode::CertificateNotYetValid,
            "operator ann is valid in",
            "clocks",
        ),
        (
            foreign,
            there,
            ErrorCode::CertificateForeign,
            "of the controller was not issued by this pool",
            "same pool",
        ),
        (
            disguised,
            there,
            ErrorCode::CertificateForeign,
            "of operator ann was not issued by this pool",
            "same pool",
        ),
        (
            issued(left(9)),
            host.address,
            ErrorCode::CertificateWrongName,
            "host-a.agent.whimbrel",
            "address",
        ),
        (
            of_host,
            there,
            ErrorCode::CertificateRefused,
            "for the other end of a connection",
            "whimbrel host show",
        ),
    ];
    for (own, address, code, words, advice) in cases {
        let config = Arc::new(tls::client_config(&own).unwrap());
        let client = PoolClient::new(Target::Tcp(address.to_string()), config).unwrap();
        let error = client.hosts().await.unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(words), "{error}");
        assert!(error.hint.as_ref().unwrap().contains(advice), "{error:?}");
    }
}

#[tokio::test]
async fn the_controller_renews_its_own_certificates_when_it_starts_also_expired_ones() {
    let mut rig = Rig::new().await;
    let agent = rig.host("host-a").await;
    rig.stop().await;
    let dir = rig.config().dir;
    ControllerIdentity::issue_within(&authority(&rig), over(1)).unwrap().save(&dir).unwrap();
    rig.start().await;
    rig.client.hosts().await.unwrap();
    rig.until_ready("host-a").await;
    assert!(agent.called("GET /v1/host") > 0);
    let own = ControllerIdentity::load(&dir).unwrap();
    assert!(!own.is_renewal_due(SystemTime::now()), "on the disk, too");
}

#[tokio::test]
async fn the_controller_renews_its_own_certificates_while_it_runs() {
    let rig = Rig::new().await;
    let agent = rig.host("host-a").await;
    let before = shown(&rig, rig.address, CONTROLLER_DNS_NAME).await;
    renewal::renew_own(&rig.controller, SystemTime::now()).unwrap();
    assert_eq!(shown(&rig, rig.address, CONTROLLER_DNS_NAME).await, before, "it is not time");
    renewal::renew_own(&rig.controller, SystemTime::now() + DAY * 250).unwrap();
    let after = shown(&rig, rig.address, CONTROLLER_DNS_NAME).await;
    assert_ne!(after, before);
    let on_disk = ControllerIdentity::load(&rig.config().dir).unwrap();
    assert_eq!(on_disk.server().certificate, after);
    rig.rounds(&agent).await;
}

#[tokio::test]
async fn renewed_certificates_are_not_taken_by_a_stranger_at_the_address() {
    // A host that is due, at whose address somebody without its name answers, is not asked for anything.
    let rig = Rig::new().await;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let keys = HostKeys::generate().unwrap();
    rig.join(&rig.token().await, &keys, "host-a", &address).await.unwrap();
    let other = HostIdentity::issue_within(&authority(&rig), "host-b", left(100)).unwrap();
    let stranger = rig.world.start_as(other, listener, MACHINES);
    let why = until_unreachable(&rig, "host-a").await;
    assert!(why.contains("host-b.agent.whimbrel"), "{why}");
    assert_eq!(stranger.called("GET /v1"), 0);
}
