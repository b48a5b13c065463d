//! Templates, clones and snapshots.

use axum::Json;
use axum::extract::State;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use whimbrel_api::lineage::{CloneVm, SetTemplate, TakeSnapshot};
use whimbrel_api::server::{Body, Segment};
use whimbrel_api::vm::Vm;
use whimbrel_api::{ApiError, Name};

use super::{Shared, to_the_end};
use crate::lineage;

pub(super) fn calls() -> OpenApiRouter<Shared> {
    OpenApiRouter::default()
        .routes(routes!(set_template))
        .routes(routes!(clone_vm))
        .routes(routes!(take_snapshot))
        .routes(routes!(revert_to_snapshot))
        .routes(routes!(delete_snapshot))
}

/// An object without fields: what a call takes that needs to be told nothing.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// Make a stopped VM a template, or a template a VM again.
#[utoipa::path(put, path = "/vms/{vm}/template", tag = "vms", request_body = SetTemplate,
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 200, description = "The VM", body = Vm)))]
async fn set_template(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
    Body(request): Body<SetTemplate>,
) -> Result<Json<Vm>, ApiError> {
    to_the_end(async move { lineage::set_template(&controller, &vm, &request).await })
        .await
        .map(Json)
}

/// Clone a VM, a template or a snapshot: the same hardware under a new identity. The id is the client's: the same request again is
/// answered with the same VM.
#[utoipa::path(post, path = "/vms/{vm}/clone", tag = "vms", request_body = CloneVm,
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 200, description = "The new VM", body = Vm)))]
async fn clone_vm(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
    Body(request): Body<CloneVm>,
) -> Result<Json<Vm>, ApiError> {
    to_the_end(async move { lineage::clone_vm(&controller, &vm, request).await }).await.map(Json)
}

/// Take a snapshot of a stopped VM's disks. Nothing is copied.
#[utoipa::path(post, path = "/vms/{vm}/snapshots", tag = "vms", request_body = TakeSnapshot,
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 200, description = "The VM", body = Vm)))]
async fn take_snapshot(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
    Body(request): Body<TakeSnapshot>,
) -> Result<Json<Vm>, ApiError> {
    to_the_end(async move { lineage::take_snapshot(&controller, &vm, &request).await })
        .await
        .map(Json)
}

/// Let a stopped VM's disks go on from a snapshot; what was written since the last one is lost.
#[utoipa::path(post, path = "/vms/{vm}/snapshots/{name}/revert", tag = "vms",
    params(("vm" = String, Path, description = "The VM's name or id"),
        ("name" = Name, Path, description = "The snapshot")),
    responses((status = 200, description = "The VM", body = Vm)))]
async fn revert_to_snapshot(
    State(controller): State<Shared>,
    Segment((vm, to)): Segment<(String, Name)>,
    Body(Nothing {}): Body<Nothing>,
) -> Result<Json<Vm>, ApiError> {
    to_the_end(async move { lineage::revert(&controller, &vm, &to).await }).await.map(Json)
}

/// Delete a snapshot of a stopped VM, and what only it needs.
#[utoipa::path(delete, path = "/vms/{vm}/snapshots/{name}", tag = "vms",
    params(("vm" = String, Path, description = "The VM's name or id"),
        ("name" = Name, Path, description = "The snapshot")),
    responses((status = 200, description = "The VM", body = Vm)))]
async fn delete_snapshot(
    State(controller): State<Shared>,
    Segment((vm, name)): Segment<(String, Name)>,
) -> Result<Json<Vm>, ApiError> {
    to_the_end(async move { lineage::delete_snapshot(&controller, &vm, &name).await })
        .await
        .map(Json)
}
