//! The HTTPS door of agent and controller: mutual TLS in front of an axum router.
//!
//! ```text
//! accept ─▶ half-open (handshake, deadline) ─▶ admitted (HTTP/1.1, upgrades) ─▶ closed
//!    │            │ too many: the oldest gives way     │ too many: refused
//!    └ never waits for a client
//! ```
//!
//! Each connection is a task of its own, so a silent client delays nobody. Every request carries a
//! [`PeerExtension`] saying who called; what that peer may do is the router's to decide. The door
//! does not bind: callers give it listeners (and care for a unix socket's file and mode).

use std::collections::BTreeMap;
use std::future::{self, Future};
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{debug, error, info, warn};

use crate::identity::{self, Peer};
use crate::socket::{Remote, Socket};
use crate::trouble::{TlsTrouble, explain};

/// Most connections with a finished handshake, WebSockets included.
pub const MAX_CONNECTIONS: usize = 512;
/// Most of those whose client showed no certificate (the join door only).
pub const MAX_ANONYMOUS_CONNECTIONS: usize = 32;
/// Most connections whose handshake is not finished. One more makes the oldest give way, so that
/// silent clients cannot keep honest ones out.
pub const MAX_HALF_OPEN: usize = 256;
/// How long a handshake may take, in seconds.
pub const HANDSHAKE_DEADLINE_SECONDS: u64 = 10;
/// How long a client may take to send a request's head, in seconds; an idle connection is closed
/// after the same time, so HTTP clients should drop theirs a little earlier.
pub const HEAD_DEADLINE_SECONDS: u64 = 30;
/// Longest request head, in bytes.
pub const MAX_HEAD_BYTES: usize = 64 * 1024;
/// How long open connections may go on after the shutdown was asked for, in seconds.
pub const DRAIN_DEADLINE_SECONDS: u64 = 5;

/// How long a refused client may take to read why, in seconds.
const LINGER_SECONDS: u64 = 3;
/// Most bytes of a refused client that are read and thrown away meanwhile.
const LINGER_BYTES: u64 = 64 * 1024;
/// Pause after `accept` failed for want of descriptors or memory, in milliseconds.
const ACCEPT_PAUSE_MILLISECONDS: u64 = 100;

/// A bound, listening socket.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// Unix.
    Unix(UnixListener),
}

/// In the extensions of every request: who called, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerExtension {
    /// The holder of the verified certificate; `None` only at a door made with
    /// [`crate::tls::join_server_config`], for a client that showed none.
    pub peer: Option<Peer>,
    /// Where the connection comes from.
    pub remote: Remote,
}

/// The door's bounds. `Default` gives the constants of this module.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// See [`MAX_CONNECTIONS`].
    pub connections: usize,
    /// See [`MAX_ANONYMOUS_CONNECTIONS`].
    pub anonymous_connections: usize,
    /// See [`MAX_HALF_OPEN`].
    pub half_open: usize,
    /// See [`HANDSHAKE_DEADLINE_SECONDS`].
    pub handshake: Duration,
    /// See [`HEAD_DEADLINE_SECONDS`].
    pub head: Duration,
    /// See [`DRAIN_DEADLINE_SECONDS`].
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: MAX_CONNECTIONS,
            anonymous_connections: MAX_ANONYMOUS_CONNECTIONS,
            half_open: MAX_HALF_OPEN,
            handshake: Duration::from_secs(HANDSHAKE_DEADLINE_SECONDS),
            head: Duration::from_secs(HEAD_DEADLINE_SECONDS),
            drain: Duration::from_secs(DRAIN_DEADLINE_SECONDS),
        }
    }
}

/// A router behind mutual TLS, ready to be served.
#[derive(Clone, Debug)]
pub struct Door {
    router: Router,
    tls: watch::Receiver<Arc<ServerConfig>>,
    limits: Limits,
}

impl Door {
    /// Puts `tls` ([`crate::tls::server_config`] or [`crate::tls::join_server_config`]) in front
    /// of `router`.
    pub fn new(router: Router, tls: Arc<ServerConfig>) -> Self {
        Self::renewable(router, watch::channel(tls).1)
    }

    /// The same with a configuration that may be replaced while the door serves: a handshake takes the one that is there when
    /// it begins, and open connections go on with theirs.
    pub fn renewable(router: Router, tls: watch::Receiver<Arc<ServerConfig>>) -> Self {
        Self { router, tls, limits: Limits::default() }
    }

