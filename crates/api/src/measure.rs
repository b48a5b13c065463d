//! What a host measures before a move (`/v1` of an agent): how a guest writes, what is in its memory, the way to another
//! host, processors to spare.
//!
//! The facts themselves are [`whimbrel_migration::forecast::facts`]; here they come with how they were found: sample sizes,
//! errors, times. Every call is bounded in time and bytes by the constants named here.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
pub use whimbrel_migration::forecast::facts::{
    Census, CompressionSample, CpuSpare, DirtyMeasure, DirtyWindow, LinkMeasure,
};
use whimbrel_migration::names::Name;

/// The shortest and the longest measuring of a dirty rate by QEMU, in milliseconds.
pub const DIRTY_RATE_MS_MIN: u64 = 100;
/// See [`DIRTY_RATE_MS_MIN`].
pub const DIRTY_RATE_MS_MAX: u64 = 60_000;
/// Pages per GiB that QEMU may sample (7.2, 10.0).
pub const DIRTY_RATE_SAMPLE_PAGES_MIN: u32 = 128;
/// See [`DIRTY_RATE_SAMPLE_PAGES_MIN`].
pub const DIRTY_RATE_SAMPLE_PAGES_MAX: u32 = 4096;

/// Fewest pages of a sample.
pub const SAMPLE_PAGES_MIN: u32 = 64;
/// Most pages of a census.
pub const CENSUS_PAGES_MAX: u32 = 4096;
/// Most pages of a dirty curve.
pub const CURVE_PAGES_MAX: u32 = 16_384;
/// Most windows of a dirty curve.
pub const CURVE_WINDOWS_MAX: usize = 8;
/// The shortest and the longest window of a dirty curve, in milliseconds.
pub const CURVE_WINDOW_MS_MIN: u64 = 50;
/// See [`CURVE_WINDOW_MS_MIN`].
pub const CURVE_WINDOW_MS_MAX: u64 = 10_000;

/// The slowest cap of a link probe, in bytes a second: with less nothing can be told.
pub const LINK_CAP_BYTES_PER_S_MIN: u64 = 128 << 10;
/// How old the result of a link probe may be to be told again, in seconds.
pub const LINK_FRESH_SECONDS: u64 = 60;

/// How QEMU finds writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyRateMode {
    /// Sampled pages are compared before and after.
    #[default]
    PageSampling,
    /// The marks that a migration uses too; under KVM only.
    DirtyBitmap,
    /// KVM's dirty ring, where the VM was started with it; under KVM only.
    DirtyRing,
}

/// Asks QEMU to measure how fast a guest writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DirtyRateRequest {
    /// For how long, in milliseconds, [`DIRTY_RATE_MS_MIN`] to [`DIRTY_RATE_MS_MAX`]; default 1000. QEMU before 9.0 takes
    /// whole seconds only: parts are rounded up.
    pub period_ms: u64,
    /// How; default `page-sampling`.
    pub mode: DirtyRateMode,
    /// Pages per GiB to sample, in that mode, [`DIRTY_RATE_SAMPLE_PAGES_MIN`] to [`DIRTY_RATE_SAMPLE_PAGES_MAX`]; default
    /// QEMU's 512.
    pub sample_pages: Option<u32>,
}

impl Default for DirtyRateRequest {
    fn default() -> Self {
        Self { period_ms: 1000, mode: DirtyRateMode::default(), sample_pages: None }
    }
}

/// How far QEMU's measuring is; in the order of the numbers that `virsh domstats --dirtyrate` shows (0, 1, 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CalcStatus {
    /// There has been none.
    Unstarted,
    /// It goes on.
    Measuring,
    /// It is done.
    Measured,
    /// A word that this version does not know.
    #[serde(other)]
    Unknown,
}

/// QEMU's measuring: the fields of `virsh domstats --dirtyrate`, by their names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DirtyRateReport {
    /// `dirtyrate.calc_status`.
    pub calc_status: CalcStatus,
    /// `dirtyrate.calc_start_time`: when it began, in seconds; since the host was started by QEMU 7.2, since 1970 by 10.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calc_start_time_seconds: Option<u64>,
    /// `dirtyrate.calc_period`, which counts seconds, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calc_period_ms: Option<u64>,
    /// `dirtyrate.megabytes_per_second`: mebibytes written per second, each page counted once in the period.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub megabytes_per_second: Option<u64>,
    /// `dirtyrate.calc_mode`: QEMU's word for the mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calc_mode: Option<String>,
    /// Pages sampled per GiB, in that mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample_pages: Option<u64>,
    /// `dirtyrate.vcpu.<number>.megabytes_per_second`, by the dirty ring.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vcpus: Vec<VcpuDirtyRate>,
}

/// How fast one vCPU writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VcpuDirtyRate {
    /// Its number.
    pub vcpu: u64,
    /// Mebibytes per second.
    pub megabytes_per_second: u64,
}

