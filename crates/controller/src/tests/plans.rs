//! Plans, and the way that a migration takes: measured or assumed, chosen, explained, and ordered so at both agents.

use whimbrel_api::agent::{Receive, ReceiveSettings};
use whimbrel_api::measure::DirtyRateRequest;
use whimbrel_api::migration::{
    Compression, CompressionMethod, MigrationState, Mode, Postcopy, Rung,
};
use whimbrel_api::plan::{Measured, PlanRequest, VmPlan};
use whimbrel_api::vm::{StateFile, VmAction};
use whimbrel_api::{ApiError, ErrorCode, MigrationId};
use whimbrel_migration::forecast::Convergence;
use whimbrel_migration::preflight::combinations::EngineAbilities;

use super::migrations::{follow, to, two_hosts};
use super::rig::{Rig, eventually, name};
use crate::fake_agent::{FakeAgent, Measures, Pace};

/// 1 Gbit/s, and pages of which compression leaves a tenth.
const SLOW_LINK: Measures =
    Measures { dirty_bytes_per_s: 0, link_bytes_per_s: 118_000_000, zstd_ratio: 0.1 };

fn request(destinations: &[&str]) -> PlanRequest {
    PlanRequest {
        vm: "web01".into(),
        destinations: destinations.iter().map(|host| name(host)).collect(),
        options: Default::default(),
        fresh: false,
        probe_bytes_per_s: None,
    }
}

fn codes(error: &ApiError) -> Vec<&'static str> {
    error.verdicts.iter().map(|verdict| verdict.code.as_str()).collect()
}

#[tokio::test]
async fn a_plan_says_for_each_host_what_a_move_would_take_and_why() {
    let (rig, a, b) = two_hosts().await;
    let c = rig.host("host-c").await;
    c.mount(7);
    a.set_measures(Measures { dirty_bytes_per_s: 400_000_000, ..SLOW_LINK });
    let plan: VmPlan = rig.client.plan(&request(&[])).await.unwrap();
    assert_eq!((plan.source.as_str(), plan.policy.policy.as_str()), ("host-a", "balanced"));
    let [to_b, to_c] = plan.destinations.as_slice() else { panic!("{plan:?}") };
    assert!(!to_b.refused && to_b.trouble.is_none(), "{to_b:?}");
    assert!(to_c.refused, "its storage is another one: {to_c:?}");
    let found = to_b.plan.as_ref().unwrap();
    assert_eq!(found.plain.convergence, Convergence::No, "the guest writes four times the link");
    assert!(found.strategy.compression.is_some(), "{:?}", found.strategy);
    assert!(found.decisions.iter().any(|why| why.measured.contains("400 MB/s")), "{found:?}");
    let ways: Vec<Rung> = to_b.candidates.iter().map(|way| way.strategy.rung).collect();
    let all = [Rung::Plain, Rung::Channels, Rung::Compression, Rung::Postcopy, Rung::Throttle];
    assert_eq!(ways, [&all[..], &[Rung::Static]].concat());
    let postcopy = to_b.candidates.iter().find(|way| way.strategy.rung == Rung::Postcopy).unwrap();
    assert!(!postcopy.allowed && postcopy.forecast.total_ms.is_some(), "balanced wants a word");
    assert!(to_b.measured.iter().all(|one| one.at.is_some()), "{:?}", to_b.measured);
    assert_eq!(to_b.measurements.as_ref().unwrap().link.bytes_per_s, 118_000_000);

    // What is fresh is not measured again, unless that is asked for.
    let before = (a.called("POST /v1/link"), a.called("POST /v1/vms"));
    rig.client.plan(&request(&["host-b"])).await.unwrap();
    assert_eq!((a.called("POST /v1/link"), a.called("POST /v1/vms")), before);
    let fresh = PlanRequest { fresh: true, ..request(&["host-b"]) };
    rig.client.plan(&fresh).await.unwrap();
    assert!(a.called("POST /v1/link") > before.0 && a.called("POST /v1/vms") > before.1);
    assert_eq!(b.called("PUT /v1/incoming"), 0, "nothing was begun");
    let gone = rig.client.plan(&request(&["host-z"])).await.unwrap_err();
    assert_eq!(gone.code, ErrorCode::NotFound);
    for bad in [
        PlanRequest { probe_bytes_per_s: Some(0), ..request(&["host-b"]) },
        request(&["host-b"; 33]),
    ] {
        assert_eq!(rig.client.plan(&bad).await.unwrap_err().code, ErrorCode::OutOfRange);
    }
}

