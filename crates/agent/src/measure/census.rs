//! What is in a guest's memory: how much is zero, how much is there twice, what compression makes of the rest.
//!
//! Runs of neighbouring pages are sampled, in an order of chance, so that a census that reaches its bound of processor time
//! has still looked everywhere. Pages are compressed as QEMU's channels do it (7.2, 10.0): one stream for all, flushed
//! after each packet of [`PACKET_PAGES`], zero pages left out; so what one page has in common with its neighbours
//! counts here as there. zlib is the classic one, as in Debian's QEMU; a faster one would promise too much.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io;
use std::time::Duration;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use whimbrel_api::measure::{Census, CensusReport, CompressionSample};
use whimbrel_migration::options::CompressionMethod;
use zstd::stream::raw::{Decoder, Encoder, InBuffer, Operation, OutBuffer};

use super::cpu;
use super::memory::{GuestMemory, MemoryError, PAGE, Presence, READ_PAGES_MAX};
use super::sample::{Dice, shuffle, spread};

/// Neighbouring pages that are looked at together: zlib looks back over 32 KiB.
const RUN_PAGES: usize = 8;
/// Pages that QEMU's channels compress at a time: 512 KiB.
const PACKET_PAGES: usize = 128;
/// Processor time of a census, in milliseconds; beyond it no further packet is looked at.
const CPU_MS_MAX: u64 = 300;
/// Of this, what compression may take, in milliseconds.
const COMPRESS_CPU_MS_MAX: u64 = 200;
/// The level of both methods: QEMU's default.
const LEVEL: u8 = 1;

/// Looks at up to `sample_pages` pages.
pub(super) fn take(
    memory: &GuestMemory,
    sample_pages: u32,
    dice: &mut Dice,
) -> Result<CensusReport, MemoryError> {
    let begun = cpu::of_this_thread();
    let spent = || cpu::of_this_thread().saturating_sub(begun);
    let runs_wanted = u64::from(sample_pages) / RUN_PAGES as u64;
    let mut runs = spread(memory.pages() / RUN_PAGES as u64, runs_wanted, dice);
    shuffle(&mut runs, dice);
    let mut counted = Counted::default();
    let mut methods = [Squeezed::new(Method::zlib()), Squeezed::new(Method::zstd()?)];
    let mut compressed_pages = 0;
    let mut buffer = Vec::new();
    for packet in runs.chunks(PACKET_PAGES / RUN_PAGES) {
        if spent() > Duration::from_millis(CPU_MS_MAX) {
            break;
        }
        let mut plain = Vec::new();
        counted.look(memory, packet, &mut buffer, &mut plain)?;
        let compressing: Duration = methods.iter().map(Squeezed::spent).sum();
        if !plain.is_empty() && compressing < Duration::from_millis(COMPRESS_CPU_MS_MAX) {
            compressed_pages += (plain.len() / PAGE) as u64;
            for method in &mut methods {
                method.squeeze(&plain).map_err(MemoryError::Compress)?;
            }
        }
    }
    let samples = methods.iter().filter_map(Squeezed::sample).collect();
    Ok(CensusReport {
        zero_share_error: counted.zero_share_error(),
        untouched_pages: counted.untouched,
        swapped_pages: counted.swapped,
        compressed_pages,
        memory_bytes: memory.bytes(),
        cpu_ms: u64::try_from(spent().as_millis()).unwrap_or(u64::MAX),
        census: counted.census(samples),
    })
}

/// What the pages so far were.
#[derive(Default)]
struct Counted {
    sampled: u64,
    zero: u64,
    untouched: u64,
    swapped: u64,
    /// How often each content was there, hashed.
    contents: HashMap<u64, u64>,
    hasher: RandomState,
    /// The share of zero pages of each run.
    zero_shares: Vec<f64>,
}

impl Counted {
    /// Looks at some runs, and adds to `plain` the pages that are not zero.
    fn look(
        &mut self,
        memory: &GuestMemory,
        runs: &[u64],
        buffer: &mut Vec<u8>,
        plain: &mut Vec<u8>,
    ) -> Result<(), MemoryError> {
        const { assert!(PACKET_PAGES <= READ_PAGES_MAX) };
        let mut there = Vec::with_capacity(runs.len() * RUN_PAGES);
        // Of each run: how many of its pages are read, and how many are zero for sure.
        let mut parts = Vec::with_capacity(runs.len());
        for run in runs {
            let first = run * RUN_PAGES as u64;
            let mut presence = [Presence::There; RUN_PAGES];
            memory.presence(first, &mut presence)?;
            let count = |wanted| presence.iter().filter(|found| **found == wanted).count();
            parts.push((count(Presence::There), count(Presence::Untouched)));
            self.swapped += count(Presence::Swapped) as u64;
            let pages = (first..).zip(&presence);
            there.extend(pages.filter(|page| *page.1 == Presence::There).map(|page| page.0));
        }
        memory.read(&there, buffer)?;
        let mut read = buffer.chunks_exact(PAGE);
        for (there, untouched) in parts {
            let mut zero = untouched;
            for page in read.by_ref().take(there) {
                if page == [0; PAGE] {
                    zero += 1;
                } else {
                    *self.contents.entry(self.hasher.hash_one(page)).or_default() += 1;
                    plain.extend_from_slice(page);
                }
            }
            self.sampled += (there + untouched) as u64;
            self.untouched += untouched as u64;
            self.zero += zero as u64;
            if there + untouched > 0 {
                self.zero_shares.push(zero as f64 / (there + untouched) as f64);
            }
        }
        Ok(())
    }

