//! How far forecasts are from facts: over a matrix of memory, content, dirty rate and link, `whimbrel plan` is asked what a
//! move will take, and then the move is made.
//!
//! The forecast is that of the way that would be chosen, and the move is left to choose by the same policy. A move that has
//! not ended after several times what its memory takes on the link is cancelled and counts as one that does not converge.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::Value;
use whimbrel_lab::Rate;
use whimbrel_lab::report::Command;

use crate::figures::{Target, median};
use crate::machine::Machine;
use crate::say;
use crate::stage::{Engine, Guest, Moved, Shape, Stage};

/// Where the plan for the one destination is in what `whimbrel plan --json` prints, if it is not all of it.
const DESTINATION_AT: &str = "/destinations/0";
/// The number that sets the guests' addresses apart from others'.
const NUMBER: u8 = 2;
/// How long a guest dirties before it is asked for.
const SETTLE: Duration = Duration::from_secs(2);
/// A move may take this many times what the memory takes on the link, and no less than the least.
const TIMES_ON_LINK_MAX: f64 = 4.0;
const WITHIN_MIN_S: f64 = 20.0;
/// And no less than this many times what was foretold.
const TIMES_FORETOLD_MAX: f64 = 1.5;
/// What counts as the rate of a link without a shaper.
const UNSHAPED_BITS_PER_S: f64 = 4e9;
/// This close to the limit either answer is right, in percent of the dirty rate.
const MARGIN_PERCENT: f64 = 15.0;
const NAME_COLUMNS: usize = 48;
const VALUE_COLUMNS: usize = 12;

const TOTAL_ERROR_TARGET: Target = Target::AtMost(10.0);
const DOWNTIME_ERROR_TARGET_MS: Target = Target::AtMost(10.0);
const WRONG_TARGET: Target = Target::AtMost(0.0);

/// Memory, and how much of it is filled, in MiB.
const MEMORIES: [(u32, u32); 2] = [(256, 128), (512, 384)];
/// A name, and the witness's words for it.
const CONTENTS: [(&str, &str); 2] =
    [("random", "witness.zero=0 witness.text=0"), ("mixed", "witness.zero=30 witness.text=40")];
/// A link in Mbit/s, or none, and what is dirtied a second, in MB: nothing, what the link carries easily, and too much.
const LOADS: [(Option<u64>, [u32; 3]); 3] =
    [(None, [0, 50, 150]), (Some(1_000), [0, 40, 250]), (Some(400), [0, 15, 100])];

/// One case.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Case {
    memory_mib: u32,
    content: &'static str,
    link_mbit_per_s: Option<u64>,
    dirty_mb_per_s: u32,
}

/// What was foretold.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Foretold {
    /// The way that would be chosen, as the plan tells it.
    strategy: Value,
    /// `yes`, `marginal` or `no`.
    convergence: String,
    margin_percent: Option<f64>,
    total_ms: Option<f64>,
    downtime_ms: Option<f64>,
    wire_bytes: Option<f64>,
}

/// What came.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Fact {
    total_ms: f64,
    downtime_ms: f64,
    wire_bytes: f64,
}

/// A case, and what came of it.
#[derive(Debug, Clone, Serialize)]
struct Compared {
    #[serde(flatten)]
    case: Case,
    foretold: Foretold,
    /// None if it did not end.
    fact: Option<Fact>,
}

/// All cases.
#[derive(Debug, Serialize)]
pub(crate) struct Forecasts {
    machine: Machine,
    engine: &'static str,
    cases: Vec<Compared>,
}

/// Goes through the matrix; after each case `keep` is called with all that there is so far.
pub(crate) fn measure(
    stage: &Stage,
    engine: &'static Engine,
    quick: bool,
    keep: &mut dyn FnMut(&Forecasts) -> Result<()>,
) -> Result<Forecasts> {
    let mut all = Forecasts { machine: Machine::look(), engine: engine.version, cases: Vec::new() };
    let kinds = MEMORIES.iter().flat_map(|memory| CONTENTS.iter().map(move |what| (memory, what)));
    for (&(memory_mib, filled_mib), &(content, words)) in kinds {
        let name = format!("{content}-{memory_mib}");
        let shape = Shape { name, number: NUMBER, memory_mib, filled_mib, words };
        let guest = stage.start(&shape, engine, engine.hosts[0])?;
        guest.wait_filled()?;
        let mut at = 0;
        for (link_mbit_per_s, rates) in LOADS {
            shape_links(stage, engine, link_mbit_per_s)?;
            for dirty_mb_per_s in rates {
                let case = Case { memory_mib, content, link_mbit_per_s, dirty_mb_per_s };
                let compared = one(stage, &guest, case, engine.hosts[1 - at])?;
                say(&compared.words());
                at = if compared.fact.is_some() { 1 - at } else { at };
                all.cases.push(compared);
                keep(&all)?;
            }
        }
        shape_links(stage, engine, None)?;
        guest.remove()?;
        if quick {
            break;
        }
    }
    Ok(all)
}

