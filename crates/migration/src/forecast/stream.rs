//! How fast a stream carries memory: the slowest of its stages, for each kind of page.
//!
//! A stream is a row of stages that work at the same time: the source's threads, the link, the
//! destination's threads. Its rate is that of the slowest one. A thread has one core at most, and all
//! threads of a host together have what its processors can spare; in a lab both hosts share these.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::facts::{EngineCosts, Measurements, PAGE_BYTES};
use crate::strategy::{CompressionSetting, Strategy};

const NS_PER_S: f64 = 1e9;
/// What QEMU sends for a page beside its bytes: where it is, and what kind it is.
const PAGE_HEAD_BYTES: f64 = 8.0;
/// What QEMU sends for a page of zeroes.
const ZERO_PAGE_WIRE_BYTES: f64 = 9.0;
/// What a host's scheduler gives to QEMU's threads also where nothing is idle, in cores.
const SPARE_CORES_MIN: f64 = 0.25;
/// A stream is never reckoned faster than this, in nanoseconds per byte (that is 100 GB/s).
const NS_PER_BYTE_MIN: f64 = 0.01;

/// What holds a stream back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Bottleneck {
    /// The network.
    Link,
    /// The bandwidth that the user allows.
    BandwidthLimit,
    /// A thread of the source, which has but one core.
    SourceThread,
    /// A thread of the destination, which has but one core.
    DestinationThread,
    /// The processors of a host.
    Cpu,
}

impl Bottleneck {
    /// The end of the sentence "it is held back by ...".
    #[must_use]
    pub const fn as_words(self) -> &'static str {
        match self {
            Self::Link => "the link",
            Self::BandwidthLimit => "the bandwidth that is allowed",
            Self::SourceThread => "the source's thread",
            Self::DestinationThread => "the destination's thread",
            Self::Cpu => "the processors",
        }
    }

    /// Whether fewer bytes on the wire would make it faster.
    #[must_use]
    pub const fn is_network(self) -> bool {
        matches!(self, Self::Link | Self::BandwidthLimit)
    }
}

/// How a strategy's stream carries memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Stream {
    /// The first pass, zero pages included, in nanoseconds per byte of the guest's memory.
    pub(super) first_ns_per_byte: f64,
    /// A page that has been sent before, in nanoseconds per byte.
    pub(super) again_ns_per_byte: f64,
    /// Bytes on the wire per byte of memory, in the first pass.
    pub(super) first_wire_share: f64,
    /// The same for pages that have been sent before.
    pub(super) again_wire_share: f64,
    /// Of such a page what QEMU counts as sent, per byte of memory.
    again_counted_share: f64,
    /// What holds the pages back that are not zero.
    pub(super) bottleneck: Bottleneck,
}

impl Stream {
    pub(super) fn of(facts: &Measurements, costs: &EngineCosts, strategy: &Strategy) -> Self {
        let page = PAGE_BYTES as f64;
        let (ratio, compress, decompress) = compression(facts, strategy);
        let wire_share = ratio + PAGE_HEAD_BYTES / page;
        let counted_share = if costs.counts_before_compression {
            wire_share.max(1.0 + PAGE_HEAD_BYTES / page)
        } else {
            wire_share
        };
        let zero_share = facts.census.zero_share();
        let data = Work {
            source_ns: costs.source_ns_per_byte + compress + tls(strategy, costs).0 * wire_share,
            destination_ns: (costs.destination_ns_per_byte + tls(strategy, costs).1) * wire_share
                + decompress,
            wire_share,
            counted_share,
        };
        let first = Work {
            destination_ns: data.destination_ns + costs.first_touch_ns_per_page / page,
            ..data
        };
        let zero = Work {
            source_ns: costs.zero_scan_ns_per_byte,
            destination_ns: 0.0,
            wire_share: ZERO_PAGE_WIRE_BYTES / page,
            counted_share: ZERO_PAGE_WIRE_BYTES / page,
        };
        let stages = Stages::of(facts, strategy);
        let (first_ns, bottleneck) = stages.slowest(&first);
        Self {
            first_ns_per_byte: zero_share * stages.slowest(&zero).0 + (1.0 - zero_share) * first_ns,
            again_ns_per_byte: stages.slowest(&data).0,
            first_wire_share: zero_share * zero.wire_share + (1.0 - zero_share) * wire_share,
            again_wire_share: wire_share,
            again_counted_share: counted_share,
            bottleneck,
        }
    }

