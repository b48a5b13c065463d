//! What is written is there afterwards, and nothing else.

use whimbrel_api::Epoch;
use whimbrel_api::vm::Boot;
use whimbrel_migration::handoff::{Intent, Standing};

use super::*;

pub(crate) fn definition(id: VmId) -> VmDefinition {
    VmDefinition {
        id,
        generation: 1,
        name: "web01".parse().unwrap(),
        vcpus: 1,
        memory_bytes: 64 << 20,
        cpu: "qemu64".to_owned(),
        machine: "pc-q35-7.2".to_owned(),
        boot: Boot::default(),
        disks: Vec::new(),
        nics: Vec::new(),
        saved: None,
        origin: None,
        template: false,
        snapshots: Vec::new(),
        snapshot: None,
    }
}

fn open(dir: &Path) -> Ledger {
    Ledger::open(&dir.join("ledger.sqlite"), Failpoints::new(dir)).unwrap()
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let vm = VmId::new();
    let created = Ownership::created(vm, Intent::Run);
    let ledger = open(dir.path());
    ledger.create_vm(&definition(vm), &created).await.unwrap();
    ledger.set_running(&definition(vm), "r1").await.unwrap();
    drop(ledger);

    let ledger = open(dir.path());
    let rows = ledger.vms().await.unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].run.as_deref(), Some("r1"));
    assert_eq!(ledger.current(vm).await.unwrap(), Some(created));
    ledger.set_ended(vm, Some("killed".to_owned())).await.unwrap();
    assert_eq!(ledger.vms().await.unwrap()[0].crashed.as_deref(), Some("killed"));
}

#[tokio::test]
async fn the_highest_epoch_is_the_hosts_word_and_old_records_still_answer() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let (vm, migration) = (VmId::new(), MigrationId::new());
    let created = Ownership::created(vm, Intent::Run);
    let to: Name = "host-b".parse().unwrap();
    let record = |epoch, standing| Ownership {
        epoch: Epoch(epoch),
        migration: Some(migration),
        standing,
        ..created.clone()
    };
    ledger.persist(&created).await.unwrap();
    ledger.persist(&record(2, Standing::Leaving { to: to.clone() })).await.unwrap();
    ledger.persist(&record(2, Standing::Gone { to: to.clone() })).await.unwrap();
    let gone = record(2, Standing::Gone { to });
    assert_eq!(ledger.current(vm).await.unwrap(), Some(gone.clone()));
    assert_eq!(ledger.ownership(vm, None).await.unwrap(), Some(created));
    assert_eq!(ledger.ownership(vm, Some(migration)).await.unwrap(), Some(gone.clone()));
    ledger.persist(&Ownership::created(VmId::new(), Intent::Pause)).await.unwrap();
    let all = ledger.current_of_all().await.unwrap();
    assert_eq!(all.len(), 2);
    assert!(all.contains(&gone));
}

#[tokio::test]
async fn the_file_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    ledger.persist(&Ownership::created(VmId::new(), Intent::Run)).await.unwrap();
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{:?}", entry.file_name());
    }
}

#[tokio::test]
async fn a_failpoint_keeps_a_record_from_being_written() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let record = Ownership::created(VmId::new(), Intent::Run);
    std::fs::write(dir.path().join(failpoint::FILE), "ledger.persist=error").unwrap();
    let refused = ledger.persist(&record).await;
    assert!(matches!(refused, Err(LedgerError::Failpoint(_))), "{refused:?}");
    assert_eq!(ledger.current(record.vm).await.unwrap(), None);
    std::fs::remove_file(dir.path().join(failpoint::FILE)).unwrap();
    ledger.persist(&record).await.unwrap();
    assert_eq!(ledger.current(record.vm).await.unwrap(), Some(record));
}

#[tokio::test]
async fn the_journal_forgets_by_owner() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let tap = Resource::Tap { name: "wt0".to_owned(), run: "r1".to_owned() };
    let run = Resource::Run { name: "r2".to_owned() };
    ledger.journal("r1", &[tap.clone(), tap.clone()]).await.unwrap();
    ledger.journal("r2", std::slice::from_ref(&run)).await.unwrap();
    assert_eq!(
        ledger.journaled().await.unwrap(),
        [("r1".to_owned(), tap), ("r2".to_owned(), run.clone())]
    );
    ledger.unjournal("r1").await.unwrap();
    assert_eq!(ledger.journaled().await.unwrap(), [("r2".to_owned(), run)]);
}

#[tokio::test]
async fn migrations_are_kept_by_side() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let row = |side| MigrationRow {
        id: MigrationId::new(),
        side,
        vm: VmId::new(),
        request: serde_json::json!({"a": 1}),
        state: serde_json::json!("open"),
    };
    let (incoming, mut outgoing) = (row(Side::Incoming), row(Side::Outgoing));
    ledger.put_migration(&incoming).await.unwrap();
    ledger.put_migration(&outgoing).await.unwrap();
    outgoing.state = serde_json::json!("moved");
    ledger.put_migration(&outgoing).await.unwrap();
    assert_eq!(ledger.migrations(Side::Incoming).await.unwrap(), std::slice::from_ref(&incoming));
    assert_eq!(ledger.migrations(Side::Outgoing).await.unwrap(), [outgoing]);
    ledger.remove_migration(incoming.id, Side::Incoming).await.unwrap();
    assert!(ledger.migrations(Side::Incoming).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_newer_ledger_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.sqlite");
    drop(open(dir.path()));
    let connection = Connection::open(&path).unwrap();
    connection.pragma_update(None, "user_version", 99).unwrap();
    drop(connection);
    let refused = Ledger::open(&path, Failpoints::new(dir.path()));
    assert!(matches!(refused, Err(LedgerError::Newer { found: 99, .. })), "{refused:?}");
}
