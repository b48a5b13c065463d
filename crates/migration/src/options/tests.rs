//! What the options look like on the wire, and every bound from both sides.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn problems(options: &MigrateOptions) -> Vec<(String, ProblemCode)> {
    let told = options.validate();
    for problem in &told {
        assert!(
            problem.sentence.contains(problem.field.rsplit('.').next().unwrap()),
            "{problem:?}"
        );
    }
    told.into_iter().map(|problem| (problem.field, problem.code)).collect()
}

fn from_json(value: serde_json::Value) -> MigrateOptions {
    serde_json::from_value(value).unwrap()
}

#[test]
fn the_default_is_empty_on_the_wire_and_sound() {
    let options = MigrateOptions::default();
    assert_eq!(serde_json::to_value(&options).unwrap(), json!({}));
    assert_eq!(from_json(json!({})), options);
    assert!(options.tls && options.mode == Mode::Auto && !options.keeps_definition());
    assert_eq!(options.validate(), []);
}

#[test]
fn everything_can_be_said_and_is_kept() {
    let all = json!({
        "mode": "live", "suspend": true, "copy": true, "persistent": true, "undefine_source": false,
        "dname": "web02", "parallel_connections": 4,
        "auto_converge": {"initial_percent": 30, "increment_percent": 5},
        "postcopy": {"after_precopy": true, "bandwidth_bytes_per_s": 1_000_000},
        "timeout": {"seconds": 60, "then": "postcopy"},
        "compression": {"methods": ["zlib", "zstd", "xbzrle"], "zlib_level": 0, "zstd_level": 20,
            "xbzrle_cache_bytes": 134_217_728},
        "zerocopy": true, "bandwidth_bytes_per_s": 65_536, "max_downtime_ms": 1,
        "available_switchover_bandwidth_bytes_per_s": 1_u64 << 50, "tls": false,
        "migrate_address": "host-b.example.org", "abort_on_error": true, "policy": "must-finish",
        "disks": {"each": {"vda": {"to": {"storage": "fast", "format": "raw"}}, "vdb": "stay",
            "vdc": {"to": {"storage": "bulk"}}}, "others": {"to": {"storage": "bulk"}},
            "address": "10.1.0.2", "originals": "keep"},
    });
    let options = from_json(all.clone());
    assert_eq!(options.validate(), []);
    assert!(options.keeps_definition());
    assert_eq!(serde_json::to_value(&options).unwrap(), all);
    assert_eq!(
        from_json(json!({"timeout": {"seconds": 9}})).timeout.unwrap().then,
        TimeoutAction::Suspend
    );
}

#[test]
fn what_is_no_number_or_not_known_is_refused_at_the_door() {
    let bad = [
        r#"{"bandwidth_bytes_per_s": -1}"#,
        r#"{"bandwidth_bytes_per_s": NaN}"#,
        r#"{"bandwidth_bytes_per_s": 1.5}"#,
        r#"{"max_downtime_ms": "300"}"#,
        r#"{"max_downtime_ms": 18446744073709551616}"#,
        r#"{"parallel_connections": -2}"#,
        r#"{"parralel_connections": 2}"#,
        r#"{"postcopy": {"now": true}}"#,
        r#"{"postcopy": true}"#,
        r#"{"compression": {"methods": ["lz4"]}}"#,
        r#"{"mode": "fast"}"#,
        r#"{"timeout": {"then": "suspend"}}"#,
        r#"{"dname": "../web"}"#,
        r#"{"policy": ""}"#,
        r#"{"tls": true, "tls": false}"#,
        r#"{"disks": {"storage": "fast"}}"#,
        r#"{"disks": {"each": {"VDA": "stay"}}}"#,
        r#"{"disks": {"each": {"vda": "go"}}}"#,
        r#"{"disks": {"each": {"vda": {"to": {}}}}}"#,
        r#"{"disks": {"each": {"vda": {"to": {"storage": "../x"}}}}}"#,
        r#"{"disks": {"each": {"vda": {"to": {"storage": "fast", "format": "vmdk"}}}}}"#,
        r#"{"disks": {"each": {"vda": {"to": {"storage": "fast", "size": 1}}}}}"#,
        r#"{"disks": {"others": {"to": {"storage": "fast", "format": "raw"}}}}"#,
        r#"{"disks": {"originals": {"quarantine": {"days": -1}}}}"#,
        r#"{"disks": {"originals": {"quarantine": {"days": 1, "hours": 1}}}}"#,
    ];
    for text in bad {
        assert!(serde_json::from_str::<MigrateOptions>(text).is_err(), "{text}");
    }
}

