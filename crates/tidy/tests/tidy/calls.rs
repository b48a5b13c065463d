//! Calls that are banned, each with its reason and what to use instead.

use crate::source::{Source, line_of, read_all};
use crate::{Finding, expect_none, tree};

/// Where a ban holds.
enum Where {
    /// Everywhere but in tests and in the files whose path begins so.
    OutsideTests(&'static [&'static str]),
    /// Everywhere but in the files whose path begins so, tests included.
    Everywhere(&'static [&'static str]),
    /// Only in the files whose path begins so, tests excluded.
    Only(&'static [&'static str]),
}

struct Ban {
    call: &'static str,
    place: Where,
    instead: &'static str,
}

const ASYNC_ROOMS: &[&str] =
    &["crates/agent/", "crates/api/", "crates/controller/", "crates/pki/", "crates/qemu/"];
const PURE_ROOM: &[&str] = &["crates/migration/src/"];
/// Init of the test guest: its standard error is the serial console.
const GUEST: &[&str] = &["crates/guest/src/"];
/// The one module with unsafe code in it, which says why.
const UNSAFE_ROOM: &[&str] = &["crates/agent/src/network/tap.rs"];
/// Processes that end as part of what they are: init of the test guest, and the imitation of QEMU.
const ENDING: &[&str] = &["crates/guest/src/", "crates/qemu/src/fake"];
const UNSAFE: &str =
    "rustix, nix or the standard library; one small module holds what none of them has";
const TRACING: &str = "a library logs with tracing, the command line writes with `output`";
const PURE: &str = "the rules have no I/O and no clock: take it as an argument";
const BY_PID: &str = "end only what was started, by its pid or pidfd";

const BANS: &[Ban] = &[
    // println! panics when its reader is gone; and a library has no terminal.
    Ban { call: "println!", place: Where::OutsideTests(GUEST), instead: TRACING },
    Ban { call: "print!", place: Where::OutsideTests(GUEST), instead: TRACING },
    Ban { call: "eprintln!", place: Where::OutsideTests(GUEST), instead: TRACING },
    Ban { call: "eprint!", place: Where::OutsideTests(GUEST), instead: TRACING },
    Ban { call: "dbg!", place: Where::Everywhere(&[]), instead: TRACING },
    Ban {
        call: "process::exit(",
        place: Where::OutsideTests(ENDING),
        instead: "return an exit code from main: an exit runs no drop guard, and leaves things behind",
    },
    Ban {
        call: ".unwrap()",
        place: Where::OutsideTests(&[]),
        instead: "return the error, or say with expect() why it cannot happen",
    },
    Ban {
        call: "thread::sleep(",
        place: Where::Only(ASYNC_ROOMS),
        instead: "tokio::time::sleep: a sleeping worker thread holds up every task on it",
    },
    Ban {
        call: "unbounded_channel",
        place: Where::Everywhere(&[]),
        instead: "a bounded channel whose bound has a name",
    },
    Ban { call: "Instant::now", place: Where::Only(PURE_ROOM), instead: PURE },
    Ban { call: "SystemTime::now", place: Where::Only(PURE_ROOM), instead: PURE },
    Ban { call: "std::fs", place: Where::Only(PURE_ROOM), instead: PURE },
    Ban { call: "std::net::Tcp", place: Where::Only(PURE_ROOM), instead: PURE },
    Ban { call: "tokio::", place: Where::Only(PURE_ROOM), instead: PURE },
    Ban { call: "pkill", place: Where::Everywhere(&[]), instead: BY_PID },
    Ban { call: "killall", place: Where::Everywhere(&[]), instead: BY_PID },
    Ban {
        call: "Command::new(\"sh\")",
        place: Where::OutsideTests(&[]),
        instead: "start the program itself: a shell splits what it is given",
    },
    Ban {
        call: "Command::new(\"bash\")",
        place: Where::OutsideTests(&[]),
        instead: "start the program itself: a shell splits what it is given",
    },
    Ban {
        call: "#![allow(",
        place: Where::OutsideTests(UNSAFE_ROOM),
        instead: "allow at the one place that needs it, with its reason",
    },
    Ban { call: "unsafe {", place: Where::Everywhere(UNSAFE_ROOM), instead: UNSAFE },
    Ban { call: "unsafe fn", place: Where::Everywhere(UNSAFE_ROOM), instead: UNSAFE },
    Ban { call: "unsafe impl", place: Where::Everywhere(UNSAFE_ROOM), instead: UNSAFE },
];

