//! What is told of a host, and that dashboard, alerts and words keep to it. No agent runs here.

use whimbrel_api::metrics::disagreements;
use whimbrel_api::migration::PostcopyReport;
use whimbrel_api::vm::VmState;
use whimbrel_api::{Epoch, MigrationId};

use super::*;

const DASHBOARD: &str = include_str!("../../../../docs/grafana/whimbrel.json");
const ALERTS: &str = include_str!("../../../../docs/prometheus/alerts.yml");

fn vm(name: &str, state: serde_json::Value) -> VmReport {
    let definition = serde_json::json!({
        "id": VmId::new(), "generation": 1, "name": name, "memory_bytes": 1 << 30, "vcpus": 1,
        "machine": "pc-q35-7.2", "cpu": "qemu64", "boot": {"firmware": "seabios"}, "disks": [], "nics": [],
    });
    serde_json::from_value(serde_json::json!({
        "definition": definition, "state": state["state"], "migration": state["migration"], "epoch": Epoch(1),
    }))
    .unwrap()
}

/// A host with one VM on its way in post-copy.
fn busy() -> Now {
    let migration = MigrationId::new();
    let moving = vm("web01", serde_json::json!({"state": "migrating", "migration": migration}));
    let at = jiff::Timestamp::UNIX_EPOCH;
    let postcopy = PostcopyReport {
        state: PostcopyState::Paused { why: "cut".to_owned(), by_hand: false },
        since: at,
        begun: at,
        recoveries: 3,
        blocktime_ms: None,
        vcpu_blocktime_ms: Vec::new(),
    };
    let progress = Progress {
        ram_remaining_bytes: 5,
        dirty_pages_per_s: 2,
        bits_per_s: 80,
        throttle_percent: Some(20),
        expected_downtime_ms: Some(300),
        ..Progress::default()
    };
    let report = OutgoingReport {
        phase: Phase::Postcopy,
        progress: Some(progress),
        postcopy: Some(postcopy),
        ..OutgoingReport::begun(migration, moving.definition.id)
    };
    let idle = vm("db", serde_json::json!({"state": "running"}));
    Now {
        vms: vec![moving, idle],
        engines: Some(2),
        incoming: 1,
        outgoing: vec![report],
        certificate_days_left: 200,
    }
}

fn text(now: &Now) -> String {
    told(now, &Metrics::default(), &write_seconds()).text()
}

#[track_caller]
fn has(text: &str, line: &str) {
    assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
}

#[test]
fn a_running_migration_has_its_figures_by_the_name_of_its_vm() {
    let text = text(&busy());
    has(&text, "whimbrel_agent_vms{state=\"running\"} 1.0");
    has(&text, "whimbrel_agent_vms{state=\"crashed\"} 0.0");
    has(&text, "whimbrel_agent_qemu_processes 2.0");
    has(&text, "whimbrel_agent_migrations_outgoing{phase=\"postcopy\"} 1.0");
    has(&text, "whimbrel_agent_migration_remaining_bytes{vm=\"web01\"} 5.0");
    has(&text, "whimbrel_agent_migration_dirty_bytes_per_second{vm=\"web01\"} 8192.0");
    has(&text, "whimbrel_agent_migration_link_bytes_per_second{vm=\"web01\"} 10.0");
    has(&text, "whimbrel_agent_migration_throttle_ratio{vm=\"web01\"} 0.2");
    has(&text, "whimbrel_agent_postcopy_state{vm=\"web01\",state=\"paused\"} 1.0");
    has(&text, "whimbrel_agent_postcopy_state{vm=\"web01\",state=\"active\"} 0.0");
    has(&text, "whimbrel_agent_postcopy_lost{vm=\"web01\"} 1.0");
    has(&text, "whimbrel_agent_postcopy_recoveries{vm=\"web01\"} 3.0");
}

#[test]
fn what_has_ended_has_no_series() {
    let mut now = busy();
    now.outgoing[0].end = OutgoingEnd::Moved;
    let text = text(&now);
    assert!(!text.contains("web01"), "{text}");
    has(&text, "whimbrel_agent_migrations_outgoing{phase=\"postcopy\"} 0.0");
}

#[test]
fn a_migration_without_an_answer_is_counted() {
    let mut now = busy();
    has(&text(&now), "whimbrel_agent_migrations_unresolved 0.0");
    now.outgoing[0].end = OutgoingEnd::Unresolved { ask: "host-b".parse().unwrap() };
    has(&text(&now), "whimbrel_agent_migrations_unresolved 1.0");
}

#[test]
fn a_ledger_that_does_not_answer_takes_only_its_own_figure_away() {
    let now = Now { engines: None, ..busy() };
    let text = text(&now);
    has(&text, "whimbrel_agent_ledger_answers 0.0");
    assert!(!text.contains("whimbrel_agent_qemu_processes"));
    has(&text, "whimbrel_agent_vms{state=\"running\"} 1.0");
}

#[test]
fn words_are_those_of_the_contract() {
    let text = text(&busy());
    for phase in Phase::ALL {
        assert!(text.contains(&format!("{{phase=\"{phase}\"}}")), "{phase}");
    }
    let paused = PostcopyState::Paused { why: String::new(), by_hand: true };
    let all = [PostcopyState::Active, paused, PostcopyState::Recovering, PostcopyState::Done];
    assert_eq!(all.map(|state| word(&state, "state")), POSTCOPY_STATES);
    let why = || "x".to_owned();
    let (migration, ask) = (MigrationId::new(), "b".parse().unwrap());
    let all = [
        VmState::Stopped,
        VmState::Running,
        VmState::Paused,
        VmState::Crashed { why: why() },
        VmState::Migrating { migration },
        VmState::Unresolved { migration, ask },
        VmState::Unknown { why: why() },
    ];
    assert_eq!(all.map(|state| state.word()), VM_STATES);
}

#[test]
fn dashboard_and_alerts_name_what_is_told() {
    let found = disagreements(&text(&busy()), "whimbrel_agent_", &[DASHBOARD, ALERTS]);
    assert_eq!(found, [""; 0]);
}
