//! Flags to requests, each option by itself and all at once; and that the manual's table knows every option.

use clap::{CommandFactory as _, Parser as _};
use serde_json::{Value, json};

use super::*;
use crate::command::{Command, CommandLine};

/// The options that a command line makes.
fn read(flags: &str) -> Result<MigrateOptions, Failure> {
    let words = "whimbrel migrate web01 host-b".split(' ').chain(flags.split_whitespace());
    let line =
        CommandLine::try_parse_from(words).unwrap_or_else(|error| panic!("{flags}: {error}"));
    let Command::Migrate(command) = line.command else { panic!("{flags}: another command") };
    command.options.read()
}

fn request(flags: &str) -> Value {
    serde_json::to_value(read(flags).unwrap_or_else(|error| panic!("{flags}: {error:?}"))).unwrap()
}

#[test]
fn every_option_is_in_the_request() {
    for (flags, expected) in [
        ("", json!({})),
        ("--live", json!({"mode": "live"})),
        ("--offline", json!({"mode": "offline"})),
        ("--static", json!({"mode": "static"})),
        ("--quick", json!({"mode": "quick"})),
        ("--policy must-finish", json!({"policy": "must-finish"})),
        ("--suspend", json!({"suspend": true})),
        ("--persistent", json!({"persistent": true})),
        ("--undefine-source", json!({"undefine_source": true})),
        ("--undefinesource", json!({"undefine_source": true})),
        ("--copy", json!({"copy": true})),
        ("--dname web02", json!({"dname": "web02"})),
        ("--max-downtime 50", json!({"max_downtime_ms": 50})),
        ("--bandwidth 1gbit", json!({"bandwidth_bytes_per_s": 125_000_000})),
        (
            "--available-switchover-bandwidth 10gbit",
            json!({"available_switchover_bandwidth_bytes_per_s": 1_250_000_000}),
        ),
        ("--parallel", json!({"parallel_connections": 2})),
        ("--parallel-connections 4", json!({"parallel_connections": 4})),
        ("--parallel --parallel-connections 255", json!({"parallel_connections": 255})),
        (
            "--zerocopy --no-tls --parallel",
            json!({"zerocopy": true, "tls": false, "parallel_connections": 2}),
        ),
        ("--tls", json!({})),
        ("--no-tls", json!({"tls": false})),
        ("--migrate-address 10.0.0.2", json!({"migrate_address": "10.0.0.2"})),
        ("--abort-on-error", json!({"abort_on_error": true})),
        ("--auto-converge", json!({"auto_converge": {}})),
        (
            "--auto-converge --auto-converge-initial 30 --auto-converge-increment 5",
            json!({"auto_converge": {"initial_percent": 30, "increment_percent": 5}}),
        ),
        ("--postcopy", json!({"postcopy": {}})),
        (
            "--postcopy --postcopy-after-precopy --postcopy-bandwidth 100MB/s",
            json!({"postcopy": {"after_precopy": true, "bandwidth_bytes_per_s": 100_000_000}}),
        ),
        ("--timeout 60", json!({"timeout": {"seconds": 60, "then": "suspend"}})),
        ("--timeout 60 --timeout-suspend", json!({"timeout": {"seconds": 60, "then": "suspend"}})),
        (
            "--postcopy --timeout 60 --timeout-postcopy",
            json!({"postcopy": {}, "timeout": {"seconds": 60, "then": "postcopy"}}),
        ),
        ("--compressed", json!({"compression": {}})),
        (
            "--compressed --comp-methods zstd,zlib --comp-zstd-level 3 --comp-zlib-level 0",
            json!({"compression": {"methods": ["zstd", "zlib"], "zstd_level": 3, "zlib_level": 0}}),
        ),
        (
            "--compressed --comp-methods xbzrle --comp-xbzrle-cache 256MiB",
            json!({"compression": {"methods": ["xbzrle"], "xbzrle_cache_bytes": 268_435_456}}),
        ),
    ] {
        assert_eq!(request(flags), expected, "{flags}");
    }
}

