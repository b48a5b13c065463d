//! Whole migrations, as an operator sees them: labs of several hosts, real QEMUs, a guest that watches itself, faults.
//! Needs root, and what `scripts/setup` and `scripts/guest` make.
//!
//! Each test is one story in one lab, in a module by its subject; [`stage`] is the lab with what all stories look at: where
//! the guest runs, that it runs nowhere else, that it holds what it held, and that nothing is left over. The layers below
//! (rules, rooms with imitations) are where every case is tried; here are those that only whole processes can show.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod cancel;
mod deaths;
mod guests;
mod handoff;
mod network;
mod refusals;
mod stage;
mod versions;
