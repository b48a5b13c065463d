//! The rules of a migration, and nothing else: no I/O, no clock, no async, no logging.
//!
//! - [`names`]: what things are called.
//! - [`phase`]: where a migration is and how it can end.
//! - [`downtime`]: how long the guest stood still, by named parts.
//! - [`handoff`]: who may run the guest. The two agents of a migration run this code, and the
//!   checker explores the same code exhaustively.
//! - [`options`]: how a user asks for a move.
//! - [`preflight`]: whether a VM can move to a host, and what stands in the way.
//! - [`disks`]: where its disks go, and what copying them takes.
//! - [`forecast`]: what a move will take, from measurements.
//! - [`strategy`]: the way that it takes, chosen from forecasts.
//! - [`policy`]: what it may cost.
//!
//! Everything here is a function of its inputs, so that a test needs neither socket nor clock.
//! The crate knows no sibling; the API, the controller and the agents use it.

pub mod disks;
pub mod downtime;
pub mod forecast;
pub mod handoff;
pub mod names;
pub mod options;
pub mod phase;
pub mod policy;
pub mod preflight;
pub mod strategy;
