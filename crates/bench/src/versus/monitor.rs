//! The events of a QEMU, by a monitor of our own beside libvirt's: QEMU stamps each when it happens, and libvirt tells
//! them late and by another clock.

use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

/// How often a QEMU that is not there yet is looked for: a destination's.
const CONNECT_POLL: Duration = Duration::from_millis(2);
/// How often a monitor that says nothing is asked whether it is still wanted.
const READ_MAX: Duration = Duration::from_millis(50);
/// More events than a migration has: some for each pass over the memory.
const EVENTS_MAX: usize = 100_000;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// QEMU's stamp: microseconds since 1970.
    pub(crate) at_us: u64,
    pub(crate) name: String,
    /// The status that a `MIGRATION` event tells.
    pub(crate) status: String,
}

/// A line of the monitor; what is no event has no name.
#[derive(Debug, Deserialize)]
struct Line {
    event: Option<String>,
    #[serde(default)]
    timestamp: Stamp,
    #[serde(default)]
    data: Data,
}

#[derive(Debug, Default, Deserialize)]
struct Stamp {
    seconds: u64,
    microseconds: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Data {
    status: serde_json::Value,
}

/// Collects the events of the QEMU that listens at a socket, from when it is there until `done`, or its end.
pub(crate) fn watch(socket: &Path, done: &AtomicBool) -> Result<Vec<Event>> {
    let Some(mut stream) = connect(socket, done) else { return Ok(Vec::new()) };
    stream.set_read_timeout(Some(READ_MAX)).context("cannot wait for a monitor")?;
    let mut reader = BufReader::new(stream.try_clone().context("cannot read a monitor")?);
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").context("cannot use a monitor")?;
    let mut events = Vec::new();
    let mut line = Vec::new();
    loop {
        match reader.read_until(b'\n', &mut line) {
            Ok(0) => return Ok(events),
            Ok(_) => {
                events.extend(event(&line));
                ensure!(events.len() < EVENTS_MAX, "QEMU tells too many events");
                line.clear();
            }
            // What has come of a line stays in it.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if done.load(Ordering::Relaxed) {
                    return Ok(events);
                }
            }
            // A QEMU that is killed resets its connections; that it is gone is the migration's business.
            Err(_) => return Ok(events),
        }
    }
}

fn connect(socket: &Path, done: &AtomicBool) -> Option<UnixStream> {
    while !done.load(Ordering::Relaxed) {
        if let Ok(stream) = UnixStream::connect(socket) {
            return Some(stream);
        }
        thread::sleep(CONNECT_POLL);
    }
    None
}

fn event(line: &[u8]) -> Option<Event> {
    let line: Line = serde_json::from_slice(line).ok()?;
    Some(Event {
        at_us: line.timestamp.seconds * 1_000_000 + line.timestamp.microseconds,
        name: line.event?,
        status: line.data.status.as_str().unwrap_or_default().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_and_nothing_else() {
        let stop = br#"{"timestamp": {"seconds": 2, "microseconds": 5}, "event": "STOP"}"#;
        let expected = Event { at_us: 2_000_005, name: "STOP".to_owned(), status: String::new() };
        assert_eq!(event(stop), Some(expected));
        let moved = br#"{"timestamp":{"seconds":1,"microseconds":0},"event":"MIGRATION","data":{"status":"completed"}}"#;
        assert_eq!(event(moved).unwrap().status, "completed");
        let other =
            br#"{"timestamp":{"seconds":1,"microseconds":0},"event":"X","data":{"status":7}}"#;
        assert_eq!(event(other).unwrap().status, "");
        for line in [r#"{"QMP": {"version": {}}}"#, r#"{"return": {}}"#, "", "{"] {
            assert_eq!(event(line.as_bytes()), None, "{line}");
        }
    }
}
