//! Migrations: one record each, its phases included.
//!
//! A record is *active* until the VM is certainly on one side ([`is_active`]); an index lets no VM have two active ones. The
//! flow that writes these records is [`crate::migrate`].

use rusqlite::{OptionalExtension, Transaction, params};
use whimbrel_api::migration::{Migration, MigrationState, MigrationStatistics};
use whimbrel_api::{ApiError, Epoch, ErrorCode, MigrationId, Name, VmId};

use super::{Fault, Store, StoreError};

/// Most migrations in a list: the newest ones. About 3 KiB each without their decisions, below the limit of an answer.
const LISTED_MAX: u32 = 200;

/// What became of a migration's record that was to begin.
#[derive(Debug, Clone, PartialEq)]
pub enum Begun {
    /// It is written.
    New,
    /// This request was made before; here is its record as it stands.
    Again(Box<Migration>),
}

/// Why a migration cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// Another migration of the VM has not ended.
    #[error("the VM is being migrated to {} (migration {})", .0.destination, .0.id)]
    AlreadyMigrating(Box<Migration>),
    /// The name that the VM is to have is another one's.
    #[error("there is a VM `{0}` already, or will be")]
    NameTaken(Name),
    /// The records cannot be used.
    #[error("cannot begin a migration")]
    Store(#[from] StoreError),
}

impl From<BeginError> for ApiError {
    fn from(error: BeginError) -> Self {
        match error {
            BeginError::AlreadyMigrating(_) => {
                ApiError::new(ErrorCode::Migrating, error.to_string())
                    .hint("wait for its end (`whimbrel migration watch ID`) or cancel it")
            }
            BeginError::NameTaken(_) => ApiError::new(ErrorCode::Exists, error.to_string())
                .hint("choose another name, or leave it out"),
            BeginError::Store(error) => error.into(),
        }
    }
}

/// Whether a migration holds its VM: it runs, or nobody knows yet how it ended.
#[must_use]
pub fn is_active(state: &MigrationState) -> bool {
    match state {
        MigrationState::Running | MigrationState::Unresolved { .. } => true,
        MigrationState::Moved | MigrationState::Stayed { .. } | MigrationState::Refused => false,
    }
}

