//! VMs: where each belongs, in which epoch, and the copy of its definition.
//!
//! The controller is the one writer of the placement; the owning host's agent is the one writer of the definition, of which
//! this is a copy by generation number. Neither epoch nor generation ever goes back.

use rusqlite::{OptionalExtension, Row, Transaction, params};
use whimbrel_api::vm::{VmDefinition, VmSpec};
use whimbrel_api::{Epoch, MigrationId, Name, VmId};

use super::migrations::{active_migration, name_is_reserved};
use super::policies::detach_vm;
use super::{Fault, Store, StoreError, from_column, parsed, to_column};

const COLUMNS: &str = "host, epoch, confirmed, spec, definition";

/// A VM as the pool remembers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmRow {
    /// The host that owns it.
    pub host: Name,
    /// The epoch in which it does.
    pub epoch: Epoch,
    /// Whether the host has confirmed that it created the VM.
    pub confirmed: bool,
    /// What the user asked for; a repeated request is recognised by it.
    pub spec: VmSpec,
    /// The copy of the definition.
    pub definition: VmDefinition,
}

impl VmRow {
    /// The VM's id.
    #[must_use]
    pub fn id(&self) -> VmId {
        self.definition.id
    }

    /// The VM's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.definition.name
    }
}

/// What became of a new VM's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inserted {
    /// It is new.
    New,
    /// A VM with this id is there; here it is.
    SameId(Box<VmRow>),
    /// Another VM has the name.
    NameTaken,
}

/// What became of a VM's row that was to be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deleted {
    /// It is gone, now or before.
    Gone,
    /// It is being migrated.
    Migrating(MigrationId),
}

/// What became of a placement that was to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlacementMove {
    /// It moved, or had moved before to the same host in the same epoch.
    Moved,
    /// A higher epoch is known; nothing was changed.
    Stale {
        /// The known epoch.
        known: Epoch,
    },
    /// There is no such VM.
    NoVm,
}

impl Store {
    /// Writes a new VM down, before its host is asked to create it.
    pub async fn insert_vm(&self, row: VmRow) -> Result<Inserted, StoreError> {
        self.transact("write a new VM down", move |transaction| {
            if let Some(found) = by_id(transaction, row.id())? {
                return Ok(Inserted::SameId(Box::new(found)));
            }
            if name_is_reserved(transaction, row.name())? {
                return Ok(Inserted::NameTaken);
            }
            let added = transaction.execute(
                "INSERT INTO vms (id, name, host, epoch, generation, confirmed, spec, definition)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT (name) DO NOTHING",
                params![
                    row.id().to_string(),
                    row.name().as_str(),
                    row.host.as_str(),
                    to_column(row.epoch.0),
                    to_column(row.definition.generation),
                    row.confirmed,
                    serde_json::to_string(&row.spec)?,
                    serde_json::to_string(&row.definition)?,
                ],
            )?;
            Ok(if added > 0 { Inserted::New } else { Inserted::NameTaken })
        })
        .await
    }

    /// All VMs, by name.
    pub async fn vms(&self) -> Result<Vec<VmRow>, StoreError> {
        self.transact("list the VMs", |transaction| {
            let mut query =
                transaction.prepare(&format!("SELECT {COLUMNS} FROM vms ORDER BY name"))?;
            let rows = query.query_and_then([], vm_row)?;
            rows.collect()
        })
        .await
    }

    /// A VM by its id.
    pub async fn vm(&self, id: VmId) -> Result<Option<VmRow>, StoreError> {
        self.transact("read a VM", move |transaction| by_id(transaction, id)).await
    }

    /// A VM by its name.
    pub async fn vm_by_name(&self, name: &Name) -> Result<Option<VmRow>, StoreError> {
        let name = name.clone();
        self.transact("read a VM", move |transaction| {
            let sql = format!("SELECT {COLUMNS} FROM vms WHERE name = ?1");
            one(transaction, &sql, name.as_str())
        })
        .await
    }

