//! Cuts between hosts: the guest stays while it is copied; once it is given away the controller carries the word.

use whimbrel_lab::Cut;
use whimbrel_lab::report::Command;

use crate::stage::{Stage, VM};

#[test]
fn a_cut_in_the_copy_leaves_the_guest_where_it_is() {
    let stage = Stage::two_hosts("cut").guest_on("host-a");
    let boot = stage.tell(Command::Status).boot_id;
    let id = stage.copies("host-b");
    stage.lab.cut("host-b", Cut::ALL).unwrap();
    stage.assert_healthy();
    stage.ok(&["migration", "cancel", &id]);
    // The end does not wait for a host that does not answer.
    let record = stage.wait_end(&id);
    assert_eq!(record["why"]["cause"], "cancelled", "{record}");
    assert_eq!(stage.assert_healthy().boot_id, boot);
    stage.lab.restore("host-b").unwrap();
    stage.wait_record(&id, "an end of the sweep", |record| record.get("leftovers").is_none());
    assert_eq!(stage.assert_runs_on("host-a").boot_id, boot);

    // A short cut is no reason to end anything.
    stage.wait("the destination", || ready(&stage, "host-b"));
    stage.slow_link("host-b", true);
    let id = stage.begins("host-b", &[]);
    stage.wait_copy(&id);
    stage.lab.cut("host-b", Cut::STREAMS).unwrap();
    stage.assert_healthy();
    stage.lab.restore("host-b").unwrap();
    stage.slow_link("host-b", false);
    assert_eq!(stage.wait_end(&id)["outcome"], "moved");
    assert_eq!(stage.assert_runs_on("host-b").boot_id, boot);
}

#[test]
fn the_controller_carries_the_word_where_the_hosts_do_not_meet() {
    let stage = Stage::two_hosts("relay").guest_on("host-a");
    let boot = stage.tell(Command::Status).boot_id;
    stage.failpoints("host-a", "source.before-release=stall");
    let id = stage.begins("host-b", &[]);
    stage.wait_stalled("host-a");
    stage.part("host-a", "host-b");
    stage.failpoints("host-a", "");
    assert_eq!(stage.wait_end(&id)["outcome"], "moved");
    assert_eq!(stage.assert_runs_on("host-b").boot_id, boot);
    // A migration while they do not meet is refused before anything is begun.
    let refused = stage.fails("preflight-refused", &["migrate", VM, "host-a"]);
    assert_eq!(refused["verdicts"][0]["code"], "port-closed", "{refused}");
    stage.join("host-a");
    stage.moves("host-a");
}

fn ready(stage: &Stage, host: &str) -> Option<()> {
    let said = stage.run(&["host", "show", host, "--json"]);
    (said.code == Some(0) && said.last()["state"] == "ready").then_some(())
}
