//! The agent's durable memory: which VMs are this host's, what runs, and what was made for it.
//!
//! One SQLite file (WAL, `synchronous=FULL`), one thread that owns the connection, and a small async handle in front of it.
//! A call returns once its transaction is committed and fsynced: what was acknowledged is still there after a power
//! loss. Nothing is decided here; who may run a guest is [`whimbrel_migration::handoff`]'s matter.
//!
//! | table | one row is | written by |
//! |---|---|---|
//! | `vm` | a VM's definition, which of the runs is the owner's, how the last one ended | the VM's task |
//! | `ownership` | this host's word on a VM, key (vm, migration) | the VM's task; during a migration its driver |
//! | `run` | a QEMU that was spawned: process, taps, definition | [`crate::vm`] |
//! | `journal` | a thing that exists or is about to: written before it is made, removed after it is gone | whoever makes it |
//! | `network`, `storage` | a definition from the controller | [`crate::network`], [`crate::storage`] |
//! | `migration` | a migration's request and state, for its driver after a restart | [`crate::migrate`] |

mod schema;

use std::path::{Path, PathBuf};
use std::time::Instant;

use prometheus_client::metrics::histogram::Histogram;
use rusqlite::{Connection, OptionalExtension, Transaction, params};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use whimbrel_api::pool::{Network, Storage};
use whimbrel_api::vm::{RunningEngine, StoragePath, VmDefinition};
use whimbrel_api::{MigrationId, Name, VmId};
use whimbrel_migration::handoff::{self, Ownership};
use whimbrel_qemu::process::ProcessIdentity;

use crate::failpoint::{self, Failpoints};
use crate::metrics;

/// Calls that may wait for the writer; more wait their turn outside.
const QUEUED_CALLS_MAX: usize = 64;

/// Why the ledger did not do what was asked. Whether a write that failed is on the disk is not known.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The file cannot be opened or brought to this version.
    #[error("cannot open the ledger {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// The file cannot be made, or kept to its owner.
    #[error("cannot use the ledger's file {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file was written by a newer version.
    #[error("the ledger {} is of version {found}; this version of whimbrel knows up to {known}", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// The writer's thread cannot be started.
    #[error("cannot start the ledger's thread")]
    Thread(#[source] std::io::Error),
    /// A statement failed.
    #[error("the ledger failed to {doing}")]
    Statement {
        /// What was to be done.
        doing: &'static str,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// A row holds what this version cannot read.
    #[error("the ledger holds a {what} that cannot be read")]
    Malformed {
        /// What it should be.
        what: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The writer has ended.
    #[error("the ledger is closed")]
    Closed,
    /// A test told it to fail.
    #[error("the ledger was told to fail")]
    Failpoint(#[from] failpoint::Failed),
}

/// A QEMU that was spawned, with all that is needed to find it again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The name of its folder under `run/`: unique for every spawning.
    pub name: String,
    /// What it runs.
    pub definition: VmDefinition,
    /// The migration that it was spawned to receive; `None` for a start.
    pub migration: Option<MigrationId>,
    /// Its process.
    pub process: ProcessIdentity,
    /// What runs it.
    pub engine: RunningEngine,
    /// Its taps, in the order of its NICs.
    pub taps: Vec<String>,
}

/// A thing outside of the ledger that has to be taken down some day.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Resource {
    /// A folder under `run/`, and the QEMU whose sockets are in it.
    Run {
        /// Its name.
        name: String,
    },
    /// A tap interface.
    Tap {
        /// Its name.
        name: String,
        /// The run that it is for.
        run: String,
    },
    /// The image of a disk that is being made; from the VM's creation on the VM's row names it.
    DiskFile {
        /// The VM.
        vm: VmId,
        /// Its storage.
        storage: Name,
        /// Its path there.
        path: String,
    },
    /// Room in a storage that is spoken for, until its file is the VM's or gone ([`crate::storage::space`]).
    Space {
        /// The file that it is for.
        file: StoragePath,
        /// How much it may occupy, in bytes.
        bytes: u64,
    },
    /// An image that is being made for a VM, or not needed any more; while the VM's row names it, it is the VM's.
    Layer {
        /// The VM.
        vm: VmId,
        /// The image.
        file: StoragePath,
    },
    /// The file of a VM's saved state, that is being written or is used up; while the VM's row names it, it is the VM's.
    StateFile {
        /// The VM.
        vm: VmId,
        /// The file.
        file: StoragePath,
    },
    /// A bridge that did not exist before.
    Bridge {
        /// Its name.
        name: String,
    },
}

/// A VM as the ledger knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct VmRow {
    /// The definition.
    pub definition: VmDefinition,
    /// The name of the run that is the owner's.
    pub run: Option<String>,
    /// Why the last run ended, if nobody had asked for it.
    pub crashed: Option<String>,
}

