//! How fast the way to another host is: a short burst of nothing, on the way that a guest's memory would go.
//!
//! ```text
//!   controller ── LinkRequest ──▶ source ── LinkListen ──▶ destination     (agents' doors)
//!                                 source ════ ticket ════▶ a port of the migration range, for one connection
//!                                        ◀═══ 1 byte ════
//!                                        ◀═ 1 byte each ═▶   [ROUNDS] times: the round trip
//!                                        ═════ zeros ════▶   until PROBE_BYTES_MAX are sent, or the destination has
//!                                        ◀══ what came ═══   counted for PROBE_MS
//! ```
//!
//! The destination counts, since only there it shows how fast bytes arrive; and not from the beginning, which goes faster
//! (a shaper's burst) or slower (TCP's slow start) than the way is: see [`BEGINNING_MS`]. By default all goes through mutual
//! TLS with the certificates of both QEMUs, as the stream does; without, the ticket, which came through the agents' doors,
//! is all that is asked of the sender, who can do no more than send what is thrown away.
//!
//! A host sends or receives one probe at a time. Results are kept for [`LINK_FRESH_SECONDS`]. What a result means is not
//! decided here; whether the port can be reached at all, and why not, the knock tells better.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use whimbrel_api::measure::{
    LINK_CAP_BYTES_PER_S_MIN, LINK_FRESH_SECONDS, LinkAddress, LinkListen, LinkMeasure, LinkReport,
    LinkRequest,
};
use whimbrel_api::{ApiError, ErrorCode, Name};
use whimbrel_pki::identity::qemu_dns_name;
use whimbrel_pki::tls::{client_config, qemu_server_config};
use whimbrel_pki::token::Secret;
use whimbrel_pki::trouble::explain;

use super::in_range;
use crate::host::Host;
use crate::in_hand::Hold;

/// Most bytes of a probe.
const PROBE_BYTES_MAX: u64 = 32 << 20;
/// How long the destination counts, in milliseconds, what does not count included.
const PROBE_MS: u64 = 250;
/// What comes this long after the first byte does not count, in milliseconds: a shaper's burst goes at once, and TCP finds
/// its pace.
const BEGINNING_MS: u64 = 50;
/// On a way that is faster than 170 MB/s the beginning is over after so many bytes.
const BEGINNING_BYTES_MAX: u64 = 8 << 20;
/// Round trips that are tried; the shortest counts.
const ROUNDS: u32 = 8;
/// How long a connection, and how long a whole probe may take, in seconds.
const CONNECT_SECONDS: u64 = 4;
/// See [`CONNECT_SECONDS`].
const PROBE_SECONDS: u64 = 8;
/// How long the destination waits for the source to hang up, in milliseconds: bytes that still come would break off the
/// answer.
const HANG_UP_MS: u64 = 1_000;
/// Bytes written and read at a time.
const CHUNK_BYTES: usize = 128 << 10;
/// How many chunks a second are sent under a cap, at least.
const CAPPED_CHUNKS_PER_S: u64 = 50;
/// Under a cap, a way that carries this share of it, in percent, was held back by nothing else.
const CAP_REACHED_PERCENT: u64 = 90;
/// Length of a ticket: 256 bits in text.
const TICKET_BYTES: usize = 43;
/// What the destination says to a ticket, and to each round.
const HEARD: u8 = b'w';
/// Most results that are kept.
const RESULTS_MAX: usize = 256;

/// The name that is held while a probe goes on.
const IN_HAND: &str = "link probe";

/// The results of this host's probes.
#[derive(Debug, Default)]
pub struct Links {
    results: Mutex<HashMap<Way, (Instant, LinkReport)>>,
}

/// What a result is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Way {
    to: Name,
    tls: bool,
    max_bytes_per_s: Option<u64>,
}

impl Links {
    fn fresh(&self, way: &Way) -> Option<LinkReport> {
        let results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, report) = results.get(way)?;
        let age = at.elapsed();
        let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        let fresh = age <= Duration::from_secs(LINK_FRESH_SECONDS);
        fresh.then(|| LinkReport { age_ms, ..report.clone() })
    }

    fn keep(&self, way: Way, report: LinkReport) {
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        results.retain(|_, (at, _)| at.elapsed() <= Duration::from_secs(LINK_FRESH_SECONDS));
        if results.len() < RESULTS_MAX {
            results.insert(way, (Instant::now(), report));
        }
    }
}

