//! Two agents of a pool with a fake QEMU each; the test plays the controller.
//!
//! The fakes keep a lock on each guest that runs, so a guest that ran twice at once would be on record in the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use whimbrel_api::agent::{
    IncomingOffer, IncomingReport, IncomingRequest, OutgoingEnd, OutgoingReport, OutgoingRequest,
    Receive, ReceiveSettings,
};
use whimbrel_api::client::AgentClient;
use whimbrel_api::migration::{MigrateOptions, Mode, Strategy};
use whimbrel_api::policy::Policy;
use whimbrel_api::vm::VmState;
use whimbrel_api::{ApiError, Epoch, MigrationId, Phase, VmId};
use whimbrel_pki::grant::{Claims, SignedGrant};
use whimbrel_pki::tls;

use crate::place::{Life, PATIENCE, Place, Pool, eventually, in_namespace, running};

/// Two hosts of a pool, whose controller the test is.
pub(crate) struct Pair {
    pub(crate) pool: Arc<Pool>,
    pub(crate) a: Place,
    pub(crate) b: Place,
    pub(crate) calls: tokio::runtime::Runtime,
    last_epoch: AtomicU64,
}

/// One try to move a VM.
#[derive(Clone, Copy)]
pub(crate) struct Try {
    pub(crate) id: MigrationId,
    pub(crate) vm: VmId,
    pub(crate) epoch: Epoch,
}

/// How a VM is sent.
pub(crate) struct Way {
    pub(crate) strategy: Strategy,
    pub(crate) options: MigrateOptions,
    pub(crate) policy: Policy,
}

impl Default for Way {
    fn default() -> Self {
        let (options, policy) = (MigrateOptions::default(), Policy::default());
        Self { strategy: Strategy::plain(300), options, policy }
    }
}

impl Pair {
    pub(crate) fn of(versions: (&str, &str)) -> Self {
        let pool = Pool::new();
        let a = pool.host_of_version("a", 7440, versions.0);
        let b = pool.host_of_version("b", 7441, versions.1);
        let calls =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        Self { pool, a, b, calls: calls.unwrap(), last_epoch: AtomicU64::new(0) }
    }

    pub(crate) fn client(&self, place: &Place) -> AgentClient {
        let tls = tls::client_config(&self.pool.controller.client()).unwrap();
        AgentClient::new(&place.config.name, &place.config.advertised(), Arc::new(tls)).unwrap()
    }

    /// A VM that runs on a life's host.
    pub(crate) fn vm_on(&self, life: &Life) -> VmId {
        let host = Arc::clone(&life.host);
        let report = self.calls.block_on(life.spawn(async move { running(&host).await }));
        report.definition.id
    }

    pub(crate) fn try_to_move(&self, vm: VmId, from: &Life) -> Try {
        // An epoch that no try has had: one that ended early has burnt its own at the destination alone.
        let owned = from.host.vms.report(vm).unwrap().epoch;
        let last = self.last_epoch.load(Ordering::Relaxed).max(owned.0);
        let epoch = Epoch(last).next();
        self.last_epoch.store(epoch.0, Ordering::Relaxed);
        Try { id: MigrationId::new(), vm, epoch }
    }

    pub(crate) fn grant(&self, one: &Try, from: &Place, to: &Place) -> SignedGrant {
        let (not_before, expires) = Claims::window(SystemTime::now());
        let claims = Claims {
            vm: one.vm.to_string(),
            migration: one.id.to_string(),
            source: from.config.name.to_string(),
            destination: to.config.name.to_string(),
            epoch: one.epoch.0 - 1,
            not_before,
            expires,
        };
        SignedGrant::sign(&claims, &self.pool.controller.client()).unwrap()
    }

    pub(crate) async fn prepare(
        &self,
        one: &Try,
        from: &Place,
        to: &Place,
    ) -> Result<IncomingOffer, ApiError> {
        self.prepare_for(one, from, to, &Way::default()).await
    }

    pub(crate) async fn prepare_for(
        &self,
        one: &Try,
        from: &Place,
        to: &Place,
        way: &Way,
    ) -> Result<IncomingOffer, ApiError> {
        let mut definition = self.client(from).vm(one.vm).await?.definition;
        definition.name = way.options.dname.clone().unwrap_or(definition.name);
        let grant = self.grant(one, from, to);
        let source = from.config.name.clone();
        let receive = match way.options.mode {
            Mode::Offline => Receive::Definition,
            _ => Receive::Guest(ReceiveSettings::of(&way.strategy, None)),
        };
        let request = IncomingRequest { definition, source, epoch: one.epoch, receive, grant };
        self.client(to).put_incoming(one.id, &request).await
    }

