//! Can this VM move to that host? All that stands in the way, at once, before anything is touched.
//!
//! [`check`] is a function of facts: it asks no host and changes nothing. Each verdict has a code
//! that never changes, a sentence that says what is the matter with names and numbers, and one that
//! says what to do. The controller calls it at admission, and refuses if any verdict does. What can
//! only be known by trying (does QEMU start there, does the incoming port open) is not here.
//! Whether the options fit together and to both engines is told by [`combinations`], whether disks can be copied by
//! [`disks`].

pub mod combinations;
pub mod disks;
mod facts;

pub use combinations::EngineAbilities;
pub use facts::{
    Accelerator, EngineFacts, EngineVersion, FileFacts, GuestState, HostFacts, NicFacts, NoVersion,
    Question, Reach, UnmovableDevice, VmFacts,
};

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::names::Name;
use crate::options::Mode;

/// Memory that a QEMU is reckoned to need beside its guest's, in bytes.
pub const ENGINE_OVERHEAD_BYTES: u64 = 128 * 1024 * 1024;

const MIB_BYTES: u64 = 1024 * 1024;

/// One thing that preflight found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Verdict {
    /// What kind of thing, for machines.
    pub code: Code,
    /// Whether it stops the migration.
    pub severity: Severity,
    /// What is the matter, a sentence for people.
    pub problem: String,
    /// What to do about it, a sentence for people.
    pub advice: String,
}

/// Whether a verdict stops the migration.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The migration goes ahead; the user is told.
    Warn,
    /// The migration does not begin.
    Refuse,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)*) => {
        /// The kinds of [`Verdict`]. Codes are never renamed or reused.
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
        )]
        #[serde(rename_all = "kebab-case")]
        pub enum Code {
            $($(#[$doc])* $variant,)*
        }

        impl Code {
            /// All codes.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The code's word, as in JSON.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }
        }
    };
}

