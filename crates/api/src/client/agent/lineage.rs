//! The agent API's calls about templates and snapshots. A clone is created as any other VM.

use std::time::Duration;

use reqwest::Method;
use whimbrel_migration::names::{Name, VmId};

use super::AgentClient;
use crate::ApiError;
use crate::agent::VmReport;
use crate::lineage::{SetTemplate, TakeSnapshot};

/// How long deleting a snapshot may take, in seconds: images are merged.
const MERGE_SECONDS: u64 = 3600;

impl AgentClient {
    /// Makes a stopped VM a template, or a template a VM again.
    pub async fn set_template(
        &self,
        id: VmId,
        request: &SetTemplate,
    ) -> Result<VmReport, ApiError> {
        self.0.put(&format!("/vms/{id}/template"), request).await
    }

    /// Takes a snapshot.
    pub async fn take_snapshot(
        &self,
        id: VmId,
        request: &TakeSnapshot,
    ) -> Result<VmReport, ApiError> {
        self.0.post(&format!("/vms/{id}/snapshots"), request).await
    }

    /// Lets a VM go on from a snapshot.
    pub async fn revert(&self, id: VmId, to: &Name) -> Result<VmReport, ApiError> {
        let path = format!("/vms/{id}/snapshots/{to}/revert");
        self.0.post(&path, &serde_json::json!({})).await
    }

    /// Deletes a snapshot on which no clone stands.
    pub async fn delete_snapshot(&self, id: VmId, name: &Name) -> Result<VmReport, ApiError> {
        let path = format!("/vms/{id}/snapshots/{name}");
        let within = Some(Duration::from_secs(MERGE_SECONDS));
        self.0.call(Method::DELETE, &path, None::<&()>, within).await
    }
}
