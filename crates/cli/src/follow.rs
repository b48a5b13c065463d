//! A migration followed to its end: the watch, opened again when it is lost; and the words about the end. Ctrl-C is in
//! [`interrupts`], the figures are in [`mod@figures`].

mod figures;
mod interrupts;

use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};
use whimbrel_api::client::PoolClient;
use whimbrel_api::migration::{
    Forecast, Migration, MigrationState, PostcopyReport, Statement, Stay, Strategy,
};
use whimbrel_api::{ApiError, Downtime, ErrorCode, MigrationId, Name, Phase};

pub(crate) use self::figures::{arrival_ms, downtime_parts, figures, postcopy_text};
pub(crate) use self::interrupts::Interrupts;
use self::interrupts::{Answers, Next, Wish, can_ask};
use crate::failure::{Exit, Failure, OwnCode};
use crate::progress::{Progress, Voice};
use crate::{output, words};

/// A watch that brings nothing for this long counts as lost, in seconds.
const QUIET_SECONDS_MAX: u64 = 10;
/// How long the controller may be away before the command gives up, in seconds. The migration does not need it.
const LOST_SECONDS_MAX: u64 = 60;
/// Pause before a lost watch is opened again, in milliseconds.
const REOPEN_PAUSE_MS: u64 = 500;

/// Follows a migration from `record` on. Ctrl-C asks where it can, then cancels, then leaves it running.
pub(crate) async fn to_the_end(
    pool: &PoolClient,
    record: Migration,
    progress: &mut Progress,
    interrupts: &mut Interrupts,
) -> Result<Migration, Failure> {
    let id = record.id;
    let vm = record.vm_name.clone();
    let mut wish = Wish::None { can_ask: can_ask(progress.is_json()) };
    let mut answers = Answers::none();
    let voice = progress.voice();
    let watching = watch(pool, record, progress);
    tokio::pin!(watching);
    // Pressed before the migration was admitted.
    let mut next = if interrupts.any() { wish.interrupted() } else { Next::Follow };
    loop {
        match next {
            Next::Follow => {}
            Next::Ask => {
                answers.read();
                voice.say(&format!(
                    "cancel the migration of {vm}? y: yes, d: leave it running, else it goes on; Ctrl-C again cancels"
                ));
            }
            Next::Cancel => {
                interrupts.note_cancel();
                tokio::select! {
                    () = cancel(pool, id, &voice) => {}
                    // Its end may come before the cancel's answer.
                    end = &mut watching => return end,
                }
            }
            Next::Leave => return Err(left(id)),
        }
        next = tokio::select! {
            end = &mut watching => return end,
            _ = interrupts.next() => wish.interrupted(),
            answer = answers.next() => wish.answered(&answer),
        };
    }
}

fn left(id: MigrationId) -> Failure {
    Failure::interrupted("left; the migration goes on")
        .hint(format!("`whimbrel migration watch {id}` follows it"))
        .with_facts(open_end("running", id))
}

async fn cancel(pool: &PoolClient, id: MigrationId, voice: &Voice) {
    match pool.cancel_migration(id).await {
        Ok(_) => voice.say("cancelling; Ctrl-C again leaves the migration running"),
        Err(error) if error.code == ErrorCode::HandedOver => {
            voice.say(
                "the guest has been handed over and can no longer be called back; waiting for the end",
            );
        }
        Err(error) => Failure::from(error).lines().iter().for_each(|line| voice.say(line)),
    }
}

