//! Up the ladder, rung by rung: candidates, their forecasts, and the first that will do.

use super::settings::{
    CompressionSetting, PostcopyBegin, PostcopySetting, Rung, Strategy, ThrottleSetting,
};
use super::{
    Allowed, CHOSEN_CHANNELS_MAX, Decision, GAIN_MIN_PERCENT, NORMAL_DOWNTIME_MS, Plan,
    RESERVE_MARGIN_PERCENT, Rejection, Situation,
};
use crate::forecast::dirtying::DirtyCurve;
use crate::forecast::facts::Measurements;
use crate::forecast::{Convergence, Forecast, forecast};
use crate::options::{CompressionMethod, Mode, TimeoutAction, limits};
use crate::preflight::EngineVersion;
use crate::preflight::combinations::multifd_with_postcopy;

const DEFAULT_LEVEL: u8 = 1;
/// Where a first pass would leave more than this share of the memory to be sent again, post-copy does not wait for it: so
/// it takes no longer than one and a half times what the memory takes.
const SENT_AGAIN_MAX_SHARE: f64 = 0.5;
/// From this QEMU on the throttle does not wait for the end of a pass. Nothing in QEMU's description of
/// itself tells, and nothing but the forecast depends on it.
const THROTTLE_SYNC_FROM: EngineVersion = EngineVersion { major: 9, minor: 2, micro: 0 };
/// From this QEMU on parallel connections count what they put on the wire. Before (seen on 7.2.22) they count pages
/// as they lie in memory, and under a limit compression sends nothing sooner. As above, only the forecast depends on it.
const COUNTS_COMPRESSED_FROM: EngineVersion = EngineVersion { major: 8, minor: 1, micro: 0 };

/// Chooses how a VM goes that is running or paused, and says why.
#[must_use]
pub fn plan(situation: &Situation<'_>) -> Plan {
    let climb = Climb::new(situation);
    let plain = climb.candidate(Strategy { rung: Rung::Plain, ..climb.base() });
    let (stream, how) = climb.choose_stream();
    let (chosen, will_do, why) = climb.choose_rung(&stream);
    let chosen = climb.with_reserves(chosen);
    Plan {
        strategy: chosen.strategy,
        forecast: chosen.forecast,
        plain: plain.forecast,
        will_do,
        decisions: vec![how, why],
    }
}

/// A strategy and what it would take.
#[derive(Clone)]
struct Candidate {
    strategy: Strategy,
    forecast: Forecast,
}

struct Climb<'a> {
    situation: Situation<'a>,
    allowed: Allowed,
}

impl<'a> Climb<'a> {
    fn new(situation: &Situation<'a>) -> Self {
        let allowed = Allowed::of(situation.policy, situation.options);
        Self { situation: *situation, allowed }
    }

    fn candidate(&self, strategy: Strategy) -> Candidate {
        let Situation { facts, source, .. } = self.situation;
        let mut costs = *self.situation.costs;
        if source.version < THROTTLE_SYNC_FROM {
            costs.throttle_sync_ms = 0.0;
        }
        costs.counts_before_compression = source.version < COUNTS_COMPRESSED_FROM;
        Candidate { forecast: forecast(facts, &costs, &strategy), strategy }
    }

    /// What the user has said, on a single stream.
    fn base(&self) -> Strategy {
        let options = self.situation.options;
        let most = self.allowed.max_downtime_ms;
        Strategy {
            bandwidth_bytes_per_s: options.bandwidth_bytes_per_s,
            switchover_bandwidth_bytes_per_s: options.available_switchover_bandwidth_bytes_per_s,
            tls: options.tls,
            zerocopy: options.zerocopy,
            stop_first: options.mode == Mode::Static,
            ..Strategy::plain(options.max_downtime_ms.unwrap_or(NORMAL_DOWNTIME_MS).min(most))
        }
    }

