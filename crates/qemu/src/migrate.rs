//! The QMP conversation of one migration, and nothing else: no hosts, no ownership, no ledger.
//!
//! ```text
//!   incoming (destination, first)            outgoing (source)
//!   ─────────────────────────────            ─────────────────
//!   prepare  → listens, guest stopped
//!                                            start
//!                                            wait_pre_switchover   guest stopped here
//!                                            continue_to_completed
//!   wait_loaded → state whole, still stopped
//!   (the agents hand over; `cont` is theirs)
//! ```
//!
//! In post-copy (`outgoing/postcopy.rs`) memory follows after the handover, and [`state_file`] puts
//! a file in the place of the destination.
//!
//! Neither side ever lets a guest run. What QEMU does by itself when the last stage fails stands
//! at [`outgoing::Outgoing::continue_to_completed`].

pub mod incoming;
pub mod outgoing;
mod settings;
pub mod state_file;
mod statistics;
pub(crate) mod tls;

pub use self::settings::{
    Compression, DEFAULT_MAX_DOWNTIME_MS, DEFAULT_XBZRLE_CACHE_BYTES, LiveChange,
    MAX_DOWNTIME_MS_MAX, Postcopy, Stream, Throttle, ZLIB_LEVEL_MAX, ZSTD_LEVEL_MAX,
};
pub use self::statistics::{
    CompressionStatistics, MigrationStatus, RamStatistics, Statistics, XbzrleStatistics,
};