#[test]
fn bad_values_and_contradictions_are_refused_before_anybody_is_asked() {
    let bandwidths =
        ["--bandwidth", "--available-switchover-bandwidth", "--postcopy --postcopy-bandwidth"];
    let numbers = [
        "--max-downtime",
        "--parallel-connections",
        "--auto-converge --auto-converge-initial",
        "--auto-converge --auto-converge-increment",
        "--timeout",
        "--compressed --comp-zlib-level",
        "--compressed --comp-zstd-level",
    ];
    for option in bandwidths.iter().chain(&numbers) {
        for bad in
            ["-1", "NaN", "9223372036854775808", "18446744073709551616", "1000000000000000000"]
        {
            let failure = read(&format!("{option} {bad}")).unwrap_err();
            assert_eq!(
                (failure.code.as_str(), failure.exit as u8),
                ("out-of-range", 2),
                "{option} {bad}"
            );
        }
    }
    for (flags, code) in [
        ("--bandwidth 0", "out-of-range"),
        ("--max-downtime 0", "out-of-range"),
        ("--parallel-connections 0", "out-of-range"),
        ("--parallel-connections 1000000", "out-of-range"),
        ("--auto-converge --auto-converge-initial 100", "out-of-range"),
        ("--timeout 2", "out-of-range"),
        ("--compressed --comp-zlib-level 10", "out-of-range"),
        ("--compressed --comp-zstd-level 21", "out-of-range"),
        ("--compressed --comp-xbzrle-cache 3MiB", "bad-request"),
        ("--compressed --comp-xbzrle-cache 4KiB", "out-of-range"),
        ("--compressed --comp-xbzrle-cache -1", "out-of-range"),
        ("--compressed --comp-methods mt", "bad-request"),
        ("--compressed --comp-methods zstd,zstd", "bad-request"),
        ("--compressed --comp-methods xbzrle --comp-zstd-level 1", "bad-request"),
        ("--comp-methods zstd", "bad-request"),
        ("--auto-converge-initial 30", "bad-request"),
        ("--postcopy-after-precopy", "bad-request"),
        ("--postcopy-bandwidth 1gbit", "bad-request"),
        ("--timeout-suspend", "bad-request"),
        ("--timeout 60 --timeout-postcopy", "bad-request"),
        ("--postcopy --timeout 60 --timeout-postcopy --timeout-suspend", "bad-request"),
        ("--live --offline", "bad-request"),
        ("--static --quick", "bad-request"),
        ("--tls --no-tls", "bad-request"),
        ("--copy --undefine-source", "bad-request"),
        ("--dname Web02", "bad-name"),
        ("--policy ../x", "bad-name"),
        ("--migrate-address 127.0.0.1", "bad-request"),
        ("--migrate-address tcp://10.0.0.2", "bad-request"),
    ] {
        let failure = read(flags).unwrap_err();
        assert_eq!(
            (failure.code.as_str(), failure.exit as u8),
            (code, 2),
            "{flags}: {}",
            failure.message
        );
        assert!(
            failure.message.starts_with("--") && !failure.message.contains('_'),
            "{flags}: {}",
            failure.message
        );
    }
}

#[test]
fn everything_that_is_wrong_is_told_at_once() {
    let flags = "--live --static --bandwidth 0 --max-downtime -1 --parallel-connections 1000000 --timeout 1 \
                 --timeout-postcopy --comp-methods lz4 --dname X --copy --undefine-source --migrate-address ::1";
    let failure = read(flags).unwrap_err();
    let told: Vec<String> = failure.as_json()["problems"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["option"].as_str().unwrap().to_owned())
        .collect();
    let expected = [
        "--live",
        "--dname",
        "--max-downtime",
        "--bandwidth",
        "--timeout-postcopy",
        "--comp-methods",
        "--comp-methods",
        "--parallel-connections",
        "--undefine-source",
        "--migrate-address",
        "--timeout",
    ];
    assert_eq!(told, expected, "{}", failure.message);
    assert_eq!(failure.message.lines().count(), told.len() + 1);
}

/// Every option of `whimbrel migrate` but the global ones and those that are about following.
fn options() -> Vec<String> {
    let command = CommandLine::command();
    let migrate = command.find_subcommand("migrate").unwrap();
    let longs = migrate.get_arguments().filter_map(|argument| argument.get_long());
    longs
        .filter(|long| !["detach", "help"].contains(long))
        .map(|long| format!("--{long}"))
        .collect()
}

#[test]
fn every_help_says_the_default_and_what_refuses_it() {
    let command = CommandLine::command();
    let migrate = command.find_subcommand("migrate").unwrap();
    for option in options() {
        let argument =
            migrate.get_arguments().find(|a| a.get_long() == option.strip_prefix("--")).unwrap();
        let help = argument.get_long_help().map(ToString::to_string).unwrap_or_default();
        assert!(help.contains("Default: ") && help.contains("Refused "), "{option}: {help}");
    }
    assert!(options().len() >= 33, "{:?}", options());
}

#[test]
fn the_manual_has_a_row_for_every_option() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/operating.md");
    let page = std::fs::read_to_string(page).unwrap();
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| ")).collect();
    for option in options() {
        let cell = format!("`{option}");
        let row = rows.iter().find(|row| {
            let second = row.split('|').nth(2).unwrap_or_default();
            second.split(&cell).skip(1).any(|rest| rest.starts_with(['`', ' ']))
        });
        assert!(row.is_some(), "docs/operating.md has no row for {option}");
    }
}
