//! A case for each rule, the combinations that are good, and that rules do not hide each other.

use serde_json::{Value, json};

use super::super::{Severity, refuses};
use super::*;

/// An engine that has everything, of a version that has everything.
pub(crate) fn able(version: &str) -> EngineAbilities {
    let set = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    EngineAbilities {
        version: version.parse().unwrap(),
        capabilities: set(&[
            "auto-converge",
            "multifd",
            "postcopy-ram",
            "postcopy-preempt",
            "xbzrle",
            "zero-copy-send",
        ]),
        parameters: set(&["avail-switchover-bandwidth"]),
        compressions: set(&["none", "zlib", "zstd"]),
        postcopy_obstacle: None,
        memory_page_bytes: 4096,
    }
}

struct Setting {
    state: GuestState,
    options: MigrateOptions,
    policy: Policy,
    source: EngineAbilities,
    destination: EngineAbilities,
}

impl Setting {
    fn new(options: Value) -> Self {
        Self {
            state: GuestState::Running,
            options: serde_json::from_value(options).unwrap(),
            policy: Policy::default(),
            source: able("10.0.2"),
            destination: able("10.1.0"),
        }
    }

    fn verdicts(&self) -> Vec<Verdict> {
        assert_eq!(self.options.validate(), []);
        let name = |text: &str| Name::new(text).unwrap();
        combinations(&Combination {
            vm: &name("web01"),
            state: self.state,
            options: &self.options,
            policy: &self.policy,
            source: (&name("host-a"), Some(&self.source)),
            destination: (&name("host-b"), Some(&self.destination)),
        })
    }

    fn codes(&self) -> Vec<Code> {
        self.verdicts().iter().map(|verdict| verdict.code).collect()
    }
}

pub(crate) struct Case {
    pub(crate) code: Code,
    options: Value,
    spoil: fn(&mut Setting),
    /// What the two sentences must name.
    words: &'static [&'static str],
}

fn case(
    code: Code,
    options: Value,
    spoil: fn(&mut Setting),
    words: &'static [&'static str],
) -> Case {
    Case { code, options, spoil, words }
}

pub(crate) fn cases() -> Vec<Case> {
    let nothing: fn(&mut Setting) = |_| {};
    vec![
        case(
            Code::VmNotStopped,
            json!({"mode": "offline"}),
            nothing,
            &["web01", "running", "--offline"],
        ),
        case(
            Code::OptionUnfit,
            json!({"mode": "static", "postcopy": {}, "timeout": {"seconds": 9}, "zerocopy": false}),
            |setting| setting.policy = Policy::named("must-finish").unwrap(),
            &["--static", "--postcopy, --timeout"],
        ),
        case(
            Code::OptionUnfit,
            json!({"mode": "offline", "suspend": true, "max_downtime_ms": 9, "parallel_connections": 2}),
            |setting| setting.state = GuestState::Stopped,
            &["--offline", "--suspend", "--max-downtime", "--parallel-connections"],
        ),
        case(
            Code::PolicyForbids,
            json!({"postcopy": {}}),
            |setting| setting.policy = Policy::named("no-postcopy").unwrap(),
            &["no-postcopy", "--postcopy"],
        ),
        case(
            Code::PolicyForbids,
            json!({"mode": "static"}),
            |setting| setting.policy = Policy::named("minimal-downtime").unwrap(),
            &["minimal-downtime", "--static"],
        ),
        case(
            Code::PolicyForbids,
            json!({"tls": false}),
            |setting| setting.policy.require_tls = true,
            &["balanced", "--no-tls"],
        ),
        case(
            Code::EngineFeature,
            json!({"available_switchover_bandwidth_bytes_per_s": 1_000_000}),
            |setting| setting.source.parameters.clear(),
            &["host-a", "10.0.2", "avail-switchover-bandwidth"],
        ),
        case(
            Code::EngineFeature,
            json!({"compression": {"methods": ["zstd"]}}),
            |setting| setting.destination.compressions.retain(|method| method != "zstd"),
            &["host-b", "10.1.0", "zstd", "--compressed"],
        ),
        case(
            Code::EngineFeature,
            json!({"parallel_connections": 4}),
            |setting| setting.destination.capabilities.retain(|able| able != "multifd"),
            &["host-b", "multifd"],
        ),
        case(
            Code::XbzrleMultifd,
            json!({"compression": {"methods": ["xbzrle"]}, "parallel_connections": 4}),
            nothing,
            &["xbzrle", "--parallel-connections"],
        ),
        case(
            Code::ZerocopyAlone,
            json!({"zerocopy": true, "tls": false}),
            nothing,
            &["--zerocopy"],
        ),
        case(
            Code::ZerocopyTls,
            json!({"zerocopy": true, "parallel_connections": 2}),
            nothing,
            &["--zerocopy", "--no-tls"],
        ),
        case(
            Code::ZerocopyCompression,
            json!({"zerocopy": true, "parallel_connections": 2, "tls": false, "compression": {}}),
            nothing,
            &["--zerocopy", "--compressed"],
        ),
        case(
            Code::PostcopyMultifd,
            json!({"postcopy": {}, "parallel_connections": 2}),
            nothing,
            &["10.1.0", "10.0.2", "--parallel-connections"],
        ),
        case(
            Code::PostcopyMultifd,
            json!({"postcopy": {}, "compression": {"methods": ["zlib", "zstd"]}}),
            nothing,
            &["10.0.2", "zlib and zstd"],
        ),
        case(
            Code::PostcopyObstacle,
            json!({"postcopy": {}}),
            |setting| setting.destination.postcopy_obstacle = Some("no userfaultfd".into()),
            &["host-b", "no userfaultfd"],
        ),
        case(
            Code::PostcopyPageSize,
            json!({"postcopy": {}}),
            |setting| setting.destination.memory_page_bytes = 2 << 20,
            &["4 KiB", "2048 KiB"],
        ),
        case(Code::PostcopyRisk, json!({"postcopy": {}}), nothing, &["web01", "lost"]),
    ]
}

