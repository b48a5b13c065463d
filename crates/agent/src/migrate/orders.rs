//! What can be ordered and asked of a migration while it runs, besides cancelling it: the calls behind HTTP.
//!
//! An order goes to the migration's own task, which says at once whether it fits; what comes of it shows in the report. Not
//! here: what an order does ([`super::source`]).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;
use whimbrel_api::agent::{
    IncomingStatistics, ListenAgain, NewAddress, OutgoingReport, RecoverOrder,
};
use whimbrel_api::migration::{LiveSettings, MigrationAction, MigrationStatistics};
use whimbrel_api::{ApiError, ErrorCode, MigrationId};
use whimbrel_pki::identity::Peer;

use super::{ORDER_SECONDS, Outgoing, destination, known, same_ticket, source, unknown};
use crate::host::Host;

type Answer = oneshot::Sender<Result<(), ApiError>>;

/// `PUT /v1/outgoing/{migration}/settings`.
///
/// # Errors
/// `not-found`, `out-of-range`, `wrong-state` where it does not fit the phase, `busy` without an answer.
pub async fn set(
    host: &Arc<Host>,
    id: MigrationId,
    settings: LiveSettings,
) -> Result<OutgoingReport, ApiError> {
    order(host, id, |answer| source::Order::Set(settings, answer)).await
}

/// `POST /v1/outgoing/{migration}/postcopy`, `pause`, `resume`, `force-complete`.
///
/// # Errors
/// As [`set`].
pub async fn act(
    host: &Arc<Host>,
    id: MigrationId,
    action: MigrationAction,
) -> Result<OutgoingReport, ApiError> {
    act_at(host, id, action, None).await
}

/// `POST /v1/outgoing/{migration}/recover`.
///
/// # Errors
/// As [`set`].
pub async fn recover(
    host: &Arc<Host>,
    id: MigrationId,
    order: RecoverOrder,
) -> Result<OutgoingReport, ApiError> {
    act_at(host, id, MigrationAction::Recover, order.address).await
}

async fn act_at(
    host: &Arc<Host>,
    id: MigrationId,
    action: MigrationAction,
    to: Option<SocketAddr>,
) -> Result<OutgoingReport, ApiError> {
    order(host, id, |answer| source::Order::Act(action, to, answer)).await
}

pub(super) async fn order(
    host: &Arc<Host>,
    id: MigrationId,
    of: impl FnOnce(Answer) -> source::Order,
) -> Result<OutgoingReport, ApiError> {
    let outgoing = known(host, id).await?;
    let (answer, answered) = oneshot::channel();
    let asked = async {
        outgoing.orders.send(of(answer)).await.ok()?;
        answered.await.ok()
    };
    match timeout(Duration::from_secs(ORDER_SECONDS), asked).await {
        Ok(Some(taken)) => taken.map(|()| outgoing.report.borrow().clone()),
        Ok(None) => Err(over(&outgoing)),
        Err(_) => {
            let message = format!("the order was not answered within {ORDER_SECONDS} s");
            Err(ApiError::new(ErrorCode::Busy, message).hint("ask again"))
        }
    }
}

fn over(outgoing: &Outgoing) -> ApiError {
    let phase = outgoing.report.borrow().phase;
    ApiError::new(ErrorCode::WrongState, format!("the migration is over; it ended in {phase}"))
}

/// `GET /v1/outgoing/{migration}/statistics`.
///
/// # Errors
/// `not-found`.
pub fn outgoing_statistics(
    host: &Arc<Host>,
    id: MigrationId,
) -> Result<MigrationStatistics, ApiError> {
    let outgoing = host.migrations.find_outgoing(id).ok_or_else(|| unknown(id))?;
    Ok(outgoing.samples.seen())
}

/// `GET /v1/incoming/{migration}/statistics`. Empty where nothing but a plain copy was seen.
///
/// # Errors
/// `not-found`.
pub fn incoming_statistics(
    host: &Arc<Host>,
    id: MigrationId,
) -> Result<IncomingStatistics, ApiError> {
    let incoming = host
        .migrations
        .find_incoming(id)
        .ok_or_else(|| ApiError::not_found("incoming migration", id))?;
    let seen = incoming.statistics.borrow().clone();
    Ok(IncomingStatistics {
        postcopy_blocktime_ms: seen.postcopy_blocktime_ms,
        postcopy_vcpu_blocktime_ms: seen.postcopy_vcpu_blocktime_ms,
        raw: Some(seen.raw).filter(|raw| !raw.is_null()),
    })
}

/// `POST /v1/incoming/{migration}/recover`: the source's agent, or the controller for it, wants to make a lost connection
/// again.
///
/// # Errors
/// `not-found`, `not-allowed`, `bad-token`, `wrong-state` where no post-copy is under way here, `busy`, `engine`.
pub async fn listen_again(
    host: &Arc<Host>,
    peer: &Peer,
    id: MigrationId,
    request: ListenAgain,
) -> Result<NewAddress, ApiError> {
    let incoming = host
        .migrations
        .find_incoming(id)
        .ok_or_else(|| ApiError::not_found("incoming migration", id))?;
    if *peer != Peer::Controller {
        if *peer != Peer::Agent(incoming.source.to_string()) {
            let message =
                format!("only {} or the controller may speak for this migration", incoming.source);
            return Err(ApiError::new(ErrorCode::NotAllowed, message));
        }
        if !same_ticket(&request.ticket, &incoming.ticket) {
            let message = "the ticket is not that of this migration";
            return Err(ApiError::new(ErrorCode::BadToken, message));
        }
    }
    let (answer, answered) = oneshot::channel();
    let asked = async {
        incoming.orders.send(destination::Order::ListenAgain(answer)).await.ok()?;
        answered.await.ok()
    };
    match timeout(Duration::from_secs(ORDER_SECONDS), asked).await {
        Ok(Some(listening)) => listening,
        Ok(None) => Err(ApiError::new(ErrorCode::WrongState, "no post-copy is under way here")),
        Err(_) => {
            Err(ApiError::new(ErrorCode::Busy, "QEMU does not listen anew yet").hint("ask again"))
        }
    }
}
