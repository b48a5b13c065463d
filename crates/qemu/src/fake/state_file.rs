//! A state in a file: one line of JSON, that says whose it is.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::sync::Arc;

use serde_json::{Value, json};

use super::outgoing::End;
use super::vm::Vm;
use super::{Version, incoming, outgoing};
use crate::machine::RunState;

/// The file that a uri speaks of, if it speaks of one that was handed over.
pub(super) fn of(vm: &Vm, arguments: &Value, to_read: bool) -> Result<Option<File>, String> {
    let uri = arguments["uri"].as_str().unwrap_or_default();
    let named = uri.strip_prefix("fd:").map(|name| (name, true));
    let numbered = uri.strip_prefix("file:/dev/fdset/").map(|set| (set, false));
    let Some((name, taken)) = named.or(numbered) else { return Ok(None) };
    if !taken && vm.version == Version::V7_2 {
        return Err(format!("unknown migration protocol: {uri}"));
    }
    let mut state = vm.state();
    let descriptor = state.descriptors.get(name);
    let descriptor = descriptor.ok_or_else(|| format!("File descriptor '{name}' not found"))?;
    let flags = rustix::fs::fcntl_getfl(descriptor).map_err(|error| error.to_string())?;
    let wanted = if to_read { rustix::fs::OFlags::RDONLY } else { rustix::fs::OFlags::WRONLY };
    if flags & rustix::fs::OFlags::RWMODE != wanted {
        return Err(format!("Failed to open {uri}: Bad file descriptor"));
    }
    let file = descriptor.try_clone().map(File::from).map_err(|error| error.to_string())?;
    if taken {
        state.descriptors.remove(name);
    }
    Ok(Some(file))
}

pub(super) fn write(vm: &Vm, mut file: File, before: &RunState) -> Result<(), End> {
    let line = json!({
        "hello": vm.options.uuid,
        "machine": vm.options.machine_type,
        "memory": vm.options.memory_bytes,
        "devices": vm.options.devices,
        "stream": outgoing::stream(vm)[0],
        "saved": before.as_wire(),
    });
    Ok(file.write_all(format!("{line}\n").as_bytes())?)
}

/// `migrate-incoming` from a file.
pub(super) fn restore(vm: &Arc<Vm>, file: File, stays: bool) {
    let vm = Arc::clone(vm);
    tokio::spawn(async move {
        vm.migration_becomes("active");
        let read = match vm.faults.at("loading").await {
            Ok(()) => read(&vm, file),
            Err(refused) => Err(refused.to_string()),
        };
        match read {
            Ok(run_state) => {
                incoming::become_loaded(&vm, &run_state);
                vm.migration_becomes("completed");
            }
            Err(reason) => incoming::fail(&vm, reason, stays),
        }
    });
}

fn read(vm: &Vm, file: File) -> Result<RunState, String> {
    let mut line = String::new();
    BufReader::new(file).read_line(&mut line).map_err(|error| error.to_string())?;
    let saved: Value =
        serde_json::from_str(&line).map_err(|_| "Not a migration stream".to_owned())?;
    let mapped = |list: &Value| list.as_array().is_some_and(|on| on.contains(&json!("mapped-ram")));
    if mapped(&saved["stream"]) != mapped(&outgoing::stream(vm)[0]) {
        return Err("Not a migration stream".to_owned());
    }
    incoming::check_shape(vm, &saved)?;
    if saved["devices"] != json!(vm.options.devices) {
        return Err("Unknown savevm section or instance".to_owned());
    }
    Ok(RunState::from_wire(saved["saved"].as_str().unwrap_or_default()))
}