fn shape_links(stage: &Stage, engine: &Engine, mbit_per_s: Option<u64>) -> Result<()> {
    let rate = mbit_per_s.map(|mbit| Rate { bits_per_s: mbit * 1_000_000 });
    for host in engine.hosts {
        stage.lab().set_link(host, rate)?;
    }
    Ok(())
}

fn one(stage: &Stage, guest: &Guest<'_>, case: Case, to: &str) -> Result<Compared> {
    let dirty = |mb_per_s| {
        let mut witness = stage.lab().witness(guest.address)?;
        Ok::<_, anyhow::Error>(witness.command(Command::Dirty { mb_per_s })?)
    };
    dirty(case.dirty_mb_per_s)?;
    stage.pause(SETTLE)?;
    let plan = stage.whimbrel(&["plan", &guest.name, to, "--fresh", "--json"])?;
    let foretold = Foretold::read(&plan)?;
    let moved = guest.migrate_within(to, &[], case.within(&foretold))?;
    dirty(0)?;
    guest.verify()?;
    let fact = moved.as_ref().map(Fact::of).transpose()?;
    Ok(Compared { case, foretold, fact })
}

impl Case {
    /// How long its move may take: what the memory takes several times over, and longer where that was foretold.
    fn within(self, foretold: &Foretold) -> Duration {
        let bits = f64::from(self.memory_mib) * 8.0 * 1_048_576.0;
        let link = self.link_mbit_per_s.map_or(UNSHAPED_BITS_PER_S, |mbit| mbit as f64 * 1e6);
        let foretold_s = foretold.total_ms.unwrap_or_default() / 1e3 * TIMES_FORETOLD_MAX;
        Duration::from_secs_f64((bits / link * TIMES_ON_LINK_MAX).max(WITHIN_MIN_S).max(foretold_s))
    }

    fn name(self) -> String {
        let Self { memory_mib, content, link_mbit_per_s, dirty_mb_per_s } = self;
        let link = link_mbit_per_s.map_or("unshaped".to_owned(), |mbit| format!("{mbit} Mbit/s"));
        format!("{memory_mib} MiB {content}, {dirty_mb_per_s} MB/s dirty, {link}")
    }
}

impl Foretold {
    fn read(plan: &str) -> Result<Self> {
        let line = plan.lines().last().unwrap_or_default();
        let plan: Value = serde_json::from_str(line).context("cannot read what `plan` says")?;
        let plan = plan.pointer(DESTINATION_AT).unwrap_or(&plan);
        let forecast = &plan["forecast"];
        let convergence = forecast["convergence"].as_str().context("the plan tells no forecast")?;
        Ok(Self {
            strategy: plan["strategy"].clone(),
            convergence: convergence.to_owned(),
            margin_percent: forecast["margin_percent"].as_f64(),
            total_ms: forecast["total_ms"].as_f64(),
            downtime_ms: forecast["downtime_ms"].as_f64(),
            wire_bytes: forecast["wire_bytes"].as_f64(),
        })
    }
}

impl Fact {
    fn of(moved: &Moved) -> Result<Self> {
        let downtime = moved.record.downtime.context("the record tells no downtime")?;
        let progress = moved.record.progress.as_ref();
        let progress = progress.context("the record has no figures of QEMU")?;
        let all_there = moved.all_there_us()?;
        Ok(Self {
            total_ms: all_there.saturating_sub(moved.spawned_us) as f64 / 1e3,
            downtime_ms: downtime.total_us as f64 / 1e3,
            wire_bytes: progress.transferred_bytes as f64,
        })
    }
}

impl Compared {
    fn total_error_percent(&self) -> Option<f64> {
        let (fact, foretold) = (self.fact?, self.foretold.total_ms?);
        Some((foretold - fact.total_ms).abs() / fact.total_ms * 100.0)
    }

    fn downtime_error_ms(&self) -> Option<f64> {
        Some((self.foretold.downtime_ms? - self.fact?.downtime_ms).abs())
    }

    /// Whether it was wrong on the convergence, where that was not a near thing.
    fn is_wrong(&self) -> bool {
        let near =
            self.foretold.margin_percent.is_some_and(|margin| margin.abs() <= MARGIN_PERCENT);
        !near && (self.foretold.convergence == "no") == self.fact.is_some()
    }

    fn words(&self) -> String {
        let ms = |value: Option<f64>| value.map_or("-".to_owned(), |ms| format!("{ms:.0} ms"));
        format!(
            "{}: converges {}, total {} for {}, pause {} for {}",
            self.case.name(),
            self.foretold.convergence,
            ms(self.foretold.total_ms),
            ms(self.fact.map(|fact| fact.total_ms)),
            ms(self.foretold.downtime_ms),
            ms(self.fact.map(|fact| fact.downtime_ms)),
        )
    }
}

