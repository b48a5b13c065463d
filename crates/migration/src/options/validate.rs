//! Whether the options are sound by themselves. All problems are told, each with the field it is in.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    Compression, CompressionMethod, MigrateOptions, Mode, Originals, TimeoutAction, limits,
};

/// One thing that is wrong with the options.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OptionProblem {
    /// The field, by its path in JSON, such as `postcopy.bandwidth_bytes_per_s`.
    pub field: String,
    /// What kind of problem, for machines.
    pub code: ProblemCode,
    /// What is wrong and what is allowed, a sentence for people.
    pub sentence: String,
}

/// The kinds of [`OptionProblem`]. Never renamed.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemCode {
    /// A number is out of its bounds.
    OutOfRange,
    /// A number has to be a power of two.
    NotPowerOfTwo,
    /// A text is no address that another host could be reached at.
    BadAddress,
    /// Something is listed twice.
    Repeated,
    /// It says something of what was not asked for, or the opposite of another field.
    Contradiction,
    /// Nothing here can be moved that way.
    NotOffered,
}

impl MigrateOptions {
    /// Everything that is wrong with the options by themselves; empty if they are sound.
    #[must_use]
    pub fn validate(&self) -> Vec<OptionProblem> {
        let mut found = Found::default();
        self.check_numbers(&mut found);
        self.check_source_and_destination(&mut found);
        self.check_disks(&mut found);
        if let Some(compression) = &self.compression {
            check_compression(compression, &mut found);
        }
        if let Some(timeout) = self.timeout {
            let (least, most) = (limits::TIMEOUT_MIN_S, limits::TIMEOUT_MAX_S);
            found.range("timeout.seconds", Some(timeout.seconds), least, most);
            if timeout.then == TimeoutAction::Postcopy && self.postcopy.is_none() {
                found.add(
                    "timeout.then",
                    ProblemCode::Contradiction,
                    "timeout.then is postcopy, and post-copy is not allowed: give postcopy too"
                        .into(),
                );
            }
        }
        found.0
    }

    fn check_numbers(&self, found: &mut Found) {
        let (least, most) = (limits::BANDWIDTH_MIN_BYTES_PER_S, limits::BANDWIDTH_MAX_BYTES_PER_S);
        let postcopy = self.postcopy.and_then(|postcopy| postcopy.bandwidth_bytes_per_s);
        let switchover = self.available_switchover_bandwidth_bytes_per_s;
        found.range("bandwidth_bytes_per_s", self.bandwidth_bytes_per_s, least, most);
        found.range("postcopy.bandwidth_bytes_per_s", postcopy, least, most);
        found.range("available_switchover_bandwidth_bytes_per_s", switchover, least, most);
        let (least, most) = (limits::MAX_DOWNTIME_MIN_MS, limits::MAX_DOWNTIME_MAX_MS);
        found.range("max_downtime_ms", self.max_downtime_ms, least, most);
        let (least, most) = (limits::CONNECTIONS_MIN, limits::CONNECTIONS_MAX);
        found.range("parallel_connections", self.parallel_connections, least, most);
        let throttle = self.auto_converge.unwrap_or_default();
        let (least, most) = (limits::THROTTLE_MIN_PERCENT, limits::THROTTLE_MAX_PERCENT);
        found.range("auto_converge.initial_percent", throttle.initial_percent, least, most);
        found.range("auto_converge.increment_percent", throttle.increment_percent, least, most);
    }

    fn check_source_and_destination(&self, found: &mut Found) {
        if self.persistent == Some(false) {
            found.add(
                "persistent",
                ProblemCode::NotOffered,
                "persistent is false, but a VM always has a definition where it is: leave it out"
                    .into(),
            );
        }
        if self.copy && self.undefine_source == Some(true) {
            found.add(
                "undefine_source",
                ProblemCode::Contradiction,
                "copy keeps a definition on the source, undefine_source takes it away: leave one of \
                 them out"
                    .into(),
            );
        }
        found.address("migrate_address", self.migrate_address.as_deref());
    }

