//! VMs through the public API: created, started, stopped, paused, resumed, deleted.
//!
//! The owning host's agent does all of it and is the one that refuses; what it answers is passed through. While a migration
//! holds a VM, everything that would change the VM is refused here already, and by the agent in any case.

use std::collections::BTreeSet;
use std::time::Duration;

use whimbrel_api::agent::VmReport;
use whimbrel_api::event::Event;
use whimbrel_api::measure::{DirtyRateReport, DirtyRateRequest};
use whimbrel_api::pool::Contact;
use whimbrel_api::vm::{CreateVm, StateFile, StopRequest, Vm, VmAction, VmDefinition};
use whimbrel_api::{ApiError, Epoch, ErrorCode, Name};

use crate::Controller;
use crate::definition::{self, Needs};
use crate::hosts::Member;
use crate::lineage;
use crate::networks::at_host;
use crate::placement::{self, Candidate};
use crate::store::{BeginError, Deleted, Inserted, VmRow};

/// How often it is looked whether a host that is asked for something long is still heard, in milliseconds.
const SILENCE_LOOK_MS: u64 = 500;

/// Creates a VM, stopped. The same request again is answered with the VM, and finishes what an earlier one left half-done.
///
/// Written down before the host is asked, so that no host ever has a VM that the pool does not know. If the host refuses, the VM
/// is forgotten again; if it does not answer, nobody knows whether it did it, and the VM stays with the state `unknown`.
pub(crate) async fn create(controller: &Controller, request: CreateVm) -> Result<Vm, ApiError> {
    definition::check(&request.spec)?;
    if let Some(row) = controller.store().vm(request.id).await? {
        return again(controller, row, &request).await;
    }
    let candidates = candidates(controller);
    let needs = definition::needs(&request.spec);
    check_known(controller, &needs).await?;
    let asked_machine = request.spec.machine.as_deref();
    let home = match &request.host {
        None => placement::choose_host(&needs, asked_machine, &candidates)?.clone(),
        Some(name) => {
            let candidate = named(controller, name)?;
            placement::check_host(&needs, asked_machine, &candidate)?;
            candidate.report
        }
    };
    let machine = match asked_machine {
        Some(machine) => machine.to_owned(),
        None => placement::choose_machine(&home, &candidates).ok_or_else(|| {
            let message = format!("no QEMU of {} offers a versioned q35 machine", home.name);
            ApiError::new(ErrorCode::NoResources, message)
        })?,
    };
    let taken = macs(&controller.store().vms().await?);
    let definition = definition::define(request.id, &request.spec, machine, &taken)?;
    let row = VmRow {
        host: home.name,
        epoch: Epoch::FIRST,
        confirmed: false,
        spec: request.spec.clone(),
        definition,
    };
    match controller.store().insert_vm(row.clone()).await? {
        Inserted::New => ask_to_create(controller, row).await,
        Inserted::SameId(row) => again(controller, *row, &request).await,
        Inserted::NameTaken => {
            let message = format!("there is a VM `{}` already", request.spec.name);
            Err(ApiError::new(ErrorCode::Exists, message))
        }
    }
}

/// The request of a VM that is known by its id.
async fn again(controller: &Controller, row: VmRow, request: &CreateVm) -> Result<Vm, ApiError> {
    let same_host = request.host.as_ref().is_none_or(|host| *host == row.host);
    if row.spec != request.spec || (!row.confirmed && !same_host) {
        let message =
            format!("the id {} is that of the VM `{}`, which is another", row.id(), row.name());
        return Err(ApiError::new(ErrorCode::Exists, message));
    }
    if row.confirmed { Ok(controller.view(&row)) } else { ask_to_create(controller, row).await }
}

pub(crate) async fn ask_to_create(controller: &Controller, row: VmRow) -> Result<Vm, ApiError> {
    let member = controller.hosts().get(&row.host)?;
    let agent = member.agent();
    let answer = tokio::select! {
        answer = agent.put_vm(&row.definition) => answer,
        why = falls_silent(&member) => Err(ApiError::new(ErrorCode::Unreachable, why)),
    };
    match answer {
        Ok(report) => accepted(controller, row, report).await,
        Err(error) => {
            if error.is_refusal() && is_certainly_absent(controller, &row).await {
                controller.store().delete_vm(row.id()).await?;
            } else {
                controller.publish_vm(&row);
            }
            Err(at_host(&row.host, error))
        }
    }
}

/// Ends when the host does not answer any more, with why. Importing a disk may take an hour, for as long as its host is heard.
async fn falls_silent(member: &Member) -> String {
    loop {
        if let Contact::Unreachable { why, .. } = member.view().contact {
            return why;
        }
        tokio::time::sleep(Duration::from_millis(SILENCE_LOOK_MS)).await;
    }
}

/// Whether its host says that it has no such VM: an earlier request, whose answer was lost, may have created it.
async fn is_certainly_absent(controller: &Controller, row: &VmRow) -> bool {
    let Ok(agent) = controller.agent(&row.host) else { return false };
    matches!(agent.vm(row.id()).await, Err(error) if error.code == ErrorCode::NotFound)
}

