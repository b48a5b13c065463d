//! The imitation of QEMU as a program, for tests: see `whimbrel_qemu::fake`.

use std::process::ExitCode;

fn main() -> ExitCode {
    whimbrel_qemu::fake::main()
}
