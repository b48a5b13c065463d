//! How long functions and files may be, and the list of those that are longer yet.

use std::collections::BTreeMap;

use crate::source::{Source, functions, read_all};
use crate::{Finding, expect_none, tree};

const FUNCTION_LINES_MAX: usize = 70;
const FILE_LINES_MAX: usize = 800;

/// The exceptions of today: place → size.
#[derive(Default)]
struct Ratchet {
    functions: BTreeMap<String, usize>,
    files: BTreeMap<String, usize>,
}

impl Ratchet {
    fn parse(text: &str) -> Self {
        let table: toml::Table = text.parse().expect("ratchet.toml is TOML");
        let known = ["functions", "files"];
        assert!(
            table.keys().all(|key| known.contains(&key.as_str())),
            "ratchet.toml: unknown table"
        );
        let sizes = |key: &str| -> BTreeMap<String, usize> {
            let entries = table.get(key).and_then(toml::Value::as_table).into_iter().flatten();
            let size = |value: &toml::Value| {
                value
                    .as_integer()
                    .and_then(|lines| usize::try_from(lines).ok())
                    .expect("a number of lines")
            };
            entries.map(|(place, value)| (place.clone(), size(value))).collect()
        };
        Self { functions: sizes("functions"), files: sizes("files") }
    }
}

/// Compares what is too long with the list: only what is listed passes, and only at its listed size.
fn compare(
    kind: &str,
    limit: usize,
    too_long: &BTreeMap<String, usize>,
    listed: &BTreeMap<String, usize>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (place, size) in too_long {
        let what = match listed.get(place) {
            None => format!("the {kind} has {size} lines, more than {limit}: split it by story"),
            Some(old) if size > old => format!("the {kind} grew from {old} to {size} lines"),
            Some(old) if size < old => {
                format!("the {kind} shrank from {old} to {size} lines: say so in ratchet.toml")
            }
            Some(_) => continue,
        };
        findings.push(Finding::new(place, what));
    }
    let gone = listed.keys().filter(|place| !too_long.contains_key(*place));
    findings.extend(gone.map(|place| {
        Finding::new(place, format!("the {kind} is short or gone: take it out of ratchet.toml"))
    }));
    findings
}

fn long_functions(sources: &[Source]) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    for source in sources {
        for function in functions(source) {
            if !source.is_test[function.line - 1] && function.lines > FUNCTION_LINES_MAX {
                let place = format!("{}::{}", source.path, function.name);
                let size = found.entry(place).or_insert(0);
                *size = function.lines.max(*size);
            }
        }
    }
    found
}

fn long_files(sources: &[Source]) -> BTreeMap<String, usize> {
    let counted = |source: &Source| source.is_test.iter().filter(|test| !**test).count();
    let sizes = sources.iter().map(|source| (source.path.clone(), counted(source)));
    sizes.filter(|(_, size)| *size > FILE_LINES_MAX).collect()
}

#[test]
fn functions_and_files_are_short() {
    let sources = read_all(&tree::rust_files());
    let ratchet = Ratchet::parse(include_str!("../../ratchet.toml"));
    let mut findings =
        compare("function", FUNCTION_LINES_MAX, &long_functions(&sources), &ratchet.functions);
    findings.extend(compare("file", FILE_LINES_MAX, &long_files(&sources), &ratchet.files));
    expect_none(findings);
}

#[test]
fn the_rule_sees_what_is_too_long_and_the_list_only_shrinks() {
    let long = format!("fn long() {{\n{}}}\nfn short() {{}}\n", "    work();\n".repeat(69));
    let sources = [crate::source::read("crates/a/src/lib.rs", &long)];
    let found = long_functions(&sources);
    assert_eq!(found, BTreeMap::from([("crates/a/src/lib.rs::long".to_owned(), 71)]));

    let file = "\n".repeat(FILE_LINES_MAX + 1);
    let sources = [crate::source::read("crates/a/src/lib.rs", &file)];
    assert_eq!(long_files(&sources).len(), 1);

    let compared = |listed: &str| {
        let listed = Ratchet::parse(listed).functions;
        let findings = compare("function", FUNCTION_LINES_MAX, &found, &listed);
        findings.into_iter().map(|finding| finding.what).collect::<Vec<_>>()
    };
    let entry = "[functions]\n\"crates/a/src/lib.rs::long\" = ";
    assert!(compared("")[0].contains("more than 70"));
    assert!(compared(&format!("{entry}70"))[0].contains("grew"));
    assert!(compared(&format!("{entry}72"))[0].contains("shrank"));
    assert!(compared(&format!("{entry}71\ngone = 90"))[0].contains("take it out"));
    assert_eq!(compared(&format!("{entry}71")), Vec::<String>::new());
}
