//! Disks between the two sides of a migration: what the destination is to make, and where the source is to send it.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use whimbrel_migration::names::Name;

use crate::disks::DiskMove;

/// The disks that a destination receives.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReceiveDisks {
    /// The disks, with the images to make: of exactly that size, and new. The definition that comes with the request names
    /// them already.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub moves: Vec<DiskMove>,
    /// The address to listen at for them and to offer, an IP address or a host name of this host; that of memory without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
}

/// Where a destination takes disks in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskOffer {
    /// Where the destination's QEMU listens for them (NBD, by TLS, for this source's name alone).
    pub address: SocketAddr,
    /// One for each disk.
    pub exports: Vec<DiskExport>,
}

/// A disk that can be written to from outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskExport {
    /// Its name in the VM.
    pub disk: Name,
    /// The export's name.
    pub export: String,
    /// What it holds, in bytes; the source sends to no other size than its own.
    pub size_bytes: u64,
    /// How much of the disk is to be sent.
    pub sends: Sends,
}

/// How much of a disk is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sends {
    /// All that is allocated, of whatever layer.
    Everything,
    /// What its own image holds: the destination has the layers beneath.
    OwnLayer,
}

impl DiskMove {
    /// How much of it is sent.
    #[must_use]
    pub fn sends(&self) -> Sends {
        if self.layers.is_empty() { Sends::Everything } else { Sends::OwnLayer }
    }
}
