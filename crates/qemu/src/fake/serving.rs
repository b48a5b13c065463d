//! The source in an imitated post-copy: pages are sent after the guest, over one connection after
//! another if need be.
//!
//! The stream goes on with `{"package": run state, "left": bytes}` in place of the end, then
//! `{"bytes": n}` as long as memory is left, then `{"done": true}`, which the other end answers
//! with `{"complete": true}`. A connection that takes it up again begins with a greeting of its
//! own, which has `"resume": true` and is answered with `{"resumed": true}`.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::Version;
use super::outgoing::{Connection, End, connect, passes, write_line};
use super::vm::Vm;

/// How long sending what is left takes when nothing else is ordered.
const POSTCOPY_MILLISECONDS: u64 = 50;

/// How often some of it is sent.
const POSTCOPY_STEP_MILLISECONDS: u64 = 5;

/// How it ended.
pub(super) enum Served {
    /// The other end has everything.
    Whole,
    /// A stand-in for the other end has said so.
    TakenBack,
}

/// Sends the rest, over new connections when one is lost. Ends when the other end has everything.
pub(super) async fn serve(vm: &Arc<Vm>, connection: Connection) -> Served {
    let mut connection = Some(connection);
    loop {
        let current = match connection.take() {
            Some(current) => current,
            None => match taken_up(vm).await {
                Some(current) => current,
                None => return Served::TakenBack,
            },
        };
        // An order that came for the connection before this one is done.
        let _ = tokio::time::timeout(Duration::ZERO, vm.pause_ordered.notified()).await;
        vm.migration_becomes("postcopy-active");
        tokio::select! {
            served = pages(vm, current) => if served.is_ok() {
                return Served::Whole;
            },
            () = vm.pause_ordered.notified() => {}
        }
        vm.migration_becomes("postcopy-paused");
    }
}

async fn pages(vm: &Arc<Vm>, (mut lines, mut writer): Connection) -> Result<(), End> {
    let total = vm.state().migration.total_bytes;
    loop {
        passes(vm, "postcopy").await?;
        let all = vm.faults.setting("postcopy-ms", POSTCOPY_MILLISECONDS).max(1);
        let sent = vm.state().migration.transferred_bytes;
        if sent >= total {
            break;
        }
        let step = total.saturating_mul(POSTCOPY_STEP_MILLISECONDS) / all;
        let bytes = step.clamp(1, total - sent);
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(POSTCOPY_STEP_MILLISECONDS)) => {}
            // Nothing is said to a source here: this is the end of the connection.
            _ = lines.next_line() => return Err(lost()),
        }
        write_line(&mut writer, &json!({ "bytes": bytes })).await?;
        let mut state = vm.state();
        state.migration.transferred_bytes += bytes;
        state.migration.postcopy_bytes += bytes;
    }
    write_line(&mut writer, &json!({ "done": true })).await?;
    match lines.next_line().await? {
        Some(line) if line.contains("complete") => Ok(()),
        _ => Err(lost()),
    }
}

fn lost() -> End {
    End::Failed("Channel error: Input/output error".to_owned())
}

/// Waits for the order to take it up again until that succeeds; none if it is over by that.
async fn taken_up(vm: &Arc<Vm>) -> Option<Connection> {
    loop {
        let address = vm.state().migration.resume_to.take();
        let Some(address) = address else {
            vm.ordered.notified().await;
            continue;
        };
        if vm.version == Version::V10_0 {
            vm.migration_becomes("postcopy-recover-setup");
        }
        let taken_up = match address.strip_prefix("unix:") {
            Some(path) => believe(vm, path).await.map(|()| None),
            None => resume(vm, address.trim_start_matches("tcp:")).await.map(Some),
        };
        match taken_up {
            Ok(connection) => return connection,
            Err(_) => vm.migration_becomes("postcopy-paused"),
        }
    }
}

/// Asks a stand-in as a real source does: which pages of its one block have come, and whether to
/// go on.
async fn believe(vm: &Arc<Vm>, path: &str) -> Result<(), End> {
    let mut stream = UnixStream::connect(path).await?;
    vm.migration_becomes("postcopy-recover");
    passes(vm, "recovering").await?;
    stream.write_all(b"\x08\0\x0a\0\x05\x04ram0").await?;
    let mut head = [0; 4 + 5 + 8];
    stream.read_exact(&mut head).await?;
    let mut length = [0; 8];
    length.copy_from_slice(&head[9..]);
    let groups = vm.options.memory_bytes.div_ceil(4096).div_ceil(64);
    if u64::from_be_bytes(length) != groups * 8 {
        return Err(lost());
    }
    let mut pages = vec![0; usize::try_from(groups * 8 + 8).map_err(|_| lost())?];
    stream.read_exact(&mut pages).await?;
    stream.write_all(b"\x08\0\x09\0\0").await?;
    stream.read_exact(&mut [0; 16]).await?;
    vm.migration_becomes("postcopy-active");
    Ok(())
}

async fn resume(vm: &Arc<Vm>, address: &str) -> Result<Connection, End> {
    let (mut lines, writer) = connect(vm, address, true).await?;
    vm.migration_becomes("postcopy-recover");
    passes(vm, "recovering").await?;
    match lines.next_line().await? {
        Some(line) if line.contains("resumed") => Ok((lines, writer)),
        _ => Err(lost()),
    }
}
