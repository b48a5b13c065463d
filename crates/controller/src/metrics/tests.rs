//! What is told of a pool, and that dashboard, alerts, manual and words keep to it. No controller runs here.

use whimbrel_api::metrics::disagreements;
use whimbrel_api::migration::{PostcopyReport, PostcopyState, Progress};
use whimbrel_migration::phase::Outcome;
use whimbrel_migration::preflight::Code;
use whimbrel_migration::strategy::{Rung, Strategy};

use super::*;

const DASHBOARD: &str = include_str!("../../../../docs/grafana/whimbrel.json");
const ALERTS: &str = include_str!("../../../../docs/prometheus/alerts.yml");

fn record(state: MigrationState) -> Migration {
    let at = jiff::Timestamp::UNIX_EPOCH;
    let bare = serde_json::json!({
        "id": whimbrel_api::MigrationId::new(), "vm": whimbrel_api::VmId::new(), "vm_name": "web01",
        "source": "host-a", "destination": "host-b", "epoch": 2, "memory_bytes": 1 << 30, "options": {},
        "phase": "retirement", "outcome": "running", "cancel_requested": false, "verdicts": [], "phases": [],
        "policy": "no-postcopy", "started": at, "total_ms": 1500,
    });
    let progress =
        Progress { engine_total_ms: 1300, transferred_bytes: 1 << 29, ..Progress::default() };
    let downtime = Downtime {
        stop_to_completed_us: 5_000,
        go_us: 2_000,
        total_us: 8_000,
        ..Downtime::default()
    };
    let postcopy = PostcopyReport {
        state: PostcopyState::Done,
        since: at,
        begun: at,
        recoveries: 2,
        blocktime_ms: Some(250),
        vcpu_blocktime_ms: Vec::new(),
    };
    Migration {
        state,
        strategy: Some(Strategy { rung: Rung::Postcopy, ..Strategy::plain(300) }),
        progress: Some(progress),
        downtime: Some(downtime),
        postcopy: Some(postcopy),
        ..serde_json::from_value(bare).unwrap()
    }
}

fn failed() -> Stay {
    Stay::Failed { phase: Phase::Precopy, code: "engine".to_owned(), message: "x".to_owned() }
}

/// Everything that can be counted has been.
fn busy() -> (Now, Metrics) {
    let metrics = Metrics::default();
    metrics.begun();
    let verdict = |severity| Verdict {
        code: Code::ALL[0],
        severity,
        problem: String::new(),
        advice: String::new(),
    };
    metrics.refused(&[verdict(Severity::Refuse), verdict(Severity::Warn)]);
    metrics.ended(&record(MigrationState::Moved));
    metrics.ended(&record(MigrationState::Stayed { why: failed() }));
    let host = Host {
        name: "host-a".parse().unwrap(),
        address: "a:1".to_owned(),
        enabled: true,
        contact: Contact::Joining,
        facts: None,
    };
    let ask = "host-b".parse().unwrap();
    let now = Now {
        hosts: vec![host],
        active: vec![record(MigrationState::Running), record(MigrationState::Unresolved { ask })],
        unswept: 4,
        certificate_days_left: 300,
        ..Now::default()
    };
    (now, metrics)
}

fn text() -> String {
    let (now, metrics) = busy();
    told(&now, &metrics).text()
}

#[track_caller]
fn has(text: &str, line: &str) {
    assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
}

#[test]
fn an_end_is_counted_by_its_labels() {
    let text = text();
    for outcome in OUTCOMES {
        let of = |label: &str| format!("{{outcome=\"{outcome}\",{label}}} 1");
        let ended = "whimbrel_controller_migrations_ended_total";
        has(&text, &format!("{ended}{}", of("rung=\"postcopy\"")));
        let by_policy = "whimbrel_controller_migrations_by_policy_total";
        has(&text, &format!("{by_policy}{}", of("policy=\"no-postcopy\"")));
    }
    let stayed = "whimbrel_controller_migrations_stayed_total";
    has(&text, &format!("{stayed}{{cause=\"failed\",phase=\"precopy\"}} 1"));
    let one = "{rung=\"postcopy\"}";
    has(&text, &format!("whimbrel_controller_migration_seconds_sum{one} 1.5"));
    has(&text, &format!("whimbrel_controller_migration_added_seconds_sum{one} 0.2"));
    has(&text, &format!("whimbrel_controller_migration_downtime_seconds_sum{one} 0.008"));
    has(&text, &format!("whimbrel_controller_migration_sent_bytes_sum{one} 536870912.0"));
    let part = "whimbrel_controller_migration_downtime_part_seconds_total";
    has(&text, &format!("{part}{{part=\"unnamed\"}} 0.001"));
    has(&text, "whimbrel_controller_postcopy_recoveries_total 4");
    has(&text, "whimbrel_controller_postcopy_blocked_seconds_total 0.5");
    let refused = "whimbrel_controller_migrations_refused_total";
    has(&text, &format!("{refused}{{verdict=\"{}\"}} 1", Code::ALL[0]));
}

