//! The figures that come out, each with its target where it has one, and the table of them.

use std::fmt::Write as _;

use serde::Serialize;

use crate::footprint::Footprint;
use crate::link::Copy;
use crate::machine::Machine;
use crate::moves::{Move, Moves};

const BYTES_PER_MIB: f64 = 1_048_576.0;

const NAME_COLUMNS: usize = 62;
const VALUE_COLUMNS: usize = 12;
const TARGET_COLUMNS: usize = 14;

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Figure {
    /// What it belongs to: a heading of the table.
    group: String,
    name: &'static str,
    value: f64,
    unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<Target>,
    /// Whether the target is met.
    #[serde(skip_serializing_if = "Option::is_none")]
    met: Option<bool>,
}

/// What a figure is to be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Target {
    AtMost(f64),
    AtLeast(f64),
}

impl Target {
    pub(crate) fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }

    pub(crate) fn text(self, unit: &str) -> String {
        match self {
            Self::AtMost(most) => format!("<= {most} {unit}"),
            Self::AtLeast(least) => format!(">= {least} {unit}"),
        }
    }
}

/// The figures of one group.
struct Group<'a> {
    name: String,
    figures: &'a mut Vec<Figure>,
}

impl Group<'_> {
    fn add(&mut self, name: &'static str, value: f64, unit: &'static str, target: Option<Target>) {
        let met = target.map(|target| target.is_met(value));
        let group = self.name.clone();
        self.figures.push(Figure { group, name, value, unit, target, met });
    }

    /// A figure without a target.
    fn tell(&mut self, name: &'static str, value: f64, unit: &'static str) {
        self.add(name, value, unit, None);
    }

    fn at_most(&mut self, name: &'static str, value: f64, unit: &'static str, most: f64) {
        self.add(name, value, unit, Some(Target::AtMost(most)));
    }
}

/// All figures that follow from what was measured.
pub(crate) fn of(moves: &[Moves], copies: &[Copy], footprint: Option<&Footprint>) -> Vec<Figure> {
    let mut figures = Vec::new();
    for moves in moves {
        let head = format!("idle guest of 1 GiB, QEMU {}, {}", moves.engine, moves.machine);
        let name = format!("{head}, {} moves", moves.moves.len());
        of_moves(&mut Group { name, figures: &mut figures }, &moves.moves);
    }
    if !copies.is_empty() {
        let name = format!("652 MiB of random pages over 1 Gbit/s, {} moves", copies.len());
        let mut group = Group { name, figures: &mut figures };
        let worst = copies.iter().map(|copy| copy.used_percent).fold(f64::INFINITY, f64::min);
        let target = Some(Target::AtLeast(97.0));
        group.add("link used while memory is copied, worst", worst, "%", target);
    }
    if let Some(footprint) = footprint {
        let name = format!("at rest, {} VMs running", footprint.vms);
        let mut group = Group { name, figures: &mut figures };
        let mib = |bytes: u64| bytes as f64 / BYTES_PER_MIB;
        group.at_most("agent, resident", mib(footprint.agent_bytes), "MiB", 30.0);
        group.at_most("controller, resident", mib(footprint.controller_bytes), "MiB", 40.0);
        group.at_most("the release binary", mib(footprint.binary_bytes), "MiB", 25.0);
    }
    figures
}

