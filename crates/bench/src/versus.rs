//! Whimbrel beside `virsh migrate`: the same guest, QEMU, hosts and link, taking turns in one run.
//!
//! Two guests of a kind exist, one in the hands of each tool, on the same two hosts; the one whose turn it is not stands
//! still. In every round each contender moves its guest once, and the round begins with another contender each time. The
//! pause is QEMU's word on both sides, from the source's STOP event to the destination's RESUME event; so is "running on
//! the destination", the same RESUME. The witness verifies the guest after every move.

mod case;
mod domain;
mod libvirt;
mod monitor;
mod mover;
mod table;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use whimbrel_lab::report::Command;
use whimbrel_lab::{ProbeReport, Rate};

use crate::link::{self, Look};
use crate::machine::Machine;
use crate::say;
use crate::stage::{Engine, Shape, Stage};
use crate::versus::case::{Case, Contender, Content, Tool};
use crate::versus::libvirt::Libvirt;
use crate::versus::mover::{End, Mover, Trip};
use crate::versus::table::Outcome;

pub(crate) use crate::versus::table::table;

/// The first guest's number on each side; there are at most this many apart.
const NUMBERS: [(Tool, u8); 2] = [(Tool::Whimbrel, 20), (Tool::Virsh, 60)];
/// How long a guest runs before its move: long enough to see at what rate it dirties.
const BEFORE: Duration = Duration::from_secs(1);
/// How long the probe goes on after a move, so that it sees the end of any gap.
const AFTERWARDS: Duration = Duration::from_millis(500);
/// A contender whose moves do not end is given up after so many.
const UNFINISHED_MAX: usize = 2;
const PAGE_BYTES: f64 = 4096.0;

/// What is wanted of the comparison.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    /// How often each contender moves a guest in a case; where a case has several guests, how many of them at most are
    /// moved, if that is less than all.
    pub(crate) pairs: u32,
    /// Whether it is only to be tried.
    pub(crate) quick: bool,
    /// Only cases whose key begins with one of these; all if there are none.
    pub(crate) cases: &'a [String],
}

/// All that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Comparison {
    machine: Machine,
    engine: &'static str,
    /// libvirt's version.
    libvirt: String,
    cases: Vec<Measured>,
}

/// One case.
#[derive(Debug, Serialize)]
struct Measured {
    #[serde(flatten)]
    case: Case,
    runs: Vec<Run>,
    outcome: Outcome,
}

/// One move.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Run {
    /// Which of the case's contenders moved which of its guests.
    contender: usize,
    guest: usize,
    to: &'static str,
    /// None if it did not end in time.
    #[serde(flatten)]
    figures: Option<Figures>,
    /// What the probe saw.
    network: ProbeReport,
    /// The longest time in which the guest did nothing, by its own clock, which stands still while it is stopped.
    guest_longest_gap_ms: f64,
    /// How much it really dirtied just before.
    dirtied_mb_per_s: f64,
}

/// The figures of a move that ended.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Figures {
    /// The command's start until the destination's RESUME event.
    to_running_ms: f64,
    /// The command's start until its end.
    command_ms: f64,
    /// QEMU's own total time.
    engine_ms: f64,
    /// The source's STOP event until the destination's RESUME event.
    downtime_ms: f64,
    /// How much of the link was used while memory was copied before the pause.
    #[serde(skip_serializing_if = "Option::is_none")]
    link_used_percent: Option<f64>,
}

/// A guest, who moves it, and on which of the engine's two hosts it is.
struct Seat<'a> {
    tool: Tool,
    mover: Box<dyn Mover + 'a>,
    at: usize,
}

/// Guests of one kind, in the hands of each tool.
struct Guests<'a> {
    content: Content,
    seats: Vec<[Seat<'a>; 2]>,
}

struct Arena<'a> {
    stage: &'a Stage,
    engine: &'static Engine,
    libvirt: &'a Libvirt<'a>,
    wanted: &'a Wanted<'a>,
}

