//! VMs: their whole life, repeated requests, placement, and what is said of them when their host is silent or strange.

use whimbrel_api::vm::{StopRequest, VmAction, VmState};
use whimbrel_api::{ApiError, Epoch, ErrorCode, VmId};

use super::rig::{MACHINES, Rig, eventually, name, request, spec};
use crate::fake_agent::vm_report;

#[tokio::test]
async fn a_vm_lives_from_creation_to_deletion() {
    let rig = Rig::new().await;
    let agent = rig.host("host-a").await;
    rig.furnish().await;
    let made = rig.create("web01", None).await;
    assert_eq!((made.state.word(), made.host.as_str()), ("stopped", "host-a"));
    assert_eq!(made.definition.machine, "pc-q35-7.2");
    let act = |action| rig.client.vm_action("web01", action);
    assert_eq!(act(VmAction::Start).await.unwrap().state, VmState::Running);
    assert_eq!(act(VmAction::Start).await.unwrap_err().code, ErrorCode::WrongState);
    assert_eq!(act(VmAction::Pause).await.unwrap().state, VmState::Paused);
    assert_eq!(act(VmAction::Resume).await.unwrap().state, VmState::Running);
    assert_eq!(rig.client.vm(&made.id.to_string()).await.unwrap().state, VmState::Running);
    assert_eq!(rig.client.vms().await.unwrap().len(), 1);
    let refused = rig.client.delete_vm("web01").await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::WrongState, "the host's refusal comes through");
    let stopped = rig.client.stop_vm("web01", &StopRequest { force: true }).await.unwrap();
    assert_eq!(stopped.state, VmState::Stopped);
    rig.client.delete_vm("web01").await.unwrap();
    assert_eq!(rig.client.vm("web01").await.unwrap_err().code, ErrorCode::NotFound);
    assert!(agent.vm(made.id).is_none());
}

#[tokio::test]
async fn a_repeated_request_makes_no_second_vm() {
    let rig = Rig::new().await;
    let agent = rig.host("host-a").await;
    rig.furnish().await;
    let first = request("web01", None);
    let made = rig.client.create_vm(&first).await.unwrap();
    assert_eq!(rig.client.create_vm(&first).await.unwrap().definition, made.definition);
    assert_eq!(agent.called("PUT /v1/vms"), 1);
    let mut other = first.clone();
    other.spec.vcpus = 2;
    assert_eq!(rig.client.create_vm(&other).await.unwrap_err().code, ErrorCode::Exists);
    let same_name = rig.client.create_vm(&request("web01", None)).await.unwrap_err();
    assert_eq!(same_name.code, ErrorCode::Exists);
}

#[tokio::test]
async fn a_refused_vm_is_forgotten_and_an_unanswered_one_is_not() {
    let rig = Rig::new().await;
    let mut agent = rig.host("host-a").await;
    rig.furnish().await;
    agent.refuse_next("PUT /v1/vms", ApiError::new(ErrorCode::NoResources, "the disk is full"));
    let refused = rig.client.create_vm(&request("web01", None)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::NoResources);
    assert!(refused.message.contains("host-a"), "{refused}");
    assert!(rig.client.vms().await.unwrap().is_empty());

    let asked = request("web02", Some("host-a"));
    agent.refuse_next("PUT /v1/vms", ApiError::new(ErrorCode::Unreachable, "lost"));
    let unknown = rig.client.create_vm(&asked).await.unwrap_err();
    assert!(unknown.is_unknown());
    assert_eq!(rig.client.vm("web02").await.unwrap().state.word(), "unknown");
    agent.stop().await;
    agent.restart().await;
    rig.until_ready("host-a").await;
    let made = rig.client.create_vm(&asked).await.unwrap();
    assert_eq!((made.id, made.state.word()), (asked.id, "stopped"), "the same request finishes it");
}

#[tokio::test]
async fn a_vm_goes_where_there_is_most_memory_and_becomes_a_machine_that_all_have() {
    let rig = Rig::new().await;
    let a = rig.host_with("host-a", &["pc-q35-7.2", "pc-q35-10.0"]).await;
    let b = rig.host_with("host-b", MACHINES).await;
    rig.furnish().await;
    b.set_free_memory(64 << 30);
    rig.rounds(&b).await;
    let made = rig.create("web01", None).await;
    assert_eq!(made.host.as_str(), "host-b");
    let named = rig.create("web02", Some("host-a")).await;
    assert_eq!(named.host.as_str(), "host-a");
    assert_eq!(named.definition.machine, "pc-q35-7.2", "10.0 is not on every host");
    let mut chosen = request("web03", None);
    chosen.spec.machine = Some("pc-q35-10.0".into());
    assert_eq!(rig.client.create_vm(&chosen).await.unwrap().host.as_str(), "host-a");

    rig.client
        .patch_host(&name("host-b"), &whimbrel_api::pool::HostPatch { enabled: false })
        .await
        .unwrap();
    assert_eq!(rig.create("web04", None).await.host.as_str(), "host-a");
    let refused = rig.client.create_vm(&request("web05", Some("host-b"))).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::WrongState);
    assert_eq!(a.called("PUT /v1/vms"), 3);
}

