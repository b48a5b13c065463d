//! What is told of a departure that lasts, and what of it is noted for the agent's next life.
//!
//! In doubt, and where a destination that fetches falls silent, the operator is told; when the destination is heard again
//! that is taken back, as often as it happens. The notes stand in the migration's row: how far post-copy was and whether it
//! is held by hand, where the stream goes by now, and an operator's word that the VM is taken back. Nothing is decided by
//! them but what is told, and that a held post-copy stays held. Not here: this host's word on the VM ([`super::word`]).

use std::time::Duration;

use tokio::time::timeout;
use tracing::{error, warn};
use whimbrel_api::agent::{OutgoingEnd, OutgoingReport};
use whimbrel_api::error::chain;
use whimbrel_api::migration::{PostcopyState, Stay};
use whimbrel_api::vm::VmState;

use super::Departure;
use crate::migrate::remember_outgoing;

/// How long a destination may be silent, in seconds, that fetches memory from here, until the operator is told. More than
/// after the release: nothing stands still for it, and a network that is back soon is no news.
pub(super) const SERVING_SILENT_SECONDS: u64 = 30;
/// The same for a test that does not want to wait.
const SILENT_IN_TEST_SECONDS: u64 = 3;
/// How long a note may take to be written, in seconds, until the migration goes on without it.
const NOTE_SECONDS: u64 = 2;
/// Why a post-copy stands still that somebody holds.
pub(super) const HELD: &str = "an order";

impl Departure {
    /// How long a destination that fetches may be silent. A test that does not want to wait says so.
    pub(super) async fn choose_patience(&mut self) {
        if self.host.failpoints.hit("source.silent-soon").await.is_err() {
            self.patience = Duration::from_secs(SILENT_IN_TEST_SECONDS);
        }
    }

    /// Whether a destination that fetches has been silent for long, and nobody has been told.
    pub(super) fn is_newly_silent(&self) -> bool {
        let silent = self.lively_at.elapsed() >= self.patience;
        silent && !self.is_told_unresolved()
    }

    fn is_told_unresolved(&self) -> bool {
        let ask = self.rules.peer();
        matches!(&self.report.borrow().end, OutgoingEnd::Unresolved { ask: told } if told == ask)
    }

    pub(super) async fn raise_unresolved(&mut self) {
        if self.rules.is_serving() && self.is_told_unresolved() {
            return;
        }
        let (migration, vm, ask) = (self.id, self.request.vm, self.rules.peer().clone());
        if !self.rules.is_serving() {
            error!(%migration, %vm, %ask, "unresolved: the VM was given away and is paused here until that host answers");
        } else if self.denied {
            error!(%migration, %vm, %ask, "unresolved: the VM is that host's, which does not know it any more; the rest of its memory is kept here");
        } else {
            error!(%migration, %vm, %ask, "unresolved: the VM is that host's, which is silent; the rest of its memory is kept here");
        }
        let news = VmState::Unresolved { migration, ask: ask.clone() };
        self.host.vms.loan_news(vm, news).await;
        self.report.send_modify(|report| report.end = OutgoingEnd::Unresolved { ask });
    }

    /// Once the destination owns the VM nothing is in doubt but whether it is heard, and that is taken back when it is.
    pub(super) async fn look_after_resolution(&mut self) {
        let heard = self.lively_at.elapsed() < self.patience && !self.denied;
        let raised = matches!(self.report.borrow().end, OutgoingEnd::Unresolved { .. });
        let told_before = self.released_at.take_if(|_| self.rules.is_serving()).is_none();
        if self.rules.is_serving() && heard && (raised || !told_before) {
            let migration = self.id;
            self.host.vms.loan_news(self.request.vm, VmState::Migrating { migration }).await;
            self.report.send_modify(|report| report.end = OutgoingEnd::Open);
        }
    }

    /// Notes what has changed, if anything has. Not before the destination owns the VM: until then the guest stands still.
    pub(super) async fn note_changes(&mut self) {
        if self.rules.is_serving() && std::mem::take(&mut self.changed) {
            self.note(None).await;
        }
    }

    /// Notes how far it is, and with a word of an operator how it will have ended once this host owns the VM.
    pub(super) async fn note(&mut self, stays: Option<Stay>) {
        let end = stays.map_or(OutgoingEnd::Open, |why| OutgoingEnd::Stayed { why });
        let mut report = OutgoingReport { relay: None, end, ..self.report.borrow().clone() };
        if let Some(postcopy) = &mut report.postcopy
            && self.is_held()
        {
            postcopy.state = PostcopyState::Paused { why: HELD.to_owned(), by_hand: true };
        }
        let note = remember_outgoing(&self.host, self.id, &self.request, Some(&report));
        match timeout(Duration::from_secs(NOTE_SECONDS), note).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                warn!(migration = %self.id, error = chain(&error), "how far the migration is, is only in memory");
            }
            // It is written in its turn: what is noted later comes after it.
            Err(_) => {
                warn!(migration = %self.id, "how far the migration is, is not noted yet: the ledger's disk is slow");
            }
        }
    }
}
