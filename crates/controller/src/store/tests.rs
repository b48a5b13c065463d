//! The rules that the records keep by themselves.

use jiff::{SignedDuration, Timestamp};
use whimbrel_api::migration::{MigrateOptions, Migration, MigrationState, Stay};
use whimbrel_api::vm::{VmDefinition, VmSpec};
use whimbrel_api::{Epoch, MigrationId, Name, Phase, VmId};
use whimbrel_pki::token::Secret;

use super::*;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn definition(id: VmId, vm: &str) -> VmDefinition {
    VmDefinition {
        id,
        generation: 1,
        name: name(vm),
        vcpus: 1,
        memory_bytes: 1 << 30,
        cpu: "qemu64".into(),
        machine: "pc-q35-7.2".into(),
        boot: Default::default(),
        disks: vec![],
        nics: vec![],
        saved: None,
        origin: None,
        template: false,
        snapshots: Vec::new(),
        snapshot: None,
    }
}

fn row(vm: &str) -> VmRow {
    let spec: VmSpec =
        serde_json::from_value(serde_json::json!({"name": vm, "memory": 1 << 30})).unwrap();
    VmRow {
        host: name("host-a"),
        epoch: Epoch::FIRST,
        confirmed: true,
        spec,
        definition: definition(VmId::new(), vm),
    }
}

fn migration(vm: VmId, destination: &str) -> Migration {
    Migration {
        id: MigrationId::new(),
        vm,
        vm_name: name("web01"),
        source: name("host-a"),
        destination: name(destination),
        epoch: Epoch(2),
        memory_bytes: 1 << 30,
        options: MigrateOptions::default(),
        phase: Phase::Admission,
        state: MigrationState::Running,
        settled: None,
        cancel_requested: false,
        reclaim: None,
        verdicts: vec![],
        disks: vec![],
        policy: None,
        strategy: None,
        forecast: None,
        decisions: vec![],
        postcopy: None,
        phases: vec![],
        progress: None,
        downtime: None,
        started: Timestamp::now(),
        ended: None,
        total_ms: None,
        leftovers: vec![],
    }
}

#[tokio::test]
async fn a_vm_has_one_active_migration() {
    let store = Store::in_memory();
    let vm = VmId::new();
    let first = migration(vm, "host-b");
    assert_eq!(store.begin_migration(&first).await.unwrap(), Begun::New);
    let mut later = first.clone();
    later.phase = Phase::Precopy;
    store.save_migration(&later).await.unwrap();
    let again = store.begin_migration(&first).await.unwrap();
    assert_eq!(again, Begun::Again(Box::new(later.clone())), "the record as it stands");

    let second = migration(vm, "host-c");
    match store.begin_migration(&second).await.unwrap_err() {
        BeginError::AlreadyMigrating(holder) => assert_eq!(holder.id, first.id),
        other => panic!("{other}"),
    }
    later.state = MigrationState::Unresolved { ask: name("host-b") };
    store.save_migration(&later).await.unwrap();
    assert!(store.begin_migration(&second).await.is_err(), "unresolved holds the VM too");
    later.state = MigrationState::Stayed { why: Stay::Cancelled };
    later.leftovers = vec!["something on host-b".into()];
    store.save_migration(&later).await.unwrap();
    assert_eq!(store.begin_migration(&second).await.unwrap(), Begun::New);

    let active = store.active_migrations().await.unwrap();
    assert_eq!(active.iter().map(|m| m.id).collect::<Vec<_>>(), [second.id]);
    let unswept = store.unswept_migrations().await.unwrap();
    assert_eq!(unswept.iter().map(|m| m.id).collect::<Vec<_>>(), [first.id]);
    let newest_first = store.migrations().await.unwrap();
    assert_eq!(newest_first[0].id, second.id);
    assert!(store.save_migration(&migration(vm, "host-b")).await.is_err(), "never begun");
}