    /// From how much the runs differ: pages of one run are like each other.
    fn zero_share_error(&self) -> f64 {
        let runs = self.zero_shares.len() as f64;
        if runs < 2.0 {
            return 1.0;
        }
        let mean = self.zero_shares.iter().sum::<f64>() / runs;
        let squares: f64 = self.zero_shares.iter().map(|share| (share - mean).powi(2)).sum();
        f64::sqrt(squares / (runs - 1.0) / runs)
    }

    fn census(self, compression: Vec<CompressionSample>) -> Census {
        let twice = self.contents.values().filter(|count| **count > 1);
        Census {
            sampled_pages: self.sampled,
            zero_pages: self.zero,
            duplicate_pages: twice.sum(),
            compression,
        }
    }
}

/// A stream of one method, both ways.
enum Method {
    Zlib { compress: Compress, decompress: Decompress },
    Zstd { compress: Encoder<'static>, decompress: Decoder<'static> },
}

/// What a method has made of the pages so far.
struct Squeezed {
    method: Method,
    plain_bytes: u64,
    packed_bytes: u64,
    compressing: Duration,
    decompressing: Duration,
}

impl Squeezed {
    fn new(method: Method) -> Self {
        let (compressing, decompressing) = (Duration::ZERO, Duration::ZERO);
        Self { method, plain_bytes: 0, packed_bytes: 0, compressing, decompressing }
    }

    fn spent(&self) -> Duration {
        self.compressing + self.decompressing
    }

    fn squeeze(&mut self, plain: &[u8]) -> io::Result<()> {
        let begun = cpu::of_this_thread();
        let packed = self.method.compress(plain)?;
        let between = cpu::of_this_thread();
        self.method.decompress(&packed, plain.len())?;
        self.compressing += between.saturating_sub(begun);
        self.decompressing += cpu::of_this_thread().saturating_sub(between);
        self.plain_bytes += plain.len() as u64;
        self.packed_bytes += packed.len() as u64;
        Ok(())
    }

    /// None where there was nothing to compress.
    fn sample(&self) -> Option<CompressionSample> {
        let bytes = self.plain_bytes as f64;
        (self.plain_bytes > 0).then(|| CompressionSample {
            method: match self.method {
                Method::Zlib { .. } => CompressionMethod::Zlib,
                Method::Zstd { .. } => CompressionMethod::Zstd,
            },
            level: LEVEL,
            ratio: self.packed_bytes as f64 / bytes,
            compress_ns_per_byte: self.compressing.as_nanos() as f64 / bytes,
            decompress_ns_per_byte: self.decompressing.as_nanos() as f64 / bytes,
        })
    }
}

impl Method {
    fn zlib() -> Self {
        let level = Compression::new(u32::from(LEVEL));
        Self::Zlib { compress: Compress::new(level, true), decompress: Decompress::new(true) }
    }

    fn zstd() -> Result<Self, MemoryError> {
        Ok(Self::Zstd {
            compress: Encoder::new(i32::from(LEVEL)).map_err(MemoryError::Compress)?,
            decompress: Decoder::new().map_err(MemoryError::Compress)?,
        })
    }

    fn compress(&mut self, plain: &[u8]) -> io::Result<Vec<u8>> {
        // What cannot be compressed grows a little (zlib by 5 bytes in 16 KiB, zstd by 3 in 128 KiB).
        let mut packed = Vec::with_capacity(plain.len() + plain.len() / 1024 + 1024);
        match self {
            Self::Zlib { compress, .. } => {
                let before = compress.total_in();
                let flush = FlushCompress::Sync;
                compress.compress_vec(plain, &mut packed, flush).map_err(io::Error::other)?;
                whole(compress.total_in() - before, plain.len())?;
            }
            Self::Zstd { compress, .. } => {
                packed.resize(packed.capacity(), 0);
                let mut input = InBuffer::around(plain);
                let mut output = OutBuffer::around(packed.as_mut_slice());
                while input.pos() < plain.len() {
                    compress.run(&mut input, &mut output)?;
                }
                let left = compress.flush(&mut output)?;
                let length = output.pos();
                whole(left as u64, 0)?;
                packed.truncate(length);
            }
        }
        Ok(packed)
    }

