//! How fast a guest writes its memory, measured by QEMU over a short time.
//!
//! The measuring goes on by itself; one at a time, and never within a migration's own figures:
//! whoever owns the VM is the only one to ask for it.
//!
//! Under TCG only the sampling can be used (tried): the bitmap ends 7.2.22 with a segmentation
//! fault, and its guest with it, as the ring does, and 10.0.2 measures 0 by it, whatever the guest
//! writes. So both are refused here unless KVM runs the guest.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Machine;
use crate::qmp::{QmpError, RefusalClass};

/// The shortest and the longest measuring that QEMU takes, in seconds (7.2, 10.0).
pub const DIRTY_RATE_SECONDS_MIN: u64 = 1;
/// See [`DIRTY_RATE_SECONDS_MIN`].
pub const DIRTY_RATE_SECONDS_MAX: u64 = 60;

/// How writes are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "mode")]
pub enum DirtyRateMode {
    /// Sampled pages are compared before and after.
    PageSampling {
        /// Pages per GiB of memory, 128 to 4096 or what QEMU takes; `None` is QEMU's 512.
        sample_pages: Option<u32>,
    },
    /// The marks that a migration uses too.
    DirtyBitmap,
    /// KVM's dirty ring, where the VM was started with it. Tells the rate of each vCPU.
    DirtyRing,
}

impl DirtyRateMode {
    /// QEMU's word.
    #[must_use]
    pub fn as_wire(self) -> &'static str {
        match self {
            Self::PageSampling { .. } => "page-sampling",
            Self::DirtyBitmap => "dirty-bitmap",
            Self::DirtyRing => "dirty-ring",
        }
    }
}

/// How far a measuring is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyRateStatus {
    /// There has been none.
    #[default]
    Unstarted,
    /// It goes on.
    Measuring,
    /// It is done.
    Measured,
    /// A word that we do not know.
    #[serde(untagged)]
    Unknown(String),
}

/// A measuring, as `query-dirty-rate` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DirtyRate {
    /// How far it is.
    pub status: DirtyRateStatus,
    /// Mebibytes written per second, every page counted once; when measured.
    pub mebibytes_per_second: Option<u64>,
    /// When it began, in seconds: since the host was started (7.2), or since 1970 (10.0).
    pub start_time_seconds: Option<u64>,
    /// How long it takes.
    pub period_ms: Option<u64>,
    /// Pages sampled per GiB, in that mode.
    pub sample_pages: Option<u64>,
    /// QEMU's word for the mode.
    pub mode: Option<String>,
    /// The rate of each vCPU by its number, in mebibytes per second, by the dirty ring.
    pub vcpus: BTreeMap<u64, u64>,
}

impl Machine {
    /// Begins to measure, for as long as that takes ([`DIRTY_RATE_SECONDS_MIN`] to
    /// [`DIRTY_RATE_SECONDS_MAX`]; parts of a second count where QEMU can, else are rounded up).
    ///
    /// # Errors
    ///
    /// [`QmpError`]; refused while one goes on, and for modes that the VM can not do.
    pub async fn calc_dirty_rate(
        &self,
        period: Duration,
        mode: DirtyRateMode,
    ) -> Result<(), QmpError> {
        const COMMAND: &str = "calc-dirty-rate";
        let samples = matches!(mode, DirtyRateMode::PageSampling { .. });
        if !samples && !self.runs_by_kvm().await? {
            return Err(QmpError::Refused {
                command: COMMAND.to_owned(),
                class: RefusalClass::GenericError,
                description: "without KVM writes are found by page-sampling only".to_owned(),
            });
        }
        let mut arguments = json!({ "mode": mode.as_wire() });
        if self.features().dirty_rate_in_milliseconds {
            arguments["calc-time"] = json!(u64::try_from(period.as_millis()).unwrap_or(u64::MAX));
            arguments["calc-time-unit"] = json!("millisecond");
        } else {
            let seconds = period.as_secs() + u64::from(period.subsec_nanos() > 0);
            arguments["calc-time"] = json!(seconds);
        }
        if let DirtyRateMode::PageSampling { sample_pages: Some(pages) } = mode {
            arguments["sample-pages"] = json!(pages);
        }
        self.order(COMMAND, arguments).await
    }

    async fn runs_by_kvm(&self) -> Result<bool, QmpError> {
        let answer = self.qmp.execute("query-kvm", Value::Null).await?;
        Ok(answer.get("enabled") == Some(&json!(true)))
    }

    /// The measuring that goes on, or the last one.
    ///
    /// # Errors
    ///
    /// [`QmpError`].
    pub async fn query_dirty_rate(&self) -> Result<DirtyRate, QmpError> {
        let exact = self.features().dirty_rate_in_milliseconds;
        let arguments =
            if exact { json!({ "calc-time-unit": "millisecond" }) } else { Value::Null };
        Ok(dirty_rate(&self.qmp.execute("query-dirty-rate", arguments).await?))
    }
}

fn dirty_rate(answer: &Value) -> DirtyRate {
    let number = |key: &str| answer.get(key).and_then(Value::as_u64);
    let text = |key: &str| answer.get(key).and_then(Value::as_str);
    let exact = text("calc-time-unit") == Some("millisecond");
    let milliseconds = |time: u64| if exact { time } else { time.saturating_mul(1000) };
    let vcpu =
        |entry: &Value| Some((entry.get("id")?.as_u64()?, entry.get("dirty-rate")?.as_u64()?));
    let vcpus = answer.get("vcpu-dirty-rate").and_then(Value::as_array);
    DirtyRate {
        status: match text("status") {
            None | Some("unstarted") => DirtyRateStatus::Unstarted,
            Some("measuring") => DirtyRateStatus::Measuring,
            Some("measured") => DirtyRateStatus::Measured,
            Some(word) => DirtyRateStatus::Unknown(word.to_owned()),
        },
        mebibytes_per_second: number("dirty-rate"),
        start_time_seconds: number("start-time"),
        period_ms: number("calc-time").map(milliseconds),
        sample_pages: number("sample-pages"),
        mode: text("mode").map(str::to_owned),
        vcpus: vcpus.into_iter().flatten().filter_map(vcpu).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_period_is_told_in_one_unit() {
        let seconds = dirty_rate(&json!({ "status": "measuring", "calc-time": 2 }));
        assert_eq!(seconds.period_ms, Some(2000));
        assert_eq!(seconds.status, DirtyRateStatus::Measuring);
        let exact = json!({ "status": "measured", "calc-time": 1500, "calc-time-unit": "millisecond",
            "dirty-rate": 12, "vcpu-dirty-rate": [{ "id": 0, "dirty-rate": 12 }, { "id": 1 }] });
        let exact = dirty_rate(&exact);
        assert_eq!((exact.period_ms, exact.mebibytes_per_second), (Some(1500), Some(12)));
        assert_eq!(exact.vcpus, BTreeMap::from([(0, 12)]));
        assert_eq!(dirty_rate(&Value::Null), DirtyRate::default());
        let strange = dirty_rate(&json!({ "status": "guessing" }));
        assert_eq!(strange.status, DirtyRateStatus::Unknown("guessing".to_owned()));
    }
}
