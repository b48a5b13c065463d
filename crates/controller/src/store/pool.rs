//! Networks and storages, and which hosts were proven to see the same files in a shared storage.

use rusqlite::{Transaction, params};
use serde::de::DeserializeOwned;
use whimbrel_api::Name;
use whimbrel_api::pool::{Network, Storage, StorageDefaults};

use super::{Fault, Store, StoreError, parsed};

impl Store {
    /// Remembers a network; `false` if the name is taken.
    pub async fn add_network(&self, network: &Network) -> Result<bool, StoreError> {
        let network = network.clone();
        self.transact("remember a network", move |transaction| {
            let added = transaction.execute(
                "INSERT INTO networks (name, definition) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
                params![network.name.as_str(), serde_json::to_string(&network)?],
            )?;
            Ok(added > 0)
        })
        .await
    }

    /// All networks, by name.
    pub async fn networks(&self) -> Result<Vec<Network>, StoreError> {
        self.transact("list the networks", |transaction| {
            definitions(transaction, "SELECT definition FROM networks ORDER BY name")
        })
        .await
    }

    /// Remembers a storage with the hosts that are proven to share it; `false` if the name is taken.
    pub async fn add_storage(
        &self,
        storage: &Storage,
        proven: Vec<Name>,
    ) -> Result<bool, StoreError> {
        let storage = storage.clone();
        self.transact("remember a storage", move |transaction| {
            let added = transaction.execute(
                "INSERT INTO storages (name, definition) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
                params![storage.name.as_str(), serde_json::to_string(&storage)?],
            )?;
            if added == 0 {
                return Ok(false);
            }
            for host in &proven {
                transaction.execute(
                    "INSERT INTO storage_proofs (storage, host) VALUES (?1, ?2)",
                    params![storage.name.as_str(), host.as_str()],
                )?;
            }
            Ok(true)
        })
        .await
    }

    /// All storages, by name.
    pub async fn storages(&self) -> Result<Vec<Storage>, StoreError> {
        self.transact("list the storages", |transaction| {
            definitions(transaction, "SELECT definition FROM storages ORDER BY name")
        })
        .await
    }

    /// The hosts that are proven to see the same files in a shared storage.
    pub async fn storage_proofs(&self, storage: &Name) -> Result<Vec<Name>, StoreError> {
        let storage = storage.clone();
        self.transact("list a storage's hosts", move |transaction| {
            let mut query = transaction
                .prepare("SELECT host FROM storage_proofs WHERE storage = ?1 ORDER BY host")?;
            let rows = query.query_and_then([storage.as_str()], |row| {
                parsed::<Name>(&row.get::<_, String>(0)?)
            })?;
            rows.collect()
        })
        .await
    }

    /// Remembers that a host is proven to share a storage.
    pub async fn add_storage_proof(&self, storage: &Name, host: &Name) -> Result<(), StoreError> {
        let (storage, host) = (storage.clone(), host.clone());
        self.transact("remember a storage's host", move |transaction| {
            transaction.execute(
                "INSERT INTO storage_proofs (storage, host) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
                params![storage.as_str(), host.as_str()],
            )?;
            Ok(())
        })
        .await
    }

    /// Which storages are used where none is named.
    pub async fn storage_defaults(&self) -> Result<StorageDefaults, StoreError> {
        self.transact("read the default storages", |transaction| {
            let sql = "SELECT host, storage FROM default_storages ORDER BY host, place";
            let mut query = transaction.prepare(sql)?;
            let mut rows = query.query([])?;
            let mut defaults = StorageDefaults::default();
            while let Some(row) = rows.next()? {
                let (host, storage): (String, String) = (row.get(0)?, row.get(1)?);
                let storage = parsed::<Name>(&storage)?;
                if host == POOL {
                    defaults.pool = Some(storage);
                } else {
                    defaults.hosts.entry(parsed(&host)?).or_default().push(storage);
                }
            }
            Ok(defaults)
        })
        .await
    }

    /// Remembers the default storages of a host, or of the pool.
    pub async fn set_storage_defaults(
        &self,
        host: Option<Name>,
        storages: Vec<Name>,
    ) -> Result<(), StoreError> {
        self.transact("remember default storages", move |transaction| {
            let host = host.as_ref().map_or(POOL, Name::as_str);
            transaction.execute("DELETE FROM default_storages WHERE host = ?1", [host])?;
            for (place, storage) in (1_i64..).zip(&storages) {
                let sql = "INSERT INTO default_storages (host, place, storage) VALUES (?1, ?2, ?3)";
                transaction.execute(sql, params![host, place, storage.as_str()])?;
            }
            Ok(())
        })
        .await
    }
}

/// The pool among the hosts: no host has this name.
const POOL: &str = "";

fn definitions<T: DeserializeOwned>(
    transaction: &Transaction<'_>,
    sql: &str,
) -> Result<Vec<T>, Fault> {
    let mut query = transaction.prepare(sql)?;
    let rows = query.query_and_then([], |row| {
        let text: String = row.get(0)?;
        Ok::<T, Fault>(serde_json::from_str(&text)?)
    })?;
    rows.collect()
}
