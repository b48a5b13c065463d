//! Takes down at the start what an earlier life of the agent has left: things that the journal names and nobody owns.
//!
//! Runs before the door opens and before any migration is taken up, so that nothing is being made meanwhile. What it is
//! not sure about it leaves alone and says so: a QEMU whose VM has no ownership record, a process that cannot be looked
//! at, a folder that the journal does not know.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use whimbrel_api::{ApiError, Name, VmId};
use whimbrel_migration::handoff::{Ownership, Standing};
use whimbrel_qemu::process::{AdoptError, Process};

use crate::host::Host;
use crate::ledger::{Resource, RunRecord};
use crate::storage::vm_folder;
use crate::vm::{RunDir, own_run, spawn};

/// How long an orphan may take to be gone, in milliseconds.
const ORPHAN_MILLISECONDS: u64 = 10_000;
/// How often it is looked at meanwhile, in milliseconds.
const ORPHAN_LOOK_MILLISECONDS: u64 = 20;

/// Sweeps.
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
    let runs = host.ledger.runs().await?;
    let vms = host.ledger.vms().await?;
    let ownerships: HashMap<VmId, Ownership> =
        host.ledger.current_of_all().await?.into_iter().map(|record| (record.vm, record)).collect();

    let mut kept: HashSet<String> = HashSet::new();
    for record in ownerships.values() {
        let row = vms.iter().find(|row| row.definition.id == record.vm);
        let run = match record.standing {
            Standing::Owned
            | Standing::Leaving { .. }
            | Standing::Released { .. }
            | Standing::Serving { .. } => {
                own_run(record, row, &runs)
            }
            Standing::Expected { .. } | Standing::Fetching { .. } => runs
                .iter()
                .find(|run| run.definition.id == record.vm && run.migration == record.migration),
            Standing::Gone { .. } | Standing::Refused { .. } => None,
        };
        kept.extend(run.map(|run| run.name.clone()));
    }
    let surplus: Vec<&RunRecord> = runs.iter().filter(|run| !kept.contains(&run.name)).collect();
    for run in surplus {
        if ownerships.contains_key(&run.definition.id) {
            end_run(host, run).await;
        } else {
            tracing::error!(
                run = run.name,
                "a QEMU of a VM that nobody has a record of is left alone"
            );
            kept.insert(run.name.clone());
        }
    }
    let known_vms = vms.iter().map(|row| row.definition.id).collect();
    sweep_journal(host, &kept, &known_vms).await
}

/// Ends a QEMU that this host must not run any more, or that never ran, and takes down what belongs to it.
async fn end_run(host: &Host, run: &RunRecord) {
    tracing::info!(run = run.name, "sweeps a QEMU that nobody owns");
    let log = RunDir::new(&host.config.run_dir(), &run.name).qemu_log();
    let ended = match Process::adopt(&run.process, &log) {
        Ok(process) => spawn::end(host, &process).await,
        Err(AdoptError::Gone { .. }) => Ok(()),
        Err(error) => Err(ApiError::internal("it cannot be looked at", &error)),
    };
    match ended {
        Ok(()) => spawn::sweep_run(host, &run.name, &run.taps).await,
        Err(error) => tracing::error!(run = run.name, %error, "a QEMU was not swept"),
    }
}

async fn sweep_journal(
    host: &Arc<Host>,
    kept: &HashSet<String>,
    known_vms: &HashSet<VmId>,
) -> Result<(), ApiError> {
    let mut of_owner: BTreeMap<String, Vec<Resource>> = BTreeMap::new();
    for (owner, resource) in host.ledger.journaled().await? {
        of_owner.entry(owner).or_default().push(resource);
    }
    for (owner, resources) in of_owner {
        if kept.contains(&owner) {
            continue;
        }
        if let Err(error) = sweep_owner(host, &owner, &resources, known_vms).await {
            tracing::error!(owner, %error, "something was not swept");
        }
    }
    Ok(())
}

/// Removes all that was made, or about to be made, for one owner.
async fn sweep_owner(
    host: &Arc<Host>,
    owner: &str,
    resources: &[Resource],
    known_vms: &HashSet<VmId>,
) -> Result<(), ApiError> {
    for resource in resources {
        match resource {
            Resource::Run { name } => {
                tracing::info!(run = name, "sweeps what was made for a start that never was");
                end_orphan(&RunDir::new(&host.config.run_dir(), name).qmp_socket()).await?;
                spawn::take_down(host, name, &[]).await?;
            }
            Resource::Tap { name, .. } => host.networks.remove(name).await?,
            Resource::DiskFile { vm, storage, path } => {
                if known_vms.contains(vm) {
                    continue;
                }
                tracing::info!(%vm, path, "sweeps a file of a VM that was never created");
                remove_file(host, *vm, storage, path).await?;
            }
            // The network's row decides; without one the bridge was to be made and the request failed.
            Resource::Bridge { name } => {
                if host.networks.bridge_is_used(name) {
                    return Ok(());
                }
                host.networks.remove(name).await?;
            }
        }
    }
    host.ledger.unjournal(owner).await?;
    Ok(())
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
        tokio::time::sleep(std::time::Duration::from_millis(ORPHAN_LOOK_MILLISECONDS)).await;
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
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        end_orphan(Path::new("/nonexistent/other.sock")).await.unwrap();
        assert!(child.try_wait().unwrap().is_none());
        end_orphan(Path::new(&socket)).await.unwrap();
        assert!(!child.wait().unwrap().success());
    }
}
