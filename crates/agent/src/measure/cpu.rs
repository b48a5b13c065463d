//! What the processors have to spare, and how much of them a process or thread has had.

use std::time::Duration;

use tokio::time::Instant;
use whimbrel_api::measure::{CpuReport, CpuSpare};
use whimbrel_api::{ApiError, ErrorCode};

/// How long is looked, in milliseconds: the kernel counts in steps of 10 ms or less.
const WINDOW_MS: u64 = 250;

/// The idle share of this host's processors over a moment, in cores. Waiting for a disk is idle.
///
/// # Errors
/// `internal` where the kernel does not tell.
pub async fn spare() -> Result<CpuReport, ApiError> {
    let before = read()?;
    let begun = Instant::now();
    tokio::time::sleep(Duration::from_millis(WINDOW_MS)).await;
    let after = read()?;
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    Ok(CpuReport {
        spare: between(&before, &after),
        window_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        boot: boot.trim().to_owned(),
    })
}

/// What the kernel has counted since its start, in its ticks.
#[derive(Debug, PartialEq, Eq)]
struct Counted {
    idle: u64,
    all: u64,
    cores: u64,
}

fn read() -> Result<Counted, ApiError> {
    let text = std::fs::read_to_string("/proc/stat")
        .map_err(|error| ApiError::internal("the processors' times cannot be read", &error))?;
    counted(&text).ok_or_else(|| {
        ApiError::new(ErrorCode::Internal, "the kernel does not tell the processors' times")
    })
}

fn counted(text: &str) -> Option<Counted> {
    // user nice system idle iowait irq softirq steal; what follows is in user and nice already (proc(5)).
    const FIELDS: usize = 8;
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let times: Vec<u64> =
        line.split_ascii_whitespace().take(FIELDS).map_while(|time| time.parse().ok()).collect();
    let idle = times.get(3)? + times.get(4).unwrap_or(&0);
    let core = |line: &&str| {
        line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let cores = u64::try_from(text.lines().filter(core).count()).unwrap_or(u64::MAX);
    Some(Counted { idle, all: times.iter().sum(), cores })
}

fn between(before: &Counted, after: &Counted) -> CpuSpare {
    let all = after.all.saturating_sub(before.all);
    // The kernel's figure for idleness can go back a little (proc(5), iowait).
    let idle = after.idle.saturating_sub(before.idle).min(all);
    let share = if all == 0 { 0.0 } else { idle as f64 / all as f64 };
    CpuSpare { spare_cores: share * after.cores as f64, cores: after.cores }
}

/// The processor time that a process has had, all of its threads together; none if it is gone.
pub(super) fn of_process(pid: u32) -> Option<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in brackets can hold anything; after it come state … utime stime as 12th and 13th.
    let (_, fields) = text.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11).map_while(|time| time.parse().ok());
    let ticks: u64 = fields.next().and_then(|user: u64| Some(user + fields.next()?))?;
    Some(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

/// The processor time that this thread has had.
pub(super) fn of_this_thread() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spare_cores_are_the_idle_share_of_all() {
        let before = counted("cpu  100 0 100 700 100 0 0 0 9 9\ncpu0 1\ncpu1 1\nctxt 5\n").unwrap();
        assert_eq!(before, Counted { idle: 800, all: 1000, cores: 2 });
        let after = Counted { idle: 950, all: 1200, cores: 2 };
        assert_eq!(between(&before, &after), CpuSpare { spare_cores: 1.5, cores: 2 });
        assert!(between(&after, &after).spare_cores == 0.0);
        assert_eq!(counted("intr 1"), None);
    }

    #[test]
    fn the_kernel_tells_the_times_of_this_machine() {
        let now = read().unwrap();
        assert!(now.cores > 0 && now.all > now.idle);
        assert!(of_process(std::process::id()).is_some() && of_process(u32::MAX).is_none());
        let before = of_this_thread();
        let mut sum = 0_u64;
        while of_this_thread() - before < Duration::from_millis(30) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(of_process(std::process::id()).unwrap() > Duration::ZERO);
    }
}
