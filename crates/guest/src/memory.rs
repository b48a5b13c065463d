//! Memory with predictable content: filled once, dirtied at a chosen rate, verified all the time.
//!
//! Each page's generation, how often it was dirtied, is kept apart from the page: a page that fell back to an older
//! moment than its generation is found out. Pages of zeroes are never dirtied, so that their share stays as chosen.
//! A page found wrong is counted, kept for the report, and written anew, so that it is counted once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::pattern::{Kind, PAGE_BYTES, Page, Pattern};
use crate::report::{MemoryReport, PageMismatch};
use crate::witness::lock;

/// Pages that share a lock: 1 MiB.
const CHUNK_PAGES: usize = 256;
/// How often the dirtying and the verifying thread wake.
const TICK: Duration = Duration::from_millis(10);
/// At most this much of missed time is caught up after a stall, so that a stall is not followed by a burst.
const CATCH_UP_MAX: Duration = Duration::from_millis(100);
/// Mismatches that are kept in detail.
const MISMATCHES_KEPT_MAX: usize = 16;

struct Chunk {
    pages: Vec<Page>,
    generations: Vec<u32>,
}

/// The filled area.
pub(crate) struct Memory {
    pattern: Pattern,
    chunks: Vec<Mutex<Chunk>>,
    filled_chunks: AtomicUsize,
    dirty_mb_per_s: AtomicU32,
    dirtied_pages: AtomicU64,
    verified_pages: AtomicU64,
    mismatches: AtomicU64,
    first_mismatches: Mutex<Vec<PageMismatch>>,
}

impl Memory {
    /// An area of `mib` MiB, of which nothing is filled yet.
    pub(crate) fn new(pattern: Pattern, mib: u64, dirty_mb_per_s: u32) -> Self {
        let chunks = mib * 1024 * 1024 / PAGE_BYTES / CHUNK_PAGES as u64;
        let empty = || Mutex::new(Chunk { pages: Vec::new(), generations: Vec::new() });
        Self {
            pattern,
            chunks: (0..chunks).map(|_| empty()).collect(),
            filled_chunks: AtomicUsize::new(0),
            dirty_mb_per_s: AtomicU32::new(dirty_mb_per_s),
            dirtied_pages: AtomicU64::new(0),
            verified_pages: AtomicU64::new(0),
            mismatches: AtomicU64::new(0),
            first_mismatches: Mutex::new(Vec::new()),
        }
    }

    /// Fills the whole area; takes about 3 s a GiB under TCG.
    pub(crate) fn fill(&self) {
        for (number, chunk) in self.chunks.iter().enumerate() {
            let mut chunk = lock(chunk);
            chunk.pages = vec![Page::ZERO; CHUNK_PAGES];
            chunk.generations = vec![0; CHUNK_PAGES];
            for (index, page) in chunk.pages.iter_mut().enumerate() {
                self.pattern.content(page_number(number, index), 0).write(page);
            }
            drop(chunk);
            self.filled_chunks.store(number + 1, Ordering::Release);
        }
    }

    pub(crate) fn set_dirty_rate(&self, mb_per_s: u32) {
        self.dirty_mb_per_s.store(mb_per_s, Ordering::Relaxed);
    }

    /// Dirties pages at the rate that is set, one after the other; never returns.
    pub(crate) fn keep_dirtying(&self) -> ! {
        let mut next = 0;
        at_rate(
            || self.dirty_mb_per_s.load(Ordering::Relaxed),
            |pages| next = self.dirty(next, pages),
        )
    }

    /// Verifies pages at a rate, one after the other; never returns.
    pub(crate) fn keep_verifying(&self, mb_per_s: u32) -> ! {
        let mut next = 0;
        at_rate(
            || mb_per_s,
            |pages| {
                for _ in 0..pages.div_ceil(CHUNK_PAGES as u64) {
                    next = self.verify_chunk(next);
                }
            },
        )
    }

    /// Verifies the filled area once.
    pub(crate) fn verify(&self) {
        for chunk in 0..self.filled_chunks.load(Ordering::Acquire) {
            self.verify_chunk(chunk);
        }
    }

    /// Flips a bit of a page that will be verified, and returns its number; none if nothing is filled.
    pub(crate) fn damage(&self) -> Option<u64> {
        let filled = self.filled_chunks.load(Ordering::Acquire);
        let chunk = filled.checked_sub(1)?;
        let index = CHUNK_PAGES / 2;
        lock(&self.chunks[chunk]).pages[index].0[100] ^= 1 << 17;
        Some(page_number(chunk, index))
    }

    pub(crate) fn report(&self) -> MemoryReport {
        let pages = |chunks: usize| (chunks * CHUNK_PAGES) as u64;
        MemoryReport {
            pages: pages(self.chunks.len()),
            filled_pages: pages(self.filled_chunks.load(Ordering::Acquire)),
            dirty_mb_per_s: self.dirty_mb_per_s.load(Ordering::Relaxed),
            dirtied_pages: self.dirtied_pages.load(Ordering::Relaxed),
            verified_pages: self.verified_pages.load(Ordering::Relaxed),
            mismatches: self.mismatches.load(Ordering::Relaxed),
            first_mismatches: lock(&self.first_mismatches).clone(),
        }
    }

