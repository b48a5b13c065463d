//! Every way in which two ends must not come together, over loopback: each side names the reason.

use std::error::Error;
use std::sync::Arc;
use std::time::SystemTime;

use crate::pool::{PATIENCE, credentials, expired, not_yet_valid};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use whimbrel_pki::authority::{Authority, Role};
use whimbrel_pki::certificate::Certificate;
use whimbrel_pki::dial::{DialError, Endpoint, connect};
use whimbrel_pki::identity::{IdentityError, Peer};
use whimbrel_pki::key::PrivateKey;
use whimbrel_pki::tls::{self, Credentials};
use whimbrel_pki::trouble::{TlsTrouble, Whose, explain};

const NAME: &str = "host-b.agent.whimbrel";

/// What each side made of one connection.
#[derive(Debug)]
struct Outcome {
    server: Result<(), TlsTrouble>,
    client: Result<(), TlsTrouble>,
}

async fn meet(server: Arc<ServerConfig>, client: ClientConfig, name: &str) -> Outcome {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint::Tcp(listener.local_addr().unwrap());
    let server = async {
        let (socket, _) = listener.accept().await.unwrap();
        match TlsAcceptor::from(server).accept(socket).into_fallible().await {
            Ok(mut stream) => {
                stream.write_all(b"x").await.unwrap();
                stream.shutdown().await.unwrap();
                Ok(())
            }
            Err((error, mut socket)) => {
                let _ = socket.shutdown().await;
                let _ = tokio::io::copy(&mut socket, &mut tokio::io::sink()).await;
                Err(explained(&error))
            }
        }
    };
    let client = async {
        match connect(&endpoint, name, Arc::new(client)).await {
            Ok(mut stream) => match stream.read_u8().await {
                Ok(_) => Ok(()),
                Err(error) => Err(explained(&error)),
            },
            Err(DialError::Tls { trouble, .. }) => Err(trouble),
            Err(other) => panic!("{other}"),
        }
    };
    let both = async { tokio::join!(server, client) };
    let (server, client) = timeout(PATIENCE, both).await.expect("a handshake hangs");
    Outcome { server, client }
}

fn explained(error: &(dyn Error + 'static)) -> TlsTrouble {
    explain(error).unwrap_or_else(|| panic!("nothing to explain in {error:?}"))
}

fn server_of(own: &Credentials) -> Arc<ServerConfig> {
    tls::server_config(own).unwrap()
}

fn client_of(own: &Credentials) -> ClientConfig {
    tls::client_config(own).unwrap()
}

fn good_server(authority: &Authority) -> Arc<ServerConfig> {
    server_of(&credentials(authority, Role::AgentServer("host-b")))
}

fn good_client(authority: &Authority) -> ClientConfig {
    client_of(&credentials(authority, Role::AgentClient("host-a")))
}

/// `authority`'s pool with a certificate that nobody but its own key signed.
fn self_signed(authority: &Authority, usage: ExtendedKeyUsagePurpose, ca: IsCa) -> Credentials {
    let pair = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![NAME.to_owned()]).unwrap();
    params.extended_key_usages = vec![usage];
    params.is_ca = ca;
    let made = params.self_signed(&pair).unwrap();
    Credentials {
        ca: authority.certificate().clone(),
        certificate: Certificate::from_der(made.der().clone()).unwrap(),
        key: PrivateKey::from_pem(&pair.serialize_pem()).unwrap(),
    }
}

#[tokio::test]
async fn members_of_one_pool_meet() {
    let pool = Authority::create().unwrap();
    for role in [Role::AgentClient("host-a"), Role::ControllerClient, Role::Operator("ann")] {
        let client = client_of(&credentials(&pool, role));
        let outcome = meet(good_server(&pool), client, NAME).await;
        assert_eq!((outcome.server, outcome.client), (Ok(()), Ok(())), "{role:?}");
    }
}

#[tokio::test]
async fn an_expired_server_is_named_on_both_sides() {
    let pool = Authority::create().unwrap();
    let server = server_of(&expired(&pool, Role::AgentServer("host-b"), 3));
    let outcome = meet(server, good_client(&pool), NAME).await;
    let theirs = TlsTrouble::Expired { whose: Whose::Theirs, days: Some(3) };
    assert_eq!(outcome.client, Err(theirs));
    assert_eq!(outcome.server, Err(TlsTrouble::Expired { whose: Whose::Ours, days: None }));
}