/// Sets one number in the options.
fn with(field: &str, number: u64) -> MigrateOptions {
    let mut options = MigrateOptions::default();
    let value = Some(number);
    match field {
        "bandwidth_bytes_per_s" => options.bandwidth_bytes_per_s = value,
        "max_downtime_ms" => options.max_downtime_ms = value,
        "available_switchover_bandwidth_bytes_per_s" => {
            options.available_switchover_bandwidth_bytes_per_s = value;
        }
        "postcopy.bandwidth_bytes_per_s" => {
            options.postcopy =
                Some(Postcopy { bandwidth_bytes_per_s: value, ..Postcopy::default() });
        }
        "parallel_connections" => options.parallel_connections = value,
        "auto_converge.initial_percent" => {
            let throttle = AutoConverge { initial_percent: value, ..AutoConverge::default() };
            options.auto_converge = Some(throttle);
        }
        "auto_converge.increment_percent" => {
            let throttle = AutoConverge { increment_percent: value, ..AutoConverge::default() };
            options.auto_converge = Some(throttle);
        }
        "timeout.seconds" => {
            options.timeout = Some(Timeout { seconds: number, then: TimeoutAction::Suspend });
        }
        "compression.zlib_level" => {
            options.compression = Some(Compression { zlib_level: value, ..Compression::default() });
        }
        "compression.zstd_level" => {
            options.compression = Some(Compression { zstd_level: value, ..Compression::default() });
        }
        "compression.xbzrle_cache_bytes" => {
            options.compression =
                Some(Compression { xbzrle_cache_bytes: value, ..Compression::default() });
        }
        "disks.originals.quarantine.days" => {
            let originals = Some(Originals::Quarantine { days: number });
            options.disks =
                DiskOptions { others: OtherDisks::Unreached, originals, ..options.disks };
        }
        other => panic!("{other}"),
    }
    options
}

#[test]
fn each_number_has_bounds_and_both_ends_of_them_are_allowed() {
    let bandwidth = (64 << 10, 1 << 50);
    let bounds: [(&str, (u64, u64)); 12] = [
        ("bandwidth_bytes_per_s", bandwidth),
        ("postcopy.bandwidth_bytes_per_s", bandwidth),
        ("available_switchover_bandwidth_bytes_per_s", bandwidth),
        ("max_downtime_ms", (1, 2_000_000)),
        ("parallel_connections", (1, 255)),
        ("auto_converge.initial_percent", (1, 99)),
        ("auto_converge.increment_percent", (1, 99)),
        ("timeout.seconds", (3, 604_800)),
        ("disks.originals.quarantine.days", (1, 3650)),
        ("compression.zlib_level", (0, 9)),
        ("compression.zstd_level", (0, 20)),
        ("compression.xbzrle_cache_bytes", (1 << 20, 64 << 30)),
    ];
    for (field, (least, most)) in bounds {
        for good in [least, most] {
            assert_eq!(problems(&with(field, good)), [], "{field} = {good}");
        }
        let bad = [least.wrapping_sub(1), most + 1, 1 << 63, u64::MAX, most + 1_000_000];
        for bad in bad.into_iter().filter(|bad| !(least..=most).contains(bad)) {
            let expected = (field.to_owned(), ProblemCode::OutOfRange);
            assert_eq!(problems(&with(field, bad)), [expected], "{field} = {bad}");
        }
    }
}

#[test]
fn all_problems_are_told_at_once() {
    let options = MigrateOptions {
        bandwidth_bytes_per_s: Some(0),
        max_downtime_ms: Some(0),
        parallel_connections: Some(1_000_000),
        copy: true,
        undefine_source: Some(true),
        persistent: Some(false),
        migrate_address: Some("::".into()),
        timeout: Some(Timeout { seconds: 0, then: TimeoutAction::Postcopy }),
        compression: Some(Compression {
            methods: vec![CompressionMethod::Zstd, CompressionMethod::Zstd],
            zlib_level: Some(10),
            zstd_level: Some(21),
            xbzrle_cache_bytes: Some(3 << 20),
        }),
        ..MigrateOptions::default()
    };
    let fields: Vec<String> = problems(&options).into_iter().map(|(field, _)| field).collect();
    let expected = [
        "bandwidth_bytes_per_s",
        "max_downtime_ms",
        "parallel_connections",
        "persistent",
        "undefine_source",
        "migrate_address",
        "compression.methods",
        "compression.zlib_level",
        "compression.zstd_level",
        "compression.xbzrle_cache_bytes",
        "compression.zlib_level",
        "compression.xbzrle_cache_bytes",
        "timeout.seconds",
        "timeout.then",
    ];
    assert_eq!(fields, expected);
}