    pub(crate) async fn send(
        &self,
        one: &Try,
        from: &Place,
        to: &Place,
        offer: IncomingOffer,
    ) -> Result<OutgoingReport, ApiError> {
        self.send_by(one, from, to, offer, Way::default()).await
    }

    pub(crate) async fn send_by(
        &self,
        one: &Try,
        from: &Place,
        to: &Place,
        offer: IncomingOffer,
        way: Way,
    ) -> Result<OutgoingReport, ApiError> {
        let request = OutgoingRequest {
            vm: one.vm,
            destination: to.config.name.clone(),
            epoch: one.epoch,
            options: way.options,
            strategy: way.strategy,
            policy: way.policy,
            forecast: None,
            measurements: None,
            offer,
            grant: self.grant(one, from, to),
        };
        self.client(from).put_outgoing(one.id, &request).await
    }

    pub(crate) async fn begin(&self, one: &Try, from: &Place, to: &Place) {
        let offer = self.prepare(one, from, to).await.unwrap();
        self.send(one, from, to, offer).await.unwrap();
    }

    pub(crate) async fn begin_by(&self, one: &Try, from: &Place, to: &Place, way: Way) {
        let offer = self.prepare_for(one, from, to, &way).await.unwrap();
        self.send_by(one, from, to, offer, way).await.unwrap();
    }

    /// How the source's side ends.
    pub(crate) async fn end(&self, one: &Try, from: &Place) -> OutgoingEnd {
        let client = self.client(from);
        let waiting = async {
            loop {
                // An agent that is being started again does not answer.
                if let Ok(report) = client.outgoing(one.id).await
                    && !matches!(report.end, OutgoingEnd::Open | OutgoingEnd::Unresolved { .. })
                {
                    return report.end;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("a migration ends")
    }

    pub(crate) async fn phase(&self, one: &Try, from: &Place, phase: Phase) {
        let client = self.client(from);
        let there =
            async || client.outgoing(one.id).await.is_ok_and(|report| report.phase == phase);
        eventually(there).await;
    }

    pub(crate) fn move_it(&self, vm: VmId, (from, source): (&Place, &Life), to: &Place) -> Try {
        let one = self.try_to_move(vm, source);
        self.calls.block_on(async {
            self.begin(&one, from, to).await;
            assert_eq!(self.end(&one, from).await, OutgoingEnd::Moved);
        });
        one
    }

    /// What the controller does after a migration that did not move the VM.
    pub(crate) fn settle(&self, one: &Try, to: &Place) {
        let told = self.calls.block_on(self.client(to).delete_incoming(one.id));
        assert!(!matches!(told, Ok(IncomingReport::Owned { .. })), "{told:?}");
    }

    /// Nothing is left on a host that runs nothing.
    pub(crate) fn assert_clean(&self, place: &Place, life: &Life) {
        self.calls.block_on(async {
            let ledger = &life.host.ledger;
            eventually(async || {
                place.run_folders().is_empty()
                    && ledger.runs().await.unwrap().is_empty()
                    && ledger.journaled().await.unwrap().is_empty()
            })
            .await;
            place.assert_clean(&life.host).await;
        });
    }

    pub(crate) fn assert_runs_on(&self, vm: VmId, life: &Life) {
        self.calls.block_on(eventually(async || {
            life.host.vms.report(vm).is_ok_and(|report| report.state == VmState::Running)
        }));
    }
}

pub(crate) fn with_pair(test: impl FnOnce(&Pair, Life, Life) + Send + 'static) {
    with_pair_of(("7.2", "7.2"), test);
}

/// Two hosts whose QEMUs are of these versions.
pub(crate) fn with_pair_of(
    versions: (&'static str, &'static str),
    test: impl FnOnce(&Pair, Life, Life) + Send + 'static,
) {
    in_namespace(move || {
        let pair = Pair::of(versions);
        let (a, b) = (pair.a.live(), pair.b.live());
        test(&pair, a, b);
    });
}
