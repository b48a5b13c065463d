//! Takes a guest back out of a post-copy that was never released: its memory is whole here, and its QEMU has to be brought
//! to believe it.
//!
//! Only for who owns the guest: the migration's source before the release or after a refusal, and the VM's task where the
//! ledger says `Owned` and an agent that was killed has left its QEMU in the middle. How it is done is
//! [`whimbrel_qemu::migrate::outgoing::take_back`]'s.

use std::time::Duration;

use whimbrel_api::error::chain;
use whimbrel_qemu::migrate::Statistics;
use whimbrel_qemu::migrate::outgoing::take_back;

use super::Spawned;
use crate::host::Host;

/// How long QEMU may take to give its guest back, in seconds.
const TAKE_BACK_SECONDS: u64 = 10;
/// The socket in QEMU's folder at which it is told that it is over.
const STAND_IN: &str = "stand-in";

/// Takes the guest back if it is in post-copy. What fails is logged: the guest does not run then, and whoever wants it to
/// asks again.
pub(crate) async fn from_postcopy(host: &Host, qemu: &Spawned) {
    let status = match Statistics::query(qemu.machine.qmp()).await {
        Ok(statistics) => statistics.status,
        Err(error) => {
            tracing::warn!(
                run = qemu.run,
                error = chain(&error),
                "QEMU does not say whether it is in post-copy"
            );
            return;
        }
    };
    if !status.is_postcopy() {
        return;
    }
    tracing::info!(run = qemu.run, ?status, "takes the guest back out of post-copy");
    let socket = qemu.dir.qemu_folder().join(STAND_IN);
    let within = Duration::from_secs(TAKE_BACK_SECONDS);
    let user = Some(host.qemu_user());
    if let Err(error) = take_back(&qemu.machine, &socket, user, within).await {
        tracing::warn!(run = qemu.run, error = chain(&error), "QEMU did not give its guest back");
    }
}
