//! A virtual machine: what a user asks for ([`VmSpec`]), what it became ([`VmDefinition`]) and how it is ([`Vm`]).
//!
//! The **definition** is written by the owning host's agent and by nobody else; the controller keeps a copy by
//! generation number. Everything that QEMU could choose differently on another host (machine version, MAC addresses,
//! PCI places) is pinned in the definition when the VM is created, so that both ends of a migration build the same machine.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};
pub use whimbrel_migration::disks::ImageFormat;
use whimbrel_migration::names::{Epoch, MigrationId, Name, VmId};

use crate::lineage::{Layer, Origin, Snapshot};

/// Bounds of a VM, checked before anything is touched.
pub mod limits {
    /// Fewest bytes of guest memory: firmware needs about this much.
    pub const MEMORY_MIN_BYTES: u64 = 16 << 20;
    /// Most bytes of guest memory (4 TiB: QEMU's q35 with 46 physical address bits holds more, our tests do not).
    pub const MEMORY_MAX_BYTES: u64 = 4 << 40;
    /// Most vCPUs (QEMU's q35 limit without an IOMMU for x2APIC is 255).
    pub const VCPUS_MAX: u32 = 255;
    /// Most disks: one PCI function each, in the slots that the command line gives to disks.
    pub const DISKS_MAX: usize = 64;
    /// Most NICs.
    pub const NICS_MAX: usize = 16;
    /// Smallest new disk in bytes: one qcow2 cluster.
    pub const DISK_MIN_BYTES: u64 = 64 << 10;
    /// Largest disk in bytes (16 TiB: the largest that common file systems hold as one file).
    pub const DISK_MAX_BYTES: u64 = 16 << 40;
    /// Longest kernel command line in bytes (Linux' COMMAND_LINE_SIZE on x86).
    pub const CMDLINE_MAX_BYTES: usize = 2048;
    /// Longest path in a storage, in bytes.
    pub const PATH_MAX_BYTES: usize = 512;
}

/// A number of bytes: in JSON and TOML an integer, or a string such as `"1GiB"` or `"512 MB"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = u64, example = 1073741824)]
pub struct Bytes(pub u64);

/// Why a text is no [`Bytes`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSize {
    /// It is none.
    #[error("`{0}` is not a size; write for instance 512MiB, 1GiB or a number of bytes")]
    NoSize(String),
    /// More bytes than there are numbers for.
    #[error("`{0}` is out of range: a size is at most {max} bytes", max = u64::MAX)]
    TooLarge(String),
}

impl FromStr for Bytes {
    type Err = BadSize;

    fn from_str(text: &str) -> Result<Self, BadSize> {
        let shown = || text.escape_debug().to_string();
        let text = text.trim();
        match text.parse::<bytesize::ByteSize>() {
            // It stops at the largest number instead of saying that it does.
            Ok(bytesize::ByteSize(u64::MAX)) if text.parse::<u64>().is_err() => {
                Err(BadSize::TooLarge(shown()))
            }
            Ok(size) => Ok(Bytes(size.as_u64())),
            // Digits alone are a number, only not one of ours.
            Err(_) if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) => {
                Err(BadSize::TooLarge(shown()))
            }
            Err(_) => Err(BadSize::NoSize(shown())),
        }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", bytesize::ByteSize(self.0).display().iec())
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, or a size such as \"1GiB\"")
            }
            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Bytes, E> {
                Ok(Bytes(value))
            }
            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Bytes, E> {
                u64::try_from(value).map(Bytes).map_err(|_| E::custom("a size cannot be negative"))
            }
            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Bytes, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A file in a storage, written `STORAGE/path/in/it`.
///
/// The path is relative, has no `..`, no empty part and no leading dash; the agent opens it beneath the storage without
/// following symlinks, so that this check is for clear words and the opening is for safety.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StoragePath {
    /// The storage.
    pub storage: Name,
    /// The path beneath the storage's folder.
    pub path: String,
}

