//! The journal on the disk: a ring of records, each durable before the next, which are verified by reading the disk.
//!
//! A record is a whole page whose content follows from the seed and its number. Record n stands in slot n mod slots, so
//! what each slot must hold follows from the last acknowledged number alone: an acknowledged write that is lost, stale or
//! misplaced shows. The disk is opened with O_DIRECT, so that verification asks the disk and not the guest's cache, and
//! with O_DSYNC, so that an append returns when the record is durable.
//!
//! The record after the last acknowledged one may be torn by a crash, and its slot may hold anything. A disk that holds
//! something else than a journal is left alone.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::pattern::{PAGE_BYTES, Page, mix};
use crate::report::DiskReport;
use crate::witness::lock;

/// The ring is 16 MiB, or the whole disk if that is smaller.
const SLOTS_MAX: u64 = 4096;
/// The first word of every record.
const MAGIC: u64 = u64::from_le_bytes(*b"whimbrel");
/// How often the whole journal is verified in the background.
const VERIFY_PERIOD: Duration = Duration::from_secs(30);
/// Slots that are read in one go: 256 KiB.
const RUN_SLOTS: usize = 64;
/// The pause of an appender whose rate is 0.
const IDLE: Duration = Duration::from_millis(100);
/// Slots found wrong that are reported by number.
const MISMATCHES_KEPT_MAX: usize = 16;

/// The journal could not be used.
#[derive(Debug)]
pub(crate) enum DiskError {
    Open(io::Error),
    Scan(io::Error),
    /// Smaller than two records.
    TooSmall,
    /// Holds data of somebody else.
    Foreign,
}

impl std::fmt::Display for DiskError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Open(error) => write!(f, "the disk cannot be opened: {error}"),
            Self::Scan(error) => write!(f, "the disk cannot be read: {error}"),
            Self::TooSmall => f.write_str("the disk is too small for a journal"),
            Self::Foreign => {
                f.write_str("the disk holds something else than a journal, and is left alone")
            }
        }
    }
}

/// How the file is opened.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caching {
    /// Every access reaches the disk.
    Direct,
    /// Through the cache: for tests on file systems without O_DIRECT.
    #[cfg(test)]
    Cached,
}

/// The journal.
pub(crate) struct Disk {
    file: File,
    seed: u64,
    slots: u64,
    /// Held while a slot is written or read, so that a record is never verified half-written.
    access: Mutex<()>,
    acknowledged: AtomicU64,
    records_per_s: AtomicU32,
    verified_records: AtomicU64,
    bad_slots: Mutex<BTreeSet<u64>>,
    mismatches: AtomicU64,
    io_errors: AtomicU64,
    longest_append_us: AtomicU64,
}