#[tokio::test]
async fn what_a_vm_needs_must_be_there() {
    let rig = Rig::new().await;
    let _agent = rig.host("host-a").await;
    rig.furnish().await;
    let refused = |change: fn(&mut whimbrel_api::vm::VmSpec)| {
        let mut asked = request("web01", None);
        change(&mut asked.spec);
        let client = rig.client.clone();
        async move { client.create_vm(&asked).await.unwrap_err().code }
    };
    assert_eq!(refused(|s| s.nics[0].network = name("wan")).await, ErrorCode::NotFound);
    assert_eq!(refused(|s| s.disks[0].storage = name("other")).await, ErrorCode::NotFound);
    assert_eq!(refused(|s| s.cpu = Some("EPYC".into())).await, ErrorCode::NoResources);
    assert_eq!(refused(|s| s.machine = Some("pc-q35-9.2".into())).await, ErrorCode::NoResources);
    assert_eq!(refused(|s| s.vcpus = 1000).await, ErrorCode::OutOfRange);
    let nowhere = rig.client.create_vm(&request("web01", Some("host-x"))).await.unwrap_err();
    assert_eq!(nowhere.code, ErrorCode::NotFound);
    assert!(rig.client.vms().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_silent_host_makes_its_vms_unknown_and_never_stopped() {
    let mut rig = Rig::new().await;
    let mut agent = rig.host("host-a").await;
    rig.furnish().await;
    let made = rig.create("web01", None).await;
    rig.client.vm_action("web01", VmAction::Start).await.unwrap();
    agent.stop().await;
    rig.until_state("web01", "unknown").await;
    let error = rig.client.vm_action("web01", VmAction::Pause).await.unwrap_err();
    assert!(error.is_unknown(), "{error}");

    rig.restart().await;
    let vm = rig.client.vm("web01").await.unwrap();
    assert_eq!(vm.state.word(), "unknown", "a new controller has not heard of it either");
    agent.restart().await;
    rig.until_state("web01", "running").await;

    agent.forget_vm(made.id);
    rig.until_state("web01", "unknown").await;
}

#[tokio::test]
async fn only_the_owner_is_believed_and_only_in_its_epoch() {
    let rig = Rig::new().await;
    let a = rig.host("host-a").await;
    let b = rig.host("host-b").await;
    rig.furnish().await;
    let made = rig.create("web01", Some("host-a")).await;
    rig.client.vm_action("web01", VmAction::Start).await.unwrap();

    // Another host says that the VM is its own, in a later epoch even.
    let mut lie = made.definition.clone();
    lie.generation = 9;
    b.set_vm(vm_report(&lie, VmState::Stopped, Epoch(7)));
    rig.rounds(&b).await;
    let vm = rig.client.vm("web01").await.unwrap();
    assert_eq!((vm.host.as_str(), vm.state.word(), vm.epoch), ("host-a", "running", Epoch::FIRST));

    // The owner's word moves the epoch on, and then its older word does not count.
    a.change_vm(made.id, |vm| vm.epoch = Epoch(3));
    rig.rounds(&a).await;
    assert_eq!(rig.client.vm("web01").await.unwrap().epoch, Epoch(3));
    a.change_vm(made.id, |vm| {
        vm.epoch = Epoch(2);
        vm.state = VmState::Stopped;
    });
    rig.rounds(&a).await;
    let vm = rig.client.vm("web01").await.unwrap();
    assert_eq!((vm.state.word(), vm.epoch), ("unknown", Epoch(3)));
}

#[tokio::test]
async fn a_console_carries_bytes_both_ways() {
    let rig = Rig::new().await;
    let _agent = rig.host("host-a").await;
    rig.furnish().await;
    rig.create("web01", None).await;
    let refused = rig.client.console("web01").await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::WrongState, "told before the upgrade");
    rig.client.vm_action("web01", VmAction::Start).await.unwrap();
    let mut console = rig.client.console("web01").await.unwrap();
    assert!(console.write(b"\x00hello\xff").await);
    assert_eq!(console.read().await.unwrap(), b"\x00hello\xff\x00hello\xff");
}

#[tokio::test]
async fn vms_are_found_by_name_or_id_and_nothing_else() {
    let rig = Rig::new().await;
    for (asked, code) in [
        ("web01", ErrorCode::NotFound),
        (VmId::new().to_string().as_str(), ErrorCode::NotFound),
        ("Web01", ErrorCode::BadName),
        ("web_01", ErrorCode::BadName),
        ("%1b%5b31m", ErrorCode::BadName),
        ("..%2f..%2fetc", ErrorCode::BadName),
        (&"x".repeat(64), ErrorCode::BadName),
    ] {
        let error = rig.client.vm(asked).await.unwrap_err();
        assert_eq!(error.code, code, "{asked}");
        assert!(!error.message.contains('\u{1b}'));
    }
    assert_eq!(spec("web01").name, name("web01"));
}

#[tokio::test]
async fn a_host_that_falls_silent_in_the_middle_is_not_waited_for() {
    let rig = Rig::new().await;
    let a = rig.host("host-a").await;
    rig.furnish().await;
    // As a machine that hangs: connections stand, and nothing comes any more.
    a.swallow_next("PUT /v1/vms");
    let request = request("web01", Some("host-a"));
    let creating = rig.client.create_vm(&request);
    let silence = async {
        eventually(|| async { a.called("PUT /v1/vms") > 0 }).await;
        for _ in 0..8 {
            a.swallow_next("GET /v1/host");
        }
    };
    let both = async { tokio::join!(creating, silence).0 };
    let limit = std::time::Duration::from_secs(20);
    let error = tokio::time::timeout(limit, both).await.expect("an answer in time").unwrap_err();
    assert_eq!(error.code, ErrorCode::Unreachable);
    assert_eq!(
        rig.client.vm("web01").await.unwrap().state.word(),
        "unknown",
        "and it is not forgotten"
    );
}
