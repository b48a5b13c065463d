//! How a guest's memory goes, from the contract's words into the engine's. Translation only: what is chosen, and whether it
//! fits both engines, was decided before ([`whimbrel_migration::strategy`], preflight).

use std::path::PathBuf;

use whimbrel_api::agent::{OutgoingRequest, ReceiveSettings};
use whimbrel_api::migration::{CompressionSetting, LiveSettings, ThrottleSetting};
use whimbrel_pki::identity::qemu_dns_name;
use whimbrel_qemu::migrate::outgoing::{OutgoingSettings, OutgoingTls};
use whimbrel_qemu::migrate::{Compression, LiveChange, Postcopy, Stream, Throttle};

/// What the source's QEMU is told. `credentials_dir` is where its certificates are laid out.
pub(super) fn outgoing(request: &OutgoingRequest, credentials_dir: PathBuf) -> OutgoingSettings {
    let strategy = &request.strategy;
    let tls = strategy.tls.then(|| OutgoingTls {
        credentials_dir,
        hostname: qemu_dns_name(request.destination.as_str()),
    });
    let postcopy = strategy.postcopy;
    OutgoingSettings {
        max_downtime_ms: strategy.max_downtime_ms,
        max_bandwidth_bytes_per_second: strategy.bandwidth_bytes_per_s.unwrap_or(0),
        max_postcopy_bandwidth_bytes_per_second: postcopy
            .and_then(|postcopy| postcopy.bandwidth_bytes_per_s)
            .unwrap_or(0),
        switchover_bandwidth_bytes_per_second: strategy.switchover_bandwidth_bytes_per_s,
        stream: Stream {
            multifd_channels: strategy.channels,
            compression: strategy.compression.map(compression),
            postcopy: postcopy.map(|postcopy| Postcopy { preempt: postcopy.preempt }),
        },
        throttle: strategy.throttle.map(throttle),
        zero_copy: strategy.zerocopy,
        ..OutgoingSettings::to(request.offer.address, tls)
    }
}

/// What the destination's QEMU is told of the stream.
pub(super) fn received(settings: &ReceiveSettings) -> Stream {
    Stream {
        multifd_channels: settings.channels,
        compression: settings.compression.map(compression),
        postcopy: settings.postcopy.map(|postcopy| Postcopy { preempt: postcopy.preempt }),
    }
}

/// What a running migration is told anew.
pub(super) fn change(settings: &LiveSettings) -> LiveChange {
    LiveChange {
        max_downtime_ms: settings.max_downtime_ms,
        max_bandwidth_bytes_per_second: settings.bandwidth_bytes_per_s,
        max_postcopy_bandwidth_bytes_per_second: settings.postcopy_bandwidth_bytes_per_s,
        throttle: None,
    }
}

/// How far the guest is held back.
pub(super) fn throttle(setting: ThrottleSetting) -> Throttle {
    let ThrottleSetting { initial_percent, increment_percent, max_percent } = setting;
    Throttle { initial_percent, increment_percent, max_percent }
}

fn compression(setting: CompressionSetting) -> Compression {
    match setting {
        CompressionSetting::Zlib { level } => Compression::Zlib { level },
        CompressionSetting::Zstd { level } => Compression::Zstd { level },
        CompressionSetting::Xbzrle { cache_bytes } => Compression::Xbzrle { cache_bytes },
    }
}