/// How fast the way from here to another host is; a fresh result is told again.
///
/// # Errors
/// `out-of-range`; `busy` where another probe goes on here or there; `unreachable` where the way is not open, with what
/// stands in it.
pub async fn measure(host: &Host, request: LinkRequest) -> Result<LinkReport, ApiError> {
    if let Some(cap) = request.max_bytes_per_s {
        in_range("max_bytes_per_s", cap, LINK_CAP_BYTES_PER_S_MIN, u64::MAX)?;
    }
    let LinkRequest { to, agent, tls, anew, max_bytes_per_s } = request;
    let way = Way { to, tls, max_bytes_per_s };
    if let Some(known) = host.links.fresh(&way).filter(|_| !anew) {
        return Ok(known);
    }
    let _alone = host.in_hand.wait_alone(IN_HAND).await?;
    // Whoever waited for a probe of the same way has its result.
    if let Some(known) = host.links.fresh(&way).filter(|_| !anew) {
        return Ok(known);
    }
    let listen = LinkListen { from: host.name().clone(), tls };
    let address = host.agent_client(&way.to, &agent)?.link_listen(&listen).await?;
    let probe = timeout(Duration::from_secs(PROBE_SECONDS), probe(host, &way, &address)).await;
    let failed = |why: String| {
        let LinkAddress { host: name, port, .. } = &address;
        let message = format!("the way to {name}:{port} was not measured: {why}");
        ApiError::new(ErrorCode::Unreachable, message)
    };
    let report = probe.map_err(|_| failed(format!("no end within {PROBE_SECONDS} s")))?.map_err(
        |error| match explain(&error) {
            Some(trouble) => failed(trouble.to_string()),
            None => failed(error.to_string()),
        },
    )?;
    host.links.keep(way, report.clone());
    Ok(report)
}

/// What goes through TLS or not.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// The source's side.
async fn probe(host: &Host, way: &Way, address: &LinkAddress) -> io::Result<LinkReport> {
    let at = (address.host.as_str(), address.port);
    let connect = timeout(Duration::from_secs(CONNECT_SECONDS), TcpStream::connect(at));
    let socket = connect.await.map_err(|_| io::ErrorKind::TimedOut)??;
    socket.set_nodelay(true)?;
    // What has not been sent when the answer is there is of no use to anybody.
    socket.set_zero_linger()?;
    let mut stream: Box<dyn Stream> = if way.tls {
        let tls = client_config(&host.identity.qemu_client()).map_err(io::Error::other)?;
        let name =
            ServerName::try_from(qemu_dns_name(way.to.as_str())).map_err(io::Error::other)?;
        Box::new(TlsConnector::from(Arc::new(tls)).connect(name, socket).await?)
    } else {
        Box::new(socket)
    };
    let (rtt, arrived) = send(&mut stream, &address.ticket, way.max_bytes_per_s).await?;
    Ok(report(way, rtt, arrived))
}

fn report(way: &Way, rtt: Duration, arrived: Arrived) -> LinkReport {
    let Arrived { bytes, us } = arrived;
    let per_s = u128::from(bytes) * 1_000_000 / u128::from(us.max(1));
    let bytes_per_s = u64::try_from(per_s).unwrap_or(u64::MAX);
    let reached = |cap: u64| bytes_per_s >= cap / 100 * CAP_REACHED_PERCENT;
    LinkReport {
        measure: LinkMeasure {
            bytes_per_s,
            at_least: way.max_bytes_per_s.is_some_and(reached),
            rtt_us: u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX),
        },
        tls: way.tls,
        counted_bytes: bytes,
        counted_us: us,
        age_ms: 0,
    }
}

/// Shows the ticket, tries the round trip, and sends until the destination says what has arrived.
async fn send<S: Stream + ?Sized>(
    stream: &mut S,
    ticket: &str,
    cap: Option<u64>,
) -> io::Result<(Duration, Arrived)> {
    stream.write_all(ticket.as_bytes()).await?;
    stream.flush().await?;
    heard(stream).await?;
    let mut rtt = Duration::MAX;
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        stream.write_all(&[HEARD]).await?;
        stream.flush().await?;
        heard(stream).await?;
        rtt = rtt.min(begun.elapsed());
    }
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sending = async {
        pump(&mut writer, cap).await?;
        writer.shutdown().await
    };
    let mut answer = [0; Arrived::BYTES];
    let mut reading = pin!(reader.read_exact(&mut answer));
    tokio::select! {
        read = &mut reading => drop(read?),
        // All is sent; or it could not be, since the destination has answered and hung up.
        _ = sending => drop(reading.await?),
    }
    Ok((rtt, Arrived::from_bytes(answer)))
}

