//! What was measured a moment ago: good enough for the next plan, and forgotten with the process.
//!
//! Nothing here is a record: a restarted controller measures again. Entries are replaced, never corrected, and bounded in
//! number. How old a result may be is said by who asks, for some things change faster than others; what is older than
//! [`KEPT_SECONDS`] is not told any more.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use whimbrel_api::measure::{Census, CpuReport, DirtyMeasure, LinkMeasure};
use whimbrel_api::{Name, VmId};

/// How long a result is kept, in seconds.
pub(super) const KEPT_SECONDS: u64 = 900;
/// Most results of one kind.
const ENTRIES_MAX: usize = 1024;
/// How far back is looked for what a host had to spare, in seconds.
const CPU_SECONDS: u64 = 120;
/// Most looks that are kept of one host.
const CPU_LOOKS_MAX: usize = 32;

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
    pub(super) cpu: Cpus,
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
    /// A result that is no older than so many seconds.
    pub(super) fn get(&self, key: &K, most_seconds: u64) -> Option<Found<T>> {
        let most = Duration::from_secs(most_seconds.min(KEPT_SECONDS));
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(key).filter(|found| found.at.elapsed() < most).cloned()
    }

    /// Forgets a result that was not so.
    pub(super) fn forget(&self, key: &K) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    /// Keeps a result of `age` ago.
    pub(super) fn put(&self, key: K, value: T, age: Duration) -> Found<T> {
        let now = Instant::now();
        let found = Found { at: now.checked_sub(age).unwrap_or(now), value };
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= ENTRIES_MAX {
            let most = Duration::from_secs(KEPT_SECONDS);
            kept.retain(|_, found| found.at.elapsed() < most);
        }
        if kept.len() < ENTRIES_MAX {
            kept.insert(key, found.clone());
        }
        found
    }
}

/// What the processors of hosts had to spare, look by look.
///
/// The most of the last two minutes is what counts: at a single look an earlier migration, or the probe for the next, may
/// have had them, and neither is there when the copy begins. A host that is busy with other things is so all the time.
#[derive(Debug, Default)]
pub(super) struct Cpus(Mutex<HashMap<Name, VecDeque<Found<CpuReport>>>>);

impl Cpus {
    /// The look at which a host had most to spare.
    pub(super) fn best(&self, host: &Name) -> Option<Found<CpuReport>> {
        let looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let recent =
            looks.get(host)?.iter().filter(|look| look.at.elapsed().as_secs() < CPU_SECONDS);
        let spare = |look: &&Found<CpuReport>| look.value.spare.spare_cores;
        recent.max_by(|a, b| spare(a).total_cmp(&spare(b))).cloned()
    }

    /// Notes a look.
    pub(super) fn note(&self, host: Name, value: CpuReport) -> Found<CpuReport> {
        let found = Found { at: Instant::now(), value };
        let mut looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if looks.len() >= ENTRIES_MAX && !looks.contains_key(&host) {
            return found;
        }
        let looks = looks.entry(host).or_default();
        if looks.len() >= CPU_LOOKS_MAX {
            looks.pop_front();
        }
        looks.push_back(found.clone());
        found
    }
}

#[cfg(test)]
mod tests {
    use whimbrel_api::measure::CpuSpare;

    use super::*;

    #[test]
    fn the_idlest_look_counts() {
        let cpus = Cpus::default();
        let host: Name = "host-a".parse().unwrap();
        assert_eq!(cpus.best(&host), None);
        for spare_cores in [0.5, 1.75, 0.0] {
            let spare = CpuSpare { spare_cores, cores: 2 };
            cpus.note(host.clone(), CpuReport { spare, window_ms: 250, boot: String::new() });
        }
        let best = |cpus: &Cpus| cpus.best(&host).unwrap().value.spare.spare_cores;
        assert!((best(&cpus) - 1.75).abs() < f64::EPSILON);
        for _ in 0..CPU_LOOKS_MAX {
            let spare = CpuSpare { spare_cores: 0.25, cores: 2 };
            cpus.note(host.clone(), CpuReport { spare, window_ms: 250, boot: String::new() });
        }
        assert!((best(&cpus) - 0.25).abs() < f64::EPSILON, "earlier ones are forgotten");
    }

    #[test]
    fn what_is_old_is_not_told_and_makes_room() {
        let kept = Kept::<u64, &str>::default();
        kept.put(1, "new", Duration::ZERO);
        assert_eq!(kept.get(&1, 60).unwrap().value, "new");
        kept.put(1, "newer", Duration::ZERO);
        assert_eq!(kept.get(&1, 60).unwrap().value, "newer");
        let old = Duration::from_secs(61);
        let monotonic_can = Instant::now().checked_sub(old).is_some();
        kept.put(2, "old", old);
        assert_eq!(
            kept.get(&2, 60).is_none(),
            monotonic_can,
            "a machine that has just started cannot tell"
        );
        assert_eq!(kept.get(&2, 120).is_some(), monotonic_can, "it is enough for others");
        assert_eq!(kept.get(&3, 60), None);
        kept.forget(&1);
        assert_eq!(kept.get(&1, 60), None);
        for key in 0..2 * ENTRIES_MAX as u64 {
            kept.put(key, "many", Duration::ZERO);
        }
        assert!(kept.0.lock().unwrap().len() <= ENTRIES_MAX);
    }
}
