//! A VM's serial console: a WebSocket to the client, another one to the owning agent, bytes in between.
//!
//! Nothing is kept or looked at. The session ends with either side; after a migration the client opens a new one, which goes to
//! the VM's host of then.

use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use whimbrel_api::client::Console;
use whimbrel_api::server::Segment;
use whimbrel_api::{ApiError, ErrorCode};

use super::Shared;

/// Largest message that a client may send, in bytes: a big paste.
const MESSAGE_MAX_BYTES: usize = 64 << 10;

/// Open a VM's serial console: a WebSocket of binary messages, both ways.
#[utoipa::path(get, path = "/vms/{vm}/console", tag = "vms",
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 101, description = "The connection is a WebSocket now")))]
pub(super) async fn open_console(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade = upgrade.map_err(|rejection| {
        ApiError::new(ErrorCode::BadRequest, format!("a console is a WebSocket: {rejection}"))
    })?;
    let row = controller.find_vm(&vm).await?;
    // Before the upgrade, so that the client is told why it gets no console.
    let console = controller.agent(&row.host)?.console(row.id()).await?;
    let upgrade = upgrade.max_message_size(MESSAGE_MAX_BYTES);
    Ok(upgrade.on_upgrade(move |socket| async move {
        tokio::select! {
            () = carry(socket, console) => {}
            () = controller.closing() => {}
        }
    }))
}

async fn carry(mut client: WebSocket, mut console: Console) {
    loop {
        tokio::select! {
            bytes = console.read() => {
                let Some(bytes) = bytes else { break };
                if client.send(Message::Binary(bytes.into())).await.is_err() {
                    return;
                }
            }
            message = client.recv() => {
                let bytes = match message {
                    Some(Ok(Message::Binary(bytes))) => bytes,
                    Some(Ok(Message::Text(text))) => text.into(),
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                };
                if !console.write(&bytes).await {
                    break;
                }
            }
        }
    }
    // The guest's side ended: say so properly. If the client is gone as well, nobody is there to hear it.
    let _ = client.send(Message::Close(None)).await;
}
