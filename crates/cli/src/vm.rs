//! `whimbrel vm`: virtual machines, one function a verb. Making one is in [`create`] and [`clone`], its console in [`console`],
//! measuring one in [`dirty_rate`], its snapshots in [`snapshot`].

mod clone;
mod console;
mod create;
mod dirty_rate;
mod snapshot;

use clap::Subcommand;
use whimbrel_api::lineage::Origin;
use whimbrel_api::vm::{
    Boot, Bytes, Disk, Firmware, Nic, StateFile, StopRequest, StoragePath, Vm as VmRecord,
    VmAction, VmState,
};

use crate::command::Options;
use crate::failure::Failure;
use crate::{output, values, words};

/// Make, start, stop, show and use virtual machines
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  whimbrel vm create -f web01.toml
  whimbrel vm start web01
  whimbrel vm list --json | jq -r 'select(.state == \"running\") | .name'
  whimbrel vm console web01")]
pub(crate) enum Vm {
    /// List all VMs: where each is, and how
    #[command(after_help = "\
Examples:
  whimbrel vm list
  whimbrel vm list --json | jq -r '[.name, .host, .state] | @tsv'")]
    List,
    /// Show all that is known of a VM
    #[command(after_help = "\
Examples:
  whimbrel vm show web01
  whimbrel vm show web01 --json | jq .definition")]
    Show {
        /// Its name or id
        #[arg(value_parser = values::vm)]
        vm: String,
    },
    Create(Box<create::Create>),
    /// Start a stopped VM
    #[command(after_help = "Examples:\n  whimbrel vm start web01")]
    Start {
        /// Its name or id
        #[arg(value_parser = values::vm)]
        vm: String,
    },
    /// Ask the guest to power off, or end it at once
    #[command(after_help = "\
Examples:
  whimbrel vm stop web01             presses the power button (ACPI)
  whimbrel vm stop web01 --force     pulls the plug: what was not written is lost")]
    Stop {
        /// Its name or id
        #[arg(value_parser = values::vm)]
        vm: String,
        /// End QEMU without asking the guest
        #[arg(long)]
        force: bool,
    },
    /// Let a running VM stand still; it stays so wherever it is moved
    #[command(after_help = "Examples:\n  whimbrel vm pause web01")]
    Pause {
        /// Its name or id
        #[arg(value_parser = values::vm)]
        vm: String,
    },
    /// Let a paused VM run again
    #[command(after_help = "Examples:\n  whimbrel vm resume web01")]
    Resume {
        /// Its name or id
        #[arg(value_parser = values::vm)]
        vm: String,
    },
    /// Save a VM's whole state, its memory included, to a file, and stop it
    #[command(after_help = "\
The file is made in a storage of the VM's host, and never overwrites one. From then on the VM can only be restored from it, not \
started anew: its memory fits its disks as they are now.

Examples:
  whimbrel vm save web01 shared/saved/web01.state")]
    Save {
        /// Its name or id
        #[arg(value_parser = values::vm)]
        vm: String,
        /// The file, as STORAGE/PATH
        #[arg(value_parser = values::storage_path)]
        file: StoragePath,
    },
    /// Let a stopped VM go on from a saved state
    #[command(after_help = "\
The file is removed once the guest runs: that memory never runs twice.

Examples:
  whimbrel vm restore web01 shared/saved/web01.state")]
    Restore {
        /// Its name or id
        #[arg(value_parser = values::vm)]
        vm: String,
        /// The file, as STORAGE/PATH
        #[arg(value_parser = values::storage_path)]
        file: StoragePath,
    },
    Clone(clone::Clone),
    Template(clone::Template),
    #[command(subcommand)]
    Snapshot(snapshot::Snapshot),
    DirtyRate(dirty_rate::DirtyRate),
    Console(console::ConsoleOf),
    /// Delete a stopped VM with its disks
    #[command(after_help = "Examples:\n  whimbrel vm delete web01")]
    Delete {
        /// Its name or id
        #[arg(value_parser = values::vm)]
        vm: String,
    },
}

