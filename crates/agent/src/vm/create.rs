//! Creates a VM on this host: checks the definition, pins what is open in it, makes its disks, writes it down. And
//! removes a VM's files.
//!
//! The ledger's row is written last: until then the journal names the files, and a failure or a crash leaves them to the
//! sweep. Repeating the same request after a success changes nothing.

use std::sync::Arc;

use whimbrel_api::agent::VmReport;
use whimbrel_api::vm::{Boot, Disk, Firmware, StoragePath, VmDefinition};
use whimbrel_api::{ApiError, ErrorCode, Name, VmId};
use whimbrel_migration::handoff::{Intent, Ownership};

use super::task::{self, Beginning};
use super::{running, spawn};
use crate::host::Host;
use crate::ledger::Resource;
use crate::storage::image::{ImageTool, SECTOR_BYTES, SPARE_BYTES};
use crate::storage::{Aside, disk_path, vm_folder};
use crate::validate;

/// Creates a VM, stopped, with its disks. Its definition comes back with everything pinned.
///
/// # Errors
/// A refusal with nothing changed, or a failure after which nothing is left that the journal does not name.
pub async fn create(host: &Arc<Host>, asked: VmDefinition) -> Result<VmReport, ApiError> {
    // A repeated request waits for the first one: it must not take its files for left-overs.
    let owner = asked.id.to_string();
    let _alone = host.in_hand.wait_alone(&owner).await?;
    if host.vms.has(asked.id) {
        let report = host.vms.report(asked.id)?;
        return if same_request(&report.definition, &asked) {
            Ok(report)
        } else {
            Err(ApiError::new(
                ErrorCode::Exists,
                format!("there is a VM {} on this host already", asked.id),
            ))
        };
    }
    if host.ledger.current(asked.id).await?.is_some() {
        let message =
            format!("VM {} has been on this host before; a new VM needs a new id", asked.id);
        return Err(ApiError::new(ErrorCode::Exists, message));
    }
    let definition = pin(host, asked)?;
    validate::definition(&definition)?;
    check_here(host, &definition).await?;

    let mut journal: Vec<Resource> =
        definition.disks.iter().map(|disk| file(&definition, disk)).collect();
    journal.extend(variables(&definition)?);
    host.ledger.journal(&owner, &journal).await?;
    let made = make_files(host, definition.clone()).await;
    let noted = match made {
        Ok(definition) => note(host, definition).await,
        Err(error) => Err(error),
    };
    if noted.is_err() && delete_files(host, &definition).await.is_ok() {
        host.ledger.unjournal(&owner).await?;
    }
    noted
}

/// Removes a VM's files; what is not there is no error.
///
/// # Errors
/// `not-found` for a storage that this host does not know, or what failed.
pub(super) async fn delete_files(
    host: &Arc<Host>,
    definition: &VmDefinition,
) -> Result<(), ApiError> {
    let (at, definition) = (Arc::clone(host), definition.clone());
    let deleting = host.storages.aside(move |aside| {
        let folder = |storage: &Name| at.storages.folder(aside, storage);
        for disk in &definition.disks {
            // A path that is not of our making is not ours to delete.
            if disk.file.path == disk_path(definition.id, disk) {
                folder(&disk.file.storage)?.remove_file(&disk.file.path)?;
            }
        }
        if let Some(Resource::DiskFile { storage, path, .. }) = variables(&definition)? {
            folder(&storage)?.remove_file(&path)?;
        }
        if let Some(saved) = &definition.saved {
            folder(&saved.file.storage)?.remove_file(&saved.file.path)?;
        }
        for disk in &definition.disks {
            folder(&disk.file.storage)?.remove_empty_folder(&vm_folder(definition.id))?;
        }
        Ok(())
    });
    deleting.await
}

