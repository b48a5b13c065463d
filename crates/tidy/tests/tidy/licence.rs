//! What is linked has a licence that goes with ours; `deny.toml` says the same to cargo-deny, which not everybody has.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use crate::{Finding, expect_none, tree};

/// Licences that ask for no more than a notice.
const ALLOWED: [&str; 9] = [
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Zlib",
];
/// Packages that must not come in, with the reason.
const BANNED: [(&str, &str); 3] = [
    ("openssl-sys", "TLS is rustls with aws-lc-rs, one implementation only"),
    ("native-tls", "TLS is rustls with aws-lc-rs, one implementation only"),
    ("ring", "TLS is rustls with aws-lc-rs, one implementation only"),
];

/// Whether an SPDX expression can be met with the allowed licences alone.
fn is_allowed(expression: &str) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let allowed = any_of(&words, &mut at);
    allowed && at == words.len()
}

fn any_of(words: &[&str], at: &mut usize) -> bool {
    let mut allowed = all_of(words, at);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        allowed |= all_of(words, at);
    }
    allowed
}

fn all_of(words: &[&str], at: &mut usize) -> bool {
    let mut allowed = one(words, at);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        allowed &= one(words, at);
    }
    allowed
}

fn one(words: &[&str], at: &mut usize) -> bool {
    let Some(word) = words.get(*at) else { return false };
    *at += 1;
    if *word == "(" {
        let allowed = any_of(words, at);
        *at += 1;
        return allowed && words.get(*at - 1) == Some(&")");
    }
    if words.get(*at) == Some(&"WITH") {
        *at += 2; // an exception only permits more
    }
    ALLOWED.contains(word)
}

/// Checks a line `NAME vVERSION … | LICENCE` of cargo's tree.
fn check(line: &str) -> Option<Finding> {
    let (package, licence) = line.rsplit_once(" | ").unwrap_or((line, ""));
    let name = package.split(' ').next().unwrap_or_default();
    if let Some((_, why)) = BANNED.iter().find(|(banned, _)| *banned == name) {
        return Some(Finding::new(package, format!("is banned: {why}")));
    }
    (!is_allowed(licence)).then(|| Finding::new(package, format!("its licence is `{licence}`")))
}

#[test]
fn what_is_linked_has_a_welcome_licence() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    // Its compiler is beside it, and `sudo` keeps no path to it.
    let beside = Path::new(&cargo).parent().map(Path::to_owned).unwrap_or_default();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(beside).chain(std::env::split_paths(&path)));
    // `cargo tree` and not `cargo metadata`: the latter also lists optional packages that no feature turns on.
    let output = Command::new(cargo)
        .args(["tree", "--workspace", "--all-features", "--locked", "--edges", "normal,build,dev"])
        .args(["--target", "x86_64-unknown-linux-gnu", "--prefix", "none", "--format", "{p} | {l}"])
        .current_dir(tree::root())
        .env("PATH", path.unwrap())
        .output()
        .expect("cargo is there: it has built this test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().map(|line| line.trim_end_matches(" (*)"));
    let packages: BTreeSet<&str> = lines.filter(|line| !line.is_empty()).collect();
    assert!(packages.len() > 100, "found {} packages only", packages.len());
    expect_none(packages.into_iter().filter_map(check).collect());
}

#[test]
fn expressions_are_understood() {
    for good in [
        "MIT",
        "MIT OR GPL-3.0",
        "MIT/Apache-2.0",
        "(MIT OR Apache-2.0) AND Unicode-3.0",
        "Apache-2.0 WITH LLVM-exception",
        "LGPL-2.1 OR (MIT AND ISC)",
    ] {
        assert!(is_allowed(good), "{good}");
    }
    for bad in
        ["", "GPL-3.0", "MIT AND MPL-2.0", "(MIT OR ISC) AND LGPL-2.1", "MIT)", "(MIT", "MIT ISC"]
    {
        assert!(!is_allowed(bad), "{bad}");
    }
    assert!(check("ring v0.17.14 | MIT").is_some());
    assert!(check("rang v1.0.0 | MPL-2.0").is_some());
    assert!(check("rang v1.0.0 | ").is_some());
    assert!(check("rang v1.0.0 (proc-macro) | MIT").is_none());
}
