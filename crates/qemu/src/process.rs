//! The QEMU process: started, found again after a restart of the agent, ended.
//!
//! A QEMU outlives whoever started it: it is in its own process group (Ctrl-C in the agent's
//! terminal does not reach it), it is not tied to its parent's life, and dropping a [`Process`]
//! leaves it alone. What remains is a [`ProcessIdentity`], small enough for a ledger, by which
//! [`Process::adopt`] finds it again, or knows that it is gone: a process id alone could by then
//! belong to something else.
//!
//! Ends are seen through a pidfd, which works for processes that are not our children.

mod sockets;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, WaitId, WaitIdOptions, pidfd_open,
    pidfd_send_signal, prlimit, waitid,
};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

/// How much of the end of a log is read for its last lines.
const LOG_TAIL_BYTES_MAX: u64 = 16 * 1024;

/// How many last lines of a log are kept.
const LOG_TAIL_LINES_MAX: usize = 20;

/// Where a script around QEMU finds its tools.
pub(crate) const SEARCH_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Where the kernel tells which boot this is.
const BOOT_ID_FILE: &str = "/proc/sys/kernel/random/boot_id";

/// The field of `/proc/PID/stat` with the start time, counted after the command's name.
const STAT_START_TIME_FIELD: usize = 19;

/// What to start.
#[derive(Debug)]
pub struct Launch {
    /// The program, or a script that ends in `exec` of it. Its environment is `PATH` alone.
    pub binary: PathBuf,
    /// Its arguments, from [`crate::command_line::arguments`].
    pub arguments: Vec<OsString>,
    /// The unprivileged user to run as; `None` keeps ours.
    pub user: Option<UnprivilegedUser>,
    /// Descriptors that QEMU gets, each under the number that the arguments name.
    pub inherited: Vec<Inherited>,
    /// Where standard output and error go (appended; made with mode 0600).
    pub log: PathBuf,
}

/// The numeric user and group that a QEMU runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnprivilegedUser {
    /// User id.
    pub uid: u32,
    /// Group id; supplementary groups are dropped.
    pub gid: u32,
}

/// One descriptor for QEMU.
#[derive(Debug)]
pub struct Inherited {
    /// Ours; closed here once QEMU has it.
    pub descriptor: OwnedFd,
    /// The number that it has in QEMU, 3 or more.
    pub number: i32,
}

/// What names one process for good on one machine: the kernel gives a pid again, but not with the
/// same start time in the same boot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub start_time_ticks: u64,
    /// The boot in which it was started (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this status.
    Code(i32),
    /// By a signal.
    Signal(i32),
    /// It is gone; only its parent could have learned how, and that was not this process.
    Unseen,
}

/// A QEMU process, child of ours or not. Clones speak of the same process; dropping does nothing
/// to it.
#[derive(Debug, Clone)]
pub struct Process {
    identity: ProcessIdentity,
    log: PathBuf,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
}

