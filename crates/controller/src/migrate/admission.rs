//! Admission and preflight: every reason against a migration, told at once, before anything is touched.
//!
//! The facts are asked for here, from both agents and at the same time; what they mean is
//! [`whimbrel_migration::preflight`]'s matter. Two things are tried and not only asked: a shared storage is proven by a
//! token that the source writes and the destination reads, and the way of the stream by a knock at a migration port.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::Timestamp;
use whimbrel_api::agent::{HostReport, KnockConnect, KnockListen, Mobility, Reach as Knocked};
use whimbrel_api::client::AgentClient;
use whimbrel_api::migration::{
    MigrateOptions, MigrateRequest, Migration, MigrationState, PhaseStart, ProblemCode,
};
use whimbrel_api::vm::{Boot, VmDefinition, VmState};
use whimbrel_api::{ApiError, Epoch, ErrorCode, Name, Phase, Verdict};
use whimbrel_migration::preflight::{
    self, EngineFacts, FileFacts, GuestState, HostFacts, NicFacts, Question, Reach,
    UnmovableDevice, VmFacts,
};

use super::page::{self, Room};
use crate::Controller;
use crate::store::{Begun, VmRow};

/// Admits a migration or refuses it with every reason; what is admitted goes on by itself.
///
/// The same request made again finds its migration and is answered with the record as it stands.
pub async fn admit(
    controller: &Arc<Controller>,
    request: MigrateRequest,
) -> Result<Migration, ApiError> {
    if let Ok(record) = controller.migration(request.id).await {
        return same_request(record, &request);
    }
    check_options(&request.options)?;
    let started = Timestamp::now();
    let row = controller.find_vm(&request.vm).await?;
    let source = controller.agent(&row.host)?;
    let member = controller.hosts().get(&request.destination)?;
    let destination = member.agent();

    let (mobility, host) = tokio::try_join!(source.mobility(row.id()), destination.host())?;
    let (shared_storages, reach) = tokio::join!(
        prove_shared(&source, &destination, &mobility.vm.definition),
        knock(&source, &destination, &row.host, &request.destination),
    );
    let question = Question {
        vm: vm_facts(&mobility)?,
        mode: request.options.mode,
        source: row.host.clone(),
        destination: host_facts(&host, member.is_enabled())?,
        shared_storages,
        reach,
    };
    let verdicts = preflight::check(&question);
    if preflight::refuses(&verdicts) {
        return Err(refusal(&row, &request.destination, verdicts));
    }
    let epoch = next_epoch(controller, &mobility).await?;
    let record = new_record(&row, &mobility, epoch, request, started, verdicts);
    match controller.store().begin_migration(&record).await {
        Ok(Begun::New) => {
            let room = Room { memory_available_bytes: host.memory_available_bytes };
            page::open(controller, record.clone(), Some(room));
            Ok(record)
        }
        Ok(Begun::Again(record)) => Ok(*record),
        Err(error) => Err(error.into()),
    }
}

/// A retry is the same request. Another one under the same id is a mistake of whoever makes the ids.
fn same_request(record: Migration, request: &MigrateRequest) -> Result<Migration, ApiError> {
    let same_vm = record.vm_name.as_str() == request.vm || record.vm.to_string() == request.vm;
    if same_vm && record.destination == request.destination && record.options == request.options {
        return Ok(record);
    }
    let message = format!("migration {} is there already, and is another one", record.id);
    Err(ApiError::new(ErrorCode::Exists, message).hint("every migration needs an id of its own"))
}

fn check_options(options: &MigrateOptions) -> Result<(), ApiError> {
    let problems = options.validate();
    if problems.is_empty() {
        return Ok(());
    }
    let only_numbers = problems.iter().all(|problem| problem.code == ProblemCode::OutOfRange);
    let code = if only_numbers { ErrorCode::OutOfRange } else { ErrorCode::BadRequest };
    let sentences: Vec<String> = problems.into_iter().map(|problem| problem.sentence).collect();
    Err(ApiError::new(code, sentences.join("; ")))
}

fn refusal(row: &VmRow, destination: &Name, verdicts: Vec<Verdict>) -> ApiError {
    let message = format!(
        "{} cannot be migrated to {destination} as things are; nothing was begun",
        row.name()
    );
    let mut error = ApiError::new(ErrorCode::PreflightRefused, message);
    error.verdicts = verdicts;
    error
}

/// The epoch that a migration is for: after the source's, and one that no earlier migration was for. One that ended before
/// the source was asked has burnt its epoch at its destination, and the source does not know.
async fn next_epoch(controller: &Controller, mobility: &Mobility) -> Result<Epoch, ApiError> {
    let tried = controller.store().highest_epoch_of(mobility.vm.definition.id).await?;
    Ok(tried.map_or(mobility.vm.epoch, |tried| tried.max(mobility.vm.epoch)).next())
}

fn new_record(
    row: &VmRow,
    mobility: &Mobility,
    epoch: Epoch,
    request: MigrateRequest,
    started: Timestamp,
    verdicts: Vec<Verdict>,
) -> Migration {
    let preflight = PhaseStart { phase: Phase::Preflight, at: started };
    Migration {
        id: request.id,
        vm: row.id(),
        vm_name: row.name().clone(),
        source: row.host.clone(),
        destination: request.destination,
        epoch,
        memory_bytes: mobility.vm.definition.memory_bytes,
        options: request.options,
        phase: Phase::Preflight,
        state: MigrationState::Running,
        settled: None,
        cancel_requested: false,
        verdicts,
        policy: None,
        strategy: None,
        forecast: None,
        decisions: Vec::new(),
        postcopy: None,
        phases: vec![PhaseStart { phase: Phase::Admission, at: started }, preflight],
        progress: None,
        downtime: None,
        started,
        ended: None,
        total_ms: None,
        leftovers: Vec::new(),
    }
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
async fn knock(source: &AgentClient, destination: &AgentClient, from: &Name, to: &Name) -> Reach {
    if from == to {
        return Reach::NotProbed;
    }
    let Ok(address) = destination.knock_listen(&KnockListen { from: from.clone() }).await else {
        return Reach::NotProbed;
    };
    let at = format!("{}:{}", address.host, address.port);
    let host = address.host.clone();
    match source.knock_connect(&KnockConnect { to: to.clone(), address }).await {
        Ok(Knocked::Open { .. }) => Reach::Reachable,
        Ok(Knocked::Unresolvable { why }) => Reach::Unresolvable { host, because: why },
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
    if let Boot::Kernel { kernel, initrd, .. } = &vm.boot {
        files.push(fact("kernel".to_owned(), kernel));
        files.extend(initrd.as_ref().map(|initrd| fact("initrd".to_owned(), initrd)));
    }
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
