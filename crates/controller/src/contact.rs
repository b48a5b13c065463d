//! Keeping in touch: one loop per host asks it for everything, again and again, and notes what it says.
//!
//! The loop is the everyday path and the recovery at once: after a restart of either side, a cut of the network or a missed
//! event, the next round puts everything right, and [`crate::reconcile`] gives the host what it should have. It never changes
//! where a VM belongs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::time::timeout;
use tracing::{debug, info, warn};
use whimbrel_api::agent::{HostReport, VmReport};
use whimbrel_api::event::Event;
use whimbrel_api::{ApiError, ErrorCode, VmId};

use crate::hosts::{Changed, Member};
use crate::{Controller, reconcile};

/// From one round to the next, in milliseconds.
const ROUND_MS: u64 = 2_000;
/// At most so much is added or taken at random, in milliseconds, so that the hosts are not all asked at once.
const JITTER_MS: u64 = 250;
/// From one round to the next while a host has not answered yet since it joined or since we started, in milliseconds: its agent
/// opens its door a moment after it has its certificates.
const FIRST_ROUND_MS: u64 = 100;
/// Most of these quick rounds; a host that has not answered by then is unreachable.
const FIRST_ROUNDS_MAX: u32 = 50;
/// How long these quick rounds may take in all, in seconds: one that hangs takes [`ANSWER_SECONDS`].
const FIRST_ROUNDS_SECONDS: u64 = 5;
/// How long a host may take to answer a round's two questions, in seconds.
const ANSWER_SECONDS: u64 = 5;

/// Starts the loop of a host; it ends with the controller.
pub(crate) fn spawn(controller: &Arc<Controller>, member: Arc<Member>) {
    let controller = controller.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = keep(&controller, &member) => {}
            () = controller.closing() => {}
        }
    });
}

async fn keep(controller: &Controller, member: &Member) {
    let mut reconciler = reconcile::Reconciler::default();
    let mut first_rounds_left = FIRST_ROUNDS_MAX;
    let begun = Instant::now();
    loop {
        let asked = member.asking();
        match ask(member).await {
            Ok((report, vms)) => {
                first_rounds_left = 0;
                let changed = member.note_answer(asked, Timestamp::now(), report, vms);
                take_note(controller, member, &changed).await;
                reconciler.reconcile(controller, member).await;
            }
            Err(_) if first_rounds_left > 0 && begun.elapsed().as_secs() < FIRST_ROUNDS_SECONDS => {
                first_rounds_left -= 1;
            }
            Err(error) => {
                first_rounds_left = 0;
                note_silence(controller, member, &error).await;
            }
        }
        let pause = if first_rounds_left > 0 { first_pause() } else { pause() };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = member.nudged() => {}
        }
    }
}

async fn take_note(controller: &Controller, member: &Member, changed: &Changed) {
    if changed.host {
        debug!(host = %member.name, "the host answers");
    }
    if let Err(error) = take_over(controller, member, changed).await {
        warn!(host = %member.name, %error, "what the host said could not be written down");
    }
}

async fn note_silence(controller: &Controller, member: &Member, error: &ApiError) {
    let why = match &error.hint {
        Some(hint) => format!("{}: {hint}", error.message),
        None => error.message.clone(),
    };
    if member.note_silence(Timestamp::now(), &why) {
        warn!(host = %member.name, %error, "the host does not answer: what runs there is unknown");
        tell_of_all(controller, member).await;
    }
}

async fn ask(member: &Member) -> Result<(HostReport, Vec<VmReport>), ApiError> {
    let agent = member.agent();
    let questions = async { Ok((agent.host().await?, agent.vms().await?)) };
    let answer = timeout(Duration::from_secs(ANSWER_SECONDS), questions).await;
    answer.unwrap_or_else(|_| {
        let message = format!("no answer within {ANSWER_SECONDS} s");
        Err(ApiError::new(ErrorCode::Unreachable, message))
    })
}

/// Writes down what changed and tells of it.
async fn take_over(
    controller: &Controller,
    member: &Member,
    changed: &Changed,
) -> Result<(), ApiError> {
    for id in &changed.vms {
        take_over_vm(controller, member, *id).await?;
    }
    if changed.host {
        tell_of_all(controller, member).await;
    }
    Ok(())
}

async fn take_over_vm(controller: &Controller, member: &Member, id: VmId) -> Result<(), ApiError> {
    let Some(row) = controller.store().vm(id).await? else {
        debug!(host = %member.name, vm = %id, "the host has a VM that the pool does not know");
        return Ok(());
    };
    let Some(report) = member.vm_report(id) else {
        if row.host == member.name {
            controller.publish_vm(&row);
        }
        return Ok(());
    };
    if row.host != member.name {
        if report.epoch > row.epoch {
            info!(host = %member.name, vm = %row.name(), epoch = %report.epoch, placed = %row.host,
                "a host says that it owns a VM that is placed elsewhere; only its migration moves it");
        }
        return Ok(());
    }
    controller.store().confirm_vm(&member.name, report.epoch, &report.definition).await?;
    if let Some(row) = controller.store().vm(id).await? {
        controller.publish_vm(&row);
    }
    Ok(())
}

/// Tells of the host and of every VM that belongs there: their states became known or unknown all at once.
async fn tell_of_all(controller: &Controller, member: &Member) {
    controller.events().publish(Event::Host { host: member.view() });
    match controller.store().vms().await {
        Ok(rows) => rows
            .iter()
            .filter(|row| row.host == member.name)
            .for_each(|row| controller.publish_vm(row)),
        Err(error) => warn!(%error, "cannot list the VMs"),
    }
}

fn first_pause() -> Duration {
    Duration::from_millis(FIRST_ROUND_MS)
}

/// The pause to the next round. The randomness is a UUID's: version 4 is nothing but random bits in its first bytes.
fn pause() -> Duration {
    let random = u64::from(uuid::Uuid::new_v4().as_bytes()[0]);
    Duration::from_millis(ROUND_MS - JITTER_MS + 2 * JITTER_MS * random / 255)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_spread_and_bounded() {
        let pauses: Vec<u128> = (0..100).map(|_| pause().as_millis()).collect();
        assert!(pauses.iter().all(|pause| (1_750..=2_250).contains(pause)));
        assert!(pauses.iter().max() != pauses.iter().min());
    }
}
