//! Figures and times as people read them.

use jiff::Timestamp;

/// A duration given in milliseconds: `11.8 ms`, `2.31 s`, `3 min 5 s`.
pub(crate) fn duration(ms: f64) -> String {
    match ms {
        ms if ms < 1_000.0 => format!("{ms:.1} ms"),
        ms if ms < 60_000.0 => format!("{:.2} s", ms / 1_000.0),
        ms => {
            let seconds = (ms / 1_000.0).round() as u64;
            format!("{} min {} s", seconds / 60, seconds % 60)
        }
    }
}

/// Milliseconds of a number of microseconds.
pub(crate) fn ms_of_us(us: u64) -> f64 {
    us as f64 / 1_000.0
}

/// A rate in bits a second, in the units of networks.
pub(crate) fn bit_rate(bits_per_s: u64) -> String {
    let bits = bits_per_s as f64;
    match bits {
        bits if bits < 1e6 => format!("{:.0} kbit/s", bits / 1e3),
        bits if bits < 1e9 => format!("{:.0} Mbit/s", bits / 1e6),
        bits => format!("{:.2} Gbit/s", bits / 1e9),
    }
}

/// A moment, to the second.
pub(crate) fn moment(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%SZ").to_string()
}

/// `yes` or `no`.
pub(crate) fn yes_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

/// Texts with commas between, or `-` for none.
pub(crate) fn comma_list<T: std::fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    let texts: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    if texts.is_empty() { "-".to_owned() } else { texts.join(", ") }
}

/// The value, or `-`.
pub(crate) fn or_dash<T: std::fmt::Display>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_well() {
        assert_eq!(duration(11.84), "11.8 ms");
        assert_eq!(duration(2_314.0), "2.31 s");
        assert_eq!(duration(185_400.0), "3 min 5 s");
        assert_eq!(bit_rate(934_000_000), "934 Mbit/s");
        assert_eq!(bit_rate(2_500_000_000), "2.50 Gbit/s");
        assert_eq!(comma_list(["a", "b"]), "a, b");
        assert_eq!(or_dash(None::<u8>), "-");
        assert_eq!(moment(Timestamp::UNIX_EPOCH), "1970-01-01 00:00:00Z");
    }
}
