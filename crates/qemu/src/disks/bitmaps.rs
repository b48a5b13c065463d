//! Dirty bitmaps: what of a disk has been written since some moment, which incremental backups go by.
//!
//! Seen on 7.2.22 and 10.0.2: a persistent one is kept in the image when QEMU closes it, which only qcow2 can
//! (refused for raw); one that a job uses is `busy` and can not be removed. A mirror does not carry them.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::nodes;
use crate::machine::Machine;
use crate::qmp::QmpError;

/// One bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name, unique in its node.
    pub name: String,
    /// Whether it notes what is written now.
    pub recording: bool,
    /// Whether it is kept in the image.
    pub persistent: bool,
    /// Whether a job uses it.
    pub busy: bool,
    /// Whether QEMU found it unfinished, after a crash: then it says nothing.
    pub inconsistent: bool,
    /// What one of its bits stands for, in bytes.
    pub granularity_bytes: u64,
    /// What it has noted, in bytes.
    pub dirty_bytes: u64,
}

/// The bitmaps of every node that has some.
///
/// # Errors
///
/// [`QmpError`].
pub async fn list(machine: &Machine) -> Result<BTreeMap<String, Vec<Bitmap>>, QmpError> {
    let answer = nodes::described(machine).await?;
    let of_node = |node: &Value| {
        let name = node.get("node-name").and_then(Value::as_str)?.to_owned();
        let bitmaps = node.get("dirty-bitmaps").and_then(Value::as_array)?;
        // One without a name is a job's own.
        let bitmaps: Vec<Bitmap> = bitmaps.iter().filter_map(bitmap).collect();
        (!bitmaps.is_empty()).then_some((name, bitmaps))
    };
    Ok(answer.as_array().map(|list| list.iter().filter_map(of_node).collect()).unwrap_or_default())
}

/// Begins a bitmap.
///
/// # Errors
///
/// [`QmpError`]; refused where there is one of this name, and for a persistent one in a raw image.
pub async fn add(
    machine: &Machine,
    node: &str,
    name: &str,
    persistent: bool,
) -> Result<(), QmpError> {
    let arguments = json!({ "node": node, "name": name, "persistent": persistent });
    machine.order("block-dirty-bitmap-add", arguments).await
}

/// Removes a bitmap, also from the image.
///
/// # Errors
///
/// [`QmpError`]; refused where there is none, or a job uses it.
pub async fn remove(machine: &Machine, node: &str, name: &str) -> Result<(), QmpError> {
    machine.order("block-dirty-bitmap-remove", json!({ "node": node, "name": name })).await
}

fn bitmap(entry: &Value) -> Option<Bitmap> {
    let flag = |key: &str| entry.get(key).and_then(Value::as_bool).unwrap_or(false);
    let number = |key: &str| entry.get(key).and_then(Value::as_u64).unwrap_or(0);
    let name = entry.get("name").and_then(Value::as_str).filter(|name| !name.is_empty())?;
    Some(Bitmap {
        name: name.to_owned(),
        recording: flag("recording"),
        persistent: flag("persistent"),
        busy: flag("busy"),
        inconsistent: flag("inconsistent"),
        granularity_bytes: number("granularity"),
        dirty_bytes: number("count"),
    })
}
