//! Disks that go with a VM: where each goes, and what copying them takes. (When they count is
//! [`crate::handoff`]'s matter, what stands in the way [`crate::preflight::disks`]'s.)
//!
//! - [`placement`]: from what the user asks for to one place for each disk;
//! - [`mirror`]: time, bytes and convergence of the copies, and when memory is to begin.
//!
//! Pure, like the rest of the crate: agents measure and copy, the controller asks and records.

pub mod mirror;
pub mod placement;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How an image is laid out. Always said, never probed: probing lets a guest turn its raw disk into a qcow2 with a backing
/// file of its choice (CVE-2015-1851, CVE-2024-32498).
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// QEMU's own format; sparse, snapshots.
    #[default]
    Qcow2,
    /// The bytes as they are.
    Raw,
}

impl ImageFormat {
    /// QEMU's name of the format, which is also the file's ending.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}
