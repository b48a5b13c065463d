//! The control protocol: one JSON object a line over TCP, a [`Command`] in, a [`Reply`] out, in order.
//!
//! Both ends are built from this file, so no versions are negotiated.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// UDP: every datagram is sent back as it came.
pub const ECHO_PORT: u16 = 7;
/// TCP: the client sends 8-byte little-endian numbers 0, 1, 2, …; the witness checks them and sends them back.
pub const STREAM_PORT: u16 = 7000;
/// TCP: the control protocol.
pub const CONTROL_PORT: u16 = 7070;
/// The longest line that either side accepts, in bytes.
pub const LINE_BYTES_MAX: usize = 64 * 1024;

/// What the witness can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Answers with the report as it is.
    Status,
    /// Verifies all memory and the whole journal, then answers.
    Verify,
    /// Dirties memory at this rate from now on; 0 stops.
    Dirty {
        /// Megabytes (10^6 bytes) of distinct pages a second.
        mb_per_s: u32,
    },
    /// Appends to the journal at this rate from now on; 0 stops.
    Journal {
        /// Records of 4 KiB a second.
        records_per_s: u32,
    },
    /// Damages what the witness watches, so that it can be seen to notice.
    Corrupt {
        /// What to damage.
        what: Damage,
    },
    /// Forgets the largest gaps and waits seen so far; mismatches are never forgotten.
    ResetPeaks,
    /// Switches the machine off.
    Poweroff,
    /// Restarts the machine.
    Reboot,
    /// Crashes the kernel.
    Panic,
}

/// What [`Command::Corrupt`] damages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Damage {
    /// One bit of one page of memory.
    Page,
    /// One bit of one acknowledged record on the disk.
    Block,
    /// The wall clock, set 5 s ahead.
    Clock,
}

/// The answer to a [`Command`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Reply {
    /// It was not understood, or could not be done.
    Refused {
        /// Why.
        error: String,
    },
    /// It was done; this is how things stand afterwards.
    Report(Box<Report>),
}

/// All that the witness has seen since it booted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// No mismatch, no error, all that was configured is running.
    pub healthy: bool,
    /// The kernel's random id of this boot: another one means that the guest restarted.
    pub boot_id: String,
    /// Time since the kernel started, by the guest's monotonic clock.
    pub uptime_ms: u64,
    /// The address of the guest, if it has a network.
    pub address: Option<Ipv4Addr>,
    /// What could not be set up or went wrong, in words.
    pub errors: Vec<String>,
    /// Memory.
    pub memory: MemoryReport,
    /// The disk's journal; none if the guest has no disk.
    pub disk: Option<DiskReport>,
    /// Clocks.
    pub clock: ClockReport,
    /// Network.
    pub net: NetReport,
}

impl Report {
    /// All mismatches of memory, disk, clock and stream.
    #[must_use]
    pub fn mismatches(&self) -> u64 {
        let disk = self.disk.as_ref().map_or(0, |disk| disk.mismatches);
        let clock = self.clock.monotonic_back + self.clock.realtime_steps;
        self.memory.mismatches + disk + clock + self.net.stream_mismatches
    }
}

/// What was seen of memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryReport {
    /// Pages of 4 KiB that are to be filled.
    pub pages: u64,
    /// Pages that are filled by now.
    pub filled_pages: u64,
    /// Rate at which pages are being dirtied, in 10^6 bytes a second.
    pub dirty_mb_per_s: u32,
    /// Page writes so far.
    pub dirtied_pages: u64,
    /// Page verifications so far.
    pub verified_pages: u64,
    /// Pages found to hold something else than was written.
    pub mismatches: u64,
    /// The first of them.
    pub first_mismatches: Vec<PageMismatch>,
}

/// A page that did not hold what was written to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageMismatch {
    /// The page, counted from 0 in the filled area.
    pub page: u64,
    /// How often it had been dirtied.
    pub generation: u32,
    /// Offset of the first wrong byte's 8-byte word.
    pub offset: u32,
    /// What that word should have been.
    pub expected: u64,
    /// What it was.
    pub found: u64,
}

/// What was seen of the disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskReport {
    /// The journal's ring, in records of 4 KiB.
    pub slots: u64,
    /// Rate of appending.
    pub records_per_s: u32,
    /// The last record that the disk acknowledged as durable; records count from 1, across boots.
    pub acknowledged: u64,
    /// Record verifications so far.
    pub verified_records: u64,
    /// Acknowledged records that the disk does not hold (each counted once).
    pub mismatches: u64,
    /// The first of their slots.
    pub first_mismatches: Vec<u64>,
    /// Reads and writes that failed.
    pub io_errors: u64,
    /// The longest time that an append took, since the last [`Command::ResetPeaks`].
    pub longest_append_us: u64,
}

/// What was seen of the clocks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockReport {
    /// How often the monotonic clock went back.
    pub monotonic_back: u64,
    /// How often the wall clock moved against the monotonic clock by more than 2 ms.
    pub realtime_steps: u64,
    /// The largest such step, either way.
    pub largest_step_us: u64,
    /// The longest time between two looks at the clock, 1 ms apart, since the last [`Command::ResetPeaks`].
    pub largest_gap_us: u64,
    /// The wall clock now, since 1970.
    pub realtime_ms: u64,
}

/// What was seen of the network.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetReport {
    /// Datagrams echoed.
    pub echoed: u64,
    /// Bytes of numbered streams received.
    pub stream_bytes: u64,
    /// Streams whose numbers did not continue.
    pub stream_mismatches: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_read_as_documented() {
        let parse = |line| serde_json::from_str::<Command>(line);
        assert_eq!(parse(r#"{"cmd":"status"}"#).unwrap(), Command::Status);
        assert_eq!(
            parse(r#"{"cmd":"dirty","mb_per_s":100}"#).unwrap(),
            Command::Dirty { mb_per_s: 100 }
        );
        assert_eq!(
            parse(r#"{"cmd":"corrupt","what":"page"}"#).unwrap(),
            Command::Corrupt { what: Damage::Page }
        );
        assert!(parse(r#"{"cmd":"dirty","mb_per_s":-1}"#).is_err());
        assert!(parse(r#"{"cmd":"dirty","mb_per_s":1,"more":2}"#).is_err());
        assert!(parse(r#"{"cmd":"dance"}"#).is_err());
    }

    #[test]
    fn a_refusal_and_a_report_are_told_apart() {
        let refused = Reply::Refused { error: "no".to_owned() };
        let report = Reply::Report(Box::default());
        for reply in [refused, report] {
            let line = serde_json::to_string(&reply).unwrap();
            assert_eq!(serde_json::from_str::<Reply>(&line).unwrap(), reply);
        }
    }
}
