//! The serial console: a line about the state every second, and an echo of every line that is typed.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use crate::report::Report;
use crate::witness::{Witness, lock};

const DEVICE: &str = "/dev/ttyS0";
/// How often the state is printed.
const PERIOD: Duration = Duration::from_secs(1);
/// The pause after reading failed, so that a console that hangs up does not eat the processor.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// The console, shared by all who print whole lines on it.
pub(crate) struct Console {
    output: Mutex<File>,
    input: File,
}

impl Console {
    pub(crate) fn open() -> io::Result<Self> {
        let output = OpenOptions::new().write(true).open(DEVICE)?;
        Ok(Self { output: Mutex::new(output), input: File::open(DEVICE)? })
    }

    /// Prints a line. A console that does not take it is no reason to stop: the control port tells the same.
    pub(crate) fn say(&self, line: &str) {
        let _written = writeln!(lock(&self.output), "{line}");
    }

    /// Prints the state every [`PERIOD`]; never returns.
    pub(crate) fn keep_telling(&self, witness: &Witness) -> ! {
        loop {
            thread::sleep(PERIOD);
            self.say(&state_line(&witness.report()));
        }
    }

    /// Answers every line with the same words; never returns.
    pub(crate) fn keep_answering(&self) -> ! {
        let mut lines = BufReader::new(&self.input).lines();
        loop {
            match lines.next() {
                Some(Ok(line)) => self.say(&format!("echo: {line}")),
                Some(Err(_)) | None => thread::sleep(RETRY_PAUSE),
            }
        }
    }
}

/// For the one message that has no console yet.
#[expect(
    clippy::print_stderr,
    reason = "run by hand on a machine that it must not take for the guest"
)]
pub(crate) fn say_to_stderr(line: &str) {
    eprintln!("{line}");
}

fn state_line(report: &Report) -> String {
    let disk = report.disk.as_ref().map_or(0, |disk| disk.acknowledged);
    format!(
        "witness: up {}.{:03} s, {} of {} pages filled, record {disk}, {} mismatches, {}",
        report.uptime_ms / 1000,
        report.uptime_ms % 1000,
        report.memory.filled_pages,
        report.memory.pages,
        report.mismatches(),
        if report.healthy { "healthy" } else { "UNHEALTHY" },
    )
}
