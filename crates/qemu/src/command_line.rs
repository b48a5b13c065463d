//! A VM's shape as the arguments of QEMU.
//!
//! Both ends of a migration call this with the same shape, `incoming` apart, so that devices,
//! their addresses and the names of memory blocks are the same on both; nothing is left to the
//! defaults of a QEMU version. Text from outside goes into JSON values or is checked, so that a
//! `,` or `=` in a path can not add an option. Nothing here touches a file.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use uuid::Uuid;

use crate::engine::Accelerator;

/// The id of the guest's memory, which is the name of its block in the migration stream.
const MEMORY_ID: &str = "ram0";

const BYTES_PER_MEBIBYTE: u64 = 1024 * 1024;

/// The address of the random number device.
const RNG_SLOT: u8 = 0x02;

/// The address of the first NIC; further ones follow.
const NIC_FIRST_SLOT: u8 = 0x03;

/// The NICs that a VM may have.
pub const NICS_MAX: usize = 8;

const BYTES_PER_KIBIBYTE: u64 = 1 << 10;

/// What makes a memory block's size no multiple of 64 pages: QEMU rounds sizes up to this.
const TCG_EXTRA_BYTES: u64 = 8 << 10;

/// The first QEMU whose TCG is known (tried: 10.0.2) to see every write of a guest that is being copied.
const TCG_MARKS_ALL_SINCE_MAJOR: u32 = 10;

/// The address of the first disk; further ones follow.
const DISK_FIRST_SLOT: u8 = 0x0b;

/// The disks that a VM may have.
pub const DISKS_MAX: usize = 16;

/// The longest serial number of a virtio disk that a guest sees, in bytes.
pub const DISK_SERIAL_BYTES_MAX: usize = 20;

/// The longest name of a disk, in bytes: QEMU (7.2, 10.0) refuses nodes with more than 31, and some of ours end in
/// five more (`-file`, `-copy`, a number).
pub const DISK_NAME_BYTES_MAX: usize = 26;

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
    /// Its node name and id, `[a-z0-9-]`, unique within the VM, at most [`DISK_NAME_BYTES_MAX`].
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
    /// The images that it stands on, the nearest first; QEMU only reads them.
    pub layers: Vec<LayerSpec>,
}

/// An image beneath a disk's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSpec {
    /// The image.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
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
    check(spec)?;
    let mut arguments = Arguments::default();
    machine(&mut arguments, spec)?;
    boot(&mut arguments, &spec.boot)?;
    for (index, disk) in spec.disks.iter().enumerate() {
        add_disk(&mut arguments, spec, index, disk)?;
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        add_nic(&mut arguments, spec, index, nic);
    }
    let rng = json!({ "qom-type": "rng-random", "id": "rng0", "filename": "/dev/urandom" });
    arguments.pair("-object", rng.to_string());
    let device = json!({
        "driver": "virtio-rng-pci", "id": "rng-device", "rng": "rng0",
        "bus": pci_bus(spec), "addr": address(RNG_SLOT, 0),
    });
    arguments.pair("-device", device.to_string());
    sockets(&mut arguments, spec)?;
    if spec.incoming {
        arguments.pair("-incoming", "defer");
    }
    Ok(arguments.list)
}

/// What QEMU may not do once it runs: it starts no program, gains no right, frees no limit.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

#[derive(Default)]
struct Arguments {
    list: Vec<OsString>,
}

impl Arguments {
    fn flag(&mut self, flag: &str) {
        self.list.push(flag.into());
    }

    fn pair(&mut self, option: &str, value: impl Into<OsString>) {
        self.list.push(option.into());
        self.list.push(value.into());
    }
}

