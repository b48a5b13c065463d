//! The state and the figures of a migration, as `query-migrate` tells them on either side.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::qmp::{Qmp, QmpError};

/// The state of a migration.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// There has been none.
    #[default]
    None,
    /// Connecting, or waiting for the first byte.
    Setup,
    /// Being cancelled.
    Cancelling,
    /// Cancelled.
    Cancelled,
    /// Copying memory.
    Active,
    /// Post-copy.
    PostcopyActive,
    /// Post-copy, connection lost.
    PostcopyPaused,
    /// Post-copy, reconnecting (10.0).
    PostcopyRecoverSetup,
    /// Post-copy, recovering.
    PostcopyRecover,
    /// Done on this side.
    Completed,
    /// Failed on this side.
    Failed,
    /// COLO.
    Colo,
    /// The guest is stopped and QEMU waits for `migrate-continue`.
    PreSwitchover,
    /// Device states are on their way.
    Device,
    /// Waits for a guest to let go of a device.
    WaitUnplug,
    /// A state that we do not know.
    #[serde(untagged)]
    Unknown(String),
}

impl MigrationStatus {
    /// Reads QEMU's word.
    #[must_use]
    pub fn from_wire(word: &str) -> Self {
        match word {
            "none" => Self::None,
            "setup" => Self::Setup,
            "cancelling" => Self::Cancelling,
            "cancelled" => Self::Cancelled,
            "active" => Self::Active,
            "postcopy-active" => Self::PostcopyActive,
            "postcopy-paused" => Self::PostcopyPaused,
            "postcopy-recover-setup" => Self::PostcopyRecoverSetup,
            "postcopy-recover" => Self::PostcopyRecover,
            "completed" => Self::Completed,
            "failed" => Self::Failed,
            "colo" => Self::Colo,
            "pre-switchover" => Self::PreSwitchover,
            "device" => Self::Device,
            "wait-unplug" => Self::WaitUnplug,
            other => Self::Unknown(other.to_owned()),
        }
    }

    /// Whether the guest's state has been sent before its memory.
    #[must_use]
    pub fn is_postcopy(&self) -> bool {
        matches!(
            self,
            Self::PostcopyActive
                | Self::PostcopyPaused
                | Self::PostcopyRecoverSetup
                | Self::PostcopyRecover
        )
    }
}

/// Every figure that QEMU tells of a migration. All optional: which are there depends on the
/// state, the capabilities and the version.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Statistics {
    /// The state.
    pub status: MigrationStatus,
    /// QEMU's text on a failure.
    pub error_desc: Option<String>,
    /// Why this VM can not be migrated at all, if so.
    pub blocked_reasons: Vec<String>,
    /// Milliseconds since the start (while it runs) or in total.
    pub total_time_ms: Option<u64>,
    /// Milliseconds that the guest was stopped, as the source sees it; at the end only.
    pub downtime_ms: Option<u64>,
    /// Milliseconds that the guest would be stopped if the switchover came now.
    pub expected_downtime_ms: Option<u64>,
    /// Milliseconds of setup.
    pub setup_time_ms: Option<u64>,
    /// Memory.
    pub ram: RamStatistics,
    /// XBZRLE, where used.
    pub xbzrle: Option<XbzrleStatistics>,
    /// The older compression by threads, where used (7.2).
    pub compression: Option<CompressionStatistics>,
    /// Share of time that vCPUs are held back, in percent.
    pub cpu_throttle_percentage: Option<u64>,
    /// Longest round time of the dirty limit, microseconds.
    pub dirty_limit_throttle_time_per_round_us: Option<u64>,
    /// Time that the dirty limit takes to fill a dirty ring, microseconds.
    pub dirty_limit_ring_full_time_us: Option<u64>,
    /// Milliseconds that all vCPUs were blocked by post-copy.
    pub postcopy_blocktime_ms: Option<u64>,
    /// The same per vCPU.
    pub postcopy_vcpu_blocktime_ms: Vec<u64>,
    /// QEMU's answer, untouched.
    pub raw: Value,
}

/// The figures of XBZRLE.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct XbzrleStatistics {
    /// Bytes of the cache.
    pub cache_bytes: Option<u64>,
    /// Bytes sent as differences.
    pub bytes: Option<u64>,
    /// Pages sent as differences.
    pub pages: Option<u64>,
    /// Pages that were not in the cache.
    pub cache_misses: Option<u64>,
    /// Their share, 0 to 1.
    pub cache_miss_rate: Option<f64>,
    /// Bytes of pages for one byte sent.
    pub encoding_rate: Option<f64>,
    /// Pages that were cheaper to send whole.
    pub overflows: Option<u64>,
}