    /// Takes over what the owning host says of the VM: its definition, name included, and its epoch. Does nothing and answers
    /// `false` if `host` is not the placement, or if something newer is known.
    pub async fn confirm_vm(
        &self,
        host: &Name,
        epoch: Epoch,
        definition: &VmDefinition,
    ) -> Result<bool, StoreError> {
        let (host, definition) = (host.clone(), definition.clone());
        self.transact("confirm a VM", move |transaction| {
            let changed = transaction.execute(
                "UPDATE vms SET epoch = ?3, generation = ?4, definition = ?5, name = ?6, confirmed = 1
                 WHERE id = ?1 AND host = ?2 AND epoch <= ?3 AND generation <= ?4
                 AND NOT EXISTS (SELECT 1 FROM vms WHERE name = ?6 AND id <> ?1)",
                params![
                    definition.id.to_string(),
                    host.as_str(),
                    to_column(epoch.0),
                    to_column(definition.generation),
                    serde_json::to_string(&definition)?,
                    definition.name.as_str(),
                ],
            )?;
            Ok(changed > 0)
        })
        .await
    }

    /// Moves a VM's placement to `host`, which has confirmed that it owns the VM in `epoch`. Repeating it is harmless; an
    /// older epoch never overwrites a newer one.
    pub async fn move_placement(
        &self,
        vm: VmId,
        host: &Name,
        epoch: Epoch,
        generation: u64,
    ) -> Result<PlacementMove, StoreError> {
        let host = host.clone();
        self.transact("move a VM's placement", move |transaction| {
            let Some(known) = by_id(transaction, vm)? else { return Ok(PlacementMove::NoVm) };
            let same = known.epoch == epoch && known.host == host;
            if known.epoch >= epoch && !same {
                return Ok(PlacementMove::Stale { known: known.epoch });
            }
            transaction.execute(
                "UPDATE vms SET host = ?2, epoch = ?3, generation = max(generation, ?4) WHERE id = ?1",
                params![vm.to_string(), host.as_str(), to_column(epoch.0), to_column(generation)],
            )?;
            Ok(PlacementMove::Moved)
        })
        .await
    }

    /// Gives a VM the name under which it has arrived; the migration has reserved it.
    pub async fn rename_vm(&self, id: VmId, name: &Name) -> Result<(), StoreError> {
        let name = name.clone();
        self.transact("rename a VM", move |transaction| {
            transaction.execute(
                "UPDATE vms SET name = ?2, definition = json_set(definition, '$.name', ?2)
                 WHERE id = ?1",
                params![id.to_string(), name.as_str()],
            )?;
            Ok(())
        })
        .await
    }

    /// Forgets a VM, unless it is being migrated.
    pub async fn delete_vm(&self, id: VmId) -> Result<Deleted, StoreError> {
        self.transact("forget a VM", move |transaction| {
            if let Some(migration) = active_migration(transaction, id)? {
                return Ok(Deleted::Migrating(migration.id));
            }
            transaction.execute("DELETE FROM vms WHERE id = ?1", [id.to_string()])?;
            detach_vm(transaction, id)?;
            Ok(Deleted::Gone)
        })
        .await
    }
}

fn by_id(transaction: &Transaction<'_>, id: VmId) -> Result<Option<VmRow>, Fault> {
    one(transaction, &format!("SELECT {COLUMNS} FROM vms WHERE id = ?1"), &id.to_string())
}

fn one(transaction: &Transaction<'_>, sql: &str, key: &str) -> Result<Option<VmRow>, Fault> {
    let found = transaction.query_row(sql, [key], |row| Ok(vm_row(row))).optional()?;
    found.transpose()
}

fn vm_row(row: &Row<'_>) -> Result<VmRow, Fault> {
    Ok(VmRow {
        host: parsed(&row.get::<_, String>(0)?)?,
        epoch: Epoch(from_column(row.get(1)?)),
        confirmed: row.get(2)?,
        spec: serde_json::from_str(&row.get::<_, String>(3)?)?,
        definition: serde_json::from_str(&row.get::<_, String>(4)?)?,
    })
}