    /// What carries the memory: the first three rungs, which the guest does not feel.
    fn choose_stream(&self) -> (Candidate, Decision) {
        let mut rejected = Vec::new();
        let streams = self.streams(&mut rejected).into_iter();
        let candidates: Vec<Candidate> = streams.map(|strategy| self.candidate(strategy)).collect();
        let mut best = 0;
        for next in 1..candidates.len() {
            if is_worth_it(&candidates[best], &candidates[next]) {
                best = next;
            }
        }
        let best = candidates[best].clone();
        // Of each other rung the quickest.
        let pass_ms = |candidate: &&Candidate| candidate.forecast.first_pass_ms;
        for rung in Rung::ALL.into_iter().filter(|rung| *rung != best.strategy.rung) {
            let of_rung = candidates.iter().filter(|candidate| candidate.strategy.rung == rung);
            let quickest = of_rung.min_by(|a, b| pass_ms(a).total_cmp(&pass_ms(b)));
            rejected.extend(quickest.map(|other| why_not(other, &best)));
        }
        let chosen = format!("{}, {}", stream_words(&best.strategy), speed(&best.forecast));
        let decision = Decision { measured: self.measured(), chosen, rejected };
        (best, decision)
    }

    /// Every stream that may be taken, the cheapest first.
    fn streams(&self, rejected: &mut Vec<Rejection>) -> Vec<Strategy> {
        let counts = self.channel_counts(rejected);
        let mut streams = Vec::new();
        let options = self.situation.options;
        let pinned = options.compression.is_some();
        let single_xbzrle = options
            .compression
            .as_ref()
            .is_some_and(|compression| compression.methods == [CompressionMethod::Xbzrle]);
        if single_xbzrle {
            let cache_bytes = options.compression.as_ref().and_then(|c| c.xbzrle_cache_bytes);
            let cache_bytes = cache_bytes.unwrap_or(limits::XBZRLE_CACHE_DEFAULT_BYTES);
            let compression = Some(CompressionSetting::Xbzrle { cache_bytes });
            return vec![Strategy { rung: Rung::Compression, compression, ..self.base() }];
        }
        if !pinned {
            if options.parallel_connections.is_none() && !options.zerocopy {
                streams.push(self.base());
            }
            for channels in &counts {
                let channels = Some(*channels);
                streams.push(Strategy { rung: Rung::Channels, channels, ..self.base() });
            }
        }
        streams.extend(self.compressed(&counts, pinned, rejected));
        if streams.is_empty() {
            streams.push(self.base());
        }
        streams
    }

    /// The numbers of connections that may be taken.
    fn channel_counts(&self, rejected: &mut Vec<Rejection>) -> Vec<u8> {
        let Situation { facts, options, source, destination, .. } = self.situation;
        let mut reject = |why: &str| {
            let what = "parallel connections".to_owned();
            rejected.push(Rejection { what, why: why.to_owned() });
            Vec::new()
        };
        if let Some(asked) = options.parallel_connections {
            return vec![u8::try_from(asked).unwrap_or(u8::MAX).max(1)];
        }
        if !(source.can("multifd") && destination.can("multifd")) {
            return reject("not both engines have them");
        }
        if options.postcopy.is_some() && !multifd_with_postcopy(source, destination) {
            return reject("post-copy is asked for, and these engines cannot do both");
        }
        if self.may_come_to_postcopy() && !multifd_with_postcopy(source, destination) {
            return reject(
                "post-copy may be needed, for it is not known how fast the guest writes, and these engines \
                 cannot do both",
            );
        }
        let cores = facts.source_cpu.cores.min(facts.destination_cpu.cores);
        let most = cores.clamp(limits::CONNECTIONS_DEFAULT, CHOSEN_CHANNELS_MAX);
        (1..=3).map(|power| 1_u8 << power).filter(|count| u64::from(*count) <= most).collect()
    }

    /// Whether post-copy is held in reserve before anything is known that speaks for or against it, and nothing that was
    /// asked for speaks against it.
    fn may_come_to_postcopy(&self) -> bool {
        let Situation { facts, options, .. } = self.situation;
        facts.dirty.windows.is_empty()
            && options.mode != Mode::Static
            && options.compression.is_none()
            && self.postcopy_possible().is_ok()
    }

