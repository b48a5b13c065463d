//! Snapshots inside the images, with the guest's memory.
//!
//! Seen on 7.2.22 and 10.0.2:
//!
//! - Every disk that the guest can write must be qcow2 and be named; otherwise refused, without a change.
//! - The guest stands still while its memory is written, and goes on by itself if it ran.
//! - A name that is taken is refused.
//! - A load that fails leaves the guest stopped, in `restore-vm`, with what it had: `cont` lets it go on. One
//!   that succeeds lets the guest run if it ran when it was told.
//! - Deleting one that is not there succeeds.

use std::time::Duration;

use serde_json::{Value, json};

use super::{jobs, nodes};
use crate::disks::jobs::JobError;
use crate::machine::Machine;
use crate::qmp::QmpError;

/// The job's id: there can be one at a time.
const JOB_ID: &str = "snapshot";

/// One snapshot, as one image has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The image's node.
    pub node: String,
    /// Its name.
    pub name: String,
    /// When it was made, in seconds since the Unix epoch.
    pub made_unix_seconds: u64,
    /// The memory kept in this image, in bytes; 0 in all but one.
    pub memory_bytes: u64,
}

/// Keeps the state of the guest: its disks, and its memory in the first of them. Bounded by `within`.
///
/// # Errors
///
/// [`JobError`]; after `Failed` there is no such snapshot.
pub async fn save(
    machine: &Machine,
    name: &str,
    nodes: &[String],
    within: Duration,
) -> Result<(), JobError> {
    let arguments = with_memory(name, nodes);
    machine.order("snapshot-save", arguments).await.map_err(begin)?;
    jobs::finish(machine, JOB_ID, within).await
}

/// Goes back to a state. Bounded by `within`.
///
/// # Errors
///
/// [`JobError`]; after `Failed` the guest is stopped and must be told to go on.
pub async fn load(
    machine: &Machine,
    name: &str,
    nodes: &[String],
    within: Duration,
) -> Result<(), JobError> {
    let arguments = with_memory(name, nodes);
    machine.order("snapshot-load", arguments).await.map_err(begin)?;
    jobs::finish(machine, JOB_ID, within).await
}

/// Removes a snapshot from all these images. Bounded by `within`.
///
/// # Errors
///
/// [`JobError`].
pub async fn delete(
    machine: &Machine,
    name: &str,
    nodes: &[String],
    within: Duration,
) -> Result<(), JobError> {
    let arguments = json!({ "job-id": JOB_ID, "tag": name, "devices": nodes });
    machine.order("snapshot-delete", arguments).await.map_err(begin)?;
    jobs::finish(machine, JOB_ID, within).await
}

/// The snapshots in all images that are open.
///
/// # Errors
///
/// [`QmpError`].
pub async fn list(machine: &Machine) -> Result<Vec<Snapshot>, QmpError> {
    let answer = nodes::described(machine).await?;
    let mut found = Vec::new();
    for node in answer.as_array().into_iter().flatten() {
        let name = node.get("node-name").and_then(Value::as_str).unwrap_or_default();
        let listed = node.pointer("/image/snapshots").and_then(Value::as_array);
        found.extend(listed.into_iter().flatten().map(|entry| snapshot(name, entry)));
    }
    Ok(found)
}

fn with_memory(name: &str, nodes: &[String]) -> Value {
    json!({ "job-id": JOB_ID, "tag": name, "vmstate": nodes.first(), "devices": nodes })
}

fn begin(source: QmpError) -> JobError {
    JobError::Begin { id: JOB_ID.to_owned(), source }
}

fn snapshot(node: &str, entry: &Value) -> Snapshot {
    let number = |key: &str| entry.get(key).and_then(Value::as_u64).unwrap_or(0);
    Snapshot {
        node: node.to_owned(),
        name: entry.get("name").and_then(Value::as_str).unwrap_or_default().to_owned(),
        made_unix_seconds: number("date-sec"),
        memory_bytes: number("vm-state-size"),
    }
}
