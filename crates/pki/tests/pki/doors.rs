//! The door over loopback, called by the HTTP client that the product uses.

use std::error::Error as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::pool::{PATIENCE, Served, credentials, credentials_within, expired};
use axum::Router;
use axum::extract::Extension;
use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::routing::get;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixListener};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use whimbrel_pki::authority::{Authority, Role, Validity};
use whimbrel_pki::dial::{Endpoint, connect};
use whimbrel_pki::door::{Door, Limits, Listener, PeerExtension};
use whimbrel_pki::socket::Socket;
use whimbrel_pki::tls::{self, Credentials};
use whimbrel_pki::trouble::{TlsTrouble, Whose, explain};

const NAME: &str = "host-b.agent.whimbrel";

fn whoami() -> Router {
    Router::new().route(
        "/whoami",
        get(|Extension(caller): Extension<PeerExtension>| async move {
            caller.peer.map_or_else(|| "nobody".to_owned(), |peer| peer.to_string())
        }),
    )
}

/// The HTTP client as the api crate makes it: name in the URL, address by override.
fn http(own: &Credentials, address: SocketAddr) -> reqwest::Client {
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls::client_config(own).unwrap())
        .resolve(NAME, address)
        .no_proxy()
        .timeout(PATIENCE * 4)
        .build()
        .unwrap()
}

async fn ask(client: &reqwest::Client, port: u16) -> reqwest::Result<String> {
    client.get(format!("https://{NAME}:{port}/whoami")).send().await?.text().await
}

async fn agent_door(authority: &Authority, router: Router, limits: Limits) -> Served {
    let own = credentials(authority, Role::AgentServer("host-b"));
    Served::start(router, tls::server_config(&own).unwrap(), limits).await
}

#[tokio::test]
async fn a_request_carries_who_asks() {
    let pool = Authority::create().unwrap();
    let door = agent_door(&pool, whoami(), Limits::default()).await;
    for (role, who) in [
        (Role::AgentClient("host-a"), "the agent of host-a"),
        (Role::ControllerClient, "the controller"),
        (Role::Operator("ann"), "operator ann"),
        (Role::Monitor("prometheus"), "monitor prometheus"),
    ] {
        let client = http(&credentials(&pool, role), door.address());
        assert_eq!(ask(&client, door.port).await.unwrap(), who);
    }
}