impl Store {
    /// Writes a migration's record, which takes the VM for it. Repeated with the same id it changes nothing.
    ///
    /// # Errors
    /// [`BeginError::AlreadyMigrating`] if another migration of the VM is active, [`BeginError::NameTaken`] if it is to arrive
    /// under the name of another VM; then nothing is written.
    pub async fn begin_migration(&self, record: &Migration) -> Result<Begun, BeginError> {
        let record = record.clone();
        let begun = self.transact("begin a migration", move |transaction| {
            if let Some(known) = by_id(transaction, record.id)? {
                return Ok(Ok(Begun::Again(Box::new(known))));
            }
            if is_active(&record.state)
                && let Some(other) = active_migration(transaction, record.vm)?
            {
                return Ok(Err(BeginError::AlreadyMigrating(Box::new(other))));
            }
            if let Some(name) = &record.options.dname
                && is_anothers(transaction, name, record.vm)?
            {
                return Ok(Err(BeginError::NameTaken(name.clone())));
            }
            transaction.execute(
                "INSERT INTO migrations (id, vm, active, swept, record) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    record.id.to_string(),
                    record.vm.to_string(),
                    is_active(&record.state),
                    record.leftovers.is_empty(),
                    serde_json::to_string(&record)?
                ],
            )?;
            Ok(Ok(Begun::New))
        });
        begun.await?
    }

    /// Writes a migration's record as it is now.
    pub async fn save_migration(&self, record: &Migration) -> Result<(), StoreError> {
        let record = record.clone();
        self.transact("save a migration", move |transaction| {
            let changed = transaction.execute(
                "UPDATE migrations SET active = ?2, swept = ?3, record = ?4 WHERE id = ?1",
                params![
                    record.id.to_string(),
                    is_active(&record.state),
                    record.leftovers.is_empty(),
                    serde_json::to_string(&record)?
                ],
            )?;
            if changed == 0 { Err(Fault::NoRow) } else { Ok(()) }
        })
        .await
    }

    /// One migration.
    pub async fn migration(&self, id: MigrationId) -> Result<Option<Migration>, StoreError> {
        self.transact("read a migration", move |transaction| by_id(transaction, id)).await
    }

    /// Writes down what was seen of a migration over time, instead of what was written before.
    pub async fn save_statistics(
        &self,
        id: MigrationId,
        statistics: &MigrationStatistics,
    ) -> Result<(), StoreError> {
        let statistics = statistics.clone();
        self.transact("save a migration's statistics", move |transaction| {
            transaction.execute(
                "INSERT INTO migration_statistics (id, statistics) VALUES (?1, ?2)
                 ON CONFLICT (id) DO UPDATE SET statistics = excluded.statistics",
                params![id.to_string(), serde_json::to_string(&statistics)?],
            )?;
            Ok(())
        })
        .await
    }

    /// What was seen of a migration over time, if it was written down.
    pub async fn statistics(
        &self,
        id: MigrationId,
    ) -> Result<Option<MigrationStatistics>, StoreError> {
        self.transact("read a migration's statistics", move |transaction| {
            let sql = "SELECT statistics FROM migration_statistics WHERE id = ?1";
            let text: Option<String> =
                transaction.query_row(sql, [id.to_string()], |row| row.get(0)).optional()?;
            text.map(|text| Ok(serde_json::from_str(&text)?)).transpose()
        })
        .await
    }

    /// The newest migrations, newest first; at most 200.
    pub async fn migrations(&self) -> Result<Vec<Migration>, StoreError> {
        self.transact("list the migrations", |transaction| {
            let sql =
                format!("SELECT record FROM migrations ORDER BY number DESC LIMIT {LISTED_MAX}");
            many(transaction, &sql)
        })
        .await
    }

    /// Every migration that holds its VM, oldest first: what a restarted controller takes up again.
    pub async fn active_migrations(&self) -> Result<Vec<Migration>, StoreError> {
        self.transact("list the active migrations", |transaction| {
            many(transaction, "SELECT record FROM migrations WHERE active ORDER BY number")
        })
        .await
    }

    /// Every ended migration that left something to be swept, oldest first.
    pub async fn unswept_migrations(&self) -> Result<Vec<Migration>, StoreError> {
        self.transact("list the migrations that are not swept", |transaction| {
            let sql =
                "SELECT record FROM migrations WHERE NOT active AND NOT swept ORDER BY number";
            many(transaction, sql)
        })
        .await
    }

    /// The highest epoch that any migration of a VM was to be for; none if there was no migration.
    pub async fn highest_epoch_of(&self, vm: VmId) -> Result<Option<Epoch>, StoreError> {
        self.transact("look for a VM's epochs", move |transaction| {
            let sql = "SELECT max(json_extract(record, '$.epoch')) FROM migrations WHERE vm = ?1";
            let highest: Option<i64> =
                transaction.query_row(sql, [vm.to_string()], |row| row.get(0))?;
            Ok(highest.and_then(|epoch| u64::try_from(epoch).ok()).map(Epoch))
        })
        .await
    }

    /// The migration that holds a VM, if one does.
    pub async fn active_migration_of(&self, vm: VmId) -> Result<Option<Migration>, StoreError> {
        self.transact("look for a VM's migration", move |transaction| {
            active_migration(transaction, vm)
        })
        .await
    }
}

/// The migration that holds a VM.
pub(super) fn active_migration(
    transaction: &Transaction<'_>,
    vm: VmId,
) -> Result<Option<Migration>, Fault> {
    one(transaction, "SELECT record FROM migrations WHERE vm = ?1 AND active", &vm.to_string())
}

/// Whether a name belongs to another VM, or will when a migration ends.
fn is_anothers(transaction: &Transaction<'_>, name: &Name, vm: VmId) -> Result<bool, Fault> {
    let sql = "SELECT EXISTS (SELECT 1 FROM vms WHERE name = ?1 AND id <> ?2)
        OR EXISTS (SELECT 1 FROM migrations WHERE active AND vm <> ?2
                   AND json_extract(record, '$.options.dname') = ?1)";
    let key = params![name.as_str(), vm.to_string()];
    Ok(transaction.query_row(sql, key, |row| row.get(0))?)
}

/// Whether a VM on its way is to have this name.
pub(super) fn name_is_reserved(transaction: &Transaction<'_>, name: &Name) -> Result<bool, Fault> {
    let sql = "SELECT EXISTS (SELECT 1 FROM migrations WHERE active
        AND json_extract(record, '$.options.dname') = ?1)";
    Ok(transaction.query_row(sql, [name.as_str()], |row| row.get(0))?)
}

fn by_id(transaction: &Transaction<'_>, id: MigrationId) -> Result<Option<Migration>, Fault> {
    one(transaction, "SELECT record FROM migrations WHERE id = ?1", &id.to_string())
}

fn one(transaction: &Transaction<'_>, sql: &str, key: &str) -> Result<Option<Migration>, Fault> {
    let text: Option<String> = transaction.query_row(sql, [key], |row| row.get(0)).optional()?;
    text.map(|text| Ok(serde_json::from_str(&text)?)).transpose()
}

fn many(transaction: &Transaction<'_>, sql: &str) -> Result<Vec<Migration>, Fault> {
    let mut query = transaction.prepare(sql)?;
    let rows = query.query_and_then([], |row| {
        let text: String = row.get(0)?;
        Ok::<Migration, Fault>(serde_json::from_str(&text)?)
    })?;
    rows.collect()
}
