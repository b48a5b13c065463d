//! The relay: carries the handoff's messages between two hosts that do not reach each other.
//!
//! The message is the source's and the answer the destination's; nothing is added, judged or kept. Without it the two would
//! find each other later all the same.

use whimbrel_api::agent::OutgoingReport;

use super::page::Page;

/// Takes the source's open question to the destination, and the answer back.
pub(super) async fn carry_message(page: &Page, report: &OutgoingReport) {
    let Some(question) = &report.relay else { return };
    let id = page.record.id;
    match page.destination().handoff(id, question).await {
        Ok(answer) => {
            tracing::info!(migration = %id, "carried the destination's answer to the source");
            if let Err(error) = page.source().relay_answer(id, &answer).await {
                tracing::warn!(migration = %id, %error, "the source did not take the answer; carried again later");
            }
        }
        Err(error) => tracing::debug!(migration = %id, %error, "the destination has no answer yet"),
    }
}
