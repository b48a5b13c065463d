//! The destination in an imitated post-copy (see `serving`).

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpListener;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::incoming::{accept, bind};
use super::vm::Vm;

type Connection = (Lines<BufReader<OwnedReadHalf>>, OwnedWriteHalf);

/// `migrate-recover`.
pub(super) fn recover(vm: &Arc<Vm>, arguments: &Value) -> Result<(), String> {
    if vm.state().migration.status != "postcopy-paused" || !vm.options.incoming {
        return Err("Migrate recover can only be run when postcopy is paused.".to_owned());
    }
    vm.state().migration.listener = None;
    let listener = bind(vm, arguments)?;
    vm.state().migration.recover_on = Some(listener);
    vm.ordered.notify_one();
    Ok(())
}

/// Receives the rest, over new connections when one is lost.
pub(super) async fn receive(vm: &Arc<Vm>, connection: Connection) {
    let mut connection = Some(connection);
    loop {
        let current = match connection.take() {
            Some(current) => current,
            None => taken_up(vm).await,
        };
        // An order that came for the connection before this one is done.
        let _ = tokio::time::timeout(Duration::ZERO, vm.pause_ordered.notified()).await;
        vm.migration_becomes("postcopy-active");
        tokio::select! {
            whole = pages(vm, current) => if whole {
                return;
            },
            () = vm.pause_ordered.notified() => {}
        }
        vm.migration_becomes("postcopy-paused");
    }
}

/// Whether everything has come over this connection.
async fn pages(vm: &Arc<Vm>, (mut lines, mut writer): Connection) -> bool {
    while let Ok(Some(line)) = lines.next_line().await {
        vm.guest_passes("postcopy");
        if vm.faults.at("postcopy").await.is_err() {
            return false;
        }
        let line: Value = serde_json::from_str(&line).unwrap_or_default();
        if line["done"] != json!(true) {
            continue;
        }
        vm.state().migration.listener = None;
        vm.migration_becomes("completed");
        // A source that is gone by now does not matter any more.
        let _ = writer.write_all(b"{\"complete\": true}\n").await;
        let _ = lines.next_line().await;
        return true;
    }
    false
}

/// Waits until a source has taken it up again.
async fn taken_up(vm: &Arc<Vm>) -> Connection {
    loop {
        told_to_listen(vm).await;
        let Some(listener) = vm.state().migration.recover_on.take() else { continue };
        let accepted = tokio::select! {
            accepted = resumed(vm, listener) => accepted,
            // Told to listen anew: this one is given up.
            () = told_to_listen(vm) => continue,
        };
        match accepted {
            Ok(connection) => return connection,
            Err(_) => vm.migration_becomes("postcopy-paused"),
        }
    }
}

async fn told_to_listen(vm: &Arc<Vm>) {
    while vm.state().migration.recover_on.is_none() {
        vm.ordered.notified().await;
    }
}

async fn resumed(vm: &Arc<Vm>, listener: TcpListener) -> Result<Connection, String> {
    let (lines, mut writer, hello) = accept(vm, &listener).await?;
    {
        let mut state = vm.state();
        (state.migration.listens_on, state.migration.listener) = (None, Some(listener));
    }
    vm.migration_becomes("postcopy-recover");
    if hello["resume"] != json!(true) {
        return Err("not the migration that was paused".to_owned());
    }
    vm.faults.at("recovering").await.map_err(|refused| refused.to_string())?;
    writer.write_all(b"{\"resumed\": true}\n").await.map_err(|error| error.to_string())?;
    Ok((lines, writer))
}
