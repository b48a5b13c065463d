//! A host's certificates: renewed while its agent serves, and by joining again when they have expired.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use axum::routing::post;
use axum::{Json, Router};
use tokio::net::TcpListener;
use whimbrel_agent::join::{self, JoinError};
use whimbrel_api::ErrorCode;
use whimbrel_api::agent::CertificateRequests;
use whimbrel_api::pool::{JoinAnswer, JoinRequest};
use whimbrel_pki::authority::{Authority, HostCertificates, Validity};
use whimbrel_pki::certificate::Certificate;
use whimbrel_pki::dial::{Endpoint, connect};
use whimbrel_pki::door::{Door, Listener};
use whimbrel_pki::files::HostIdentity;
use whimbrel_pki::identity::agent_dns_name;
use whimbrel_pki::key::SubjectKey;
use whimbrel_pki::tls;
use whimbrel_pki::token::JoinToken;

use crate::http::{controller, serve};
use crate::place::{Place, Pool, in_namespace};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A lifetime of a year that began so many days ago.
fn begun(days_ago: u32) -> Validity {
    let not_before = SystemTime::now() - DAY * days_ago;
    Validity { not_before, not_after: not_before + DAY * 365 }
}

/// Lets the host have certificates of this lifetime.
fn give(place: &Place, validity: Validity) -> HostIdentity {
    let name = place.config.name.as_str();
    let identity = HostIdentity::issue_within(&place.pool.authority, name, validity).unwrap();
    identity.save(&place.config.pki_dir()).unwrap();
    identity
}

fn issue(authority: &Authority, host: &str, asked: &CertificateRequests) -> HostCertificates {
    authority.issue_host(host, &asked.agent_csr, &asked.qemu_csr).unwrap()
}

/// What the agent shows to a new connection.
async fn shown(place: &Place) -> Certificate {
    let config = Arc::new(tls::client_config(&place.pool.controller.client()).unwrap());
    let name = agent_dns_name(place.config.name.as_str());
    let stream = connect(&Endpoint::Tcp(place.config.listen), &name, config).await.unwrap();
    let certificates = stream.get_ref().1.peer_certificates().unwrap();
    Certificate::from_der(certificates[0].clone().into_owned()).unwrap()
}

#[test]
fn new_certificates_are_in_use_at_once_and_only_the_hosts_own() {
    in_namespace(|| {
        let place = Place::with_fake();
        let old = give(&place, begun(300));
        serve(&place, async || {
            let client = controller(&place);
            let report = client.host().await.unwrap();
            assert!(report.certificate_renewal_due && report.certificate_days_left < 66);
            assert_eq!(shown(&place).await, old.server().certificate);

            let asked = client.certificate_requests().await.unwrap();
            let foreign = issue(&Authority::create().unwrap(), "a", &asked);
            let others = issue(&place.pool.authority, "b", &asked);
            for wrong in [foreign, others] {
                let refused = client.put_certificates(&wrong).await.unwrap_err();
                assert_eq!(refused.code, ErrorCode::BadRequest, "{refused}");
            }
            assert_eq!(shown(&place).await, old.server().certificate);

            let renewed = issue(&place.pool.authority, "a", &asked);
            client.put_certificates(&renewed).await.unwrap();
            assert_eq!(shown(&place).await.to_pem(), renewed.agent_server);
            let report = client.host().await.unwrap();
            assert!(!report.certificate_renewal_due && report.certificate_days_left > 300);
            let loaded = HostIdentity::load(&place.config.pki_dir()).unwrap();
            assert_eq!(loaded.qemu_client().certificate.to_pem(), renewed.qemu_client);
            assert_eq!(loaded.server().key.to_pem(), old.server().key.to_pem(), "keys stay");
        });
    });
}

/// A controller that does nothing but let hosts join; it notes the keys of those who asked.
async fn join_door(pool: &Arc<Pool>) -> (JoinToken, Arc<Mutex<Vec<String>>>) {
    let keys = Arc::new(Mutex::new(Vec::new()));
    let (noted, authority) = (Arc::clone(&keys), pool.authority.clone());
    let admit = async move |Json(request): Json<JoinRequest>| {
        let key = SubjectKey::from_request_pem(&request.agent_csr).unwrap();
        noted.lock().unwrap().push(key.fingerprint().to_string());
        let (agent_csr, qemu_csr) = (request.agent_csr, request.qemu_csr);
        let asked = CertificateRequests { agent_csr, qemu_csr };
        let made = issue(&authority, request.name.as_str(), &asked);
        let HostCertificates { ca, agent_server, agent_client, qemu_server, qemu_client } = made;
        Json(JoinAnswer { ca, agent_server, agent_client, qemu_server, qemu_client })
    };
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let tls = tls::join_server_config(&pool.controller.server()).unwrap();
    let door = Door::new(Router::new().route("/v1/join", post(admit)), tls);
    tokio::spawn(door.serve(vec![Listener::Tcp(listener)], std::future::pending()));
    let fingerprint = pool.authority.certificate().fingerprint();
    (JoinToken::create(vec![address], fingerprint).unwrap(), keys)
}

#[test]
fn a_host_whose_certificates_have_expired_joins_again_with_its_keys() {
    in_namespace(|| {
        let place = Place::with_fake();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (token, asked) = join_door(&place.pool).await;
            let valid = give(&place, begun(364));
            join::join(&place.config, &token.to_line()).await.unwrap();
            assert!(asked.lock().unwrap().is_empty(), "what is valid needs no token");
            let loaded = || HostIdentity::load(&place.config.pki_dir()).unwrap();
            assert_eq!(loaded().server().certificate, valid.server().certificate);

            let expired = give(&place, begun(366));
            let bad = join::join(&place.config, "whimbrel-join-1.nonsense").await.unwrap_err();
            assert!(matches!(bad, JoinError::Token(_)), "{bad}");
            join::join(&place.config, &token.to_line()).await.unwrap();
            let key = expired.server().key;
            let fingerprint = key.subject().unwrap().fingerprint().to_string();
            assert_eq!(*asked.lock().unwrap(), [fingerprint]);
            let renewed = loaded();
            assert!(!renewed.is_expired(SystemTime::now()));
            assert_eq!(renewed.server().key.to_pem(), key.to_pem());
        });
    });
}
