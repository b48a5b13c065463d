//! Steering a copy that is under way: by what is seen, by the clock, and by orders.
//!
//! The ladder's rules are [`whimbrel_migration::strategy::replan`]'s: asked once for each pass, they answer rarely, and one
//! rung at a time. Here what they say is done, and told in the report as a decision. An order of the user goes before them.
//!
//! Nothing here ends a copy, and nothing is waited for: QEMU is told beside the driver, and what comes of it shows in
//! QEMU's figures. Not here: the choice before the start (the controller), and the handoff.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{debug, info, warn};
use whimbrel_api::agent::{OutgoingReport, OutgoingRequest};
use whimbrel_api::error::chain;
use whimbrel_api::migration::{
    DECISIONS_MAX, Decision, Forecast, LiveSettings, PostcopyBegin, Strategy, Timeout,
    TimeoutAction,
};
use whimbrel_api::{ApiError, ErrorCode, Phase};
use whimbrel_migration::forecast::{Bottleneck, Convergence};
use whimbrel_migration::handoff::SourceInput;
use whimbrel_migration::strategy::{
    Allowed, Observed, PASSES_KEPT, PassSeen, Rung, Step, StepUp, replan,
};
use whimbrel_qemu::migrate::outgoing::Control;
use whimbrel_qemu::migrate::{LiveChange, MigrationStatus, Statistics};
use whimbrel_qemu::qmp::QmpError;

use super::Departure;
use super::copy::hold;
use super::pause::now_us;
use super::samples::{dirty_bytes_per_s, progress};
use crate::migrate::destination::LEASE_SECONDS;
use crate::migrate::settings::{change, throttle};

/// How long nothing of a guest may be sent that is held for it, in seconds; longer than a connection may take to be made.
const HELD_STILL_SECONDS: u64 = 8;

/// How long what waits in a connection may take to be sent, in milliseconds: it is a part of the pause, for QEMU takes for
/// sent what Linux has taken from it.
const QUEUE_MS: u64 = 2;
/// Bounds of that, in bytes: less costs throughput, more is more than Linux lets wait by itself.
const QUEUE_BYTES_MIN: u64 = 64 << 10;
const QUEUE_BYTES_MAX: u64 = 4 << 20;

/// What QEMU is told on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Other limits.
    Limits,
    /// The guest stands still from now on.
    Stop,
    /// The guest stands still, and post-copy begins.
    Postcopy,
}

/// An order, and whether QEMU has taken it.
pub(super) type Told = (Order, Result<(), QmpError>);

/// An order under way.
pub(super) type Telling = Pin<Box<dyn Future<Output = Told> + Send>>;

/// What is known of a copy's course, and may be done about it.
pub(super) struct Steering {
    strategy: Strategy,
    allowed: Allowed,
    expected: Forecast,
    timeout: Option<Timeout>,
    began: Instant,
    passes: Vec<PassSeen>,
    control: watch::Sender<Option<Control>>,
    /// Post-copy has been ordered, or the guest stopped: it only has to end.
    past_choice: bool,
    /// Nothing more is allowed; asked again only when something is set by hand.
    exhausted: bool,
    /// What may wait in each connection, in bytes, once that was told.
    queue_bytes: Option<u32>,
}

impl Steering {
    pub(super) fn of(request: &OutgoingRequest) -> Self {
        Self {
            strategy: request.strategy.clone(),
            allowed: Allowed::of(&request.policy, &request.options),
            expected: request.forecast.clone().unwrap_or_else(nothing_foretold),
            timeout: request.options.timeout,
            began: Instant::now(),
            passes: Vec::new(),
            control: watch::Sender::new(None),
            past_choice: request.strategy.stop_first,
            exhausted: false,
            queue_bytes: None,
        }
    }

    /// What may wait in each connection, in bytes, at the rate that is seen, or foretold as long as none is.
    fn fitting_queue(&self, statistics: &Statistics) -> u32 {
        let seen = statistics.ram.mbps.map(|mbps| mbps * 1e6 / 8.0).filter(|rate| *rate > 0.0);
        let rate = seen.unwrap_or(self.expected.wire_bytes_per_s);
        let channels = u64::from(self.strategy.channels.unwrap_or(1).max(1));
        let bytes = rate as u64 * QUEUE_MS / 1_000 / channels;
        u32::try_from(bytes.clamp(QUEUE_BYTES_MIN, QUEUE_BYTES_MAX)).unwrap_or(u32::MAX)
    }

