//! Block nodes of a running QEMU: which there are, what the drives use, images added and removed.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::command_line::{self, DiskSpec, SpecError};
use crate::machine::Machine;
use crate::qmp::QmpError;

/// The names tried for one disk before we give up.
const GENERATIONS_MAX: u32 = 9999;

/// What a drive of the guest uses now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// The disk's name, as in the VM's shape.
    pub disk: String,
    /// The topmost node below it: its image, or its newest layer. A mirror or commit under way is passed over.
    pub node: String,
    /// QEMU's word for the format, e.g. `qcow2`.
    pub driver: String,
    /// Whether the guest can not write.
    pub read_only: bool,
    /// What the guest sees, in bytes.
    pub virtual_size_bytes: u64,
    /// `nospace`, `failed` or `ok`: whether an I/O error of the guest's has stopped it.
    pub io_status: Option<String>,
}

/// Why a node is not there.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// It can not be expressed.
    #[error("the node can not be described to QEMU")]
    Spec(#[source] SpecError),
    /// QEMU did not open it.
    #[error("QEMU did not open {}", path.display())]
    Open {
        /// The image.
        path: std::path::PathBuf,
        /// The refusal.
        #[source]
        source: QmpError,
    },
}

/// The drives of the guest, in the order of its devices.
///
/// # Errors
///
/// [`QmpError`].
pub async fn drives(machine: &Machine) -> Result<Vec<Drive>, QmpError> {
    let answer = machine.qmp().execute("query-block", Value::Null).await?;
    Ok(answer.as_array().map(|list| list.iter().filter_map(drive).collect()).unwrap_or_default())
}

/// The names of all nodes.
///
/// # Errors
///
/// [`QmpError`].
pub async fn names(machine: &Machine) -> Result<BTreeSet<String>, QmpError> {
    let answer = described(machine).await?;
    let name = |node: &Value| node.get("node-name").and_then(Value::as_str).map(str::to_owned);
    Ok(answer.as_array().map(|list| list.iter().filter_map(name).collect()).unwrap_or_default())
}

/// All nodes as QEMU describes them, each without those below it.
pub(super) async fn described(machine: &Machine) -> Result<Value, QmpError> {
    machine.qmp().execute("query-named-block-nodes", json!({ "flat": true })).await
}

/// A name for a further image of a disk: `vda`, else `vda-2`, `vda-3`, …
#[must_use]
pub fn fresh_name(disk: &str, taken: &BTreeSet<String>) -> Option<String> {
    let further = (2..=GENERATIONS_MAX).map(|number| format!("{disk}-{number}"));
    std::iter::once(disk.to_owned()).chain(further).find(|name| !taken.contains(name))
}

/// Opens an image beside the guest's own, as the guest's are opened; `image.node` is its name.
///
/// It stands on its layers, or on the node `below`, which is open already. What the image's header says of a
/// backing file is never followed.
///
/// # Errors
///
/// [`NodeError`]. Refused also where another process has it open for writing.
pub async fn add_image(
    machine: &Machine,
    image: &DiskSpec,
    below: Option<&str>,
) -> Result<(), NodeError> {
    let mut node = command_line::image_node(image).map_err(NodeError::Spec)?;
    // Named by QEMU itself: the longest name of a disk leaves no room for both a number and this.
    if let Some(file) = node.get_mut("file").and_then(Value::as_object_mut) {
        file.remove("node-name");
    }
    if let Some(below) = below {
        node["backing"] = json!(below);
    }
    let open = |source| NodeError::Open { path: image.path.clone(), source };
    machine.order("blockdev-add", node).await.map_err(open)
}

/// Closes a node if it is there.
///
/// What is cached is written first: for a node on another host see [`super::target::remove`].
///
/// # Errors
///
/// [`QmpError`]; refused where it is in use.
pub async fn remove(machine: &Machine, node: &str) -> Result<(), QmpError> {
    match machine.order("blockdev-del", json!({ "node-name": node })).await {
        Err(error) if error.is_refusal() && !names(machine).await?.contains(node) => Ok(()),
        other => other,
    }
}

/// Makes a disk larger, while it is used. To make it smaller cuts off what stands there.
///
/// # Errors
///
/// [`QmpError`].
pub async fn resize(machine: &Machine, node: &str, bytes: u64) -> Result<(), QmpError> {
    machine.order("block_resize", json!({ "node-name": node, "size": bytes })).await
}

fn drive(entry: &Value) -> Option<Drive> {
    let text = |pointer: &str| entry.pointer(pointer).and_then(Value::as_str);
    // 7.2 and 10.0 tell `/machine/peripheral/vda-device/virtio-backend`.
    let device = text("/qdev")?.split('/').rev().find_map(|part| part.strip_suffix("-device"));
    let flag = |pointer: &str| entry.pointer(pointer).and_then(Value::as_bool);
    let size = entry.pointer("/inserted/image/virtual-size").and_then(Value::as_u64);
    Some(Drive {
        disk: device?.to_owned(),
        node: text("/inserted/node-name")?.to_owned(),
        driver: text("/inserted/drv").unwrap_or_default().to_owned(),
        read_only: flag("/inserted/ro").unwrap_or(false),
        virtual_size_bytes: size.unwrap_or(0),
        io_status: text("/io-status").map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_further_node_has_a_name_of_its_own() {
        let taken = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(fresh_name("vda", &taken(&[])).as_deref(), Some("vda"));
        assert_eq!(fresh_name("vda", &taken(&["vda", "vda-2"])).as_deref(), Some("vda-3"));
    }

    #[test]
    fn a_drive_is_known_by_its_device() {
        let entry = json!({ "device": "", "qdev": "/machine/peripheral/vd-a-device/virtio-backend",
            "inserted": { "node-name": "vd-a-2", "drv": "qcow2", "ro": false,
                "image": { "virtual-size": 7 } } });
        let found = drive(&entry).unwrap();
        assert_eq!((found.disk.as_str(), found.node.as_str()), ("vd-a", "vd-a-2"));
        assert_eq!((found.virtual_size_bytes, found.read_only), (7, false));
        assert_eq!(drive(&json!({ "device": "pflash0", "inserted": {} })), None);
    }
}
