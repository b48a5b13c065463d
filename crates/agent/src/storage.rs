//! The host's storages: named folders, in which every path is opened beneath the folder.
//!
//! A storage's files are reached through [`beneath::Folder`], which neither leaves the folder nor follows a link. Images
//! are made, copied and looked at by [`image`]. Whether a storage is shared is the controller's question; here a token
//! is written or looked for, which answers it.
//!
//! Storage may be slow, or hang. Whoever touches it shows that it is [`Aside`], which is given on a thread beside the
//! agent's async work only ([`Storages::aside`]). Room that is spoken for is counted in [`space`].

pub mod beneath;
pub mod image;
pub mod space;
mod token;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use whimbrel_api::agent::{SharedToken, StorageReport};
pub use whimbrel_api::lineage::vm_folder;
use whimbrel_api::pool::Storage;
use whimbrel_api::vm::{Disk, StoragePath};
use whimbrel_api::{ApiError, ErrorCode, Name, VmId};

use beneath::{BeneathError, Folder};

use crate::host::Host;
use crate::ledger::Resource;

/// Longest path of a storage's folder, in bytes.
const FOLDER_PATH_BYTES_MAX: usize = 1024;
/// Calls that may be at storages at the same time: one that hangs keeps its calls. More are refused as `busy`.
const CALLS_MAX: usize = 64;
/// How long a report waits for a storage, in milliseconds: less than the controller waits for the host's.
const LOOK_MILLISECONDS: u64 = 1_500;

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

/// Whoever has this is beside the agent's async work, where waiting for a storage holds nobody else up.
#[derive(Debug)]
pub struct Aside(());

/// The storages of this host.
#[derive(Debug)]
pub struct Storages {
    known: Mutex<BTreeMap<Name, Storage>>,
    calls: Arc<Semaphore>,
    /// The storages that are being looked at: one that hangs is not asked a second time.
    looking: Arc<Mutex<BTreeSet<Name>>>,
    /// Held while room is reserved.
    reserving: tokio::sync::Mutex<()>,
}

impl Default for Storages {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            calls: Arc::new(Semaphore::new(CALLS_MAX)),
            looking: Arc::default(),
            reserving: tokio::sync::Mutex::default(),
        }
    }
}

