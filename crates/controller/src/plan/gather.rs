//! Measurements for a plan, gathered from both agents; what is fresh on the [`Shelf`](super::shelf::Shelf) is not measured again.
//!
//! Two efforts. A **plan** is asked for by somebody who waits for it: everything is measured, the guest's writing over two
//! seconds, one thing after the other where one would disturb the other. A **migration** waits for nothing that costs more
//! than it can win: what can be had within [`BRIEF_MS`], beside preflight, which takes its time anyway; how the guest writes is
//! learnt during the copy. What comes too late is kept for the next time. What the processors have to spare is asked of every
//! host now and then ([`keep_cpus`]): while a link is probed, or a guest copied, it could not be told.
//!
//! What cannot be measured is assumed, and said to be: a plan without a measurement is better than none.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use whimbrel_api::measure::{
    Census, CensusRequest, CpuReport, CpuSpare, DirtyCurveRequest, DirtyMeasure, DirtyWindow,
    LinkMeasure, LinkRequest,
};
use whimbrel_api::migration::Migration;
use whimbrel_api::plan::{Measured, MeasuredAt, Measurements};
use whimbrel_api::{ApiError, VmId};

use super::shelf::Found;
use crate::Controller;
use crate::hosts::Member;

/// How long a migration waits for measurements, in milliseconds, from its admission on. A link of 1 Gbit/s is probed in a
/// quarter of a second, a faster one in less; a slower one makes the copy so long that this is nothing.
pub(super) const BRIEF_MS: u64 = 400;
/// How long a plan waits for each measurement, in seconds.
const THOROUGH_SECONDS: u64 = 20;
/// Sampled pages of a guest for a migration: the share of zero pages to 2 % or better.
const BRIEF_PAGES: u32 = 1024;
/// How old a census may be, in seconds.
const CENSUS_SECONDS: u64 = 60;
/// How old the look at a guest's writing may be, in seconds: it may begin to write at any time.
const DIRTY_SECONDS: u64 = 15;
/// How old a link's rate may be for a plan, in seconds.
const LINK_SECONDS: u64 = 60;
/// The same for a migration, in seconds: links seldom change, a probe costs a quarter of a second, and a migration that finds the
/// link otherwise has it forgotten ([`note_rate`]).
const LINK_BRIEF_SECONDS: u64 = 600;
/// How far the rate of a copy may be from the forecast, in percent, before the link is probed anew.
const RATE_OFF_PERCENT: f64 = 30.0;
/// How often a host is asked what its processors have to spare, in seconds.
const CPU_AGAIN_SECONDS: u64 = 5;
/// What a link is reckoned to carry that could not be probed, in bytes a second: 10 Gbit/s, so that nothing is done about a
/// bottleneck that nobody has seen.
const ASSUMED_LINK_BYTES_PER_S: u64 = 1_250_000_000;
/// The round trip of such a link, in microseconds.
const ASSUMED_RTT_US: u64 = 200;

/// How much is done for measurements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effort {
    /// What is at hand.
    None,
    /// What can be had in the shadow of preflight.
    Brief,
    /// Everything.
    Thorough {
        /// Also what is fresh.
        fresh: bool,
        /// Most bytes a second that a probe sends.
        probe_bytes_per_s: Option<u64>,
    },
}

/// What is to be measured.
#[derive(Clone)]
pub(crate) struct Subject {
    pub(crate) vm: VmId,
    pub(crate) memory_bytes: u64,
    /// A guest that stands still writes nothing.
    pub(crate) paused: bool,
    pub(crate) source: Arc<Member>,
    pub(crate) destination: Arc<Member>,
    pub(crate) tls: bool,
}

/// What is known.
#[derive(Debug, Clone)]
pub(crate) struct Gathered {
    pub(crate) measurements: Measurements,
    /// When each was measured, and what could not be.
    pub(crate) measured: Vec<MeasuredAt>,
}

/// One result, or why there is none.
type Answer<T> = Result<Found<T>, String>;

/// Gathers what the effort allows. Never an error: what is missing is assumed.
pub(crate) async fn gather(
    controller: &Arc<Controller>,
    subject: &Subject,
    effort: Effort,
) -> Gathered {
    let until = match effort {
        Effort::None => Duration::ZERO,
        Effort::Brief => Duration::from_millis(BRIEF_MS),
        Effort::Thorough { .. } => Duration::from_secs(THOROUGH_SECONDS),
    };
    let asking = Asking { controller: controller.clone(), subject: subject.clone(), effort, until };
    let (census, dirty, link, (source_cpu, destination_cpu)) = match effort {
        // The cpu first: the rest takes some of it. Then what is quick, then what lasts.
        Effort::Thorough { .. } => {
            let (dirty, cpus) = tokio::join!(asking.dirty(), asking.cpus());
            let census = asking.census().await;
            (census, dirty, asking.link().await, cpus)
        }
        Effort::Brief | Effort::None => {
            let (census, link, cpus) = tokio::join!(asking.census(), asking.link(), asking.cpus());
            (census, asking.dirty().await, link, cpus)
        }
    };
    assemble(subject, census, dirty, link, source_cpu, destination_cpu)
}

