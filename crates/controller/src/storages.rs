//! Storages: made known to every host that answers, or to none and told. A shared one is proven, not believed.
//!
//! ```text
//! first host ──writes token──▶ its folder        another host ◀──looks for the token── its folder
//! ```
//!
//! For each pair of the first host and another one a fresh token is written, so that no cache and no clean-up of an earlier one
//! can answer. A migration does not rely on this proof: preflight makes its own, at its own time.

use std::collections::BTreeSet;
use std::path::{Component, Path};
use std::sync::Arc;

use tracing::warn;
use whimbrel_api::agent::{HostReport, StorageReport};
use whimbrel_api::event::Event;
use whimbrel_api::pool::{
    Host, SetStorageDefaults, Storage, StorageDefaults, StorageOnHost, StorageStatus,
};
use whimbrel_api::{ApiError, ErrorCode, Name, vm};

use crate::Controller;
use crate::hosts::Member;
use crate::networks::{at_host, ready};

/// Most default storages of a host.
const DEFAULTS_MAX: usize = 64;

/// Makes a storage known to all hosts that answer.
///
/// # Errors
/// `exists`, `in-use` (the path belongs to another storage), `not-shared` naming the host that does not see the same files, or
/// what a host answered, naming the host; then no host keeps it.
pub(crate) async fn create(
    controller: &Controller,
    storage: Storage,
) -> Result<StorageStatus, ApiError> {
    check(&storage)?;
    let _layout = controller.layout.lock().await;
    for known in controller.store().storages().await? {
        if known.name == storage.name {
            return Err(exists(&storage.name));
        }
        if known.path == storage.path {
            let message = format!("the path {} is the storage {}'s", known.path, known.name);
            return Err(ApiError::new(ErrorCode::InUse, message));
        }
    }
    let ready = ready(controller);
    let hosts = match give_all(&storage, &ready).await {
        Ok(hosts) => hosts,
        Err(error) => {
            undo(&storage.name, &ready).await;
            return Err(error);
        }
    };
    let proven = if storage.shared { names(&ready) } else { Vec::new() };
    if !controller.store().add_storage(&storage, proven).await? {
        return Err(exists(&storage.name));
    }
    ready.iter().for_each(|(member, _)| member.nudge());
    controller.events().publish(Event::Storage { storage: storage.clone() });
    Ok(StorageStatus { storage, default: false, hosts })
}

fn names(ready: &[(Arc<Member>, HostReport)]) -> Vec<Name> {
    ready.iter().map(|(member, _)| member.name.clone()).collect()
}

/// Gives the storage to every host and, if it is shared, proves it between the first and each other one.
async fn give_all(
    storage: &Storage,
    ready: &[(Arc<Member>, HostReport)],
) -> Result<Vec<StorageOnHost>, ApiError> {
    let mut hosts = Vec::new();
    for (member, _) in ready {
        let report = give(storage, member).await?;
        let (host, proven) = (member.name.clone(), storage.shared);
        hosts.push(StorageOnHost { host, proven, default_place: None, report });
    }
    if storage.shared
        && let Some(((first, _), others)) = ready.split_first()
    {
        for (other, _) in others {
            prove(storage, first, other).await?;
        }
    }
    Ok(hosts)
}

async fn give(storage: &Storage, member: &Member) -> Result<StorageReport, ApiError> {
    let report = member.agent().put_storage(storage).await;
    let report = report.map_err(|error| at_host(&member.name, error))?;
    match &report.trouble {
        None => Ok(report),
        Some(trouble) => {
            let message = format!("{} cannot use {}: {trouble}", member.name, storage.path);
            Err(ApiError::new(ErrorCode::BadPath, message))
        }
    }
}

/// Shows that `reader` sees what `writer` wrote.
async fn prove(storage: &Storage, writer: &Member, reader: &Member) -> Result<(), ApiError> {
    let token = writer.agent().write_token(&storage.name).await;
    let token = token.map_err(|error| at_host(&writer.name, error))?;
    let seen = reader.agent().token_seen(&storage.name, &token).await;
    if seen.map_err(|error| at_host(&reader.name, error))?.seen {
        return Ok(());
    }
    let message = format!(
        "the storage `{}` is not shared: {} does not see in {} what {} wrote there",
        storage.name, reader.name, storage.path, writer.name
    );
    Err(ApiError::new(ErrorCode::NotShared, message)
        .hint("mount the same file system at this path on every host, or create the storage without `shared`"))
}

/// Takes the storage from the hosts that did not have it before.
async fn undo(name: &Name, ready: &[(Arc<Member>, HostReport)]) {
    for (member, before) in ready {
        if before.storages.iter().any(|storage| storage.name == *name) {
            continue;
        }
        if let Err(error) = member.agent().delete_storage(name).await
            && error.code != ErrorCode::NotFound
        {
            warn!(host = %member.name, storage = %name, %error, "a half-made storage stays known to a host");
        }
    }
}

/// Gives a shared storage to a host that came later and proves it against a host that has it. Without such a host there is
/// nobody to share with, and the host is the first.
pub(crate) async fn give_shared(
    controller: &Controller,
    member: &Member,
    storage: &Storage,
) -> Result<(), ApiError> {
    let proven = controller.store().storage_proofs(&storage.name).await?;
    let others: Vec<Arc<Member>> = ready(controller)
        .into_iter()
        .map(|(other, _)| other)
        .filter(|other| proven.contains(&other.name) && other.name != member.name)
        .collect();
    if others.is_empty() && proven.iter().any(|host| *host != member.name) {
        let message = format!("no host answers that `{}` could be proven against", storage.name);
        return Err(ApiError::new(ErrorCode::Unreachable, message));
    }
    give(storage, member).await?;
    if proven.contains(&member.name) {
        return Ok(());
    }
    if let Some(writer) = others.first()
        && let Err(error) = prove(storage, writer, member).await
    {
        if let Err(left) = member.agent().delete_storage(&storage.name).await {
            warn!(host = %member.name, storage = %storage.name, error = %left, "an unproven storage stays known to a host");
        }
        return Err(error);
    }
    controller.store().add_storage_proof(&storage.name, &member.name).await?;
    Ok(())
}

