//! A wish to stop (Ctrl-C, a request to terminate, a closed terminal), heard between two steps: the lab is taken down as
//! at the end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result, bail};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use whimbrel_lab::Cancel;

/// The wish, or its absence.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop {
    wished: Arc<AtomicBool>,
    cancel: Cancel,
}

impl Stop {
    /// From now on the signals end nothing by themselves. They are handled and not held back, for children inherit what is
    /// held back, and have to be interruptible.
    pub(crate) fn catch() -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("cannot wait for signals")?;
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let signals = {
            let _entered = runtime.enter();
            kinds.into_iter().map(signal).collect::<io::Result<Vec<_>>>()
        };
        let mut signals = signals.context("cannot catch Ctrl-C")?;
        let stop = Self::default();
        let heard = stop.clone();
        thread::spawn(move || {
            runtime.block_on(async {
                let [interrupt, terminate, hangup] = signals.as_mut_slice() else { return };
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                        _ = hangup.recv() => {}
                    }
                    heard.wished.store(true, Ordering::Relaxed);
                    heard.cancel.cancel();
                }
            });
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
