//! Processes started, watched, found again and ended: tried on real ones.

use std::io::Write;

use rustix::process::{getpgid, getpid};

use super::*;

fn launch(dir: &Path, script: &str) -> Launch {
    Launch {
        binary: "/bin/sh".into(),
        arguments: vec!["-c".into(), script.into()],
        user: None,
        inherited: Vec::new(),
        log: dir.join("log"),
    }
}

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Bounds every wait, so that a broken test ends.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("took too long")
}

#[test]
fn start_time_is_found_behind_any_name() {
    let rest = (3..=52).map(|field| field.to_string()).collect::<Vec<_>>().join(" ");
    assert_eq!(start_time_ticks(&format!("1 (sh) {rest}")), Some(22));
    assert_eq!(start_time_ticks(&format!("1 (a) b (c 7) {rest}")), Some(22));
    assert_eq!(start_time_ticks("1 (sh) S 2"), None);
    assert_eq!(start_time_ticks(""), None);
}

#[tokio::test]
async fn exit_status_and_last_words_are_kept() {
    let dir = dir();
    let process = Process::spawn(launch(dir.path(), "echo one; echo two >&2; exit 7")).unwrap();
    assert_eq!(soon(process.wait_exit()).await, Exit::Code(7));
    assert_eq!(process.exited(), Some(Exit::Code(7)));
    assert_eq!(process.last_words(), ["one", "two"]);
    // Reaped: nothing has its id any more, or something else has.
    assert!(ProcessIdentity::of(process.identity().pid).ok() != Some(process.identity().clone()));
}

#[tokio::test]
async fn a_dropped_process_lives_on_and_is_found_again() {
    let dir = dir();
    let process = Process::spawn(launch(dir.path(), "exec sleep 60")).unwrap();
    let identity = process.identity().clone();
    let group = getpgid(Pid::from_raw(i32::try_from(identity.pid).unwrap())).unwrap();
    assert_ne!(group, getpgid(Some(getpid())).unwrap());
    drop(process);

    let found = Process::adopt(&identity, &dir.path().join("log")).unwrap();
    assert_eq!(found.exited(), None);
    let end = soon(found.kill_and_wait(Duration::from_secs(10))).await.unwrap();
    assert!(matches!(end, Exit::Signal(9) | Exit::Unseen), "{end:?}");
    soon(async {
        // The first watcher, whose handle is gone, reaps.
        while Process::adopt(&identity, &dir.path().join("log")).is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    found.kill().expect("a signal to what is gone is no error");
}

#[tokio::test]
async fn the_end_of_a_process_that_is_no_child_is_seen() {
    let dir = dir();
    // The shell ends at once, so its child is nobody's here.
    let shell = Process::spawn(launch(dir.path(), "sleep 60 & echo $!")).unwrap();
    assert_eq!(soon(shell.wait_exit()).await, Exit::Code(0));
    let pid: u32 = shell.last_words()[0].parse().unwrap();
    let identity = ProcessIdentity::of(pid).unwrap();
    let orphan = Process::adopt(&identity, &dir.path().join("log")).unwrap();
    assert_eq!(orphan.exited(), None);
    orphan.terminate().unwrap();
    assert_eq!(soon(orphan.wait_exit()).await, Exit::Unseen);
}

#[tokio::test]
async fn another_process_under_the_same_id_is_not_adopted() {
    let dir = dir();
    let process = Process::spawn(launch(dir.path(), "exec sleep 60")).unwrap();
    let log = dir.path().join("log");
    let right = process.identity().clone();
    let later = ProcessIdentity { start_time_ticks: right.start_time_ticks + 1, ..right.clone() };
    let other_boot = ProcessIdentity { boot_id: "another".to_owned(), ..right.clone() };
    for wrong in [later, other_boot] {
        let error = Process::adopt(&wrong, &log).unwrap_err();
        assert!(matches!(error, AdoptError::Gone { .. }), "{error:?}");
    }
    soon(process.kill_and_wait(Duration::from_secs(10))).await.unwrap();
    let error = Process::adopt(&right, &log).unwrap_err();
    assert!(matches!(error, AdoptError::Gone { .. }), "{error:?}");
}

#[tokio::test]
async fn descriptors_arrive_under_their_numbers_and_the_environment_is_bare() {
    let dir = dir();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"through the descriptor\n").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut launch = launch(dir.path(), "cat <&9; env");
    launch.inherited.push(Inherited { descriptor: file.into(), number: 9 });
    let process = Process::spawn(launch).unwrap();
    assert_eq!(soon(process.wait_exit()).await, Exit::Code(0));
    let words = process.last_words();
    assert_eq!(words[0], "through the descriptor");
    assert!(words.iter().any(|word| word.starts_with("PATH=")), "{words:?}");
    assert!(!words.iter().any(|word| word.starts_with("CARGO")), "{words:?}");
}

#[tokio::test]
async fn what_can_not_start_is_an_error() {
    let dir = dir();
    let missing = Launch { binary: "/nonexistent".into(), ..launch(dir.path(), "") };
    assert!(matches!(Process::spawn(missing).unwrap_err(), SpawnError::Run { .. }));
    let no_log = Launch { log: dir.path().join("no/log"), ..launch(dir.path(), "") };
    assert!(matches!(Process::spawn(no_log).unwrap_err(), SpawnError::Log { .. }));
}

#[tokio::test]
async fn only_the_end_of_a_long_log_is_kept() {
    let dir = dir();
    let process = Process::spawn(launch(dir.path(), "seq 1 50000")).unwrap();
    soon(process.wait_exit()).await;
    let words = process.last_words();
    assert_eq!(
        (words.len(), words[LOG_TAIL_LINES_MAX - 1].as_str()),
        (LOG_TAIL_LINES_MAX, "50000")
    );
}
