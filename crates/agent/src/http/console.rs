//! A VM's console over a WebSocket: binary messages both ways, nothing else is meant by them.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use whimbrel_api::server::Segment;
use whimbrel_api::{ApiError, VmId};

use crate::host::Host;
use crate::vm::console::Reader;

/// Largest message that is read, in bytes.
const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// How often an idle reader is asked whether it is still there, in seconds.
const PING_SECONDS: u64 = 20;

/// `GET /v1/vms/{id}/console`. The refusals come as plain answers, before the upgrade.
pub(super) async fn open(
    State(host): State<Arc<Host>>,
    Segment(id): Segment<VmId>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, ApiError> {
    let reader = host.vms.open_console(id).await?;
    Ok(upgrade.max_message_size(MESSAGE_BYTES_MAX).on_upgrade(move |socket| pass(socket, reader)))
}

async fn pass(mut socket: WebSocket, mut reader: Reader) {
    let memory = std::mem::take(&mut reader.memory);
    if !memory.is_empty() && socket.send(Message::Binary(memory.into())).await.is_err() {
        return;
    }
    loop {
        tokio::select! {
            piece = reader.read() => {
                let Some(piece) = piece else { break };
                if socket.send(Message::Binary(piece.into())).await.is_err() {
                    return;
                }
            }
            message = socket.recv() => {
                let typed: Vec<u8> = match message {
                    Some(Ok(Message::Binary(bytes))) => bytes.to_vec(),
                    Some(Ok(Message::Text(text))) => text.as_bytes().to_vec(),
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                };
                if !reader.write(&typed).await {
                    break;
                }
            }
            () = tokio::time::sleep(Duration::from_secs(PING_SECONDS)) => {
                if socket.send(Message::Ping(Bytes::new())).await.is_err() {
                    return;
                }
            }
        }
    }
    // The console has ended; whether the reader hears of it does not matter.
    let _ = socket.send(Message::Close(None)).await;
}
