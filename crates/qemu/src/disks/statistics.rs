//! What the guest reads from and writes to its disks, counted by QEMU since it began.
//!
//! A mirror's own reading is not in it (7.2.22, 10.0.2); nor is anything of a guest that came by
//! migration from before its coming.

use std::time::Duration;

use serde_json::Value;

use crate::machine::Machine;
use crate::qmp::QmpError;

/// The figures of one drive.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DriveStatistics {
    /// The disk's name.
    pub disk: String,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests to read.
    pub reads: u64,
    /// Requests to write.
    pub writes: u64,
    /// The time that all writes took together, in nanoseconds.
    pub write_nanoseconds: u64,
    /// Requests of any kind that failed.
    pub failed: u64,
}

impl DriveStatistics {
    /// How fast the guest has written since an earlier look, in bytes per second; `None` without time between.
    #[must_use]
    pub fn written_per_second_since(&self, earlier: &Self, elapsed: Duration) -> Option<u64> {
        let written = u128::from(self.written_bytes.saturating_sub(earlier.written_bytes));
        let rate = written.checked_mul(1_000_000_000)?.checked_div(elapsed.as_nanos())?;
        Some(u64::try_from(rate).unwrap_or(u64::MAX))
    }
}

/// The figures of all drives.
///
/// # Errors
///
/// [`QmpError`].
pub async fn query(machine: &Machine) -> Result<Vec<DriveStatistics>, QmpError> {
    let answer = machine.qmp().execute("query-blockstats", Value::Null).await?;
    Ok(answer.as_array().map(|list| list.iter().filter_map(drive).collect()).unwrap_or_default())
}

fn drive(entry: &Value) -> Option<DriveStatistics> {
    let device = entry.get("qdev").and_then(Value::as_str)?;
    let disk = device.split('/').rev().find_map(|part| part.strip_suffix("-device"))?;
    let stats = entry.get("stats")?;
    let number = |key: &str| stats.get(key).and_then(Value::as_u64).unwrap_or(0);
    let failed =
        ["rd", "wr", "flush", "unmap"].map(|kind| number(&format!("failed_{kind}_operations")));
    Some(DriveStatistics {
        disk: disk.to_owned(),
        read_bytes: number("rd_bytes"),
        written_bytes: number("wr_bytes"),
        reads: number("rd_operations"),
        writes: number("wr_operations"),
        write_nanoseconds: number("wr_total_time_ns"),
        failed: failed.into_iter().fold(0, u64::saturating_add),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_rate_needs_time_and_never_falls_below_nothing() {
        let at = |written_bytes| DriveStatistics { written_bytes, ..DriveStatistics::default() };
        let second = Duration::from_secs(1);
        assert_eq!(at(7).written_per_second_since(&at(2), second), Some(5));
        assert_eq!(at(7).written_per_second_since(&at(2), second / 2), Some(10));
        assert_eq!(at(2).written_per_second_since(&at(7), second), Some(0));
        assert_eq!(at(7).written_per_second_since(&at(2), Duration::ZERO), None);
    }

    #[test]
    fn a_drive_is_known_by_its_device() {
        let entry = json!({ "qdev": "/machine/peripheral/vda-device/virtio-backend",
            "stats": { "wr_bytes": 7, "failed_wr_operations": 1, "failed_rd_operations": 2 } });
        let found = drive(&entry).unwrap();
        assert_eq!((found.disk.as_str(), found.written_bytes, found.failed), ("vda", 7, 3));
        assert_eq!(drive(&json!({ "device": "pflash0", "stats": {} })), None);
    }
}
