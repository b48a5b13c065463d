//! Layers of a disk: what is put on top of an image, and how two become one again.
//!
//! Seen on 7.2.22 and 10.0.2:
//!
//! - [`put_on`] writes nothing into the image: the overlay must have been made with its backing file's
//!   name in the header, else it stands on nothing once QEMU has ended.
//! - [`pull`] of everything below takes the backing file's name out of the image.
//! - [`push`] of the topmost layer is a mirror downwards: it gets ready, and follows the guest until it is completed.

use std::time::Duration;

use serde_json::json;

use super::jobs::{self, Job, JobError, JobStatus};
use crate::machine::Machine;
use crate::qmp::QmpError;

/// A layer to be put on what a drive uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// What the drive uses now.
    pub node: String,
    /// What it is to use: an empty image of the same size, opened without a backing file
    /// ([`super::nodes::add_image`]).
    pub overlay: String,
}

/// Puts layers on several disks at one moment, all or none. From then on the guest writes to the overlays, and
/// what was there stays as it is.
///
/// # Errors
///
/// [`QmpError`]; refused where nothing was changed.
pub async fn put_on(machine: &Machine, overlays: &[Overlay]) -> Result<(), QmpError> {
    let action = |one: &Overlay| {
        let data = json!({ "node": one.node, "overlay": one.overlay });
        json!({ "type": "blockdev-snapshot", "data": data })
    };
    let actions: Vec<_> = overlays.iter().map(action).collect();
    machine.order("transaction", json!({ "actions": actions })).await
}

/// Begins to copy what lies beneath into a disk's topmost layer, until it stands on `base`, or on nothing. The job
/// is `job`; [`jobs::finish`] waits for it.
///
/// # Errors
///
/// [`JobError::Begin`].
pub async fn pull(
    machine: &Machine,
    job: &str,
    node: &str,
    base: Option<&str>,
) -> Result<(), JobError> {
    let mut arguments = json!({
        "job-id": job, "device": node, "on-error": "report",
        "auto-finalize": true, "auto-dismiss": false,
    });
    if let Some(base) = base {
        arguments["base-node"] = json!(base);
    }
    let begin = |source| JobError::Begin { id: job.to_owned(), source };
    machine.order("block-stream", arguments).await.map_err(begin)
}

/// Copies the layers from `top` down to just above `base` into `base`, and lets the drive use that. Where `top` is what
/// the drive uses, it follows the guest meanwhile. Bounded by `within`.
///
/// # Errors
///
/// [`JobError`]. After `TookTooLong` it goes on; after `Failed` the drive uses what it used.
pub async fn push(
    machine: &Machine,
    job: &str,
    (device, top, base): (&str, &str, &str),
    within: Duration,
) -> Result<(), JobError> {
    let arguments = json!({
        "job-id": job, "device": device, "top-node": top, "base-node": base, "on-error": "report",
        "auto-finalize": true, "auto-dismiss": false,
    });
    let begin = |source| JobError::Begin { id: job.to_owned(), source };
    machine.order("block-commit", arguments).await.map_err(begin)?;
    let done = |job: &Job| matches!(job.status, JobStatus::Ready | JobStatus::Concluded);
    let reached = jobs::reach(machine, job, done, within).await?;
    if reached.status == JobStatus::Ready {
        machine.order("job-complete", json!({ "id": job })).await.map_err(begin)?;
    }
    jobs::finish(machine, job, within).await
}
