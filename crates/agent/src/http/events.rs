//! A migration's progress as server-sent events: the report at once, then each change, until the end.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures::Stream;
use futures::stream::unfold;
use tokio::sync::watch;
use whimbrel_api::agent::OutgoingReport;
use whimbrel_api::server::Segment;
use whimbrel_api::{ApiError, MigrationId};

use crate::host::Host;
use crate::migrate;

/// How often a silent stream says that it lives, in seconds.
const KEEP_ALIVE_SECONDS: u64 = 5;

/// `GET /v1/outgoing/{migration}/watch`.
pub(super) async fn watch(
    State(host): State<Arc<Host>>,
    Segment(id): Segment<MigrationId>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let mut reports = migrate::watch(&host, id).await?;
    reports.mark_changed();
    let alive = KeepAlive::new().interval(Duration::from_secs(KEEP_ALIVE_SECONDS));
    Ok(Sse::new(unfold(reports, next)).keep_alive(alive))
}

/// The next report; the stream ends when the sender is gone and the last report was told.
async fn next(
    mut reports: watch::Receiver<OutgoingReport>,
) -> Option<(Result<Event, Infallible>, watch::Receiver<OutgoingReport>)> {
    reports.changed().await.ok()?;
    let report = reports.borrow_and_update().clone();
    // A report is made of plain values; what cannot be written is told as a comment and not as silence.
    let event = Event::default()
        .json_data(&report)
        .unwrap_or_else(|error| Event::default().comment(error.to_string()));
    Some((Ok(event), reports))
}
