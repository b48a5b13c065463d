//! The figures of a migration in words, each fact with its forecast beside it.

use whimbrel_api::Downtime;
use whimbrel_api::migration::{Forecast, Migration, PostcopyReport, PostcopyState};
use whimbrel_api::vm::Bytes;

use crate::words;

/// The figures of a migration, as far as there are any.
pub(crate) fn figures(record: &Migration) -> Vec<(&'static str, String)> {
    let mut figures = Vec::new();
    let foretold = record.forecast.as_ref();
    if let Some(total_ms) = record.total_ms {
        let forecast = foretold.and_then(|forecast| arrival_ms(record, forecast));
        figures
            .push(("total", beside(words::duration(total_ms as f64), forecast, words::duration)));
    }
    if let Some(downtime) = &record.downtime {
        let forecast = foretold.and_then(|forecast| forecast.downtime_ms);
        let total = words::duration(words::ms_of_us(downtime.total_us));
        let parts = format!(" ({})", downtime_parts(downtime));
        figures.push(("downtime", beside(total, forecast, words::duration) + &parts));
    }
    if let Some(progress) = &record.progress {
        let passes = if progress.passes == 1 { "pass" } else { "passes" };
        let bytes = Bytes(progress.transferred_bytes).to_string();
        let forecast = foretold.and_then(|forecast| forecast.wire_bytes).map(Bytes);
        let sent = format!(
            "{} in {} {passes}, at {}",
            beside(bytes, forecast, |bytes| bytes.to_string()),
            progress.passes,
            words::bit_rate(progress.bits_per_s)
        );
        figures.push(("sent", sent));
    }
    if let Some(strategy) = &record.strategy {
        figures.push(("way", strategy.to_string()));
    }
    if let Some(postcopy) = &record.postcopy {
        figures.push(("post-copy", postcopy_text(postcopy)));
    }
    figures.extend(record.leftovers.iter().map(|leftover| ("left over", leftover.clone())));
    figures
}

/// When the guest is foretold to run on the destination: in post-copy that is before its memory is there.
pub(crate) fn arrival_ms(record: &Migration, forecast: &Forecast) -> Option<f64> {
    let early = record.postcopy.as_ref().and(forecast.postcopy.as_ref());
    early.map(|postcopy| postcopy.runs_after_ms).or(forecast.total_ms)
}

fn beside<T>(fact: String, forecast: Option<T>, text: impl Fn(T) -> String) -> String {
    match forecast {
        Some(forecast) => format!("{fact} (forecast {})", text(forecast)),
        None => fact,
    }
}

/// A pause by its parts, in milliseconds.
pub(crate) fn downtime_parts(downtime: &Downtime) -> String {
    let parts = [
        ("last pass", downtime.stop_to_completed_us),
        ("loaded", downtime.loaded_confirm_us),
        ("release", downtime.release_us),
        ("go", downtime.go_us),
        ("rest", downtime.unnamed_us()),
    ];
    let named: Vec<String> = parts
        .iter()
        .filter(|(name, us)| *us > 0 || *name != "rest")
        .map(|(name, us)| format!("{name} {:.1}", words::ms_of_us(*us)))
        .collect();
    named.join(" + ")
}

/// How post-copy goes, or went.
pub(crate) fn postcopy_text(report: &PostcopyReport) -> String {
    let mut text = postcopy_state(&report.state);
    if report.recoveries > 0 {
        text.push_str(&format!(", {} × recovered", report.recoveries));
    }
    if let Some(blocked_ms) = report.blocktime_ms {
        text.push_str(&format!(", guest waited {}", words::duration(blocked_ms as f64)));
    }
    text
}

fn postcopy_state(state: &PostcopyState) -> String {
    match state {
        PostcopyState::Active => "active".to_owned(),
        PostcopyState::Paused { why, by_hand: false } => format!("paused, nothing is lost: {why}"),
        PostcopyState::Paused { why, by_hand: true } => {
            format!("paused by hand ({why}); `whimbrel migration resume` goes on")
        }
        PostcopyState::Recovering => "recovering".to_owned(),
        PostcopyState::Done => "done".to_owned(),
    }
}
