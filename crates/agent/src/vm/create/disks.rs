//! The disks of a new VM: where each one's content comes from, found out before anything is made, and then made.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use whimbrel_api::lineage::{Layer, chain};
use whimbrel_api::vm::{Disk, ImageFormat, StoragePath, VmDefinition};
use whimbrel_api::{ApiError, ErrorCode, VmId};

use super::super::lineage::images;
use crate::host::Host;
use crate::storage::image::{ImageFacts, ImageTool, SECTOR_BYTES};
use crate::storage::space::Wanted;
use crate::storage::vm_folder;

/// Where a new disk's content comes from.
#[derive(Debug)]
pub(super) enum Source {
    /// Nowhere.
    New,
    /// A copy of an image that a user has named.
    Image { file: std::fs::File, format: ImageFormat, facts: ImageFacts },
    /// A copy of another VM's disk, with all that it stands on.
    Copy { images: Vec<(PathBuf, ImageFormat)>, bytes: u64 },
    /// It stands on another VM's disk.
    On { path: PathBuf, format: ImageFormat },
}

impl Source {
    /// How much the new disk will occupy at most, in bytes, as far as it is known beforehand: new images are sparse, and need
    /// room for what is written, not for what they promise.
    fn bytes(&self) -> u64 {
        match self {
            Self::New | Self::On { .. } => 0,
            Self::Image { facts, .. } => facts.occupied_bytes.min(facts.virtual_bytes),
            Self::Copy { bytes, .. } => *bytes,
        }
    }
}

/// The images that a clone's disk is made from, or stands on, the one with the latest data first.
pub(super) fn of_parent(
    parent: &VmDefinition,
    definition: &VmDefinition,
    disk: &Disk,
) -> Vec<Layer> {
    let snapshot = definition.origin.as_ref().and_then(|origin| origin.snapshot.as_ref());
    let frozen = snapshot.map(|name| chain(parent, name, &disk.name)).unwrap_or_default();
    if !frozen.is_empty() {
        return frozen;
    }
    // No snapshot is meant, or the disk is only read and in none.
    let own = parent.disks.iter().find(|found| found.name == disk.name);
    own.map(images).unwrap_or_default()
}

/// Finds out where each disk's content comes from, and looks at images that come from outside. Nothing is changed.
pub(super) async fn sources(
    host: &Arc<Host>,
    tool: &ImageTool,
    definition: &VmDefinition,
    parent: Option<&VmDefinition>,
) -> Result<Vec<Source>, ApiError> {
    let mut sources = Vec::new();
    for disk in &definition.disks {
        sources.push(match (&disk.import, parent) {
            (_, Some(parent)) => from_parent(host, definition, parent, disk).await?,
            (Some(_), None) => from_image(host, tool, disk).await?,
            (None, None) => Source::New,
        });
    }
    Ok(sources)
}

/// What the disks need room for.
pub(super) fn wanted(definition: &VmDefinition, sources: &[Source]) -> Vec<Wanted> {
    let disks = definition.disks.iter().zip(sources);
    disks.map(|(disk, source)| Wanted { file: disk.file.clone(), bytes: source.bytes() }).collect()
}

async fn from_image(host: &Arc<Host>, tool: &ImageTool, disk: &Disk) -> Result<Source, ApiError> {
    let Some(import) = &disk.import else { return Ok(Source::New) };
    let (at, from) = (Arc::clone(host), import.file.clone());
    let opening = host
        .storages
        .aside(move |aside| Ok(at.storages.folder(aside, &from.storage)?.open_file(&from.path)?));
    let file = opening.await?;
    let facts = tool.inspect(&file, &import.file.to_string(), import.format).await?;
    if disk.size_bytes != 0 && disk.size_bytes < facts.virtual_bytes {
        let message = format!(
            "disk `{}` would have {} bytes, but the image to import has {}",
            disk.name, disk.size_bytes, facts.virtual_bytes
        );
        return Err(ApiError::new(ErrorCode::OutOfRange, message));
    }
    Ok(Source::Image { file, format: import.format, facts })
}

