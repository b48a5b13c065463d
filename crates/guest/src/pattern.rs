//! The content of every page, as a function of the seed, the page's number and how often it was dirtied.
//!
//! Nothing is stored to compare with: a page that comes from another guest, another place or another moment is wrong in
//! its words, not only in a checksum. Pure; [`crate::memory`] and [`crate::disk`] call it.

/// 8-byte words in a page of 4 KiB.
pub(crate) const PAGE_WORDS: usize = 512;
/// Bytes in a page.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// A page, aligned as the machine's own pages are, so that dirtying one dirties one, and direct disk I/O may use it.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(crate) struct Page(pub(crate) [u64; PAGE_WORDS]);

impl Page {
    pub(crate) const ZERO: Self = Self([0; PAGE_WORDS]);
}

/// What kind of content a page has, which decides how well it compresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Zero,
    Text,
    Random,
}

/// The rule for a whole area of memory.
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    pub(crate) seed: u64,
    pub(crate) zero_percent: u8,
    pub(crate) text_percent: u8,
}

/// Words of the text-like pages; each is as long as a memory word.
const TEXT: [&[u8; 8]; 16] = [
    b"the host",
    b" and the",
    b" guest, ",
    b"running ",
    b"machine ",
    b"memory, ",
    b"pages of",
    b" a disk ",
    b"storage\n",
    b"network ",
    b"moved to",
    b" another",
    b" without",
    b" pausing",
    b" or loss",
    b" of it.\n",
];

/// Mixes a word so that neighbours have nothing in common (the finaliser of SplitMix64).
pub(crate) fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

impl Pattern {
    /// The kind of a page, decided by chance with the configured shares, the same every time.
    pub(crate) fn kind(&self, page: u64) -> Kind {
        let percent = mix(self.key(page)) % 100;
        if percent < u64::from(self.zero_percent) {
            Kind::Zero
        } else if percent < u64::from(self.zero_percent) + u64::from(self.text_percent) {
            Kind::Text
        } else {
            Kind::Random
        }
    }

    /// What the page holds after it was dirtied `generation` times.
    pub(crate) fn content(&self, page: u64, generation: u32) -> Content {
        let key = self.key(page);
        let stamp = (generation > 0).then(|| mix(key ^ u64::from(generation).rotate_left(32)));
        Content { key, kind: self.kind(page), stamp }
    }

    fn key(&self, page: u64) -> u64 {
        mix(mix(self.seed) ^ page)
    }
}

/// The words of one page.
pub(crate) struct Content {
    key: u64,
    kind: Kind,
    stamp: Option<u64>,
}

impl Content {
    /// The word at `index`: the generation's stamp at both ends of a page that was dirtied, else the page's own content.
    pub(crate) fn word(&self, index: usize) -> u64 {
        match self.stamp {
            Some(stamp) if Self::is_stamped(index) => stamp,
            _ => self.own_word(index),
        }
    }

    fn own_word(&self, index: usize) -> u64 {
        let random = || mix(self.key.wrapping_add(index as u64));
        match self.kind {
            Kind::Zero => 0,
            Kind::Text => u64::from_le_bytes(*TEXT[(random() % TEXT.len() as u64) as usize]),
            Kind::Random => random(),
        }
    }

    fn is_stamped(index: usize) -> bool {
        index == 0 || index == PAGE_WORDS - 1
    }

    /// Writes the whole page.
    pub(crate) fn write(&self, page: &mut Page) {
        for (index, word) in page.0.iter_mut().enumerate() {
            *word = self.word(index);
        }
    }

    /// Writes what differs from any other generation of the same page.
    pub(crate) fn write_stamp(&self, page: &mut Page) {
        page.0[0] = self.word(0);
        page.0[PAGE_WORDS - 1] = self.word(PAGE_WORDS - 1);
    }

    /// The first word of the page that is not as it should be.
    pub(crate) fn first_difference(&self, page: &Page) -> Option<usize> {
        (0..PAGE_WORDS).find(|index| page.0[*index] != self.word(*index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATTERN: Pattern = Pattern { seed: 3, zero_percent: 20, text_percent: 30 };

    fn page(pattern: &Pattern, number: u64, generation: u32) -> Page {
        let mut page = Page::ZERO;
        pattern.content(number, generation).write(&mut page);
        page
    }

    #[test]
    fn shares_are_as_configured() {
        let count = |kind| (0..10_000).filter(|page| PATTERN.kind(*page) == kind).count();
        assert!((1_900..2_100).contains(&count(Kind::Zero)), "{}", count(Kind::Zero));
        assert!((2_850..3_150).contains(&count(Kind::Text)), "{}", count(Kind::Text));
        let all_zero = Pattern { zero_percent: 100, text_percent: 0, ..PATTERN };
        assert!((0..1000).all(|page| all_zero.kind(page) == Kind::Zero));
    }

    #[test]
    fn content_is_found_again_and_no_other() {
        let other_seed = Pattern { seed: 4, ..PATTERN };
        for number in (0..200).filter(|number| PATTERN.kind(*number) != Kind::Zero) {
            let written = page(&PATTERN, number, 5);
            assert_eq!(PATTERN.content(number, 5).first_difference(&written), None);
            assert!(PATTERN.content(number, 4).first_difference(&written).is_some());
            assert!(PATTERN.content(number, 0).first_difference(&written).is_some());
            assert!(PATTERN.content(number + 1, 5).first_difference(&written).is_some());
            assert!(other_seed.content(number, 5).first_difference(&written).is_some());
        }
    }

    #[test]
    fn a_stamp_makes_one_generation_the_next() {
        let mut stamped = page(&PATTERN, 9, 1);
        PATTERN.content(9, 2).write_stamp(&mut stamped);
        assert_eq!(PATTERN.content(9, 2).first_difference(&stamped), None);
        let before = page(&PATTERN, 9, 1);
        let changed = (0..PAGE_WORDS).filter(|index| before.0[*index] != stamped.0[*index]);
        assert_eq!(
            changed.collect::<Vec<_>>(),
            [0, PAGE_WORDS - 1],
            "a page that is half old is found out"
        );
    }

    #[test]
    fn every_bit_counts() {
        let mut damaged = page(&PATTERN, 11, 0);
        for index in 0..PAGE_WORDS {
            for bit in [0, 31, 63] {
                damaged.0[index] ^= 1 << bit;
                assert_eq!(PATTERN.content(11, 0).first_difference(&damaged), Some(index));
                damaged.0[index] ^= 1 << bit;
            }
        }
    }
}
