//! Disks on their way: where each goes ([`DiskMove`]), how far it is ([`DiskProgress`]), and what that makes of the VM's
//! definition.
//!
//! Which disks are copied is the rules' matter ([`whimbrel_migration::disks::placement`]); the controller turns it into moves,
//! which name the files. Files of a copy are never those of an earlier one: the epoch of the move is in their names.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use whimbrel_migration::names::{Epoch, Name, VmId};

use crate::lineage::{Layer, is_own, vm_folder};
use crate::vm::{ImageFormat, StoragePath, VmDefinition};

/// A disk that is copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskMove {
    /// Its name in the VM.
    pub disk: Name,
    /// Its image on the source.
    pub from: StoragePath,
    /// Its image on the destination.
    pub to: StoragePath,
    /// The new image's format.
    pub format: ImageFormat,
    /// What the guest sees, in bytes: exactly so on both sides.
    pub size_bytes: u64,
    /// The images that it stands on there, the nearest first: the destination holds them, and they do not travel. Without
    /// any the new image holds everything.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<Layer>,
}

/// How far a disk is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskProgress {
    /// Its name in the VM.
    pub disk: Name,
    /// What is being done with it.
    #[serde(flatten)]
    pub state: DiskState,
    /// Bytes that have been sent or need not be; what the guest writes meanwhile adds to both.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// What is being done with a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum DiskState {
    /// It is sent, and what the guest writes to it again and again.
    Copying,
    /// The destination has it, but for what the guest writes this moment.
    Ready,
    /// The guest stands still, and the last bytes are on their way.
    Settling,
    /// The destination has all of it.
    Settled,
    /// The copy has failed.
    Failed {
        /// Why.
        why: String,
    },
}

/// Why a definition cannot be that of a VM whose disks have moved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotMoved {
    /// The VM has no such disk, or another image is its own.
    #[error("the VM has no disk {disk} with the image {from}")]
    NotItsDisk {
        /// The disk.
        disk: Name,
        /// The image that was to be copied.
        from: StoragePath,
    },
    /// Snapshots name images of the disk that would stay behind.
    #[error("disk {disk} has snapshots, which would be left behind")]
    Snapshots {
        /// The disk.
        disk: Name,
    },
}

/// The file that a disk's copy becomes: in the folder of the VM's files, with the epoch in which the destination would own the
/// VM. No epoch is given twice, so that a copy never lies where an older one was kept, put aside or left.
///
/// # Errors
/// Says why it is no path in a storage; with a name and an epoch that cannot be.
pub fn target_file(
    vm: VmId,
    disk: &Name,
    epoch: Epoch,
    (storage, format): (Name, ImageFormat),
) -> Result<StoragePath, String> {
    let path = format!("{}/{disk}-e{epoch}.{}", vm_folder(vm), format.as_str());
    StoragePath::new(storage, &path)
}