    /// Compressed streams: those that were asked for, or those that the census has tried where it is the
    /// network that holds an uncompressed stream back.
    fn compressed(
        &self,
        counts: &[u8],
        pinned: bool,
        rejected: &mut Vec<Rejection>,
    ) -> Vec<Strategy> {
        let Situation { options, .. } = self.situation;
        if options.zerocopy || counts.is_empty() {
            return Vec::new();
        }
        let most = counts.last().copied();
        let fastest = Strategy { channels: most, ..self.base() };
        let fastest = self.candidate(fastest);
        if !pinned && !fastest.forecast.bottleneck.is_network() {
            rejected.push(Rejection {
                what: Rung::Compression.as_words().to_owned(),
                why: format!(
                    "what holds it back is {}, not the network",
                    fastest.forecast.bottleneck.as_words()
                ),
            });
            return Vec::new();
        }
        let settings = self.compression_settings();
        if settings.is_empty() && !pinned {
            rejected.push(Rejection {
                what: Rung::Compression.as_words().to_owned(),
                why: "no method that both engines have was tried on the guest's pages".to_owned(),
            });
        }
        let with = |channels: &u8| {
            let channels = *channels;
            settings.iter().map(move |setting| (channels, *setting)).collect::<Vec<_>>()
        };
        counts
            .iter()
            .flat_map(with)
            .map(|(channels, setting)| Strategy {
                rung: Rung::Compression,
                channels: Some(channels),
                compression: Some(setting),
                ..self.base()
            })
            .collect()
    }

    /// Methods and levels of compression that may be taken.
    fn compression_settings(&self) -> Vec<CompressionSetting> {
        let Situation { facts, options, source, destination, .. } = self.situation;
        let asked = options.compression.clone().unwrap_or_default();
        let wanted = |method: CompressionMethod| {
            (asked.methods.is_empty() || asked.methods.contains(&method))
                && source.compresses(method)
                && destination.compresses(method)
        };
        let level = |level: Option<u64>| level.and_then(|level| u8::try_from(level).ok());
        let mut settings = Vec::new();
        for method in [CompressionMethod::Zstd, CompressionMethod::Zlib] {
            let (pinned, make): (_, fn(u8) -> CompressionSetting) = match method {
                CompressionMethod::Zstd => {
                    (level(asked.zstd_level), |level| CompressionSetting::Zstd { level })
                }
                _ => (level(asked.zlib_level), |level| CompressionSetting::Zlib { level }),
            };
            if !wanted(method) {
                continue;
            }
            let sampled = facts.census.compression.iter().filter(|s| s.method == method);
            let sampled: Vec<u8> = sampled.map(|sample| sample.level).collect();
            match pinned {
                Some(level) => settings.push(make(level)),
                None if sampled.is_empty() && options.compression.is_some() => {
                    settings.push(make(DEFAULT_LEVEL));
                }
                None => settings.extend(sampled.into_iter().map(make)),
            }
        }
        settings
    }

