//! An imitation of QEMU for tests.
