//! The ledger's tables and how an older file is brought to this version.

use std::fs::{File, Permissions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use super::LedgerError;

/// The version of the tables; rises with every change of them.
const SCHEMA_VERSION: i64 = 1;

/// How long a statement waits for a lock, in milliseconds. Nobody else has the file open; a backup tool may.
const LOCK_WAIT_MILLISECONDS: u64 = 5_000;

const TABLES: &str = "
CREATE TABLE vm (
    id TEXT PRIMARY KEY,
    definition TEXT NOT NULL,
    generation INTEGER NOT NULL,
    run TEXT,
    crashed TEXT
) STRICT;
CREATE TABLE ownership (
    vm TEXT NOT NULL,
    migration TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    record TEXT NOT NULL,
    PRIMARY KEY (vm, migration)
) STRICT;
CREATE TABLE run (name TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT;
CREATE TABLE journal (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    owner TEXT NOT NULL,
    resource TEXT NOT NULL,
    UNIQUE (owner, resource)
) STRICT;
CREATE TABLE named (
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    definition TEXT NOT NULL,
    PRIMARY KEY (kind, name)
) STRICT;
CREATE TABLE migration (
    id TEXT NOT NULL,
    side TEXT NOT NULL,
    vm TEXT NOT NULL,
    request TEXT NOT NULL,
    state TEXT NOT NULL,
    PRIMARY KEY (id, side)
) STRICT;
CREATE TABLE opened (id INTEGER PRIMARY KEY CHECK (id = 1), times INTEGER NOT NULL) STRICT;
INSERT INTO opened VALUES (1, 0);
";

/// Mode of the file: tickets of migrations are in it, and QEMU's user passes through its folder. SQLite gives its other
/// files the same.
const FILE_MODE: u32 = 0o600;

/// Opens or makes the file.
pub(super) fn open(path: &Path) -> Result<Connection, LedgerError> {
    let failed = |source| LedgerError::Open { path: path.to_owned(), source };
    File::options()
        .create(true)
        .append(true)
        .mode(FILE_MODE)
        .open(path)
        .and_then(|file| file.set_permissions(Permissions::from_mode(FILE_MODE)))
        .map_err(|source| LedgerError::File { path: path.to_owned(), source })?;
    let mut connection = Connection::open(path).map_err(failed)?;
    connection
        .busy_timeout(std::time::Duration::from_millis(LOCK_WAIT_MILLISECONDS))
        .map_err(failed)?;
    // FULL: every commit is fsynced, also in WAL mode (NORMAL would sync at checkpoints only).
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;",
        )
        .map_err(failed)?;
    let found: i64 =
        connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed)?;
    if found > SCHEMA_VERSION {
        return Err(LedgerError::Newer { path: path.to_owned(), found, known: SCHEMA_VERSION });
    }
    prepare(&mut connection, found).map_err(failed)?;
    Ok(connection)
}

/// Makes the tables where there are none. Counting the opening is a committed write: it makes durable whatever a crashed
/// agent had written and not synced, before this one reads it and acts.
fn prepare(connection: &mut Connection, found: i64) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    if found == 0 {
        transaction.execute_batch(TABLES)?;
        transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    }
    transaction.execute("UPDATE opened SET times = times + 1", [])?;
    transaction.commit()
}