/// Sends zeros, no more than [`PROBE_BYTES_MAX`] and no faster than the cap.
async fn pump<W: AsyncWrite + Unpin>(writer: &mut W, cap: Option<u64>) -> io::Result<()> {
    let chunk = match cap {
        Some(cap) => {
            usize::try_from(cap / CAPPED_CHUNKS_PER_S).unwrap_or(usize::MAX).min(CHUNK_BYTES)
        }
        None => CHUNK_BYTES,
    };
    let zeros = vec![0; chunk];
    let begun = Instant::now();
    let mut sent = 0;
    while sent < PROBE_BYTES_MAX {
        writer.write_all(&zeros).await?;
        sent += zeros.len() as u64;
        if let Some(cap) = cap {
            writer.flush().await?;
            sleep_until(begun + Duration::from_secs_f64(sent as f64 / cap as f64)).await;
        }
    }
    Ok(())
}

async fn heard<S: Stream + ?Sized>(stream: &mut S) -> io::Result<()> {
    match stream.read_u8().await? {
        HEARD => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "no Whimbrel host answers there")),
    }
}

/// Opens a port of the migration range for one probe by `request.from`.
///
/// # Errors
/// `busy` where another probe goes on; `no-resources` where no port is free.
pub async fn listen(host: &Host, request: LinkListen) -> Result<LinkAddress, ApiError> {
    // Two hosts that would measure each other must not wait for each other.
    let alone = host.in_hand.hold_alone(IN_HAND).ok_or_else(|| {
        ApiError::new(
            ErrorCode::Busy,
            format!("host {} has another link probe in hand", host.name()),
        )
        .hint("try again in a moment")
    })?;
    let name = host.config.migration_host();
    let resolved = tokio::net::lookup_host((name.as_str(), 0)).await;
    let ip = resolved.ok().and_then(|mut found| found.next()).map(|found| found.ip());
    let ports = host.config.migration_port_range();
    let mut bound = None;
    for port in ports.clone() {
        let Some(ip) = ip else { break };
        if let Ok(listener) = TcpListener::bind(SocketAddr::new(ip, port)).await {
            bound = Some((listener, port));
            break;
        }
    }
    let Some((listener, port)) = bound else {
        let message = format!("no port of {}-{} is free on {name}", ports.start(), ports.end());
        return Err(ApiError::new(ErrorCode::NoResources, message));
    };
    let failed = |error: &dyn std::error::Error| ApiError::internal("a port was not opened", error);
    let tls = if request.tls {
        let own = host.identity.qemu_server();
        let tls = qemu_server_config(&own, request.from.as_str());
        Some(TlsAcceptor::from(tls.map_err(|error| failed(&error))?))
    } else {
        None
    };
    let ticket = Secret::generate().map_err(|error| failed(&error))?.to_text();
    tokio::spawn(receive(listener, tls, ticket.clone(), request.from, alone));
    Ok(LinkAddress { host: name, port, ticket })
}

/// The destination's side.
async fn receive(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    ticket: String,
    from: Name,
    _alone: Hold,
) {
    let probe = timeout(Duration::from_secs(PROBE_SECONDS), async {
        let waited = timeout(Duration::from_secs(CONNECT_SECONDS), listener.accept()).await;
        let (socket, _) = waited.map_err(|_| io::ErrorKind::TimedOut)??;
        drop(listener);
        socket.set_nodelay(true)?;
        match tls {
            Some(tls) => answer(&mut tls.accept(socket).await?, &ticket).await,
            None => answer(&mut { socket }, &ticket).await,
        }
    });
    match probe.await {
        Ok(Ok(arrived)) => tracing::debug!(%from, ?arrived, "received a link probe"),
        Ok(Err(error)) => tracing::debug!(%from, %error, "a link probe broke off"),
        Err(_) => tracing::debug!(%from, "a link probe did not come to an end"),
    }
}

async fn answer<S: Stream + ?Sized>(stream: &mut S, ticket: &str) -> io::Result<Arrived> {
    let mut shown = [0; TICKET_BYTES];
    stream.read_exact(&mut shown).await?;
    // Good for one connection only, so what the comparison's time tells is of no use.
    if shown != ticket.as_bytes() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the ticket is wrong"));
    }
    stream.write_all(&[HEARD]).await?;
    stream.flush().await?;
    for _ in 0..ROUNDS {
        heard(stream).await?;
        stream.write_all(&[HEARD]).await?;
        stream.flush().await?;
    }
    let mut buffer = vec![0; CHUNK_BYTES];
    let arrived = count(stream, &mut buffer).await?;
    stream.write_all(&arrived.to_bytes()).await?;
    stream.flush().await?;
    let hung_up = async { while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {} };
    let _ = timeout(Duration::from_millis(HANG_UP_MS), pin!(hung_up)).await;
    Ok(arrived)
}

