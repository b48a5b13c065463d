//! This host's word on the VM, written into its ledger: the release among them, which is the point of no return.
//!
//! A write has an answer, written or failed, however long it takes; the rules go on when it has come. While a disk hangs
//! it is neither, and nobody but this host can say what becomes of the VM: that is told meanwhile, and taken back.

use std::time::Instant;

use tokio::sync::watch;
use tracing::{error, warn};
use whimbrel_api::agent::{OutgoingEnd, OutgoingReport};
use whimbrel_api::error::chain;
use whimbrel_api::vm::VmState;
use whimbrel_api::{MigrationId, Phase, VmId};
use whimbrel_migration::handoff::{Ownership, SourceInput, Standing, UNRESOLVED_AFTER_MS};

use super::Departure;
use super::copy::enter;
use super::pause::now_us;
use crate::host::Host;
use crate::migrate::driver::written;

/// Where it is told how the writing goes.
#[derive(Clone, Copy)]
struct Teller<'a> {
    host: &'a Host,
    migration: MigrationId,
    vm: VmId,
    report: &'a watch::Sender<OutgoingReport>,
}

/// What was told before.
struct Told {
    end: OutgoingEnd,
    vm: Option<VmState>,
}

/// Whether a record gives the VM away.
fn is_release(record: &Ownership) -> bool {
    matches!(record.standing, Standing::Released { .. } | Standing::Serving { .. })
}

impl Departure {
    /// Writes a record; answers with whether it is on the disk.
    pub(super) async fn persist(&mut self, record: &Ownership) -> SourceInput {
        let releasing = is_release(record);
        if releasing {
            self.pause.confirmed.get_or_insert_with(now_us);
        }
        let (migration, vm) = (self.id, self.request.vm);
        let teller = Teller { host: &self.host, migration, vm, report: &self.report };
        let mut before = None;
        let tell = async { before = Some(teller.tell_unwritten(record).await) };
        let written = written(teller.write(record), tell).await;
        if let Some(before) = before {
            teller.tell_again(before).await;
        }
        if releasing {
            self.pause.released = written.then(now_us);
            // Whether it was written or not: the guest stands still until somebody says whose it is.
            self.released_at = Some(Instant::now());
        }
        if written { SourceInput::Persisted } else { SourceInput::PersistFailed }
    }
}

impl Teller<'_> {
    async fn write(self, record: &Ownership) -> bool {
        if is_release(record) {
            // A test that wants the agent to die or hang here says so; a failure counts as the ledger's.
            if self.host.failpoints.hit("source.before-release").await.is_err() {
                return false;
            }
            enter(self.report, Phase::Handoff);
        }
        let written = self.host.ledger.persist(record).await;
        if let Err(error) = &written {
            warn!(migration = %self.migration, error = chain(error), "the ledger could not be written");
        }
        written.is_ok()
    }

    /// The disk neither writes nor fails.
    async fn tell_unwritten(self, record: &Ownership) -> Told {
        let Self { host, migration, vm, report } = self;
        error!(%migration, %vm, standing = ?record.standing,
            "the disk of this host's ledger does not answer; it is waited for");
        let before = Told {
            end: report.borrow().end.clone(),
            vm: host.vms.report(vm).ok().map(|report| report.state),
        };
        let ask = host.name().clone();
        report.send_modify(|report| report.end = OutgoingEnd::Unresolved { ask });
        let why = format!(
            "the disk of its host's ledger has not answered for {UNRESOLVED_AFTER_MS} ms; migration {migration} waits for it"
        );
        host.vms.loan_news(vm, VmState::Unknown { why }).await;
        before
    }

    /// The disk has answered.
    async fn tell_again(self, before: Told) {
        warn!(migration = %self.migration, "the disk of this host's ledger has answered");
        self.report.send_modify(|report| report.end = before.end);
        if let Some(news) = before.vm {
            self.host.vms.loan_news(self.vm, news).await;
        }
    }
}
