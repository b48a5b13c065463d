//! The host's storages: named folders, in which every path is opened beneath the folder.
//!
//! A storage's files are reached through [`beneath::Folder`], which neither leaves the folder nor follows a link. Images
//! are made, copied and looked at by [`image`]. Whether a storage is shared is the controller's question; here a token
//! is written or looked for, which answers it.

pub mod beneath;
pub mod image;
mod token;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use whimbrel_api::agent::{SharedToken, StorageReport};
use whimbrel_api::pool::Storage;
use whimbrel_api::vm::{Disk, StoragePath};
use whimbrel_api::{ApiError, ErrorCode, Name, VmId};

use beneath::{BeneathError, Folder};

/// Longest path of a storage's folder, in bytes.
const FOLDER_PATH_BYTES_MAX: usize = 1024;

impl From<BeneathError> for ApiError {
    fn from(error: BeneathError) -> Self {
        let code = match &error {
            BeneathError::Folder { .. } => ErrorCode::Internal,
            BeneathError::Exists { .. } => ErrorCode::Exists,
            BeneathError::Io { .. } => ErrorCode::Internal,
            _ => ErrorCode::BadPath,
        };
        ApiError::new(code, whimbrel_api::error::chain(&error))
    }
}

/// The storages of this host.
#[derive(Debug, Default)]
pub struct Storages {
    known: Mutex<BTreeMap<Name, Storage>>,
}

impl Storages {
    /// Checks a definition before it is remembered.
    ///
    /// # Errors
    /// `bad-path` for a folder that is not absolute, or not plain.
    pub fn check(storage: &Storage) -> Result<(), ApiError> {
        let path = &storage.path;
        let plain = path.starts_with('/')
            && path.len() <= FOLDER_PATH_BYTES_MAX
            && !path.chars().any(char::is_control)
            && Path::new(path)
                .components()
                .all(|part| !matches!(part, std::path::Component::ParentDir));
        if plain {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorCode::BadPath,
            format!(
                "a storage's folder is an absolute path without `..`, of at most {FOLDER_PATH_BYTES_MAX} bytes"
            ),
        ))
    }

    /// Makes a storage known.
    pub fn put(&self, storage: Storage) {
        self.known().insert(storage.name.clone(), storage);
    }

    /// Forgets a storage; its files stay.
    pub fn forget(&self, name: &Name) {
        self.known().remove(name);
    }

    /// A known storage.
    ///
    /// # Errors
    /// `not-found`.
    pub fn get(&self, name: &Name) -> Result<Storage, ApiError> {
        let found = self.known().get(name).cloned();
        found.ok_or_else(|| {
            ApiError::not_found("storage", name)
                .hint("`whimbrel storage list` shows who reaches which")
        })
    }

    /// A storage's folder, open.
    ///
    /// # Errors
    /// `not-found`, or `internal` where the folder cannot be opened.
    pub fn folder(&self, name: &Name) -> Result<Folder, ApiError> {
        let storage = self.get(name)?;
        Ok(Folder::open(Path::new(&storage.path))?)
    }

    /// How a storage is.
    ///
    /// # Errors
    /// `not-found`.
    pub fn report(&self, name: &Name) -> Result<StorageReport, ApiError> {
        self.get(name).map(|storage| report(&storage))
    }

    /// How all storages are.
    #[must_use]
    pub fn reports(&self) -> Vec<StorageReport> {
        let known: Vec<Storage> = self.known().values().cloned().collect();
        known.iter().map(report).collect()
    }

    /// Writes a token that other hosts look for. It is removed again after a minute.
    ///
    /// # Errors
    /// `not-found`, or `internal` where nothing can be written.
    pub fn write_token(&self, name: &Name) -> Result<SharedToken, ApiError> {
        let folder = self.folder(name)?;
        token::sweep(&folder);
        let token = token::write(&folder)?;
        let (path, made) = (PathBuf::from(self.get(name)?.path), token.clone());
        tokio::spawn(async move {
            tokio::time::sleep(token::LIFETIME).await;
            if let Ok(folder) = Folder::open(&path) {
                token::remove(&folder, &made);
            }
        });
        Ok(token)
    }

    /// Whether a token that another host wrote is seen here.
    ///
    /// # Errors
    /// `not-found`, or `bad-request` for what is no token.
    pub fn token_seen(&self, name: &Name, token: &SharedToken) -> Result<bool, ApiError> {
        token::check(token)?;
        Ok(token::seen(&self.folder(name)?, token))
    }

    /// Removes what tokens of earlier proofs are left.
    pub fn sweep_tokens(&self) {
        let known: Vec<Storage> = self.known().values().cloned().collect();
        for storage in known {
            if let Ok(folder) = Folder::open(Path::new(&storage.path)) {
                token::sweep(&folder);
            }
        }
    }

    /// The absolute path of an existing plain file, for QEMU. It has been opened beneath the storage without following
    /// anything, so what stands there now is no link and no device.
    ///
    /// # Errors
    /// `not-found` for the storage, `bad-path` for the file.
    pub fn existing_file(&self, file: &StoragePath) -> Result<PathBuf, ApiError> {
        let storage = self.get(&file.storage)?;
        self.folder(&file.storage)?.open_file(&file.path)?;
        Ok(Path::new(&storage.path).join(&file.path))
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<Name, Storage>> {
        // Each change is one call, so the map is whole even after a panic.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a VM's disk belongs: `vms/<vm id>/<disk>.<format>`.
#[must_use]
pub fn disk_path(vm: VmId, disk: &Disk) -> String {
    format!("{}/{}.{}", vm_folder(vm), disk.name, disk.format.as_str())
}

/// The folder of a VM's files in a storage.
#[must_use]
pub fn vm_folder(vm: VmId) -> String {
    format!("vms/{vm}")
}

fn report(storage: &Storage) -> StorageReport {
    let space = Folder::open(Path::new(&storage.path)).and_then(|folder| folder.space());
    match space {
        Ok(space) => StorageReport {
            name: storage.name.clone(),
            trouble: None,
            total_bytes: space.total_bytes,
            available_bytes: space.available_bytes,
        },
        Err(error) => StorageReport {
            name: storage.name.clone(),
            trouble: Some(whimbrel_api::error::chain(&error)),
            total_bytes: 0,
            available_bytes: 0,
        },
    }
}

#[cfg(test)]
mod tests;
