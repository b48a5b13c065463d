//! A VM's shape as the arguments of QEMU.
//!
//! Both ends of a migration call this with the same shape, `incoming` apart, so that devices,
//! their addresses and the names of memory blocks are the same on both; nothing is left to the
//! defaults of a QEMU version. Text from outside goes into JSON values or is checked, so that a
//! `,` or `=` in a path can not add an option. Nothing here touches a file.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::engine::Accelerator;

/// The id of the guest's memory, which is the name of its block in the migration stream.
const MEMORY_ID: &str = "ram0";

/// The address of the random number device.
const RNG_SLOT: u8 = 0x02;

/// The address of the first NIC; further ones follow.
const NIC_FIRST_SLOT: u8 = 0x03;

/// The NICs that a VM may have.
pub const NICS_MAX: usize = 8;

/// The address of the first disk; further ones follow.
const DISK_FIRST_SLOT: u8 = 0x0b;

/// The disks that a VM may have.
pub const DISKS_MAX: usize = 16;

/// The longest serial number of a virtio disk that a guest sees, in bytes.
pub const DISK_SERIAL_BYTES_MAX: usize = 20;

/// The shape of one VM, as one QEMU is to run it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSpec {
    /// Name, for people; shown in the process list.
    pub name: String,
    /// The guest's uuid (SMBIOS); compared by the two ends of a migration.
    pub uuid: Uuid,
    /// Versioned machine type, e.g. `pc-q35-7.2`: an alias would differ between versions.
    pub machine_type: String,
    /// How the vCPUs are run.
    pub accelerator: Accelerator,
    /// The processor that the guest sees.
    pub cpu: CpuSpec,
    /// vCPUs, 1 or more.
    pub vcpus: u16,
    /// The guest's memory, in bytes; a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// What the guest starts from.
    pub boot: Boot,
    /// Disks, in the order of booting.
    pub disks: Vec<DiskSpec>,
    /// Network cards.
    pub nics: Vec<NicSpec>,
    /// The serial console.
    pub console: ConsoleSpec,
    /// Where QEMU listens for QMP (QEMU makes it; its folder must be writable for QEMU's user).
    pub qmp_socket: PathBuf,
    /// Wait for a migration (`-incoming defer`) instead of being a fresh guest.
    pub incoming: bool,
}

/// The processor that a guest sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuSpec {
    /// Model, e.g. `Nehalem`.
    pub model: String,
    /// Features switched on or off against the model.
    pub features: BTreeMap<String, bool>,
}

/// What a guest starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Boot {
    /// A kernel, loaded by QEMU.
    Kernel {
        /// The kernel.
        kernel: PathBuf,
        /// Its initial file system.
        initrd: Option<PathBuf>,
        /// Its command line.
        command_line: String,
    },
    /// The first bootable disk, by QEMU's BIOS.
    SeaBios,
    /// The first bootable disk, by UEFI.
    Ovmf {
        /// The firmware, read-only, raw.
        code: PathBuf,
        /// The VM's own variables, raw; part of its state.
        variables: PathBuf,
    },
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// Its node name and id, `[a-z0-9-]`, unique within the VM.
    pub node: String,
    /// The image.
    pub path: PathBuf,
    /// Its format: always told, never probed, because a guest can write any header into raw.
    pub format: DiskFormat,
    /// Whether the guest can not write.
    pub read_only: bool,
    /// The serial number that the guest sees, at most [`DISK_SERIAL_BYTES_MAX`].
    pub serial: Option<String>,
    /// How the host caches it.
    pub cache: Cache,
}

/// An image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// QEMU's own.
    Qcow2,
    /// The bare bytes.
    Raw,
}

impl DiskFormat {
    /// QEMU's word.
    #[must_use]
    pub fn as_wire(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// How the host caches a disk. A guest's flush is a flush to the medium in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Not at all (`O_DIRECT`): for disks on shared storage, and where the file system can.
    None,
    /// In the host's page cache.
    WriteBack,
}

/// One network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicSpec {
    /// Its id, `[a-z0-9-]`, unique within the VM.
    pub id: String,
    /// Its address, `52:54:00:…`.
    pub mac: String,
    /// The descriptor of its tap, as numbered in QEMU.
    pub tap_descriptor: i32,
}

/// The serial console: a socket for whoever looks, and a file that keeps everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleSpec {
    /// Where QEMU listens.
    pub socket: PathBuf,
    /// Where QEMU appends all output.
    pub log: PathBuf,
}

/// Why a shape can not be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A word that goes into a comma-separated option.
    #[error("{what} {word:?} is not made of letters, digits, '.', '_' and '-'")]
    Word {
        /// What it is.
        what: &'static str,
        /// The word.
        word: String,
    },
    /// A number outside of its bounds.
    #[error("{what} is {found}, allowed is {allowed}")]
    Bounds {
        /// What is counted.
        what: &'static str,
        /// How much of it.
        found: u64,
        /// The bounds.
        allowed: &'static str,
    },
    /// Two devices with one id.
    #[error("two devices have the id {id:?}")]
    SameId {
        /// The id.
        id: String,
    },
    /// QEMU's options are text.
    #[error("the path {} is not UTF-8", path.display())]
    PathNotUtf8 {
        /// The path.
        path: PathBuf,
    },
}

/// The arguments of QEMU for a VM, without the program itself.
///
/// QEMU is always started stopped (`-S`): a fresh guest runs with the first
/// [`cont`](crate::machine::Machine::cont), a migrated one when it has been handed over.
///
/// # Errors
///
/// [`SpecError`] for a shape that can not be expressed.
pub fn arguments(spec: &VmSpec) -> Result<Vec<OsString>, SpecError> {
    let _ = (spec, MEMORY_ID, RNG_SLOT, NIC_FIRST_SLOT, DISK_FIRST_SLOT);
    let _: Value = json!(null);
    unimplemented!()
}
