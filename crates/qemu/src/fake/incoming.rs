//! The destination's side of an imitated migration.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpListener;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::vm::Vm;
use super::{outgoing, receiving, state_file, tls};
use crate::machine::RunState;

/// `migrate-incoming`.
pub(super) fn listen(vm: &Arc<Vm>, arguments: &Value) -> Result<(), String> {
    if vm.state().run_state != RunState::InMigrate {
        return Err("'-incoming' was not specified on the command line".to_owned());
    }
    if !vm.state().migration.status.is_empty() {
        return Err("The incoming migration has already been started".to_owned());
    }
    let stays = arguments["exit-on-error"] == json!(false);
    vm.migration_becomes("setup");
    if let Some(file) = state_file::of(vm, arguments, true)? {
        state_file::restore(vm, file, stays);
        return Ok(());
    }
    let listener = bind(vm, arguments)?;
    let vm = Arc::clone(vm);
    tokio::spawn(async move {
        if let Err(reason) = receive(&vm, listener).await {
            fail(&vm, reason, stays);
        }
    });
    Ok(())
}

/// Listens on the first free port of a range.
pub(super) fn bind(vm: &Vm, arguments: &Value) -> Result<TcpListener, String> {
    let uri = arguments["uri"].as_str().and_then(|uri| uri.strip_prefix("tcp:"));
    let (first, last) =
        uri.and_then(|uri| uri.split_once(",to=")).ok_or("unknown migration protocol")?;
    let first: SocketAddr = first.parse().map_err(|_| "invalid address".to_owned())?;
    let last: u16 = last.parse().map_err(|_| "invalid port".to_owned())?;
    let mut ports = first.port()..=last;
    let bound = ports
        .find_map(|port| std::net::TcpListener::bind(SocketAddr::new(first.ip(), port)).ok())
        .ok_or("Failed to find an available port: Address already in use")?;
    bound.set_nonblocking(true).map_err(|error| error.to_string())?;
    let listener = TcpListener::from_std(bound).map_err(|error| error.to_string())?;
    vm.state().migration.listens_on = listener.local_addr().ok();
    Ok(listener)
}

/// What a QEMU does that can not load: it ends, unless told to stay.
pub(super) fn fail(vm: &Vm, reason: String, stays: bool) {
    complain(&format!("load of migration failed: {reason}"));
    if stays {
        vm.state().migration.error = Some(reason);
        vm.migration_becomes("failed");
    } else {
        std::process::exit(1);
    }
}

async fn receive(vm: &Arc<Vm>, listener: TcpListener) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    let (mut lines, mut writer, hello) = accept(vm, &listener).await?;
    {
        let mut state = vm.state();
        state.migration.listens_on = None;
        let stays = state.capabilities.contains("postcopy-ram");
        state.migration.listener = Some(listener).filter(|_| stays);
    }
    vm.migration_becomes("active");
    vm.faults.at("accepted").await.map_err(|refused| refused.to_string())?;
    check_shape(vm, &hello)?;
    if hello["stream"] != outgoing::stream(vm) {
        return Err("the two ends differ in how the memory travels".to_owned());
    }
    if vm.faults.lies_at("loaded") {
        become_loaded(vm, &RunState::Running);
        vm.migration_becomes("completed");
    }
    let (run_state, whole) = loop {
        let line = lines.next_line().await.map_err(text)?.ok_or("Unable to read from socket")?;
        let line: Value = serde_json::from_str(&line).map_err(|error| error.to_string())?;
        if let Some(word) = line["end"].as_str() {
            break (RunState::from_wire(word), true);
        }
        if let Some(word) = line["package"].as_str() {
            // The status comes before the state has been loaded.
            vm.migration_becomes("postcopy-active");
            break (RunState::from_wire(word), false);
        }
    };
    vm.faults.at("loading").await.map_err(|refused| refused.to_string())?;
    if hello["devices"] != json!(vm.options.devices) {
        return Err("Unknown savevm section or instance".to_owned());
    }
    become_loaded(vm, &run_state);
    if !whole {
        receiving::receive(vm, (lines, writer)).await;
        return Ok(());
    }
    vm.state().migration.listener = None;
    vm.migration_becomes("completed");
    vm.faults.at("loaded").await.map_err(|refused| refused.to_string())?;
    // A source that has given up does not matter any more: this end has loaded.
    let _ = writer.write_all(b"{\"loaded\": true}\n").await;
    // The source looks at the answer before it lets go.
    let _ = lines.next_line().await;
    Ok(())
}

type Greeted = (Lines<BufReader<OwnedReadHalf>>, OwnedWriteHalf, Value);

/// The first client that is let in, and its greeting.
pub(super) async fn accept(vm: &Vm, listener: &TcpListener) -> Result<Greeted, String> {
    let text = |error: std::io::Error| error.to_string();
    loop {
        let (stream, _) = listener.accept().await.map_err(text)?;
        let (reader, mut writer) = stream.into_split();
        let mut lines = BufReader::new(reader).lines();
        let hello = lines.next_line().await.map_err(text)?.ok_or("Not a migration stream")?;
        let hello: Value =
            serde_json::from_str(&hello).map_err(|_| "Not a migration stream".to_owned())?;
        // One that is not let in changes nothing: the next may be.
        match shake_hands(vm, &hello) {
            Err(reason) => complain(&reason),
            Ok(None) => return Ok((lines, writer, hello)),
            Ok(Some(own)) => {
                let own = format!("{}\n", json!({ "tls": own }));
                writer.write_all(own.as_bytes()).await.map_err(text)?;
                return Ok((lines, writer, hello));
            }
        }
    }
}

/// Lets a client in or not; what is told to one that uses TLS.
fn shake_hands(vm: &Vm, hello: &Value) -> Result<Option<Value>, String> {
    let state = vm.state();
    let of = |name: &str| state.parameters.get(name).and_then(Value::as_str).unwrap_or_default();
    let credentials = state.objects.get(of("tls-creds"));
    match (credentials, hello["tls"].is_null()) {
        (None, true) => Ok(None),
        (Some(credentials), false) => {
            let identity = state.objects.get(of("tls-authz")).map(|object| &object["identity"]);
            tls::let_in(&credentials["dir"], identity, &hello["tls"]).map(Some)
        }
        _ => Err("TLS handshake failed: An unexpected TLS packet was received.".to_owned()),
    }
}

fn complain(reason: &str) {
    let _ = writeln!(std::io::stderr(), "fake-qemu: {reason}");
}

pub(super) fn check_shape(vm: &Vm, hello: &Value) -> Result<(), String> {
    let validates = vm.state().capabilities.contains("validate-uuid");
    if validates && hello["hello"] != json!(vm.options.uuid) {
        return Err("UUID received is different from the local one".to_owned());
    }
    if hello["machine"] != json!(vm.options.machine_type) {
        return Err("Machine type received is different".to_owned());
    }
    if hello["memory"] != json!(vm.options.memory_bytes) {
        return Err("Size mismatch: ram0".to_owned());
    }
    Ok(())
}

/// The guest is here, stopped.
pub(super) fn become_loaded(vm: &Vm, source: &RunState) {
    let mut state = vm.state();
    if state.run_state != RunState::InMigrate {
        return;
    }
    let autostart = state.autostart && *source == RunState::Running;
    state.run_state = match source {
        RunState::Running => RunState::Paused,
        other => other.clone(),
    };
    drop(state);
    if autostart {
        vm.resume();
    }
}
