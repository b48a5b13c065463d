//! What a user can say of the disks: where they go, by which path, and what becomes of the originals.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{is_default, limits};
use crate::disks::ImageFormat;
use crate::names::Name;

/// Which disks are copied, and where to. With nothing said none is: the VM moves only if both hosts reach all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DiskOptions {
    /// Single disks, by their names in the VM such as `vda`; at most 64.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<String, DiskTarget>)]
    pub each: BTreeMap<Name, DiskTarget>,
    /// The disks that are not named.
    #[serde(skip_serializing_if = "is_default")]
    pub others: OtherDisks,
    /// The address of the destination to which the disks' data goes, an IP address or a host name; that of the memory
    /// without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// What becomes of the disks on the source once the VM runs elsewhere; `quarantine` for 7 days without it, and `keep`
    /// where the source keeps a definition of the VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub originals: Option<Originals>,
}

/// Where a disk goes that is named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum DiskTarget {
    /// It stays where it is; both hosts must reach it.
    Stay,
    /// It is copied.
    To {
        /// To this storage of the destination.
        storage: Name,
        /// Into an image of this format; of the same one without it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        format: Option<ImageFormat>,
    },
}

/// Where the disks go that are not named.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum OtherDisks {
    /// They stay where they are; both hosts must reach them.
    #[default]
    Stay,
    /// Those that the destination does not reach are copied to its default storage.
    Unreached,
    /// All of them are copied.
    To {
        /// To this storage of the destination.
        storage: Name,
    },
}

/// What becomes of the disks on the source. Before the VM runs elsewhere, and that is on record, they are touched in no case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Originals {
    /// They stay as they are, and belong to no VM.
    Keep,
    /// They are put aside in their storage, and deleted some days later.
    Quarantine {
        /// How many days, 1 to 3650.
        days: u64,
    },
    /// They are deleted.
    Delete,
}

impl Default for Originals {
    fn default() -> Self {
        Self::Quarantine { days: limits::QUARANTINE_DEFAULT_DAYS }
    }
}

impl DiskOptions {
    /// Whether any disk could be copied.
    #[must_use]
    pub fn may_copy(&self) -> bool {
        let goes = |target: &DiskTarget| matches!(target, DiskTarget::To { .. });
        self.others != OtherDisks::Stay || self.each.values().any(goes)
    }
}
