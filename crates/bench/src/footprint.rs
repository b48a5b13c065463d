//! What the daemons need while nothing happens: ten small VMs run on one host.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;
use whimbrel_lab::CONTROLLER;

use crate::say;
use crate::stage::{Engine, Guest, Shape, Stage};

/// The VMs, all on one host.
const VMS: u8 = 10;
/// The smallest in which the guest's kernel boots with some room.
const MEMORY_MIB: u32 = 128;
/// The daemons are looked at this long after the last VM was ready.
const IDLE: Duration = Duration::from_secs(5);

const BYTES_PER_KIB: u64 = 1024;

/// What was seen.
#[derive(Debug, Serialize)]
pub(crate) struct Footprint {
    pub(crate) vms: u8,
    /// The agent of the host that they run on.
    pub(crate) agent_bytes: u64,
    pub(crate) controller_bytes: u64,
    pub(crate) binary_bytes: u64,
}

/// Starts the VMs on a host that has seen migrations before, and looks at its agent and at the controller.
pub(crate) fn measure(stage: &Stage, engine: &Engine, binary: &Path) -> Result<Footprint> {
    let host = engine.hosts[0];
    let mut guests: Vec<Guest<'_>> = Vec::new();
    for number in 0..VMS {
        let shape = Shape {
            name: format!("small-{number}"),
            number: 10 + number,
            memory_mib: MEMORY_MIB,
            filled_mib: 1,
            words: "witness.journal=0",
        };
        guests.push(stage.start(&shape, engine, host)?);
    }
    for guest in &guests {
        guest.wait_filled()?;
    }
    stage.pause(IDLE)?;
    let binary = fs::metadata(binary).context("cannot look at the binary")?;
    let seen = Footprint {
        vms: VMS,
        agent_bytes: resident_bytes(stage, host)?,
        controller_bytes: resident_bytes(stage, CONTROLLER)?,
        binary_bytes: binary.len(),
    };
    say(&format!("{VMS} VMs run on {host}: both daemons were looked at"));
    Ok(seen)
}

/// The memory of a daemon that is in use, as Linux counts it (`VmRSS`).
fn resident_bytes(stage: &Stage, name: &str) -> Result<u64> {
    let daemon = stage.lab().daemon(name).with_context(|| format!("{name} does not run"))?;
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid))
        .with_context(|| format!("cannot look at {name}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kib.context("Linux does not tell what is resident")? * BYTES_PER_KIB)
}
