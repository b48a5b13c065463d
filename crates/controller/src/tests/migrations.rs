//! Migrations through the API, between fake hosts: followed, refused, cancelled, and taken up again after a restart.

use std::time::Duration;

use whimbrel_api::migration::{MigrateOptions, MigrateRequest, Migration, MigrationState, Stay};
use whimbrel_api::vm::VmAction;
use whimbrel_api::{Epoch, ErrorCode, MigrationId};

use super::rig::{Rig, eventually, name};
use crate::fake_agent::{FakeAgent, Pace};

async fn two_hosts() -> (Rig, FakeAgent, FakeAgent) {
    let rig = Rig::new().await;
    let a = rig.host("host-a").await;
    let b = rig.host("host-b").await;
    rig.furnish().await;
    rig.create("web01", Some("host-a")).await;
    rig.client.vm_action("web01", VmAction::Start).await.unwrap();
    (rig, a, b)
}

fn to(destination: &str) -> MigrateRequest {
    MigrateRequest {
        id: MigrationId::new(),
        vm: "web01".into(),
        destination: name(destination),
        options: MigrateOptions::default(),
    }
}

/// Follows a migration to its last record.
async fn follow(rig: &Rig, id: MigrationId) -> Migration {
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
