//! The commands, as QEMU carries them out or refuses them.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::vm::{Migration, Vm};
use super::{Version, disks, incoming, measuring, mirroring, outgoing, receiving};
use crate::machine::RunState;
use crate::schema::{SENT, SENT_WHERE_KNOWN, Sent};

/// A line for the client.
pub(super) struct Answer {
    pub(super) line: String,
    /// Whether the program ends after it.
    pub(super) ends: bool,
}

/// An error as QMP has it.
struct Refusal {
    class: &'static str,
    description: String,
}

fn refuse<T>(description: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { class: "GenericError", description: description.into() })
}

/// Processor models of the fake, with what the host lacks for them.
const CPU_MODELS: &[(&str, &[&str])] = &[
    ("max", &[]),
    ("qemu64", &[]),
    ("Nehalem", &[]),
    ("Westmere", &[]),
    ("Skylake-Client", &["pcid", "invpcid"]),
];

/// Features of the fake's best processor.
const CPU_FEATURES: &[&str] = &["fpu", "sse", "sse2", "ssse3", "sse4.1", "sse4.2", "popcnt", "aes"];

pub(super) async fn run(
    vm: &Arc<Vm>,
    command: &Value,
    descriptor: Option<OwnedFd>,
    negotiated: &mut bool,
) -> Answer {
    let verb = command.get("execute").or_else(|| command.get("exec-oob"));
    let name = verb.and_then(Value::as_str).unwrap_or_default();
    let arguments = command.get("arguments").cloned().unwrap_or_else(|| json!({}));
    let result = carry_out(vm, name, &arguments, descriptor, *negotiated).await;
    *negotiated |= name == "qmp_capabilities" && result.is_ok();
    let ends = name == "quit" && result.is_ok();
    let mut answer = match result {
        Ok(value) => json!({ "return": value }),
        Err(Refusal { class, description }) => {
            json!({ "error": { "class": class, "desc": description } })
        }
    };
    if let Some(id) = command.get("id") {
        answer["id"] = id.clone();
    }
    Answer { line: answer.to_string(), ends }
}

async fn carry_out(
    vm: &Arc<Vm>,
    name: &str,
    arguments: &Value,
    descriptor: Option<OwnedFd>,
    negotiated: bool,
) -> Result<Value, Refusal> {
    let mut known = SENT.iter().chain(more(vm.version));
    let Some(sent) = known.find(|sent| sent.command == name) else {
        let description = format!("The command {name} has not been found");
        return Err(Refusal { class: "CommandNotFound", description });
    };
    if !negotiated && name != "qmp_capabilities" {
        let description = "Expecting capabilities negotiation with 'qmp_capabilities'".to_owned();
        return Err(Refusal { class: "CommandNotFound", description });
    }
    check_arguments(vm.version, sent, arguments)?;
    if let Err(refused) = vm.faults.at(name).await {
        return refuse(refused.to_string());
    }
    if vm.faults.lies_at(name) {
        return Ok(json!({}));
    }
    if let Some(done) = disks::carry_out(vm, name, arguments).await {
        return done.or_else(refuse);
    }
    match name {
        "query-qmp-schema" => Ok(schema(vm.version)),
        "query-machines" => Ok(machines(vm.version)),
        "query-cpu-definitions" => Ok(cpu_definitions()),
        "query-cpu-model-expansion" => Ok(best_cpu()),
        "query-uuid" => Ok(json!({ "UUID": vm.options.uuid })),
        "query-memory-size-summary" => Ok(json!({ "base-memory": vm.options.memory_bytes })),
        "query-kvm" => Ok(json!({ "enabled": false, "present": true })),
        "query-status" => Ok(status(vm)),
        "query-migrate" => Ok(query_migrate(vm)),
        "x-query-ramblock" => Ok(blocks(vm)),
        "query-dirty-rate" => Ok(measuring::query(vm)),
        "getfd" | "add-fd" => take_descriptor(vm, name, arguments, descriptor),
        _ => order(vm, name, arguments),
    }
}

