//! How the guest writes, learnt during the first pass: for a migration that began without knowing.
//!
//! A migration does not wait for a measurement that takes seconds. Where its first pass takes longer than that, the guest's
//! pages are looked at from outside meanwhile ([`crate::measure`]), and the rules are asked once more
//! ([`replan_measured`]): a copy that cannot end is helped in its third second, and not after passes of many seconds each.
//! QEMU (7.2, 10.0) counts dirty pages only between passes.
//!
//! Not here: what is done about it ([`super::steering`]).

use std::future::Future;
use std::pin::Pin;

use tracing::debug;
use whimbrel_api::ApiError;
use whimbrel_api::agent::OutgoingRequest;
use whimbrel_api::measure::{DirtyCurveRequest, DirtyMeasure};
use whimbrel_migration::forecast::facts::EngineCosts;
use whimbrel_migration::strategy::{Allowed, StepUp, Strategy, replan_measured};

use super::Departure;
use crate::measure::dirty_curve_of_lent;

/// From what first pass on it is looked, in milliseconds: twice what the looking takes.
const FROM_PASS_MS: f64 = 2_000.0;
/// The windows, in milliseconds: three tell how large the set is that is written to.
const WINDOWS_MS: [u64; 3] = [250, 500, 1_000];
/// Pages that are looked at: the share of written ones to 2 % or better.
const SAMPLE_PAGES: u32 = 4_096;

/// A look under way.
pub(super) type Look = Pin<Box<dyn Future<Output = Result<DirtyMeasure, ApiError>> + Send>>;

/// Whether a migration has to learn how its guest writes, and has the time for it.
fn is_wanted(request: &OutgoingRequest) -> bool {
    let unknown = request.measurements.as_ref().is_some_and(|m| m.dirty.windows.is_empty());
    let pass_ms = request.forecast.as_ref().map_or(0.0, |forecast| forecast.first_pass_ms);
    unknown && pass_ms >= FROM_PASS_MS && !request.strategy.stop_first
}

/// What follows from it.
fn follows(
    request: &OutgoingRequest,
    strategy: &Strategy,
    allowed: &Allowed,
    dirty: DirtyMeasure,
) -> Option<StepUp> {
    let mut facts = request.measurements.clone()?;
    facts.dirty = dirty;
    replan_measured(&facts, &EngineCosts::default(), strategy, allowed)
}

impl Departure {
    /// A look at how the guest writes, if one is wanted. It begins when it is first awaited.
    pub(super) fn look(&self) -> Option<Look> {
        let guest = self.guest.as_ref().filter(|_| is_wanted(&self.request))?;
        let definition = self.host.vms.report(self.request.vm).ok()?.definition;
        let process = guest.qemu.process.identity().pid;
        Some(Box::pin(async move {
            let request =
                DirtyCurveRequest { windows_ms: WINDOWS_MS.to_vec(), sample_pages: SAMPLE_PAGES };
            dirty_curve_of_lent(process, &definition, &request).await
        }))
    }

    /// The look is over.
    pub(super) fn looked(&mut self, found: Result<DirtyMeasure, ApiError>) {
        let dirty = match found {
            Ok(dirty) => dirty,
            Err(error) => {
                debug!(migration = %self.id, %error, "how the guest writes is not known; the passes will tell");
                return;
            }
        };
        let (strategy, allowed) = self.steering.chosen();
        let step = follows(&self.request, strategy, allowed, dirty);
        if let Some(step) = step.filter(|_| self.may_step()) {
            self.take_step(step);
        }
    }
}
