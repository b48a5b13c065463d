//! Who may send guests to this host: a list of host names, addresses and networks in the agent's configuration.
//!
//! A guest may come if the source's name is listed, as its certificate says it, or the address that it comes from. The address is
//! seen at the knock of preflight, which the source makes from where its QEMU will come and with its QEMU's certificate; that
//! is remembered for [`KNOCK_GOOD_SECONDS`], and a preparation without it is refused where the name is not listed. An empty list
//! allows every host of the pool. Asked by [`crate::migrate`]; the list does not say who may *make* a migration, which needs the
//! controller's grant in any case.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use whimbrel_api::{ApiError, ErrorCode, Name};

/// How long a knock tells from where a host sends, in seconds: preflight, and what comes until the preparation.
const KNOCK_GOOD_SECONDS: u64 = 600;
/// Hosts whose knock is remembered: more than a pool has.
const KNOCKS_MAX: usize = 1024;

/// One entry of the list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum AllowedSource {
    /// A host of the pool, by its name.
    Host(Name),
    /// All addresses that agree in the first bits; with all of them it is one address.
    Network {
        /// An address in it.
        address: IpAddr,
        /// So many bits count, 0 to 32 or 128.
        prefix_bits: u8,
    },
}

/// A text that is no [`AllowedSource`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither the name of a host nor an address or a network such as 192.0.2.0/24")]
pub struct NoSource(String);

impl FromStr for AllowedSource {
    type Err = NoSource;

    fn from_str(text: &str) -> Result<Self, NoSource> {
        let none =
            || NoSource(text.chars().take(80).collect::<String>().escape_debug().to_string());
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse().map_err(|_| none())?)),
            None => (text, None),
        };
        let Ok(address) = address.parse::<IpAddr>() else {
            return text.parse().map(Self::Host).map_err(|_| none());
        };
        let most = bits_of(address);
        let prefix_bits = bits.unwrap_or(most);
        if prefix_bits > most {
            return Err(none());
        }
        Ok(Self::Network { address, prefix_bits })
    }
}

impl TryFrom<String> for AllowedSource {
    type Error = NoSource;

    fn try_from(text: String) -> Result<Self, NoSource> {
        text.parse()
    }
}

impl From<AllowedSource> for String {
    fn from(source: AllowedSource) -> Self {
        source.to_string()
    }
}

impl fmt::Display for AllowedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(name) => name.fmt(f),
            Self::Network { address, prefix_bits } if *prefix_bits == bits_of(*address) => {
                address.fmt(f)
            }
            Self::Network { address, prefix_bits } => write!(f, "{address}/{prefix_bits}"),
        }
    }
}

impl AllowedSource {
    fn has(&self, from: IpAddr) -> bool {
        match self {
            Self::Host(_) => false,
            Self::Network { address, prefix_bits } => {
                match (address.to_canonical(), from.to_canonical()) {
                    (IpAddr::V4(net), IpAddr::V4(from)) => {
                        let differ = u32::from(net) ^ u32::from(from);
                        differ.leading_zeros() >= u32::from(*prefix_bits)
                    }
                    (IpAddr::V6(net), IpAddr::V6(from)) => {
                        let differ = u128::from(net) ^ u128::from(from);
                        differ.leading_zeros() >= u32::from(*prefix_bits)
                    }
                    _ => false,
                }
            }
        }
    }
}

fn bits_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Whether a host may send guests from an address.
#[must_use]
pub fn may_send(list: &[AllowedSource], name: &Name, from: IpAddr) -> bool {
    may_send_by_name(list, name) || list.iter().any(|allowed| allowed.has(from))
}

/// Whether a host may send guests from wherever it is.
#[must_use]
pub fn may_send_by_name(list: &[AllowedSource], name: &Name) -> bool {
    list.is_empty() || list.contains(&AllowedSource::Host(name.clone()))
}

/// Whether a host may send guests at all, from some address or other.
#[must_use]
pub fn may_ever_send(list: &[AllowedSource], name: &Name) -> bool {
    may_send_by_name(list, name)
        || list.iter().any(|allowed| matches!(allowed, AllowedSource::Network { .. }))
}

