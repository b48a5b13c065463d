//! Migrations through the API, between fake hosts: followed, refused, cancelled, and taken up again after a restart.

use std::time::Duration;

use whimbrel_api::migration::{
    MigrateOptions, MigrateRequest, Migration, MigrationState, PhaseStart, Stay,
};
use whimbrel_api::vm::VmAction;
use whimbrel_api::{ApiError, Epoch, ErrorCode, MigrationId, Phase};
use whimbrel_migration::preflight::Code;

use super::rig::{Rig, eventually, name};
use crate::fake_agent::{FakeAgent, Pace};

pub(super) async fn two_hosts() -> (Rig, FakeAgent, FakeAgent) {
    let rig = Rig::new().await;
    let a = rig.host("host-a").await;
    let b = rig.host("host-b").await;
    rig.furnish().await;
    rig.create("web01", Some("host-a")).await;
    rig.client.vm_action("web01", VmAction::Start).await.unwrap();
    (rig, a, b)
}

pub(super) fn to(destination: &str) -> MigrateRequest {
    MigrateRequest {
        id: MigrationId::new(),
        vm: "web01".into(),
        destination: name(destination),
        options: MigrateOptions::default(),
    }
}

/// Follows a migration to its last record.
pub(super) async fn follow(rig: &Rig, id: MigrationId) -> Migration {
    let mut watch = rig.client.watch_migration(id).await.unwrap();
    let mut last = None;
    let ended = async {
        while let Some(record) = watch.next().await.unwrap() {
            last = Some(record);
        }
    };
    tokio::time::timeout(Duration::from_secs(20), ended).await.expect("it ended in time");
    last.expect("the record comes at once")
}

#[tokio::test]
async fn a_vm_moves_there_and_back() {
    let (rig, a, b) = two_hosts().await;
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    let again = rig.client.migrate(&request).await.unwrap();
    assert_eq!(again.id, request.id, "the same request is the same migration");
    let record = follow(&rig, request.id).await;
    assert_eq!(record.state, MigrationState::Moved, "{record:?}");
    rig.until_state("web01", "running").await;
    let vm = rig.client.vm("web01").await.unwrap();
    assert_eq!((vm.host.as_str(), vm.epoch), ("host-b", Epoch(2)));
    eventually(|| async { a.is_swept() && b.is_swept() }).await;

    let back = to("host-a");
    rig.client.migrate(&back).await.unwrap();
    assert_eq!(follow(&rig, back.id).await.state, MigrationState::Moved);
    assert_eq!(rig.client.vm("web01").await.unwrap().host.as_str(), "host-a");
    let newest_first = rig.client.migrations().await.unwrap();
    assert_eq!(newest_first.iter().map(|m| m.id).collect::<Vec<_>>(), [back.id, request.id]);
    let late = follow(&rig, request.id).await;
    assert_eq!(late.state, MigrationState::Moved, "an ended one is told once");
}

#[tokio::test]
async fn while_a_migration_holds_a_vm_nobody_else_changes_it() {
    let (rig, a, b) = two_hosts().await;
    rig.world.set_pace(Pace::Hangs);
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    let refused = |error: whimbrel_api::ApiError| assert_eq!(error.code, ErrorCode::Migrating);
    refused(rig.client.vm_action("web01", VmAction::Pause).await.unwrap_err());
    refused(rig.client.stop_vm("web01", &Default::default()).await.unwrap_err());
    refused(rig.client.delete_vm("web01").await.unwrap_err());
    eventually(|| async { a.called("PUT /v1/outgoing") > 0 }).await;
    rig.client.cancel_migration(request.id).await.unwrap();
    let record = follow(&rig, request.id).await;
    assert_eq!(record.state, MigrationState::Stayed { why: Stay::Cancelled });
    eventually(|| async { a.is_swept() && b.is_swept() }).await;
    rig.until_state("web01", "running").await;
    assert_eq!(rig.client.vm("web01").await.unwrap().host.as_str(), "host-a");

    rig.world.set_pace(Pace::Moves(Duration::from_millis(5)));
    let next = to("host-b");
    rig.client.migrate(&next).await.unwrap();
    assert_eq!(follow(&rig, next.id).await.state, MigrationState::Moved, "the next try succeeds");
}

#[tokio::test]
async fn a_migration_is_taken_up_by_a_restarted_controller() {
    let (mut rig, a, b) = two_hosts().await;
    rig.world.set_pace(Pace::Moves(Duration::from_millis(300)));
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    eventually(|| async { a.called("PUT /v1/outgoing") > 0 }).await;
    rig.restart().await;
    let record = follow(&rig, request.id).await;
    assert_eq!(record.state, MigrationState::Moved, "{record:?}");
    rig.until_state("web01", "running").await;
    assert_eq!(rig.client.vm("web01").await.unwrap().host.as_str(), "host-b");
    eventually(|| async { a.is_swept() && b.is_swept() }).await;
}