    fn decompress(&mut self, packed: &[u8], plain_bytes: usize) -> io::Result<()> {
        let mut plain = Vec::with_capacity(plain_bytes + 1);
        match self {
            Self::Zlib { decompress, .. } => {
                let flush = FlushDecompress::Sync;
                decompress.decompress_vec(packed, &mut plain, flush).map_err(io::Error::other)?;
                whole(plain.len() as u64, plain_bytes)
            }
            Self::Zstd { decompress, .. } => {
                plain.resize(plain_bytes, 0);
                let mut input = InBuffer::around(packed);
                let mut output = OutBuffer::around(plain.as_mut_slice());
                while output.pos() < plain_bytes {
                    let before = (input.pos(), output.pos());
                    decompress.run(&mut input, &mut output)?;
                    if before == (input.pos(), output.pos()) {
                        break;
                    }
                }
                whole(output.pos() as u64, plain_bytes)
            }
        }
    }
}

fn whole(got: u64, wanted: usize) -> io::Result<()> {
    if got == wanted as u64 {
        return Ok(());
    }
    Err(io::Error::other(format!("{got} bytes instead of {wanted}")))
}

#[cfg(test)]
mod tests {
    use super::super::memory::tests::Own;
    use super::*;

    const TEXT: &[u8] =
        b"GET /v1/vms/0197a7c2 HTTP/1.1 host: controller.whimbrel status=200 took=17ms\n";

    fn noise(into: &mut [u8], seed: u64) {
        let mut dice = seed;
        for chunk in into.chunks_mut(8) {
            dice = dice
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            chunk.copy_from_slice(&(dice ^ (dice >> 29)).to_le_bytes());
        }
    }

    /// Half untouched or zero, a quarter text, an eighth noise, an eighth of one content.
    fn filled() -> Own {
        let mut own = Own::new(4096);
        for page in 0..4096 {
            let seed = page as u64;
            match page % 64 {
                0..16 => own.page(page).fill(0),
                16..32 => {
                    for (byte, letter) in own.page(page).iter_mut().zip(TEXT.iter().cycle()) {
                        *byte = *letter;
                    }
                    own.page(page)[..8].copy_from_slice(&seed.to_le_bytes());
                }
                32..40 => noise(own.page(page), seed),
                40..48 => noise(own.page(page), 1),
                _ => {}
            }
        }
        own
    }

    #[test]
    fn known_shares_are_found() {
        let own = filled();
        let report = take(&own.memory(), 4096, &mut Dice::seeded(3)).unwrap();
        let census = &report.census;
        assert_eq!(census.sampled_pages % 8, 0);
        assert!(census.sampled_pages > 0 && report.swapped_pages == 0);
        let share = |pages: u64| pages as f64 / census.sampled_pages as f64;
        let near = |share: f64, wanted: f64| (share - wanted).abs() < 0.06;
        assert!(near(census.zero_share(), 0.5), "{report:?}");
        assert!(near(share(census.duplicate_pages), 0.125), "{report:?}");
        assert!(report.zero_share_error < 0.1 && report.compressed_pages > 0);
    }

    #[test]
    fn each_method_is_told_with_its_price() {
        let own = filled();
        let report = take(&own.memory(), 4096, &mut Dice::seeded(3)).unwrap();
        let methods: Vec<_> = report.census.compression.iter().map(|found| found.method).collect();
        assert_eq!(methods, [CompressionMethod::Zlib, CompressionMethod::Zstd]);
        for sample in report.census.compression {
            // Half of what is not zero is text, which all but vanishes, and half is noise, which does not.
            assert!((0.2..0.8).contains(&sample.ratio), "{sample:?}");
            assert!(sample.compress_ns_per_byte > 0.0 && sample.decompress_ns_per_byte > 0.0);
        }
    }

    #[test]
    fn untouched_memory_stays_untouched() {
        let own = Own::new(8192);
        let memory = own.memory();
        let report = take(&memory, 4096, &mut Dice::seeded(4)).unwrap();
        assert_eq!(report.census.zero_pages, report.census.sampled_pages);
        // The borders may share a page with what the allocator keeps there.
        assert!(report.untouched_pages + 16 >= report.census.sampled_pages, "{report:?}");
        assert_eq!(report.census.compression, []);
        let mut presence = vec![Presence::There; 8192];
        memory.presence(0, &mut presence).unwrap();
        let there = presence.iter().filter(|found| **found == Presence::There).count();
        assert!(there < 16, "{there} pages were made by looking");
    }

    #[test]
    fn what_was_packed_comes_out_again() {
        let mut plain = vec![0; 300_000];
        noise(&mut plain[..200_000], 9);
        for mut method in [Method::zlib(), Method::zstd().unwrap()] {
            for _ in 0..3 {
                let packed = method.compress(&plain).unwrap();
                assert!(packed.len() < 210_000);
                method.decompress(&packed, plain.len()).unwrap();
            }
        }
    }
}
