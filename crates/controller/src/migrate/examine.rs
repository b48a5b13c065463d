//! Every reason against a move, and the facts that they are made from: asked for from both agents, before anything is touched.
//!
//! What the facts mean is [`whimbrel_migration::preflight`]'s matter. Two things are tried and not only asked: a shared storage
//! is proven by a token that the source writes and the destination reads, and the way of the stream by a knock at a migration
//! port. Used by the admission of a migration and by plans, which begin nothing.

use std::collections::BTreeSet;

use whimbrel_api::agent::{HostReport, KnockConnect, KnockListen, Mobility, Reach as Knocked};
use whimbrel_api::client::AgentClient;
use whimbrel_api::migration::MigrateOptions;
use whimbrel_api::policy::Policy;
use whimbrel_api::vm::{Boot, VmDefinition, VmState};
use whimbrel_api::{ApiError, ErrorCode, Name, Verdict};
use whimbrel_migration::preflight::combinations::{Combination, combinations};
use whimbrel_migration::preflight::{
    self, EngineAbilities, EngineFacts, FileFacts, GuestState, HostFacts, NicFacts, Question,
    Reach, UnmovableDevice, VmFacts,
};

use crate::hosts::Member;
use crate::store::VmRow;

/// What both agents said, and what follows from it.
#[derive(Debug, Clone)]
pub(crate) struct Examined {
    /// What the source says of the VM.
    pub(crate) mobility: Mobility,
    /// What the destination says of itself.
    pub(crate) host: HostReport,
    /// Everything that stands in the way, or is worth knowing.
    pub(crate) verdicts: Vec<Verdict>,
    /// What the engine can do that would run the VM on the destination.
    destination: Option<EngineAbilities>,
}

impl Examined {
    /// What the source's engine and the destination's can do.
    pub(crate) fn abilities(&self) -> (Option<&EngineAbilities>, Option<&EngineAbilities>) {
        (self.mobility.abilities.as_ref(), self.destination.as_ref())
    }
}

/// Asks both agents, and judges. `Err`: one of them does not answer, or says what is not understood.
pub(crate) async fn examine(
    source: &Member,
    destination: &Member,
    row: &VmRow,
    options: &MigrateOptions,
    policy: &Policy,
) -> Result<Examined, ApiError> {
    let (here, there) = (source.agent(), destination.agent());
    let (mobility, host) = tokio::try_join!(here.mobility(row.id()), there.host())?;
    let (shared_storages, reach) = tokio::join!(
        prove_shared(&here, &there, &mobility.vm.definition),
        knock(&here, &there, &row.host, &destination.name, options),
    );
    let question = Question {
        vm: vm_facts(&mobility)?,
        mode: options.mode,
        source: row.host.clone(),
        destination: host_facts(&host, destination.is_enabled())?,
        shared_storages,
        reach,
    };
    let engine = preflight::choose_engine(&question.vm, &question.destination);
    let engine = engine.map(|engine| engine.version.to_string());
    let report = host.engines.iter().find(|report| Some(&report.version) == engine.as_ref());
    let abilities = report.and_then(|report| report.abilities.clone());
    let mut verdicts = preflight::check(&question);
    if source.name != destination.name {
        verdicts.extend(combinations(&Combination {
            vm: &question.vm.name,
            state: question.vm.state,
            options,
            policy,
            source: (&row.host, mobility.abilities.as_ref()),
            destination: (&destination.name, abilities.as_ref()),
        }));
    }
    Ok(Examined { mobility, host, verdicts, destination: abilities })
}

/// The storages of a VM of which both hosts see the same one.
async fn prove_shared(
    source: &AgentClient,
    destination: &AgentClient,
    vm: &VmDefinition,
) -> BTreeSet<Name> {
    let wanted: BTreeSet<Name> = files(vm).into_iter().map(|file| file.storage).collect();
    let proofs = wanted.into_iter().map(|name| async move {
        let token = source.write_token(&name).await.ok()?;
        let seen = destination.token_seen(&name, &token).await.ok()?;
        seen.seen.then_some(name)
    });
    futures::future::join_all(proofs).await.into_iter().flatten().collect()
}

/// Tries the way that the stream will go.
async fn knock(
    source: &AgentClient,
    destination: &AgentClient,
    from: &Name,
    to: &Name,
    options: &MigrateOptions,
) -> Reach {
    if from == to {
        return Reach::NotProbed;
    }
    let listen = KnockListen { from: from.clone(), listen: options.migrate_address.clone() };
    let address = match destination.knock_listen(&listen).await {
        Ok(address) => address,
        Err(error) if error.code == ErrorCode::NotAllowed => {
            return Reach::NotAllowed { because: "it is not in its list".to_owned() };
        }
        // The codes of the knock: see `KnockListen`.
        Err(error) if error.code == ErrorCode::NotFound => {
            let host = listen.listen.unwrap_or_else(|| "its `migration_address`".to_owned());
            return Reach::Unresolvable { by: to.clone(), host, because: error.message };
        }
        Err(error) if error.code == ErrorCode::NoResources => {
            return Reach::NotItsOwn { because: error.message };
        }
        Err(_) => return Reach::NotProbed,
    };
    let at = format!("{}:{}", address.host, address.port);
    let host = address.host.clone();
    match source.knock_connect(&KnockConnect { to: to.clone(), address }).await {
        Ok(Knocked::Open { .. }) => Reach::Reachable,
        Ok(Knocked::Unresolvable { why }) => {
            Reach::Unresolvable { by: from.clone(), host, because: why }
        }
        Ok(Knocked::NotAllowed { why }) => Reach::NotAllowed { because: why },
        Ok(Knocked::Closed { why }) => Reach::PortClosed { address: at, because: why },
        Ok(Knocked::Untrusted { why }) => Reach::TlsFailed { address: at, because: why },
        Err(_) => Reach::NotProbed,
    }
}