impl Vm {
    pub(crate) async fn run(self, options: &Options) -> Result<(), Failure> {
        match self {
            Self::List => {
                let head = ["NAME", "STATE", "HOST", "VCPUS", "MEMORY", "ENGINE", "ID"];
                output::list(options.json, &options.pool()?.vms().await?, head, row)
            }
            Self::Show { vm } => show(options, &options.pool()?.vm(&vm).await?),
            Self::Create(command) => {
                // The file is read, and found good, before anybody is asked.
                let request = command.request()?;
                show(options, &options.pool()?.create_vm(&request).await?)
            }
            Self::Start { vm } => act(options, &vm, VmAction::Start).await,
            Self::Pause { vm } => act(options, &vm, VmAction::Pause).await,
            Self::Resume { vm } => act(options, &vm, VmAction::Resume).await,
            Self::Stop { vm, force } => {
                told(options, &options.pool()?.stop_vm(&vm, &StopRequest { force }).await?)
            }
            Self::Save { vm, file } => {
                told(options, &options.pool()?.save_vm(&vm, &StateFile { file }).await?)
            }
            Self::Restore { vm, file } => {
                told(options, &options.pool()?.restore_vm(&vm, &StateFile { file }).await?)
            }
            Self::Clone(command) => show(options, &command.run(options).await?),
            Self::Template(command) => command.run(options).await,
            Self::Snapshot(command) => command.run(options).await,
            Self::DirtyRate(command) => command.run(options).await,
            Self::Console(command) => command.run(options).await,
            Self::Delete { vm } => {
                options.pool()?.delete_vm(&vm).await?;
                match options.json {
                    true => output::json(&serde_json::json!({"deleted": vm})),
                    false => output::line(&format!("{vm} is deleted")),
                }
            }
        }
    }
}

async fn act(options: &Options, vm: &str, action: VmAction) -> Result<(), Failure> {
    told(options, &options.pool()?.vm_action(vm, action).await?)
}

/// One line about a VM that something was done with.
fn told(options: &Options, vm: &VmRecord) -> Result<(), Failure> {
    match options.json {
        true => output::json(vm),
        false => output::line(&format!("{} is {} on {}", vm.name, state(&vm.state), vm.host)),
    }
}

fn row(vm: &VmRecord) -> [String; 7] {
    let definition = &vm.definition;
    [
        vm.name.to_string(),
        vm.state.word().to_owned(),
        vm.host.to_string(),
        definition.vcpus.to_string(),
        Bytes(definition.memory_bytes).to_string(),
        engine(vm),
        vm.id.to_string(),
    ]
}

fn engine(vm: &VmRecord) -> String {
    words::or_dash(vm.engine.as_ref().map(|e| format!("{} {}", e.version, e.accelerator)))
}

fn state(state: &VmState) -> String {
    let word = state.word();
    match state {
        VmState::Stopped | VmState::Running | VmState::Paused => word.to_owned(),
        VmState::Crashed { why } | VmState::Unknown { why } => format!("{word} ({why})"),
        VmState::Migrating { migration } => format!("{word} ({migration})"),
        VmState::Unresolved { migration, ask } => format!("{word} ({migration}; ask {ask})"),
    }
}

fn show(options: &Options, vm: &VmRecord) -> Result<(), Failure> {
    let definition = &vm.definition;
    let mut fields = vec![
        ("name", vm.name.to_string()),
        ("id", vm.id.to_string()),
        ("state", state(&vm.state)),
        ("host", vm.host.to_string()),
        ("epoch", vm.epoch.to_string()),
        ("engine", engine(vm)),
        ("vcpus", format!("{} × {}", definition.vcpus, definition.cpu)),
        ("memory", Bytes(definition.memory_bytes).to_string()),
        ("machine", definition.machine.clone()),
        ("boot", boot(&definition.boot)),
    ];
    if definition.template {
        fields.push(("template", words::yes_no(true)));
    }
    fields.extend(definition.origin.iter().map(|origin| ("clone of", origin_text(origin))));
    fields.extend(definition.disks.iter().map(|disk| ("disk", disk_text(disk))));
    fields.extend(definition.snapshot.iter().map(|name| ("goes on from", name.to_string())));
    fields.extend(definition.nics.iter().map(|nic| ("nic", nic_text(nic))));
    fields.extend(definition.saved.iter().map(|saved| ("saved", saved.file.to_string())));
    output::fields(options.json, vm, &fields)
}

fn boot(boot: &Boot) -> String {
    match boot {
        Boot::Kernel { kernel, initrd, cmdline } => {
            let initrd = initrd.as_ref().map(|initrd| format!(" with {initrd}"));
            format!("{kernel}{} ({cmdline})", initrd.unwrap_or_default())
        }
        Boot::Firmware(Firmware::Seabios) => "SeaBIOS".to_owned(),
        Boot::Firmware(Firmware::Ovmf) => "OVMF".to_owned(),
    }
}

fn disk_text(disk: &Disk) -> String {
    let read_only = if disk.read_only { ", read-only" } else { "" };
    let (size, format) = (Bytes(disk.size_bytes), disk.format.as_str());
    let on = disk.layers.first().map(|layer| format!(", on {}", layer.file)).unwrap_or_default();
    format!("{}: {} ({size}, {format}{read_only}{on})", disk.name, disk.file)
}

fn origin_text(origin: &Origin) -> String {
    let kind = if origin.linked { "linked" } else { "full" };
    let snapshot = origin.snapshot.as_ref().map(|name| format!(", snapshot {name}"));
    format!("{} ({kind}{})", origin.vm, snapshot.unwrap_or_default())
}

fn nic_text(nic: &Nic) -> String {
    format!("{} in {}", nic.mac, nic.network)
}