    /// Where a copy puts its handle, once QEMU can be told.
    pub(super) fn control(&self) -> watch::Sender<Option<Control>> {
        self.control.clone()
    }

    fn handle(&self) -> Option<Control> {
        self.control.borrow().clone()
    }

    fn aim_ms(&self) -> Option<u64> {
        self.control.borrow().as_ref().and_then(Control::aim_ms)
    }

    /// What QEMU's figures ask for, if anything.
    fn look(&mut self, statistics: &Statistics) -> Option<StepUp> {
        let pass = statistics.ram.dirty_sync_count.unwrap_or(0);
        if self.past_choice || pass == 0 || self.passes.last().is_some_and(|last| last.pass == pass)
        {
            return None;
        }
        let rest_bytes = statistics.ram.remaining_bytes.unwrap_or(0);
        if self.passes.len() >= PASSES_KEPT {
            self.passes.remove(0);
        }
        self.passes.push(PassSeen { pass, rest_bytes });
        let begin = self.strategy.postcopy.map(|postcopy| postcopy.begin);
        if pass > 1 && begin == Some(PostcopyBegin::AfterFirstPass) {
            return Some(self.by(
                Step::Postcopy,
                "the first pass is made",
                "post-copy, as planned",
            ));
        }
        if begin == Some(PostcopyBegin::AtOnce) {
            return Some(self.by(Step::Postcopy, "memory goes", "post-copy, as planned"));
        }
        if self.exhausted {
            return None;
        }
        let seen = self.observed(statistics);
        replan(&seen, &self.expected, &self.strategy, &self.allowed)
    }

    fn observed(&self, statistics: &Statistics) -> Observed {
        Observed {
            elapsed_ms: u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            passes: self.passes.clone(),
            wire_bytes_per_s: statistics.ram.mbps.unwrap_or(0.0) * 1e6 / 8.0,
            dirty_bytes_per_s: dirty_bytes_per_s(statistics) as f64,
            // Of a copy that was taken up again it is not known; it keeps what it has.
            aim_ms: self.aim_ms().unwrap_or(self.strategy.max_downtime_ms),
            throttle_percent: statistics
                .cpu_throttle_percentage
                .and_then(|percent| u8::try_from(percent).ok())
                .unwrap_or(0),
            past_choice: self.past_choice,
        }
    }

    /// How the copy goes, and what may be done about it.
    pub(super) fn chosen(&self) -> (&Strategy, &Allowed) {
        (&self.strategy, &self.allowed)
    }

    /// What the clock asks for.
    fn timed_out(&mut self) -> Option<StepUp> {
        let timeout = self.timeout?;
        if self.past_choice || self.began.elapsed() < Duration::from_secs(timeout.seconds) {
            return None;
        }
        self.timeout = None;
        let measured = format!("{} s are over", timeout.seconds);
        Some(match timeout.then {
            TimeoutAction::Suspend => {
                self.by(Step::Stop, &measured, "the guest stands still until the rest is sent")
            }
            TimeoutAction::Postcopy => {
                self.by(Step::Postcopy, &measured, "post-copy, as was asked for")
            }
        })
    }

    /// A step that somebody wants.
    fn by(&self, step: Step, measured: &str, chosen: &str) -> StepUp {
        let mut strategy = self.strategy.clone();
        match step {
            Step::Postcopy => strategy.rung = Rung::Postcopy,
            Step::Stop => {
                strategy.rung = Rung::Static;
                strategy.stop_first = true;
            }
            _ => {}
        }
        let decision = Decision {
            measured: measured.to_owned(),
            chosen: chosen.to_owned(),
            rejected: Vec::new(),
        };
        StepUp { step, strategy, decision }
    }
}

/// Where nothing was measured: whatever the guest writes is more than was reckoned with.
fn nothing_foretold() -> Forecast {
    Forecast {
        convergence: Convergence::Marginal,
        margin_percent: None,
        total_ms: None,
        downtime_ms: None,
        wire_bytes: None,
        passes: None,
        first_pass_ms: 0.0,
        wire_bytes_per_s: 0.0,
        bottleneck: Bottleneck::Link,
        throttle_percent: 0.0,
        postcopy: None,
    }
}

