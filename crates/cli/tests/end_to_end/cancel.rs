//! A cancel: in the middle of the copy it is as if nothing had been; after the handoff it is refused.

use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use whimbrel_lab::report::Command;

use crate::stage::{Stage, VM, WAIT_MAX};

#[test]
fn a_cancelled_guest_stays_and_the_next_try_succeeds() {
    let stage = Stage::two_hosts("undo").guest_on("host-a");
    let boot = stage.tell(Command::Status).boot_id;
    stage.slow_link("host-b", true);
    let id = stage.begins("host-b", &[]);
    stage.wait_copy(&id);
    // Whatever is asked of the VM meanwhile, or of the migration a second time, is refused with its reason.
    stage.fails("migrating", &["vm", "stop", VM]);
    let again = stage.fails("preflight-refused", &["migrate", VM, "host-b"]);
    assert_eq!(again["verdicts"][0]["code"], "already-migrating", "{again}");
    stage.ok(&["migration", "cancel", &id]);
    let record = stage.wait_end(&id);
    assert_eq!(
        (&record["outcome"], &record["why"]["cause"]),
        (&"stayed".into(), &"cancelled".into())
    );
    assert_eq!(stage.assert_runs_on("host-a").boot_id, boot);
    // Cancelled twice is cancelled.
    stage.ok(&["migration", "cancel", &id]);

    an_interrupt_cancels(&stage);

    stage.slow_link("host-b", false);
    let end = stage.moves("host-b");
    stage.fails("handed-over", &["migration", "cancel", end["migration"].as_str().unwrap()]);
    assert_eq!(stage.assert_runs_on("host-b").boot_id, boot);
}

/// Ctrl-C at `whimbrel migrate` is a cancel, and the command tells the end.
fn an_interrupt_cancels(stage: &Stage) {
    let mut command = stage.lab.operator_command(&["migrate", VM, "host-b", "--json"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let list = || stage.ok(&["migration", "list", "--json"]).out;
    let running = |line: &&str| line.contains(r#""outcome":"running""#);
    stage.wait("a running migration", || list().lines().find(running).map(drop));
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(130), "within {WAIT_MAX:?}: {out}");
    let last: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!((&last["outcome"], &last["host"]), (&"stayed".into(), &"host-a".into()), "{last}");
    stage.assert_runs_on("host-a");
}
