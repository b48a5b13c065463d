//! The knock: tries the way that QEMU's stream will go, before anything is prepared.
//!
//! The destination listens for a moment on a port of the migration range, with the certificate that its QEMU will show; the
//! source connects with the one that its QEMU will show. So a wrong name, a closed port and a bad certificate are told in
//! our words in preflight, and not in QEMU's in the middle of a move. One connection, [`KNOCK_SECONDS`], then the port is
//! free again. Where it cannot listen at all the code says why: the name has no address, or that is another machine's.
//! Nothing of the VM is involved. Called by [`super`] for the controller.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tracing::debug;
use whimbrel_api::agent::{KnockAddress, KnockConnect, KnockListen, Reach};
use whimbrel_api::error::chain;
use whimbrel_api::{ApiError, ErrorCode};
use whimbrel_pki::dial::{DialError, Endpoint, connect};
use whimbrel_pki::identity::qemu_dns_name;
use whimbrel_pki::tls::{client_config, qemu_server_config};
use whimbrel_pki::trouble::explain;

use super::migration_ip;
use crate::host::Host;
use crate::sources;

/// How long the destination waits for the knock, and the source for the answer, in seconds.
const KNOCK_SECONDS: u64 = 4;
/// What the destination says once it knows who knocks: with TLS 1.3 the source learns only by reading whether its own
/// certificate was accepted.
const WELCOME: &[u8] = b"whimbrel\n";
/// What it says instead to one that may not send from where it is: as long.
const FORBIDDEN: &[u8; WELCOME.len()] = b"not here\n";

/// Opens a port of the migration range for one knock by `request.from`.
pub(super) async fn listen(
    host: &Arc<Host>,
    request: KnockListen,
) -> Result<KnockAddress, ApiError> {
    if !sources::may_ever_send(&host.config.migration_sources, &request.from) {
        return Err(sources::refusal(&request.from));
    }
    let ip = address(host, request.listen.as_deref()).await?;
    let (listener, port) = bind(host, ip).await?;
    let tls = qemu_server_config(&host.identity.qemu_server(), request.from.as_str()).map_err(
        |error| ApiError::internal("the certificates of this host cannot be used", &error),
    )?;
    let (at, from) = (Arc::clone(host), request.from.clone());
    tokio::spawn(async move {
        let welcomed = timeout(Duration::from_secs(KNOCK_SECONDS), async {
            let (stream, peer) = listener.accept().await?;
            drop(listener);
            let may_send = sources::may_send(&at.config.migration_sources, &from, peer.ip());
            let said = if may_send { WELCOME } else { FORBIDDEN };
            welcome(stream, TlsAcceptor::from(tls), said).await?;
            if may_send {
                at.migrations.knocks.note(from, peer.ip());
            }
            Ok::<_, std::io::Error>(())
        });
        match welcomed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(from = %request.from, %error, "a knock was refused"),
            Err(_) => debug!(from = %request.from, "nobody knocked"),
        }
    });
    let at = request.listen.unwrap_or_else(|| host.config.migration_host());
    Ok(KnockAddress { host: at, port })
}

/// Where to listen. `not-found`: the name has no address here.
async fn address(host: &Host, named: Option<&str>) -> Result<IpAddr, ApiError> {
    let found = timeout(Duration::from_secs(KNOCK_SECONDS), migration_ip(host, named)).await;
    let found = found.unwrap_or_else(|_| {
        let message = format!("the resolver gave no answer within {KNOCK_SECONDS} s");
        Err(ApiError::new(ErrorCode::NotFound, message))
    });
    found.map_err(|error| ApiError { code: ErrorCode::NotFound, ..error })
}

/// The first free port of the range. `no-resources`: the address is not this host's; `busy`: all ports are taken just now.
async fn bind(host: &Host, ip: IpAddr) -> Result<(TcpListener, u16), ApiError> {
    for port in host.config.migration_port_range() {
        match TcpListener::bind(SocketAddr::new(ip, port)).await {
            Ok(listener) => return Ok((listener, port)),
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable => {
                let message = format!("{ip} is not an address of {}", host.name());
                return Err(ApiError::new(ErrorCode::NoResources, message));
            }
            Err(_) => {}
        }
    }
    let ports = host.config.migration_port_range();
    let message = format!("no port of {}-{} is free on {ip}", ports.start(), ports.end());
    Err(ApiError::new(ErrorCode::Busy, message))
}

/// The name is that of the certificate from here on.
async fn welcome(stream: TcpStream, acceptor: TlsAcceptor, said: &[u8]) -> std::io::Result<()> {
    let mut stream = acceptor.accept(stream).await?;
    stream.write_all(said).await?;
    stream.shutdown().await
}

/// Knocks at the destination's port, and says how far that came.
pub(super) async fn knock(host: &Arc<Host>, request: KnockConnect) -> Result<Reach, ApiError> {
    let KnockAddress { host: name, port } = request.address;
    let found =
        timeout(Duration::from_secs(KNOCK_SECONDS), tokio::net::lookup_host((name.as_str(), port)))
            .await;
    let address = match found {
        Ok(Ok(mut addresses)) => addresses.next(),
        Ok(Err(error)) => return Ok(Reach::Unresolvable { why: format!("{name}: {error}") }),
        Err(_) => {
            return Ok(Reach::Unresolvable {
                why: format!("{name}: no answer within {KNOCK_SECONDS} s"),
            });
        }
    };
    let Some(address) = address else {
        return Ok(Reach::Unresolvable { why: format!("{name} has no address") });
    };
    let tls = client_config(&host.identity.qemu_client()).map_err(|error| {
        ApiError::internal("the certificates of this host cannot be used", &error)
    })?;
    let server = qemu_dns_name(request.to.as_str());
    let knocked = timeout(Duration::from_secs(KNOCK_SECONDS), async {
        let mut stream = connect(&Endpoint::Tcp(address), &server, Arc::new(tls)).await?;
        let mut heard = [0; WELCOME.len()];
        let read = stream.read_exact(&mut heard).await;
        Ok::<_, DialError>(read.map(|_| heard))
    });
    Ok(match knocked.await {
        Ok(Ok(Ok(heard))) if heard == WELCOME => Reach::Open { address },
        Ok(Ok(Ok(heard))) if heard == *FORBIDDEN => Reach::NotAllowed {
            why: "the address that the guest would come from is not in its list".to_owned(),
        },
        Ok(Ok(Ok(_))) => {
            Reach::Untrusted { why: format!("{address} does not speak as a Whimbrel host") }
        }
        Ok(Ok(Err(error))) => match explain(&error) {
            Some(trouble) => Reach::Untrusted { why: format!("{address}: {trouble}") },
            None => Reach::Untrusted {
                why: format!("{address} refused this host's certificate: {error}"),
            },
        },
        Ok(Err(error @ DialError::Tls { .. })) => Reach::Untrusted { why: chain(&error) },
        Ok(Err(error)) => Reach::Closed { why: chain(&error) },
        Err(_) => {
            Reach::Closed { why: format!("{address} did not answer within {KNOCK_SECONDS} s") }
        }
    })
}
