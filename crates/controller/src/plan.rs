//! What moving a VM would take, and the way that it goes: measurements, forecast and choice brought together.
//!
//! ```text
//!             examine: facts from both agents ─▶ verdicts (preflight, combinations)
//!  a plan ──┤
//!  a move ──┤ gather: measurements, or what is assumed in their place
//!             choose: forecast, ladder ─▶ strategy and decisions ([`whimbrel_migration::strategy`])
//! ```
//!
//! A plan ([`plan`]) and a migration ([`crate::migrate::admit`]) go through the same three functions; they differ in how much is
//! measured ([`Effort`]). Nothing is begun here and nothing written down.

mod candidates;
mod gather;
mod shelf;

use std::sync::Arc;

use whimbrel_api::measure::LINK_CAP_BYTES_PER_S_MIN;
use whimbrel_api::migration::{Decision, MigrateOptions, Mode, Rejection};
use whimbrel_api::plan::{
    DESTINATIONS_MAX, DestinationPlan, Measured, MeasuredAt, PlanRequest, VmPlan,
};
use whimbrel_api::policy::Policy;
use whimbrel_api::vm::VmState;
use whimbrel_api::{ApiError, ErrorCode};
use whimbrel_migration::forecast::facts::EngineCosts;
use whimbrel_migration::preflight::{self, EngineAbilities, EngineVersion};
use whimbrel_migration::strategy::{self, Plan, Situation};

pub(crate) use gather::{Effort, Gathered, Subject, gather, keep_cpus, note_rate};
pub(crate) use shelf::Shelf;

use crate::Controller;
use crate::hosts::Member;
use crate::migrate::examine::{Examined, examine};
use crate::policies;
use crate::store::{Subject as PolicySubject, VmRow};

/// A guest with less memory is moved without measuring: any way takes less than measuring would win.
const SMALL_BYTES: u64 = 256 << 20;

/// What moving a VM would take, for each destination.
pub(crate) async fn plan(
    controller: &Arc<Controller>,
    request: PlanRequest,
) -> Result<VmPlan, ApiError> {
    policies::sound(&request.options.validate())?;
    let row = controller.find_vm(&request.vm).await?;
    let asked = request.options.policy.as_ref();
    let (applied, policy) =
        policies::applied(controller, PolicySubject::Vm(row.id()), asked).await?;
    let members = destinations(controller, &row, &request)?;
    let mut plans = Vec::with_capacity(members.len());
    // One after the other: a host probes one link at a time, and what is measured of the guest serves all.
    for member in members {
        plans.push(to_one(controller, &row, member, &request, &policy).await);
    }
    Ok(VmPlan {
        vm: row.id(),
        vm_name: row.name().clone(),
        source: row.host.clone(),
        policy: applied,
        destinations: plans,
    })
}

fn destinations(
    controller: &Controller,
    row: &VmRow,
    request: &PlanRequest,
) -> Result<Vec<Arc<Member>>, ApiError> {
    if request.destinations.len() > DESTINATIONS_MAX {
        let message = format!("a plan has at most {DESTINATIONS_MAX} destinations");
        return Err(ApiError::new(ErrorCode::OutOfRange, message));
    }
    if let Some(cap) = request.probe_bytes_per_s
        && cap < LINK_CAP_BYTES_PER_S_MIN
    {
        let message =
            format!("probe_bytes_per_s is {cap}; it can be {LINK_CAP_BYTES_PER_S_MIN} or more");
        return Err(ApiError::new(ErrorCode::OutOfRange, message));
    }
    if !request.destinations.is_empty() {
        return request.destinations.iter().map(|name| controller.hosts().get(name)).collect();
    }
    let others = controller.hosts().all().into_iter().filter(|member| member.name != row.host);
    Ok(others.take(DESTINATIONS_MAX).collect())
}

async fn to_one(
    controller: &Arc<Controller>,
    row: &VmRow,
    destination: Arc<Member>,
    request: &PlanRequest,
    policy: &Policy,
) -> DestinationPlan {
    let name = destination.name.clone();
    let answer = answer(controller, row, destination, request, policy).await;
    answer.unwrap_or_else(|error| DestinationPlan {
        destination: name,
        verdicts: Vec::new(),
        refused: true,
        trouble: Some(error.message),
        plan: None,
        candidates: Vec::new(),
        measurements: None,
        measured: Vec::new(),
    })
}

