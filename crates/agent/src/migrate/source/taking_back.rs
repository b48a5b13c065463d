//! The VM is taken back by an operator's word: whether that can be, and what it changes here.
//!
//! What follows from it is the rules' matter ([`whimbrel_migration::handoff::Source`]): this host's QEMU ends, then its record
//! says that the VM is its own, crashed. Not here: the call ([`crate::migrate::reclaim()`]).

use tracing::warn;
use whimbrel_api::migration::{Statement, Stay};
use whimbrel_api::{ApiError, ErrorCode};
use whimbrel_migration::handoff::SourceInput;

use super::Departure;
use crate::migrate::HANDOFF_SECONDS;
use crate::migrate::destination::LEASE_SECONDS;

/// How long the destination must have been silent, in seconds: one that was only cut off, and has not got GO, has refused by
/// then, and no GO is on its way any more.
const SILENT_SECONDS: u64 = LEASE_SECONDS + HANDOFF_SECONDS;

impl Departure {
    /// Takes the word, or refuses it. `waits`: not before the destination has been silent for long.
    pub(super) fn reclaim(
        &mut self,
        statement: Statement,
        waits: bool,
    ) -> Result<Option<SourceInput>, ApiError> {
        let destination = self.rules.peer();
        if self.rules.is_reclaiming() {
            return Ok(None);
        }
        if !self.rules.can_reclaim() {
            let message = "the VM has not been given away to a host that does not answer";
            return Err(ApiError::new(ErrorCode::WrongState, message)
                .hint("before the handoff `whimbrel migration cancel` ends it"));
        }
        let silent = self.lively_at.elapsed().as_secs();
        if waits && silent < SILENT_SECONDS {
            let message = format!(
                "{destination} may still answer: it has been silent for {silent} s of {SILENT_SECONDS} s"
            );
            return Err(ApiError::new(ErrorCode::Busy, message)
                .hint("ask again when it has been silent for so long"));
        }
        warn!(migration = %self.id, vm = %self.request.vm, %destination, statement = statement.as_str(),
            "the VM is taken back by an operator's word; its memory is given up");
        self.why = Some(Stay::Reclaimed { statement });
        // Nobody carries a GO any more.
        self.report.send_modify(|report| report.relay = None);
        Ok(Some(SourceInput::Reclaim))
    }
}
