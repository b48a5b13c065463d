//! What can go wrong in a session with QEMU. A refusal by QEMU, a lost session and a missing
//! answer are kept apart, because only the first tells that nothing was done.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Why a command has no result.
#[derive(Debug, Clone, thiserror::Error)]
pub enum QmpError {
    /// QEMU answered with an error: the command was not carried out.
    #[error("QEMU refused `{command}`: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class.
        class: RefusalClass,
        /// QEMU's text, for people; it changes between versions.
        description: String,
    },
    /// The session ended first: whether the command was carried out is unknown.
    #[error("the session with QEMU ended before `{command}` was answered")]
    Disconnected {
        /// The command.
        command: String,
        /// What ended the session.
        #[source]
        end: SessionEnd,
    },
    /// No answer in time: whether the command was (or will be) carried out is unknown.
    #[error("QEMU did not answer `{command}` within {} s", after.as_secs())]
    TimedOut {
        /// The command.
        command: String,
        /// How long was waited.
        after: Duration,
    },
    /// QEMU answered something that the command's reader can not use.
    #[error("QEMU's answer to `{command}` can not be used: {problem}")]
    Malformed {
        /// The command.
        command: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl QmpError {
    /// Whether QEMU said no, so that the command certainly had no effect.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether the session is gone, which for a QEMU of ours means that the process has ended or
    /// is ending.
    #[must_use]
    pub fn is_disconnected(&self) -> bool {
        matches!(self, Self::Disconnected { .. })
    }

    pub(crate) fn malformed(command: &str, problem: impl Into<String>) -> Self {
        Self::Malformed { command: command.to_owned(), problem: problem.into() }
    }
}

/// QEMU's error classes; all but the first few have been folded into `GenericError`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RefusalClass {
    /// Anything without a class of its own.
    GenericError,
    /// No such command (or not in this build).
    CommandNotFound,
    /// No such device, node or job.
    DeviceNotFound,
    /// The device is not in use.
    DeviceNotActive,
    /// A class that we do not know.
    Unknown(String),
}

impl RefusalClass {
    pub(crate) fn from_wire(word: &str) -> Self {
        match word {
            "GenericError" => Self::GenericError,
            "CommandNotFound" => Self::CommandNotFound,
            "DeviceNotFound" => Self::DeviceNotFound,
            "DeviceNotActive" => Self::DeviceNotActive,
            other => Self::Unknown(other.to_owned()),
        }
    }
}

/// Why a session is over.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SessionEnd {
    /// QEMU closed it, usually because the process ended.
    #[error("QEMU closed the connection")]
    ClosedByQemu,
    /// Reading failed.
    #[error("reading from QEMU failed")]
    Read(#[source] Arc<io::Error>),
    /// Writing failed.
    #[error("writing to QEMU failed")]
    Write(#[source] Arc<io::Error>),
    /// A line beyond the bound.
    #[error("QEMU sent a line of more than {limit_bytes} bytes")]
    LineTooLong {
        /// The bound.
        limit_bytes: usize,
    },
    /// A line that is no JSON object, or is nested too deeply.
    #[error("QEMU sent a line that is not usable JSON: {problem}")]
    NotJson {
        /// What the parser says.
        problem: String,
    },
    /// The first line is not a QMP greeting.
    #[error("the other side does not greet like QEMU")]
    NoGreeting,
    /// Our side let go of it.
    #[error("the session was given up by our side")]
    GivenUp,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The socket can not be used at all.
    #[error("can not connect to QEMU's socket {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Nobody listened in time.
    #[error("no QEMU listens on {} after {} ms", path.display(), after.as_millis())]
    NobodyListens {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        after: Duration,
        /// The last attempt's error.
        #[source]
        source: io::Error,
    },
    /// Connected, but the handshake was not done in time: QEMU hangs, or serves another client.
    #[error(
        "QEMU did not greet on {} within {} ms (it hangs, or serves another client)",
        path.display(),
        after.as_millis()
    )]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        after: Duration,
    },
    /// The session ended before the greeting.
    #[error("QEMU did not greet")]
    Greeting(#[source] SessionEnd),
    /// QEMU did not take the capabilities negotiation.
    #[error("the handshake with QEMU failed")]
    Handshake(#[source] QmpError),
}
