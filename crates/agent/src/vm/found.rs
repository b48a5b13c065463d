//! Finds a QEMU again that an earlier life of the agent had spawned.
//!
//! The process is known by pid, start time and boot, so it is never confused with another. A process that lives and does
//! not answer over QMP is neither alive nor gone: it is asked again, and nothing is done to it.

use std::time::Duration;

use whimbrel_qemu::machine::Machine;
use whimbrel_qemu::process::{AdoptError, Process, ProcessIdentity};

use super::running::{RunDir, Spawned};
use crate::host::Host;
use crate::ledger::RunRecord;

/// How long one try waits for an answer, in seconds.
const ANSWER_SECONDS: u64 = 5;
/// Pause between two tries, in milliseconds.
const AGAIN_MILLISECONDS: u64 = 500;

/// What became of a QEMU.
#[derive(Debug)]
pub enum Found {
    /// It lives and answers. What its guest does is to be asked.
    Alive(Box<Spawned>),
    /// It has certainly ended.
    Gone {
        /// What is known of its end.
        why: String,
    },
}

/// A process that lives and does not answer.
#[derive(Debug)]
pub struct Silent {
    /// What it does instead.
    pub why: String,
}

/// Finds a QEMU again; waits for as long as it lives and does not answer. Cancellation safe.
pub async fn find_again(host: &Host, record: &RunRecord) -> Found {
    loop {
        match try_to_find(host, record).await {
            Ok(found) => return found,
            Err(Silent { why }) => {
                tracing::warn!(run = record.name, why, "QEMU lives and does not answer");
                tokio::time::sleep(Duration::from_millis(AGAIN_MILLISECONDS)).await;
            }
        }
    }
}

/// Opens a new session with a QEMU whose old one has ended, though it lives; waits for as long as it does not answer. One
/// that is gone stays as it was: whoever has it hears of its end. Cancellation safe.
pub(crate) async fn hear_again(host: &Host, qemu: &mut Spawned) {
    if qemu.machine.qmp().ended().is_none() {
        return;
    }
    tracing::warn!(run = qemu.run, "the session with QEMU has ended; opening another");
    if let Found::Alive(found) = find_again(host, &qemu.record()).await {
        qemu.machine = found.machine;
    }
}

/// Whether a process of this boot has ended. Asked before anything of a run is taken down: a watcher that has itself
/// ended (with its runtime, when the agent ends) tells an end that was none.
pub(crate) fn has_ended(process: &ProcessIdentity) -> bool {
    match std::fs::read_to_string(format!("/proc/{}/stat", process.pid)) {
        Ok(stat) => stat_tells_end(&stat, process.start_time_ticks),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

/// `/proc/PID/stat`: after the name in brackets come the state (field 3) and, as field 22, the start time.
fn stat_tells_end(stat: &str, start_time_ticks: u64) -> bool {
    let after_name = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let mut fields = after_name.split_ascii_whitespace();
    // A zombie waits for its parent only; its memory, files and taps are gone.
    let dead = matches!(fields.next(), Some("Z" | "X"));
    let started = fields.nth(18).and_then(|ticks| ticks.parse::<u64>().ok());
    dead || started.is_some_and(|ticks| ticks != start_time_ticks)
}

/// Tries once to find a QEMU again.
///
/// # Errors
/// [`Silent`] where it is there and cannot be spoken to.
pub async fn try_to_find(host: &Host, record: &RunRecord) -> Result<Found, Silent> {
    let dir = RunDir::new(&host.config.run_dir(), &record.name);
    let process = match Process::adopt(&record.process, &dir.qemu_log()) {
        Ok(process) => process,
        Err(AdoptError::Gone { .. }) => {
            return Ok(Found::Gone {
                why: "QEMU ended while the agent was not looking".to_owned(),
            });
        }
        Err(error) => return Err(Silent { why: whimbrel_api::error::chain(&error) }),
    };
    let (socket, vm) = (dir.qmp_socket(), *record.definition.id.as_uuid());
    let deadline = Duration::from_secs(ANSWER_SECONDS);
    let session = Machine::connect_to(&socket, &record.process, vm, deadline);
    let machine = tokio::select! {
        session = session => session,
        exit = process.wait_exit() => {
            return if has_ended(&record.process) {
                Ok(Found::Gone { why: super::running::describe_end(&process, exit) })
            } else {
                Err(Silent { why: "its end was told, and it lives".to_owned() })
            };
        }
    };
    match machine {
        Ok(machine) => Ok(Found::Alive(Box::new(Spawned {
            definition: record.definition.clone(),
            run: record.name.clone(),
            dir,
            migration: record.migration,
            machine,
            process,
            engine: record.engine.clone(),
            taps: record.taps.clone(),
            _hold: host.in_hand.hold(&record.name),
        }))),
        Err(error) => Err(Silent { why: whimbrel_api::error::chain(&error) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_by_state_or_start_time() {
        let stat = |state: &str, ticks: u64| {
            format!("7 (a) b) {state} 1 7 7 0 -1 4 0 0 0 0 0 0 0 0 20 0 1 0 {ticks} 0 0")
        };
        assert!(!stat_tells_end(&stat("S", 42), 42));
        assert!(stat_tells_end(&stat("Z", 42), 42));
        assert!(stat_tells_end(&stat("S", 43), 42));
        assert!(!stat_tells_end("what is this", 42));
    }

    #[test]
    fn this_process_has_not_ended() {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let ticks = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().nth(19).unwrap();
        let mut own = ProcessIdentity {
            pid: std::process::id(),
            start_time_ticks: ticks.parse().unwrap(),
            boot_id: String::new(),
        };
        assert!(!has_ended(&own));
        own.start_time_ticks += 1;
        assert!(has_ended(&own));
    }
}
