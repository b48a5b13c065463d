//! The imitation of QEMU, built where this crate's tests find it: beside them, under `examples/`.

use std::process::ExitCode;

fn main() -> ExitCode {
    whimbrel_qemu::fake::main()
}
