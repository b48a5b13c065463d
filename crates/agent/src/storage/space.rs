//! Room in the host's storages that is spoken for.
//!
//! Whoever is about to make a file says how large it may become. The word stands in the journal beside the file itself, so that it
//! holds over a restart of the agent and ends with what it was for: when the file is the VM's own, when the maker gives up, or
//! when the sweep takes what a killed agent has left. What the file occupies already is not counted twice.
//!
//! Storages that lie in one file system share its room. What other hosts have reserved in a shared storage is not known here; it is
//! in their reports.

use std::collections::BTreeMap;
use std::sync::Arc;

use whimbrel_api::vm::StoragePath;
use whimbrel_api::{ApiError, ErrorCode, Name};

use super::Aside;
use super::image::SPARE_BYTES;
use crate::host::Host;
use crate::ledger::Resource;

/// A file that is about to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The file.
    pub file: StoragePath,
    /// How much it will occupy at most, in bytes; 0 for a sparse one that nothing is copied into.
    pub bytes: u64,
}

/// Reserves room for files that `owner` (as the journal has it) is about to make. It is released when the journal forgets them.
///
/// # Errors
/// `no-resources` naming the storage, with nothing reserved; `not-found`, or what failed.
pub async fn reserve(host: &Arc<Host>, owner: &str, wanted: &[Wanted]) -> Result<(), ApiError> {
    // From looking to noting nobody else looks: two could be given the same room.
    let _alone = host.storages.reserving.lock().await;
    let journal: Vec<Resource> =
        host.ledger.journaled().await?.into_iter().map(|(_, r)| r).collect();
    let (at, asked) = (Arc::clone(host), wanted.to_vec());
    host.storages.aside(move |aside| check(&at, aside, &asked, &journal)).await?;
    let resources: Vec<Resource> = wanted
        .iter()
        .filter(|wanted| wanted.bytes > 0)
        .map(|wanted| Resource::Space { file: wanted.file.clone(), bytes: wanted.bytes })
        .collect();
    Ok(host.ledger.journal(owner, &resources).await?)
}

/// What is reserved in each storage and not yet written, in bytes. A storage that cannot be looked at has what was said.
pub(super) fn reserved(host: &Host, aside: &Aside, journal: &[Resource]) -> BTreeMap<Name, u64> {
    let mut reserved: BTreeMap<Name, u64> = BTreeMap::new();
    for resource in journal {
        let Resource::Space { file, bytes } = resource else { continue };
        let folder = host.storages.folder(aside, &file.storage);
        let occupied = folder.ok().and_then(|folder| folder.occupied_bytes(&file.path).ok());
        let left = bytes.saturating_sub(occupied.unwrap_or(0));
        let sum = reserved.entry(file.storage.clone()).or_default();
        *sum = sum.saturating_add(left);
    }
    reserved
}

fn check(
    host: &Host,
    aside: &Aside,
    wanted: &[Wanted],
    journal: &[Resource],
) -> Result<(), ApiError> {
    let reserved = reserved(host, aside, journal);
    let mut sums: BTreeMap<&Name, u64> = BTreeMap::new();
    for Wanted { file, bytes } in wanted {
        let sum = sums.entry(&file.storage).or_default();
        *sum = sum.saturating_add(*bytes);
    }
    for storage in sums.keys() {
        let folder = host.storages.folder(aside, storage)?;
        let (device, space) = (folder.device()?, folder.space()?);
        let same_room = |name: &Name| {
            let other = host.storages.folder(aside, name);
            name == *storage || other.ok().and_then(|other| other.device().ok()) == Some(device)
        };
        let within = |rooms: &mut dyn Iterator<Item = (&Name, u64)>| {
            rooms
                .filter(|(name, _)| same_room(name))
                .fold(0_u64, |sum, (_, bytes)| sum.saturating_add(bytes))
        };
        let spoken_for = within(&mut reserved.iter().map(|(name, bytes)| (name, *bytes)));
        let needed = within(&mut sums.iter().map(|(name, bytes)| (*name, *bytes)));
        let free = space.available_bytes.saturating_sub(spoken_for);
        if free < needed.saturating_add(SPARE_BYTES) {
            let message = format!(
                "storage `{storage}` has {free} bytes free ({spoken_for} more are reserved), and {needed} bytes and {SPARE_BYTES} to spare are needed"
            );
            return Err(ApiError::new(ErrorCode::NoResources, message)
                .hint("`whimbrel storage list` shows what is free where"));
        }
    }
    Ok(())
}
