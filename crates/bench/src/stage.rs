//! The lab that is measured on, and the guests on it: made, moved and verified through the public command line.

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use whimbrel_api::Phase;
use whimbrel_api::migration::{Migration, MigrationState};
use whimbrel_api::vm::Vm;
use whimbrel_lab::report::Report;
use whimbrel_lab::{Lab, PREFIX, guest_address, vm_definition};

use crate::stop::Stop;
use crate::{bounded, say};

/// How long a guest may take, from its start until its memory is filled.
const BOOT_MAX: Duration = Duration::from_secs(180);
const BOOT_POLL: Duration = Duration::from_millis(100);
/// How long a migration may take that nobody expects to be slow.
const MIGRATE_MAX: Duration = Duration::from_secs(300);

/// A QEMU, what its guests are pinned to, and the two hosts that have it.
#[derive(Debug)]
pub(crate) struct Engine {
    /// Its version in the cache of `scripts/setup`.
    pub(crate) version: &'static str,
    /// The newest machine type that it has.
    pub(crate) machine: &'static str,
    pub(crate) hosts: [&'static str; 2],
}

/// What a guest is like.
#[derive(Debug)]
pub(crate) struct Shape {
    pub(crate) name: String,
    /// Sets its address apart from other guests'.
    pub(crate) number: u8,
    pub(crate) memory_mib: u32,
    /// How much of it the witness fills.
    pub(crate) filled_mib: u32,
    /// More words for the witness.
    pub(crate) words: &'static str,
}

impl Shape {
    /// What the guest's kernel is told. The witness verifies when it is asked to, and not besides.
    pub(crate) fn kernel_words(&self) -> String {
        let Self { number, filled_mib, words, .. } = self;
        let (address, seed) = (guest_address(*number), u32::from(*number) + 1);
        let witness = format!(
            "witness.ip={address}/{PREFIX} witness.seed={seed} witness.memory={filled_mib}"
        );
        format!("console=ttyS0 quiet {witness} witness.verify=0 {words}").trim_end().to_owned()
    }
}

/// A lab, taken down when it is dropped.
#[derive(Debug)]
pub(crate) struct Stage {
    lab: Lab,
    stop: Stop,
}

/// A guest on the lab.
#[derive(Debug)]
pub(crate) struct Guest<'a> {
    stage: &'a Stage,
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
}

/// A migration that went well.
#[derive(Debug)]
pub(crate) struct Moved {
    /// When the command was started, in microseconds since 1970.
    pub(crate) spawned_us: u64,
    /// When it had ended.
    pub(crate) ended_us: u64,
    /// What the controller wrote down.
    pub(crate) record: Migration,
}

impl Moved {
    /// When QEMU began to copy memory, in microseconds since 1970: the end of its setup.
    pub(crate) fn copying_us(&self) -> Result<u64> {
        let record = &self.record;
        let downtime = record.downtime.context("the record tells no downtime")?;
        let progress = record.progress.as_ref().context("the record has no figures of QEMU")?;
        let began = |wanted| record.phases.iter().find(|start| start.phase == wanted);
        if began(Phase::Postcopy).is_some() {
            // QEMU's total time then goes on long after the pause, and cannot be reckoned back from it.
            let precopy = began(Phase::Precopy).context("the record tells no pre-copy")?;
            return u64::try_from(precopy.at.as_microsecond()).context("it began before 1970");
        }
        let stopped = downtime.stopped_at_us.context("QEMU's STOP event was missed")?;
        let setup_us = progress.engine_setup_ms.unwrap_or(0) * 1_000;
        let completed = stopped + downtime.stop_to_completed_us;
        Ok((completed + setup_us).saturating_sub(progress.engine_total_ms * 1_000))
    }

    /// When all of the guest's memory was on the destination, in microseconds since 1970; after a post-copy that is later
    /// than the guest.
    pub(crate) fn all_there_us(&self) -> Result<u64> {
        let downtime = self.record.downtime.context("the record tells no downtime")?;
        let progress =
            self.record.progress.as_ref().context("the record has no figures of QEMU")?;
        let resumed = downtime.resumed_at_us.context("QEMU's RESUME event was missed")?;
        let setup_ms = progress.engine_setup_ms.unwrap_or(0);
        let copied_ms = progress.engine_total_ms.saturating_sub(setup_ms);
        Ok(resumed.max(self.copying_us()? + copied_ms * 1_000))
    }
}

impl Stage {
    pub(crate) fn new(lab: Lab, stop: Stop) -> Self {
        Self { lab, stop }
    }

    pub(crate) fn lab(&self) -> &Lab {
        &self.lab
    }

    pub(crate) fn stop(&self) -> &Stop {
        &self.stop
    }

    /// Returns when the witness at an address answers and has filled its guest's memory.
    pub(crate) fn wait_filled(&self, address: Ipv4Addr) -> Result<()> {
        let began = Instant::now();
        loop {
            let status = self.lab.witness(address).and_then(|mut witness| witness.status());
            if status.is_ok_and(|report| report.memory.filled_pages == report.memory.pages) {
                return Ok(());
            }
            ensure!(began.elapsed() < BOOT_MAX, "{address} is not ready after {BOOT_MAX:?}");
            self.pause(BOOT_POLL)?;
        }
    }

    /// Lets a guest's witness verify all memory, the whole journal and the clocks.
    pub(crate) fn verify(&self, address: Ipv4Addr) -> Result<Report> {
        let report = self.lab.witness(address)?.verify()?;
        if report.healthy && report.mismatches() == 0 {
            return Ok(report);
        }
        let errors = report.errors.join("; ");
        bail!("the guest found {} mismatches after a move; {errors}", report.mismatches())
    }