#[tokio::test]
async fn a_door_shows_a_renewed_certificate_and_keeps_open_connections() {
    let pool = Authority::create().unwrap();
    let server = |days| {
        let own = credentials_within(&pool, Role::AgentServer("host-b"), days);
        (tls::server_config(&own).unwrap(), own.certificate)
    };
    let now = SystemTime::now();
    let (first, old) = server(Validity::days_from(now, 1));
    let (second, new) = server(Validity::days_from(now, 2));
    let (renewal, current) = watch::channel(first);
    let door = Served::start_door(Door::renewable(whoami(), current)).await;
    let ann = credentials(&pool, Role::Operator("ann"));
    let config = Arc::new(tls::client_config(&ann).unwrap());
    let endpoint = Endpoint::Tcp(door.address());
    let open = async || connect(&endpoint, NAME, config.clone()).await.unwrap();
    let shown = |stream: &tokio_rustls::client::TlsStream<Socket>| {
        stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
    };
    let mut early = open().await;
    assert_eq!(&shown(&early), old.der());
    renewal.send_replace(second);
    assert_eq!(&shown(&open().await), new.der());
    early.write_all(b"GET /whoami HTTP/1.1\r\nhost: b\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    timeout(PATIENCE, early.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.ends_with("operator ann"), "{answer}");
}

#[tokio::test]
async fn the_join_door_lets_nobody_in_as_nobody() {
    let pool = Authority::create().unwrap();
    let own = credentials(&pool, Role::AgentServer("host-b"));
    let config = tls::join_server_config(&own).unwrap();
    let door = Served::start(whoami(), config, Limits::default()).await;
    let newcomer = reqwest::Client::builder()
        .tls_backend_preconfigured(
            tls::join_client_config(pool.certificate().fingerprint()).unwrap(),
        )
        .resolve(NAME, door.address())
        .no_proxy()
        .build()
        .unwrap();
    assert_eq!(ask(&newcomer, door.port).await.unwrap(), "nobody");
    let ann = http(&credentials(&pool, Role::Operator("ann")), door.address());
    assert_eq!(ask(&ann, door.port).await.unwrap(), "operator ann");
}

#[tokio::test]
async fn a_unix_socket_carries_the_same_tls() {
    let pool = Authority::create().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let listener = Listener::Unix(UnixListener::bind(&path).unwrap());
    let own = credentials(&pool, Role::AgentServer("host-b"));
    let config = tls::server_config(&own).unwrap();
    let _door = Served::on(vec![listener], 443, whoami(), config, Limits::default());
    let ann = credentials(&pool, Role::Operator("ann"));
    let client = reqwest::Client::builder()
        .tls_backend_preconfigured(tls::client_config(&ann).unwrap())
        .unix_socket(path.clone())
        .build()
        .unwrap();
    assert_eq!(ask(&client, 443).await.unwrap(), "operator ann");
    // No certificate, no entry: the socket is no way around TLS.
    let plain = reqwest::Client::builder()
        .tls_backend_preconfigured(tls::client_config(&ann).unwrap())
        .unix_socket(path)
        .build()
        .unwrap();
    assert!(plain.get(format!("http://{NAME}/whoami")).send().await.is_err());
}

#[tokio::test]
async fn the_http_client_learns_why_it_was_refused() {
    let pool = Authority::create().unwrap();
    let door = agent_door(&pool, whoami(), Limits::default()).await;
    let other = Authority::create().unwrap();
    let foreign = Credentials {
        ca: pool.certificate().clone(),
        ..credentials(&other, Role::AgentClient("host-a"))
    };
    let cases = [
        (
            expired(&pool, Role::Operator("ann"), 2),
            TlsTrouble::Expired { whose: Whose::Ours, days: None },
        ),
        (foreign, TlsTrouble::UnknownAuthority { whose: Whose::Ours }),
        (
            credentials(&pool, Role::QemuClient("host-a")),
            TlsTrouble::NoRole { whose: Whose::Ours, why: None },
        ),
        (
            credentials(&pool, Role::AgentServer("host-a")),
            TlsTrouble::WrongPurpose { whose: Whose::Ours },
        ),
    ];
    for (own, expected) in cases {
        // Several times: the alert races with the client's request and must never be lost.
        for _ in 0..10 {
            let error = ask(&http(&own, door.address()), door.port).await.unwrap_err();
            assert_eq!(explain(&error), Some(expected.clone()), "{error:?}");
        }
    }
}

#[tokio::test]
async fn a_refused_client_that_is_still_sending_can_read_why() {
    let pool = Authority::create().unwrap();
    let door = agent_door(&pool, whoami(), Limits::default()).await;
    let own = expired(&pool, Role::Operator("ann"), 2);
    let config = Arc::new(tls::client_config(&own).unwrap());
    let mut stream = connect(&Endpoint::Tcp(door.address()), NAME, config).await.unwrap();
    stream.write_all(&[b'x'; 1024]).await.unwrap();
    stream.flush().await.unwrap();
    // By now the door has refused; had it closed with our bytes unread, the next write would fail.
    sleep(Duration::from_millis(200)).await;
    for _ in 0..3 {
        stream.write_all(&[b'x'; 1024]).await.unwrap();
        stream.flush().await.unwrap();
        sleep(Duration::from_millis(20)).await;
    }
    let error = stream.read_u8().await.unwrap_err();
    let expected = TlsTrouble::Expired { whose: Whose::Ours, days: None };
    assert_eq!(explain(&error), Some(expected));
}

#[tokio::test]
async fn the_http_client_says_what_is_wrong_with_the_server() {
    let pool = Authority::create().unwrap();
    let own = credentials(&pool, Role::AgentServer("host-c"));
    let config = tls::server_config(&own).unwrap();
    let door = Served::start(whoami(), config, Limits::default()).await;
    let client = http(&credentials(&pool, Role::Operator("ann")), door.address());
    let error = ask(&client, door.port).await.unwrap_err();
    match explain(&error) {
        Some(TlsTrouble::WrongName { whose: Whose::Theirs, got, .. }) => {
            assert_eq!(got, ["host-c.agent.whimbrel"]);
        }
        other => panic!("{other:?} from {error:?}"),
    }
}

#[tokio::test]
async fn silent_clients_are_dropped_and_hold_nobody_up() {
    let pool = Authority::create().unwrap();
    let limits = Limits { handshake: Duration::from_millis(500), ..Limits::default() };
    let door = agent_door(&pool, whoami(), limits).await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(TcpStream::connect(door.address()).await.unwrap());
    }
    let client = http(&credentials(&pool, Role::ControllerClient), door.address());
    assert_eq!(ask(&client, door.port).await.unwrap(), "the controller");
    for mut stream in silent {
        let mut byte = [0];
        // Closed by the door's deadline: the end of the stream, or a reset.
        let read = timeout(PATIENCE, stream.read(&mut byte)).await.expect("still open");
        assert!(matches!(read, Ok(0) | Err(_)));
    }
}