/// The commands that change something.
fn order(vm: &Arc<Vm>, name: &str, arguments: &Value) -> Result<Value, Refusal> {
    match name {
        "cont" => cont(vm)?,
        "stop" => stop(vm),
        "quit" => vm.emit("SHUTDOWN", json!({ "guest": false, "reason": "host-qmp-quit" })),
        "system_powerdown" => {
            vm.emit("POWERDOWN", Value::Null);
            if vm.state().run_state == RunState::Running {
                vm.emit("SHUTDOWN", json!({ "guest": true, "reason": "guest-shutdown" }));
                vm.stop_into(RunState::Shutdown);
            }
        }
        "system_reset" => {
            vm.emit("RESET", json!({ "guest": false, "reason": "host-qmp-system-reset" }))
        }
        "object-add" => add_object(vm, arguments)?,
        "object-del" => {
            let id = arguments["id"].as_str().unwrap_or_default();
            if vm.state().objects.remove(id).is_none() {
                return refuse(format!("object '{id}' not found"));
            }
        }
        "qom-list" => {
            let state = vm.state();
            let entry = |id: &String| json!({ "name": id, "type": "child<object>" });
            return Ok(state.objects.keys().map(entry).collect());
        }
        "migrate-set-capabilities" => set_capabilities(vm, arguments)?,
        "migrate-set-parameters" => {
            let given = arguments.as_object().cloned().unwrap_or_default();
            vm.state().parameters.extend(given);
        }
        "remove-fd" => {
            let set = arguments["fdset-id"].to_string();
            if vm.state().descriptors.remove(&set).is_none() {
                return refuse(format!("File descriptor set {set} not found"));
            }
        }
        "calc-dirty-rate" => measuring::begin(vm, arguments).or_else(refuse)?,
        "migrate-start-postcopy" => start_postcopy(vm)?,
        "migrate-pause" => pause_postcopy(vm)?,
        "migrate-recover" => receiving::recover(vm, arguments).or_else(refuse)?,
        "migrate-incoming" => incoming::listen(vm, arguments).or_else(refuse)?,
        "migrate" => outgoing::begin(vm, arguments).or_else(refuse)?,
        "migrate-continue" => migrate_continue(vm)?,
        "migrate_cancel" => cancel(vm)?,
        // Nothing to imitate.
        _ => {}
    }
    Ok(json!({}))
}

fn check_arguments(
    version: Version,
    sent: &'static Sent,
    arguments: &Value,
) -> Result<(), Refusal> {
    for name in arguments.as_object().into_iter().flat_map(|map| map.keys()) {
        let is_it = |path: &&str| path.split('/').next() == Some(name);
        let mut all = vec![sent];
        all.extend(more(version).filter(|more| more.command == sent.command));
        let known = all.iter().any(|sent| {
            sent.arguments.iter().any(is_it) || sent.words.iter().any(|(path, _)| is_it(path))
        });
        if !known {
            return refuse(format!("Parameter '{name}' is unexpected"));
        }
    }
    Ok(())
}

fn status(vm: &Vm) -> Value {
    let run_state = match vm.state().run_state.clone() {
        RunState::Running if vm.faults.sleeping() => RunState::Suspended,
        other => other,
    };
    json!({ "status": run_state.as_wire(), "running": run_state == RunState::Running })
}

fn cont(vm: &Arc<Vm>) -> Result<(), Refusal> {
    let mut state = vm.state();
    match state.run_state {
        RunState::FinishMigrate => refuse("Migration is not finalized yet"),
        RunState::Shutdown => refuse("Resetting the Virtual Machine is required"),
        RunState::InMigrate => {
            state.autostart = true;
            Ok(())
        }
        _ => {
            drop(state);
            if disks::serves(vm) {
                vm.violates("runs while a disk of it is exported");
            }
            vm.take_disks().or_else(refuse)?;
            vm.resume();
            Ok(())
        }
    }
}