codes! {
    /// Source and destination are one host.
    SameHost = "same-host",
    /// The destination takes no VMs at present.
    DestinationDisabled = "destination-disabled",
    /// The VM has no running QEMU that could be moved.
    VmNotRunning = "vm-not-running",
    /// Another migration of the VM is under way.
    AlreadyMigrating = "already-migrating",
    /// The destination has no usable QEMU.
    EngineMissing = "engine-missing",
    /// No QEMU there can run the guest the way it runs now (KVM or TCG).
    AcceleratorMissing = "accelerator-missing",
    /// No suitable QEMU there knows the VM's machine type.
    MachineTypeMissing = "machine-type-missing",
    /// No suitable QEMU there knows the VM's CPU model.
    CpuModelMissing = "cpu-model-missing",
    /// No suitable QEMU there can restore the VM's saved state.
    SavedStateLayout = "saved-state-layout",
    /// The guest sees processor features that the destination does not have.
    CpuFeatures = "cpu-features",
    /// The destination's QEMU is older than the one that runs the VM.
    EngineOlder = "engine-older",
    /// The destination has too little memory free.
    Memory = "memory",
    /// A network of the VM has no bridge on the destination.
    NetworkMissing = "network-missing",
    /// A disk or boot file cannot be opened on the destination.
    DiskUnreachable = "disk-unreachable",
    /// A device of the VM cannot be moved.
    DeviceCannotMove = "device-cannot-move",
    /// The destination's migration address cannot be resolved.
    AddressUnresolvable = "address-unresolvable",
    /// The migration address is not one of the destination's.
    AddressNotItsOwn = "address-not-its-own",
    /// Nothing answers at the destination's migration address.
    PortClosed = "port-closed",
    /// What answers there is not the destination, or does not trust the source.
    TlsFailed = "tls-failed",
    /// The destination takes no guests from this source.
    SourceNotAllowed = "source-not-allowed",
    /// Whether the source reaches the destination was not tried.
    AddressNotProbed = "address-not-probed",
    /// Only a stopped VM can be moved offline.
    VmNotStopped = "vm-not-stopped",
    /// An option says nothing in the mode that was asked for.
    OptionUnfit = "option-unfit",
    /// The policy forbids what an option asks for.
    PolicyForbids = "policy-forbids",
    /// One of the two QEMUs lacks what an option needs.
    EngineFeature = "engine-feature",
    /// xbzrle on parallel connections.
    XbzrleMultifd = "xbzrle-multifd",
    /// Zero-copy without parallel connections.
    ZerocopyAlone = "zerocopy-alone",
    /// Zero-copy with TLS.
    ZerocopyTls = "zerocopy-tls",
    /// Zero-copy with compression.
    ZerocopyCompression = "zerocopy-compression",
    /// Post-copy on parallel connections, with a QEMU that cannot do both.
    PostcopyMultifd = "postcopy-multifd",
    /// The destination host cannot receive by post-copy.
    PostcopyObstacle = "postcopy-obstacle",
    /// Post-copy between host pages of different size.
    PostcopyPageSize = "postcopy-page-size",
    /// What is at stake in post-copy.
    PostcopyRisk = "postcopy-risk",
    /// The VM has no disk of a name that was given a place.
    DiskUnknown = "disk-unknown",
    /// A disk that is to be copied is used by another running VM.
    DiskInUse = "disk-in-use",
    /// Something is being done with a disk that is to be copied.
    DiskBusy = "disk-busy",
    /// A disk cannot be copied as it is.
    DiskUncopyable = "disk-uncopyable",
    /// The destination does not hold the images on which a disk stands: they travel with it.
    DiskBaseMissing = "disk-base-missing",
    /// The name that a disk's copy would have is taken.
    DiskNameTaken = "disk-name-taken",
    /// The destination does not have the storage to which disks are to go.
    StorageMissing = "storage-missing",
    /// The storage to which disks are to go cannot be used.
    StorageUnusable = "storage-unusable",
    /// Disks are to go to the destination's default storage, which has none.
    NoDefaultStorage = "no-default-storage",
    /// There is too little room for the disks.
    StorageSpace = "storage-space",
    /// There is room for the disks as they are, and not for what they can grow to.
    StorageOvercommit = "storage-overcommit",
    /// One of the two QEMUs cannot copy disks.
    EngineDisks = "engine-disks",
    /// The guest writes to its disks as fast as they can be sent.
    DisksNotConverging = "disks-not-converging",
    /// The disks' data goes by the network of the agents.
    DisksByManagement = "disks-by-management",
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

fn refuse(code: Code, problem: String, advice: impl Into<String>) -> Verdict {
    Verdict { code, severity: Severity::Refuse, problem, advice: advice.into() }
}

fn warn(code: Code, problem: String, advice: impl Into<String>) -> Verdict {
    Verdict { code, severity: Severity::Warn, problem, advice: advice.into() }
}

/// Whether any of the verdicts stops the migration.
#[must_use]
pub fn refuses(verdicts: &[Verdict]) -> bool {
    verdicts.iter().any(|verdict| verdict.severity == Severity::Refuse)
}

/// Everything that stands in the way of the move, or is worth knowing; empty if nothing.
///
/// A VM that would stay on its own host is told only that and what concerns the VM itself: the rest
/// would be noise. Of a VM that moves offline only its definition is looked at: it needs no memory, no
/// stream, and nothing that its guest has seen.
#[must_use]
pub fn check(question: &Question) -> Vec<Verdict> {
    let Question { vm, mode, source, destination, shared_storages, reach } = question;
    let live = *mode != Mode::Offline;
    let mut verdicts = Vec::new();
    verdicts.extend(vm_state(vm, live));
    verdicts.extend(already_migrating(vm));
    if live {
        verdicts.extend(devices(vm));
    }
    if *source == destination.name {
        verdicts.push(refuse(
            Code::SameHost,
            format!("VM {} is on host {source} already.", vm.name),
            "Choose another destination.",
        ));
        return verdicts;
    }
    verdicts.extend(disabled(destination));
    verdicts.extend(engine(vm, destination, live));
    if live {
        verdicts.extend(cpu_features(vm, destination));
        verdicts.extend(memory(vm, destination));
    }
    verdicts.extend(networks(vm, destination));
    verdicts.extend(files(vm, source, destination, shared_storages));
    let reachable = reachability(source, &destination.name, reach);
    // A definition goes from agent to agent: whether a guest would get through is of no matter.
    verdicts.extend(reachable.filter(|found| live || found.code == Code::SourceNotAllowed));
    verdicts
}

/// The QEMU of the destination that would run the VM: the newest that has all it needs.
#[must_use]
pub fn choose_engine<'a>(vm: &VmFacts, destination: &'a HostFacts) -> Option<&'a EngineFacts> {
    let needs = engine_needs(vm);
    destination
        .engines
        .iter()
        .filter(|engine| needs.iter().all(|need| (need.met_by)(vm, engine)))
        .max_by_key(|engine| engine.version)
}