async fn answer(
    controller: &Arc<Controller>,
    row: &VmRow,
    destination: Arc<Member>,
    request: &PlanRequest,
    policy: &Policy,
) -> Result<DestinationPlan, ApiError> {
    let options = &request.options;
    let source = controller.hosts().get(&row.host)?;
    let examined = examine(&source, &destination, row, options, policy).await?;
    let mut plan = DestinationPlan {
        destination: destination.name.clone(),
        refused: preflight::refuses(&examined.verdicts),
        verdicts: examined.verdicts.clone(),
        trouble: None,
        plan: None,
        candidates: Vec::new(),
        measurements: None,
        measured: Vec::new(),
    };
    let moves_memory = options.mode != Mode::Offline && examined.mobility.vm.engine.is_some();
    if moves_memory && source.name != destination.name {
        let subject = subject(controller, row, &source, &destination, options);
        let PlanRequest { fresh, probe_bytes_per_s, .. } = *request;
        let effort = Effort::Thorough { fresh, probe_bytes_per_s };
        let gathered = gather(controller, &subject, effort).await;
        plan.plan = Some(choose(&gathered, &examined, options, policy));
        let (nothing, costs) = (unable(), EngineCosts::default());
        let (here, there) = examined.abilities();
        let engines = (here.unwrap_or(&nothing), there.unwrap_or(&nothing));
        let facts = &gathered.measurements;
        plan.candidates = candidates::candidates(facts, &costs, engines, (options, policy));
        plan.measured = gathered.measured;
        plan.measurements = Some(gathered.measurements);
    }
    Ok(plan)
}

/// What is to be measured for a move.
pub(crate) fn subject(
    controller: &Controller,
    row: &VmRow,
    source: &Arc<Member>,
    destination: &Arc<Member>,
    options: &MigrateOptions,
) -> Subject {
    Subject {
        vm: row.id(),
        memory_bytes: row.definition.memory_bytes,
        paused: controller.view(row).state == VmState::Paused,
        source: source.clone(),
        destination: destination.clone(),
        tls: options.tls,
    }
}

/// How much a migration measures before it begins: nothing where nothing could follow from it.
pub(crate) fn effort(subject: &Subject, options: &MigrateOptions) -> Effort {
    let stream_is_said = options.zerocopy
        || (options.compression.is_some() && options.parallel_connections.is_some());
    let goes_nowhere = subject.source.name == subject.destination.name;
    let small = subject.memory_bytes < SMALL_BYTES;
    if options.mode == Mode::Offline || small || stream_is_said || goes_nowhere {
        return Effort::None;
    }
    Effort::Brief
}

/// Chooses the way, and says why; what had to be assumed is the first thing that is said.
pub(crate) fn choose(
    gathered: &Gathered,
    examined: &Examined,
    options: &MigrateOptions,
    policy: &Policy,
) -> Plan {
    let nothing = unable();
    let (source, destination) = examined.abilities();
    let costs = EngineCosts::default();
    let mut plan = strategy::plan(&Situation {
        facts: &gathered.measurements,
        costs: &costs,
        source: source.unwrap_or(&nothing),
        destination: destination.unwrap_or(&nothing),
        options,
        policy,
    });
    if let Some(assumed) = assumptions(&gathered.measured) {
        plan.decisions.insert(0, assumed);
    }
    plan
}

/// What is known of an engine whose agent does not say what it can do: a single stream.
fn unable() -> EngineAbilities {
    EngineAbilities {
        version: EngineVersion { major: 0, minor: 0, micro: 0 },
        capabilities: Default::default(),
        parameters: Default::default(),
        compressions: Default::default(),
        postcopy_obstacle: Some("its agent does not say what its QEMU can do".to_owned()),
        memory_page_bytes: 4096,
    }
}

/// What was not measured, why not, and what was assumed instead.
fn assumptions(measured: &[MeasuredAt]) -> Option<Decision> {
    let missing: Vec<Rejection> = measured
        .iter()
        .filter_map(|one| {
            let why = one.trouble.clone()?;
            Some(Rejection { what: format!("measuring {}", one.what.as_words()), why })
        })
        .collect();
    if missing.is_empty() {
        return None;
    }
    let assumed = |what: Measured| measured.iter().any(|one| one.what == what && one.at.is_none());
    let mut chosen = Vec::new();
    for (what, words) in [
        (Measured::Census, "no zero pages, and pages that do not compress"),
        (Measured::DirtyRate, "a guest that writes nothing, until the copy shows otherwise"),
        (Measured::Link, "a link of 10 Gbit/s"),
        (Measured::SourceCpu, "an idle source"),
        (Measured::DestinationCpu, "an idle destination"),
    ] {
        if assumed(what) {
            chosen.push(words);
        }
    }
    let known: Vec<&str> =
        measured.iter().filter(|one| one.at.is_some()).map(|one| one.what.as_words()).collect();
    let known = if known.is_empty() { "nothing".to_owned() } else { known.join(", ") };
    let chosen = format!("to assume {}", chosen.join(", "));
    Some(Decision { measured: known, chosen, rejected: missing })
}