impl Disk {
    /// Opens the disk and finds the end of its journal, verifying it on the way.
    pub(crate) fn open(
        path: &Path,
        seed: u64,
        records_per_s: u32,
        caching: Caching,
    ) -> Result<Self, DiskError> {
        let direct = if caching == Caching::Direct { OFlags::DIRECT } else { OFlags::empty() };
        let flags = (OFlags::DSYNC | direct).bits() as i32;
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
            .map_err(DiskError::Open)?;
        let bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0)).map_err(DiskError::Open)?;
        let slots = (bytes / PAGE_BYTES).min(SLOTS_MAX);
        if slots < 2 {
            return Err(DiskError::TooSmall);
        }
        let disk = Self {
            file,
            seed,
            slots,
            access: Mutex::new(()),
            acknowledged: AtomicU64::new(0),
            records_per_s: AtomicU32::new(records_per_s),
            verified_records: AtomicU64::new(0),
            bad_slots: Mutex::new(BTreeSet::new()),
            mismatches: AtomicU64::new(0),
            io_errors: AtomicU64::new(0),
            longest_append_us: AtomicU64::new(0),
        };
        disk.acknowledged.store(disk.find_end()?, Ordering::Relaxed);
        disk.verify();
        Ok(disk)
    }

    pub(crate) fn set_rate(&self, records_per_s: u32) {
        self.records_per_s.store(records_per_s, Ordering::Relaxed);
    }

    pub(crate) fn reset_peaks(&self) {
        self.longest_append_us.store(0, Ordering::Relaxed);
    }

    /// Appends at the rate that is set; never returns.
    pub(crate) fn keep_appending(&self) -> ! {
        loop {
            match self.records_per_s.load(Ordering::Relaxed) {
                0 => thread::sleep(IDLE),
                rate => {
                    let began = Instant::now();
                    self.append();
                    let period = Duration::from_secs(1) / rate;
                    thread::sleep(period.saturating_sub(began.elapsed()));
                }
            }
        }
    }

    /// Verifies the whole journal every [`VERIFY_PERIOD`]; never returns.
    pub(crate) fn keep_verifying(&self) -> ! {
        loop {
            thread::sleep(VERIFY_PERIOD);
            self.verify();
        }
    }

    /// Reads every slot that has been acknowledged, and counts those that hold something else.
    pub(crate) fn verify(&self) {
        for first in (0..self.slots).step_by(RUN_SLOTS) {
            // Held for the whole run, as an append changes what its slot must hold.
            let _held = lock(&self.access);
            let Ok(run) = self.read_run(first) else {
                self.io_errors.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            for (slot, page) in (first..).zip(run) {
                let Some(number) = self.due_in(slot) else { continue };
                if page.0 != self.record(number).0 {
                    self.count_mismatch(slot);
                }
                self.verified_records.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Flips a bit of the last acknowledged record on the disk, and returns its slot; none if there is no record yet, or
    /// the disk refuses.
    pub(crate) fn damage(&self) -> Option<u64> {
        let _held = lock(&self.access);
        let slot = match self.acknowledged.load(Ordering::Relaxed) {
            0 => return None,
            number => number % self.slots,
        };
        let mut page = self.read(slot).ok()?;
        page.0[100] ^= 1 << 17;
        self.write(slot, &page).ok()?;
        Some(slot)
    }

    pub(crate) fn report(&self) -> DiskReport {
        let bad_slots = lock(&self.bad_slots).clone();
        DiskReport {
            slots: self.slots,
            records_per_s: self.records_per_s.load(Ordering::Relaxed),
            acknowledged: self.acknowledged.load(Ordering::Relaxed),
            verified_records: self.verified_records.load(Ordering::Relaxed),
            mismatches: self.mismatches.load(Ordering::Relaxed),
            first_mismatches: bad_slots.into_iter().take(MISMATCHES_KEPT_MAX).collect(),
            io_errors: self.io_errors.load(Ordering::Relaxed),
            longest_append_us: self.longest_append_us.load(Ordering::Relaxed),
        }
    }

    fn append(&self) {
        let _held = lock(&self.access);
        let number = self.acknowledged.load(Ordering::Relaxed) + 1;
        let slot = number % self.slots;
        let began = Instant::now();
        match self.write(slot, &self.record(number)) {
            Ok(()) => {
                self.acknowledged.store(number, Ordering::Relaxed);
                lock(&self.bad_slots).remove(&slot);
                let took_us = began.elapsed().as_micros() as u64;
                self.longest_append_us.fetch_max(took_us, Ordering::Relaxed);
            }
            Err(_) => {
                self.io_errors.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// The number of the last record in the journal, 0 if the disk is blank.
    fn find_end(&self) -> Result<u64, DiskError> {
        let (mut last, mut foreign) = (0, 0);
        for first in (0..self.slots).step_by(RUN_SLOTS) {
            let run = self.read_run(first).map_err(DiskError::Scan)?;
            for (slot, page) in (first..).zip(run) {
                let number = page.0[1];
                let in_place = number > 0 && number % self.slots == slot;
                if in_place && page.0 == self.record(number).0 {
                    last = last.max(number);
                } else if page.0 != Page::ZERO.0 {
                    foreign += 1;
                }
            }
        }
        // A single strange slot in an else blank ring is a first record that a crash tore.
        if last == 0 && foreign > 1 { Err(DiskError::Foreign) } else { Ok(last) }
    }

    /// The number of the record that a slot must hold; none if it was never written.
    fn due_in(&self, slot: u64) -> Option<u64> {
        let last = self.acknowledged.load(Ordering::Relaxed);
        let behind = (last % self.slots + self.slots - slot) % self.slots;
        let number = last.checked_sub(behind).filter(|number| *number > 0)?;
        // The oldest record's slot is where the next one was being written when a crash came.
        (behind < self.slots - 1).then_some(number)
    }

    fn count_mismatch(&self, slot: u64) {
        if lock(&self.bad_slots).insert(slot) {
            self.mismatches.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn record(&self, number: u64) -> Page {
        let mut page = Page::ZERO;
        let key = mix(mix(self.seed) ^ number);
        for (index, word) in page.0.iter_mut().enumerate() {
            *word = mix(key.wrapping_add(index as u64));
        }
        page.0[0] = MAGIC;
        page.0[1] = number;
        page
    }

    /// The pages from `first` on, up to [`RUN_SLOTS`] of them.
    fn read_run(&self, first: u64) -> io::Result<Vec<Page>> {
        let count = (self.slots - first).min(RUN_SLOTS as u64);
        let mut run = Box::new(Aligned([0; RUN_SLOTS * PAGE_BYTES as usize]));
        let bytes = &mut run.0[..(count * PAGE_BYTES) as usize];
        self.file.read_exact_at(bytes, first * PAGE_BYTES)?;
        Ok(bytes.chunks_exact(PAGE_BYTES as usize).map(page_of).collect())
    }

    fn read(&self, slot: u64) -> io::Result<Page> {
        let mut bytes = Aligned([0; PAGE_BYTES as usize]);
        self.file.read_exact_at(&mut bytes.0, slot * PAGE_BYTES)?;
        Ok(page_of(&bytes.0))
    }

    fn write(&self, slot: u64, page: &Page) -> io::Result<()> {
        let mut bytes = Aligned([0; PAGE_BYTES as usize]);
        for (place, word) in bytes.0.chunks_exact_mut(8).zip(page.0) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        self.file.write_all_at(&bytes.0, slot * PAGE_BYTES)
    }
}

/// Bytes of the disk, aligned as O_DIRECT wants them.
#[repr(C, align(4096))]
struct Aligned<const BYTES: usize>([u8; BYTES]);

/// The page that stands in a page's bytes.
fn page_of(bytes: &[u8]) -> Page {
    let mut page = Page::ZERO;
    let (words, _) = bytes.as_chunks::<8>();
    for (word, bytes) in page.0.iter_mut().zip(words) {
        *word = u64::from_le_bytes(*bytes);
    }
    page
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A disk image that is removed with its test.
    struct Image(PathBuf);

    impl Image {
        fn new(name: &str, bytes: &[u8]) -> Self {
            let path =
                std::env::temp_dir().join(format!("whimbrel-guest-{}-{name}", std::process::id()));
            std::fs::write(&path, bytes).unwrap();
            Self(path)
        }

        fn blank(name: &str, slots: usize) -> Self {
            Self::new(name, &vec![0; slots * PAGE_BYTES as usize])
        }

        fn open(&self) -> Result<Disk, DiskError> {
            Disk::open(&self.0, 5, 0, Caching::Cached)
        }

        fn append(&self, count: usize) -> Disk {
            let disk = self.open().unwrap();
            (0..count).for_each(|_| disk.append());
            disk
        }
    }

    impl Drop for Image {
        fn drop(&mut self) {
            std::fs::remove_file(&self.0).unwrap();
        }
    }

    #[test]
    fn goes_on_where_it_ended() {
        let image = Image::blank("goes-on", 16);
        for round in 1..6 {
            let disk = image.append(7);
            disk.verify();
            let report = disk.report();
            assert_eq!((report.acknowledged, report.mismatches), (round * 7, 0));
        }
    }

    #[test]
    fn a_damaged_record_is_reported_once_and_heals_when_it_is_overwritten() {
        let image = Image::blank("damaged", 8);
        let disk = image.append(20);
        let slot = disk.damage().unwrap();
        disk.verify();
        disk.verify();
        assert_eq!((disk.report().mismatches, disk.report().first_mismatches), (1, vec![slot]));
        (0..8).for_each(|_| disk.append());
        disk.verify();
        assert_eq!((disk.report().mismatches, disk.report().first_mismatches), (1, vec![]));
    }

    #[test]
    fn a_lost_acknowledged_record_is_reported() {
        let image = Image::blank("lost", 8);
        let disk = image.append(20);
        disk.write(18 % 8, &disk.record(10)).unwrap();
        disk.verify();
        assert_eq!(disk.report().first_mismatches, vec![2]);
        // Found at the next boot, too.
        assert_eq!(image.open().unwrap().report().first_mismatches, vec![2]);
    }

    #[test]
    fn a_misplaced_record_is_no_end_of_the_journal() {
        let image = Image::blank("misplaced", 8);
        let disk = image.append(20);
        disk.write(1, &disk.record(90)).unwrap();
        let report = image.open().unwrap().report();
        assert_eq!((report.acknowledged, report.first_mismatches), (20, vec![1]));
    }

    #[test]
    fn a_record_torn_by_a_crash_is_no_mismatch() {
        let image = Image::blank("torn", 8);
        for acknowledged in [0, 3, 20] {
            let disk = image.append(acknowledged);
            let next = disk.acknowledged.load(Ordering::Relaxed) + 1;
            let mut torn = disk.record(next);
            torn.0[300..].fill(0);
            disk.write(next % 8, &torn).unwrap();
            let disk = image.append(1);
            disk.verify();
            assert_eq!((disk.report().acknowledged, disk.report().mismatches), (next, 0));
        }
    }

    #[test]
    fn a_disk_of_somebody_else_is_left_alone() {
        let content = vec![7; 16 * PAGE_BYTES as usize];
        let image = Image::new("foreign", &content);
        assert!(matches!(image.open(), Err(DiskError::Foreign)));
        let other_guest = Image::blank("other", 16);
        drop(other_guest.append(5));
        assert!(matches!(
            Disk::open(&other_guest.0, 6, 0, Caching::Cached),
            Err(DiskError::Foreign)
        ));
        assert_eq!(std::fs::read(&image.0).unwrap(), content);
        assert!(matches!(Image::blank("small", 1).open(), Err(DiskError::TooSmall)));
    }
}
