//! Headers, names of rooms, marks of unfinished work, and paths of somebody's machine.

use crate::tree::TextFile;
use crate::{Finding, expect_none, tree};

/// Rooms that are called like nothing end up holding everything.
const NOTHING_NAMES: [&str; 10] = [
    "util", "utils", "common", "manager", "managers", "helper", "helpers", "misc", "shared",
    "types",
];
/// Marks of unfinished work, written so that this file does not hold them.
const MARKS: [&str; 4] =
    [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX"), concat!("HA", "CK")];
/// Folders that exist on one machine only.
const MACHINE_PATHS: [&str; 3] =
    [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/")];

fn check(file: &TextFile) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |line: usize, what: String| {
        findings.push(Finding::new(format!("{}:{line}", file.path), what));
    };
    if let Some(what) = missing_header(file) {
        find(1, what.to_owned());
    }
    if let Some(room) = nothing_name(&file.path) {
        find(1, format!("`{room}` names nothing: call the room after what it does"));
    }
    for (index, line) in file.text.lines().enumerate() {
        if let Some(mark) = MARKS.iter().find(|mark| has_word(line, mark)) {
            find(index + 1, format!("`{mark}`: finish it, or put it into words as a limit"));
        }
        if let Some(path) = MACHINE_PATHS.iter().find(|path| line.contains(**path)) {
            find(index + 1, format!("`{path}` exists on somebody's machine only"));
        }
    }
    findings
}

fn missing_header(file: &TextFile) -> Option<&'static str> {
    if file.path.ends_with(".rs") {
        let good = file.text.starts_with("//! ");
        return (!good).then_some("a module opens with `//! `: what it is, what it is not");
    }
    let second = file.text.starts_with("#!").then(|| file.text.lines().nth(1).unwrap_or_default());
    let missing = second.is_some_and(|line| !line.starts_with("# "));
    missing.then_some("a script says below its first line what it is for")
}

/// The part of a path that names nothing. The tests' folder may share what it wants.
fn nothing_name(path: &str) -> Option<&str> {
    let parts = path.strip_prefix("crates/")?.split('/');
    let mut stems = parts.map(|part| part.split('.').next().unwrap_or(part));
    stems.find(|stem| NOTHING_NAMES.contains(stem))
}

fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let edge = |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '_');
        edge(line[..at].chars().next_back()) && edge(line[at + word.len()..].chars().next())
    })
}

#[test]
fn every_file_is_headed_named_and_finished() {
    expect_none(tree::files().iter().flat_map(check).collect());
}

#[test]
fn every_rule_is_seen() {
    let findings =
        |path: &str, text: &str| check(&TextFile { path: path.into(), text: text.into() }).len();
    assert_eq!(findings("crates/a/src/lib.rs", "//! Good.\n"), 0);
    assert_eq!(findings("crates/a/src/lib.rs", "use x;\n"), 1);
    assert_eq!(findings("crates/a/src/lib.rs", "//!\n"), 1);
    assert_eq!(findings("crates/a/src/util/mod.rs", "//! Bad.\n"), 1);
    assert_eq!(findings("crates/helpers/Cargo.toml", ""), 1);
    assert_eq!(findings("scripts/x", "#!/bin/sh\necho\n"), 1);
    assert_eq!(findings("scripts/x", "#!/bin/sh\n# Says.\nmktemp a.XXXXXX\n"), 0);
    for mark in MARKS {
        assert_eq!(findings("README.md", &format!("({mark}: later)\n")), 1, "{mark}");
        assert_eq!(findings("README.md", &format!("{mark}S {mark}_A a{mark}\n")), 0, "{mark}");
    }
    for path in MACHINE_PATHS {
        assert_eq!(findings("README.md", &format!("see {path}here\n")), 1, "{path}");
    }
}
