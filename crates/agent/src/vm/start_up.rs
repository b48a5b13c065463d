//! What an agent does with its VMs when it starts: each gets its task, from what the ledger says, and QEMUs of an
//! earlier life are found again. Nothing is started and nothing is ended here.

use std::collections::HashMap;
use std::sync::Arc;

use whimbrel_api::{ApiError, VmId};
use whimbrel_migration::handoff::{Ownership, Standing};

use super::task::{self, Beginning, news_of};
use crate::host::Host;
use crate::ledger::{RunRecord, VmRow};

/// Gives every VM of this host its task. Called once, before the door opens.
///
/// # Errors
/// `internal` where the ledger cannot be read: then nothing is known, and the agent must not go on.
pub async fn find_all(host: &Arc<Host>) -> Result<(), ApiError> {
    let mut rows: HashMap<VmId, VmRow> =
        host.ledger.vms().await?.into_iter().map(|row| (row.definition.id, row)).collect();
    let runs = host.ledger.runs().await?;
    for ownership in host.ledger.current_of_all().await? {
        let vm = ownership.vm;
        let row = rows.remove(&vm);
        match &ownership.standing {
            Standing::Owned => take_up_owned(host, ownership, row, &runs).await?,
            Standing::Leaving { .. } | Standing::Released { .. } | Standing::Serving { .. } => {
                take_up_lent(host, ownership, row, &runs);
            }
            // Its migration's driver takes it up.
            Standing::Expected { .. } | Standing::Fetching { .. } => {}
            // Another host's; the agent ended before it had forgotten the VM.
            Standing::Gone { .. } | Standing::Refused { .. } => {
                if row.is_some() {
                    host.ledger.remove_vm(vm).await?;
                }
            }
        }
    }
    for vm in rows.keys() {
        tracing::error!(%vm, "the ledger has a VM without any word on who owns it; it is left alone");
    }
    Ok(())
}

/// The run that is a VM's own, by the ledger: noted as such, or brought by the migration that made this host the owner
/// (the agent ended between `Owned` and the note).
pub(crate) fn own_run<'a>(
    ownership: &Ownership,
    row: Option<&VmRow>,
    runs: &'a [RunRecord],
) -> Option<&'a RunRecord> {
    let noted = row.and_then(|row| row.run.as_ref());
    let of_vm = |run: &&RunRecord| run.definition.id == ownership.vm;
    let is_noted = |run: &&RunRecord| of_vm(run) && Some(&run.name) == noted;
    let is_brought = |run: &&RunRecord| {
        of_vm(run) && run.migration.is_some() && run.migration == ownership.migration
    };
    runs.iter().find(is_noted).or_else(|| runs.iter().find(is_brought))
}

async fn take_up_owned(
    host: &Arc<Host>,
    ownership: Ownership,
    row: Option<VmRow>,
    runs: &[RunRecord],
) -> Result<(), ApiError> {
    let record = own_run(&ownership, row.as_ref(), runs).cloned();
    let definition = match (&row, &record) {
        (Some(row), _) => row.definition.clone(),
        (None, Some(record)) => record.definition.clone(),
        // Deleted here: only its ownership is remembered.
        (None, None) => return Ok(()),
    };
    let beginning = match (record, row) {
        (Some(record), row) => {
            if row.is_none_or(|row| row.run.as_ref() != Some(&record.name)) {
                host.ledger.set_running(&definition, &record.name).await?;
            }
            Beginning::Find { record: Box::new(record) }
        }
        (None, Some(VmRow { crashed: Some(why), .. })) => Beginning::Crashed { why },
        (None, _) => Beginning::Stopped,
    };
    host.vms.insert(definition.id, task::run(host, definition, ownership, beginning));
    Ok(())
}

fn take_up_lent(host: &Arc<Host>, ownership: Ownership, row: Option<VmRow>, runs: &[RunRecord]) {
    let (Some(row), Some((migration, news))) = (row, news_of(&ownership)) else {
        tracing::error!(vm = %ownership.vm, "a migration is open of a VM without definition");
        return;
    };
    let record = own_run(&ownership, Some(&row), runs).cloned().map(Box::new);
    let beginning = Beginning::Lent { migration, news, record };
    let definition = row.definition;
    host.vms.insert(definition.id, task::run(host, definition, ownership, beginning));
}
