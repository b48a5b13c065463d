//! The lab that is measured on, and the guests on it: made, moved and verified through the public command line.

use std::fs;
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use whimbrel_api::migration::{Migration, MigrationState};
use whimbrel_api::vm::Vm;
use whimbrel_lab::{Lab, guest_address, vm_definition};

use crate::say;
use crate::stop::Stop;

/// How long a guest may take, from its start until its memory is filled.
const BOOT_MAX: Duration = Duration::from_secs(180);
const BOOT_POLL: Duration = Duration::from_millis(100);

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
    /// Its memory, as in a definition.
    pub(crate) memory: &'static str,
    /// How much of it the witness fills.
    pub(crate) filled_mib: u32,
    /// More words for the witness.
    pub(crate) words: &'static str,
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

impl Stage {
    pub(crate) fn new(lab: Lab, stop: Stop) -> Self {
        Self { lab, stop }
    }

    pub(crate) fn lab(&self) -> &Lab {
        &self.lab
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
    fn whimbrel(&self, args: &[&str]) -> Result<String> {
        Ok(self.lab.whimbrel(args)?)
    }

    /// Defines a guest on a host and starts it; [`Guest::wait_filled`] says when it is ready.
    pub(crate) fn start(&self, shape: &Shape, engine: &Engine, host: &str) -> Result<Guest<'_>> {
        say(&format!("starting {} on {host}, QEMU {}", shape.name, engine.version));
        let mut definition = vm_definition(&shape.name, shape.number, shape.filled_mib);
        for (usual, ours) in [
            ("vcpus = 1", format!("vcpus = 1\nmachine = \"{}\"", engine.machine)),
            ("\"1GiB\"", format!("\"{}\"", shape.memory)),
            (" witness.memory=", format!(" witness.verify=0 {} witness.memory=", shape.words)),
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
        let began = Instant::now();
        loop {
            let status = self.stage.lab.witness(self.address).and_then(|mut w| w.status());
            if status.is_ok_and(|report| report.memory.filled_pages == report.memory.pages) {
                return Ok(());
            }
            ensure!(began.elapsed() < BOOT_MAX, "{} is not ready after {BOOT_MAX:?}", self.name);
            self.stage.pause(BOOT_POLL)?;
        }
    }

    /// What the pool says of it.
    pub(crate) fn vm(&self) -> Result<Vm> {
        let text = self.stage.whimbrel(&["vm", "show", &self.name, "--json"])?;
        serde_json::from_str(&text).context("cannot read what `vm show` says")
    }

    /// Moves it, as a user would.
    pub(crate) fn migrate(&self, to: &str) -> Result<Moved> {
        self.stage.stop.check()?;
        let mut command = self.stage.lab.operator_command(&["migrate", &self.name, to, "--json"]);
        command.stdin(Stdio::null());
        let spawned_us = now_us();
        let output = command.output().context("cannot start whimbrel")?;
        let ended_us = now_us();
        self.stage.stop.check()?;
        let lines = String::from_utf8_lossy(&output.stdout);
        let last = lines.lines().last().unwrap_or_default();
        let end: Value = serde_json::from_str(last).unwrap_or_default();
        let Some(id) = end["migration"].as_str().filter(|_| output.status.success()) else {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{} did not move to {to}: {} {last}", self.name, said.trim());
        };
        let text = self.stage.whimbrel(&["migration", "show", id, "--json"])?;
        let record: Migration =
            serde_json::from_str(&text).context("cannot read what `migration show` says")?;
        ensure!(record.state == MigrationState::Moved, "{id} did not move the guest: {text}");
        Ok(Moved { spawned_us, ended_us, record })
    }

    /// Lets the witness verify all memory, the whole journal and the clocks.
    pub(crate) fn verify(&self) -> Result<()> {
        let report = self.stage.lab.witness(self.address)?.verify()?;
        if report.healthy && report.mismatches() == 0 {
            return Ok(());
        }
        let errors = report.errors.join("; ");
        bail!("the guest found {} mismatches after a move; {errors}", report.mismatches())
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
