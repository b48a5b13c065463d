//! Rust source, read just far enough: what is comment, what is text, what is test, and where functions begin and end.
//!
//! No parser: rustc has one, and whatever reaches this test has passed it.

use std::collections::BTreeSet;

use crate::tree::TextFile;

/// A source file whose comments, and texts too, are blanked with spaces; lines stay where they are.
pub(crate) struct Source {
    pub(crate) path: String,
    /// Comments blanked, texts kept.
    pub(crate) code: String,
    /// Comments and texts blanked.
    pub(crate) bare: String,
    /// For each line, whether it belongs to tests.
    pub(crate) is_test: Vec<bool>,
}

/// A function with a body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Function {
    pub(crate) name: String,
    /// Its first line, counted from 1, without attributes and documentation.
    pub(crate) line: usize,
    pub(crate) lines: usize,
}

/// All sources, each knowing which of its lines are tests'.
pub(crate) fn read_all(files: &[TextFile]) -> Vec<Source> {
    let mut sources: Vec<Source> = files.iter().map(|file| read(&file.path, &file.text)).collect();
    let test_files: BTreeSet<String> = sources.iter().flat_map(test_modules).collect();
    for source in &mut sources {
        let below = |module: &String| source.path.starts_with(&format!("{module}/"));
        let is_named = |module: &String| source.path == format!("{module}.rs") || below(module);
        if test_files.iter().any(is_named) {
            source.is_test.fill(true);
        }
    }
    sources
}

/// One file on its own.
pub(crate) fn read(path: &str, text: &str) -> Source {
    let (code, bare) = blank(text);
    let mut is_test = vec![false; text.lines().count()];
    let outside = ["/tests/", "/benches/", "/examples/"];
    if outside.iter().any(|folder| path.contains(folder)) {
        is_test.fill(true);
    }
    for (from, to) in test_regions(&bare) {
        is_test[from..=to].fill(true);
    }
    Source { path: path.to_owned(), code, bare, is_test }
}

/// The lines (counted from 0, both ends included) of every item under `#[cfg(test)]`.
fn test_regions(bare: &str) -> Vec<(usize, usize)> {
    const MARK: &str = "#[cfg(test)]";
    let mut regions = Vec::new();
    let mut from = 0;
    while let Some(found) = bare[from..].find(MARK) {
        let start = from + found;
        let end = item_end(bare, start + MARK.len()).unwrap_or(bare.len() - 1);
        regions.push((line_of(bare, start), line_of(bare, end)));
        from = end.max(start + MARK.len());
    }
    regions
}

/// The paths, without `.rs`, of the files that this file declares as test modules.
fn test_modules(source: &Source) -> Vec<String> {
    let (folder, file) = source.path.rsplit_once('/').unwrap_or(("", &source.path));
    let stem = file.trim_end_matches(".rs");
    let own = if ["lib", "main", "mod"].contains(&stem) {
        folder.to_owned()
    } else {
        format!("{folder}/{stem}")
    };
    let lines: Vec<&str> = source.bare.lines().collect();
    let pairs = lines.windows(2).filter(|pair| pair[0].trim() == "#[cfg(test)]");
    let declared = pairs.filter_map(|pair| pair[1].trim().strip_suffix(';'));
    let names = declared.filter_map(|line| line.split_once("mod ").map(|(_, name)| name));
    names.map(|name| format!("{own}/{name}")).collect()
}

/// Every function with a body, in the order of the file.
pub(crate) fn functions(source: &Source) -> Vec<Function> {
    let mut found = Vec::new();
    let mut start = 0;
    for (index, line) in source.bare.split('\n').enumerate() {
        if let Some((offset, name)) = function_named(line)
            && let Some(end) = item_end(&source.bare, start + offset)
            && source.bare.as_bytes()[end] == b'}'
        {
            let lines = line_of(&source.bare, end) - index + 1;
            found.push(Function { name, line: index + 1, lines });
        }
        start += line.len() + 1;
    }
    found
}

/// The name of the function whose head stands on this line, and where the head begins.
fn function_named(line: &str) -> Option<(usize, String)> {
    let (before, after) = line.split_once("fn ")?;
    let qualifier = |word: &str| {
        ["const", "async", "unsafe", "extern", "default"].contains(&word) || word.starts_with("pub")
    };
    let place = |word: &str| word.ends_with(')'); // the rest of `pub(in some::place)`
    if !before.split_whitespace().all(|word| qualifier(word) || place(word)) {
        return None;
    }
    let name: String = after.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    (!name.is_empty()).then_some((before.len(), name))
}

/// Where the item that begins at `from` ends: its closing brace, or its semicolon.
fn item_end(bare: &str, from: usize) -> Option<usize> {
    let (mut round, mut braces) = (0_i32, 0_i32);
    for (offset, byte) in bare.bytes().enumerate().skip(from) {
        match byte {
            b'(' | b'[' => round += 1,
            b')' | b']' => round -= 1,
            b'{' => braces += 1,
            b'}' => {
                braces -= 1;
                if braces == 0 && round == 0 {
                    return Some(offset);
                }
            }
            b';' if round == 0 && braces == 0 => return Some(offset),
            _ => {}
        }
    }
    None
}