async fn note(host: &Arc<Host>, definition: VmDefinition) -> Result<VmReport, ApiError> {
    let ownership = Ownership::created(definition.id, Intent::Run);
    host.ledger.create_vm(&definition, &ownership).await?;
    tracing::info!(vm = %definition.name, id = %definition.id, "created");
    let id = definition.id;
    host.vms.insert(id, task::run(host, definition, ownership, Beginning::Stopped));
    host.vms.report(id)
}

/// Fills in what the request leaves to the creating host.
fn pin(host: &Host, asked: VmDefinition) -> Result<VmDefinition, ApiError> {
    let mut definition = asked;
    definition.generation = definition.generation.max(1);
    definition.saved = None;
    if definition.machine.is_empty() {
        let engine = host.engines.first();
        let newest = engine.and_then(|engine| engine.pinned_machine_type("q35"));
        definition.machine = newest.map(str::to_owned).ok_or_else(|| {
            ApiError::new(ErrorCode::Engine, "no QEMU of this host offers a machine type to pin")
        })?;
    }
    for disk in &mut definition.disks {
        disk.file.path = disk_path(definition.id, disk);
    }
    Ok(definition)
}

/// Whether a repeated request asks for what is there: everything but what the first one pinned.
fn same_request(found: &VmDefinition, asked: &VmDefinition) -> bool {
    let mut asked = asked.clone();
    asked.generation = found.generation;
    if asked.machine.is_empty() {
        asked.machine.clone_from(&found.machine);
    }
    for (disk, found) in asked.disks.iter_mut().zip(&found.disks) {
        disk.file.path.clone_from(&found.file.path);
        if disk.import.is_some() && disk.size_bytes == 0 {
            disk.size_bytes = found.size_bytes;
        }
    }
    asked == *found
}

/// Whether this host has what the definition names.
async fn check_here(host: &Arc<Host>, definition: &VmDefinition) -> Result<(), ApiError> {
    let engine = host.engine_for(&definition.machine)?;
    if engine.cpu_model(&definition.cpu).is_none_or(|model| !model.unavailable_features.is_empty())
    {
        let accelerator = engine.accelerator.as_wire();
        return Err(ApiError::new(
            ErrorCode::Engine,
            format!(
                "CPU model `{}` does not run on this host (accelerator {accelerator})",
                definition.cpu
            ),
        )
        .hint("`whimbrel host show` lists the models that do"));
    }
    for nic in &definition.nics {
        if host.networks.get(&nic.network).is_none() {
            return Err(ApiError::not_found("network", &nic.network));
        }
    }
    for name in super::storages_of(definition) {
        host.storages.get(&name)?;
    }
    let Boot::Kernel { kernel, initrd, .. } = &definition.boot else { return Ok(()) };
    let files: Vec<StoragePath> = std::iter::once(kernel).chain(initrd).cloned().collect();
    let at = Arc::clone(host);
    let looking = host.storages.aside(move |aside| {
        files.iter().try_for_each(|file| at.storages.existing_file(aside, file).map(drop))
    });
    looking.await
}

fn file(definition: &VmDefinition, disk: &Disk) -> Resource {
    Resource::DiskFile {
        vm: definition.id,
        storage: disk.file.storage.clone(),
        path: disk.file.path.clone(),
    }
}

/// The file of the VM's UEFI variables, if it has one.
fn variables(definition: &VmDefinition) -> Result<Option<Resource>, ApiError> {
    if definition.boot != Boot::Firmware(Firmware::Ovmf) {
        return Ok(None);
    }
    let file = spawn::variables_file(definition)?;
    Ok(Some(Resource::DiskFile { vm: definition.id, storage: file.storage, path: file.path }))
}

