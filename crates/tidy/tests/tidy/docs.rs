//! The prose is true of the code: what a page names is there, under that name and with that value.
//!
//! | on a page | must be so |
//! |---|---|
//! | a link into the tree | its file is there; it names no line, for lines move |
//! | a link to Rust source whose text is code, such as ``[`Type::method`](x.rs)`` | it is defined there; what is no Rust name stands there as a text |
//! | the same, then ` = 60` | the constant has this value |
//! | the headings of the walkthrough | every phase of a migration, in order |
//! | the tables of codes in the manual for operators | exactly the codes that there are, with their HTTP status |
//!
//! Names in code without a link are not checked: whoever wants a name to stay true links it.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::{self, Source};
use crate::tree::TextFile;
use crate::{Finding, expect_none, tree};

const WALKTHROUGH: &str = "docs/migration-walkthrough.md";
const MANUAL: &str = "docs/operating.md";
const PHASES: &str = "crates/migration/src/phase.rs";
const ERRORS: &str = "crates/api/src/error.rs";
const VERDICTS: &str = "crates/migration/src/preflight/mod.rs";
/// Fewer checked names than this mean that the walkthrough has become a tale, or that links are not seen any more.
const WALKTHROUGH_NAMES_MIN: usize = 60;
/// What introduces a name in Rust.
const KEYWORDS: [&str; 9] =
    ["fn", "struct", "enum", "trait", "type", "const", "static", "mod", "macro_rules!"];

/// A link on a page.
#[derive(Debug, PartialEq, Eq)]
struct Link<'a> {
    /// The line, counted from 1.
    line: usize,
    text: &'a str,
    target: &'a str,
    /// What is said to be the value: what follows ` = `.
    value: Option<&'a str>,
}

impl<'a> Link<'a> {
    /// The name that the link is about: its text, if that is code and nothing else.
    fn name(&self) -> Option<&'a str> {
        let name = self.text.strip_prefix('`')?.strip_suffix('`')?;
        (!name.contains('`')).then(|| name.trim_end_matches("()"))
    }
}

/// All links of a page, those in fenced blocks passed over.
fn links(page: &str) -> Vec<Link<'_>> {
    let mut found = Vec::new();
    let mut fenced = false;
    for (index, line) in page.lines().enumerate() {
        fenced ^= line.trim_start().starts_with("```");
        if fenced {
            continue;
        }
        for (middle, _) in line.match_indices("](") {
            let Some(start) = line[..middle].rfind('[') else { continue };
            let Some(length) = line[middle + 2..].find(')') else { continue };
            let (target, rest) = line[middle + 2..].split_at(length);
            let value = rest.strip_prefix(") = ").map(|rest| {
                let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
                &rest[..end.unwrap_or(rest.len())]
            });
            found.push(Link { line: index + 1, text: &line[start + 1..middle], target, value });
        }
    }
    found
}

/// The path from the root that a link on the page `from` leads to.
fn resolve(from: &str, target: &str) -> String {
    let path = target.split('#').next().unwrap_or_default();
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in path.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." | "" => {}
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where `word` stands as a whole word.
fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    text.match_indices(word).map(|(at, _)| at).filter(move |at| {
        !text[..*at].ends_with(is_word) && !text[at + word.len()..].starts_with(is_word)
    })
}

/// Where something of that name is introduced.
fn definition(bare: &str, name: &str) -> Option<usize> {
    words(bare, name).find(|at| {
        let before = bare[..*at].trim_end();
        KEYWORDS.iter().any(|keyword| {
            before.strip_suffix(keyword).is_some_and(|before| !before.ends_with(is_word))
        })
    })
}

/// The words that begin a line in the braces of `enum NAME`, one level deep: its variants.
fn variants(bare: &str, name: &str) -> Vec<String> {
    let Some(head) = words(bare, name).find(|at| bare[..*at].trim_end().ends_with("enum")) else {
        return Vec::new();
    };
    let Some(start) = bare[head..].find('{').map(|at| head + at) else { return Vec::new() };
    let mut depth = 0_usize;
    let mut found = Vec::new();
    for line in bare[start..].lines() {
        let word: String = line.trim_start().chars().take_while(|c| is_word(*c)).collect();
        if depth == 1 && word.starts_with(char::is_uppercase) {
            found.push(word);
        }
        for c in line.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth <= 1 => return found,
                '}' => depth -= 1,
                _ => {}
            }
        }
    }
    found
}

