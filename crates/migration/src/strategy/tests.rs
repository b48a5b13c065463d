//! The ladder over situations of every kind, and stepping up.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    Allowed, CompressionSetting, Decision, GAIN_MIN_PERCENT, Observed, PassSeen, Plan,
    PostcopyBegin, Rejection, Rung, Situation, Step, Strategy, ThrottleSetting, plan, replan,
    replan_measured,
};
use crate::forecast::Convergence;
use crate::forecast::facts::{
    Census, CompressionSample, CpuSpare, DirtyMeasure, DirtyWindow, EngineCosts, LinkMeasure,
    Measurements,
};
use crate::names::Name;
use crate::options::{CompressionMethod, MigrateOptions};
use crate::policy::Policy;
use crate::preflight::combinations::tests::able;
use crate::preflight::combinations::{Combination, combinations};
use crate::preflight::{EngineAbilities, GuestState, refuses};

const GIB: u64 = 1 << 30;

/// What there is, and what is asked for.
struct World {
    facts: Measurements,
    options: MigrateOptions,
    policy: Policy,
    source: EngineAbilities,
    destination: EngineAbilities,
}

impl World {
    /// A guest of 1 GiB that writes so much over a set, over 1 Gbit/s, between hosts of eight cores.
    fn new(mb_per_s: u64, set_mb: u64) -> Self {
        let at = |window_ms: u64| DirtyWindow {
            window_ms,
            dirtied_bytes: (mb_per_s * window_ms * 1_000).min(set_mb * 1_000_000),
        };
        let cpu = CpuSpare { spare_cores: 6.0, cores: 8 };
        Self {
            facts: Measurements {
                memory_bytes: GIB,
                census: Census { sampled_pages: 1_000, ..Census::default() },
                dirty: DirtyMeasure {
                    windows: [250, 500, 1_000, 2_000, 4_000].map(at).to_vec(),
                    vcpu_busy_share: 1.0,
                },
                link: LinkMeasure { bytes_per_s: 117_000_000, at_least: false, rtt_us: 200 },
                source_cpu: cpu,
                destination_cpu: cpu,
                hosts_share_cpu: false,
            },
            options: MigrateOptions::default(),
            policy: Policy::default(),
            source: able("10.0.2"),
            destination: able("10.0.2"),
        }
    }

    fn asking(mut self, options: Value) -> Self {
        self.options = serde_json::from_value(options).unwrap();
        self
    }

    fn under(mut self, policy: &str) -> Self {
        self.policy = Policy::named(policy).unwrap();
        self
    }

    /// Pages that zstd halves, at a cost in nanoseconds per byte.
    fn compressible(mut self, compress_ns_per_byte: f64) -> Self {
        self.facts.census.compression = vec![CompressionSample {
            method: CompressionMethod::Zstd,
            level: 1,
            ratio: 0.4,
            compress_ns_per_byte,
            decompress_ns_per_byte: 1.0,
        }];
        self
    }

    fn plan(&self) -> Plan {
        let costs = EngineCosts::default();
        plan(&Situation {
            facts: &self.facts,
            costs: &costs,
            source: &self.source,
            destination: &self.destination,
            options: &self.options,
            policy: &self.policy,
        })
    }

    fn rung(&self) -> Rung {
        self.plan().strategy.rung
    }
}

fn rejected<'a>(plan: &'a Plan, what: &str) -> &'a str {
    let all = plan.decisions.iter().flat_map(|decision| &decision.rejected);
    let found = all.into_iter().find(|rejection| rejection.what.contains(what));
    found.map_or("", |rejection| rejection.why.as_str())
}