#[tokio::test]
async fn what_moved_while_the_controller_was_away_has_moved() {
    let (mut rig, a, b) = two_hosts().await;
    let vm = rig.client.vm("web01").await.unwrap().id;
    rig.world.set_pace(Pace::Moves(Duration::from_millis(200)));
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    eventually(|| async { a.called("PUT /v1/outgoing") > 0 }).await;
    rig.stop().await;
    // The source has given the VM away by then and knows nothing of it any more.
    eventually(|| async { a.vm(vm).is_none() }).await;
    rig.start().await;
    let record = follow(&rig, request.id).await;
    assert_eq!(record.state, MigrationState::Moved, "{record:?}");
    assert!(record.phases.is_sorted_by_key(|start| start.phase), "{:?}", record.phases);
    rig.until_state("web01", "running").await;
    assert_eq!(rig.client.vm("web01").await.unwrap().host.as_str(), "host-b");
    eventually(|| async { a.is_swept() && b.is_swept() }).await;
}

#[tokio::test]
async fn an_address_at_which_nobody_can_receive_is_refused_before_anything_is_prepared() {
    let (rig, _a, b) = two_hosts().await;
    for (code, verdict) in [
        (ErrorCode::NotFound, Code::AddressUnresolvable),
        (ErrorCode::NoResources, Code::AddressNotItsOwn),
    ] {
        let said = ApiError::new(code, "there is no 10.0.0.77 here");
        b.refuse_next("POST /v1/knock/listen", said);
        let mut request = to("host-b");
        request.options.migrate_address = Some("10.0.0.77".to_owned());
        let refused = rig.client.migrate(&request).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::PreflightRefused, "{refused:?}");
        let codes: Vec<Code> = refused.verdicts.iter().map(|verdict| verdict.code).collect();
        assert_eq!(codes, [verdict]);
        assert!(refused.verdicts[0].problem.contains("10.0.0.77"), "{refused:?}");
    }
    assert_eq!(b.called("PUT /v1/incoming"), 0);
}

#[tokio::test]
async fn what_fails_before_the_handoff_leaves_the_vm_where_it_was() {
    let (rig, a, b) = two_hosts().await;
    let why = Stay::GuestPoweredOff;
    rig.world.set_pace(Pace::Fails(Duration::from_millis(5), why.clone()));
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    assert_eq!(follow(&rig, request.id).await.state, MigrationState::Stayed { why });
    eventually(|| async { a.is_swept() && b.is_swept() }).await;

    let no_room = whimbrel_api::ApiError::new(ErrorCode::NoResources, "no port is free");
    b.refuse_next("PUT /v1/incoming", no_room);
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    let record = follow(&rig, request.id).await;
    match record.state {
        MigrationState::Stayed { why: Stay::Failed { code, .. } } => {
            assert_eq!(code, "no-resources")
        }
        other => panic!("{other:?}"),
    }
    // The source has not heard of it; its epoch is burnt all the same, for the destination may have.
    let next = rig.client.migrate(&to("host-b")).await.unwrap();
    assert!(next.epoch > record.epoch, "{} after {}", next.epoch, record.epoch);
    follow(&rig, next.id).await;
    rig.until_state("web01", "running").await;
    let missing = rig.client.migration(MigrationId::new()).await.unwrap_err();
    assert_eq!(missing.code, ErrorCode::NotFound);
}

#[tokio::test]
async fn what_is_left_over_names_the_host_that_is_away_and_no_other() {
    let (rig, a, mut b) = two_hosts().await;
    rig.world.set_pace(Pace::Fails(Duration::from_millis(500), Stay::GuestPoweredOff));
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    eventually(|| async { a.called("PUT /v1/outgoing") > 0 }).await;
    b.stop().await;
    let record = follow(&rig, request.id).await;
    assert_eq!(record.state, MigrationState::Stayed { why: Stay::GuestPoweredOff });
    let [left] = record.leftovers.as_slice() else { panic!("{:?}", record.leftovers) };
    assert!(left.starts_with("host-b: the incoming side; host-b does not answer"), "{left}");
    assert!(!left.contains("host-a"), "{left}");
    let left = async || rig.client.migration(request.id).await.unwrap().leftovers;
    eventually(|| async { left().await.iter().any(|left| left.contains("since 20")) }).await;
    b.restart().await;
    eventually(|| async { left().await.is_empty() }).await;
    assert!(a.is_swept() && b.is_swept());
}

