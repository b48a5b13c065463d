//! `whimbrel lab`: several hosts on this machine, to try everything on. The lab itself is `whimbrel-lab`'s.
//!
//! The lab's library blocks, so it runs beside on its own thread, while this one listens for Ctrl-C.

use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus};
use std::time::Duration;

use clap::{Args, Subcommand};
use whimbrel_api::{ApiError, ErrorCode};
use whimbrel_lab::report::{Command as WitnessCommand, Damage, Report};
use whimbrel_lab::{
    Cancel, DIR_DEFAULT, HOSTS_DEFAULT, HOSTS_MAX, Lab as LabHandle, LabConfig, LabError,
    ProbeReport, Rate, Status, guest_address,
};

use crate::command::Options;
use crate::failure::{Failure, OwnCode};
use crate::follow::Interrupts;
use crate::{output, values};

/// Run several hosts on this machine, to try everything on
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Each host is a network namespace with its own agent and real QEMU guests. The lab needs root, touches nothing outside \
its folder and its namespaces, and is the pool that `whimbrel` speaks to while no other one is configured.

Examples:
  whimbrel lab up
  whimbrel vm create -f /var/tmp/whimbrel-lab/web01.toml
  whimbrel vm start web01
  whimbrel migrate web01 host-b
  whimbrel lab down")]
pub(crate) enum Lab {
    Up(Up),
    /// Take a lab down, also one that was killed half-way
    #[command(after_help = "Examples:\n  whimbrel lab down\n  whimbrel lab down --dir /srv/lab")]
    Down(Folder),
    /// Show a lab: its hosts, their agents and QEMUs
    #[command(
        after_help = "Examples:\n  whimbrel lab status\n  whimbrel lab status --json | jq .hosts"
    )]
    Status(Folder),
    Start(Start),
    Exec(Exec),
    Probe(Probe),
    Witness(Witness),
}

/// Start a host's agent, or the controller, again after it was killed
#[derive(Debug, Args)]
#[command(after_help = "\
Killing them is part of the fun: QEMUs live on, and a migration ends as it would have.

Examples:
  kill -9 $(whimbrel lab status --json | jq '.hosts[0].agent_pid')
  whimbrel lab start host-a
  whimbrel lab start controller")]
pub(crate) struct Start {
    #[command(flatten)]
    folder: Folder,
    /// The host, or `controller`
    place: String,
}

#[derive(Debug, Args)]
pub(crate) struct Folder {
    /// The lab's folder
    #[arg(long, value_name = "FOLDER", default_value = DIR_DEFAULT, global = true)]
    dir: PathBuf,
}

/// Set a lab up: hosts, a controller, a network, a shared storage, and a test guest ready to be made
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  whimbrel lab up
  whimbrel lab up --hosts 2 --link 1gbit
  whimbrel lab up --engine 7.2 --engine 10.0      hosts of both versions, in turn")]
pub(crate) struct Up {
    #[command(flatten)]
    folder: Folder,
    /// How many hosts
    #[arg(long, value_name = "N", default_value_t = HOSTS_DEFAULT,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(HOSTS_MAX)))]
    hosts: u8,
    /// The rate of each host's link, such as 1gbit; as fast as the machine without it
    #[arg(long, value_name = "RATE")]
    link: Option<Rate>,
    /// A QEMU: a version that `make setup` unpacked, or a path; several are dealt out in turn
    #[arg(long, value_name = "QEMU")]
    engine: Vec<String>,
}

/// Run a command in the network of a host, of `controller` or of `client`
#[derive(Debug, Args)]
#[command(after_help = "\
The exit code is the command's.

Examples:
  whimbrel lab exec host-a -- ip address
  whimbrel lab exec client -- ping -c 3 198.19.0.101")]
