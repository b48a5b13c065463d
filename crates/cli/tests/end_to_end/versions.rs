//! Between versions of QEMU, with everything watched: memory, disk, clocks, network, console.

use std::io::{Read as _, Write as _};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use whimbrel_lab::report::Command;

use crate::stage::{Stage, VM, guest};

#[test]
fn a_guest_goes_round_all_versions_and_notices_nothing() {
    let stage = Stage::with_engines("round", &["7.2", "7.2", "10.0", "10.0"]).guest_on("host-a");
    let boot = stage.tell(Command::Status).boot_id;
    let mut console = Console::open(&stage);
    console.answers(&stage, "before");
    let probe = stage.lab.probe(guest()).unwrap();
    for (to, version) in
        [("host-b", "7.2"), ("host-c", "10.0"), ("host-d", "10.0"), ("host-a", "7.2")]
    {
        let end = stage.ok(&["migrate", VM, to, "--json"]).last();
        assert_eq!((&end["outcome"], &end["host"]), (&"moved".into(), &to.into()), "{end}");
        for figure in ["total_ms", "downtime_ms", "bytes"] {
            assert!(end[figure].as_f64() > Some(0.0), "{figure}: {end}");
        }
        let id = end["migration"].as_str().unwrap();
        let record = stage.record(id).unwrap();
        assert_eq!((&record["id"], &record["outcome"]), (&id.into(), &"moved".into()));
        assert!(record.get("leftovers").is_none(), "{record}");
        let engine = stage.wait_vm("running", to)["engine"]["version"].clone();
        assert!(engine.as_str().unwrap().starts_with(version), "{engine}");
        assert_eq!(stage.assert_runs_on(to).boot_id, boot, "it is the same guest");
        let seen = probe.take();
        assert!(seen.stream_unbroken && seen.received > 0, "{to}: {seen:?}");
        console.answers(&stage, &format!("on-{to}"));
    }
}

/// A `whimbrel vm console` that stays open while the guest moves.
struct Console {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    seen: String,
}

impl Console {
    fn open(stage: &Stage) -> Self {
        let mut command = stage.lab.operator_command(&["vm", "console", VM]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, mut out) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (send, output) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = out.read(&mut buffer) {
                if send.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { child, input, output, seen: String::new() }
    }

    /// Types a word until the witness has answered it: what is typed while the console is opened anew may be lost.
    fn answers(&mut self, stage: &Stage, word: &str) {
        stage.wait(&format!("the console's answer to {word}"), || {
            writeln!(self.input, "{word}").unwrap();
            while let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(500)) {
                self.seen.push_str(&String::from_utf8_lossy(&bytes));
                if self.seen.contains(&format!("echo: {word}")) {
                    return Some(());
                }
            }
            None
        });
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
