//! What is measured before a move, and what QEMU's own work costs. Plain data: the agents measure.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::dirtying::DirtyCurve;
use crate::options::CompressionMethod;

/// Size of a guest page, in bytes, as QEMU sends and tracks them on x86.
pub const PAGE_BYTES: u64 = 4096;

/// All that a forecast is made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Measurements {
    /// The guest's memory, in bytes.
    pub memory_bytes: u64,
    /// What is in it.
    pub census: Census,
    /// How it changes.
    pub dirty: DirtyMeasure,
    /// The way to the destination.
    pub link: LinkMeasure,
    /// What the source's processors have to spare while the guest runs.
    pub source_cpu: CpuSpare,
    /// What the destination's processors have to spare.
    pub destination_cpu: CpuSpare,
    /// Both hosts are on the same processors, as in a lab: then the source's figure is that of both.
    #[serde(default)]
    pub hosts_share_cpu: bool,
}

impl Measurements {
    /// How much of its memory the guest has written after some time. What is zero it is not reckoned to
    /// write: nobody has written there so far.
    #[must_use]
    pub fn dirty_curve(&self) -> DirtyCurve {
        let memory_bytes = self.memory_bytes as f64;
        let seen = self.dirty.windows.iter().map(|window| window.dirtied_bytes).max().unwrap_or(0);
        let most_bytes = (memory_bytes * (1.0 - self.census.zero_share())).max(seen as f64);
        DirtyCurve::fit(&self.dirty, most_bytes.min(memory_bytes))
    }
}

/// What is in a guest's memory, from a sample of its pages, read from outside the guest.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Census {
    /// Pages that were looked at.
    pub sampled_pages: u64,
    /// Of these, pages that are all zero.
    pub zero_pages: u64,
    /// Of these, pages that another one of the sample equals (QEMU makes nothing of that).
    pub duplicate_pages: u64,
    /// What compression makes of the pages that are not zero.
    pub compression: Vec<CompressionSample>,
}

impl Census {
    /// The share of zero pages, 0 to 1; 0 where nothing was sampled.
    #[must_use]
    pub fn zero_share(&self) -> f64 {
        if self.sampled_pages == 0 {
            return 0.0;
        }
        (self.zero_pages as f64 / self.sampled_pages as f64).min(1.0)
    }
}

/// What one method at one level makes of the sampled pages that are not zero.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CompressionSample {
    /// The method: zlib or zstd. What xbzrle would save cannot be seen in a sample.
    pub method: CompressionMethod,
    /// Its level.
    pub level: u8,
    /// Compressed size by original size; below 1 it is smaller.
    pub ratio: f64,
    /// Time of one core of the source, in nanoseconds per byte before compression.
    pub compress_ns_per_byte: f64,
    /// Time of one core of the destination, in nanoseconds per byte before compression.
    pub decompress_ns_per_byte: f64,
}

/// How much memory a guest dirties, over windows of different length: pages that are written again and
/// again count once in each, which shows how large the set is that it works on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DirtyMeasure {
    /// The windows, in any order; one is enough for a guess, three are good.
    pub windows: Vec<DirtyWindow>,
    /// How busy the guest's vCPUs were, 0 to 1: throttling a guest that is mostly idle slows nothing.
    pub vcpu_busy_share: f64,
}

/// One window of a [`DirtyMeasure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DirtyWindow {
    /// How long it was, in milliseconds.
    pub window_ms: u64,
    /// Bytes of the pages that were written at least once in it.
    pub dirtied_bytes: u64,
}

/// The way between the agents, by a short probe.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LinkMeasure {
    /// Payload that one TCP connection after the other carried, in bytes a second.
    pub bytes_per_s: u64,
    /// The probe's cap was reached: the link carries at least this.
    #[serde(default)]
    pub at_least: bool,
    /// Round trip in microseconds.
    pub rtt_us: u64,
}