impl StoragePath {
    /// The file `path` in `storage`, if the path is of the allowed form.
    pub fn new(storage: Name, path: &str) -> Result<Self, String> {
        let shown = path.escape_debug();
        if path.len() > limits::PATH_MAX_BYTES {
            return Err(format!(
                "a path in a storage has at most {} bytes",
                limits::PATH_MAX_BYTES
            ));
        }
        if path.chars().any(|c| c.is_control()) {
            return Err(format!("`{shown}` has a control character in it"));
        }
        let part_ok =
            |part: &str| !part.is_empty() && part != "." && part != ".." && !part.starts_with('-');
        if !path.split('/').all(part_ok) {
            return Err(format!(
                "`{shown}` is not a path inside a storage: no `..`, no empty part, no leading `/` or `-`"
            ));
        }
        Ok(Self { storage, path: path.to_owned() })
    }
}

impl PartialSchema for StoragePath {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("A file in a storage, written `STORAGE/path/in/it`."))
            .examples(["shared/boot/vmlinuz"])
            .into()
    }
}

impl ToSchema for StoragePath {}

impl FromStr for StoragePath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (storage, path) = text
            .split_once('/')
            .ok_or_else(|| format!("`{}` is not STORAGE/PATH", text.escape_debug()))?;
        let storage = storage.parse::<Name>().map_err(|error| error.to_string())?;
        Self::new(storage, path)
    }
}

impl fmt::Display for StoragePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.storage, self.path)
    }
}

impl Serialize for StoragePath {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for StoragePath {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// How a VM comes up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Boot {
    /// A kernel straight from a storage.
    Kernel {
        /// The kernel image.
        kernel: StoragePath,
        /// The initial RAM file system.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        initrd: Option<StoragePath>,
        /// The kernel's command line.
        #[serde(default)]
        cmdline: String,
    },
    /// From the first disk, by a firmware.
    Firmware(Firmware),
}

/// The firmware that boots from disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, Default)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// SeaBIOS, which comes with QEMU.
    #[default]
    Seabios,
    /// OVMF (UEFI), where the host has it installed.
    Ovmf,
}

impl Default for Boot {
    fn default() -> Self {
        Boot::Firmware(Firmware::default())
    }
}

/// What a user asks for: `vm create -f vm.toml`, or flags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Its name, unique in the pool.
    pub name: Name,
    /// vCPUs; 1 to [`limits::VCPUS_MAX`].
    #[serde(default = "one")]
    pub vcpus: u32,
    /// Guest memory.
    pub memory: Bytes,
    /// QEMU's name of a CPU model; without one, the model that the pool's hosts have in common (`qemu64` under TCG is QEMU's
    /// `max`-free baseline). `host` is allowed, and limits where the VM can go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// A versioned machine type, such as `pc-q35-7.2`; without one, the newest that the creating host offers is pinned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// How it comes up; without it, SeaBIOS from the first disk.
    #[serde(default)]
    pub boot: Boot,
    /// Its disks, in order.
    #[serde(default, rename = "disk", skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSpec>,
    /// Its network cards, in order.
    #[serde(default, rename = "nic", skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicSpec>,
}

fn one() -> u32 {
    1
}

/// A disk that a user asks for: new (`size`), or imported from an image on the creating host (`import`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Where it lives.
    pub storage: Name,
    /// Its format there.
    #[serde(default)]
    pub format: ImageFormat,
    /// Size of a new disk, or the size to grow an imported one to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Bytes>,
    /// An image in a storage, copied into the new disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import: Option<StoragePath>,
    /// The format of the image to import; it must be said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import_format: Option<ImageFormat>,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
}

/// A network card that a user asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// The network that it is in.
    pub network: Name,
    /// Its address; without one, a locally administered one is drawn (`52:54:00:…`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// A VM with everything pinned: what an agent needs to build the same machine anywhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDefinition {
    /// Its id, for ever.
    pub id: VmId,
    /// Rises with every change by the owning agent.
    pub generation: u64,
    /// Its name.
    pub name: Name,
    /// vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes; a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// QEMU's CPU model.
    pub cpu: String,
    /// The versioned machine type. Empty only between the controller's asking and the creating agent's answer, which pins it.
    pub machine: String,
    /// How it comes up.
    pub boot: Boot,
    /// Its disks, in order.
    pub disks: Vec<Disk>,
    /// Its network cards, in order.
    pub nics: Vec<Nic>,
    /// The state from which it goes on, if it was saved. A VM that has one is stopped, and is not started anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved: Option<SavedState>,
    /// What it was cloned from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// Whether it is a template: never started, never changed, only cloned.
    #[serde(default, skip_serializing_if = "is_false")]
    pub template: bool,
    /// Its snapshots, in the order in which they were taken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<Snapshot>,
    /// The snapshot that its disks go on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Name>,
}