fn assemble(
    subject: &Subject,
    census: Answer<Census>,
    dirty: Answer<DirtyMeasure>,
    link: Answer<LinkMeasure>,
    source_cpu: Answer<CpuReport>,
    destination_cpu: Answer<CpuReport>,
) -> Gathered {
    let boot = |answer: &Answer<CpuReport>| {
        answer.as_ref().map(|found| found.value.boot.clone()).unwrap_or_default()
    };
    let (here, there) = (boot(&source_cpu), boot(&destination_cpu));
    let mut measured = Vec::new();
    let mut note = Notes { measured: &mut measured, now: Timestamp::now() };
    let measurements = Measurements {
        memory_bytes: subject.memory_bytes,
        census: note.take(Measured::Census, census, Census::default),
        dirty: note.take(Measured::DirtyRate, dirty, DirtyMeasure::default),
        link: note.take(Measured::Link, link, || LinkMeasure {
            bytes_per_s: ASSUMED_LINK_BYTES_PER_S,
            at_least: true,
            rtt_us: ASSUMED_RTT_US,
        }),
        source_cpu: note.take(Measured::SourceCpu, source_cpu, || idle(&subject.source)).spare,
        destination_cpu: note
            .take(Measured::DestinationCpu, destination_cpu, || idle(&subject.destination))
            .spare,
        hosts_share_cpu: !here.is_empty() && here == there,
    };
    Gathered { measurements, measured }
}

/// A host whose processors nobody could ask is reckoned to be idle.
fn idle(member: &Member) -> CpuReport {
    let cores = member.ready_report().map_or(1, |report| u64::from(report.cpus));
    let spare = CpuSpare { spare_cores: cores as f64, cores };
    CpuReport { spare, window_ms: 0, boot: String::new() }
}

/// Writes down where each figure comes from.
struct Notes<'a> {
    measured: &'a mut Vec<MeasuredAt>,
    now: Timestamp,
}

impl Notes<'_> {
    fn take<T>(&mut self, what: Measured, answer: Answer<T>, assumed: impl FnOnce() -> T) -> T {
        match answer {
            Ok(found) => {
                let age_ms = u64::try_from(found.at.elapsed().as_millis()).unwrap_or(u64::MAX);
                let age = jiff::SignedDuration::from_millis(i64::try_from(age_ms).unwrap_or(0));
                let at = self.now.checked_sub(age).ok();
                self.measured.push(MeasuredAt { what, at, age_ms: Some(age_ms), trouble: None });
                found.value
            }
            Err(why) => {
                let trouble = Some(why);
                self.measured.push(MeasuredAt { what, at: None, age_ms: None, trouble });
                assumed()
            }
        }
    }
}

/// One gathering.
#[derive(Clone)]
struct Asking {
    controller: Arc<Controller>,
    subject: Subject,
    effort: Effort,
    until: Duration,
}

impl Asking {
    fn wants_fresh(&self) -> bool {
        matches!(self.effort, Effort::Thorough { fresh: true, .. })
    }

