//! Every command, argument and word that this crate sends exists in each installed QEMU.

use std::collections::BTreeSet;
use std::path::Path;

use whimbrel_qemu::schema::Schema;

use crate::rig::{Lab, engines};

/// What is sent always: a command, its arguments, and the words of arguments that take words.
const SENT: &[(&str, &[&str], &[(&str, &[&str])])] = &[
    ("qmp_capabilities", &[], &[("enable", &["oob"])]),
    ("query-qmp-schema", &[], &[]),
    ("query-machines", &[], &[]),
    ("query-cpu-definitions", &[], &[]),
    ("query-cpu-model-expansion", &["model/name"], &[("type", &["full"])]),
    ("query-uuid", &[], &[]),
    ("query-status", &[], &[]),
    ("query-block", &[], &[]),
    ("query-jobs", &[], &[]),
    ("query-memory-size-summary", &[], &[]),
    ("query-migrate", &[], &[]),
    ("cont", &[], &[]),
    ("stop", &[], &[]),
    ("quit", &[], &[]),
    ("system_powerdown", &[], &[]),
    ("system_reset", &[], &[]),
    ("announce-self", &["initial", "max", "rounds", "step"], &[]),
    (
        "object-add",
        &["id", "dir", "endpoint", "verify-peer", "identity"],
        &[("qom-type", &["tls-creds-x509", "authz-simple"]), ("endpoint", &["server", "client"])],
    ),
    ("object-del", &["id"], &[]),
    ("qom-list", &["path"], &[]),
    (
        "migrate-set-capabilities",
        &["capabilities/state"],
        &[(
            "capabilities/capability",
            &[
                "events",
                "return-path",
                "late-block-activate",
                "pause-before-switchover",
                "validate-uuid",
                "multifd",
            ],
        )],
    ),
    (
        "migrate-set-parameters",
        &[
            "tls-creds",
            "tls-hostname",
            "tls-authz",
            "announce-rounds",
            "multifd-channels",
            "max-bandwidth",
            "downtime-limit",
        ],
        &[],
    ),
    ("migrate", &["uri"], &[]),
    ("migrate-incoming", &["uri"], &[]),
    ("migrate-continue", &[], &[("state", &["pre-switchover"])]),
    ("migrate_cancel", &[], &[]),
];

/// What is sent only where the schema has it.
const SENT_IF_KNOWN: &[(&str, &[&str])] = &[("migrate-incoming", &["exit-on-error"])];

#[tokio::test]
async fn all_that_is_sent_is_known_to_every_engine() {
    for engine in engines() {
        let lab = Lab::new();
        let guest = lab.start(&engine, "web01", false).await;
        let schema = Schema::query(guest.machine.qmp()).await.unwrap();
        let version = engine.version;
        for (command, arguments, words) in SENT {
            assert!(schema.has_command(command), "{version} has no {command}");
            for argument in *arguments {
                assert!(schema.has_argument(command, argument), "{version}: {command} {argument}");
            }
            for (argument, words) in *words {
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
    let listed: BTreeSet<String> = SENT.iter().map(|(command, ..)| (*command).to_owned()).collect();
    assert_eq!(written, listed);
    for (command, _) in SENT_IF_KNOWN {
        assert!(listed.contains(*command));
    }
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
