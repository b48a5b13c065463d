//! The binary as scripts see it: exit codes, what stands on which stream, and the form of errors, without a server and
//! with a controller that has no hosts.

#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

const WHIMBREL: &str = env!("CARGO_BIN_EXE_whimbrel");
const NO_ID: &str = "01890a5d-ac96-774b-bcce-b302099a8057";

/// Runs `whimbrel` with no settings but those given.
fn whimbrel(args: &[&str]) -> Output {
    let mut command = Command::new(WHIMBREL);
    command.args(args).env_remove("WHIMBREL_CLIENT").env_remove("WHIMBREL_LOG");
    command.env("HOME", "/nonexistent").env_remove("XDG_CONFIG_HOME").stdin(Stdio::null());
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// The exit code and the error's code, with and without `--json`, which must agree.
fn refusal(args: &[&str]) -> (i32, String) {
    let plain = whimbrel(args);
    assert_eq!(text(&plain.stdout), "", "{args:?}: nothing but results on standard output");
    let first = text(&plain.stderr).lines().next().unwrap_or_default().to_owned();
    let code = first.strip_prefix("error[").and_then(|rest| rest.split_once("]: "));
    let (code, _) = code.unwrap_or_else(|| panic!("{args:?}: {first}"));
    // Options end at `--`.
    let with_json = [&["--json"], args].concat();
    let json = whimbrel(&with_json);
    let object: Value = serde_json::from_slice(&json.stdout)
        .unwrap_or_else(|error| panic!("{args:?}: {error}: {}", text(&json.stdout)));
    assert_eq!(text(&json.stdout).lines().count(), 1, "{args:?}");
    assert_eq!(object["error"], code, "{args:?}");
    assert_eq!(object["exit_code"], json.status.code().unwrap(), "{args:?}");
    assert_eq!(plain.status.code(), json.status.code(), "{args:?}");
    (plain.status.code().unwrap(), code.to_owned())
}

#[test]
fn bad_input_is_told_before_anybody_is_asked() {
    let long = "x".repeat(64);
    for (args, code) in [
        (&["migrate"][..], "usage"),
        (&["fly"], "usage"),
        (&["--fly"], "usage"),
        (&["migrate", "web01", "host-b", "extra"], "usage"),
        (&["migrate", "", "host-b"], "bad-name"),
        (&["migrate", "../web01", "host-b"], "bad-name"),
        (&["migrate", "web01", "Host-B"], "bad-name"),
        (&["migrate", "web01", "-web"], "usage"),
        (&["migrate", "web01", "host-b\n"], "bad-name"),
        (&["migrate", "web01", &long], "bad-name"),
        (&["migrate", "web01", "host\u{202e}b"], "bad-name"),
        (&["migrate", "web01", "a;b"], "bad-name"),
        (&["migrate", "web01", "host-b", "--bandwidth", "0"], "out-of-range"),
        (&["migrate", "web01", "host-b", "--bandwidth=-1"], "out-of-range"),
        (&["migrate", "web01", "host-b", "--bandwidth", "NaN"], "out-of-range"),
        (&["migrate", "web01", "host-b", "--bandwidth", "9223372036854775808"], "out-of-range"),
        (&["migrate", "web01", "host-b", "--bandwidth", "1Mb/s"], "bad-request"),
        (&["migrate", "web01", "host-b", "--max-downtime", "0"], "out-of-range"),
        (&["migrate", "web01", "host-b", "--max-downtime", "2000001"], "out-of-range"),
        (&["migrate", "web01", "host-b", "--max-downtime", "-5"], "out-of-range"),
        (&["migrate", "web01", "host-b", "--parallel-connections", "1000000"], "out-of-range"),
        (&["migrate", "web01", "host-b", "--timeout", "1"], "out-of-range"),
        (&["migrate", "web01", "host-b", "--live", "--offline"], "bad-request"),
        (&["migrate", "web01", "host-b", "--comp-methods", "zstd"], "bad-request"),
        (&["plan", "web01", "--all", "host-b"], "usage"),
        (&["plan", "web01", "--probe-rate", "NaN"], "out-of-range"),
        (&["plan", "web01", "--bandwidth", "0"], "out-of-range"),
        (&["migration", "show", "web01"], "bad-name"),
        (&["migration", "set", NO_ID], "bad-request"),
        (&["migration", "set", NO_ID, "--bandwidth", "0"], "out-of-range"),
        (&["migration", "set", NO_ID, "--max-downtime", "9223372036854775808"], "out-of-range"),
        (&["migration", "postcopy", "web01"], "bad-name"),
        (&["policy", "set", "web01"], "usage"),
        (&["policy", "set", "web01", "x", "--pool", "y"], "usage"),
        (&["policy", "unset"], "usage"),
        (&["policy", "create", "Mine", "--max-downtime", "50"], "bad-name"),
        (&["policy", "create", "mine"], "usage"),
        (&["policy", "create", "mine", "--max-downtime", "0"], "out-of-range"),
        (
            &["policy", "create", "mine", "--max-downtime", "50", "--postcopy", "perhaps"],
            "bad-request",
        ),
        (&["policy", "create", "mine", "--max-downtime", "50", "--max-total", "0"], "out-of-range"),
        (&["vm", "dirty-rate", "web01", "--seconds", "0"], "out-of-range"),
        (&["vm", "dirty-rate", "web01", "--seconds", "NaN"], "out-of-range"),
        (&["vm", "dirty-rate", "web01", "--mode", "guess"], "bad-request"),
        (&["vm", "save", "web01", "shared/../x"], "bad-path"),
        (&["vm", "restore", "web01", "nothing"], "bad-path"),
        (&["vm", "create", "-f", "/nonexistent/vm.toml"], "bad-path"),
        (&["vm", "create", "-f", "/dev/zero"], "too-large"),
        (&["vm", "create", "web01"], "usage"),
        (&["vm", "create", "web01", "--memory", "lots"], "bad-request"),
        (&["vm", "create", "web01", "--memory", "1GiB", "--disk", "storage=s"], "bad-request"),
        (&["vm", "create", "web01", "--memory", "1GiB", "--kernel", "s/../x"], "bad-path"),
        (&["pool", "init", "--name", "p", "--listen", "nowhere"], "usage"),
        (&["pool", "join-token", "--minutes", "0"], "usage"),
        (&["controller", "--dir", "/nonexistent"], "bad-request"),
        (&["agent"], "usage"),
        (&["agent", "--config", "/nonexistent"], "bad-request"),
        (&["agent", "--name", "a", "--listen", "127.0.0.1:0"], "bad-request"),
        (&["agent", "--name", "a", "--listen", "127.0.0.1:1", "--qemu-user", "0:0"], "bad-request"),
        (&["agent", "--name", "a", "--listen", "127.0.0.1:1", "--join", "x"], "bad-token"),
        (&["lab", "up", "--hosts", "0"], "usage"),
        (&["lab", "up", "--link", "fast"], "usage"),
        (&["vm", "list", "--client", "/nonexistent/client.toml"], "no-controller"),
        (&["vm", "list", "--client", "/dev/null"], "no-controller"),
    ] {
        assert_eq!(refusal(args), (2, code.to_owned()), "{args:?}");
    }
}

#[test]
fn a_vm_file_with_an_unknown_field_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    std::fs::write(&file, "name = \"web01\"\nmemory = \"1GiB\"\ncolour = \"\u{1b}[31mred\"\n")
        .unwrap();
    let path = file.to_str().unwrap();
    assert_eq!(refusal(&["vm", "create", "-f", path]), (2, "bad-request".to_owned()));
    let shown = whimbrel(&["vm", "create", "-f", path]);
    assert!(text(&shown.stderr).contains("colour"));
}

