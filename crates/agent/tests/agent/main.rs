//! An agent with a fake QEMU (and once with the real one), in a network namespace and a folder of its own. Needs root.

mod http;
mod loans;
mod place;
mod real;
mod restarts;
mod vms;
