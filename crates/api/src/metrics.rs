//! Metrics, as agent and controller tell them at `GET /metrics`: OpenMetrics text, for Prometheus.
//!
//! ```text
//!   kept since the start (counters, histograms) ──┐
//!   as it is now (gauges, read when asked) ───────┴──▶ Scrape ──▶ text
//! ```
//!
//! A gauge lives for one scrape, so that what is over is not told any more, and a VM has a series only as long as it moves. No
//! label is a migration's id: ids never end. Which metrics there are the two processes say, each in its `metrics` module; and
//! who may read them is the matter of their doors.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU64;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric, Registry};
use serde::Serialize;

/// OpenMetrics, as Prometheus asks for it.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The labels of a series: names and values.
pub type Labels<const N: usize> = [(&'static str, String); N];

/// What is told at one scrape.
#[derive(Debug, Default)]
pub struct Scrape {
    registry: Registry,
}

impl Scrape {
    /// A scrape that begins with the process itself: its version and its memory. `process` is `agent` or `controller`.
    #[must_use]
    pub fn of(process: &str) -> Self {
        let mut scrape = Self::default();
        let version = [("version", env!("CARGO_PKG_VERSION").to_owned())];
        let name = format!("whimbrel_{process}_build_info");
        scrape.gauges(&name, "1, with the version", [(version, 1.0)]);
        if let Some(bytes) = resident_bytes() {
            let name = format!("whimbrel_{process}_resident_bytes");
            scrape.gauge(&name, "Memory that the process has", bytes as f64);
        }
        scrape
    }

    /// Adds a figure as it is now.
    pub fn gauge(&mut self, name: &str, help: &str, value: f64) {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(value);
        self.registry.register(name, help, gauge);
    }

    /// Adds figures as they are now, with their labels.
    pub fn gauges<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<N>, f64)>,
    ) {
        let family = Family::<Labels<N>, Gauge<f64, AtomicU64>>::default();
        for (labels, value) in values {
            family.get_or_create(&labels).set(value);
        }
        self.registry.register(name, help, family);
    }

    /// Adds what is kept since the process began: a clone that shares its figures.
    pub fn kept(&mut self, name: &str, help: &str, metric: impl Metric) {
        self.registry.register(name, help, metric);
    }

    /// The text.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

impl IntoResponse for Scrape {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, CONTENT_TYPE)], self.text()).into_response()
    }
}

/// How often each word occurs; those of `known` also where they do not, so that a series is there before it is needed.
#[must_use]
pub fn counted(known: &[&str], found: impl IntoIterator<Item = String>) -> BTreeMap<String, f64> {
    let mut counts: BTreeMap<String, f64> =
        known.iter().map(|word| ((*word).to_owned(), 0.0)).collect();
    for word in found {
        *counts.entry(word).or_default() += 1.0;
    }
    counts
}

/// The word of a value, as in JSON: the value itself, or what stands under `tag` where it carries data.
#[must_use]
pub fn word(value: &impl Serialize, tag: &str) -> String {
    let json = serde_json::to_value(value).unwrap_or_default();
    let found = json.get(tag).unwrap_or(&json);
    found.as_str().unwrap_or("unknown").to_owned()
}

/// Memory that this process has, in bytes.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// Holds pages that name metrics (a dashboard, alerts) to what is told: for tests.
///
/// Answers with every word of the pages that begins with `prefix` and is no series of `scraped`, and with every metric of
/// `scraped` of that prefix that no page names.
#[must_use]
pub fn disagreements(scraped: &str, prefix: &str, pages: &[&str]) -> Vec<String> {
    let told = series(scraped);
    let named: BTreeSet<&str> = pages.iter().flat_map(|page| words(page, prefix)).collect();
    let of_metric = |name: &str| told.values().any(|series| series.iter().any(|one| one == name));
    let misspelt = named.iter().filter(|name| !of_metric(name));
    let unused = told.iter().filter(|(metric, series)| {
        metric.starts_with(prefix) && !series.iter().any(|one| named.contains(one.as_str()))
    });
    let mut found: Vec<String> = misspelt.map(|name| format!("{name} is not told")).collect();
    found.extend(unused.map(|(metric, _)| format!("{metric} is on no page")));
    found
}

/// Each metric of a scrape with the names under which its series are asked for.
fn series(scraped: &str) -> BTreeMap<&str, Vec<String>> {
    let types = scraped.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let of_type = |(name, kind)| {
        let suffixes: &[&str] = match kind {
            "counter" => &["_total"],
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        (name, suffixes.iter().map(|suffix| format!("{name}{suffix}")).collect())
    };
    types.map(of_type).collect()
}

/// The words of a text that begin with `prefix`.
fn words<'a>(text: &'a str, prefix: &'a str) -> impl Iterator<Item = &'a str> {
    let all = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    all.filter(move |word| word.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;
    use prometheus_client::metrics::histogram::Histogram;

    use super::*;

    fn scrape() -> Scrape {
        let mut scrape = Scrape::of("agent");
        scrape.kept("whimbrel_agent_a", "A", Counter::<u64>::default());
        scrape.kept("whimbrel_agent_b", "B", Histogram::new([1.0]));
        scrape.gauges("whimbrel_agent_c", "C", [([("state", "quo\"te".to_owned())], 1.5)]);
        scrape
    }

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let text = scrape().text();
        assert!(text.ends_with("# EOF\n"), "{text}");
        assert!(text.contains("# TYPE whimbrel_agent_a counter\nwhimbrel_agent_a_total 0\n"));
        assert!(text.contains("whimbrel_agent_c{state=\"quo\\\"te\"} 1.5\n"), "{text}");
        let resident = text.lines().find_map(|l| l.strip_prefix("whimbrel_agent_resident_bytes "));
        assert!(resident.unwrap().parse::<f64>().unwrap() > 1e6);
    }

    #[test]
    fn pages_are_held_to_what_is_told() {
        let text = scrape().text();
        let good = "whimbrel_agent_a_total whimbrel_agent_b_bucket{} (whimbrel_agent_c) \
                    whimbrel_agent_build_info whimbrel_agent_resident_bytes";
        assert_eq!(disagreements(&text, "whimbrel_agent_", &[good]), [""; 0]);
        let spoilt = good.replace("agent_a_total", "agent_a");
        let expected = ["whimbrel_agent_a is not told", "whimbrel_agent_a is on no page"];
        assert_eq!(disagreements(&text, "whimbrel_agent_", &[&spoilt]), expected);
    }

    #[test]
    fn words_are_those_of_json() {
        use crate::vm::VmState;
        assert_eq!(word(&crate::Phase::Precopy, ""), "precopy");
        assert_eq!(word(&VmState::Crashed { why: "x".to_owned() }, "state"), "crashed");
        let counts = counted(&["a", "b"], ["b".to_owned(), "c".to_owned()]);
        assert_eq!(counts.into_values().collect::<Vec<_>>(), [0.0, 1.0, 1.0]);
    }
}