#[tokio::test]
async fn an_expired_client_is_named_on_both_sides() {
    let pool = Authority::create().unwrap();
    let own = expired(&pool, Role::AgentClient("host-a"), 3);
    let outcome = meet(good_server(&pool), client_of(&own), NAME).await;
    let theirs = TlsTrouble::Expired { whose: Whose::Theirs, days: Some(3) };
    assert_eq!(outcome.server, Err(theirs));
    let told = outcome.client.unwrap_err();
    assert_eq!(told, TlsTrouble::Expired { whose: Whose::Ours, days: None });
    let seen = told.seen_from(&own.certificate, SystemTime::now());
    assert_eq!(seen, TlsTrouble::Expired { whose: Whose::Ours, days: Some(3) });
    assert_eq!(seen.to_string(), "our certificate expired 3 days ago; renew it");
    let told = seen.between("host-a", "the controller");
    assert_eq!(told, "the certificate of host-a expired 3 days ago; renew it");
}

#[tokio::test]
async fn a_certificate_of_tomorrow_is_named_on_both_sides() {
    let pool = Authority::create().unwrap();
    let own = not_yet_valid(&pool, Role::AgentClient("host-a"));
    let outcome = meet(good_server(&pool), client_of(&own), NAME).await;
    let seen = outcome.server.unwrap_err();
    assert!(matches!(seen, TlsTrouble::NotYetValid { whose: Whose::Theirs, seconds: 86_000.. }));
    let told = outcome.client.unwrap_err().seen_from(&own.certificate, SystemTime::now());
    assert!(matches!(told, TlsTrouble::NotYetValid { whose: Whose::Ours, seconds: 86_000.. }));

    let server = server_of(&not_yet_valid(&pool, Role::AgentServer("host-b")));
    let outcome = meet(server, good_client(&pool), NAME).await;
    let seen = outcome.client.unwrap_err();
    assert!(matches!(seen, TlsTrouble::NotYetValid { whose: Whose::Theirs, seconds: 86_000.. }));
}

#[tokio::test]
async fn another_pool_is_named_on_both_sides() {
    let pool = Authority::create().unwrap();
    let other = Authority::create().unwrap();
    // A client of the other pool that trusts ours: only our server can refuse.
    let foreign = Credentials {
        ca: pool.certificate().clone(),
        ..credentials(&other, Role::AgentClient("host-a"))
    };
    let outcome = meet(good_server(&pool), client_of(&foreign), NAME).await;
    assert_eq!(outcome.server, Err(TlsTrouble::UnknownAuthority { whose: Whose::Theirs }));
    assert_eq!(outcome.client, Err(TlsTrouble::UnknownAuthority { whose: Whose::Ours }));

    let outcome = meet(good_server(&other), good_client(&pool), NAME).await;
    assert_eq!(outcome.client, Err(TlsTrouble::UnknownAuthority { whose: Whose::Theirs }));
    assert_eq!(outcome.server, Err(TlsTrouble::UnknownAuthority { whose: Whose::Ours }));
}

#[tokio::test]
async fn a_self_signed_certificate_is_of_no_pool() {
    let pool = Authority::create().unwrap();
    let authority = || IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    for ca in [|| IsCa::NoCa, authority] {
        let own = self_signed(&pool, ExtendedKeyUsagePurpose::ServerAuth, ca());
        let outcome = meet(server_of(&own), good_client(&pool), NAME).await;
        assert_eq!(outcome.client, Err(TlsTrouble::UnknownAuthority { whose: Whose::Theirs }));

        let own = self_signed(&pool, ExtendedKeyUsagePurpose::ClientAuth, ca());
        let outcome = meet(good_server(&pool), client_of(&own), NAME).await;
        assert_eq!(outcome.server, Err(TlsTrouble::UnknownAuthority { whose: Whose::Theirs }));
    }
}