/// The figures of the older compression by threads.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct CompressionStatistics {
    /// Pages compressed.
    pub pages: Option<u64>,
    /// Times that no thread was free.
    pub busy: Option<u64>,
    /// Their share, 0 to 1.
    pub busy_rate: Option<f64>,
    /// Bytes sent compressed.
    pub compressed_bytes: Option<u64>,
    /// Bytes of pages for one byte sent.
    pub compression_rate: Option<f64>,
}

/// The figures of the guest's memory.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RamStatistics {
    /// Bytes sent.
    pub transferred_bytes: Option<u64>,
    /// Bytes still to send.
    pub remaining_bytes: Option<u64>,
    /// Bytes of guest memory.
    pub total_bytes: Option<u64>,
    /// Zero pages.
    pub duplicate_pages: Option<u64>,
    /// Pages sent whole.
    pub normal_pages: Option<u64>,
    /// The same in bytes.
    pub normal_bytes: Option<u64>,
    /// Pages that the guest dirties per second.
    pub dirty_pages_rate: Option<u64>,
    /// Throughput, megabits per second.
    pub mbps: Option<f64>,
    /// Pages sent per second.
    pub pages_per_second: Option<u64>,
    /// Passes over the dirty bitmap.
    pub dirty_sync_count: Option<u64>,
    /// Passes in which zero-copy had to copy.
    pub dirty_sync_missed_zero_copy: Option<u64>,
    /// Bytes sent while the guest ran.
    pub precopy_bytes: Option<u64>,
    /// Bytes sent while it was stopped.
    pub downtime_bytes: Option<u64>,
    /// Bytes sent in post-copy.
    pub postcopy_bytes: Option<u64>,
    /// Pages that the destination asked for in post-copy.
    pub postcopy_requests: Option<u64>,
    /// Bytes sent by multifd.
    pub multifd_bytes: Option<u64>,
    /// Bytes per page.
    pub page_size_bytes: Option<u64>,
}

impl Statistics {
    /// Asks QEMU.
    ///
    /// # Errors
    ///
    /// [`QmpError`].
    pub async fn query(qmp: &Qmp) -> Result<Self, QmpError> {
        Ok(Self::from_wire(&qmp.execute("query-migrate", Value::Null).await?))
    }

    /// Reads the answer of `query-migrate`.
    #[must_use]
    pub fn from_wire(answer: &Value) -> Self {
        let number = |key: &str| answer.get(key).and_then(Value::as_u64);
        let text = |key: &str| answer.get(key).and_then(Value::as_str).map(str::to_owned);
        let list = |key: &str| answer.get(key).and_then(Value::as_array);
        Self {
            status: answer
                .get("status")
                .and_then(Value::as_str)
                .map_or(MigrationStatus::None, MigrationStatus::from_wire),
            error_desc: text("error-desc"),
            blocked_reasons: list("blocked-reasons")
                .map(|reasons| {
                    reasons.iter().filter_map(Value::as_str).map(str::to_owned).collect()
                })
                .unwrap_or_default(),
            total_time_ms: number("total-time"),
            downtime_ms: number("downtime"),
            expected_downtime_ms: number("expected-downtime"),
            setup_time_ms: number("setup-time"),
            ram: answer.get("ram").map(RamStatistics::from_wire).unwrap_or_default(),
            xbzrle: answer.get("xbzrle-cache").map(XbzrleStatistics::from_wire),
            compression: answer.get("compression").map(CompressionStatistics::from_wire),
            cpu_throttle_percentage: number("cpu-throttle-percentage"),
            dirty_limit_throttle_time_per_round_us: number("dirty-limit-throttle-time-per-round"),
            dirty_limit_ring_full_time_us: number("dirty-limit-ring-full-time"),
            postcopy_blocktime_ms: number("postcopy-blocktime"),
            postcopy_vcpu_blocktime_ms: list("postcopy-vcpu-blocktime")
                .map(|times| times.iter().filter_map(Value::as_u64).collect())
                .unwrap_or_default(),
            raw: answer.clone(),
        }
    }
}

impl XbzrleStatistics {
    fn from_wire(cache: &Value) -> Self {
        let number = |key: &str| cache.get(key).and_then(Value::as_u64);
        let share = |key: &str| cache.get(key).and_then(Value::as_f64);
        Self {
            cache_bytes: number("cache-size"),
            bytes: number("bytes"),
            pages: number("pages"),
            cache_misses: number("cache-miss"),
            cache_miss_rate: share("cache-miss-rate"),
            encoding_rate: share("encoding-rate"),
            overflows: number("overflow"),
        }
    }
}

impl CompressionStatistics {
    fn from_wire(compression: &Value) -> Self {
        let number = |key: &str| compression.get(key).and_then(Value::as_u64);
        let share = |key: &str| compression.get(key).and_then(Value::as_f64);
        Self {
            pages: number("pages"),
            busy: number("busy"),
            busy_rate: share("busy-rate"),
            compressed_bytes: number("compressed-size"),
            compression_rate: share("compression-rate"),
        }
    }
}

