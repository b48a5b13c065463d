//! The calls that save a VM's state to a file, and let it go on from there. Called by [`super::router`]; what they do is the VM's
//! task's.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use whimbrel_api::VmId;
use whimbrel_api::agent::VmReport;
use whimbrel_api::server::{Body, Segment};
use whimbrel_api::vm::StateFile;

use super::{Answer, On};
use crate::host::Host;

/// What the controller may ask.
pub(super) fn for_the_controller() -> Router<Arc<Host>> {
    Router::new().route("/vms/{id}/save", post(save)).route("/vms/{id}/restore", post(restore))
}

async fn save(
    State(host): On,
    Segment(id): Segment<VmId>,
    Body(to): Body<StateFile>,
) -> Answer<VmReport> {
    host.vms.save(id, to).await.map(Json)
}

async fn restore(
    State(host): On,
    Segment(id): Segment<VmId>,
    Body(from): Body<StateFile>,
) -> Answer<VmReport> {
    host.vms.restore(id, from).await.map(Json)
}
