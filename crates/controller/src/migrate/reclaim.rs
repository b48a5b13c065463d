//! A VM that an operator takes back from a destination that never returns.
//!
//! Nobody can know what such a host did last: the operator states it, and the word is in the record, with who said it and
//! when, before the source hears of it. The source decides whether it can be ([`whimbrel_migration::handoff::Source`]); it is
//! asked again until it has answered. When the VM is its own again, the placement is there too, and the destination is told
//! once it is back ([`tell_former_owner`]): until it has answered that is a leftover of the migration, and no order about the
//! VM goes there, for the placement is elsewhere.
//!
//! Called by [`super`] and the migration's page.

use std::time::Duration;

use jiff::Timestamp;
use whimbrel_api::agent::{OutgoingEnd, OutgoingReport, Superseded};
use whimbrel_api::migration::{Migration, MigrationState, Reclaim, ReclaimRequest, Statement};
use whimbrel_api::{ApiError, ErrorCode, MigrationId};

use super::page::{Page, Wish};
use crate::Controller;
use crate::controller::MovedPlacement;

/// Takes a VM back, if its migration is unresolved and its destination the one that is silent.
pub async fn reclaim(
    controller: &Controller,
    id: MigrationId,
    statement: Statement,
    by: String,
) -> Result<Migration, ApiError> {
    let record = controller.migration(id).await?;
    fits(&record, statement)?;
    let word = Reclaim { statement, by, at: Timestamp::now(), guest_was_there: None };
    if !controller.running().ask(id, |answer| Wish::Reclaim(word, answer)).await? {
        return Err(ApiError::new(ErrorCode::Busy, "nobody leads this migration at the moment"));
    }
    controller.migration(id).await
}

/// Whether the operator's word means anything, of a VM that was given away, to a host that does not answer; and whether it can
/// be honest: where disks were copied the guest may have written to the destination's, and no fence brings that back.
fn fits(record: &Migration, statement: Statement) -> Result<(), ApiError> {
    let (vm, destination) = (&record.vm_name, &record.destination);
    let (message, hint) = match &record.state {
        MigrationState::Unresolved { ask } if ask == destination => {
            if statement == Statement::HostIsFenced && !record.disks.is_empty() {
                let message = format!(
                    "{vm} has taken its disks to {destination}: what it may have written there is on no other disk"
                );
                let hint = "`--accept-data-loss` starts it from the disks on its source, as they were when it left";
                return Err(ApiError::new(ErrorCode::WrongState, message).hint(hint));
            }
            return Ok(());
        }
        MigrationState::Unresolved { ask } => (
            format!(
                "whether {vm} was given to {destination} only {ask} knows, and it does not answer"
            ),
            "it is asked on; a VM is taken back where its source answers",
        ),
        MigrationState::Running => (
            format!("{destination} may still answer for {vm}"),
            "before the handoff `whimbrel migration cancel` ends it; a destination that is silent is told as unresolved",
        ),
        _ => (format!("the migration of {vm} has ended"), "`whimbrel migration show` tells how"),
    };
    Err(ApiError::new(ErrorCode::WrongState, message).hint(hint))
}

/// Whether the VM is its source's again by an operator's word, which the destination may not know.
pub(super) fn was_taken_back(record: &Migration) -> bool {
    let settled = record.settled.as_ref().unwrap_or(&record.state);
    record.reclaim.is_some() && matches!(settled, MigrationState::Stayed { .. })
}

impl Page {
    /// Takes the word down and brings it to the source. One that the source refuses is taken out again.
    pub(super) async fn reclaim(&mut self, word: Reclaim) -> Result<(), ApiError> {
        fits(&self.record, word.statement)?;
        let first = self.record.reclaim.is_none();
        let statement = self.record.reclaim.get_or_insert(word).statement;
        if let Err(error) = self.controller.save_migration(&self.record).await {
            self.record.reclaim = self.record.reclaim.take().filter(|_| !first);
            return Err(error);
        }
        let request = ReclaimRequest { statement };
        let told = self.source().reclaim_outgoing(self.record.id, &request).await;
        match told {
            Ok(_) => Ok(()),
            Err(error) if error.is_unknown() => {
                let message = format!("{} does not answer; it is asked on", self.record.source);
                Err(ApiError::new(ErrorCode::Busy, message)
                    .hint("`whimbrel migration show` tells how it ends"))
            }
            Err(error) => {
                if first {
                    self.record.reclaim = None;
                    self.save().await;
                }
                Err(error)
            }
        }
    }