    /// A fresh result that is at hand, else a new one, if it comes in time. What comes later is kept for the next time.
    async fn have<T: Clone + Send + 'static>(
        &self,
        at_hand: Option<Found<T>>,
        measure: impl Future<Output = Result<Found<T>, ApiError>> + Send + 'static,
    ) -> Answer<T> {
        if let Some(found) = at_hand.filter(|_| !self.wants_fresh()) {
            return Ok(found);
        }
        if self.effort == Effort::None {
            return Err("it was not measured".to_owned());
        }
        match tokio::time::timeout(self.until, tokio::spawn(measure)).await {
            Ok(Ok(answer)) => answer.map_err(|error| error.message),
            Ok(Err(_)) => Err("the measuring ended abnormally".to_owned()),
            Err(_) => Err(format!("it took more than {} ms", self.until.as_millis())),
        }
    }

    async fn census(&self) -> Answer<Census> {
        let Self { controller, subject, .. } = self.clone();
        let at_hand = controller.shelf().census.get(&subject.vm, CENSUS_SECONDS);
        let request = match self.effort {
            Effort::Thorough { .. } => CensusRequest::default(),
            Effort::Brief | Effort::None => CensusRequest { sample_pages: BRIEF_PAGES },
        };
        self.have(at_hand, async move {
            let report = subject.source.agent().census(subject.vm, &request).await?;
            Ok(controller.shelf().census.put(subject.vm, report.census, Duration::ZERO))
        })
        .await
    }

    /// How the guest writes. A migration does not wait for it.
    async fn dirty(&self) -> Answer<DirtyMeasure> {
        let Self { controller, subject, .. } = self.clone();
        if subject.paused {
            let windows = vec![DirtyWindow { window_ms: 1_000, dirtied_bytes: 0 }];
            let value = DirtyMeasure { windows, vcpu_busy_share: 0.0 };
            return Ok(Found { at: Instant::now(), value });
        }
        let at_hand = controller.shelf().dirty.get(&subject.vm, DIRTY_SECONDS);
        if at_hand.is_none() && !matches!(self.effort, Effort::Thorough { .. }) {
            return Err("it would take seconds; the copy itself will tell".to_owned());
        }
        self.have(at_hand, async move {
            let request = DirtyCurveRequest::default();
            let report = subject.source.agent().dirty_curve(subject.vm, &request).await?;
            Ok(controller.shelf().dirty.put(subject.vm, report.measure, Duration::ZERO))
        })
        .await
    }

    async fn link(&self) -> Answer<LinkMeasure> {
        let Self { controller, subject, effort, .. } = self.clone();
        let (from, to) = (subject.source.name.clone(), subject.destination.name.clone());
        let key = (from, to.clone(), subject.tls);
        let thorough = matches!(effort, Effort::Thorough { .. });
        let most_seconds = if thorough { LINK_SECONDS } else { LINK_BRIEF_SECONDS };
        let at_hand = controller.shelf().link.get(&key, most_seconds);
        let anew = self.wants_fresh();
        self.have(at_hand, async move {
            let agent = subject.destination.view().address;
            let mut request = LinkRequest { tls: subject.tls, anew, ..LinkRequest::new(to, agent) };
            if let Effort::Thorough { probe_bytes_per_s, .. } = effort {
                request.max_bytes_per_s = probe_bytes_per_s;
            }
            let report = subject.source.agent().link(&request).await?;
            let age = Duration::from_millis(report.age_ms);
            Ok(controller.shelf().link.put(key, report.measure, age))
        })
        .await
    }

    async fn cpus(&self) -> (Answer<CpuReport>, Answer<CpuReport>) {
        let Subject { source, destination, .. } = &self.subject;
        tokio::join!(self.cpu(source.clone()), self.cpu(destination.clone()))
    }

    async fn cpu(&self, member: Arc<Member>) -> Answer<CpuReport> {
        let controller = self.controller.clone();
        if !matches!(self.effort, Effort::Thorough { .. }) {
            let best = controller.shelf().cpu.best(&member.name);
            return best.ok_or_else(|| "it was not asked yet".to_owned());
        }
        self.have(None, async move { ask_cpu(&controller, &member).await }).await
    }
}

/// A copy has ended that went faster or slower than was foretold: the next one measures the link anew.
pub(crate) fn note_rate(controller: &Controller, record: &Migration) {
    let (Some(forecast), Some(progress)) = (&record.forecast, &record.progress) else { return };
    let (seen, foretold) = (progress.bits_per_s as f64 / 8.0, forecast.wire_bytes_per_s);
    if seen > 0.0 && (seen - foretold).abs() > foretold * RATE_OFF_PERCENT / 100.0 {
        let (from, to) = (record.source.clone(), record.destination.clone());
        controller.shelf().link.forget(&(from, to, record.options.tls));
    }
}

/// Looks at a host's processors; the answer is the best of the last looks, as it is for a migration.
async fn ask_cpu(controller: &Controller, member: &Member) -> Result<Found<CpuReport>, ApiError> {
    let report = member.agent().cpu().await?;
    let cpus = &controller.shelf().cpu;
    let now = cpus.note(member.name.clone(), report);
    Ok(cpus.best(&member.name).unwrap_or(now))
}

/// Asks every host that answers what its processors have to spare, again and again.
pub(crate) async fn keep_cpus(controller: &Controller) {
    loop {
        tokio::time::sleep(Duration::from_secs(CPU_AGAIN_SECONDS)).await;
        let members = controller.hosts().all();
        let ready = members.iter().filter(|member| member.ready_report().is_some());
        let asked = ready.map(|member| ask_cpu(controller, member));
        for error in futures::future::join_all(asked).await.into_iter().filter_map(Result::err) {
            tracing::debug!(%error, "a host does not say what its processors have to spare");
        }
    }
}
