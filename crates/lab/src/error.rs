//! Why a lab could not be set up, changed or taken down; one variant for each thing that can fail.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

/// What went wrong with a lab.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LabError {
    /// Namespaces need root.
    #[error("a lab needs root: run it with sudo")]
    NotRoot,
    /// An option has no sense.
    #[error("{what}")]
    BadConfig {
        /// What, as a sentence.
        what: String,
    },
    /// Two lab commands on one folder.
    #[error("another lab command is at work in {}", dir.display())]
    Busy {
        /// The lab's folder.
        dir: PathBuf,
    },
    /// The lab runs already.
    #[error("the lab in {} is up already; `whimbrel lab down` takes it down", dir.display())]
    AlreadyUp {
        /// The lab's folder.
        dir: PathBuf,
    },
    /// There is no lab.
    #[error("there is no lab in {}; `whimbrel lab up` makes one", dir.display())]
    NotUp {
        /// The lab's folder.
        dir: PathBuf,
    },
    /// The folder has something in it that a lab would overwrite.
    #[error("{} is in the way, and was not made by a lab: choose another --dir", path.display())]
    InTheWay {
        /// The file or folder.
        path: PathBuf,
    },
    /// QEMU runs unprivileged, and must reach the lab's folder.
    #[error("{} cannot be entered by other users, and QEMU runs as one: choose another --dir", path.display())]
    NotTraversable {
        /// The folder that is closed.
        path: PathBuf,
    },
    /// The lab has no host of this name.
    #[error("the lab has no host `{name}`; it has {known}")]
    UnknownHost {
        /// The name that was asked for.
        name: String,
        /// The names that there are.
        known: String,
    },
    /// The witness was not built.
    #[error("the test guest's program is missing; `scripts/guest` builds it")]
    NoWitness,
    /// Something of the cache is not there.
    #[error("{} is missing; `scripts/setup` fetches it", path.display())]
    NotSetUp {
        /// What is missing.
        path: PathBuf,
    },
    /// A file or folder of the lab could not be made, read or removed.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The lab's own record is not readable.
    #[error("{} is damaged", path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// How.
        source: serde_json::Error,
    },
    /// A namespace could not be made or entered.
    #[error("cannot {action} the network namespace {name}")]
    Namespace {
        /// What was tried, as a verb.
        action: &'static str,
        /// The host or other end.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// A program could not be started.
    #[error("cannot run {program}")]
    Spawn {
        /// The program.
        program: String,
        /// Why not.
        source: io::Error,
    },
    /// A program failed.
    #[error("`{command}` failed: {output}")]
    Tool {
        /// The command line.
        command: String,
        /// What it said last.
        output: String,
    },
    /// The agent or controller ended by itself.
    #[error("the {name} ended; the end of {} says:\n{tail}", log.display())]
    Died {
        /// Which one.
        name: String,
        /// Its log.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {} s", within.as_secs())]
    TooSlow {
        /// What was waited for.
        what: String,
        /// How long.
        within: Duration,
    },
    /// Processes that even SIGKILL did not end.
    #[error("processes {pids:?} do not end")]
    Undying {
        /// Their ids.
        pids: Vec<i32>,
    },
    /// [`crate::Cancel`] was used.
    #[error("interrupted")]
    Interrupted,
    /// The witness does not answer.
    #[error("the guest at {address} cannot be reached")]
    Guest {
        /// Its address.
        address: std::net::Ipv4Addr,
        /// Why not.
        source: io::Error,
    },
    /// The witness refused a command.
    #[error("the guest refuses: {why}")]
    GuestRefused {
        /// Its words.
        why: String,
    },
}

impl LabError {
    pub(crate) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }

    pub(crate) fn namespace(action: &'static str, name: &str) -> impl FnOnce(io::Error) -> Self {
        let name = name.to_owned();
        move |source| Self::Namespace { action, name, source }
    }
}