#[test]
fn an_idle_guest_on_a_slow_link_takes_the_first_rung() {
    let plan = World::new(0, 0).plan();
    assert_eq!(plan.strategy.rung, Rung::Plain);
    assert_eq!(plan.strategy.channels, None);
    assert!(plan.will_do && plan.strategy.tls);
    assert_eq!(plan.strategy.throttle, Some(ThrottleSetting::RESERVE));
    assert_eq!(plan.strategy.postcopy, None);
    assert!(rejected(&plan, "connections").contains("gains too little"));
    assert!(rejected(&plan, "compression").contains("no method"));
}

#[test]
fn a_fast_link_is_given_more_connections() {
    let mut world = World::new(0, 0);
    world.facts.link.bytes_per_s = 12_500_000_000;
    let plan = world.plan();
    assert_eq!(plan.strategy.rung, Rung::Channels);
    assert!(plan.strategy.channels.is_some_and(|channels| channels > 1));
    assert!(plan.forecast.total_ms < plan.plain.total_ms);
    assert!(rejected(&plan, "compression").contains("not the network"));
    world.destination.capabilities.remove("multifd");
    let plan = world.plan();
    assert_eq!(plan.strategy.rung, Rung::Plain);
    assert!(rejected(&plan, "parallel connections").contains("not both engines"));
}

#[test]
fn compression_is_taken_where_the_network_holds_it_back_and_it_pays() {
    let plan = World::new(0, 0).compressible(3.0).plan();
    assert_eq!(plan.strategy.rung, Rung::Compression);
    assert_eq!(plan.strategy.compression, Some(CompressionSetting::Zstd { level: 1 }));
    assert!(plan.strategy.channels.is_some());
    // Too dear for these processors: 8 threads at 100 ns a byte are 80 MB/s.
    assert_eq!(World::new(0, 0).compressible(100.0).rung(), Rung::Plain);
    // Or hardly worth it.
    let mut random = World::new(0, 0).compressible(1.0);
    random.facts.census.compression[0].ratio = 0.95;
    let plan = random.plan();
    assert_eq!(plan.strategy.rung, Rung::Plain);
    assert!(rejected(&plan, "zstd").contains("gains too little"));
    // An old engine counts a limit by what is not compressed yet.
    let limited = json!({"bandwidth_bytes_per_s": 20_000_000});
    let mut slow = World::new(0, 0).compressible(3.0).asking(limited);
    assert_eq!(slow.rung(), Rung::Compression);
    slow.source = able("7.2.22");
    assert_eq!(slow.rung(), Rung::Plain);
    let mut older = World::new(0, 0).compressible(3.0);
    older.source.compressions.remove("zstd");
    assert_eq!(older.rung(), Rung::Plain);
}

#[test]
fn compression_can_make_it_converge() {
    // 150 MB/s are too much for 117 MB/s, and not for what they compress to.
    let world = World::new(150, 100_000).compressible(3.0);
    let plan = world.plan();
    assert_eq!(plan.plain.convergence, Convergence::No);
    assert_eq!(plan.forecast.convergence, Convergence::Yes);
    assert_eq!(plan.strategy.rung, Rung::Compression);
}

#[test]
fn a_longer_pause_is_taken_within_the_policys_limit_only() {
    // 60 MB over and over are half a second.
    let plan = World::new(300, 60).plan();
    assert_eq!(plan.strategy.rung, Rung::Downtime);
    assert_eq!(plan.strategy.max_downtime_ms, 600);
    assert!(plan.forecast.downtime_ms.is_some_and(|ms| ms < 620.0));
    assert_ne!(World::new(300, 60).under("minimal-downtime").rung(), Rung::Downtime);
    let world = World::new(300, 60).asking(json!({"max_downtime_ms": 300}));
    let plan = world.plan();
    assert_ne!(plan.strategy.rung, Rung::Downtime);
    assert!(rejected(&plan, "a longer pause").contains("300 ms is the limit"));
}

