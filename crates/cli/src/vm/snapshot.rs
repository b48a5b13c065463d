//! `whimbrel vm snapshot`: what a VM's disks were at a moment, and going back to it.

use clap::Subcommand;
use whimbrel_api::Name;
use whimbrel_api::lineage::{Snapshot as SnapshotRecord, TakeSnapshot};
use whimbrel_api::vm::Vm as VmRecord;

use crate::command::Options;
use crate::failure::Failure;
use crate::{output, values, words};

/// Take snapshots of a stopped VM's disks, list them, go back to one
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Taking a snapshot copies nothing: from then on the disks go on in new images, and what was there is only read. Snapshots form a \
tree, since a VM can go back to any of them and on from there.

Examples:
  whimbrel vm snapshot create web01 before-upgrade
  whimbrel vm snapshot list web01
  whimbrel vm snapshot revert web01 before-upgrade")]
pub(crate) enum Snapshot {
    /// Take a snapshot of a stopped VM's disks
    #[command(after_help = "\
Disks that the guest may only read are not in it: they never change.

Examples:
  whimbrel vm snapshot create web01 before-upgrade")]
    Create {
        /// The VM's name or id
        #[arg(value_parser = values::vm)]
        vm: String,
        /// The snapshot's name
        #[arg(value_parser = values::name)]
        name: Name,
    },
    /// List a VM's snapshots, each with the one that it goes on from
    #[command(after_help = "\
Examples:
  whimbrel vm snapshot list web01
  whimbrel vm snapshot list web01 --json | jq -r .name")]
    List {
        /// The VM's name or id
        #[arg(value_parser = values::vm)]
        vm: String,
    },
    /// Let a stopped VM's disks go on from a snapshot; what was written since the last one is lost
    #[command(after_help = "\
What the disks are now is lost unless a snapshot of it is taken first. The other snapshots stay.

Examples:
  whimbrel vm snapshot revert web01 before-upgrade")]
    Revert {
        /// The VM's name or id
        #[arg(value_parser = values::vm)]
        vm: String,
        /// The snapshot
        #[arg(value_parser = values::name)]
        name: Name,
    },
    /// Delete a snapshot of a stopped VM; its disks and the other snapshots stay as they are
    #[command(after_help = "\
One that linked clones stand on is not deleted, and the refusal lists them.

Examples:
  whimbrel vm snapshot delete web01 before-upgrade")]
    Delete {
        /// The VM's name or id
        #[arg(value_parser = values::vm)]
        vm: String,
        /// The snapshot
        #[arg(value_parser = values::name)]
        name: Name,
    },
}

impl Snapshot {
    pub(crate) async fn run(self, options: &Options) -> Result<(), Failure> {
        let pool = options.pool()?;
        match self {
            Self::Create { vm, name } => {
                let request = TakeSnapshot { name: name.clone() };
                let after = pool.take_snapshot(&vm, &request).await?;
                told(options, &after, &format!("{} has the snapshot {name}", after.name))
            }
            Self::List { vm } => list(options, &pool.vm(&vm).await?),
            Self::Revert { vm, name } => {
                let after = pool.revert(&vm, &name).await?;
                told(options, &after, &format!("{} goes on from {name}", after.name))
            }
            Self::Delete { vm, name } => {
                let after = pool.delete_snapshot(&vm, &name).await?;
                let sentence = format!("{} has the snapshot {name} no more", after.name);
                told(options, &after, &sentence)
            }
        }
    }
}

fn told(options: &Options, vm: &VmRecord, sentence: &str) -> Result<(), Failure> {
    match options.json {
        true => output::json(vm),
        false => output::line(sentence),
    }
}

fn list(options: &Options, vm: &VmRecord) -> Result<(), Failure> {
    let now = vm.definition.snapshot.as_ref();
    let row = |snapshot: &SnapshotRecord| {
        [
            snapshot.name.to_string(),
            words::moment(snapshot.taken),
            words::or_dash(snapshot.parent.as_ref()),
            words::comma_list(snapshot.disks.iter().map(|disk| &disk.name)),
            words::yes_no(now == Some(&snapshot.name)),
        ]
    };
    let head = ["NAME", "TAKEN", "GOES ON FROM", "DISKS", "CURRENT"];
    output::list(options.json, &vm.definition.snapshots, head, row)
}
