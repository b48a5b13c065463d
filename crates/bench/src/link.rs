//! A guest full of random pages moves over a link of 1 Gbit/s: how much of the link is used while memory is copied.
//!
//! What is counted is what the link's shaper has let through, headers included: TCP's payload alone cannot fill a link. The
//! stretch of time is QEMU's: from the end of its setup to the guest's stop.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use whimbrel_lab::{Lab, Rate};

use crate::say;
use crate::stage::{Engine, Guest, Shape, Stage, now_us};

const LINK: Rate = Rate { bits_per_s: 1_000_000_000 };
/// Of the guest's 1 GiB this much is filled, 85 % of it with random bytes: 652 MiB.
const FILLED_MIB: u32 = 768;
const FILLED_WITH: &str = "witness.zero=0 witness.text=15";
/// To the other host and back.
const MOVES: usize = 2;
/// How often the shaper's counter is read. It costs a process, and the processors are needed for the copy.
const LOOK_PERIOD: Duration = Duration::from_millis(100);

/// One copy over the link.
#[derive(Debug, Serialize)]
pub(crate) struct Copy {
    pub(crate) to: &'static str,
    pub(crate) link_bits_per_s: u64,
    /// From the end of QEMU's setup to the last look at the counter before the guest's stop.
    pub(crate) seconds: f64,
    /// What passed the shaper meanwhile, headers included.
    pub(crate) wire_bytes: u64,
    /// Of what the link can carry in that time.
    pub(crate) used_percent: f64,
    pub(crate) engine_total_ms: u64,
    pub(crate) downtime_us: u64,
}

/// What the counter said, and when.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look {
    at_us: u64,
    bytes: u64,
}

/// Moves a guest over a slow link, to and fro.
pub(crate) fn measure(stage: &Stage, engine: &Engine) -> Result<Vec<Copy>> {
    let [home, other] = engine.hosts;
    let shape = Shape {
        name: "full".to_owned(),
        number: 1,
        memory_mib: 1024,
        filled_mib: FILLED_MIB,
        words: FILLED_WITH,
    };
    let guest = stage.start(&shape, engine, home)?;
    guest.wait_filled()?;
    for host in engine.hosts {
        stage.lab().set_link(host, Some(LINK))?;
    }
    let mut copies = Vec::new();
    for (from, to) in [(home, other), (other, home)].into_iter().cycle().take(MOVES) {
        let copy = one(stage, &guest, from, to)?;
        say(&format!("a copy over {LINK}: {:.1} % of the link used", copy.used_percent));
        copies.push(copy);
        guest.verify()?;
    }
    for host in engine.hosts {
        stage.lab().set_link(host, None)?;
    }
    guest.remove()?;
    Ok(copies)
}

fn one(stage: &Stage, guest: &Guest<'_>, from: &str, to: &'static str) -> Result<Copy> {
    let done = AtomicBool::new(false);
    let (moved, looks) = thread::scope(|scope| {
        let looking = scope.spawn(|| watch(stage.lab(), from, &done));
        let moved = guest.migrate(to);
        done.store(true, Ordering::Relaxed);
        (moved, looking.join())
    });
    let (moved, looks) = (moved?, looks.ok().context("the counter's thread ended")??);
    let (began, record) = (moved.copying_us()?, moved.record);
    let downtime = record.downtime.context("the record tells no downtime")?;
    let progress = record.progress.context("the record has no figures of QEMU")?;
    let stopped = downtime.stopped_at_us.context("QEMU's STOP event was missed")?;
    let (seconds, wire_bytes) = between(&looks, began, stopped)?;
    Ok(Copy {
        to,
        link_bits_per_s: LINK.bits_per_s,
        seconds,
        wire_bytes,
        used_percent: wire_bytes as f64 * 8.0 / seconds / LINK.bits_per_s as f64 * 100.0,
        engine_total_ms: progress.engine_total_ms,
        downtime_us: downtime.total_us,
    })
}

/// The seconds and bytes from `began` to the last look before `ended`. Nearly nothing passes before `began`, so the last
/// look before it tells the count at it.
pub(crate) fn between(looks: &[Look], began: u64, ended: u64) -> Result<(f64, u64)> {
    let before = |at: u64| looks.iter().rev().find(|look| look.at_us <= at);
    let (first, last) = before(began).zip(before(ended)).context("the counter was not read")?;
    ensure!(last.at_us > began, "the copy was too short to be measured");
    Ok(((last.at_us - began) as f64 / 1e6, last.bytes - first.bytes))
}

pub(crate) fn watch(lab: &Lab, host: &str, done: &AtomicBool) -> Result<Vec<Look>> {
    let mut looks = Vec::new();
    while !done.load(Ordering::Relaxed) {
        let bytes = sent_bytes(lab, host)?;
        looks.push(Look { at_us: now_us(), bytes });
        thread::sleep(LOOK_PERIOD);
    }
    Ok(looks)
}

/// What a host's shaper has let through, in bytes on the wire. The interface's own counter takes a packet that is cut into
/// segments later for one, with one header.
fn sent_bytes(lab: &Lab, host: &str) -> Result<u64> {
    let mut command = Command::new("tc");
    command.args(["-statistics", "-json", "qdisc", "show", "dev", "eth0", "root"]);
    let output = lab.run(host, move || command.output())?.context("cannot start tc")?;
    let said: Value = serde_json::from_slice(&output.stdout).context("cannot read tc's answer")?;
    said[0]["bytes"].as_u64().context("tc tells no bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_passes_during_the_copy_counts() {
        let look = |at_us, bytes| Look { at_us, bytes };
        let looks = [look(0, 5), look(900_000, 10), look(1_100_000, 110), look(2_000_000, 1_010)];
        assert_eq!(between(&looks, 1_000_000, 2_050_000).unwrap(), (1.0, 1_000));
        assert_eq!(between(&looks, 1_000_000, 1_500_000).unwrap(), (0.1, 100));
        assert!(between(&looks, 1_000_000, 1_050_000).is_err(), "no look in between");
        assert!(between(&[], 1, 2).is_err());
    }
}
