//! Policies through the API: made, attached, looked up in order, and kept as long as something uses them.

use whimbrel_api::event::Event;
use whimbrel_api::policy::{AttachPolicy, Consent, Policy, PolicyOrigin};
use whimbrel_api::{ApiError, ErrorCode, VmId};

use super::migrations::{follow, to, two_hosts};
use super::rig::name;
use crate::fake_agent::Pace;

fn attach(policy: &str) -> AttachPolicy {
    AttachPolicy { policy: Some(name(policy)) }
}

fn own(policy: &str) -> Policy {
    Policy {
        name: name(policy),
        allow_postcopy: Consent::Never,
        max_downtime_ms: 50,
        ..Policy::default()
    }
}

fn refused<T: std::fmt::Debug>(result: Result<T, ApiError>) -> ErrorCode {
    result.unwrap_err().code
}

#[tokio::test]
async fn the_nearest_policy_applies() {
    let (mut rig, _a, _b) = two_hosts().await;
    rig.client.put_policy(&own("gold")).await.unwrap();
    let applied = async |rig: &super::rig::Rig| {
        let applied = rig.client.vm_policy("web01").await.unwrap();
        (applied.policy.to_string(), applied.origin)
    };
    assert_eq!(applied(&rig).await, ("balanced".into(), PolicyOrigin::Default));
    rig.client.attach_pool_policy(&attach("must-finish")).await.unwrap();
    assert_eq!(applied(&rig).await, ("must-finish".into(), PolicyOrigin::Pool));
    rig.client.attach_vm_policy("web01", &attach("gold")).await.unwrap();
    assert_eq!(applied(&rig).await, ("gold".into(), PolicyOrigin::Vm));
    rig.restart().await;
    rig.until_ready("host-a").await;
    rig.until_ready("host-b").await;
    assert_eq!(applied(&rig).await, ("gold".into(), PolicyOrigin::Vm), "also after a restart");
    assert_eq!(rig.client.pool_policy().await.unwrap().policy, name("must-finish"));

    rig.world.set_pace(Pace::Hangs);
    let admitted = rig.client.migrate(&to("host-b")).await.unwrap();
    assert_eq!(admitted.policy, Some(name("gold")));
    assert!(admitted.strategy.unwrap().max_downtime_ms <= 50);
    // What a migration goes by is not taken from under it.
    rig.client.attach_vm_policy("web01", &AttachPolicy::default()).await.unwrap();
    assert_eq!(refused(rig.client.delete_policy(&name("gold")).await), ErrorCode::InUse);
    rig.client.cancel_migration(admitted.id).await.unwrap();
    follow(&rig, admitted.id).await;
    rig.client.delete_policy(&name("gold")).await.unwrap();

    let mut request = to("host-b");
    request.options.policy = Some(name("gold"));
    assert_eq!(refused(rig.client.migrate(&request).await), ErrorCode::NotFound);
    request.options.policy = Some(name("no-postcopy"));
    let admitted = rig.client.migrate(&request).await.unwrap();
    assert_eq!(admitted.policy, Some(name("no-postcopy")), "what is asked for goes before all");
}

#[tokio::test]
async fn whoever_follows_events_hears_of_policies() {
    let (rig, _a, _b) = two_hosts().await;
    let vm = rig.client.vm("web01").await.unwrap().id;
    rig.client.put_policy(&own("gold")).await.unwrap();
    rig.client.attach_vm_policy("web01", &attach("gold")).await.unwrap();
    let mut events = rig.client.events().await.unwrap();
    // What is there, up to the VM's own: the last that is told of policies.
    let mut told = Vec::new();
    while !matches!(told.last(), Some(Event::PolicyApplied { vm: Some(_), .. })) {
        told.push(events.next().await.unwrap().unwrap());
    }
    let known: Vec<String> = told.iter().filter_map(policy_of).collect();
    assert_eq!(known.len(), Policy::built_in().len() + 1, "{known:?}");
    assert_eq!(applied_of(&told[told.len() - 2]), Some((None, "balanced".to_owned())));
    assert_eq!(applied_of(&told[told.len() - 1]), Some((Some(vm), "gold".to_owned())));

    let mut next = async || loop {
        let event = events.next().await.unwrap().unwrap();
        let of_policies = matches!(event, Event::PolicyDeleted { .. })
            || policy_of(&event).or(applied_of(&event).map(|(_, name)| name)).is_some();
        if of_policies {
            return event;
        }
    };
    rig.client.put_policy(&Policy { max_downtime_ms: 70, ..own("gold") }).await.unwrap();
    let changed = next().await;
    assert!(
        matches!(&changed, Event::Policy { policy } if policy.policy.max_downtime_ms == 70),
        "{changed:?}"
    );
    rig.client.attach_vm_policy("web01", &AttachPolicy::default()).await.unwrap();
    assert_eq!(applied_of(&next().await), Some((Some(vm), "balanced".to_owned())));
    rig.client.attach_pool_policy(&attach("must-finish")).await.unwrap();
    assert_eq!(applied_of(&next().await), Some((None, "must-finish".to_owned())));
    rig.client.delete_policy(&name("gold")).await.unwrap();
    assert_eq!(next().await, Event::PolicyDeleted { name: name("gold") });
}

fn policy_of(event: &Event) -> Option<String> {
    match event {
        Event::Policy { policy } => Some(policy.policy.name.to_string()),
        _ => None,
    }
}

fn applied_of(event: &Event) -> Option<(Option<VmId>, String)> {
    match event {
        Event::PolicyApplied { vm, applied } => Some((*vm, applied.policy.to_string())),
        _ => None,
    }
}

#[tokio::test]
async fn built_in_policies_stay_and_bad_ones_are_refused() {
    let (rig, _a, _b) = two_hosts().await;
    let client = &rig.client;
    let names = async || {
        let all = client.policies().await.unwrap();
        all.iter().map(|one| (one.policy.name.to_string(), one.built_in)).collect::<Vec<_>>()
    };
    assert_eq!(names().await.len(), Policy::built_in().len());
    assert!(names().await.iter().all(|(_, built_in)| *built_in));
    let balanced = Policy { max_downtime_ms: 5, ..Policy::default() };
    assert_eq!(refused(client.put_policy(&balanced).await), ErrorCode::WrongState);
    assert_eq!(refused(client.delete_policy(&balanced.name).await), ErrorCode::WrongState);
    let bad = Policy { max_downtime_ms: 0, max_total_s: Some(u64::MAX), ..own("bad") };
    let error = client.put_policy(&bad).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::OutOfRange);
    assert!(error.message.contains("max_downtime_ms") && error.message.contains("max_total_s"));

    client.put_policy(&own("gold")).await.unwrap();
    let changed = Policy { max_downtime_ms: 70, ..own("gold") };
    client.put_policy(&changed).await.unwrap();
    let found = client.policy(&name("gold")).await.unwrap();
    assert_eq!((found.policy, found.built_in), (changed, false));
    assert_eq!(names().await.last().unwrap(), &("gold".to_owned(), false));
    assert_eq!(refused(client.attach_pool_policy(&attach("silver")).await), ErrorCode::NotFound);
    client.attach_vm_policy("web01", &attach("gold")).await.unwrap();
    assert_eq!(refused(client.delete_policy(&name("gold")).await), ErrorCode::InUse);
    client.stop_vm("web01", &Default::default()).await.unwrap();
    client.delete_vm("web01").await.unwrap();
    client.delete_policy(&name("gold")).await.expect("a VM that is gone holds nothing");
    assert_eq!(refused(client.policy(&name("gold")).await), ErrorCode::NotFound);
}