#[tokio::test]
async fn a_placement_never_goes_back() {
    let store = Store::in_memory();
    let vm = row("web01");
    let id = vm.id();
    assert_eq!(store.insert_vm(vm).await.unwrap(), Inserted::New);
    let (b, c) = (name("host-b"), name("host-c"));
    let moved = |host: &Name, epoch| {
        let (store, host) = (store.clone(), host.clone());
        async move { store.move_placement(id, &host, Epoch(epoch), 1).await.unwrap() }
    };
    assert_eq!(moved(&b, 2).await, PlacementMove::Moved);
    assert_eq!(moved(&b, 2).await, PlacementMove::Moved, "repeated");
    assert_eq!(moved(&c, 2).await, PlacementMove::Stale { known: Epoch(2) });
    assert_eq!(moved(&c, 1).await, PlacementMove::Stale { known: Epoch(2) });
    assert_eq!(store.vm(id).await.unwrap().unwrap().host, b);
    let nobody = store.move_placement(VmId::new(), &b, Epoch(9), 1).await.unwrap();
    assert_eq!(nobody, PlacementMove::NoVm);

    let mut newer = definition(id, "web01");
    newer.generation = 5;
    assert!(!store.confirm_vm(&c, Epoch(7), &newer).await.unwrap(), "not the placement");
    assert!(!store.confirm_vm(&b, Epoch(1), &newer).await.unwrap(), "an earlier epoch");
    assert!(store.confirm_vm(&b, Epoch(3), &newer).await.unwrap());
    newer.generation = 4;
    assert!(!store.confirm_vm(&b, Epoch(3), &newer).await.unwrap(), "an older definition");
    let known = store.vm(id).await.unwrap().unwrap();
    assert_eq!((known.epoch, known.definition.generation), (Epoch(3), 5));
}

#[tokio::test]
async fn names_and_ids_are_unique() {
    let store = Store::in_memory();
    let first = row("web01");
    assert_eq!(store.insert_vm(first.clone()).await.unwrap(), Inserted::New);
    let same = store.insert_vm(first.clone()).await.unwrap();
    assert_eq!(same, Inserted::SameId(Box::new(first.clone())));
    assert_eq!(store.insert_vm(row("web01")).await.unwrap(), Inserted::NameTaken);
    let held = migration(first.id(), "host-b");
    store.begin_migration(&held).await.unwrap();
    assert_eq!(store.delete_vm(first.id()).await.unwrap(), Deleted::Migrating(held.id));
    assert!(store.vm_by_name(first.name()).await.unwrap().is_some());
}

#[tokio::test]
async fn a_token_admits_one_host_in_its_time() {
    let store = Store::in_memory();
    let now = Timestamp::now();
    let hash = |letter: char| {
        Secret::from_text(&format!("{}A", letter.to_string().repeat(42))).unwrap().hash()
    };
    let host = |host: &str, key: &str| HostRow {
        name: name(host),
        address: "127.0.0.1:1".into(),
        enabled: true,
        agent_key: key.into(),
    };
    let minute = SignedDuration::from_secs(60);
    store.add_join_token(hash('a'), now + minute, now).await.unwrap();
    store.add_join_token(hash('b'), now + minute, now).await.unwrap();
    let admit = |letter, row, at| store.admit_host(hash(letter), row, at);
    use JoinOutcome::*;
    let a = host("host-a", "key-a");
    assert_eq!(admit('x', a.clone(), now).await.unwrap(), UnknownToken);
    assert_eq!(admit('a', a.clone(), now + minute).await.unwrap(), Expired);
    assert_eq!(admit('a', a.clone(), now).await.unwrap(), Admitted);
    assert_eq!(admit('a', a.clone(), now).await.unwrap(), Admitted, "the same host repeats itself");
    assert_eq!(admit('a', host("host-b", "key-b"), now).await.unwrap(), Used);
    assert_eq!(admit('a', host("host-a", "key-x"), now).await.unwrap(), Used);
    assert_eq!(admit('b', host("host-a", "key-x"), now).await.unwrap(), NameTaken);
    assert_eq!(
        admit('b', host("host-b", "key-b"), now).await.unwrap(),
        Admitted,
        "not spent before"
    );
    assert_eq!(store.hosts().await.unwrap().len(), 2);
}

#[tokio::test]
async fn records_outlive_the_process_and_a_newer_schema_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool.db");
    let vm = row("web01");
    {
        let store = Store::open(&path).unwrap();
        store.insert_vm(vm.clone()).await.unwrap();
        store.begin_migration(&migration(vm.id(), "host-b")).await.unwrap();
    }
    let store = Store::open(&path).unwrap();
    assert_eq!(store.vms().await.unwrap(), [vm]);
    assert_eq!(store.active_migrations().await.unwrap().len(), 1);
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.pragma_update(None, "user_version", 99).unwrap();
    match Store::open(&path).unwrap_err() {
        StoreError::Newer { found: 99, known: 3 } => {}
        other => panic!("{other}"),
    }
}
