//! How a guest's memory travels, and how that is told to QEMU: every capability and every
//! parameter of each try is set, so that nothing of an earlier one is left.
//!
//! What was tried on 7.2.22 and 10.0.2, and decided by it:
//!
//! - zlib and zstd are methods of multifd. The older `compress` capability of 7.2 (one stream,
//!   pages compressed by threads) is not used: it was given up by QEMU as unreliable and is gone
//!   in 10.0, and multifd does the same on both.
//! - Post-copy over multifd is taken by 7.2, which misbehaves with it then; 10.0 refuses it, as QEMU's source has it since
//!   8.0, and 10.1 can do it (by its source; not tried). So it is refused here for a QEMU as old as 7.2, by what that lacks
//!   (the transport for files, 8.2), and else it is QEMU that says no, before anything is done. The description of QMP does
//!   not tell those apart: who wants to know beforehand goes by the version, as preflight does.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::event::{Event, EventError, Events};
use crate::machine::Machine;
use crate::qmp::QmpError;
use crate::schema::Features;

/// The highest level of zlib.
pub const ZLIB_LEVEL_MAX: u8 = 9;

/// The highest level of zstd.
pub const ZSTD_LEVEL_MAX: u8 = 20;

/// QEMU's own cache for XBZRLE, in bytes; QEMU rounds it down to a power of 2.
pub const DEFAULT_XBZRLE_CACHE_BYTES: u64 = 64 << 20;

/// QEMU's own default for the downtime, in milliseconds.
pub const DEFAULT_MAX_DOWNTIME_MS: u64 = 300;

/// The longest downtime that QEMU takes, in milliseconds. With it a guest is stopped at the next
/// look, whatever is left to send: this is what completes a migration by force.
pub const MAX_DOWNTIME_MS_MAX: u64 = 2_000_000;

/// What stands for no limit, in bytes per second (1 TiB/s). QEMU's own default is 128 MiB/s, and
/// 0 is not documented to mean no limit before post-copy.
pub(super) const UNLIMITED_BYTES_PER_SECOND: u64 = 1 << 40;

/// QEMU's own default of `max-bandwidth`.
const DEFAULT_BANDWIDTH_BYTES_PER_SECOND: u64 = 128 << 20;

/// Every capability that is ever switched on here; what a try does not want is switched off.
const CAPABILITIES: &[&str] = &[
    "auto-converge",
    "events",
    "late-block-activate",
    "mapped-ram",
    "multifd",
    "pause-before-switchover",
    "postcopy-blocktime",
    "postcopy-preempt",
    "postcopy-ram",
    "return-path",
    "validate-uuid",
    "xbzrle",
    "zero-copy-send",
];

/// How the memory travels: what both ends of a migration must be told alike. The default is one
/// stream, as it is, before the switchover only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stream {
    /// Connections of a multifd migration, 1 to 255; `None` for a single stream.
    pub multifd_channels: Option<u8>,
    /// Compression on the way.
    pub compression: Option<Compression>,
    /// Whether the switchover may come before all memory has been sent.
    pub postcopy: Option<Postcopy>,
}

/// How memory is compressed on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// By zlib; needs multifd.
    Zlib {
        /// 0 (none) to [`ZLIB_LEVEL_MAX`]; QEMU's default is 1.
        level: u8,
    },
    /// By zstd; needs multifd.
    Zstd {
        /// 0 to [`ZSTD_LEVEL_MAX`]; QEMU's default is 1.
        level: u8,
    },
    /// Pages that are sent again are sent as differences (XBZRLE); needs a single stream.
    Xbzrle {
        /// What the source keeps of sent pages; a power of 2, at least one page, at most the
        /// guest's memory.
        cache_bytes: u64,
    },
}

/// The guest may be moved before its memory, which is sent after it on demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Postcopy {
    /// Pages that the guest waits for have a connection of their own, where both ends can.
    pub preempt: bool,
}

/// How far a guest that writes too fast is held back (auto-converge).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Throttle {
    /// The first step, percent of the vCPUs' time, 1 to 99.
    pub initial_percent: u8,
    /// Every further step.
    pub increment_percent: u8,
    /// The last step.
    pub max_percent: u8,
}

impl Throttle {
    /// Its parameters.
    pub(super) fn parameters(self, parameters: &mut Map<String, Value>) {
        let steps = [
            ("cpu-throttle-initial", self.initial_percent),
            ("cpu-throttle-increment", self.increment_percent),
            ("max-cpu-throttle", self.max_percent),
        ];
        for (name, percent) in steps {
            parameters.insert(name.to_owned(), json!(percent));
        }
    }
}

impl Default for Throttle {
    /// QEMU's own (7.2, 10.0).
    fn default() -> Self {
        Self { initial_percent: 20, increment_percent: 10, max_percent: 99 }
    }
}

