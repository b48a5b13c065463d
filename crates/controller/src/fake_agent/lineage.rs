//! What a fake host does about templates, snapshots and clones: layers by name alone, no images.

use axum::extract::State as Extract;
use axum::routing::{delete, post, put};
use axum::{Json, Router};
use jiff::Timestamp;
use whimbrel_api::agent::VmReport;
use whimbrel_api::lineage::{
    Layer, SetTemplate, Snapshot, SnapshotDisk, TakeSnapshot, chain, vm_folder,
};
use whimbrel_api::server::{Body, Segment};
use whimbrel_api::vm::{Disk, VmDefinition};
use whimbrel_api::{ApiError, Name, VmId};

use super::State;
use super::calls::{Host, change};

pub(super) fn calls() -> Router<Host> {
    Router::new()
        .route("/vms/{id}/template", put(set_template))
        .route("/vms/{id}/snapshots", post(take))
        .route("/vms/{id}/snapshots/{name}", delete(delete_one))
}

/// The layers of a new linked clone.
pub(super) fn link(state: &State, definition: &mut VmDefinition) {
    let Some(origin) = definition.origin.clone().filter(|origin| origin.linked) else { return };
    let Some(parent) = state.vms.get(&origin.vm) else { return };
    for disk in &mut definition.disks {
        let frozen = origin.snapshot.as_ref().map(|s| chain(&parent.definition, s, &disk.name));
        let own = parent.definition.disks.iter().find(|found| found.name == disk.name);
        disk.layers = frozen.or(own.map(images)).unwrap_or_default();
    }
}

fn images(disk: &Disk) -> Vec<Layer> {
    let own = Layer { file: disk.file.clone(), format: disk.format };
    std::iter::once(own).chain(disk.layers.iter().cloned()).collect()
}

async fn set_template(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
    Body(request): Body<SetTemplate>,
) -> Result<Json<VmReport>, ApiError> {
    change(&host, id, |vm| {
        vm.definition.template = request.template;
        vm.definition.generation += 1;
        Ok(())
    })
}

async fn take(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
    Body(TakeSnapshot { name }): Body<TakeSnapshot>,
) -> Result<Json<VmReport>, ApiError> {
    change(&host, id, |vm| {
        let definition = &mut vm.definition;
        let mut disks = Vec::new();
        for disk in &mut definition.disks {
            let layers = images(disk);
            disk.layers.clone_from(&layers);
            disk.file.path = format!("{}/{}-{name}.qcow2", vm_folder(id), disk.name);
            let (name, size_bytes) = (disk.name.clone(), disk.size_bytes);
            disks.push(SnapshotDisk { name, size_bytes, layers });
        }
        let taken = Timestamp::UNIX_EPOCH;
        definition.snapshots.push(Snapshot { name, taken, parent: None, disks, variables: None });
        definition.generation += 1;
        Ok(())
    })
}

async fn delete_one(
    Extract(host): Extract<Host>,
    Segment((id, name)): Segment<(VmId, Name)>,
) -> Result<Json<VmReport>, ApiError> {
    change(&host, id, |vm| {
        vm.definition.snapshots.retain(|snapshot| snapshot.name != name);
        vm.definition.generation += 1;
        Ok(())
    })
}
