//! A pool for tests: an authority, credentials for any role, and loopback listeners.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use whimbrel_pki::authority::{Authority, Role, Validity};
use whimbrel_pki::door::{Door, Limits, Listener};
use whimbrel_pki::key::PrivateKey;
use whimbrel_pki::tls::Credentials;

pub(crate) const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Bound on anything that a test waits for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn credentials(authority: &Authority, role: Role<'_>) -> Credentials {
    let now = SystemTime::now();
    credentials_within(authority, role, Validity::days_from(now, 1))
}

pub(crate) fn credentials_within(
    authority: &Authority,
    role: Role<'_>,
    validity: Validity,
) -> Credentials {
    let key = PrivateKey::generate().unwrap();
    let certificate = authority.issue_within(role, &key.subject().unwrap(), validity).unwrap();
    Credentials { ca: authority.certificate().clone(), certificate, key }
}

pub(crate) fn expired(authority: &Authority, role: Role<'_>, days_ago: u32) -> Credentials {
    let now = SystemTime::now();
    // An hour more than whole days, so that the count does not depend on the test's speed.
    let not_after = now - DAY * days_ago - Duration::from_secs(3600);
    let validity = Validity { not_before: not_after - DAY, not_after };
    credentials_within(authority, role, validity)
}

pub(crate) fn not_yet_valid(authority: &Authority, role: Role<'_>) -> Credentials {
    let now = SystemTime::now();
    credentials_within(
        authority,
        role,
        Validity { not_before: now + DAY, not_after: now + DAY * 2 },
    )
}

/// A door on loopback that serves `router` until dropped.
pub(crate) struct Served {
    pub(crate) port: u16,
    stop: Option<oneshot::Sender<()>>,
    pub(crate) task: JoinHandle<()>,
}

impl Served {
    pub(crate) async fn start(router: Router, tls: Arc<ServerConfig>, limits: Limits) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        Self::on(vec![Listener::Tcp(listener)], port, router, tls, limits)
    }

    pub(crate) fn on(
        listeners: Vec<Listener>,
        port: u16,
        router: Router,
        tls: Arc<ServerConfig>,
        limits: Limits,
    ) -> Self {
        Self::door(listeners, port, Door::new(router, tls).with_limits(limits))
    }

    pub(crate) async fn start_door(door: Door) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        Self::door(vec![Listener::Tcp(listener)], port, door)
    }

    fn door(listeners: Vec<Listener>, port: u16, door: Door) -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(door.serve(listeners, async {
            let _ = stopped.await;
        }));
        Self { port, stop: Some(stop), task }
    }

    pub(crate) fn stop(&mut self) {
        self.stop.take();
    }

    pub(crate) fn address(&self) -> std::net::SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }
}