/// What a live migration can be told anew; `None` leaves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LiveChange {
    /// How long the guest may be stopped, in milliseconds, at most [`MAX_DOWNTIME_MS_MAX`].
    pub max_downtime_ms: Option<u64>,
    /// The most that may be sent, in bytes per second; 0 is no limit.
    pub max_bandwidth_bytes_per_second: Option<u64>,
    /// The same in post-copy, for what is not asked for; 0 is no limit.
    pub max_postcopy_bandwidth_bytes_per_second: Option<u64>,
    /// How far the guest is held back from the next step on. Without effect where the migration was begun without any:
    /// QEMU takes the capability only before the start (7.2, 10.0).
    pub throttle: Option<Throttle>,
}

impl Stream {
    /// The first thing asked for that a QEMU does not have, or that can not be had together.
    #[must_use]
    pub fn unsupported(&self, features: &Features) -> Option<&'static str> {
        let multifd = self.multifd_channels.is_some();
        let compresses = |method: &str| features.multifd_compressions.contains(method);
        let compression = match self.compression {
            None => None,
            Some(Compression::Zlib { .. } | Compression::Zstd { .. }) if !multifd => {
                Some("compression by zlib or zstd without multifd")
            }
            Some(Compression::Zlib { .. }) => {
                (!compresses("zlib")).then_some("compression by zlib")
            }
            Some(Compression::Zstd { .. }) => {
                (!compresses("zstd")).then_some("compression by zstd")
            }
            Some(Compression::Xbzrle { .. }) if multifd => Some("XBZRLE over multifd"),
            Some(Compression::Xbzrle { .. }) => (!features.xbzrle).then_some("XBZRLE"),
        };
        let postcopy = match self.postcopy {
            None => None,
            Some(_) if multifd && !features.file_transport => Some("post-copy over multifd"),
            Some(_) if !features.postcopy => Some("post-copy"),
            Some(Postcopy { preempt }) => {
                (preempt && !features.postcopy_preempt).then_some("post-copy preemption")
            }
        };
        let multifd = (multifd && !features.multifd).then_some("multifd");
        multifd.or(compression).or(postcopy)
    }

    /// The capabilities that this needs, on either end.
    pub(super) fn capabilities(&self) -> Vec<&'static str> {
        let mut on = Vec::new();
        if self.multifd_channels.is_some() {
            on.push("multifd");
        }
        if let Some(Compression::Xbzrle { .. }) = self.compression {
            on.push("xbzrle");
        }
        if let Some(Postcopy { preempt }) = self.postcopy {
            on.push("postcopy-ram");
            on.extend(preempt.then_some("postcopy-preempt"));
        }
        on
    }

    /// The parameters of this.
    pub(super) fn parameters(&self, parameters: &mut Map<String, Value>) {
        let mut set = |name: &str, value: Value| parameters.insert(name.to_owned(), value);
        if let Some(channels) = self.multifd_channels {
            set("multifd-channels", json!(channels));
        }
        match self.compression {
            None => {}
            Some(Compression::Zlib { level }) => {
                set("multifd-compression", json!("zlib"));
                set("multifd-zlib-level", json!(level));
            }
            Some(Compression::Zstd { level }) => {
                set("multifd-compression", json!("zstd"));
                set("multifd-zstd-level", json!(level));
            }
            Some(Compression::Xbzrle { cache_bytes }) => {
                set("xbzrle-cache-size", json!(cache_bytes));
            }
        }
    }
}

/// How often a guest that was loaded announces itself by QEMU's own doing, with the first `cont`; whoever sends `cont` has it
/// done several times more ([`Machine::announce_self`]).
///
/// **Never 0.** Of a virtio network card whose driver can announce, loading frees the timer then (7.2.22 and 10.0.2), and
/// QEMU dies by it (SIGSEGV in `timer_del`) when the guest is reset for the first time, be it days later.
pub(super) const ANNOUNCE_ROUNDS_WHEN_LOADED: u64 = 1;

/// Every parameter that is ever set here, as QEMU has it by itself (7.2, 10.0).
pub(super) fn default_parameters(features: &Features) -> Map<String, Value> {
    let mut parameters = Map::new();
    Throttle::default().parameters(&mut parameters);
    let mut set = |name: &str, value: Value| parameters.insert(name.to_owned(), value);
    set("announce-rounds", json!(5));
    set("downtime-limit", json!(DEFAULT_MAX_DOWNTIME_MS));
    set("max-bandwidth", json!(DEFAULT_BANDWIDTH_BYTES_PER_SECOND));
    set("max-postcopy-bandwidth", json!(0));
    set("multifd-channels", json!(2));
    set("multifd-compression", json!("none"));
    set("multifd-zlib-level", json!(1));
    set("multifd-zstd-level", json!(1));
    set("xbzrle-cache-size", json!(DEFAULT_XBZRLE_CACHE_BYTES));
    // QEMU's word for none.
    for name in ["tls-creds", "tls-hostname", "tls-authz"] {
        set(name, json!(""));
    }
    if features.avail_switchover_bandwidth {
        set("avail-switchover-bandwidth", json!(0));
    }
    parameters
}