impl Storages {
    /// Does something at a storage, on a thread of its own. It is waited for however long it takes: a change that comes
    /// after its answer would be nobody's.
    ///
    /// # Errors
    /// `busy`, with nothing done, where too many calls hang already; otherwise as `work`.
    pub async fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Aside) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let Ok(call) = Arc::clone(&self.calls).try_acquire_owned() else {
            let message = format!("{CALLS_MAX} calls wait for this host's storages already");
            return Err(ApiError::new(ErrorCode::Busy, message));
        };
        let working = tokio::task::spawn_blocking(move || {
            let _call = call;
            work(&Aside(()))
        });
        working
            .await
            .map_err(|error| ApiError::internal("a call to a storage broke off", &error))?
    }

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
    pub fn folder(&self, _: &Aside, name: &Name) -> Result<Folder, ApiError> {
        let storage = self.get(name)?;
        Ok(Folder::open(Path::new(&storage.path))?)
    }

    /// How a storage is.
    ///
    /// # Errors
    /// `not-found`.
    pub fn report(&self, at: &Aside, name: &Name) -> Result<StorageReport, ApiError> {
        self.get(name).map(|storage| report(at, &storage))
    }

    /// How all storages are. One that does not answer soon is told as such, and holds the others up for a moment only.
    pub async fn reports(&self, host: &Arc<Host>) -> Vec<StorageReport> {
        let known: Vec<Storage> = self.known().values().cloned().collect();
        let journal = host.ledger.journaled().await.unwrap_or_else(|error| {
            tracing::warn!(
                error = whimbrel_api::error::chain(&error),
                "what is reserved is not known"
            );
            Vec::new()
        });
        let looks = known.iter().map(|storage| {
            // What is reserved elsewhere is not looked at: that storage may hang.
            let here = |resource: &Resource| matches!(resource, Resource::Space { file, .. } if file.storage == storage.name);
            let of_all = journal.iter().map(|(_, resource)| resource);
            self.look(host, storage.clone(), of_all.filter(|r| here(r)).cloned().collect())
        });
        futures::future::join_all(looks).await
    }

    /// Looks at one storage, for a bounded time.
    async fn look(
        &self,
        host: &Arc<Host>,
        storage: Storage,
        journal: Vec<Resource>,
    ) -> StorageReport {
        let name = storage.name.clone();
        if !lock(&self.looking).insert(name.clone()) {
            return troubled(name, "it has not answered for some time".to_owned());
        }
        let done = Looking { at: Arc::clone(&self.looking), name: name.clone() };
        let at = Arc::clone(host);
        let looking = self.aside(move |aside| {
            let _done = done;
            let mut report = report(aside, &storage);
            let reserved = space::reserved(&at, aside, &journal);
            report.reserved_bytes = reserved.get(&storage.name).copied().unwrap_or(0);
            Ok(report)
        });
        match tokio::time::timeout(Duration::from_millis(LOOK_MILLISECONDS), looking).await {
            Ok(Ok(report)) => report,
            Ok(Err(error)) => troubled(name, error.message),
            Err(_) => troubled(name, format!("it has not answered within {LOOK_MILLISECONDS} ms")),
        }
    }

    /// Writes a token that other hosts look for. It is removed again after a minute.
    ///
    /// # Errors
    /// `not-found`, or `internal` where nothing can be written.
    pub fn write_token(&self, at: &Aside, name: &Name) -> Result<SharedToken, ApiError> {
        let folder = self.folder(at, name)?;
        token::sweep(&folder);
        let token = token::write(&folder)?;
        let (path, made) = (PathBuf::from(self.get(name)?.path), token.clone());
        tokio::spawn(async move {
            tokio::time::sleep(token::LIFETIME).await;
            // One that hangs is left to the next sweep of tokens.
            tokio::task::spawn_blocking(move || {
                if let Ok(folder) = Folder::open(&path) {
                    token::remove(&folder, &made);
                }
            });
        });
        Ok(token)
    }

    /// Whether a token that another host wrote is seen here.
    ///
    /// # Errors
    /// `not-found`, or `bad-request` for what is no token.
    pub fn token_seen(
        &self,
        at: &Aside,
        name: &Name,
        token: &SharedToken,
    ) -> Result<bool, ApiError> {
        token::check(token)?;
        Ok(token::seen(&self.folder(at, name)?, token))
    }

    /// Removes what tokens of earlier proofs are left.
    pub fn sweep_tokens(&self, _: &Aside) {
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
    pub fn existing_file(&self, at: &Aside, file: &StoragePath) -> Result<PathBuf, ApiError> {
        let storage = self.get(&file.storage)?;
        self.folder(at, &file.storage)?.open_file(&file.path)?;
        Ok(Path::new(&storage.path).join(&file.path))
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<Name, Storage>> {
        lock(&self.known)
    }
}

/// A storage that is being looked at, until the look is over.
struct Looking {
    at: Arc<Mutex<BTreeSet<Name>>>,
    name: Name,
}

impl Drop for Looking {
    fn drop(&mut self) {
        lock(&self.at).remove(&self.name);
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is one call, so what is in it is whole even after a panic.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a VM's disk belongs: `vms/<vm id>/<disk>.<format>`.
#[must_use]
pub fn disk_path(vm: VmId, disk: &Disk) -> String {
    format!("{}/{}.{}", vm_folder(vm), disk.name, disk.format.as_str())
}

fn report(_: &Aside, storage: &Storage) -> StorageReport {
    let space = Folder::open(Path::new(&storage.path)).and_then(|folder| folder.space());
    match space {
        Ok(space) => StorageReport {
            name: storage.name.clone(),
            trouble: space.read_only.then(|| "its file system is read-only".to_owned()),
            total_bytes: space.total_bytes,
            available_bytes: space.available_bytes,
            reserved_bytes: 0,
        },
        Err(error) => troubled(storage.name.clone(), whimbrel_api::error::chain(&error)),
    }
}

fn troubled(name: Name, trouble: String) -> StorageReport {
    StorageReport {
        name,
        trouble: Some(trouble),
        total_bytes: 0,
        available_bytes: 0,
        reserved_bytes: 0,
    }
}

#[cfg(test)]
mod tests;
