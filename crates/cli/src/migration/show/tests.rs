//! What `migration show` writes, of a full record and of an empty one.

use serde_json::{Value, json};

use super::*;

fn record(more: &Value) -> Migration {
    let vm = "7c9e6679-7425-40de-944b-e07fc1f90ae7";
    let mut record = json!({
        "id": "01890a5d-ac96-774b-bcce-b302099a8057", "vm": vm, "vm_name": "web01", "source": "host-a",
        "destination": "host-b", "epoch": 2, "memory_bytes": 1 << 30, "options": {}, "cancel_requested": false,
        "verdicts": [], "phases": [], "started": "2026-01-02T03:04:05Z", "phase": "preflight", "outcome": "running",
    });
    for (name, value) in more.as_object().unwrap() {
        record[name] = value.clone();
    }
    serde_json::from_value(record).unwrap()
}

fn full() -> Migration {
    record(&json!({
        "phase": "retirement", "outcome": "moved", "policy": "minimal-downtime", "total_ms": 9_050,
        "ended": "2026-01-02T03:04:15Z",
        "strategy": {
            "rung": "postcopy", "max_downtime_ms": 100, "stop_first": false, "tls": true, "zerocopy": false,
            "postcopy": {"begin": "when-stalled", "preempt": true},
        },
        "forecast": {
            "convergence": "no", "margin_percent": -48.5, "total_ms": 12_300.0, "downtime_ms": 35.5,
            "wire_bytes": 1_300_000_000, "passes": 1, "first_pass_ms": 8_900.0, "wire_bytes_per_s": 117_000_000.0,
            "bottleneck": "link", "throttle_percent": 0.0,
            "postcopy": {
                "runs_after_ms": 9_200.0, "missing_bytes": 300_000_000, "lasts_ms": 2_600.0, "faults": 1200,
                "stall_us": 700.0, "stalls_ms": 840.0,
            },
        },
        "decisions": [
            {"measured": "it dirties 250 MB/s, the link takes 117 MB/s", "chosen": "post-copy in reserve",
             "rejected": [{"what": "plain", "why": "does not converge"}]},
            {"measured": "3 passes without getting smaller", "chosen": "post-copy"},
        ],
        "postcopy": {
            "state": "done", "since": "2026-01-02T03:04:15Z", "begun": "2026-01-02T03:04:14Z", "recoveries": 2,
            "blocktime_ms": 820, "vcpu_blocktime_ms": [900, 840],
        },
        "phases": [
            {"phase": "admission", "at": "2026-01-02T03:04:05Z"},
            {"phase": "precopy", "at": "2026-01-02T03:04:05.400Z"},
        ],
        "progress": {
            "ram_total_bytes": 1 << 30, "ram_remaining_bytes": 0, "transferred_bytes": 1_310_000_000,
            "zero_pages": 7, "normal_pages": 300_000, "passes": 3, "dirty_pages_per_s": 61_000,
            "bits_per_s": 940_000_000, "engine_total_ms": 11_900, "engine_downtime_ms": 31,
            "postcopy_requests": 1187, "throttle_percent": 0, "engine_status": "completed",
            "xbzrle": {"cache_bytes": 67_108_864, "bytes": 1_048_576, "pages": 300, "cache_misses": 20,
                       "cache_miss_rate": 0.25, "encoding_rate": 3.5, "overflows": 4},
        },
        "downtime": {
            "stop_to_completed_us": 7200, "loaded_confirm_us": 600, "release_us": 1400, "go_us": 2600, "total_us": 11_900,
        },
        "leftovers": ["host-a: its QEMU"],
        "verdicts": [{"code": "postcopy-risk", "severity": "warn", "problem": "P.", "advice": "A."}],
    }))
}

fn samples() -> Vec<Sample> {
    let sample = |at: u64| Sample {
        at_ms: at * 100,
        phase: whimbrel_api::Phase::Precopy,
        pass: 1,
        transferred_bytes: at * 1_000,
        remaining_bytes: 0,
        bits_per_s: if at < 10 { at * 94_000_000 } else { 940_000_000 },
        dirty_bytes_per_s: 58_750_000,
        throttle_percent: at / 4,
    };
    (0..130).map(sample).collect()
}

#[test]
fn all_of_a_migration_is_shown() {
    insta::assert_snapshot!("full", text(&full(), &samples()).join("\n"));
}

#[test]
fn of_one_that_has_just_begun_little_is_shown() {
    insta::assert_snapshot!("begun", text(&record(&json!({})), &[]).join("\n"));
}

#[test]
fn a_paused_post_copy_says_what_to_do() {
    let paused = |by_hand: bool| {
        let mut record = full();
        let report = record.postcopy.as_mut().unwrap();
        let why = "the connection is lost".to_owned();
        report.state = whimbrel_api::migration::PostcopyState::Paused { why, by_hand };
        text(&record, &[]).join("\n")
    };
    assert!(paused(false).contains("paused, nothing is lost: the connection is lost"));
    assert!(paused(true).contains("whimbrel migration resume"));
}

#[test]
fn plots_have_a_bound_and_stand_still_at_nothing() {
    assert_eq!(plot(&[0, 0], 0), "▁▁");
    assert_eq!(plot(&[0, 50, 100], 100), "▁▅█");
    assert_eq!(plot(&[u64::MAX; 600], u64::MAX).chars().count(), PLOT_WIDTH);
    assert_eq!(plots(&samples()[..1]), [""; 0]);
}

#[test]
fn a_margin_that_was_not_looked_at_further_is_told_as_a_bound() {
    let told = |convergence: &str, margin: Option<f64>| {
        let mut forecast = full().forecast.unwrap();
        forecast.convergence = serde_json::from_value(json!(convergence)).unwrap();
        forecast.margin_percent = margin;
        converges(&forecast)
    };
    assert_eq!(told("yes", Some(899.4)), "yes (+899 %)");
    assert_eq!(told("yes", Some(MARGIN_MAX_PERCENT)), "yes (at least +900 %)");
    assert_eq!(told("no", Some(-98.2)), "no (-98 %)");
    assert_eq!(told("no", Some(MARGIN_MIN_PERCENT)), "no (-99 % or less)");
    assert_eq!(told("no", Some(-99.0)), "no (-99 % or less)");
    assert_eq!(told("no", None), "no");
}
