//! Can the VM's disks go where they are to go? What stands in the way, from facts that both agents have gathered.
//!
//! For disks that are copied, or could be: what stays is looked at by [`super::check`], which is given the files that stay.
//! Codes, sentences and severities as there. What only trying can tell (does the mirror reach its end, does the storage
//! keep its word) is not here.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Code, Verdict, refuse, warn};
use crate::disks::ImageFormat;
use crate::disks::mirror::DiskForecast;
use crate::disks::placement::{Place, There, place};
use crate::forecast::Convergence;
use crate::names::Name;
use crate::options::MigrateOptions;

/// What qcow2 itself needs, as a share of what the guest sees: eight bytes of its tables, and two of its counts, for each
/// cluster of 64 KiB.
const QCOW2_TABLES_DIVISOR: u64 = (64 << 10) / 10;
/// What qcow2 needs at least for itself, in bytes: header and the first tables, a cluster each, well rounded up.
const QCOW2_LEAST_BYTES: u64 = 1 << 20;

/// All that is looked at.
#[derive(Clone, Debug)]
pub struct DiskQuestion<'a> {
    /// The VM.
    pub vm: &'a Name,
    /// What its user asks for.
    pub options: &'a MigrateOptions,
    /// Its disks, the read-only ones included, in order.
    pub disks: &'a [DiskFacts],
    /// The source, and what the QEMU that runs the VM can do with disks; none where it does not say, or none runs.
    pub source: (&'a Name, Option<&'a DiskAbilities>),
    /// The destination, and what the QEMU can do there that would run the VM.
    pub destination: (&'a Name, Option<&'a DiskAbilities>),
    /// The storages of the destination.
    pub storages: &'a [StorageFacts],
    /// The storages of which it is *proven* that both hosts see the same one.
    pub shared: &'a BTreeSet<Name>,
    /// The destination's storage for disks that nobody gave a place.
    pub default: Option<&'a Name>,
    /// What copying them would take; none if nothing was measured.
    pub forecast: Option<&'a DiskForecast>,
    /// The disks' data goes by the network of the agents.
    pub by_management_network: bool,
}

/// A disk of the VM, as its host found it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskFacts {
    /// Its name in the VM.
    pub name: Name,
    /// The storage on which it is.
    pub storage: Name,
    /// Its path in that storage.
    pub path: String,
    /// Its format.
    pub format: ImageFormat,
    /// What the guest sees, in bytes.
    pub virtual_bytes: u64,
    /// What of it takes room, in bytes, all layers together.
    pub allocated_bytes: u64,
    /// What of that is in the layers beneath, in bytes.
    #[serde(default)]
    pub layers_bytes: u64,
    /// The layers beneath that the destination holds, byte by byte the same, down to the lowest: they need not travel.
    #[serde(default)]
    pub layers_held: bool,
    /// Other VMs that have it open.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub used_by: Vec<Name>,
    /// What is being done with it, such as a backup, if something is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub busy: Option<String>,
    /// Why it cannot be copied as it is, if so, as the end of the sentence "it cannot be copied because ...".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uncopyable: Option<String>,
}

/// A storage of the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StorageFacts {
    /// Its name.
    pub name: Name,
    /// Why it cannot be used, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// Bytes free, those that are reserved included.
    pub free_bytes: u64,
    /// Bytes of them that are spoken for.
    #[serde(default)]
    pub reserved_bytes: u64,
    /// Names that this move would give and that are taken, by the disks that would have them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<String, String>)]
    pub taken: BTreeMap<Name, String>,
}

/// What a QEMU can do with disks, by its schema.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DiskAbilities {
    /// Let others write to a disk (`nbd-server-start`, `block-export-add`).
    pub export: bool,
    /// Copy a disk that a guest writes to (`blockdev-mirror`, and the driver `nbd`).
    pub mirror: bool,
    /// Let the guest's writes wait for the copy, from some moment on (`block-job-change`; 8.2 or newer).
    pub blocking: bool,
}

/// One disk's place, as [`place`] has it.
struct Placed<'a> {
    disk: &'a DiskFacts,
    place: Place,
}

/// Everything that stands in the way of the disks, or is worth knowing; empty if nothing.
#[must_use]
pub fn check(question: &DiskQuestion<'_>) -> Vec<Verdict> {
    let there = There { shared: question.shared, default: question.default };
    let placed: Vec<Placed<'_>> = question
        .disks
        .iter()
        .map(|disk| {
            let known = (&disk.name, &disk.storage, disk.format);
            Placed { disk, place: place(&question.options.disks, known, there) }
        })
        .collect();
    let mut verdicts = unknown_names(question);
    for one in &placed {
        match &one.place {
            Place::Stays => {}
            Place::Nowhere => verdicts.push(nowhere(question, one.disk)),
            Place::Copied { storage, format } => {
                verdicts.extend(disk(question, one.disk));
                verdicts.extend(target(question, one.disk, storage, *format));
            }
        }
    }
    verdicts.extend(storages(question, &placed));
    if placed.iter().any(|one| matches!(one.place, Place::Copied { .. })) {
        verdicts.extend(engines(question));
        verdicts.extend(pace(question));
    }
    verdicts
}

