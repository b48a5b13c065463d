//! What is measured of this host and its guests before a move; all of it while the guests run on.
//!
//! ```text
//!   dirty_rate   QEMU's own figure, as `virsh domstats --dirtyrate` has it
//!   dirty_curve  how many different pages are written in 0.25, 0.5, 1, 2 s ─┐
//!   census       zero, equal and compressible pages ────────────────────────┴─▶ memory: the guest's pages, from outside
//!   link         how fast the way to another host is
//!   cpu          what the processors have to spare
//! ```
//!
//! Each is polite: bounded in time, bytes and processor time by named constants, one of a kind at a time for a VM, and none
//! while the VM is lent to a migration, whose own figures they would disturb. A VM that is lent in the middle of one makes
//! its result void. Nothing here writes to a guest, stops it, or makes memory that the guest has not touched.
//!
//! What follows from the figures is not decided here ([`whimbrel_migration::forecast`]). Called by [`crate::http`].

mod census;
mod cpu;
mod dirty_curve;
mod dirty_rate;
mod link;
mod memory;
mod sample;

pub use cpu::spare as cpu;
pub use dirty_rate::{last as last_dirty_rate, measure as dirty_rate};
pub use link::{Links, listen as link_listen, measure as link};

use std::sync::Arc;

use whimbrel_api::measure::{
    CENSUS_PAGES_MAX, CURVE_PAGES_MAX, CURVE_WINDOW_MS_MAX, CURVE_WINDOW_MS_MIN, CURVE_WINDOWS_MAX,
    CensusReport, CensusRequest, DirtyCurveReport, DirtyCurveRequest, DirtyMeasure,
    SAMPLE_PAGES_MIN,
};
use whimbrel_api::vm::{VmDefinition, VmState};
use whimbrel_api::{ApiError, ErrorCode, VmId};
use whimbrel_qemu::engine::Accelerator;
use whimbrel_qemu::machine::Machine;

use crate::host::Host;
use crate::in_hand::Hold;
use memory::{GuestMemory, MemoryError};
use sample::Dice;

/// What is in a guest's memory.
///
/// # Errors
/// A refusal with nothing begun (`not-found`, `wrong-state`, `migrating`, `busy`, `out-of-range`), or `engine` where the
/// memory cannot be read.
pub async fn census(
    host: &Arc<Host>,
    vm: VmId,
    request: CensusRequest,
) -> Result<CensusReport, ApiError> {
    in_range("sample_pages", request.sample_pages, SAMPLE_PAGES_MIN, CENSUS_PAGES_MAX)?;
    let subject = Subject::take(host, vm, "census")?;
    let memory = subject.memory()?;
    let report = blocking(move || census::take(&memory, request.sample_pages, &mut Dice::new()));
    let report = report.await?;
    subject.still_there(host)?;
    Ok(report)
}

/// How many different pages a guest writes in windows of different length.
///
/// # Errors
/// As [`census()`].
pub async fn dirty_curve(
    host: &Arc<Host>,
    vm: VmId,
    request: DirtyCurveRequest,
) -> Result<DirtyCurveReport, ApiError> {
    in_range("sample_pages", request.sample_pages, SAMPLE_PAGES_MIN, CURVE_PAGES_MAX)?;
    let windows = &request.windows_ms;
    in_range("the number of `windows_ms`", windows.len(), 1, CURVE_WINDOWS_MAX)?;
    for window in windows {
        in_range("windows_ms", *window, CURVE_WINDOW_MS_MIN, CURVE_WINDOW_MS_MAX)?;
    }
    if !windows.is_sorted_by(|earlier, later| earlier < later) {
        return Err(ApiError::new(ErrorCode::OutOfRange, "`windows_ms` do not rise"));
    }
    let subject = Subject::take(host, vm, "dirty curve")?;
    let memory = subject.memory()?;
    let report = dirty_curve::measure(memory, &request, subject.pid, subject.vcpus).await?;
    subject.still_there(host)?;
    Ok(report)
}

/// The same of a VM that is lent to a migration: for that migration, beside its copy.
pub(crate) async fn dirty_curve_of_lent(
    process: u32,
    definition: &VmDefinition,
    request: &DirtyCurveRequest,
) -> Result<DirtyMeasure, ApiError> {
    let memory = GuestMemory::of(process, definition.memory_bytes)?;
    let report = dirty_curve::measure(memory, request, process, definition.vcpus).await?;
    Ok(report.measure)
}

/// A running VM that is measured. While this lives, nobody else measures the same of it.
struct Subject {
    vm: VmId,
    machine: Machine,
    pid: u32,
    accelerated: bool,
    vcpus: u32,
    memory_bytes: u64,
    _alone: Hold,
}

impl Subject {
    fn take(host: &Host, vm: VmId, what: &str) -> Result<Self, ApiError> {
        let (report, machine) = host.vms.session(vm)?;
        let name = &report.definition.name;
        let (machine, engine) = match (&report.state, machine, &report.engine) {
            (VmState::Running | VmState::Paused, Some(machine), Some(engine)) => (machine, engine),
            (VmState::Migrating { migration }, ..) => {
                let why = format!(
                    "VM `{name}` is being migrated (migration {migration}) and is not measured meanwhile"
                );
                return Err(ApiError::new(ErrorCode::Migrating, why));
            }
            (state, ..) => {
                let why = format!("VM `{name}` is {}, not running or paused", state.word());
                return Err(ApiError::new(ErrorCode::WrongState, why));
            }
        };
        let busy = || {
            ApiError::new(ErrorCode::Busy, format!("the {what} of VM `{name}` is being measured"))
                .hint("wait for it and try again")
        };
        let alone = host.in_hand.hold_alone(&format!("{what} of VM {vm}")).ok_or_else(busy)?;
        Ok(Self {
            vm,
            machine,
            pid: engine.pid,
            accelerated: engine.accelerator == Accelerator::Kvm.as_wire(),
            vcpus: report.definition.vcpus,
            memory_bytes: report.definition.memory_bytes,
            _alone: alone,
        })
    }

    fn memory(&self) -> Result<GuestMemory, ApiError> {
        Ok(GuestMemory::of(self.pid, self.memory_bytes)?)
    }

    /// What was measured is void if the VM has been lent, or its QEMU has ended, in the meantime.
    fn still_there(&self, host: &Host) -> Result<(), ApiError> {
        let (report, _) = host.vms.session(self.vm)?;
        if report.engine.as_ref().is_some_and(|engine| engine.pid == self.pid) {
            return Ok(());
        }
        let state = report.state.word();
        let message =
            format!("while VM `{}` was measured it became {state}", report.definition.name);
        let code = match report.state {
            VmState::Migrating { .. } => ErrorCode::Migrating,
            _ => ErrorCode::WrongState,
        };
        Err(ApiError::new(code, message))
    }
}

impl From<MemoryError> for ApiError {
    fn from(error: MemoryError) -> Self {
        let chain = whimbrel_api::error::chain(&error);
        ApiError::new(ErrorCode::Engine, format!("the guest's memory was not looked at: {chain}"))
    }
}

/// Refuses a number outside of its bounds.
fn in_range<T: Copy + PartialOrd + std::fmt::Display>(
    what: &str,
    value: T,
    least: T,
    most: T,
) -> Result<(), ApiError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    let message = format!("{what} is {value}; it must be {least} to {most}");
    Err(ApiError::new(ErrorCode::OutOfRange, message))
}

/// Reading and comparing memory would keep the agent's other work waiting.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, MemoryError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|error| ApiError::internal("the measuring broke off", &error))??)
}
