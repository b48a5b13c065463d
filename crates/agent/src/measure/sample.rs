//! Which pages are looked at: chance, spread evenly over the memory.

/// Chance that is good enough for a sample (splitmix64); nothing secret hangs on it.
#[derive(Debug, Clone)]
pub(super) struct Dice(u64);

impl Dice {
    /// Thrown differently each time.
    pub(super) fn new() -> Self {
        Self(uuid::Uuid::new_v4().as_u64_pair().0)
    }

    /// Thrown the same each time.
    #[cfg(test)]
    pub(super) fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is not 0.
    fn below(&mut self, limit: u64) -> u64 {
        // The high half of the product: no division, and no number is favoured by more than 2^-40 here.
        let product = u128::from(self.next()) * u128::from(limit.max(1));
        u64::try_from(product >> 64).unwrap_or(0)
    }
}

/// `count` of the numbers below `all`, or all of them, rising: one from each of as many equal parts, so that what lies
/// together is hit in proportion.
pub(super) fn spread(all: u64, count: u64, dice: &mut Dice) -> Vec<u64> {
    let count = count.min(all);
    let edge = |part: u64| {
        let product = u128::from(part) * u128::from(all) / u128::from(count.max(1));
        u64::try_from(product).unwrap_or(all)
    };
    (0..count).map(|part| edge(part) + dice.below(edge(part + 1) - edge(part))).collect()
}

/// Puts things into an order of chance: whoever stops early has still looked everywhere.
pub(super) fn shuffle<T>(things: &mut [T], dice: &mut Dice) {
    for index in (1..things.len()).rev() {
        let other = dice.below(index as u64 + 1);
        things.swap(index, usize::try_from(other).unwrap_or(index));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_one_of_each_part_and_no_more_than_there_are() {
        let mut dice = Dice::seeded(7);
        let sample = spread(1000, 10, &mut dice);
        assert_eq!(sample.len(), 10);
        assert!(sample.iter().zip(0_u64..).all(|(page, part)| page / 100 == part));
        assert_eq!(spread(3, 10, &mut dice), [0, 1, 2]);
        assert!(spread(0, 10, &mut dice).is_empty());
        assert_ne!(spread(1000, 10, &mut Dice::new()), spread(1000, 10, &mut Dice::new()));
    }

    #[test]
    fn all_places_come_up() {
        let mut dice = Dice::seeded(1);
        let mut seen = [0_u32; 10];
        for _ in 0..1000 {
            seen[usize::try_from(dice.below(10)).unwrap()] += 1;
        }
        assert!(seen.iter().all(|count| (60..140).contains(count)), "{seen:?}");
        let mut order: Vec<u32> = (0..100).collect();
        shuffle(&mut order, &mut dice);
        assert_ne!(order, (0..100).collect::<Vec<u32>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<u32>>());
    }
}
