//! The demo as `make demo` runs it, with real QEMUs: it needs root, and what `scripts/setup` and `scripts/guest` make.

#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const WHIMBREL: &str = env!("CARGO_BIN_EXE_whimbrel");

/// A lab's folder that others may pass through, since QEMU runs as another user; short, since sockets are in it. Removed in
/// the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        Self(format!("/var/tmp/wt-{name}-{}", std::process::id()).into())
    }

    fn start(&self, args: &[&str]) -> Child {
        let mut command = Command::new(WHIMBREL);
        command.args(["demo", "--dir"]).arg(&self.0).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// What is left of the lab: files other than its log, and processes that name its folder.
    fn leftovers(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let files = names.filter(|name| !["log", ".lab.lock"].contains(&name.as_str()));
        let folder = self.0.to_str().unwrap();
        let command_line =
            |entry: std::fs::DirEntry| std::fs::read(entry.path().join("cmdline")).ok();
        let processes = std::fs::read_dir("/proc").unwrap().flatten().filter_map(command_line);
        let processes = processes.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
        files.chain(processes.filter(|line| line.contains(folder))).collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Whatever a failed test left: the lab's own way of cleaning up, then the folder with its log.
        let mut down = Command::new(WHIMBREL);
        let _ = down.args(["lab", "down", "--dir"]).arg(&self.0).output();
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_demo_moves_a_vm_twice_and_leaves_nothing() {
    let folder = Folder::new("demo");
    let output = folder.start(&["--json"]).wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}\n{}", String::from_utf8_lossy(&output.stdout));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let ends: Vec<Value> = lines.filter(|line| line["outcome"].is_string()).collect();
    let hosts: Vec<&str> = ends.iter().filter_map(|end| end["host"].as_str()).collect();
    assert_eq!(hosts, ["host-b", "host-c"]);
    for end in &ends {
        assert_eq!(end["outcome"], "moved");
        assert_eq!(end["network"]["stream_unbroken"], true);
        assert_eq!(end["witness"]["healthy"], true);
        assert!(end["witness"]["memory"]["verified_pages"].as_u64() > Some(0));
        assert!(end["downtime"]["total_us"].as_u64() > Some(0), "{end}");
        assert_eq!(end["leftovers"], serde_json::json!([]));
    }
    assert_eq!(folder.leftovers(), [""; 0]);
}

#[test]
fn an_interrupted_demo_leaves_nothing_either() {
    let folder = Folder::new("stop");
    let mut demo = folder.start(&["--json"]);
    let lines = BufReader::new(demo.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut errors = demo.stderr.take().unwrap();
    let mut seen = Vec::new();
    for line in lines {
        let first_copy = line.contains(r#""phase":"precopy""#)
            && !seen.iter().any(|s: &String| s.contains("precopy"));
        seen.push(line);
        if first_copy {
            kill_process(Pid::from_child(&demo), Signal::INT).unwrap();
        }
    }
    let mut told = String::new();
    std::io::Read::read_to_string(&mut errors, &mut told).unwrap();
    assert_eq!(demo.wait().unwrap().code(), Some(130), "{told}\n{}", seen.join("\n"));
    assert!(seen.last().unwrap().contains(r#""error":"interrupted""#), "{}", seen.join("\n"));
    assert_eq!(folder.leftovers(), [""; 0]);
}
