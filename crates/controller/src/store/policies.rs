//! Policies of the pool, and what they are attached to.
//!
//! The built-in ones are not here: they are part of the program.

use rusqlite::{OptionalExtension, Transaction, params};
use whimbrel_api::policy::Policy;
use whimbrel_api::{Name, VmId};

use super::{Fault, Store, StoreError, parsed};

/// Most policies of a pool.
pub const POLICIES_MAX: usize = 256;
/// What the pool's own policy is attached to; no VM's id reads like this.
const POOL: &str = "pool";

/// What a policy can be attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// The pool.
    Pool,
    /// A VM.
    Vm(VmId),
}

impl Subject {
    fn key(self) -> String {
        match self {
            Self::Pool => POOL.to_owned(),
            Self::Vm(id) => id.to_string(),
        }
    }
}

/// What became of a policy that was to be deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyDeleted {
    /// It is gone, now or before.
    Gone,
    /// It is attached to so many VMs, or to the pool.
    Attached {
        /// To the pool.
        pool: bool,
        /// To so many VMs.
        vms: u64,
    },
}

/// What became of a policy that was to be attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attached {
    /// It is.
    Done,
    /// There is no such policy.
    NoPolicy,
}

impl Store {
    /// Writes a policy down, or over the one of its name; `false` if there are too many.
    pub async fn put_policy(&self, policy: &Policy) -> Result<bool, StoreError> {
        let policy = policy.clone();
        self.transact("remember a policy", move |transaction| {
            let others: i64 = transaction.query_row(
                "SELECT count(*) FROM policies WHERE name <> ?1",
                [policy.name.as_str()],
                |row| row.get(0),
            )?;
            if usize::try_from(others).unwrap_or(usize::MAX) >= POLICIES_MAX {
                return Ok(false);
            }
            transaction.execute(
                "INSERT INTO policies (name, definition) VALUES (?1, ?2)
                 ON CONFLICT (name) DO UPDATE SET definition = excluded.definition",
                params![policy.name.as_str(), serde_json::to_string(&policy)?],
            )?;
            Ok(true)
        })
        .await
    }

    /// All policies that are the pool's own, by name.
    pub async fn policies(&self) -> Result<Vec<Policy>, StoreError> {
        self.transact("list the policies", |transaction| {
            let mut query = transaction.prepare("SELECT definition FROM policies ORDER BY name")?;
            let rows = query.query_and_then([], |row| {
                let text: String = row.get(0)?;
                Ok::<Policy, Fault>(serde_json::from_str(&text)?)
            })?;
            rows.collect()
        })
        .await
    }

    /// A policy that is the pool's own.
    pub async fn policy(&self, name: &Name) -> Result<Option<Policy>, StoreError> {
        let name = name.clone();
        self.transact("read a policy", move |transaction| by_name(transaction, &name)).await
    }

    /// Forgets a policy, unless it is attached to something.
    pub async fn delete_policy(&self, name: &Name) -> Result<PolicyDeleted, StoreError> {
        let name = name.clone();
        self.transact("forget a policy", move |transaction| {
            let attached = |sql: &str| {
                transaction.query_row(sql, params![name.as_str(), POOL], |row| row.get::<_, i64>(0))
            };
            let pool = attached(
                "SELECT count(*) FROM attached_policies WHERE policy = ?1 AND subject = ?2",
            )?;
            let vms = attached(
                "SELECT count(*) FROM attached_policies WHERE policy = ?1 AND subject <> ?2",
            )?;
            if pool + vms > 0 {
                let vms = u64::try_from(vms).unwrap_or(0);
                return Ok(PolicyDeleted::Attached { pool: pool > 0, vms });
            }
            transaction.execute("DELETE FROM policies WHERE name = ?1", [name.as_str()])?;
            Ok(PolicyDeleted::Gone)
        })
        .await
    }

    /// Attaches a policy, or takes the attached one away. A name that is not built in has to be that of a policy here.
    pub async fn attach_policy(
        &self,
        subject: Subject,
        policy: Option<&Name>,
    ) -> Result<Attached, StoreError> {
        let (key, policy) = (subject.key(), policy.cloned());
        self.transact("attach a policy", move |transaction| {
            let Some(policy) = policy else {
                transaction.execute("DELETE FROM attached_policies WHERE subject = ?1", [key])?;
                return Ok(Attached::Done);
            };
            let known = Policy::named(policy.as_str()).is_some()
                || by_name(transaction, &policy)?.is_some();
            if !known {
                return Ok(Attached::NoPolicy);
            }
            transaction.execute(
                "INSERT INTO attached_policies (subject, policy) VALUES (?1, ?2)
                 ON CONFLICT (subject) DO UPDATE SET policy = excluded.policy",
                params![key, policy.as_str()],
            )?;
            Ok(Attached::Done)
        })
        .await
    }

    /// The VMs that have a policy of their own, with its name.
    pub async fn policies_of_vms(&self) -> Result<Vec<(VmId, Name)>, StoreError> {
        self.transact("list the attached policies", |transaction| {
            let sql = "SELECT subject, policy FROM attached_policies WHERE subject <> ?1 ORDER BY subject";
            let mut query = transaction.prepare(sql)?;
            let rows = query.query_and_then([POOL], |row| {
                let (vm, policy): (String, String) = (row.get(0)?, row.get(1)?);
                Ok::<_, Fault>((parsed(&vm)?, parsed(&policy)?))
            })?;
            rows.collect()
        })
        .await
    }

    /// The name of the policy that is attached to something.
    pub async fn attached_policy(&self, subject: Subject) -> Result<Option<Name>, StoreError> {
        let key = subject.key();
        self.transact("look for an attached policy", move |transaction| {
            let sql = "SELECT policy FROM attached_policies WHERE subject = ?1";
            let found: Option<String> =
                transaction.query_row(sql, [key], |row| row.get(0)).optional()?;
            found.as_deref().map(parsed::<Name>).transpose()
        })
        .await
    }
}

/// Takes away what is attached to a VM that is forgotten.
pub(super) fn detach_vm(transaction: &Transaction<'_>, vm: VmId) -> Result<(), Fault> {
    let key = Subject::Vm(vm).key();
    transaction.execute("DELETE FROM attached_policies WHERE subject = ?1", [key])?;
    Ok(())
}

fn by_name(transaction: &Transaction<'_>, name: &Name) -> Result<Option<Policy>, Fault> {
    let sql = "SELECT definition FROM policies WHERE name = ?1";
    let text: Option<String> =
        transaction.query_row(sql, [name.as_str()], |row| row.get(0)).optional()?;
    text.map(|text| Ok(serde_json::from_str(&text)?)).transpose()
}
