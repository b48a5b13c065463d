//! `whimbrel migration show`: one migration in full, forecast beside fact, and why it went the way it went.

use whimbrel_api::MigrationId;
use whimbrel_api::migration::{
    Forecast, Migration, MigrationState, MigrationStatistics, PhaseStart, PostcopyReport, Progress,
    Sample,
};
use whimbrel_api::vm::Bytes;
use whimbrel_migration::forecast::{Convergence, MARGIN_MAX_PERCENT, MARGIN_MIN_PERCENT};

use crate::command::Options;
use crate::failure::{Failure, verdict_lines};
use crate::output::Table;
use crate::{follow, output, words};

/// Characters of a plot on one line.
const PLOT_WIDTH: usize = 60;
const STEPS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Shows the record; with `--json` as the API has it.
pub(super) async fn show(options: &Options, id: MigrationId) -> Result<(), Failure> {
    let pool = options.pool()?;
    let record = pool.migration(id).await?;
    if options.json {
        return output::json(&record);
    }
    // The plot is an ornament: where its figures cannot be had, the rest is shown all the same.
    let statistics = pool.migration_statistics(id).await.unwrap_or_else(|error| {
        tracing::info!(%error, "no figures over time");
        MigrationStatistics::default()
    });
    text(&record, &statistics.samples).iter().try_for_each(|line| output::line(line))
}

/// Shows what QEMU said, and the samples.
pub(super) fn raw(options: &Options, statistics: &MigrationStatistics) -> Result<(), Failure> {
    if options.json {
        return output::json(statistics);
    }
    let text = serde_json::to_string_pretty(statistics)
        .map_err(|error| Failure::because("cannot write the answer as JSON", &error))?;
    text.lines().try_for_each(output::line)
}

/// All of it, by lines.
fn text(record: &Migration, samples: &[Sample]) -> Vec<String> {
    let mut lines = aligned(&head(record));
    lines.extend(section("forecast and fact", comparison(record)));
    lines.extend(section("pause", pause(record)));
    lines.extend(section("post-copy", record.postcopy.as_ref().map(postcopy).unwrap_or_default()));
    let decided = record.decisions.iter().map(ToString::to_string).collect();
    lines.extend(section("decisions", decided));
    lines.extend(section("phases", record.phases.iter().map(|p| phase(record, p)).collect()));
    let figures = record.progress.as_ref().map(figures).unwrap_or_default();
    lines.extend(section("figures", aligned(&figures)));
    lines.extend(section("over time", plots(samples)));
    lines.extend(section("left over", record.leftovers.clone()));
    lines.extend(section("preflight", record.verdicts.iter().flat_map(verdict_lines).collect()));
    lines
}

fn head(record: &Migration) -> Vec<(&'static str, String)> {
    let outcome = match &record.state {
        MigrationState::Running => format!("running, in {}", record.phase),
        _ => follow::outcome_sentence(record),
    };
    let mut fields = vec![
        ("migration", record.id.to_string()),
        ("vm", format!("{} ({})", record.vm_name, record.vm)),
        ("from", record.source.to_string()),
        ("to", record.destination.to_string()),
        ("epoch", record.epoch.to_string()),
        ("memory", Bytes(record.memory_bytes).to_string()),
        ("outcome", outcome),
        ("started", words::moment(record.started)),
        ("ended", words::or_dash(record.ended.map(words::moment))),
    ];
    if record.cancel_requested {
        fields.push(("cancel", "requested".to_owned()));
    }
    fields.extend(record.policy.as_ref().map(|policy| ("policy", policy.to_string())));
    fields.extend(record.strategy.as_ref().map(|strategy| ("way", strategy.to_string())));
    fields
}