impl Departure {
    /// QEMU has figures of its progress.
    pub(super) fn copied_more(&mut self, statistics: &Statistics) {
        let progress = progress(statistics, &self.request, self.steering.aim_ms());
        let sent = |report: &OutgoingReport| report.progress.as_ref().map(|p| p.transferred_bytes);
        let mut phase = self.report.borrow().phase;
        self.report.send_modify(|report| {
            let before = sent(report);
            report.progress = Some(progress);
            if sent(report) != before {
                (self.lively_at, self.moved_at) = (Instant::now(), Instant::now());
            }
            phase = report.phase;
        });
        self.samples.add(statistics, phase);
        self.shorten_queues(statistics);
        if self.copying.is_some()
            && let Some(step) = self.steering.look(statistics)
        {
            self.take_step(step);
        }
        self.look_after_postcopy(statistics);
    }

    /// Once memory goes, all connections are there; later the rate may turn out to be another.
    fn shorten_queues(&mut self, statistics: &Statistics) {
        let goes = statistics.status == MigrationStatus::Active;
        let Some(guest) = self.guest.as_ref().filter(|_| goes) else { return };
        let bytes = self.steering.fitting_queue(statistics);
        let fits = |told: u32| bytes <= told.saturating_mul(2) && told <= bytes.saturating_mul(2);
        if self.steering.queue_bytes.is_some_and(fits) {
            return;
        }
        self.steering.queue_bytes = Some(bytes);
        match guest.qemu.process.shorten_queues(self.settings.to.port(), bytes) {
            Ok(connections) => {
                debug!(migration = %self.id, bytes, connections, "no more may wait in a connection");
            }
            Err(error) => {
                warn!(migration = %self.id, %error, "the pause may be longer than it had to be")
            }
        }
    }

    /// Looks at the clock.
    pub(super) fn look_at_the_clock(&mut self) {
        if self.copies()
            && let Some(step) = self.steering.timed_out()
        {
            self.take_step(step);
        }
    }

    /// Whether nothing of the guest has been sent for longer than it can be waited for: how long that was, in seconds.
    pub(super) fn stands_still_for(&self) -> Option<u64> {
        let held = self.steering.past_choice && self.pause.stopped.is_some();
        let most = if held { HELD_STILL_SECONDS } else { LEASE_SECONDS };
        // In the last pass QEMU is not asked for figures, and has a limit of its own.
        let goes = self.copying.is_some() && self.report.borrow().phase == Phase::Precopy;
        let still = goes && self.moved_at.elapsed() >= Duration::from_secs(most);
        still.then_some(most)
    }

    /// Whether memory goes while the guest runs, and QEMU can be told how.
    fn copies(&self) -> bool {
        self.copying.is_some() && self.steering.handle().is_some() && self.pause.completed.is_none()
    }

    /// Whether a step can still be taken.
    pub(super) fn may_step(&self) -> bool {
        self.copies() && !self.steering.past_choice
    }

    /// Takes a step up the ladder, and tells it.
    pub(super) fn take_step(&mut self, StepUp { step, strategy, decision }: StepUp) {
        info!(migration = %self.id, %decision, "the way of the copy is changed");
        self.steering.passes.clear();
        match step {
            Step::Downtime { max_downtime_ms } => {
                let max_downtime_ms = Some(max_downtime_ms);
                self.change(LiveChange { max_downtime_ms, ..LiveChange::default() });
            }
            Step::Throttle { throttle: setting } => {
                let throttle = Some(throttle(setting));
                self.change(LiveChange { throttle, ..LiveChange::default() });
            }
            Step::Postcopy => self.begin_postcopy(),
            // Once it is made: the strategy says so.
            Step::PostcopyAfterPass => {}
            Step::Stop => self.stop_guest(),
            Step::Nothing => self.steering.exhausted = true,
        }
        self.steering.strategy = strategy.clone();
        self.report.send_modify(|report| report.strategy = Some(strategy));
        self.decided(decision);
    }

    fn change(&self, change: LiveChange) {
        let Some(control) = self.steering.handle() else { return };
        self.tell(Order::Limits, async move { control.set_live(&change).await });
    }

