//! What can be asked of a migration while it runs: other settings, post-copy, holding it, completing it by force; and what was
//! seen of it over time.
//!
//! The source's agent does it and has the last word. Refused here already is what does not fit the phase that is known: so
//! nobody waits for a host to hear what is certain. The migration's page is not involved: what the source does it tells in its
//! reports.

use std::sync::Arc;
use std::time::{Duration, Instant};

use whimbrel_api::agent::{ListenAgain, OutgoingReport, RecoverOrder};
use whimbrel_api::client::AgentClient;
use whimbrel_api::migration::{
    LiveSettings, Migration, MigrationAction, MigrationState, MigrationStatistics, PostcopyState,
};
use whimbrel_api::{ApiError, ErrorCode, MigrationId, Phase};

use crate::store::is_active;
use crate::{Controller, policies};

/// How long a source is left alone with a lost connection, in seconds, before the controller asks the destination for it: longer
/// than its own asking takes to fail where no way leads there.
const RECOVER_ALONE_SECONDS: u64 = 7;
/// Pause between two looks at it meanwhile, in milliseconds.
const RECOVER_LOOK_MS: u64 = 250;

/// Changes a running migration.
pub async fn set(
    controller: &Arc<Controller>,
    id: MigrationId,
    settings: &LiveSettings,
) -> Result<Migration, ApiError> {
    policies::sound(&settings.validate())?;
    let record = controller.migration(id).await?;
    let of_precopy = settings.max_downtime_ms.or(settings.bandwidth_bytes_per_s).is_some();
    match record.phase {
        _ if !is_active(&record.state) => return Err(ended(&record)),
        Phase::Precopy => {}
        Phase::Postcopy if !of_precopy => {}
        phase => {
            let message = format!("{} is in {phase}", record.vm_name);
            return Err(ApiError::new(ErrorCode::WrongState, message).hint(
                "pause and bandwidth can be set while memory is copied, and in post-copy its own bandwidth",
            ));
        }
    }
    let source = controller.agent(&record.source)?;
    let report = source.put_outgoing_settings(id, settings).await?;
    answered(controller, id, &report).await
}

/// Orders something of a running migration.
pub async fn act(
    controller: &Arc<Controller>,
    id: MigrationId,
    action: MigrationAction,
) -> Result<Migration, ApiError> {
    let record = controller.migration(id).await?;
    fits(&record, action)?;
    let source = controller.agent(&record.source)?;
    let report = match action {
        MigrationAction::Recover => recover(controller, &record, &source).await?,
        _ => source.outgoing_action(id, action).await?,
    };
    answered(controller, id, &report).await
}

/// Lets the source make a lost connection again.
///
/// By the source's word, and not by the record's, which may be older: a destination that listens anew gives up the connection
/// that it has. So the source is asked first, and asks the destination by itself. Only where it stays paused, the controller asks
/// for it: it may reach a destination that the source does not.
async fn recover(
    controller: &Controller,
    record: &Migration,
    source: &AgentClient,
) -> Result<OutgoingReport, ApiError> {
    let mut report = source.recover_outgoing(record.id, &RecoverOrder { address: None }).await?;
    let until = Instant::now() + Duration::from_secs(RECOVER_ALONE_SECONDS);
    while is_paused(&report) && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(RECOVER_LOOK_MS)).await;
        report = source.outgoing(record.id).await?;
    }
    if !is_paused(&report) {
        return Ok(report);
    }
    let destination = controller.agent(&record.destination)?;
    let listening = destination.listen_again(record.id, &ListenAgain::default()).await?;
    let there = RecoverOrder { address: Some(listening.address) };
    source.recover_outgoing(record.id, &there).await
}

fn is_paused(report: &OutgoingReport) -> bool {
    let postcopy = report.postcopy.as_ref().map(|postcopy| &postcopy.state);
    matches!(postcopy, Some(PostcopyState::Paused { .. }))
}

/// The record as it is after the source's answer. The page takes the same report over; whoever asked need not wait for it.
async fn answered(
    controller: &Controller,
    id: MigrationId,
    report: &OutgoingReport,
) -> Result<Migration, ApiError> {
    let mut record = controller.migration(id).await?;
    record.postcopy = report.postcopy.clone().or(record.postcopy);
    record.strategy = report.strategy.clone().or(record.strategy);
    Ok(record)
}

