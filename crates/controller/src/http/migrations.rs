//! Migrations: asked for, listed, followed, steered, cancelled.

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Sse;
use axum::response::sse::Event as Line;
use axum::{Extension, Json};
use futures::{Stream, StreamExt, stream};
use tokio::sync::watch;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use whimbrel_api::migration::{
    LiveSettings, MigrateRequest, Migration, MigrationAction, MigrationStatistics, ReclaimRequest,
};
use whimbrel_api::server::{Body, Segment};
use whimbrel_api::{ApiError, MigrationId};
use whimbrel_pki::door::PeerExtension;

use super::{Shared, events, to_the_end};
use crate::migrate;

pub(super) fn calls() -> OpenApiRouter<Shared> {
    OpenApiRouter::default()
        .routes(routes!(list_migrations, begin_migration))
        .routes(routes!(get_migration))
        .routes(routes!(watch_migration))
        .routes(routes!(cancel_migration))
        .routes(routes!(reclaim_migration))
        .routes(routes!(set_migration))
        .routes(routes!(start_postcopy))
        .routes(routes!(pause_migration))
        .routes(routes!(resume_migration))
        .routes(routes!(recover_migration))
        .routes(routes!(force_complete_migration))
        .routes(routes!(migration_statistics))
}

/// The newest migrations, newest first; at most 200, without their decisions.
#[utoipa::path(get, path = "/migrations", tag = "migrations",
    responses((status = 200, description = "The migrations", body = Vec<Migration>)))]
async fn list_migrations(
    State(controller): State<Shared>,
) -> Result<Json<Vec<Migration>>, ApiError> {
    let mut records = controller.store().migrations().await?;
    for record in &mut records {
        if let Some(latest) = controller.events().latest(record.id) {
            *record = latest;
        }
        record.decisions.clear();
    }
    Ok(Json(records))
}

/// Move a VM to another host while it runs. Answered as soon as the migration is admitted; the id is the client's, and the same
/// request again is answered with the same migration.
#[utoipa::path(post, path = "/migrations", tag = "migrations", request_body = MigrateRequest,
    responses((status = 200, description = "The migration has begun", body = Migration)))]
async fn begin_migration(
    State(controller): State<Shared>,
    Body(request): Body<MigrateRequest>,
) -> Result<Json<Migration>, ApiError> {
    to_the_end(async move { migrate::admit(&controller, request).await }).await.map(Json)
}

/// One migration.
#[utoipa::path(get, path = "/migrations/{id}", tag = "migrations",
    params(("id" = MigrationId, Path, description = "The migration's id")),
    responses((status = 200, description = "The migration", body = Migration)))]
async fn get_migration(
    State(controller): State<Shared>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<Migration>, ApiError> {
    controller.migration(id).await.map(Json)
}

/// Follow a migration: its record now, then at every change, until it has ended. A slow reader misses changes, but never the
/// latest one.
#[utoipa::path(get, path = "/migrations/{id}/watch", tag = "migrations",
    params(("id" = MigrationId, Path, description = "The migration's id")),
    responses((status = 200, description = "Server-sent events, each one a migration", body = Migration, content_type = "text/event-stream")))]
async fn watch_migration(
    State(controller): State<Shared>,
    Segment(id): Segment<MigrationId>,
) -> Result<Sse<impl Stream<Item = Result<Line, Infallible>>>, ApiError> {
    let record = controller.migration(id).await?;
    let mut receiver = controller.events().watch(record);
    receiver.mark_changed();
    let closing = async move { controller.closing().await };
    let records = stream::unfold(receiver, next).take_until(Box::pin(closing));
    Ok(Sse::new(records.map(|record| Ok(events::line(record.as_ref()))))
        .keep_alive(events::keep_alive()))
}

async fn next(
    mut receiver: watch::Receiver<Arc<Migration>>,
) -> Option<(Arc<Migration>, watch::Receiver<Arc<Migration>>)> {
    // An error says that the migration has ended and its last record was seen.
    receiver.changed().await.ok()?;
    let record = receiver.borrow_and_update().clone();
    Some((record, receiver))
}

/// Cancel a migration. Possible until the guest is handed over; afterwards the answer is `handed-over`.
#[utoipa::path(post, path = "/migrations/{id}/cancel", tag = "migrations",
    params(("id" = MigrationId, Path, description = "The migration's id")),
    responses((status = 200, description = "The migration; it ends as `stayed`", body = Migration)))]