/// Which side of a migration this host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The destination.
    Incoming,
    /// The source.
    Outgoing,
}

impl Side {
    fn as_str(self) -> &'static str {
        match self {
            Side::Incoming => "incoming",
            Side::Outgoing => "outgoing",
        }
    }
}

/// A migration as its driver wants to find it after a restart. What is in `request` and `state` is the driver's.
#[derive(Debug, Clone, PartialEq)]
pub struct MigrationRow {
    /// The migration.
    pub id: MigrationId,
    /// Which side this host is.
    pub side: Side,
    /// The VM.
    pub vm: VmId,
    /// The request.
    pub request: serde_json::Value,
    /// How far it is.
    pub state: serde_json::Value,
}

type Call = Box<dyn FnOnce(&mut Connection) + Send>;

/// The handle. Clones share the writer, which ends when the last one is dropped.
#[derive(Debug, Clone)]
pub struct Ledger {
    calls: mpsc::Sender<Call>,
    failpoints: Failpoints,
    write_seconds: Histogram,
}

impl Ledger {
    /// Opens or makes the file, and makes durable what is in it before anybody acts on it.
    ///
    /// # Errors
    /// [`LedgerError::File`], [`LedgerError::Open`], [`LedgerError::Newer`] and [`LedgerError::Thread`].
    pub fn open(path: &Path, failpoints: Failpoints) -> Result<Self, LedgerError> {
        let mut connection = schema::open(path)?;
        let (calls, mut waiting) = mpsc::channel::<Call>(QUEUED_CALLS_MAX);
        std::thread::Builder::new()
            .name("ledger".to_owned())
            .spawn(move || {
                while let Some(call) = waiting.blocking_recv() {
                    call(&mut connection);
                }
            })
            .map_err(LedgerError::Thread)?;
        Ok(Self { calls, failpoints, write_seconds: metrics::write_seconds() })
    }

    /// How long writes have taken, from the asking to the disk.
    pub(crate) fn write_seconds(&self) -> &Histogram {
        &self.write_seconds
    }

