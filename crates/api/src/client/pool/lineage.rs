//! The public API's calls about templates, clones, snapshots and default storages.

use std::time::Duration;

use reqwest::Method;
use whimbrel_migration::names::Name;

use super::PoolClient;
use crate::ApiError;
use crate::lineage::{CloneVm, SetTemplate, TakeSnapshot};
use crate::pool::{SetStorageDefaults, StorageDefaults, StorageStatus};
use crate::vm::Vm;

/// How long work on images may take, in seconds: a full clone copies, and a deleted snapshot is merged.
const IMAGES_SECONDS: u64 = 3600;

impl PoolClient {
    /// Makes a stopped VM a template, or a template a VM again.
    pub async fn set_template(&self, vm: &str, request: &SetTemplate) -> Result<Vm, ApiError> {
        self.0.put(&format!("/vms/{vm}/template"), request).await
    }

    /// Clones a VM, a template or a snapshot; the answer is the new VM.
    pub async fn clone_vm(&self, vm: &str, request: &CloneVm) -> Result<Vm, ApiError> {
        self.on_images(Method::POST, &format!("/vms/{vm}/clone"), Some(request)).await
    }

    /// Takes a snapshot of a VM.
    pub async fn take_snapshot(&self, vm: &str, request: &TakeSnapshot) -> Result<Vm, ApiError> {
        self.0.post(&format!("/vms/{vm}/snapshots"), request).await
    }

    /// Lets a VM go on from a snapshot; what its disks have become since is lost.
    pub async fn revert(&self, vm: &str, to: &Name) -> Result<Vm, ApiError> {
        let path = format!("/vms/{vm}/snapshots/{to}/revert");
        self.0.post(&path, &serde_json::json!({})).await
    }

    /// Deletes a snapshot.
    pub async fn delete_snapshot(&self, vm: &str, name: &Name) -> Result<Vm, ApiError> {
        self.on_images(Method::DELETE, &format!("/vms/{vm}/snapshots/{name}"), None::<&()>).await
    }

    /// One storage.
    pub async fn storage(&self, name: &Name) -> Result<StorageStatus, ApiError> {
        self.0.get(&format!("/storages/{name}")).await
    }

    /// Which storages are used where none is named.
    pub async fn storage_defaults(&self) -> Result<StorageDefaults, ApiError> {
        self.0.get("/storage-defaults").await
    }

    /// Says which storages are used where none is named.
    pub async fn set_storage_defaults(
        &self,
        request: &SetStorageDefaults,
    ) -> Result<StorageDefaults, ApiError> {
        self.0.put("/storage-defaults", request).await
    }

    async fn on_images<B: serde::Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<Vm, ApiError> {
        self.0.call(method, path, body, Some(Duration::from_secs(IMAGES_SECONDS))).await
    }
}
