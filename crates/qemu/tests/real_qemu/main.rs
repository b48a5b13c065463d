//! What this crate says of QEMU, tried on each installed version and on pairs of them; and, with
//! the feature `fake`, on the imitation of each, which has to pass the same tests.
//!
//! Engines that are not installed are passed over, unless `WHIMBREL_REQUIRE_ENGINES` is set.

#![allow(clippy::unwrap_used, reason = "a test that can not go on has failed")]

mod certificates;
mod contract;
mod disks;
mod life;
mod migrations;
mod postcopy;
mod rig;
mod tls;
mod ways;
