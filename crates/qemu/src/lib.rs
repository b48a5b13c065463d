//! All that Whimbrel knows of QEMU, and nothing of hosts, pools or HTTP.
//!
//! ```text
//!   engine        what one QEMU program can do (probed, never guessed from its version)
//!   command_line  a VM's shape → the arguments of QEMU
//!   process       the QEMU process: started, found again, ended
//!   qmp           one session with its monitor: ids, bounds, descriptors
//!   schema        which features that QEMU has
//!   event         what QEMU reports by itself
//!   machine       typed commands to one running QEMU
//!   migrate       the conversation of one migration, either side
//!   disks         copied, moved, layered: what becomes of disks while QEMU runs
//!   fake          an imitation of QEMU for tests (feature `fake`)
//! ```
//!
//! The agent is the only caller. This crate decides nothing about who may run a guest: it does
//! what it is told and reports what it sees. QEMU facts stand where they are used, with the
//! versions on which they were seen; the tests in `tests/real_qemu.rs` run them again.

pub mod command_line;
pub mod disks;
pub mod engine;
pub mod event;
#[cfg(feature = "fake")]
pub mod fake;
pub mod machine;
pub mod migrate;
pub mod process;
pub mod qmp;
pub mod schema;