async fn from_parent(
    host: &Arc<Host>,
    definition: &VmDefinition,
    parent: &VmDefinition,
    disk: &Disk,
) -> Result<Source, ApiError> {
    let images = of_parent(parent, definition, disk);
    let (paths, occupied_bytes) = found(host, images).await?;
    let linked = definition.origin.as_ref().is_some_and(|origin| origin.linked);
    if !linked {
        return Ok(Source::Copy { images: paths, bytes: occupied_bytes.min(disk.size_bytes) });
    }
    let Some((path, format)) = paths.into_iter().next() else {
        let message = format!("disk `{}` of VM `{}` has no image", disk.name, parent.name);
        return Err(ApiError::new(ErrorCode::Internal, message));
    };
    Ok(Source::On { path, format })
}

/// Where images are on this host, and what they occupy together, in bytes.
pub(in crate::vm) async fn found(
    host: &Arc<Host>,
    images: Vec<Layer>,
) -> Result<(Vec<(PathBuf, ImageFormat)>, u64), ApiError> {
    let at = Arc::clone(host);
    let looking = host.storages.aside(move |aside| {
        let (mut paths, mut bytes) = (Vec::new(), 0_u64);
        for Layer { file, format } in images {
            paths.push((at.storages.existing_file(aside, &file)?, format));
            let folder = at.storages.folder(aside, &file.storage)?;
            bytes = bytes.saturating_add(folder.occupied_bytes(&file.path)?);
        }
        Ok((paths, bytes))
    });
    looking.await
}

/// Makes one disk; returns the size that the guest sees, in bytes.
pub(super) async fn make(
    host: &Arc<Host>,
    tool: &ImageTool,
    vm: VmId,
    disk: &Disk,
    source: Source,
) -> Result<u64, ApiError> {
    let file = new_file(host, vm, &disk.file).await?;
    match source {
        Source::New => {
            tool.create(file, disk.format, disk.size_bytes).await?;
            Ok(disk.size_bytes)
        }
        Source::Image { file: image, format, facts } => {
            let size_bytes =
                if disk.size_bytes == 0 { facts.virtual_bytes } else { disk.size_bytes };
            let grow = (size_bytes > facts.virtual_bytes).then_some(size_bytes);
            tool.copy(image, format, file, disk.format, grow).await?;
            Ok(size_bytes.next_multiple_of(SECTOR_BYTES))
        }
        Source::Copy { images, .. } => {
            tool.flatten(&images, file, disk.format).await?;
            Ok(disk.size_bytes)
        }
        Source::On { path, format } => {
            tool.create_on(file, disk.size_bytes, (&path, format)).await?;
            Ok(disk.size_bytes)
        }
    }
}

/// Makes the empty file of an image in the VM's folder.
pub(in crate::vm) async fn new_file(
    host: &Arc<Host>,
    vm: VmId,
    file: &StoragePath,
) -> Result<std::fs::File, ApiError> {
    let (at, file) = (Arc::clone(host), file.clone());
    let making = host.storages.aside(move |aside| {
        let folder = at.storages.folder(aside, &file.storage)?;
        folder.create_folders(&vm_folder(vm))?;
        Ok(folder.create_file(&file.path, at.qemu_user())?)
    });
    making.await
}

/// Makes durable that files are in a VM's folder.
pub(in crate::vm) async fn sync_folder(
    host: &Arc<Host>,
    vm: VmId,
    file: &StoragePath,
) -> Result<(), ApiError> {
    let (at, storage) = (Arc::clone(host), file.storage.clone());
    let syncing = host.storages.aside(move |aside| {
        Ok(at.storages.folder(aside, &storage)?.sync_folder(&vm_folder(vm))?)
    });
    syncing.await
}

/// Copies a small file (UEFI variables) to a new one of QEMU's.
pub(in crate::vm) async fn copy_small(
    host: &Arc<Host>,
    vm: VmId,
    from: impl AsRef<Path> + Send + 'static,
    to: &StoragePath,
) -> Result<(), ApiError> {
    let mut file = new_file(host, vm, to).await?;
    let copying = host.storages.aside(move |_| {
        let failed = |error: std::io::Error| {
            ApiError::internal("the UEFI variables were not copied", &error)
        };
        let mut source = std::fs::File::open(from).map_err(failed)?;
        std::io::copy(&mut source, &mut file).map_err(failed)?;
        file.sync_all().map_err(failed)
    });
    copying.await
}