fn vm_state(vm: &VmFacts, live: bool) -> Option<Verdict> {
    match vm.state {
        GuestState::Running | GuestState::Paused => None,
        GuestState::Stopped | GuestState::Crashed if !live => None,
        GuestState::Stopped | GuestState::Crashed => Some(refuse(
            Code::VmNotRunning,
            format!(
                "VM {} is {}; only a running or paused VM can be moved live.",
                vm.name, vm.state
            ),
            format!(
                "Start it with `whimbrel vm start {}`, then migrate it; or move it stopped with --offline.",
                vm.name
            ),
        )),
    }
}

fn already_migrating(vm: &VmFacts) -> Option<Verdict> {
    let migration = vm.migration?;
    Some(refuse(
        Code::AlreadyMigrating,
        format!("VM {} is migrating already (migration {migration}).", vm.name),
        format!(
            "Wait for it (`whimbrel migration watch {migration}`) or cancel it (`whimbrel migration \
             cancel {migration}`)."
        ),
    ))
}

fn devices(vm: &VmFacts) -> impl Iterator<Item = Verdict> {
    vm.unmovable.iter().map(|UnmovableDevice { device, because }| {
        refuse(
            Code::DeviceCannotMove,
            format!("Device {device} of VM {} cannot be moved because {because}.", vm.name),
            format!("Remove {device} from the VM, or stop the VM and move it stopped."),
        )
    })
}

fn disabled(destination: &HostFacts) -> Option<Verdict> {
    if destination.enabled {
        return None;
    }
    Some(refuse(
        Code::DestinationDisabled,
        format!("Host {} takes no VMs at present.", destination.name),
        "Enable the host, or choose another destination.",
    ))
}

/// The first thing that no QEMU of the destination has. What follows from it is not listed: a
/// QEMU that is missing has no machine types either. A stopped VM has no QEMU that it runs on.
fn engine(vm: &VmFacts, destination: &HostFacts, live: bool) -> Option<Verdict> {
    let host = &destination.name;
    let mut engines: Vec<&EngineFacts> = destination.engines.iter().collect();
    if engines.is_empty() && !live {
        return Some(refuse(
            Code::EngineMissing,
            format!("Host {host} has no usable QEMU: VM {} could not be started there.", vm.name),
            format!("Install QEMU on {host} and restart its agent."),
        ));
    }
    if engines.is_empty() {
        return Some(refuse(
            Code::EngineMissing,
            format!("Host {host} has no usable QEMU; VM {} runs on QEMU {}.", vm.name, vm.engine),
            format!("Install QEMU {} or newer on {host} and restart its agent.", vm.engine),
        ));
    }
    let needs = engine_needs(vm).into_iter();
    for need in needs.filter(|need| live || need.code != Code::AcceleratorMissing) {
        let versions: Vec<_> = engines.iter().map(|engine| engine.version.to_string()).collect();
        engines.retain(|engine| (need.met_by)(vm, engine));
        if engines.is_empty() {
            return Some(refuse(
                need.code,
                format!(
                    "QEMU {} on host {host} cannot do {} of VM {}.",
                    versions.join(", "),
                    need.what,
                    vm.name
                ),
                format!("Choose another destination, or {}.", need.remedy),
            ));
        }
    }
    if live { older(vm, destination) } else { None }
}

