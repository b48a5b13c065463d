//! Measurements over HTTP: the calls of [`whimbrel_api::measure`]'s types.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use whimbrel_api::measure::{
    CensusReport, CensusRequest, CpuReport, DirtyCurveReport, DirtyCurveRequest, DirtyRateReport,
    DirtyRateRequest, LinkAddress, LinkListen, LinkReport, LinkRequest,
};
use whimbrel_api::server::{Body, Segment};
use whimbrel_api::{ApiError, ErrorCode, VmId};
use whimbrel_pki::door::PeerExtension;
use whimbrel_pki::identity::Peer;

use super::{Answer, On};
use crate::host::Host;
use crate::measure;

/// What the controller may call.
pub(super) fn for_the_controller() -> Router<Arc<Host>> {
    Router::new()
        .route("/vms/{id}/dirty-rate", post(dirty_rate).get(last_dirty_rate))
        .route("/vms/{id}/dirty-curve", post(dirty_curve))
        .route("/vms/{id}/census", post(census))
        .route("/cpu", get(cpu))
        .route("/link", post(link))
}

/// What another agent may call as well.
pub(super) fn for_agents() -> Router<Arc<Host>> {
    Router::new().route("/link/listen", post(link_listen))
}

async fn dirty_rate(
    State(host): On,
    Segment(id): Segment<VmId>,
    Body(request): Body<DirtyRateRequest>,
) -> Answer<DirtyRateReport> {
    measure::dirty_rate(&host, id, &request).await.map(Json)
}

async fn last_dirty_rate(State(host): On, Segment(id): Segment<VmId>) -> Answer<DirtyRateReport> {
    measure::last_dirty_rate(&host, id).await.map(Json)
}

async fn dirty_curve(
    State(host): On,
    Segment(id): Segment<VmId>,
    Body(request): Body<DirtyCurveRequest>,
) -> Answer<DirtyCurveReport> {
    measure::dirty_curve(&host, id, request).await.map(Json)
}

async fn census(
    State(host): On,
    Segment(id): Segment<VmId>,
    Body(request): Body<CensusRequest>,
) -> Answer<CensusReport> {
    measure::census(&host, id, request).await.map(Json)
}

async fn cpu() -> Answer<CpuReport> {
    measure::cpu().await.map(Json)
}

async fn link(State(host): On, Body(request): Body<LinkRequest>) -> Answer<LinkReport> {
    measure::link(&host, request).await.map(Json)
}

async fn link_listen(
    State(host): On,
    Extension(who): Extension<PeerExtension>,
    Body(request): Body<LinkListen>,
) -> Answer<LinkAddress> {
    match who.peer {
        Some(Peer::Agent(name)) if name != request.from.as_str() => {
            let message = format!("host {name} may not have a probe of {} received", request.from);
            Err(ApiError::new(ErrorCode::NotAllowed, message))
        }
        _ => measure::link_listen(&host, request).await.map(Json),
    }
}
