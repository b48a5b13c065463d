//! What the figures were measured on: without it they say nothing.

use std::fs;

use jiff::Timestamp;
use serde::Serialize;

/// The machine, and when.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Machine {
    /// When the bench began.
    pub(crate) began: Timestamp,
    /// The processor's name.
    pub(crate) processor: String,
    /// How many of them.
    pub(crate) processors: usize,
    /// Linux' version.
    pub(crate) kernel: String,
    /// Processes that were running or waited to run in the minute before, on average: a busy machine spoils the figures.
    pub(crate) load: f64,
}

impl Machine {
    /// Looks at this machine. What it does not tell stays empty.
    pub(crate) fn look() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let processors = read("/proc/cpuinfo");
        let name = processors.lines().find_map(|line| {
            line.strip_prefix("model name").and_then(|rest| rest.split_once(": "))
        });
        let load = read("/proc/loadavg");
        Self {
            began: Timestamp::now(),
            processor: name.map(|(_, name)| name.to_owned()).unwrap_or_default(),
            processors: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or_default(),
        }
    }
    /// One line for people.
    pub(crate) fn words(&self) -> String {
        let Self { processor, processors, kernel, load, .. } = self;
        let began = self.began.strftime("%Y-%m-%d %H:%M:%SZ");
        format!("{processors} × {processor}, Linux {kernel}, load {load} at the beginning, {began}")
    }
}
