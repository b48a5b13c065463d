//! The checker: the handoff's two machines, unchanged, in a small world of two hosts, explored in
//! every order of events within bounds.
//!
//! The world ([`world`]) has two hosts, each with a ledger (survives everything), a QEMU (survives
//! its agent) and an agent (volatile), a network that may lose, repeat and reorder every message
//! for ever, and a controller that may give any order at any time, also late and twice, and need
//! never give one again. The driver ([`driver`]) carries out actions as the handoff's header says.
//! Events ([`events`]) are what can happen next; a crash can come between any two actions. Faults
//! (crashes, deaths of a QEMU, failed writes that may have landed or not, a `cont` that fails, a
//! post-copy whose stream is cut or given up) are bounded by a budget; cancels, leases that end and
//! copies that fail come free. Hosts lose their power, for a time or for good, and an operator takes their VMs back, where
//! one is there ([`Operator`]). Disks are shared, or copied with the guest ([`disks`]). A guest is sent whole, or its state first and the rest of its memory
//! at any time later, as long as both QEMUs live ([`Copies`]).
//!
//! Invariants ([`invariants`]) hold in every state. Liveness is checked as: *from every reachable
//! state in which nothing is half done, when faults stop and without any further order of the
//! controller, a fair run ends well* (one owner, its guest as its user wants it, nothing left
//! over, the next migration free to begin). This finds every state without a good end, not every
//! unfair loop.
//!
//! Planted bugs ([`bugs`]) each remove one rule of the code or of its driver, from outside: the
//! shipped code has no switches.

pub(crate) mod bugs;
mod disks;
mod driver;
mod events;
mod invariants;
mod world;

pub(crate) use bugs::ALL_BUGS;
#[allow(unused_imports)] // the test and the example each use what they need
pub(crate) use events::{Copies, Handoff, Operator};