    /// The same door with other bounds.
    pub fn with_limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// Serves until `shutdown` ends; then takes no more connections, lets open requests finish for
    /// [`Limits::drain`], and closes what is left. Upgraded connections are their handlers' to end.
    pub async fn serve(self, listeners: Vec<Listener>, shutdown: impl Future<Output = ()>) {
        let limits = self.limits;
        let (closing, closed) = watch::channel(());
        let rooms = Arc::new(Rooms {
            router: self.router,
            tls: self.tls,
            limits,
            admitted: Arc::new(Semaphore::new(limits.connections)),
            anonymous: Arc::new(Semaphore::new(limits.anonymous_connections)),
            half_open: HalfOpen::default(),
            closed,
        });
        let mut connections = JoinSet::new();
        let mut shutdown = pin!(shutdown);
        let mut first = 0;
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                Some(ended) = connections.join_next() => note_end(ended),
                accepted = accept_any(&listeners, &mut first) => match accepted {
                    Ok((socket, remote)) => {
                        let evicted = rooms.half_open.enter(limits.half_open);
                        connections.spawn(Arc::clone(&rooms).connection(socket, remote, evicted));
                    }
                    Err(error) => pause_after(&error).await,
                },
            }
        }
        drop(listeners);
        drop(closing);
        let drained = timeout(limits.drain, async {
            while let Some(ended) = connections.join_next().await {
                note_end(ended);
            }
        });
        if drained.await.is_err() {
            info!(left = connections.len(), "closing connections that did not end by themselves");
            connections.shutdown().await;
        }
    }
}

fn note_end(ended: Result<(), tokio::task::JoinError>) {
    if let Err(panicked) = ended {
        error!(error = %panicked, "a request's handler ended abnormally");
    }
}

/// One connection of whichever listener has one, starting with another listener each time.
async fn accept_any(listeners: &[Listener], first: &mut usize) -> io::Result<(Socket, Remote)> {
    future::poll_fn(|cx| {
        for offset in 0..listeners.len() {
            let index = (*first + offset) % listeners.len();
            if let Poll::Ready(accepted) = poll_accept(&listeners[index], cx) {
                *first = index + 1;
                return Poll::Ready(accepted);
            }
        }
        Poll::Pending
    })
    .await
}

fn poll_accept(listener: &Listener, cx: &mut Context<'_>) -> Poll<io::Result<(Socket, Remote)>> {
    match listener {
        Listener::Tcp(listener) => listener.poll_accept(cx).map_ok(|(stream, address)| {
            // Requests are small and their answers awaited: never hold one back to fill a packet.
            if let Err(error) = stream.set_nodelay(true) {
                debug!(%error, "cannot set TCP_NODELAY");
            }
            (Socket::Tcp(stream), Remote::Tcp(address))
        }),
        Listener::Unix(listener) => {
            listener.poll_accept(cx).map_ok(|(stream, _)| (Socket::Unix(stream), Remote::Unix))
        }
    }
}

/// A client that gave up before it was accepted is its own affair; anything else is a shortage,
/// which asking again at once would only worsen.
async fn pause_after(error: &io::Error) {
    match error.kind() {
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset => {
            debug!(%error, "a client left before it was accepted");
        }
        _ => {
            error!(%error, "cannot accept connections");
            sleep(Duration::from_millis(ACCEPT_PAUSE_MILLISECONDS)).await;
        }
    }
}

/// What all connections of one door share.
struct Rooms {
    router: Router,
    tls: watch::Receiver<Arc<ServerConfig>>,
    limits: Limits,
    admitted: Arc<Semaphore>,
    anonymous: Arc<Semaphore>,
    half_open: HalfOpen,
    closed: watch::Receiver<()>,
}

impl Rooms {
    async fn connection(self: Arc<Self>, socket: Socket, remote: Remote, ticket: Ticket) {
        let Ticket { number, mut evicted } = ticket;
        let shaken = tokio::select! {
            shaken = self.handshake(socket) => shaken,
            _ = &mut evicted => {
                warn!(%remote, "refused a connection: too many unfinished handshakes, this is the oldest");
                return;
            }
            () = self.closing() => return,
        };
        self.half_open.leave(number);
        let admitted = shaken.and_then(|stream| self.admit(stream));
        match admitted {
            Ok((stream, peer)) => self.serve_http(stream, PeerExtension { peer, remote }).await,
            Err(refusal) => {
                warn!(%remote, code = refusal.code(), "refused a connection: {refusal}")
            }
        }
    }