#[tokio::test]
async fn the_right_pool_with_a_wrong_name_is_refused_by_the_caller() {
    let pool = Authority::create().unwrap();
    for role in [Role::AgentServer("host-c"), Role::ControllerServer, Role::QemuServer("host-b")] {
        let own = credentials(&pool, role);
        let outcome = meet(server_of(&own), good_client(&pool), NAME).await;
        let told = outcome.client.unwrap_err();
        assert_eq!(
            told,
            TlsTrouble::WrongName {
                whose: Whose::Theirs,
                expected: Some(NAME.to_owned()),
                got: vec![role.peer().dns_name()],
            }
        );
        assert!(told.to_string().contains(&role.peer().dns_name()), "{told}");
        let unknown = TlsTrouble::WrongName { whose: Whose::Ours, expected: None, got: vec![] };
        assert_eq!(outcome.server, Err(unknown));
    }
}

#[tokio::test]
async fn a_certificate_serves_one_end_only() {
    let pool = Authority::create().unwrap();
    let own = credentials(&pool, Role::AgentClient("host-b"));
    let outcome = meet(server_of(&own), good_client(&pool), NAME).await;
    assert_eq!(outcome.client, Err(TlsTrouble::WrongPurpose { whose: Whose::Theirs }));
    assert_eq!(outcome.server, Err(TlsTrouble::WrongPurpose { whose: Whose::Ours }));

    let own = credentials(&pool, Role::AgentServer("host-a"));
    let outcome = meet(good_server(&pool), client_of(&own), NAME).await;
    assert_eq!(outcome.server, Err(TlsTrouble::WrongPurpose { whose: Whose::Theirs }));
    assert_eq!(outcome.client, Err(TlsTrouble::WrongPurpose { whose: Whose::Ours }));
}

