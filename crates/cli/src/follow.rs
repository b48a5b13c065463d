//! A migration followed to its end: the watch, opened again when it is lost; Ctrl-C; and the words about the end.

use std::time::Duration;

use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep, timeout};
use whimbrel_api::client::PoolClient;
use whimbrel_api::migration::{Migration, MigrationState, Stay};
use whimbrel_api::vm::Bytes;
use whimbrel_api::{ApiError, Downtime, ErrorCode, MigrationId, Name, Phase};

use crate::failure::{Exit, Failure};
use crate::progress::Progress;
use crate::{output, words};

/// A watch that brings nothing for this long counts as lost, in seconds.
const QUIET_SECONDS_MAX: u64 = 10;
/// How long the controller may be away before the command gives up, in seconds. The migration does not need it.
const LOST_SECONDS_MAX: u64 = 60;
/// Pause before a lost watch is opened again, in milliseconds.
const REOPEN_PAUSE_MS: u64 = 500;

/// Ctrl-C, counted.
pub(crate) struct Interrupts {
    signal: Signal,
    /// What else means "end", for who has something to take down.
    ends: Option<(Signal, Signal)>,
    presses: u32,
}

impl Interrupts {
    /// From now on Ctrl-C is counted and does not end the process.
    pub(crate) fn catch() -> Result<Self, Failure> {
        Ok(Self { signal: caught(SignalKind::interrupt())?, ends: None, presses: 0 })
    }

    /// The same, and a request to terminate or a closed terminal count as Ctrl-C.
    pub(crate) fn catch_all() -> Result<Self, Failure> {
        let ends = (caught(SignalKind::terminate())?, caught(SignalKind::hangup())?);
        Ok(Self { ends: Some(ends), ..Self::catch()? })
    }

    /// Waits for the next one; says which it is.
    pub(crate) async fn next(&mut self) -> u32 {
        match &mut self.ends {
            None => self.signal.recv().await,
            Some((terminate, hangup)) => tokio::select! {
                got = self.signal.recv() => got,
                got = terminate.recv() => got,
                got = hangup.recv() => got,
            },
        };
        self.presses += 1;
        self.presses
    }

    /// Whether there has been one.
    pub(crate) fn any(&self) -> bool {
        self.presses > 0
    }
}

fn caught(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| Failure::because("cannot catch Ctrl-C", &error))
}

/// Follows a migration from `record` on. The first Ctrl-C cancels it, the second one leaves it running.
pub(crate) async fn to_the_end(
    pool: &PoolClient,
    record: Migration,
    progress: &mut Progress,
    interrupts: &mut Interrupts,
) -> Result<Migration, Failure> {
    let id = record.id;
    let mut cancelled = interrupts.any();
    if cancelled {
        cancel(pool, id).await;
    }
    let watching = watch(pool, record, progress);
    tokio::pin!(watching);
    loop {
        tokio::select! {
            end = &mut watching => return end,
            _ = interrupts.next() => {
                if cancelled {
                    return Err(Failure::interrupted("left; the migration goes on")
                        .hint(format!("`whimbrel migration watch {id}` follows it"))
                        .with_facts(open_end("running", id)));
                }
                cancelled = true;
                tokio::select! {
                    () = cancel(pool, id) => {}
                    // Its end may come before the cancel's answer.
                    end = &mut watching => return end,
                }
            }
        }
    }
}

async fn cancel(pool: &PoolClient, id: MigrationId) {
    match pool.cancel_migration(id).await {
        Ok(_) => output::note("cancelling; Ctrl-C again leaves the migration running"),
        Err(error) if error.code == ErrorCode::HandedOver => {
            output::note(
                "the guest has been handed over and can no longer be called back; waiting for the end",
            );
        }
        Err(error) => Failure::from(error).lines().iter().for_each(|line| output::note(line)),
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
                    return Err(Failure::from(error)
                        .hint(hint)
                        .with_facts(open_end("unknown", id)));
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
        MigrationState::Running => Failure::unknown("unknown", sentence),
        MigrationState::Stayed { why: Stay::Cancelled } if interrupted => Failure::interrupted(sentence),
        MigrationState::Stayed { why } => {
            Failure { code: stay_code(why).to_owned(), ..Failure::failed(sentence) }
        }
        MigrationState::Refused => Failure {
            exit: Exit::Refused,
            code: ErrorCode::PreflightRefused.as_str().to_owned(),
            verdicts: record.verdicts.clone(),
            ..Failure::failed(sentence)
        },
        MigrationState::Unresolved { ask } => Failure::unknown("unresolved", sentence).hint(format!(
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
        },
    }
}

/// The figures of a migration, as far as there are any.
pub(crate) fn figures(record: &Migration) -> Vec<(&'static str, String)> {
    let mut figures = Vec::new();
    if let Some(total_ms) = record.total_ms {
        figures.push(("total", words::duration(total_ms as f64)));
    }
    if let Some(downtime) = &record.downtime {
        figures.push(("downtime", downtime_text(downtime)));
    }
    if let Some(progress) = &record.progress {
        let passes = if progress.passes == 1 { "pass" } else { "passes" };
        let sent = format!(
            "{} in {} {passes}, at {}",
            Bytes(progress.transferred_bytes),
            progress.passes,
            words::bit_rate(progress.bits_per_s)
        );
        figures.push(("sent", sent));
    }
    figures.extend(record.leftovers.iter().map(|leftover| ("left over", leftover.clone())));
    figures
}

fn downtime_text(downtime: &Downtime) -> String {
    let parts = [
        ("last pass", downtime.stop_to_completed_us),
        ("loaded", downtime.loaded_confirm_us),
        ("release", downtime.release_us),
        ("go", downtime.go_us),
        ("rest", downtime.unnamed_us()),
    ];
    let named: Vec<String> = parts
        .iter()
        .filter(|(name, us)| *us > 0 || *name != "rest")
        .map(|(name, us)| format!("{name} {:.1}", words::ms_of_us(*us)))
        .collect();
    format!("{} ({})", words::duration(words::ms_of_us(downtime.total_us)), named.join(" + "))
}
