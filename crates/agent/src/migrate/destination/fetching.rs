//! The destination in post-copy: the guest's state is here, and the rest of its memory comes while it runs.
//!
//! The guest is this host's, or about to be, and neither QEMU is ended here (invariant I23): a lost connection is waited
//! for, and made again when the source asks for it ([`Arrival::listen_again`]). What is told to the rules: that all memory
//! has come, and, where the source can send nothing more, that some never will.
//!
//! Not here: the source's half ([`crate::migrate::source`]), and what QEMU is told ([`incoming`]).

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, timeout};
use tracing::{debug, error, info, warn};
use whimbrel_api::agent::{IncomingReport, IncomingRequest, NewAddress};
use whimbrel_api::error::chain;
use whimbrel_api::vm::VmState;
use whimbrel_api::{ApiError, ErrorCode, MigrationId};
use whimbrel_migration::handoff::{DestinationInput, Ownership, Standing};
use whimbrel_qemu::machine::Machine;
use whimbrel_qemu::migrate::Statistics;
use whimbrel_qemu::migrate::incoming::{self, IncomingError, Loaded};
use whimbrel_qemu::migrate::outgoing::pause_postcopy;
use whimbrel_qemu::process::Process;
use whimbrel_qemu::qmp::QmpError;

use super::Arrival;
use crate::host::Host;
use crate::ledger::RunRecord;
use crate::migrate::migration_ip;
use crate::migrate::resuming::{Was, resume};
use crate::vm::Spawned;
use crate::vm::found::{Found, find_again};

/// How long QEMU may take to give a lost connection up and to listen anew, in seconds.
const LISTEN_AGAIN_SECONDS: u64 = 8;
/// How soon a question is repeated that QEMU did not answer, in milliseconds.
const ASK_AGAIN_MS: u64 = 200;
/// How long what is on its way from a source that sends nothing more may take to be read, in seconds, before the connection
/// is given up: its end may have been lost with the network.
const LAST_BYTES_SECONDS: u64 = 5;
/// How long the operator is not told of a guest whose lost memory cannot be asked for, in seconds.
const LOST_TOLD_SECONDS: u64 = 30;

/// What is known of memory that its source will never send.
#[derive(Debug, Default)]
pub(super) struct Lost {
    /// Since when it is looked for.
    since: Option<Instant>,
    /// Since when QEMU has been seen to wait for it on a connection that it believes in.
    believed: Option<Instant>,
    told: bool,
}

/// What is waited for: the guest's arrival, then the rest of its memory.
pub(super) type Loading = Pin<Box<dyn Future<Output = Result<Came, IncomingError>> + Send>>;

/// What has come.
pub(super) enum Came {
    /// The guest, stopped; all of it or its state.
    Guest(Loaded),
    /// What was missing of its memory.
    Rest(Statistics),
    /// A session with QEMU, in place of one that has ended: only the waiting goes on.
    Session(Machine),
}

pub(super) fn wait_loaded(target: &Spawned) -> Loading {
    let machine = target.machine.clone();
    Box::pin(async move { incoming::wait_loaded(&machine).await.map(Came::Guest) })
}

fn wait_rest(host: &Arc<Host>, target: &Spawned, progress: watch::Sender<Statistics>) -> Loading {
    let (host, record, machine) = (host.clone(), target.record(), target.machine.clone());
    Box::pin(async move {
        loop {
            match incoming::wait_whole(&machine, &progress).await {
                Ok(statistics) => return Ok(Came::Rest(statistics)),
                Err(_) if machine.qmp().ended().is_some() => {
                    warn!(
                        run = record.name,
                        "the session with QEMU has ended in post-copy; opening another"
                    );
                    match find_again(&host, &record).await {
                        Found::Alive(found) => return Ok(Came::Session(found.machine)),
                        Found::Gone { .. } => std::future::pending().await,
                    }
                }
                // Its end is heard elsewhere, and means something else then.
                Err(IncomingError::Query(_) | IncomingError::Ended(_)) => {
                    sleep(Duration::from_millis(ASK_AGAIN_MS)).await;
                }
                Err(error) => return Err(error),
            }
        }
    })
}

/// Gives a VM whose memory still comes its task.
pub(in crate::migrate) async fn adopt(
    host: &Arc<Host>,
    id: MigrationId,
    request: &IncomingRequest,
    record: Ownership,
    run: Option<RunRecord>,
) {
    let adopted = host.vms.adopt_lent(host, &request.definition, (record, id), run).await;
    if let Err(error) = adopted {
        warn!(migration = %id, %error, "the VM is here, but its row could not be written");
    }
}

impl Arrival {
    /// What was waited for has come, or never will.
    pub(super) fn came(&mut self, came: Result<Came, IncomingError>) -> Option<DestinationInput> {
        self.loading = None;
        match came {
            Ok(Came::Guest(Loaded { whole: true, .. })) => Some(DestinationInput::Loaded),
            Ok(Came::Guest(_)) => {
                self.fetch();
                Some(DestinationInput::StateLoaded)
            }
            Ok(Came::Session(machine)) => {
                if let Some(target) = &mut self.target {
                    target.machine = machine;
                }
                self.fetch();
                None
            }
            Ok(Came::Rest(statistics)) => {
                info!(migration = %self.id, "all memory has come");
                self.statistics.send_replace(statistics);
                Some(DestinationInput::Loaded)
            }
            // Once GO has been taken the rules do not hear this: such a guest is given up only by its own end, or when its
            // source has nothing more to send (`LookForRest`).
            Err(error) => {
                warn!(migration = %self.id, error = chain(&error), "no more of the guest comes");
                Some(DestinationInput::Abandon(chain(&error)))
            }
        }
    }

