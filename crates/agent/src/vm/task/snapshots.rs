//! Templates, snapshots and clones of a stopped VM.
//!
//! ```text
//!  take, revert:  journal the new images ─► make them ─► the row names them ─► clear the journal
//!  delete:        journal what is not needed any more ─► the row names it no more ─► remove it ─► clear the journal
//! ```
//!
//! The row in the ledger alone says which images are the VM's, at every moment: whenever the agent dies, the sweep removes what the
//! journal names and the row does not. Nothing is copied but the UEFI variables, and what is merged after a deletion: merging
//! writes into a layer that reads the same before and after, with the image above it, so that it may break off at any point.
//!
//! How definitions change is in [`lineage`].

use std::collections::BTreeSet;

use jiff::Timestamp;
use uuid::Uuid;
use whimbrel_api::agent::VmReport;
use whimbrel_api::error::chain as words;
use whimbrel_api::lineage::{Layer, SNAPSHOTS_MAX, chain, is_own, stands_on};
use whimbrel_api::vm::{Boot, Firmware, ImageFormat, StoragePath, VmDefinition};
use whimbrel_api::{ApiError, ErrorCode, Name};

use super::super::create::{self, disks};
use super::super::lineage::{self, Overlays};
use super::super::order::ImageChange;
use super::super::spawn;
use super::{State, Task};
use crate::ledger::Resource;
use crate::storage::image::ImageTool;
use crate::storage::vm_folder;

/// Hexadecimal digits that tell the images of a disk apart.
const IMAGE_DIGITS: usize = 8;

impl Task {
    pub(super) async fn change_images(&mut self, change: ImageChange) -> Result<(), ApiError> {
        match change {
            ImageChange::Template(template) => self.set_template(template).await,
            ImageChange::Take(name) => self.take_snapshot(&name).await,
            ImageChange::Revert(to) => self.revert(&to).await,
            ImageChange::DeleteSnapshot(name) => self.delete_snapshot(&name).await,
        }
    }

    /// Makes the VM a template, or a VM again. The caller knows that no clone stands on it.
    async fn set_template(&mut self, template: bool) -> Result<(), ApiError> {
        if self.definition.template == template {
            return Ok(());
        }
        self.still().await?;
        if !template {
            self.refuse_if_stood_on()?;
        }
        self.note_definition(lineage::as_template(&self.definition, template)).await
    }

    /// Takes a snapshot: what the disks are now is never written again, and they go on in new images.
    async fn take_snapshot(&mut self, name: &Name) -> Result<(), ApiError> {
        self.still().await?;
        self.refuse_if_template()?;
        let vm = &self.definition;
        if vm.snapshots.iter().any(|snapshot| snapshot.name == *name) {
            let message = format!("VM `{}` has a snapshot `{name}` already", vm.name);
            return Err(ApiError::new(ErrorCode::Exists, message));
        }
        if vm.snapshots.len() >= SNAPSHOTS_MAX {
            let message =
                format!("VM `{}` has {SNAPSHOTS_MAX} snapshots, the most it can", vm.name);
            return Err(ApiError::new(ErrorCode::OutOfRange, message));
        }
        let now: Vec<NewImage> = lineage::written(vm)
            .map(|disk| NewImage {
                disk: disk.name.clone(),
                file: new_path(vm, &disk.name, &disk.file.storage),
                size_bytes: disk.size_bytes,
                below: lineage::images(disk).into_iter().next(),
            })
            .collect();
        let kept = self.variables().map(|used| StoragePath {
            path: format!("{}/ovmf-variables-{}.raw", vm_folder(vm.id), digits()),
            ..used
        });
        let overlays = overlays(&now);
        let changed = lineage::taken(vm, name, Timestamp::now(), &overlays, kept.clone());
        let variables = self.variables().zip(kept);
        self.change(changed, now, variables).await?;
        tracing::info!(vm = %self.definition.name, snapshot = %name, "a snapshot was taken");
        Ok(())
    }

