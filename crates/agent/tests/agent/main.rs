//! An agent with a fake QEMU (and once with the real one), in a network namespace and a folder of its own. Needs root.

#![allow(clippy::unwrap_used)] // tests: the lint knows only functions marked as such

mod certificates;
mod guests;
mod http;
mod leftovers;
mod lineage;
mod loans;
mod measures;
mod migrations;
mod networks;
mod pair;
mod place;
mod postcopy;
mod real;
mod reclaim;
mod recovery;
mod restarts;
mod saved;
mod sources;
mod steering;
mod stopped;
mod vms;