#[tokio::test]
async fn a_client_without_certificate_is_let_in_at_the_join_door_only() {
    let pool = Authority::create().unwrap();
    let own = credentials(&pool, Role::ControllerServer);
    let name = Peer::Controller.dns_name();
    let fingerprint = pool.certificate().fingerprint();
    let newcomer = || tls::join_client_config(fingerprint).unwrap();

    let outcome = meet(tls::join_server_config(&own).unwrap(), newcomer(), &name).await;
    assert_eq!((outcome.server, outcome.client), (Ok(()), Ok(())));

    // The ordinary door does not send the authority along, so give the client what it pins.
    let mut trusting = rustls::RootCertStore::empty();
    trusting.add(pool.certificate().der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let anonymous = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(trusting)
        .with_no_client_auth();
    let outcome = meet(server_of(&own), anonymous, &name).await;
    assert_eq!(outcome.server, Err(TlsTrouble::NoClientCertificate { whose: Whose::Theirs }));
    assert_eq!(outcome.client, Err(TlsTrouble::NoClientCertificate { whose: Whose::Ours }));
}

#[tokio::test]
async fn a_newcomer_trusts_the_pinned_authority_alone() {
    let pool = Authority::create().unwrap();
    let other = Authority::create().unwrap();
    let name = Peer::Controller.dns_name();
    let newcomer = || tls::join_client_config(pool.certificate().fingerprint()).unwrap();
    let unknown = Err(TlsTrouble::UnknownAuthority { whose: Whose::Theirs });

    let impostor = credentials(&other, Role::ControllerServer);
    let outcome = meet(tls::join_server_config(&impostor).unwrap(), newcomer(), &name).await;
    assert_eq!(outcome.client, unknown);

    // The right authority sent along does not make another pool's certificate good.
    let mixed = Credentials { ca: pool.certificate().clone(), ..impostor };
    let outcome = meet(tls::join_server_config(&mixed).unwrap(), newcomer(), &name).await;
    assert_eq!(outcome.client, unknown);

    // An agent of the pool is not the controller.
    let agent = credentials(&pool, Role::AgentServer("host-b"));
    let outcome = meet(tls::join_server_config(&agent).unwrap(), newcomer(), &name).await;
    assert!(matches!(outcome.client, Err(TlsTrouble::WrongName { .. })), "{outcome:?}");

    let expired = expired(&pool, Role::ControllerServer, 1);
    let outcome = meet(tls::join_server_config(&expired).unwrap(), newcomer(), &name).await;
    assert!(matches!(outcome.client, Err(TlsTrouble::Expired { .. })), "{outcome:?}");
}

#[tokio::test]
async fn a_shown_certificate_must_be_good_at_the_join_door_too() {
    let pool = Authority::create().unwrap();
    let own = credentials(&pool, Role::ControllerServer);
    let client = client_of(&expired(&pool, Role::Operator("ann"), 1));
    let name = Peer::Controller.dns_name();
    let outcome = meet(tls::join_server_config(&own).unwrap(), client, &name).await;
    assert!(matches!(outcome.server, Err(TlsTrouble::Expired { .. })), "{outcome:?}");
}

#[tokio::test]
async fn qemu_may_not_speak_at_a_door() {
    let pool = Authority::create().unwrap();
    let client = client_of(&credentials(&pool, Role::QemuClient("host-a")));
    let outcome = meet(good_server(&pool), client, NAME).await;
    let why = Some(IdentityError::QemuAtDoor(Peer::Qemu("host-a".to_owned())));
    assert_eq!(outcome.server, Err(TlsTrouble::NoRole { whose: Whose::Theirs, why }));
    assert_eq!(outcome.client, Err(TlsTrouble::NoRole { whose: Whose::Ours, why: None }));
}

#[tokio::test]
async fn a_key_that_is_not_the_certificates_is_refused() {
    let pool = Authority::create().unwrap();
    let other = PrivateKey::generate().unwrap();
    let own = Credentials { key: other, ..credentials(&pool, Role::AgentClient("host-a")) };
    assert!(tls::client_config(&own).is_err());
    assert!(tls::server_config(&own).is_err());
}

#[tokio::test]
async fn an_old_protocol_is_refused() {
    let pool = Authority::create().unwrap();
    let mut trusting = rustls::RootCertStore::empty();
    trusting.add(pool.certificate().der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let old = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(trusting)
        .with_no_client_auth();
    let outcome = meet(good_server(&pool), old, NAME).await;
    assert_eq!(outcome.server, Err(TlsTrouble::OldProtocol));
    assert_eq!(outcome.client, Err(TlsTrouble::OldProtocol));
}

#[tokio::test]
async fn other_services_on_the_port_are_named() {
    let pool = Authority::create().unwrap();
    let greetings: [&[u8]; 3] =
        [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"220 smtp ready\r\n"];
    for greeting in greetings {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Endpoint::Tcp(listener.local_addr().unwrap());
        let service = tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            socket.write_all(greeting).await.unwrap();
            let _ = tokio::io::copy(&mut socket, &mut tokio::io::sink()).await;
        });
        let dialled = timeout(PATIENCE, connect(&endpoint, NAME, good_client(&pool).into()));
        match dialled.await.unwrap() {
            Err(DialError::Tls { trouble: TlsTrouble::NotTls, .. }) => {}
            other => panic!("{greeting:?}: {other:?}"),
        }
        service.abort();
    }
}

#[tokio::test]
async fn a_service_that_hangs_up_is_named() {
    let pool = Authority::create().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint::Tcp(listener.local_addr().unwrap());
    let service = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut hello = [0; 5];
        socket.read_exact(&mut hello).await.unwrap();
        socket.shutdown().await.unwrap();
        let _ = tokio::io::copy(&mut socket, &mut tokio::io::sink()).await;
    });
    let dialled = timeout(PATIENCE, connect(&endpoint, NAME, good_client(&pool).into()));
    match dialled.await.unwrap() {
        Err(DialError::Tls { trouble: TlsTrouble::Closed, .. }) => {}
        other => panic!("{other:?}"),
    }
    service.abort();
}

#[tokio::test]
async fn plain_http_to_a_tls_port_is_named_by_the_server() {
    let pool = Authority::create().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let (socket, _) = listener.accept().await.unwrap();
    let refused = TlsAcceptor::from(good_server(&pool)).accept(socket).await.unwrap_err();
    assert_eq!(explained(&refused), TlsTrouble::NotTls);
}

#[test]
fn an_error_without_tls_in_it_explains_nothing() {
    let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
    assert_eq!(explain(&refused), None);
}