    /// The guest stands still until the rest is sent.
    fn stop_guest(&mut self) {
        let Some(guest) = &self.guest else { return };
        self.steering.past_choice = true;
        self.pause.stopped.get_or_insert_with(now_us);
        let machine = guest.qemu.machine.clone();
        self.tell(Order::Stop, async move { hold(&machine).await });
    }

    /// The guest is stopped by us, and then QEMU turns to post-copy: a guest that QEMU stops itself for it, QEMU may let run
    /// again when it fails, and that may be after the release.
    fn begin_postcopy(&mut self) {
        let (Some(guest), Some(control)) = (&self.guest, self.steering.handle()) else { return };
        self.steering.past_choice = true;
        let machine = guest.qemu.machine.clone();
        self.tell(Order::Postcopy, async move {
            hold(&machine).await?;
            control.start_postcopy().await
        });
    }

    /// Tells QEMU beside the driver, which hears what came of it. Nothing that was told outlives the copy: a guest that
    /// was resumed must not be stopped by an order that comes late ([`Departure::stop_copy`]).
    fn tell(
        &self,
        order: Order,
        telling: impl Future<Output = Result<(), QmpError>> + Send + 'static,
    ) {
        self.telling.push(Box::pin(async move { (order, telling.await) }));
    }

    /// QEMU has taken an order, or not. One that holds the guest may have been carried out in part: the copy is given up
    /// then, and the guest resumes where the rules say so. Never from here: by the time that QEMU hears it, it may have sent
    /// the whole guest.
    pub(super) fn was_told(&mut self, (order, taken): Told) -> Option<SourceInput> {
        let error = taken.err()?;
        warn!(migration = %self.id, ?order, error = chain(&error), "QEMU did not take an order");
        if order == Order::Limits || !self.copies() {
            return None;
        }
        let message = format!("the source's QEMU did not take an order: {}", chain(&error));
        Some(self.failed(Phase::Precopy, ErrorCode::Engine, message))
    }

    pub(super) fn decided(&self, decision: Decision) {
        self.report.send_modify(|report| {
            if report.decisions.len() >= DECISIONS_MAX {
                // The first ones and the latest are kept.
                report.decisions.remove(DECISIONS_MAX / 2);
            }
            report.decisions.push(decision);
        });
    }

    /// Other limits, by order.
    pub(super) fn set(&mut self, settings: &LiveSettings) -> Result<(), ApiError> {
        let wanted = settings.validate();
        if let Some(problem) = wanted.first() {
            return Err(ApiError::new(ErrorCode::OutOfRange, problem.sentence.clone()));
        }
        if !self.copies() && self.serving.is_none() {
            return Err(self.no_fit("set anything"));
        }
        if let Some(most_ms) = settings.max_downtime_ms {
            self.steering.strategy.max_downtime_ms = most_ms;
            self.steering.allowed.max_downtime_ms = most_ms;
        }
        self.steering.exhausted = false;
        self.steering.passes.clear();
        self.change(change(settings));
        Ok(())
    }

    /// Post-copy, by order.
    pub(super) fn order_postcopy(&mut self) -> Result<(), ApiError> {
        if !self.copies() || self.steering.past_choice {
            return Err(self.no_fit("begin post-copy"));
        }
        if self.steering.strategy.postcopy.is_none() {
            let message =
                "post-copy was not made ready when this migration began, and cannot be now";
            return Err(ApiError::new(ErrorCode::WrongState, message)
                .hint("cancel it, and migrate with `--postcopy`; or `migration force-complete`"));
        }
        let step = self.steering.by(Step::Postcopy, "an order", "post-copy now");
        self.take_step(step);
        Ok(())
    }

    /// The guest is stopped and the rest sent, by order.
    pub(super) fn order_completion(&mut self) -> Result<(), ApiError> {
        if !self.copies() || self.steering.past_choice {
            return Err(self.no_fit("stop the guest for it"));
        }
        let step = self.steering.by(
            Step::Stop,
            "an order",
            "the guest stands still until the rest is sent",
        );
        self.take_step(step);
        Ok(())
    }

    /// The refusal of an order that does not fit the phase.
    pub(super) fn no_fit(&self, what: &str) -> ApiError {
        let phase = self.report.borrow().phase;
        ApiError::new(
            ErrorCode::WrongState,
            format!("it is too early or too late to {what}: the migration is in {phase}"),
        )
        .hint("look at `whimbrel migration show`, and ask again if it has only begun")
    }
}