#[test]
fn an_address_must_be_one_that_another_host_can_reach() {
    let problem = |text: &str| {
        let options =
            MigrateOptions { migrate_address: Some(text.to_owned()), ..MigrateOptions::default() };
        problems(&options).pop().map(|(_, code)| code)
    };
    for good in ["10.0.0.2", "fd00::2", "host-b", "host-b.example.org", "169.254.1.1", "7.example"]
    {
        assert_eq!(problem(good), None, "{good}");
    }
    let long = "a".repeat(254);
    let bad = [
        "",
        "0.0.0.0",
        "::",
        "127.0.0.1",
        "::1",
        "255.255.255.255",
        "224.0.0.1",
        "ff02::1",
        "fe80::1",
        "::ffff:10.0.0.2",
        "10.0.0.2:4444",
        "tcp://10.0.0.2",
        "a b",
        "-a",
        "a..b",
        "a\0",
        "1.2.3",
        "300.1.1.1",
        "exec:x",
        "fe80::1%eth0",
        &long,
    ];
    for bad in bad {
        assert_eq!(problem(bad), Some(ProblemCode::BadAddress), "{bad}");
    }
}

#[test]
fn what_is_said_of_disks_must_fit() {
    let problem = |disks: serde_json::Value, rest: serde_json::Value| {
        let mut all = rest;
        all["disks"] = disks;
        problems(&from_json(all))
    };
    let contradiction = |field: &str| vec![(field.to_owned(), ProblemCode::Contradiction)];
    let (nothing, bad_address) = (json!({}), ProblemCode::BadAddress);
    let others = json!({"others": "unreached", "address": "0.0.0.0"});
    let bad = vec![("disks.address".to_owned(), bad_address)];
    assert_eq!(problem(others, nothing.clone()), bad);
    assert_eq!(
        problem(json!({"address": "10.0.0.2", "each": {"vda": "stay"}}), nothing.clone()),
        contradiction("disks.address"),
        "nothing is copied"
    );
    assert_eq!(
        problem(json!({"originals": "delete"}), nothing.clone()),
        contradiction("disks.originals")
    );
    let deleted = json!({"others": "unreached", "originals": "delete"});
    assert_eq!(problem(deleted.clone(), nothing.clone()), []);
    assert_eq!(problem(deleted, json!({"copy": true})), contradiction("disks.originals"));
    let kept = json!({"others": "unreached", "originals": "keep"});
    assert_eq!(problem(kept, json!({"copy": true})), []);
    let by = json!({"others": "unreached", "address": "10.0.0.2"});
    assert_eq!(
        problem(by.clone(), json!({"postcopy": {}})),
        [],
        "post-copy and copied disks go together"
    );
    assert_eq!(problem(by, json!({"mode": "offline"})), contradiction("disks.address"));
    let many: serde_json::Map<_, _> =
        (0..65).map(|number| (format!("d{number}"), json!("stay"))).collect();
    let too_many = vec![("disks.each".to_owned(), ProblemCode::OutOfRange)];
    assert_eq!(problem(json!({"each": many}), nothing), too_many);
}

#[test]
fn originals_are_put_aside_unless_the_source_keeps_the_vm() {
    let originals = |value| from_json(value).originals();
    assert_eq!(originals(json!({})), Originals::Quarantine { days: 7 });
    assert_eq!(originals(json!({"copy": true})), Originals::Keep);
    assert_eq!(originals(json!({"disks": {"originals": "delete"}})), Originals::Delete);
}

proptest! {
    #[test]
    fn no_options_make_the_check_panic(address in ".{0,300}", number in any::<u64>(), seconds in any::<u64>()) {
        let mut options = with("compression.xbzrle_cache_bytes", number);
        options.migrate_address = Some(address);
        options.timeout = Some(Timeout { seconds, then: TimeoutAction::Postcopy });
        prop_assert!(!options.validate().is_empty());
    }
}
