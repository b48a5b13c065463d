//! A VM that is taken back from a destination that never returns: the calls on both sides.
//!
//! On the source an operator's word goes to the migration's own task, whose rules end its QEMU and then write that the VM is
//! this host's ([`whimbrel_migration::handoff::Source`]). The destination hears of it when it is back, from the controller,
//! again and again until it has answered: what its ledger says of the VM is old, and must not let it run again
//! ([`handoff::supersede`]).
//!
//! Not here: whether the word is true, which nobody but the operator knows; who tells the destination and when (the
//! controller). Until it has been told only an order of the controller could start the VM there, and none comes.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tracing::{error, warn};
use whimbrel_api::agent::{OutgoingReport, Superseded, SupersededReport};
use whimbrel_api::migration::ReclaimRequest;
use whimbrel_api::vm::{VmAction, VmState};
use whimbrel_api::{ApiError, ErrorCode, MigrationId};
use whimbrel_migration::handoff::{self, Claim, Observed, Superseding};

use super::{ORDER_SECONDS, destination, orders, source};
use crate::host::Host;

/// `POST /v1/outgoing/{migration}/reclaim`. Repeated, it is the same word.
///
/// # Errors
/// `not-found`; `wrong-state` where the VM was not given away to a host that is silent; `busy` as long as the destination
/// may still be heard of, and without an answer.
pub async fn reclaim(
    host: &Arc<Host>,
    id: MigrationId,
    request: ReclaimRequest,
) -> Result<OutgoingReport, ApiError> {
    // A test that does not want to wait says so.
    let waits = host.failpoints.hit("source.reclaim-waits").await.is_ok();
    let statement = request.statement;
    let word = |answer| source::Order::Reclaim { statement, waits, answer };
    orders::order(host, id, word).await
}

/// `POST /v1/incoming/{migration}/superseded`. Answered once it is durable that this host does not own the VM.
///
/// # Errors
/// `busy` as long as the migration, or another of the VM, is open here; what failed. It is asked again.
pub async fn superseded(
    host: &Arc<Host>,
    id: MigrationId,
    said: Superseded,
) -> Result<SupersededReport, ApiError> {
    if let Some(incoming) = host.migrations.find_incoming(id) {
        let over = async {
            // Fails if its task has ended.
            let _ended = incoming.orders.send(destination::Order::Superseded).await;
            incoming.orders.closed().await;
        };
        let ended = timeout(Duration::from_secs(ORDER_SECONDS), over).await;
        ended.map_err(|_| ApiError::new(ErrorCode::Busy, "the migration is still open here"))?;
    }
    host.migrations.open().admit(said.vm)?;
    let guest_was_there = end_guest(host, id, &said).await?;
    give_up(host, id, &said).await?;
    Ok(SupersededReport { guest_was_there })
}

/// What the rules say of the VM as it is here.
async fn does(
    host: &Host,
    id: MigrationId,
    said: &Superseded,
    observed: Observed,
) -> Result<Superseding, ApiError> {
    let current = host.ledger.current(said.vm).await?;
    let claim = Claim { vm: said.vm, migration: id, epoch: said.epoch };
    Ok(handoff::supersede(current.as_ref(), claim, &said.owner, observed))
}

/// The operator was wrong, and a QEMU of the VM lives: it ends. Whether there was one; one of which nothing is known counts.
async fn end_guest(host: &Arc<Host>, id: MigrationId, said: &Superseded) -> Result<bool, ApiError> {
    let observed = match host.vms.report(said.vm).map(|report| report.state) {
        Err(_) | Ok(VmState::Stopped | VmState::Crashed { .. }) => Observed::Gone,
        Ok(_) => Observed::Running,
    };
    if does(host, id, said, observed).await? != Superseding::EndGuest {
        return Ok(false);
    }
    error!(migration = %id, vm = %said.vm, owner = %said.owner,
        "the VM was taken back from this host while its guest was here; it is ended");
    host.vms.act(said.vm, VmAction::Stop, true).await?;
    Ok(true)
}

/// Writes that the VM is another host's, and forgets it. On failure it is as it was, and nothing runs.
async fn give_up(host: &Arc<Host>, id: MigrationId, said: &Superseded) -> Result<(), ApiError> {
    if does(host, id, said, Observed::Gone).await? == Superseding::Nothing {
        return Ok(());
    }
    let lent = host.vms.has(said.vm);
    if lent {
        // Now it has no QEMU, and gets none.
        host.vms.lend_stopped(said.vm, id).await?;
    }
    let written = match does(host, id, said, Observed::Gone).await {
        Ok(Superseding::Write(record)) => {
            warn!(migration = %id, vm = %said.vm, owner = %said.owner,
                "the VM was taken back while this host could not be asked; what is left of it here is given up");
            host.ledger.persist(&record).await.map_err(ApiError::from)
        }
        Ok(Superseding::Nothing | Superseding::EndGuest) => Err(super::no_answer_yet()),
        Err(error) => Err(error),
    };
    match written {
        Ok(()) => host.vms.forget(said.vm).await,
        Err(_) if lent => host.vms.give_back_stopped(said.vm).await,
        Err(_) => {}
    }
    written
}
