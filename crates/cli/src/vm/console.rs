//! `whimbrel vm console`: the guest's serial console in this terminal.
//!
//! With a terminal, it is put into raw mode until the end, so that Ctrl-C reaches the guest; with pipes, bytes pass as they
//! are. A console that ends because the VM has moved is opened again where the VM is now.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use clap::Args;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::AsyncReadExt as _;
use whimbrel_api::client::{Console, PoolClient};
use whimbrel_api::vm::VmState;

use crate::command::Options;
use crate::failure::Failure;
use crate::{output, values};

/// Ctrl-].
const LEAVE: u8 = 0x1d;
/// Bytes read from standard input at once.
const INPUT_BYTES: usize = 4096;
/// How often a console is opened again without a byte having come, before it has ended for good.
const REOPEN_TRIES_MAX: u32 = 20;
/// Pause before each of these tries, in milliseconds.
const REOPEN_PAUSE_MS: u64 = 250;

/// Use a VM's serial console; Ctrl-] leaves it
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  whimbrel vm console web01
  whimbrel vm console web01 < /dev/null          follows what the guest writes
  printf 'uptime\\n' | timeout 5 whimbrel vm console web01

The console stays open when the VM is moved to another host.")]
pub(crate) struct ConsoleOf {
    /// Its name or id
    #[arg(value_parser = values::vm)]
    vm: String,
}

impl ConsoleOf {
    pub(super) async fn run(self, options: &Options) -> Result<(), Failure> {
        let pool = options.pool()?;
        let mut console = pool.console(&self.vm).await?;
        let terminal = std::io::stdin().is_terminal();
        if terminal {
            output::note(&format!("console of {}; Ctrl-] leaves", self.vm));
        }
        let _raw = terminal.then(RawTerminal::enter).transpose()?;
        let mut input = Input { stdin: tokio::io::stdin(), open: true };
        while talk(&mut console, &mut input).await? == Ended::ByTheOtherSide {
            match reopen(&pool, &self.vm).await {
                Some(opened) => console = opened,
                None => break,
            }
        }
        Ok(())
    }
}

struct Input {
    stdin: tokio::io::Stdin,
    open: bool,
}

#[derive(PartialEq)]
enum Ended {
    ByUs,
    ByTheOtherSide,
}

/// Carries bytes both ways until one side ends. The end of standard input alone ends nothing: the output goes on.
async fn talk(console: &mut Console, input: &mut Input) -> Result<Ended, Failure> {
    let mut buffer = [0; INPUT_BYTES];
    loop {
        tokio::select! {
            bytes = console.read() => match bytes {
                Some(bytes) => {
                    if !show(&bytes)? {
                        return Ok(Ended::ByUs);
                    }
                }
                None => return Ok(Ended::ByTheOtherSide),
            },
            read = input.stdin.read(&mut buffer), if input.open => {
                let typed = match read {
                    Ok(count) => &buffer[..count],
                    Err(error) => return Err(Failure::because("cannot read standard input", &error)),
                };
                input.open = !typed.is_empty();
                let upto = typed.iter().position(|byte| *byte == LEAVE);
                let sent = console.write(&typed[..upto.unwrap_or(typed.len())]).await;
                if upto.is_some() {
                    return Ok(Ended::ByUs);
                }
                if !sent {
                    return Ok(Ended::ByTheOtherSide);
                }
            }
        }
    }
}

/// Writes the guest's bytes as they are; `false` when nobody reads them any more.
fn show(bytes: &[u8]) -> Result<bool, Failure> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::because("cannot write to standard output", &error)),
    }
}

/// The console again, if the VM still runs somewhere.
async fn reopen(pool: &PoolClient, vm: &str) -> Option<Console> {
    for _ in 0..REOPEN_TRIES_MAX {
        tokio::time::sleep(Duration::from_millis(REOPEN_PAUSE_MS)).await;
        // Not knowing how the VM is, or that it is on its way, is a reason to look again.
        let ended = pool
            .vm(vm)
            .await
            .is_ok_and(|vm| matches!(vm.state, VmState::Stopped | VmState::Crashed { .. }));
        if ended {
            return None;
        }
        if let Ok(console) = pool.console(vm).await {
            return Some(console);
        }
    }
    None
}

/// Raw mode of the terminal on standard input, until dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> Result<Self, Failure> {
        let failed =
            |error: rustix::io::Errno| Failure::because("cannot set the terminal up", &error);
        let before = tcgetattr(std::io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone; then there is nothing to restore.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}
