//! VMs and what can be done with them.

use axum::Json;
use axum::extract::State;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use whimbrel_api::ApiError;
use whimbrel_api::server::{Body, Segment};
use whimbrel_api::vm::{CreateVm, StateFile, StopRequest, Vm, VmAction};

use super::{Shared, console, to_the_end};
use crate::vms;

pub(super) fn calls() -> OpenApiRouter<Shared> {
    OpenApiRouter::default()
        .routes(routes!(list_vms, create_vm))
        .routes(routes!(get_vm, delete_vm))
        .routes(routes!(start_vm))
        .routes(routes!(stop_vm))
        .routes(routes!(pause_vm))
        .routes(routes!(resume_vm))
        .routes(routes!(save_vm))
        .routes(routes!(restore_vm))
        .routes(routes!(console::open_console))
}

/// An object without fields: what a call takes that needs to be told nothing.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// All VMs, by name.
#[utoipa::path(get, path = "/vms", tag = "vms",
    responses((status = 200, description = "The VMs", body = Vec<Vm>)))]
async fn list_vms(State(controller): State<Shared>) -> Result<Json<Vec<Vm>>, ApiError> {
    let rows = controller.store().vms().await?;
    Ok(Json(rows.iter().map(|row| controller.view(row)).collect()))
}

/// Create a VM, stopped. The id is the client's: the same request again is answered with the same VM.
#[utoipa::path(post, path = "/vms", tag = "vms", request_body = CreateVm,
    responses((status = 200, description = "The VM", body = Vm)))]
async fn create_vm(
    State(controller): State<Shared>,
    Body(request): Body<CreateVm>,
) -> Result<Json<Vm>, ApiError> {
    to_the_end(async move { vms::create(&controller, request).await }).await.map(Json)
}

/// One VM, by name or id.
#[utoipa::path(get, path = "/vms/{vm}", tag = "vms",
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 200, description = "The VM", body = Vm)))]
async fn get_vm(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
) -> Result<Json<Vm>, ApiError> {
    let row = controller.find_vm(&vm).await?;
    Ok(Json(controller.view(&row)))
}

/// Delete a stopped VM with its disks.
#[utoipa::path(delete, path = "/vms/{vm}", tag = "vms",
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 200, description = "It is gone")))]
async fn delete_vm(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
) -> Result<(), ApiError> {
    to_the_end(async move { vms::delete(&controller, &vm).await }).await
}

/// Start a VM.
#[utoipa::path(post, path = "/vms/{vm}/start", tag = "vms",
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 200, description = "The VM", body = Vm)))]
async fn start_vm(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
    Body(Nothing {}): Body<Nothing>,
) -> Result<Json<Vm>, ApiError> {
    act(controller, vm, VmAction::Start).await
}

/// Stop a VM: ask its guest to power off, or with `force` end it.
#[utoipa::path(post, path = "/vms/{vm}/stop", tag = "vms", request_body = StopRequest,
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 200, description = "The VM", body = Vm)))]
async fn stop_vm(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
    Body(request): Body<StopRequest>,
) -> Result<Json<Vm>, ApiError> {
    to_the_end(async move { vms::stop(&controller, &vm, &request).await }).await.map(Json)
}

/// Stop a VM's vCPUs.
#[utoipa::path(post, path = "/vms/{vm}/pause", tag = "vms",
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 200, description = "The VM", body = Vm)))]
async fn pause_vm(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
    Body(Nothing {}): Body<Nothing>,
) -> Result<Json<Vm>, ApiError> {
    act(controller, vm, VmAction::Pause).await
}

/// Let a VM's vCPUs run again.
#[utoipa::path(post, path = "/vms/{vm}/resume", tag = "vms",
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 200, description = "The VM", body = Vm)))]
async fn resume_vm(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
    Body(Nothing {}): Body<Nothing>,
) -> Result<Json<Vm>, ApiError> {
    act(controller, vm, VmAction::Resume).await
}

/// Save a VM's whole state, its memory included, to a file in a storage of its host; the VM is stopped then.
#[utoipa::path(post, path = "/vms/{vm}/save", tag = "vms", request_body = StateFile,
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 200, description = "The VM", body = Vm)))]
async fn save_vm(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
    Body(to): Body<StateFile>,
) -> Result<Json<Vm>, ApiError> {
    to_the_end(async move { vms::save(&controller, &vm, &to).await }).await.map(Json)
}

/// Let a stopped VM go on from a saved state.
#[utoipa::path(post, path = "/vms/{vm}/restore", tag = "vms", request_body = StateFile,
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 200, description = "The VM", body = Vm)))]
async fn restore_vm(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
    Body(from): Body<StateFile>,
) -> Result<Json<Vm>, ApiError> {
    to_the_end(async move { vms::restore(&controller, &vm, &from).await }).await.map(Json)
}

async fn act(controller: Shared, vm: String, action: VmAction) -> Result<Json<Vm>, ApiError> {
    to_the_end(async move { vms::act(&controller, &vm, action).await }).await.map(Json)
}
