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
    let (mut watch, first) = timed(first).await?;
    let mut curve = Vec::with_capacity(request.windows_ms.len());
    for window_ms in &request.windows_ms {
        sleep_until(begun + Duration::from_millis(*window_ms)).await;
        let look = blocking(move || {
            watch.look()?;
            Ok(watch)
        });
        let (looked, at) = timed(look).await?;
        watch = looked;
        let window = u64::try_from((at - first).as_millis()).unwrap_or(u64::MAX);
        curve.push(point(window, watch.changed, watch.pages.len()));
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

/// What came out, and when: in the middle between beginning and end, since the first page was looked at then and the last
/// one now.
async fn timed<T>(
    look: impl Future<Output = Result<T, ApiError>>,
) -> Result<(T, Instant), ApiError> {
    let begun = Instant::now();
    let outcome = look.await?;
    Ok((outcome, begun + begun.elapsed() / 2))
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
    /// What each page held at first, hashed; none once it has changed.
    pages: Vec<(u64, Option<u64>)>,
    hasher: RandomState,
    changed: usize,
    /// Processor time that the looks have taken.
    cpu: Duration,
}

impl Watch {
    fn begin(memory: GuestMemory, sample_pages: u64, dice: &mut Dice) -> Result<Self, MemoryError> {
        let sample = spread(memory.pages(), sample_pages, dice);
        let mut watch = Self {
            memory,
            pages: Vec::new(),
            hasher: RandomState::new(),
            changed: 0,
            cpu: Duration::ZERO,
        };
        // What is swapped out is hardly being written; bringing it back would disturb more than it tells.
        let mut pages = Vec::with_capacity(sample.len());
        watch.hashes(&sample, |page, hash| pages.push((page, Some(hash))))?;
        watch.pages = pages;
        Ok(watch)
    }

    /// Compares what has not changed yet.
    fn look(&mut self) -> Result<(), MemoryError> {
        let unchanged: Vec<u64> =
            self.pages.iter().filter(|page| page.1.is_some()).map(|page| page.0).collect();
        let mut now = Vec::with_capacity(unchanged.len());
        self.hashes(&unchanged, |page, hash| now.push((page, hash)))?;
        let mut now = now.into_iter().peekable();
        // Both rise by page; a page that is swapped out by now is missing, and has not changed as far as is known.
        for (page, held) in &mut self.pages {
            let Some((_, hash)) = now.next_if(|(found, _)| found == page) else { continue };
            if *held != Some(hash) {
                *held = None;
                self.changed += 1;
            }
        }
        Ok(())
    }

    /// What pages hold, hashed, in their order and without those that are swapped out.
    fn hashes(
        &mut self,
        pages: &[u64],
        mut found: impl FnMut(u64, u64),
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
            let mut held = buffer.chunks_exact(PAGE);
            for (page, presence) in with() {
                match presence {
                    Presence::There => {
                        found(page, held.next().map_or(nothing, |held| self.hasher.hash_one(held)));
                    }
                    Presence::Untouched => found(page, nothing),
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
