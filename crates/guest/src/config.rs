//! What the kernel command line asks of the witness: `witness.KEY=VALUE` words; every other word is the kernel's.
//!
//! | key | meaning | default |
//! |---|---|---|
//! | `ip` | address of the first network interface, `a.b.c.d/prefix` | no network |
//! | `seed` | makes this guest's pages and records unlike any other's | 1 |
//! | `memory` | MiB of memory to fill | 64 |
//! | `zero`, `text` | percent of the pages that are zero, and that compress well; the rest is random | 10, 45 |
//! | `dirty` | MB/s to dirty from the start | 0 |
//! | `verify` | MB/s of memory to verify in the background | 4 |
//! | `journal` | records a second to append to the disk's journal | 10 |

use std::net::Ipv4Addr;

/// The largest area of memory that can be asked for.
const MEMORY_MIB_MAX: u64 = 1024 * 1024;
/// The highest rate that can be asked for: beyond what any machine does.
const RATE_MAX: u64 = 1_000_000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) address: Option<Address>,
    pub(crate) seed: u64,
    pub(crate) memory_mib: u64,
    pub(crate) zero_percent: u8,
    pub(crate) text_percent: u8,
    pub(crate) dirty_mb_per_s: u32,
    pub(crate) verify_mb_per_s: u32,
    pub(crate) journal_records_per_s: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) ip: Ipv4Addr,
    pub(crate) prefix: u8,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: None,
            seed: 1,
            memory_mib: 64,
            zero_percent: 10,
            text_percent: 45,
            dirty_mb_per_s: 0,
            verify_mb_per_s: 4,
            journal_records_per_s: 10,
        }
    }
}

impl Config {
    /// Reads the kernel command line. What cannot be understood keeps its default, and is returned as words for people:
    /// a guest that does not boot could tell nobody why.
    pub(crate) fn parse(command_line: &str) -> (Self, Vec<String>) {
        let mut config = Self::default();
        let mut errors = Vec::new();
        for word in command_line.split_whitespace() {
            let Some((key, value)) =
                word.strip_prefix("witness.").and_then(|rest| rest.split_once('='))
            else {
                continue;
            };
            if config.set(key, value).is_none() {
                errors.push(format!("the kernel command line's {word} is not understood"));
            }
        }
        if config.zero_percent + config.text_percent > 100 {
            errors.push("witness.zero and witness.text are more than 100 percent".to_owned());
            config.zero_percent = Self::default().zero_percent;
            config.text_percent = Self::default().text_percent;
        }
        (config, errors)
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "ip" => self.address = Some(address(value)?),
            "seed" => self.seed = value.parse().ok()?,
            "memory" => self.memory_mib = up_to(value, MEMORY_MIB_MAX)?,
            "zero" => self.zero_percent = u8::try_from(up_to(value, 100)?).ok()?,
            "text" => self.text_percent = u8::try_from(up_to(value, 100)?).ok()?,
            "dirty" => self.dirty_mb_per_s = rate(value)?,
            "verify" => self.verify_mb_per_s = rate(value)?,
            "journal" => self.journal_records_per_s = rate(value)?,
            _ => return None,
        }
        Some(())
    }
}

fn up_to(value: &str, max: u64) -> Option<u64> {
    value.parse().ok().filter(|number| *number <= max)
}

fn rate(value: &str) -> Option<u32> {
    u32::try_from(up_to(value, RATE_MAX)?).ok()
}

fn address(value: &str) -> Option<Address> {
    let (ip, prefix) = value.split_once('/')?;
    Some(Address { ip: ip.parse().ok()?, prefix: u8::try_from(up_to(prefix, 32)?).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_key() {
        let line = "console=ttyS0 quiet witness.ip=198.19.0.101/24 witness.seed=7 witness.memory=512 witness.zero=5 \
                    witness.text=15 witness.dirty=100 witness.verify=0 witness.journal=50\n";
        let (config, errors) = Config::parse(line);
        assert_eq!(errors, Vec::<String>::new());
        let expected = Config {
            address: Some(Address { ip: Ipv4Addr::new(198, 19, 0, 101), prefix: 24 }),
            seed: 7,
            memory_mib: 512,
            zero_percent: 5,
            text_percent: 15,
            dirty_mb_per_s: 100,
            verify_mb_per_s: 0,
            journal_records_per_s: 50,
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn what_is_wrong_is_told_and_keeps_its_default() {
        for word in [
            "witness.ip=198.19.0.101",
            "witness.ip=198.19.0.101/33",
            "witness.memory=-1",
            "witness.memory=1048577",
            "witness.zero=101",
            "witness.dirty=fast",
            "witness.colour=red",
        ] {
            let (config, errors) = Config::parse(word);
            assert_eq!(config, Config::default(), "{word}");
            assert!(errors.len() == 1 && errors[0].contains(word), "{errors:?}");
        }
        let (config, errors) = Config::parse("witness.zero=60 witness.text=60");
        assert_eq!((config.zero_percent, errors.len()), (Config::default().zero_percent, 1));
    }
}