#[test]
fn postcopy_is_taken_where_it_is_allowed() {
    let heavy = || World::new(300, 100_000);
    for world in [heavy().under("minimal-downtime"), heavy().asking(json!({"postcopy": {}}))] {
        let plan = world.plan();
        assert_eq!(plan.strategy.rung, Rung::Postcopy);
        assert!(plan.will_do);
        let postcopy = plan.strategy.postcopy.unwrap();
        assert_eq!(postcopy.begin, PostcopyBegin::AtOnce);
        assert!(postcopy.preempt);
        assert_eq!((plan.strategy.channels, plan.strategy.compression), (None, None));
        assert!(plan.forecast.postcopy.is_some());
    }
    let plan = heavy().plan();
    assert_eq!(plan.strategy.rung, Rung::Throttle);
    assert!(rejected(&plan, "post-copy").contains("wants it to be asked for"));
    let mut world = heavy().under("must-finish");
    world.destination.postcopy_obstacle = Some("no userfaultfd".into());
    let plan = world.plan();
    assert_eq!(plan.strategy.rung, Rung::Throttle);
    assert!(rejected(&plan, "post-copy").contains("userfaultfd"));
}

#[test]
fn after_a_first_pass_it_is_taken_even_where_pre_copy_would_do() {
    for options in [
        json!({"postcopy": {"after_precopy": true}}),
        json!({"postcopy": {"after_precopy": true}, "timeout": {"seconds": 60}}),
    ] {
        assert_eq!(World::new(0, 0).asking(options).rung(), Rung::Postcopy);
    }
}

#[test]
fn throttling_is_the_last_thing_done_to_a_running_guest() {
    let plan = World::new(300, 100_000).under("no-postcopy").plan();
    assert_eq!(plan.strategy.rung, Rung::Throttle);
    assert_eq!(plan.strategy.throttle, Some(ThrottleSetting::STANDARD));
    assert!(plan.forecast.throttle_percent > 20.0);
    let world = World::new(300, 100_000)
        .asking(json!({"auto_converge": {"initial_percent": 40, "increment_percent": 20}}));
    let throttle = world.plan().strategy.throttle.unwrap();
    assert_eq!((throttle.initial_percent, throttle.increment_percent), (40, 20));
}

/// A guest whose writes no throttle slows: its vCPUs are hardly used.
fn unthrottled() -> World {
    let mut world = World::new(300, 100_000);
    world.facts.dirty.vcpu_busy_share = 0.01;
    world
}

#[test]
fn the_guest_is_stopped_only_where_the_policy_allows_it() {
    let mut world = unthrottled().under("must-finish");
    world.destination.capabilities.remove("postcopy-ram");
    assert_eq!(world.rung(), Rung::Static);
    assert_eq!(unthrottled().asking(json!({"mode": "quick"})).rung(), Rung::Static);
    let plan = unthrottled().plan();
    assert!(!plan.will_do && !plan.strategy.stop_first);
    assert!(rejected(&plan, "stopping the guest").contains("unasked"));
    let mut live = unthrottled().under("must-finish").asking(json!({"mode": "live"}));
    live.destination.capabilities.remove("postcopy-ram");
    let plan = live.plan();
    assert!(!plan.will_do && !plan.strategy.stop_first);
    assert!(rejected(&plan, "stopping the guest").contains("--live"));
    let plan = World::new(0, 0).asking(json!({"mode": "static"})).plan();
    assert_eq!((plan.strategy.rung, plan.strategy.throttle), (Rung::Static, None));
    assert!(plan.will_do && plan.strategy.stop_first);
    // Quick is live where that converges.
    assert_eq!(World::new(1, 10).asking(json!({"mode": "quick"})).rung(), Rung::Plain);
}

#[test]
fn a_limit_of_time_counts() {
    let mut world = World::new(90, 100_000).under("must-finish");
    let without = world.plan();
    world.policy.max_total_s = Some(15);
    let with = world.plan();
    assert!(without.strategy.rung < with.strategy.rung, "{:?} {:?}", without, with);
    world.policy.max_total_s = Some(1);
    assert!(!world.plan().will_do);
}