    /// Dirties `count` pages from `page` on, round and round, and returns the page to go on with.
    fn dirty(&self, mut page: u64, count: u64) -> u64 {
        let filled = (self.filled_chunks.load(Ordering::Acquire) * CHUNK_PAGES) as u64;
        // Were all pages zero, the loop would never find one to dirty: look at each at most once.
        let (mut left, mut looks) = (count, filled);
        while left > 0 && looks > 0 {
            page %= filled;
            let mut chunk = lock(&self.chunks[page as usize / CHUNK_PAGES]);
            while left > 0 && looks > 0 {
                if self.pattern.kind(page) != Kind::Zero {
                    self.dirty_page(&mut chunk, page);
                    left -= 1;
                }
                looks -= 1;
                page += 1;
                if page.is_multiple_of(CHUNK_PAGES as u64) {
                    break;
                }
            }
        }
        self.dirtied_pages.fetch_add(count - left, Ordering::Relaxed);
        page
    }

    fn dirty_page(&self, chunk: &mut Chunk, page: u64) {
        let index = page as usize % CHUNK_PAGES;
        chunk.generations[index] = chunk.generations[index].wrapping_add(1);
        let content = self.pattern.content(page, chunk.generations[index]);
        content.write_stamp(&mut chunk.pages[index]);
    }

    /// Verifies a chunk, and returns the number of the one to go on with.
    fn verify_chunk(&self, number: usize) -> usize {
        let filled = self.filled_chunks.load(Ordering::Acquire);
        if number >= filled {
            return 0;
        }
        let mut chunk = lock(&self.chunks[number]);
        for index in 0..CHUNK_PAGES {
            self.verify_page(&mut chunk, page_number(number, index), index);
        }
        self.verified_pages.fetch_add(CHUNK_PAGES as u64, Ordering::Relaxed);
        number + 1
    }

    fn verify_page(&self, chunk: &mut Chunk, page: u64, index: usize) {
        let generation = chunk.generations[index];
        let content = self.pattern.content(page, generation);
        let Some(word) = content.first_difference(&chunk.pages[index]) else { return };
        self.mismatches.fetch_add(1, Ordering::Relaxed);
        let mut kept = lock(&self.first_mismatches);
        if kept.len() < MISMATCHES_KEPT_MAX {
            kept.push(PageMismatch {
                page,
                generation,
                offset: word as u32 * 8,
                expected: content.word(word),
                found: chunk.pages[index].0[word],
            });
        }
        drop(kept);
        content.write(&mut chunk.pages[index]);
    }
}

fn page_number(chunk: usize, index: usize) -> u64 {
    (chunk * CHUNK_PAGES + index) as u64
}

/// Calls `work` with the number of pages that are due at a rate in MB/s, which may change at any time; never returns.
fn at_rate(rate_mb_per_s: impl Fn() -> u32, mut work: impl FnMut(u64)) -> ! {
    let mut last = Instant::now();
    let mut due_bytes = 0;
    loop {
        thread::sleep(TICK);
        let now = Instant::now();
        let elapsed = now.duration_since(last).min(CATCH_UP_MAX);
        last = now;
        // MB/s × µs = bytes.
        due_bytes += u64::from(rate_mb_per_s()) * elapsed.as_micros() as u64;
        let pages = due_bytes / PAGE_BYTES;
        due_bytes %= PAGE_BYTES;
        if pages > 0 {
            work(pages);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(zero_percent: u8) -> Memory {
        let memory = Memory::new(Pattern { seed: 1, zero_percent, text_percent: 0 }, 3, 0);
        memory.fill();
        memory
    }

    #[test]
    fn is_faithful_while_it_is_dirtied() {
        let memory = filled(30);
        let mut next = 0;
        for _ in 0..7 {
            next = memory.dirty(next, 200);
            memory.verify();
        }
        let report = memory.report();
        assert_eq!((report.filled_pages, report.pages), (768, 768));
        assert_eq!((report.dirtied_pages, report.mismatches), (1400, 0));
        assert_eq!(report.verified_pages, 7 * 768);
    }

    #[test]
    fn a_damaged_page_is_reported_once() {
        let memory = filled(0);
        let page = memory.damage().unwrap();
        memory.verify();
        memory.verify();
        let report = memory.report();
        assert_eq!(report.mismatches, 1);
        assert_eq!(report.first_mismatches[0].page, page);
        assert_eq!(report.first_mismatches[0].offset, 800);
    }

    #[test]
    fn a_page_from_an_older_moment_is_reported() {
        let memory = filled(0);
        let old = lock(&memory.chunks[1]).pages[3].clone();
        memory.dirty(256, 256);
        lock(&memory.chunks[1]).pages[3] = old;
        memory.verify();
        let report = memory.report();
        assert_eq!(report.mismatches, 1);
        assert_eq!(report.first_mismatches[0].page, 259);
    }

    #[test]
    fn dirtying_ends_where_there_is_nothing_to_dirty() {
        let zeroes = filled(100);
        zeroes.dirty(0, 1000);
        assert_eq!(zeroes.report().dirtied_pages, 0);
        let unfilled = Memory::new(Pattern { seed: 1, zero_percent: 0, text_percent: 0 }, 1, 0);
        assert_eq!(unfilled.dirty(0, 10), 0);
        assert_eq!(unfilled.damage(), None);
    }
}
