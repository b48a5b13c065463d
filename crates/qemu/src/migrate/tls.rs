//! QEMU's TLS objects for one migration.
