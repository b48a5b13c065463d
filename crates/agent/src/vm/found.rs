//! Finds a QEMU again that an earlier life of the agent had spawned.
//!
//! The process is known by pid, start time and boot, so it is never confused with another. A process that lives and does
//! not answer over QMP is neither alive nor gone: it is asked again, and nothing is done to it.

use std::time::Duration;

use whimbrel_qemu::machine::Machine;
use whimbrel_qemu::process::{AdoptError, Process};

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
            return Ok(Found::Gone { why: super::running::describe_end(&process, exit) });
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
        }))),
        Err(error) => Err(Silent { why: whimbrel_api::error::chain(&error) }),
    }
}
