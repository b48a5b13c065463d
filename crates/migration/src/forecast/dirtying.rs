//! How much of its memory a guest has written after some time: a curve through the measured windows.
//!
//! A guest that writes 200 MB/s does not dirty 2 GB in ten seconds if it always writes the same 50 MB.
//! So the curve counts *different* pages. It is concave: what was written in a longer window
//! includes what was written in a shorter one. Between windows it is straight; beyond the longest one
//! its slope goes on falling as it did between the last two stretches, which is what random writes over a
//! set of fixed size do, and what a sweep over such a set does once it is round.

use super::facts::DirtyMeasure;

/// Where the last slope has at least this share of the one before, the curve goes on straight.
const STRAIGHT_SHARE: f64 = 0.9;
/// Where it has less than this share, the set has been written all over: nothing new comes.
const FLAT_SHARE: f64 = 0.01;

/// Different bytes dirtied after a time.
#[derive(Debug, Clone, PartialEq)]
pub struct DirtyCurve {
    /// Corners after (0, 0): milliseconds and bytes, both rising, slopes falling.
    corners: Vec<(f64, f64)>,
    /// Bytes per millisecond at the last corner.
    tail_slope: f64,
    /// How fast that slope falls, per millisecond; 0 for a straight line.
    tail_decay: f64,
    /// What can be dirtied at most.
    most_bytes: f64,
}

impl DirtyCurve {
    /// The curve through the windows of a measurement, for a guest with so much memory that can be
    /// written.
    #[must_use]
    pub fn fit(measure: &DirtyMeasure, most_bytes: f64) -> Self {
        let corners = concave(measure);
        let slope = |from: (f64, f64), to: (f64, f64)| (to.1 - from.1) / (to.0 - from.0);
        let last = corners.len().checked_sub(1).map(|last| corners[last]);
        let before = corners.len().checked_sub(2).map(|before| corners[before]);
        let start = corners.len().checked_sub(3).map_or((0.0, 0.0), |start| corners[start]);
        let (tail_slope, tail_decay) = match (before, last) {
            (_, None) => (0.0, 0.0),
            (None, Some(last)) => (slope((0.0, 0.0), last), 0.0),
            (Some(before), Some(last)) => {
                let (earlier, later) = (slope(start, before), slope(before, last));
                if later >= earlier * STRAIGHT_SHARE {
                    (later, 0.0)
                } else if later <= earlier * FLAT_SHARE {
                    (0.0, 0.0)
                } else {
                    let apart = (last.0 - start.0) / 2.0;
                    let decay = (earlier / later).ln() / apart;
                    (later * (-decay * (last.0 - before.0) / 2.0).exp(), decay)
                }
            }
        };
        Self { corners, tail_slope, tail_decay, most_bytes: most_bytes.max(0.0) }
    }

    /// Different bytes dirtied within so many milliseconds.
    #[must_use]
    pub fn unique_bytes(&self, ms: f64) -> f64 {
        let ms = ms.max(0.0);
        let mut from = (0.0, 0.0);
        for corner in &self.corners {
            if ms <= corner.0 {
                let share = (ms - from.0) / (corner.0 - from.0);
                return (from.1 + share * (corner.1 - from.1)).min(self.most_bytes);
            }
            from = *corner;
        }
        let beyond = ms - from.0;
        let more = if self.tail_decay > 0.0 {
            self.tail_slope / self.tail_decay * (1.0 - (-self.tail_decay * beyond).exp())
        } else {
            self.tail_slope * beyond
        };
        (from.1 + more).min(self.most_bytes)
    }

    /// The size of the set that the guest writes to, in bytes: what the curve never exceeds.
    #[must_use]
    pub fn set_bytes(&self) -> f64 {
        let last = self.corners.last().map_or(0.0, |corner| corner.1);
        let limit = match (self.tail_slope > 0.0, self.tail_decay > 0.0) {
            (false, _) => last,
            (true, true) => last + self.tail_slope / self.tail_decay,
            (true, false) => self.most_bytes,
        };
        limit.min(self.most_bytes)
    }

    /// Bytes dirtied a second while nothing has been dirtied yet: the plain dirty rate.
    #[must_use]
    pub fn bytes_per_s(&self) -> f64 {
        self.corners.first().map_or(0.0, |(ms, bytes)| bytes / ms * 1_000.0)
    }
}

