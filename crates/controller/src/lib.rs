//! The controller: one per pool. It keeps the inventory, serves the public API and leads migrations.
//!
//! ```text
//!            ┌────────────────────────── http (public API, /v1) ──────────────────────────┐
//!  operators │ vms  networks  storages  join │ migrate (the page that reads as the flow)  │
//!            └───────┬───────────────────────┴──────────┬──────────────────────────────────┘
//!                 store (SQLite)   events (SSE)      hosts ──── contact loop + reconcile ────▶ agents
//! ```
//!
//! It is never needed for safety: who may run a VM is settled by the two agents of a migration, and every host goes on without
//! its controller. What is written here first is what this process alone decides (placement, jobs, networks, storages); what a
//! host does is asked for and believed only from the host that owns the VM. Guest memory and disks never pass through here, and
//! nothing of QEMU is known here.
//!
//! The binary calls [`pool_init`] and [`run`].

mod config;
mod contact;
mod controller;
mod definition;
mod events;
mod hosts;
pub mod http;
mod init;
mod join;
mod lineage;
mod metrics;
pub mod migrate;
mod monitor;
mod networks;
mod placement;
mod plan;
mod policies;
mod reconcile;
mod renewal;
mod serve;
mod storages;
pub mod store;
mod vms;

#[cfg(any(test, feature = "fake"))]
pub mod fake_agent;
#[cfg(test)]
mod tests;

pub use config::{Config, ConfigError};
pub use controller::{Controller, MovedPlacement, OpenError};
pub use events::Events;
pub use hosts::{Hosts, Member};
pub use init::{InitError, PoolInit, PoolMade, RenewError, Renewed, pool_init, renew_operator};
pub use monitor::{MonitorError, MonitorMade, make_monitor};
pub use renewal::OwnError;
pub use serve::{RunError, run};
