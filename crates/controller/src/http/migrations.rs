//! Migrations: asked for, listed, followed, cancelled.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::Sse;
use axum::response::sse::Event as Line;
use futures::{Stream, StreamExt, stream};
use tokio::sync::watch;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use whimbrel_api::migration::{MigrateRequest, Migration};
use whimbrel_api::server::{Body, Segment};
use whimbrel_api::{ApiError, MigrationId};

use super::{Shared, events, to_the_end};
use crate::migrate;

pub(super) fn calls() -> OpenApiRouter<Shared> {
    OpenApiRouter::default()
        .routes(routes!(list_migrations, begin_migration))
        .routes(routes!(get_migration))
        .routes(routes!(watch_migration))
        .routes(routes!(cancel_migration))
}

/// The newest migrations, newest first; at most 200.
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