fn of_moves(group: &mut Group<'_>, moves: &[Move]) {
    let all = |of: &dyn Fn(&Move) -> f64| -> Vec<f64> { moves.iter().map(of).collect() };
    let part = |of: &dyn Fn(&Move) -> u64| median(&all(&|one| of(one) as f64 / 1e3));

    let pauses = all(&|one| one.downtime_ms);
    group.at_most("downtime, STOP to RESUME, median", median(&pauses), "ms", 15.0);
    group.at_most("downtime, worst", worst(&pauses), "ms", 40.0);
    let last_pass = part(&|one| one.agents_downtime.stop_to_completed_us);
    group.tell("  of it QEMU's last pass (STOP to completed), median", last_pass, "ms");
    let loaded = part(&|one| one.agents_downtime.loaded_confirm_us);
    group.tell("  the destination's word that it holds all, median", loaded, "ms");
    let release = part(&|one| one.agents_downtime.release_us);
    group.tell("  the release on the source's disk, median", release, "ms");
    let go = part(&|one| one.agents_downtime.go_us);
    group.tell("  GO until RESUME, median", go, "ms");
    let off = worst(&all(&Move::disagreement_ms));
    group.at_most("the agents' own figure is off by, worst", off, "ms", 2.0);

    // The probe sends one datagram a millisecond.
    let silent = all(&|one| one.pause_seen.lost as f64);
    group.at_most(
        "the pause by the probe (packets lost, one a ms), median",
        median(&silent),
        "ms",
        15.0,
    );
    group.at_most("the pause by the probe, worst", worst(&silent), "ms", 40.0);
    let answer = all(&|one| one.pause_seen.ms);
    group.tell("last answer before the pause to the first after, median", median(&answer), "ms");
    group.tell("last answer before the pause to the first after, worst", worst(&answer), "ms");
    let gaps = all(&|one| one.network.longest_gap_ms);
    group.tell("longest gap in the whole move, median", median(&gaps), "ms");
    group.tell("longest gap in the whole move, worst", worst(&gaps), "ms");
    let own = worst(&all(&|one| one.network.own_longest_gap_ms));
    group.tell("  the probe's own longest pause", own, "ms");
    let lost = all(&|one| one.network.lost as f64);
    group.tell("packets lost in the whole move, median", median(&lost), "");
    group.tell("packets lost in the whole move, worst", worst(&lost), "");
    let broken = moves.iter().filter(|one| !one.network.stream_unbroken).count();
    group.at_most("TCP streams broken", broken as f64, "", 0.0);

    let added = all(&|one| one.added_ms);
    group.at_most("added to QEMU's own total time, median", median(&added), "ms", 250.0);
    group.tell("added to QEMU's own total time, worst", worst(&added), "ms");
    let start = median(&all(&|one| one.destination_start_ms as f64));
    group.tell("  of it starting the destination's QEMU, median", start, "ms");
    let total = median(&all(&|one| one.engine_total_ms as f64));
    group.tell("QEMU's own total time, median", total, "ms");
    let command = median(&all(&|one| one.command_ms));
    group.tell("the whole command, both sides swept, median", command, "ms");
}

/// The middle one; between two middle ones, their mean. 0 of nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.as_slice() {
        [] => 0.0,
        sorted if sorted.len() % 2 == 1 => sorted[middle],
        sorted => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

pub(crate) fn worst(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

/// The table for people.
pub(crate) fn table(machine: &Machine, figures: &[Figure]) -> String {
    let mut text = format!("{}\n", machine.words());
    let mut group = "";
    for figure in figures {
        if figure.group != group {
            group = &figure.group;
            text.push_str(&format!("\n{group}\n"));
        }
        text.push_str(&line(figure));
    }
    let with_target = figures.iter().filter(|figure| figure.met.is_some()).count();
    let met = figures.iter().filter(|figure| figure.met == Some(true)).count();
    text.push_str(&format!("\n{met} of {with_target} targets met\n"));
    text
}

fn line(figure: &Figure) -> String {
    let value = match figure.unit {
        "" => format!("{}", figure.value),
        unit => format!("{:.1} {unit}", figure.value),
    };
    let target = figure.target.map(|target| target.text(figure.unit)).unwrap_or_default();
    let verdict = match figure.met {
        None => "",
        Some(true) => "met",
        Some(false) => "MISSED",
    };
    let mut text = String::new();
    // Writing to a text cannot fail.
    let _infallible = write!(
        text,
        "  {:NAME_COLUMNS$}{value:>VALUE_COLUMNS$}  {target:TARGET_COLUMNS$}{verdict}",
        figure.name
    );
    format!("{}\n", text.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_the_worst() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), 3.0);
        assert_eq!(worst(&[4.0, 9.0, 2.0]), 9.0);
    }

    #[test]
    fn a_target_is_met_or_missed_and_told_so() {
        let footprint = |agent_bytes| Footprint {
            vms: 10,
            agent_bytes,
            controller_bytes: 40 << 20,
            binary_bytes: 1 << 20,
        };
        let copies = |used_percent| {
            let none = Copy {
                to: "host-a",
                link_bits_per_s: 1,
                seconds: 1.0,
                wire_bytes: 1,
                used_percent,
                engine_total_ms: 1,
                downtime_us: 1,
            };
            vec![none]
        };
        let good = of(&[], &copies(97.0), Some(&footprint(30 << 20)));
        let bad = of(&[], &copies(96.9), Some(&footprint((30 << 20) + 1)));
        let met = |figures: &[Figure]| -> Vec<_> { figures.iter().map(|f| f.met).collect() };
        assert_eq!(met(&good), [Some(true); 4]);
        assert_eq!(met(&bad), [Some(false), Some(false), Some(true), Some(true)]);
        let table = table(&Machine::default(), &bad);
        assert!(table.contains("2 of 4 targets met"), "{table}");
        assert!(table.contains("96.9 %  >= 97 %       MISSED"), "{table}");
    }
}
