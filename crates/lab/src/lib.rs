//! The lab: several hosts on one machine, each a network namespace with its own agent and real QEMU guests, joined by
//! shaped links, with a probe and a controller. The demo, the tests, the benches and curious users run on it.
//!
//! # Interface
//! - [`LabConfig`] says what a lab is to be like; [`Lab::up`] makes it, [`Lab::open`] finds it again from any process, and
//!   [`Lab::down`] removes whatever of it exists. [`Cancel`] stops an `up` from a signal handler's thread. [`Status::of`]
//!   is `lab status`.
//! - [`Lab::whimbrel`] and [`Lab::operator_command`] speak to the pool; [`Lab::spawn`] is `lab exec`; [`Lab::run`] opens
//!   sockets in a host's network.
//! - [`Lab::witness`] talks to the guest's [`Witness`]; [`Lab::probe`] starts a [`Probe`] whose [`ProbeReport`] says what the
//!   network saw. [`vm_definition`] and [`guest_address`] describe such guests; `web01`'s is [`Lab::vm_file`].
//! - Faults: [`Lab::kill`], [`Lab::freeze`] and [`Lab::start_daemon`] for processes ([`Lab::daemon`], [`Lab::qemus`]),
//!   [`Lab::cut`], [`Lab::restore`] and [`Lab::set_link`] for the network.
//!
//! All of it blocks: in async code call it through `spawn_blocking`.
//!
//! # What holds
//! - Nothing outside the lab's folder is touched: no link, address, rule or name in the machine's own network, no mount
//!   elsewhere. Namespaces are bound inside the folder, and everything in them goes with them.
//! - A process is the lab's exactly if it is in one of the lab's namespaces; nothing else is ever signalled.
//! - The record is written before anything is made and removed after everything is gone, so a killed `up` or `down` can
//!   always be finished by the next one.
//!
//! # What it does not do
//! It has no opinion on migrations: it sets a pool up through the public command line, and everything above that is its
//! callers' story.

mod cancel;
mod command;
mod error;
mod image;
mod lab;
mod namespace;
mod network;
mod plan;
mod pool;
mod probe;
mod processes;
mod status;
mod witness;

pub use cancel::Cancel;
pub use error::LabError;
pub use image::{WITNESS_VARIABLE, find_witness, write_initramfs};
pub use lab::Lab;
pub use network::{Cut, Direction};
pub use plan::{
    AGENT_PORT, CACHE_VARIABLE, CLIENT, CLIENT_ADDRESS, CONTROLLER, CONTROLLER_ADDRESS,
    CONTROLLER_PORT, DIR_DEFAULT, HOSTS_DEFAULT, HOSTS_MAX, HostPlan, LabConfig, PREFIX, QEMU_USER,
    Rate, SYSTEM_ENGINE, cache_dir, guest_address,
};
pub use pool::{NETWORK, STORAGE, vm_definition};
pub use probe::{DATAGRAM_PERIOD, Gap, Probe, ProbeReport};
pub use processes::Process;
pub use status::{ControllerStatus, HostStatus, Status};
pub use whimbrel_guest::report;
pub use witness::Witness;
