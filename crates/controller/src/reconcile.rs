//! Giving a host what it lacks: networks and storages after it joined, came back, or lost something, and new certificates in
//! time.
//!
//! Every round compares what the pool has with what the host says that it has, and asks for what is missing; there is no memory
//! of what was done before, so that nothing depends on it. A shared storage is given to a host only together with the proof that
//! it sees the same files ([`crate::storages`]). Called by [`crate::contact`], after each answer.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tracing::{info, warn};
use whimbrel_api::agent::HostReport;
use whimbrel_api::pool::Storage;
use whimbrel_api::{ApiError, Name};

use crate::hosts::Member;
use crate::{Controller, renewal, storages};

/// How long a host that failed to prove a shared storage is left alone with it, in seconds.
const PROOF_RETRY_SECONDS: u64 = 30;
/// From one renewal of a host's certificates to the next try, in seconds. It may fail, and when the authority itself is about to
/// expire it does not help.
const RENEWAL_PAUSE_SECONDS: u64 = 60 * 60;

/// What the loop of one host remembers for its log's sake, and to be gentle.
#[derive(Debug, Default)]
pub(crate) struct Reconciler {
    troubles: BTreeMap<String, String>,
    unproven: BTreeMap<Name, Instant>,
    renewed: Option<Instant>,
}

impl Reconciler {
    /// Gives the host what it lacks. What fails is logged once and tried again in the next round.
    pub(crate) async fn reconcile(&mut self, controller: &Controller, member: &Member) {
        let Some(report) = member.ready_report() else { return };
        self.renew_certificates(controller, member, &report).await;
        // Somebody makes a network or a storage known at the moment: that includes this host.
        let Ok(_layout) = controller.layout.try_lock() else { return };
        if let Err(error) = self.give_networks(controller, member, &report).await {
            warn!(%error, "cannot read the networks");
        }
        if let Err(error) = self.give_storages(controller, member, &report).await {
            warn!(%error, "cannot read the storages");
        }
    }

    async fn renew_certificates(
        &mut self,
        controller: &Controller,
        member: &Member,
        report: &HostReport,
    ) {
        let pause = Duration::from_secs(RENEWAL_PAUSE_SECONDS);
        if !report.certificate_renewal_due
            || self.renewed.is_some_and(|tried| tried.elapsed() < pause)
        {
            return;
        }
        self.renewed = Some(Instant::now());
        let renewed = renewal::renew_host(controller, member).await;
        self.note(member, "new certificates".to_owned(), renewed);
    }

    async fn give_networks(
        &mut self,
        controller: &Controller,
        member: &Member,
        report: &HostReport,
    ) -> Result<(), ApiError> {
        for network in controller.store().networks().await? {
            if !report.networks.contains(&network.name) {
                let given = member.agent().put_network(&network).await;
                self.note(member, format!("network {}", network.name), given);
            }
        }
        Ok(())
    }

    async fn give_storages(
        &mut self,
        controller: &Controller,
        member: &Member,
        report: &HostReport,
    ) -> Result<(), ApiError> {
        for storage in controller.store().storages().await? {
            let there = report.storages.iter().any(|there| there.name == storage.name);
            if storage.shared {
                let proofs = controller.store().storage_proofs(&storage.name).await?;
                if !there || !proofs.contains(&member.name) {
                    self.give_shared(controller, member, &storage).await;
                }
            } else if !there {
                let given = member.agent().put_storage(&storage).await.map(drop);
                self.note(member, format!("storage {}", storage.name), given);
            }
        }
        Ok(())
    }

    async fn give_shared(&mut self, controller: &Controller, member: &Member, storage: &Storage) {
        let pause = Duration::from_secs(PROOF_RETRY_SECONDS);
        if self.unproven.get(&storage.name).is_some_and(|failed| failed.elapsed() < pause) {
            return;
        }
        let proven = storages::give_shared(controller, member, storage).await;
        match &proven {
            Ok(()) => self.unproven.remove(&storage.name),
            Err(_) => self.unproven.insert(storage.name.clone(), Instant::now()),
        };
        self.note(member, format!("storage {}", storage.name), proven);
    }

    /// Logs what happened, but the same trouble only once.
    fn note(&mut self, member: &Member, what: String, given: Result<(), ApiError>) {
        match given {
            Ok(()) => {
                self.troubles.remove(&what);
                info!(host = %member.name, what, "given to the host");
            }
            Err(error) => {
                if self.troubles.get(&what) != Some(&error.message) {
                    warn!(host = %member.name, what, %error, "cannot be given to the host; tried again");
                }
                self.troubles.insert(what, error.message);
            }
        }
    }
}
