//! The agent API's calls.

mod lineage;
mod measuring;
mod moving;

use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use whimbrel_migration::names::{MigrationId, Name, VmId};
use whimbrel_pki::authority::HostCertificates;

use super::{Caller, Console, EventStream, Target};
use crate::ApiError;
use crate::agent::{
    CertificateRequests, Handoff, HostReport, IncomingOffer, IncomingReport, IncomingRequest,
    KnockAddress, KnockConnect, KnockListen, Mobility, OutgoingReport, OutgoingRequest, Reach,
    SharedToken, StorageReport, Superseded, SupersededReport, TokenSeen, VmReport,
};
use crate::migration::ReclaimRequest;
use crate::pool::{Network, Storage};
use crate::vm::{StopRequest, VmAction, VmDefinition};

/// How long creating a VM's disks may take, in seconds: an import copies a whole image.
const CREATE_SECONDS: u64 = 3600;
/// How long one handoff message may wait for its answer, in seconds; after that it is sent again.
const HANDOFF_SECONDS: u64 = 5;

/// A host's agent.
#[derive(Debug, Clone)]
pub struct AgentClient(Caller);

impl AgentClient {
    /// The agent of `host` at `address` (`address:port`), spoken to with the certificate in `tls`.
    pub fn new(
        host: &Name,
        address: &str,
        tls: Arc<rustls::ClientConfig>,
    ) -> Result<Self, ApiError> {
        let name = whimbrel_pki::identity::agent_dns_name(host.as_ref());
        Caller::new(Target::Tcp(address.to_owned()), name, tls).map(Self)
    }

    /// What the host says of itself.
    pub async fn host(&self) -> Result<HostReport, ApiError> {
        self.0.get("/host").await
    }

    /// What the host wants certified when its certificates are renewed.
    pub async fn certificate_requests(&self) -> Result<CertificateRequests, ApiError> {
        self.0.get("/certificates").await
    }

    /// Gives the host new certificates for its keys.
    pub async fn put_certificates(&self, renewed: &HostCertificates) -> Result<(), ApiError> {
        self.0.put("/certificates", renewed).await
    }

    /// Makes a network's bridge.
    pub async fn put_network(&self, network: &Network) -> Result<(), ApiError> {
        self.0.put(&format!("/networks/{}", network.name), network).await
    }

    /// Takes a network's bridge down.
    pub async fn delete_network(&self, name: &Name) -> Result<(), ApiError> {
        self.0.delete(&format!("/networks/{name}")).await
    }

    /// Makes a storage known.
    pub async fn put_storage(&self, storage: &Storage) -> Result<StorageReport, ApiError> {
        self.0.put(&format!("/storages/{}", storage.name), storage).await
    }

    /// Forgets a storage (its files stay).
    pub async fn delete_storage(&self, name: &Name) -> Result<(), ApiError> {
        self.0.delete(&format!("/storages/{name}")).await
    }

    /// Writes a token into a storage.
    pub async fn write_token(&self, name: &Name) -> Result<SharedToken, ApiError> {
        self.0.post(&format!("/storages/{name}/token"), &serde_json::json!({})).await
    }

    /// Whether a token that another host wrote is seen; the last one to ask may remove it.
    pub async fn token_seen(
        &self,
        name: &Name,
        token: &SharedToken,
    ) -> Result<TokenSeen, ApiError> {
        self.0.post(&format!("/storages/{name}/seen"), token).await
    }

    /// All VMs that the host has a record of owning.
    pub async fn vms(&self) -> Result<Vec<VmReport>, ApiError> {
        self.0.get("/vms").await
    }

    /// One VM.
    pub async fn vm(&self, id: VmId) -> Result<VmReport, ApiError> {
        self.0.get(&format!("/vms/{id}")).await
    }

    /// What matters to whoever wants to move the VM.
    pub async fn mobility(&self, id: VmId) -> Result<Mobility, ApiError> {
        self.0.get(&format!("/vms/{id}/mobility")).await
    }

    /// Creates a VM with its disks; the answer has the machine type pinned.
    pub async fn put_vm(&self, definition: &VmDefinition) -> Result<VmReport, ApiError> {
        let path = format!("/vms/{}", definition.id);
        self.0
            .call(Method::PUT, &path, Some(definition), Some(Duration::from_secs(CREATE_SECONDS)))
            .await
    }