#[test]
fn what_the_user_has_said_is_kept() {
    let options = json!({
        "parallel_connections": 6, "compression": {"methods": ["zlib"], "zlib_level": 4}, "tls": false,
        "bandwidth_bytes_per_s": 50_000_000, "max_downtime_ms": 77,
        "available_switchover_bandwidth_bytes_per_s": 80_000_000,
    });
    let strategy = World::new(1, 10).compressible(3.0).asking(options).plan().strategy;
    assert_eq!(strategy.channels, Some(6));
    assert_eq!(strategy.compression, Some(CompressionSetting::Zlib { level: 4 }));
    assert_eq!(strategy.bandwidth_bytes_per_s, Some(50_000_000));
    assert_eq!(strategy.switchover_bandwidth_bytes_per_s, Some(80_000_000));
    assert_eq!((strategy.max_downtime_ms, strategy.tls), (77, false));
    let xbzrle = json!({"compression": {"methods": ["xbzrle"]}});
    let strategy = World::new(1, 10).asking(xbzrle).plan().strategy;
    assert_eq!(strategy.compression, Some(CompressionSetting::Xbzrle { cache_bytes: 64 << 20 }));
    assert_eq!(strategy.channels, None);
    let zerocopy = json!({"zerocopy": true, "parallel_connections": 2, "tls": false});
    let strategy = World::new(1, 10).compressible(0.1).asking(zerocopy).plan().strategy;
    assert!(strategy.zerocopy && strategy.compression.is_none());
    let postcopy = json!({"postcopy": {"bandwidth_bytes_per_s": 9_000_000}, "mode": "live"});
    let strategy = World::new(1, 10).asking(postcopy).plan().strategy;
    let reserve = strategy.postcopy.unwrap();
    assert_eq!(reserve.begin, PostcopyBegin::WhenStalled);
    assert_eq!(reserve.bandwidth_bytes_per_s, Some(9_000_000));
}

#[test]
fn a_guest_whose_writing_is_not_known_has_postcopy_in_reserve_where_it_is_allowed() {
    let reserve = |policy: &str, measured: bool| {
        let mut world = World::new(1, 10).under(policy);
        if !measured {
            world.facts.dirty = DirtyMeasure::default();
        }
        world.plan().strategy.postcopy.map(|postcopy| postcopy.begin)
    };
    assert_eq!(reserve("minimal-downtime", false), Some(PostcopyBegin::WhenStalled));
    assert_eq!(reserve("minimal-downtime", true), None);
    assert_eq!(reserve("balanced", false), None);
}

#[test]
fn what_keeps_postcopy_out_is_not_chosen_while_it_may_be_needed() {
    let world = |policy: &str, options: Value, measured: bool| {
        let mut world = World::new(1, 10).compressible(3.0).under(policy).asking(options);
        if !measured {
            world.facts.dirty = DirtyMeasure::default();
        }
        world
    };
    let limited = || json!({"bandwidth_bytes_per_s": 20_000_000});
    let plan = world("minimal-downtime", limited(), false).plan();
    assert_eq!(plan.strategy.channels, None);
    assert_eq!(plan.strategy.postcopy.unwrap().begin, PostcopyBegin::WhenStalled);
    assert!(rejected(&plan, "parallel connections").contains("not known how fast"));
    // It is known, it is not allowed, compression is asked for, or these engines can do both.
    assert_eq!(world("minimal-downtime", limited(), true).rung(), Rung::Compression);
    assert_eq!(world("balanced", limited(), false).rung(), Rung::Compression);
    let asked = json!({"compression": {}});
    assert_eq!(world("minimal-downtime", asked, false).rung(), Rung::Compression);
    let mut newer = world("minimal-downtime", limited(), false);
    (newer.source, newer.destination) = (able("10.1.0"), able("10.1.0"));
    let plan = newer.plan();
    assert_eq!(plan.strategy.rung, Rung::Compression);
    assert_eq!(plan.strategy.postcopy.unwrap().begin, PostcopyBegin::WhenStalled);
}

