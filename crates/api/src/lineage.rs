//! Where a VM's disks come from, and what they can go back to: layers, snapshots, templates and clones.
//!
//! ```text
//!             active (written)        frozen (never written again)
//!   web01     vda-7c1e ──────────▶ vda-02fa ──────────▶ vda          the snapshots `before` (vda) and `after` (vda-02fa on vda)
//!   web02     vda ────────────────────┘                              a linked clone of `after`
//! ```
//!
//! A disk's own image is the only one that is ever written; the images beneath it, its **layers**, never change. A snapshot names
//! the layers that a disk had, so that taking one, going back to one and making a linked clone of one copy nothing. Which layers a
//! disk has stands in the VM's definition and is told to QEMU; what an image's header says of it is believed by nobody.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use whimbrel_migration::names::{Name, VmId};

use crate::vm::{ImageFormat, StoragePath, VmDefinition};

/// Most snapshots of a VM. Each may add a layer to a disk, and QEMU opens every layer.
pub const SNAPSHOTS_MAX: usize = 32;
/// Most layers beneath a disk, those of templates that it comes from included.
pub const LAYERS_MAX: usize = 64;

/// An image that is only read, beneath a disk's own.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The image.
    pub file: StoragePath,
    /// Its format.
    pub format: ImageFormat,
}

/// What a VM was cloned from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// The VM or template.
    pub vm: VmId,
    /// The snapshot of it; without one, the VM as it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Name>,
    /// Whether its disks stand on those of the other, which must stay for as long.
    pub linked: bool,
}

/// What a VM's disks were at a moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// Its name, unique among the VM's snapshots.
    pub name: Name,
    /// When it was taken, by its host's clock.
    #[schema(value_type = String)]
    pub taken: Timestamp,
    /// The snapshot that the disks went on from then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Name>,
    /// The disks. One that the guest may only read is not among them: it never changes.
    pub disks: Vec<SnapshotDisk>,
    /// The UEFI variables as they were, if the VM has some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variables: Option<StoragePath>,
}

/// A disk at a moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotDisk {
    /// Its name in the VM.
    pub name: Name,
    /// What the guest saw, in bytes.
    pub size_bytes: u64,
    /// Its images down to those of the parent snapshot, the one with the latest data first: at least one. The parent's follow,
    /// and so on to the lowest; see [`chain`].
    pub layers: Vec<Layer>,
}

/// The request that takes a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TakeSnapshot {
    /// The snapshot's name.
    pub name: Name,
}

/// Whether a VM is a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetTemplate {
    /// `true`: it is never started and never changes, and can be cloned at any time.
    pub template: bool,
}

/// The request that clones a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneVm {
    /// The new VM's id, chosen by the client, so that a retry is the same request.
    pub id: VmId,
    /// Its name.
    pub name: Name,
    /// Whether its disks stand on those of the other instead of being copies.
    #[serde(default)]
    pub linked: bool,
    /// The snapshot to clone; without one, the VM as it is, which must be stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Name>,
    /// Where the copies of the disks go; without it each beside the one that it is a copy of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<Name>,
}

/// The folder of a VM's files in a storage.
#[must_use]
pub fn vm_folder(vm: VmId) -> String {
    format!("vms/{vm}")
}

/// Whether a file is one of a VM's own: it lies in the VM's folder.
#[must_use]
pub fn is_own(vm: VmId, file: &StoragePath) -> bool {
    file.path.strip_prefix(&vm_folder(vm)).is_some_and(|rest| rest.starts_with('/'))
}

/// A VM's snapshot.
#[must_use]
pub fn snapshot<'a>(vm: &'a VmDefinition, name: &Name) -> Option<&'a Snapshot> {
    vm.snapshots.iter().find(|snapshot| snapshot.name == *name)
}

/// All images that a disk had at a snapshot, the one with the latest data first; none where the snapshot or the disk in it is
/// not known.
#[must_use]
pub fn chain(vm: &VmDefinition, of: &Name, disk: &Name) -> Vec<Layer> {
    let mut layers = Vec::new();
    let mut at = snapshot(vm, of);
    // As many steps as there are snapshots: a definition in which they go round in a circle is not followed for ever.
    for _ in 0..vm.snapshots.len() {
        let Some(here) = at else { break };
        let own = here.disks.iter().find(|found| found.name == *disk);
        layers.extend(own.into_iter().flat_map(|own| own.layers.iter().cloned()));
        at = here.parent.as_ref().and_then(|parent| snapshot(vm, parent));
    }
    layers
}

/// What of `vm` a linked clone stands on: for each of its disks the first layer that is `vm`'s, which is the latest data of
/// the snapshot or template that it was made from.
pub fn stands_on(clone: &VmDefinition, vm: VmId) -> impl Iterator<Item = &Layer> {
    clone
        .disks
        .iter()
        .filter_map(move |disk| disk.layers.iter().find(|layer| is_own(vm, &layer.file)))
}
