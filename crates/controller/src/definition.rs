//! From what a user asks for to what an agent builds: the bounds that are checked before anything is touched, and everything
//! that is drawn or named once and for ever (MAC addresses, disk names and files).
//!
//! Pure: no host and no database is asked here. Called by [`crate::vms`].

use std::collections::BTreeSet;

use whimbrel_api::vm::{
    Boot, Bytes, Disk, DiskSpec, Import, Nic, NicSpec, StoragePath, VmDefinition, VmSpec, limits,
};
use whimbrel_api::{ApiError, ErrorCode, Name, VmId};

/// The CPU model of a VM whose user names none.
///
/// `qemu64` is the only x86-64 model that every host of a mixed pool can give a guest: it exists under the same name and with the
/// same features in QEMU 7.2 and 10.0, needs nothing of the host's processor under KVM, and holds nothing that TCG cannot
/// translate. (`max` and `host` differ from host to host and version to version, so a guest started with them may not move.)
pub(crate) const DEFAULT_CPU: &str = "qemu64";

/// Guest memory is rounded up to a multiple of this, in bytes: the size of a huge page on x86-64.
const MEMORY_STEP_BYTES: u64 = 2 << 20;
/// Longest name of a CPU model or machine type, in bytes; QEMU's own stay below 40.
const ENGINE_NAME_MAX_BYTES: usize = 64;
/// The vendor part of QEMU's MAC addresses; locally administered, so never a real card's.
const MAC_PREFIX: &str = "52:54:00";
/// How often an address is drawn before giving up: with 2^24 addresses a second draw is rare.
const MAC_DRAWS_MAX: usize = 64;

/// What a VM needs of its host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    pub(crate) networks: BTreeSet<Name>,
    pub(crate) storages: BTreeSet<Name>,
    pub(crate) cpu: String,
}

/// Checks every bound of a request.
pub(crate) fn check(spec: &VmSpec) -> Result<(), ApiError> {
    within("vcpus", u64::from(spec.vcpus), 1, u64::from(limits::VCPUS_MAX))?;
    within("memory", spec.memory.0, limits::MEMORY_MIN_BYTES, limits::MEMORY_MAX_BYTES)?;
    within("the number of disks", spec.disks.len() as u64, 0, limits::DISKS_MAX as u64)?;
    within("the number of NICs", spec.nics.len() as u64, 0, limits::NICS_MAX as u64)?;
    if let Some(cpu) = &spec.cpu {
        check_engine_name("cpu", cpu)?;
    }
    if let Some(machine) = &spec.machine {
        check_machine(machine)?;
    }
    if let Boot::Kernel { cmdline, .. } = &spec.boot {
        check_cmdline(cmdline)?;
    }
    spec.disks.iter().enumerate().try_for_each(|(index, disk)| check_disk(index, disk))?;
    let mut macs = BTreeSet::new();
    for nic in &spec.nics {
        if let Some(mac) = given_mac(nic)?
            && !macs.insert(mac.clone())
        {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                format!("two NICs have the address {mac}"),
            ));
        }
    }
    Ok(())
}

fn within(what: &str, value: u64, least: u64, most: u64) -> Result<(), ApiError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    let message = format!("{what} is {value}; it must be {least} to {most}");
    Err(ApiError::new(ErrorCode::OutOfRange, message))
}

/// A name becomes part of QEMU's command line, where a comma would begin another option.
fn check_engine_name(field: &str, name: &str) -> Result<(), ApiError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if (1..=ENGINE_NAME_MAX_BYTES).contains(&name.len()) && name.chars().all(plain) {
        return Ok(());
    }
    let message = format!(
        "`{field}` is not a name that QEMU knows: 1 to {ENGINE_NAME_MAX_BYTES} of a-z, A-Z, 0-9, '-', '_' and '.'"
    );
    Err(ApiError::new(ErrorCode::BadRequest, message))
}