#[tokio::test]
async fn a_migration_that_was_not_asked_for_yet_begins_anew_with_phases_in_order() {
    let (mut rig, _a, _b) = two_hosts().await;
    rig.world.set_pace(Pace::Hangs);
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    rig.client.cancel_migration(request.id).await.unwrap();
    let cancelled = follow(&rig, request.id).await;

    // As a controller leaves it that is killed between writing "precopy" and asking the source.
    let mut record = Migration {
        id: MigrationId::new(),
        epoch: cancelled.epoch.next(),
        phase: Phase::Precopy,
        state: MigrationState::Running,
        settled: None,
        cancel_requested: false,
        reclaim: None,
        progress: None,
        ended: None,
        ..cancelled
    };
    record.phases.retain(|start| start.phase < Phase::Reservation);
    let at = record.started;
    for phase in [Phase::Reservation, Phase::Preparation, Phase::Precopy] {
        record.phases.push(PhaseStart { phase, at });
    }
    rig.stop().await;
    rig.controller.store().begin_migration(&record).await.unwrap();
    rig.world.set_pace(Pace::Moves(Duration::from_millis(5)));
    rig.start().await;
    let moved = follow(&rig, record.id).await;
    assert_eq!(moved.state, MigrationState::Moved, "{moved:?}");
    let phases: Vec<Phase> = moved.phases.iter().map(|start| start.phase).collect();
    assert!(phases.windows(2).all(|pair| pair[0] < pair[1]), "each once, in order: {phases:?}");
    let reserved = moved.phases.iter().find(|start| start.phase == Phase::Reservation);
    assert!(reserved.unwrap().at > at, "it began when it was begun anew");
}

#[tokio::test]
async fn a_migration_without_one_of_its_hosts_is_told_and_not_led() {
    let (mut rig, _a, _b) = two_hosts().await;
    rig.world.set_pace(Pace::Moves(Duration::from_millis(5)));
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    let moved = follow(&rig, request.id).await;
    // As in a database that is older than the host.
    let orphan = Migration {
        id: MigrationId::new(),
        source: name("host-b"),
        destination: name("host-z"),
        phase: Phase::Precopy,
        state: MigrationState::Running,
        ..moved
    };
    rig.stop().await;
    rig.controller.store().begin_migration(&orphan).await.unwrap();
    rig.start().await;
    let found = async || rig.client.migration(orphan.id).await.unwrap().state;
    let unresolved = MigrationState::Unresolved { ask: name("host-z") };
    eventually(|| async { found().await == unresolved }).await;
    let error = rig.client.cancel_migration(orphan.id).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Busy, "nobody is there to hear it");
    let error = rig.client.vm_action("web01", VmAction::Pause).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Migrating, "and the VM is left alone");
}

#[tokio::test]
async fn a_source_that_is_cut_off_while_it_is_watched_is_asked_again() {
    let (rig, a, b) = two_hosts().await;
    rig.world.set_pace(Pace::Moves(Duration::from_millis(50)));
    a.swallow_next("GET /v1/outgoing");
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    assert_eq!(follow(&rig, request.id).await.state, MigrationState::Moved);
    eventually(|| async { a.is_swept() && b.is_swept() }).await;
}

#[tokio::test]
async fn a_source_that_denies_what_it_began_is_not_taken_at_its_word() {
    let (rig, a, _b) = two_hosts().await;
    rig.world.set_pace(Pace::Moves(Duration::from_millis(50)));
    a.swallow_next("GET /v1/outgoing");
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    eventually(|| async { a.called("PUT /v1/outgoing") > 0 }).await;
    // As one that was restarted, could not take the migration up, and to which the permission is too old by now.
    a.refuse_next("PUT /v1/outgoing", ApiError::new(ErrorCode::NotAllowed, "the grant is old"));
    let record = follow(&rig, request.id).await;
    assert_eq!(record.state, MigrationState::Moved, "{record:?}");
    assert_eq!(rig.client.vm("web01").await.unwrap().host.as_str(), "host-b");
}

#[tokio::test]
async fn a_source_that_has_forgotten_what_its_destination_still_fetches_is_told() {
    let (mut rig, a, b) = two_hosts().await;
    rig.world.set_pace(Pace::Hangs);
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    eventually(|| async { a.outgoing_request(request.id).is_some() }).await;
    rig.stop().await;
    b.fetches(request.id, Epoch(2));
    a.forget_outgoing(request.id);
    rig.start().await;
    let found = async || rig.client.migration(request.id).await.unwrap().state;
    let unresolved = MigrationState::Unresolved { ask: name("host-b") };
    eventually(|| async { found().await == unresolved }).await;
}