/// Measures the cases; after each of them `keep` is called with all that there is so far.
pub(crate) fn measure(
    stage: &Stage,
    engine: &'static Engine,
    wanted: &Wanted<'_>,
    keep: &mut dyn FnMut(&Comparison) -> Result<()>,
) -> Result<Comparison> {
    let chosen = |case: &Case| {
        wanted.cases.is_empty() || wanted.cases.iter().any(|key| case.key.starts_with(key))
    };
    let cases: Vec<Case> = case::all().into_iter().filter(chosen).collect();
    ensure!(!cases.is_empty(), "there is no such case");
    let libvirt = Libvirt::start(stage, engine)?;
    let arena = Arena { stage, engine, libvirt: &libvirt, wanted };
    let mut comparison = Comparison {
        machine: Machine::look(),
        engine: engine.version,
        libvirt: libvirt.version.clone(),
        cases: Vec::new(),
    };
    let mut guests: Option<Guests<'_>> = None;
    for case in cases {
        let count = if wanted.quick { case.guests.min(2) } else { case.guests };
        let fresh = match guests.take() {
            Some(guests) if guests.content == case.content => guests,
            others => {
                arena.remove(others)?;
                let mut fresh = arena.make(case.content, count)?;
                say(&format!("{}: warming up", case.title));
                arena.round(&case, &mut fresh, 0, &mut Vec::new())?;
                fresh
            }
        };
        let fresh = guests.insert(fresh);
        let runs = arena.case(&case, fresh)?;
        let outcome = Outcome::of(&case, &runs);
        comparison.cases.push(Measured { case, runs, outcome });
        keep(&comparison)?;
    }
    arena.remove(guests)?;
    Ok(comparison)
}

