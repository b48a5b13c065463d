//! Imitated mirrors: the states of their jobs in QEMU's order, and what goes wrong with them.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::Version;
use super::disks::{self, text};
use super::vm::Vm;

/// How long copying takes when nothing else is ordered.
const MIRRORING_MILLISECONDS: u64 = 20;

/// Pause between two looks at what is ordered.
const LOOK_MILLISECONDS: u64 = 2;

const IO_ERROR: &str = "Input/output error";

/// One mirror.
pub(super) struct Job {
    source: String,
    target: String,
    status: &'static str,
    progress: u64,
    total: u64,
    speed: u64,
    error: Option<String>,
    io_status: &'static str,
    write_blocking: bool,
    ordered: Option<Order>,
    resumed: bool,
}

/// How a mirror is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Settle,
    Pivot,
    GiveUp,
}

/// Why a mirror ends without having done its work.
struct End(String);

/// `query-jobs`, or `query-block-jobs`.
pub(super) fn query(vm: &Vm, as_block_jobs: bool) -> Value {
    if vm.faults.vanishes("mirror") {
        return json!([]);
    }
    let state = vm.state();
    let job = |(id, job): (&String, &Job)| {
        if !as_block_jobs {
            let mut entry = json!({
                "id": id, "type": "mirror", "status": job.status,
                "current-progress": job.progress, "total-progress": job.total,
            });
            if let Some(error) = &job.error {
                entry["error"] = json!(error);
            }
            return entry;
        }
        let mut entry = json!({
            "device": id, "type": "mirror", "status": job.status, "io-status": job.io_status,
            "len": job.total, "offset": job.progress, "speed": job.speed,
            "ready": matches!(job.status, "ready" | "standby"),
            "paused": matches!(job.status, "paused" | "standby"),
        });
        if vm.version == Version::V10_0 {
            entry["actively-synced"] = json!(job.write_blocking && job.status == "ready");
        }
        entry
    };
    state.disks.jobs.iter().map(job).collect()
}

/// Whether a mirror uses the node.
pub(super) fn uses(vm: &Vm, node: &str) -> bool {
    let state = vm.state();
    let mut live = state.disks.jobs.values().filter(|job| job.status != "concluded");
    live.any(|job| job.target == node || job.source == node)
}

/// Whether a guest that leaves now would leave a copy behind that was not settled.
pub(super) fn unsettled(vm: &Vm) -> bool {
    let state = vm.state();
    state.disks.jobs.values().any(|job| job.status != "concluded" || job.error.is_some())
}

/// `blockdev-mirror`.
pub(super) fn begin(vm: &Arc<Vm>, arguments: &Value) -> Result<Value, String> {
    let id = text(arguments, "job-id").to_owned();
    let (source, target) = (text(arguments, "device"), text(arguments, "target"));
    let total = disks::size(vm, source).filter(|_| disks::is_used(vm, source));
    let total = total.ok_or("Need a root block node")?;
    if disks::size(vm, target).is_none() {
        return Err(format!("Cannot find device='{target}' nor node-name='{target}'"));
    }
    if uses(vm, target) || disks::is_used(vm, target) {
        return Err(format!("Node {target} is in use"));
    }
    let job = Job {
        source: source.to_owned(),
        target: target.to_owned(),
        status: "created",
        progress: 0,
        total,
        speed: arguments["speed"].as_u64().unwrap_or(0),
        error: None,
        io_status: "ok",
        write_blocking: text(arguments, "copy-mode") == "write-blocking",
        ordered: None,
        resumed: false,
    };
    if vm.state().disks.jobs.contains_key(&id) {
        return Err(format!("Job ID '{id}' already in use"));
    }
    vm.state().disks.jobs.insert(id.clone(), job);
    becomes(vm, &id, "created");
    becomes(vm, &id, "running");
    let vm = Arc::clone(vm);
    tokio::spawn(async move {
        let ended = run(&vm, &id).await;
        conclude(&vm, &id, ended);
    });
    Ok(json!({}))
}

/// The commands to a mirror.
pub(super) fn order(vm: &Vm, name: &str, arguments: &Value) -> Result<Value, String> {
    let id = arguments["id"].as_str().unwrap_or_else(|| text(arguments, "device"));
    let mut state = vm.state();
    let Some(job) = state.disks.jobs.get_mut(id) else {
        return Err(format!("Block job '{id}' not found"));
    };
    let concluded = job.status == "concluded";
    if concluded != (name == "job-dismiss") {
        let status = job.status;
        return Err(format!("Job '{id}' in state '{status}' cannot accept command verb"));
    }
    let held = matches!(job.status, "paused" | "standby");
    match name {
        "job-dismiss" => {
            state.disks.jobs.remove(id);
            vm.emit("JOB_STATUS_CHANGE", json!({ "id": id, "status": "null" }));
        }
        "block-job-set-speed" => job.speed = arguments["speed"].as_u64().unwrap_or(0),
        "block-job-change" => job.write_blocking = true,
        "block-job-resume" if held => {
            job.resumed = true;
            job.io_status = "ok";
        }
        "block-job-resume" => return Err(format!("The block job '{id}' is not paused")),
        "block-job-cancel" if arguments["force"] == json!(true) => {
            job.ordered = Some(Order::GiveUp)
        }
        _ if held => return Err(format!("The block job for device '{id}' is currently paused")),
        "block-job-cancel" if job.status == "ready" => job.ordered = Some(Order::Settle),
        // What is not ready is given up by it.
        "block-job-cancel" => job.ordered = Some(Order::GiveUp),
        _ if job.status == "ready" => job.ordered = Some(Order::Pivot),
        _ => return Err(format!("The active block job '{id}' cannot be completed")),
    }
    Ok(json!({}))
}