    /// Starts, pauses or resumes a VM.
    pub async fn vm_action(&self, id: VmId, action: VmAction) -> Result<VmReport, ApiError> {
        self.0.post(&format!("/vms/{id}/{}", action.as_str()), &serde_json::json!({})).await
    }

    /// Stops a VM.
    pub async fn stop_vm(&self, id: VmId, request: &StopRequest) -> Result<VmReport, ApiError> {
        self.0.post(&format!("/vms/{id}/stop"), request).await
    }

    /// Deletes a stopped VM with its disks.
    pub async fn delete_vm(&self, id: VmId) -> Result<(), ApiError> {
        self.0.delete(&format!("/vms/{id}")).await
    }

    /// Opens a VM's console.
    pub async fn console(&self, id: VmId) -> Result<Console, ApiError> {
        Console::open(&self.0, &format!("/vms/{id}/console")).await
    }

    /// Lets the destination listen for a knock.
    pub async fn knock_listen(&self, request: &KnockListen) -> Result<KnockAddress, ApiError> {
        self.0.post("/knock/listen", request).await
    }

    /// Lets the source knock.
    pub async fn knock_connect(&self, request: &KnockConnect) -> Result<Reach, ApiError> {
        self.0.post("/knock/connect", request).await
    }

    /// Prepares the destination. Repeating it gives the same offer.
    pub async fn put_incoming(
        &self,
        id: MigrationId,
        request: &IncomingRequest,
    ) -> Result<IncomingOffer, ApiError> {
        self.0.put(&format!("/incoming/{id}"), request).await
    }

    /// How the destination's side is.
    pub async fn incoming(&self, id: MigrationId) -> Result<IncomingReport, ApiError> {
        self.0.get(&format!("/incoming/{id}")).await
    }

    /// Abandons the destination's side before GO, or lets it forget an ended one. The answer says how it is.
    pub async fn delete_incoming(&self, id: MigrationId) -> Result<IncomingReport, ApiError> {
        self.0.delete(&format!("/incoming/{id}")).await
    }

    /// Delivers a message of the handoff and brings the answer.
    pub async fn handoff(&self, id: MigrationId, message: &Handoff) -> Result<Handoff, ApiError> {
        let path = format!("/incoming/{id}/handoff");
        self.0
            .call(Method::POST, &path, Some(message), Some(Duration::from_secs(HANDOFF_SECONDS)))
            .await
    }

    /// Starts the source's side. Repeating it is harmless.
    pub async fn put_outgoing(
        &self,
        id: MigrationId,
        request: &OutgoingRequest,
    ) -> Result<OutgoingReport, ApiError> {
        self.0.put(&format!("/outgoing/{id}"), request).await
    }

    /// How the source's side is.
    pub async fn outgoing(&self, id: MigrationId) -> Result<OutgoingReport, ApiError> {
        self.0.get(&format!("/outgoing/{id}")).await
    }

    /// Follows the source's side to its end.
    pub async fn watch_outgoing(
        &self,
        id: MigrationId,
    ) -> Result<EventStream<OutgoingReport>, ApiError> {
        EventStream::open(&self.0, &format!("/outgoing/{id}/watch")).await
    }

    /// Cancels; `handed-over` once the guest has been given away.
    pub async fn cancel_outgoing(&self, id: MigrationId) -> Result<OutgoingReport, ApiError> {
        self.0.post(&format!("/outgoing/{id}/cancel"), &serde_json::json!({})).await
    }

    /// Takes a VM back from a destination that never returns, by an operator's word.
    pub async fn reclaim_outgoing(
        &self,
        id: MigrationId,
        request: &ReclaimRequest,
    ) -> Result<OutgoingReport, ApiError> {
        self.0.post(&format!("/outgoing/{id}/reclaim"), request).await
    }

    /// Tells a destination that the VM was taken back from it.
    pub async fn superseded(
        &self,
        id: MigrationId,
        said: &Superseded,
    ) -> Result<SupersededReport, ApiError> {
        self.0.post(&format!("/incoming/{id}/superseded"), said).await
    }

    /// Brings the source an answer that the direct way did not bring.
    pub async fn relay_answer(
        &self,
        id: MigrationId,
        answer: &Handoff,
    ) -> Result<OutgoingReport, ApiError> {
        self.0.post(&format!("/outgoing/{id}/handoff"), answer).await
    }

    /// Retires the source's side: placement has moved.
    pub async fn delete_outgoing(&self, id: MigrationId) -> Result<(), ApiError> {
        self.0.delete(&format!("/outgoing/{id}")).await
    }
}