/// What the processors of a host have to spare.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CpuSpare {
    /// Idle time in cores: 1.5 is one core and half of another.
    pub spare_cores: f64,
    /// Cores that the host has.
    pub cores: u64,
}

/// What QEMU's own work, and ours, costs on these hosts. One core's time; measured, not guessed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EngineCosts {
    /// Admission and preflight until the destination is asked, in milliseconds.
    pub control_ms: f64,
    /// The destination's QEMU until it listens, in milliseconds.
    pub engine_start_ms: f64,
    /// Connecting, TLS and the first bitmap until the first page is sent, in milliseconds, without the
    /// round trips.
    pub setup_ms: f64,
    /// Round trips of the same.
    pub setup_round_trips: f64,
    /// Source: reading a page, finding that it is not zero, writing it to a socket; nanoseconds per byte.
    pub source_ns_per_byte: f64,
    /// Source: finding out that a page is zero, in nanoseconds per byte.
    pub zero_scan_ns_per_byte: f64,
    /// Source: TLS, in nanoseconds per byte on the wire.
    pub tls_encrypt_ns_per_byte: f64,
    /// Destination: TLS, in nanoseconds per byte on the wire.
    pub tls_decrypt_ns_per_byte: f64,
    /// Destination: reading a byte from a socket into memory that is there, in nanoseconds.
    pub destination_ns_per_byte: f64,
    /// Destination: the first write to a page, in nanoseconds; 0 where memory is touched beforehand.
    pub first_touch_ns_per_page: f64,
    /// A pass: fetching the bitmap of dirty pages, in nanoseconds per page of the guest.
    pub sync_ns_per_page: f64,
    /// The pause without its last pass and round trips: devices, loading, the handoff's two writes; in
    /// milliseconds.
    pub switchover_ms: f64,
    /// Round trips in the pause.
    pub switchover_round_trips: f64,
    /// Post-copy: what the pause takes more, in milliseconds.
    pub postcopy_switchover_extra_ms: f64,
    /// Post-copy: serving one page that the guest waits for, in microseconds, without the round trip.
    pub postcopy_fault_us: f64,
    /// The pause aimed at first, in milliseconds; doubled after each further pass.
    pub first_aim_ms: f64,
    /// How long after a bitmap QEMU fetches the next one while throttling is switched on, also in the middle
    /// of a pass, in milliseconds; 0 where it waits for the end of the pass (before 9.2).
    pub throttle_sync_ms: f64,
    /// A bandwidth that is allowed, and the rate from which QEMU reckons what a pause can carry, count pages as they
    /// lie in memory, however small they are on the wire (before 8.1).
    pub counts_before_compression: bool,
    /// How often the passes are looked at to lengthen that aim, in milliseconds.
    pub look_ms: f64,
}

impl Default for EngineCosts {
    /// Measured on two cores of an AMD EPYC without KVM (QEMU 10.0.2, both ends on one machine, 1 GiB of random pages):
    /// 0.44 s by a single stream and 0.3 s by two connections, 1.1 s and 0.9 s with TLS.
    fn default() -> Self {
        Self {
            control_ms: 60.0,
            engine_start_ms: 70.0,
            setup_ms: 15.0,
            setup_round_trips: 4.0,
            source_ns_per_byte: 0.42,
            zero_scan_ns_per_byte: 0.1,
            tls_encrypt_ns_per_byte: 0.6,
            tls_decrypt_ns_per_byte: 0.4,
            destination_ns_per_byte: 0.15,
            first_touch_ns_per_page: 500.0,
            sync_ns_per_page: 8.0,
            switchover_ms: 10.0,
            switchover_round_trips: 3.0,
            postcopy_switchover_extra_ms: 15.0,
            postcopy_fault_us: 300.0,
            first_aim_ms: 1.0,
            throttle_sync_ms: 5_000.0,
            counts_before_compression: false,
            look_ms: 200.0,
        }
    }
}