/// Forecast and fact side by side; the fact alone where nothing was foretold.
fn comparison(record: &Migration) -> Vec<String> {
    let forecast = record.forecast.as_ref();
    let progress = record.progress.as_ref();
    let mut table = Table::new(&["", "FORECAST", "FACT"]);
    let mut row = |name: &str, foretold: Option<String>, fact: Option<String>| {
        if foretold.is_some() || fact.is_some() {
            table.row([name.to_owned(), words::or_dash(foretold), words::or_dash(fact)]);
        }
    };
    row("converges", forecast.map(converges), None);
    row(
        "total",
        forecast.and_then(|f| follow::arrival_ms(record, f)).map(words::duration),
        record.total_ms.map(|ms| words::duration(ms as f64)),
    );
    row(
        "downtime",
        forecast.and_then(|f| f.downtime_ms).map(words::duration),
        record.downtime.map(|downtime| words::duration(words::ms_of_us(downtime.total_us))),
    );
    let bytes = |bytes: u64| Bytes(bytes).to_string();
    row(
        "sent",
        forecast.and_then(|f| f.wire_bytes).map(bytes),
        progress.map(|p| bytes(p.transferred_bytes)),
    );
    row(
        "passes",
        forecast.and_then(|f| f.passes).map(|passes| passes.to_string()),
        progress.map(|p| p.passes.to_string()),
    );
    row(
        "rate",
        forecast.map(|f| words::bit_rate((f.wire_bytes_per_s * 8.0) as u64)),
        progress.map(|p| words::bit_rate(p.bits_per_s)),
    );
    row("held back by", forecast.map(|f| f.bottleneck.as_words().to_owned()), None);
    let throttled = forecast.map(|f| f.throttle_percent).filter(|percent| *percent > 0.0);
    let throttle = progress.and_then(|p| p.throttle_percent).filter(|percent| *percent > 0);
    row(
        "throttle",
        throttled.map(|percent| format!("{percent:.0} %")),
        throttle.map(|percent| format!("{percent} %")),
    );
    let lines = table.lines();
    if lines.len() > 1 { lines } else { Vec::new() }
}

/// Whether it converges, and how far that is from the limit. What is told as the farthest that is looked at may be farther.
pub(crate) fn converges(forecast: &Forecast) -> String {
    let word = match forecast.convergence {
        Convergence::Yes => "yes",
        Convergence::Marginal => "marginal",
        Convergence::No => "no",
    };
    match forecast.margin_percent {
        Some(margin) if margin >= MARGIN_MAX_PERCENT => format!("{word} (at least {margin:+.0} %)"),
        Some(margin) if margin <= MARGIN_MIN_PERCENT => format!("{word} ({margin:+.0} % or less)"),
        Some(margin) => format!("{word} ({margin:+.0} %)"),
        None => word.to_owned(),
    }
}

fn pause(record: &Migration) -> Vec<String> {
    let Some(downtime) = &record.downtime else { return Vec::new() };
    let total = words::duration(words::ms_of_us(downtime.total_us));
    vec![format!("{total} = {} (ms)", follow::downtime_parts(downtime))]
}

fn postcopy(report: &PostcopyReport) -> Vec<String> {
    let mut fields = vec![
        ("state", follow::postcopy_text(report)),
        ("since", words::moment(report.since)),
        ("begun", words::moment(report.begun)),
    ];
    let waited = report.vcpu_blocktime_ms.iter().enumerate();
    fields.extend(waited.map(|(vcpu, ms)| ("vcpu", format!("{vcpu} waited {ms} ms for pages"))));
    aligned(&fields)
}

fn phase(record: &Migration, start: &PhaseStart) -> String {
    let since = start.at.duration_since(record.started).as_millis();
    format!("{:<12} +{since} ms", start.phase.as_str())
}