#[tokio::test]
async fn what_cannot_be_measured_is_assumed_and_said() {
    let (rig, a, mut b) = two_hosts().await;
    let no = || ApiError::new(ErrorCode::Engine, "the fake one does not say");
    a.refuse_next("POST /v1/link", no());
    a.refuse_next("POST /v1/vms", no());
    let plan = rig.client.plan(&request(&["host-b"])).await.unwrap();
    let one = &plan.destinations[0];
    let missing: Vec<Measured> =
        one.measured.iter().filter(|m| m.at.is_none()).map(|m| m.what).collect();
    assert_eq!(missing, [Measured::DirtyRate, Measured::Link]);
    let first = one.plan.as_ref().unwrap().decisions[0].to_string();
    assert!(first.contains("the fake one does not say") && first.contains("assume"), "{first}");
    b.stop().await;
    let plan = rig.client.plan(&request(&["host-b"])).await.unwrap();
    assert!(plan.destinations[0].trouble.is_some() && plan.destinations[0].refused);
}

#[tokio::test]
async fn a_migration_goes_the_way_that_was_chosen_and_keeps_why() {
    let (mut rig, a, b) = two_hosts().await;
    a.set_measures(SLOW_LINK);
    rig.world.set_pace(Pace::Hangs);
    let request = to("host-b");
    let admitted = rig.client.migrate(&request).await.unwrap();
    let strategy = admitted.strategy.clone().unwrap();
    assert_eq!(strategy.rung, Rung::Compression, "{:?}", admitted.decisions);
    assert!(admitted.forecast.is_some() && !admitted.decisions.is_empty());
    assert_eq!(admitted.policy, Some(name("balanced")));
    eventually(|| async { a.outgoing_request(request.id).is_some() }).await;
    let (sent, _) = a.outgoing_request(request.id).unwrap();
    assert_eq!((&sent.strategy, sent.policy.name.as_str()), (&strategy, "balanced"));
    assert_eq!(sent.forecast, admitted.forecast);
    let received = b.incoming_request(request.id).unwrap();
    assert_eq!(received.receive, Receive::Guest(ReceiveSettings::of(&strategy, None)));
    assert_eq!(a.called("POST /v1/vms"), 2, "started, and its pages counted: {}", a.name);

    // All of it outlives the controller.
    rig.restart().await;
    let taken_up = rig.client.migration(request.id).await.unwrap();
    assert_eq!((taken_up.strategy, taken_up.decisions), (Some(strategy), admitted.decisions));
    eventually(|| async { rig.client.cancel_migration(request.id).await.is_ok() }).await;
    follow(&rig, request.id).await;
    let kept = rig.client.migration_statistics(request.id).await.unwrap();
    assert_eq!(kept.samples.len(), 1);
    assert_eq!(kept.raw.unwrap()["total-time"], 7);
}

#[tokio::test]
async fn a_migration_does_not_wait_for_a_measurement_that_takes_long() {
    let (rig, a, _b) = two_hosts().await;
    a.swallow_next("POST /v1/link");
    let admitted = rig.client.migrate(&to("host-b")).await.unwrap();
    let first = admitted.decisions[0].to_string();
    assert!(first.contains("the link") && first.contains("ms"), "{first}");
    assert_eq!(follow(&rig, admitted.id).await.state, MigrationState::Moved);
    // What leads to nothing is not measured.
    let before = rig_calls(&a);
    let mut pinned = to("host-a");
    pinned.options.parallel_connections = Some(3);
    pinned.options.compression = Some(Compression::default());
    let admitted = rig.client.migrate(&pinned).await.unwrap();
    assert_eq!(admitted.strategy.unwrap().channels, Some(3));
    assert_eq!(rig_calls(&a), before);
}

fn rig_calls(agent: &FakeAgent) -> usize {
    agent.called("POST /v1/link")
}

#[tokio::test]
async fn combinations_are_refused_all_at_once_with_what_both_ends_can_do() {
    let (rig, _a, b) = two_hosts().await;
    b.forget_capability("postcopy-ram");
    let mut request = to("host-b");
    request.options.postcopy = Some(Postcopy::default());
    request.options.zerocopy = true;
    request.options.policy = Some(name("no-postcopy"));
    request.options.compression =
        Some(Compression { methods: vec![CompressionMethod::Xbzrle], ..Default::default() });
    let error = rig.client.migrate(&request).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::PreflightRefused, "{error}");
    let found = codes(&error);
    for code in [
        "policy-forbids",
        "zerocopy-alone",
        "zerocopy-tls",
        "zerocopy-compression",
        "engine-feature",
    ] {
        assert!(found.contains(&code), "{code} is not among {found:?}");
    }
    assert!(rig.client.migrations().await.unwrap().is_empty(), "nothing was begun");
    request.options.max_downtime_ms = Some(0);
    request.options.bandwidth_bytes_per_s = Some(1 << 63);
    let error = rig.client.migrate(&request).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::OutOfRange);
    assert!(error.message.contains("max_downtime_ms") && error.message.contains("bandwidth"));
}

