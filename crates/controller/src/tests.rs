//! The controller as its clients see it: through the real door, with fake hosts behind it.

mod api;
mod hosts;
mod joining;
mod migrations;
mod process;
mod renewal;
mod rig;
mod vms;
