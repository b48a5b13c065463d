//! Every command, argument and word that this crate sends exists in each installed QEMU.

use std::collections::BTreeSet;
use std::path::Path;

use whimbrel_qemu::schema::{SENT, SENT_WHERE_KNOWN, Schema, Sent};

use crate::rig::{Lab, engines};

#[tokio::test]
async fn all_that_is_sent_is_known_to_every_engine() {
    for engine in engines() {
        let lab = Lab::new();
        let guest = lab.start(&engine, "web01", false).await;
        let schema = Schema::query(guest.machine.qmp()).await.unwrap();
        let version = engine.version;
        for sent in SENT {
            assert_eq!(missing(&schema, sent), None, "{version}");
        }
        for sent in SENT_WHERE_KNOWN {
            assert_eq!(missing(&schema, sent).is_none(), version == "10.0", "{version}: {sent:?}");
        }
        // The test itself must be able to fail.
        assert!(!schema.has_command("query-nonsense"));
        assert!(!schema.has_argument("migrate", "nonsense"));
        assert!(!schema.words("migrate-continue", "state").contains("nonsense"));
    }
}

/// What of it a QEMU does not know.
fn missing(schema: &Schema, sent: &Sent) -> Option<String> {
    let command = sent.command;
    if !schema.has_command(command) {
        return Some(command.to_owned());
    }
    let argument = sent.arguments.iter().find(|argument| !schema.has_argument(command, argument));
    let word = sent.words.iter().find_map(|(argument, words)| {
        let known = schema.words(command, argument);
        words.iter().find(|word| !known.contains(**word))
    });
    argument.or(word).map(|name| format!("{command} {name}"))
}

/// The table above names every command that stands in the sources, and no other.
#[test]
fn the_table_is_complete() {
    let mut written = BTreeSet::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut written);
    let all = SENT.iter().chain(SENT_WHERE_KNOWN);
    let listed: BTreeSet<String> = all.map(|sent| sent.command.to_owned()).collect();
    assert_eq!(written, listed);
}

/// Finds the names of commands: the first text after a call that sends one.
fn collect(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            collect(&path, found);
            continue;
        }
        if name == "tests.rs" || path.iter().any(|part| part == "fake") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        const CALLS: [&str; 5] = [
            ".order(",
            ".execute(",
            ".execute_oob(",
            ".execute_with_descriptor(",
            "const COMMAND: &str =",
        ];
        for call in CALLS {
            for (at, _) in text.match_indices(call) {
                let rest = text[at + call.len()..].trim_start();
                if let Some(rest) = rest.strip_prefix('"') {
                    found.insert(rest.split('"').next().unwrap().to_owned());
                }
            }
        }
    }
}
