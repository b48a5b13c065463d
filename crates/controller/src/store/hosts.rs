//! Hosts and the tokens with which they join.

use jiff::Timestamp;
use rusqlite::{OptionalExtension, Row, Transaction, params};
use whimbrel_api::Name;
use whimbrel_pki::token::TokenHash;

use super::{Fault, Store, StoreError, parsed};

/// Longest that an expired token is kept, in seconds: long enough that its owner is told "expired" and not "unknown".
const EXPIRED_TOKEN_KEPT_SECONDS: i64 = 7 * 24 * 60 * 60;

/// A host as the pool remembers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRow {
    /// Its name.
    pub name: Name,
    /// Where its agent listens, `address:port`.
    pub address: String,
    /// Whether it takes new VMs and migrations.
    pub enabled: bool,
    /// Fingerprint of its agent's public key: only the same key may join again under the name.
    pub agent_key: String,
}

/// What became of a join.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JoinOutcome {
    /// The host is a member, and the token is used.
    Admitted,
    /// There is no such token.
    UnknownToken,
    /// The token's time is over.
    Expired,
    /// Another host has used the token.
    Used,
    /// A host with another key has the name.
    NameTaken,
}

impl Store {
    /// Remembers a token by its hash until `expires`.
    pub async fn add_join_token(
        &self,
        hash: TokenHash,
        expires: Timestamp,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        self.transact("remember a join token", move |transaction| {
            transaction.execute(
                "DELETE FROM join_tokens WHERE expires_s < ?1",
                [now.as_second() - EXPIRED_TOKEN_KEPT_SECONDS],
            )?;
            transaction.execute(
                "INSERT INTO join_tokens (hash, expires_s) VALUES (?1, ?2)",
                params![hash.to_string(), expires.as_second()],
            )?;
            Ok(())
        })
        .await
    }

    /// Spends the token and makes `host` a member, or does neither.
    ///
    /// A token admits one host. The same host with the same key may repeat its request until the token expires: the answer to
    /// the first one may have been lost. The token is found by the hash of 256 random bits, so that the time that a look-up
    /// takes tells nothing about any other token.
    pub async fn admit_host(
        &self,
        hash: TokenHash,
        host: HostRow,
        now: Timestamp,
    ) -> Result<JoinOutcome, StoreError> {
        self.transact("admit a host", move |transaction| {
            let hash = hash.to_string();
            if let Some(refusal) = judge_token(transaction, &hash, &host, now)? {
                return Ok(refusal);
            }
            let member: Option<String> = transaction
                .query_row(
                    "SELECT agent_key FROM hosts WHERE name = ?1",
                    [host.name.as_str()],
                    |row| row.get(0),
                )
                .optional()?;
            if member.is_some_and(|key| key != host.agent_key) {
                return Ok(JoinOutcome::NameTaken);
            }
            transaction.execute(
                "UPDATE join_tokens SET used_by = ?2, used_key = ?3 WHERE hash = ?1",
                params![hash, host.name.as_str(), host.agent_key],
            )?;
            transaction.execute(
                "INSERT INTO hosts (name, address, enabled, agent_key) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (name) DO UPDATE SET address = excluded.address",
                params![host.name.as_str(), host.address, host.enabled, host.agent_key],
            )?;
            Ok(JoinOutcome::Admitted)
        })
        .await
    }

    /// All hosts, by name.
    pub async fn hosts(&self) -> Result<Vec<HostRow>, StoreError> {
        self.transact("list the hosts", |transaction| {
            let mut query = transaction
                .prepare("SELECT name, address, enabled, agent_key FROM hosts ORDER BY name")?;
            let rows = query.query_and_then([], host_row)?;
            rows.collect()
        })
        .await
    }

    /// Enables or disables a host; `false` if there is no such host.
    pub async fn enable_host(&self, name: &Name, enabled: bool) -> Result<bool, StoreError> {
        let name = name.clone();
        self.transact("change a host", move |transaction| {
            let changed = transaction.execute(
                "UPDATE hosts SET enabled = ?2 WHERE name = ?1",
                params![name.as_str(), enabled],
            )?;
            Ok(changed > 0)
        })
        .await
    }
}

fn judge_token(
    transaction: &Transaction<'_>,
    hash: &str,
    host: &HostRow,
    now: Timestamp,
) -> Result<Option<JoinOutcome>, Fault> {
    type Columns = (i64, Option<String>, Option<String>);
    let token: Option<Columns> = transaction
        .query_row(
            "SELECT expires_s, used_by, used_key FROM join_tokens WHERE hash = ?1",
            [hash],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )
        .optional()?;
    let Some((expires_s, used_by, used_key)) = token else {
        return Ok(Some(JoinOutcome::UnknownToken));
    };
    if now.as_second() >= expires_s {
        return Ok(Some(JoinOutcome::Expired));
    }
    let same_host = used_by.as_deref() == Some(host.name.as_str())
        && used_key.as_deref() == Some(host.agent_key.as_str());
    Ok((used_by.is_some() && !same_host).then_some(JoinOutcome::Used))
}

fn host_row(row: &Row<'_>) -> Result<HostRow, Fault> {
    Ok(HostRow {
        name: parsed(&row.get::<_, String>(0)?)?,
        address: row.get(1)?,
        enabled: row.get(2)?,
        agent_key: row.get(3)?,
    })
}
