//! What follows from the moves of the comparison: medians, ratios, whether the targets are met; and the table of them.

use std::fmt::Write as _;

use serde::Serialize;

use crate::figures::{Target, median, worst};
use crate::versus::case::{Case, Tool};
use crate::versus::{Comparison, Figures, Run};

const NAME_COLUMNS: usize = 54;
const VALUE_COLUMNS: usize = 11;
const VERDICT_COLUMNS: usize = 72;

/// What follows from a case's moves.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    contenders: Vec<Summary>,
    verdicts: Vec<Verdict>,
}

/// One contender's moves.
#[derive(Debug, Serialize)]
struct Summary {
    name: String,
    tool: Tool,
    moves: usize,
    /// Of these so many did not end in time.
    unfinished: usize,
    /// Of those that ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    medians: Option<Medians>,
}

/// Medians, where nothing else is said.
#[derive(Debug, Clone, Copy, Serialize)]
struct Medians {
    to_running_ms: f64,
    command_ms: f64,
    /// Sum of all.
    commands_ms: f64,
    engine_ms: f64,
    downtime_ms: f64,
    worst_downtime_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    link_used_percent: Option<f64>,
    probe_gap_ms: f64,
    packets_lost: f64,
    guest_gap_ms: f64,
}

/// A ratio or a figure of ours, and what came of its target, if it has one.
#[derive(Debug, Serialize)]
struct Verdict {
    what: String,
    value: f64,
    unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<Target>,
    #[serde(skip_serializing_if = "Option::is_none")]
    met: Option<bool>,
}

impl Outcome {
    pub(crate) fn of(case: &Case, runs: &[Run]) -> Self {
        let summary = |(index, contender): (usize, &crate::versus::case::Contender)| {
            let own: Vec<&Run> = runs.iter().filter(|run| run.contender == index).collect();
            let unfinished = own.iter().filter(|run| run.figures.is_none()).count();
            let (name, tool) = (contender.name(), contender.tool);
            Summary { name, tool, moves: own.len(), unfinished, medians: Medians::of(&own) }
        };
        let contenders: Vec<Summary> = case.contenders.iter().enumerate().map(summary).collect();
        let verdicts = verdicts(case, &contenders);
        Self { contenders, verdicts }
    }
}

impl Medians {
    fn of(runs: &[&Run]) -> Option<Self> {
        let ended: Vec<(&Run, Figures)> =
            runs.iter().filter_map(|run| Some((*run, run.figures?))).collect();
        if ended.is_empty() {
            return None;
        }
        let all = |of: &dyn Fn(&Run, &Figures) -> f64| -> Vec<f64> {
            ended.iter().map(|(run, figures)| of(run, figures)).collect()
        };
        let used: Vec<f64> =
            ended.iter().filter_map(|(_, figures)| figures.link_used_percent).collect();
        let downtimes = all(&|_, figures| figures.downtime_ms);
        Some(Self {
            to_running_ms: median(&all(&|_, figures| figures.to_running_ms)),
            command_ms: median(&all(&|_, figures| figures.command_ms)),
            commands_ms: all(&|_, figures| figures.command_ms).iter().sum(),
            engine_ms: median(&all(&|_, figures| figures.engine_ms)),
            downtime_ms: median(&downtimes),
            worst_downtime_ms: worst(&downtimes),
            link_used_percent: (!used.is_empty()).then(|| median(&used)),
            probe_gap_ms: median(&all(&|run, _| run.network.longest_gap_ms)),
            packets_lost: median(&all(&|run, _| run.network.lost as f64)),
            guest_gap_ms: median(&all(&|run, _| run.guest_longest_gap_ms)),
        })
    }
}

fn verdicts(case: &Case, contenders: &[Summary]) -> Vec<Verdict> {
    let targets = case.targets;
    let ours = contenders.iter().find(|one| one.tool == Tool::Whimbrel);
    let Some(ours) = ours.and_then(|ours| ours.medians) else { return Vec::new() };
    let mut verdicts = Vec::new();
    let mut tell = |what: String, value: f64, unit, target: Option<Target>| {
        let met = target.map(|target| target.is_met(value));
        verdicts.push(Verdict { what, value, unit, target, met });
    };
    for virsh in contenders.iter().filter(|one| one.tool == Tool::Virsh) {
        let Some(theirs) = virsh.medians else { continue };
        let (name, at_most) = (&virsh.name, |target: Option<f64>| target.map(Target::AtMost));
        let ratio = ours.command_ms / theirs.command_ms;
        tell(format!("command / {name}"), ratio, "", at_most(targets.command_ratio));
        let ratio = ours.to_running_ms / theirs.to_running_ms;
        tell(format!("command to RESUME / {name}"), ratio, "", None);
        let ratio = ours.downtime_ms / theirs.downtime_ms;
        tell(format!("downtime / {name}"), ratio, "", at_most(targets.downtime_ratio));
    }
    if let Some((used, target)) = ours.link_used_percent.zip(targets.link_percent) {
        tell("whimbrel's use of the link".to_owned(), used, "%", Some(Target::AtLeast(target)));
    }
    if let Some((on_link, target)) = case.memory_on_link_s().zip(targets.times_memory_on_link) {
        let times = ours.command_ms / 1e3 / on_link;
        let target = Some(Target::AtMost(target));
        tell("whimbrel's command / memory on the link".to_owned(), times, "", target);
    }
    if let Some(target) = targets.downtime_ms {
        let target = Some(Target::AtMost(target));
        tell("whimbrel's downtime".to_owned(), ours.downtime_ms, "ms", target);
    }
    verdicts
}