/// This file names what it bans.
const SELF: &str = "crates/tidy/tests/tidy/calls.rs";

fn begins(path: &str, with: &[&str]) -> bool {
    with.iter().any(|start| path.starts_with(start))
}

fn check(source: &Source, bans: &[Ban]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for ban in bans {
        // What stands in quotes is looked for with its quotes, everything else outside of texts.
        let text = if ban.call.contains('"') { &source.code } else { &source.bare };
        for (offset, _) in text.match_indices(ban.call) {
            let line = line_of(text, offset);
            let in_word = text[..offset].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            let holds = match ban.place {
                Where::OutsideTests(except) => {
                    !source.is_test[line] && !begins(&source.path, except)
                }
                Where::Everywhere(except) => !begins(&source.path, except),
                Where::Only(rooms) => !source.is_test[line] && begins(&source.path, rooms),
            };
            if holds && (!in_word || ban.call.starts_with('.')) {
                let place = format!("{}:{}", source.path, line + 1);
                findings.push(Finding::new(place, format!("`{}`: {}", ban.call, ban.instead)));
            }
        }
    }
    findings
}

#[test]
fn no_banned_call_is_made() {
    let sources = read_all(&tree::rust_files());
    let mut findings: Vec<Finding> = sources
        .iter()
        .filter(|source| source.path != SELF)
        .flat_map(|source| check(source, BANS))
        .collect();
    for file in tree::files().iter().filter(|file| is_script(&file.path)) {
        for word in ["pkill", "killall"] {
            if file.text.contains(word) {
                findings.push(Finding::new(&file.path, format!("`{word}`: {BY_PID}")));
            }
        }
    }
    expect_none(findings);
}

fn is_script(path: &str) -> bool {
    path == "Makefile" || path.starts_with("scripts/") || path.starts_with(".ci/")
}

#[test]
fn every_ban_is_seen() {
    for ban in BANS {
        let path = match ban.place {
            Where::Only(rooms) => format!("{}x.rs", rooms[0]),
            Where::OutsideTests(_) | Where::Everywhere(_) => "crates/lab/src/x.rs".to_owned(),
        };
        let before = if ban.call.starts_with('.') { "x" } else { "" };
        let text = format!("//! {0}\nfn f() {{\n    {before}{0}\n}}\n", ban.call);
        let findings = check(&crate::source::read(&path, &text), BANS);
        let expected = format!("`{}`: {}", ban.call, ban.instead);
        assert_eq!(findings, [Finding::new(format!("{path}:3"), expected)], "{}", ban.call);
    }
}

#[test]
fn tests_excepted_rooms_and_longer_words_pass() {
    let findings = |path: &str, text: &str| check(&crate::source::read(path, text), BANS);
    assert_eq!(
        findings("crates/lab/src/x.rs", "#[cfg(test)]\nmod tests {\n    x.unwrap();\n}\n"),
        []
    );
    assert_eq!(findings("crates/guest/src/x.rs", "fn f() { process::exit(1) }"), []);
    assert_eq!(findings("crates/lab/src/x.rs", "fn f() { my_println!() }"), []);
    assert_eq!(findings("crates/lab/src/x.rs", "const S: &str = \"pkill\";"), []);
    assert_eq!(findings("crates/lab/src/x.rs", "fn f() { std::fs::read() }"), []);
}
