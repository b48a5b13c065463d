//! Templates, clones and snapshots of VMs, pool-wide: what stands on what, and who may therefore not go.
//!
//! The owning host's agent does the work. What only the pool knows is which linked clones stand on a VM's images: they may live
//! on any host that reaches the storage. A clone's row is written before its host is asked, and between looking for clones and
//! deleting nobody makes one ([`Controller::images`]), so that no clone ever loses what it stands on.

use std::collections::BTreeSet;

use whimbrel_api::lineage::{
    CloneVm, Origin, SetTemplate, TakeSnapshot, chain, snapshot, stands_on, vm_folder,
};
use whimbrel_api::vm::{ImageFormat, Vm, VmDefinition, VmSpec};
use whimbrel_api::{ApiError, Epoch, ErrorCode, Name, VmId};

use crate::Controller;
use crate::definition::draw_macs;
use crate::store::{Inserted, VmRow};
use crate::vms::{accepted, ask_to_create, free_vm, macs};

/// Makes a VM a template, or a template a VM again.
pub(crate) async fn set_template(
    controller: &Controller,
    vm: &str,
    request: &SetTemplate,
) -> Result<Vm, ApiError> {
    let _alone = controller.images.lock().await;
    let row = free_vm(controller, vm).await?;
    if !request.template {
        let active: BTreeSet<_> = row.definition.disks.iter().map(|disk| &disk.file).collect();
        let rows = controller.store().vms().await?;
        let on = clones(&rows, &row, |definition| {
            stands_on(definition, row.id()).any(|layer| active.contains(&layer.file))
        });
        refuse_if_needed(&format!("the template `{}`", row.name()), &on)?;
    }
    let report = controller.agent(&row.host)?.set_template(row.id(), request).await?;
    accepted(controller, row, report).await
}

/// Clones a VM, a template or a snapshot on its host. The same request again is answered with the clone.
pub(crate) async fn clone_vm(
    controller: &Controller,
    vm: &str,
    request: CloneVm,
) -> Result<Vm, ApiError> {
    let source = free_vm(controller, vm).await?;
    let origin =
        Origin { vm: source.id(), snapshot: request.snapshot.clone(), linked: request.linked };
    let row = {
        let _alone = controller.images.lock().await;
        if let Some(row) = controller.store().vm(request.id).await? {
            return again(controller, row, &request, &origin).await;
        }
        check(controller, &source, &request).await?;
        let taken = macs(&controller.store().vms().await?);
        let row = clone_of(&source, &request, origin, taken)?;
        match controller.store().insert_vm(row.clone()).await? {
            Inserted::New => row,
            Inserted::SameId(_) | Inserted::NameTaken => {
                let message = format!("there is a VM `{}` already", request.name);
                return Err(ApiError::new(ErrorCode::Exists, message));
            }
        }
    };
    ask_to_create(controller, row).await
}

/// The request of a clone that is known by its id.
async fn again(
    controller: &Controller,
    row: VmRow,
    request: &CloneVm,
    origin: &Origin,
) -> Result<Vm, ApiError> {
    if row.definition.origin.as_ref() != Some(origin) || *row.name() != request.name {
        let message =
            format!("the id {} is that of the VM `{}`, which is another", row.id(), row.name());
        return Err(ApiError::new(ErrorCode::Exists, message));
    }
    if row.confirmed { Ok(controller.view(&row)) } else { ask_to_create(controller, row).await }
}

/// What can be known here of whether a clone can be made; the host knows the rest.
async fn check(controller: &Controller, source: &VmRow, request: &CloneVm) -> Result<(), ApiError> {
    let member = controller.hosts().get(&source.host)?;
    if !member.is_enabled() {
        let message = format!("{} is disabled: it takes no new VM", source.host);
        return Err(ApiError::new(ErrorCode::WrongState, message));
    }
    if let Some(name) = &request.snapshot
        && snapshot(&source.definition, name).is_none()
    {
        let message = format!("VM `{}` has no snapshot `{name}`", source.name());
        return Err(ApiError::new(ErrorCode::NotFound, message));
    }
    let Some(storage) = &request.storage else { return Ok(()) };
    if request.linked {
        let message = "a linked clone's disks stay beside those that they stand on: `storage` does not go with `linked`";
        return Err(ApiError::new(ErrorCode::BadRequest, message));
    }
    let known = controller.store().storages().await?;
    match known.iter().any(|known| known.name == *storage) {
        true => Ok(()),
        false => Err(ApiError::not_found("storage", storage)),
    }
}