impl RamStatistics {
    fn from_wire(ram: &Value) -> Self {
        let number = |key: &str| ram.get(key).and_then(Value::as_u64);
        Self {
            transferred_bytes: number("transferred"),
            remaining_bytes: number("remaining"),
            total_bytes: number("total"),
            duplicate_pages: number("duplicate"),
            normal_pages: number("normal"),
            normal_bytes: number("normal-bytes"),
            dirty_pages_rate: number("dirty-pages-rate"),
            mbps: ram.get("mbps").and_then(Value::as_f64),
            pages_per_second: number("pages-per-second"),
            dirty_sync_count: number("dirty-sync-count"),
            dirty_sync_missed_zero_copy: number("dirty-sync-missed-zero-copy"),
            precopy_bytes: number("precopy-bytes"),
            downtime_bytes: number("downtime-bytes"),
            postcopy_bytes: number("postcopy-bytes"),
            postcopy_requests: number("postcopy-requests"),
            multifd_bytes: number("multifd-bytes"),
            page_size_bytes: number("page-size"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_figure_may_be_missing() {
        let strange = json!({ "status": 7, "ram": "much", "total-time": -1, "downtime": 1.5 });
        for answer in [json!({}), Value::Null, strange] {
            let nothing = Statistics { raw: answer.clone(), ..Statistics::default() };
            assert_eq!(Statistics::from_wire(&answer), nothing);
        }
    }

    /// As 7.2 answered after a migration.
    #[test]
    fn figures_are_found_where_qemu_puts_them() {
        let figures = Statistics::from_wire(&json!({
            "status": "completed", "setup-time": 5, "downtime": 59, "total-time": 63,
            "blocked-reasons": ["a device"], "cpu-throttle-percentage": 20,
            "postcopy-blocktime": 7, "postcopy-vcpu-blocktime": [7, 9],
            "xbzrle-cache": {
                "cache-size": 67_108_864, "bytes": 12, "pages": 3, "cache-miss": 4,
                "cache-miss-rate": 0.25, "encoding-rate": 40.5, "overflow": 1
            },
            "ram": {
                "total": 67_641_344, "postcopy-requests": 0, "dirty-sync-count": 2,
                "multifd-bytes": 0, "pages-per-second": 0, "downtime-bytes": 135_437,
                "page-size": 4096, "remaining": 0, "postcopy-bytes": 0, "mbps": 108.5,
                "transferred": 779_648, "dirty-sync-missed-zero-copy": 0,
                "precopy-bytes": 644_211, "duplicate": 16_393, "dirty-pages-rate": 0,
                "normal-bytes": 630_784, "normal": 154
            }
        }));
        assert_eq!(figures.status, MigrationStatus::Completed);
        assert_eq!((figures.total_time_ms, figures.downtime_ms), (Some(63), Some(59)));
        assert_eq!(figures.setup_time_ms, Some(5));
        assert_eq!(figures.blocked_reasons, ["a device"]);
        assert_eq!(figures.cpu_throttle_percentage, Some(20));
        let ram = &figures.ram;
        assert_eq!((ram.transferred_bytes, ram.remaining_bytes), (Some(779_648), Some(0)));
        assert_eq!((ram.normal_pages, ram.normal_bytes), (Some(154), Some(630_784)));
        assert_eq!((ram.duplicate_pages, ram.dirty_sync_count), (Some(16_393), Some(2)));
        assert_eq!((ram.precopy_bytes, ram.downtime_bytes), (Some(644_211), Some(135_437)));
        assert_eq!(ram.mbps, Some(108.5));
        assert_eq!(figures.postcopy_blocktime_ms, Some(7));
        assert_eq!(figures.postcopy_vcpu_blocktime_ms, [7, 9]);
        let xbzrle = figures.xbzrle.unwrap();
        assert_eq!((xbzrle.pages, xbzrle.overflows), (Some(3), Some(1)));
        assert_eq!((xbzrle.cache_miss_rate, xbzrle.encoding_rate), (Some(0.25), Some(40.5)));
        assert_eq!(figures.raw["ram"]["page-size"], 4096);
    }

    #[test]
    fn an_unknown_status_is_kept_by_its_word() {
        let status = MigrationStatus::from_wire("teleporting");
        assert_eq!(status, MigrationStatus::Unknown("teleporting".to_owned()));
        for word in ["pre-switchover", "postcopy-recover-setup", "none", "teleporting"] {
            let status = MigrationStatus::from_wire(word);
            let text = serde_json::to_string(&status).unwrap();
            assert_eq!(text, format!("\"{word}\""));
            assert_eq!(serde_json::from_str::<MigrationStatus>(&text).unwrap(), status);
        }
    }
}
