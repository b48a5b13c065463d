//! A strategy: the explicit settings of one move, nothing left to be chosen.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::options::CompressionMethod;

/// How a guest's memory goes, by explicit settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Strategy {
    /// The rung of the ladder.
    pub rung: Rung,
    /// Connections side by side (multifd); a single stream without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channels: Option<u8>,
    /// Compression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<CompressionSetting>,
    /// The longest pause, in milliseconds.
    pub max_downtime_ms: u64,
    /// Bytes a second that are there for the last pass; as measured by QEMU without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switchover_bandwidth_bytes_per_s: Option<u64>,
    /// Most bytes a second; unlimited without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_s: Option<u64>,
    /// Post-copy, made ready before the start; never without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy: Option<PostcopySetting>,
    /// Slowing the guest down; never without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle: Option<ThrottleSetting>,
    /// The guest is stopped before its memory is sent.
    pub stop_first: bool,
    /// The stream is encrypted.
    pub tls: bool,
    /// Pages are sent without a copy in the kernel.
    pub zerocopy: bool,
}

impl Strategy {
    /// A single stream, nothing special: the first rung.
    #[must_use]
    pub fn plain(max_downtime_ms: u64) -> Self {
        Self {
            rung: Rung::Plain,
            channels: None,
            compression: None,
            max_downtime_ms,
            switchover_bandwidth_bytes_per_s: None,
            bandwidth_bytes_per_s: None,
            postcopy: None,
            throttle: None,
            stop_first: false,
            tls: true,
            zerocopy: false,
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.channels {
            None => write!(f, "one stream")?,
            Some(1) => write!(f, "1 connection")?,
            Some(channels) => write!(f, "{channels} connections")?,
        }
        if let Some(compression) = self.compression {
            write!(f, ", {compression}")?;
        }
        if self.zerocopy {
            write!(f, ", zero-copy")?;
        }
        if !self.tls {
            write!(f, ", no TLS")?;
        }
        if self.stop_first {
            return write!(f, ", the guest stopped meanwhile");
        }
        match self.postcopy.map(|postcopy| postcopy.begin) {
            Some(PostcopyBegin::AtOnce) => write!(f, ", post-copy at once")?,
            Some(PostcopyBegin::AfterFirstPass) => write!(f, ", post-copy after a first pass")?,
            Some(PostcopyBegin::WhenStalled) => write!(f, ", post-copy in reserve")?,
            Some(PostcopyBegin::WhenOrdered) => write!(f, ", post-copy when ordered")?,
            None => {}
        }
        if let Some(throttle) = self.throttle.filter(|throttle| !throttle.is_reserve()) {
            let ThrottleSetting { initial_percent, increment_percent, max_percent } = throttle;
            write!(f, ", throttle {initial_percent} % + {increment_percent} % to {max_percent} %")?;
        }
        write!(f, ", pause up to {} ms", self.max_downtime_ms)
    }
}

/// The rungs of the ladder, from the cheapest on.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Rung {
    /// A single stream.
    Plain,
    /// More connections side by side.
    Channels,
    /// Compression.
    Compression,
    /// A longer pause, within the limit.
    Downtime,
    /// Post-copy.
    Postcopy,
    /// The guest is slowed down.
    Throttle,
    /// The guest is stopped.
    Static,
}

impl Rung {
    /// All rungs, from the cheapest on.
    pub const ALL: [Self; 7] = [
        Self::Plain,
        Self::Channels,
        Self::Compression,
        Self::Downtime,
        Self::Postcopy,
        Self::Throttle,
        Self::Static,
    ];

    /// What it is, in words.
    #[must_use]
    pub const fn as_words(self) -> &'static str {
        match self {
            Self::Plain => "a single stream",
            Self::Channels => "parallel connections",
            Self::Compression => "compression",
            Self::Downtime => "a longer pause",
            Self::Postcopy => "post-copy",
            Self::Throttle => "throttling the guest",
            Self::Static => "stopping the guest",
        }
    }
}

/// A method of compression with its setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(tag = "method", rename_all = "kebab-case")]
pub enum CompressionSetting {
    /// zlib.
    Zlib {
        /// Its level, 0 to 9.
        level: u8,
    },
    /// zstd.
    Zstd {
        /// Its level, 0 to 20.
        level: u8,
    },
    /// xbzrle.
    Xbzrle {
        /// Its cache, in bytes.
        cache_bytes: u64,
    },
}

impl CompressionSetting {
    /// The method.
    #[must_use]
    pub const fn method(self) -> CompressionMethod {
        match self {
            Self::Zlib { .. } => CompressionMethod::Zlib,
            Self::Zstd { .. } => CompressionMethod::Zstd,
            Self::Xbzrle { .. } => CompressionMethod::Xbzrle,
        }
    }
}

impl fmt::Display for CompressionSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zlib { level } => write!(f, "zlib level {level}"),
            Self::Zstd { level } => write!(f, "zstd level {level}"),
            Self::Xbzrle { cache_bytes } => write!(f, "xbzrle with {} MiB", cache_bytes >> 20),
        }
    }
}

/// Post-copy, as it is made ready before the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub struct PostcopySetting {
    /// When it begins.
    pub begin: PostcopyBegin,
    /// Pages that the guest waits for overtake the others.
    pub preempt: bool,
    /// Most bytes a second for pages that nobody waits for; unlimited without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_s: Option<u64>,
}

/// When post-copy begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PostcopyBegin {
    /// As soon as memory goes: of a first pass, most would have to be sent again.
    AtOnce,
    /// As soon as one pass over the memory is made.
    AfterFirstPass,
    /// When the copy turns out not to converge.
    WhenStalled,
    /// When the user orders it, or a timeout does.
    WhenOrdered,
}

/// Throttling of the vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub struct ThrottleSetting {
    /// The first step, in percent.
    pub initial_percent: u8,
    /// Each further step, in percent.
    pub increment_percent: u8,
    /// The hardest, in percent.
    pub max_percent: u8,
}

impl ThrottleSetting {
    /// QEMU's own steps.
    pub const STANDARD: Self = Self { initial_percent: 20, increment_percent: 10, max_percent: 99 };

    /// Switched on but hardly felt. QEMU takes capabilities only before a migration begins, and
    /// parameters also while it runs: what may be needed has to be switched on beforehand.
    pub const RESERVE: Self = Self { initial_percent: 1, increment_percent: 1, max_percent: 1 };

    /// Whether it is only kept ready.
    #[must_use]
    pub fn is_reserve(&self) -> bool {
        *self == Self::RESERVE
    }
}
