//! One host: everything that the agent's parts share, and what the host says of itself.
//!
//! Made once by [`crate::run`] and passed to whoever needs it. It decides nothing.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;
use whimbrel_api::agent::{CertificateRequests, EngineReport, HostReport};
use whimbrel_api::client::AgentClient;
use whimbrel_api::pool::Network;
use whimbrel_api::vm::VmDefinition;
use whimbrel_api::{ApiError, ErrorCode, Name};
use whimbrel_pki::authority::HostCertificates;
use whimbrel_pki::files::HostIdentity;
use whimbrel_pki::tls;
use whimbrel_qemu::engine::EngineFacts;
use whimbrel_qemu::process::UnprivilegedUser;

use crate::config::AgentConfig;
use crate::failpoint::Failpoints;
use crate::in_hand::InHand;
use crate::ledger::{Ledger, Resource};
use crate::measure::Links;
use crate::metrics::Metrics;
use crate::migrate::Migrations;
use crate::network::Networks;
use crate::storage::Storages;
use crate::vm::Vms;

pub(crate) mod abilities;
mod facts;

/// A host.
#[derive(Debug)]
pub struct Host {
    /// How the agent was set up.
    pub config: AgentConfig,
    /// Its keys and certificates; these are renewed by [`Host::renew`].
    pub identity: HostIdentity,
    /// What its door shows.
    pub door_tls: watch::Sender<Arc<rustls::ServerConfig>>,
    /// Its durable memory.
    pub ledger: Ledger,
    /// What somebody handles at this moment.
    pub in_hand: InHand,
    /// Failures on order.
    pub failpoints: Failpoints,
    /// The QEMUs, the first being the one for new VMs.
    pub engines: Vec<EngineFacts>,
    /// Its networks.
    pub networks: Networks,
    /// Its storages.
    pub storages: Storages,
    /// Its VMs.
    pub vms: Vms,
    /// Its migrations.
    pub migrations: Migrations,
    /// What it knows of the ways to other hosts.
    pub links: Links,
    /// What it counts.
    pub metrics: Metrics,
}