    /// Gives the VM a task of its own as soon as it is this host's, where its memory still comes: it is told as migrating,
    /// its console can be read, and all other orders are refused.
    pub(super) async fn adopt(&mut self) {
        let Some(record) = self.owned.clone().filter(|_| !self.adopted) else { return };
        if !matches!(record.standing, Standing::Fetching { .. }) {
            return;
        }
        self.adopted = true;
        let epoch = record.epoch;
        let run = self.target.as_ref().map(Spawned::record);
        adopt(&self.host, self.id, &self.request, record, run).await;
        self.report.send_replace(IncomingReport::Fetching { epoch });
    }

    /// Waits for the rest of the memory.
    pub(super) fn fetch(&mut self) {
        let Some(target) = &self.target else { return };
        self.loading = Some(wait_rest(&self.host, target, self.statistics.clone()));
    }

    /// The rules' question whether all memory is here, or some of it never will be. Without an answer it is asked again,
    /// since the source says again what made them ask.
    pub(super) async fn look_for_rest(&mut self) -> Option<DestinationInput> {
        let target = self.target.as_ref()?;
        let listen = migration_ip(&self.host, self.listen_at()).await.ok()?;
        let ports = self.host.config.migration_port_range();
        let machine = target.machine.clone();
        match incoming::rest(&machine, listen, ports).await {
            Ok(incoming::Rest::Whole) => return Some(DestinationInput::Loaded),
            Ok(incoming::Rest::Cut) => {
                let source = &self.request.source;
                let why =
                    format!("the memory that was still at {source} is lost with its QEMU there");
                self.starved = Some(why);
                return Some(DestinationInput::Starved);
            }
            Ok(incoming::Rest::Open) => self.give_up_believed(&machine).await,
            Err(error) => {
                debug!(migration = %self.id, error = chain(&error), "QEMU does not say whether it lacks memory");
            }
        }
        self.tell_lost().await;
        None
    }

    /// QEMU waits on a connection for a source that sends nothing more. What has come is read; then it is given up, and
    /// the next look finds it cut.
    async fn give_up_believed(&mut self, machine: &Machine) {
        let since = *self.lost.believed.get_or_insert_with(Instant::now);
        if since.elapsed() < Duration::from_secs(LAST_BYTES_SECONDS) {
            return;
        }
        if let Err(error) = pause_postcopy(machine).await {
            debug!(migration = %self.id, error = chain(&error), "QEMU does not give up its connection");
        }
    }

    /// Where it lasts that is told: the guest waits for memory that nobody has, and cannot be ended for certain.
    async fn tell_lost(&mut self) {
        let since = *self.lost.since.get_or_insert_with(Instant::now);
        if self.lost.told || since.elapsed() < Duration::from_secs(LOST_TOLD_SECONDS) {
            return;
        }
        self.lost.told = true;
        let (vm, source) = (self.request.definition.id, &self.request.source);
        let why = format!(
            "its source {source} can send no more memory, and QEMU does not say whether it lacks any; it is asked on"
        );
        error!(migration = %self.id, %vm, why, "an operator must look");
        self.host.vms.loan_news(vm, VmState::Unknown { why }).await;
    }

    /// The guest shall run, after a restart of the agent; the rest of its memory comes meanwhile.
    pub(super) async fn resume_guest(&mut self) {
        // It opens a session of its own where there is none.
        let fetches = self.loading.take().is_some();
        if let Some(target) = &mut self.target {
            resume(&self.host, target, self.id, Was::Fetching).await;
        }
        if fetches {
            self.fetch();
        }
    }

    /// Listens anew for a source whose connection was lost. Answered beside the driver.
    pub(super) fn listen_again(&self, answer: oneshot::Sender<Result<NewAddress, ApiError>>) {
        let Some(target) = self.target.clone().filter(|_| self.rules.lacks_memory()) else {
            let message = "no post-copy is under way here";
            // Whoever asked may have gone.
            let _gone = answer.send(Err(ApiError::new(ErrorCode::WrongState, message)));
            return;
        };
        let (host, id) = (self.host.clone(), self.id);
        let listen = self.listen_at().map(str::to_owned);
        tokio::spawn(async move {
            let late =
                ApiError::new(ErrorCode::Busy, "QEMU does not listen anew yet").hint("ask again");
            let within = Duration::from_secs(LISTEN_AGAIN_SECONDS);
            let listening = async {
                let address = migration_ip(&host, listen.as_deref()).await?;
                listen_again(&host, &target.machine, &target.process, address).await
            };
            let listening = timeout(within, listening).await.unwrap_or(Err(late));
            if let Ok(NewAddress { address }) = &listening {
                info!(migration = %id, %address, "listening anew for the rest of the memory");
            }
            let _gone = answer.send(listening);
        });
    }
}

async fn listen_again(
    host: &Host,
    machine: &Machine,
    process: &Process,
    address: IpAddr,
) -> Result<NewAddress, ApiError> {
    loop {
        let ports = host.config.migration_port_range();
        match incoming::recover(machine, process, address, ports).await {
            Ok(listening) => return Ok(NewAddress { address: listening.address }),
            // It has not noticed yet that the connection is lost.
            Err(IncomingError::Listen { source: QmpError::Refused { .. }, .. }) => {
                match pause_postcopy(machine).await {
                    Ok(()) | Err(QmpError::Refused { .. }) => {}
                    Err(error) => return Err(ApiError::new(ErrorCode::Engine, chain(&error))),
                }
                sleep(Duration::from_millis(ASK_AGAIN_MS)).await;
            }
            Err(error) => return Err(ApiError::new(ErrorCode::Engine, chain(&error))),
        }
    }
}
