//! The rules of the house that neither the compiler nor clippy checks, as one test.
//!
//! | rule | where | checked in |
//! |---|---|---|
//! | a function has at most 70 lines, a file at most 800 (tests not counted) | `.rs` | [`sizes`] |
//! | every module opens with a `//!` header, every script with a comment | `.rs`, scripts | [`words`] |
//! | banned calls, each with what to use instead | `.rs`, scripts | [`calls`] |
//! | no mark of unfinished work, no path of somebody's machine, no room called like nothing | all | [`words`] |
//! | dependencies point one way, lints and versions are the workspace's | `Cargo.toml` | [`direction`] |
//! | nothing of an unwelcome licence is linked | `Cargo.lock` | [`licence`] |
//! | what a page names is in the code, under that name and with that value | `.md` | [`docs`] |
//!
//! What broke a rule of size before the rule stood is listed in `ratchet.toml` with its size, which may only shrink. The
//! rules are functions from text to findings, so that each is also shown a text that breaks it. Nothing here depends on
//! git: the tree is read as it lies.

mod calls;
mod direction;
mod docs;
mod licence;
mod sizes;
mod source;
mod tree;
mod words;

/// One broken rule at one place.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    place: String,
    what: String,
}

impl Finding {
    fn new(place: impl Into<String>, what: impl Into<String>) -> Self {
        Self { place: place.into(), what: what.into() }
    }
}

/// Fails with every finding, one a line, sorted by place.
fn expect_none(mut findings: Vec<Finding>) {
    findings.sort();
    let lines: Vec<String> =
        findings.iter().map(|finding| format!("{}: {}", finding.place, finding.what)).collect();
    assert!(lines.is_empty(), "\n\n{}\n\n{} findings\n", lines.join("\n"), lines.len());
}
