//! How a VM's definition changes with snapshots and clones: pure functions on definitions, and which files one names.
//!
//! The one rule: a file beneath a disk's own is never written again for as long as any snapshot, template or clone stands on it.
//! Linked clones stand on snapshots and templates alone, so a layer that no snapshot has is the VM's own business, and may be
//! merged with what is above it. Nothing is touched here; [`super::task`] makes and removes the files.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use whimbrel_api::lineage::{Layer, Snapshot, SnapshotDisk, chain, is_own, snapshot};
use whimbrel_api::vm::{Disk, ImageFormat, StoragePath, VmDefinition};
use whimbrel_api::{ApiError, ErrorCode, Name};

/// New images for a VM's disks, by the disk's name.
pub(super) type Overlays = BTreeMap<Name, StoragePath>;

/// All images of a disk, the one with the latest data first.
pub(super) fn images(disk: &Disk) -> Vec<Layer> {
    let own = Layer { file: disk.file.clone(), format: disk.format };
    std::iter::once(own).chain(disk.layers.iter().cloned()).collect()
}

/// All images and variables that a definition names besides the variables in use.
pub(crate) fn files(definition: &VmDefinition) -> BTreeSet<StoragePath> {
    let disks = definition.disks.iter().flat_map(images).map(|layer| layer.file);
    let snapshots = definition.snapshots.iter();
    let frozen = snapshots.clone().flat_map(|snapshot| &snapshot.disks);
    let frozen = frozen.flat_map(|disk| &disk.layers).map(|layer| layer.file.clone());
    let variables = snapshots.filter_map(|snapshot| snapshot.variables.clone());
    disks.chain(frozen).chain(variables).collect()
}

/// Those of them that are the VM's own, and go with it.
pub(crate) fn own_files(definition: &VmDefinition) -> BTreeSet<StoragePath> {
    files(definition).into_iter().filter(|file| is_own(definition.id, file)).collect()
}

/// The disks that a snapshot is of: those that the guest may write.
pub(super) fn written(definition: &VmDefinition) -> impl Iterator<Item = &Disk> {
    definition.disks.iter().filter(|disk| !disk.read_only)
}

/// The snapshot of that name.
pub(super) fn find<'a>(vm: &'a VmDefinition, name: &Name) -> Result<&'a Snapshot, ApiError> {
    snapshot(vm, name).ok_or_else(|| {
        let message = format!("VM `{}` has no snapshot `{name}`", vm.name);
        ApiError::new(ErrorCode::NotFound, message)
            .hint(format!("`whimbrel vm snapshot list {}` shows all", vm.name))
    })
}

/// The definition after a snapshot: each written disk goes on in its overlay.
pub(super) fn taken(
    vm: &VmDefinition,
    name: &Name,
    now: Timestamp,
    overlays: &Overlays,
    variables: Option<StoragePath>,
) -> VmDefinition {
    let disks = written(vm).map(|disk| {
        let beneath = vm.snapshot.as_ref().map_or(0, |parent| chain(vm, parent, &disk.name).len());
        let mut layers = images(disk);
        layers.truncate(layers.len().saturating_sub(beneath));
        SnapshotDisk { name: disk.name.clone(), size_bytes: disk.size_bytes, layers }
    });
    let snapshot = Snapshot {
        name: name.clone(),
        taken: now,
        parent: vm.snapshot.clone(),
        disks: disks.collect(),
        variables,
    };
    let mut changed = next(vm);
    for disk in &mut changed.disks {
        if let Some(overlay) = overlays.get(&disk.name) {
            let layers = images(disk);
            go_on(disk, overlay, layers);
        }
    }
    changed.snapshots.push(snapshot);
    changed.snapshot = Some(name.clone());
    changed
}

/// The definition after going back to a snapshot: each of its disks goes on from it in a new overlay.
pub(super) fn reverted(vm: &VmDefinition, to: &Snapshot, overlays: &Overlays) -> VmDefinition {
    let mut changed = next(vm);
    for disk in &mut changed.disks {
        let was = to.disks.iter().find(|was| was.name == disk.name);
        if let (Some(was), Some(overlay)) = (was, overlays.get(&disk.name)) {
            disk.size_bytes = was.size_bytes;
            go_on(disk, overlay, chain(vm, &to.name, &disk.name));
        }
    }
    changed.snapshot = Some(to.name.clone());
    changed
}

/// The definition without a snapshot. What stood on it stands on its parent, with the layers of both.
pub(super) fn without(vm: &VmDefinition, name: &Name) -> VmDefinition {
    let mut changed = next(vm);
    let Some(at) = changed.snapshots.iter().position(|found| found.name == *name) else {
        return changed;
    };
    let gone = changed.snapshots.remove(at);
    for child in &mut changed.snapshots {
        if child.parent.as_ref() != Some(name) {
            continue;
        }
        child.parent.clone_from(&gone.parent);
        for disk in &mut child.disks {
            let beneath = gone.disks.iter().find(|found| found.name == disk.name);
            disk.layers.extend(beneath.into_iter().flat_map(|found| found.layers.iter().cloned()));
        }
    }
    if changed.snapshot.as_ref() == Some(name) {
        changed.snapshot = gone.parent;
    }
    changed
}

/// A disk whose own image can be merged with the layer beneath it, because nothing else stands on that: it is the VM's own and in
/// no snapshot.
pub(super) fn mergeable(vm: &VmDefinition) -> Option<&Disk> {
    let frozen: BTreeSet<&StoragePath> = vm
        .snapshots
        .iter()
        .flat_map(|snapshot| &snapshot.disks)
        .flat_map(|disk| &disk.layers)
        .map(|layer| &layer.file)
        .collect();
    let alone = |disk: &&Disk| {
        let below = disk.layers.first();
        below.is_some_and(|below| is_own(vm.id, &below.file) && !frozen.contains(&below.file))
    };
    written(vm).find(alone)
}

/// The definition after a disk's own image was merged with the layer beneath it.
pub(super) fn merged(vm: &VmDefinition, disk: &Name) -> VmDefinition {
    let mut changed = next(vm);
    if let Some(disk) = changed.disks.iter_mut().find(|found| found.name == *disk)
        && !disk.layers.is_empty()
    {
        let below = disk.layers.remove(0);
        disk.file = below.file;
        disk.format = below.format;
    }
    changed
}

/// The definition as a template, or as a VM again.
pub(super) fn as_template(vm: &VmDefinition, template: bool) -> VmDefinition {
    VmDefinition { template, ..next(vm) }
}

fn go_on(disk: &mut Disk, overlay: &StoragePath, layers: Vec<Layer>) {
    disk.layers = layers;
    disk.file = overlay.clone();
    disk.format = ImageFormat::Qcow2;
}

fn next(vm: &VmDefinition) -> VmDefinition {
    VmDefinition { generation: vm.generation.saturating_add(1), ..vm.clone() }
}

#[cfg(test)]
mod tests;