    /// Lets the disks go on from a snapshot. What was written since the last one is lost.
    async fn revert(&mut self, to: &Name) -> Result<(), ApiError> {
        self.still().await?;
        self.refuse_if_template()?;
        let vm = &self.definition;
        let snapshot = lineage::find(vm, to)?.clone();
        let storage = |disk: &Name| {
            let now = vm.disks.iter().find(|found| found.name == *disk);
            now.map(|found| found.file.storage.clone())
        };
        let now: Vec<NewImage> = snapshot
            .disks
            .iter()
            .filter_map(|was| {
                Some(NewImage {
                    disk: was.name.clone(),
                    file: new_path(vm, &was.name, &storage(&was.name)?),
                    size_bytes: was.size_bytes,
                    below: chain(vm, to, &was.name).into_iter().next(),
                })
            })
            .collect();
        let changed = lineage::reverted(vm, &snapshot, &overlays(&now));
        self.change(changed, now, None).await?;
        if let Some((used, kept)) = self.variables().zip(snapshot.variables) {
            self.put_variables_back(&kept, used).await?;
        }
        tracing::info!(vm = %self.definition.name, snapshot = %to, "went back to a snapshot");
        Ok(())
    }

    /// Deletes a snapshot, and merges what only the VM itself needs any more.
    async fn delete_snapshot(&mut self, name: &Name) -> Result<(), ApiError> {
        self.still().await?;
        self.refuse_if_template()?;
        lineage::find(&self.definition, name)?;
        self.change(lineage::without(&self.definition, name), Vec::new(), None).await?;
        tracing::info!(vm = %self.definition.name, snapshot = %name, "a snapshot was deleted");
        while let Some(disk) = lineage::mergeable(&self.definition).cloned() {
            if let Err(error) = self.merge(&disk.name, lineage::images(&disk)).await {
                // The snapshot is gone all the same; its room is not free yet.
                tracing::warn!(vm = %self.definition.name, disk = %disk.name, %error, "two images were not merged; the next deletion tries again");
                break;
            }
        }
        Ok(())
    }

    /// Makes a clone of this VM, which stands still meanwhile: its orders wait.
    pub(super) async fn clone_as(&mut self, asked: VmDefinition) -> Result<VmReport, ApiError> {
        self.still().await?;
        create::make(&self.host, asked, Some(&self.definition)).await
    }

    /// A template is what its clones were made from, for ever.
    pub(super) fn refuse_if_template(&self) -> Result<(), ApiError> {
        if !self.definition.template {
            return Ok(());
        }
        let name = &self.definition.name;
        Err(ApiError::new(ErrorCode::WrongState, format!("VM `{name}` is a template"))
            .hint(format!("`whimbrel vm clone {name} NAME` makes a VM of it")))
    }

    /// No VM of this host stands on this one's images. The controller has asked the same of the whole pool.
    pub(super) fn refuse_if_stood_on(&self) -> Result<(), ApiError> {
        let vm = self.definition.id;
        let on = self
            .host
            .vms
            .names_where(|other| other.id != vm && stands_on(other, vm).next().is_some());
        if on.is_empty() {
            return Ok(());
        }
        let on: Vec<&str> = on.iter().map(Name::as_str).collect();
        let message =
            format!("on VM `{}` stand linked clones: {}", self.definition.name, on.join(", "));
        Err(ApiError::new(ErrorCode::InUse, message))
    }

    /// The VM is stopped, this host's, and nothing waits to go on from its disks as they are.
    async fn still(&mut self) -> Result<(), ApiError> {
        if !matches!(self.state, State::Stopped | State::Crashed { .. }) {
            return Err(self.refuse("stopped"));
        }
        self.own().await?;
        self.refuse_if_saved()
    }

    /// Changes which images the VM has: makes the new ones, has the row name them, and removes what it names no more. On failure
    /// the VM is as before.
    async fn change(
        &mut self,
        changed: VmDefinition,
        new: Vec<NewImage>,
        variables: Option<(StoragePath, StoragePath)>,
    ) -> Result<(), ApiError> {
        let vm = self.definition.id;
        crate::validate::definition(&changed)?;
        let owner = format!("images of {vm}");
        let _alone = self.host.in_hand.wait_alone(&owner).await?;
        let (before, after) = (lineage::own_files(&self.definition), lineage::own_files(&changed));
        let touched = before.symmetric_difference(&after).cloned();
        let journal: Vec<Resource> = touched.map(|file| Resource::Layer { vm, file }).collect();
        self.host.ledger.journal(&owner, &journal).await?;
        let noted = async {
            self.make(&new, variables).await?;
            self.host.failpoints.hit("vm.images.note").await?;
            self.note_definition(changed).await
        };
        let noted = noted.await;
        let unneeded: BTreeSet<StoragePath> = match &noted {
            Ok(()) => before.difference(&after).cloned().collect(),
            Err(_) => after.difference(&before).cloned().collect(),
        };
        match self.remove(unneeded).await {
            Ok(()) => self.host.ledger.unjournal(&owner).await?,
            Err(error) => {
                tracing::warn!(vm = %self.definition.name, %error, "an image that is not needed is left to the next sweep");
            }
        }
        noted
    }

