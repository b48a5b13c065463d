//! `migrate`, `migration watch` and what steers one, against an imitation of a controller that says what each test wants:
//! lost answers, lost watches, Ctrl-C, every request's JSON, and every way in which a migration can end.

#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

use std::collections::{HashMap, VecDeque};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use whimbrel_pki::door::{Door, Listener};
use whimbrel_pki::files::ControllerIdentity;

const WHIMBREL: &str = env!("CARGO_BIN_EXE_whimbrel");
const VM: &str = "7c9e6679-7425-40de-944b-e07fc1f90ae7";

/// What the imitation is to say, and what it was asked.
#[derive(Default)]
struct Script {
    /// Answers to `POST /migrations` before the first good one.
    bad_answers: VecDeque<(u16, Value)>,
    /// What the record becomes, one entry a watch; the last one stays.
    watches: VecDeque<Value>,
    /// What the record becomes once a cancel is asked for, or the refusal of it.
    on_cancel: Option<Result<Value, Value>>,
    /// Every `POST /migrations`.
    asked: Vec<Value>,
    /// Every other request: method, path, body.
    calls: Vec<(String, String, Value)>,
    /// Answers to these, by method and path; what is not here is answered with the record.
    answers: HashMap<&'static str, Value>,
    /// Watches that were opened.
    watched: usize,
    cancels: usize,
}

type Shared = Arc<Mutex<Script>>;

struct Imitation {
    folder: TempDir,
    script: Shared,
}

impl Imitation {
    fn start(script: Script) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("pool");
        let made = Command::new(WHIMBREL)
            .args(["pool", "init", "--name", "test", "--listen", "127.0.0.1:8440"])
            .args(["--socket", "c.sock", "--dir"])
            .arg(&dir)
            .output()
            .unwrap();
        assert!(made.status.success());
        let identity = ControllerIdentity::load(&dir).unwrap();
        let tls = whimbrel_pki::tls::server_config(&identity.server()).unwrap();
        let script = Arc::new(Mutex::new(script));
        let router = Router::new()
            .route("/v1/migrations", post(ask))
            .route("/v1/migrations/{id}", get(record))
            .route("/v1/migrations/{id}/watch", get(watch))
            .route("/v1/migrations/{id}/cancel", post(cancel))
            .fallback(call)
            .with_state(script.clone());
        let socket = std::os::unix::net::UnixListener::bind(dir.join("c.sock")).unwrap();
        socket.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let socket = tokio::net::UnixListener::from_std(socket).unwrap();
                let door = Door::new(router, tls);
                door.serve(vec![Listener::Unix(socket)], std::future::pending()).await;
            });
        });
        Self { folder, script }
    }

    fn client(&self) -> PathBuf {
        self.folder.path().join("pool/client.toml")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(WHIMBREL);
        command.args(args).env("WHIMBREL_CLIENT", self.client()).env_remove("WHIMBREL_LOG");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn migrate(&self, more: &[&str]) -> Output {
        self.command(&[&["migrate", "web01", "host-b"], more].concat()).output().unwrap()
    }

    /// Starts `migrate`, and returns when it shows the phase `precopy`.
    fn migrate_until_precopy(&self) -> Running {
        let mut child = self.command(&["migrate", "web01", "host-b"]).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        wait_for(&mut stderr, "precopy");
        Running { child, stderr }
    }

    fn script<T>(&self, look: impl FnOnce(&mut Script) -> T) -> T {
        look(&mut self.script.lock().unwrap())
    }
}

struct Running {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
}

impl Running {
    fn interrupt(&self) {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
    }

    /// The exit code, and what was printed to either stream.
    fn end(mut self) -> (i32, String) {
        let mut text = String::new();
        self.stderr.read_to_string(&mut text).unwrap();
        self.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        (self.child.wait().unwrap().code().unwrap(), text)
    }
}

fn wait_for(reader: &mut impl std::io::BufRead, word: &str) {
    let found = reader.lines().map(Result::unwrap).any(|line| line.contains(word));
    assert!(found, "it never said {word}");
}