pub(crate) struct Exec {
    #[command(flatten)]
    folder: Folder,
    /// Where
    place: String,
    /// The command
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Watch a test guest over the network for a while: gaps, lost packets, a TCP stream
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  whimbrel lab probe --seconds 10
  whimbrel lab probe --guest 1 --json | jq .longest_gap_ms")]
pub(crate) struct Probe {
    #[command(flatten)]
    guest: Guest,
    /// How long
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
}

/// Ask the witness in a test guest, or let it work
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  whimbrel lab witness verify
  whimbrel lab witness dirty 100           writes 100 MB of memory a second
  whimbrel lab witness corrupt page        damages what it watches: it must say so
  whimbrel lab witness status --json | jq .healthy")]
pub(crate) struct Witness {
    #[command(flatten)]
    guest: Guest,
    #[command(subcommand)]
    order: Order,
}

#[derive(Debug, Args)]
pub(crate) struct Guest {
    #[command(flatten)]
    folder: Folder,
    /// The guest's number: that of the address 198.19.0.(101 + N)
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(..100), global = true)]
    guest: u8,
}

#[derive(Debug, Clone, Copy, Subcommand)]
#[command(disable_help_subcommand = true)]
pub(crate) enum Order {
    /// Say how things stand
    #[command(after_help = "Examples:\n  whimbrel lab witness status")]
    Status,
    /// Verify all memory and the whole journal on the disk
    #[command(after_help = "Examples:\n  whimbrel lab witness verify")]
    Verify,
    /// Write memory at a rate
    #[command(after_help = "Examples:\n  whimbrel lab witness dirty 100")]
    Dirty {
        /// MB (10^6 bytes) a second; 0 stops
        mb_per_s: u32,
    },
    /// Write to the journal on the disk at a rate
    #[command(after_help = "Examples:\n  whimbrel lab witness journal 50")]
    Journal {
        /// Records of 4 KiB a second; 0 stops
        records_per_s: u32,
    },
    /// Damage what the witness watches
    #[command(after_help = "Examples:\n  whimbrel lab witness corrupt block")]
    Corrupt {
        /// page, block or clock
        #[arg(value_parser = damage)]
        what: Damage,
    },
}

fn damage(text: &str) -> Result<Damage, values::BadValue> {
    match text {
        "page" => Ok(Damage::Page),
        "block" => Ok(Damage::Block),
        "clock" => Ok(Damage::Clock),
        _ => Err(values::BadValue::bad("what can be damaged is page, block or clock")),
    }
}