/// A machine type without a version is another machine in each QEMU, and cannot move between them.
fn check_machine(machine: &str) -> Result<(), ApiError> {
    check_engine_name("machine", machine)?;
    if machine_version(machine).is_some() {
        return Ok(());
    }
    let message = format!("`machine` is `{machine}`; it must carry a version, such as pc-q35-7.2");
    Err(ApiError::new(ErrorCode::BadRequest, message))
}

/// The version at the end of a machine type: `pc-q35-7.2` is 7.2.
pub(crate) fn machine_version(machine: &str) -> Option<(u32, u32)> {
    let (_, version) = machine.rsplit_once('-')?;
    let (major, minor) = version.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn check_cmdline(cmdline: &str) -> Result<(), ApiError> {
    within("the length of `cmdline`", cmdline.len() as u64, 0, limits::CMDLINE_MAX_BYTES as u64)?;
    if cmdline.chars().any(char::is_control) {
        let message = "`cmdline` has a control character in it";
        return Err(ApiError::new(ErrorCode::BadRequest, message));
    }
    Ok(())
}

fn check_disk(index: usize, disk: &DiskSpec) -> Result<(), ApiError> {
    let name = disk_letters(index);
    let bad =
        |what: &str| Err(ApiError::new(ErrorCode::BadRequest, format!("disk {name}: {what}")));
    if let Some(Bytes(size)) = disk.size {
        let what = format!("the size of disk {name}");
        within(&what, size, limits::DISK_MIN_BYTES, limits::DISK_MAX_BYTES)?;
        if size % 512 != 0 {
            return bad("its size must be a multiple of 512 bytes, a sector");
        }
    }
    match (&disk.size, &disk.import, &disk.import_format) {
        (None, None, _) => bad("say `size` for a new disk, or `import` for one made from an image"),
        (_, Some(_), None) => bad("say `import_format`: an image's format is never guessed"),
        (_, None, Some(_)) => bad("`import_format` is for a disk with `import`"),
        (_, Some(_), Some(_)) | (Some(_), None, None) => Ok(()),
    }
}

/// The address that the user chose, lower case; refused unless it is one card's address.
fn given_mac(nic: &NicSpec) -> Result<Option<String>, ApiError> {
    let Some(given) = &nic.mac else { return Ok(None) };
    let mac = given.to_ascii_lowercase();
    let pairs: Vec<Option<u8>> = mac
        .split(':')
        .map(|pair| (pair.len() == 2).then(|| u8::from_str_radix(pair, 16).ok()).flatten())
        .collect();
    let hex = mac.chars().all(|c| c.is_ascii_hexdigit() || c == ':');
    let whole: Option<Vec<u8>> = pairs.into_iter().collect();
    match whole {
        Some(bytes) if hex && bytes.len() == 6 && bytes[0] & 1 == 0 && bytes != [0; 6] => {
            Ok(Some(mac))
        }
        _ => {
            let shown: String = given.chars().take(32).flat_map(char::escape_debug).collect();
            let message = format!(
                "`{shown}` is not the address of a network card, such as 52:54:00:12:34:56"
            );
            Err(ApiError::new(ErrorCode::BadRequest, message))
        }
    }
}

/// What the VM needs of its host.
pub(crate) fn needs(spec: &VmSpec) -> Needs {
    let mut storages: BTreeSet<Name> = BTreeSet::new();
    for disk in &spec.disks {
        storages.insert(disk.storage.clone());
        storages.extend(disk.import.as_ref().map(|file| file.storage.clone()));
    }
    if let Boot::Kernel { kernel, initrd, .. } = &spec.boot {
        storages.insert(kernel.storage.clone());
        storages.extend(initrd.as_ref().map(|file| file.storage.clone()));
    }
    Needs {
        networks: spec.nics.iter().map(|nic| nic.network.clone()).collect(),
        storages,
        cpu: cpu(spec),
    }
}

fn cpu(spec: &VmSpec) -> String {
    spec.cpu.clone().unwrap_or_else(|| DEFAULT_CPU.to_owned())
}

/// The definition of a new VM. `taken` are the addresses of the pool's other VMs.
///
/// The size of a disk that is made from an image, and is not to be grown, is 0 here: the agent that copies the image says what
/// it is.
pub(crate) fn define(
    id: VmId,
    spec: &VmSpec,
    machine: String,
    taken: &BTreeSet<String>,
) -> Result<VmDefinition, ApiError> {
    let disks = spec.disks.iter().enumerate().map(|(index, disk)| define_disk(id, index, disk));
    Ok(VmDefinition {
        id,
        generation: 1,
        name: spec.name.clone(),
        vcpus: spec.vcpus,
        memory_bytes: spec.memory.0.next_multiple_of(MEMORY_STEP_BYTES),
        cpu: cpu(spec),
        machine,
        boot: spec.boot.clone(),
        disks: disks.collect::<Result<_, _>>()?,
        nics: define_nics(spec, taken)?,
        saved: None,
        origin: None,
        template: false,
        snapshots: Vec::new(),
        snapshot: None,
    })
}

fn define_disk(id: VmId, index: usize, spec: &DiskSpec) -> Result<Disk, ApiError> {
    let impossible = |error: String| ApiError::new(ErrorCode::Internal, error);
    let letters = disk_letters(index);
    let path = format!("vms/{id}/{letters}.{}", spec.format.as_str());
    let import = match (&spec.import, spec.import_format) {
        (Some(file), Some(format)) => Some(Import { file: file.clone(), format }),
        _ => None,
    };
    Ok(Disk {
        name: letters.parse().map_err(|error| impossible(format!("a disk's name: {error}")))?,
        file: StoragePath::new(spec.storage.clone(), &path).map_err(impossible)?,
        format: spec.format,
        size_bytes: spec.size.map_or(0, |size| size.0),
        read_only: spec.read_only,
        import,
        layers: Vec::new(),
    })
}

/// `vda` to `vdz`, then `vdaa` and so on, as Linux counts its virtio disks.
fn disk_letters(index: usize) -> String {
    let letter = |number: usize| char::from(b'a' + (number % 26) as u8);
    match index.checked_sub(26) {
        None => format!("vd{}", letter(index)),
        Some(beyond) => format!("vd{}{}", letter(beyond / 26), letter(beyond)),
    }
}

fn define_nics(spec: &VmSpec, taken: &BTreeSet<String>) -> Result<Vec<Nic>, ApiError> {
    let mut taken = taken.clone();
    let mut given = Vec::new();
    for nic in &spec.nics {
        let mac = given_mac(nic)?;
        if let Some(mac) = &mac
            && !taken.insert(mac.clone())
        {
            return Err(ApiError::new(
                ErrorCode::Exists,
                format!("another VM has the address {mac}"),
            ));
        }
        given.push((nic.network.clone(), mac));
    }
    let mut nics = Vec::new();
    for (network, mac) in given {
        let mac = match mac {
            Some(mac) => mac,
            None => draw_mac(&mut taken)?,
        };
        nics.push(Nic { network, mac });
    }
    Ok(nics)
}

/// Gives cards new addresses that nobody in the pool has.
pub(crate) fn draw_macs(nics: &mut [Nic], taken: BTreeSet<String>) -> Result<(), ApiError> {
    let mut taken = taken;
    for nic in nics {
        nic.mac = draw_mac(&mut taken)?;
    }
    Ok(())
}

/// Draws an address that nobody in the pool has. The randomness is a UUID's: version 4 is nothing but random bits in its first
/// bytes.
fn draw_mac(taken: &mut BTreeSet<String>) -> Result<String, ApiError> {
    for _ in 0..MAC_DRAWS_MAX {
        let random = uuid::Uuid::new_v4();
        let [a, b, c, ..] = random.into_bytes();
        let mac = format!("{MAC_PREFIX}:{a:02x}:{b:02x}:{c:02x}");
        if taken.insert(mac.clone()) {
            return Ok(mac);
        }
    }
    Err(ApiError::new(ErrorCode::NoResources, "no free address for a NIC was found"))
}

#[cfg(test)]
mod tests;
