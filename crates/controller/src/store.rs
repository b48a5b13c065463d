//! What the controller knows durably: hosts, join tokens, networks, storages, policies, VMs and migrations, in one SQLite file.
//!
//! ```text
//! many tasks ──jobs (bounded)──▶ one thread, one connection ──▶ pool.db (WAL, synchronous=FULL)
//! ```
//!
//! Every function is one transaction with no await inside: it either happened, fsync included, or it did not. The boundary
//! is these functions and nothing of SQL shows outside, so that another database can stand behind them once a pool needs more
//! than one controller. What agents said last (contact, running states) is not here but in [`crate::hosts`]: it is asked again
//! after a restart, never remembered. Called by every other module of this crate.

mod hosts;
mod migrations;
mod policies;
mod pool;
mod schema;
mod vms;

use std::path::Path;

use rusqlite::{Connection, Transaction, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};
use whimbrel_api::ApiError;

pub use hosts::{HostRow, JoinOutcome};
pub use migrations::{BeginError, Begun, is_active};
pub use policies::{Attached, POLICIES_MAX, PolicyDeleted, Subject};
pub use vms::{Deleted, Inserted, PlacementMove, VmRow};

/// Most jobs that wait for the writer thread; who comes then waits for a place.
const QUEUE_JOBS_MAX: usize = 256;
/// How long SQLite waits for a lock held by another process (a backup), in milliseconds.
const BUSY_TIMEOUT_MS: u64 = 5_000;

/// Why the store could not do something. None of these says anything about a VM: the record is as it was.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database file could not be opened or set up.
    #[error("cannot open the database {path}")]
    Open {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: Fault,
    },
    /// A newer Whimbrel wrote this database.
    #[error("the database has schema {found}, this version of Whimbrel knows {known}")]
    Newer {
        /// In the file.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// A transaction failed and was rolled back.
    #[error("the database cannot {doing}")]
    Failed {
        /// What was to be done.
        doing: &'static str,
        /// Why.
        #[source]
        source: Fault,
    },
    /// The writer thread could not be started.
    #[error("cannot start the database's thread")]
    Thread(#[source] std::io::Error),
    /// The writer thread has ended: the process is shutting down.
    #[error("the database is closed")]
    Closed,
}

/// What went wrong inside a transaction.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// SQLite's word.
    #[error(transparent)]
    Sql(#[from] rusqlite::Error),
    /// A record is not of the form in which we write it.
    #[error("a record in it is damaged")]
    Record(#[from] serde_json::Error),
    /// A name or id in it is not of the form in which we write it.
    #[error("a record in it is damaged: {0}")]
    Text(String),
    /// The row to change is not there.
    #[error("there is no such row")]
    NoRow,
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        ApiError::internal("the controller's records cannot be used", &error)
    }
}

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// The handle to the database; cheap to clone, alive until the last one is dropped.
#[derive(Debug, Clone)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
}

impl Store {
    /// Opens the database at `path`, makes it if it is not there, and starts its thread.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let opened = Connection::open(path).map_err(Fault::from);
        let connection = opened
            .map_err(|source| StoreError::Open { path: path.display().to_string(), source })?;
        Self::start(connection, &path.display().to_string())
    }

    /// A database that lives as long as its handle, for tests.
    #[cfg(test)]
    pub(crate) fn in_memory() -> Self {
        let connection = Connection::open_in_memory().expect("SQLite opens in memory");
        Self::start(connection, ":memory:").expect("an empty database can be set up")
    }

    fn start(mut connection: Connection, path: &str) -> Result<Self, StoreError> {
        let opened = |source| StoreError::Open { path: path.to_owned(), source };
        connection
            .busy_timeout(std::time::Duration::from_millis(BUSY_TIMEOUT_MS))
            .map_err(|error| opened(error.into()))?;
        schema::prepare(&mut connection, opened)?;
        let (jobs, mut queue) = mpsc::channel::<Job>(QUEUE_JOBS_MAX);
        std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || {
                while let Some(job) = queue.blocking_recv() {
                    job(&mut connection);
                }
            })
            .map_err(StoreError::Thread)?;
        Ok(Self { jobs })
    }

    /// Runs `work` as one transaction on the writer thread. A caller that stops waiting does not stop the work.
    async fn transact<T, F>(&self, doing: &'static str, work: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Transaction<'_>) -> Result<T, Fault> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let result = in_transaction(connection, work);
            // Nobody may be waiting any more; the work is done all the same.
            let _ = answer.send(result);
        });
        self.jobs.send(job).await.map_err(|_| StoreError::Closed)?;
        let result = answered.await.map_err(|_| StoreError::Closed)?;
        result.map_err(|source| StoreError::Failed { doing, source })
    }
}

fn in_transaction<T>(
    connection: &mut Connection,
    work: impl FnOnce(&Transaction<'_>) -> Result<T, Fault>,
) -> Result<T, Fault> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let result = work(&transaction)?;
    transaction.commit()?;
    Ok(result)
}

/// Reads a name, an id or the like out of a column.
fn parsed<T: std::str::FromStr>(text: &str) -> Result<T, Fault>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error: T::Err| Fault::Text(error.to_string()))
}

/// SQLite's integers are signed; our counters start at one and never come near the end.
fn to_column(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn from_column(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

#[cfg(test)]
mod tests;
