//! The calls about templates and snapshots. Called by [`super::router`]; what they do is the VM's task's.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::{delete, post, put};
use axum::{Json, Router};
use whimbrel_api::agent::VmReport;
use whimbrel_api::lineage::{SetTemplate, TakeSnapshot};
use whimbrel_api::server::Body;
use whimbrel_api::{Name, VmId};

use super::{Answer, On, Segment};
use crate::host::Host;

/// What the controller may ask.
pub(super) fn for_the_controller() -> Router<Arc<Host>> {
    Router::new()
        .route("/vms/{id}/template", put(set_template))
        .route("/vms/{id}/snapshots", post(take))
        .route("/vms/{id}/snapshots/{name}", delete(delete_one))
        .route("/vms/{id}/snapshots/{name}/revert", post(revert))
}

async fn set_template(
    State(host): On,
    Segment(id): Segment<VmId>,
    Body(SetTemplate { template }): Body<SetTemplate>,
) -> Answer<VmReport> {
    host.vms.set_template(id, template).await.map(Json)
}

async fn take(
    State(host): On,
    Segment(id): Segment<VmId>,
    Body(TakeSnapshot { name }): Body<TakeSnapshot>,
) -> Answer<VmReport> {
    host.vms.take_snapshot(id, name).await.map(Json)
}

async fn revert(State(host): On, Segment((id, to)): Segment<(VmId, Name)>) -> Answer<VmReport> {
    host.vms.revert(id, to).await.map(Json)
}

async fn delete_one(
    State(host): On,
    Segment((id, name)): Segment<(VmId, Name)>,
) -> Answer<VmReport> {
    host.vms.delete_snapshot(id, name).await.map(Json)
}
