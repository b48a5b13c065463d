//! Guests with a will of their own: paused by their users, rebooting, powering off, busy.

use whimbrel_lab::report::Command;

use crate::stage::{Stage, VM, guest};

#[test]
fn a_paused_guest_arrives_paused_and_a_busy_one_busy() {
    let stage = Stage::two_hosts("pause").guest_on("host-a");
    let boot = stage.tell(Command::Status).boot_id;
    stage.ok(&["vm", "pause", VM]);
    let end = stage.ok(&["migrate", VM, "host-b", "--json"]).last();
    assert_eq!(end["outcome"], "moved", "{end}");
    stage.wait_vm("paused", "host-b");
    stage.assert_only_on("host-b");
    assert!(stage.lab.witness(guest()).and_then(|mut witness| witness.status()).is_err());
    stage.ok(&["vm", "resume", VM]);
    assert_eq!(stage.assert_runs_on("host-b").boot_id, boot);

    stage.tell(Command::Dirty { mb_per_s: 5 });
    let dirtied = stage.tell(Command::Journal { records_per_s: 100 }).memory.dirtied_pages;
    for to in ["host-a", "host-b"] {
        stage.moves(to);
    }
    let report = stage.assert_healthy();
    assert!(report.memory.dirtied_pages > dirtied && report.boot_id == boot, "{report:?}");
}

#[test]
fn a_reboot_in_the_copy_goes_along_and_a_power_off_ends_it() {
    let stage = Stage::two_hosts("power").guest_on("host-a");
    let before = stage.tell(Command::Status);
    let id = stage.copies("host-b");
    stage.lab.witness(guest()).unwrap().end(Command::Reboot).unwrap();
    let after = stage.wait_filled_after(&before.boot_id);
    assert_ne!(after.boot_id, before.boot_id);
    assert_eq!(stage.record(&id).unwrap()["outcome"], "running", "a reboot ends no migration");
    stage.ok(&["migration", "cancel", &id]);
    stage.wait_end(&id);
    stage.moves("host-b");

    let id = stage.copies("host-a");
    stage.lab.witness(guest()).unwrap().end(Command::Poweroff).unwrap();
    let record = stage.wait_end(&id);
    assert_eq!(record["why"]["cause"], "guest-powered-off", "{record}");
    stage.wait_vm("stopped", "host-b");
    for host in ["host-a", "host-b"] {
        stage.assert_left(host, 0);
    }
    stage.ok(&["vm", "start", VM]);
    stage.wait_filled();
    stage.moves("host-a");

    // What came with a guest has to outlast its next reset.
    let before = stage.assert_healthy();
    stage.lab.witness(guest()).unwrap().end(Command::Reboot).unwrap();
    stage.wait_filled_after(&before.boot_id);
    stage.assert_runs_on("host-a");
}
