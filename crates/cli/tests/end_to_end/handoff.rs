//! Faults around the point of no return: before it the guest goes on at the source, after it at the destination, and
//! between the two it stands still rather than run twice.

use whimbrel_lab::CONTROLLER;
use whimbrel_lab::report::Command;

use crate::stage::Stage;

/// The source has all confirmations, and has not yet written that the guest is given away.
const BEFORE_RELEASE: &str = "source.before-release";
/// At the destination, once the source stands there: the guest has been given away, and is not yet owned.
const BEFORE_OWNED: &str = "ledger.persist";

#[test]
fn before_the_release_the_guest_goes_on_at_the_source() {
    let stage = Stage::two_hosts("keep").guest_on("host-a");
    let boot = stage.tell(Command::Status).boot_id;
    let same_guest = || assert_eq!(stage.assert_runs_on("host-a").boot_id, boot);

    // The source's agent dies.
    stage.failpoints("host-a", &format!("{BEFORE_RELEASE}=exit"));
    let id = stage.begins("host-b", &[]);
    stage.wait("the end of the agent", || stage.lab.daemon("host-a").is_none().then_some(()));
    stage.assert_stands_still();
    stage.failpoints("host-a", "");
    stage.start_daemon("host-a");
    assert_eq!(stage.wait_end(&id)["outcome"], "stayed");
    same_guest();

    // The release cannot be written.
    stage.failpoints("host-a", &format!("{BEFORE_RELEASE}=error"));
    let id = stage.begins("host-b", &[]);
    assert_eq!(stage.wait_end(&id)["outcome"], "stayed");
    stage.failpoints("host-a", "");
    same_guest();

    // The destination's QEMU dies with the whole guest in it, before anybody was told to run it.
    stage.failpoints("host-a", &format!("{BEFORE_RELEASE}=stall"));
    let id = stage.begins("host-b", &[]);
    stage.wait_stalled("host-a");
    stage.assert_stands_still();
    stage.kill(&stage.qemu("host-b"));
    stage.failpoints("host-a", "");
    let record = stage.wait_end(&id);
    assert_eq!(record["why"]["cause"], "destination-refused", "{record}");
    same_guest();

    stage.moves("host-b");
}

#[test]
fn after_the_release_the_guest_goes_on_at_the_destination() {
    let stage = Stage::two_hosts("give").guest_on("host-a");
    let boot = stage.tell(Command::Status).boot_id;
    let moved = |id: &str, to: &str| {
        assert_eq!(stage.wait_end(id)["outcome"], "moved");
        assert_eq!(stage.assert_runs_on(to).boot_id, boot);
    };

    // The destination's agent dies, with the whole guest in its QEMU.
    let id = given_away(&stage, "host-a", "host-b", "exit");
    stage.wait("the end of the agent", || stage.lab.daemon("host-b").is_none().then_some(()));
    stage.assert_stands_still();
    stage.failpoints("host-b", "");
    stage.start_daemon("host-b");
    moved(&id, "host-b");

    // The source's agent and the controller die, while the destination is silent; then the user learns whom to ask.
    let id = given_away(&stage, "host-b", "host-a", "stall");
    stage.wait_stalled("host-a");
    stage.kill_daemon("host-b");
    stage.kill_daemon(CONTROLLER);
    stage.assert_stands_still();
    stage.start_daemon(CONTROLLER);
    stage.start_daemon("host-b");
    let record = stage.wait_record(&id, "whom to ask", |record| record["outcome"] == "unresolved");
    assert_eq!(record["ask"], "host-a", "{record}");
    stage.fails("handed-over", &["migration", "cancel", &id]);
    stage.assert_stands_still();
    stage.failpoints("host-a", "");
    moved(&id, "host-a");

    // The source's QEMU dies: it is not needed any more.
    let id = given_away(&stage, "host-a", "host-b", "stall");
    stage.wait_stalled("host-b");
    stage.kill(&stage.qemu("host-a"));
    stage.failpoints("host-b", "");
    moved(&id, "host-b");
}

#[test]
fn a_destination_that_cannot_own_the_guest_gives_it_back() {
    let stage = Stage::two_hosts("deny").guest_on("host-a");
    let boot = stage.tell(Command::Status).boot_id;
    // It is told to run the guest, and can neither write that it owns it nor that it refuses.
    let id = given_away(&stage, "host-a", "host-b", "error");
    stage.wait_log("host-b", "the ledger could not be written");
    stage.assert_stands_still();
    stage.kill(&stage.qemu("host-b"));
    stage.failpoints("host-b", "");
    let record = stage.wait_end(&id);
    assert_eq!(record["why"]["cause"], "destination-refused", "{record}");
    assert_eq!(stage.assert_runs_on("host-a").boot_id, boot);
    stage.moves("host-b");
}

/// Begins a migration in which the destination does something else than write that it owns the guest.
fn given_away(stage: &Stage, from: &str, to: &str, instead: &str) -> String {
    stage.failpoints(from, &format!("{BEFORE_RELEASE}=stall"));
    let id = stage.begins(to, &[]);
    stage.wait_stalled(from);
    stage.failpoints(to, &format!("{BEFORE_OWNED}={instead}"));
    stage.failpoints(from, "");
    id
}