/// The table for people.
pub(crate) fn table(comparison: &Comparison) -> String {
    let machine = comparison.machine.words();
    let (engine, libvirt) = (comparison.engine, &comparison.libvirt);
    let mut text = format!("{machine}\nQEMU {engine} on both sides, libvirt {libvirt}; medians\n");
    for measured in &comparison.cases {
        text.push_str(&format!("\n{}\n", heading(&measured.case.title)));
        for summary in &measured.outcome.contenders {
            text.push_str(&line(summary, measured.case.within_s));
        }
        for verdict in &measured.outcome.verdicts {
            text.push_str(&verdict_line(verdict));
        }
    }
    let verdicts = comparison.cases.iter().flat_map(|case| &case.outcome.verdicts);
    let judged: Vec<bool> = verdicts.filter_map(|verdict| verdict.met).collect();
    let met = judged.iter().filter(|met| **met).count();
    text.push_str(&format!("\n{met} of {} targets met\n", judged.len()));
    text
}

fn heading(title: &str) -> String {
    let columns = [
        "running",
        "QEMU's",
        "downtime",
        "worst",
        "command",
        "probe gap",
        "lost",
        "guest gap",
        "link",
    ];
    columns.iter().fold(format!("{title:NAME_COLUMNS$}"), |mut text, column| {
        let _infallible = write!(text, "{column:>VALUE_COLUMNS$}");
        text
    })
}

fn line(summary: &Summary, within_s: u64) -> String {
    let Summary { name, moves, unfinished, .. } = summary;
    let mut text = format!("  {:<width$}", format!("{name} ({moves})"), width = NAME_COLUMNS - 2);
    if let Some(medians) = summary.medians {
        let seconds = |ms: f64| format!("{:.2} s", ms / 1e3);
        let values = [
            seconds(medians.to_running_ms),
            seconds(medians.engine_ms),
            format!("{:.1} ms", medians.downtime_ms),
            format!("{:.1} ms", medians.worst_downtime_ms),
            seconds(medians.command_ms),
            format!("{:.0} ms", medians.probe_gap_ms),
            format!("{}", medians.packets_lost),
            format!("{:.0} ms", medians.guest_gap_ms),
            medians.link_used_percent.map(|used| format!("{used:.1} %")).unwrap_or_default(),
        ];
        for value in values {
            let _infallible = write!(text, "{value:>VALUE_COLUMNS$}");
        }
    }
    if *unfinished > 0 {
        let _infallible = write!(text, "  {unfinished} did not end within {within_s} s");
    }
    format!("{}\n", text.trim_end())
}

fn verdict_line(verdict: &Verdict) -> String {
    let Verdict { what, value, unit, target, met } = verdict;
    let verdict = met.map(|met| if met { "met" } else { "MISSED" }).unwrap_or_default();
    let said = format!("{what}: {value:.3} {unit}");
    let target = target.map(|target| target.text(unit)).unwrap_or_default();
    let line = format!("    {:VERDICT_COLUMNS$}{target:12}{verdict}", said.trim_end());
    format!("{}\n", line.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::versus::case;

    fn run(contender: usize, figures: Option<(f64, f64)>) -> Run {
        let figures = figures.map(|(to_running_ms, downtime_ms)| Figures {
            to_running_ms,
            command_ms: to_running_ms + 100.0,
            engine_ms: to_running_ms - 100.0,
            downtime_ms,
            link_used_percent: Some(98.0),
        });
        Run {
            contender,
            guest: 0,
            to: "host-b",
            figures,
            network: whimbrel_lab::ProbeReport::default(),
            guest_longest_gap_ms: 1.0,
            dirtied_mb_per_s: 0.0,
        }
    }

    fn case(key: &str) -> Case {
        case::all().into_iter().find(|case| case.key == key).unwrap()
    }

    #[test]
    fn each_ratio_is_judged_against_each_way_of_virsh() {
        let runs = [
            run(0, Some((1_000.0, 10.0))),
            run(0, Some((1_200.0, 20.0))),
            run(0, Some((9_000.0, 12.0))),
            run(1, Some((3_000.0, 100.0))),
            run(2, Some((2_000.0, 50.0))),
        ];
        let outcome = Outcome::of(&case("random-unshaped"), &runs);
        let rounded = |verdict: &Verdict| ((verdict.value * 100.0).round() / 100.0, verdict.met);
        let told: Vec<(f64, Option<bool>)> = outcome.verdicts.iter().map(rounded).collect();
        let against_none = [(0.42, Some(true)), (0.4, None), (0.12, Some(true))];
        let against_best = [(0.62, Some(false)), (0.6, None), (0.24, Some(false))];
        assert_eq!(told, [against_none, against_best].concat());
    }

    #[test]
    fn what_does_not_end_is_told_and_is_no_figure() {
        let case = case("dirtying-1gbit");
        let runs = [run(0, Some((9_000.0, 90.0))), run(1, None), run(1, None)];
        let outcome = Outcome::of(&case, &runs);
        assert!(outcome.contenders[1].medians.is_none() && outcome.contenders[2].moves == 0);
        assert!(line(&outcome.contenders[1], 45).contains("2 did not end within 45 s"));
        let met: Vec<_> = outcome.verdicts.iter().map(|verdict| verdict.met).collect();
        assert_eq!(met, [Some(true), Some(true)]);
    }
}
