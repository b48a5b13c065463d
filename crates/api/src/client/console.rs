//! A VM's serial console over a WebSocket: bytes both ways.

use std::pin::Pin;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use tokio_tungstenite::{WebSocketStream, client_async};
use whimbrel_pki::dial::{self, DialError, Endpoint};

use super::{Caller, Target};
use crate::{ApiError, ErrorCode};

/// How long a server that accepts the connection may take to open the console, in seconds.
const OPEN_SECONDS: u64 = 10;

trait Stream: AsyncRead + AsyncWrite + Send {}
impl<S: AsyncRead + AsyncWrite + Send> Stream for S {}

/// An open console.
pub struct Console {
    socket: WebSocketStream<Pin<Box<dyn Stream>>>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Console")
    }
}

impl Console {
    pub(super) async fn open(caller: &Caller, path: &str) -> Result<Self, ApiError> {
        let stream = connect(caller).await?;
        let url = format!("wss{}{path}", caller.base.strip_prefix("https").unwrap_or(&caller.base));
        let opened = timeout(Duration::from_secs(OPEN_SECONDS), client_async(url, stream)).await;
        match opened.map_err(|_| caller.silent())? {
            Ok((socket, _)) => Ok(Self { socket }),
            Err(WsError::Http(response)) => {
                let body = response.body().as_deref().unwrap_or_default();
                Err(serde_json::from_slice(body).unwrap_or_else(|_| {
                    let message = format!(
                        "{} does not open the console: HTTP {}",
                        caller.who(),
                        response.status()
                    );
                    ApiError::new(ErrorCode::Internal, message)
                }))
            }
            Err(error) => Err(caller.unreachable(&error)),
        }
    }

    /// The next bytes from the guest; `None` at the end.
    pub async fn read(&mut self) -> Option<Vec<u8>> {
        loop {
            match self.socket.next().await?.ok()? {
                Message::Binary(bytes) => return Some(bytes.to_vec()),
                Message::Text(text) => return Some(text.as_bytes().to_vec()),
                Message::Close(_) => return None,
                _ => {}
            }
        }
    }

    /// Sends bytes to the guest; `false` when the console has ended.
    pub async fn write(&mut self, bytes: &[u8]) -> bool {
        self.socket.send(Message::binary(bytes.to_vec())).await.is_ok()
    }
}

/// Connects to the server with TLS, trying each address that its name resolves to.
async fn connect(caller: &Caller) -> Result<Pin<Box<dyn Stream>>, ApiError> {
    let endpoints: Vec<Endpoint> = match &caller.target {
        Target::Unix(path) => vec![Endpoint::Unix(path.clone())],
        Target::Tcp(address) => {
            let found = tokio::net::lookup_host(address).await;
            found.map_err(|error| caller.unreachable(&error))?.map(Endpoint::Tcp).collect()
        }
    };
    let mut failed = None;
    for endpoint in &endpoints {
        match dial::connect(endpoint, &caller.server_name, caller.tls.clone()).await {
            Ok(stream) => return Ok(Box::pin(stream)),
            Err(error) => failed = Some(error),
        }
    }
    Err(match failed {
        Some(DialError::Tls { trouble, .. }) => caller.insecure(trouble),
        Some(error) => caller.unreachable(&error),
        None => ApiError::new(
            ErrorCode::Unreachable,
            format!("{} cannot be found: its name has no address", caller.who()),
        ),
    })
}
