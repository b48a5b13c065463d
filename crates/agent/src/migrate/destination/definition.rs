//! A stopped VM that comes: its definition, and no guest (`offline`).
//!
//! It is handed over by the same rules as a running one, with the same records: one owner at any moment, whoever dies. What
//! differs is what the rules' actions find to do. There is no QEMU: what the destination has to hold has come with the
//! request, so it is "loaded" as soon as it is seen that the VM could be started here, nothing listens, and "the guest runs
//! on" means that it stands still as before. The row with the definition is written in one with the `Owned` record.
//!
//! The firmware's variables lie beside the first disk, on the storage that both hosts reach, and stay where they are.
//!
//! After a restart of the agent an arrival that owns nothing yet is refused, as one whose QEMU has died: a refusal that was told
//! before stays true. Not here: the rules, and who may ask ([`super`], [`super::super`]).

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use tokio::sync::watch;
use tracing::warn;
use whimbrel_api::ApiError;
use whimbrel_api::agent::{IncomingOffer, IncomingReport, IncomingRequest, Receive};
use whimbrel_api::error::chain;
use whimbrel_api::vm::{VmDefinition, VmState};
use whimbrel_migration::handoff::{DestinationInput, Ownership, Standing};

use super::Arrival;
use crate::host::Host;
use crate::vm::spawn;

/// Where nothing listens.
const NOWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

impl Arrival {
    /// Whether no guest comes, but the definition of a stopped VM.
    pub(super) fn is_definition(&self) -> bool {
        matches!(self.request.receive, Receive::Definition)
    }

    /// The definition that a record makes this host's, if a definition is what comes.
    pub(super) fn brings_definition(&self, record: &Ownership) -> Option<&VmDefinition> {
        let owned = self.is_definition() && record.standing == Standing::Owned;
        owned.then_some(&self.request.definition)
    }

    /// Sees whether the VM could be started here. That is all there is to be ready for.
    pub(super) async fn expect_definition(&mut self) -> DestinationInput {
        match spawn::could_start(&self.host, &self.request.definition).await {
            Ok(()) => {
                let agent = self.host.config.advertised();
                let ticket = self.ticket.clone();
                let offer =
                    IncomingOffer { address: NOWHERE, agent, ticket, start_ms: 0, disks: None };
                self.tell_offer(offer).await;
                DestinationInput::Loaded
            }
            Err(error) => {
                let why = error.message.clone();
                self.offer.send_replace(Some(Err(error)));
                DestinationInput::Abandon(why)
            }
        }
    }
}

/// Gives the VM its task, or takes away the row of one that this host has refused.
pub(super) async fn settle(
    host: &Arc<Host>,
    request: &IncomingRequest,
    owned: Option<Ownership>,
    report: &watch::Sender<IncomingReport>,
) {
    if !matches!(request.receive, Receive::Definition) {
        return;
    }
    let definition = request.definition.clone();
    match owned {
        Some(ownership) => {
            let epoch = ownership.epoch;
            host.vms.adopt_stopped(host, definition, ownership);
            report.send_replace(IncomingReport::Owned { epoch, vm: VmState::Stopped });
        }
        None => {
            // A write that failed may have left it; at its next start the agent would take it away as well.
            if let Err(error) = host.ledger.remove_vm(definition.id).await {
                let error = chain(&ApiError::from(error));
                warn!(vm = %definition.name, error, "the row of a VM that did not come is left until the next start");
            }
        }
    }
}