#[tokio::test]
async fn a_flood_of_unfinished_handshakes_does_not_shut_honest_clients_out() {
    let pool = Authority::create().unwrap();
    // The deadline never helps here: only the eviction of the oldest does.
    let limits = Limits { handshake: PATIENCE * 10, half_open: 8, ..Limits::default() };
    let door = agent_door(&pool, whoami(), limits).await;
    let mut flood = Vec::new();
    for _ in 0..40 {
        flood.push(TcpStream::connect(door.address()).await.unwrap());
    }
    let client = http(&credentials(&pool, Role::ControllerClient), door.address());
    assert_eq!(ask(&client, door.port).await.unwrap(), "the controller");
    let mut byte = [0];
    let oldest = timeout(PATIENCE, flood[0].read(&mut byte)).await.expect("not evicted");
    assert!(matches!(oldest, Ok(0) | Err(_)));
}

#[tokio::test]
async fn the_number_of_connections_is_bounded() {
    let pool = Authority::create().unwrap();
    let limits = Limits { connections: 2, ..Limits::default() };
    let door = agent_door(&pool, whoami(), limits).await;
    let own = credentials(&pool, Role::ControllerClient);
    let config = Arc::new(tls::client_config(&own).unwrap());
    let endpoint = Endpoint::Tcp(door.address());
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = connect(&endpoint, NAME, config.clone()).await.unwrap();
        // A whole request, so that the connection is known to be admitted.
        stream.write_all(b"GET /whoami HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        assert_ne!(timeout(PATIENCE, stream.read(&mut [0; 16])).await.unwrap().unwrap(), 0);
        held.push(stream);
    }
    let client = http(&own, door.address());
    assert!(ask(&client, door.port).await.is_err());
    held.pop();
    // The place is free once the door has seen the close: soon, not at once.
    let freed = async {
        while ask(&client, door.port).await.is_err() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, freed).await.expect("the place was not freed");
}