/// QEMU's number for a limit of which 0 says that there is none.
pub(super) fn bandwidth(limit_bytes_per_second: u64) -> Value {
    match limit_bytes_per_second {
        0 => json!(UNLIMITED_BYTES_PER_SECOND),
        limit => json!(limit),
    }
}

/// Switches on these capabilities and no others, all in one command.
pub(super) async fn set_capabilities(machine: &Machine, on: &[&str]) -> Result<(), QmpError> {
    let known = &machine.features().migration_capabilities;
    let list: Vec<Value> = CAPABILITIES
        .iter()
        .map(|name| (name, on.contains(name)))
        // Switching off what this QEMU does not have is done already.
        .filter(|(name, on)| *on || known.contains(**name))
        .map(|(name, on)| json!({ "capability": name, "state": on }))
        .collect();
    machine.order("migrate-set-capabilities", json!({ "capabilities": list })).await
}

/// Sets migration parameters.
pub(super) async fn set_parameters(
    machine: &Machine,
    parameters: Map<String, Value>,
) -> Result<(), QmpError> {
    machine.order("migrate-set-parameters", Value::Object(parameters)).await
}

/// Waits until something may have changed: an event, or `at_most` for what no event tells.
///
/// A reader that lagged, or a session that ended, is a reason to ask again too.
pub(super) async fn next_change(events: &mut Events, at_most: Duration) -> Option<Event> {
    match tokio::time::timeout(at_most, events.next()).await {
        Ok(Ok(event)) => Some(event),
        Ok(Err(EventError::Lagged { .. })) | Err(_) => None,
        Ok(Err(EventError::Closed)) => {
            // The next question will tell why; without this pause a caller that ignores the
            // answer would spin.
            tokio::time::sleep(at_most).await;
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn able() -> Features {
        Features {
            multifd: true,
            multifd_compressions: ["none", "zlib"].map(str::to_owned).into(),
            xbzrle: true,
            postcopy: true,
            ..Features::default()
        }
    }

    #[test]
    fn what_a_qemu_lacks_or_cannot_combine_is_named() {
        let plain = Stream::default();
        assert_eq!(plain.unsupported(&Features::default()), None);
        let multifd = Stream { multifd_channels: Some(2), ..plain };
        assert_eq!(multifd.unsupported(&Features::default()), Some("multifd"));
        assert_eq!(multifd.unsupported(&able()), None);
        let zlib = Some(Compression::Zlib { level: 1 });
        assert_eq!(Stream { compression: zlib, ..multifd }.unsupported(&able()), None);
        assert!(Stream { compression: zlib, ..plain }.unsupported(&able()).is_some());
        let zstd = Some(Compression::Zstd { level: 1 });
        assert!(Stream { compression: zstd, ..multifd }.unsupported(&able()).is_some());
        let xbzrle = Some(Compression::Xbzrle { cache_bytes: 1 << 20 });
        assert_eq!(Stream { compression: xbzrle, ..plain }.unsupported(&able()), None);
        assert!(Stream { compression: xbzrle, ..multifd }.unsupported(&able()).is_some());
        let postcopy = Stream { postcopy: Some(Postcopy::default()), ..plain };
        assert_eq!(postcopy.unsupported(&able()), None);
        let both = Stream { multifd_channels: Some(2), ..postcopy };
        assert!(both.unsupported(&able()).is_some(), "it would take it, and misbehave");
        let newer = Features { file_transport: true, ..able() };
        assert_eq!(both.unsupported(&newer), None, "it says itself whether it can");
        let preempt = Stream { postcopy: Some(Postcopy { preempt: true }), ..plain };
        assert!(preempt.unsupported(&able()).is_some());
    }

    #[test]
    fn every_capability_that_a_stream_needs_can_be_switched_off_again() {
        let streams = [
            Stream { multifd_channels: Some(2), ..Stream::default() },
            Stream {
                compression: Some(Compression::Xbzrle { cache_bytes: 1 }),
                postcopy: Some(Postcopy { preempt: true }),
                ..Stream::default()
            },
        ];
        for stream in streams {
            assert!(stream.capabilities().iter().all(|name| CAPABILITIES.contains(name)));
            let mut parameters = Map::new();
            stream.parameters(&mut parameters);
            let known = default_parameters(&Features::default());
            assert!(parameters.keys().all(|name| known.contains_key(name)), "{parameters:?}");
        }
    }
}
