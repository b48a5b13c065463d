//! Dependencies between our own packages point one way, and lints and versions are written once, in the workspace.

use crate::{Finding, expect_none, tree};

/// Whom each package may use, tests included. The command line is the one that brings all together.
const ALLOWED: &[(&str, &[&str])] = &[
    ("migration", &[]),
    ("pki", &[]),
    ("qemu", &[]),
    ("guest", &[]),
    ("tidy", &[]),
    ("api", &["migration", "pki"]),
    ("agent", &["api", "migration", "pki", "qemu"]),
    ("controller", &["api", "migration", "pki"]),
    ("lab", &["api", "guest", "migration", "pki"]),
    ("bench", &["api", "lab"]),
    ("cli", &["agent", "api", "controller", "guest", "lab", "migration", "pki"]),
];
const SECTIONS: [&str; 3] = ["dependencies", "dev-dependencies", "build-dependencies"];

fn check(room: &str, manifest: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |what: String| {
        findings.push(Finding::new(format!("crates/{room}/Cargo.toml"), what));
    };
    let table: toml::Table = manifest.parse().expect("cargo has read it");
    let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == room) else {
        find("a new package: say in direction.rs whom it may use".to_owned());
        return findings;
    };
    let inherits = |value: Option<&toml::Value>| {
        value.and_then(|v| v.get("workspace")).and_then(toml::Value::as_bool) == Some(true)
    };
    if !inherits(table.get("lints")) {
        find("it does not inherit the workspace's lints".to_owned());
    }
    for section in SECTIONS {
        let entries = table.get(section).and_then(toml::Value::as_table).into_iter().flatten();
        for (name, value) in entries {
            let sibling = name.strip_prefix("whimbrel-");
            if sibling.is_some_and(|sibling| !allowed.contains(&sibling)) {
                find(format!("{room} does not know {name}: dependencies point one way"));
            }
            if !inherits(Some(value)) {
                find(format!("the version of {name} stands in the workspace's Cargo.toml"));
            }
        }
    }
    findings
}

#[test]
fn dependencies_point_one_way() {
    let files = tree::files();
    let manifests = files.iter().filter_map(|file| {
        let room = file.path.strip_prefix("crates/")?.strip_suffix("/Cargo.toml")?;
        Some((room, &file.text))
    });
    let manifests: Vec<_> = manifests.collect();
    assert!(manifests.len() >= ALLOWED.len(), "found {} packages only", manifests.len());
    expect_none(manifests.iter().flat_map(|(room, text)| check(room, text)).collect());
}

#[test]
fn every_rule_is_seen() {
    let lints = "[lints]\nworkspace = true\n";
    let findings = |room: &str, rest: &str| check(room, &format!("{lints}{rest}")).len();
    assert_eq!(findings("agent", "[dependencies]\nwhimbrel-qemu.workspace = true\n"), 0);
    assert_eq!(findings("agent", "[dependencies]\nwhimbrel-controller.workspace = true\n"), 1);
    assert_eq!(findings("controller", "[dev-dependencies]\nwhimbrel-qemu.workspace = true\n"), 1);
    assert_eq!(findings("qemu", "[build-dependencies]\nwhimbrel-api.workspace = true\n"), 1);
    assert_eq!(findings("qemu", "[dependencies]\ntokio = \"1\"\n"), 1);
    assert_eq!(findings("new", ""), 1);
    assert_eq!(check("agent", "").len(), 1);
}