#[test]
fn each_rule_gives_its_one_verdict_with_reason_and_way_out() {
    for Case { code, options, spoil, words } in cases() {
        let mut setting = Setting::new(options);
        spoil(&mut setting);
        let verdicts = setting.verdicts();
        assert_eq!(setting.codes(), [code], "{verdicts:?}");
        let Verdict { severity, problem, advice, .. } = &verdicts[0];
        for word in words {
            let told = problem.contains(word) || advice.contains(word);
            assert!(told, "{code}: {problem:?} and {advice:?} lack {word:?}");
        }
        assert!(problem.ends_with('.') && advice.ends_with('.'), "{code}: {problem} {advice}");
        assert_eq!(*severity == Severity::Warn, code == Code::PostcopyRisk);
    }
}

#[test]
fn what_goes_together_is_let_through() {
    let good = [
        json!({}),
        json!({"mode": "live", "parallel_connections": 8, "compression": {"methods": ["zstd"]}}),
        json!({"parallel_connections": 8, "compression": {"methods": ["zstd", "xbzrle"]}}),
        json!({"compression": {"methods": ["xbzrle"]}, "tls": false}),
        json!({"zerocopy": true, "parallel_connections": 2, "tls": false}),
        json!({"mode": "static", "suspend": true, "parallel_connections": 2, "bandwidth_bytes_per_s": 1_000_000}),
        json!({"mode": "quick", "auto_converge": {}, "max_downtime_ms": 50, "timeout": {"seconds": 60}}),
    ];
    for options in good {
        let setting = Setting::new(options.clone());
        assert_eq!(setting.verdicts(), [], "{options}");
    }
    for state in [GuestState::Running, GuestState::Paused] {
        let setting = Setting { state, ..Setting::new(json!({"mode": "live"})) };
        assert_eq!(setting.verdicts(), [], "a paused VM arrives paused");
    }
    let offline = json!({"mode": "offline", "dname": "web02", "copy": true});
    let setting = Setting { state: GuestState::Stopped, ..Setting::new(offline) };
    assert_eq!(setting.verdicts(), []);
}

#[test]
fn postcopy_and_parallel_connections_go_together_from_10_1_on_at_both_ends() {
    let options = json!({"postcopy": {"after_precopy": true}, "parallel_connections": 2});
    for (source, destination, refused) in [
        ("7.2.22", "10.1.0", true),
        ("10.1.0", "10.0.9", true),
        ("10.1.0", "10.1.0", false),
        ("10.2.0", "11.0.0", false),
    ] {
        let setting = Setting {
            source: able(source),
            destination: able(destination),
            ..Setting::new(options.clone())
        };
        assert_eq!(refuses(&setting.verdicts()), refused, "{source} to {destination}");
    }
}

#[test]
fn what_both_engines_lack_is_told_of_both() {
    let mut setting = Setting::new(json!({"postcopy": {}, "auto_converge": {}}));
    setting.source.capabilities.clear();
    setting.destination.capabilities.clear();
    let verdicts = setting.verdicts();
    let of = |host: &str| {
        let about = |v: &&Verdict| v.code == Code::EngineFeature && v.problem.contains(host);
        verdicts.iter().filter(about).count()
    };
    assert_eq!((of("host-a"), of("host-b")), (2, 1));
}

#[test]
fn rules_do_not_hide_each_other() {
    let mut setting = Setting::new(json!({
        "mode": "quick", "postcopy": {}, "parallel_connections": 2, "zerocopy": true,
        "compression": {"methods": ["xbzrle"]}, "auto_converge": {},
    }));
    setting.policy =
        Policy { allow_static: Consent::Never, require_tls: true, ..Policy::default() };
    setting.source.capabilities.remove("auto-converge");
    setting.destination.postcopy_obstacle = Some("no userfaultfd".into());
    setting.destination.memory_page_bytes = 1 << 30;
    let expected = [
        Code::PolicyForbids,
        Code::XbzrleMultifd,
        Code::ZerocopyTls,
        Code::ZerocopyCompression,
        Code::EngineFeature,
        Code::PostcopyMultifd,
        Code::PostcopyObstacle,
        Code::PostcopyPageSize,
    ];
    assert_eq!(setting.codes(), expected);
}