/// The line, counted from 0, of a byte.
pub(crate) fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset].iter().filter(|byte| **byte == b'\n').count()
}

/// What a stretch of source is.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Code,
    Comment,
    Text,
}

/// The source without comments, and without comments and texts. Byte offsets stay as they are.
fn blank(text: &str) -> (String, String) {
    let (mut code, mut bare) =
        (String::with_capacity(text.len()), String::with_capacity(text.len()));
    let mut rest = text;
    while !rest.is_empty() {
        let (kind, length) = stretch(rest, bare.chars().next_back());
        let (now, later) = rest.split_at(length);
        let spaces: String =
            now.bytes().map(|byte| if byte == b'\n' { '\n' } else { ' ' }).collect();
        code.push_str(if kind == Kind::Comment { &spaces } else { now });
        bare.push_str(if kind == Kind::Code { now } else { &spaces });
        rest = later;
    }
    (code, bare)
}

/// What `rest` begins with, and how many bytes of it.
fn stretch(rest: &str, before: Option<char>) -> (Kind, usize) {
    let in_word = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    if rest.starts_with("//") {
        return (Kind::Comment, rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return (Kind::Comment, block_comment(rest));
    }
    if !in_word && let Some(length) = raw_text(rest) {
        return (Kind::Text, length);
    }
    if rest.starts_with('"') {
        return (Kind::Text, quoted(rest, '"'));
    }
    if rest.starts_with('\'') && is_character(rest) {
        return (Kind::Text, quoted(rest, '\''));
    }
    (Kind::Code, rest.chars().next().map_or(1, char::len_utf8))
}

fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < rest.len() {
        let here = &rest.as_bytes()[at..];
        if here.starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if here.starts_with(b"*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// The length of a raw text such as `r#"…"#`, if `rest` begins with one.
fn raw_text(rest: &str) -> Option<usize> {
    let after = rest.strip_prefix("br").or_else(|| rest.strip_prefix('r'))?;
    let hashes = after.bytes().take_while(|byte| *byte == b'#').count();
    let body = after[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = body.find(&end).map_or(body.len(), |at| at + end.len());
    Some(rest.len() - body.len() + length)
}

fn quoted(rest: &str, mark: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        if !escaped && c == mark {
            return at + c.len_utf8();
        }
        escaped = !escaped && c == '\\';
    }
    rest.len()
}

/// Whether a `'` begins a character and no lifetime.
fn is_character(rest: &str) -> bool {
    let mut chars = rest.chars().skip(1);
    match chars.next() {
        Some('\\') => true,
        Some(_) => chars.next() == Some('\''),
        None => false,
    }
}

#[test]
fn comments_and_texts_are_blanked_where_they_stand() {
    let text = "let a = \"// no\"; // yes 'x\nlet c = ['\\'', '\"']; /* a /* b */ c */ f::<'a>(r#\"q\"q\"#)";
    let (code, bare) = blank(text);
    assert_eq!(code.len(), text.len());
    assert_eq!(bare.len(), text.len());
    assert!(code.contains("\"// no\"") && !code.contains("yes") && !code.contains(" c */"));
    assert!(!bare.contains("no") && !bare.contains('q') && bare.contains("f::<'a>("));
    assert_eq!(line_of(&bare, bare.find("f::").unwrap()), 1);
}

#[test]
fn functions_are_measured_and_tests_are_told_apart() {
    let text = "trait T {\n    fn only_said(&self);\n}\nimpl T for [u8; 4] {\n    pub(crate) async fn done(\n        \
                a: [u8; 4],\n    ) {\n        let s = \"}\";\n    }\n}\n#[cfg(test)]\nmod tests {\n    fn t() {}\n}\n";
    let source = read("crates/a/src/lib.rs", text);
    let found = functions(&source);
    let expected = [("done", 5, 5), ("t", 13, 1)];
    let seen: Vec<_> = found.iter().map(|f| (f.name.as_str(), f.line, f.lines)).collect();
    assert_eq!(seen, expected);
    assert_eq!(source.is_test.iter().filter(|test| **test).count(), 4);
    assert!(!source.is_test[9] && source.is_test[10]);
}

#[test]
fn a_file_declared_as_test_module_is_a_test() {
    let file = |path: &str, text: &str| TextFile { path: path.into(), text: text.into() };
    let sources = read_all(&[
        file("crates/a/src/run.rs", "//! x\n#[cfg(test)]\nmod trial;\nfn f() {}\n"),
        file("crates/a/src/run/trial.rs", "//! x\n"),
        file("crates/a/src/run/trial/deep.rs", "//! x\n"),
        file("crates/a/src/trial.rs", "//! x\n"),
        file("crates/a/tests/all.rs", "//! x\n"),
    ]);
    let tests: Vec<bool> = sources.iter().map(|source| source.is_test.iter().all(|t| *t)).collect();
    assert_eq!(tests, [false, true, true, false, true]);
}
