//! How many different pages a guest writes in windows of different length: sampled pages are read again and again from
//! outside, and compared with what they held first.
//!
//! QEMU's own measuring gives one figure for one window, and a guest that writes the same pages again and again is told from
//! one that always writes new ones only by several. Once a page has changed it counts in all longer windows, whatever it
//! holds then. What is not seen: a page that was written with what it held, and one that was changed and changed back
//! between two looks. So the figures are a lower bound, as those of QEMU's page sampling are; by dirty bitmap, which KVM
//! can, QEMU sees all writes, and the larger figure is the better one.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use whimbrel_api::ApiError;
use whimbrel_api::measure::{
    DirtyCurveReport, DirtyCurveRequest, DirtyMeasure, DirtyPoint, DirtyWindow,
};

use super::memory::{GuestMemory, MemoryError, PAGE, Presence};
use super::sample::{Dice, spread};
use super::{blocking, cpu};

/// Pages that are read at a time: 1 MiB, so that a look needs little memory.
const CHUNK_PAGES: usize = 256;

/// Looks at the memory at the beginning and at the end of each window.
pub(super) async fn measure(
    memory: GuestMemory,
    request: &DirtyCurveRequest,
    pid: u32,
    vcpus: u32,
) -> Result<DirtyCurveReport, ApiError> {
    let sample_pages = u64::from(request.sample_pages);
    let memory_bytes = memory.bytes();
    let (begun, busy_before) = (Instant::now(), cpu::of_process(pid));
    let first = blocking(move || Watch::begin(memory, sample_pages, &mut Dice::new()));
    let mut watch = first.await?;
    let mut curve = Vec::with_capacity(request.windows_ms.len());
    for window_ms in &request.windows_ms {
        sleep_until(begun + Duration::from_millis(*window_ms)).await;
        let look = blocking(move || {
            let window = watch.look()?;
            Ok((watch, window))
        });
        let (looked, window) = look.await?;
        watch = looked;
        let window_ms = u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
        curve.push(point(window_ms, watch.changed, watch.pages.len()));
    }
    let windows = curve.iter().map(|point| DirtyWindow {
        window_ms: point.window_ms,
        dirtied_bytes: (point.share_changed * memory_bytes as f64) as u64,
    });
    let busy = busy_before.zip(cpu::of_process(pid));
    let busy = busy.map_or(Duration::ZERO, |(before, after)| after.saturating_sub(before));
    // QEMU's other threads have next to nothing to do while no migration goes on.
    let share = busy.as_secs_f64() / (begun.elapsed().as_secs_f64() * f64::from(vcpus.max(1)));
    Ok(DirtyCurveReport {
        measure: DirtyMeasure { windows: windows.collect(), vcpu_busy_share: share.min(1.0) },
        curve,
        sampled_pages: watch.pages.len() as u64,
        memory_bytes,
        cpu_ms: u64::try_from(watch.cpu.as_millis()).unwrap_or(u64::MAX),
    })
}

fn point(window_ms: u64, changed: usize, sampled: usize) -> DirtyPoint {
    let (hits, all) = (changed as f64, sampled.max(1) as f64);
    // One hit and one miss more than seen (after Laplace): nothing seen is not nothing for sure.
    let likely = (hits + 1.0) / (all + 2.0);
    DirtyPoint {
        window_ms,
        changed_pages: changed as u64,
        share_changed: hits / all,
        share_error: f64::sqrt(likely * (1.0 - likely) / all),
    }
}

/// Sampled pages that are watched.
struct Watch {
    memory: GuestMemory,
    /// Rising by page.
    pages: Vec<Watched>,
    hasher: RandomState,
    changed: usize,
    /// Processor time that the looks have taken.
    cpu: Duration,
}

struct Watched {
    page: u64,
    /// What it held at first, hashed; none once it has changed.
    held: Option<u64>,
    /// When it held that.
    since: Instant,
}

impl Watch {
    fn begin(memory: GuestMemory, sample_pages: u64, dice: &mut Dice) -> Result<Self, MemoryError> {
        let sample = spread(memory.pages(), sample_pages, dice);
        let (hasher, cpu) = (RandomState::new(), Duration::ZERO);
        let mut watch = Self { memory, pages: Vec::new(), hasher, changed: 0, cpu };
        // What is swapped out is hardly being written; bringing it back would disturb more than it tells.
        let mut pages = Vec::with_capacity(sample.len());
        watch.hashes(&sample, |page, hash, since| {
            pages.push(Watched { page, held: Some(hash), since });
        })?;
        watch.pages = pages;
        Ok(watch)
    }

