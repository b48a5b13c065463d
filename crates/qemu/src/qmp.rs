//! One session with the monitor (QMP) of one QEMU, over its unix socket.
//!
//! ```text
//!   execute ──▶ queue ──▶ writer task ──▶ ┌──────┐
//!      ▲                                  │ QEMU │
//!      └── pending[id] ◀── reader task ◀──└──────┘
//!                              └──▶ broadcast of events
//! ```
//!
//! The layer is thin on purpose: it carries JSON and knows no command. Its rules:
//!
//! - Every command has an id; an answer without a waiting command (its caller gave up) is dropped.
//! - One task writes, so that a caller who goes away never leaves half a line behind. Once a
//!   command is queued QEMU gets it, whether or not the caller still waits.
//! - Out-of-band commands are switched on at the handshake. QEMU (7.2, 10.0) stops *reading* once
//!   8 in-band commands wait, which would block out-of-band ones too; so at most
//!   [`IN_BAND_IN_FLIGHT_MAX`] are under way, counting those whose callers have given up.
//! - A descriptor travels with the line of the command that takes it, one such command at a time:
//!   QEMU keeps only the descriptors of the newest message.
//! - The end of the session, whatever the reason, answers every waiting command with
//!   [`QmpError::Disconnected`].
//!
//! It does not reconnect, retry or interpret: a timed-out command may still be carried out, and
//! only the caller knows whom to ask.

mod error;
mod session;
mod wire;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::time::Instant;

pub use self::error::{ConnectError, QmpError, RefusalClass, SessionEnd};
use self::session::Session;
use self::wire::Priority;
use crate::event::Events;

/// The longest line that QEMU may send, in bytes. The longest that it does send is the answer to
/// `query-qmp-schema` (10.0: below 300 KiB).
pub const LINE_BYTES_MAX: usize = 8 * 1024 * 1024;

/// In-band commands that may be under way at once; QEMU stops reading at 8.
pub const IN_BAND_IN_FLIGHT_MAX: usize = 7;

/// Events kept for a slow reader before it is told that it lags.
pub const EVENTS_KEPT_MAX: usize = 256;

/// How long an ordinary command may take.
pub const COMMAND_TIMEOUT_SECONDS: u64 = 10;

/// Commands that may wait for the guest's disks, with the seconds they get. They flush or open
/// images, which storage may delay far beyond what an ordinary command takes.
pub const SLOW_COMMAND_TIMEOUT_SECONDS: &[(&str, u64)] = &[
    ("cont", 30),
    ("stop", 30),
    ("migrate-continue", 30),
    ("blockdev-add", 30),
    ("blockdev-del", 30),
    ("blockdev-mirror", 30),
    ("job-complete", 30),
    ("nbd-server-stop", 30),
    ("transaction", 30),
    ("snapshot-save", 30),
    ("quit", 5),
];

/// Pause between two attempts to reach a socket that is not there yet.
const CONNECT_RETRY_MILLISECONDS: u64 = 2;

/// A session with one QEMU. Clones share it; it ends with the last of them.
#[derive(Debug, Clone)]
pub struct Qmp {
    session: Arc<Session>,
    greeting: Arc<Greeting>,
}

/// What QEMU says of itself at the start of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// The version as (major, minor, micro), zeros where QEMU told none.
    pub version: (u32, u32, u32),
    /// The packager's word on the version, often empty.
    pub package: String,
    /// Whether out-of-band commands can be sent.
    pub out_of_band: bool,
    /// The process that listens on the socket, as the kernel tells it.
    pub peer_pid: Option<u32>,
}