fn stop(vm: &Vm) {
    if vm.state().run_state == RunState::Running {
        vm.stop_into(RunState::Paused);
    }
}

fn add_object(vm: &Vm, arguments: &Value) -> Result<(), Refusal> {
    let id = arguments["id"].as_str().unwrap_or_default().to_owned();
    if let Some(dir) = arguments["dir"].as_str() {
        let role = arguments["endpoint"].as_str().unwrap_or_default();
        let names =
            ["ca-cert.pem".to_owned(), format!("{role}-cert.pem"), format!("{role}-key.pem")];
        for name in names {
            let path = Path::new(dir).join(name);
            if let Err(error) = std::fs::read(&path) {
                return refuse(format!("Unable to access credentials {}: {error}", path.display()));
            }
        }
    }
    let mut state = vm.state();
    if state.objects.contains_key(&id) {
        return refuse(format!("attempt to add duplicate property '{id}' to object"));
    }
    state.objects.insert(id, arguments.clone());
    Ok(())
}

fn set_capabilities(vm: &Vm, arguments: &Value) -> Result<(), Refusal> {
    let mut state = vm.state();
    if outgoing::under_way(state.migration.status) {
        return refuse("There's a migration process in progress");
    }
    let mut capabilities = state.capabilities.clone();
    for entry in arguments["capabilities"].as_array().into_iter().flatten() {
        let name = entry["capability"].as_str().unwrap_or_default().to_owned();
        if entry["state"] == json!(true) {
            capabilities.insert(name);
        } else {
            capabilities.remove(&name);
        }
    }
    check_capabilities(vm, &capabilities)?;
    state.capabilities = capabilities;
    Ok(())
}

/// What can not be had together, or not on this host.
fn check_capabilities(vm: &Vm, on: &BTreeSet<String>) -> Result<(), Refusal> {
    let has = |name: &str| on.contains(name);
    if has("mapped-ram") && vm.version == Version::V7_2 {
        return refuse("Parameter 'capability' does not accept value 'mapped-ram'");
    }
    if has("postcopy-ram") && has("multifd") && vm.version == Version::V10_0 {
        return refuse("Postcopy is not yet compatible with multifd");
    }
    if has("postcopy-preempt") && !has("postcopy-ram") {
        return refuse("Postcopy preempt requires postcopy-ram");
    }
    if has("multifd") && has("xbzrle") {
        return refuse("Multifd is not compatible with xbzrle");
    }
    if has("postcopy-ram") && vm.options.incoming && vm.faults.refuses_postcopy() {
        return refuse("Postcopy is not supported: Userfaultfd not available");
    }
    Ok(())
}

fn take_descriptor(
    vm: &Vm,
    command: &str,
    arguments: &Value,
    descriptor: Option<OwnedFd>,
) -> Result<Value, Refusal> {
    let Some(descriptor) = descriptor else {
        return refuse("No file descriptor supplied via SCM_RIGHTS");
    };
    let mut state = vm.state();
    if command == "getfd" {
        let name = arguments["fdname"].as_str().unwrap_or_default().to_owned();
        state.descriptors.insert(name, descriptor);
        return Ok(json!({}));
    }
    let free = (0..).find(|set: &u64| !state.descriptors.contains_key(&set.to_string()));
    let set = free.unwrap_or_default();
    state.descriptors.insert(set.to_string(), descriptor);
    Ok(json!({ "fdset-id": set, "fd": 99 }))
}

fn start_postcopy(vm: &Vm) -> Result<(), Refusal> {
    let mut state = vm.state();
    if !state.capabilities.contains("postcopy-ram") {
        return refuse("Enable postcopy with migrate_set_capability before the start of migration");
    }
    if state.migration.status.is_empty() {
        return refuse("Postcopy must be started after migration has been started");
    }
    // Without effect once the guest has been stopped.
    state.migration.postcopy_ordered |= matches!(state.migration.status, "setup" | "active");
    Ok(())
}

