//! How far a migration is: a bar where standard error is a terminal, else a line now and then; with `--json` an object a
//! change on standard output.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use whimbrel_api::migration::{
    Decision, Migration, MigrationState, PostcopyReport, PostcopyState, Progress as Figures,
};
use whimbrel_api::vm::Bytes;
use whimbrel_api::{MigrationId, Name, Phase};

use crate::failure::Failure;
use crate::{follow, output, words};

/// Pause between two lines of one phase, in seconds.
const LINE_SECONDS: u64 = 2;
/// QEMU counts in pages of x86 where it does not say otherwise, in bytes.
const PAGE_BYTES: u64 = 4096;
/// The bar is drawn anew this often while nothing changes, in milliseconds.
const TICK_MS: u64 = 100;
const BAR: &str = "{spinner} {prefix:<12} {bar:30} {percent:>3}%  {msg}";

/// Shows one migration.
pub(crate) struct Progress {
    place: Place,
    /// The decision that was told last.
    decided: Option<Decision>,
    /// How post-copy was last told to go.
    postcopy: Option<PostcopyState>,
}

/// Where it is shown.
enum Place {
    /// Objects for a program; the last one, since not every change is one of what is shown.
    Json { last: serde_json::Value },
    /// A bar for a person.
    Bar(ProgressBar),
    /// Lines for a log.
    Lines { last: Option<(Phase, Instant)> },
}

/// Says a word between what is shown, which no bar overwrites.
#[derive(Clone)]
pub(crate) struct Voice(Option<ProgressBar>);

impl Voice {
    /// Says it, on standard error.
    pub(crate) fn say(&self, text: &str) {
        match &self.0 {
            Some(bar) => bar.suspend(|| output::note(text)),
            None => output::note(text),
        }
    }
}

/// A change of a running migration, for programs.
#[derive(Serialize)]
struct Change<'a> {
    migration: MigrationId,
    vm: &'a Name,
    source: &'a Name,
    destination: &'a Name,
    phase: Phase,
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<&'a Figures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    postcopy: Option<&'a PostcopyReport>,
    /// The latest one, where there is one since the last change.
    #[serde(skip_serializing_if = "Option::is_none")]
    decision: Option<&'a Decision>,
}

impl Progress {
    /// What fits the place where it is shown.
    pub(crate) fn new(json: bool) -> Self {
        Self { place: Place::new(json), decided: None, postcopy: None }
    }

    /// Whether it is shown to a program.
    pub(crate) fn is_json(&self) -> bool {
        matches!(self.place, Place::Json { .. })
    }

    /// What says a word between.
    pub(crate) fn voice(&self) -> Voice {
        match &self.place {
            Place::Bar(bar) => Voice(Some(bar.clone())),
            _ => Voice(None),
        }
    }

    /// Says a word between.
    pub(crate) fn say(&self, text: &str) {
        self.voice().say(text);
    }

    /// Shows how far it is. Ended ones are shown by whoever says how they ended.
    pub(crate) fn show(&mut self, record: &Migration) -> Result<(), Failure> {
        if record.state != MigrationState::Running {
            return Ok(());
        }
        let decisions = self.new_decisions(record);
        if self.is_json() {
            return self.place.change(record, decisions.last());
        }
        decisions.iter().for_each(|decision| self.say(&decision.to_string()));
        self.tell_postcopy(record);
        self.place.draw(record);
        Ok(())
    }

    /// What was decided since the last look. At the first one the latest counts: `migration show` has those before.
    fn new_decisions<'a>(&mut self, record: &'a Migration) -> &'a [Decision] {
        let all = &record.decisions;
        let told = self.decided.as_ref();
        let told = told.and_then(|told| all.iter().rposition(|decision| decision == told));
        self.decided = all.last().cloned();
        &all[told.map_or(all.len().saturating_sub(1), |told| told + 1)..]
    }

    /// A connection that is lost, or made again, is said plainly and not only drawn.
    fn tell_postcopy(&mut self, record: &Migration) {
        let state = record.postcopy.as_ref().map(|report| &report.state);
        if self.postcopy.as_ref() != state {
            self.postcopy = state.cloned();
            if let Some(report) = &record.postcopy {
                self.say(&format!("post-copy: {}", follow::postcopy_text(report)));
            }
        }
    }

    /// Takes the bar away.
    pub(crate) fn end(&mut self) {
        if let Place::Bar(bar) = &self.place {
            bar.finish_and_clear();
        }
    }
}

