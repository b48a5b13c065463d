//! QEMU's own figure of how fast a guest writes: what `virsh domdirtyrate-calc` asks for and `virsh domstats --dirtyrate`
//! shows, with the same meaning.
//!
//! QEMU has one such measuring per VM, whoever asked; so there is one asker, who waits for its end.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use whimbrel_api::measure::{
    CalcStatus, DIRTY_RATE_MS_MAX, DIRTY_RATE_MS_MIN, DIRTY_RATE_SAMPLE_PAGES_MAX,
    DIRTY_RATE_SAMPLE_PAGES_MIN, DirtyRateMode, DirtyRateReport, DirtyRateRequest, VcpuDirtyRate,
};
use whimbrel_api::{ApiError, ErrorCode, VmId};
use whimbrel_qemu::machine::{DirtyRate, DirtyRateMode as EngineMode, DirtyRateStatus};

use super::{Subject, in_range};
use crate::host::Host;
use crate::vm::running::engine_error;

/// How often is looked whether a measuring has ended, in milliseconds.
const LOOK_MS: u64 = 50;
/// How much longer than asked for a measuring may take, in seconds: QEMU compares the pages of a large guest afterwards.
const GRACE_SECONDS: u64 = 10;

/// Lets QEMU measure, and waits for the end.
///
/// # Errors
/// A refusal with nothing begun (`not-found`, `wrong-state`, `migrating`, `busy`, `out-of-range`), also of a mode that is
/// not for this VM; or `engine`: a mode that this QEMU has not, or a QEMU that does not come to an end.
pub async fn measure(
    host: &Host,
    vm: VmId,
    request: &DirtyRateRequest,
) -> Result<DirtyRateReport, ApiError> {
    in_range("period_ms", request.period_ms, DIRTY_RATE_MS_MIN, DIRTY_RATE_MS_MAX)?;
    if let Some(pages) = request.sample_pages {
        let (least, most) = (DIRTY_RATE_SAMPLE_PAGES_MIN, DIRTY_RATE_SAMPLE_PAGES_MAX);
        in_range("sample_pages", pages, least, most)?;
    }
    let mode = engine_mode(request)?;
    let subject = Subject::take(host, vm, "dirty rate")?;
    if !subject.machine.features().dirty_rate_modes.contains(mode.as_wire()) {
        let message = format!("this QEMU cannot measure by {}", mode.as_wire());
        return Err(ApiError::new(ErrorCode::Engine, message));
    }
    // Asked for either under TCG, 7.2.22 ends with a segmentation fault, and the guest with it; 10.0.2 counts nothing.
    if !subject.accelerated && !matches!(mode, EngineMode::PageSampling { .. }) {
        let message = format!("without KVM QEMU cannot measure by {}", mode.as_wire());
        return Err(ApiError::new(ErrorCode::WrongState, message).hint("use `page-sampling`"));
    }
    let period = Duration::from_millis(request.period_ms);
    let begun = Instant::now();
    let refused = |error| engine_error("QEMU did not begin to measure", &error);
    subject.machine.calc_dirty_rate(period, mode).await.map_err(refused)?;
    loop {
        sleep(Duration::from_millis(LOOK_MS)).await;
        let now = asked(&subject.machine).await?;
        subject.still_there(host)?;
        if now.status == DirtyRateStatus::Measured {
            return Ok(report(now));
        }
        // Where only whole seconds are measured, a part counts as one.
        let longest = period + Duration::from_secs(1 + GRACE_SECONDS);
        if begun.elapsed() > longest {
            let seconds = longest.as_secs();
            let message = format!("QEMU has not come to an end of its measuring after {seconds} s");
            return Err(ApiError::new(ErrorCode::Engine, message));
        }
    }
}

/// The last measuring of a VM, or the one that goes on.
///
/// # Errors
/// `not-found`; `wrong-state` where no QEMU is there to be asked; `engine`.
pub async fn last(host: &Host, vm: VmId) -> Result<DirtyRateReport, ApiError> {
    let (report_of_vm, machine) = host.vms.session(vm)?;
    let Some(machine) = machine else {
        let state = report_of_vm.state.word();
        return Err(ApiError::new(ErrorCode::WrongState, format!("the VM is {state}")));
    };
    Ok(report(asked(&machine).await?))
}

async fn asked(machine: &whimbrel_qemu::machine::Machine) -> Result<DirtyRate, ApiError> {
    let failed = |error| engine_error("QEMU does not tell what it has measured", &error);
    machine.query_dirty_rate().await.map_err(failed)
}

fn engine_mode(request: &DirtyRateRequest) -> Result<EngineMode, ApiError> {
    let sample_pages = request.sample_pages;
    match request.mode {
        DirtyRateMode::PageSampling => Ok(EngineMode::PageSampling { sample_pages }),
        _ if sample_pages.is_some() => {
            let message = "`sample_pages` is for the mode `page-sampling` only";
            Err(ApiError::new(ErrorCode::BadRequest, message))
        }
        DirtyRateMode::DirtyBitmap => Ok(EngineMode::DirtyBitmap),
        DirtyRateMode::DirtyRing => Ok(EngineMode::DirtyRing),
    }
}

fn report(told: DirtyRate) -> DirtyRateReport {
    let vcpu = |(vcpu, megabytes_per_second)| VcpuDirtyRate { vcpu, megabytes_per_second };
    DirtyRateReport {
        calc_status: match told.status {
            DirtyRateStatus::Unstarted => CalcStatus::Unstarted,
            DirtyRateStatus::Measuring => CalcStatus::Measuring,
            DirtyRateStatus::Measured => CalcStatus::Measured,
            DirtyRateStatus::Unknown(_) => CalcStatus::Unknown,
        },
        calc_start_time_seconds: told.start_time_seconds,
        calc_period_ms: told.period_ms,
        megabytes_per_second: told.mebibytes_per_second,
        calc_mode: told.mode,
        sample_pages: told.sample_pages,
        vcpus: told.vcpus.into_iter().map(vcpu).collect(),
    }
}
