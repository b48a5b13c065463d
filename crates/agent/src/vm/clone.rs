//! Clones: a new VM whose disks are copies of another's (full), or stand on them (linked).
//!
//! What is cloned must stand still. A snapshot and a template do for good, so that cloning one asks nothing of its VM, which may
//! even run; a stopped VM does for as long as its task makes the clone. A linked clone needs what stands still for good. That the
//! other's files stay is the controller's care, who knows all clones: it deletes nothing that one stands on, or is being made from.

use std::sync::Arc;

use whimbrel_api::agent::VmReport;
use whimbrel_api::lineage::Origin;
use whimbrel_api::vm::VmDefinition;
use whimbrel_api::{ApiError, ErrorCode};

use super::create::make;
use super::lineage;
use super::order::Order;
use crate::host::Host;

/// Makes a clone, as its definition's `origin` says. Its disks' sizes and layers are those of the other.
///
/// # Errors
/// `not-found`, `wrong-state` where the other does not stand still, or as [`super::create()`].
pub(super) async fn begin(
    host: &Arc<Host>,
    origin: Origin,
    asked: VmDefinition,
) -> Result<VmReport, ApiError> {
    let parent = host.vms.report(origin.vm)?.definition;
    if let Some(name) = &origin.snapshot {
        lineage::find(&parent, name)?;
        return make(host, asked, Some(&parent)).await;
    }
    if parent.template {
        return make(host, asked, Some(&parent)).await;
    }
    if origin.linked {
        let name = &parent.name;
        let message =
            format!("VM `{name}` is no template: what a linked clone stands on must never change");
        return Err(ApiError::new(ErrorCode::WrongState, message).hint(format!(
            "`whimbrel vm template {name}`, or `whimbrel vm snapshot create {name} SNAPSHOT` and `--snapshot SNAPSHOT`"
        )));
    }
    let asked = Box::new(asked);
    host.vms.order(origin.vm, |reply| Order::Clone { asked, reply }).await?
}