/// What an image takes on its storage, in bytes: all that the guest sees if it is raw, which has no way to say that it lacks
/// room later; else what is allocated, and the format's own tables.
#[must_use]
pub fn needed_bytes(disk: &DiskFacts, format: ImageFormat) -> u64 {
    match format {
        ImageFormat::Raw => disk.virtual_bytes,
        ImageFormat::Qcow2 => {
            let tables = disk.virtual_bytes / QCOW2_TABLES_DIVISOR + QCOW2_LEAST_BYTES;
            travelling_bytes(disk).min(disk.virtual_bytes).saturating_add(tables)
        }
    }
}

/// What of a disk has to be sent, in bytes.
#[must_use]
pub fn travelling_bytes(disk: &DiskFacts) -> u64 {
    let held = if disk.layers_held { disk.layers_bytes } else { 0 };
    disk.allocated_bytes.saturating_sub(held)
}

fn unknown_names(question: &DiskQuestion<'_>) -> Vec<Verdict> {
    let known: Vec<&str> = question.disks.iter().map(|disk| disk.name.as_str()).collect();
    let unknown = question.options.disks.each.keys().filter(|name| !known.contains(&name.as_str()));
    unknown
        .map(|name| {
            let has = if known.is_empty() { "no disk".into() } else { known.join(", ") };
            refuse(
                Code::DiskUnknown,
                format!("VM {} has no disk {name}; it has {has}.", question.vm),
                format!("Leave out {name}, or name another disk."),
            )
        })
        .collect()
}

fn nowhere(question: &DiskQuestion<'_>, disk: &DiskFacts) -> Verdict {
    let host = question.destination.0;
    refuse(
        Code::NoDefaultStorage,
        format!(
            "Disk {} of VM {} is on storage {}, which host {host} does not reach, and {host} has no default \
             storage for it.",
            disk.name, question.vm, disk.storage
        ),
        format!("Say where it is to go, or give {host} a default storage."),
    )
}

/// What of the disk itself is in the way.
fn disk(question: &DiskQuestion<'_>, disk: &DiskFacts) -> Vec<Verdict> {
    let (name, vm) = (&disk.name, question.vm);
    let mut verdicts = Vec::new();
    if !disk.used_by.is_empty() {
        let users: Vec<&str> = disk.used_by.iter().map(Name::as_str).collect();
        verdicts.push(refuse(
            Code::DiskInUse,
            format!(
                "Disk {name} of VM {vm} is used by VM {} too: a copy would be a second disk.",
                users.join(", ")
            ),
            format!("Let {name} stay where it is, or stop the others."),
        ));
    }
    if let Some(busy) = &disk.busy {
        verdicts.push(refuse(
            Code::DiskBusy,
            format!("Disk {name} of VM {vm} is busy: {busy}."),
            "Wait for its end, or end it.",
        ));
    }
    if let Some(because) = &disk.uncopyable {
        verdicts.push(refuse(
            Code::DiskUncopyable,
            format!("Disk {name} of VM {vm} cannot be copied because {because}."),
            format!("Let {name} stay where it is, or repair its image while the VM is stopped."),
        ));
    }
    if disk.layers_bytes > 0 && !disk.layers_held {
        verdicts.push(warn(
            Code::DiskBaseMissing,
            format!(
                "Host {} does not hold what disk {name} of VM {vm} stands on: {} MiB of it travel too, and \
                 take room there.",
                question.destination.0,
                mib(disk.layers_bytes)
            ),
            "Bring the base image there first, if other VMs are to stand on it.",
        ));
    }
    verdicts
}

/// What of the place is in the way, the room excepted.
fn target(
    question: &DiskQuestion<'_>,
    disk: &DiskFacts,
    storage: &Name,
    format: ImageFormat,
) -> Option<Verdict> {
    let facts = question.storages.iter().find(|facts| facts.name == *storage)?;
    let file = facts.taken.get(&disk.name)?;
    Some(refuse(
        Code::DiskNameTaken,
        format!(
            "Disk {} of VM {} would become {file} on storage {storage} of host {} ({}), and that exists.",
            disk.name,
            question.vm,
            question.destination.0,
            format.as_str()
        ),
        "Look whose it is, and move or remove it; or choose another storage.",
    ))
}

