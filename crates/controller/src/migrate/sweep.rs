//! After the end: both sides forget the migration, and what the destination prepared in vain is taken down.
//!
//! A side that does not answer is noted in the record's `leftovers` and asked again until it does: an ended migration leaves
//! nothing behind (invariant I12), however long a host was away.

use std::sync::Arc;
use std::time::Duration;

use whimbrel_api::agent::IncomingReport;
use whimbrel_api::client::AgentClient;
use whimbrel_api::migration::Migration;
use whimbrel_api::{ApiError, ErrorCode, MigrationId};

use super::page::Page;
use crate::Controller;

/// How long the end waits for both sides, in seconds, before it is told with leftovers.
const BOTH_SIDES_SECONDS: u64 = 3;
/// How often a side that does not answer is asked again, in seconds.
const AGAIN_SECONDS: u64 = 5;

/// Lets both sides forget, and goes on in the background with what does not answer in time.
pub(super) async fn both_sides(page: &mut Page) {
    let (source, destination) = (page.source.clone(), page.destination.clone());
    let once = sweep(&page.record, &source, &destination);
    let left = match tokio::time::timeout(Duration::from_secs(BOTH_SIDES_SECONDS), once).await {
        Ok(left) => left,
        Err(_) => vec![format!(
            "{} or {}: did not answer in time",
            page.record.source, page.record.destination
        )],
    };
    page.record.leftovers = left;
    if !page.record.leftovers.is_empty() {
        tokio::spawn(go_on(page.controller.clone(), page.record.id));
    }
}

/// Takes up what an earlier controller did not get done.
pub(super) async fn resume(controller: &Arc<Controller>) {
    match controller.store().unswept_migrations().await {
        Ok(unswept) => {
            for record in unswept {
                tokio::spawn(go_on(controller.clone(), record.id));
            }
        }
        Err(error) => tracing::error!(%error, "cannot read which migrations left something behind"),
    }
}

async fn go_on(controller: Arc<Controller>, id: MigrationId) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(AGAIN_SECONDS)) => {}
            () = controller.closing() => return,
        }
        let Ok(Some(mut record)) = controller.store().migration(id).await else { continue };
        if crate::store::is_active(&record.state) {
            continue;
        }
        let (Ok(source), Ok(destination)) =
            (controller.agent(&record.source), controller.agent(&record.destination))
        else {
            return;
        };
        record.leftovers = sweep(&record, &source, &destination).await;
        if record.leftovers.is_empty() && controller.save_migration(&record).await.is_ok() {
            tracing::info!(migration = %id, "nothing of the migration is left");
            return;
        }
    }
}

/// What is left after asking both sides once, in words.
async fn sweep(record: &Migration, source: &AgentClient, destination: &AgentClient) -> Vec<String> {
    let (retired, dropped) =
        tokio::join!(source.delete_outgoing(record.id), destination.delete_incoming(record.id));
    let mut left = Vec::new();
    if let Err(error) = retired.or_else(nothing_there) {
        left.push(format!("{}: the outgoing side ({error})", record.source));
    }
    match dropped {
        Ok(IncomingReport::Waiting) => {
            left.push(format!("{}: the incoming side is still there", record.destination))
        }
        Ok(_) => {}
        Err(error) => left.push(format!("{}: the incoming side ({error})", record.destination)),
    }
    left
}

fn nothing_there(error: ApiError) -> Result<(), ApiError> {
    if error.code == ErrorCode::NotFound { Ok(()) } else { Err(error) }
}