/// Something that a QEMU must be able to do to run the VM.
struct EngineNeed {
    code: Code,
    what: String,
    met_by: fn(&VmFacts, &EngineFacts) -> bool,
    remedy: String,
}

fn engine_needs(vm: &VmFacts) -> [EngineNeed; 4] {
    let install = match vm.state {
        GuestState::Running | GuestState::Paused => {
            format!("install there QEMU {}, which runs the VM now", vm.engine)
        }
        GuestState::Stopped | GuestState::Crashed => "install there a QEMU that has it".into(),
    };
    [
        EngineNeed {
            code: Code::AcceleratorMissing,
            what: format!("accelerator {}", vm.accelerator),
            met_by: |vm, engine| engine.accelerators.contains(&vm.accelerator),
            remedy: "restart the VM with an accelerator that both hosts have".into(),
        },
        EngineNeed {
            code: Code::MachineTypeMissing,
            what: format!("machine type {}", vm.machine_type),
            met_by: |vm, engine| engine.machine_types.contains(&vm.machine_type),
            remedy: install.clone(),
        },
        EngineNeed {
            code: Code::CpuModelMissing,
            what: format!("CPU model {}", vm.cpu_model),
            met_by: |vm, engine| engine.cpu_models.contains(&vm.cpu_model),
            remedy: install,
        },
        // Mapped memory (`mapped-ram`) came with QEMU 9.0: 10.0.2 writes it, 7.2.22 cannot read it.
        EngineNeed {
            code: Code::SavedStateLayout,
            what: "the saved state, in which each page has its place,".into(),
            met_by: |vm, engine| engine.maps_memory || !vm.saved_mapped,
            remedy: "restore the VM where it is (`whimbrel vm restore`) and migrate it running"
                .into(),
        },
    ]
}

/// To an older QEMU works by the pinned machine type (tried: 10.0.2 to 7.2.22 with pc-q35-7.2), but
/// QEMU's developers test the other direction.
fn older(vm: &VmFacts, destination: &HostFacts) -> Option<Verdict> {
    let engine = choose_engine(vm, destination)?;
    let line = |version: EngineVersion| (version.major, version.minor);
    if line(engine.version) >= line(vm.engine) {
        return None;
    }
    Some(warn(
        Code::EngineOlder,
        format!(
            "VM {} runs on QEMU {}, host {} has the older QEMU {}.",
            vm.name, vm.engine, destination.name, engine.version
        ),
        format!("Prefer a destination with QEMU {} or newer.", vm.engine),
    ))
}

fn cpu_features(vm: &VmFacts, destination: &HostFacts) -> Option<Verdict> {
    let missing: Vec<&str> =
        vm.cpu_features.difference(&destination.cpu_features).map(String::as_str).collect();
    if missing.is_empty() {
        return None;
    }
    Some(refuse(
        Code::CpuFeatures,
        format!(
            "The guest of VM {} sees processor features that host {} does not have: {}.",
            vm.name,
            destination.name,
            missing.join(", ")
        ),
        "Choose a destination with these features, or restart the VM with a CPU model that does \
         without them.",
    ))
}

fn memory(vm: &VmFacts, destination: &HostFacts) -> Option<Verdict> {
    let needed = vm.memory_bytes.saturating_add(ENGINE_OVERHEAD_BYTES);
    if needed <= destination.memory_available_bytes {
        return None;
    }
    let host = &destination.name;
    let advice = if needed > destination.memory_total_bytes {
        format!("{host} is too small for this VM: choose another destination.")
    } else {
        format!("Free memory on {host}, or choose another destination.")
    };
    Some(refuse(
        Code::Memory,
        format!(
            "VM {} needs {} MiB ({} MiB and {} MiB for QEMU), host {host} has {} MiB available of {} \
             MiB.",
            vm.name,
            needed.div_ceil(MIB_BYTES),
            vm.memory_bytes.div_ceil(MIB_BYTES),
            ENGINE_OVERHEAD_BYTES / MIB_BYTES,
            destination.memory_available_bytes / MIB_BYTES,
            destination.memory_total_bytes / MIB_BYTES,
        ),
        advice,
    ))
}

