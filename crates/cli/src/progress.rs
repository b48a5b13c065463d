//! How far a migration is: a bar where standard error is a terminal, else a line now and then; with `--json` an object a
//! change on standard output.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use whimbrel_api::migration::{Migration, MigrationState, Progress as Figures};
use whimbrel_api::vm::Bytes;
use whimbrel_api::{MigrationId, Name, Phase};

use crate::failure::Failure;
use crate::{output, words};

/// Pause between two lines of one phase, in seconds.
const LINE_SECONDS: u64 = 2;
/// QEMU counts in pages of x86, in bytes.
const PAGE_BYTES: u64 = 4096;
/// The bar is drawn anew this often while nothing changes, in milliseconds.
const TICK_MS: u64 = 100;
const BAR: &str = "{spinner} {prefix:<12} {bar:30} {percent:>3}%  {msg}";

/// Shows one migration.
pub(crate) enum Progress {
    /// Objects for a program; the last one, since not every change is one of what is shown.
    Json { last: serde_json::Value },
    /// A bar for a person.
    Bar(ProgressBar),
    /// Lines for a log.
    Lines { last: Option<(Phase, Instant)> },
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
}

impl Progress {
    /// What fits the place where it is shown.
    pub(crate) fn new(json: bool) -> Self {
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

    /// Shows how far it is. Ended ones are shown by whoever says how they ended.
    pub(crate) fn show(&mut self, record: &Migration) -> Result<(), Failure> {
        if record.state != MigrationState::Running {
            return Ok(());
        }
        match self {
            Self::Json { last } => {
                let change = serde_json::json!(Change {
                    migration: record.id,
                    vm: &record.vm_name,
                    source: &record.source,
                    destination: &record.destination,
                    phase: record.phase,
                    progress: record.progress.as_ref(),
                });
                if *last != change {
                    output::json(&change)?;
                    *last = change;
                }
            }
            Self::Bar(bar) => {
                bar.set_prefix(record.phase.as_str());
                bar.set_position(percent(record));
                bar.set_message(record.progress.as_ref().map(figures).unwrap_or_default());
            }
            Self::Lines { last } => {
                let due = last.is_none_or(|(phase, at)| {
                    phase != record.phase || at.elapsed() > Duration::from_secs(LINE_SECONDS)
                });
                if due {
                    *last = Some((record.phase, Instant::now()));
                    let figures = record.progress.as_ref().map(figures).unwrap_or_default();
                    output::note(format!("{:<12} {figures}", record.phase.as_str()).trim_end());
                }
            }
        }
        Ok(())
    }

    /// A word between, which no bar overwrites.
    pub(crate) fn say(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.suspend(|| output::note(text)),
            _ => output::note(text),
        }
    }

    /// Takes the bar away.
    pub(crate) fn end(&mut self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
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

fn figures(figures: &Figures) -> String {
    if figures.ram_total_bytes == 0 {
        return String::new();
    }
    let mut text = format!(
        "pass {} · {} left · {}",
        figures.passes,
        Bytes(figures.ram_remaining_bytes),
        words::bit_rate(figures.bits_per_s)
    );
    if figures.dirty_pages_per_s > 0 {
        let dirtied = Bytes(figures.dirty_pages_per_s.saturating_mul(PAGE_BYTES));
        text.push_str(&format!(" · guest writes {dirtied}/s"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

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
            figures(&some),
            "pass 2 · 256.0 MiB left · 940 Mbit/s · guest writes 10.0 MiB/s"
        );
        assert_eq!(figures(&Figures::default()), "");
    }
}