fn pause_postcopy(vm: &Vm) -> Result<(), Refusal> {
    let status = vm.state().migration.status;
    if !matches!(status, "postcopy-active" | "postcopy-recover") {
        return refuse(
            "migrate-pause is currently only supported during postcopy-active or postcopy-recover state",
        );
    }
    vm.pause_ordered.notify_one();
    Ok(())
}

fn migrate_continue(vm: &Vm) -> Result<(), Refusal> {
    let mut state = vm.state();
    if state.migration.status != "pre-switchover" {
        let status = state.migration.status;
        return refuse(format!("Migration not in expected state: {status}"));
    }
    state.migration.continued = true;
    drop(state);
    if mirroring::unsettled(vm) {
        vm.violates("leaves before the copies of its disks are settled");
    }
    vm.ordered.notify_one();
    Ok(())
}

fn cancel(vm: &Vm) -> Result<(), Refusal> {
    let mut state = vm.state();
    if !outgoing::under_way(state.migration.status) {
        return Ok(());
    }
    if outgoing::in_postcopy(state.migration.status) {
        return refuse("Postcopy migration in progress, cannot cancel.");
    }
    state.migration.cancelled = true;
    drop(state);
    vm.migration_becomes("cancelling");
    vm.ordered.notify_one();
    Ok(())
}

fn query_migrate(vm: &Vm) -> Value {
    let state = vm.state();
    let migration = &state.migration;
    let mut answer = json!({});
    if !migration.status.is_empty() {
        answer["status"] = json!(migration.status);
    }
    if let Some(error) = &migration.error {
        answer["error-desc"] = json!(error);
    }
    if let Some(address) = migration.listens_on {
        let host = address.ip().to_string();
        let port = address.port().to_string();
        answer["socket-address"] = json!([{ "type": "inet", "host": host, "port": port }]);
    }
    if migration.total_bytes > 0 {
        answer["ram"] = ram(vm, migration);
        answer["total-time"] = json!(migration.total_time_ms);
        answer["expected-downtime"] = json!(state.parameters.get("downtime-limit"));
        if let Some(downtime) = migration.downtime_ms {
            answer["downtime"] = json!(downtime);
        }
        if state.capabilities.contains("xbzrle") {
            answer["xbzrle-cache"] = json!({
                "cache-size": state.parameters.get("xbzrle-cache-size"), "bytes": 0, "pages": 0,
                "cache-miss": 0, "cache-miss-rate": 0.0, "encoding-rate": 0.0, "overflow": 0,
            });
        }
        if state.capabilities.contains("auto-converge") {
            answer["cpu-throttle-percentage"] = json!(vm.faults.setting("throttle", 0));
        }
    } else if state.capabilities.contains("postcopy-blocktime") {
        answer["postcopy-blocktime"] = json!(0);
        answer["postcopy-vcpu-blocktime"] = json!([0]);
    }
    answer
}

fn ram(vm: &Vm, migration: &Migration) -> Value {
    let seconds = (migration.total_time_ms.max(1)) as f64 / 1000.0;
    json!({
        "total": migration.total_bytes,
        "transferred": migration.transferred_bytes,
        "remaining": migration.total_bytes.saturating_sub(migration.transferred_bytes),
        "mbps": migration.transferred_bytes as f64 * 8.0 / 1e6 / seconds,
        "dirty-pages-rate": vm.faults.setting("dirty-pages-rate", 0),
        "dirty-sync-count": vm.faults.setting("dirty-sync-count", 1),
        "page-size": 4096,
        "normal-bytes": migration.transferred_bytes,
        "precopy-bytes": migration.transferred_bytes - migration.postcopy_bytes,
        "postcopy-bytes": migration.postcopy_bytes,
        "postcopy-requests": 0,
        "downtime-bytes": 0,
        "multifd-bytes": 0,
        "pages-per-second": 0,
    })
}