#[test]
fn what_a_terminal_obeys_is_never_printed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    for evil in ["\u{1b}[2J", "\u{9b}31m", "\u{202e}", "\u{7}"] {
        std::fs::write(&file, format!("name = \"{evil}\"")).unwrap();
        for args in [
            &["migrate", evil, "host-b"][..],
            &[evil],
            &["--client", evil, "vm", "list"],
            &["vm", "create", "-f", evil],
            &["vm", "create", "-f", file.to_str().unwrap()],
            &["lab", "up", "--link", evil],
        ] {
            for args in [args.to_vec(), [&["--json"], args].concat()] {
                let output = whimbrel(&args);
                assert_eq!(output.status.code(), Some(2), "{args:?}");
                let all = [output.stdout, output.stderr].concat();
                let harmful = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
                assert!(!text(&all).contains(harmful), "{args:?}: {:?}", text(&all));
            }
        }
    }
}

#[test]
fn help_and_version_are_results() {
    for args in [&["--help"][..], &["-h"], &["--version"], &["migrate", "--help"]] {
        let output = whimbrel(args);
        assert!(output.status.success() && output.stderr.is_empty(), "{args:?}");
        assert!(text(&output.stdout).contains("whimbrel"));
    }
    assert_eq!(whimbrel(&[]).status.code(), Some(2));
}

/// A pool in a folder of its own, and its controller where it runs.
struct Pool {
    folder: TempDir,
    controller: Option<Child>,
}

impl Pool {
    fn init() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pool = Self { folder, controller: None };
        let dir = pool.dir();
        let made = whimbrel(&[
            "pool",
            "init",
            "--name",
            "test",
            "--listen",
            &free_address(),
            "--dir",
            dir.to_str().unwrap(),
            "--socket",
            "c.sock",
        ]);
        assert!(made.status.success(), "{}", text(&made.stderr));
        pool
    }

    fn dir(&self) -> PathBuf {
        self.folder.path().join("pool")
    }

    fn client(&self) -> String {
        self.dir().join("client.toml").to_str().unwrap().to_owned()
    }

    /// Starts the controller and waits until its log says that it serves.
    fn start(mut self) -> Self {
        let mut command = Command::new(WHIMBREL);
        command.args(["controller", "--dir"]).arg(self.dir()).stderr(Stdio::piped());
        let mut child = command.env_remove("WHIMBREL_LOG").spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let serves = |line: &str| line.contains("the controller serves");
        let found = lines.by_ref().map(Result::unwrap).any(|line| serves(&line));
        self.controller = Some(child);
        assert!(found, "the controller ended");
        // Read on, so that the controller never waits for a reader.
        std::thread::spawn(move || lines.for_each(drop));
        self
    }

    fn run(&self, args: &[&str]) -> Output {
        whimbrel(&[&["--client", &self.client()], args].concat())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(controller) = &mut self.controller {
            let _ = controller.kill();
            let _ = controller.wait();
        }
    }
}

