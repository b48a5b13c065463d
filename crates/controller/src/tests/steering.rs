//! A running migration is steered: settings, post-copy, holding and recovering it, completing it by force.

use whimbrel_api::migration::{
    DECISIONS_MAX, Decision, LiveSettings, Migration, MigrationAction, MigrationState, Postcopy,
    PostcopyState,
};
use whimbrel_api::{ApiError, ErrorCode, MigrationId, Phase};

use super::migrations::{follow, to, two_hosts};
use super::rig::{Rig, eventually};
use crate::fake_agent::{FakeAgent, Pace};

/// A migration that copies until it is told otherwise.
async fn copying(postcopy: bool) -> (Rig, FakeAgent, FakeAgent, MigrationId) {
    let (rig, a, b) = two_hosts().await;
    rig.world.set_pace(Pace::Hangs);
    let mut request = to("host-b");
    request.options.postcopy = postcopy.then(Postcopy::default);
    rig.client.migrate(&request).await.unwrap();
    eventually(|| async { a.outgoing_request(request.id).is_some() }).await;
    (rig, a, b, request.id)
}

async fn record(rig: &Rig, id: MigrationId) -> Migration {
    rig.client.migration(id).await.unwrap()
}

async fn refused(rig: &Rig, id: MigrationId, action: MigrationAction) -> ErrorCode {
    rig.client.migration_action(id, action).await.unwrap_err().code
}

#[tokio::test]
async fn settings_reach_the_source_and_bad_ones_nobody() {
    let (rig, a, _b, id) = copying(false).await;
    let settings = LiveSettings { max_downtime_ms: Some(20), ..LiveSettings::default() };
    rig.client.set_migration(id, &settings).await.unwrap();
    assert_eq!(a.outgoing_request(id).unwrap().1, [settings]);
    for (downtime, bandwidth) in [(Some(0), None), (None, Some(0)), (None, Some(1 << 63))] {
        let bad = LiveSettings {
            max_downtime_ms: downtime,
            bandwidth_bytes_per_s: bandwidth,
            ..LiveSettings::default()
        };
        let error = rig.client.set_migration(id, &bad).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::OutOfRange, "{error}");
    }
    let nothing = rig.client.set_migration(id, &LiveSettings::default()).await.unwrap_err();
    assert_eq!(nothing.code, ErrorCode::BadRequest);
    assert_eq!(a.outgoing_request(id).unwrap().1.len(), 1);
    rig.client.cancel_migration(id).await.unwrap();
    follow(&rig, id).await;
    let over = rig.client.set_migration(id, &settings).await.unwrap_err();
    assert_eq!(over.code, ErrorCode::WrongState);
    for action in MigrationAction::ALL {
        assert_eq!(refused(&rig, id, action).await, ErrorCode::WrongState, "{action:?}");
    }
    let nobody = rig.client.set_migration(MigrationId::new(), &settings).await.unwrap_err();
    assert_eq!(nobody.code, ErrorCode::NotFound);
}

#[tokio::test]
async fn what_does_not_fit_the_phase_is_refused_and_force_completes() {
    let (rig, a, _b, id) = copying(false).await;
    for action in [
        MigrationAction::Postcopy,
        MigrationAction::Pause,
        MigrationAction::Resume,
        MigrationAction::Recover,
    ] {
        assert_eq!(refused(&rig, id, action).await, ErrorCode::WrongState, "{action:?}");
    }
    assert_eq!(a.called("POST /v1/outgoing"), 0, "nobody was asked what is certain");
    rig.client.migration_action(id, MigrationAction::ForceComplete).await.unwrap();
    assert_eq!(follow(&rig, id).await.state, MigrationState::Moved);
    for action in MigrationAction::ALL {
        assert_eq!(refused(&rig, id, action).await, ErrorCode::HandedOver, "{action:?}");
    }
}