fn is_false(flag: &bool) -> bool {
    !*flag
}

/// A VM's whole state in a file, its memory included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SavedState {
    /// The file.
    pub file: StoragePath,
    /// Whether each page has a place of its own in it. A QEMU that does not know that layout (before 9.0) cannot restore it.
    #[serde(default)]
    pub mapped: bool,
}

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// The name in the VM: `vda`, `vdb`, …
    pub name: Name,
    /// The image.
    pub file: StoragePath,
    /// The image's format.
    pub format: ImageFormat,
    /// What the guest sees, in bytes.
    pub size_bytes: u64,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// What it is made from, if it is not new: copied once, at creation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import: Option<Import>,
    /// The images beneath its own, which are only read, the nearest first; see [`crate::lineage`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<Layer>,
}

/// The image that a disk is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Import {
    /// The image.
    pub file: StoragePath,
    /// Its format.
    pub format: ImageFormat,
}

/// A network card of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// The network.
    pub network: Name,
    /// The address, lower case, six pairs.
    pub mac: String,
}

/// How a VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum VmState {
    /// Defined, no QEMU.
    Stopped,
    /// Its vCPUs run.
    Running,
    /// Paused by its user; it stays paused wherever it goes.
    Paused,
    /// QEMU ended without being asked, or the guest panicked.
    Crashed {
        /// What is known of the cause.
        why: String,
    },
    /// On its way to another host; it runs here until the handoff.
    Migrating {
        /// The migration.
        migration: MigrationId,
    },
    /// Given to another host, which has not confirmed: paused here until it answers, or an operator decides.
    Unresolved {
        /// The migration.
        migration: MigrationId,
        /// The host to ask.
        ask: Name,
    },
    /// The host does not answer: not known.
    Unknown {
        /// Why.
        why: String,
    },
}

impl VmState {
    /// The state's word, as in JSON.
    pub fn word(&self) -> &'static str {
        match self {
            VmState::Stopped => "stopped",
            VmState::Running => "running",
            VmState::Paused => "paused",
            VmState::Crashed { .. } => "crashed",
            VmState::Migrating { .. } => "migrating",
            VmState::Unresolved { .. } => "unresolved",
            VmState::Unknown { .. } => "unknown",
        }
    }
}

/// What the public API says of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: Name,
    /// The host that owns it.
    pub host: Name,
    /// How it is.
    #[serde(flatten)]
    pub state: VmState,
    /// The ownership epoch: rises by one with every change of owner.
    pub epoch: Epoch,
    /// What runs it, while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<RunningEngine>,
    /// The definition.
    pub definition: VmDefinition,
}

/// What a VM runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunningEngine {
    /// QEMU's version.
    pub version: String,
    /// Whether the processor runs the guest (`kvm`) or QEMU translates it (`tcg`).
    pub accelerator: String,
    /// QEMU's process id on its host.
    pub pid: u32,
}

/// What can be done with a VM besides migrating it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmAction {
    /// Start it.
    Start,
    /// Ask the guest to power off (ACPI), or with `force` end QEMU.
    Stop,
    /// Stop its vCPUs.
    Pause,
    /// Let its vCPUs run again.
    Resume,
}

impl VmAction {
    /// The last part of the call's path.
    pub fn as_str(self) -> &'static str {
        match self {
            VmAction::Start => "start",
            VmAction::Stop => "stop",
            VmAction::Pause => "pause",
            VmAction::Resume => "resume",
        }
    }
}

/// Where a VM's whole state is saved to, or restored from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StateFile {
    /// The file. Saving makes it, and never overwrites one.
    pub file: StoragePath,
}

/// How to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, Default)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// End QEMU without asking the guest: like pulling the plug.
    #[serde(default)]
    pub force: bool,
}

/// The request that creates a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// The id, chosen by the client, so that a retry is the same request.
    pub id: VmId,
    /// Where; without it, the enabled host with most free memory that has the VM's networks and storages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Name>,
    /// What.
    pub spec: VmSpec,
}