#[test]
fn who_gives_a_timeout_is_not_helped_otherwise() {
    let options = json!({"postcopy": {}, "timeout": {"seconds": 20, "then": "postcopy"}});
    let world = World::new(300, 100_000).under("must-finish").asking(options);
    let plan = world.plan();
    assert!(plan.will_do && plan.forecast.total_ms.is_none());
    assert_eq!(plan.strategy.rung, Rung::Plain);
    assert_eq!(plan.strategy.postcopy.unwrap().begin, PostcopyBegin::WhenOrdered);
    assert_eq!(plan.strategy.throttle, None);
    assert!(plan.decisions[1].chosen.contains("after 20 s post-copy begins"));
    let allowed = Allowed::of(&world.policy, &world.options);
    assert!(!allowed.throttle && !allowed.stopping);
    let asked = json!({"auto_converge": {}, "timeout": {"seconds": 20}});
    let plan = World::new(300, 100_000).asking(asked).plan();
    assert_eq!(plan.strategy.throttle, Some(ThrottleSetting::STANDARD));
    assert!(plan.decisions[1].chosen.contains("after 20 s the guest is stopped"));
}

#[test]
fn postcopy_is_made_ready_where_it_is_close() {
    let close = World::new(70, 100_000).under("minimal-downtime").plan();
    assert_eq!(close.strategy.rung, Rung::Plain);
    assert_eq!(close.strategy.postcopy.unwrap().begin, PostcopyBegin::WhenStalled);
    let far = World::new(10, 100_000).under("minimal-downtime").plan();
    assert_eq!(far.strategy.postcopy, None);
}

#[test]
fn each_decision_is_one_line_that_says_all() {
    let world = World::new(300, 100_000).under("must-finish").compressible(3.0);
    let plan = world.plan();
    assert_eq!(plan.decisions.len(), 2);
    for decision in &plan.decisions {
        let line = decision.to_string();
        assert!(!line.contains('\n') && line.starts_with("measured: "), "{line}");
        assert!(line.contains("; chosen: ") && line.contains("; rejected: "), "{line}");
    }
    let first = plan.decisions[0].to_string();
    for word in ["1.1 GB of memory", "0 % zero", "300 MB/s", "117 MB/s", "6.0 and 6.0 cores"] {
        assert!(first.contains(word), "{first} lacks {word}");
    }
    let decision = Decision {
        measured: "a".into(),
        chosen: "b".into(),
        rejected: ["c", "d"].map(|what| Rejection { what: what.into(), why: "e".into() }).to_vec(),
    };
    assert_eq!(decision.to_string(), "measured: a; chosen: b; rejected: c (e), d (e)");
}

#[test]
fn a_plan_can_be_kept() {
    let plan = World::new(300, 100_000).under("must-finish").plan();
    let json = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
}

/// A strategy as options, to hold it against the rules for combinations.
fn as_options(strategy: &Strategy) -> Value {
    let mut options = json!({"tls": strategy.tls, "zerocopy": strategy.zerocopy});
    let mut set = |key: &str, value: Value| options[key] = value;
    if let Some(channels) = strategy.channels {
        set("parallel_connections", json!(channels));
    }
    if let Some(compression) = strategy.compression {
        set("compression", json!({"methods": [compression.method()]}));
    }
    if strategy.postcopy.is_some() {
        set("postcopy", json!({}));
    }
    if strategy.throttle.is_some() {
        set("auto_converge", json!({}));
    }
    options
}