/// Shows every change until the end. A lost watch is opened again until the controller has been away for too long.
pub(crate) async fn watch(
    pool: &PoolClient,
    mut record: Migration,
    progress: &mut Progress,
) -> Result<Migration, Failure> {
    let id = record.id;
    let mut last_heard = Instant::now();
    let mut told_at = None;
    progress.show(&record)?;
    while record.state == MigrationState::Running {
        match watch_once(pool, &mut record, progress, &mut last_heard).await? {
            Ok(()) => {}
            Err(error) if error.is_unknown() => {
                // Once for each time that it goes away.
                if told_at != Some(last_heard) {
                    progress.say("the controller does not answer; asking again");
                    told_at = Some(last_heard);
                }
                if last_heard.elapsed() > Duration::from_secs(LOST_SECONDS_MAX) {
                    let hint = format!(
                        "the migration goes on without its controller; `whimbrel migration watch {id}` follows it"
                    );
                    let lost = Failure { exit: Exit::Unknown, ..Failure::from(error) };
                    return Err(lost.hint(hint).with_facts(open_end("unknown", id)));
                }
            }
            Err(error) => return Err(error.into()),
        }
        if record.state == MigrationState::Running {
            sleep(Duration::from_millis(REOPEN_PAUSE_MS)).await;
        }
    }
    progress.end();
    Ok(record)
}

/// One watch, until the end of the migration or of the watch. What cannot be shown is the outer error.
async fn watch_once(
    pool: &PoolClient,
    record: &mut Migration,
    progress: &mut Progress,
    last_heard: &mut Instant,
) -> Result<Result<(), ApiError>, Failure> {
    let mut events = match pool.watch_migration(record.id).await {
        Ok(events) => events,
        Err(error) => return Ok(Err(error)),
    };
    loop {
        let next = timeout(Duration::from_secs(QUIET_SECONDS_MAX), events.next()).await;
        match next {
            Ok(Ok(Some(news))) => {
                *last_heard = Instant::now();
                *record = news;
                progress.show(record)?;
                if record.state != MigrationState::Running {
                    return Ok(Ok(()));
                }
            }
            Ok(Err(error)) => return Ok(Err(error)),
            // The server has closed it, or nothing has come for long: look whether anybody is there.
            Ok(Ok(None)) | Err(_) => return Ok(Ok(())),
        }
    }
}

/// The last line of `migrate --json`.
#[derive(Debug, Serialize)]
pub(crate) struct End<'a> {
    outcome: &'static str,
    migration: MigrationId,
    vm: &'a Name,
    source: &'a Name,
    destination: &'a Name,
    /// Where the VM is now; unresolved: where it is asked for.
    host: &'a Name,
    phase: Phase,
    total_ms: Option<u64>,
    downtime_ms: Option<f64>,
    downtime: Option<Downtime>,
    bytes: Option<u64>,
    rate_bits_per_s: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    forecast: Option<&'a Forecast>,
    #[serde(skip_serializing_if = "Option::is_none")]
    strategy: Option<&'a Strategy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    postcopy: Option<&'a PostcopyReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<&'a Stay>,
    leftovers: &'a [String],
}

impl<'a> End<'a> {
    /// What there is to say of a record.
    pub(crate) fn of(record: &'a Migration) -> Self {
        let why = match &record.state {
            MigrationState::Stayed { why } => Some(why),
            _ => None,
        };
        let host = match &record.state {
            MigrationState::Moved => &record.destination,
            MigrationState::Unresolved { ask } => ask,
            _ => &record.source,
        };
        Self {
            outcome: outcome_word(&record.state),
            migration: record.id,
            vm: &record.vm_name,
            source: &record.source,
            destination: &record.destination,
            host,
            phase: record.phase,
            total_ms: record.total_ms,
            downtime_ms: record.downtime.map(|downtime| words::ms_of_us(downtime.total_us)),
            downtime: record.downtime,
            bytes: record.progress.as_ref().map(|progress| progress.transferred_bytes),
            rate_bits_per_s: record.progress.as_ref().map(|progress| progress.bits_per_s),
            forecast: record.forecast.as_ref(),
            strategy: record.strategy.as_ref(),
            postcopy: record.postcopy.as_ref(),
            why,
            leftovers: &record.leftovers,
        }
    }
}