#[tokio::test]
async fn post_copy_is_held_broken_recovered_and_ends() {
    let (mut rig, a, b, id) = copying(true).await;
    rig.client.migration_action(id, MigrationAction::Postcopy).await.unwrap();
    let state = async |rig: &Rig| record(rig, id).await.postcopy.map(|postcopy| postcopy.state);
    eventually(|| async { state(&rig).await == Some(PostcopyState::Active) }).await;
    // The guest is there, while its memory still comes: that is what the pool says, and for how long it took.
    let there =
        || async { rig.client.vm("web01").await.unwrap().host == "host-b".parse().unwrap() };
    eventually(there).await;
    let now = record(&rig, id).await;
    assert_eq!((now.phase, now.state.clone()), (Phase::Postcopy, MigrationState::Running));
    assert!(now.total_ms.is_some() && now.ended.is_none());
    let cancelled = rig.client.cancel_migration(id).await.unwrap_err();
    assert_eq!(cancelled.code, ErrorCode::HandedOver);
    assert_eq!(refused(&rig, id, MigrationAction::ForceComplete).await, ErrorCode::WrongState);

    let held = rig.client.migration_action(id, MigrationAction::Pause).await.unwrap();
    assert!(matches!(held.postcopy.unwrap().state, PostcopyState::Paused { by_hand: true, .. }));
    let paused = || async { matches!(state(&rig).await, Some(PostcopyState::Paused { .. })) };
    eventually(paused).await;
    rig.client.migration_action(id, MigrationAction::Resume).await.unwrap();
    eventually(|| async { state(&rig).await == Some(PostcopyState::Active) }).await;

    a.lose_postcopy(id);
    eventually(|| async { matches!(state(&rig).await, Some(PostcopyState::Paused { .. })) }).await;
    assert_eq!(refused(&rig, id, MigrationAction::Resume).await, ErrorCode::WrongState);
    rig.restart().await;
    let told = record(&rig, id).await.postcopy.unwrap().state;
    assert!(matches!(told, PostcopyState::Paused { by_hand: false, .. }), "{told:?}");
    // The source knows better than the record, and a destination is not made to give up a good connection.
    let flows = ApiError::new(ErrorCode::WrongState, "post-copy is not paused");
    a.refuse_next("POST /v1/outgoing", flows);
    assert_eq!(refused(&rig, id, MigrationAction::Recover).await, ErrorCode::WrongState);
    assert_eq!(b.called("POST /v1/incoming"), 0);
    rig.client.migration_action(id, MigrationAction::Recover).await.unwrap();
    assert_eq!(b.called("POST /v1/incoming"), 1, "the destination was asked to listen anew");
    eventually(|| async { record(&rig, id).await.postcopy.unwrap().recoveries == 1 }).await;
    a.end_postcopy(id);
    let ended = follow(&rig, id).await;
    assert_eq!(ended.state, MigrationState::Moved);
    assert_eq!(ended.total_ms, now.total_ms, "running there was what counted");
    let postcopy = ended.postcopy.unwrap();
    assert_eq!((postcopy.state, postcopy.recoveries), (PostcopyState::Done, 1));
    assert_eq!((postcopy.blocktime_ms, postcopy.vcpu_blocktime_ms), (Some(12), vec![12, 34]));
    let kept = rig.client.migration_statistics(id).await.unwrap();
    assert!(kept.destination_raw.is_some() && !kept.samples.is_empty());
}

#[tokio::test]
async fn what_the_source_decides_is_kept_after_what_was_planned() {
    let (mut rig, a, _b, id) = copying(false).await;
    let planned = record(&rig, id).await.decisions;
    let decision = |number: usize| Decision {
        measured: format!("pass {number}"),
        chosen: "a longer pause".into(),
        rejected: Vec::new(),
    };
    a.decide(id, decision(0));
    let expected = [planned.clone(), vec![decision(0)]].concat();
    eventually(|| async { record(&rig, id).await.decisions == expected }).await;
    rig.restart().await;
    assert_eq!(record(&rig, id).await.decisions, expected);
    for number in 1..2 * DECISIONS_MAX {
        a.decide(id, decision(number));
    }
    let last = decision(2 * DECISIONS_MAX - 1);
    eventually(|| async { record(&rig, id).await.decisions.last() == Some(&last) }).await;
    let all = record(&rig, id).await.decisions;
    assert_eq!((all.len(), &all[..planned.len()]), (DECISIONS_MAX, &planned[..]));
    assert!(rig.client.migrations().await.unwrap()[0].decisions.is_empty(), "not in lists");
}