/// From where hosts have knocked that may send from there.
#[derive(Debug, Default)]
pub struct Knocks(Mutex<HashMap<Name, (IpAddr, Instant)>>);

impl Knocks {
    /// A host has knocked from an address that is listed.
    pub fn note(&self, name: Name, from: IpAddr) {
        let mut known = self.known();
        if known.len() >= KNOCKS_MAX {
            known.retain(|_, (_, at)| is_fresh(*at));
        }
        if known.len() < KNOCKS_MAX {
            known.insert(name, (from, Instant::now()));
        }
    }

    /// May this host send a guest now?
    ///
    /// # Errors
    /// `not-allowed`, with the code `source-not-allowed` in the sentence.
    pub fn admit(&self, list: &[AllowedSource], name: &Name) -> Result<(), ApiError> {
        if may_send_by_name(list, name) {
            return Ok(());
        }
        let from = self.known().get(name).filter(|(_, at)| is_fresh(*at)).map(|(from, _)| *from);
        match from {
            Some(from) if may_send(list, name, from) => Ok(()),
            _ => Err(refusal(name)),
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Name, (IpAddr, Instant)>> {
        // Each change is one call, so the map is whole even after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_fresh(at: Instant) -> bool {
    at.elapsed() < Duration::from_secs(KNOCK_GOOD_SECONDS)
}

/// The refusal of a host that is not listed.
#[must_use]
pub fn refusal(name: &Name) -> ApiError {
    let message = format!(
        "source-not-allowed: this host's list of migration sources does not have {name}, nor an address that it has sent from"
    );
    ApiError::new(ErrorCode::NotAllowed, message)
        .hint("add it to `migration_sources` in this host's agent's configuration")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[&str]) -> Vec<AllowedSource> {
        entries.iter().map(|entry| entry.parse().unwrap()).collect()
    }

    fn allowed(entries: &[&str], name: &str, from: &str) -> bool {
        may_send(&list(entries), &name.parse().unwrap(), from.parse().unwrap())
    }

    #[test]
    fn a_name_or_an_address_is_enough() {
        assert!(allowed(&[], "host-a", "192.0.2.1"), "an empty list allows all");
        assert!(allowed(&["host-a"], "host-a", "192.0.2.1"));
        assert!(!allowed(&["host-b"], "host-a", "192.0.2.1"));
        assert!(allowed(&["host-b", "192.0.2.0/24"], "host-a", "192.0.2.77"));
        assert!(!allowed(&["192.0.2.0/24"], "host-a", "192.0.3.1"));
        assert!(allowed(&["192.0.2.9"], "host-a", "192.0.2.9"));
        assert!(!allowed(&["192.0.2.9"], "host-a", "192.0.2.8"));
        assert!(allowed(&["192.0.2.9"], "host-a", "::ffff:192.0.2.9"));
        assert!(allowed(&["2001:db8::/32"], "host-a", "2001:db8:1::5"));
        assert!(!allowed(&["2001:db8::/32"], "host-a", "192.0.2.1"));
        assert!(allowed(&["0.0.0.0/0"], "host-a", "203.0.113.1"));
    }

    #[test]
    fn what_is_no_source_is_refused_and_the_rest_is_written_as_it_was() {
        for bad in ["", "192.0.2.0/33", "2001:db8::/129", "192.0.2.0/x", "Host A", "a/24", "-a"] {
            bad.parse::<AllowedSource>().unwrap_err();
        }
        for good in ["host-a", "192.0.2.1", "192.0.2.0/24", "2001:db8::/32"] {
            assert_eq!(good.parse::<AllowedSource>().unwrap().to_string(), good);
        }
    }

    #[test]
    fn a_host_that_is_not_listed_must_have_knocked_from_where_one_may() {
        let (list, name) = (list(&["192.0.2.0/24"]), "host-a".parse().unwrap());
        let knocks = Knocks::default();
        assert_eq!(knocks.admit(&list, &name).unwrap_err().code, ErrorCode::NotAllowed);
        knocks.note("host-b".parse().unwrap(), "192.0.2.5".parse().unwrap());
        knocks.admit(&list, &name).unwrap_err();
        knocks.note(name.clone(), "192.0.2.5".parse().unwrap());
        knocks.admit(&list, &name).unwrap();
    }
}
