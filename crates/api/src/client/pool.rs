//! The public API's calls.

mod lineage;

use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use whimbrel_migration::names::{MigrationId, Name};

use super::{Caller, Console, EventStream, Target};
use crate::ApiError;
use crate::event::Event;
use crate::measure::{DirtyRateReport, DirtyRateRequest};
use crate::migration::{
    LiveSettings, MigrateRequest, Migration, MigrationAction, MigrationEvent, MigrationStatistics,
    ReclaimRequest,
};
use crate::plan::{PlanRequest, VmPlan};
use crate::policy::{AppliedPolicy, AttachPolicy, Policy, PolicyStatus};
use crate::pool::{
    Host, HostPatch, JoinAnswer, JoinRequest, JoinToken, Network, NewJoinToken, Storage,
    StorageStatus,
};
use crate::vm::{CreateVm, StateFile, StopRequest, Vm, VmAction};

/// How long creating a VM may take, in seconds: an import copies a whole image.
const CREATE_SECONDS: u64 = 3600;
/// How long saving or restoring a VM's state may take, in seconds: as long as its memory takes to a disk.
const STATE_SECONDS: u64 = 3600;
/// How long measuring may take, in seconds: the longest window, and what is around it.
const MEASURE_SECONDS: u64 = 120;

/// A pool's controller.
#[derive(Debug, Clone)]
pub struct PoolClient(Caller);

impl PoolClient {
    /// The controller at `target`, spoken to with the certificate in `tls`.
    pub fn new(target: Target, tls: Arc<rustls::ClientConfig>) -> Result<Self, ApiError> {
        Caller::new(target, whimbrel_pki::identity::CONTROLLER_DNS_NAME.to_owned(), tls).map(Self)
    }

    /// Hands a join token in.
    pub async fn join(&self, request: &JoinRequest) -> Result<JoinAnswer, ApiError> {
        self.0.post("/join", request).await
    }

    /// Makes a join token.
    pub async fn new_join_token(&self, request: &NewJoinToken) -> Result<JoinToken, ApiError> {
        self.0.post("/join-tokens", request).await
    }

    /// All hosts.
    pub async fn hosts(&self) -> Result<Vec<Host>, ApiError> {
        self.0.get("/hosts").await
    }

    /// One host.
    pub async fn host(&self, name: &Name) -> Result<Host, ApiError> {
        self.0.get(&format!("/hosts/{name}")).await
    }

    /// Enables or disables a host.
    pub async fn patch_host(&self, name: &Name, patch: &HostPatch) -> Result<Host, ApiError> {
        self.0.call(Method::PATCH, &format!("/hosts/{name}"), Some(patch), None).await
    }

    /// All networks.
    pub async fn networks(&self) -> Result<Vec<Network>, ApiError> {
        self.0.get("/networks").await
    }

    /// Makes a network on every host.
    pub async fn create_network(&self, network: &Network) -> Result<Network, ApiError> {
        self.0.post("/networks", network).await
    }

    /// All storages.
    pub async fn storages(&self) -> Result<Vec<StorageStatus>, ApiError> {
        self.0.get("/storages").await
    }

    /// Makes a storage known to every host; a shared one is proven first.
    pub async fn create_storage(&self, storage: &Storage) -> Result<StorageStatus, ApiError> {
        self.0.post("/storages", storage).await
    }

    /// All VMs.
    pub async fn vms(&self) -> Result<Vec<Vm>, ApiError> {
        self.0.get("/vms").await
    }

    /// One VM, by name or id.
    pub async fn vm(&self, vm: &str) -> Result<Vm, ApiError> {
        self.0.get(&format!("/vms/{vm}")).await
    }

    /// Creates a VM, stopped.
    pub async fn create_vm(&self, request: &CreateVm) -> Result<Vm, ApiError> {
        self.0
            .call(Method::POST, "/vms", Some(request), Some(Duration::from_secs(CREATE_SECONDS)))
            .await
    }

    /// Starts, pauses or resumes a VM.
    pub async fn vm_action(&self, vm: &str, action: VmAction) -> Result<Vm, ApiError> {
        self.0.post(&format!("/vms/{vm}/{}", action.as_str()), &serde_json::json!({})).await
    }

    /// Stops a VM.
    pub async fn stop_vm(&self, vm: &str, request: &StopRequest) -> Result<Vm, ApiError> {
        self.0.post(&format!("/vms/{vm}/stop"), request).await
    }

    /// Deletes a stopped VM with its disks.
    pub async fn delete_vm(&self, vm: &str) -> Result<(), ApiError> {
        self.0.delete(&format!("/vms/{vm}")).await
    }

    /// Opens a VM's console.
    pub async fn console(&self, vm: &str) -> Result<Console, ApiError> {
        Console::open(&self.0, &format!("/vms/{vm}/console")).await
    }

    /// Follows everything that changes in the pool; it begins with everything there is.
    pub async fn events(&self) -> Result<EventStream<Event>, ApiError> {
        EventStream::open(&self.0, "/events").await
    }

    /// Asks for a migration; the answer comes when it is admitted or refused.
    pub async fn migrate(&self, request: &MigrateRequest) -> Result<Migration, ApiError> {
        self.0.post("/migrations", request).await
    }