impl Lab {
    pub(crate) async fn run(self, options: &Options) -> Result<ExitCode, Failure> {
        match self {
            Self::Up(command) => command.run(options).await?,
            Self::Down(Folder { dir }) => down(options, dir).await?,
            Self::Status(Folder { dir }) => {
                show(options, &blocking(move || Status::of(&dir)).await?)?;
            }
            Self::Start(Start { folder: Folder { dir }, place }) => {
                start(options, dir, place).await?
            }
            Self::Exec(command) => return command.run().await,
            Self::Probe(command) => command.run(options).await?,
            Self::Witness(command) => command.run(options).await?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

async fn start(options: &Options, dir: PathBuf, place: String) -> Result<(), Failure> {
    let started = blocking(move || {
        whimbrel_lab::Lab::open(&dir)?.start_daemon(&place)?;
        Status::of(&dir)
    });
    show(options, &started.await?)
}

impl Up {
    async fn run(self, options: &Options) -> Result<(), Failure> {
        let mut config = config(self.folder.dir)?;
        config.hosts = self.hosts;
        config.link = self.link;
        if !self.engine.is_empty() {
            config.engines = self.engine.iter().map(|engine| config.engine(engine)).collect();
        }
        let mut interrupts = Interrupts::catch_all()?;
        let lab = up(config, &mut interrupts, output::note).await?;
        let dir = lab.dir().to_owned();
        let status = blocking(move || Status::of(&dir)).await?;
        show(options, &status)?;
        if !options.json {
            invite(&lab);
        }
        Ok(())
    }
}

/// The usual lab in a folder, made of this very binary.
pub(crate) fn config(dir: PathBuf) -> Result<LabConfig, Failure> {
    let binary = std::env::current_exe()
        .map_err(|error| Failure::because("cannot tell where this program is", &error))?;
    Ok(LabConfig::new(&dir, &binary))
}

/// Sets a lab up. On an error, Ctrl-C included, nothing of it is left.
pub(crate) async fn up(
    config: LabConfig,
    interrupts: &mut Interrupts,
    on_step: impl Fn(&str) + Send + 'static,
) -> Result<LabHandle, Failure> {
    let cancel = Cancel::default();
    let theirs = cancel.clone();
    let working = blocking(move || LabHandle::up(&config, &theirs, &mut |step| on_step(step)));
    tokio::pin!(working);
    loop {
        tokio::select! {
            // Once a wish to stop was heard, whatever error follows from it is that wish.
            made = &mut working => return made.map_err(|error| match interrupts.any() {
                true => interrupted(),
                false => error,
            }),
            _ = interrupts.next() => cancel.cancel(),
        }
    }
}

pub(crate) fn interrupted() -> Failure {
    Failure::interrupted("interrupted; everything is taken down")
}

/// What to try next.
fn invite(lab: &LabHandle) {
    let mut lines = vec![String::new(), "try:".to_owned()];
    if lab.dir() != std::path::Path::new(DIR_DEFAULT) {
        lines.push(format!("  export WHIMBREL_CLIENT={}", lab.client_config().display()));
    }
    lines.push(format!("  whimbrel vm create -f {}", lab.vm_file().display()));
    lines.push("  whimbrel vm start web01".to_owned());
    lines.push("  whimbrel migrate web01 host-b".to_owned());
    lines.iter().for_each(|line| output::note(line));
}

async fn down(options: &Options, dir: PathBuf) -> Result<(), Failure> {
    // Caught, and not heeded: a lab that is half taken down helps nobody.
    let _interrupts = Interrupts::catch_all()?;
    let folder = dir.clone();
    let was_up = blocking(move || LabHandle::down(&folder)).await?;
    match (options.json, was_up) {
        (true, _) => {
            output::json(&serde_json::json!({"state": "down", "dir": dir, "was_up": was_up}))
        }
        (false, true) => output::line(&format!("the lab in {} is taken down", dir.display())),
        (false, false) => output::line(&format!("there was no lab in {}", dir.display())),
    }
}

fn show(options: &Options, status: &Status) -> Result<(), Failure> {
    if options.json {
        return output::json(status);
    }
    status.to_string().lines().try_for_each(output::line)
}

impl Exec {
    async fn run(self) -> Result<ExitCode, Failure> {
        // The terminal sends Ctrl-C to the command as well: it is the command's to answer.
        let _interrupts = Interrupts::catch_all()?;
        let Self { folder: Folder { dir }, place, command } = self;
        let mut words = command.into_iter();
        let program = words.next().unwrap_or_default();
        let mut command = Command::new(&program);
        command.args(words);
        let status = blocking(move || {
            let mut child = LabHandle::open(&dir)?.spawn(&place, &mut command)?;
            child.wait().map_err(|source| LabError::Spawn { program, source })
        });
        Ok(exit_code(status.await?))
    }
}

/// The code that a shell would report.
fn exit_code(status: ExitStatus) -> ExitCode {
    use std::os::unix::process::ExitStatusExt as _;
    const KILLED_BY_SIGNAL: i32 = 128;
    let code = status.code().or_else(|| status.signal().map(|signal| KILLED_BY_SIGNAL + signal));
    code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}

impl Probe {
    async fn run(self, options: &Options) -> Result<(), Failure> {
        let Self { guest: Guest { folder: Folder { dir }, guest }, seconds } = self;
        let mut interrupts = Interrupts::catch()?;
        let probe = blocking(move || LabHandle::open(&dir)?.probe(guest_address(guest))).await?;
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(seconds)) => {}
            _ = interrupts.next() => {}
        }
        let report = blocking(move || Ok(probe.finish())).await?;
        match options.json {
            true => output::json(&report),
            false => output::line(&probe_words(&report)),
        }
    }
}

/// What the network saw, in a line.
pub(crate) fn probe_words(report: &ProbeReport) -> String {
    let stream = match (&report.stream_error, report.stream_unbroken) {
        (_, true) => "TCP stream unbroken".to_owned(),
        (Some(error), false) => format!("TCP stream broken: {error}"),
        (None, false) => "TCP stream broken".to_owned(),
    };
    format!(
        "longest gap {:.1} ms, {} of {} packets lost, {stream}",
        report.longest_gap_ms, report.lost, report.sent
    )
}

impl Witness {
    async fn run(self, options: &Options) -> Result<(), Failure> {
        let Self { guest: Guest { folder: Folder { dir }, guest }, order } = self;
        let command = match order {
            Order::Status => WitnessCommand::Status,
            Order::Verify => WitnessCommand::Verify,
            Order::Dirty { mb_per_s } => WitnessCommand::Dirty { mb_per_s },
            Order::Journal { records_per_s } => WitnessCommand::Journal { records_per_s },
            Order::Corrupt { what } => WitnessCommand::Corrupt { what },
        };
        let report = blocking(move || {
            LabHandle::open(&dir)?.witness(guest_address(guest))?.command(command)
        });
        let report = report.await?;
        if options.json {
            return output::json(&report);
        }
        output::line(&witness_words(&report))?;
        report.errors.iter().try_for_each(|error| output::line(error))
    }
}

/// What the witness verified, in a line.
pub(crate) fn witness_words(report: &Report) -> String {
    let memory = format!("{} pages of memory", report.memory.verified_pages);
    let disk = report.disk.as_ref();
    let disk = disk.map(|disk| format!(", {} records on disk", disk.verified_records));
    let verdict = match report.mismatches() {
        0 => "no mismatch".to_owned(),
        count => format!("{count} MISMATCHES"),
    };
    format!("{memory}{} and the clocks verified: {verdict}", disk.unwrap_or_default())
}

/// Runs what blocks on a thread of its own, and puts its error into our words.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LabError> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Failure::from),
        Err(error) => Err(Failure::because("a thread of the lab ended", &error)),
    }
}

