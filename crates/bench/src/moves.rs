//! An idle guest of 1 GiB moves to and fro: how long it stands still, and what we add to QEMU's own time.
//!
//! The pause is QEMU's word: from the source's STOP event to the destination's RESUME event, which here are stamped by one
//! clock. The agents' own figure, by the source's clock alone, is kept beside it to be compared; so is what the probe saw
//! from outside.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;
use whimbrel_api::Downtime;
use whimbrel_lab::{Gap, Probe, ProbeReport};

use crate::say;
use crate::stage::{Engine, Guest, Moved, Shape, Stage};

/// How much of its memory the guest fills, as the demo's does; all of its 1 GiB travels.
const FILLED_MIB: u32 = 256;
/// How long the probe goes on after a move, so that it sees the end of any gap.
const AFTERWARDS: Duration = Duration::from_millis(500);

/// The moves with one QEMU.
#[derive(Debug, Serialize)]
pub(crate) struct Moves {
    /// QEMU's version, and what runs the guest's processors.
    pub(crate) engine: String,
    pub(crate) machine: &'static str,
    pub(crate) moves: Vec<Move>,
}

/// One of them.
#[derive(Debug, Serialize)]
pub(crate) struct Move {
    pub(crate) to: &'static str,
    /// By QEMU's events.
    pub(crate) downtime_ms: f64,
    /// By the source agent's clock, in its parts.
    pub(crate) agents_downtime: Downtime,
    /// QEMU's own total time.
    pub(crate) engine_total_ms: u64,
    /// The command's start until the guest ran again.
    pub(crate) command_to_resume_ms: f64,
    /// The command's start until the controller knew that the guest runs on the destination.
    pub(crate) command_to_running_ms: f64,
    /// The command's start until its end: both sides are swept by then.
    pub(crate) command_ms: f64,
    /// What of [`Move::command_to_running_ms`] is not QEMU's total time.
    pub(crate) added_ms: f64,
    /// What of that was starting the destination's QEMU.
    pub(crate) destination_start_ms: u64,
    pub(crate) bytes: u64,
    pub(crate) passes: u64,
    /// What the probe saw.
    pub(crate) network: ProbeReport,
    /// What of it belongs to the pause: the gap in which the guest stopped. Others are the engine's, at the beginning of a copy.
    pub(crate) pause_seen: Gap,
}

impl Move {
    /// How far the agents' figure is from QEMU's, in milliseconds.
    pub(crate) fn disagreement_ms(&self) -> f64 {
        (self.agents_downtime.total_us as f64 / 1e3 - self.downtime_ms).abs()
    }
}

/// Moves a guest `count` times with an engine, once more to warm up.
pub(crate) fn measure(stage: &Stage, engine: &Engine, count: u32) -> Result<Moves> {
    let [home, other] = engine.hosts;
    let name = format!("idle-{}", engine.version.replace('.', "-"));
    let shape = Shape { name, number: 0, memory_mib: 1024, filled_mib: FILLED_MIB, words: "" };
    let guest = stage.start(&shape, engine, home)?;
    guest.wait_filled()?;
    let runs_on = guest.vm()?.engine.context("the guest has no engine")?;
    let probe = stage.lab().probe(guest.address)?;
    let mut moves = Vec::new();
    for number in 0..=count {
        let to = if number % 2 == 0 { other } else { home };
        let moved = one(stage, &guest, &probe, to)?;
        let name = if number == 0 { "warm-up".to_owned() } else { format!("{number}") };
        say(&format!(
            "QEMU {}, move {name}: {:.1} ms pause, {:.0} ms added",
            runs_on.version, moved.downtime_ms, moved.added_ms
        ));
        if number > 0 {
            moves.push(moved);
        }
    }
    guest.remove()?;
    let engine_text = format!("{} {}", runs_on.version, runs_on.accelerator);
    Ok(Moves { engine: engine_text, machine: engine.machine, moves })
}

fn one(stage: &Stage, guest: &Guest<'_>, probe: &Probe, to: &'static str) -> Result<Move> {
    // What was seen so far belongs to no move.
    let _before = probe.take();
    let moved = guest.migrate(to)?;
    stage.pause(AFTERWARDS)?;
    let network = probe.take();
    guest.verify()?;
    Move::new(to, &moved, network)
}

impl Move {
    fn new(to: &'static str, moved: &Moved, network: ProbeReport) -> Result<Self> {
        let record = &moved.record;
        let downtime = record.downtime.context("the record tells no downtime")?;
        let stopped = downtime.stopped_at_us.context("QEMU's STOP event was missed")?;
        let resumed = downtime.resumed_at_us.context("QEMU's RESUME event was missed")?;
        let progress = record.progress.as_ref().context("the record has no figures of QEMU")?;
        let running = record.ended.context("the record has no end")?.as_microsecond();
        let running = u64::try_from(running).context("the record ended before 1970")?;
        let since_spawn = |at: u64| at.saturating_sub(moved.spawned_us) as f64 / 1e3;
        Ok(Self {
            to,
            downtime_ms: resumed.saturating_sub(stopped) as f64 / 1e3,
            agents_downtime: downtime,
            engine_total_ms: progress.engine_total_ms,
            command_to_resume_ms: since_spawn(resumed),
            command_to_running_ms: since_spawn(running),
            command_ms: since_spawn(moved.ended_us),
            added_ms: since_spawn(running) - progress.engine_total_ms as f64,
            destination_start_ms: progress.destination_start_ms.unwrap_or(0),
            bytes: progress.transferred_bytes,
            passes: progress.passes,
            pause_seen: network
                .gaps
                .iter()
                .find(|gap| gap.holds(stopped))
                .copied()
                .unwrap_or_default(),
            network,
        })
    }
}
