//! `whimbrel migration reclaim`: takes a VM back from a destination that never returns, by a word that only a person can give.
//!
//! Whether it can be is the controller's and the source's matter. Not here: what becomes of a VM that is to start again.

use clap::Args;
use whimbrel_api::MigrationId;
use whimbrel_api::migration::{ReclaimRequest, Statement};

use crate::command::Options;
use crate::failure::Failure;
use crate::values;

/// Take a VM back from a host that never returns; its guest has crashed then
#[derive(Debug, Args)]
#[command(after_help = "\
For a migration that is unresolved: the VM was given to a host that does not answer any more. Nobody but you can know that it \
never will act on that, and one of the two has to be said. If that host runs the guest after all, the guest runs twice.

The guest's memory is given up either way: that host may have written to its disks. The VM is crashed on its source, and \
`whimbrel vm start` starts it from its disks, as after a power cut. When the host comes back it is told, and gives up what it \
has of the VM.

Examples:
  whimbrel migration reclaim 01890a5d-ac96-774b-bcce-b302099a8057 --host-is-fenced
  whimbrel migration reclaim 01890a5d-ac96-774b-bcce-b302099a8057 --accept-data-loss

Where the VM was not given away, or its destination may still be heard of, the answer is a refusal, exit code 3.")]
pub(crate) struct Reclaim {
    /// Its id
    #[arg(value_parser = values::migration)]
    id: MigrationId,
    #[command(flatten)]
    word: Word,
}

/// What is stated of the destination.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Word {
    /// It is without power, or cut off from the VM's disks: no acknowledged write is lost
    #[arg(long)]
    host_is_fenced: bool,
    /// It is gone, and nobody can say what it did last
    #[arg(long)]
    accept_data_loss: bool,
}

impl Reclaim {
    pub(super) async fn run(self, options: &Options) -> Result<(), Failure> {
        let fenced = self.word.host_is_fenced;
        let statement = if fenced { Statement::HostIsFenced } else { Statement::AcceptDataLoss };
        let request = ReclaimRequest { statement };
        let record = options.pool()?.reclaim_migration(self.id, &request).await?;
        let (vm, source) = (&record.vm_name, &record.source);
        let what =
            format!("{vm} is taken back to {source}: `whimbrel vm start {vm}` starts it there");
        super::told(options, &record, &format!("ends; {what}"))
    }
}
