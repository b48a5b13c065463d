//! Kill -9 in the middle of the copy, of each process that takes part: the guest never stops, or has crashed where it was;
//! nothing stays at the destination; and the next try succeeds.

use whimbrel_lab::CONTROLLER;
use whimbrel_lab::report::Command;

use crate::stage::{Stage, VM};

#[test]
fn whoever_dies_in_the_copy_the_guest_stays() {
    let stage = Stage::two_hosts("death").guest_on("host-a");
    let boot = stage.tell(Command::Status).boot_id;
    let same_guest = || assert_eq!(stage.assert_runs_on("host-a").boot_id, boot);

    let id = stage.copies("host-b");
    stage.kill(&stage.qemu("host-b"));
    // Its own QEMU says so, or the destination does: whichever the source hears first.
    assert_eq!(stage.wait_end(&id)["outcome"], "stayed");
    same_guest();

    let id = stage.copies("host-b");
    stage.kill_daemon("host-a");
    stage.assert_healthy();
    stage.start_daemon("host-a");
    assert_eq!(stage.wait_end(&id)["outcome"], "stayed");
    same_guest();

    // The copy needs neither the controller nor the destination's agent, if both are back in time.
    stage.slow_link("host-b", true);
    let id = stage.begins("host-b", &[]);
    stage.wait_copy(&id);
    stage.kill_daemon(CONTROLLER);
    stage.kill_daemon("host-b");
    stage.assert_healthy();
    stage.start_daemon(CONTROLLER);
    stage.start_daemon("host-b");
    stage.wait_record(&id, "the same migration", |record| record["outcome"] == "running");
    stage.slow_link("host-b", false);
    assert_eq!(stage.wait_end(&id)["outcome"], "moved");
    assert_eq!(stage.assert_runs_on("host-b").boot_id, boot);

    stage.moves("host-a");
    assert_eq!(stage.assert_healthy().boot_id, boot);
}

#[test]
fn a_guest_that_dies_in_the_copy_has_crashed_where_it_was() {
    let stage = Stage::two_hosts("crash").guest_on("host-a");
    let id = stage.copies("host-b");
    stage.kill(&stage.qemu("host-a"));
    let record = stage.wait_end(&id);
    assert_eq!((&record["outcome"], &record["why"]["cause"]), (&"stayed".into(), &"failed".into()));
    stage.wait_vm("crashed", "host-a");
    for host in ["host-a", "host-b"] {
        stage.assert_left(host, 0);
    }
    stage.ok(&["vm", "start", VM]);
    stage.wait_filled();
    stage.moves("host-b");
}