/// Asks how many different pages a guest writes in windows of different length.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DirtyCurveRequest {
    /// The ends of the windows, all of which begin now, in milliseconds and rising: at most [`CURVE_WINDOWS_MAX`], each
    /// [`CURVE_WINDOW_MS_MIN`] to [`CURVE_WINDOW_MS_MAX`]; default 250, 500, 1000, 2000.
    pub windows_ms: Vec<u64>,
    /// Pages to look at, [`SAMPLE_PAGES_MIN`] to [`CURVE_PAGES_MAX`]; default 8192.
    pub sample_pages: u32,
}

impl Default for DirtyCurveRequest {
    fn default() -> Self {
        Self { windows_ms: vec![250, 500, 1000, 2000], sample_pages: 8192 }
    }
}

/// How many different pages a guest wrote in windows of different length: the content of sampled pages was compared from
/// outside, which costs the guest nothing. A page that was written with what it held before is not seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DirtyCurveReport {
    /// The result, for a forecast.
    pub measure: DirtyMeasure,
    /// The same as shares of the sample, with their errors.
    pub curve: Vec<DirtyPoint>,
    /// Pages that were looked at.
    pub sampled_pages: u64,
    /// The guest's memory, in bytes.
    pub memory_bytes: u64,
    /// Processor time that the looking took, in milliseconds.
    pub cpu_ms: u64,
}

/// One window of a [`DirtyCurveReport`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DirtyPoint {
    /// How long the window was, in milliseconds.
    pub window_ms: u64,
    /// Sampled pages that had changed at its end, or before.
    pub changed_pages: u64,
    /// The same as a share of the sample, 0 to 1.
    pub share_changed: f64,
    /// Standard error of that share, at most; less where what is written lies together.
    pub share_error: f64,
}

/// Asks what is in a guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CensusRequest {
    /// Pages to look at, [`SAMPLE_PAGES_MIN`] to [`CENSUS_PAGES_MAX`]; default the latter.
    pub sample_pages: u32,
}

impl Default for CensusRequest {
    fn default() -> Self {
        Self { sample_pages: CENSUS_PAGES_MAX }
    }
}

/// What is in a guest's memory, from a sample that was read from outside while the guest ran on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CensusReport {
    /// The result, for a forecast.
    pub census: Census,
    /// Standard error of its share of zero pages, at most.
    pub zero_share_error: f64,
    /// Sampled pages that the guest has never touched. They are zero, and were not read, which would have made them.
    pub untouched_pages: u64,
    /// Pages that were passed over because they are swapped out; not in the sample.
    pub swapped_pages: u64,
    /// Pages that were compressed.
    pub compressed_pages: u64,
    /// The guest's memory, in bytes.
    pub memory_bytes: u64,
    /// Processor time that it took, in milliseconds.
    pub cpu_ms: u64,
}

/// Asks a host how fast the way to another one is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LinkRequest {
    /// The other host.
    pub to: Name,
    /// Where its agent listens, `address:port`.
    pub agent: String,
    /// Whether the probe goes through TLS, as the stream does by default.
    #[serde(default = "yes")]
    pub tls: bool,
    /// Measure anew, though there may be a result that is no older than [`LINK_FRESH_SECONDS`].
    #[serde(default)]
    pub anew: bool,
    /// Send no faster than this, in bytes a second; at least [`LINK_CAP_BYTES_PER_S_MIN`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes_per_s: Option<u64>,
}

impl LinkRequest {
    /// Through TLS, without cap; a fresh result is good enough.
    #[must_use]
    pub fn new(to: Name, agent: String) -> Self {
        Self { to, agent, tls: true, anew: false, max_bytes_per_s: None }
    }
}

fn yes() -> bool {
    true
}

/// How fast the way to another host is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LinkReport {
    /// The result, for a forecast.
    pub measure: LinkMeasure,
    /// Whether the probe went through TLS.
    pub tls: bool,
    /// Bytes that the rate was made from, the beginning not being counted.
    pub counted_bytes: u64,
    /// In which time they came, in microseconds.
    pub counted_us: u64,
    /// How old the result is, in milliseconds.
    pub age_ms: u64,
}

/// Asks a destination to listen for one probe; from the source's agent, which shows its certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkListen {
    /// Who will send.
    pub from: Name,
    /// Whether through TLS.
    pub tls: bool,
}

/// Where to send a probe, once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkAddress {
    /// Host name or IP address, without port.
    pub host: String,
    /// A port of the migration range.
    pub port: u16,
    /// What to say first: good for this one probe.
    pub ticket: String,
}

/// What the processors of a host had to spare a moment ago.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CpuReport {
    /// The result, for a forecast.
    pub spare: CpuSpare,
    /// How long was looked, in milliseconds.
    pub window_ms: u64,
    /// Names the start of this machine's kernel: two hosts with the same word are on the same processors, as in a lab.
    /// Empty where the kernel does not tell.
    pub boot: String,
}