async fn cancel_migration(
    State(controller): State<Shared>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<Migration>, ApiError> {
    to_the_end(async move { migrate::cancel(&controller, id).await }).await.map(Json)
}

/// Take a VM back from a destination that never returns. The caller states that it never will act on what it was given; nobody
/// else can know. The guest's memory is given up, and the VM has crashed on its source. `wrong-state` unless the migration is
/// unresolved and waits for its destination; `busy` as long as that may still be heard of.
#[utoipa::path(post, path = "/migrations/{id}/reclaim", tag = "migrations", request_body = ReclaimRequest,
    params(("id" = MigrationId, Path, description = "The migration's id")),
    responses((status = 200, description = "The migration; it ends as `stayed`", body = Migration)))]
async fn reclaim_migration(
    State(controller): State<Shared>,
    Extension(who): Extension<PeerExtension>,
    Segment(id): Segment<MigrationId>,
    Body(request): Body<ReclaimRequest>,
) -> Result<Json<Migration>, ApiError> {
    let by = who.peer.map_or_else(String::new, |peer| peer.to_string());
    let word = request.statement;
    to_the_end(async move { migrate::reclaim(&controller, id, word, by).await }).await.map(Json)
}

/// Let post-copy begin now. It has to have been made ready before the start. `wrong-state` where it does not fit.
#[utoipa::path(post, path = "/migrations/{id}/postcopy", tag = "migrations",
    params(("id" = MigrationId, Path, description = "The migration's id")),
    responses((status = 200, description = "The migration", body = Migration)))]
async fn start_postcopy(
    State(controller): State<Shared>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<Migration>, ApiError> {
    act(controller, id, MigrationAction::Postcopy).await
}

/// Hold post-copy: the guest goes on as far as its memory is there. `wrong-state` where it does not fit.
#[utoipa::path(post, path = "/migrations/{id}/pause", tag = "migrations",
    params(("id" = MigrationId, Path, description = "The migration's id")),
    responses((status = 200, description = "The migration", body = Migration)))]
async fn pause_migration(
    State(controller): State<Shared>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<Migration>, ApiError> {
    act(controller, id, MigrationAction::Pause).await
}

/// Let a post-copy that was paused by hand go on. `wrong-state` where it does not fit.
#[utoipa::path(post, path = "/migrations/{id}/resume", tag = "migrations",
    params(("id" = MigrationId, Path, description = "The migration's id")),
    responses((status = 200, description = "The migration", body = Migration)))]
async fn resume_migration(
    State(controller): State<Shared>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<Migration>, ApiError> {
    act(controller, id, MigrationAction::Resume).await
}

/// Take a post-copy up whose connection is lost, instead of when the way is back. `wrong-state` where it does not fit.
#[utoipa::path(post, path = "/migrations/{id}/recover", tag = "migrations",
    params(("id" = MigrationId, Path, description = "The migration's id")),
    responses((status = 200, description = "The migration", body = Migration)))]
async fn recover_migration(
    State(controller): State<Shared>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<Migration>, ApiError> {
    act(controller, id, MigrationAction::Recover).await
}

/// Let the guest stand still until the rest is sent. `wrong-state` where it does not fit.
#[utoipa::path(post, path = "/migrations/{id}/force-complete", tag = "migrations",
    params(("id" = MigrationId, Path, description = "The migration's id")),
    responses((status = 200, description = "The migration", body = Migration)))]
async fn force_complete_migration(
    State(controller): State<Shared>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<Migration>, ApiError> {
    act(controller, id, MigrationAction::ForceComplete).await
}

async fn act(
    controller: Shared,
    id: MigrationId,
    action: MigrationAction,
) -> Result<Json<Migration>, ApiError> {
    to_the_end(async move { migrate::act(&controller, id, action).await }).await.map(Json)
}

/// Change a running migration: what is not said stays.
#[utoipa::path(put, path = "/migrations/{id}/settings", tag = "migrations", request_body = LiveSettings,
    params(("id" = MigrationId, Path, description = "The migration's id")),
    responses((status = 200, description = "The migration", body = Migration)))]
async fn set_migration(
    State(controller): State<Shared>,
    Segment(id): Segment<MigrationId>,
    Body(settings): Body<LiveSettings>,
) -> Result<Json<Migration>, ApiError> {
    to_the_end(async move { migrate::set(&controller, id, &settings).await }).await.map(Json)
}

/// What was seen of a migration over time, and QEMU's own last figures; while it runs, as far as it is.
#[utoipa::path(get, path = "/migrations/{id}/statistics", tag = "migrations",
    params(("id" = MigrationId, Path, description = "The migration's id")),
    responses((status = 200, description = "Samples for a plot, and raw figures", body = MigrationStatistics)))]
async fn migration_statistics(
    State(controller): State<Shared>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<MigrationStatistics>, ApiError> {
    migrate::statistics(&controller, id).await.map(Json)
}