/// Whether a file defines `name`, or `Type::name`, or `module::name`.
fn defines(source: &Source, path: &str) -> bool {
    let bare = &source.bare;
    let Some((owner, name)) = path.rsplit_once("::") else {
        return definition(bare, path).is_some();
    };
    let owner = owner.rsplit("::").next().unwrap_or(owner);
    if owner.starts_with(char::is_lowercase) {
        return definition(bare, name).is_some();
    }
    let implemented = words(bare, owner).any(|at| {
        let line_start = bare[..at].rfind('\n').map_or(0, |at| at + 1);
        bare[line_start..at].trim_start().starts_with("impl")
    });
    let known = implemented || definition(bare, owner).is_some();
    known && (definition(bare, name).is_some() || variants(bare, owner).iter().any(|v| v == name))
}

/// The value of a constant, without underscores.
fn value(source: &Source, name: &str) -> Option<String> {
    let at = definition(&source.bare, name)?;
    let rest = source.code[at..].split_once('=')?.1.split_once(';')?.0;
    Some(rest.trim().replace('_', ""))
}

/// What is wrong with a link, and whether it named something that was looked up.
fn check_link(
    page: &str,
    link: &Link<'_>,
    files: &BTreeMap<&str, &TextFile>,
) -> Result<bool, String> {
    let Link { text, target, .. } = link;
    if target.contains("://") || target.starts_with('#') {
        return Ok(false);
    }
    if target.contains("#L") {
        return Err(format!("`{target}` names a line, and lines move"));
    }
    let path = resolve(page, target);
    let Some(file) = files.get(path.as_str()) else {
        let folder = format!("{path}/");
        let is_folder = files.keys().any(|file| file.starts_with(&folder));
        return if is_folder { Ok(false) } else { Err(format!("[{text}]: there is no {path}")) };
    };
    let Some(name) = link.name().filter(|_| path.ends_with(".rs")) else { return Ok(false) };
    let source = source::read(&path, &file.text);
    let is_name = name.chars().all(|c| is_word(c) || c == ':');
    let there = if is_name { defines(&source, name) } else { source.code.contains(name) };
    if !there {
        return Err(format!("`{name}` is not in {path}"));
    }
    match (link.value, value(&source, name)) {
        (None, _) => Ok(true),
        (Some(said), Some(is)) if said.replace('_', "") == is => Ok(true),
        (Some(said), is) => Err(format!("`{name}` is said to be {said}, and is {is:?}")),
    }
}

/// What is wrong with the links of a page, and how many names were looked up.
fn check_page(page: &TextFile, files: &BTreeMap<&str, &TextFile>) -> (Vec<Finding>, usize) {
    let mut findings = Vec::new();
    let mut names = 0;
    for link in links(&page.text) {
        match check_link(&page.path, &link, files) {
            Ok(named) => names += usize::from(named),
            Err(what) => findings.push(Finding::new(format!("{}:{}", page.path, link.line), what)),
        }
    }
    (findings, names)
}

/// The headings of the second level that are phases, in order.
fn phase_headings<'a>(page: &'a str, phases: &[String]) -> Vec<&'a str> {
    let headings = page.lines().filter_map(|line| line.strip_prefix("## "));
    headings.filter(|heading| phases.iter().any(|phase| phase == heading)).collect()
}

/// The codes in the block of the macro `name!`, with what follows each: ` = "code", 404;` or ` = "code",`.
fn codes_in_source(source: &Source, name: &str) -> BTreeSet<(String, String)> {
    let block = source.code.split_once(&format!("\n{name}! {{")).map_or("", |(_, rest)| rest);
    let block = block.split_once("\n}").map_or("", |(block, _)| block);
    let entries = block.lines().filter_map(|line| line.split_once(" = \"")?.1.split_once('"'));
    entries
        .map(|(code, rest)| (code.to_owned(), rest.trim_matches([',', ';', ' ']).to_owned()))
        .collect()
}

/// The codes in the first column of the table below a heading, with the second column where `second` wants it.
fn codes_on_page(page: &str, heading: &str, second: bool) -> BTreeSet<(String, String)> {
    let section = page.split_once(&format!("\n{heading}\n")).map_or("", |(_, rest)| rest);
    let lines = section.lines().take_while(|line| !line.starts_with('#'));
    let cells = lines.filter_map(|line| {
        let (code, rest) = line.strip_prefix("| `")?.split_once("` |")?;
        let status = rest.split('|').next().filter(|_| second).unwrap_or_default();
        Some((code.to_owned(), status.trim().to_owned()))
    });
    cells.collect()
}

fn by_path(files: &[TextFile]) -> BTreeMap<&str, &TextFile> {
    files.iter().map(|file| (file.path.as_str(), file)).collect()
}