/// The clone's row: the same hardware under a new identity. Sizes and layers of its disks are its host's to fill in.
fn clone_of(
    source: &VmRow,
    request: &CloneVm,
    origin: Origin,
    taken: BTreeSet<String>,
) -> Result<VmRow, ApiError> {
    let mut definition = VmDefinition {
        id: request.id,
        generation: 1,
        name: request.name.clone(),
        saved: None,
        origin: Some(origin),
        template: false,
        snapshots: Vec::new(),
        snapshot: None,
        ..source.definition.clone()
    };
    for disk in &mut definition.disks {
        disk.import = None;
        disk.layers.clear();
        if request.linked {
            disk.format = ImageFormat::Qcow2;
        }
        if let Some(storage) = &request.storage {
            disk.file.storage = storage.clone();
        }
        disk.file.path =
            format!("{}/{}.{}", vm_folder(request.id), disk.name, disk.format.as_str());
    }
    draw_macs(&mut definition.nics, taken)?;
    let mut spec = VmSpec { name: request.name.clone(), ..source.spec.clone() };
    spec.nics.iter_mut().for_each(|nic| nic.mac = None);
    Ok(VmRow { host: source.host.clone(), epoch: Epoch::FIRST, confirmed: false, spec, definition })
}

/// Takes a snapshot.
pub(crate) async fn take_snapshot(
    controller: &Controller,
    vm: &str,
    request: &TakeSnapshot,
) -> Result<Vm, ApiError> {
    let row = free_vm(controller, vm).await?;
    let report = controller.agent(&row.host)?.take_snapshot(row.id(), request).await?;
    accepted(controller, row, report).await
}

/// Goes back to a snapshot.
pub(crate) async fn revert(controller: &Controller, vm: &str, to: &Name) -> Result<Vm, ApiError> {
    let row = free_vm(controller, vm).await?;
    let report = controller.agent(&row.host)?.revert(row.id(), to).await?;
    accepted(controller, row, report).await
}

/// Deletes a snapshot on which no clone stands.
pub(crate) async fn delete_snapshot(
    controller: &Controller,
    vm: &str,
    name: &Name,
) -> Result<Vm, ApiError> {
    let _alone = controller.images.lock().await;
    let row = free_vm(controller, vm).await?;
    let rows = controller.store().vms().await?;
    let tops: BTreeSet<_> = row
        .definition
        .disks
        .iter()
        .filter_map(|disk| chain(&row.definition, name, &disk.name).into_iter().next())
        .map(|layer| layer.file)
        .collect();
    let on = clones(&rows, &row, |definition| {
        stands_on(definition, row.id()).any(|layer| tops.contains(&layer.file))
    });
    refuse_if_needed(&format!("the snapshot `{name}` of VM `{}`", row.name()), &on)?;
    let report = controller.agent(&row.host)?.delete_snapshot(row.id(), name).await?;
    accepted(controller, row, report).await
}

/// Refuses to delete a VM on which clones stand, or of which one is being made.
pub(crate) async fn refuse_if_stood_on(
    controller: &Controller,
    row: &VmRow,
) -> Result<(), ApiError> {
    let rows = controller.store().vms().await?;
    let on = clones(&rows, row, |definition| stands_on(definition, row.id()).next().is_some());
    refuse_if_needed(&format!("VM `{}`", row.name()), &on)
}

/// The VMs that stand on `of` in that way, and those that are being made from it: what they will stand on is not known yet.
fn clones(rows: &[VmRow], of: &VmRow, stands: impl Fn(&VmDefinition) -> bool) -> Vec<Name> {
    let made_from = |row: &VmRow, vm: VmId| {
        !row.confirmed && row.definition.origin.as_ref().is_some_and(|origin| origin.vm == vm)
    };
    let needs =
        |row: &&VmRow| row.id() != of.id() && (stands(&row.definition) || made_from(row, of.id()));
    rows.iter().filter(needs).map(|row| row.name().clone()).collect()
}

fn refuse_if_needed(what: &str, by: &[Name]) -> Result<(), ApiError> {
    if by.is_empty() {
        return Ok(());
    }
    let by: Vec<&str> = by.iter().map(Name::as_str).collect();
    let message = format!("{what} is needed by its clones: {}", by.join(", "));
    Err(ApiError::new(ErrorCode::InUse, message).hint("delete them first"))
}
