//! After the end: both sides forget the migration, and what the destination prepared in vain is taken down.
//!
//! A side that does not answer is noted in the record's `leftovers` and asked again until it does: an ended migration leaves
//! nothing behind (invariant I12), however long a host was away.

use std::sync::Arc;
use std::time::Duration;

use whimbrel_api::agent::IncomingReport;
use whimbrel_api::migration::Migration;
use whimbrel_api::pool::Contact;
use whimbrel_api::{ApiError, ErrorCode, MigrationId, Name};

use super::page::Page;
use super::reclaim::tell_former_owner;
use crate::Controller;

/// How long each side may take to answer, in seconds: then the end is told with leftovers.
const SIDE_SECONDS: u64 = 3;
/// How often a side that does not answer is asked again, in seconds.
const AGAIN_SECONDS: u64 = 5;

/// Lets both sides forget, and goes on in the background with what does not answer in time.
pub(super) async fn both_sides(page: &mut Page) {
    let controller = page.controller.clone();
    page.record.leftovers = sweep(&controller, &mut page.record).await;
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
        let heard = record.reclaim.clone();
        let left = sweep(&controller, &mut record).await;
        let news = left != record.leftovers || heard != record.reclaim;
        record.leftovers = left;
        if news && controller.save_migration(&record).await.is_err() {
            continue;
        }
        if record.leftovers.is_empty() {
            tracing::info!(migration = %id, "nothing of the migration is left");
            return;
        }
    }
}

/// What is left after asking both sides once, in words.
async fn sweep(controller: &Controller, record: &mut Migration) -> Vec<String> {
    let id = record.id;
    let retire = async { controller.agent(&record.source)?.delete_outgoing(id).await };
    let drop = async {
        let heard = tell_former_owner(controller, record).await?;
        Ok((heard, controller.agent(&record.destination)?.delete_incoming(id).await?))
    };
    let (retired, dropped) = tokio::join!(in_time(retire), in_time(drop));
    let dropped = dropped.map(|(heard, report)| {
        if let Some(word) = &mut record.reclaim {
            word.guest_was_there = heard;
        }
        report
    });
    let outgoing = match retired {
        Ok(()) => None,
        Err(error) if error.code == ErrorCode::NotFound && knows(controller, &record.source) => {
            None
        }
        Err(error) => Some(left(controller, &record.source, "outgoing", &error)),
    };
    let incoming = match dropped {
        Ok(IncomingReport::Waiting | IncomingReport::Fetching { .. }) => {
            Some(format!("{}: the incoming side is still there", record.destination))
        }
        Ok(_) => None,
        Err(error) => Some(left(controller, &record.destination, "incoming", &error)),
    };
    outgoing.into_iter().chain(incoming).collect()
}

async fn in_time<T>(asked: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
    let answer = tokio::time::timeout(Duration::from_secs(SIDE_SECONDS), asked).await;
    answer.unwrap_or_else(|_| {
        let message = format!("no answer within {SIDE_SECONDS} s");
        Err(ApiError::new(ErrorCode::Unreachable, message))
    })
}

/// Whether a host is in the pool: one that is not is not the same as one that has forgotten the migration.
fn knows(controller: &Controller, host: &Name) -> bool {
    controller.hosts().get(host).is_ok()
}

/// Which side is left where, and for a host that is away since when. The words stay the same as long as nothing changes.
fn left(controller: &Controller, host: &Name, side: &str, error: &ApiError) -> String {
    let contact = controller.hosts().get(host).map(|member| member.view().contact);
    match contact {
        Ok(Contact::Unreachable { since, .. }) if error.is_unknown() => {
            format!("{host}: the {side} side; {host} does not answer since {since:.0}")
        }
        _ if error.is_unknown() => format!("{host}: the {side} side; {host} does not answer"),
        _ => format!("{host}: the {side} side ({error})"),
    }
}
