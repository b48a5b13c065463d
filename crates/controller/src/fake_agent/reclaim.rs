//! What a fake host does when its VM was given away to a silent host, and is taken back.

use axum::extract::State as Extract;
use axum::routing::post;
use axum::{Json, Router};
use whimbrel_api::agent::{OutgoingEnd, OutgoingReport, Superseded, SupersededReport};
use whimbrel_api::migration::{ReclaimRequest, Stay};
use whimbrel_api::server::{Body, Segment};
use whimbrel_api::vm::VmState;
use whimbrel_api::{ApiError, ErrorCode, MigrationId, Phase};

use super::FakeAgent;
use super::calls::Host;

pub(super) fn calls() -> Router<Host> {
    Router::new()
        .route("/outgoing/{id}/reclaim", post(reclaim))
        .route("/incoming/{id}/superseded", post(superseded))
}

impl FakeAgent {
    /// The VM of an outgoing migration has been given away, and its destination says nothing.
    pub fn give_away(&self, id: MigrationId) {
        self.world.with(&self.name, |state| {
            let outgoing = &state.outgoing[&id];
            let ask = outgoing.request.destination.clone();
            outgoing.report.send_modify(|report| {
                report.phase = Phase::Handoff;
                report.end = OutgoingEnd::Unresolved { ask };
            });
        });
    }
}

async fn reclaim(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
    Body(request): Body<ReclaimRequest>,
) -> Result<Json<OutgoingReport>, ApiError> {
    host.with(|state| {
        let outgoing = state.outgoing.get(&id);
        let outgoing = outgoing.ok_or_else(|| ApiError::not_found("outgoing migration", id))?;
        if !matches!(outgoing.report.borrow().end, OutgoingEnd::Unresolved { .. }) {
            return Err(ApiError::new(ErrorCode::WrongState, "the VM has not been given away"));
        }
        if let Some(vm) = state.vms.get_mut(&outgoing.request.vm) {
            vm.state = VmState::Crashed { why: "it was taken back".to_owned() };
            vm.epoch = outgoing.request.epoch.next();
        }
        let why = Stay::Reclaimed { statement: request.statement };
        outgoing.report.send_modify(|report| report.end = OutgoingEnd::Stayed { why });
        Ok(Json(outgoing.report.borrow().clone()))
    })
}

async fn superseded(
    Extract(host): Extract<Host>,
    Segment(_id): Segment<MigrationId>,
    Body(said): Body<Superseded>,
) -> Json<SupersededReport> {
    let gone = host.with(|state| {
        let older = state.vms.get(&said.vm).is_some_and(|vm| vm.epoch < said.epoch);
        if older { state.vms.remove(&said.vm) } else { None }
    });
    let guest_was_there = gone.is_some_and(|vm| vm.state == VmState::Running);
    Json(SupersededReport { guest_was_there })
}