proptest! {
    /// Whatever is chosen, preflight would not refuse it: neither the engines' rules nor the policy's.
    #[test]
    fn nothing_is_chosen_that_would_be_refused(
        mb_per_s in 0_u64..400, set_mb in 1_u64..2_000, policy in 0_usize..4, ns in 0.5_f64..50.0,
        versions in (0_usize..3, 0_usize..3), lacks in 0_usize..8, pinned in 0_usize..5,
        link in 10_000_000_u64..3_000_000_000,
    ) {
        let mut world = World::new(mb_per_s, set_mb).compressible(ns);
        world.facts.link.bytes_per_s = link;
        world.policy = Policy::built_in().swap_remove(policy);
        let known = ["7.2.22", "10.0.2", "10.1.0"];
        world.source = able(known[versions.0]);
        world.destination = able(known[versions.1]);
        let features = ["auto-converge", "multifd", "postcopy-ram", "postcopy-preempt", "xbzrle"];
        if let Some(feature) = features.get(lacks) {
            world.source.capabilities.remove(*feature);
            world.destination.capabilities.remove(*feature);
        }
        let pins = [
            json!({}), json!({"mode": "live"}), json!({"mode": "quick"}), json!({"postcopy": {}}),
            json!({"compression": {}}),
        ];
        world = world.asking(pins[pinned].clone());
        let (vm, a, b) = ["web01", "host-a", "host-b"].map(|text| Name::new(text).unwrap()).into();
        let judged = |options: &MigrateOptions| combinations(&Combination {
            vm: &vm,
            state: GuestState::Running,
            options,
            policy: &world.policy,
            source: (&a, Some(&world.source)),
            destination: (&b, Some(&world.destination)),
        });
        prop_assume!(!refuses(&judged(&world.options)));
        let plan = world.plan();
        let chosen = serde_json::from_value(as_options(&plan.strategy)).unwrap();
        let verdicts = judged(&chosen);
        prop_assert!(!refuses(&verdicts), "{:?} {:?}", plan.strategy, verdicts);
        let allowed = Allowed::of(&world.policy, &world.options);
        prop_assert!(allowed.stopping || !plan.strategy.stop_first);
        prop_assert!(plan.strategy.max_downtime_ms <= allowed.max_downtime_ms);
        prop_assert_eq!(plan.will_do, plan.forecast.total_ms.is_some() && plan.will_do);
        // A rung that the guest feels is taken only where those that it does not feel will not do.
        if plan.plain.convergence == Convergence::Yes && pinned < 3 {
            prop_assert!(plan.strategy.rung <= Rung::Compression);
            let gain = 1.0 - GAIN_MIN_PERCENT / 100.0;
            let (plain, taken) = (plan.plain.total_ms.unwrap(), plan.forecast.total_ms.unwrap());
            prop_assert!(plan.strategy.rung == Rung::Plain || taken <= plain * gain.max(0.98));
        }
    }
}

// Stepping up.

fn passes(rests_mb: &[u64]) -> Vec<PassSeen> {
    let pass = |(index, mb): (usize, &u64)| PassSeen {
        pass: index as u64 + 2,
        rest_bytes: mb * 1_000_000,
    };
    rests_mb.iter().enumerate().map(pass).collect()
}

/// A copy as forecast, with its aim at its end.
fn seen(plan: &Plan, rests_mb: &[u64]) -> Observed {
    Observed {
        elapsed_ms: 20_000,
        passes: passes(rests_mb),
        wire_bytes_per_s: plan.forecast.wire_bytes_per_s,
        dirty_bytes_per_s: 10e6,
        aim_ms: plan.strategy.max_downtime_ms,
        throttle_percent: 0,
        past_choice: false,
    }
}

const STALLED: &[u64] = &[100, 98, 99, 97, 98];