/// QEMU's figures, those that it told.
fn figures(progress: &Progress) -> Vec<(&'static str, String)> {
    let bytes = |bytes: u64| Bytes(bytes).to_string();
    let ms = |ms: u64| words::duration(ms as f64);
    let count = |count: u64| count.to_string();
    let percent = |percent: u64| format!("{percent} %");
    let mut fields = vec![
        ("memory", bytes(progress.ram_total_bytes)),
        ("remaining", bytes(progress.ram_remaining_bytes)),
        ("normal pages", count(progress.normal_pages)),
        ("zero pages", count(progress.zero_pages)),
        ("dirty pages/s", count(progress.dirty_pages_per_s)),
    ];
    let told: [(&str, Option<String>); 17] = [
        ("pages/s", progress.pages_per_s.map(count)),
        ("page size", progress.page_size_bytes.map(bytes)),
        ("pre-copy", progress.precopy_bytes.map(bytes)),
        ("in the pause", progress.downtime_bytes.map(bytes)),
        ("post-copy", progress.postcopy_bytes.map(bytes)),
        ("pages asked", progress.postcopy_requests.map(count)),
        ("multifd", progress.multifd_bytes.map(bytes)),
        ("copied after all", progress.missed_zero_copy_passes.map(count)),
        ("throttle", progress.throttle_percent.map(percent)),
        ("expected pause", progress.expected_downtime_ms.map(ms)),
        ("pause aimed at", progress.aim_ms.map(ms)),
        ("QEMU's setup", progress.engine_setup_ms.map(ms)),
        ("QEMU's total", Some(ms(progress.engine_total_ms))),
        ("QEMU's downtime", progress.engine_downtime_ms.map(ms)),
        ("QEMU's state", progress.engine_status.clone()),
        ("destination's start", progress.destination_start_ms.map(ms)),
        ("dirty limit", progress.dirty_limit_round_us.map(|us| format!("{us} µs a round"))),
    ];
    fields.extend(told.into_iter().filter_map(|(name, value)| Some((name, value?))));
    if let Some(cache) = &progress.xbzrle {
        let text = format!(
            "{} in {} pages, {} cache, {:.0} % missed, {} overflows",
            bytes(cache.bytes),
            cache.pages,
            bytes(cache.cache_bytes),
            cache.cache_miss_rate * 100.0,
            cache.overflows
        );
        fields.push(("xbzrle", text));
    }
    fields
}

/// The rates over time, a line each, with their highest.
fn plots(samples: &[Sample]) -> Vec<String> {
    let Some(last) = samples.last().filter(|_| samples.len() > 1) else { return Vec::new() };
    let sent: Vec<u64> = samples.iter().map(|sample| sample.bits_per_s).collect();
    let dirtied: Vec<u64> =
        samples.iter().map(|sample| sample.dirty_bytes_per_s.saturating_mul(8)).collect();
    let throttled: Vec<u64> = samples.iter().map(|sample| sample.throttle_percent).collect();
    let most = |values: &[u64]| values.iter().copied().max().unwrap_or(0);
    // Side by side on one scale, so that they can be compared.
    let scale = most(&sent).max(most(&dirtied));
    let mut lines = vec![
        format!("sent      {}  up to {}", plot(&sent, scale), words::bit_rate(most(&sent))),
        format!("written   {}  up to {}", plot(&dirtied, scale), words::bit_rate(most(&dirtied))),
    ];
    if most(&throttled) > 0 {
        lines.push(format!("throttle  {}  up to {} %", plot(&throttled, 100), most(&throttled)));
    }
    lines.push(format!("in {}; --raw has the figures", words::duration(last.at_ms as f64)));
    lines
}

/// Values as bars, at most [`PLOT_WIDTH`]: each one the highest of those that fall on it.
fn plot(values: &[u64], scale: u64) -> String {
    let per_bar = values.len().div_ceil(PLOT_WIDTH).max(1);
    let bar = |chunk: &[u64]| {
        let value = chunk.iter().copied().max().unwrap_or(0);
        let step = (value as f64 / scale.max(1) as f64 * (STEPS.len() - 1) as f64).round();
        STEPS[(step as usize).min(STEPS.len() - 1)]
    };
    values.chunks(per_bar).map(bar).collect()
}

fn section(title: &str, lines: Vec<String>) -> Vec<String> {
    if lines.is_empty() {
        return lines;
    }
    let indented = lines.into_iter().map(|line| format!("  {line}").trim_end().to_owned());
    std::iter::once(format!("{title}:")).chain(indented).collect()
}

fn aligned(fields: &[(&'static str, String)]) -> Vec<String> {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    fields.iter().map(|(name, value)| format!("{name:width$}  {value}")).collect()
}

#[cfg(test)]
mod tests;