/// Each storage once, with all the disks that are to go there.
fn storages(question: &DiskQuestion<'_>, placed: &[Placed<'_>]) -> Vec<Verdict> {
    let mut going: BTreeMap<&Name, Vec<(&DiskFacts, ImageFormat)>> = BTreeMap::new();
    for one in placed {
        if let Place::Copied { storage, format } = &one.place {
            going.entry(storage).or_default().push((one.disk, *format));
        }
    }
    going.into_iter().filter_map(|(name, disks)| storage(question, name, &disks)).collect()
}

fn storage(
    question: &DiskQuestion<'_>,
    name: &Name,
    disks: &[(&DiskFacts, ImageFormat)],
) -> Option<Verdict> {
    let (vm, host) = (question.vm, question.destination.0);
    let names: Vec<&str> = disks.iter().map(|(disk, _)| disk.name.as_str()).collect();
    let names = names.join(", ");
    let Some(facts) = question.storages.iter().find(|facts| facts.name == *name) else {
        return Some(refuse(
            Code::StorageMissing,
            format!("Host {host} has no storage {name}, to which {names} of VM {vm} are to go."),
            format!("Choose a storage that {host} has, or add {name} to it."),
        ));
    };
    if let Some(trouble) = &facts.trouble {
        return Some(refuse(
            Code::StorageUnusable,
            format!("Storage {name} of host {host} cannot be used: {trouble}."),
            format!("Repair it, or choose another storage for {names}."),
        ));
    }
    let sum = |of: fn(&DiskFacts, ImageFormat) -> u64| {
        disks.iter().map(|(disk, format)| of(disk, *format)).fold(0, u64::saturating_add)
    };
    let needed = sum(needed_bytes);
    let available = facts.free_bytes.saturating_sub(facts.reserved_bytes);
    if needed > available {
        let advice = if needed <= facts.free_bytes {
            "Wait until what has reserved room there has ended, or choose another storage."
        } else {
            "Make room there, or choose another storage."
        };
        return Some(refuse(
            Code::StorageSpace,
            format!(
                "Storage {name} of host {host} has {} MiB free, {} MiB of them reserved; {names} of VM {vm} \
                 need {} MiB.",
                mib_down(facts.free_bytes),
                mib(facts.reserved_bytes),
                mib(needed)
            ),
            advice,
        ));
    }
    let most = sum(|disk, _| disk.virtual_bytes);
    if most > available {
        return Some(warn(
            Code::StorageOvercommit,
            format!(
                "Storage {name} of host {host} has {} MiB to spare, and {names} of VM {vm} can grow to {} MiB.",
                mib_down(available),
                mib(most)
            ),
            "Watch it: a guest whose disk cannot grow stands still, or sees errors.",
        ));
    }
    None
}

fn engines(question: &DiskQuestion<'_>) -> Vec<Verdict> {
    let lacking = [
        (question.source, (|can| can.mirror) as fn(&DiskAbilities) -> bool, "copy a disk in use"),
        (question.destination, |can| can.export, "take in a disk"),
    ];
    lacking
        .into_iter()
        .filter(|((_, abilities), can, _)| abilities.is_some_and(|abilities| !can(abilities)))
        .map(|((host, _), _, what)| {
            refuse(
                Code::EngineDisks,
                format!("The QEMU on host {host} for VM {} cannot {what}.", question.vm),
                format!("Install another QEMU on {host}, or let the disks stay where they are."),
            )
        })
        .collect()
}

/// Whether the copies get to their end, and by which way.
fn pace(question: &DiskQuestion<'_>) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    let convergence = question.forecast.map(|forecast| forecast.convergence);
    if let Some(convergence @ (Convergence::No | Convergence::Marginal)) = convergence {
        let what = if convergence == Convergence::No { "faster than" } else { "nearly as fast as" };
        verdicts.push(warn(
            Code::DisksNotConverging,
            format!(
                "The guest of VM {} writes to its disks {what} they can be sent: the copy may not come to its \
                 end.",
                question.vm
            ),
            "Move it when it writes less, by a faster network (--storage-network), or stopped.",
        ));
    }
    if question.by_management_network {
        verdicts.push(warn(
            Code::DisksByManagement,
            format!(
                "The disks of VM {} go to host {} by the management network: orders and monitoring share it \
                 with them.",
                question.vm, question.destination.0
            ),
            "Give another address of the destination with --storage-network, if there is one.",
        ));
    }
    verdicts
}

const fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

const fn mib_down(bytes: u64) -> u64 {
    bytes >> 20
}

#[cfg(test)]
pub(crate) mod tests;
