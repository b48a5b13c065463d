//! Checks a VM's definition before anything is touched. The controller has checked the request; what comes over the wire
//! is checked again by whoever acts on it.

use std::collections::HashSet;

use whimbrel_api::lineage::LAYERS_MAX;
use whimbrel_api::vm::{Boot, VmDefinition, limits};
use whimbrel_api::{ApiError, ErrorCode};
use whimbrel_qemu::command_line;

use crate::storage::image::SECTOR_BYTES;

/// Memory comes in steps of this many bytes (large pages of x86).
const MEMORY_STEP_BYTES: u64 = 2 << 20;
/// Longest name of a machine type or CPU model, in bytes.
const WORD_BYTES_MAX: usize = 64;

/// Checks a definition with everything pinned.
///
/// # Errors
/// `out-of-range`, `bad-request` or `bad-name` for the first thing that is wrong; the sentence names it.
pub(crate) fn definition(vm: &VmDefinition) -> Result<(), ApiError> {
    within("vcpus", u64::from(vm.vcpus), 1, u64::from(limits::VCPUS_MAX))?;
    within("memory_bytes", vm.memory_bytes, limits::MEMORY_MIN_BYTES, limits::MEMORY_MAX_BYTES)?;
    if !vm.memory_bytes.is_multiple_of(MEMORY_STEP_BYTES) {
        return Err(out_of_range("`memory_bytes` must be a multiple of 2 MiB"));
    }
    word("cpu", &vm.cpu)?;
    word("machine", &vm.machine)?;
    disks(vm)?;
    nics(vm)?;
    match &vm.boot {
        Boot::Kernel { cmdline, .. } => kernel_command_line(cmdline),
        Boot::Firmware(_) if vm.disks.is_empty() => {
            Err(ApiError::new(ErrorCode::BadRequest, "a VM that boots by firmware needs a disk"))
        }
        Boot::Firmware(_) => Ok(()),
    }
}

fn disks(vm: &VmDefinition) -> Result<(), ApiError> {
    let most = limits::DISKS_MAX.min(command_line::DISKS_MAX);
    within("number of disks", vm.disks.len() as u64, 0, most as u64)?;
    let (mut names, mut files) = (HashSet::new(), HashSet::new());
    for disk in &vm.disks {
        let what = format!("disk `{}`: bytes of its name", disk.name);
        within(
            &what,
            disk.name.as_str().len() as u64,
            1,
            command_line::DISK_NAME_BYTES_MAX as u64,
        )?;
        let what = format!("disk `{}`: size_bytes", disk.name);
        // An imported disk is as large as its image unless it says otherwise.
        if !(disk.import.is_some() && disk.size_bytes == 0) {
            within(&what, disk.size_bytes, limits::DISK_MIN_BYTES, limits::DISK_MAX_BYTES)?;
        }
        if !disk.size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(out_of_range(&format!("{what} must be a multiple of {SECTOR_BYTES}")));
        }
        let what = format!("disk `{}`: number of layers", disk.name);
        within(&what, disk.layers.len() as u64, 0, LAYERS_MAX as u64)?;
        if !names.insert(&disk.name) || !files.insert(&disk.file) {
            let message = format!("two disks have the name or the file of disk `{}`", disk.name);
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        }
    }
    Ok(())
}

fn nics(vm: &VmDefinition) -> Result<(), ApiError> {
    let most = limits::NICS_MAX.min(command_line::NICS_MAX);
    within("number of network cards", vm.nics.len() as u64, 0, most as u64)?;
    let mut addresses = HashSet::new();
    for nic in &vm.nics {
        if !is_unicast_mac(&nic.mac) {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                format!(
                    "`{}` is no address for a network card: six pairs of hexadecimal digits, lower case, the first one even",
                    nic.mac.chars().take(32).collect::<String>().escape_debug()
                ),
            ));
        }
        if !addresses.insert(&nic.mac) {
            let message = format!("two network cards have the address {}", nic.mac);
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        }
    }
    Ok(())
}

/// Six pairs, lower case; not a group address (the lowest bit of the first byte), not all zero.
fn is_unicast_mac(mac: &str) -> bool {
    let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    let pairs: Vec<&str> = mac.split(':').collect();
    let formed =
        pairs.len() == 6 && pairs.iter().all(|pair| pair.len() == 2 && pair.bytes().all(digit));
    let first = pairs.first().and_then(|pair| u8::from_str_radix(pair, 16).ok());
    formed && first.is_some_and(|byte| byte & 1 == 0) && mac != "00:00:00:00:00:00"
}

fn kernel_command_line(text: &str) -> Result<(), ApiError> {
    if text.len() > limits::CMDLINE_MAX_BYTES {
        return Err(out_of_range(&format!(
            "the kernel's command line has {} bytes, at most {} are allowed",
            text.len(),
            limits::CMDLINE_MAX_BYTES
        )));
    }
    if text.chars().any(char::is_control) {
        return Err(ApiError::new(
            ErrorCode::BadRequest,
            "the kernel's command line has a control character in it",
        ));
    }
    Ok(())
}