/// The upper concave hull of the windows, from (0, 0) on. What lies below it is taken for noise: the
/// higher figure is the safer one.
fn concave(measure: &DirtyMeasure) -> Vec<(f64, f64)> {
    let mut windows: Vec<(f64, f64)> = measure
        .windows
        .iter()
        .filter(|window| window.window_ms > 0)
        .map(|window| (window.window_ms as f64, window.dirtied_bytes as f64))
        .collect();
    windows.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
    windows.dedup_by(|later, earlier| later.0 == earlier.0);
    let mut hull: Vec<(f64, f64)> = Vec::with_capacity(windows.len());
    for (ms, bytes) in windows {
        // What a shorter window saw, a longer one has seen.
        let point = (ms, hull.last().map_or(bytes, |last| bytes.max(last.1)));
        while let Some(last) = hull.last().copied() {
            let before = hull.len().checked_sub(2).map_or((0.0, 0.0), |index| hull[index]);
            let rise = (last.1 - before.1) * (point.0 - before.0);
            if rise >= (point.1 - before.1) * (last.0 - before.0) {
                break;
            }
            hull.pop();
        }
        hull.push(point);
    }
    hull
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::facts::DirtyWindow;
    use super::*;

    const MB: f64 = 1e6;

    fn curve(windows: &[(u64, f64)]) -> DirtyCurve {
        let windows = windows
            .iter()
            .map(|(window_ms, mb)| DirtyWindow {
                window_ms: *window_ms,
                dirtied_bytes: (mb * MB) as u64,
            })
            .collect();
        DirtyCurve::fit(&DirtyMeasure { windows, vcpu_busy_share: 1.0 }, 1_000.0 * MB)
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() <= 0.01 * b.abs().max(1.0), "{a} is not {b}");
    }

    #[test]
    fn one_window_is_a_straight_line_up_to_the_memory() {
        let curve = curve(&[(500, 50.0)]);
        close(curve.bytes_per_s(), 100.0 * MB);
        close(curve.unique_bytes(250.0), 25.0 * MB);
        close(curve.unique_bytes(4_000.0), 400.0 * MB);
        close(curve.unique_bytes(60_000.0), 1_000.0 * MB);
        close(curve.set_bytes(), 1_000.0 * MB);
    }

    #[test]
    fn a_sweep_over_a_small_set_ends_at_the_set() {
        let curve = curve(&[(200, 20.0), (400, 40.0), (1_000, 50.0), (2_000, 50.0)]);
        close(curve.unique_bytes(300.0), 30.0 * MB);
        close(curve.unique_bytes(10_000.0), 50.0 * MB);
        close(curve.set_bytes(), 50.0 * MB);
    }

    #[test]
    fn random_writes_are_told_by_three_windows() {
        // W (1 - e^(-rt/W)) with W = 100 MB and r = 200 MB/s.
        let at = |ms: f64| 100.0 * (1.0 - (-2.0 * ms / 1_000.0).exp());
        let curve = curve(&[(250, at(250.0)), (500, at(500.0)), (750, at(750.0))]);
        for ms in [500.0, 1_000.0, 2_000.0, 9_000.0] {
            close(curve.unique_bytes(ms), at(ms) * MB);
        }
        close(curve.set_bytes(), 100.0 * MB);
    }

    #[test]
    fn nothing_measured_is_nothing_dirtied() {
        for curve in [curve(&[]), curve(&[(0, 5.0)]), curve(&[(100, 0.0), (900, 0.0)])] {
            assert!(curve.unique_bytes(1e6) == 0.0 && curve.set_bytes() == 0.0);
        }
    }

    proptest! {
        #[test]
        fn it_rises_ever_slower_and_lies_on_or_above_what_was_measured(
            windows in prop::collection::vec((1_u64..5_000, 0_u64..2_000_000_000), 0..6),
        ) {
            let windows: Vec<DirtyWindow> = windows
                .into_iter()
                .map(|(window_ms, dirtied_bytes)| DirtyWindow { window_ms, dirtied_bytes })
                .collect();
            let measure = DirtyMeasure { windows: windows.clone(), vcpu_busy_share: 1.0 };
            let curve = DirtyCurve::fit(&measure, 1e9);
            let values: Vec<f64> = (0..200).map(|i| curve.unique_bytes(f64::from(i) * 50.0)).collect();
            for pair in values.windows(3) {
                prop_assert!(pair[1] >= pair[0] - 1.0);
                prop_assert!(pair[2] - pair[1] <= pair[1] - pair[0] + 1.0);
            }
            for window in windows {
                let at = curve.unique_bytes(window.window_ms as f64);
                prop_assert!(at + 1.0 >= (window.dirtied_bytes as f64).min(1e9));
            }
            prop_assert!(values.iter().all(|value| *value <= curve.set_bytes() + 1.0));
        }
    }
}
