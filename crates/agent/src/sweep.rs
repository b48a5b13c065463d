//! Takes down what nobody owns and the journal names: what an earlier life of the agent has left, and what could not be
//! taken down when it was time.
//!
//! Once at the start, before the door opens and before any migration is taken up, and then every [`SWEEP_SECONDS`]. What a
//! live task makes, has or takes down is held ([`crate::in_hand`]) and left alone, and so is whatever the ledger gives to
//! a VM or an open migration. What it is not sure about it leaves alone as well and says so: a QEMU whose VM has no
//! ownership record, a process that cannot be looked at, a folder that the journal does not know.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use whimbrel_api::vm::StoragePath;
use whimbrel_api::{ApiError, Name, VmId};
use whimbrel_migration::handoff::{Ownership, Standing};
use whimbrel_qemu::process::{AdoptError, Process};

use crate::host::Host;
use crate::in_hand::Hold;
use crate::ledger::{Resource, RunRecord, VmRow};
use crate::storage::vm_folder;
use crate::vm::{RunDir, lineage, own_run, spawn};

/// How often is swept, in seconds. What a finished migration leaves is to be gone within 30.
pub const SWEEP_SECONDS: u64 = 10;
/// How long an orphan may take to be gone, in milliseconds.
const ORPHAN_MILLISECONDS: u64 = 10_000;
/// How often it is looked at meanwhile, in milliseconds.
const ORPHAN_LOOK_MILLISECONDS: u64 = 20;

/// Sweeps at the start of the agent, tokens of earlier proofs of shared storages included.
///
/// # Errors
/// `internal` where the ledger cannot be read; a single thing that cannot be removed is logged and left to the next time.
pub async fn at_start(host: &Arc<Host>) -> Result<(), ApiError> {
    let at = Arc::clone(host);
    let tokens = host.storages.aside(move |aside| {
        at.storages.sweep_tokens(aside);
        Ok(())
    });
    tokens.await?;
    once(host, &mut HashSet::new()).await
}

/// Sweeps until the agent ends.
pub async fn again_and_again(host: Arc<Host>) {
    let mut told = HashSet::new();
    loop {
        tokio::time::sleep(Duration::from_secs(SWEEP_SECONDS)).await;
        if let Err(error) = once(&host, &mut told).await {
            tracing::warn!(%error, "nothing was swept this time");
        }
    }
}

/// Sweeps once. `told` are the runs that are left alone and of which that has been said.
///
/// # Errors
/// As [`at_start`].
pub async fn once(host: &Arc<Host>, told: &mut HashSet<String>) -> Result<(), ApiError> {
    let mut left = left_over(host).await?;
    if left.is_empty() {
        host.metrics.swept(0);
        return Ok(());
    }
    let mut still_left = 0;
    // Read after it was seen that nobody holds what is left: whoever let go of it has written down what it is to be.
    let runs = host.ledger.runs().await?;
    let vms = host.ledger.vms().await?;
    let ownerships: HashMap<VmId, Ownership> =
        host.ledger.current_of_all().await?.into_iter().map(|record| (record.vm, record)).collect();

    for record in ownerships.values() {
        let row = vms.iter().find(|row| row.definition.id == record.vm);
        let run = match record.standing {
            Standing::Owned
            | Standing::Leaving { .. }
            | Standing::Released { .. }
            | Standing::Serving { .. } => own_run(record, row, &runs),
            Standing::Expected { .. } | Standing::Fetching { .. } => runs
                .iter()
                .find(|run| run.definition.id == record.vm && run.migration == record.migration),
            Standing::Gone { .. } | Standing::Refused { .. } => None,
        };
        if let Some(run) = run {
            left.remove(&run.name);
        }
    }
    for run in &runs {
        let Some(_held) = left.remove(&run.name) else { continue };
        if ownerships.contains_key(&run.definition.id) {
            still_left += usize::from(!end_run(host, run).await);
            continue;
        }
        still_left += 1;
        if told.insert(run.name.clone()) {
            tracing::error!(
                run = run.name,
                "a QEMU of a VM that nobody has a record of is left alone"
            );
        }
    }
    let known = Known::of(&vms, &ownerships);
    for (owner, (resources, _alone)) in left {
        if let Err(error) = sweep_owner(host, &owner, &resources, &known).await {
            tracing::error!(owner, %error, "something was not swept");
            still_left += 1;
        }
    }
    host.metrics.swept(still_left);
    Ok(())
}