fn word(field: &str, text: &str) -> Result<(), ApiError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let good = (1..=WORD_BYTES_MAX).contains(&text.len())
        && text.chars().all(plain)
        && !text.starts_with(['-', '.']);
    if good {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::BadName,
        format!(
            "`{field}` is 1 to {WORD_BYTES_MAX} letters, digits, '.', '_' and '-', not beginning with '-' or '.'"
        ),
    ))
}

fn within(what: &str, found: u64, least: u64, most: u64) -> Result<(), ApiError> {
    if (least..=most).contains(&found) {
        return Ok(());
    }
    Err(out_of_range(&format!("{what} is {found}; allowed is {least} to {most}")))
}

fn out_of_range(message: &str) -> ApiError {
    ApiError::new(ErrorCode::OutOfRange, message)
}

#[cfg(test)]
mod tests {
    use whimbrel_api::VmId;
    use whimbrel_api::vm::{Disk, ImageFormat, Nic, StoragePath};

    use super::*;

    fn good() -> VmDefinition {
        let disk = Disk {
            name: "vda".parse().unwrap(),
            file: StoragePath::new("s".parse().unwrap(), "vms/x/vda.qcow2").unwrap(),
            format: ImageFormat::Qcow2,
            size_bytes: 1 << 30,
            read_only: false,
            import: None,
            layers: Vec::new(),
        };
        VmDefinition {
            id: VmId::new(),
            generation: 1,
            name: "web01".parse().unwrap(),
            vcpus: 2,
            memory_bytes: 1 << 30,
            cpu: "qemu64".to_owned(),
            machine: "pc-q35-7.2".to_owned(),
            boot: Boot::default(),
            disks: vec![disk],
            nics: vec![Nic { network: "n".parse().unwrap(), mac: "52:54:00:00:00:01".to_owned() }],
            saved: None,
            origin: None,
            template: false,
            snapshots: Vec::new(),
            snapshot: None,
        }
    }

    #[test]
    fn a_good_one_passes() {
        definition(&good()).unwrap();
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        type Spoil = fn(&mut VmDefinition);
        let spoils: [(ErrorCode, Spoil); 20] = [
            (ErrorCode::OutOfRange, |vm| vm.vcpus = 0),
            (ErrorCode::OutOfRange, |vm| vm.vcpus = 256),
            (ErrorCode::OutOfRange, |vm| vm.memory_bytes = 0),
            (ErrorCode::OutOfRange, |vm| vm.memory_bytes += 1),
            (ErrorCode::OutOfRange, |vm| vm.memory_bytes = u64::MAX),
            (ErrorCode::BadName, |vm| vm.cpu = String::new()),
            (ErrorCode::BadName, |vm| vm.cpu = "max,vendor=x".to_owned()),
            (ErrorCode::BadName, |vm| vm.machine = "pc-q35-7.2,accel=kvm".to_owned()),
            (ErrorCode::BadName, |vm| vm.machine = "x".repeat(65)),
            (ErrorCode::OutOfRange, |vm| vm.disks[0].size_bytes = 0),
            (ErrorCode::OutOfRange, |vm| vm.disks[0].name = "d".repeat(27).parse().unwrap()),
            (ErrorCode::OutOfRange, |vm| vm.disks[0].size_bytes += 1),
            (ErrorCode::OutOfRange, |vm| vm.disks[0].size_bytes = 1 << 60),
            (ErrorCode::BadRequest, |vm| vm.disks.push(vm.disks[0].clone())),
            (ErrorCode::BadRequest, |vm| vm.disks.clear()),
            (ErrorCode::BadRequest, |vm| vm.nics.push(vm.nics[0].clone())),
            (ErrorCode::BadRequest, |vm| vm.nics[0].mac = "52:54:00:00:00".to_owned()),
            (ErrorCode::BadRequest, |vm| vm.nics[0].mac = "53:54:00:00:00:01".to_owned()),
            (ErrorCode::BadRequest, |vm| vm.nics[0].mac = "52:54:00:00:00:0A".to_owned()),
            (ErrorCode::OutOfRange, |vm| vm.nics = vec![vm.nics[0].clone(); 17]),
        ];
        for (index, (code, spoil)) in spoils.into_iter().enumerate() {
            let mut vm = good();
            spoil(&mut vm);
            assert_eq!(definition(&vm).unwrap_err().code, code, "spoil {index}");
        }
    }

    #[test]
    fn kernel_command_lines_are_bounded() {
        let kernel = |cmdline: String| VmDefinition {
            boot: Boot::Kernel {
                kernel: StoragePath::new("s".parse().unwrap(), "k").unwrap(),
                initrd: None,
                cmdline,
            },
            ..good()
        };
        definition(&kernel("console=ttyS0".to_owned())).unwrap();
        assert!(definition(&kernel("a\nb".to_owned())).is_err());
        assert!(definition(&kernel("a".repeat(2049))).is_err());
    }
}
