//! Creates a VM on this host: checks the definition, pins what is open in it, makes its disks, writes it down. And
//! removes a VM's files.
//!
//! The ledger's row is written last: until then the journal names the files, and a failure or a crash leaves them to the
//! sweep. Repeating the same request after a success changes nothing.

pub(super) mod disks;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use whimbrel_api::agent::VmReport;
use whimbrel_api::lineage::snapshot as snapshot_of;
use whimbrel_api::vm::{Boot, Disk, Firmware, ImageFormat, StoragePath, VmDefinition};
use whimbrel_api::{ApiError, ErrorCode, Name};
use whimbrel_migration::handoff::{Intent, Ownership};

use disks::Source;

use super::task::{self, Beginning};
use super::{clone, lineage, spawn};
use crate::host::Host;
use crate::ledger::Resource;
use crate::storage::image::ImageTool;
use crate::storage::{disk_path, space, vm_folder};
use crate::validate;

/// Creates a VM, stopped, with its disks. Its definition comes back with everything pinned.
///
/// # Errors
/// A refusal with nothing changed, or a failure after which nothing is left that the journal does not name.
pub async fn create(host: &Arc<Host>, asked: VmDefinition) -> Result<VmReport, ApiError> {
    match &asked.origin {
        Some(origin) if !host.vms.has(asked.id) => clone::begin(host, origin.clone(), asked).await,
        _ => make(host, asked, None).await,
    }
}

/// Creates a VM whose disks are new, or made from those of `parent`, which stand still meanwhile.
pub(super) async fn make(
    host: &Arc<Host>,
    asked: VmDefinition,
    parent: Option<&VmDefinition>,
) -> Result<VmReport, ApiError> {
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
    let definition = pin(host, asked, parent)?;
    validate::definition(&definition)?;
    check_here(host, &definition).await?;
    let engine = host.engine_for(&definition.machine)?;
    let tool = ImageTool::beside(&engine.binary, host.qemu_user());
    let sources = disks::sources(host, &tool, &definition, parent).await?;
    space::reserve(host, &owner, &disks::wanted(&definition, &sources)).await?;

    let mut journal: Vec<Resource> =
        definition.disks.iter().map(|disk| file(&definition, disk)).collect();
    journal.extend(variables(&definition)?);
    host.ledger.journal(&owner, &journal).await?;
    let made = make_files(host, &tool, definition.clone(), sources, parent).await;
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
        // A path that is not of our making is not ours to delete.
        let own = lineage::own_files(&definition);
        for file in &own {
            folder(&file.storage)?.remove_file(&file.path)?;
        }
        if let Some(Resource::DiskFile { storage, path, .. }) = variables(&definition)? {
            folder(&storage)?.remove_file(&path)?;
        }
        if let Some(saved) = &definition.saved {
            folder(&saved.file.storage)?.remove_file(&saved.file.path)?;
        }
        let storages: BTreeSet<&Name> = own.iter().map(|file| &file.storage).collect();
        for storage in storages {
            folder(storage)?.remove_empty_folder(&vm_folder(definition.id))?;
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
fn pin(
    host: &Host,
    asked: VmDefinition,
    parent: Option<&VmDefinition>,
) -> Result<VmDefinition, ApiError> {
    let mut definition = VmDefinition {
        generation: asked.generation.max(1),
        saved: None,
        template: false,
        snapshots: Vec::new(),
        snapshot: None,
        ..asked
    };
    if definition.machine.is_empty() {
        let engine = host.engines.first();
        let newest = engine.and_then(|engine| engine.pinned_machine_type("q35"));
        definition.machine = newest.map(str::to_owned).ok_or_else(|| {
            ApiError::new(ErrorCode::Engine, "no QEMU of this host offers a machine type to pin")
        })?;
    }
    for disk in &mut definition.disks {
        disk.layers.clear();
    }
    if let Some(parent) = parent {
        pin_to_parent(&mut definition, parent)?;
    }
    for disk in &mut definition.disks {
        disk.file.path = disk_path(definition.id, disk);
    }
    Ok(definition)
}

/// A clone's disks are as large as those that it is made from; a linked one's stand on them.
fn pin_to_parent(definition: &mut VmDefinition, parent: &VmDefinition) -> Result<(), ApiError> {
    let whole = definition.clone();
    let origin = definition.origin.as_ref();
    let linked = origin.is_some_and(|origin| origin.linked);
    let snapshot = origin.and_then(|origin| snapshot_of(parent, origin.snapshot.as_ref()?));
    for disk in &mut definition.disks {
        let layers = disks::of_parent(parent, &whole, disk);
        let Some(now) = parent.disks.iter().find(|found| found.name == disk.name) else {
            let message = format!("VM `{}` has no disk `{}`", parent.name, disk.name);
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        };
        let then = snapshot.and_then(|s| s.disks.iter().find(|found| found.name == disk.name));
        disk.size_bytes = then.map_or(now.size_bytes, |then| then.size_bytes);
        if linked {
            disk.format = ImageFormat::Qcow2;
            disk.layers = layers;
        }
    }
    Ok(())
}

/// Whether a repeated request asks for what is there: everything but what the first one pinned.
fn same_request(found: &VmDefinition, asked: &VmDefinition) -> bool {
    let mut asked = asked.clone();
    asked.generation = found.generation;
    if asked.machine.is_empty() {
        asked.machine.clone_from(&found.machine);
    }
    // What has happened to it since.
    asked.template = found.template;
    asked.snapshots.clone_from(&found.snapshots);
    asked.snapshot.clone_from(&found.snapshot);
    for (disk, found) in asked.disks.iter_mut().zip(&found.disks) {
        disk.file.path.clone_from(&found.file.path);
        disk.layers.clone_from(&found.layers);
        if asked.origin.is_some() || !found.layers.is_empty() {
            disk.format = found.format;
        }
        if asked.origin.is_some() {
            disk.size_bytes = found.size_bytes;
        }
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
async fn make_files(
    host: &Arc<Host>,
    tool: &ImageTool,
    definition: VmDefinition,
    sources: Vec<Source>,
    parent: Option<&VmDefinition>,
) -> Result<VmDefinition, ApiError> {
    let mut definition = definition;
    let id = definition.id;
    for (disk, source) in definition.disks.iter_mut().zip(sources) {
        disk.size_bytes = disks::make(host, tool, id, disk, source).await?;
        disks::sync_folder(host, id, &disk.file).await?;
    }
    if definition.boot == Boot::Firmware(Firmware::Ovmf) {
        let from = variables_of(host, &definition, parent).await?;
        disks::copy_small(host, id, from, &spawn::variables_file(&definition)?).await?;
    }
    Ok(definition)
}

/// Where the UEFI variables of a new VM come from: pristine ones, or those of the VM that it is a clone of.
async fn variables_of(
    host: &Arc<Host>,
    definition: &VmDefinition,
    parent: Option<&VmDefinition>,
) -> Result<PathBuf, ApiError> {
    let Some(parent) = parent else { return Ok(spawn::ovmf()?.1) };
    let snapshot = definition.origin.as_ref().and_then(|origin| origin.snapshot.as_ref());
    let kept = snapshot.and_then(|name| snapshot_of(parent, name)?.variables.clone());
    let file = match kept {
        Some(file) => file,
        None => spawn::variables_file(parent)?,
    };
    let at = Arc::clone(host);
    host.storages.aside(move |aside| at.storages.existing_file(aside, &file)).await
}