    /// Waits, unless somebody wants to stop.
    pub(crate) fn pause(&self, duration: Duration) -> Result<()> {
        let until = Instant::now() + duration;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            self.stop.check()?;
            thread::sleep(left.min(BOOT_POLL));
        }
        self.stop.check()
    }

    /// Runs `whimbrel` as the pool's operator, and returns what it prints.
    pub(crate) fn whimbrel(&self, args: &[&str]) -> Result<String> {
        Ok(self.lab.whimbrel(args)?)
    }

    /// The bridge of the VMs' network, the same on every host.
    pub(crate) fn bridge(&self) -> Result<String> {
        let text = self.whimbrel(&["network", "list", "--json"])?;
        let of =
            |line| serde_json::from_str::<Value>(line).ok()?["bridge"].as_str().map(str::to_owned);
        text.lines().find_map(of).context("the lab has no network")
    }

    /// Defines a guest on a host and starts it; [`Guest::wait_filled`] says when it is ready.
    pub(crate) fn start(&self, shape: &Shape, engine: &Engine, host: &str) -> Result<Guest<'_>> {
        say(&format!("starting {} on {host}, QEMU {}", shape.name, engine.version));
        let mut definition = vm_definition(&shape.name, shape.number, shape.filled_mib);
        let usual_words = definition.lines().find(|line| line.starts_with("cmdline = "));
        let usual_words = usual_words.context("the lab's usual guest has no cmdline")?.to_owned();
        for (usual, ours) in [
            ("vcpus = 1", format!("vcpus = 1\nmachine = \"{}\"", engine.machine)),
            ("\"1GiB\"", format!("\"{}MiB\"", shape.memory_mib)),
            (&usual_words, format!("cmdline = \"{}\"", shape.kernel_words())),
        ] {
            ensure!(definition.contains(usual), "the lab's usual guest has no {usual}");
            definition = definition.replace(usual, &ours);
        }
        let file = self.lab.shared().join(format!("{}.toml", shape.name));
        fs::write(&file, definition).context("cannot write a guest's definition")?;
        self.whimbrel(&["vm", "create", "-f", &file.to_string_lossy(), "--host", host])?;
        self.whimbrel(&["vm", "start", &shape.name])?;
        let address = guest_address(shape.number);
        Ok(Guest { stage: self, name: shape.name.clone(), address })
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Err(error) = Lab::down(self.lab.dir()) {
            let dir = self.lab.dir().display();
            say(&format!("the lab in {dir} could not be taken down: {error}"));
        }
    }
}

impl Guest<'_> {
    /// Returns when the guest answers and has filled its memory.
    pub(crate) fn wait_filled(&self) -> Result<()> {
        self.stage.wait_filled(self.address)
    }

    /// What the pool says of it.
    pub(crate) fn vm(&self) -> Result<Vm> {
        let text = self.stage.whimbrel(&["vm", "show", &self.name, "--json"])?;
        serde_json::from_str(&text).context("cannot read what `vm show` says")
    }

    /// Moves it, as a user would.
    pub(crate) fn migrate(&self, to: &str) -> Result<Moved> {
        let moved = self.migrate_within(to, &[], MIGRATE_MAX)?;
        moved.with_context(|| format!("{} did not move to {to} within {MIGRATE_MAX:?}", self.name))
    }

    /// Moves it with more words for `whimbrel migrate`, at most for a time; none if it is still where it was then.
    pub(crate) fn migrate_within(
        &self,
        to: &str,
        options: &[&str],
        within: Duration,
    ) -> Result<Option<Moved>> {
        self.stage.stop.check()?;
        let words = [&["migrate", &self.name, to, "--json"], options].concat();
        let mut command = self.stage.lab.operator_command(&words);
        let start = |command: &mut Command| command.spawn().context("cannot start whimbrel");
        let ran = bounded::run(&mut command, start, within, &self.stage.stop, bounded::interrupt)?;
        let lines = String::from_utf8_lossy(&ran.output.stdout);
        let last = lines.lines().last().unwrap_or_default();
        let end: Value = serde_json::from_str(last).unwrap_or_default();
        if ran.late && end["outcome"] == "stayed" {
            return Ok(None);
        }
        let Some(id) = end["migration"].as_str().filter(|_| ran.output.status.success()) else {
            bail!("{} did not move to {to}: {} {last}", self.name, ran.words());
        };
        let text = self.stage.whimbrel(&["migration", "show", id, "--json"])?;
        let record: Migration =
            serde_json::from_str(&text).context("cannot read what `migration show` says")?;
        ensure!(record.state == MigrationState::Moved, "{id} did not move the guest: {text}");
        Ok(Some(Moved { spawned_us: ran.spawned_us, ended_us: ran.ended_us, record }))
    }

    /// Lets it stand still.
    pub(crate) fn rest(&self) -> Result<()> {
        self.stage.whimbrel(&["vm", "pause", &self.name]).map(drop)
    }

    /// Lets it run again.
    pub(crate) fn wake(&self) -> Result<()> {
        self.stage.whimbrel(&["vm", "resume", &self.name]).map(drop)
    }

    /// Lets the witness verify all memory, the whole journal and the clocks.
    pub(crate) fn verify(&self) -> Result<()> {
        self.stage.verify(self.address).map(drop)
    }

    /// Ends it and deletes it.
    pub(crate) fn remove(self) -> Result<()> {
        self.stage.whimbrel(&["vm", "stop", &self.name, "--force"])?;
        self.stage.whimbrel(&["vm", "delete", &self.name]).map(drop)
    }
}

/// Microseconds since 1970: the clock that QEMU stamps its events with.
pub(crate) fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}