/// An address that nobody listens on at the moment.
fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[test]
fn a_pool_is_made_once() {
    let pool = Pool::init();
    let again = ["pool", "init", "--name", "test", "--listen", "127.0.0.1:1", "--dir"];
    let dir = pool.dir();
    let again = [&again[..], &[dir.to_str().unwrap()]].concat();
    assert_eq!(refusal(&again), (3, "exists".to_owned()));
}

#[test]
fn a_monitor_is_let_in_by_its_folder() {
    let pool = Pool::init();
    let (dir, out) = (pool.dir(), pool.folder.path().join("monitor"));
    let (dir, out) = (dir.to_str().unwrap(), out.to_str().unwrap());
    for _ in 0..2 {
        let made = whimbrel(&["pool", "monitor", "prometheus", "--out", out, "--dir", dir]);
        assert!(made.status.success(), "{}", text(&made.stderr));
        assert!(text(&made.stdout).contains("monitor prometheus, until"), "{}", text(&made.stdout));
    }
    for file in ["ca.pem", "monitor.pem", "monitor.key"] {
        assert!(std::path::Path::new(out).join(file).exists(), "{file}");
    }
    let nowhere = ["pool", "monitor", "prometheus", "--out", out, "--dir", "/nowhere"];
    assert_eq!(refusal(&nowhere), (1, "failed".to_owned()));
}

#[test]
fn a_controller_that_does_not_answer_is_unknown() {
    let pool = Pool::init();
    let client = pool.client();
    for args in [&["vm", "list"][..], &["host", "show", "host-a"], &["vm", "start", "web01"]] {
        assert_eq!(
            refusal(&[&["--client", &client], args].concat()),
            (4, "unreachable".to_owned())
        );
    }
    let output = pool.run(&["migrate", "web01", "host-b", "--json"]);
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &object["outcome"]), (Some(4), &Value::from("unknown")));
    assert!(object["migration"].is_string() && object["hint"].is_string(), "{object}");
}

#[test]
fn an_empty_pool_answers() {
    let pool = Pool::init().start();
    for list in ["host", "network", "storage", "vm", "migration"] {
        let table = pool.run(&[list, "list"]);
        assert!(table.status.success(), "{}", text(&table.stderr));
        assert_eq!(text(&table.stdout).lines().count(), 1, "{list}: the head alone");
        assert_eq!(text(&pool.run(&[list, "list", "--json"]).stdout), "", "{list}");
    }
    let token = pool.run(&["pool", "join-token"]);
    assert_eq!(text(&token.stdout).split_whitespace().count(), 1, "the token alone");
    let client = pool.client();
    for args in [
        &["vm", "show", "web01"][..],
        &["vm", "start", NO_ID],
        &["vm", "delete", "web01"],
        &["vm", "console", "web01"],
        &["host", "show", "host-a"],
        &["host", "disable", "host-a"],
        &["migration", "show", NO_ID],
        &["migration", "watch", NO_ID],
        &["migration", "cancel", NO_ID],
        &["migrate", "web01", "host-b"],
    ] {
        let args = [&["--client", &client], args].concat();
        assert_eq!(refusal(&args), (3, "not-found".to_owned()), "{args:?}");
    }
    let output = pool.run(&["migrate", "web01", "host-b", "--json"]);
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["outcome"], "refused");
}

#[test]
fn another_pools_operator_is_told_so() {
    let (pool, other) = (Pool::init().start(), Pool::init());
    let mixed = other.dir().join("mixed.toml");
    mix(&pool.client(), &other.client(), &mixed);
    let args = ["--client", mixed.to_str().unwrap(), "vm", "list"];
    assert_eq!(refusal(&args), (3, "certificate-foreign".to_owned()));
    let output = whimbrel(&args);
    assert!(text(&output.stderr).contains("authority"), "{}", text(&output.stderr));
}

/// The address of one client file with the identity of another.
fn mix(address: &str, identity: &str, into: &Path) {
    let read = |path: &str| std::fs::read_to_string(path).unwrap().parse::<toml::Table>().unwrap();
    let mut mixed = read(identity);
    mixed["controller"] = read(address)["controller"].clone();
    std::fs::copy(identity, into).unwrap();
    std::fs::write(into, mixed.to_string()).unwrap();
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let pool = Pool::init().start();
    let mut command = Command::new(WHIMBREL);
    command.args(["--client", &pool.client(), "vm", "list"]).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
}
