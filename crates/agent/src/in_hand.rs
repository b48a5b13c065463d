//! What is in somebody's hands on this host: the names, as the journal has them, of what a live task makes, has or takes
//! down.
//!
//! The ledger says what belongs to a VM or to an open migration; what is just being made, or ended, it cannot tell from
//! what was left. So whoever handles such a thing holds its name, and lets go of it by being dropped, on whatever way. The
//! sweep ([`crate::sweep`]) takes only what nobody holds. In memory alone: after a restart nobody holds anything.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use whimbrel_api::{ApiError, ErrorCode};

/// How long somebody who must be alone with a name waits for others to let go, in seconds: the end of a hanging QEMU.
const ALONE_SECONDS: u64 = 15;
/// How often it is looked at meanwhile, in milliseconds.
const ALONE_LOOK_MILLISECONDS: u64 = 20;

/// The names that are held, and by how many.
#[derive(Debug, Clone, Default)]
pub struct InHand {
    names: Arc<Mutex<HashMap<String, usize>>>,
}

/// A name that is held. Clones hold it too.
#[derive(Debug)]
pub struct Hold {
    of: InHand,
    name: String,
}

impl InHand {
    /// Holds a name, as others may.
    #[must_use]
    pub fn hold(&self, name: &str) -> Hold {
        *self.names().entry(name.to_owned()).or_default() += 1;
        Hold { of: self.clone(), name: name.to_owned() }
    }

    /// Holds a name that nobody holds.
    #[must_use]
    pub fn hold_alone(&self, name: &str) -> Option<Hold> {
        match self.names().entry(name.to_owned()) {
            Entry::Occupied(_) => None,
            Entry::Vacant(free) => {
                free.insert(1);
                Some(Hold { of: self.clone(), name: name.to_owned() })
            }
        }
    }

    /// Holds a name once nobody else does.
    ///
    /// # Errors
    /// `busy` where others do not let go in time.
    pub async fn wait_alone(&self, name: &str) -> Result<Hold, ApiError> {
        for _ in 0..ALONE_SECONDS * 1000 / ALONE_LOOK_MILLISECONDS {
            if let Some(hold) = self.hold_alone(name) {
                return Ok(hold);
            }
            tokio::time::sleep(Duration::from_millis(ALONE_LOOK_MILLISECONDS)).await;
        }
        let message = format!("{name} is being made or taken down at this moment");
        Err(ApiError::new(ErrorCode::Busy, message).hint("ask again"))
    }

    fn names(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        // Each change is one call, so the map is whole even after a panic.
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clone for Hold {
    fn clone(&self) -> Self {
        self.of.hold(&self.name)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut names = self.of.names();
        if let Some(holders) = names.get_mut(&self.name) {
            *holders -= 1;
            if *holders == 0 {
                names.remove(&self.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_held_until_the_last_one_lets_go() {
        let in_hand = InHand::default();
        let first = in_hand.hold("run");
        assert!(in_hand.hold_alone("run").is_none());
        assert!(in_hand.hold_alone("other").is_some());
        let second = first.clone();
        drop(first);
        assert!(in_hand.hold_alone("run").is_none());
        drop(second);
        let alone = in_hand.hold_alone("run");
        assert!(alone.is_some() && in_hand.hold_alone("run").is_none());
    }
}
