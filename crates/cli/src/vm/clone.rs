//! `whimbrel vm clone` and `whimbrel vm template`: many VMs from one.

use clap::Args;
use whimbrel_api::lineage::{CloneVm, SetTemplate};
use whimbrel_api::vm::Vm as VmRecord;
use whimbrel_api::{Name, VmId};

use crate::command::Options;
use crate::failure::Failure;
use crate::{output, values};

/// Make a VM like another: the same hardware and disks, another identity
#[derive(Debug, Args)]
#[command(after_help = "\
A full clone shares nothing with the other. A linked clone stands on the other's disks and keeps only what it writes itself: it is \
made at once, whatever the size, and the other cannot be deleted for as long. It is made from a template or a snapshot, which \
never change. A VM that is cloned as it is must be stopped; a snapshot can be cloned at any time.

The clone has an id and network addresses of its own; a name or key that its guest keeps on its disks it has from the other.

Examples:
  whimbrel vm template golden
  whimbrel vm clone golden web07 --linked
  whimbrel vm clone web01 web01-copy --storage bulk
  whimbrel vm clone web01 web01-test --linked --snapshot before-upgrade")]
pub(crate) struct Clone {
    /// The VM or template, by its name or id
    #[arg(value_parser = values::vm)]
    vm: String,
    /// The new VM's name
    #[arg(value_parser = values::name)]
    name: Name,
    /// Stand on the other's disks instead of copying them
    #[arg(long)]
    linked: bool,
    /// Clone this snapshot; without it the VM as it is
    #[arg(long, value_parser = values::name)]
    snapshot: Option<Name>,
    /// Put the copies of all disks there; without it each beside the one that it is a copy of
    #[arg(long, value_parser = values::name, conflicts_with = "linked")]
    storage: Option<Name>,
}

impl Clone {
    /// The new VM.
    pub(super) async fn run(self, options: &Options) -> Result<VmRecord, Failure> {
        let Self { vm, name, linked, snapshot, storage } = self;
        let request = CloneVm { id: VmId::new(), name, linked, snapshot, storage };
        Ok(options.pool()?.clone_vm(&vm, &request).await?)
    }
}

/// Make a stopped VM a template, which is never started and can be cloned at any time
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  whimbrel vm template golden
  whimbrel vm template golden --undo     a VM again, once no linked clone stands on it")]
pub(crate) struct Template {
    /// Its name or id
    #[arg(value_parser = values::vm)]
    vm: String,
    /// Make a template a VM again
    #[arg(long)]
    undo: bool,
}

impl Template {
    pub(super) async fn run(self, options: &Options) -> Result<(), Failure> {
        let request = SetTemplate { template: !self.undo };
        let vm = options.pool()?.set_template(&self.vm, &request).await?;
        let what = if vm.definition.template { "a template" } else { "a VM" };
        match options.json {
            true => output::json(&vm),
            false => output::line(&format!("{} is {what}", vm.name)),
        }
    }
}