impl Qmp {
    /// Connects to the socket of a QEMU that may still be starting, and does the handshake.
    ///
    /// QEMU serves one client at a time: while another is connected, there is no greeting, and
    /// this ends at the deadline.
    ///
    /// # Errors
    ///
    /// [`ConnectError`], naming the step that did not come about within `deadline`.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Self, ConnectError> {
        let until = Instant::now() + deadline;
        let stream = reach(path, deadline, until).await?;
        let greeted = tokio::time::timeout_at(until, Self::over(stream)).await;
        greeted.unwrap_or_else(|_| {
            Err(ConnectError::NoGreeting { path: path.to_owned(), after: deadline })
        })
    }

    /// Does the handshake over a stream that is already connected.
    ///
    /// # Errors
    ///
    /// [`ConnectError::Greeting`] and [`ConnectError::Handshake`].
    pub async fn over(stream: UnixStream) -> Result<Self, ConnectError> {
        let peer_pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
        let (session, greeting) = Session::open(stream).await.map_err(ConnectError::Greeting)?;
        let greeting =
            Greeting { peer_pid: peer_pid.and_then(|pid| u32::try_from(pid).ok()), ..greeting };
        let enable: &[&str] = if greeting.out_of_band { &["oob"] } else { &[] };
        let qmp = Self { session: Arc::new(session), greeting: Arc::new(greeting) };
        qmp.execute("qmp_capabilities", json!({ "enable": enable }))
            .await
            .map_err(ConnectError::Handshake)?;
        Ok(qmp)
    }

    /// What QEMU said of itself.
    #[must_use]
    pub fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// Sends a command and waits for its answer. `Value::Null` stands for no arguments.
    ///
    /// Dropping the future gives up the answer, not the command.
    ///
    /// # Errors
    ///
    /// [`QmpError`]; after `TimedOut` and `Disconnected` the command may have been carried out.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.session.run(command, arguments, Priority::InBand, None, timeout_of(command)).await
    }

    /// As [`Qmp::execute`], ahead of the queue of ordinary commands; for `migrate-pause` and
    /// `migrate-recover`, which QEMU takes while another command hangs.
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`]; refused by QEMU for commands that know no out-of-band form.
    pub async fn execute_oob(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.session.run(command, arguments, Priority::OutOfBand, None, timeout_of(command)).await
    }

    /// As [`Qmp::execute`], handing over a descriptor (`getfd`, `add-fd`).
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`].
    pub async fn execute_with_descriptor(
        &self,
        command: &str,
        arguments: Value,
        descriptor: OwnedFd,
    ) -> Result<Value, QmpError> {
        self.session
            .run(command, arguments, Priority::InBand, Some(descriptor), timeout_of(command))
            .await
    }

    /// A reader of the events from now on.
    #[must_use]
    pub fn events(&self) -> Events {
        self.session.events()
    }

    /// Why the session is over, or `None` while it stands.
    #[must_use]
    pub fn ended(&self) -> Option<SessionEnd> {
        self.session.ended()
    }

    /// Waits for the end of the session.
    pub async fn wait_ended(&self) -> SessionEnd {
        self.session.wait_ended().await
    }
}

fn timeout_of(command: &str) -> Duration {
    let slow = SLOW_COMMAND_TIMEOUT_SECONDS.iter().find(|(name, _)| *name == command);
    Duration::from_secs(slow.map_or(COMMAND_TIMEOUT_SECONDS, |(_, seconds)| *seconds))
}

/// Connects, trying again while the socket is not there or nobody listens on it yet.
async fn reach(
    path: &Path,
    deadline: Duration,
    until: Instant,
) -> Result<UnixStream, ConnectError> {
    loop {
        let error = match UnixStream::connect(path).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let may_come = matches!(
            error.kind(),
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
        );
        let path = || PathBuf::from(path);
        if !may_come {
            return Err(ConnectError::Socket { path: path(), source: error });
        }
        if Instant::now() >= until {
            return Err(ConnectError::NobodyListens {
                path: path(),
                after: deadline,
                source: error,
            });
        }
        tokio::time::sleep(Duration::from_millis(CONNECT_RETRY_MILLISECONDS)).await;
    }
}

#[cfg(test)]
mod tests;
