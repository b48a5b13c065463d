//! A wish to stop (Ctrl-C, a request to terminate, a closed terminal), heard between two steps: the lab is taken down as
//! at the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use whimbrel_lab::Cancel;

/// The wish, or its absence.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop {
    wished: Arc<AtomicBool>,
    cancel: Cancel,
}

impl Stop {
    /// From now on the signals end nothing by themselves. Called before any other thread exists, which would get them
    /// instead. Children get them as usual: the standard library lets them begin with no signal held back.
    pub(crate) fn catch() -> Result<Self> {
        let signals: SigSet =
            [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
        signals.thread_block().context("cannot catch Ctrl-C")?;
        let stop = Self::default();
        let heard = stop.clone();
        thread::spawn(move || {
            while signals.wait().is_ok() {
                heard.wished.store(true, Ordering::Relaxed);
                heard.cancel.cancel();
            }
        });
        Ok(stop)
    }

    /// Ends a lab that is being set up.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// An error once somebody wants to stop.
    pub(crate) fn check(&self) -> Result<()> {
        if self.wished.load(Ordering::Relaxed) {
            bail!("interrupted; everything is taken down");
        }
        Ok(())
    }
}
