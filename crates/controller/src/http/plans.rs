//! What a move would take, and measuring of a VM.

use axum::Json;
use axum::extract::State;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use whimbrel_api::ApiError;
use whimbrel_api::measure::{DirtyRateReport, DirtyRateRequest};
use whimbrel_api::plan::{PlanRequest, VmPlan};
use whimbrel_api::server::{Body, Segment};

use super::{Shared, to_the_end};
use crate::{plan, vms};

pub(super) fn calls() -> OpenApiRouter<Shared> {
    OpenApiRouter::default().routes(routes!(make_plan)).routes(routes!(measure_dirty_rate))
}

/// What moving a VM would take: for each destination what would refuse it, the way that would be chosen and why, how long it
/// and plain pre-copy would take, and what that was reckoned from. Measures for some seconds; nothing is begun.
#[utoipa::path(post, path = "/plans", tag = "migrations", request_body = PlanRequest,
    responses((status = 200, description = "One plan for each destination", body = VmPlan)))]
async fn make_plan(
    State(controller): State<Shared>,
    Body(request): Body<PlanRequest>,
) -> Result<Json<VmPlan>, ApiError> {
    to_the_end(async move { plan::plan(&controller, request).await }).await.map(Json)
}

/// Let QEMU measure how fast a VM's guest writes, as `virsh domdirtyrate-calc` does.
#[utoipa::path(post, path = "/vms/{vm}/dirty-rate", tag = "vms", request_body = DirtyRateRequest,
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 200, description = "The fields of `virsh domstats --dirtyrate`", body = DirtyRateReport)))]
async fn measure_dirty_rate(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
    Body(request): Body<DirtyRateRequest>,
) -> Result<Json<DirtyRateReport>, ApiError> {
    to_the_end(async move { vms::dirty_rate(&controller, &vm, &request).await }).await.map(Json)
}