/// Whether an order fits how far a migration is known to be.
fn fits(record: &Migration, action: MigrationAction) -> Result<(), ApiError> {
    if !is_active(&record.state) {
        return Err(ended(record));
    }
    let postcopy = record.postcopy.as_ref().map(|postcopy| &postcopy.state);
    let wrong = |what: String, hint: &str| {
        let message = format!("{} cannot {what}", record.vm_name);
        Err(ApiError::new(ErrorCode::WrongState, message).hint(hint))
    };
    match (action, record.phase, postcopy) {
        (MigrationAction::Postcopy, Phase::Precopy, _) => {
            let ready = record.strategy.as_ref().is_some_and(|how| how.postcopy.is_some());
            if ready {
                return Ok(());
            }
            wrong(
                "go on with post-copy: it was not made ready before the start".into(),
                "cancel it, and migrate with --postcopy or a policy that allows post-copy",
            )
        }
        (MigrationAction::ForceComplete, Phase::Precopy, _) => Ok(()),
        (MigrationAction::Pause, Phase::Postcopy, Some(PostcopyState::Active)) => Ok(()),
        (
            MigrationAction::Resume,
            Phase::Postcopy,
            Some(PostcopyState::Paused { by_hand: true, .. }),
        )
        | (MigrationAction::Recover, Phase::Postcopy, Some(PostcopyState::Paused { .. })) => Ok(()),
        (MigrationAction::Resume, Phase::Postcopy, Some(PostcopyState::Paused { .. })) => wrong(
            "be resumed: nobody paused it, its connection is lost".into(),
            "it recovers by itself when the way is back; `whimbrel migration recover` tries now",
        ),
        (action, phase, state) => {
            let (what, hint) = unfit(action, phase, state);
            wrong(what, hint)
        }
    }
}

/// What cannot be done in a phase, and what can; for an order that does not fit it.
fn unfit(
    action: MigrationAction,
    phase: Phase,
    postcopy: Option<&PostcopyState>,
) -> (String, &'static str) {
    const SHOWN: &str = "`whimbrel migration show` tells how it is";
    const GOES_ON: &str = "`whimbrel migration resume` goes on with it";
    const BY_ITSELF: &str = "it recovers by itself when the way is back";
    const WHILE_COPIED: &str = "it can be ordered while memory is copied (precopy)";
    let (what, hint) = match (action, phase, postcopy) {
        (MigrationAction::Postcopy, Phase::Postcopy, _) => {
            return ("begin post-copy: it has begun".into(), SHOWN);
        }
        (MigrationAction::ForceComplete, Phase::Postcopy, _) => {
            return ("be completed by force: the guest has left its source".into(), SHOWN);
        }
        (MigrationAction::Pause, _, Some(PostcopyState::Paused { by_hand: true, .. })) => {
            return ("be paused: it is paused already".into(), GOES_ON);
        }
        (MigrationAction::Pause, _, Some(PostcopyState::Paused { .. })) => {
            return ("be paused: its connection is lost".into(), BY_ITSELF);
        }
        (_, _, Some(PostcopyState::Recovering)) => {
            let what = if action == MigrationAction::Pause { "be paused" } else { "be taken up" };
            return (format!("{what}: its connection is being made again"), BY_ITSELF);
        }
        (MigrationAction::Postcopy, ..) => ("begin post-copy", WHILE_COPIED),
        (MigrationAction::ForceComplete, ..) => ("be completed by force", WHILE_COPIED),
        (MigrationAction::Pause, ..) => {
            ("be paused", "only post-copy can be held; before it, set a low bandwidth or cancel")
        }
        (MigrationAction::Resume | MigrationAction::Recover, ..) => {
            return (format!("be taken up in {phase}: it is not paused"), SHOWN);
        }
    };
    (format!("{what} in {phase}"), hint)
}

fn ended(record: &Migration) -> ApiError {
    match record.state {
        MigrationState::Moved => super::handed_over(record),
        _ => ApiError::new(ErrorCode::WrongState, "the migration has ended")
            .hint("`whimbrel migration show` tells how"),
    }
}

/// What was seen of a migration over time: while it runs, from its source; afterwards as it was written down.
pub async fn statistics(
    controller: &Controller,
    id: MigrationId,
) -> Result<MigrationStatistics, ApiError> {
    let record = controller.migration(id).await?;
    if let Some(kept) = controller.store().statistics(id).await? {
        return Ok(kept);
    }
    if !is_active(&record.state) || record.phase < Phase::Precopy {
        return Ok(MigrationStatistics::default());
    }
    controller.agent(&record.source)?.outgoing_statistics(id).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_is_in_the_way() {
        let by_hand = |by_hand| PostcopyState::Paused { why: "an order".into(), by_hand };
        for (action, phase, state, says) in [
            (MigrationAction::Postcopy, Phase::Handoff, None, "begin post-copy in handoff"),
            (MigrationAction::Postcopy, Phase::Postcopy, None, "begin post-copy: it has begun"),
            (
                MigrationAction::ForceComplete,
                Phase::Postcopy,
                Some(PostcopyState::Active),
                "be completed by force: the guest has left its source",
            ),
            (MigrationAction::Pause, Phase::Precopy, None, "be paused in precopy"),
            (
                MigrationAction::Pause,
                Phase::Postcopy,
                Some(by_hand(true)),
                "be paused: it is paused already",
            ),
            (
                MigrationAction::Pause,
                Phase::Postcopy,
                Some(by_hand(false)),
                "be paused: its connection is lost",
            ),
            (
                MigrationAction::Recover,
                Phase::Postcopy,
                Some(PostcopyState::Recovering),
                "be taken up: its connection is being made again",
            ),
            (
                MigrationAction::Resume,
                Phase::Postcopy,
                Some(PostcopyState::Active),
                "be taken up in postcopy: it is not paused",
            ),
        ] {
            assert_eq!(unfit(action, phase, state.as_ref()).0, says, "{action:?} {phase}");
        }
    }
}
