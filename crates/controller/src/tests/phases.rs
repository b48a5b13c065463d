//! Whatever phase a migration is in when its controller dies, the next controller leads it to the end that it would have had; and
//! a cancel is heard in every phase before the source is asked.
//!
//! In Precopy and later the same is in [`super::migrations`]. A phase is held by a host that does not answer; Reservation, which
//! asks nobody, by the record that a controller leaves which is killed in it.

use std::time::Duration;

use whimbrel_api::migration::{Migration, MigrationState, PhaseStart, Stay};
use whimbrel_api::{MigrationId, Phase};

use super::migrations::{follow, to, two_hosts};
use super::rig::{Rig, eventually};
use crate::fake_agent::{FakeAgent, Pace};

const PREPARE: &str = "PUT /v1/incoming";
const FORGET: &str = "DELETE /v1/outgoing";
const QUICK: Pace = Pace::Moves(Duration::from_millis(5));

async fn in_phase(rig: &Rig, id: MigrationId, phase: Phase) {
    eventually(|| async { rig.client.migration(id).await.unwrap().phase == phase }).await;
}

async fn has_moved(rig: &Rig, id: MigrationId, hosts: [&FakeAgent; 2]) {
    let record = follow(rig, id).await;
    assert_eq!(record.state, MigrationState::Moved, "{record:?}");
    let phases: Vec<Phase> = record.phases.iter().map(|start| start.phase).collect();
    assert!(phases.windows(2).all(|pair| pair[0] < pair[1]), "each once, in order: {phases:?}");
    rig.until_state("web01", "running").await;
    assert_eq!(rig.client.vm("web01").await.unwrap().host.as_str(), "host-b");
    eventually(|| async { hosts.iter().all(|host| host.is_swept()) }).await;
}

async fn was_cancelled(rig: &Rig, id: MigrationId, hosts: [&FakeAgent; 2]) {
    let record = follow(rig, id).await;
    assert_eq!(record.state, MigrationState::Stayed { why: Stay::Cancelled });
    assert_eq!(rig.client.vm("web01").await.unwrap().host.as_str(), "host-a");
    eventually(|| async { hosts.iter().all(|host| host.is_swept()) }).await;
    rig.until_state("web01", "running").await;
    assert_eq!(hosts[0].called("PUT /v1/outgoing"), 0, "the guest was left alone");

    rig.world.set_pace(QUICK);
    let next = to("host-b");
    rig.client.migrate(&next).await.unwrap();
    has_moved(rig, next.id, hosts).await;
}

/// What a controller leaves that is killed in Reservation: the record of a migration that nobody was asked for.
async fn leave_in_reservation(rig: &mut Rig, b: &FakeAgent, cancelled: bool) -> MigrationId {
    b.swallow_next(PREPARE);
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    in_phase(rig, request.id, Phase::Preparation).await;
    rig.stop().await;
    let store = rig.controller.store();
    let mut record: Migration = store.active_migrations().await.unwrap().remove(0);
    record.phases.retain(|start| start.phase < Phase::Reservation);
    record.phases.push(PhaseStart { phase: Phase::Reservation, at: record.started });
    record.phase = Phase::Reservation;
    record.cancel_requested = cancelled;
    store.save_migration(&record).await.unwrap();
    rig.start().await;
    record.id
}

#[tokio::test]
async fn a_controller_that_dies_in_reservation_begins_anew() {
    let (mut rig, a, b) = two_hosts().await;
    rig.world.set_pace(QUICK);
    let id = leave_in_reservation(&mut rig, &b, false).await;
    has_moved(&rig, id, [&a, &b]).await;
}

#[tokio::test]
async fn a_controller_that_dies_in_preparation_asks_the_destination_again() {
    let (mut rig, a, b) = two_hosts().await;
    rig.world.set_pace(QUICK);
    b.swallow_next(PREPARE);
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    eventually(|| async { b.called(PREPARE) > 0 }).await;
    in_phase(&rig, request.id, Phase::Preparation).await;
    rig.restart().await;
    has_moved(&rig, request.id, [&a, &b]).await;
    assert_eq!(b.called(PREPARE), 2);
}

#[tokio::test]
async fn a_controller_that_dies_in_switchover_follows_on() {
    let (mut rig, a, b) = two_hosts().await;
    rig.world.set_pace(Pace::HangsInSwitchover);
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    in_phase(&rig, request.id, Phase::Switchover).await;
    rig.restart().await;
    in_phase(&rig, request.id, Phase::Switchover).await;
    a.complete(request.id);
    has_moved(&rig, request.id, [&a, &b]).await;
    assert_eq!(b.called(PREPARE), 1, "nothing was begun anew");
}

#[tokio::test]
async fn a_controller_that_dies_in_retirement_sweeps_on() {
    let (mut rig, a, b) = two_hosts().await;
    rig.world.set_pace(QUICK);
    a.swallow_next(FORGET);
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    eventually(|| async { a.called(FORGET) > 0 }).await;
    in_phase(&rig, request.id, Phase::Retirement).await;
    rig.restart().await;
    has_moved(&rig, request.id, [&a, &b]).await;
    assert_eq!((b.called(PREPARE), a.called("PUT /v1/outgoing")), (1, 1), "nothing was begun anew");
}

#[tokio::test]
async fn a_cancel_in_reservation_is_kept_over_the_controllers_death() {
    let (mut rig, a, b) = two_hosts().await;
    let id = leave_in_reservation(&mut rig, &b, true).await;
    was_cancelled(&rig, id, [&a, &b]).await;
    assert_eq!(b.called(PREPARE), 2, "once before, and once for the next try");
}

#[tokio::test]
async fn a_cancel_in_preparation_does_not_wait_for_the_destination() {
    let (rig, a, b) = two_hosts().await;
    b.swallow_next(PREPARE);
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    eventually(|| async { b.called(PREPARE) > 0 }).await;
    in_phase(&rig, request.id, Phase::Preparation).await;
    rig.client.cancel_migration(request.id).await.unwrap();
    was_cancelled(&rig, request.id, [&a, &b]).await;
}