    /// What is done to the guest, if anything.
    fn choose_rung(&self, stream: &Candidate) -> (Candidate, bool, Decision) {
        let options = self.situation.options;
        let measured = convergence_words(&stream.forecast);
        let mut rejected = Vec::new();
        let decide = |candidate: &Candidate, rejected: Vec<Rejection>| Decision {
            measured: measured.clone(),
            chosen: format!("{}: {}", candidate.strategy, outcome_words(&candidate.forecast)),
            rejected,
        };
        if options.mode == Mode::Static {
            let chosen = self.stopped(stream);
            let will_do = self.in_time(&chosen.forecast);
            let why = decide(&chosen, rejected);
            return (chosen, will_do, why);
        }
        let after_a_pass = options.postcopy.is_some_and(|postcopy| postcopy.after_precopy);
        if let Some(timeout) = options.timeout.filter(|_| !after_a_pass) {
            let mut why = decide(stream, rejected);
            let then = match timeout.then {
                TimeoutAction::Suspend => "the guest is stopped",
                TimeoutAction::Postcopy => "post-copy begins",
            };
            why.chosen.push_str(&format!("; after {} s {then}, as asked", timeout.seconds));
            return (stream.clone(), true, why);
        }
        let mut candidates = Vec::new();
        if after_a_pass {
            candidates.extend(self.postcopy(&mut rejected));
        }
        candidates.push(stream.clone());
        candidates.extend(self.longer_pauses(stream, &mut rejected));
        candidates.extend(self.postcopy(&mut rejected));
        candidates.extend(self.throttled(stream, &mut rejected));
        candidates.extend(self.stopping(stream, &mut rejected));
        // First what is sure, then what is on the edge, then what ends at all.
        let found = candidates
            .iter()
            .position(|candidate| self.will_do(&candidate.forecast))
            .or_else(|| {
                candidates.iter().position(|candidate| {
                    candidate.forecast.convergence == Convergence::Marginal
                        && self.in_time(&candidate.forecast)
                })
            });
        let will_do = found.is_some();
        let index = found.unwrap_or_else(|| least_bad(&candidates));
        let chosen = candidates[index].clone();
        let mut short = candidates[..index].iter().peekable();
        while let Some(other) = short.next() {
            // Of the longer pauses the longest says it for all.
            let longer = short.peek().is_some_and(|next| next.strategy.rung == Rung::Downtime);
            if other.strategy.rung == Rung::Downtime && longer {
                continue;
            }
            let why = self.shortcoming(&other.forecast);
            rejected.push(Rejection { what: other.strategy.to_string(), why });
        }
        let why = decide(&chosen, rejected);
        (chosen, will_do, why)
    }

    fn will_do(&self, forecast: &Forecast) -> bool {
        forecast.convergence == Convergence::Yes && self.in_time(forecast)
    }

    fn in_time(&self, forecast: &Forecast) -> bool {
        let limit = self.allowed.max_total_ms.map_or(f64::INFINITY, |most| most as f64);
        forecast.total_ms.is_some_and(|total| total <= limit)
    }

    fn shortcoming(&self, forecast: &Forecast) -> String {
        match (forecast.convergence, forecast.total_ms) {
            (Convergence::No, _) | (_, None) => "would not end".to_owned(),
            (Convergence::Marginal, _) => "might not end".to_owned(),
            (Convergence::Yes, Some(total)) => format!("takes {}", seconds(total)),
        }
    }

    /// Longer and longer pauses, up to the limit.
    fn longer_pauses(&self, stream: &Candidate, rejected: &mut Vec<Rejection>) -> Vec<Candidate> {
        let most = self.allowed.max_downtime_ms;
        let mut pause = stream.strategy.max_downtime_ms;
        if pause >= most {
            rejected.push(Rejection {
                what: Rung::Downtime.as_words().to_owned(),
                why: format!("{pause} ms is the limit"),
            });
        }
        let mut longer = Vec::new();
        while pause < most {
            pause = pause.saturating_mul(2).min(most);
            let strategy = stream.strategy.clone();
            let rung = Rung::Downtime;
            longer.push(self.candidate(Strategy { rung, max_downtime_ms: pause, ..strategy }));
        }
        longer
    }

    fn postcopy(&self, rejected: &mut Vec<Rejection>) -> Option<Candidate> {
        let what = Rung::Postcopy.as_words();
        if let Err(why) = self.postcopy_possible() {
            if !rejected.iter().any(|rejection| rejection.what == what) {
                rejected.push(Rejection { what: what.to_owned(), why });
            }
            return None;
        }
        let postcopy = Some(self.postcopy_setting(PostcopyBegin::AfterFirstPass));
        let Situation { source, destination, options, .. } = self.situation;
        let channels = if multifd_with_postcopy(source, destination) {
            options.parallel_connections.and_then(|asked| u8::try_from(asked).ok())
        } else {
            None
        };
        let strategy = Strategy { rung: Rung::Postcopy, channels, postcopy, ..self.base() };
        let after_a_pass = self.candidate(strategy);
        let asked = options.postcopy.is_some_and(|postcopy| postcopy.after_precopy);
        if asked || !is_mostly_sent_again(self.situation.facts, &after_a_pass.forecast) {
            return Some(after_a_pass);
        }
        let postcopy = Some(self.postcopy_setting(PostcopyBegin::AtOnce));
        Some(self.candidate(Strategy { postcopy, ..after_a_pass.strategy }))
    }