/// Makes all files of a VM; the definition comes back with the sizes of imported disks.
async fn make_files(host: &Arc<Host>, definition: VmDefinition) -> Result<VmDefinition, ApiError> {
    let engine = host.engine_for(&definition.machine)?;
    let tool = ImageTool::beside(&engine.binary, host.qemu_user());
    let mut definition = definition;
    let id = definition.id;
    for disk in &mut definition.disks {
        disk.size_bytes = make_disk(host, &tool, id, disk).await?;
        let (at, storage) = (Arc::clone(host), disk.file.storage.clone());
        let syncing = host.storages.aside(move |aside| {
            Ok(at.storages.folder(aside, &storage)?.sync_folder(&vm_folder(id))?)
        });
        syncing.await?;
    }
    if definition.boot == Boot::Firmware(Firmware::Ovmf) {
        let (at, of) = (Arc::clone(host), definition.clone());
        host.storages.aside(move |aside| make_variables(&at, aside, &of)).await?;
    }
    Ok(definition)
}

/// Makes one disk; returns the size that the guest sees, in bytes.
async fn make_disk(
    host: &Arc<Host>,
    tool: &ImageTool,
    vm: VmId,
    disk: &Disk,
) -> Result<u64, ApiError> {
    let Some(import) = &disk.import else {
        // New images are sparse: they need room for what is written, not for what they promise.
        let file = new_file(host, vm, disk, 0).await?;
        tool.create(file, disk.format, disk.size_bytes).await?;
        return Ok(disk.size_bytes);
    };
    let (at, from) = (Arc::clone(host), import.file.clone());
    let opening = host
        .storages
        .aside(move |aside| Ok(at.storages.folder(aside, &from.storage)?.open_file(&from.path)?));
    let source = opening.await?;
    let facts = tool.inspect(&source, &import.file.to_string(), import.format).await?;
    let size_bytes = if disk.size_bytes == 0 { facts.virtual_bytes } else { disk.size_bytes };
    if size_bytes < facts.virtual_bytes {
        let message = format!(
            "disk `{}` would have {size_bytes} bytes, but the image to import has {}",
            disk.name, facts.virtual_bytes
        );
        return Err(ApiError::new(ErrorCode::OutOfRange, message));
    }
    let occupied_bytes = facts.occupied_bytes.min(facts.virtual_bytes);
    let file = new_file(host, vm, disk, occupied_bytes).await?;
    let grow = (size_bytes > facts.virtual_bytes).then_some(size_bytes);
    tool.copy(source, import.format, file, disk.format, grow).await?;
    Ok(size_bytes.next_multiple_of(SECTOR_BYTES))
}

/// Makes the empty file of a disk, in a storage that has room for so many bytes and some more.
async fn new_file(
    host: &Arc<Host>,
    vm: VmId,
    disk: &Disk,
    bytes: u64,
) -> Result<std::fs::File, ApiError> {
    let (at, disk) = (Arc::clone(host), disk.clone());
    let making = host.storages.aside(move |aside| {
        let folder = at.storages.folder(aside, &disk.file.storage)?;
        let available_bytes = folder.space()?.available_bytes;
        let wanted = bytes.saturating_add(SPARE_BYTES);
        if available_bytes < wanted {
            let message = format!(
                "storage `{}` has {available_bytes} bytes free, disk `{}` needs {wanted}",
                disk.file.storage, disk.name
            );
            return Err(ApiError::new(ErrorCode::NoResources, message));
        }
        folder.create_folders(&vm_folder(vm))?;
        Ok(folder.create_file(&disk.file.path, at.qemu_user())?)
    });
    making.await
}

/// Copies the pristine UEFI variables.
fn make_variables(host: &Host, aside: &Aside, definition: &VmDefinition) -> Result<(), ApiError> {
    let (_, pristine) = spawn::ovmf()?;
    let target = spawn::variables_file(definition)?;
    let failed =
        |error: std::io::Error| running::engine_error("the UEFI variables were not made", &error);
    let mut source = std::fs::File::open(pristine).map_err(failed)?;
    let mut file = host
        .storages
        .folder(aside, &target.storage)?
        .create_file(&target.path, host.qemu_user())?;
    std::io::copy(&mut source, &mut file).map_err(failed)?;
    file.sync_all().map_err(failed)
}
