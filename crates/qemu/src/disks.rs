//! A VM's disks while QEMU runs: copied to another QEMU or another file, in layers, with
//! snapshots and bitmaps. Decides nothing: whose copy is the good one is not known here.
//!
//! ```text
//!   source                                     destination (its guest stopped)
//!   ──────                                     ──────────────────────────────
//!                                              server::start, server::export
//!   target::Remote::prepare, add
//!   mirror::start, wait_ready
//!   (the guest is stopped: pre-switchover)
//!   mirror::settle      every copy is equal
//!   target::remove                             server::stop, before `cont`
//! ```
//!
//! # What QEMU does not hold together by itself
//!
//! Seen on 7.2.22 and 10.0.2:
//!
//! - A migration completes although a mirror still runs, and the destination's `cont` is answered with
//!   success although its disk is still exported for writing. Nothing but the order above holds it.
//! - A cut connection is no end of a mirror here: it stands still (`on-target-error` is `stop`), the
//!   guest goes on, and what it writes is remembered. How it is taken up again without an old write
//!   overtaking a new one stands at [`target::Remote::reach`].
//! - A node whose server does not answer holds up **all of QEMU**, the guest with it, as soon as anything
//!   waits for its requests (`stop`, a migration's end, `blockdev-del`): for as long as
//!   `reconnect-delay` says after a cut (it is 0 here), without end when the network only swallows.
//!   `yank` is heard even then ([`target::yank`]), and takes the copy with it.
//!
//! Nodes are named after their disk: `vda` is its image, `vda-file` what is below it, `vda-copy` a mirror's
//! target elsewhere, `vda-2` what follows `vda` ([`nodes::fresh_name`]). Which one a drive uses now is
//! QEMU's to tell ([`nodes::drives`]).

pub mod bitmaps;
pub mod jobs;
pub mod layers;
pub mod mirror;
pub mod nodes;
pub mod server;
pub mod snapshots;
pub mod statistics;
pub mod target;
