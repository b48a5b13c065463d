//! How a VM is to be moved, as its user asks for it: every option, its default and its bounds.
//!
//! Everything has a default: with no option at all the way is chosen by [`crate::strategy`] from
//! measurements, within the [`crate::policy`] that applies. What is said here pins a piece of that
//! choice. Names follow virsh where it has the option; units stand in the names.
//!
//! [`MigrateOptions::validate`] looks at the options alone. Whether they fit together and to the two
//! engines is preflight's matter ([`crate::preflight::combinations`]).

mod disks;
mod validate;

pub use disks::{DiskOptions, DiskTarget, Originals, OtherDisks};
pub use validate::{OptionProblem, ProblemCode};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::names::Name;

/// Bounds of the options.
pub mod limits {
    /// Shortest pause that may be asked for, in milliseconds.
    pub const MAX_DOWNTIME_MIN_MS: u64 = 1;
    /// QEMU's own upper bound of `downtime-limit`, in milliseconds.
    pub const MAX_DOWNTIME_MAX_MS: u64 = 2_000_000;
    /// Least bandwidth that may be asked for, in bytes a second; below it no guest ever arrives.
    pub const BANDWIDTH_MIN_BYTES_PER_S: u64 = 64 << 10;
    /// Most bandwidth that may be asked for, in bytes a second (QEMU takes a signed 64-bit number).
    pub const BANDWIDTH_MAX_BYTES_PER_S: u64 = 1 << 50;
    /// Fewest parallel connections.
    pub const CONNECTIONS_MIN: u64 = 1;
    /// Most parallel connections: QEMU counts `multifd-channels` in eight bits.
    pub const CONNECTIONS_MAX: u64 = 255;
    /// Parallel connections where the user wants them and says no number; QEMU's default. One for
    /// each 10 Gbit/s of the link is good advice.
    pub const CONNECTIONS_DEFAULT: u64 = 2;
    /// Lightest throttle, in percent (QEMU's bound, 7.2 and 10.0).
    pub const THROTTLE_MIN_PERCENT: u64 = 1;
    /// Hardest throttle, in percent (QEMU's bound, 7.2 and 10.0).
    pub const THROTTLE_MAX_PERCENT: u64 = 99;
    /// QEMU's default for the first throttle, in percent.
    pub const THROTTLE_INITIAL_DEFAULT_PERCENT: u64 = 20;
    /// QEMU's default for each further step of the throttle, in percent.
    pub const THROTTLE_INCREMENT_DEFAULT_PERCENT: u64 = 10;
    /// Highest level of zlib; 0 does not compress.
    pub const ZLIB_LEVEL_MAX: u64 = 9;
    /// Highest level of zstd that QEMU takes; 0 is zstd's own default.
    pub const ZSTD_LEVEL_MAX: u64 = 20;
    /// Smallest cache of xbzrle, in bytes. QEMU takes a page; less than this never helps.
    pub const XBZRLE_CACHE_MIN_BYTES: u64 = 1 << 20;
    /// Largest cache of xbzrle, in bytes. It is memory of the source host.
    pub const XBZRLE_CACHE_MAX_BYTES: u64 = 64 << 30;
    /// QEMU's default for the cache of xbzrle, in bytes.
    pub const XBZRLE_CACHE_DEFAULT_BYTES: u64 = 64 << 20;
    /// What preparing a destination takes where nothing is wrong, in seconds, well rounded up (QEMU
    /// started and listening under TCG: below 2). A shorter timeout would stop the guest before
    /// anything was copied.
    pub const TIMEOUT_MIN_S: u64 = 3;
    /// Longest timeout, in seconds: a week.
    pub const TIMEOUT_MAX_S: u64 = 7 * 24 * 3600;
    /// Longest migration address, in bytes: that of a DNS name.
    pub const ADDRESS_MAX_BYTES: usize = 253;
    /// Most methods of compression that can be listed.
    pub const METHODS_MAX: usize = 3;
    /// Most disks that can be given a place by name: those that a VM can have.
    pub const NAMED_DISKS_MAX: u64 = 64;
    /// Shortest time for which originals are put aside, in days.
    pub const QUARANTINE_MIN_DAYS: u64 = 1;
    /// Longest time for which originals are put aside, in days; `keep` keeps them for ever.
    pub const QUARANTINE_MAX_DAYS: u64 = 3650;
    /// Days for which originals are put aside where nobody says anything.
    pub const QUARANTINE_DEFAULT_DAYS: u64 = 7;
}