#[test]
fn what_goes_well_is_let_alone() {
    let world = World::new(50, 100_000).under("must-finish");
    let plan = world.plan();
    let allowed = Allowed::of(&world.policy, &world.options);
    let asked = |seen: &Observed| replan(seen, &plan.forecast, &plan.strategy, &allowed);
    assert_eq!(asked(&seen(&plan, &[])), None);
    assert_eq!(asked(&seen(&plan, &[100, 98, 99])), None, "too few passes to tell");
    assert_eq!(asked(&seen(&plan, &[400, 200, 100, 50, 25])), None);
    let small: Vec<u64> = STALLED.iter().map(|rest| rest / 5).collect();
    assert_eq!(asked(&Observed { aim_ms: 8, ..seen(&plan, &small) }), None, "the aim still grows");
    let aim_in_vain = Observed { aim_ms: 8, ..seen(&plan, STALLED) };
    assert!(asked(&aim_in_vain).is_some(), "300 ms would not reach");
    assert_eq!(asked(&Observed { past_choice: true, ..seen(&plan, STALLED) }), None);
    assert!(asked(&seen(&plan, STALLED)).is_some());
}

#[test]
fn a_stall_climbs_rung_by_rung_to_the_end_of_what_is_allowed() {
    let world = World::new(50, 100_000).under("must-finish");
    let plan = world.plan();
    let allowed = Allowed::of(&world.policy, &world.options);
    let mut strategy = Strategy { postcopy: None, ..plan.strategy.clone() };
    let mut steps = Vec::new();
    loop {
        let mut seen = seen(&plan, STALLED);
        seen.aim_ms = strategy.max_downtime_ms;
        seen.throttle_percent = 99;
        let Some(step_up) = replan(&seen, &plan.forecast, &strategy, &allowed) else { break };
        assert!(step_up.decision.measured.contains("98 MB"), "{}", step_up.decision);
        assert!(step_up.strategy.rung >= strategy.rung);
        strategy = step_up.strategy;
        steps.push(step_up.step);
    }
    let pauses: Vec<u64> = steps
        .iter()
        .filter_map(|step| match step {
            Step::Downtime { max_downtime_ms } => Some(*max_downtime_ms),
            _ => None,
        })
        .collect();
    assert_eq!(pauses, [600, 1_200, 2_400, 4_800, 5_000]);
    assert_eq!(steps[5..], [Step::Throttle { throttle: ThrottleSetting::STANDARD }, Step::Stop]);
    assert!(strategy.stop_first);
}

#[test]
fn postcopy_that_was_made_ready_is_begun_and_one_that_waits_for_an_order_is_not() {
    let world = World::new(70, 100_000).under("minimal-downtime");
    let plan = world.plan();
    let allowed = Allowed::of(&world.policy, &world.options);
    let step = |strategy: &Strategy| {
        let step_up = replan(&seen(&plan, STALLED), &plan.forecast, strategy, &allowed).unwrap();
        (step_up.step, step_up.strategy.rung)
    };
    assert_eq!(step(&plan.strategy), (Step::Postcopy, Rung::Postcopy));
    let mut ordered = plan.strategy.clone();
    ordered.postcopy.as_mut().unwrap().begin = PostcopyBegin::WhenOrdered;
    assert_eq!(step(&ordered).1, Rung::Throttle);
    let bare = Strategy { throttle: None, postcopy: None, ..ordered };
    let step_up = replan(&seen(&plan, STALLED), &plan.forecast, &bare, &allowed).unwrap();
    assert_eq!((step_up.step, step_up.strategy), (Step::Nothing, bare));
    assert_eq!(step_up.decision.rejected.len(), 4);
}

#[test]
fn what_no_pause_can_hold_is_not_waited_for() {
    let world = World::new(0, 0).asking(json!({"postcopy": {}}));
    let plan = world.plan();
    let allowed = Allowed::of(&world.policy, &world.options);
    let mut seen = seen(&plan, &[870, 860]);
    (seen.aim_ms, seen.dirty_bytes_per_s) = (2, 115e6);
    let step_up = replan(&seen, &plan.forecast, &plan.strategy, &allowed).unwrap();
    let rejected = step_up.decision.rejected;
    assert_eq!((step_up.step, rejected[0].what.as_str()), (Step::Postcopy, "a longer pause"));
}