    async fn handshake(&self, socket: Socket) -> Result<TlsStream<Socket>, Refusal> {
        let deadline = self.limits.handshake;
        let acceptor = TlsAcceptor::from(Arc::clone(&self.tls.borrow()));
        match timeout(deadline, acceptor.accept(socket).into_fallible()).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err((error, socket))) => {
                linger(socket).await;
                Err(Refusal::Tls(
                    explain(&error)
                        .unwrap_or_else(|| TlsTrouble::Handshake { what: error.to_string() }),
                ))
            }
            Err(_) => Err(Refusal::Tls(TlsTrouble::TimedOut { seconds: deadline.as_secs() })),
        }
    }

    /// Finds out who called and gives the connection its place among the admitted.
    fn admit(
        &self,
        stream: TlsStream<Socket>,
    ) -> Result<(Admitted<TlsStream<Socket>>, Option<Peer>), Refusal> {
        let peer = match stream.get_ref().1.peer_certificates() {
            Some([certificate, ..]) => {
                Some(identity::peer_of(certificate).map_err(Refusal::Identity)?)
            }
            _ => None,
        };
        let place = Arc::clone(&self.admitted).try_acquire_owned();
        let mut places = vec![place.map_err(|_| Refusal::Full)?];
        if peer.is_none() {
            let place = Arc::clone(&self.anonymous).try_acquire_owned();
            places.push(place.map_err(|_| Refusal::FullOfAnonymous)?);
        }
        Ok((Admitted { stream, _places: places }, peer))
    }

    async fn serve_http(&self, stream: Admitted<TlsStream<Socket>>, caller: PeerExtension) {
        let remote = caller.remote;
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(caller.clone());
            TowerToHyperService::new(self.router.clone()).call(request)
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.head)
            .max_buf_size(MAX_HEAD_BYTES)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut connection = pin!(connection);
        let served = tokio::select! {
            served = connection.as_mut() => served,
            () = self.closing() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = served {
            debug!(%remote, %error, "a connection ended early");
        }
    }

    /// Ends when the door is being closed.
    async fn closing(&self) {
        let mut closed = self.closed.clone();
        // The only news on this channel is that its sender is gone.
        while closed.changed().await.is_ok() {}
    }
}

/// Why a connection was not admitted.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("{0}")]
    Tls(TlsTrouble),
    #[error("{0}")]
    Identity(identity::IdentityError),
    #[error("the door has all the connections that it may have")]
    Full,
    #[error("the door has all the connections without a certificate that it may have")]
    FullOfAnonymous,
}

impl Refusal {
    fn code(&self) -> &'static str {
        match self {
            Self::Tls(trouble) => trouble.code(),
            Self::Identity(_) => "tls-no-role",
            Self::Full | Self::FullOfAnonymous => "door-full",
        }
    }
}

/// Lets a refused client read the alert that says why: closing a socket with unread bytes resets
/// the connection, and the client would learn nothing.
async fn linger(mut socket: Socket) {
    let _ = timeout(Duration::from_secs(LINGER_SECONDS), async {
        socket.shutdown().await?;
        tokio::io::copy(&mut (&mut socket).take(LINGER_BYTES), &mut tokio::io::sink()).await
    })
    .await;
}

/// The unfinished handshakes, oldest first.
#[derive(Default)]
struct HalfOpen {
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    by_age: BTreeMap<u64, oneshot::Sender<()>>,
}

/// A place among the unfinished handshakes; `evicted` fires when it is taken away.
struct Ticket {
    number: u64,
    evicted: oneshot::Receiver<()>,
}

impl HalfOpen {
    /// Takes a place, the oldest one's if there are `most` already.
    fn enter(&self, most: usize) -> Ticket {
        let (sender, evicted) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while waiting.by_age.len() >= most.max(1) {
            // Dropping the sender is the message.
            waiting.by_age.pop_first();
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.by_age.insert(number, sender);
        Ticket { number, evicted }
    }

    fn leave(&self, number: u64) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).by_age.remove(&number);
    }
}

/// A stream that holds its places until it is closed, also after an upgrade.
struct Admitted<S> {
    stream: S,
    _places: Vec<OwnedSemaphorePermit>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Admitted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Admitted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