/// Counts what arrives, without the beginning, for [`PROBE_MS`] or until the end.
async fn count<S: Stream + ?Sized>(stream: &mut S, buffer: &mut [u8]) -> io::Result<Arrived> {
    let mut all = stream.read(buffer).await? as u64;
    let first = Instant::now();
    let until = first + Duration::from_millis(PROBE_MS);
    // Where counting begins, and what has come last.
    let mut from = None;
    let mut last = (first, all);
    while let Ok(read) = timeout_at(until, stream.read(buffer)).await {
        let read = read?;
        if read == 0 {
            break;
        }
        all += read as u64;
        last = (Instant::now(), all);
        let beginning = last.0 - first < Duration::from_millis(BEGINNING_MS);
        if !beginning || all >= BEGINNING_BYTES_MAX {
            from.get_or_insert(last);
        }
    }
    Ok(Arrived::between(from.unwrap_or((first, 0)), last))
}

/// What has arrived in which time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Arrived {
    bytes: u64,
    us: u64,
}

impl Arrived {
    /// On the wire: both numbers, high byte first.
    const BYTES: usize = 16;

    fn between(from: (Instant, u64), to: (Instant, u64)) -> Self {
        let us = u64::try_from((to.0 - from.0).as_micros()).unwrap_or(u64::MAX);
        Self { bytes: to.1 - from.1, us }
    }

    fn to_bytes(self) -> [u8; Self::BYTES] {
        ((u128::from(self.bytes) << 64) | u128::from(self.us)).to_be_bytes()
    }

    fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        let both = u128::from_be_bytes(bytes);
        let half = |number: u128| u64::try_from(number & u128::from(u64::MAX)).unwrap_or(0);
        Self { bytes: half(both >> 64), us: half(both) }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    async fn through_a_pipe(
        shown: &'static str,
        cap: Option<u64>,
    ) -> (io::Result<(Duration, Arrived)>, io::Result<Arrived>) {
        let (mut here, mut there) = duplex(CHUNK_BYTES);
        let answering = tokio::spawn(async move {
            let ticket = "t".repeat(TICKET_BYTES);
            answer(&mut there, &ticket).await
        });
        let sent = send(&mut here, shown, cap).await;
        drop(here);
        (sent, answering.await.unwrap())
    }

    const TICKET: &str = "ttttttttttttttttttttttttttttttttttttttttttt";

    #[tokio::test]
    async fn both_sides_agree_on_what_arrived() {
        let (sent, arrived) = through_a_pipe(TICKET, None).await;
        let (_, told) = sent.unwrap();
        assert_eq!(told, arrived.unwrap());
        assert!(told.bytes > 0 && told.bytes <= PROBE_BYTES_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cap_is_kept_and_told() {
        let cap = 1_000_000;
        let (_, told) = through_a_pipe(TICKET, Some(cap)).await.0.unwrap();
        let way = Way { to: "b".parse().unwrap(), tls: false, max_bytes_per_s: Some(cap) };
        let report = report(&way, Duration::from_millis(1), told);
        let rate = report.measure.bytes_per_s;
        assert!((900_000..=1_100_000).contains(&rate) && report.measure.at_least, "{report:?}");
        assert_eq!(report.measure.rtt_us, 1000);
    }

    /// Gives what a shaper gives: a burst at once, then chunks at a pace.
    #[tokio::test(start_paused = true)]
    async fn the_beginning_does_not_count() {
        let (mut here, mut there) = duplex(4 << 20);
        let sending = tokio::spawn(async move {
            here.write_all(&vec![0; 2_000_000]).await.unwrap();
            loop {
                tokio::time::sleep(Duration::from_millis(1)).await;
                if here.write_all(&[0; 1_000]).await.is_err() {
                    return;
                }
            }
        });
        let arrived = count(&mut there, &mut vec![0; CHUNK_BYTES]).await.unwrap();
        drop(there);
        sending.await.unwrap();
        let way = Way { to: "b".parse().unwrap(), tls: false, max_bytes_per_s: None };
        let rate = report(&way, Duration::ZERO, arrived).measure.bytes_per_s;
        assert!((950_000..=1_050_000).contains(&rate), "{rate}: {arrived:?}");
    }

    #[tokio::test]
    async fn a_wrong_ticket_gets_no_word() {
        let wrong = "uuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuu";
        let (sent, arrived) = through_a_pipe(wrong, None).await;
        assert_eq!(arrived.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(sent.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_arrived_reads_as_it_was_written() {
        let arrived = Arrived { bytes: u64::MAX - 3, us: 250_017 };
        assert_eq!(Arrived::from_bytes(arrived.to_bytes()), arrived);
    }
}