impl<'a> Arena<'a> {
    fn make(&self, content: Content, count: u8) -> Result<Guests<'a>> {
        let mut seats = Vec::new();
        for number in 0..count {
            let [ours, theirs] =
                NUMBERS.map(|(tool, first)| self.start(tool, content, first + number));
            let pair = [ours?, theirs?];
            for seat in &pair {
                self.stage.wait_filled(seat.mover.address())?;
                seat.mover.rest(self.engine.hosts[seat.at])?;
            }
            seats.push(pair);
        }
        Ok(Guests { content, seats })
    }

    fn start(&self, tool: Tool, content: Content, number: u8) -> Result<Seat<'a>> {
        let Content { memory_mib, filled_mib, words } = content;
        let name = match tool {
            Tool::Whimbrel => format!("ours-{number}"),
            Tool::Virsh => format!("theirs-{number}"),
        };
        let shape = Shape { name, number, memory_mib, filled_mib, words };
        let home = self.engine.hosts[0];
        let mover: Box<dyn Mover + 'a> = match tool {
            Tool::Whimbrel => Box::new(self.stage.start(&shape, self.engine, home)?),
            Tool::Virsh => Box::new(self.libvirt.start_guest(&shape, home)?),
        };
        Ok(Seat { tool, mover, at: 0 })
    }

    fn remove(&self, guests: Option<Guests<'a>>) -> Result<()> {
        let seats = guests.into_iter().flat_map(|guests| guests.seats).flatten();
        for seat in seats {
            seat.mover.remove(self.engine.hosts[seat.at])?;
        }
        Ok(())
    }

    /// All rounds of a case.
    fn case(&self, case: &Case, guests: &mut Guests<'a>) -> Result<Vec<Run>> {
        self.shape(case.link)?;
        let mut runs = Vec::new();
        // Many guests are many pairs.
        let rounds = if guests.seats.len() > 1 { 1 } else { self.wanted.pairs };
        for number in 0..guests.seats.len() {
            for round in 0..rounds as usize {
                self.round_of(case, guests, number, number + round, &mut runs)?;
            }
        }
        self.shape(None)?;
        Ok(runs)
    }

    fn shape(&self, link: Option<Rate>) -> Result<()> {
        for host in self.engine.hosts {
            self.stage.lab().set_link(host, link)?;
        }
        Ok(())
    }

    fn round(
        &self,
        case: &Case,
        guests: &mut Guests<'a>,
        round: usize,
        runs: &mut Vec<Run>,
    ) -> Result<()> {
        self.shape(case.link)?;
        self.round_of(case, guests, 0, round, runs)
    }

    /// Every contender moves a guest once, another one first in each round.
    fn round_of(
        &self,
        case: &Case,
        guests: &mut Guests<'a>,
        guest: usize,
        round: usize,
        runs: &mut Vec<Run>,
    ) -> Result<()> {
        let count = case.contenders.len();
        for turn in 0..count {
            let index = (turn + round) % count;
            let contender = &case.contenders[index];
            let unfinished =
                runs.iter().filter(|run| run.contender == index && run.figures.is_none()).count();
            if unfinished >= UNFINISHED_MAX {
                continue;
            }
            let seat = guests.seats[guest].iter_mut().find(|seat| seat.tool == contender.tool);
            let seat = seat.context("a contender has no guest")?;
            let context = || format!("{}, {}", case.title, contender.name());
            let run = self.turn(case, contender, seat).with_context(context)?;
            say(&format!("{}: {}", context(), run.words()));
            runs.push(Run { contender: index, guest, ..run });
        }
        Ok(())
    }

    fn turn(&self, case: &Case, contender: &Contender, seat: &mut Seat<'_>) -> Result<Run> {
        let [from, to] = [seat.at, 1 - seat.at].map(|at| self.engine.hosts[at]);
        let address = seat.mover.address();
        let tell =
            |command| Ok::<_, anyhow::Error>(self.stage.lab().witness(address)?.command(command)?);
        seat.mover.wake(from)?;
        tell(Command::Dirty { mb_per_s: case.dirty_mb_per_s })?;
        let began = (Instant::now(), tell(Command::ResetPeaks)?.memory.dirtied_pages);
        let probe = self.stage.lab().probe(address)?;
        self.stage.pause(BEFORE)?;
        let dirtied = tell(Command::Status)?.memory.dirtied_pages - began.1;
        let dirtied_mb_per_s = dirtied as f64 * PAGE_BYTES / began.0.elapsed().as_secs_f64() / 1e6;
        let _before = probe.take();
        let within = Duration::from_secs(case.within_s);
        let go = || seat.mover.go(from, to, &contender.options, within);
        let (end, looks) = self.watched(case.link, from, go)?;
        self.stage.pause(AFTERWARDS)?;
        let network = probe.finish();
        tell(Command::Dirty { mb_per_s: 0 })?;
        let report = self.stage.verify(address)?;
        let figures = match end {
            End::TooSlow => None,
            End::Arrived(trip) => {
                seat.at = 1 - seat.at;
                Some(Figures::of(&trip, case.link, &looks)?)
            }
        };
        seat.mover.rest(self.engine.hosts[seat.at])?;
        let guest_longest_gap_ms = report.clock.largest_gap_us as f64 / 1e3;
        let (contender, guest) = (0, 0);
        Ok(Run { contender, guest, to, figures, network, guest_longest_gap_ms, dirtied_mb_per_s })
    }

    /// Moves a guest, and meanwhile reads the counter of the link, if there is one.
    fn watched(
        &self,
        link: Option<Rate>,
        from: &str,
        go: impl FnOnce() -> Result<End>,
    ) -> Result<(End, Vec<Look>)> {
        if link.is_none() {
            return Ok((go()?, Vec::new()));
        }
        let done = AtomicBool::new(false);
        let (end, looks) = thread::scope(|scope| {
            let looking = scope.spawn(|| link::watch(self.stage.lab(), from, &done));
            let end = go();
            done.store(true, Ordering::Relaxed);
            (end, looking.join())
        });
        Ok((end?, looks.ok().context("the counter's thread ended")??))
    }
}

impl Figures {
    fn of(trip: &Trip, link: Option<Rate>, looks: &[Look]) -> Result<Self> {
        let since_spawn = |at: u64| at.saturating_sub(trip.spawned_us) as f64 / 1e3;
        let used = |link: Rate| {
            // A copy that is over at once tells nothing about the link.
            let (seconds, bytes) = link::between(looks, trip.copying_us, trip.stopped_us).ok()?;
            Some(bytes as f64 * 8.0 / seconds / link.bits_per_s as f64 * 100.0)
        };
        ensure!(trip.resumed_us > trip.stopped_us, "the guest ran on before it was stopped");
        Ok(Self {
            to_running_ms: since_spawn(trip.resumed_us),
            command_ms: since_spawn(trip.ended_us),
            engine_ms: trip.engine_ms,
            downtime_ms: (trip.resumed_us - trip.stopped_us) as f64 / 1e3,
            link_used_percent: link.and_then(used),
        })
    }
}

impl Run {
    fn words(&self) -> String {
        match self.figures {
            None => "did not end".to_owned(),
            Some(Figures { to_running_ms, downtime_ms, .. }) => {
                format!("running after {:.2} s, {downtime_ms:.1} ms pause", to_running_ms / 1e3)
            }
        }
    }
}