/// The machine itself: what it is made of, and how QEMU behaves around it.
fn machine(arguments: &mut Arguments, spec: &VmSpec) -> Result<(), SpecError> {
    arguments.pair("-name", format!("guest={}", escaped(&spec.name)));
    arguments.pair("-uuid", spec.uuid.to_string());
    for flag in ["-nodefaults", "-no-user-config", "-S", "-no-shutdown"] {
        arguments.flag(flag);
    }
    arguments.pair("-display", "none");
    arguments.pair("-msg", "timestamp=on");
    arguments.pair("-sandbox", SANDBOX);

    let mut machine =
        format!("{},memory-backend={MEMORY_ID},dump-guest-core=off", spec.machine_type);
    if let Boot::Ovmf { .. } = spec.boot {
        machine.push_str(",pflash0=firmware-code,pflash1=firmware-variables");
    }
    arguments.pair("-machine", machine);
    let accelerator = match spec.accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg,thread=multi",
    };
    arguments.pair("-accel", accelerator);
    let mut cpu = spec.cpu.model.clone();
    for (feature, on) in &spec.cpu.features {
        cpu.push_str(&format!(",{feature}={}", if *on { "on" } else { "off" }));
    }
    arguments.pair("-cpu", cpu);
    arguments.pair("-smp", format!("cpus={0},sockets=1,cores={0},threads=1", spec.vcpus));
    let size = block_bytes(spec);
    arguments.pair("-m", format!("size={}K", size / BYTES_PER_KIBIBYTE));
    let memory = json!({ "qom-type": "memory-backend-ram", "id": MEMORY_ID, "size": size });
    arguments.pair("-object", memory.to_string());
    arguments.pair("-rtc", "base=utc");
    Ok(())
}

/// The size of the guest's memory block: what was asked for, and under TCG a little more, lest writes are lost.
///
/// On QEMU 7.2 the guest of a TCG source writes unseen while it is copied. Collecting the dirty pages of a block whose
/// size is a multiple of 64 pages goes a fast way, which clears the marks and forgets to tell the translator's TLB, so that
/// the next write to such a page leaves no mark. Seen on 7.2.22: the guest crashed at the destination after every copy of
/// 7 s or more (6 of 6), with a block of any other size never (0 of 4); 10.0.2 is free of it.
///
/// The slow way costs: while the copy begins, a guest of 1 GiB is silent for 0.3 to 0.7 s (on 10.0.2 for 50 ms), in which
/// QEMU holds its lock and walks the TLB once for every page (`tlb_reset_dirty`, by perf). Better late than corrupt, and
/// under TCG alone.
///
/// Both ends must have blocks of one size, so the machine type decides, which both know, and not the QEMU at hand: an older
/// one may yet run on such a QEMU.
fn block_bytes(spec: &VmSpec) -> u64 {
    let version = spec.machine_type.rsplit('-').next().and_then(|version| version.split_once('.'));
    let major = version.and_then(|(major, _)| major.parse::<u32>().ok());
    let marks_all = major.is_some_and(|major| major >= TCG_MARKS_ALL_SINCE_MAJOR);
    let extra = match spec.accelerator {
        Accelerator::Tcg if !marks_all => TCG_EXTRA_BYTES,
        Accelerator::Tcg | Accelerator::Kvm => 0,
    };
    spec.memory_bytes + extra
}

fn boot(arguments: &mut Arguments, boot: &Boot) -> Result<(), SpecError> {
    match boot {
        Boot::SeaBios => arguments.pair("-boot", "strict=on"),
        Boot::Kernel { kernel, initrd, command_line } => {
            arguments.pair("-kernel", kernel);
            if let Some(initrd) = initrd {
                arguments.pair("-initrd", initrd);
            }
            arguments.pair("-append", command_line);
        }
        Boot::Ovmf { code, variables } => {
            arguments.pair("-boot", "strict=on");
            let code = file_node("firmware-code", code, true)?;
            let variables = file_node("firmware-variables", variables, false)?;
            arguments.pair("-blockdev", code.to_string());
            arguments.pair("-blockdev", variables.to_string());
        }
    }
    Ok(())
}

