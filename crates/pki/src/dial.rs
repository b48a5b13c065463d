//! The calling side of the door, for connections that no HTTP client makes: WebSockets, streams.
//!
//! An HTTP client takes [`crate::tls::client_config`] itself and dials on its own.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::socket::Socket;
use crate::trouble::{TlsTrouble, explain};

/// How long a connection may take to come about, in seconds, before TLS.
pub const CONNECT_DEADLINE_SECONDS: u64 = 5;
/// How long the TLS handshake may take, in seconds.
pub const HANDSHAKE_DEADLINE_SECONDS: u64 = 10;

/// Where a door is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// At this address.
    Tcp(SocketAddr),
    /// Behind this unix socket (TLS inside all the same).
    Unix(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The name to be proven by the server is no DNS name.
    #[error("{name:?} cannot be the name of a server")]
    BadName {
        /// The name.
        name: String,
    },
    /// Nobody answers there.
    #[error("cannot connect to {endpoint}")]
    Unreachable {
        /// Where.
        endpoint: Endpoint,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection did not come about within [`CONNECT_DEADLINE_SECONDS`].
    #[error("{endpoint} did not answer within {CONNECT_DEADLINE_SECONDS} s")]
    Silent {
        /// Where.
        endpoint: Endpoint,
    },
    /// Somebody answers, but the handshake fails.
    #[error("no secure connection to {name} at {endpoint}: {trouble}")]
    Tls {
        /// Where.
        endpoint: Endpoint,
        /// The name that the server had to prove.
        name: String,
        /// What is wrong, in our words.
        trouble: TlsTrouble,
    },
}

/// Connects and proves that the server is `server_name`.
///
/// With TLS 1.3 the server may still refuse *our* certificate after this returns: the first read
/// then fails, and [`explain`] of that error says why.
pub async fn connect(
    endpoint: &Endpoint,
    server_name: &str,
    config: Arc<ClientConfig>,
) -> Result<TlsStream<Socket>, DialError> {
    let name = ServerName::try_from(server_name.to_owned())
        .map_err(|_| DialError::BadName { name: server_name.to_owned() })?;
    let socket = match timeout(Duration::from_secs(CONNECT_DEADLINE_SECONDS), open(endpoint)).await
    {
        Ok(Ok(socket)) => socket,
        Ok(Err(source)) => {
            return Err(DialError::Unreachable { endpoint: endpoint.clone(), source });
        }
        Err(_) => return Err(DialError::Silent { endpoint: endpoint.clone() }),
    };
    let refused = |trouble| DialError::Tls {
        endpoint: endpoint.clone(),
        name: server_name.to_owned(),
        trouble,
    };
    let handshake = TlsConnector::from(config).connect(name, socket);
    match timeout(Duration::from_secs(HANDSHAKE_DEADLINE_SECONDS), handshake).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(refused(
            explain(&error).unwrap_or_else(|| TlsTrouble::Handshake { what: error.to_string() }),
        )),
        Err(_) => Err(refused(TlsTrouble::TimedOut { seconds: HANDSHAKE_DEADLINE_SECONDS })),
    }
}

async fn open(endpoint: &Endpoint) -> io::Result<Socket> {
    match endpoint {
        Endpoint::Tcp(address) => {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok(Socket::Tcp(stream))
        }
        Endpoint::Unix(path) => Ok(Socket::Unix(UnixStream::connect(path).await?)),
    }
}