    async fn make(
        &self,
        new: &[NewImage],
        variables: Option<(StoragePath, StoragePath)>,
    ) -> Result<(), ApiError> {
        let (host, vm) = (&self.host, self.definition.id);
        let tool = self.tool()?;
        for image in new {
            let Some(below) = image.below.clone() else { continue };
            let (paths, _) = disks::found(host, vec![below]).await?;
            let Some((path, format)) = paths.first() else { continue };
            let file = disks::new_file(host, vm, &image.file).await?;
            tool.create_on(file, image.size_bytes, (path, *format)).await?;
        }
        if let Some((from, to)) = variables {
            let (paths, _) = disks::found(host, vec![raw(from)]).await?;
            let from = paths.into_iter().next().map(|(path, _)| path).unwrap_or_default();
            disks::copy_small(host, vm, from, &to).await?;
        }
        let folders = new.iter().map(|image| &image.file);
        for file in folders {
            disks::sync_folder(host, vm, file).await?;
        }
        Ok(())
    }

    /// The variables in use are one file for ever, beside the first disk; their content is the snapshot's again.
    async fn put_variables_back(
        &self,
        kept: &StoragePath,
        used: StoragePath,
    ) -> Result<(), ApiError> {
        let (host, vm) = (&self.host, self.definition.id);
        let (paths, _) = disks::found(host, vec![raw(kept.clone())]).await?;
        let from = paths.into_iter().next().map(|(path, _)| path).unwrap_or_default();
        self.remove(BTreeSet::from([used.clone()])).await?;
        disks::copy_small(host, vm, from, &used).await
    }

    async fn merge(&mut self, disk: &Name, images: Vec<Layer>) -> Result<(), ApiError> {
        let (paths, _) = disks::found(&self.host, images).await?;
        self.tool()?.merge_down(&paths).await?;
        self.change(lineage::merged(&self.definition, disk), Vec::new(), None).await
    }

    async fn remove(&self, files: BTreeSet<StoragePath>) -> Result<(), ApiError> {
        let (at, vm) = (std::sync::Arc::clone(&self.host), self.definition.id);
        let removing = self.host.storages.aside(move |aside| {
            for file in files.iter().filter(|file| is_own(vm, file)) {
                at.storages.folder(aside, &file.storage)?.remove_file(&file.path)?;
            }
            Ok(())
        });
        removing.await
    }

    async fn note_definition(&mut self, definition: VmDefinition) -> Result<(), ApiError> {
        if let Err(error) = self.host.ledger.set_definition(&definition).await {
            // Whether it is on the disk is not known: only the old one is true for sure once it is written again.
            if let Err(again) = self.host.ledger.set_definition(&self.definition).await {
                tracing::error!(vm = %self.definition.name, error = words(&again), "the ledger may name images that are not there");
            }
            return Err(error.into());
        }
        self.definition = definition;
        Ok(())
    }

    fn tool(&self) -> Result<ImageTool, ApiError> {
        let engine = self.host.engine_for(&self.definition.machine)?;
        Ok(ImageTool::beside(&engine.binary, self.host.qemu_user()))
    }

    /// The file of UEFI variables that the VM uses, if it has one.
    fn variables(&self) -> Option<StoragePath> {
        let has = self.definition.boot == Boot::Firmware(Firmware::Ovmf);
        has.then(|| spawn::variables_file(&self.definition).ok()).flatten()
    }
}

/// An image that a disk is to go on in.
struct NewImage {
    disk: Name,
    file: StoragePath,
    size_bytes: u64,
    below: Option<Layer>,
}

fn overlays(new: &[NewImage]) -> Overlays {
    new.iter().map(|image| (image.disk.clone(), image.file.clone())).collect()
}

fn raw(file: StoragePath) -> Layer {
    Layer { file, format: ImageFormat::Raw }
}

fn new_path(vm: &VmDefinition, disk: &Name, storage: &Name) -> StoragePath {
    let path = format!("{}/{disk}-{}.qcow2", vm_folder(vm.id), digits());
    StoragePath { storage: storage.clone(), path }
}

fn digits() -> String {
    let mut digits = Uuid::new_v4().simple().to_string();
    digits.truncate(IMAGE_DIGITS);
    digits
}