/// A raw image on a file, for flash.
fn file_node(node: &str, path: &Path, read_only: bool) -> Result<Value, SpecError> {
    Ok(json!({
        "driver": "raw", "node-name": node, "read-only": read_only,
        "file": { "driver": "file", "filename": utf8(path)?, "read-only": read_only },
    }))
}

fn add_disk(
    arguments: &mut Arguments,
    spec: &VmSpec,
    index: usize,
    disk: &DiskSpec,
) -> Result<(), SpecError> {
    let node = image_node(disk)?;
    arguments.pair("-blockdev", node.to_string());
    let mut device = json!({
        "driver": "virtio-blk-pci", "id": format!("{}-device", disk.node), "drive": disk.node,
        "bus": pci_bus(spec), "addr": address(DISK_FIRST_SLOT, index), "write-cache": "on",
    });
    // A kernel given to QEMU takes boot index 0 for itself, and QEMU refuses a second one (7.2, 10.0).
    if !matches!(spec.boot, Boot::Kernel { .. }) {
        device["bootindex"] = json!(index);
    }
    if let Some(serial) = &disk.serial {
        device["serial"] = json!(serial);
    }
    arguments.pair("-device", device.to_string());
    Ok(())
}

/// A disk's image as a node, with all below it. Also how one is opened by a running QEMU.
pub(crate) fn image_node(disk: &DiskSpec) -> Result<Value, SpecError> {
    let cache = cache_of(disk.cache);
    let mut node = json!({
        "driver": disk.format.as_wire(), "node-name": disk.node,
        "read-only": disk.read_only, "cache": cache, "discard": "unmap",
        "file": {
            "driver": "file", "node-name": format!("{}-file", disk.node),
            "filename": utf8(&disk.path)?, "aio": "threads",
            "read-only": disk.read_only, "cache": cache, "discard": "unmap",
        },
    });
    if disk.format == DiskFormat::Qcow2 {
        node["backing"] = layers(disk)?;
    }
    Ok(node)
}

/// What a qcow2 image stands on, each layer in the one above. It is always said, `null` being nothing: without it QEMU opens what
/// the image's header names (7.2, 10.0), which may be any file.
fn layers(disk: &DiskSpec) -> Result<Value, SpecError> {
    let mut below = Value::Null;
    for (index, layer) in disk.layers.iter().enumerate().rev() {
        // Names of nodes have at most 31 bytes (7.2, 10.0); those of the files are QEMU's to make.
        let name = format!("{}-{}", disk.node, index + 1);
        let cache = cache_of(layer.cache);
        let mut node = json!({
            "driver": layer.format.as_wire(), "node-name": name, "read-only": true, "cache": cache,
            "file": {
                "driver": "file", "filename": utf8(&layer.path)?, "aio": "threads",
                "read-only": true, "cache": cache,
            },
        });
        if layer.format == DiskFormat::Qcow2 {
            node["backing"] = below;
        }
        below = node;
    }
    Ok(below)
}

fn cache_of(cache: Cache) -> Value {
    json!({ "direct": cache == Cache::None, "no-flush": false })
}

fn add_nic(arguments: &mut Arguments, spec: &VmSpec, index: usize, nic: &NicSpec) {
    // The descriptor's number is text here: it may also name one handed over by `getfd`.
    let back_end = json!({
        "type": "tap", "id": format!("{}-tap", nic.id), "fd": nic.tap_descriptor.to_string(),
    });
    arguments.pair("-netdev", back_end.to_string());
    // Without a boot ROM: its size differs between QEMU versions, and a guest with another size
    // of it can not be loaded.
    let device = json!({
        "driver": "virtio-net-pci", "id": nic.id, "netdev": format!("{}-tap", nic.id),
        "mac": nic.mac, "romfile": "",
        "bus": pci_bus(spec), "addr": address(NIC_FIRST_SLOT, index),
    });
    arguments.pair("-device", device.to_string());
}

