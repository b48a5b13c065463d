//! `whimbrel vm create`: a VM from a file, or from flags that say the same.

use std::path::PathBuf;

use clap::Args;
use whimbrel_api::vm::{
    Boot, Bytes, CreateVm, DiskSpec, Firmware, ImageFormat, NicSpec, StoragePath, VmSpec,
};
use whimbrel_api::{ErrorCode, Name, VmId};

use crate::connect::read_bounded;
use crate::failure::{Failure, OwnCode};
use crate::values::{self, BadValue, Pairs};

const DISK_KEYS: &str = "storage, size, format, import, import-format, read-only";
const NIC_KEYS: &str = "network, mac";

/// Make a VM, stopped, from a file or from flags
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  whimbrel vm create -f web01.toml
  whimbrel vm create web01 --memory 1GiB --disk storage=shared,size=8GiB --nic network=lan
  whimbrel vm create web02 --memory 2GiB --vcpus 2 --firmware ovmf --nic network=lan \\
      --disk storage=shared,import=shared/debian-12.qcow2,import-format=qcow2,size=20GiB
  whimbrel vm create test --memory 512MiB --kernel shared/vmlinuz --initrd shared/initrd \\
      --cmdline console=ttyS0

A file has the same fields:
  name = \"web01\"
  memory = \"1GiB\"
  vcpus = 2                         # 1 without it
  boot = { firmware = \"ovmf\" }      # or { kernel = { kernel = \"shared/vmlinuz\", cmdline = \"…\" } }

  [[disk]]
  storage = \"shared\"
  size = \"8GiB\"
  format = \"qcow2\"                  # or raw; qcow2 without it

  [[nic]]
  network = \"lan\"")]
pub(crate) struct Create {
    /// The VM's name, where no file says it
    #[arg(value_parser = values::name, required_unless_present = "file", conflicts_with = "file")]
    name: Option<Name>,
    /// A TOML file that says it all
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The host to make it on; without it the one with most free memory that has what it needs
    #[arg(long, value_parser = values::name)]
    host: Option<Name>,
    #[command(flatten)]
    shape: Shape,
}

#[derive(Debug, Args)]
#[group(id = "shape", multiple = true, conflicts_with = "file")]
struct Shape {
    /// Guest memory, such as 512MiB or 1GiB
    #[arg(long, value_name = "SIZE", value_parser = values::size, required_unless_present = "file")]
    memory: Option<Bytes>,
    /// Virtual processors
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// QEMU's name of a CPU model; without it one that the pool's hosts have in common
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    /// A versioned machine type, such as pc-q35-7.2; without it the host's newest
    #[arg(long, value_name = "TYPE")]
    machine: Option<String>,
    /// A disk: storage=NAME,size=SIZE; also format=qcow2|raw, read-only, and to begin with a copy of
    /// an image import=STORAGE/PATH,import-format=qcow2|raw
    #[arg(long, value_name = "DISK", value_parser = disk)]
    disk: Vec<DiskSpec>,
    /// A network card: network=NAME[,mac=ADDRESS]
    #[arg(long, value_name = "NIC", value_parser = nic)]
    nic: Vec<NicSpec>,
    /// Boot from the first disk by this firmware: seabios or ovmf
    #[arg(long, value_parser = firmware, conflicts_with = "kernel")]
    firmware: Option<Firmware>,
    /// Boot this kernel, given as STORAGE/PATH
    #[arg(long, value_parser = values::storage_path)]
    kernel: Option<StoragePath>,
    /// The kernel's initial RAM file system, given as STORAGE/PATH
    #[arg(long, value_parser = values::storage_path, requires = "kernel")]
    initrd: Option<StoragePath>,
    /// The kernel's command line
    #[arg(
        long,
        value_name = "TEXT",
        requires = "kernel",
        default_value = "",
        hide_default_value = true
    )]
    cmdline: String,
}

impl Create {
    /// The request, with a new id. The file is checked here; the controller checks the rest.
    pub(super) fn request(self) -> Result<CreateVm, Failure> {
        let spec = match (self.file, self.name, self.shape.memory) {
            (Some(file), _, _) => from_file(&file)?,
            (None, Some(name), Some(memory)) => self.shape.spec(name, memory),
            _ => {
                return Err(Failure::own(
                    OwnCode::Usage,
                    "a VM needs a file, or a name and --memory",
                ));
            }
        };
        Ok(CreateVm { id: VmId::new(), host: self.host, spec })
    }
}

