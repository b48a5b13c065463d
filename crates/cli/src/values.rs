//! Values as people write them on the command line: names, rates, times, `key=value` lists. Checked before anybody is
//! asked, with the same codes that the controller would answer with.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::str::ParseBoolError;

use whimbrel_api::measure::{DIRTY_RATE_MS_MAX, DIRTY_RATE_MS_MIN};
use whimbrel_api::migration::CompressionMethod;
use whimbrel_api::migration::limits::{
    BANDWIDTH_MAX_BYTES_PER_S, BANDWIDTH_MIN_BYTES_PER_S, MAX_DOWNTIME_MAX_MS,
};
use whimbrel_api::vm::{BadSize, Bytes, StoragePath};
use whimbrel_api::{ErrorCode, MigrationId, Name, VmId};

/// Why a value is none, with the code that machines read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct BadValue {
    pub(crate) code: ErrorCode,
    pub(crate) message: String,
}

impl BadValue {
    fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    fn out_of_range(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::OutOfRange, message)
    }

    pub(crate) fn bad(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::BadRequest, message)
    }
}

impl From<String> for BadValue {
    fn from(message: String) -> Self {
        Self::bad(message)
    }
}

impl From<ParseBoolError> for BadValue {
    fn from(error: ParseBoolError) -> Self {
        Self::bad(error.to_string())
    }
}

/// A value as it was given: what it is, or why it is none. Who takes it judges it together with others.
#[derive(Debug, Clone)]
pub(crate) struct Given<T>(pub(crate) Result<T, BadValue>);

/// Reads by `read`, and lets what is none pass.
pub(crate) fn given<T>(
    read: fn(&str) -> Result<T, BadValue>,
) -> impl Fn(&str) -> Result<Given<T>, Infallible> + Clone {
    move |text| Ok(Given(read(text)))
}

/// A name.
pub(crate) fn name(text: &str) -> Result<Name, BadValue> {
    text.parse::<Name>().map_err(|error| BadValue::new(ErrorCode::BadName, error.to_string()))
}

/// A VM by its name, or by its id in any case.
pub(crate) fn vm(text: &str) -> Result<String, BadValue> {
    match text.parse::<VmId>() {
        Ok(id) => Ok(id.to_string()),
        Err(_) => name(text).map(String::from),
    }
}

/// A migration's id.
pub(crate) fn migration(text: &str) -> Result<MigrationId, BadValue> {
    let parsed = text.parse::<MigrationId>();
    parsed.map_err(|error| {
        let message = format!("{error}; `whimbrel migration list` shows them");
        BadValue::new(ErrorCode::BadName, message)
    })
}

/// The longest pause of a migration, in milliseconds.
pub(crate) fn downtime_ms(text: &str) -> Result<u64, BadValue> {
    let rule = || BadValue::out_of_range(format!("write 1 to {MAX_DOWNTIME_MAX_MS} milliseconds"));
    let ms = text.parse::<u64>().map_err(|_| rule())?;
    (1..=MAX_DOWNTIME_MAX_MS).contains(&ms).then_some(ms).ok_or_else(rule)
}

/// A whole number; its bounds are those of the option's rule.
pub(crate) fn whole(text: &str) -> Result<u64, BadValue> {
    text.parse::<u64>().map_err(|_| match is_number(text) {
        true => BadValue::out_of_range(format!("{text} is out of range: write a whole number")),
        false => BadValue::bad("write a whole number"),
    })
}

/// Whether a text is a number of some kind, if not of ours.
fn is_number(text: &str) -> bool {
    text.parse::<f64>().is_ok()
}

/// How long to measure, in seconds; the result in milliseconds.
pub(crate) fn measuring_ms(text: &str) -> Result<u64, BadValue> {
    let (least, most) = (DIRTY_RATE_MS_MIN as f64, DIRTY_RATE_MS_MAX as f64);
    let rule =
        || BadValue::out_of_range(format!("write {} to {} seconds", least / 1e3, most / 1e3));
    let ms = text.parse::<f64>().map_err(|_| rule())? * 1e3;
    // What is no number is in no range.
    if (least..=most).contains(&ms) { Ok(ms.round() as u64) } else { Err(rule()) }
}

/// A method of compression.
pub(crate) fn compression(text: &str) -> Result<CompressionMethod, BadValue> {
    let found = CompressionMethod::ALL.into_iter().find(|method| method.as_str() == text);
    found.ok_or_else(|| BadValue::bad("a method is zlib, zstd or xbzrle"))
}

/// A size as a number of bytes.
pub(crate) fn bytes(text: &str) -> Result<u64, BadValue> {
    match size(text) {
        Err(error) if is_number(text) && error.code != ErrorCode::OutOfRange => {
            Err(BadValue::out_of_range("write a size such as 64MiB"))
        }
        read => read.map(|Bytes(bytes)| bytes),
    }
}

/// A file in a storage.
pub(crate) fn storage_path(text: &str) -> Result<StoragePath, BadValue> {
    text.parse().map_err(|message: String| BadValue::new(ErrorCode::BadPath, message))
}