impl Host {
    /// The host's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.config.name
    }

    /// The user that QEMU runs as.
    #[must_use]
    pub fn qemu_user(&self) -> UnprivilegedUser {
        let (uid, gid) = self.config.qemu_user;
        UnprivilegedUser { uid, gid }
    }

    /// The first engine that has a machine type.
    ///
    /// # Errors
    /// `engine` where there is none.
    pub fn engine_for(&self, machine: &str) -> Result<&EngineFacts, ApiError> {
        let has =
            |engine: &&EngineFacts| engine.machine_types.iter().any(|found| found.name == machine);
        self.engines.iter().find(has).ok_or_else(|| {
            ApiError::new(
                ErrorCode::Engine,
                format!("no QEMU of host {} has the machine type `{machine}`", self.name()),
            )
        })
    }

    /// A client for the agent of another host.
    ///
    /// # Errors
    /// `internal` where no HTTP client can be made.
    pub fn agent_client(&self, host: &Name, address: &str) -> Result<AgentClient, ApiError> {
        let tls = tls::client_config(&self.identity.client());
        let tls = tls.map_err(|error| ApiError::internal("the host's certificates", &error))?;
        AgentClient::new(host, address, Arc::new(tls))
    }

    /// What the host wants certified when its certificates are renewed: the keys that it has.
    ///
    /// # Errors
    /// `internal` where no signing request can be made.
    pub fn certificate_requests(&self) -> Result<CertificateRequests, ApiError> {
        let keys = self.identity.keys();
        let failed = |error| ApiError::internal("cannot make a signing request", &error);
        Ok(CertificateRequests {
            agent_csr: keys.agent_request_pem().map_err(failed)?,
            qemu_csr: keys.qemu_request_pem().map_err(failed)?,
        })
    }

    /// Takes new certificates: on the disk first, then for every handshake and every migration that begins from now on.
    ///
    /// # Errors
    /// `bad-request` where they are not for this host and its keys, or cannot be written; the old ones stay in use.
    pub async fn renew(&self, received: HostCertificates) -> Result<(), ApiError> {
        let (identity, folder) = (self.identity.clone(), self.config.pki_dir());
        let renewed = tokio::task::spawn_blocking(move || identity.renew(&received, &folder)).await;
        renewed.map_err(|error| ApiError::internal("the renewal broke off", &error))?.map_err(
            |error| ApiError::new(ErrorCode::BadRequest, whimbrel_api::error::chain(&error)),
        )?;
        let tls = tls::server_config(&self.identity.server());
        let tls = tls.map_err(|error| ApiError::internal("the host's certificates", &error))?;
        self.door_tls.send_replace(tls);
        tracing::info!(days = self.certificate_days_left(), "the host's certificates are renewed");
        Ok(())
    }

    /// Makes a network's bridge and remembers the network.
    ///
    /// # Errors
    /// `in-use` with the VMs that are in its present bridge, where that is another; or what failed: a bridge that was
    /// made nonetheless is in the journal.
    pub async fn put_network(&self, network: &Network) -> Result<(), ApiError> {
        Networks::check(network)?;
        let known = self.networks.get(&network.name);
        if known.is_some_and(|known| known.bridge != network.bridge) {
            // A tap stays in the bridge that it was put into: two VMs of one network would not see each other.
            let users = self.users_of_network(&network.name).await?;
            refuse_if_used("network", &network.name, &users)
                .map_err(|error| error.hint("its bridge can be changed when no VM here uses it"))?;
        }
        let owner = network_owner(&network.name);
        let _alone = self.in_hand.wait_alone(&owner).await?;
        if !self.networks.bridge_exists(&network.bridge).await? {
            let bridge = Resource::Bridge { name: network.bridge.clone() };
            self.ledger.journal(&owner, &[bridge]).await?;
        }
        self.networks.ensure(network).await?;
        self.ledger.put_network(network).await?;
        Ok(())
    }

    /// Forgets a network that no VM uses, and removes its bridge if the agent had made it.
    ///
    /// # Errors
    /// `in-use` with the VMs; `not-found`.
    pub async fn delete_network(&self, name: &Name) -> Result<(), ApiError> {
        if self.networks.get(name).is_none() {
            return Err(ApiError::not_found("network", name));
        }
        refuse_if_used("network", name, &self.users_of_network(name).await?)?;
        let owner = network_owner(name);
        let _alone = self.in_hand.wait_alone(&owner).await?;
        self.networks.forget(name);
        for (found, resource) in self.ledger.journaled().await? {
            if let (true, Resource::Bridge { name }) = (found == owner, resource) {
                self.networks.remove(&name).await?;
            }
        }
        self.ledger.unjournal(&owner).await?;
        self.ledger.remove_network(name).await?;
        Ok(())
    }

    /// The VMs on this host that have a card in a network: those that live here, and those that just arrive or leave.
    async fn users_of_network(&self, name: &Name) -> Result<Vec<Name>, ApiError> {
        let uses = |vm: &VmDefinition| vm.nics.iter().any(|nic| nic.network == *name);
        let runs = self.ledger.runs().await?.into_iter().map(|run| run.definition);
        let mut users = self.vms.names_where(uses);
        users.extend(runs.filter(uses).map(|vm| vm.name));
        users.sort();
        users.dedup();
        Ok(users)
    }

    /// Forgets a storage that no VM uses; its files stay.
    ///
    /// # Errors
    /// `in-use` with the VMs; `not-found`.
    pub async fn delete_storage(&self, name: &Name) -> Result<(), ApiError> {
        self.storages.get(name)?;
        let users = self.vms.names_where(|vm| crate::vm::storages_of(vm).contains(name));
        refuse_if_used("storage", name, &users)?;
        self.storages.forget(name);
        self.ledger.remove_storage(name).await?;
        Ok(())
    }

    /// What the host says of itself.
    pub async fn report(self: &Arc<Self>) -> HostReport {
        let vms = self.vms.reports();
        let engine = |engine: &EngineFacts| {
            let (major, minor, micro) = engine.version;
            let fits =
                |model: &&whimbrel_qemu::engine::CpuModel| model.unavailable_features.is_empty();
            let version = format!("{major}.{minor}.{micro}");
            let obstacle = engine.postcopy_obstacle.clone();
            EngineReport {
                abilities: abilities::abilities(&version, &engine.features, obstacle),
                version,
                accelerator: engine.accelerator.as_wire().to_owned(),
                machines: engine.machine_types.iter().map(|found| found.name.clone()).collect(),
                cpu_models: engine.cpu_models.iter().filter(fits).map(|m| m.name.clone()).collect(),
            }
        };
        let memory = facts::memory();
        HostReport {
            name: self.name().clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cpus: facts::cpus(),
            cpu_model: facts::cpu_model(),
            memory_total_bytes: memory.total_bytes,
            memory_available_bytes: memory
                .available_bytes
                .saturating_sub(facts::untouched_bytes(&vms)),
            engines: self.engines.iter().map(engine).collect(),
            cpu_features: self
                .engines
                .first()
                .map(|engine| engine.host_cpu_features.clone())
                .unwrap_or_default(),
            networks: self.networks.present().await,
            storages: self.storages.reports(self).await,
            migration_address: self.config.migration_host(),
            vms: u32::try_from(vms.len()).unwrap_or(u32::MAX),
            certificate_days_left: self.certificate_days_left(),
            certificate_renewal_due: self.identity.is_renewal_due(SystemTime::now()),
        }
    }

    /// Days until the first of the host's certificates expires; negative afterwards.
    #[must_use]
    pub fn certificate_days_left(&self) -> i64 {
        let identity = &self.identity;
        let shown =
            [identity.server(), identity.client(), identity.qemu_server(), identity.qemu_client()];
        let now = SystemTime::now();
        let of_each = shown.iter().map(|credentials| credentials.certificate.days_left(now));
        of_each.min().unwrap_or(0).min(identity.ca().days_left(now))
    }
}

impl From<crate::ledger::LedgerError> for ApiError {
    fn from(error: crate::ledger::LedgerError) -> Self {
        ApiError::new(ErrorCode::Internal, whimbrel_api::error::chain(&error))
    }
}

impl From<crate::failpoint::Failed> for ApiError {
    fn from(error: crate::failpoint::Failed) -> Self {
        ApiError::new(ErrorCode::Internal, error.to_string())
    }
}

fn network_owner(name: &Name) -> String {
    format!("network {name}")
}

fn refuse_if_used(kind: &str, name: &Name, users: &[Name]) -> Result<(), ApiError> {
    if users.is_empty() {
        return Ok(());
    }
    let users: Vec<&str> = users.iter().map(Name::as_str).collect();
    Err(ApiError::new(ErrorCode::InUse, format!("{kind} `{name}` is used by {}", users.join(", "))))
}