async fn ask(State(script): State<Shared>, Json(request): Json<Value>) -> Response {
    let mut script = script.lock().unwrap();
    script.asked.push(request);
    if let Some((status, error)) = script.bad_answers.pop_front() {
        return (StatusCode::from_u16(status).unwrap(), Json(error)).into_response();
    }
    Json(merged(&script, json!({"phase": "admission", "outcome": "running"}))).into_response()
}

async fn record(State(script): State<Shared>, Path(_id): Path<String>) -> Json<Value> {
    let script = script.lock().unwrap();
    Json(merged(&script, script.watches.front().cloned().unwrap()))
}

/// One event, then the stream ends: every watch is a lost one.
async fn watch(State(script): State<Shared>, Path(_id): Path<String>) -> String {
    let mut script = script.lock().unwrap();
    script.watched += 1;
    let now = script.watches.front().cloned().unwrap();
    if script.watches.len() > 1 {
        script.watches.pop_front();
    }
    format!(": comment\n\ndata: {}\n\n", merged(&script, now))
}

async fn cancel(State(script): State<Shared>, Path(_id): Path<String>) -> Response {
    let mut script = script.lock().unwrap();
    script.cancels += 1;
    match script.on_cancel.clone() {
        Some(Ok(state)) => {
            script.watches = VecDeque::from([state.clone()]);
            Json(merged(&script, state)).into_response()
        }
        Some(Err(refusal)) => (StatusCode::CONFLICT, Json(refusal)).into_response(),
        None => (StatusCode::NOT_FOUND, Json(json!({"code": "not-found", "message": "m"})))
            .into_response(),
    }
}

/// Any other request: noted, and answered as the test says.
async fn call(State(script): State<Shared>, method: Method, uri: Uri, body: Bytes) -> Json<Value> {
    let mut script = script.lock().unwrap();
    let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
    let (method, path) = (method.to_string(), uri.path().trim_start_matches("/v1").to_owned());
    let answer = script.answers.get(format!("{method} {path}").as_str()).cloned();
    script.calls.push((method, path, body));
    Json(answer.unwrap_or_else(|| merged(&script, precopy())))
}

/// The whole record of the migration that was asked for, in a state.
fn merged(script: &Script, state: Value) -> Value {
    let id = script.asked.last().map_or(json!(VM), |request| request["id"].clone());
    let mut record = json!({
        "id": id, "vm": VM, "vm_name": "web01", "source": "host-a", "destination": "host-b", "epoch": 2, "memory_bytes": 1_073_741_824,
        "options": {}, "cancel_requested": false, "verdicts": [], "phases": [], "started": "2026-01-02T03:04:05Z",
    });
    for (name, value) in state.as_object().unwrap() {
        record[name] = value.clone();
    }
    record
}

fn precopy() -> Value {
    json!({"phase": "precopy", "outcome": "running", "progress": progress(1)})
}

fn progress(passes: u64) -> Value {
    json!({
        "ram_total_bytes": 1_073_741_824, "ram_remaining_bytes": 104_857_600, "transferred_bytes": 52_428_800,
        "zero_pages": 1, "normal_pages": 2, "passes": passes, "dirty_pages_per_s": 100, "bits_per_s": 934_000_000,
        "engine_total_ms": 900,
    })
}

fn moved() -> Value {
    json!({
        "phase": "retirement", "outcome": "moved", "progress": progress(3), "total_ms": 2314,
        "downtime": {
            "stop_to_completed_us": 7200, "loaded_confirm_us": 600, "release_us": 1400, "go_us": 2600, "total_us": 11_900,
        },
    })
}

