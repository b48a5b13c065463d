//! The controller as its clients see it: through the real door, with fake hosts behind it.

mod api;
mod hosts;
mod joining;
mod lineage;
mod metrics;
mod migrations;
mod phases;
mod plans;
mod policies;
mod process;
mod reclaim;
mod renewal;
mod rig;
mod steering;
mod vms;