impl Place {
    fn new(json: bool) -> Self {
        if json {
            return Self::Json { last: serde_json::Value::Null };
        }
        if !std::io::stderr().is_terminal() {
            return Self::Lines { last: None };
        }
        let style =
            ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(100).with_style(style.progress_chars("━━╌"));
        bar.enable_steady_tick(Duration::from_millis(TICK_MS));
        Self::Bar(bar)
    }

    /// An object for a program, if it is another one than the last.
    fn change(&mut self, record: &Migration, decision: Option<&Decision>) -> Result<(), Failure> {
        let change = serde_json::json!(Change {
            migration: record.id,
            vm: &record.vm_name,
            source: &record.source,
            destination: &record.destination,
            phase: record.phase,
            progress: record.progress.as_ref(),
            postcopy: record.postcopy.as_ref(),
            decision,
        });
        match self {
            Self::Json { last } if *last != change => {
                output::json(&change)?;
                *last = change;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn draw(&mut self, record: &Migration) {
        match self {
            Self::Json { .. } => {}
            Self::Bar(bar) => {
                bar.set_prefix(record.phase.as_str());
                bar.set_position(percent(record));
                bar.set_message(figures(record));
            }
            Self::Lines { last } => {
                let due = last.is_none_or(|(phase, at)| {
                    phase != record.phase || at.elapsed() > Duration::from_secs(LINE_SECONDS)
                });
                if due {
                    *last = Some((record.phase, Instant::now()));
                    let line = format!("{:<12} {}", record.phase.as_str(), figures(record));
                    output::note(line.trim_end());
                }
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

/// How much of the memory does not have to be sent any more.
fn percent(record: &Migration) -> u64 {
    match &record.progress {
        Some(figures) if figures.ram_total_bytes > 0 => {
            let rest = figures.ram_remaining_bytes.min(figures.ram_total_bytes);
            100 - rest.saturating_mul(100) / figures.ram_total_bytes
        }
        _ => 0,
    }
}

/// The pass, what is left of it, what the guest writes beside what is sent, and what is done about it.
fn figures(record: &Migration) -> String {
    let Some(figures) = record.progress.as_ref().filter(|figures| figures.ram_total_bytes > 0)
    else {
        return String::new();
    };
    let rate = words::bit_rate(figures.bits_per_s);
    let (pass, left) = (figures.passes, Bytes(figures.ram_remaining_bytes));
    let mut text = format!("pass {pass} · {left} left · {rate}");
    if figures.dirty_pages_per_s > 0 {
        let page_bytes = figures.page_size_bytes.unwrap_or(PAGE_BYTES);
        let bits_per_s = figures.dirty_pages_per_s.saturating_mul(page_bytes).saturating_mul(8);
        text.push_str(&format!(", guest writes {}", words::bit_rate(bits_per_s)));
    }
    if let Some(percent) = figures.throttle_percent.filter(|percent| *percent > 0) {
        text.push_str(&format!(" · throttled {percent} %"));
    }
    if let Some(ms) = figures.expected_downtime_ms.filter(|_| record.postcopy.is_none()) {
        text.push_str(&format!(" · pause {ms} ms expected"));
    }
    if let Some(asked) = figures.postcopy_requests.filter(|asked| *asked > 0) {
        text.push_str(&format!(" · {asked} pages asked for"));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn record(progress: &Figures) -> Migration {
        let vm = "7c9e6679-7425-40de-944b-e07fc1f90ae7";
        serde_json::from_value(json!({
            "id": vm, "vm": vm, "vm_name": "web01", "source": "host-a", "destination": "host-b", "epoch": 2,
            "memory_bytes": 1 << 30, "options": {}, "cancel_requested": false, "verdicts": [], "phases": [],
            "started": "2026-01-02T03:04:05Z", "phase": "precopy", "outcome": "running", "progress": progress,
        }))
        .unwrap()
    }

    #[test]
    fn figures_fit_a_line() {
        let some = Figures {
            ram_total_bytes: 1 << 30,
            ram_remaining_bytes: 256 << 20,
            passes: 2,
            bits_per_s: 940_000_000,
            dirty_pages_per_s: 2560,
            ..Figures::default()
        };
        assert_eq!(
            figures(&record(&some)),
            "pass 2 · 256.0 MiB left · 940 Mbit/s, guest writes 84 Mbit/s"
        );
        let more = Figures {
            throttle_percent: Some(20),
            expected_downtime_ms: Some(35),
            postcopy_requests: Some(7),
            ..some
        };
        assert!(
            figures(&record(&more))
                .ends_with(" · throttled 20 % · pause 35 ms expected · 7 pages asked for")
        );
        assert_eq!(figures(&record(&Figures::default())), "");
    }
}