/// Notes what the host answered about a VM and tells what the API says of the VM now.
pub(crate) async fn accepted(
    controller: &Controller,
    row: VmRow,
    report: VmReport,
) -> Result<Vm, ApiError> {
    let known = controller.accept_report(&row.host, report).await?;
    Ok(controller.view(&known.unwrap_or(row)))
}

fn candidates(controller: &Controller) -> Vec<Candidate> {
    let all = controller.hosts().all();
    all.iter().filter_map(|member| candidate(member)).collect()
}

fn candidate(member: &Member) -> Option<Candidate> {
    let report = member.ready_report()?;
    Some(Candidate { enabled: member.is_enabled(), report })
}

fn named(controller: &Controller, name: &Name) -> Result<Candidate, ApiError> {
    let member = controller.hosts().get(name)?;
    candidate(&member).ok_or_else(|| {
        ApiError::new(ErrorCode::Unreachable, format!("{name} does not answer"))
            .hint(format!("`whimbrel host show {name}` tells since when"))
    })
}

/// A network or storage that the pool does not know is told as such, and not as what some host lacks.
async fn check_known(controller: &Controller, needs: &Needs) -> Result<(), ApiError> {
    let networks = controller.store().networks().await?;
    let unknown = |name: &&Name| !networks.iter().any(|network| network.name == **name);
    if let Some(name) = needs.networks.iter().find(unknown) {
        return Err(ApiError::not_found("network", name));
    }
    let storages = controller.store().storages().await?;
    let unknown = |name: &&Name| !storages.iter().any(|storage| storage.name == **name);
    match needs.storages.iter().find(unknown) {
        Some(name) => Err(ApiError::not_found("storage", name)),
        None => Ok(()),
    }
}

pub(crate) fn macs(rows: &[VmRow]) -> BTreeSet<String> {
    let of = |definition: &VmDefinition| definition.nics.clone();
    rows.iter().flat_map(|row| of(&row.definition)).map(|nic| nic.mac).collect()
}

/// Starts, pauses or resumes a VM.
pub(crate) async fn act(
    controller: &Controller,
    vm: &str,
    action: VmAction,
) -> Result<Vm, ApiError> {
    let row = free_vm(controller, vm).await?;
    let report = controller.agent(&row.host)?.vm_action(row.id(), action).await?;
    accepted(controller, row, report).await
}

/// Stops a VM.
pub(crate) async fn stop(
    controller: &Controller,
    vm: &str,
    request: &StopRequest,
) -> Result<Vm, ApiError> {
    let row = free_vm(controller, vm).await?;
    let report = controller.agent(&row.host)?.stop_vm(row.id(), request).await?;
    accepted(controller, row, report).await
}

/// Saves a running or paused VM's whole state to a file in a storage; it is stopped then.
pub(crate) async fn save(
    controller: &Controller,
    vm: &str,
    to: &StateFile,
) -> Result<Vm, ApiError> {
    let row = free_vm(controller, vm).await?;
    let report = controller.agent(&row.host)?.save_vm(row.id(), to).await?;
    accepted(controller, row, report).await
}

/// Restores a stopped VM from such a file.
pub(crate) async fn restore(
    controller: &Controller,
    vm: &str,
    from: &StateFile,
) -> Result<Vm, ApiError> {
    let row = free_vm(controller, vm).await?;
    let report = controller.agent(&row.host)?.restore_vm(row.id(), from).await?;
    accepted(controller, row, report).await
}

/// Lets QEMU measure how fast a VM's guest writes.
pub(crate) async fn dirty_rate(
    controller: &Controller,
    vm: &str,
    request: &DirtyRateRequest,
) -> Result<DirtyRateReport, ApiError> {
    let row = free_vm(controller, vm).await?;
    controller.agent(&row.host)?.dirty_rate(row.id(), request).await
}

/// Deletes a stopped VM with its disks. A VM that its host does not have any more is forgotten.
pub(crate) async fn delete(controller: &Controller, vm: &str) -> Result<(), ApiError> {
    let _alone = controller.images.lock().await;
    let row = free_vm(controller, vm).await?;
    lineage::refuse_if_stood_on(controller, &row).await?;
    match controller.agent(&row.host)?.delete_vm(row.id()).await {
        Ok(()) => {}
        Err(error) if error.code == ErrorCode::NotFound => {}
        Err(error) => return Err(error),
    }
    match controller.store().delete_vm(row.id()).await? {
        Deleted::Gone => {}
        Deleted::Migrating(id) => {
            let message = format!("the VM is being migrated (migration {id})");
            return Err(ApiError::new(ErrorCode::Migrating, message));
        }
    }
    controller.hosts().get(&row.host)?.forget_vm(row.id());
    let deleted = Event::VmDeleted { id: row.id(), name: row.name().clone() };
    controller.events().publish(deleted);
    Ok(())
}

/// A VM that no migration holds.
pub(crate) async fn free_vm(controller: &Controller, vm: &str) -> Result<VmRow, ApiError> {
    let row = controller.find_vm(vm).await?;
    match controller.store().active_migration_of(row.id()).await? {
        None => Ok(row),
        Some(migration) => Err(BeginError::AlreadyMigrating(Box::new(migration)).into()),
    }
}
