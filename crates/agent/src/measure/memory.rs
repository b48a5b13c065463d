//! A guest's memory, read from outside while the guest runs on.
//!
//! QEMU's process has the guest's memory as one anonymous mapping, which is found by its size; its pages are read by
//! `process_vm_readv`. A page that the guest has never touched is not there, and reading it would make it: so
//! [`GuestMemory::presence`] asks `/proc/PID/pagemap` first, and what it does not name as there is not read. In post-copy
//! this also keeps the reader from waiting for pages that have not come.
//!
//! It only reads. A page may change while it is read; a sample can bear that.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use whimbrel_migration::forecast::facts::PAGE_BYTES;

/// [`PAGE_BYTES`] as the size of a buffer.
pub(super) const PAGE: usize = PAGE_BYTES as usize;
/// How much larger than the guest's memory its mapping may be, in bytes: QEMU is given a little more under TCG, and rounds
/// sizes up.
const EXTRA_BYTES_MAX: u64 = 64 << 10;
/// Most pages that are asked for in one read: the kernel's own bound of parts (`IOV_MAX`).
pub(super) const READ_PAGES_MAX: usize = 1024;

/// Why a guest's memory was not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    /// The process has ended, or is not ours to look at.
    #[error("the mappings of process {pid} cannot be read")]
    Mappings {
        /// The process.
        pid: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No mapping, or more than one, has the size.
    #[error("process {pid} has {found} mappings of {memory_bytes} bytes, not one")]
    NotFound {
        /// The process.
        pid: u32,
        /// How many there are.
        found: usize,
        /// The size.
        memory_bytes: u64,
    },
    /// Which pages are there cannot be asked.
    #[error("the pages of the guest's memory cannot be asked for")]
    Presence(#[source] io::Error),
    /// The pages cannot be read.
    #[error("the guest's memory cannot be read")]
    Read(#[source] Errno),
    /// A part of it was not there.
    #[error("only {got} of {wanted} bytes of the guest's memory could be read")]
    Short {
        /// Bytes read.
        got: usize,
        /// Bytes wanted.
        wanted: usize,
    },
    /// A compression library failed.
    #[error("sampled pages cannot be compressed")]
    Compress(#[source] io::Error),
}

/// Whether a page is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// It is in memory.
    There,
    /// It was never touched, or given back: it reads as zero.
    Untouched,
    /// It is swapped out; reading would bring it back.
    Swapped,
}

/// A guest's memory.
#[derive(Debug)]
pub(super) struct GuestMemory {
    process: Pid,
    start: u64,
    bytes: u64,
    pagemap: File,
}

impl GuestMemory {
    /// The memory of the guest that process `pid` runs.
    pub(super) fn of(pid: u32, memory_bytes: u64) -> Result<Self, MemoryError> {
        let failed = |source| MemoryError::Mappings { pid, source };
        let mappings = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(failed)?;
        match find(&mappings, memory_bytes)[..] {
            [start] => Self::at(pid, start, memory_bytes),
            ref found => Err(MemoryError::NotFound { pid, found: found.len(), memory_bytes }),
        }
    }

    /// The memory at a known place.
    pub(super) fn at(pid: u32, start: u64, bytes: u64) -> Result<Self, MemoryError> {
        let failed = |source| MemoryError::Mappings { pid, source };
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(failed)?;
        let process = i32::try_from(pid).map_err(|error| failed(io::Error::other(error)))?;
        Ok(Self { process: Pid::from_raw(process), start, bytes, pagemap })
    }

    /// Its size in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its size in pages.
    pub(super) fn pages(&self) -> u64 {
        self.bytes / PAGE_BYTES
    }

    /// Whether the pages from `first` on are there, as many as `into` has room for.
    pub(super) fn presence(&self, first: u64, into: &mut [Presence]) -> Result<(), MemoryError> {
        // Eight bytes for each page (Linux, Documentation/admin-guide/mm/pagemap.rst).
        const ENTRY_BYTES: usize = 8;
        const THERE: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        let mut entries = vec![0; into.len() * ENTRY_BYTES];
        let offset = (self.start / PAGE_BYTES + first) * ENTRY_BYTES as u64;
        self.pagemap.read_exact_at(&mut entries, offset).map_err(MemoryError::Presence)?;
        let entries = entries.as_chunks::<ENTRY_BYTES>().0;
        for (presence, entry) in into.iter_mut().zip(entries) {
            let entry = u64::from_ne_bytes(*entry);
            *presence = match entry {
                _ if entry & THERE != 0 => Presence::There,
                _ if entry & SWAPPED != 0 => Presence::Swapped,
                _ => Presence::Untouched,
            };
        }
        Ok(())
    }

    /// Reads pages, at most [`READ_PAGES_MAX`], one after the other into `buffer`, which becomes as large as they are.
    pub(super) fn read(&self, pages: &[u64], buffer: &mut Vec<u8>) -> Result<(), MemoryError> {
        buffer.resize(pages.len() * PAGE, 0);
        if pages.is_empty() {
            return Ok(());
        }
        let place = |page: &u64| RemoteIoVec {
            base: usize::try_from(self.start + page * PAGE_BYTES).unwrap_or(usize::MAX),
            len: PAGE,
        };
        let places: Vec<RemoteIoVec> = pages.iter().map(place).collect();
        let wanted = buffer.len();
        let mut into = [IoSliceMut::new(buffer)];
        let got = process_vm_readv(self.process, &mut into, &places).map_err(MemoryError::Read)?;
        if got != wanted {
            return Err(MemoryError::Short { got, wanted });
        }
        Ok(())
    }
}

/// Where the mappings that can be a guest's memory begin: private, anonymous, writable and not executable, and of its
/// size. The kernel may show one in several parts (QEMU has given advice on some of it); these follow each other without
/// a gap, and are added up.
fn find(mappings: &str, memory_bytes: u64) -> Vec<u64> {
    let fits = |bytes: u64| (memory_bytes..=memory_bytes + EXTRA_BYTES_MAX).contains(&bytes);
    let parts: Vec<(u64, u64)> = mappings.lines().filter_map(anonymous).collect();
    let mut found: Vec<u64> = Vec::new();
    for (index, (start, _)) in parts.iter().enumerate() {
        let mut end = *start;
        for (next, next_end) in &parts[index..] {
            if *next != end || end - start > memory_bytes + EXTRA_BYTES_MAX {
                break;
            }
            end = *next_end;
            if fits(end - start) {
                found.push(*start);
                break;
            }
        }
    }
    found
}

/// Start and end of the mapping in a line of `/proc/PID/maps`, if it can be of a guest's memory.
fn anonymous(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let private = fields.next()? == "rw-p";
    let named = fields.nth(3).is_some_and(|name| !name.starts_with("[anon:"));
    let number = |text| u64::from_str_radix(text, 16).ok();
    (private && !named).then_some((number(start)?, number(end)?))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Memory of this process that a test fills, at the borders of pages.
    pub(in super::super) struct Own {
        bytes: Vec<u8>,
        offset: usize,
        pages: usize,
    }

    impl Own {
        pub(in super::super) fn new(pages: usize) -> Self {
            // Zeroed memory of this size comes fresh from the kernel: nothing of it is there yet.
            let bytes = vec![0_u8; (pages + 1) * PAGE];
            let offset = bytes.as_ptr().align_offset(PAGE);
            Self { bytes, offset, pages }
        }

        pub(in super::super) fn page(&mut self, page: usize) -> &mut [u8] {
            assert!(page < self.pages);
            &mut self.bytes[self.offset + page * PAGE..][..PAGE]
        }

        pub(in super::super) fn memory(&self) -> GuestMemory {
            let start = self.bytes.as_ptr().addr() + self.offset;
            let bytes = (self.pages * PAGE) as u64;
            GuestMemory::at(std::process::id(), start as u64, bytes).unwrap()
        }
    }

    #[test]
    fn what_was_touched_is_there_and_can_be_read() {
        let mut own = Own::new(4096);
        own.page(1500).fill(7);
        own.page(1502).fill(9);
        let memory = own.memory();
        let mut there = [Presence::There; 5];
        // Huge pages may make neighbours appear, so the untouched one is far away.
        memory.presence(1500, &mut there[..1]).unwrap();
        memory.presence(4000, &mut there[1..2]).unwrap();
        assert_eq!(there[0], Presence::There);
        assert_eq!(there[1], Presence::Untouched);
        let mut buffer = Vec::new();
        memory.read(&[1502, 1500], &mut buffer).unwrap();
        assert!(buffer[..PAGE].iter().all(|byte| *byte == 9));
        assert!(buffer[PAGE..].iter().all(|byte| *byte == 7));
        assert_eq!(buffer.len(), 2 * PAGE);
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let nowhere = GuestMemory::at(std::process::id(), 4096, 1 << 20).unwrap();
        assert!(matches!(nowhere.read(&[0], &mut Vec::new()), Err(MemoryError::Read(_))));
        let gone = GuestMemory::of(u32::MAX, 1 << 20);
        assert!(matches!(gone, Err(MemoryError::Mappings { .. })));
        let none = GuestMemory::of(std::process::id(), 1 << 60);
        assert!(matches!(none, Err(MemoryError::NotFound { found: 0, .. })));
    }

    const MAPS: &str = "\
7f0000000000-7f0004002000 rw-p 00000000 00:00 0 
7f0004002000-7f0004003000 ---p 00000000 00:00 0 
7f1000000000-7f1001000000 rw-p 00000000 00:00 0 
7f1001000000-7f1003000000 rw-p 00000000 00:00 0 [anon:ram]
7f1003000000-7f1008000000 rw-p 00000000 00:00 0 
7f2000000000-7f2008000000 rwxp 00000000 00:00 0 
7f3000000000-7f3008000000 rw-p 00000000 08:01 12 /memfd (deleted)
";

    #[test]
    fn a_guests_memory_is_found_by_its_size() {
        assert_eq!(find(MAPS, 64 << 20), [0x7f00_0000_0000], "8 KiB more");
        assert_eq!(find(MAPS, 128 << 20), [0x7f10_0000_0000], "in three parts");
        assert!(find(MAPS, 256 << 20).is_empty());
        let twice = "1000000-5000000 rw-p 0 0:0 0\n8000000-c000000 rw-p 0 0:0 0\n";
        assert_eq!(find(twice, 64 << 20).len(), 2, "which it is cannot be told");
    }
}