fn is_page(file: &&TextFile) -> bool {
    file.path.ends_with(".md")
}

#[test]
fn what_a_page_names_is_there() {
    let files = tree::files();
    let files_by_path = by_path(&files);
    let pages = files.iter().filter(is_page);
    expect_none(pages.flat_map(|page| check_page(page, &files_by_path).0).collect());
}

#[test]
fn the_walkthrough_goes_through_every_phase() {
    let files = tree::files();
    let files = by_path(&files);
    let page = files[WALKTHROUGH];
    let phases = variants(&source::read(PHASES, &files[PHASES].text).bare, "Phase");
    assert!(phases.len() > 5, "the phases are not found any more: {phases:?}");
    assert_eq!(phase_headings(&page.text, &phases), phases, "the headings of {WALKTHROUGH}");
    let (_, names) = check_page(page, &files);
    assert!(names >= WALKTHROUGH_NAMES_MIN, "{WALKTHROUGH} names {names} things of the code only");
}

#[test]
fn the_manual_has_every_code() {
    let files = tree::files();
    let files = by_path(&files);
    let page = &files[MANUAL].text;
    let code =
        |path: &str, name: &str| codes_in_source(&source::read(path, &files[path].text), name);
    let errors = code(ERRORS, "error_codes");
    assert!(errors.len() > 10, "the error codes are not found any more");
    assert_eq!(codes_on_page(page, "## Error codes", true), errors);
    let verdicts = code(VERDICTS, "codes");
    assert!(verdicts.len() > 10, "the verdicts are not found any more");
    assert_eq!(codes_on_page(page, "## Verdicts of preflight", false), verdicts);
}

#[test]
fn every_rule_is_seen() {
    let source = "//! fn in_comment\nconst WAIT_MS: u64 = 1_000;\nenum Way {\n    /// Out.\n    Out { by: u8 },\n    \
                  Home,\n}\nimpl<T> Way<T> {\n    async fn go() { hit(\"a.point\") }\n}\n";
    let files = [TextFile { path: "crates/a/src/x.rs".into(), text: source.into() }];
    let files = by_path(&files);
    let findings = |text: &str| {
        let page = TextFile { path: "docs/page.md".into(), text: text.into() };
        check_page(&page, &files).0.len()
    };
    let good = ["go", "Way::go", "x::go", "Way::Home", "Way::Out", "go()", "WAIT_MS", "a.point"];
    for name in good {
        assert_eq!(findings(&format!("see [`{name}`](../crates/a/src/x.rs).")), 0, "{name}");
    }
    for name in ["gone", "Way::gone", "Way::by", "Gone::go", "in_comment", "o", "b.point"] {
        assert_eq!(findings(&format!("see [`{name}`](../crates/a/src/x.rs).")), 1, "{name}");
    }
    assert_eq!(findings("[`WAIT_MS`](../crates/a/src/x.rs) = 1000, and then"), 0);
    assert_eq!(findings("[`WAIT_MS`](../crates/a/src/x.rs) = 1_000."), 0);
    assert_eq!(findings("[`WAIT_MS`](../crates/a/src/x.rs) = 999"), 1);
    assert_eq!(
        findings("[x](../crates/a/src), [y](../crates/a/), [z](https://example.org/#L1)"),
        0
    );
    assert_eq!(findings("[x](../crates/b/src/x.rs) and [y](x.md)"), 2);
    assert_eq!(findings("[x](../crates/a/src/x.rs#L3)"), 1);
    assert_eq!(findings("```\n[x](gone.md)\n```\n[y](gone.md)\n"), 1);
    assert_eq!(resolve("README.md", "docs/x.md#part"), "docs/x.md");

    let phases = ["Home".to_owned(), "Out".to_owned()];
    assert_eq!(
        phase_headings("# Home\n## Out\n## Else\n## Home\n### Out\n", &phases),
        ["Out", "Home"]
    );
    let source =
        source::read("x.rs", "m!(\n\ncodes! {\n    /// One.\n    One = \"o-ne\", 404;\n}\n");
    let expected = BTreeSet::from([("o-ne".to_owned(), "404".to_owned())]);
    assert_eq!(codes_in_source(&source, "codes"), expected);
    let page =
        "\n## Codes\n\n| code | x |\n|---|---|\n| `o-ne` | 404 | text |\n## Next\n| `two` | 1 |\n";
    assert_eq!(codes_on_page(page, "## Codes", true), expected);
    assert_eq!(codes_on_page(page, "## Codes", false).len(), 1);
}