/// One verdict for each missing network, naming the interfaces that need it.
fn networks(vm: &VmFacts, destination: &HostFacts) -> Vec<Verdict> {
    let wanted: BTreeSet<&Name> = vm.nics.iter().map(|nic| &nic.network).collect();
    let missing = wanted.into_iter().filter(|network| !destination.networks.contains(*network));
    missing
        .map(|network| {
            let nics: Vec<&str> = vm
                .nics
                .iter()
                .filter(|nic| nic.network == *network)
                .map(|nic| nic.label.as_str())
                .collect();
            refuse(
                Code::NetworkMissing,
                format!(
                    "Network {network} ({} of VM {}) is not on host {}.",
                    nics.join(", "),
                    vm.name,
                    destination.name
                ),
                format!("Give {} a bridge for {network}, or choose another.", destination.name),
            )
        })
        .collect()
}

/// One verdict for each file that the destination could not open.
fn files(
    vm: &VmFacts,
    source: &Name,
    destination: &HostFacts,
    shared_storages: &BTreeSet<Name>,
) -> Vec<Verdict> {
    let host = &destination.name;
    let verdict = |file: &FileFacts| {
        let FileFacts { label, storage, path } = file;
        let what = format!("{label} of VM {} ({path} on storage {storage})", vm.name);
        if !destination.storages.contains(storage) {
            return Some(refuse(
                Code::DiskUnreachable,
                format!("Host {host} has no storage {storage}: it cannot open the {what}."),
                format!("Add storage {storage} to {host}, or choose another destination."),
            ));
        }
        if !shared_storages.contains(storage) {
            return Some(refuse(
                Code::DiskUnreachable,
                format!(
                    "Storage {storage} on host {host} is not the one on host {source}: {host} cannot \
                     open the {what}."
                ),
                format!("Mount the same file system as {storage} on both hosts."),
            ));
        }
        None
    };
    vm.files.iter().filter_map(verdict).collect()
}

fn reachability(source: &Name, host: &Name, reach: &Reach) -> Option<Verdict> {
    match reach {
        Reach::Reachable => None,
        Reach::NotProbed => Some(warn(
            Code::AddressNotProbed,
            format!("Whether host {source} reaches host {host} was not tried."),
            format!("See that the agent of {source} is running."),
        )),
        Reach::Unresolvable { by, host: name, because } => Some(refuse(
            Code::AddressUnresolvable,
            format!("Host {by} cannot resolve {name}, the migration address of {host}: {because}."),
            format!(
                "Correct --migrate-address, or give {host} a `migration_address` that both hosts can resolve, or an IP address."
            ),
        )),
        Reach::NotItsOwn { because } => Some(refuse(
            Code::AddressNotItsOwn,
            format!("Host {host} cannot receive at the migration address: {because}."),
            format!(
                "Give an address of {host}: in --migrate-address, else in its `migration_address`."
            ),
        )),
        Reach::PortClosed { address, because } => Some(refuse(
            Code::PortClosed,
            format!("Host {source} cannot connect to host {host} at {address}: {because}."),
            format!("See that the agent of {host} is running and that no firewall is in between."),
        )),
        Reach::NotAllowed { because } => Some(refuse(
            Code::SourceNotAllowed,
            format!("Host {host} takes no VMs from host {source}: {because}."),
            format!(
                "Add {source} or its address to `migration_sources` on {host}, and restart its agent."
            ),
        )),
        Reach::TlsFailed { address, because } => Some(refuse(
            Code::TlsFailed,
            format!(
                "Host {source} does not trust what answers at {address} as host {host}: {because}."
            ),
            format!(
                "Check the certificates and clocks of {source} and {host}; join the pool again."
            ),
        )),
    }
}

#[cfg(test)]
mod tests;