/// A table for people, as the real one.
fn blocks(vm: &Vm) -> Value {
    let bytes = vm.options.memory_bytes;
    let line = format!("ram0    4 KiB  {:#018x} {bytes:#018x} {bytes:#018x}\n", 0);
    json!({ "human-readable-text": format!("Block Name PSize Offset Used Total\n{line}") })
}

fn machines(version: Version) -> Value {
    let entry = |(name, alias): &(&str, Option<&str>)| {
        let mut machine = json!({ "name": name, "cpu-max": 288, "deprecated": false });
        if let Some(alias) = alias {
            machine["alias"] = json!(alias);
        }
        machine
    };
    version.machine_types().iter().map(entry).collect()
}

fn cpu_definitions() -> Value {
    let entry = |(name, lacking): &(&str, &[&str])| {
        json!({
            "name": name, "unavailable-features": lacking,
            "migration-safe": *name != "max", "deprecated": false,
        })
    };
    CPU_MODELS.iter().map(entry).collect()
}

fn best_cpu() -> Value {
    let on = CPU_FEATURES.iter().map(|feature| ((*feature).to_owned(), json!(true)));
    let properties: serde_json::Map<String, Value> = on.collect();
    json!({ "model": { "name": "max", "props": properties } })
}

/// What this version has beyond all others.
fn more(version: Version) -> impl Iterator<Item = &'static Sent> {
    SENT_WHERE_KNOWN.iter().filter(move |_| version == Version::V10_0)
}

/// An argument, possibly a path, and its words if it takes words.
type Member = (String, Option<Vec<&'static str>>);

/// The description of exactly what this fake takes.
fn schema(version: Version) -> Value {
    let mut entities = vec![json!({ "name": "value", "meta-type": "builtin" })];
    if version == Version::V10_0 {
        entities.push(json!({ "name": "blockdev-set-active", "meta-type": "command" }));
    }
    let commands: BTreeSet<&str> =
        SENT.iter().chain(more(version)).map(|sent| sent.command).collect();
    for command in commands {
        let is_it = |sent: &&Sent| sent.command == command;
        let all: Vec<&Sent> = SENT.iter().chain(more(version)).filter(is_it).collect();
        let members = members(&all);
        let arguments = format!("{command}-arguments");
        entities.push(json!({ "name": command, "meta-type": "command", "arg-type": arguments }));
        describe(&mut entities, &arguments, &members);
    }
    Value::Array(entities)
}

/// All arguments of one command; the words for the same argument together.
fn members(all: &[&Sent]) -> Vec<Member> {
    let mut words: BTreeMap<&str, Vec<&'static str>> = BTreeMap::new();
    for (path, more) in all.iter().flat_map(|sent| sent.words) {
        words.entry(path).or_default().extend(*more);
    }
    let plain = all.iter().flat_map(|sent| sent.arguments).map(|path| ((*path).to_owned(), None));
    let worded = words.into_iter().map(|(path, words)| (path.to_owned(), Some(words)));
    plain.chain(worded).collect()
}

/// Describes an object type whose members may be paths.
fn describe(entities: &mut Vec<Value>, name: &str, members: &[Member]) {
    let mut listed: Vec<Value> = Vec::new();
    let mut nested: BTreeMap<&str, Vec<Member>> = BTreeMap::new();
    for (path, words) in members {
        if let Some((outer, inner)) = path.split_once('/') {
            nested.entry(outer).or_default().push((inner.to_owned(), words.clone()));
            continue;
        }
        let mut of_type = "value".to_owned();
        if let Some(words) = words {
            of_type = format!("{name}-{path}");
            entities.push(json!({ "name": of_type, "meta-type": "enum", "values": words }));
        }
        listed.push(json!({ "name": path, "type": of_type }));
    }
    for (outer, inner) in nested {
        let of_type = format!("{name}-{outer}");
        describe(entities, &of_type, &inner);
        listed.push(json!({ "name": outer, "type": of_type }));
    }
    entities.push(json!({ "name": name, "meta-type": "object", "members": listed }));
}
