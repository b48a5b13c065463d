//! Runs one command, at most for a time: past it, or when somebody wants to stop, it is cancelled, and waited for.

use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::stage::now_us;
use crate::stop::Stop;

/// How often the wish to stop is looked for.
const POLL: Duration = Duration::from_millis(50);
/// How long a cancelled command may take to undo what it began.
const CANCEL_MAX: Duration = Duration::from_secs(30);

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Ran {
    /// When it was started, in microseconds since 1970.
    pub(crate) spawned_us: u64,
    /// When it had ended.
    pub(crate) ended_us: u64,
    /// Whether it was cancelled because its time was over.
    pub(crate) late: bool,
    pub(crate) output: Output,
}

impl Ran {
    /// What it said, wherever it said it.
    pub(crate) fn words(&self) -> String {
        let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
        let (errors, output) = (text(&self.output.stderr), text(&self.output.stdout));
        if errors.is_empty() { output } else { errors }
    }
}

/// Cancels a command as Ctrl-C would.
pub(crate) fn interrupt(pid: Pid) -> Result<()> {
    kill(pid, Signal::SIGINT).context("cannot interrupt a command")
}

/// Starts a command with `spawn` and waits for its end; `cancel` has to bring it about. An error if somebody wants to stop,
/// or if it cannot be ended.
pub(crate) fn run(
    command: &mut Command,
    spawn: impl FnOnce(&mut Command) -> Result<Child>,
    within: Duration,
    stop: &Stop,
    cancel: impl FnOnce(Pid) -> Result<()>,
) -> Result<Ran> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let spawned_us = now_us();
    let child = spawn(command)?;
    let pid = Pid::from_raw(i32::try_from(child.id()).context("the kernel gave a strange id")?);
    let (tell, told) = mpsc::channel();
    // It ends with the command, and nobody waits for it when the command does not end.
    thread::spawn(move || {
        let output = child.wait_with_output();
        let _nobody_waits = tell.send((output, now_us()));
    });
    let mut until = Instant::now() + within;
    let mut cancel = Some(cancel);
    loop {
        match told.recv_timeout(POLL) {
            Ok((output, ended_us)) => {
                stop.check()?;
                let output = output.context("cannot wait for a command's end")?;
                let late = cancel.is_none();
                return Ok(Ran { spawned_us, ended_us, late, output });
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the thread of a command has ended"),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if Instant::now() < until && (cancel.is_none() || stop.check().is_ok()) {
            continue;
        }
        let Some(cancel) = cancel.take() else {
            // It may have ended just now; then nobody is hit, for its thread has not reaped it.
            let _ended = kill(pid, Signal::SIGKILL);
            bail!("a command did not end {CANCEL_MAX:?} after it was cancelled");
        };
        until = Instant::now() + CANCEL_MAX;
        cancel(pid)?;
    }
}