/// What the VMs' rows name.
struct Known {
    vms: HashSet<VmId>,
    saved: HashSet<StoragePath>,
    images: HashSet<StoragePath>,
    /// VMs that have left: their files are another host's matter.
    elsewhere: HashSet<VmId>,
}

impl Known {
    fn of(vms: &[VmRow], ownerships: &HashMap<VmId, Ownership>) -> Self {
        let definitions = || vms.iter().map(|row| &row.definition);
        let saved = definitions().filter_map(|definition| definition.saved.as_ref());
        let owned = |record: &&Ownership| record.standing == Standing::Owned;
        Self {
            vms: definitions().map(|definition| definition.id).collect(),
            saved: saved.map(|saved| saved.file.clone()).collect(),
            images: definitions().flat_map(lineage::files).collect(),
            elsewhere: ownerships.values().filter(|r| !owned(r)).map(|r| r.vm).collect(),
        }
    }
}

/// All that the journal names and nobody holds, by its owner. It is held from here on, so that nobody begins anew with it.
async fn left_over(host: &Arc<Host>) -> Result<BTreeMap<String, (Vec<Resource>, Hold)>, ApiError> {
    let mut of_owner: BTreeMap<String, Vec<Resource>> = BTreeMap::new();
    for (owner, resource) in host.ledger.journaled().await? {
        of_owner.entry(owner).or_default().push(resource);
    }
    let held = of_owner.into_iter().filter_map(|(owner, resources)| {
        let alone = host.in_hand.hold_alone(&owner)?;
        Some((owner, (resources, alone)))
    });
    Ok(held.collect())
}

/// Ends a QEMU that this host must not run any more, or that never ran, and takes down what belongs to it. Whether that
/// was done.
async fn end_run(host: &Host, run: &RunRecord) -> bool {
    tracing::info!(run = run.name, "sweeps a QEMU that nobody owns");
    let log = RunDir::new(&host.config.run_dir(), &run.name).qemu_log();
    let ended = match Process::adopt(&run.process, &log) {
        Ok(process) => spawn::end(host, &process).await,
        Err(AdoptError::Gone { .. }) => Ok(()),
        Err(error) => Err(ApiError::internal("it cannot be looked at", &error)),
    };
    let swept = match ended {
        Ok(()) => spawn::take_down(host, &run.name, &run.taps).await,
        Err(error) => Err(error),
    };
    if let Err(error) = &swept {
        tracing::error!(run = run.name, %error, "a QEMU was not swept");
    }
    swept.is_ok()
}

/// Removes all that was made, or about to be made, for one owner.
async fn sweep_owner(
    host: &Arc<Host>,
    owner: &str,
    resources: &[Resource],
    known: &Known,
) -> Result<(), ApiError> {
    for resource in resources {
        match resource {
            Resource::Run { name } => {
                tracing::info!(run = name, "sweeps what was made for a start that never was");
                end_orphan(&RunDir::new(&host.config.run_dir(), name).qmp_socket()).await?;
                let taps: Vec<String> = resources.iter().filter_map(tap).collect();
                spawn::take_down(host, name, &taps).await?;
            }
            Resource::Tap { name, .. } => host.networks.remove(name).await?,
            // The VM's row names it.
            Resource::DiskFile { vm, .. } if known.vms.contains(vm) => {}
            Resource::DiskFile { vm, storage, path } => {
                tracing::info!(%vm, path, "sweeps a file of a VM that was never created");
                remove_file(host, *vm, storage, path).await?;
            }
            // Nobody makes the file any more; the file itself stands beside it.
            Resource::Space { .. } => {}
            Resource::Layer { vm, file }
                if known.images.contains(file) || known.elsewhere.contains(vm) => {}
            Resource::Layer { vm, file } => {
                tracing::info!(%vm, %file, "sweeps an image that the VM does not need");
                remove_file(host, *vm, &file.storage, &file.path).await?;
            }
            // The VM goes on from it.
            Resource::StateFile { file, .. } if known.saved.contains(file) => {}
            Resource::StateFile { vm, file } => {
                tracing::info!(%vm, %file, "sweeps a saved state that nothing goes on from");
                remove_file(host, *vm, &file.storage, &file.path).await?;
            }
            Resource::Bridge { name } if host.networks.bridge_is_used(name) => continue,
            // The network has another bridge by now, or was never made.
            Resource::Bridge { name } => host.networks.remove(name).await?,
        }
        host.ledger.unjournal_one(owner, resource).await?;
    }
    Ok(())
}