#[test]
fn what_is_active_runs_or_is_unresolved() {
    let text = text();
    has(&text, "whimbrel_controller_migrations_running{phase=\"retirement\"} 1.0");
    has(&text, "whimbrel_controller_migrations_unresolved 1.0");
    has(&text, "whimbrel_controller_migrations_unswept 4.0");
    has(&text, "whimbrel_controller_host_reachable{host=\"host-a\"} 0.0");
}

#[test]
fn words_are_those_of_the_rules() {
    let text = text();
    for phase in Phase::ALL {
        assert!(text.contains(&format!("running{{phase=\"{phase}\"}}")), "{phase}");
    }
    let outcomes = [Outcome::Moved, Outcome::Stayed { why: String::new() }];
    assert_eq!(outcomes.map(|outcome| word(&outcome, "outcome")), OUTCOMES);
    let at = jiff::Timestamp::UNIX_EPOCH;
    let contacts = [
        Contact::Joining,
        Contact::Ready { seen: at },
        Contact::Unreachable { since: at, why: String::new() },
    ];
    assert_eq!(contacts.map(|contact| word(&contact, "state")), CONTACTS);
    let whys = [
        Stay::Cancelled,
        failed(),
        Stay::DestinationRefused { message: String::new() },
        Stay::GuestPoweredOff,
        Stay::Reclaimed { statement: whimbrel_api::migration::Statement::HostIsFenced },
    ];
    assert_eq!(whys.map(|why| word(&why, "cause")), CAUSES);
    for rung in Rung::ALL {
        let rung = serde_json::to_value(rung).unwrap();
        assert!(text.contains(&format!("seconds_count{{rung={rung}}}")), "{rung}");
    }
    // The parts of a pause are the record's fields.
    let fields = serde_json::to_value(Downtime::default()).unwrap();
    for (part, _) in parts(&Downtime::default()).iter().filter(|(part, _)| *part != "unnamed") {
        assert!(fields.get(format!("{part}_us")).is_some(), "{part}");
    }
}

#[test]
fn dashboard_and_alerts_name_what_is_told() {
    let found = disagreements(&text(), "whimbrel_controller_", &[DASHBOARD, ALERTS]);
    assert_eq!(found, [""; 0]);
    // Nothing else may begin so: such a word would be misspelt.
    for page in [DASHBOARD, ALERTS] {
        let words = page.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        for word in words.filter(|word| word.starts_with("whimbrel_")) {
            let told = ["whimbrel_agent_", "whimbrel_controller_"];
            assert!(told.iter().any(|prefix| word.starts_with(prefix)), "{word}");
        }
    }
}

#[test]
fn the_dashboard_can_be_imported() {
    let dashboard: serde_json::Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut ids: Vec<u64> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), panels.len(), "each panel has an id of its own");
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{}", panel["title"]);
        for target in targets {
            let asked = target["expr"].as_str().unwrap();
            assert_eq!(asked.matches('(').count(), asked.matches(')').count(), "{asked}");
        }
    }
}

#[test]
fn what_can_be_counted_begins_with_zero() {
    let metrics = Metrics::default();
    metrics.prepare_policies(["balanced".to_owned()]);
    let text = told(&Now::default(), &metrics).text();
    has(&text, "whimbrel_controller_migrations_ended_total{outcome=\"moved\",rung=\"plain\"} 0");
    let by_policy = "whimbrel_controller_migrations_by_policy_total";
    has(&text, &format!("{by_policy}{{outcome=\"stayed\",policy=\"balanced\"}} 0"));
    let stayed = "whimbrel_controller_migrations_stayed_total";
    has(&text, &format!("{stayed}{{cause=\"failed\",phase=\"precopy\"}} 0"));
    has(&text, "whimbrel_controller_migration_downtime_seconds_count{rung=\"static\"} 0");
}

#[test]
fn the_manual_has_every_alert() {
    let manual = include_str!("../../../../docs/operating.md");
    let (_, section) = manual.split_once("\n## Metrics\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let names = section.split('`').filter(|word| word.starts_with("Whimbrel"));
    let told: std::collections::BTreeSet<&str> = names.collect();
    let alerts = ALERTS.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    assert_eq!(alerts.collect::<std::collections::BTreeSet<_>>(), told);
}