/// The console and the monitor. Character devices have no JSON form in 7.2 and 10.0: a comma in
/// a path is doubled, which is how their options take it.
fn sockets(arguments: &mut Arguments, spec: &VmSpec) -> Result<(), SpecError> {
    let console = escaped(utf8(&spec.console.socket)?);
    let log = escaped(utf8(&spec.console.log)?);
    arguments.pair(
        "-chardev",
        format!("socket,id=console,path={console},server=on,wait=off,logfile={log},logappend=on"),
    );
    let serial = json!({ "driver": "isa-serial", "id": "serial0", "chardev": "console" });
    arguments.pair("-device", serial.to_string());
    let monitor = escaped(utf8(&spec.qmp_socket)?);
    arguments.pair("-chardev", format!("socket,id=qmp,path={monitor},server=on,wait=off"));
    arguments.pair("-mon", "chardev=qmp,mode=control");
    Ok(())
}

/// The name of the root bus, which differs between the two families of machine types.
fn pci_bus(spec: &VmSpec) -> &'static str {
    if spec.machine_type.contains("q35") { "pcie.0" } else { "pci.0" }
}

fn address(first: u8, index: usize) -> String {
    format!("0x{:02x}", usize::from(first) + index)
}

/// A value as comma-separated options take it.
fn escaped(text: &str) -> String {
    text.replace(',', ",,")
}

fn utf8(path: &Path) -> Result<&str, SpecError> {
    path.to_str().ok_or_else(|| SpecError::PathNotUtf8 { path: path.to_owned() })
}

fn check(spec: &VmSpec) -> Result<(), SpecError> {
    word("machine type", &spec.machine_type)?;
    word("CPU model", &spec.cpu.model)?;
    for feature in spec.cpu.features.keys() {
        word("CPU feature", feature)?;
    }
    let mib = spec.memory_bytes / BYTES_PER_MEBIBYTE;
    let whole = spec.memory_bytes.is_multiple_of(BYTES_PER_MEBIBYTE) && mib > 0;
    bounds("memory in bytes", spec.memory_bytes, whole, "a multiple of 1 MiB above 0")?;
    bounds("vCPUs", u64::from(spec.vcpus), spec.vcpus > 0, "1 or more")?;
    let count = |length: usize| u64::try_from(length).unwrap_or(u64::MAX);
    bounds("disks", count(spec.disks.len()), spec.disks.len() <= DISKS_MAX, "0 to 16")?;
    bounds("NICs", count(spec.nics.len()), spec.nics.len() <= NICS_MAX, "0 to 8")?;

    let mut ids = BTreeSet::new();
    let disks = spec.disks.iter().map(|disk| ("disk", &disk.node));
    for (what, id) in disks.chain(spec.nics.iter().map(|nic| ("NIC", &nic.id))) {
        word(what, id)?;
        if !ids.insert(id) {
            return Err(SpecError::SameId { id: id.clone() });
        }
    }
    for node in spec.disks.iter().map(|disk| &disk.node) {
        let fits = node.len() <= DISK_NAME_BYTES_MAX;
        bounds("bytes of a disk's name", count(node.len()), fits, "1 to 26")?;
    }
    for serial in spec.disks.iter().filter_map(|disk| disk.serial.as_ref()) {
        let fits = serial.len() <= DISK_SERIAL_BYTES_MAX;
        bounds("bytes of a disk's serial number", count(serial.len()), fits, "0 to 20")?;
    }
    Ok(())
}

fn word(what: &'static str, word: &str) -> Result<(), SpecError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if word.is_empty() || !word.chars().all(allowed) {
        return Err(SpecError::Word { what, word: word.to_owned() });
    }
    Ok(())
}

fn bounds(
    what: &'static str,
    found: u64,
    within: bool,
    allowed: &'static str,
) -> Result<(), SpecError> {
    if within { Ok(()) } else { Err(SpecError::Bounds { what, found, allowed }) }
}

#[cfg(test)]
mod tests;
