//! The witness: the static program that is init in the test guest, and knows whether its machine was moved faithfully.
//!
//! It fills memory with pages whose content it can predict and dirties them at a chosen rate (`memory`), keeps an
//! fsynced journal on its disk (`disk`), watches its clocks (`clock`), echoes what a probe sends (`net`), and tells
//! all of it on a TCP port (`control`) and on the serial console (`console`). Every mismatch is counted and reported
//! to the outside; the guest itself draws no conclusions, and repairs only what would be counted twice.
//!
//! [`report`] is what it says and what it can be told, shared with the lab, which is the only one that talks to it.
//! Everything else is private to the guest: it cannot tell that it was migrated, and must not try to.

#![forbid(unsafe_code)]

mod boot;
mod clock;
mod config;
mod console;
mod control;
mod disk;
mod memory;
mod net;
mod netlink;
mod pattern;
mod power;
pub mod report;
mod witness;

use std::process;

/// Runs the witness as init of the machine; returns never, for the kernel panics when init ends.
///
/// Refuses to run as anything but process 1, since it powers off and crashes the machine that it is init of.
pub fn run() -> ! {
    if process::id() != 1 {
        console::say_to_stderr("whimbrel-witness is init of the test guest, and runs nowhere else");
        process::exit(1);
    }
    boot::boot()
}