    fn check_disks(&self, found: &mut Found) {
        let disks = &self.disks;
        let named = disks.each.len().try_into().unwrap_or(u64::MAX);
        found.range("disks.each", Some(named), 0, limits::NAMED_DISKS_MAX);
        found.address("disks.address", disks.address.as_deref());
        if let Some(Originals::Quarantine { days }) = disks.originals {
            let (least, most) = (limits::QUARANTINE_MIN_DAYS, limits::QUARANTINE_MAX_DAYS);
            found.range("disks.originals.quarantine.days", Some(days), least, most);
        }
        let said = [
            ("disks.address", disks.address.is_some()),
            ("disks.originals", disks.originals.is_some()),
        ];
        for (field, said) in said {
            if said && !disks.may_copy() {
                let sentence =
                    format!("{field} is for disks that are copied, and none is: leave it out");
                found.add(field, ProblemCode::Contradiction, sentence);
            }
        }
        let taken = disks.originals.is_some_and(|originals| originals != Originals::Keep);
        if taken && self.keeps_definition() {
            found.add(
                "disks.originals",
                ProblemCode::Contradiction,
                "the source is to keep a definition of the VM, and disks.originals takes its disks away: \
                 keep both or none"
                    .into(),
            );
        }
        if self.mode == Mode::Offline && disks.address.is_some() {
            let sentence = "disks.address is for disks of a guest that runs: leave it out".into();
            found.add("disks.address", ProblemCode::Contradiction, sentence);
        }
    }
}

fn check_compression(compression: &Compression, found: &mut Found) {
    let Compression { methods, zlib_level, zstd_level, xbzrle_cache_bytes } = compression;
    if methods.len() > limits::METHODS_MAX
        || methods.iter().enumerate().any(|(index, method)| methods[..index].contains(method))
    {
        let sentence = "compression.methods lists a method twice".into();
        found.add("compression.methods", ProblemCode::Repeated, sentence);
    }
    found.range("compression.zlib_level", *zlib_level, 0, limits::ZLIB_LEVEL_MAX);
    found.range("compression.zstd_level", *zstd_level, 0, limits::ZSTD_LEVEL_MAX);
    let (least, most) = (limits::XBZRLE_CACHE_MIN_BYTES, limits::XBZRLE_CACHE_MAX_BYTES);
    let field = "compression.xbzrle_cache_bytes";
    if found.range(field, *xbzrle_cache_bytes, least, most)
        && let Some(bytes) = xbzrle_cache_bytes.filter(|bytes| !bytes.is_power_of_two())
    {
        let sentence = format!("{field} is {bytes}; it has to be a power of two");
        found.add(field, ProblemCode::NotPowerOfTwo, sentence);
    }
    let settings = [
        ("compression.zlib_level", zlib_level.is_some(), CompressionMethod::Zlib),
        ("compression.zstd_level", zstd_level.is_some(), CompressionMethod::Zstd),
        (field, xbzrle_cache_bytes.is_some(), CompressionMethod::Xbzrle),
    ];
    for (field, given, method) in settings {
        if given && !methods.is_empty() && !methods.contains(&method) {
            let sentence = format!(
                "{field} is for {method}, which is not among compression.methods: add it, or leave the \
                 setting out"
            );
            found.add(field, ProblemCode::Contradiction, sentence);
        }
    }
}

/// Whether another host could be reached at an address; what else the text is, without repeating it.
fn check_address(text: &str) -> Result<(), &'static str> {
    if text.is_empty() {
        return Err("is empty");
    }
    if text.len() > limits::ADDRESS_MAX_BYTES {
        return Err("is longer than 253 bytes");
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return check_ip(address);
    }
    let label = |label: &str| {
        let inner = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        inner && (1..=63).contains(&label.len()) && !label.starts_with('-') && !label.ends_with('-')
    };
    let numeric =
        text.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
    if !text.split('.').all(label) || numeric {
        return Err("is neither an IP address nor a host name");
    }
    Ok(())
}

fn check_ip(address: IpAddr) -> Result<(), &'static str> {
    let link_local = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    match address {
        _ if address.is_unspecified() => Err("is the unspecified address"),
        _ if address.is_loopback() => Err("is a loopback address"),
        _ if address.is_multicast() || broadcast => Err("is a multicast or broadcast address"),
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            Err("is an IPv4 address written as IPv6")
        }
        _ if link_local => Err("is a link-local address without its zone"),
        _ => Ok(()),
    }
}

#[derive(Default)]
struct Found(Vec<OptionProblem>);

impl Found {
    fn add(&mut self, field: &str, code: ProblemCode, sentence: String) {
        self.0.push(OptionProblem { field: field.to_owned(), code, sentence });
    }

    /// Looks at an address, if there is one.
    fn address(&mut self, field: &str, address: Option<&str>) {
        if let Some(Err(why)) = address.map(check_address) {
            let sentence = format!("{field} {why}: give an address that hosts can reach");
            self.add(field, ProblemCode::BadAddress, sentence);
        }
    }

    /// Whether the number, if there is one, is in its bounds.
    fn range(&mut self, field: &str, value: Option<u64>, least: u64, most: u64) -> bool {
        match value {
            Some(value) if !(least..=most).contains(&value) => {
                let sentence = format!("{field} is {value}; it can be {least} to {most}");
                self.add(field, ProblemCode::OutOfRange, sentence);
                false
            }
            _ => true,
        }
    }
}