    /// Brings the word to a source that has forgotten it over a restart of its agent.
    pub(super) async fn reclaim_again(&mut self, report: &OutgoingReport) {
        let Some(word) = &self.record.reclaim else { return };
        if !matches!(report.end, OutgoingEnd::Unresolved { .. }) {
            return;
        }
        let request = ReclaimRequest { statement: word.statement };
        if let Err(error) = self.source().reclaim_outgoing(self.record.id, &request).await {
            tracing::info!(migration = %self.record.id, %error, "the VM is not taken back yet; asking on");
        }
    }

    /// The placement is the source's again, under the name that the VM has there.
    pub(super) async fn place_back(&mut self, again_after: Duration) {
        if !was_taken_back(&self.record) {
            return;
        }
        let back = MovedPlacement {
            vm: self.record.vm,
            host: self.record.source.clone(),
            epoch: self.record.epoch.next(),
            generation: self.generation,
            state: None,
        };
        let (vm, name) = (self.record.vm, self.record.vm_name.clone());
        let renamed = self.record.options.dname.is_some();
        loop {
            let placed = async {
                if renamed {
                    self.controller.store().rename_vm(vm, &name).await?;
                }
                self.controller.move_placement(&back).await
            };
            match placed.await {
                Ok(_) => return,
                Err(error) => {
                    tracing::error!(migration = %self.record.id, %error, "the placement cannot be written; trying again");
                }
            }
            self.pause(again_after).await;
        }
    }
}

/// Tells the destination that the VM is another host's, if that is so and it has not heard; until it has, nothing else of the
/// migration is asked of it.
pub(super) async fn tell_former_owner(
    controller: &Controller,
    record: &Migration,
) -> Result<Option<bool>, ApiError> {
    let known = record.reclaim.as_ref().and_then(|word| word.guest_was_there);
    if !was_taken_back(record) || known.is_some() {
        return Ok(known);
    }
    let said =
        Superseded { vm: record.vm, epoch: record.epoch.next(), owner: record.source.clone() };
    let heard = controller.agent(&record.destination)?.superseded(record.id, &said).await?;
    if heard.guest_was_there {
        tracing::error!(migration = %record.id, vm = %record.vm_name, host = %record.destination,
            "the host still had the guest of a VM that was taken back from it, against the operator's word; it has ended it");
    }
    Ok(Some(heard.guest_was_there))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unresolved(disks: serde_json::Value) -> Migration {
        let record = serde_json::json!({
            "id": "01890a5d-ac96-774b-bcce-b302099a8057", "vm": "0a000000-0000-4000-8000-000000000001",
            "vm_name": "web01", "source": "host-a", "destination": "host-b", "epoch": 5, "memory_bytes": 1 << 30,
            "options": {}, "phase": "handoff", "outcome": "unresolved", "ask": "host-b",
            "cancel_requested": false, "verdicts": [], "disks": disks, "phases": [],
            "started": "2026-01-01T00:00:00Z",
        });
        serde_json::from_value(record).unwrap()
    }

    #[test]
    fn a_fence_does_not_bring_back_what_was_written_to_copied_disks() {
        let shared = unresolved(serde_json::json!([]));
        assert!(fits(&shared, Statement::HostIsFenced).is_ok());
        let copied = unresolved(serde_json::json!([{
            "disk": "vda", "from": "local/vms/1/vda.qcow2", "to": "fast/vms/1/vda-e5.qcow2",
            "format": "qcow2", "size_bytes": 1 << 30,
        }]));
        let refused = fits(&copied, Statement::HostIsFenced).unwrap_err();
        assert_eq!(refused.code, ErrorCode::WrongState);
        assert!(refused.hint.unwrap().contains("--accept-data-loss"));
        assert!(fits(&copied, Statement::AcceptDataLoss).is_ok());
    }
}
