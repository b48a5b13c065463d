//! A plan in words: a good destination, a doubtful one, one that would refuse, and one that is away.

use serde_json::{Value, json};

use super::*;

fn forecast(convergence: &str, margin: Option<f64>, ends: bool) -> Value {
    let mut forecast = json!({
        "convergence": convergence, "first_pass_ms": 8_900.0, "wire_bytes_per_s": 117_000_000.0, "bottleneck": "link",
        "throttle_percent": 0.0,
    });
    if let Some(margin) = margin {
        forecast["margin_percent"] = json!(margin);
    }
    if ends {
        forecast["total_ms"] = json!(9_300.0);
        forecast["downtime_ms"] = json!(24.5);
        forecast["wire_bytes"] = json!(1_100_000_000);
    }
    forecast
}

fn strategy() -> Value {
    json!({"rung": "plain", "max_downtime_ms": 300, "stop_first": false, "tls": true, "zerocopy": false})
}

fn stopping() -> Value {
    let mut stopping = strategy();
    stopping["rung"] = json!("static");
    stopping["stop_first"] = json!(true);
    stopping
}

fn measurements() -> Value {
    json!({
        "memory_bytes": 1 << 30,
        "census": {"sampled_pages": 4000, "zero_pages": 1000, "duplicate_pages": 40, "compression": [
            {"method": "zstd", "level": 1, "ratio": 0.42, "compress_ns_per_byte": 2.0, "decompress_ns_per_byte": 0.7}]},
        "dirty": {"windows": [{"window_ms": 250, "dirtied_bytes": 5_242_880}, {"window_ms": 2000, "dirtied_bytes": 20_971_520}],
                  "vcpu_busy_share": 0.4},
        "link": {"bytes_per_s": 117_000_000, "rtt_us": 350},
        "source_cpu": {"spare_cores": 1.5, "cores": 2}, "destination_cpu": {"spare_cores": 7.9, "cores": 8},
    })
}

fn plan() -> VmPlan {
    let decision = json!({"measured": "it writes 10 MB/s, the link takes 117 MB/s", "chosen": "a single stream",
                          "rejected": [{"what": "compression", "why": "5 % shorter"}]});
    serde_json::from_value(json!({
        "vm": "7c9e6679-7425-40de-944b-e07fc1f90ae7", "vm_name": "web01", "source": "host-a",
        "policy": {"policy": "balanced", "origin": "pool"},
        "destinations": [
            {"destination": "host-b", "verdicts": [], "refused": false, "strategy": strategy(), "decisions": [decision],
             "forecast": forecast("yes", Some(900.0), true), "plain": forecast("yes", Some(900.0), true), "will_do": true,
             "candidates": [
                 {"strategy": strategy(), "forecast": forecast("yes", Some(900.0), true), "allowed": true},
                 {"strategy": stopping(), "forecast": forecast("yes", None, true), "allowed": false}],
             "measurements": measurements(),
             "measured": [{"what": "link", "age_ms": 42_000}, {"what": "census", "age_ms": 10},
                          {"what": "destination-cpu", "trouble": "host-b is busy"}]},
            {"destination": "host-c", "verdicts": [{"code": "engine-older", "severity": "warn", "problem": "P.", "advice": "A."}],
             "refused": false, "strategy": strategy(), "decisions": [decision], "will_do": false,
             "forecast": forecast("no", Some(-40.0), false), "plain": forecast("no", Some(-60.0), false)},
            {"destination": "host-d", "refused": true, "verdicts": [
                {"code": "engine-older", "severity": "warn", "problem": "P.", "advice": "A."},
                {"code": "memory", "severity": "refuse", "problem": "Too little.", "advice": "More."}]},
            {"destination": "host-e", "refused": false, "verdicts": [], "trouble": "host-e does not answer"},
        ],
    }))
    .unwrap()
}

#[test]
fn a_plan_reads_as_a_table_with_reasons() {
    insta::assert_snapshot!("plan", text(&plan()).join("\n"));
}

#[test]
fn it_is_a_refusal_where_nothing_can_be_begun() {
    assert_eq!(judge(&plan(), false), Ok(()));
    let mut hopeless = plan();
    hopeless.destinations.drain(..2);
    assert_eq!(judge(&hopeless, false).unwrap_err().exit, crate::failure::Exit::Refused);
    assert!(judge(&hopeless, true).is_ok(), "a program reads the plan itself");
    hopeless.destinations.clear();
    assert_eq!(judge(&hopeless, false), Ok(()));
    assert_eq!(text(&hopeless).last().unwrap(), "there is no other host in the pool");
}
