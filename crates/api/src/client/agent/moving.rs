//! What can be asked of a running migration's two sides, and the saving of a VM's state.

use std::time::Duration;

use reqwest::Method;
use whimbrel_migration::names::{MigrationId, VmId};

use super::AgentClient;
use crate::ApiError;
use crate::agent::{
    IncomingStatistics, ListenAgain, NewAddress, OutgoingReport, RecoverOrder, VmReport,
};
use crate::migration::{LiveSettings, MigrationAction, MigrationStatistics};
use crate::vm::StateFile;

/// How long saving or restoring a VM's state may take, in seconds: as long as its memory takes to a disk.
const STATE_SECONDS: u64 = 3600;

impl AgentClient {
    /// What only the destination's QEMU knows of a migration.
    pub async fn incoming_statistics(
        &self,
        id: MigrationId,
    ) -> Result<IncomingStatistics, ApiError> {
        self.0.get(&format!("/incoming/{id}/statistics")).await
    }

    /// Lets a destination whose post-copy is paused listen anew.
    pub async fn listen_again(
        &self,
        id: MigrationId,
        request: &ListenAgain,
    ) -> Result<NewAddress, ApiError> {
        self.0.post(&format!("/incoming/{id}/recover"), request).await
    }

    /// What was seen of the source's side over time.
    pub async fn outgoing_statistics(
        &self,
        id: MigrationId,
    ) -> Result<MigrationStatistics, ApiError> {
        self.0.get(&format!("/outgoing/{id}/statistics")).await
    }

    /// Changes a running migration.
    pub async fn put_outgoing_settings(
        &self,
        id: MigrationId,
        settings: &LiveSettings,
    ) -> Result<OutgoingReport, ApiError> {
        self.0.put(&format!("/outgoing/{id}/settings"), settings).await
    }

    /// Orders something of a running migration; `wrong-state` where it does not fit.
    pub async fn outgoing_action(
        &self,
        id: MigrationId,
        action: MigrationAction,
    ) -> Result<OutgoingReport, ApiError> {
        let path = format!("/outgoing/{id}/{}", action.as_str());
        self.0.post(&path, &serde_json::json!({})).await
    }

    /// Lets a source whose post-copy is paused connect again.
    pub async fn recover_outgoing(
        &self,
        id: MigrationId,
        order: &RecoverOrder,
    ) -> Result<OutgoingReport, ApiError> {
        self.0.post(&format!("/outgoing/{id}/recover"), order).await
    }

    /// Saves a VM's whole state to a file; it is stopped then.
    pub async fn save_vm(&self, id: VmId, to: &StateFile) -> Result<VmReport, ApiError> {
        self.state(&format!("/vms/{id}/save"), to).await
    }

    /// Restores a stopped VM from a file, and lets it run as it did when it was saved.
    pub async fn restore_vm(&self, id: VmId, from: &StateFile) -> Result<VmReport, ApiError> {
        self.state(&format!("/vms/{id}/restore"), from).await
    }

    async fn state(&self, path: &str, file: &StateFile) -> Result<VmReport, ApiError> {
        self.0.call(Method::POST, path, Some(file), Some(Duration::from_secs(STATE_SECONDS))).await
    }
}