impl Shape {
    fn spec(self, name: Name, memory: Bytes) -> VmSpec {
        let boot = match self.kernel {
            Some(kernel) => Boot::Kernel { kernel, initrd: self.initrd, cmdline: self.cmdline },
            None => Boot::Firmware(self.firmware.unwrap_or_default()),
        };
        VmSpec {
            name,
            vcpus: self.vcpus,
            memory,
            cpu: self.cpu,
            machine: self.machine,
            boot,
            disks: self.disk,
            nics: self.nic,
        }
    }
}

fn from_file(path: &std::path::Path) -> Result<VmSpec, Failure> {
    let text = read_bounded(path)?;
    toml::from_str(&text).map_err(|error| {
        Failure::usage(ErrorCode::BadRequest, format!("{} defines no VM: {error}", path.display()))
    })
}

fn firmware(text: &str) -> Result<Firmware, BadValue> {
    match text {
        "seabios" => Ok(Firmware::Seabios),
        "ovmf" => Ok(Firmware::Ovmf),
        _ => Err(BadValue::bad("a firmware is seabios or ovmf")),
    }
}

fn format(text: &str) -> Result<ImageFormat, BadValue> {
    match text {
        "qcow2" => Ok(ImageFormat::Qcow2),
        "raw" => Ok(ImageFormat::Raw),
        _ => Err(BadValue::bad("a format is qcow2 or raw")),
    }
}

fn disk(text: &str) -> Result<DiskSpec, BadValue> {
    let mut pairs = Pairs::parse(text)?;
    let disk = DiskSpec {
        storage: pairs.need("storage", values::name)?,
        format: pairs.take("format", format)?.unwrap_or_default(),
        size: pairs.take("size", values::size)?,
        import: pairs.take("import", values::storage_path)?,
        import_format: pairs.take("import-format", format)?,
        read_only: pairs.take("read-only", str::parse::<bool>)?.unwrap_or(false),
    };
    pairs.end(DISK_KEYS)?;
    match (disk.size, &disk.import, disk.import_format) {
        (None, None, _) => {
            Err(BadValue::bad("a disk needs `size=`, or `import=` and `import-format=`"))
        }
        // Probing an image's format would let a guest choose it.
        (_, Some(_), None) => Err(BadValue::bad("`import-format=` is missing: qcow2 or raw")),
        (_, None, Some(_)) => Err(BadValue::bad("`import-format=` without `import=`")),
        _ => Ok(disk),
    }
}

fn nic(text: &str) -> Result<NicSpec, BadValue> {
    let mut pairs = Pairs::parse(text)?;
    let nic = NicSpec {
        network: pairs.need("network", values::name)?,
        mac: pairs.take("mac", |mac| Ok::<_, BadValue>(mac.to_owned()))?,
    };
    pairs.end(NIC_KEYS)?;
    Ok(nic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_and_nics_are_read() {
        let found = disk("storage=shared,size=1GiB,format=raw,read-only").unwrap();
        assert_eq!(
            (found.size, found.format, found.read_only),
            (Some(Bytes(1 << 30)), ImageFormat::Raw, true)
        );
        let found = disk("storage=s,import=s/a/b.qcow2,import-format=qcow2").unwrap();
        assert_eq!(found.import.unwrap().to_string(), "s/a/b.qcow2");
        assert_eq!(nic("network=lan,mac=52:54:00:00:00:01").unwrap().network.as_str(), "lan");
        for bad in [
            "",
            "size=1GiB",
            "storage=shared",
            "storage=shared,size=big",
            "storage=../x,size=1GiB",
            "storage=s,import=s/../x,import-format=raw",
            "storage=s,import=s/x",
            "storage=s,size=1GiB,colour=red",
            "storage=s,size=1GiB,import-format=raw",
        ] {
            assert!(disk(bad).is_err(), "{bad}");
        }
        assert!(nic("mac=1").is_err());
    }

    #[test]
    fn the_file_of_the_help_is_one() {
        let help = <crate::command::CommandLine as clap::CommandFactory>::command()
            .find_subcommand("vm")
            .unwrap()
            .find_subcommand("create")
            .unwrap()
            .get_after_help()
            .unwrap()
            .to_string();
        let (_, file) = help.split_once("same fields:\n").unwrap();
        let spec: VmSpec = toml::from_str(file).unwrap();
        assert_eq!((spec.vcpus, spec.disks.len(), spec.nics.len()), (2, 1, 1));
        assert_eq!(spec.boot, Boot::Firmware(Firmware::Ovmf));
    }
}
