//! The source's side of an imitated migration.
//!
//! The stream is lines of JSON: `{"hello": uuid, "tls": …, …}`, which stands for the handshake
//! too and is answered with `{"tls": verdict}`, then `{"bytes": n}` while the memory is "copied", then `{"end": run state}`, to which the other end
//! answers `{"loaded": true}` or goes away.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::Instant;

use super::serving::{self, Served};
use super::vm::{Migration, Vm};
use super::{Version, state_file, tls};
use crate::machine::RunState;

/// How long the copying takes when nothing else is ordered.
const COPYING_MILLISECONDS: u64 = 50;

/// How often figures change while the memory is copied.
const COPYING_STEP_MILLISECONDS: u64 = 5;

/// The most steps in which the memory is copied.
const COPYING_STEPS_MAX: u64 = 200;

/// What there is beside the guest's own memory (firmware and the like).
const OTHER_MEMORY_BYTES: u64 = 532 * 1024;

/// How much less is sent than there is: most pages of an idle guest are zero.
const SENT_SHARE: u64 = 100;

/// Why a migration ended without success.
pub(super) enum End {
    Cancelled,
    Failed(String),
}

impl From<std::io::Error> for End {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Whether QEMU takes a migration of this status for one under way.
pub(super) fn under_way(status: &str) -> bool {
    matches!(status, "setup" | "active" | "pre-switchover" | "device" | "cancelling")
        || in_postcopy(status)
}

/// Whether the guest may be elsewhere while part of its memory is here.
pub(super) fn in_postcopy(status: &str) -> bool {
    status.starts_with("postcopy-")
}

/// What both ends must have alike, and a real one does not always find out about.
pub(super) fn stream(vm: &Vm) -> Value {
    let state = vm.state();
    let alike = ["multifd", "postcopy-ram", "postcopy-preempt", "xbzrle", "mapped-ram"];
    let on: Vec<&str> =
        alike.into_iter().filter(|name| state.capabilities.contains(*name)).collect();
    let multifd = on.contains(&"multifd");
    let of = |name: &str| state.parameters.get(name).filter(|_| multifd).cloned();
    json!([on, of("multifd-channels"), of("multifd-compression")])
}

/// `migrate`.
pub(super) fn begin(vm: &Arc<Vm>, arguments: &Value) -> Result<(), String> {
    if arguments["resume"] == json!(true) {
        return resume(vm, arguments);
    }
    let file = state_file::of(vm, arguments, false)?;
    let mut state = vm.state();
    if under_way(state.migration.status) {
        return Err("There's a migration process in progress".to_owned());
    }
    match state.run_state {
        RunState::InMigrate => return Err("Guest is waiting for an incoming migration".to_owned()),
        RunState::PostMigrate => {
            let reason = "Can't migrate the vm that was paused due to previous migration";
            return Err(reason.to_owned());
        }
        _ => {}
    }
    let address = if file.is_none() { tcp(arguments)? } else { String::new() };
    let total_bytes = vm.options.memory_bytes + OTHER_MEMORY_BYTES;
    state.migration = Migration { total_bytes, ..Migration::default() };
    drop(state);
    vm.migration_becomes("setup");
    let vm = Arc::clone(vm);
    tokio::spawn(async move { conduct(&vm, &address, file).await });
    Ok(())
}

fn tcp(arguments: &Value) -> Result<String, String> {
    let uri = arguments["uri"].as_str().and_then(|uri| uri.strip_prefix("tcp:"));
    Ok(uri.ok_or("unknown migration protocol")?.to_owned())
}

/// `migrate` with `resume`.
fn resume(vm: &Vm, arguments: &Value) -> Result<(), String> {
    let address = arguments["uri"].as_str().unwrap_or_default().to_owned();
    let mut state = vm.state();
    if state.migration.status != "postcopy-paused" {
        return Err("Cannot resume if there is no paused migration".to_owned());
    }
    state.migration.resume_to = Some(address);
    drop(state);
    vm.ordered.notify_one();
    Ok(())
}

/// One whole migration, with what QEMU does with the guest at its end.
async fn conduct(vm: &Arc<Vm>, address: &str, file: Option<File>) {
    let run_state_before = vm.state().run_state.clone();
    let sent = match file {
        Some(file) => save(vm, file, &run_state_before).await,
        None => send(vm, address, &run_state_before).await,
    };
    let end = match sent {
        Ok(()) => return,
        Err(end) => end,
    };
    if let End::Failed(reason) = &end {
        vm.state().migration.error = Some(reason.clone());
        vm.migration_becomes("failed");
    }
    // Whatever happens here, the migration has ended already.
    let _ = vm.faults.at("settling").await;
    let stopped = vm.state().run_state == RunState::FinishMigrate;
    if stopped {
        // 7.2 forgets that it ran where it was to go on in post-copy.
        let remembers = vm.version == Version::V10_0 || !vm.state().migration.postcopy_ordered;
        match (&run_state_before, vm.version) {
            (RunState::Running, _) if remembers => vm.resume(),
            (_, Version::V7_2) => vm.state().run_state = RunState::PostMigrate,
            (before, Version::V10_0) => vm.state().run_state = before.clone(),
        }
    }
    if matches!(end, End::Cancelled) {
        vm.migration_becomes("cancelled");
    }
}

async fn send(vm: &Arc<Vm>, address: &str, before: &RunState) -> Result<(), End> {
    let begun = Instant::now();
    let (lines, mut writer) = or_cancelled(vm, connect(vm, address, false)).await?;
    vm.migration_becomes("active");
    copy(vm, &mut writer, begun).await?;

    vm.stop_into(RunState::FinishMigrate);
    let stopped = Instant::now();
    if vm.state().capabilities.contains("pause-before-switchover") {
        vm.migration_becomes("pre-switchover");
        passes(vm, "pre-switchover").await?;
        while !vm.state().migration.continued {
            cancelled_or(vm, vm.ordered.notified()).await?;
        }
    }
    let postcopy = vm.state().migration.postcopy_ordered;
    if !postcopy || vm.version == Version::V10_0 {
        vm.migration_becomes("device");
    }
    passes(vm, "device").await?;
    if postcopy {
        let package = json!({ "package": before.as_wire() });
        or_cancelled(vm, async { Ok(write_line(&mut writer, &package).await?) }).await?;
        vm.state().migration.downtime_ms = Some(milliseconds(stopped));
        vm.leave_disks();
        let served = serving::serve(vm, (lines, writer)).await;
        if matches!(served, Served::TakenBack) && vm.version == Version::V7_2 {
            vm.migration_becomes("failed");
            vm.state().run_state = RunState::PostMigrate;
            return Ok(());
        }
    } else {
        end(vm, (lines, writer), before).await?;
    }
    finished(vm, begun, stopped).await
}

async fn end(vm: &Arc<Vm>, connection: Connection, before: &RunState) -> Result<(), End> {
    let (mut lines, mut writer) = connection;
    if !vm.faults.lies_at("completed") {
        let end = json!({ "end": before.as_wire() });
        or_cancelled(vm, finish(&mut lines, &mut writer, &end)).await?;
    }
    passes(vm, "completed").await
}

/// The guest has left.
async fn finished(vm: &Arc<Vm>, begun: Instant, stopped: Instant) -> Result<(), End> {
    {
        let mut state = vm.state();
        if state.migration.cancelled {
            return Err(End::Cancelled);
        }
        state.migration.transferred_bytes = state.migration.total_bytes;
        state.migration.downtime_ms.get_or_insert(milliseconds(stopped));
        state.migration.total_time_ms = milliseconds(begun);
    }
    if vm.version == Version::V7_2 && vm.arrived_and_never_ran() {
        vm.faults.die();
    }
    vm.leave_disks();
    vm.migration_becomes("completed");
    vm.state().run_state = RunState::PostMigrate;
    Ok(())
}

/// Into a file, where there is nobody to wait for.
async fn save(vm: &Arc<Vm>, file: File, before: &RunState) -> Result<(), End> {
    let begun = Instant::now();
    vm.migration_becomes("active");
    passes(vm, "copying").await?;
    cancelled_or(vm, tokio::time::sleep(Duration::from_millis(COPYING_MILLISECONDS))).await?;
    vm.stop_into(RunState::FinishMigrate);
    state_file::write(vm, file, before)?;
    finished(vm, begun, Instant::now()).await
}

pub(super) type Connection = (Lines<BufReader<OwnedReadHalf>>, OwnedWriteHalf);

pub(super) async fn connect(vm: &Arc<Vm>, address: &str, resume: bool) -> Result<Connection, End> {
    let stream = TcpStream::connect(address)
        .await
        .map_err(|error| End::Failed(format!("Failed to connect to '{address}': {error}")))?;
    let (reader, mut writer) = stream.into_split();
    let stream = self::stream(vm);
    let hello = {
        let state = vm.state();
        let parameter = |name: &str| state.parameters.get(name).cloned().unwrap_or(json!(""));
        let credentials = parameter("tls-creds");
        let id = credentials.as_str().unwrap_or_default();
        let dir = state.objects.get(id).map(|object| object["dir"].clone());
        json!({
            "hello": vm.options.uuid,
            "machine": vm.options.machine_type,
            "memory": vm.options.memory_bytes,
            "devices": vm.options.devices,
            "stream": stream,
            "resume": resume,
            "tls": tls::of_client(dir.as_ref(), &parameter("tls-hostname")),
        })
    };
    write_line(&mut writer, &hello).await?;
    let mut lines = BufReader::new(reader).lines();
    // Without TLS there is no handshake to wait for.
    if !hello["tls"].is_null() {
        let verdict = lines.next_line().await?;
        let verdict: Value = serde_json::from_str(&verdict.unwrap_or_default()).unwrap_or_default();
        tls::check_server(&verdict, &hello["tls"]).map_err(End::Failed)?;
    }
    Ok((lines, writer))
}

/// "Copies" the memory: a paced count, slowed by `max-bandwidth`.
async fn copy(vm: &Arc<Vm>, writer: &mut OwnedWriteHalf, begun: Instant) -> Result<(), End> {
    passes(vm, "copying").await?;
    let total = vm.state().migration.total_bytes;
    let limit = vm.state().parameters.get("max-bandwidth").and_then(Value::as_u64);
    let by_bandwidth =
        limit.map_or(0, |limit| total.saturating_mul(1000) / SENT_SHARE / limit.max(1));
    let ordered = vm.faults.setting("copying-ms", COPYING_MILLISECONDS);
    let all = ordered.max(by_bandwidth);
    let steps = (all / COPYING_STEP_MILLISECONDS).clamp(1, COPYING_STEPS_MAX);
    let pause = Duration::from_millis(all / steps);
    for step in 1..=steps {
        if vm.state().migration.postcopy_ordered {
            break;
        }
        cancelled_or(vm, tokio::time::sleep(pause)).await?;
        passes(vm, "copying").await?;
        or_cancelled(vm, async {
            Ok(write_line(writer, &json!({ "bytes": total / steps })).await?)
        })
        .await?;
        let mut state = vm.state();
        state.migration.transferred_bytes = total.saturating_mul(step) / steps;
        state.migration.total_time_ms = milliseconds(begun);
    }
    Ok(())
}

async fn finish(
    lines: &mut Lines<BufReader<OwnedReadHalf>>,
    writer: &mut OwnedWriteHalf,
    end: &Value,
) -> Result<(), End> {
    write_line(writer, end).await?;
    match lines.next_line().await? {
        Some(line) if line.contains("loaded") => Ok(()),
        _ => Err(End::Failed("Sibling indicated error 1".to_owned())),
    }
}

/// Passes a point of the faults, unless a cancel comes first.
pub(super) async fn passes(vm: &Arc<Vm>, point: &str) -> Result<(), End> {
    vm.guest_passes(point);
    or_cancelled(vm, async {
        vm.faults.at(point).await.map_err(|refused| End::Failed(refused.to_string()))
    })
    .await
}

async fn cancelled_or(vm: &Arc<Vm>, step: impl Future<Output = ()>) -> Result<(), End> {
    or_cancelled(vm, async {
        step.await;
        Ok(())
    })
    .await
}

/// Does a step, or ends with the cancel that comes meanwhile.
async fn or_cancelled<T>(
    vm: &Arc<Vm>,
    step: impl Future<Output = Result<T, End>>,
) -> Result<T, End> {
    let cancelled = async {
        while !vm.state().migration.cancelled {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        biased;
        () = cancelled => Err(End::Cancelled),
        result = step => result,
    }
}

pub(super) async fn write_line(writer: &mut OwnedWriteHalf, value: &Value) -> std::io::Result<()> {
    writer.write_all(format!("{value}\n").as_bytes()).await
}

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
