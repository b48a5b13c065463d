//! What is refused before anything is touched, with every reason at once.

use std::collections::BTreeSet;
use std::os::unix::fs::symlink;

use serde_json::Value;
use whimbrel_lab::Cut;

use crate::stage::{Stage, VM};

#[test]
fn everything_in_the_way_is_told_at_once_and_nothing_is_touched() {
    let stage = Stage::two_hosts("paths");
    stage.create_guest("host-a");
    paths_stay_in_their_storage(&stage);

    let stopped = stage.fails("preflight-refused", &["migrate", VM, "host-b"]);
    assert!(codes(&stopped).contains("vm-not-running"), "{stopped}");
    stage.ok(&["vm", "start", VM]);
    stage.wait_filled();

    stage.fails("not-found", &["migrate", VM, "host-z"]);
    assert_eq!(
        codes(&stage.fails("preflight-refused", &["migrate", VM, "host-a"])),
        set(&["same-host"])
    );

    // An address at which host-b cannot listen is found here, and not by its QEMU.
    for (address, code) in
        [("no-such.invalid", "address-unresolvable"), ("192.0.2.77", "address-not-its-own")]
    {
        let named = ["migrate", VM, "host-b", "--migrate-address", address];
        let refused = stage.fails("preflight-refused", &named);
        assert_eq!(codes(&refused), set(&[code]), "{refused}");
    }

    stage.lab.cut("host-b", Cut::STREAMS).unwrap();
    let closed = stage.fails("preflight-refused", &["migrate", VM, "host-b"]);
    assert_eq!(codes(&closed), set(&["port-closed"]), "{closed}");
    stage.ok(&["host", "disable", "host-b"]);
    let several = stage.fails("preflight-refused", &["migrate", VM, "host-b"]);
    assert_eq!(codes(&several), set(&["destination-disabled", "port-closed"]), "{several}");
    assert!(several["verdicts"].as_array().unwrap().iter().all(|verdict| {
        !verdict["problem"].as_str().unwrap().is_empty()
            && !verdict["advice"].as_str().unwrap().is_empty()
    }));
    // Nothing was begun: no record, no QEMU, and the guest was never asked to stop.
    assert_eq!(stage.ok(&["migration", "list", "--json"]).out.trim(), "");
    stage.assert_runs_on("host-a");

    stage.lab.restore("host-b").unwrap();
    stage.ok(&["host", "enable", "host-b"]);
    stage.moves("host-b");
}

/// A name in a storage that leads out of it is refused, at the latest when it is opened.
fn paths_stay_in_their_storage(stage: &Stage) {
    let shared = stage.lab.shared();
    symlink("/etc/passwd", shared.join("boot/leads-out")).unwrap();
    symlink("/etc", shared.join("etc")).unwrap();
    let create = |name: &'static str, file: &str| {
        let kernel = format!("shared/{file}");
        stage.run(&["vm", "create", name, "--memory", "64MiB", "--kernel", &kernel, "--json"])
    };
    for file in ["../etc/passwd", "boot/../../etc/passwd"] {
        let said = create("dots", file);
        assert_eq!(said.last()["error"], "bad-path", "{said:?}");
    }
    for (name, file) in [("link", "boot/leads-out"), ("folder", "etc/passwd")] {
        let created = create(name, file);
        let refused = if created.code == Some(0) {
            stage.run(&["vm", "start", name, "--json"])
        } else {
            created
        };
        assert_eq!(refused.last()["error"], "bad-path", "{refused:?}");
        let deleted = stage.run(&["vm", "delete", name]);
        assert!([Some(0), Some(3)].contains(&deleted.code), "{deleted:?}");
    }
    let disk = ["--disk", "storage=shared,import=shared/boot/leads-out,import-format=raw"];
    let args = [&["vm", "create", "import", "--memory", "64MiB"], &disk[..]].concat();
    stage.fails("bad-path", &args);
    for host in stage.hosts() {
        stage.assert_left(&host, 0);
    }
}

fn codes(refusal: &Value) -> BTreeSet<String> {
    let verdicts = refusal["verdicts"].as_array().unwrap();
    let refusing = verdicts.iter().filter(|verdict| verdict["severity"] == "refuse");
    refusing.map(|verdict| verdict["code"].as_str().unwrap().to_owned()).collect()
}

fn set(codes: &[&str]) -> BTreeSet<String> {
    codes.iter().map(|code| (*code).to_owned()).collect()
}