/// Says how a migration ended, and turns the end into the command's.
pub(crate) fn conclude(json: bool, record: &Migration, interrupted: bool) -> Result<(), Failure> {
    let end = judge(record, interrupted);
    if json {
        return match end {
            Ok(()) => output::json(&End::of(record)),
            // The error's object is the last line then, and has the end in it.
            Err(failure) => Err(failure.with_facts(serde_json::json!(End::of(record)))),
        };
    }
    if end.is_ok() {
        output::line(&outcome_sentence(record))?;
    }
    for (name, value) in figures(record) {
        output::line(&format!("  {name:<9} {value}"))?;
    }
    end
}

/// What `--json` says where the end is not known.
pub(crate) fn open_end(outcome: &str, migration: MigrationId) -> serde_json::Value {
    serde_json::json!({"outcome": outcome, "migration": migration})
}

/// The command's end that a migration's end means.
fn judge(record: &Migration, interrupted: bool) -> Result<(), Failure> {
    let sentence = outcome_sentence(record);
    let failure = match &record.state {
        MigrationState::Moved => return Ok(()),
        MigrationState::Running => Failure::own(OwnCode::Unknown, sentence),
        MigrationState::Stayed { why: Stay::Cancelled } if interrupted => Failure::interrupted(sentence),
        MigrationState::Stayed { why } => Failure::stayed(stay_code(why), sentence),
        MigrationState::Refused => Failure {
            verdicts: record.verdicts.clone(),
            ..Failure::refused(ErrorCode::PreflightRefused, sentence)
        },
        MigrationState::Unresolved { ask } => Failure::own(OwnCode::Unresolved, sentence).hint(format!(
            "it settles by itself once {ask} answers; `whimbrel migration watch {}` waits for it",
            record.id
        )),
    };
    Err(failure)
}

fn stay_code(why: &Stay) -> &str {
    match why {
        Stay::Cancelled => "cancelled",
        Stay::Failed { code, .. } => code,
        Stay::DestinationRefused { .. } => "destination-refused",
        Stay::GuestPoweredOff => "guest-powered-off",
        Stay::Reclaimed { .. } => "reclaimed",
    }
}

/// The outcome's word, as in JSON.
pub(crate) fn outcome_word(state: &MigrationState) -> &'static str {
    match state {
        MigrationState::Running => "running",
        MigrationState::Moved => "moved",
        MigrationState::Stayed { .. } => "stayed",
        MigrationState::Refused => "refused",
        MigrationState::Unresolved { .. } => "unresolved",
    }
}

/// How it ended and where the VM is.
pub(crate) fn outcome_sentence(record: &Migration) -> String {
    let Migration { vm_name: vm, source, destination, .. } = record;
    match &record.state {
        MigrationState::Running => format!("{vm} is on its way from {source} to {destination}"),
        MigrationState::Moved => format!("{vm} has moved from {source} to {destination}"),
        MigrationState::Refused => format!("{vm} cannot move to {destination}; nothing was begun"),
        // Who does not answer is the source itself: what it has given away nobody else knows.
        MigrationState::Unresolved { ask } if ask == source => {
            format!(
                "{source} does not answer, so whether {vm} runs there, stands still or is on {destination} is not known; it is asked on"
            )
        }
        MigrationState::Unresolved { ask } => {
            format!(
                "{vm} was given to {destination}, which has not confirmed: it stands still until {ask} answers"
            )
        }
        MigrationState::Stayed { why } => match why {
            Stay::Cancelled => {
                format!("{vm} runs on {source} as before: the migration was cancelled")
            }
            Stay::Failed { phase, message, .. } => {
                format!("{vm} is on {source} as before: {phase} failed: {message}")
            }
            Stay::DestinationRefused { message } => {
                format!("{vm} runs on {source} again: {destination} refused it: {message}")
            }
            Stay::GuestPoweredOff => {
                format!("{vm} is stopped on {source}: the guest powered itself off")
            }
            Stay::Reclaimed { statement } => {
                let stated = match statement {
                    Statement::HostIsFenced => "is fenced",
                    Statement::AcceptDataLoss => "is lost, whatever it did last",
                };
                format!(
                    "{vm} was taken back to {source}, where it has crashed: somebody stated that {destination} {stated}; `whimbrel vm start {vm}` starts it from its disks"
                )
            }
        },
    }
}