/// How to migrate. Everything has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MigrateOptions {
    /// Which way the VM goes.
    #[serde(skip_serializing_if = "is_default")]
    pub mode: Mode,
    /// The VM arrives paused, also if it ran. One that was paused arrives paused in any case.
    #[serde(skip_serializing_if = "is_default")]
    pub suspend: bool,
    /// Keeps a stopped definition of the VM on the source. Without it the source forgets the VM.
    #[serde(skip_serializing_if = "is_default")]
    pub copy: bool,
    /// The destination keeps the VM's definition. Always done; `false` is refused, for there are no
    /// VMs without a definition.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persistent: Option<bool>,
    /// The source forgets the VM's definition. Done unless `copy` is asked for; `false` means `copy`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undefine_source: Option<bool>,
    /// The VM's name on the destination; the same without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dname: Option<Name>,
    /// Connections that carry memory side by side (multifd), 1 to 255; chosen from measurements without
    /// it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parallel_connections: Option<u64>,
    /// Slows the guest down if it writes faster than can be sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_converge: Option<AutoConverge>,
    /// Allows post-copy: the guest runs on the destination before all its memory is there. If either
    /// QEMU ends while it lasts, or the network never comes back, the guest's memory is lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postcopy: Option<Postcopy>,
    /// What to do when the copy takes too long; nothing without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Timeout>,
    /// Compresses memory; chosen from measurements without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// Sends memory without copying it in the kernel. Needs parallel connections, and neither TLS nor
    /// compression.
    #[serde(skip_serializing_if = "is_default")]
    pub zerocopy: bool,
    /// Most bytes a second for the stream; unlimited without it (QEMU's own default of 128 MiB/s is slow).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_s: Option<u64>,
    /// How long the guest may pause for the last pass, in milliseconds; the policy's limit without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_downtime_ms: Option<u64>,
    /// Bytes a second that are there for the last pass, if more or less than for those before; QEMU
    /// measures without it. Needs QEMU 8.2 or newer on the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_switchover_bandwidth_bytes_per_s: Option<u64>,
    /// Encrypts and authenticates the stream. On unless said otherwise.
    #[serde(skip_serializing_if = "is_true")]
    pub tls: bool,
    /// The address of the destination to which memory goes, an IP address or a host name; the one in
    /// the host's settings without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migrate_address: Option<String>,
    /// Gives up at an I/O error of a disk on the way, instead of going on with the guest's own policy.
    #[serde(skip_serializing_if = "is_default")]
    pub abort_on_error: bool,
    /// The policy; that of the VM, of the pool, or `balanced` without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<Name>,
    /// Which disks are copied, and where to; none without it.
    #[serde(skip_serializing_if = "is_default")]
    pub disks: DiskOptions,
}

impl Default for MigrateOptions {
    fn default() -> Self {
        Self {
            mode: Mode::Auto,
            suspend: false,
            copy: false,
            persistent: None,
            undefine_source: None,
            dname: None,
            parallel_connections: None,
            auto_converge: None,
            postcopy: None,
            timeout: None,
            compression: None,
            zerocopy: false,
            bandwidth_bytes_per_s: None,
            max_downtime_ms: None,
            available_switchover_bandwidth_bytes_per_s: None,
            tls: true,
            migrate_address: None,
            abort_on_error: false,
            policy: None,
            disks: DiskOptions::default(),
        }
    }
}

impl MigrateOptions {
    /// Whether the source keeps a stopped definition.
    #[must_use]
    pub fn keeps_definition(&self) -> bool {
        self.copy || self.undefine_source == Some(false)
    }

    /// What becomes of the disks on the source that were copied.
    #[must_use]
    pub fn originals(&self) -> Originals {
        let default = if self.keeps_definition() { Originals::Keep } else { Originals::default() };
        self.disks.originals.unwrap_or(default)
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

// By reference, as serde asks for it.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_true(value: &bool) -> bool {
    *value
}

/// Which way a VM goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Live, by the cheapest means that the forecast says will do; see [`crate::strategy`].
    #[default]
    Auto,
    /// Live or not at all.
    Live,
    /// Only the definition and the firmware's variables: the VM is stopped, and stays so.
    Offline,
    /// The guest stands still while its state is moved.
    Static,
    /// Live if that converges, else static.
    Quick,
}

impl Mode {
    /// All modes.
    pub const ALL: [Self; 5] = [Self::Auto, Self::Live, Self::Offline, Self::Static, Self::Quick];

    /// The mode's word, as in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Live => "live",
            Self::Offline => "offline",
            Self::Static => "static",
            Self::Quick => "quick",
        }
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// Slowing the guest down (QEMU's auto-converge).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AutoConverge {
    /// The first throttle of the vCPUs, in percent, 1 to 99; QEMU's 20 without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_percent: Option<u64>,
    /// Each further step, in percent, 1 to 99; QEMU's 10 without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub increment_percent: Option<u64>,
}

/// Post-copy, which is begun when it is ordered, by a timeout, or after a first pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Postcopy {
    /// Begins after one pass over the memory.
    #[serde(skip_serializing_if = "is_default")]
    pub after_precopy: bool,
    /// Most bytes a second for pages that nobody waits for; unlimited without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_s: Option<u64>,
}

/// What to do when the copy takes too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Timeout {
    /// After so many seconds, counted from the request: at least 3, which the preparation may take.
    pub seconds: u64,
    /// What then.
    #[serde(default)]
    pub then: TimeoutAction,
}

/// What a timeout does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TimeoutAction {
    /// The guest stands still until the rest is sent.
    #[default]
    Suspend,
    /// Post-copy begins; it has to be allowed.
    Postcopy,
}

/// Compression of memory on its way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Compression {
    /// The methods, of which the one that measures best is taken; any without it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 3)]
    pub methods: Vec<CompressionMethod>,
    /// Level of zlib, 0 to 9; QEMU's 1 without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zlib_level: Option<u64>,
    /// Level of zstd, 0 to 20; QEMU's 1 without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zstd_level: Option<u64>,
    /// Cache of xbzrle in bytes, a power of two from 1 MiB to 64 GiB; QEMU's 64 MiB without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xbzrle_cache_bytes: Option<u64>,
}

/// A method of compression.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum CompressionMethod {
    /// zlib, on parallel connections.
    Zlib,
    /// zstd, on parallel connections.
    Zstd,
    /// Sends of a page only what has changed since it was last sent; on a single connection.
    Xbzrle,
}

impl CompressionMethod {
    /// All methods.
    pub const ALL: [Self; 3] = [Self::Zlib, Self::Zstd, Self::Xbzrle];

    /// The method's word, as in JSON and in QEMU's `multifd-compression`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
            Self::Xbzrle => "xbzrle",
        }
    }

    /// Whether it works on parallel connections, and only there.
    #[must_use]
    pub const fn is_parallel(self) -> bool {
        !matches!(self, Self::Xbzrle)
    }
}

impl std::fmt::Display for CompressionMethod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests;