    /// Bytes a second on the wire.
    pub(super) fn wire_bytes_per_s(&self) -> f64 {
        NS_PER_S * self.again_wire_share / self.again_ns_per_byte
    }

    /// Bytes a second that QEMU counts, from which it reckons what can be sent in a pause.
    pub(super) fn counted_bytes_per_s(&self) -> f64 {
        NS_PER_S * self.again_counted_share / self.again_ns_per_byte
    }
}

/// Ratio, and the cost of compressing and of decompressing in nanoseconds per byte. A method that the
/// census knows nothing of (xbzrle, a level that was not tried) is reckoned to save nothing.
fn compression(facts: &Measurements, strategy: &Strategy) -> (f64, f64, f64) {
    let Some(setting) = strategy.compression else { return (1.0, 0.0, 0.0) };
    let wanted = match setting {
        CompressionSetting::Zlib { level } | CompressionSetting::Zstd { level } => level,
        CompressionSetting::Xbzrle { .. } => return (1.0, 0.0, 0.0),
    };
    let samples = facts.census.compression.iter();
    let near = |level: u8| level.abs_diff(wanted);
    samples
        .filter(|sample| sample.method == setting.method())
        .min_by_key(|sample| near(sample.level))
        .map_or((1.0, 0.0, 0.0), |sample| {
            let cost = |ns: f64| if ns.is_finite() { ns.max(0.0) } else { 0.0 };
            let ratio = if sample.ratio.is_finite() { sample.ratio.clamp(0.001, 2.0) } else { 1.0 };
            (ratio, cost(sample.compress_ns_per_byte), cost(sample.decompress_ns_per_byte))
        })
}

fn tls(strategy: &Strategy, costs: &EngineCosts) -> (f64, f64) {
    if strategy.tls {
        (costs.tls_encrypt_ns_per_byte, costs.tls_decrypt_ns_per_byte)
    } else {
        (0.0, 0.0)
    }
}

/// What a byte of memory costs at each end.
#[derive(Clone, Copy)]
struct Work {
    source_ns: f64,
    destination_ns: f64,
    wire_share: f64,
    counted_share: f64,
}

/// What there is to do the work.
struct Stages {
    link_bytes_per_s: f64,
    limit_bytes_per_s: Option<f64>,
    threads: f64,
    source_cores: f64,
    destination_cores: f64,
    shared: bool,
}

impl Stages {
    fn of(facts: &Measurements, strategy: &Strategy) -> Self {
        let cores = |spare: f64| if spare.is_finite() { spare.max(SPARE_CORES_MIN) } else { 1.0 };
        Self {
            link_bytes_per_s: facts.link.bytes_per_s.max(1) as f64,
            limit_bytes_per_s: strategy.bandwidth_bytes_per_s.map(|limit| limit.max(1) as f64),
            threads: f64::from(strategy.channels.unwrap_or(1).max(1)),
            source_cores: cores(facts.source_cpu.spare_cores),
            destination_cores: cores(facts.destination_cpu.spare_cores),
            shared: facts.hosts_share_cpu,
        }
    }

    /// The slowest stage for some work: nanoseconds per byte, and which it is.
    fn slowest(&self, work: &Work) -> (f64, Bottleneck) {
        let link = work.wire_share * NS_PER_S / self.link_bytes_per_s;
        let limit = self
            .limit_bytes_per_s
            .map_or(0.0, |bytes_per_s| work.counted_share * NS_PER_S / bytes_per_s);
        let cpu = if self.shared {
            (work.source_ns + work.destination_ns) / self.source_cores
        } else {
            (work.source_ns / self.source_cores).max(work.destination_ns / self.destination_cores)
        };
        let stages = [
            (link, Bottleneck::Link),
            (limit, Bottleneck::BandwidthLimit),
            (work.source_ns / self.threads, Bottleneck::SourceThread),
            (work.destination_ns / self.threads, Bottleneck::DestinationThread),
            (cpu, Bottleneck::Cpu),
        ];
        let mut slowest = (NS_PER_BYTE_MIN, Bottleneck::Link);
        for stage in stages {
            if stage.0 > slowest.0 {
                slowest = stage;
            }
        }
        slowest
    }
}