    /// Runs `work` in one transaction on the writer's thread.
    async fn run<T: Send + 'static>(
        &self,
        doing: &'static str,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, LedgerError> {
        let (reply, answer) = oneshot::channel();
        let (asked, write_seconds) = (Instant::now(), self.write_seconds.clone());
        let call: Call = Box::new(move |connection| {
            let changes = connection.total_changes();
            let done = connection.transaction().and_then(|transaction| {
                let value = work(&transaction)?;
                transaction.commit()?;
                Ok(value)
            });
            if connection.total_changes() != changes {
                write_seconds.observe(asked.elapsed().as_secs_f64());
            }
            // Who asked may have given up: what was written stays written.
            let _ = reply.send(done);
        });
        self.calls.send(call).await.map_err(|_| LedgerError::Closed)?;
        let done = answer.await.map_err(|_| LedgerError::Closed)?;
        done.map_err(|source| LedgerError::Statement { doing, source })
    }

    /// Writes this host's word on a VM under its key (vm, migration). Durable on return.
    ///
    /// # Errors
    /// [`LedgerError`]; the record may be on the disk all the same.
    pub async fn persist(&self, record: &Ownership) -> Result<(), LedgerError> {
        self.failpoints.hit("ledger.persist").await?;
        let row = OwnershipRow::of(record)?;
        self.run("write an ownership record", move |t| row.put(t)).await
    }

    /// The record of one migration of a VM (or of its creation, with `None`).
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn ownership(
        &self,
        vm: VmId,
        migration: impl Into<Option<MigrationId>>,
    ) -> Result<Option<Ownership>, LedgerError> {
        let (vm, migration) = (vm.to_string(), migration_key(migration.into()));
        let found: Option<String> = self
            .run("read an ownership record", move |t| {
                let sql = "SELECT record FROM ownership WHERE vm = ?1 AND migration = ?2";
                t.query_row(sql, params![vm, migration], |row| row.get(0)).optional()
            })
            .await?;
        found.as_deref().map(|text| read("ownership record", text)).transpose()
    }

    /// This host's word on a VM: its record with the highest epoch.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn current(&self, vm: VmId) -> Result<Option<Ownership>, LedgerError> {
        let vm = vm.to_string();
        let texts = self
            .run("read a VM's ownership records", move |t| {
                column(t, "SELECT record FROM ownership WHERE vm = ?1", params![vm])
            })
            .await?;
        let records: Vec<Ownership> = read_all("ownership record", &texts)?;
        Ok(handoff::current(&records).cloned())
    }

    /// This host's word on every VM that it has ever heard of.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn current_of_all(&self) -> Result<Vec<Ownership>, LedgerError> {
        let texts = self
            .run("read the ownership records", |t| {
                column(t, "SELECT record FROM ownership ORDER BY vm", [])
            })
            .await?;
        let records: Vec<Ownership> = read_all("ownership record", &texts)?;
        let of_each = records.chunk_by(|a, b| a.vm == b.vm);
        Ok(of_each.filter_map(|records| handoff::current(records).cloned()).collect())
    }

    /// Notes a VM that is created on this host, with its ownership.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn create_vm(
        &self,
        definition: &VmDefinition,
        record: &Ownership,
    ) -> Result<(), LedgerError> {
        let row = OwnershipRow::of(record)?;
        let (vm, generation) = (definition.id.to_string(), generation(definition));
        let definition = write("definition", definition)?;
        self.run("note a new VM", move |t| {
            row.put(t)?;
            t.execute(
                "INSERT INTO vm (id, definition, generation) VALUES (?1, ?2, ?3)",
                params![vm, definition, generation],
            )?;
            // From here on the VM's row names its disks.
            t.execute("DELETE FROM journal WHERE owner = ?1", params![vm])?;
            Ok(())
        })
        .await
    }

    /// All VMs with a row.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn vms(&self) -> Result<Vec<VmRow>, LedgerError> {
        let rows: Vec<(String, Option<String>, Option<String>)> = self
            .run("read the VMs", |t| {
                let mut statement = t.prepare("SELECT definition, run, crashed FROM vm")?;
                let rows =
                    statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
                rows.collect()
            })
            .await?;
        rows.into_iter()
            .map(|(definition, run, crashed)| {
                Ok(VmRow { definition: read("definition", &definition)?, run, crashed })
            })
            .collect()
    }

    /// Notes that `run` is a VM's own, and makes the VM's row if there is none (it came by a migration).
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn set_running(
        &self,
        definition: &VmDefinition,
        run: &str,
    ) -> Result<(), LedgerError> {
        let (vm, generation) = (definition.id.to_string(), generation(definition));
        let definition = write("definition", definition)?;
        let run = run.to_owned();
        self.run("note a running VM", move |t| {
            t.execute(
                "INSERT INTO vm (id, definition, generation, run) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (id) DO UPDATE SET definition = excluded.definition,
                    generation = excluded.generation, run = excluded.run, crashed = NULL",
                params![vm, definition, generation, run],
            )
        })
        .await
        .map(drop)
    }

    /// Notes that this host owns a VM that has come stopped, with its definition: both or neither.
    ///
    /// # Errors
    /// [`LedgerError`]; both may be on the disk all the same.
    pub async fn take_stopped(
        &self,
        definition: &VmDefinition,
        record: &Ownership,
    ) -> Result<(), LedgerError> {
        self.failpoints.hit("ledger.persist").await?;
        let row = OwnershipRow::of(record)?;
        let (vm, generation) = (definition.id.to_string(), generation(definition));
        let definition = write("definition", definition)?;
        self.run("note a VM that has come", move |t| {
            row.put(t)?;
            t.execute(
                "INSERT INTO vm (id, definition, generation) VALUES (?1, ?2, ?3)
                 ON CONFLICT (id) DO UPDATE SET definition = excluded.definition,
                    generation = excluded.generation, run = NULL, crashed = NULL",
                params![vm, definition, generation],
            )
        })
        .await
        .map(drop)
    }

    /// Notes that a VM has no run any more, and why, if nobody had asked for it.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn set_ended(&self, vm: VmId, crashed: Option<String>) -> Result<(), LedgerError> {
        let vm = vm.to_string();
        self.run("note the end of a run", move |t| {
            t.execute("UPDATE vm SET run = NULL, crashed = ?2 WHERE id = ?1", params![vm, crashed])
        })
        .await
        .map(drop)
    }

    /// Notes what a VM's definition is from now on.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn set_definition(&self, definition: &VmDefinition) -> Result<(), LedgerError> {
        let (vm, generation) = (definition.id.to_string(), generation(definition));
        let definition = write("definition", definition)?;
        self.run("note a definition", move |t| {
            let sql = "UPDATE vm SET definition = ?2, generation = ?3 WHERE id = ?1";
            t.execute(sql, params![vm, definition, generation])
        })
        .await
        .map(drop)
    }

    /// Notes that a VM is saved, as its definition says, and has no run any more. What was made for the run stays in the
    /// journal, so that its QEMU is ended whatever happens: its guest must not run on.
    ///
    /// # Errors
    /// [`LedgerError`]; it may be on the disk all the same.
    pub async fn set_saved(&self, definition: &VmDefinition, run: &str) -> Result<(), LedgerError> {
        self.failpoints.hit("ledger.saved").await?;
        let (vm, generation) = (definition.id.to_string(), generation(definition));
        let definition = write("definition", definition)?;
        let run = run.to_owned();
        self.run("note a saved VM", move |t| {
            t.execute("DELETE FROM run WHERE name = ?1", params![run])?;
            let sql = "UPDATE vm SET definition = ?2, generation = ?3, run = NULL, crashed = NULL
                 WHERE id = ?1";
            t.execute(sql, params![vm, definition, generation])
        })
        .await
        .map(drop)
    }

    /// Forgets a VM's row. Its ownership records stay: late questions are still answered, and an old offer of the VM is
    /// still known to be old.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn remove_vm(&self, vm: VmId) -> Result<(), LedgerError> {
        let vm = vm.to_string();
        self.run("forget a VM", move |t| t.execute("DELETE FROM vm WHERE id = ?1", params![vm]))
            .await
            .map(drop)
    }

    /// Notes a spawned QEMU.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn put_run(&self, record: &RunRecord) -> Result<(), LedgerError> {
        let name = record.name.clone();
        let record = write("run", record)?;
        self.run("note a process", move |t| {
            t.execute(
                "INSERT OR REPLACE INTO run (name, record) VALUES (?1, ?2)",
                params![name, record],
            )
        })
        .await
        .map(drop)
    }

    /// All QEMUs that were spawned and not yet taken down.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn runs(&self) -> Result<Vec<RunRecord>, LedgerError> {
        let texts = self.run("read the runs", |t| column(t, "SELECT record FROM run", [])).await?;
        read_all("run", &texts)
    }

    /// Forgets a QEMU, after all that was made for it is gone.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn remove_run(&self, name: &str) -> Result<(), LedgerError> {
        let name = name.to_owned();
        self.run("forget a run", move |t| {
            t.execute("DELETE FROM run WHERE name = ?1", params![name])?;
            t.execute("DELETE FROM journal WHERE owner = ?1", params![name])?;
            Ok(())
        })
        .await
    }

    /// Notes things that are about to be made for `owner` (a run's name, a VM's id or a network's name).
    ///
    /// # Errors
    /// [`LedgerError`]; then they must not be made.
    pub async fn journal(&self, owner: &str, resources: &[Resource]) -> Result<(), LedgerError> {
        let owner = owner.to_owned();
        let texts: Result<Vec<String>, _> =
            resources.iter().map(|resource| write("resource", resource)).collect();
        let texts = texts?;
        self.run("write the journal", move |t| {
            for text in texts {
                let sql = "INSERT OR IGNORE INTO journal (owner, resource) VALUES (?1, ?2)";
                t.execute(sql, params![owner, text])?;
            }
            Ok(())
        })
        .await
    }

    /// All that the journal names, with its owner, oldest first.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn journaled(&self) -> Result<Vec<(String, Resource)>, LedgerError> {
        let rows: Vec<(String, String)> = self
            .run("read the journal", |t| {
                let mut statement =
                    t.prepare("SELECT owner, resource FROM journal ORDER BY seq")?;
                let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
                rows.collect()
            })
            .await?;
        rows.into_iter().map(|(owner, text)| Ok((owner, read("resource", &text)?))).collect()
    }

    /// Forgets one thing that was made for `owner`, after it is gone.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn unjournal_one(&self, owner: &str, resource: &Resource) -> Result<(), LedgerError> {
        let (owner, resource) = (owner.to_owned(), write("resource", resource)?);
        self.run("clear the journal", move |t| {
            let sql = "DELETE FROM journal WHERE owner = ?1 AND resource = ?2";
            t.execute(sql, params![owner, resource])
        })
        .await
        .map(drop)
    }

    /// Forgets all that was made for `owner`, after it is gone.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn unjournal(&self, owner: &str) -> Result<(), LedgerError> {
        let owner = owner.to_owned();
        self.run("clear the journal", move |t| {
            t.execute("DELETE FROM journal WHERE owner = ?1", params![owner])
        })
        .await
        .map(drop)
    }

    /// Notes a network.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn put_network(&self, network: &Network) -> Result<(), LedgerError> {
        self.put_named("network", &network.name, network).await
    }

    /// All networks.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn networks(&self) -> Result<Vec<Network>, LedgerError> {
        self.all_named("network").await
    }

    /// Forgets a network.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn remove_network(&self, name: &Name) -> Result<(), LedgerError> {
        self.remove_named("network", name).await
    }

    /// Notes a storage.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn put_storage(&self, storage: &Storage) -> Result<(), LedgerError> {
        self.put_named("storage", &storage.name, storage).await
    }

    /// All storages.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn storages(&self) -> Result<Vec<Storage>, LedgerError> {
        self.all_named("storage").await
    }

    /// Forgets a storage.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn remove_storage(&self, name: &Name) -> Result<(), LedgerError> {
        self.remove_named("storage", name).await
    }

    /// Notes a migration, or how far it is.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn put_migration(&self, row: &MigrationRow) -> Result<(), LedgerError> {
        let (id, side, vm) = (row.id.to_string(), row.side.as_str(), row.vm.to_string());
        let (request, state) = (row.request.to_string(), row.state.to_string());
        self.run("note a migration", move |t| {
            t.execute(
                "INSERT OR REPLACE INTO migration (id, side, vm, request, state) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![id, side, vm, request, state],
            )
        })
        .await
        .map(drop)
    }

    /// All migrations of one side.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn migrations(&self, side: Side) -> Result<Vec<MigrationRow>, LedgerError> {
        let rows: Vec<[String; 4]> = self
            .run("read the migrations", move |t| {
                let sql =
                    "SELECT id, vm, request, state FROM migration WHERE side = ?1 ORDER BY id";
                let mut statement = t.prepare(sql)?;
                let rows = statement.query_map(params![side.as_str()], |row| {
                    Ok([row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?])
                })?;
                rows.collect()
            })
            .await?;
        let row = |[id, vm, request, state]: [String; 4]| {
            Ok(MigrationRow {
                id: read("migration's id", &format!("\"{id}\""))?,
                side,
                vm: read("VM's id", &format!("\"{vm}\""))?,
                request: read("migration's request", &request)?,
                state: read("migration's state", &state)?,
            })
        };
        rows.into_iter().map(row).collect()
    }

    /// Forgets a migration.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub async fn remove_migration(&self, id: MigrationId, side: Side) -> Result<(), LedgerError> {
        let id = id.to_string();
        self.run("forget a migration", move |t| {
            let sql = "DELETE FROM migration WHERE id = ?1 AND side = ?2";
            t.execute(sql, params![id, side.as_str()])
        })
        .await
        .map(drop)
    }

    async fn put_named<T: Serialize>(
        &self,
        kind: &'static str,
        name: &Name,
        value: &T,
    ) -> Result<(), LedgerError> {
        let (name, text) = (name.to_string(), write(kind, value)?);
        self.run("note a definition", move |t| {
            let sql = "INSERT OR REPLACE INTO named (kind, name, definition) VALUES (?1, ?2, ?3)";
            t.execute(sql, params![kind, name, text])
        })
        .await
        .map(drop)
    }

    async fn all_named<T: DeserializeOwned>(
        &self,
        kind: &'static str,
    ) -> Result<Vec<T>, LedgerError> {
        let texts = self
            .run("read the definitions", move |t| {
                column(
                    t,
                    "SELECT definition FROM named WHERE kind = ?1 ORDER BY name",
                    params![kind],
                )
            })
            .await?;
        read_all(kind, &texts)
    }

    async fn remove_named(&self, kind: &'static str, name: &Name) -> Result<(), LedgerError> {
        let name = name.to_string();
        self.run("forget a definition", move |t| {
            t.execute("DELETE FROM named WHERE kind = ?1 AND name = ?2", params![kind, name])
        })
        .await
        .map(drop)
    }
}