#[tokio::test]
async fn nobodies_have_a_bound_of_their_own() {
    let pool = Authority::create().unwrap();
    let own = credentials(&pool, Role::AgentServer("host-b"));
    let config = tls::join_server_config(&own).unwrap();
    let limits = Limits { anonymous_connections: 1, ..Limits::default() };
    let door = Served::start(whoami(), config, limits).await;
    let config = Arc::new(tls::join_client_config(pool.certificate().fingerprint()).unwrap());
    let endpoint = Endpoint::Tcp(door.address());
    let mut first = connect(&endpoint, NAME, config.clone()).await.unwrap();
    first.write_all(b"GET /whoami HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert_ne!(timeout(PATIENCE, first.read(&mut [0; 16])).await.unwrap().unwrap(), 0);
    let mut second = connect(&endpoint, NAME, config).await.unwrap();
    let read = timeout(PATIENCE, second.read(&mut [0; 16])).await.unwrap();
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    let member = http(&credentials(&pool, Role::Operator("ann")), door.address());
    assert_eq!(ask(&member, door.port).await.unwrap(), "operator ann");
}

#[tokio::test]
async fn a_slow_request_head_is_cut_off() {
    let pool = Authority::create().unwrap();
    let limits = Limits { head: Duration::from_millis(300), ..Limits::default() };
    let door = agent_door(&pool, whoami(), limits).await;
    let own = credentials(&pool, Role::ControllerClient);
    let config = Arc::new(tls::client_config(&own).unwrap());
    let mut stream = connect(&Endpoint::Tcp(door.address()), NAME, config).await.unwrap();
    stream.write_all(b"GET /whoami HTTP/1.1\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("still open");
}

#[tokio::test]
async fn a_slow_answer_is_not_a_slow_request() {
    let pool = Authority::create().unwrap();
    let limits = Limits { head: Duration::from_millis(100), ..Limits::default() };
    let slow = get(|| async {
        sleep(Duration::from_millis(400)).await;
        "at last"
    });
    let door = agent_door(&pool, Router::new().route("/whoami", slow), limits).await;
    let client = http(&credentials(&pool, Role::ControllerClient), door.address());
    // Twice, over one connection: the second head is awaited from the first answer on.
    for _ in 0..2 {
        assert_eq!(ask(&client, door.port).await.unwrap(), "at last");
    }
}

#[tokio::test]
async fn a_websocket_goes_through_and_counts_as_a_connection() {
    let pool = Authority::create().unwrap();
    let echo = whoami().route(
        "/echo",
        get(|upgrade: WebSocketUpgrade| async {
            upgrade.on_upgrade(|mut socket| async move {
                while let Some(Ok(Message::Text(text))) = socket.recv().await {
                    if socket.send(Message::Text(text)).await.is_err() {
                        break;
                    }
                }
            })
        }),
    );
    let limits = Limits { connections: 1, ..Limits::default() };
    let door = agent_door(&pool, echo, limits).await;
    let own = credentials(&pool, Role::Operator("ann"));
    let config = Arc::new(tls::client_config(&own).unwrap());
    let stream = connect(&Endpoint::Tcp(door.address()), NAME, config).await.unwrap();
    let (mut socket, _) =
        tokio_tungstenite::client_async(format!("wss://{NAME}/echo"), stream).await.unwrap();
    let (sent, heard) = one_echo(&mut socket).await;
    assert_eq!(sent, heard);
    assert!(ask(&http(&own, door.address()), door.port).await.is_err());
}

async fn one_echo<S>(socket: &mut tokio_tungstenite::WebSocketStream<S>) -> (String, String)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    use futures::{SinkExt as _, StreamExt as _};
    use tokio_tungstenite::tungstenite::Message;
    let sent = "hello".to_owned();
    socket.send(Message::text(sent.clone())).await.unwrap();
    let heard = timeout(PATIENCE, socket.next()).await.unwrap().unwrap().unwrap();
    (sent, heard.into_text().unwrap().to_string())
}

#[tokio::test]
async fn shutdown_lets_a_request_finish_and_takes_no_more() {
    let pool = Authority::create().unwrap();
    let (entered, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let router = Router::new().route("/whoami", {
        let (entered, go) = (entered.clone(), go.clone());
        get(move || async move {
            entered.notify_one();
            go.notified().await;
            "done"
        })
    });
    let mut door = agent_door(&pool, router, Limits { drain: PATIENCE, ..Limits::default() }).await;
    let client = http(&credentials(&pool, Role::ControllerClient), door.address());
    let port = door.port;
    let asked = tokio::spawn({
        let client = client.clone();
        async move { ask(&client, port).await }
    });
    timeout(PATIENCE, entered.notified()).await.unwrap();
    door.stop();
    let refused = async {
        while TcpStream::connect(door.address()).await.is_ok() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, refused).await.expect("the door still accepts");
    go.notify_one();
    assert_eq!(asked.await.unwrap().unwrap(), "done");
    timeout(PATIENCE, &mut door.task).await.expect("the door does not end").unwrap();
}

#[tokio::test]
async fn shutdown_ends_what_does_not_end_by_itself() {
    let pool = Authority::create().unwrap();
    let router = Router::new().route("/whoami", get(std::future::pending::<String>));
    let limits = Limits { drain: Duration::from_millis(200), ..Limits::default() };
    let mut door = agent_door(&pool, router, limits).await;
    let client = http(&credentials(&pool, Role::ControllerClient), door.address());
    let port = door.port;
    let asked = tokio::spawn(async move { ask(&client, port).await });
    sleep(Duration::from_millis(200)).await;
    door.stop();
    timeout(PATIENCE, &mut door.task).await.expect("the door does not end").unwrap();
    let error = asked.await.unwrap().unwrap_err();
    assert!(error.source().is_some());
}
