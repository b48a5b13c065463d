//! The calls about a migration that is under way, besides its beginning, its handoff and its cancel. Called by
//! [`super::router`]; what they do is [`crate::migrate`]'s.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::{get, post, put};
use axum::{Extension, Json, Router};
use whimbrel_api::agent::{
    IncomingStatistics, ListenAgain, NewAddress, OutgoingReport, RecoverOrder, Superseded,
    SupersededReport,
};
use whimbrel_api::migration::{LiveSettings, MigrationAction, MigrationStatistics, ReclaimRequest};
use whimbrel_api::server::{Body, Segment};
use whimbrel_api::{ApiError, ErrorCode, MigrationId};
use whimbrel_pki::door::PeerExtension;

use super::{Answer, On, to_the_end};
use crate::host::Host;
use crate::migrate;

/// What the controller may ask.
pub(super) fn for_the_controller() -> Router<Arc<Host>> {
    let mut router = Router::new()
        .route("/incoming/{migration}/statistics", get(incoming_statistics))
        .route("/outgoing/{migration}/statistics", get(outgoing_statistics))
        .route("/outgoing/{migration}/settings", put(set))
        .route("/outgoing/{migration}/recover", post(recover))
        .route("/outgoing/{migration}/reclaim", post(reclaim))
        .route("/incoming/{migration}/superseded", post(superseded));
    for action in MigrationAction::ALL {
        if action != MigrationAction::Recover {
            let path = format!("/outgoing/{{migration}}/{}", action.as_str());
            let order = move |State(host): On, Segment(id): Segment<MigrationId>| {
                to_the_end(async move { migrate::act(&host, id, action).await })
            };
            router = router.route(&path, post(order));
        }
    }
    router
}

/// What a source's agent may ask as well.
pub(super) fn for_agents() -> Router<Arc<Host>> {
    Router::new().route("/incoming/{migration}/recover", post(listen_again))
}

async fn set(
    State(host): On,
    Segment(id): Segment<MigrationId>,
    Body(settings): Body<LiveSettings>,
) -> Answer<OutgoingReport> {
    to_the_end(async move { migrate::set(&host, id, settings).await }).await
}

async fn recover(
    State(host): On,
    Segment(id): Segment<MigrationId>,
    Body(order): Body<RecoverOrder>,
) -> Answer<OutgoingReport> {
    to_the_end(async move { migrate::recover_by_order(&host, id, order).await }).await
}

async fn reclaim(
    State(host): On,
    Segment(id): Segment<MigrationId>,
    Body(request): Body<ReclaimRequest>,
) -> Answer<OutgoingReport> {
    to_the_end(async move { migrate::reclaim(&host, id, request).await }).await
}

async fn superseded(
    State(host): On,
    Segment(id): Segment<MigrationId>,
    Body(said): Body<Superseded>,
) -> Answer<SupersededReport> {
    to_the_end(async move { migrate::superseded(&host, id, said).await }).await
}

async fn outgoing_statistics(
    State(host): On,
    Segment(id): Segment<MigrationId>,
) -> Answer<MigrationStatistics> {
    migrate::outgoing_statistics(&host, id).map(Json)
}

async fn incoming_statistics(
    State(host): On,
    Segment(id): Segment<MigrationId>,
) -> Answer<IncomingStatistics> {
    migrate::incoming_statistics(&host, id).map(Json)
}

async fn listen_again(
    State(host): On,
    Extension(who): Extension<PeerExtension>,
    Segment(id): Segment<MigrationId>,
    Body(request): Body<ListenAgain>,
) -> Answer<NewAddress> {
    let peer = who
        .peer
        .ok_or_else(|| ApiError::new(ErrorCode::NotAllowed, "this call needs a certificate"))?;
    to_the_end(async move { migrate::listen_again(&host, &peer, id, request).await }).await
}
