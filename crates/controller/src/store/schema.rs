//! The tables, and how a database comes to have them.
//!
//! `user_version` holds the schema's number. A change of the schema is a new entry in [`STEPS`] and nothing else: an older
//! database is brought forward step by step in one transaction each, a newer one is refused. Called by [`super::Store`] alone.

use rusqlite::{Connection, TransactionBehavior};

use super::{Fault, StoreError};

/// Entry `n` brings schema `n` to `n + 1`.
const STEPS: &[&str] = &[FIRST, POLICIES_AND_STATISTICS, DEFAULT_STORAGES];

const FIRST: &str = "
CREATE TABLE hosts (
    name TEXT PRIMARY KEY,
    address TEXT NOT NULL,
    enabled INTEGER NOT NULL,
    agent_key TEXT NOT NULL
) STRICT;
CREATE TABLE join_tokens (
    hash TEXT PRIMARY KEY,
    expires_s INTEGER NOT NULL,
    used_by TEXT,
    used_key TEXT
) STRICT;
CREATE TABLE networks (name TEXT PRIMARY KEY, definition TEXT NOT NULL) STRICT;
CREATE TABLE storages (name TEXT PRIMARY KEY, definition TEXT NOT NULL) STRICT;
CREATE TABLE storage_proofs (
    storage TEXT NOT NULL REFERENCES storages (name) ON DELETE CASCADE,
    host TEXT NOT NULL,
    PRIMARY KEY (storage, host)
) STRICT;
CREATE TABLE vms (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    host TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    confirmed INTEGER NOT NULL,
    spec TEXT NOT NULL,
    definition TEXT NOT NULL
) STRICT;
CREATE TABLE migrations (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    vm TEXT NOT NULL,
    active INTEGER NOT NULL,
    swept INTEGER NOT NULL,
    record TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX one_active_migration_per_vm ON migrations (vm) WHERE active;
";

const POLICIES_AND_STATISTICS: &str = "
CREATE TABLE policies (name TEXT PRIMARY KEY, definition TEXT NOT NULL) STRICT;
CREATE TABLE attached_policies (subject TEXT PRIMARY KEY, policy TEXT NOT NULL) STRICT;
CREATE TABLE migration_statistics (
    id TEXT PRIMARY KEY REFERENCES migrations (id),
    statistics TEXT NOT NULL
) STRICT;
";

/// The pool's own are those of the host without name.
const DEFAULT_STORAGES: &str = "
CREATE TABLE default_storages (
    host TEXT NOT NULL,
    place INTEGER NOT NULL,
    storage TEXT NOT NULL REFERENCES storages (name) ON DELETE CASCADE,
    PRIMARY KEY (host, place)
) STRICT;
";

pub(super) fn prepare(
    connection: &mut Connection,
    opened: impl Fn(Fault) -> StoreError,
) -> Result<(), StoreError> {
    let known = STEPS.len() as i64;
    let found = set_up(connection).map_err(&opened)?;
    if found > known {
        return Err(StoreError::Newer { found, known });
    }
    let first = usize::try_from(found).unwrap_or(0);
    for (number, step) in STEPS.iter().enumerate().skip(first) {
        bring_forward(connection, step, number as i64 + 1).map_err(&opened)?;
    }
    Ok(())
}

/// Sets the connection up and tells the schema that the file has. `FULL` fsyncs the log at every commit: without it, WAL mode
/// may lose the last commits at a power loss, and a record is always written before what it is about is done.
fn set_up(connection: &Connection) -> Result<i64, Fault> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(connection.pragma_query_value(None, "user_version", |row| row.get(0))?)
}

fn bring_forward(connection: &mut Connection, step: &str, to: i64) -> Result<(), Fault> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch(step)?;
    transaction.pragma_update(None, "user_version", to)?;
    Ok(transaction.commit()?)
}
