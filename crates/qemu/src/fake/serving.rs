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

use super::Version;
use super::outgoing::{Connection, End, connect, passes, write_line};
use super::vm::Vm;

/// How long sending what is left takes when nothing else is ordered.
const POSTCOPY_MILLISECONDS: u64 = 50;

/// In how many steps.
const POSTCOPY_STEPS: u64 = 10;

/// Sends the rest, over new connections when one is lost. Ends when the other end has everything.
pub(super) async fn serve(vm: &Arc<Vm>, connection: Connection) -> Result<(), End> {
    let mut connection = Some(connection);
    loop {
        let current = match connection.take() {
            Some(current) => current,
            None => taken_up(vm).await,
        };
        vm.migration_becomes("postcopy-active");
        tokio::select! {
            served = pages(vm, current) => if served.is_ok() {
                return Ok(());
            },
            () = vm.pause_ordered.notified() => {}
        }
        vm.migration_becomes("postcopy-paused");
    }
}

async fn pages(vm: &Arc<Vm>, (mut lines, mut writer): Connection) -> Result<(), End> {
    let all = vm.faults.setting("postcopy-ms", POSTCOPY_MILLISECONDS);
    let total = vm.state().migration.total_bytes;
    let step = (total / POSTCOPY_STEPS).max(1);
    loop {
        passes(vm, "postcopy").await?;
        let sent = vm.state().migration.transferred_bytes;
        if sent >= total {
            break;
        }
        let bytes = step.min(total - sent);
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(all / POSTCOPY_STEPS)) => {}
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

/// Waits for the order to take it up again until that succeeds.
async fn taken_up(vm: &Arc<Vm>) -> Connection {
    loop {
        let address = vm.state().migration.resume_to.take();
        let Some(address) = address else {
            vm.ordered.notified().await;
            continue;
        };
        if vm.version == Version::V10_0 {
            vm.migration_becomes("postcopy-recover-setup");
        }
        match resume(vm, &address).await {
            Ok(connection) => return connection,
            Err(_) => vm.migration_becomes("postcopy-paused"),
        }
    }
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
