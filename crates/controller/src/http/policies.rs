//! Policies: made, listed, deleted, attached.

use axum::Json;
use axum::extract::State;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use whimbrel_api::policy::{AppliedPolicy, AttachPolicy, Policy, PolicyStatus};
use whimbrel_api::server::{Body, Segment};
use whimbrel_api::{ApiError, Name};

use super::{Shared, to_the_end};
use crate::policies;
use crate::store::Subject;

pub(super) fn calls() -> OpenApiRouter<Shared> {
    OpenApiRouter::default()
        .routes(routes!(list_policies))
        .routes(routes!(get_policy, put_policy, delete_policy))
        .routes(routes!(get_vm_policy, attach_vm_policy))
        .routes(routes!(get_pool_policy, attach_pool_policy))
}

/// All policies, the built-in ones first.
#[utoipa::path(get, path = "/policies", tag = "policies",
    responses((status = 200, description = "The policies", body = Vec<PolicyStatus>)))]
async fn list_policies(
    State(controller): State<Shared>,
) -> Result<Json<Vec<PolicyStatus>>, ApiError> {
    policies::list(&controller).await.map(Json)
}

/// One policy.
#[utoipa::path(get, path = "/policies/{name}", tag = "policies",
    params(("name" = Name, Path, description = "The policy's name")),
    responses((status = 200, description = "The policy", body = PolicyStatus)))]
async fn get_policy(
    State(controller): State<Shared>,
    Segment(name): Segment<Name>,
) -> Result<Json<PolicyStatus>, ApiError> {
    policies::get(&controller, &name).await.map(Json)
}

/// Make a policy, or change the one of this name. The built-in ones cannot be changed. What has begun goes on as it was.
#[utoipa::path(put, path = "/policies/{name}", tag = "policies", request_body = Policy,
    params(("name" = Name, Path, description = "The policy's name")),
    responses((status = 200, description = "The policy", body = PolicyStatus)))]
async fn put_policy(
    State(controller): State<Shared>,
    Segment(name): Segment<Name>,
    Body(policy): Body<Policy>,
) -> Result<Json<PolicyStatus>, ApiError> {
    to_the_end(async move { policies::put(&controller, &name, &policy).await }).await.map(Json)
}

/// Delete a policy that is attached to nothing.
#[utoipa::path(delete, path = "/policies/{name}", tag = "policies",
    params(("name" = Name, Path, description = "The policy's name")),
    responses((status = 200, description = "It is gone")))]
async fn delete_policy(
    State(controller): State<Shared>,
    Segment(name): Segment<Name>,
) -> Result<(), ApiError> {
    to_the_end(async move { policies::delete(&controller, &name).await }).await
}

/// The policy that applies to a VM where a request says none.
#[utoipa::path(get, path = "/vms/{vm}/policy", tag = "policies",
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 200, description = "The policy, and where it comes from", body = AppliedPolicy)))]
async fn get_vm_policy(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
) -> Result<Json<AppliedPolicy>, ApiError> {
    let row = controller.find_vm(&vm).await?;
    policies::attached(&controller, Subject::Vm(row.id())).await.map(Json)
}

/// Attach a policy to a VM, or take it away.
#[utoipa::path(put, path = "/vms/{vm}/policy", tag = "policies", request_body = AttachPolicy,
    params(("vm" = String, Path, description = "The VM's name or id")),
    responses((status = 200, description = "What applies now, and where it comes from", body = AppliedPolicy)))]
async fn attach_vm_policy(
    State(controller): State<Shared>,
    Segment(vm): Segment<String>,
    Body(attach): Body<AttachPolicy>,
) -> Result<Json<AppliedPolicy>, ApiError> {
    to_the_end(async move {
        let row = controller.find_vm(&vm).await?;
        policies::attach(&controller, Subject::Vm(row.id()), &attach).await
    })
    .await
    .map(Json)
}

/// The policy that applies where neither a request nor a VM says one.
#[utoipa::path(get, path = "/pool/policy", tag = "policies",
    responses((status = 200, description = "The policy, and where it comes from", body = AppliedPolicy)))]
async fn get_pool_policy(
    State(controller): State<Shared>,
) -> Result<Json<AppliedPolicy>, ApiError> {
    policies::attached(&controller, Subject::Pool).await.map(Json)
}

/// Attach a policy to the pool, or take it away: then `balanced` applies.
#[utoipa::path(put, path = "/pool/policy", tag = "policies", request_body = AttachPolicy,
    responses((status = 200, description = "What applies now, and where it comes from", body = AppliedPolicy)))]
async fn attach_pool_policy(
    State(controller): State<Shared>,
    Body(attach): Body<AttachPolicy>,
) -> Result<Json<AppliedPolicy>, ApiError> {
    to_the_end(async move { policies::attach(&controller, Subject::Pool, &attach).await })
        .await
        .map(Json)
}