/// Why no process was started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The log can not be opened.
    #[error("can not open the log {}", path.display())]
    Log {
        /// The log.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Two descriptors under one number.
    #[error("two descriptors for QEMU have the same number")]
    DescriptorNumbers,
    /// The program can not be run.
    #[error("can not run {}", binary.display())]
    Run {
        /// The program.
        binary: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// It runs (or ran), but can not be watched. It has been told to end.
    #[error("can not watch the new process {pid}")]
    Watch {
        /// Its id.
        pid: u32,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// Why a process can not be adopted.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// It has ended (the pid is free, or belongs to another process now).
    #[error("process {pid} has ended")]
    Gone {
        /// Its id.
        pid: u32,
    },
    /// It can not be told whether it lives.
    #[error("can not watch process {pid}")]
    Watch {
        /// Its id.
        pid: u32,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// Why a process did not end.
#[derive(Debug, thiserror::Error)]
pub enum EndError {
    /// The signal could not be sent.
    #[error("can not signal process {pid}")]
    Signal {
        /// Its id.
        pid: u32,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// It got the signal and is still there.
    #[error("process {pid} is still there {} ms after SIGKILL", after.as_millis())]
    StillThere {
        /// Its id.
        pid: u32,
        /// How long was waited.
        after: Duration,
    },
}

impl ProcessIdentity {
    /// The identity of whatever runs under a process id now.
    ///
    /// # Errors
    ///
    /// `NotFound` when nothing does.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let malformed = || io::Error::other(format!("/proc/{pid}/stat has no start time"));
        let start_time_ticks = start_time_ticks(&stat).ok_or_else(malformed)?;
        Ok(Self { pid, start_time_ticks, boot_id: boot_id()? })
    }
}

impl Process {
    /// Starts a process. Must be called within a tokio runtime, whose tasks watch for (and reap)
    /// the end.
    ///
    /// # Errors
    ///
    /// [`SpawnError`]; no process is left then.
    pub fn spawn(launch: Launch) -> Result<Self, SpawnError> {
        let log_error = |source| SpawnError::Log { path: launch.log.clone(), source };
        let output = open_log(&launch.log).map_err(log_error)?;
        let errors = output.try_clone().map_err(log_error)?;

        let mut command = Command::new(&launch.binary);
        command.args(&launch.arguments).process_group(0);
        command.env_clear().env("PATH", SEARCH_PATH);
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        if let Some(user) = launch.user {
            // With a uid, the standard library drops the supplementary groups as well.
            command.uid(user.uid).gid(user.gid);
        }
        let mapping = |inherited: Inherited| FdMapping {
            parent_fd: inherited.descriptor,
            child_fd: inherited.number,
        };
        command
            .fd_mappings(launch.inherited.into_iter().map(mapping).collect())
            .map_err(|_| SpawnError::DescriptorNumbers)?;
        let child = command
            .spawn()
            .map_err(|source| SpawnError::Run { binary: launch.binary.clone(), source })?;

        // Until it is reaped the pid stays its own, so what follows speaks of this child.
        let pid = child.id();
        Self::watch_child(pid, launch.log).map_err(|source| {
            let mut child = child;
            let _ = child.kill();
            let _ = child.wait();
            SpawnError::Watch { pid, source }
        })
    }

    fn watch_child(pid: u32, log: PathBuf) -> io::Result<Self> {
        let pidfd = open_pidfd(pid)?;
        let identity = ProcessIdentity::of(pid)?;
        Self::watch(identity, log, pidfd)
    }

    /// Finds a process again.
    ///
    /// # Errors
    ///
    /// [`AdoptError::Gone`] when it certainly has ended.
    pub fn adopt(identity: &ProcessIdentity, log: &Path) -> Result<Self, AdoptError> {
        let pid = identity.pid;
        let watch_error = |source| AdoptError::Watch { pid, source };
        if boot_id().map_err(watch_error)? != identity.boot_id {
            return Err(AdoptError::Gone { pid });
        }
        let gone = |error: &io::Error| {
            let code = error.raw_os_error().map(rustix::io::Errno::from_raw_os_error);
            code == Some(rustix::io::Errno::SRCH) || error.kind() == io::ErrorKind::NotFound
        };
        // The descriptor first: after it, a matching start time speaks of the same process.
        let looked = open_pidfd(pid).and_then(|pidfd| Ok((pidfd, ProcessIdentity::of(pid)?)));
        match looked {
            Ok((pidfd, found)) if found == *identity => {
                Self::watch(found, log.to_owned(), pidfd).map_err(watch_error)
            }
            Ok(_) => Err(AdoptError::Gone { pid }),
            Err(error) if gone(&error) => Err(AdoptError::Gone { pid }),
            Err(error) => Err(watch_error(error)),
        }
    }

    fn watch(identity: ProcessIdentity, log: PathBuf, pidfd: OwnedFd) -> io::Result<Self> {
        // The replacement is unsafe for types that could close or swap their descriptor while it
        // is watched; an `OwnedFd` in a task of its own can not.
        #[allow(deprecated)]
        let readable = AsyncFd::with_interest(pidfd.try_clone()?, Interest::READABLE)?;
        let (told, exit) = watch::channel(None);
        tokio::spawn(async move {
            // An error would mean that the pidfd can not be polled, which its opening excludes.
            if readable.readable().await.is_ok() {
                told.send_replace(Some(reap(readable.get_ref())));
            }
        });
        Ok(Self { identity, log, pidfd: Arc::new(pidfd), exit })
    }

    /// What finds it again.
    #[must_use]
    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// How it ended, or `None` while it lives (or its end has not been noticed yet).
    #[must_use]
    pub fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end. Cancellation safe.
    pub async fn wait_exit(&self) -> Exit {
        let mut exit = self.exit.clone();
        let told = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        match told {
            Some(exit) => exit,
            // The watcher has ended with its runtime, not the process: no end may be told.
            None => std::future::pending().await,
        }
    }

    /// Asks it to end (SIGTERM): QEMU then ends as if told `quit`.
    ///
    /// # Errors
    ///
    /// [`EndError::Signal`]; a process that is gone already is no error.
    pub fn terminate(&self) -> Result<(), EndError> {
        self.signal(Signal::TERM)
    }

    /// Ends it at once (SIGKILL).
    ///
    /// # Errors
    ///
    /// As [`Process::terminate`].
    pub fn kill(&self) -> Result<(), EndError> {
        self.signal(Signal::KILL)
    }

    /// Ends it at once and waits until it is gone.
    ///
    /// # Errors
    ///
    /// [`EndError`]; `StillThere` happens when the process hangs in the kernel (dead storage).
    pub async fn kill_and_wait(&self, within: Duration) -> Result<Exit, EndError> {
        self.kill()?;
        tokio::time::timeout(within, self.wait_exit())
            .await
            .map_err(|_| EndError::StillThere { pid: self.identity.pid, after: within })
    }

    /// Lets it lock that much memory, as sending without a copy needs (the kernel counts what is
    /// on its way as locked). Needs the right to raise limits.
    ///
    /// # Errors
    ///
    /// Where the kernel does not allow it.
    pub fn allow_locked_memory(&self, bytes: u64) -> io::Result<()> {
        let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
        Ok(prlimit(process_id(self.identity.pid)?.into(), Resource::Memlock, limit).map(drop)?)
    }

    fn signal(&self, signal: Signal) -> Result<(), EndError> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(EndError::Signal { pid: self.identity.pid, source: error.into() }),
        }
    }

    /// The last lines that it wrote, oldest first, for error messages; empty where the log can
    /// not be read.
    #[must_use]
    pub fn last_words(&self) -> Vec<String> {
        log_tail(&self.log).unwrap_or_default()
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

fn process_id(pid: u32) -> io::Result<Pid> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    raw.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    // Non-blocking, as `waitid` would otherwise wait for a process that is not readable yet.
    Ok(pidfd_open(process_id(pid)?, PidfdFlags::NONBLOCK)?)
}

fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string(BOOT_ID_FILE)?.trim().to_owned())
}

/// The start time in `/proc/PID/stat`. The name in brackets may contain anything, brackets too.
fn start_time_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(STAT_START_TIME_FIELD)?.parse().ok()
}

/// Takes the exit status of an ended child; for any other process there is none to take.
fn reap(pidfd: &OwnedFd) -> Exit {
    use std::os::fd::AsFd;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    match waitid(WaitId::PidFd(pidfd.as_fd()), options) {
        Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, Some(signal)) => Exit::Signal(signal),
            (None, None) => Exit::Unseen,
        },
        Ok(None) | Err(_) => Exit::Unseen,
    }
}

fn log_tail(path: &Path) -> io::Result<Vec<String>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES_MAX)))?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL_BYTES_MAX).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let mut lines: Vec<String> =
        text.lines().rev().take(LOG_TAIL_LINES_MAX).map(str::to_owned).collect();
    lines.reverse();
    Ok(lines)
}

#[cfg(test)]
mod tests;
