//! What a fake host can be told while a VM leaves it, and what it has seen of that.

use axum::extract::State as Extract;
use axum::routing::{get, post, put};
use axum::{Json, Router};
use jiff::Timestamp;
use whimbrel_api::agent::{
    IncomingStatistics, ListenAgain, NewAddress, OutgoingReport, RecoverOrder,
};
use whimbrel_api::migration::{
    LiveSettings, MigrationStatistics, PostcopyReport, PostcopyState, Sample,
};
use whimbrel_api::server::{Body, Segment};
use whimbrel_api::{ApiError, ErrorCode, MigrationId, Phase};

use super::Outgoing;
use super::calls::Host;

pub(super) fn calls() -> Router<Host> {
    Router::new()
        .route("/incoming/{id}/statistics", get(incoming_statistics))
        .route("/incoming/{id}/recover", post(listen_again))
        .route("/outgoing/{id}/statistics", get(outgoing_statistics))
        .route("/outgoing/{id}/settings", put(settings))
        .route("/outgoing/{id}/postcopy", post(postcopy))
        .route("/outgoing/{id}/force-complete", post(force_complete))
        .route("/outgoing/{id}/pause", post(pause))
        .route("/outgoing/{id}/resume", post(resume))
        .route("/outgoing/{id}/recover", post(recover))
}

fn order(
    host: &Host,
    id: MigrationId,
    order: impl FnOnce(&mut Outgoing) -> Result<(), ApiError>,
) -> Result<Json<OutgoingReport>, ApiError> {
    host.with(|state| {
        let outgoing = state.outgoing.get_mut(&id);
        let outgoing = outgoing.ok_or_else(|| ApiError::not_found("outgoing migration", id))?;
        order(outgoing)?;
        Ok(Json(outgoing.report.borrow().clone()))
    })
}

/// Tells how post-copy is from now on.
pub(super) fn tell(outgoing: &Outgoing, state: PostcopyState) {
    let now = Timestamp::now();
    outgoing.report.send_modify(|report| {
        let begun = report.postcopy.as_ref().map_or(now, |before| before.begun);
        let recoveries = report.postcopy.as_ref().map_or(0, |before| before.recoveries);
        let lost = matches!(
            report.postcopy,
            Some(PostcopyReport { state: PostcopyState::Paused { by_hand: false, .. }, .. })
        );
        let again = u64::from(lost && state == PostcopyState::Active);
        report.phase = Phase::Postcopy;
        report.postcopy = Some(PostcopyReport {
            state,
            since: now,
            begun,
            recoveries: recoveries + again,
            blocktime_ms: None,
            vcpu_blocktime_ms: Vec::new(),
        });
    });
}

fn in_phase(outgoing: &Outgoing, phase: Phase) -> Result<(), ApiError> {
    let now = outgoing.report.borrow().phase;
    if now == phase {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::WrongState, format!("the migration is in {now}")))
}

async fn settings(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
    Body(settings): Body<LiveSettings>,
) -> Result<Json<OutgoingReport>, ApiError> {
    order(&host, id, |outgoing| {
        outgoing.settings.push(settings);
        Ok(())
    })
}

async fn postcopy(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<OutgoingReport>, ApiError> {
    order(&host, id, |outgoing| {
        in_phase(outgoing, Phase::Precopy)?;
        outgoing.postcopy.notify_one();
        Ok(())
    })
}

async fn force_complete(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<OutgoingReport>, ApiError> {
    order(&host, id, |outgoing| {
        in_phase(outgoing, Phase::Precopy)?;
        outgoing.complete.notify_one();
        Ok(())
    })
}

async fn pause(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<OutgoingReport>, ApiError> {
    order(&host, id, |outgoing| {
        in_phase(outgoing, Phase::Postcopy)?;
        let why = "an operator wants it".to_owned();
        tell(outgoing, PostcopyState::Paused { why, by_hand: true });
        Ok(())
    })
}

async fn resume(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<OutgoingReport>, ApiError> {
    order(&host, id, |outgoing| {
        in_phase(outgoing, Phase::Postcopy)?;
        tell(outgoing, PostcopyState::Active);
        Ok(())
    })
}

async fn recover(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
    Body(recovery): Body<RecoverOrder>,
) -> Result<Json<OutgoingReport>, ApiError> {
    order(&host, id, |outgoing| {
        in_phase(outgoing, Phase::Postcopy)?;
        let paused = outgoing
            .report
            .borrow()
            .postcopy
            .as_ref()
            .is_some_and(|postcopy| matches!(postcopy.state, PostcopyState::Paused { .. }));
        if !paused {
            return Err(ApiError::new(ErrorCode::WrongState, "post-copy is not paused"));
        }
        // A fake source asks nobody where to go.
        if recovery.address.is_some() {
            tell(outgoing, PostcopyState::Active);
        }
        Ok(())
    })
}

async fn listen_again(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
    Body(_): Body<ListenAgain>,
) -> Result<Json<NewAddress>, ApiError> {
    let known = host.with(|state| state.incoming.contains_key(&id));
    if !known {
        return Err(ApiError::not_found("incoming migration", id));
    }
    Ok(Json(NewAddress { address: ([127, 0, 0, 1], 49_153).into() }))
}

async fn incoming_statistics(Segment(_): Segment<MigrationId>) -> Json<IncomingStatistics> {
    Json(IncomingStatistics {
        postcopy_blocktime_ms: Some(12),
        postcopy_vcpu_blocktime_ms: vec![12, 34],
        raw: Some(serde_json::json!({ "status": "completed" })),
    })
}

async fn outgoing_statistics(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<MigrationStatistics>, ApiError> {
    let Json(report) = order(&host, id, |_| Ok(()))?;
    let sample = Sample {
        at_ms: 1,
        phase: report.phase,
        pass: 1,
        transferred_bytes: 2,
        remaining_bytes: 3,
        bits_per_s: 4,
        dirty_bytes_per_s: 5,
        throttle_percent: 0,
    };
    let raw = Some(serde_json::json!({ "status": "completed", "total-time": 7 }));
    Ok(Json(MigrationStatistics { samples: vec![sample], raw, destination_raw: None }))
}