/// The table for people.
pub(crate) fn table(forecasts: &Forecasts) -> String {
    let (machine, engine) = (forecasts.machine.words(), forecasts.engine);
    let mut text = format!("{machine}\nforecast and fact, QEMU {engine}\n\n");
    let columns = ["converges", "total", "in fact", "error", "pause", "in fact", "error"];
    text.push_str(&row("", &columns.map(str::to_owned)));
    let ms = |value: Option<f64>| value.map_or("-".to_owned(), |ms| format!("{ms:.1} ms"));
    let s = |value: Option<f64>| value.map_or("-".to_owned(), |ms| format!("{:.2} s", ms / 1e3));
    for case in &forecasts.cases {
        let percent = |error: f64| format!("{error:.1} %");
        let answer = &case.foretold.convergence;
        let values = [
            if case.is_wrong() { format!("{answer} WRONG") } else { answer.clone() },
            s(case.foretold.total_ms),
            s(case.fact.map(|fact| fact.total_ms)),
            case.total_error_percent().map_or("-".to_owned(), percent),
            ms(case.foretold.downtime_ms),
            ms(case.fact.map(|fact| fact.downtime_ms)),
            ms(case.downtime_error_ms()),
        ];
        text.push_str(&row(&case.case.name(), &values));
    }
    for verdict in verdicts(&forecasts.cases) {
        let (what, value, unit, target) = verdict;
        let met = if target.is_met(value) { "met" } else { "MISSED" };
        let said = format!("{value:.1} {unit}");
        let target = target.text(unit);
        let _infallible =
            writeln!(text, "  {what:NAME_COLUMNS$}{said:>VALUE_COLUMNS$}  {target:12}{met}");
    }
    text
}

fn verdicts(cases: &[Compared]) -> [(&'static str, f64, &'static str, Target); 3] {
    let totals: Vec<f64> = cases.iter().filter_map(Compared::total_error_percent).collect();
    let downtimes: Vec<f64> = cases.iter().filter_map(Compared::downtime_error_ms).collect();
    let wrong = cases.iter().filter(|case| case.is_wrong()).count();
    [
        ("error of the total time, median", median(&totals), "%", TOTAL_ERROR_TARGET),
        ("error of the downtime, median", median(&downtimes), "ms", DOWNTIME_ERROR_TARGET_MS),
        ("wrong answers on convergence", wrong as f64, "", WRONG_TARGET),
    ]
}

fn row(name: &str, values: &[String; 7]) -> String {
    let mut text = format!("  {name:NAME_COLUMNS$}");
    for value in values {
        let _infallible = write!(text, "{value:>VALUE_COLUMNS$}");
    }
    format!("{}\n", text.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(convergence: &str, margin: f64, fact: Option<(f64, f64)>) -> Compared {
        let case = Case {
            memory_mib: 256,
            content: "random",
            link_mbit_per_s: Some(1_000),
            dirty_mb_per_s: 1,
        };
        let foretold = Foretold {
            strategy: Value::Null,
            convergence: convergence.to_owned(),
            margin_percent: Some(margin),
            total_ms: Some(1_100.0),
            downtime_ms: Some(20.0),
            wire_bytes: None,
        };
        let fact =
            fact.map(|(total_ms, downtime_ms)| Fact { total_ms, downtime_ms, wire_bytes: 1.0 });
        Compared { case, foretold, fact }
    }

    #[test]
    fn errors_are_of_the_fact() {
        let one = compared("yes", 50.0, Some((1_000.0, 12.0)));
        assert_eq!(one.total_error_percent().map(f64::round), Some(10.0));
        assert_eq!(one.downtime_error_ms(), Some(8.0));
        assert_eq!(compared("no", -50.0, None).total_error_percent(), None);
    }

    #[test]
    fn an_answer_is_wrong_only_away_from_the_limit() {
        let ended = Some((1.0, 1.0));
        for (convergence, margin, fact, wrong) in [
            ("yes", 50.0, ended, false),
            ("yes", 50.0, None, true),
            ("no", -50.0, None, false),
            ("no", -50.0, ended, true),
            ("marginal", 10.0, None, false),
            ("no", -14.0, ended, false),
        ] {
            assert_eq!(
                compared(convergence, margin, fact).is_wrong(),
                wrong,
                "{convergence} {margin}"
            );
        }
    }

    #[test]
    fn the_matrix_is_large_enough() {
        let loads: usize = LOADS.iter().map(|(_, rates)| rates.len()).sum();
        assert!(MEMORIES.len() * CONTENTS.len() * loads >= 24);
    }

    #[test]
    fn a_plan_is_read() {
        let plan = r#"{"forecast":{"convergence":"yes","margin_percent":30.5,"total_ms":900,"downtime_ms":9.5}}"#;
        let of_many = format!(r#"{{"destinations":[{plan}]}}"#);
        assert_eq!(Foretold::read(&of_many).unwrap(), Foretold::read(plan).unwrap());
        let foretold = Foretold::read(plan).unwrap();
        assert_eq!((foretold.total_ms, foretold.margin_percent), (Some(900.0), Some(30.5)));
        assert!(Foretold::read("{}").is_err());
        assert!(Foretold::read("").is_err());
    }
}
