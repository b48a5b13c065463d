//! What was measured a moment ago: good enough for the next plan, and forgotten with the process.
//!
//! Nothing here is a record: a restarted controller measures again. Entries are replaced, never corrected, and bounded in
//! number; what is older than [`FRESH_SECONDS`] is not told any more.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use whimbrel_api::measure::{Census, CpuReport, DirtyMeasure, LinkMeasure};
use whimbrel_api::{Name, VmId};

/// How long a result is good enough, in seconds.
pub(crate) const FRESH_SECONDS: u64 = 60;
/// Most results of one kind.
const ENTRIES_MAX: usize = 1024;

/// The results.
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    /// What is in a guest's memory.
    pub(super) census: Kept<VmId, Census>,
    /// How a guest writes.
    pub(super) dirty: Kept<VmId, DirtyMeasure>,
    /// The way from one host to another, through TLS or not.
    pub(super) link: Kept<(Name, Name, bool), LinkMeasure>,
    /// What a host's processors have to spare.
    pub(super) cpu: Kept<Name, CpuReport>,
}

/// A result and when it was measured.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Found<T> {
    pub(super) at: Instant,
    pub(super) value: T,
}

/// The results of one kind.
#[derive(Debug)]
pub(super) struct Kept<K, T>(Mutex<HashMap<K, Found<T>>>);

impl<K, T> Default for Kept<K, T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash, T: Clone> Kept<K, T> {
    /// A result that is fresh.
    pub(super) fn get(&self, key: &K) -> Option<Found<T>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(key).filter(|found| is_fresh(found)).cloned()
    }

    /// Keeps a result of `age` ago.
    pub(super) fn put(&self, key: K, value: T, age: Duration) -> Found<T> {
        let now = Instant::now();
        let found = Found { at: now.checked_sub(age).unwrap_or(now), value };
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= ENTRIES_MAX {
            kept.retain(|_, found| is_fresh(found));
        }
        if kept.len() < ENTRIES_MAX {
            kept.insert(key, found.clone());
        }
        found
    }
}

fn is_fresh<T>(found: &Found<T>) -> bool {
    found.at.elapsed() < Duration::from_secs(FRESH_SECONDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_old_is_not_told_and_makes_room() {
        let kept = Kept::<u64, &str>::default();
        kept.put(1, "new", Duration::ZERO);
        assert_eq!(kept.get(&1).unwrap().value, "new");
        kept.put(1, "newer", Duration::ZERO);
        assert_eq!(kept.get(&1).unwrap().value, "newer");
        let old = Duration::from_secs(FRESH_SECONDS + 1);
        let monotonic_can = Instant::now().checked_sub(old).is_some();
        kept.put(2, "old", old);
        assert_eq!(
            kept.get(&2).is_none(),
            monotonic_can,
            "a machine that has just started cannot tell"
        );
        assert_eq!(kept.get(&3), None);
        for key in 0..2 * ENTRIES_MAX as u64 {
            kept.put(key, "many", Duration::ZERO);
        }
        assert!(kept.0.lock().unwrap().len() <= ENTRIES_MAX);
    }
}