    fn postcopy_possible(&self) -> Result<(), String> {
        let Situation { source, destination, policy, options, .. } = self.situation;
        if !self.allowed.postcopy {
            return Err(if options.postcopy.is_some() {
                format!("policy {} forbids it", policy.name)
            } else {
                format!("policy {} wants it to be asked for", policy.name)
            });
        }
        if !(source.can("postcopy-ram") && destination.can("postcopy-ram")) {
            return Err("not both engines have it".to_owned());
        }
        if source.memory_page_bytes != destination.memory_page_bytes {
            return Err("the hosts' pages differ in size".to_owned());
        }
        let multifd = options.parallel_connections.is_some() || options.zerocopy;
        if multifd && !multifd_with_postcopy(source, destination) {
            return Err(
                "parallel connections are asked for, and these engines cannot do both".into()
            );
        }
        match &destination.postcopy_obstacle {
            Some(why) => Err(why.clone()),
            None => Ok(()),
        }
    }

    fn postcopy_setting(&self, begin: PostcopyBegin) -> PostcopySetting {
        let Situation { source, destination, options, .. } = self.situation;
        let preempts = source.can("postcopy-preempt") && destination.can("postcopy-preempt");
        let limit = options.postcopy.and_then(|postcopy| postcopy.bandwidth_bytes_per_s);
        PostcopySetting { begin, preempt: preempts, bandwidth_bytes_per_s: limit }
    }

    /// The steps that the user wants, or QEMU's own.
    fn throttle_setting(&self) -> ThrottleSetting {
        let asked = self.situation.options.auto_converge.unwrap_or_default();
        let percent = |asked: Option<u64>, otherwise: u8| {
            asked.and_then(|percent| u8::try_from(percent).ok()).unwrap_or(otherwise)
        };
        let standard = ThrottleSetting::STANDARD;
        ThrottleSetting {
            initial_percent: percent(asked.initial_percent, standard.initial_percent),
            increment_percent: percent(asked.increment_percent, standard.increment_percent),
            ..standard
        }
    }

    fn throttle_possible(&self) -> Result<(), String> {
        let Situation { source, policy, .. } = self.situation;
        if !self.allowed.throttle {
            let unasked = self.situation.options.timeout.is_some();
            return Err(if unasked {
                "a timeout is given, which says what to do".to_owned()
            } else {
                format!("policy {} does not allow it", policy.name)
            });
        }
        if !source.can("auto-converge") {
            return Err("the source's engine cannot".to_owned());
        }
        Ok(())
    }

    fn throttled(&self, stream: &Candidate, rejected: &mut Vec<Rejection>) -> Option<Candidate> {
        if let Err(why) = self.throttle_possible() {
            let what = Rung::Throttle.as_words().to_owned();
            rejected.push(Rejection { what, why });
            return None;
        }
        Some(self.candidate(Strategy {
            rung: Rung::Throttle,
            throttle: Some(self.throttle_setting()),
            max_downtime_ms: self.allowed.max_downtime_ms.max(stream.strategy.max_downtime_ms),
            ..stream.strategy.clone()
        }))
    }

    fn stopping(&self, stream: &Candidate, rejected: &mut Vec<Rejection>) -> Option<Candidate> {
        if self.allowed.stopping {
            return Some(self.stopped(stream));
        }
        let why = if self.situation.options.mode == Mode::Live {
            "--live is asked for".to_owned()
        } else {
            format!("policy {} does not allow it unasked", self.situation.policy.name)
        };
        rejected.push(Rejection { what: Rung::Static.as_words().to_owned(), why });
        None
    }