/// A size in bytes.
pub(crate) fn size(text: &str) -> Result<Bytes, BadValue> {
    text.parse::<Bytes>().map_err(|error| match error {
        BadSize::TooLarge(_) => BadValue::out_of_range(error.to_string()),
        BadSize::NoSize(_) => BadValue::bad(error.to_string()),
    })
}

/// Factors of the units' first letters: of 1000 and of 1024.
const PREFIXES: [(&str, u64, u64); 5] = [
    ("", 1, 1),
    ("k", 1_000, 1 << 10),
    ("m", 1_000_000, 1 << 20),
    ("g", 1_000_000_000, 1 << 30),
    ("t", 1_000_000_000_000, 1 << 40),
];

/// A rate in bytes a second: `500MiB/s`, `1gbit`, or a plain number of bytes.
///
/// Bytes are `B`, bits are `bit`, never `b`: who writes `Mb` may mean either, and would be wrong by a factor of eight.
pub(crate) fn rate(text: &str) -> Result<u64, BadValue> {
    let text = text.trim();
    let range = || {
        BadValue::out_of_range(format!(
            "a rate is {} to {} a second; leave the option out for no limit",
            Bytes(BANDWIDTH_MIN_BYTES_PER_S),
            Bytes(BANDWIDTH_MAX_BYTES_PER_S),
        ))
    };
    let lower = text.to_ascii_lowercase();
    if lower.starts_with('-') || ["nan", "inf", "infinity"].contains(&lower.as_str()) {
        return Err(range());
    }
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start();
    let bits_per_one = bits_per_unit(unit.strip_suffix("/s").unwrap_or(unit));
    let (Ok(number), Some(bits_per_one)) = (number.parse::<f64>(), bits_per_one) else {
        return Err(BadValue::bad(
            "write a rate such as 500MiB/s, 100MB/s, 1gbit or a plain number of bytes a second",
        ));
    };
    // Both bounds are far below 2^53: nothing that passes was rounded by more than a byte.
    let bytes = (number * bits_per_one / 8.0).round();
    let (least, most) = (BANDWIDTH_MIN_BYTES_PER_S as f64, BANDWIDTH_MAX_BYTES_PER_S as f64);
    if (least..=most).contains(&bytes) { Ok(bytes as u64) } else { Err(range()) }
}

fn bits_per_unit(unit: &str) -> Option<f64> {
    let lower = unit.to_ascii_lowercase();
    PREFIXES.iter().find_map(|(prefix, thousand, binary)| {
        let factor = match lower.strip_prefix(prefix)? {
            "" if prefix.is_empty() => 8 * thousand,
            "b" if unit.ends_with('B') => 8 * thousand,
            "ib" if unit.ends_with('B') && !prefix.is_empty() => 8 * binary,
            "bit" => *thousand,
            "ibit" if !prefix.is_empty() => *binary,
            _ => return None,
        };
        Some(factor as f64)
    })
}

/// The pairs of a list such as `storage=shared,size=1GiB`, each taken once.
#[derive(Debug)]
pub(crate) struct Pairs(BTreeMap<String, String>);

