//! Who is who in a pool: the pool's certificate authority, the certificates that carry a role, join
//! tokens, signed grants, and the mutual-TLS door that agent and controller share.
//!
//! ```text
//! authority ──issues──▶ certificate ──parsed by──▶ identity::Peer
//!     │                     │                           ▲
//!     │ token (join)        ├─ files (a host's folder)  │
//!     │                     └─ tls ──▶ door (serve) / dial (connect)
//!     └ grant (an order to move one VM, signed by the controller)
//! ```
//!
//! One rule holds everywhere: a role is the suffix of the certificate's only name, and only the
//! authority writes names. What a peer *may do* is not decided here; callers match on
//! [`identity::Peer`]. This crate knows no other room of the workspace.

pub mod authority;
pub mod certificate;
pub mod dial;
pub mod door;
pub mod files;
pub mod grant;
pub mod identity;
pub mod key;
pub mod qemu_credentials;
pub mod socket;
pub mod tls;
pub mod token;
pub mod trouble;