    fn stopped(&self, stream: &Candidate) -> Candidate {
        let strategy = stream.strategy.clone();
        self.candidate(Strategy { rung: Rung::Static, stop_first: true, ..strategy })
    }

    /// Makes ready what a later step may need and what costs nothing now. What the user has asked for is
    /// switched on in any case.
    fn with_reserves(&self, chosen: Candidate) -> Candidate {
        let Situation { source, destination, options, .. } = self.situation;
        let Candidate { mut strategy, forecast } = chosen;
        if strategy.stop_first {
            return Candidate { strategy, forecast };
        }
        if strategy.throttle.is_none() && self.throttle_possible().is_ok() {
            let asked = options.auto_converge.is_some();
            let setting = if asked { self.throttle_setting() } else { ThrottleSetting::RESERVE };
            strategy.throttle = Some(setting);
        }
        // Of a guest whose writing was not measured it is not known how close it is.
        let close = self.situation.facts.dirty.windows.is_empty()
            || forecast.margin_percent.is_some_and(|margin| margin < RESERVE_MARGIN_PERCENT);
        let fits = strategy.channels.is_none() || multifd_with_postcopy(source, destination);
        if strategy.postcopy.is_none()
            && (close || options.postcopy.is_some())
            && fits
            && self.postcopy_possible().is_ok()
        {
            // A timeout is an order given beforehand.
            let begin = match options.timeout {
                Some(_) => PostcopyBegin::WhenOrdered,
                None => PostcopyBegin::WhenStalled,
            };
            strategy.postcopy = Some(self.postcopy_setting(begin));
        }
        Candidate { strategy, forecast }
    }

    fn measured(&self) -> String {
        let facts = self.situation.facts;
        let curve = facts.dirty_curve();
        format!(
            "{} of memory, {:.0} % zero, {}; {}; {:.1} and {:.1} cores to spare",
            size(facts.memory_bytes as f64),
            facts.census.zero_share() * 100.0,
            dirty_words(&curve),
            link_words(facts),
            facts.source_cpu.spare_cores,
            facts.destination_cpu.spare_cores,
        )
    }
}

/// Whether a dearer stream is worth it: it ends where the other does not, or is enough faster.
fn is_worth_it(current: &Candidate, next: &Candidate) -> bool {
    let share = 1.0 - GAIN_MIN_PERCENT / 100.0;
    // A dearer rung has to gain more than another setting of the same one.
    let share = if next.strategy.rung > current.strategy.rung { share } else { 0.98 };
    let ends = |candidate: &Candidate| candidate.forecast.convergence == Convergence::Yes;
    match (current.forecast.total_ms, next.forecast.total_ms) {
        _ if ends(next) && !ends(current) => true,
        _ if ends(current) && !ends(next) => false,
        (Some(current), Some(next)) => next < current * share,
        (None, Some(_)) => true,
        (Some(_), None) => false,
        (None, None) => next.forecast.first_pass_ms < current.forecast.first_pass_ms * share,
    }
}

/// Where nothing will do: what comes nearest, and of equals the cheapest.
fn least_bad(candidates: &[Candidate]) -> usize {
    let rank = |candidate: &Candidate| match candidate.forecast.total_ms {
        Some(total) => (0, total),
        None => (1, -candidate.forecast.margin_percent.unwrap_or(0.0)),
    };
    let mut best = 0;
    for index in 1..candidates.len() {
        let (ends, cost) = rank(&candidates[index]);
        let (best_ends, best_cost) = rank(&candidates[best]);
        if ends < best_ends || (ends == best_ends && cost < best_cost) {
            best = index;
        }
    }
    best
}

