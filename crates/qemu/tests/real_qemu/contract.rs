//! Every command, argument and word that this crate sends exists in each installed QEMU.

use std::collections::BTreeSet;
use std::path::Path;

use whimbrel_qemu::schema::{SENT, Schema};

use crate::rig::{Lab, engines};

#[tokio::test]
async fn all_that_is_sent_is_known_to_every_engine() {
    for engine in engines() {
        let lab = Lab::new();
        let guest = lab.start(&engine, "web01", false).await;
        let schema = Schema::query(guest.machine.qmp()).await.unwrap();
        let version = engine.version;
        for sent in SENT {
            let command = sent.command;
            assert!(schema.has_command(command), "{version} has no {command}");
            for argument in sent.arguments {
                assert!(schema.has_argument(command, argument), "{version}: {command} {argument}");
            }
            for (argument, words) in sent.words {
                let known = schema.words(command, argument);
                for word in *words {
                    assert!(known.contains(*word), "{version}: {command} {argument}={word}");
                }
            }
        }
        // The test itself must be able to fail.
        assert!(!schema.has_command("query-nonsense"));
        assert!(!schema.has_argument("migrate", "nonsense"));
        assert!(!schema.words("migrate-continue", "state").contains("nonsense"));
    }
}

/// The table above names every command that stands in the sources, and no other.
#[test]
fn the_table_is_complete() {
    let mut written = BTreeSet::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut written);
    let listed: BTreeSet<String> = SENT.iter().map(|sent| sent.command.to_owned()).collect();
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
        for call in [".order(", ".execute(", "const COMMAND: &str ="] {
            for (at, _) in text.match_indices(call) {
                let rest = text[at + call.len()..].trim_start();
                if let Some(rest) = rest.strip_prefix('"') {
                    found.insert(rest.split('"').next().unwrap().to_owned());
                }
            }
        }
    }
}