fn files(vm: &VmDefinition) -> Vec<FileFacts> {
    let fact = |label: String, file: &whimbrel_api::vm::StoragePath| FileFacts {
        label,
        storage: file.storage.clone(),
        path: file.path.clone(),
    };
    let mut files: Vec<FileFacts> =
        vm.disks.iter().map(|disk| fact(format!("disk {}", disk.name), &disk.file)).collect();
    for disk in &vm.disks {
        let beneath = disk.layers.iter();
        files.extend(beneath.map(|l| fact(format!("disk {}'s layer", disk.name), &l.file)));
    }
    let frozen = vm.snapshots.iter().flat_map(|snapshot| &snapshot.disks);
    let frozen = frozen.flat_map(|disk| disk.layers.iter().map(move |layer| (disk, layer)));
    files.extend(frozen.map(|(disk, l)| fact(format!("disk {}'s snapshot", disk.name), &l.file)));
    if let Boot::Kernel { kernel, initrd, .. } = &vm.boot {
        files.push(fact("kernel".to_owned(), kernel));
        files.extend(initrd.as_ref().map(|initrd| fact("initrd".to_owned(), initrd)));
    }
    files.extend(vm.saved.as_ref().map(|saved| fact("saved state".to_owned(), &saved.file)));
    files
}

fn not_understood(what: &str, text: &str) -> ApiError {
    ApiError::new(
        ErrorCode::Internal,
        format!("a host said `{}`, which is no {what}", text.escape_debug()),
    )
}

fn vm_facts(mobility: &Mobility) -> Result<VmFacts, ApiError> {
    let definition = &mobility.vm.definition;
    let (state, migration) = match &mobility.vm.state {
        VmState::Running => (GuestState::Running, None),
        VmState::Paused => (GuestState::Paused, None),
        VmState::Stopped | VmState::Unknown { .. } => (GuestState::Stopped, None),
        VmState::Crashed { .. } => (GuestState::Crashed, None),
        VmState::Migrating { migration } => (GuestState::Running, Some(*migration)),
        VmState::Unresolved { migration, .. } => (GuestState::Paused, Some(*migration)),
    };
    let engine = mobility.vm.engine.as_ref();
    // Without a QEMU there is neither; preflight refuses such a VM before it looks at them.
    let version = engine.map_or("0.0.0", |engine| engine.version.as_str());
    let accelerator = engine.map_or("tcg", |engine| engine.accelerator.as_str());
    Ok(VmFacts {
        name: definition.name.clone(),
        state,
        memory_bytes: definition.memory_bytes,
        saved_mapped: definition.saved.as_ref().is_some_and(|saved| saved.mapped),
        engine: version.parse().map_err(|_| not_understood("version of QEMU", version))?,
        accelerator: accelerator_of(accelerator)?,
        machine_type: definition.machine.clone(),
        cpu_model: definition.cpu.clone(),
        cpu_features: mobility.cpu_features.clone(),
        files: files(definition),
        nics: definition
            .nics
            .iter()
            .enumerate()
            .map(|(index, nic)| NicFacts {
                label: format!("nic {index}"),
                network: nic.network.clone(),
            })
            .collect(),
        unmovable: mobility
            .blockers
            .iter()
            .map(|why| UnmovableDevice {
                device: definition.name.to_string(),
                because: why.clone(),
            })
            .collect(),
        migration,
    })
}

fn host_facts(report: &HostReport, enabled: bool) -> Result<HostFacts, ApiError> {
    let engine = |engine: &whimbrel_api::agent::EngineReport| {
        Ok(EngineFacts {
            version: engine
                .version
                .parse()
                .map_err(|_| not_understood("version of QEMU", &engine.version))?,
            accelerators: BTreeSet::from([accelerator_of(&engine.accelerator)?]),
            machine_types: engine.machines.iter().cloned().collect(),
            cpu_models: engine.cpu_models.iter().cloned().collect(),
            maps_memory: engine.abilities.as_ref().is_some_and(|able| able.can("mapped-ram")),
        })
    };
    Ok(HostFacts {
        name: report.name.clone(),
        enabled,
        engines: report.engines.iter().map(engine).collect::<Result<_, ApiError>>()?,
        cpu_features: report.cpu_features.clone(),
        memory_total_bytes: report.memory_total_bytes,
        memory_available_bytes: report.memory_available_bytes,
        networks: report.networks.iter().cloned().collect(),
        storages: report
            .storages
            .iter()
            .filter(|s| s.trouble.is_none())
            .map(|s| s.name.clone())
            .collect(),
    })
}

fn accelerator_of(word: &str) -> Result<preflight::Accelerator, ApiError> {
    match word {
        "kvm" => Ok(preflight::Accelerator::Kvm),
        "tcg" => Ok(preflight::Accelerator::Tcg),
        other => Err(not_understood("accelerator", other)),
    }
}