    /// Compares what has not changed yet. Says how long after the first look a page was looked at, in the mean: on a busy
    /// host a look takes its time.
    fn look(&mut self) -> Result<Duration, MemoryError> {
        let unchanged = self.pages.iter().filter(|watched| watched.held.is_some());
        let unchanged: Vec<u64> = unchanged.map(|watched| watched.page).collect();
        let mut now = Vec::with_capacity(unchanged.len());
        self.hashes(&unchanged, |page, hash, at| now.push((page, hash, at)))?;
        let (mut looked_at, mut waited) = (0, Duration::ZERO);
        let mut now = now.into_iter().peekable();
        for watched in &mut self.pages {
            // A page that is swapped out by now is missing, and has not changed as far as is known.
            let Some((_, hash, at)) = now.next_if(|found| found.0 == watched.page) else {
                continue;
            };
            looked_at += 1;
            waited += at - watched.since;
            if watched.held != Some(hash) {
                watched.held = None;
                self.changed += 1;
            }
        }
        // Where all had changed before, there was nothing to look at.
        let since = |watched: &Watched| watched.since.elapsed();
        let window = waited.checked_div(looked_at);
        Ok(window.or_else(|| self.pages.first().map(since)).unwrap_or_default())
    }

    /// What pages hold, hashed, and when; in their order and without those that are swapped out.
    fn hashes(
        &mut self,
        pages: &[u64],
        mut found: impl FnMut(u64, u64, Instant),
    ) -> Result<(), MemoryError> {
        let begun = cpu::of_this_thread();
        let nothing = self.hasher.hash_one([0_u8; PAGE].as_slice());
        let mut buffer = Vec::new();
        for chunk in pages.chunks(CHUNK_PAGES) {
            let mut presence = vec![Presence::There; chunk.len()];
            for (page, presence) in chunk.iter().zip(&mut presence) {
                self.memory.presence(*page, std::slice::from_mut(presence))?;
            }
            let with = || chunk.iter().copied().zip(presence.iter().copied());
            let there: Vec<u64> =
                with().filter(|page| page.1 == Presence::There).map(|page| page.0).collect();
            self.memory.read(&there, &mut buffer)?;
            let now = Instant::now();
            let mut held = buffer.chunks_exact(PAGE);
            for (page, presence) in with() {
                match presence {
                    Presence::There => {
                        let held = held.next();
                        let hash = held.map_or(nothing, |held| self.hasher.hash_one(held));
                        found(page, hash, now);
                    }
                    Presence::Untouched => found(page, nothing, now),
                    Presence::Swapped => {}
                }
            }
        }
        self.cpu += cpu::of_this_thread().saturating_sub(begun);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::tests::Own;
    use super::*;

    #[test]
    fn what_changes_counts_once_and_stays_counted() {
        let mut own = Own::new(1000);
        for page in 0..500 {
            own.page(page).fill(1);
        }
        let mut watch = Watch::begin(own.memory(), 1000, &mut Dice::seeded(1)).unwrap();
        assert_eq!(watch.pages.len(), 1000);
        watch.look().unwrap();
        assert_eq!(watch.changed, 0);
        for page in 0..200 {
            own.page(page)[4095] = 2;
        }
        for page in 600..650 {
            own.page(page)[0] = 3;
        }
        watch.look().unwrap();
        assert_eq!(watch.changed, 250);
        for page in 0..200 {
            own.page(page)[4095] = 1;
        }
        own.page(900)[17] = 1;
        watch.look().unwrap();
        assert_eq!(watch.changed, 251, "what was changed back had been written all the same");
    }

    #[test]
    fn a_sample_tells_the_share() {
        let mut own = Own::new(8192);
        let mut watch = Watch::begin(own.memory(), 1024, &mut Dice::seeded(2)).unwrap();
        for page in 1000..3048 {
            own.page(page)[5] = 1;
        }
        watch.look().unwrap();
        assert_eq!(watch.pages.len(), 1024);
        assert!((254..=258).contains(&watch.changed), "a quarter, in one piece: {}", watch.changed);
    }

    #[tokio::test]
    async fn windows_are_told_as_bytes() {
        let own = Own::new(512);
        let request = DirtyCurveRequest { windows_ms: vec![50, 60], sample_pages: 64 };
        let report = measure(own.memory(), &request, std::process::id(), 1).await.unwrap();
        assert_eq!((report.sampled_pages, report.memory_bytes), (64, 512 * 4096));
        let windows = report.measure.windows;
        assert!(windows.len() == 2 && windows[0].window_ms < windows[1].window_ms);
        assert!(windows.iter().all(|window| window.dirtied_bytes == 0));
        assert!(report.curve.iter().all(|point| point.share_error > 0.0));
    }
}