/// An ownership record on its way into the table.
struct OwnershipRow {
    vm: String,
    migration: String,
    epoch: i64,
    record: String,
}

impl OwnershipRow {
    fn of(record: &Ownership) -> Result<Self, LedgerError> {
        Ok(Self {
            vm: record.vm.to_string(),
            migration: migration_key(record.migration),
            epoch: i64::try_from(record.epoch.0).unwrap_or(i64::MAX),
            record: write("ownership record", record)?,
        })
    }

    fn put(self, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
        transaction
            .execute(
                "INSERT OR REPLACE INTO ownership (vm, migration, epoch, record) VALUES (?1, ?2, ?3, ?4)",
                params![self.vm, self.migration, self.epoch, self.record],
            )
            .map(drop)
    }
}

/// A key column cannot be NULL: the record of a VM's creation has an empty migration.
fn migration_key(migration: Option<MigrationId>) -> String {
    migration.map(|id| id.to_string()).unwrap_or_default()
}

fn generation(definition: &VmDefinition) -> i64 {
    i64::try_from(definition.generation).unwrap_or(i64::MAX)
}

fn column(
    transaction: &Transaction<'_>,
    sql: &str,
    values: impl rusqlite::Params,
) -> rusqlite::Result<Vec<String>> {
    let mut statement = transaction.prepare(sql)?;
    let rows = statement.query_map(values, |row| row.get(0))?;
    rows.collect()
}

fn write<T: Serialize>(what: &'static str, value: &T) -> Result<String, LedgerError> {
    serde_json::to_string(value).map_err(|source| LedgerError::Malformed { what, source })
}

fn read<T: DeserializeOwned>(what: &'static str, text: &str) -> Result<T, LedgerError> {
    serde_json::from_str(text).map_err(|source| LedgerError::Malformed { what, source })
}

fn read_all<T: DeserializeOwned>(
    what: &'static str,
    texts: &[String],
) -> Result<Vec<T>, LedgerError> {
    texts.iter().map(|text| read(what, text)).collect()
}

#[cfg(test)]
mod tests;
