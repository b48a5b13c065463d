//! A stopped VM that leaves: its definition, and no guest (`offline`).
//!
//! The rules are those of a running one, and so are the records. There is no QEMU, so nothing can end, be cancelled or be
//! resumed; what there is to be sent has gone with the destination's request, so the copy is complete as soon as it is begun.
//! From there on everything is as ever: the destination is asked, the release is written, GO is sent until it is answered.

use std::sync::Arc;
use std::time::{Duration, Instant};

use whimbrel_api::agent::OutgoingRequest;
use whimbrel_api::client::AgentClient;
use whimbrel_api::migration::Mode;
use whimbrel_api::{ApiError, MigrationId, Phase};
use whimbrel_migration::handoff::{Action, SourceInput};

use super::copy::{CONFIRM_SECONDS, enter};
use super::{Departure, Voices};
use crate::host::Host;

impl Departure {
    /// Takes a stopped VM from its task. On failure it is its task's again, as it was.
    pub(super) async fn begin_stopped(
        host: &Arc<Host>,
        id: MigrationId,
        request: &OutgoingRequest,
        peer: AgentClient,
        voices: Voices,
    ) -> Result<(Self, Vec<Action>), ApiError> {
        let lent = host.vms.lend_stopped(request.vm, id).await?;
        match Self::ready(host, id, request, &lent).await {
            Ok((rules, first)) => {
                let departure = Self::new(host, id, request.clone(), (rules, None), peer, voices);
                Ok((departure, first))
            }
            Err(error) => {
                host.vms.give_back_stopped(request.vm).await;
                Err(error)
            }
        }
    }

    /// Whether no guest leaves, but the definition of a stopped VM.
    pub(super) fn is_definition(&self) -> bool {
        self.request.options.mode == Mode::Offline
    }

    /// Everything has been sent; the destination is to say that it has it.
    pub(super) fn send_definition(&mut self) -> SourceInput {
        enter(&self.report, Phase::Switchover);
        self.confirm_by = Some(Instant::now() + Duration::from_secs(CONFIRM_SECONDS));
        SourceInput::Completed
    }
}