#[tokio::test]
async fn an_offline_move_takes_the_definition_only() {
    let (rig, a, b) = two_hosts().await;
    let mut request = to("host-b");
    request.options.mode = Mode::Offline;
    let error = rig.client.migrate(&request).await.unwrap_err();
    assert!(codes(&error).contains(&"vm-not-stopped"), "{error:?}");
    rig.client.stop_vm("web01", &Default::default()).await.unwrap();
    rig.world.set_pace(Pace::Hangs);
    let admitted = rig.client.migrate(&request).await.unwrap();
    assert_eq!((admitted.strategy, admitted.forecast), (None, None));
    eventually(|| async { b.incoming_request(request.id).is_some() }).await;
    assert_eq!(b.incoming_request(request.id).unwrap().receive, Receive::Definition);
    // Whether the source may send here is asked by a knock each time; how fast the way is does not matter.
    assert_eq!((a.called("POST /v1/link"), a.called("POST /v1/knock/connect")), (0, 2));
    eventually(|| async { completes(&rig, request.id).await }).await;
    assert_eq!(follow(&rig, request.id).await.state, MigrationState::Moved);
    let vm = rig.client.vm("web01").await.unwrap();
    assert_eq!((vm.host.as_str(), vm.state.word()), ("host-b", "stopped"));
}

#[tokio::test]
async fn a_vm_arrives_under_another_name_which_is_its_own_meanwhile() {
    let (rig, _a, b) = two_hosts().await;
    rig.create("web02", Some("host-a")).await;
    let mut taken = to("host-b");
    taken.options.dname = Some(name("web02"));
    assert_eq!(rig.client.migrate(&taken).await.unwrap_err().code, ErrorCode::Exists);
    rig.world.set_pace(Pace::Hangs);
    let mut request = to("host-b");
    request.options.dname = Some(name("web03"));
    rig.client.migrate(&request).await.unwrap();
    let created = rig.client.create_vm(&super::rig::request("web03", None)).await;
    assert_eq!(created.unwrap_err().code, ErrorCode::Exists, "it will be another one's");
    eventually(|| async { b.incoming_request(request.id).is_some() }).await;
    assert_eq!(b.incoming_request(request.id).unwrap().definition.name, name("web03"));
    eventually(|| async { completes(&rig, request.id).await }).await;
    assert_eq!(follow(&rig, request.id).await.state, MigrationState::Moved);
    let vm = rig.client.vm("web03").await.unwrap();
    assert_eq!((vm.host.as_str(), vm.definition.name), ("host-b", name("web03")));
    assert_eq!(rig.client.vm("web01").await.unwrap_err().code, ErrorCode::NotFound);
}

async fn completes(rig: &Rig, id: MigrationId) -> bool {
    let action = whimbrel_api::migration::MigrationAction::ForceComplete;
    rig.client.migration_action(id, action).await.is_ok()
}

#[tokio::test]
async fn a_vm_is_measured_saved_and_restored() {
    let (rig, a, _b) = two_hosts().await;
    a.set_measures(Measures { dirty_bytes_per_s: 64 << 20, ..SLOW_LINK });
    let rate = rig.client.dirty_rate("web01", &DirtyRateRequest::default()).await.unwrap();
    assert_eq!(rate.megabytes_per_second, Some(64));
    let file = StateFile { file: "shared/web01.state".parse().unwrap() };
    assert_eq!(rig.client.save_vm("web01", &file).await.unwrap().state.word(), "stopped");
    let again = rig.client.save_vm("web01", &file).await.unwrap_err();
    assert_eq!(again.code, ErrorCode::WrongState);
    assert_eq!(rig.client.restore_vm("web01", &file).await.unwrap().state.word(), "running");
    rig.client.vm_action("web01", VmAction::Pause).await.unwrap();
}

#[test]
fn an_agent_that_says_nothing_of_its_engine_is_still_understood() {
    let report = serde_json::json!({
        "version": "7.2.0", "accelerator": "tcg", "machines": [], "cpu_models": []
    });
    let report: whimbrel_api::agent::EngineReport = serde_json::from_value(report).unwrap();
    assert_eq!(report.abilities, None::<EngineAbilities>);
}