impl From<LabError> for Failure {
    fn from(error: LabError) -> Self {
        let message = whimbrel_api::error::chain(&error);
        let refused = |code| Self::refused(code, message.clone());
        match error {
            LabError::NotRoot => Self::own(OwnCode::NotRoot, message),
            LabError::BadConfig { .. } => Self::usage(ErrorCode::BadRequest, message),
            LabError::Busy { .. } => refused(ErrorCode::Busy),
            LabError::AlreadyUp { .. } | LabError::InTheWay { .. } => refused(ErrorCode::Exists),
            LabError::NotUp { .. } | LabError::UnknownHost { .. } => refused(ErrorCode::NotFound),
            LabError::NotTraversable { .. } => refused(ErrorCode::BadPath),
            LabError::NoWitness | LabError::NotSetUp { .. } => {
                Self::own(OwnCode::NotSetUp, message)
            }
            LabError::Guest { .. } => Self::from(ApiError::new(ErrorCode::Unreachable, message)),
            LabError::GuestRefused { .. } => refused(ErrorCode::WrongState),
            LabError::Interrupted => Self::interrupted(message),
            _ => Self::failed(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Exit;

    #[test]
    fn exit_codes_are_a_shells() {
        let run = |script: &str| {
            let status = Command::new("sh").args(["-c", script]).status().unwrap();
            format!("{:?}", exit_code(status))
        };
        assert_eq!(run("exit 7"), format!("{:?}", ExitCode::from(7)));
        assert_eq!(run("kill -9 $$"), format!("{:?}", ExitCode::from(137)));
    }

    #[test]
    fn what_the_lab_says_has_a_code() {
        let failure = Failure::from(LabError::NotUp { dir: "/lab".into() });
        assert_eq!((failure.exit, failure.code.as_str()), (Exit::Refused, "not-found"));
        assert_eq!(Failure::from(LabError::Interrupted).exit, Exit::Interrupted);
    }
}