impl Pairs {
    /// Reads the list. A key without `=` counts as `key=true`.
    pub(crate) fn parse(text: &str) -> Result<Self, BadValue> {
        let mut pairs = BTreeMap::new();
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, "true"));
            if pairs.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(BadValue::bad(format!("`{key}` is given twice")));
            }
        }
        Ok(Self(pairs))
    }

    /// Takes a value out, read by `read`.
    pub(crate) fn take<T, E: Into<BadValue>>(
        &mut self,
        key: &str,
        read: impl Fn(&str) -> Result<T, E>,
    ) -> Result<Option<T>, BadValue> {
        let Some(value) = self.0.remove(key) else { return Ok(None) };
        read(&value).map(Some).map_err(|error| {
            let BadValue { code, message } = error.into();
            BadValue { code, message: format!("`{key}`: {message}") }
        })
    }

    /// Takes a value out that must be there.
    pub(crate) fn need<T, E: Into<BadValue>>(
        &mut self,
        key: &str,
        read: impl Fn(&str) -> Result<T, E>,
    ) -> Result<T, BadValue> {
        self.take(key, read)?.ok_or_else(|| BadValue::bad(format!("`{key}=…` is missing")))
    }

    /// Whether all has been taken; what has not is named.
    pub(crate) fn end(self, known: &str) -> Result<(), BadValue> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(key) => {
                Err(BadValue::bad(format!("`{key}` is not known here; known are {known}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rates_are_read_as_meant() {
        for (text, bytes) in [
            ("500MiB/s", 500 << 20),
            ("100MB/s", 100_000_000),
            ("1gbit", 125_000_000),
            ("1Gbit/s", 125_000_000),
            ("2.5 gbit", 312_500_000),
            ("1gibit", (1 << 30) / 8),
            ("65536", 65536),
            ("64KiB", 65536),
            ("1TB", 1_000_000_000_000),
            ("8000000bit/s", 1_000_000),
        ] {
            assert_eq!(rate(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn rates_out_of_range_and_without_sense_are_told_apart() {
        let code = |text| rate(text).unwrap_err().code;
        for text in
            ["0", "-1", "-1gbit", "NaN", "inf", "1", "65535", "9223372036854775808", "0gbit", "1e"]
        {
            let expected = if text == "1e" { ErrorCode::BadRequest } else { ErrorCode::OutOfRange };
            assert_eq!(code(text), expected, "{text}");
        }
        for text in ["", "fast", "1Mb", "1 Mb/s", "1mb", "1.2.3MB", "1ib", "1MBps", "10 %", "0x10"]
        {
            assert_eq!(code(text), ErrorCode::BadRequest, "{text}");
        }
    }

    #[test]
    fn downtimes_have_bounds() {
        assert_eq!(downtime_ms("300"), Ok(300));
        assert_eq!(downtime_ms("2000000"), Ok(2_000_000));
        for text in ["0", "2000001", "-1", "", "1.5", "300ms"] {
            assert_eq!(downtime_ms(text).unwrap_err().code, ErrorCode::OutOfRange, "{text}");
        }
    }

    #[test]
    fn numbers_of_no_use_are_told_apart_from_words() {
        assert_eq!(whole("18446744073709551615"), Ok(u64::MAX));
        for text in ["-1", "NaN", "inf", "1.5", "1e3", "18446744073709551616"] {
            assert_eq!(whole(text).unwrap_err().code, ErrorCode::OutOfRange, "{text}");
        }
        for text in ["", "ten", "0x10", "1 "] {
            assert_eq!(whole(text).unwrap_err().code, ErrorCode::BadRequest, "{text}");
        }
        assert_eq!(measuring_ms("1"), Ok(1_000));
        assert_eq!(measuring_ms("0.25"), Ok(250));
        for text in ["0", "-1", "NaN", "inf", "60.1", "", "1s", "9223372036854775808"] {
            assert_eq!(measuring_ms(text).unwrap_err().code, ErrorCode::OutOfRange, "{text}");
        }
        assert_eq!(bytes("64MiB"), Ok(64 << 20));
        assert_eq!(size("18446744073709551615"), Ok(Bytes(u64::MAX)));
        for text in ["99999999TiB", "16777216TiB", "18446744073709551616", "99999999.5TiB"] {
            let error = size(text).unwrap_err();
            assert_eq!(error.code, ErrorCode::OutOfRange, "{text}");
            assert!(error.message.contains(text), "{error}");
        }
        assert_eq!(bytes("-1").unwrap_err().code, ErrorCode::OutOfRange);
        assert_eq!(bytes("much").unwrap_err().code, ErrorCode::BadRequest);
        assert_eq!(compression("zstd"), Ok(CompressionMethod::Zstd));
        assert_eq!(compression("mt").unwrap_err().code, ErrorCode::BadRequest);
    }

    #[test]
    fn an_id_is_the_same_in_any_case() {
        let id = "01890A5D-AC96-774B-BCCE-B302099A8057";
        assert_eq!(vm(id).unwrap(), id.to_ascii_lowercase());
        assert_eq!(vm("web01").unwrap(), "web01");
        assert_eq!(vm("Web01").unwrap_err().code, ErrorCode::BadName);
    }

    #[test]
    fn pairs_are_taken_once_and_all_of_them() {
        let text = |text: &str| Ok::<_, String>(text.to_owned());
        let mut pairs = Pairs::parse("a=1,b").unwrap();
        assert_eq!(pairs.need("a", text), Ok("1".to_owned()));
        assert_eq!(pairs.take("c", text), Ok(None));
        assert!(pairs.end("a, c").unwrap_err().message.contains("`b`"));
        assert!(Pairs::parse("a=1,a=2").unwrap_err().message.contains("twice"));
        assert!(
            Pairs::parse("a=1").unwrap().need("z", text).unwrap_err().message.contains("missing")
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_a_rate_out_of_bounds(text in "\\PC{0,24}") {
            if let Ok(bytes) = rate(&text) {
                prop_assert!((BANDWIDTH_MIN_BYTES_PER_S..=BANDWIDTH_MAX_BYTES_PER_S).contains(&bytes));
            }
        }

        #[test]
        fn every_whole_number_in_range_is_itself(
            bytes in BANDWIDTH_MIN_BYTES_PER_S..=BANDWIDTH_MAX_BYTES_PER_S,
        ) {
            prop_assert_eq!(rate(&bytes.to_string()), Ok(bytes));
            prop_assert_eq!(rate(&format!("{bytes}B/s")), Ok(bytes));
            prop_assert_eq!(rate(&format!("{}bit", bytes * 8)), Ok(bytes));
        }

        #[test]
        fn sizes_never_panic(text in "\\PC{0,24}") {
            let _ = size(&text);
        }
    }
}