fn why_not(other: &Candidate, taken: &Candidate) -> Rejection {
    let why = match (other.forecast.total_ms, taken.forecast.total_ms) {
        (Some(other), Some(taken)) if other > taken => {
            format!("{}, not {}", seconds(other), seconds(taken))
        }
        (Some(other), Some(_)) => format!("{}: gains too little", seconds(other)),
        _ => format!("{}: does not make the difference", speed(&other.forecast)),
    };
    Rejection { what: stream_words(&other.strategy), why }
}

fn stream_words(strategy: &Strategy) -> String {
    let channels = match strategy.channels {
        None => "a single stream".to_owned(),
        Some(channels) => format!("{channels} connections"),
    };
    match strategy.compression {
        None => channels,
        Some(compression) => format!("{channels} with {compression}"),
    }
}

fn speed(forecast: &Forecast) -> String {
    format!(
        "{}/s, held back by {}",
        size(forecast.wire_bytes_per_s),
        forecast.bottleneck.as_words()
    )
}

fn convergence_words(forecast: &Forecast) -> String {
    let margin = forecast.margin_percent.unwrap_or(0.0);
    match forecast.convergence {
        Convergence::Yes if margin >= 900.0 => "pre-copy converges with much to spare".to_owned(),
        Convergence::Yes => format!("pre-copy converges, {margin:.0} % below its limit"),
        Convergence::Marginal => format!("pre-copy is within {:.0} % of its limit", margin.abs()),
        Convergence::No => {
            format!(
                "pre-copy does not converge: the guest writes {:.0} % too much",
                too_much(margin)
            )
        }
    }
}

/// How much more than the limit it is, from how much less it would have to be.
fn too_much(margin_percent: f64) -> f64 {
    let share = (1.0 + margin_percent / 100.0).max(0.01);
    (1.0 / share - 1.0) * 100.0
}

fn outcome_words(forecast: &Forecast) -> String {
    let Some((total, downtime)) = forecast.total_ms.zip(forecast.downtime_ms) else {
        return "would not end by itself".to_owned();
    };
    let bytes = size(forecast.wire_bytes.unwrap_or(0) as f64);
    let mut words = format!("{}, pause {downtime:.0} ms, {bytes}", seconds(total));
    if forecast.throttle_percent > 0.0 {
        words.push_str(&format!(", guest slowed by {:.0} %", forecast.throttle_percent));
    }
    if let Some(postcopy) = forecast.postcopy {
        words.push_str(&format!(
            ", then {} of post-copy with about {} waits of {:.1} ms",
            seconds(postcopy.lasts_ms),
            postcopy.faults,
            postcopy.stall_us / 1_000.0
        ));
    }
    words
}

/// Whether a guest dirties so much during a first pass that the pass is not worth making before post-copy:
/// what it works on is missing afterwards all the same, and everything takes longer.
pub(super) fn is_mostly_sent_again(facts: &Measurements, forecast: &Forecast) -> bool {
    let again = facts.dirty_curve().unique_bytes(forecast.first_pass_ms);
    again > facts.memory_bytes as f64 * SENT_AGAIN_MAX_SHARE
}

fn dirty_words(curve: &DirtyCurve) -> String {
    if curve.bytes_per_s() < 1.0 {
        return "nothing is written".to_owned();
    }
    let (rate, set) = (size(curve.bytes_per_s()), size(curve.set_bytes()));
    format!("{rate}/s are written over {set}")
}

fn link_words(facts: &Measurements) -> String {
    let least = if facts.link.at_least { "at least " } else { "" };
    let rate = size(facts.link.bytes_per_s as f64);
    format!(
        "the link carries {least}{rate}/s, round trip {:.1} ms",
        facts.link.rtt_us as f64 / 1_000.0
    )
}

fn seconds(ms: f64) -> String {
    format!("{:.1} s", ms / 1_000.0)
}

fn size(bytes: f64) -> String {
    match bytes {
        _ if bytes >= 1e9 => format!("{:.1} GB", bytes / 1e9),
        _ if bytes >= 1e6 => format!("{:.0} MB", bytes / 1e6),
        _ => format!("{:.0} kB", bytes / 1e3),
    }
}