#[test]
fn a_guest_that_turns_out_to_write_too_much_is_helped_in_the_first_pass() {
    let step = |written: &World, world: &World| {
        // Begun as one that writes nothing, which is what is assumed where nothing was measured.
        let Plan { strategy, .. } = World {
            facts: Measurements { dirty: DirtyMeasure::default(), ..world.facts.clone() },
            ..World::new(0, 0)
        }
        .asking(serde_json::to_value(&world.options).unwrap())
        .plan();
        let allowed = Allowed::of(&world.policy, &world.options);
        replan_measured(&written.facts, &EngineCosts::default(), &strategy, &allowed)
    };
    let (plain, postcopy) = (World::new(0, 0), World::new(0, 0).asking(json!({"postcopy": {}})));
    for (mb_per_s, set_mb, world, expected) in [
        (10, 100, &postcopy, None),
        (250, 900, &postcopy, Some(Step::Postcopy)),
        (250, 300, &postcopy, Some(Step::PostcopyAfterPass)),
        (250, 900, &plain, Some(Step::Throttle { throttle: ThrottleSetting::STANDARD })),
    ] {
        let step_up = step(&World::new(mb_per_s, set_mb), world);
        assert_eq!(step_up.as_ref().map(|up| up.step), expected, "{mb_per_s} {set_mb}");
        if let Some(step_up) = step_up {
            assert!(step_up.decision.measured.contains("250 MB/s"), "{}", step_up.decision);
            assert!(step_up.strategy.rung >= Rung::Postcopy);
        }
    }
    let never = World::new(0, 0)
        .under("no-postcopy")
        .asking(json!({"timeout": {"seconds": 60, "then": "suspend"}}));
    assert!(
        step(&World::new(250, 900), &never).is_none(),
        "who gives a timeout is not helped otherwise"
    );
}

#[test]
fn postcopy_waits_for_a_first_pass_only_where_that_is_worth_it() {
    let begin = |world: World| {
        world.asking(json!({"postcopy": {}})).plan().strategy.postcopy.unwrap().begin
    };
    assert_eq!(begin(World::new(250, 900)), PostcopyBegin::AtOnce);
    assert_eq!(begin(World::new(250, 300)), PostcopyBegin::AfterFirstPass);
    let asked = World::new(250, 900).asking(json!({"postcopy": {"after_precopy": true}})).plan();
    assert_eq!(asked.strategy.postcopy.unwrap().begin, PostcopyBegin::AfterFirstPass);
    // It then takes little more than the memory does.
    let plan = World::new(250, 900).asking(json!({"postcopy": {}})).plan();
    let on_link_ms = GIB as f64 / 117_000.0;
    assert!(plan.forecast.total_ms.unwrap() < on_link_ms * 1.2, "{:?}", plan.forecast);
    assert!(asked.forecast.total_ms.unwrap() > on_link_ms * 1.5);
}

#[test]
fn changed_rates_are_seen_after_one_pass_and_lost_time_at_once() {
    let mut world = World::new(50, 100_000).under("must-finish");
    world.policy.max_total_s = Some(100);
    let plan = world.plan();
    let allowed = Allowed::of(&world.policy, &world.options);
    let asked = |seen: Observed| replan(&seen, &plan.forecast, &plan.strategy, &allowed);
    let mut slower = seen(&plan, &[100, 120]);
    assert_eq!(asked(slower.clone()), None);
    slower.wire_bytes_per_s /= 10.0;
    slower.dirty_bytes_per_s = 50e6;
    assert!(asked(slower).is_some());
    let late = Observed { elapsed_ms: 81_000, ..seen(&plan, &[400, 200, 100]) };
    let step_up = asked(late).unwrap();
    assert!(step_up.decision.measured.contains("81 s of the 100 s"), "{}", step_up.decision);
}
