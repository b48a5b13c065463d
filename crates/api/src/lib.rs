//! The contract of Whimbrel: what goes over the wire, and the client that speaks it.
//!
//! Two interfaces, both HTTP/1.1 + JSON over mutual TLS, both under `/v1`:
//!
//! - the **public API** of a pool ([`vm`], [`lineage`], [`pool`], [`migration`], [`disks`], [`plan`], [`policy`]): served by the controller, used by the command line
//!   and by nothing privileged beside it. Its OpenAPI document is checked in under `openapi/`;
//! - the **agent API** ([`agent`]): served by each host's agent, used by the controller and by other agents.
//!
//! Here are types, error codes and the [`client`]; no decision is taken here. Every request type denies unknown
//! fields, so that a typing error is told and not ignored; answers tolerate them, so that a newer server can add some.
//! Sizes are bytes and carry `_bytes` in their name, times carry their unit likewise.

pub mod agent;
pub mod client;
pub mod disks;
pub mod error;
pub mod event;
pub mod lineage;
pub mod measure;
#[cfg(feature = "server")]
pub mod metrics;
pub mod migration;
pub mod plan;
pub mod policy;
pub mod pool;
#[cfg(feature = "server")]
pub mod server;
pub mod vm;

pub use error::{ApiError, ErrorCode};
pub use whimbrel_migration::downtime::Downtime;
pub use whimbrel_migration::names::{Epoch, MigrationId, Name, VmId};
pub use whimbrel_migration::phase::Phase;
pub use whimbrel_migration::preflight::Verdict;

/// The largest request or answer body that any Whimbrel process reads, in bytes.
pub const BODY_LIMIT_BYTES: usize = 1 << 20;
