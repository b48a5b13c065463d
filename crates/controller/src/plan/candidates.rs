//! One forecast for each rung of the ladder, side by side: for whoever wants to choose by hand, or to see what the choice was from.
//!
//! These are the plain forms of each way, not what [`whimbrel_migration::strategy`] would make of them; the choice is not made
//! from them.

use whimbrel_api::migration::{
    CompressionMethod, CompressionSetting, MigrateOptions, PostcopyBegin, PostcopySetting, Rung,
    Strategy, ThrottleSetting,
};
use whimbrel_api::plan::Candidate;
use whimbrel_api::policy::Policy;
use whimbrel_migration::forecast::facts::{EngineCosts, Measurements};
use whimbrel_migration::forecast::forecast;
use whimbrel_migration::preflight::EngineAbilities;
use whimbrel_migration::strategy::Allowed;

/// Connections of a candidate that has several: QEMU's default.
const CHANNELS: u8 = 2;

/// The candidates that both engines can do, whether policy and options allow them or not.
pub(super) fn candidates(
    facts: &Measurements,
    costs: &EngineCosts,
    (source, destination): (&EngineAbilities, &EngineAbilities),
    (options, policy): (&MigrateOptions, &Policy),
) -> Vec<Candidate> {
    let allowed = Allowed::of(policy, options);
    let plain = Strategy {
        tls: options.tls,
        bandwidth_bytes_per_s: options.bandwidth_bytes_per_s,
        ..Strategy::plain(allowed.max_downtime_ms)
    };
    let both = |capability: &str| source.can(capability) && destination.can(capability);
    let mut ways = vec![(plain.clone(), true)];
    if both("multifd") {
        let channels = Some(CHANNELS);
        ways.push((Strategy { rung: Rung::Channels, channels, ..plain.clone() }, true));
        for sample in &facts.census.compression {
            let setting = match sample.method {
                CompressionMethod::Zlib => CompressionSetting::Zlib { level: sample.level },
                CompressionMethod::Zstd => CompressionSetting::Zstd { level: sample.level },
                CompressionMethod::Xbzrle => continue,
            };
            if source.compresses(sample.method) && destination.compresses(sample.method) {
                let (rung, compression) = (Rung::Compression, Some(setting));
                ways.push((Strategy { rung, channels, compression, ..plain.clone() }, true));
            }
        }
    }
    if both("postcopy-ram") && destination.postcopy_obstacle.is_none() {
        let begin = PostcopyBegin::AfterFirstPass;
        let preempt = both("postcopy-preempt");
        let postcopy = Some(PostcopySetting { begin, preempt, bandwidth_bytes_per_s: None });
        let way = Strategy { rung: Rung::Postcopy, postcopy, ..plain.clone() };
        ways.push((way, allowed.postcopy));
    }
    if source.can("auto-converge") {
        let throttle = Some(ThrottleSetting::STANDARD);
        let way = Strategy { rung: Rung::Throttle, throttle, ..plain.clone() };
        ways.push((way, allowed.throttle));
    }
    let stopped = Strategy { rung: Rung::Static, stop_first: true, ..plain };
    ways.push((stopped, allowed.stopping));
    let candidate = |(strategy, allowed): (Strategy, bool)| Candidate {
        forecast: forecast(facts, costs, &strategy),
        strategy,
        allowed,
    };
    ways.into_iter().map(candidate).collect()
}