/// All storages, with what each host that has it says.
pub(crate) async fn list(controller: &Controller) -> Result<Vec<StorageStatus>, ApiError> {
    let defaults = controller.store().storage_defaults().await?;
    let mut all = Vec::new();
    for storage in controller.store().storages().await? {
        all.push(status(controller, &defaults, storage).await?);
    }
    Ok(all)
}

/// One storage.
pub(crate) async fn show(controller: &Controller, name: &Name) -> Result<StorageStatus, ApiError> {
    let defaults = controller.store().storage_defaults().await?;
    status(controller, &defaults, known(controller, name).await?).await
}

async fn known(controller: &Controller, name: &Name) -> Result<Storage, ApiError> {
    let all = controller.store().storages().await?;
    all.into_iter().find(|storage| storage.name == *name).ok_or_else(|| {
        ApiError::not_found("storage", name).hint("`whimbrel storage list` shows all")
    })
}

async fn status(
    controller: &Controller,
    defaults: &StorageDefaults,
    storage: Storage,
) -> Result<StorageStatus, ApiError> {
    let proofs = controller.store().storage_proofs(&storage.name).await?;
    let on_host = |view: &Host| {
        let facts = view.facts.as_ref()?;
        let report = facts.storages.iter().find(|report| report.name == storage.name)?;
        let places = defaults.hosts.get(&view.name).map(Vec::as_slice).unwrap_or_default();
        let place = (1_u32..).zip(places).find(|(_, name)| **name == storage.name);
        Some(StorageOnHost {
            host: view.name.clone(),
            proven: storage.shared && proofs.contains(&view.name),
            default_place: place.map(|(place, _)| place),
            report: report.clone(),
        })
    };
    let views: Vec<Host> = controller.hosts().all().iter().map(|member| member.view()).collect();
    let hosts = views.iter().filter_map(on_host).collect();
    let default = defaults.pool.as_ref() == Some(&storage.name);
    Ok(StorageStatus { storage, default, hosts })
}

/// Says which storages are used where none is named.
///
/// # Errors
/// `not-found` for a host or storage, `bad-request` for a storage named twice or a second one for the pool; nothing is changed then.
pub(crate) async fn set_defaults(
    controller: &Controller,
    request: SetStorageDefaults,
) -> Result<StorageDefaults, ApiError> {
    let _layout = controller.layout.lock().await;
    let SetStorageDefaults { host, storages } = request;
    if host.is_none() && storages.len() > 1 {
        let message = "the pool has one default storage; a host may have several";
        return Err(ApiError::new(ErrorCode::BadRequest, message));
    }
    if storages.len() > DEFAULTS_MAX {
        let message = format!("{} default storages; at most {DEFAULTS_MAX}", storages.len());
        return Err(ApiError::new(ErrorCode::OutOfRange, message));
    }
    if let Some(host) = &host {
        controller.hosts().get(host)?;
    }
    let mut seen = BTreeSet::new();
    for name in &storages {
        known(controller, name).await?;
        if !seen.insert(name) {
            let message = format!("`{name}` is named twice");
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        }
    }
    controller.store().set_storage_defaults(host, storages).await?;
    Ok(controller.store().storage_defaults().await?)
}

fn exists(name: &Name) -> ApiError {
    ApiError::new(ErrorCode::Exists, format!("there is a storage `{name}` already"))
}

/// The folder must be spelt in one way only: absolute, without `.`, `..`, double or trailing slashes, and not the root.
fn check(storage: &Storage) -> Result<(), ApiError> {
    let path = storage.path.as_str();
    let parts: Vec<Component<'_>> = Path::new(path).components().collect();
    let spelt_once = parts.iter().collect::<std::path::PathBuf>().as_os_str() == path;
    let plain = parts.iter().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let good = path.len() <= vm::limits::PATH_MAX_BYTES
        && path.starts_with('/')
        && !path.chars().any(char::is_control)
        && parts.len() > 1
        && plain
        && spelt_once;
    if good {
        return Ok(());
    }
    let message = format!(
        "`path` must be an absolute folder of at most {} bytes, without `.`, `..`, `//` or a slash at its end",
        vm::limits::PATH_MAX_BYTES
    );
    Err(ApiError::new(ErrorCode::BadPath, message))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn storage(path: &str) -> Storage {
        Storage { name: "s".parse().unwrap(), path: path.to_owned(), shared: false }
    }

    #[test]
    fn a_folder_is_spelt_in_one_way() {
        check(&storage("/srv/vms")).unwrap();
        for bad in
            ["", "/", "srv", "/srv/", "/srv//vms", "/srv/./vms", "/srv/../etc", "/a\nb", "//srv"]
        {
            assert_eq!(check(&storage(bad)).unwrap_err().code, ErrorCode::BadPath, "{bad:?}");
        }
        assert!(check(&storage(&format!("/{}", "x".repeat(512)))).is_err());
    }

    proptest! {
        #[test]
        fn what_passes_stays_below_no_parent(path in "[/.a]{0,12}") {
            if check(&storage(&path)).is_ok() {
                prop_assert!(path.starts_with('/') && !path.ends_with('/'));
                prop_assert!(path.split('/').skip(1).all(|part| !part.is_empty() && part != "." && part != ".."));
            }
        }
    }
}