async fn run(vm: &Arc<Vm>, id: &str) -> Result<(), End> {
    let (source, target) = {
        let state = vm.state();
        let job = state.disks.jobs.get(id).ok_or_else(|| End(IO_ERROR.to_owned()))?;
        (job.source.clone(), job.target.clone())
    };
    if disks::size(vm, &source) != disks::size(vm, &target) {
        return Err(End("Source and target image have different sizes".to_owned()));
    }
    passes(vm, id, "mirroring").await?;
    copy(vm, id, &target).await?;
    with(vm, id, |job| job.progress = job.total);
    becomes(vm, id, "ready");
    vm.emit("BLOCK_JOB_READY", json!({ "device": id, "type": "mirror" }));
    passes(vm, id, "mirror-ready").await?;
    let order = loop {
        writable(vm, id, &target, "standby", "ready").await?;
        match with(vm, id, |job| job.ordered).flatten() {
            Some(Order::GiveUp) => return Err(given_up()),
            Some(order) => break order,
            None => sleep(Duration::from_millis(LOOK_MILLISECONDS)).await,
        }
    };
    passes(vm, id, "mirror-end").await?;
    tokio::select! {
        carried = disks::carry_over(vm, &source, &target) => carried.map_err(End)?,
        () = is_given_up(vm, id) => return Err(given_up()),
    }
    becomes(vm, id, "waiting");
    becomes(vm, id, "pending");
    if order == Order::Pivot {
        disks::replace(vm, &source, &target);
    }
    Ok(())
}

async fn copy(vm: &Arc<Vm>, id: &str, target: &str) -> Result<(), End> {
    let begun = Instant::now();
    loop {
        writable(vm, id, target, "paused", "running").await?;
        let takes = vm.faults.setting("mirroring-ms", MIRRORING_MILLISECONDS);
        let gone = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        // A limit by which it would take long is taken for one that never gets there.
        let slow = with(vm, id, |job| job.speed > 0 && job.speed < job.total).unwrap_or(false);
        if gone >= takes && !slow {
            return Ok(());
        }
        with(vm, id, |job| job.progress = job.total / 2);
        sleep(Duration::from_millis(LOOK_MILLISECONDS)).await;
    }
}

/// Holds a mirror as long as its target can not be written, and until it is resumed.
async fn writable(
    vm: &Arc<Vm>,
    id: &str,
    target: &str,
    held: &'static str,
    goes_on: &'static str,
) -> Result<(), End> {
    loop {
        if with(vm, id, |job| job.ordered) == Some(Some(Order::GiveUp)) {
            return Err(given_up());
        }
        let io_status = if vm.faults.is_full("mirror") {
            "nospace"
        } else if disks::reachable(vm, target) {
            return Ok(());
        } else {
            "failed"
        };
        with(vm, id, |job| {
            job.io_status = io_status;
            job.resumed = false;
        });
        let told = json!({ "device": id, "operation": "write", "action": "stop" });
        vm.emit("BLOCK_JOB_ERROR", told);
        becomes(vm, id, held);
        while with(vm, id, |job| job.resumed) == Some(false) {
            if with(vm, id, |job| job.ordered) == Some(Some(Order::GiveUp)) {
                return Err(given_up());
            }
            sleep(Duration::from_millis(LOOK_MILLISECONDS)).await;
        }
        becomes(vm, id, goes_on);
    }
}

fn given_up() -> End {
    End("Operation canceled".to_owned())
}

/// Passes a point of the faults, unless the mirror is given up there.
async fn passes(vm: &Arc<Vm>, id: &str, point: &str) -> Result<(), End> {
    tokio::select! {
        passed = vm.faults.at(point) => passed.map_err(|_| End(IO_ERROR.to_owned())),
        () = is_given_up(vm, id) => Err(given_up()),
    }
}

async fn is_given_up(vm: &Vm, id: &str) {
    while with(vm, id, |job| job.ordered) != Some(Some(Order::GiveUp)) {
        sleep(Duration::from_millis(LOOK_MILLISECONDS)).await;
    }
}

fn conclude(vm: &Vm, id: &str, ended: Result<(), End>) {
    let error = ended.err().map(|End(reason)| reason);
    if error.is_some() {
        becomes(vm, id, "aborting");
    }
    with(vm, id, |job| job.error.clone_from(&error));
    let name = match error.as_deref() {
        Some("Operation canceled") => "BLOCK_JOB_CANCELLED",
        _ => "BLOCK_JOB_COMPLETED",
    };
    vm.emit(name, json!({ "device": id, "type": "mirror", "error": error }));
    becomes(vm, id, "concluded");
}

fn becomes(vm: &Vm, id: &str, status: &'static str) {
    with(vm, id, |job| job.status = status);
    vm.emit("JOB_STATUS_CHANGE", json!({ "id": id, "status": status }));
}

fn with<T>(vm: &Vm, id: &str, change: impl FnOnce(&mut Job) -> T) -> Option<T> {
    vm.state().disks.jobs.get_mut(id).map(change)
}
