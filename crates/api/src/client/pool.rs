//! The public API's calls.

use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use whimbrel_migration::names::{MigrationId, Name};

use super::{Caller, Console, EventStream, Target};
use crate::ApiError;
use crate::event::Event;
use crate::migration::{MigrateRequest, Migration, MigrationEvent};
use crate::pool::{
    Host, HostPatch, JoinAnswer, JoinRequest, JoinToken, Network, NewJoinToken, Storage,
    StorageStatus,
};
use crate::vm::{CreateVm, StopRequest, Vm, VmAction};

/// How long creating a VM may take, in seconds: an import copies a whole image.
const CREATE_SECONDS: u64 = 3600;

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
}
