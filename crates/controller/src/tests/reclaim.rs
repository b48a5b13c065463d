//! A VM that was given to a host that never returns, and is taken back.

use whimbrel_api::migration::{MigrationState, ReclaimRequest, Statement, Stay};
use whimbrel_api::{ApiError, Epoch, ErrorCode};

use super::migrations::{follow, to, two_hosts};
use super::rig::eventually;
use crate::fake_agent::Pace;

const FENCED: ReclaimRequest = ReclaimRequest { statement: Statement::HostIsFenced };

#[tokio::test]
async fn a_vm_is_taken_back_and_its_former_owner_told_when_it_is_back() {
    let (rig, a, b) = two_hosts().await;
    rig.world.set_pace(Pace::Hangs);
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    eventually(|| async { a.called("PUT /v1/outgoing") > 0 }).await;
    let refused = rig.client.reclaim_migration(request.id, &FENCED).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::WrongState, "{refused}");

    a.give_away(request.id);
    let found = || async { rig.client.migration(request.id).await.unwrap() };
    let unresolved = || async { matches!(found().await.state, MigrationState::Unresolved { .. }) };
    eventually(unresolved).await;
    a.refuse_next("POST /v1/outgoing", ApiError::new(ErrorCode::Busy, "it was heard of just now"));
    let refused = rig.client.reclaim_migration(request.id, &FENCED).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Busy, "{refused}");
    assert_eq!(found().await.reclaim, None, "a word that was refused is none");

    // It is not back yet.
    b.refuse_next("POST /v1/incoming", ApiError::new(ErrorCode::Unreachable, "no answer"));
    rig.client.reclaim_migration(request.id, &FENCED).await.unwrap();
    let record = follow(&rig, request.id).await;
    let why = Stay::Reclaimed { statement: Statement::HostIsFenced };
    assert_eq!(record.state, MigrationState::Stayed { why });
    let word = record.reclaim.unwrap();
    assert!(!word.by.is_empty() && word.guest_was_there.is_none(), "{word:?}");
    assert!(record.leftovers.iter().any(|left| left.starts_with("host-b")), "until it has heard");
    let vm = rig.client.vm("web01").await.unwrap();
    assert_eq!((vm.host.as_str(), vm.epoch), ("host-a", Epoch(3)));

    eventually(|| async { found().await.leftovers.is_empty() }).await;
    assert_eq!(found().await.reclaim.unwrap().guest_was_there, Some(false));
    let over = rig.client.reclaim_migration(request.id, &FENCED).await.unwrap_err();
    assert_eq!(over.code, ErrorCode::WrongState, "{over}");
    assert!(a.is_swept() && b.is_swept());
}
