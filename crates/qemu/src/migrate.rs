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
//! Neither side ever lets a guest run. What QEMU does by itself when the last stage fails stands
//! at [`outgoing::Outgoing::continue_to_completed`].

pub mod incoming;
pub mod outgoing;
mod settings;
mod statistics;
mod tls;

pub use self::statistics::{MigrationStatus, RamStatistics, Statistics};
