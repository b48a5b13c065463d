//! What both sides of the comparison can do with a guest of theirs, and what comes of a move.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::stage::{Guest, Moved};

/// A guest in the hands of `whimbrel` or of libvirt. It rests while it is not its turn, so that it takes no processor time
/// from the other.
pub(crate) trait Mover {
    fn address(&self) -> Ipv4Addr;

    /// Lets it stand still.
    fn rest(&self, at: &str) -> Result<()>;

    /// Lets it run again.
    fn wake(&self, at: &str) -> Result<()>;

    /// Moves it by one command with these options; interrupted when that takes longer.
    fn go(&self, from: &str, to: &str, options: &[&str], within: Duration) -> Result<End>;

    /// Ends it and deletes its disk.
    fn remove(self: Box<Self>, at: &str) -> Result<()>;
}

/// How a move ended.
#[derive(Debug)]
pub(crate) enum End {
    Arrived(Trip),
    /// It was interrupted when its time was over, and runs where it was.
    TooSlow,
}

/// A move that went well. All times are in microseconds since 1970, by one machine's clock.
#[derive(Debug)]
pub(crate) struct Trip {
    /// The command's start.
    pub(crate) spawned_us: u64,
    /// The command's end.
    pub(crate) ended_us: u64,
    /// QEMU began to copy memory.
    pub(crate) copying_us: u64,
    /// The source's STOP event.
    pub(crate) stopped_us: u64,
    /// The destination's RESUME event.
    pub(crate) resumed_us: u64,
    /// QEMU's own total time.
    pub(crate) engine_ms: f64,
}

impl Mover for Guest<'_> {
    fn address(&self) -> Ipv4Addr {
        self.address
    }

    fn rest(&self, _at: &str) -> Result<()> {
        Guest::rest(self)
    }

    fn wake(&self, _at: &str) -> Result<()> {
        Guest::wake(self)
    }

    fn go(&self, _from: &str, to: &str, options: &[&str], within: Duration) -> Result<End> {
        match self.migrate_within(to, options, within)? {
            Some(moved) => Ok(End::Arrived(trip(&moved)?)),
            None => Ok(End::TooSlow),
        }
    }

    fn remove(self: Box<Self>, _at: &str) -> Result<()> {
        Guest::remove(*self)
    }
}

fn trip(moved: &Moved) -> Result<Trip> {
    let downtime = moved.record.downtime.context("the record tells no downtime")?;
    let progress = moved.record.progress.as_ref().context("the record has no figures of QEMU")?;
    Ok(Trip {
        spawned_us: moved.spawned_us,
        ended_us: moved.ended_us,
        copying_us: moved.copying_us()?,
        stopped_us: downtime.stopped_at_us.context("QEMU's STOP event was missed")?,
        resumed_us: downtime.resumed_at_us.context("QEMU's RESUME event was missed")?,
        engine_ms: progress.engine_total_ms as f64,
    })
}
