//! `whimbrel vm dirty-rate`: how fast a guest writes, in the fields of `virsh domstats --dirtyrate`.

use clap::Args;
use whimbrel_api::measure::{
    CalcStatus, DIRTY_RATE_SAMPLE_PAGES_MAX, DIRTY_RATE_SAMPLE_PAGES_MIN, DirtyRateMode,
    DirtyRateReport, DirtyRateRequest,
};

use crate::command::Options;
use crate::failure::Failure;
use crate::output;
use crate::values::{self, BadValue};

/// Measure how fast a guest writes, in the fields of `virsh domstats --dirtyrate`
#[derive(Debug, Args)]
#[command(after_help = "\
A page that is written many times in the period counts once: try several periods, and see `whimbrel plan`, which looks at several \
at once and needs no QEMU for it.

Examples:
  whimbrel vm dirty-rate web01
  whimbrel vm dirty-rate web01 --seconds 30
  whimbrel vm dirty-rate web01 --seconds 2 --mode dirty-bitmap --json | jq .megabytes_per_second")]
pub(crate) struct DirtyRate {
    /// The VM's name or id
    #[arg(value_parser = values::vm)]
    vm: String,
    /// For how long, 0.1 to 60; QEMU before 9.0 takes whole seconds only, parts are rounded up
    #[arg(long, value_name = "N", default_value = "1", allow_negative_numbers = true, value_parser = values::measuring_ms)]
    seconds: u64,
    /// How: page-sampling, or under KVM dirty-bitmap, or dirty-ring where the VM has one
    #[arg(long, value_name = "MODE", default_value = "page-sampling", value_parser = mode)]
    mode: DirtyRateMode,
    /// Pages to sample for each GiB, 128 to 4096; QEMU's 512 without it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32)
          .range(i64::from(DIRTY_RATE_SAMPLE_PAGES_MIN)..=i64::from(DIRTY_RATE_SAMPLE_PAGES_MAX)))]
    sample_pages: Option<u32>,
}

impl DirtyRate {
    pub(super) async fn run(self, options: &Options) -> Result<(), Failure> {
        let request = DirtyRateRequest {
            period_ms: self.seconds,
            mode: self.mode,
            sample_pages: self.sample_pages,
        };
        let pool = options.pool()?;
        let report = pool.dirty_rate(&self.vm, &request).await?;
        if options.json {
            return output::json(&report);
        }
        output::line(&format!("Domain: '{}'", self.vm))?;
        let told = fields(&report);
        told.iter()
            .try_for_each(|(name, value)| output::line(&format!("  dirtyrate.{name}={value}")))
    }
}

fn mode(text: &str) -> Result<DirtyRateMode, BadValue> {
    match text {
        "page-sampling" => Ok(DirtyRateMode::PageSampling),
        "dirty-bitmap" => Ok(DirtyRateMode::DirtyBitmap),
        "dirty-ring" => Ok(DirtyRateMode::DirtyRing),
        _ => Err(BadValue::bad("a mode is page-sampling, dirty-bitmap or dirty-ring")),
    }
}

/// The fields that virsh shows, in its order and with its numbers.
fn fields(report: &DirtyRateReport) -> Vec<(String, String)> {
    let status = match report.calc_status {
        CalcStatus::Unstarted => "0",
        CalcStatus::Measuring => "1",
        CalcStatus::Measured => "2",
        CalcStatus::Unknown => "-1",
    };
    // Whole seconds, as virsh has them; QEMU 9.0 and newer tell what they measured to the millisecond.
    let period = report.calc_period_ms.map(|ms| match ms {
        ms if ms < 1_000 => (ms as f64 / 1e3).to_string(),
        ms => ((ms + 500) / 1_000).to_string(),
    });
    let fields = [
        ("calc_status", Some(status.to_owned())),
        ("calc_start_time", report.calc_start_time_seconds.map(|seconds| seconds.to_string())),
        ("calc_period", period),
        ("megabytes_per_second", report.megabytes_per_second.map(|rate| rate.to_string())),
        ("calc_mode", report.calc_mode.clone()),
    ];
    let told = fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    let vcpus = report.vcpus.iter().map(|vcpu| {
        let name = format!("vcpu.{}.megabytes_per_second", vcpu.vcpu);
        (name, vcpu.megabytes_per_second.to_string())
    });
    told.chain(vcpus).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_are_those_of_virsh() {
        let report: DirtyRateReport = serde_json::from_value(serde_json::json!({
            "calc_status": "measured", "calc_start_time_seconds": 348_414, "calc_period_ms": 30_001,
            "megabytes_per_second": 2, "calc_mode": "dirty-ring",
            "vcpus": [{"vcpu": 0, "megabytes_per_second": 2}],
        }))
        .unwrap();
        let told: Vec<String> =
            fields(&report).into_iter().map(|(name, value)| format!("{name}={value}")).collect();
        let expected = [
            "calc_status=2",
            "calc_start_time=348414",
            "calc_period=30",
            "megabytes_per_second=2",
            "calc_mode=dirty-ring",
            "vcpu.0.megabytes_per_second=2",
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn modes_have_the_words_of_the_api() {
        for mode_of in
            [DirtyRateMode::PageSampling, DirtyRateMode::DirtyBitmap, DirtyRateMode::DirtyRing]
        {
            assert_eq!(mode(serde_json::json!(mode_of).as_str().unwrap()), Ok(mode_of));
        }
        assert!(mode("guess").is_err());
    }
}
