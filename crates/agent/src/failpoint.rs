//! Failures on order, for tests and the lab: named points at which the agent fails, dies, panics or stands still.
//!
//! Orders stand in the environment (`WHIMBREL_FAILPOINTS`, read once) and in a file (`DIR/failpoints`, read at each
//! point, so that a running agent can be told), one a line or separated by `;`: `NAME=error|panic|exit|stall`, `#`
//! begins a comment. Always compiled: what is tested is what runs. Without the file a point costs one `stat`.
//!
//! | point | before |
//! |---|---|
//! | `ledger.persist` | an ownership record is written |
//! | `vm.start.spawn` | QEMU is spawned |
//! | `vm.start.cont` | the guest is let go |
//! | `vm.spawned` | the new process is noted in the ledger |
//! | `vm.end` | a QEMU is killed |
//! | `vm.take-down` | what was made for a QEMU is removed |
//! | `ledger.saved` | it is written that a VM is saved |
//! | `vm.images.note` | it is written which images a VM has |
//! | `vm.restore.note` | it is written that a restored VM runs |
//! | `vm.restore.cont` | a restored guest is let go |
//!
//! The migration's own points are named in [`crate::migrate`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The variable with orders.
pub const VARIABLE: &str = "WHIMBREL_FAILPOINTS";
/// The file with orders, in the agent's folder.
pub const FILE: &str = "failpoints";
/// Most bytes of the file that are looked at.
const FILE_BYTES_MAX: usize = 4096;
/// How often a stalled point looks whether it still has to, in milliseconds.
const STALL_LOOK_MILLISECONDS: u64 = 50;

/// The orders that this agent may get. Clones share them.
#[derive(Debug, Clone)]
pub struct Failpoints {
    file: PathBuf,
    environment: Arc<str>,
}

/// A point failed because it was told to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("failpoint `{name}` was told to fail")]
pub struct Failed {
    /// The point.
    pub name: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Error,
    Panic,
    Exit,
    Stall,
}

impl Failpoints {
    /// Orders for the agent whose folder is `dir`, the environment's included.
    #[must_use]
    pub fn new(dir: &std::path::Path) -> Self {
        let environment = std::env::var(VARIABLE).unwrap_or_default();
        Self { file: dir.join(FILE), environment: environment.into() }
    }

    /// Passes the point `name`, or does what it was told to do there.
    ///
    /// # Errors
    /// [`Failed`] where the order is `error`.
    ///
    /// # Panics
    /// Where the order is `panic`.
    pub async fn hit(&self, name: &'static str) -> Result<(), Failed> {
        match self.order(name) {
            None => Ok(()),
            Some(Order::Error) => {
                tracing::warn!(name, "failpoint: error");
                Err(Failed { name })
            }
            Some(Order::Panic) => panic!("failpoint `{name}` was told to panic"),
            Some(Order::Exit) => {
                tracing::warn!(name, "failpoint: exit");
                // As `kill -9` would: nothing is flushed, nothing is closed in order.
                let me = rustix::process::getpid();
                let _ = rustix::process::kill_process(me, rustix::process::Signal::KILL);
                std::process::abort()
            }
            Some(Order::Stall) => {
                tracing::warn!(name, "failpoint: stall");
                while self.order(name) == Some(Order::Stall) {
                    tokio::time::sleep(Duration::from_millis(STALL_LOOK_MILLISECONDS)).await;
                }
                Ok(())
            }
        }
    }

    fn order(&self, name: &str) -> Option<Order> {
        // A file that is not there says nothing; what cannot be read says nothing either: this is for tests.
        let text = std::fs::read_to_string(&self.file).unwrap_or_default();
        let bounded = text.get(..FILE_BYTES_MAX).unwrap_or(&text);
        find(bounded, name).or_else(|| find(&self.environment, name))
    }
}

fn find(orders: &str, name: &str) -> Option<Order> {
    if orders.is_empty() {
        return None;
    }
    orders
        .lines()
        .filter_map(|line| line.split('#').next())
        .flat_map(|line| line.split(';'))
        .find_map(|order| {
            let (found, what) = order.split_once('=')?;
            if found.trim() != name {
                return None;
            }
            match what.trim() {
                "error" => Some(Order::Error),
                "panic" => Some(Order::Panic),
                "exit" => Some(Order::Exit),
                "stall" => Some(Order::Stall),
                _ => None,
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read() {
        let orders = "# all of it\n a.b = error ; c=stall\nd=exit # why\ne=nonsense";
        assert_eq!(find(orders, "a.b"), Some(Order::Error));
        assert_eq!(find(orders, "c"), Some(Order::Stall));
        assert_eq!(find(orders, "d"), Some(Order::Exit));
        assert_eq!(find(orders, "e"), None);
        assert_eq!(find(orders, "a"), None);
    }

    #[tokio::test]
    async fn a_running_agent_can_be_told() {
        let dir = tempfile::tempdir().unwrap();
        let points = Failpoints { file: dir.path().join(FILE), environment: "".into() };
        assert_eq!(points.hit("x").await, Ok(()));
        std::fs::write(dir.path().join(FILE), "x=error").unwrap();
        assert_eq!(points.hit("x").await, Err(Failed { name: "x" }));
        assert_eq!(points.hit("y").await, Ok(()));
        std::fs::write(dir.path().join(FILE), "x=stall").unwrap();
        let stalled = tokio::spawn({
            let points = points.clone();
            async move { points.hit("x").await }
        });
        tokio::time::sleep(Duration::from_millis(2 * STALL_LOOK_MILLISECONDS)).await;
        assert!(!stalled.is_finished());
        std::fs::remove_file(dir.path().join(FILE)).unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(20), stalled).await;
        assert_eq!(ended.unwrap().unwrap(), Ok(()));
    }
}
