//! Admission: a migration is refused with every reason, or written down with the way that it will go.
//!
//! The reasons are [`super::examine`]'s, the way is chosen by [`crate::plan`]. Both are at work at the same time, and nothing is
//! begun: what is measured is measured in the shadow of preflight, and no longer than a move could win by it.

use std::sync::Arc;

use jiff::Timestamp;
use whimbrel_api::agent::Mobility;
use whimbrel_api::migration::{MigrateRequest, Migration, MigrationState, Mode, PhaseStart};
use whimbrel_api::policy::Policy;
use whimbrel_api::{ApiError, Epoch, ErrorCode, Name, Phase, Verdict};
use whimbrel_migration::preflight;
use whimbrel_migration::strategy::Plan;

use super::examine::{Examined, examine};
use super::page::{self, Room};
use crate::plan::{choose, effort, gather, subject};
use crate::store::{Begun, Subject, VmRow};
use crate::{Controller, policies};

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
    policies::sound(&request.options.validate())?;
    let started = Timestamp::now();
    let row = controller.find_vm(&request.vm).await?;
    let asked = request.options.policy.as_ref();
    let (_, policy) = policies::applied(controller, Subject::Vm(row.id()), asked).await?;

    let (examined, plan) = look(controller, &row, &request, &policy).await?;
    if preflight::refuses(&examined.verdicts) {
        controller.metrics().refused(&examined.verdicts);
        return Err(refusal(&row, &request.destination, examined.verdicts));
    }
    let epoch = next_epoch(controller, &examined.mobility).await?;
    let room = (request.options.mode != Mode::Offline)
        .then_some(Room { memory_available_bytes: examined.host.memory_available_bytes });
    let record = Admitted { row, request, epoch, started, policy, plan }.record(examined);
    match controller.store().begin_migration(&record).await {
        Ok(Begun::New) => {
            controller.metrics().begun();
            page::open(controller, record.clone(), room);
            Ok(record)
        }
        Ok(Begun::Again(record)) => Ok(*record),
        Err(error) => Err(error.into()),
    }
}

/// Looks for reasons against the move, and meanwhile measures what the way is chosen by. There is no way for what moves no
/// memory.
async fn look(
    controller: &Arc<Controller>,
    row: &VmRow,
    request: &MigrateRequest,
    policy: &Policy,
) -> Result<(Examined, Option<Plan>), ApiError> {
    let source = controller.hosts().get(&row.host)?;
    let destination = controller.hosts().get(&request.destination)?;
    let options = &request.options;
    let subject = subject(controller, row, &source, &destination, options);
    let (examined, gathered) = tokio::join!(
        examine(&source, &destination, row, options, policy),
        gather(controller, &subject, effort(&subject, options)),
    );
    let examined = examined?;
    let moves_memory = options.mode != Mode::Offline;
    let plan = moves_memory.then(|| choose(&gathered, &examined, options, policy));
    Ok((examined, plan))
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

/// A migration that may begin.
struct Admitted {
    row: VmRow,
    request: MigrateRequest,
    epoch: Epoch,
    started: Timestamp,
    policy: Policy,
    plan: Option<Plan>,
}

impl Admitted {
    fn record(self, examined: Examined) -> Migration {
        let Self { row, request, epoch, started, policy, plan } = self;
        let preflight = PhaseStart { phase: Phase::Preflight, at: started };
        let (strategy, forecast, decisions) = match plan {
            Some(plan) => (Some(plan.strategy), Some(plan.forecast), plan.decisions),
            None => (None, None, Vec::new()),
        };
        Migration {
            id: request.id,
            vm: row.id(),
            vm_name: row.name().clone(),
            source: row.host.clone(),
            destination: request.destination,
            epoch,
            memory_bytes: examined.mobility.vm.definition.memory_bytes,
            options: request.options,
            phase: Phase::Preflight,
            state: MigrationState::Running,
            settled: None,
            cancel_requested: false,
            reclaim: None,
            verdicts: examined.verdicts,
            disks: Vec::new(),
            policy: Some(policy.name),
            strategy,
            forecast,
            decisions,
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
}