/// The definition of a VM once its disks are where `moves` takes them: what the destination writes down when it owns the VM.
/// Everything that the guest sees is as it was.
///
/// # Errors
/// Says which move is not one of this VM.
pub fn moved(vm: &VmDefinition, moves: &[DiskMove]) -> Result<VmDefinition, NotMoved> {
    let mut there = vm.clone();
    for one in moves {
        let DiskMove { disk: name, from, to, format, size_bytes, layers } = one;
        if vm.snapshots.iter().any(|snapshot| snapshot.disks.iter().any(|d| d.name == *name)) {
            return Err(NotMoved::Snapshots { disk: name.clone() });
        }
        let Some(disk) =
            there.disks.iter_mut().find(|disk| disk.name == *name && disk.file == *from)
        else {
            return Err(NotMoved::NotItsDisk { disk: name.clone(), from: from.clone() });
        };
        disk.file = to.clone();
        disk.format = *format;
        disk.size_bytes = *size_bytes;
        disk.layers.clone_from(layers);
        // It was made from that once; on this host there may be no such image.
        disk.import = None;
    }
    if let Some(origin) = &mut there.origin {
        let stands = |layer: &Layer| is_own(origin.vm, &layer.file);
        origin.linked &= there.disks.iter().any(|disk| disk.layers.iter().any(stands));
    }
    if !moves.is_empty() {
        there.generation = vm.generation.saturating_add(1);
    }
    Ok(there)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> StoragePath {
        text.parse().unwrap()
    }

    fn vm() -> VmDefinition {
        let value = serde_json::json!({
            "id": "0a000000-0000-4000-8000-000000000001", "generation": 4, "name": "web01", "vcpus": 2,
            "memory_bytes": 1 << 30, "cpu": "qemu64", "machine": "pc-q35-7.2", "boot": {"firmware": "seabios"},
            "disks": [
                {"name": "vda", "file": "local/vms/1/vda.qcow2", "format": "qcow2", "size_bytes": 1 << 30,
                    "read_only": false, "import": {"file": "local/base.raw", "format": "raw"},
                    "layers": [{"file": "local/vms/0b000000-0000-4000-8000-000000000002/vda.qcow2", "format": "qcow2"}]},
                {"name": "vdb", "file": "nfs/vms/1/vdb.raw", "format": "raw", "size_bytes": 512, "read_only": true},
            ],
            "nics": [],
            "origin": {"vm": "0b000000-0000-4000-8000-000000000002", "linked": true},
        });
        serde_json::from_value(value).unwrap()
    }

    fn one_move() -> DiskMove {
        DiskMove {
            disk: "vda".parse().unwrap(),
            from: path("local/vms/1/vda.qcow2"),
            to: path("fast/vms/1/vda-e5.raw"),
            format: ImageFormat::Raw,
            size_bytes: 1 << 30,
            layers: Vec::new(),
        }
    }

    #[test]
    fn only_the_places_differ() {
        let (before, after) = (vm(), moved(&vm(), &[one_move()]).unwrap());
        let disk = &after.disks[0];
        assert_eq!((&disk.file, disk.format), (&path("fast/vms/1/vda-e5.raw"), ImageFormat::Raw));
        assert!(disk.layers.is_empty() && disk.import.is_none(), "it stands on nothing there");
        assert!(!after.origin.as_ref().unwrap().linked);
        assert_eq!(after.generation, 5);
        assert_eq!(after.disks[1], before.disks[1]);
        // Back in its old places it is the same VM but for where it came from.
        let mut same = after.clone();
        (same.disks, same.origin, same.generation) =
            (before.disks.clone(), before.origin.clone(), before.generation);
        assert_eq!(same, before);
        assert_eq!(moved(&before, &[]).unwrap(), before);
    }

    #[test]
    fn a_linked_clone_stays_one_where_the_base_is_held() {
        let layer = Layer {
            file: path("fast/vms/0b000000-0000-4000-8000-000000000002/vda.qcow2"),
            format: ImageFormat::Qcow2,
        };
        let one = DiskMove { layers: vec![layer.clone()], ..one_move() };
        let after = moved(&vm(), &[one]).unwrap();
        assert_eq!(after.disks[0].layers, [layer]);
        assert!(after.origin.unwrap().linked);
    }

    #[test]
    fn a_move_of_something_else_is_none() {
        let strange = DiskMove { from: path("local/vms/1/other.qcow2"), ..one_move() };
        assert!(matches!(moved(&vm(), &[strange]), Err(NotMoved::NotItsDisk { .. })));
        // The second time its image is where the first one has taken it.
        assert!(matches!(
            moved(&vm(), &[one_move(), one_move()]),
            Err(NotMoved::NotItsDisk { .. })
        ));
        let mut kept = vm();
        kept.snapshots = serde_json::from_value(serde_json::json!([{
            "name": "before", "taken": "2026-01-01T00:00:00Z",
            "disks": [{"name": "vda", "size_bytes": 1 << 30,
                "layers": [{"file": "local/vms/1/vda-0.qcow2", "format": "qcow2"}]}],
        }]))
        .unwrap();
        assert!(matches!(moved(&kept, &[one_move()]), Err(NotMoved::Snapshots { .. })));
    }

    #[test]
    fn each_copy_has_a_name_of_its_own() {
        let (vm, disk) = (vm().id, "vda".parse().unwrap());
        let named = |epoch| {
            let place = ("fast".parse().unwrap(), ImageFormat::Qcow2);
            target_file(vm, &disk, Epoch(epoch), place).unwrap()
        };
        let first = "fast/vms/0a000000-0000-4000-8000-000000000001/vda-e5.qcow2";
        assert_eq!(named(5).to_string(), first);
        assert_ne!(named(5), named(6));
        assert!(is_own(vm, &named(u64::MAX)));
    }

    #[test]
    fn a_disks_progress_is_flat_in_json() {
        let progress = DiskProgress {
            disk: "vda".parse().unwrap(),
            state: DiskState::Failed { why: "no space".into() },
            done_bytes: 1,
            total_bytes: 2,
        };
        let json = serde_json::to_value(&progress).unwrap();
        let flat = serde_json::json!({"disk": "vda", "state": "failed", "why": "no space",
            "done_bytes": 1, "total_bytes": 2});
        assert_eq!(json, flat);
        assert_eq!(serde_json::from_value::<DiskProgress>(json).unwrap(), progress);
    }
}