fn tap(resource: &Resource) -> Option<String> {
    match resource {
        Resource::Tap { name, .. } => Some(name.clone()),
        _ => None,
    }
}

async fn remove_file(
    host: &Arc<Host>,
    vm: VmId,
    storage: &Name,
    path: &str,
) -> Result<(), ApiError> {
    let (at, storage, path) = (Arc::clone(host), storage.clone(), path.to_owned());
    let removing = host.storages.aside(move |aside| {
        let folder = at.storages.folder(aside, &storage)?;
        folder.remove_file(&path)?;
        Ok(folder.remove_empty_folder(&vm_folder(vm))?)
    });
    removing.await
}

/// Ends the QEMU that was started with this socket, if there is one: the agent died between spawning it and noting its
/// pid, so it is found by its arguments. Its guest has never run: `cont` comes after the note.
async fn end_orphan(socket: &Path) -> Result<(), ApiError> {
    let wanted = socket.to_string_lossy().into_owned();
    let Some(pid) = find_by_argument(&wanted) else { return Ok(()) };
    let failed = |errno: rustix::io::Errno| {
        ApiError::internal("an orphaned QEMU was not ended", &std::io::Error::from(errno))
    };
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(failed)?;
    // The descriptor speaks of one process for good; if it still has the argument it is the one.
    if !has_argument(pid, &wanted) {
        return Ok(());
    }
    tracing::info!(pid = pid.as_raw_pid(), "ends an orphaned QEMU");
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(errno) => return Err(failed(errno)),
    }
    for _ in 0..ORPHAN_MILLISECONDS / ORPHAN_LOOK_MILLISECONDS {
        // A zombie has no arguments.
        if !has_argument(pid, &wanted) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(ORPHAN_LOOK_MILLISECONDS)).await;
    }
    Err(failed(rustix::io::Errno::BUSY))
}

fn find_by_argument(wanted: &str) -> Option<Pid> {
    let entries = std::fs::read_dir("/proc").ok()?;
    let pids =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let own = rustix::process::getpid();
    pids.filter_map(Pid::from_raw).find(|pid| *pid != own && has_argument(*pid, wanted))
}

/// Whether one of a process's arguments names the socket, and it is a QEMU's way of naming it.
fn has_argument(pid: Pid, socket: &str) -> bool {
    let file = format!("/proc/{}/cmdline", pid.as_raw_pid());
    let Ok(arguments) = std::fs::read(file) else { return false };
    let wanted = format!("path={socket},");
    arguments
        .split(|byte| *byte == 0)
        .any(|argument| String::from_utf8_lossy(argument).contains(&wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_orphan_is_known_by_its_socket_and_ended() {
        let socket = format!("/nonexistent/{}/q/qmp.sock", std::process::id());
        let marker = format!("socket,id=qmp,path={socket},server=on");
        let mut child = std::process::Command::new("sh")
            .args(["-c", "read _ < /proc/self/fd/0", "sh", &marker])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = Pid::from_child(&child);
        while !has_argument(pid, &socket) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        end_orphan(Path::new("/nonexistent/other.sock")).await.unwrap();
        assert!(child.try_wait().unwrap().is_none());
        end_orphan(Path::new(&socket)).await.unwrap();
        assert!(!child.wait().unwrap().success());
    }
}