    /// All migrations, newest first.
    pub async fn migrations(&self) -> Result<Vec<Migration>, ApiError> {
        self.0.get("/migrations").await
    }

    /// One migration.
    pub async fn migration(&self, id: MigrationId) -> Result<Migration, ApiError> {
        self.0.get(&format!("/migrations/{id}")).await
    }

    /// Follows a migration to its end.
    pub async fn watch_migration(
        &self,
        id: MigrationId,
    ) -> Result<EventStream<MigrationEvent>, ApiError> {
        EventStream::open(&self.0, &format!("/migrations/{id}/watch")).await
    }

    /// Cancels a migration.
    pub async fn cancel_migration(&self, id: MigrationId) -> Result<Migration, ApiError> {
        self.0.post(&format!("/migrations/{id}/cancel"), &serde_json::json!({})).await
    }

    /// Takes a VM back from a destination that never returns.
    pub async fn reclaim_migration(
        &self,
        id: MigrationId,
        request: &ReclaimRequest,
    ) -> Result<Migration, ApiError> {
        self.0.post(&format!("/migrations/{id}/reclaim"), request).await
    }

    /// What was seen of a migration over time; while it runs, as far as it is.
    pub async fn migration_statistics(
        &self,
        id: MigrationId,
    ) -> Result<MigrationStatistics, ApiError> {
        self.0.get(&format!("/migrations/{id}/statistics")).await
    }

    /// Changes a running migration.
    pub async fn set_migration(
        &self,
        id: MigrationId,
        settings: &LiveSettings,
    ) -> Result<Migration, ApiError> {
        self.0.put(&format!("/migrations/{id}/settings"), settings).await
    }

    /// Orders something of a running migration; `wrong-state` where it does not fit.
    pub async fn migration_action(
        &self,
        id: MigrationId,
        action: MigrationAction,
    ) -> Result<Migration, ApiError> {
        self.0.post(&format!("/migrations/{id}/{}", action.as_str()), &serde_json::json!({})).await
    }

    /// What moving a VM would take.
    pub async fn plan(&self, request: &PlanRequest) -> Result<VmPlan, ApiError> {
        let within = Duration::from_secs(MEASURE_SECONDS);
        self.0.call(Method::POST, "/plans", Some(request), Some(within)).await
    }

    /// Measures how fast a VM's guest writes.
    pub async fn dirty_rate(
        &self,
        vm: &str,
        request: &DirtyRateRequest,
    ) -> Result<DirtyRateReport, ApiError> {
        let within = Duration::from_secs(MEASURE_SECONDS);
        self.0
            .call(Method::POST, &format!("/vms/{vm}/dirty-rate"), Some(request), Some(within))
            .await
    }

    /// All policies, the built-in ones first.
    pub async fn policies(&self) -> Result<Vec<PolicyStatus>, ApiError> {
        self.0.get("/policies").await
    }

    /// One policy.
    pub async fn policy(&self, name: &Name) -> Result<PolicyStatus, ApiError> {
        self.0.get(&format!("/policies/{name}")).await
    }

    /// Makes or changes a policy.
    pub async fn put_policy(&self, policy: &Policy) -> Result<PolicyStatus, ApiError> {
        self.0.put(&format!("/policies/{}", policy.name), policy).await
    }

    /// Deletes a policy that is attached to nothing.
    pub async fn delete_policy(&self, name: &Name) -> Result<(), ApiError> {
        self.0.delete(&format!("/policies/{name}")).await
    }

    /// The policy that applies to a VM where a request says none.
    pub async fn vm_policy(&self, vm: &str) -> Result<AppliedPolicy, ApiError> {
        self.0.get(&format!("/vms/{vm}/policy")).await
    }

    /// Attaches a policy to a VM, or takes it away.
    pub async fn attach_vm_policy(
        &self,
        vm: &str,
        attach: &AttachPolicy,
    ) -> Result<AppliedPolicy, ApiError> {
        self.0.put(&format!("/vms/{vm}/policy"), attach).await
    }

    /// The policy that applies where neither a request nor a VM says one.
    pub async fn pool_policy(&self) -> Result<AppliedPolicy, ApiError> {
        self.0.get("/pool/policy").await
    }

    /// Attaches a policy to the pool, or takes it away.
    pub async fn attach_pool_policy(
        &self,
        attach: &AttachPolicy,
    ) -> Result<AppliedPolicy, ApiError> {
        self.0.put("/pool/policy", attach).await
    }

    /// Saves a VM's whole state to a file in a storage; it is stopped then.
    pub async fn save_vm(&self, vm: &str, to: &StateFile) -> Result<Vm, ApiError> {
        self.state(&format!("/vms/{vm}/save"), to).await
    }

    /// Restores a stopped VM from a file in a storage.
    pub async fn restore_vm(&self, vm: &str, from: &StateFile) -> Result<Vm, ApiError> {
        self.state(&format!("/vms/{vm}/restore"), from).await
    }

    async fn state(&self, path: &str, file: &StateFile) -> Result<Vm, ApiError> {
        let within = Duration::from_secs(STATE_SECONDS);
        self.0.call(Method::POST, path, Some(file), Some(within)).await
    }
}