fn cancelled() -> Value {
    json!({"phase": "precopy", "outcome": "stayed", "why": {"cause": "cancelled"}, "cancel_requested": true})
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn lost_answers_and_watches_are_asked_for_again() {
    let lost = (503, json!({"code": "unreachable", "message": "gone"}));
    let script = Script {
        bad_answers: [lost.clone(), lost].into(),
        watches: [precopy(), precopy(), moved()].into(),
        ..Script::default()
    };
    let imitation = Imitation::start(script);
    let output = imitation.migrate(&["--json", "--bandwidth", "1gbit", "--max-downtime", "50"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let asked = imitation.script(|script| std::mem::take(&mut script.asked));
    assert_eq!(asked.len(), 3);
    assert!(asked.iter().all(|request| *request == asked[0]), "the same request each time");
    assert_eq!(
        asked[0]["options"],
        json!({"max_downtime_ms": 50, "bandwidth_bytes_per_s": 125_000_000})
    );
    assert_eq!(imitation.script(|script| script.watched), 3);

    let lines: Vec<Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (end, progress) = lines.split_last().unwrap();
    assert!(progress.iter().all(|line| line["phase"].is_string() && line["outcome"].is_null()));
    assert_eq!(end["outcome"], "moved");
    assert_eq!((&end["total_ms"], &end["downtime_ms"]), (&json!(2314), &json!(11.9)));
    assert_eq!((&end["bytes"], &end["migration"]), (&json!(52_428_800), &asked[0]["id"]));
    assert_eq!(end["host"], "host-b");
}

#[test]
fn the_end_is_told_in_words() {
    let imitation =
        Imitation::start(Script { watches: [precopy(), moved()].into(), ..Script::default() });
    let output = imitation.migrate(&[]);
    assert!(output.status.success());
    assert_eq!(
        text(&output.stdout),
        "web01 has moved from host-a to host-b\n  total     2.31 s\n  downtime  11.9 ms (last pass 7.2 + loaded 0.6 + \
         release 1.4 + go 2.6 + rest 0.1)\n  sent      50.0 MiB in 3 passes, at 934 Mbit/s\n"
    );
    assert!(text(&output.stderr).contains("precopy      pass 1 · 100.0 MiB left · 934 Mbit/s"));
}

#[test]
fn every_other_end_has_its_exit_code() {
    let failed = json!({
        "phase": "precopy", "outcome": "stayed",
        "why": {"cause": "failed", "phase": "precopy", "code": "engine", "message": "QEMU said \u{1b}[31mno"},
    });
    let unresolved = json!({"phase": "handoff", "outcome": "unresolved", "ask": "host-b"});
    let refused = json!({"phase": "preflight", "outcome": "refused"});
    for (end, exit, code, outcome) in [
        (failed, 1, "engine", "stayed"),
        (cancelled(), 1, "cancelled", "stayed"),
        (unresolved, 4, "unresolved", "unresolved"),
        (refused, 3, "preflight-refused", "refused"),
    ] {
        let imitation = Imitation::start(Script { watches: [end].into(), ..Script::default() });
        let output = imitation.migrate(&[]);
        assert_eq!(output.status.code(), Some(exit), "{code}");
        assert!(
            text(&output.stderr).contains(&format!("error[{code}]: ")),
            "{}",
            text(&output.stderr)
        );
        assert!(!text(&output.stderr).contains('\u{1b}'));
        let json = imitation.migrate(&["--json"]);
        assert_eq!(json.status.code(), Some(exit), "{code}");
        let last: Value = serde_json::from_str(text(&json.stdout).lines().last().unwrap()).unwrap();
        assert_eq!((&last["outcome"], &last["error"]), (&json!(outcome), &json!(code)));
        assert!(last["migration"].is_string());
    }
}

#[test]
fn every_reason_of_a_refusal_is_told() {
    let verdict = |code, severity| json!({"code": code, "severity": severity, "problem": "P.", "advice": "A."});
    let refusal = json!({
        "code": "preflight-refused", "message": "web01 cannot move to host-b",
        "verdicts": [verdict("memory", "refuse"), verdict("engine-older", "warn")],
    });
    let bad_answers = VecDeque::from([(409, refusal.clone()), (409, refusal)]);
    let imitation = Imitation::start(Script { bad_answers, ..Script::default() });
    let output = imitation.migrate(&[]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(
        text(&output.stderr),
        "error[preflight-refused]: web01 cannot move to host-b\nrefused[memory]: P.\n  → A.\nwarning[engine-older]: \
         P.\n  → A.\n"
    );
    let output = imitation.migrate(&["--json"]);
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&object["outcome"], &object["verdicts"][1]["code"]),
        (&json!("refused"), &json!("engine-older"))
    );
    assert_eq!(imitation.script(|script| script.asked.len()), 2, "a refusal is not asked again");
}

#[test]
fn detached_it_returns_when_admitted() {
    let imitation = Imitation::start(Script::default());
    let output = imitation.migrate(&["--detach"]);
    assert!(output.status.success());
    let id = imitation.script(|script| script.asked[0]["id"].as_str().unwrap().to_owned());
    assert!(text(&output.stdout).contains(&format!("whimbrel migration watch {id}")));
    assert_eq!(imitation.script(|script| script.watched), 0);
}

#[test]
fn the_first_interrupt_cancels_and_waits_for_the_end() {
    let script = Script {
        watches: [precopy()].into(),
        on_cancel: Some(Ok(cancelled())),
        ..Script::default()
    };
    let imitation = Imitation::start(script);
    let running = imitation.migrate_until_precopy();
    running.interrupt();
    let (code, said) = running.end();
    assert_eq!(code, 130, "{said}");
    assert!(said.contains("web01 runs on host-a as before"), "{said}");
    assert_eq!(imitation.script(|script| script.cancels), 1);
}

#[test]
fn after_the_handoff_an_interrupt_waits_for_the_end_and_a_second_one_leaves() {
    let handed_over =
        json!({"code": "handed-over", "message": "the guest has been given to host-b"});
    let script = || Script {
        watches: [precopy()].into(),
        on_cancel: Some(Err(handed_over.clone())),
        ..Script::default()
    };
    let imitation = Imitation::start(script());
    let mut running = imitation.migrate_until_precopy();
    running.interrupt();
    wait_for(&mut running.stderr, "handed over");
    running.interrupt();
    let (code, said) = running.end();
    assert_eq!(code, 130, "{said}");
    assert!(said.contains("whimbrel migration watch"), "{said}");

    let imitation = Imitation::start(script());
    let mut running = imitation.migrate_until_precopy();
    running.interrupt();
    wait_for(&mut running.stderr, "handed over");
    imitation.script(|script| script.watches = [moved()].into());
    let (code, said) = running.end();
    assert_eq!(code, 0, "it has moved, after all: {said}");
}

#[test]
fn an_interrupted_watch_cancels_nothing() {
    let imitation = Imitation::start(Script { watches: [precopy()].into(), ..Script::default() });
    let mut child = imitation.command(&["migration", "watch", VM]).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    wait_for(&mut stderr, "precopy");
    let running = Running { child, stderr };
    running.interrupt();
    assert_eq!(running.end().0, 130);
    assert_eq!(imitation.script(|script| script.cancels), 0);
}

#[test]
fn every_order_has_its_request() {
    let vm = json!({
        "id": VM, "name": "web01", "host": "host-a", "state": "stopped", "epoch": 1,
        "definition": {"id": VM, "generation": 1, "name": "web01", "vcpus": 1, "memory_bytes": 1, "cpu": "c", "machine": "m",
                       "boot": {"firmware": "seabios"}, "disks": [], "nics": []},
    });
    let rate =
        json!({"calc_status": "measured", "calc_period_ms": 2000, "megabytes_per_second": 7});
    let applied = json!({"policy": "must-finish", "origin": "vm"});
    let policy = json!({"name": "nightly", "max_downtime_ms": 5000, "allow_static": "yes", "built_in": false});
    let plan = json!({"vm": VM, "vm_name": "web01", "source": "host-a", "policy": applied, "destinations": []});
    let answers = HashMap::from([
        ("POST /vms/web01/save", vm.clone()),
        ("POST /vms/web01/restore", vm),
        ("POST /vms/web01/dirty-rate", rate),
        ("PUT /vms/web01/policy", applied.clone()),
        ("GET /vms/web01/policy", applied.clone()),
        ("PUT /pool/policy", applied.clone()),
        ("GET /pool/policy", applied),
        ("PUT /policies/nightly", policy.clone()),
        ("GET /policies/nightly", policy.clone()),
        ("DELETE /policies/nightly", Value::Null),
        ("GET /policies", json!([policy])),
        ("POST /plans", plan),
    ]);
    let imitation = Imitation::start(Script { answers, ..Script::default() });
    let state = json!({"file": "shared/saved/web01"});
    let of = |order: &str| format!("/migrations/{VM}/{order}");
    for (words, method, path, body) in [
        (
            format!(
                "migration set {VM} --max-downtime 50 --bandwidth 1gbit --postcopy-bandwidth 1MiB"
            ),
            "PUT",
            of("settings"),
            json!({"max_downtime_ms": 50, "bandwidth_bytes_per_s": 125_000_000, "postcopy_bandwidth_bytes_per_s": 1_048_576}),
        ),
        (
            format!("migration set {VM} --bandwidth 64KiB"),
            "PUT",
            of("settings"),
            json!({"bandwidth_bytes_per_s": 65_536}),
        ),
        (format!("migration postcopy {VM}"), "POST", of("postcopy"), json!({})),
        (format!("migration pause {VM}"), "POST", of("pause"), json!({})),
        (format!("migration resume {VM}"), "POST", of("resume"), json!({})),
        (format!("migration recover {VM}"), "POST", of("recover"), json!({})),
        (format!("migration force-complete {VM}"), "POST", of("force-complete"), json!({})),
        (
            "vm save web01 shared/saved/web01".into(),
            "POST",
            "/vms/web01/save".into(),
            state.clone(),
        ),
        ("vm restore web01 shared/saved/web01".into(), "POST", "/vms/web01/restore".into(), state),
        (
            "vm dirty-rate web01 --seconds 2 --mode dirty-bitmap".into(),
            "POST",
            "/vms/web01/dirty-rate".into(),
            json!({"period_ms": 2000, "mode": "dirty-bitmap", "sample_pages": null}),
        ),
        ("plan web01".into(), "POST", "/plans".into(), json!({"vm": "web01", "options": {}})),
        ("plan web01 --all".into(), "POST", "/plans".into(), json!({"vm": "web01", "options": {}})),
        (
            "plan web01 host-b host-c --fresh --probe-rate 1gbit --no-tls".into(),
            "POST",
            "/plans".into(),
            json!({"vm": "web01", "destinations": ["host-b", "host-c"], "options": {"tls": false}, "fresh": true,
                "probe_bytes_per_s": 125_000_000}),
        ),
        (
            "policy set web01 must-finish".into(),
            "PUT",
            "/vms/web01/policy".into(),
            json!({"policy": "must-finish"}),
        ),
        (
            "policy set --pool must-finish".into(),
            "PUT",
            "/pool/policy".into(),
            json!({"policy": "must-finish"}),
        ),
        ("policy unset web01".into(), "PUT", "/vms/web01/policy".into(), json!({})),
        ("policy unset --pool".into(), "PUT", "/pool/policy".into(), json!({})),
        ("policy which web01".into(), "GET", "/vms/web01/policy".into(), Value::Null),
        ("policy which --pool".into(), "GET", "/pool/policy".into(), Value::Null),
        ("policy list".into(), "GET", "/policies".into(), Value::Null),
        ("policy show nightly".into(), "GET", "/policies/nightly".into(), Value::Null),
        (
            "policy create nightly --max-downtime 5000 --static yes --max-total 60 --require-tls"
                .into(),
            "PUT",
            "/policies/nightly".into(),
            json!({"name": "nightly", "allow_postcopy": "if-asked", "allow_throttle": "if-asked", "allow_static": "yes",
                "max_downtime_ms": 5000, "max_total_s": 60, "require_tls": true}),
        ),
        ("policy delete nightly".into(), "DELETE", "/policies/nightly".into(), Value::Null),
    ] {
        let args: Vec<&str> = words.split(' ').collect();
        for json in [&[][..], &["--json"]] {
            let output = imitation.command(&[&args, json].concat()).output().unwrap();
            assert!(output.status.success(), "{words}: {}", text(&output.stderr));
            let lines = text(&output.stdout).lines();
            if !json.is_empty() {
                lines.for_each(|line| drop(serde_json::from_str::<Value>(line).unwrap()));
            } else {
                assert!(lines.count() > 0, "{words}");
            }
            let call = imitation.script(|script| script.calls.pop().unwrap());
            assert_eq!(call, (method.to_owned(), path.clone(), body.clone()), "{words}");
        }
    }
}

#[test]
fn forecast_and_fact_stand_side_by_side() {
    let foretold = json!({
        "convergence": "yes", "total_ms": 2250.0, "downtime_ms": 12.5, "wire_bytes": 52_428_800, "first_pass_ms": 1.0,
        "wire_bytes_per_s": 1.0, "bottleneck": "link", "throttle_percent": 0.0,
    });
    let mut end = moved();
    end["forecast"] = foretold;
    let imitation = Imitation::start(Script { watches: [end].into(), ..Script::default() });
    let said = imitation.migrate(&[]);
    assert!(
        text(&said.stdout).contains("total     2.31 s (forecast 2.25 s)"),
        "{}",
        text(&said.stdout)
    );
    assert!(text(&said.stdout).contains("downtime  11.9 ms (forecast 12.5 ms) (last pass"));
    let shown = imitation.command(&["migration", "show", VM]).output().unwrap();
    assert!(text(&shown.stdout).contains("  total         2.25 s"), "{}", text(&shown.stdout));
    let json = imitation.migrate(&["--json"]);
    let last: Value = serde_json::from_str(text(&json.stdout).lines().last().unwrap()).unwrap();
    assert_eq!(last["forecast"]["total_ms"], 2250.0);
}

#[test]
fn a_step_on_the_way_is_said_when_it_is_taken() {
    let decided = |chosen: &[&str]| {
        let decisions = chosen.iter().map(|chosen| json!({"measured": "m", "chosen": chosen}));
        let mut record = precopy();
        record["decisions"] = decisions.collect();
        record
    };
    let paused = json!({
        "phase": "postcopy", "outcome": "running",
        "postcopy": {"state": "paused", "why": "the way is cut", "by_hand": false, "since": "2026-01-02T03:04:05Z",
                     "begun": "2026-01-02T03:04:05Z"},
    });
    let watches =
        [decided(&["a stream"]), decided(&["a stream", "post-copy"]), paused, moved()].into();
    let imitation = Imitation::start(Script { watches, ..Script::default() });
    let said = imitation.migrate(&[]);
    let told = text(&said.stderr);
    assert_eq!(told.matches("chosen: a stream").count(), 1, "{told}");
    assert_eq!(told.matches("chosen: post-copy").count(), 1, "{told}");
    assert!(told.contains("post-copy: paused, nothing is lost: the way is cut"), "{told}");
}

/// `migrate` at a terminal of its own, which `script` makes.
fn at_a_terminal(
    imitation: &Imitation,
) -> (Child, std::process::ChildStdin, BufReader<std::process::ChildStdout>) {
    let mut command = Command::new("script");
    command
        .args(["-q", "-e", "-c"])
        // `exec`: a shell that stayed would be interrupted too, and its end would hide the command's.
        .arg(format!("exec {WHIMBREL} migrate web01 host-b"))
        .arg("/dev/null");
    command
        .env("SHELL", "/bin/sh")
        .env("WHIMBREL_CLIENT", imitation.client())
        .env("TERM", "xterm")
        .env_remove("WHIMBREL_LOG");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    (child, stdin, BufReader::new(stdout))
}

/// Reads on until a word has come; the terminal draws over its lines.
fn read_until(stdout: &mut impl std::io::Read, word: &str) {
    let mut seen = Vec::new();
    let mut byte = [0];
    while !seen.ends_with(word.as_bytes()) {
        assert_eq!(stdout.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
}

#[test]
fn at_a_terminal_it_is_asked_once_whether_to_cancel() {
    // What is typed (3 is Ctrl-C), how many cancels come of it, and the exit code.
    for (typed, cancels, exit) in
        [(&b"y\n"[..], 1, 130), (b"\x03", 1, 130), (b"d\n", 0, 130), (b"n\n", 0, 0)]
    {
        let script = Script {
            watches: [precopy()].into(),
            on_cancel: Some(Ok(cancelled())),
            ..Script::default()
        };
        let imitation = Imitation::start(script);
        let (mut child, mut stdin, mut stdout) = at_a_terminal(&imitation);
        read_until(&mut stdout, "precopy");
        stdin.write_all(b"\x03").unwrap();
        read_until(&mut stdout, "Ctrl-C again cancels");
        assert_eq!(imitation.script(|script| script.cancels), 0, "asked before anything is done");
        stdin.write_all(typed).unwrap();
        if exit == 0 {
            imitation.script(|script| script.watches = [moved()].into());
        }
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(exit), "{typed:?}: {rest}");
        assert_eq!(imitation.script(|script| script.cancels), cancels, "{typed:?}: {rest}");
    }
}
