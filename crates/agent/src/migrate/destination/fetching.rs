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
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};
use whimbrel_api::agent::{IncomingReport, NewAddress};
use whimbrel_api::error::chain;
use whimbrel_api::{ApiError, ErrorCode};
use whimbrel_migration::handoff::{DestinationInput, Standing};
use whimbrel_qemu::machine::Machine;
use whimbrel_qemu::migrate::incoming::{self, IncomingError, Loaded};
use whimbrel_qemu::migrate::outgoing::pause_postcopy;
use whimbrel_qemu::migrate::{MigrationStatus, Statistics};
use whimbrel_qemu::process::Process;
use whimbrel_qemu::qmp::QmpError;

use super::Arrival;
use crate::host::Host;
use crate::migrate::migration_ip;
use crate::migrate::resuming::{Was, resume};
use crate::vm::Spawned;

/// How long QEMU may take to give a lost connection up and to listen anew, in seconds.
const LISTEN_AGAIN_SECONDS: u64 = 8;
/// How soon a question is repeated that QEMU did not answer, in milliseconds.
const ASK_AGAIN_MS: u64 = 200;

/// What is waited for: the guest's arrival, then the rest of its memory.
pub(super) type Loading = Pin<Box<dyn Future<Output = Result<Came, IncomingError>> + Send>>;

/// What has come.
pub(super) enum Came {
    /// The guest, stopped; all of it or its state.
    Guest(Loaded),
    /// What was missing of its memory.
    Rest(Statistics),
}

pub(super) fn wait_loaded(target: &Spawned) -> Loading {
    let machine = target.machine.clone();
    Box::pin(async move { incoming::wait_loaded(&machine).await.map(Came::Guest) })
}

fn wait_rest(target: &Spawned, progress: watch::Sender<Statistics>) -> Loading {
    let machine = target.machine.clone();
    Box::pin(async move {
        loop {
            match incoming::wait_whole(&machine, &progress).await {
                Ok(statistics) => return Ok(Came::Rest(statistics)),
                // Its end is heard elsewhere, and means something else then.
                Err(IncomingError::Query(_) | IncomingError::Ended(_)) => {
                    sleep(Duration::from_millis(ASK_AGAIN_MS)).await;
                }
                Err(error) => return Err(error),
            }
        }
    })
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
        let (definition, target) = (&self.request.definition, self.target.as_ref());
        let vms = &self.host.vms;
        let owner = (record, self.id);
        if let Err(error) = vms.adopt_lent(&self.host, definition, owner, target).await {
            warn!(migration = %self.id, %error, "the VM is here, but its row could not be written");
        }
        self.report.send_replace(IncomingReport::Fetching { epoch });
    }

    /// Waits for the rest of the memory.
    pub(super) fn fetch(&mut self) {
        let Some(target) = &self.target else { return };
        self.loading = Some(wait_rest(target, self.statistics.clone()));
    }

    /// The rules' question whether all memory is here, or some of it never will be. Without an answer it is asked again,
    /// since the source says again what made them ask.
    pub(super) async fn look_for_rest(&mut self) -> Option<DestinationInput> {
        let target = self.target.as_ref()?;
        match Statistics::query(target.machine.qmp()).await.ok()?.status {
            MigrationStatus::Completed => Some(DestinationInput::Loaded),
            MigrationStatus::PostcopyPaused | MigrationStatus::Failed => {
                let source = &self.request.source;
                let why =
                    format!("the memory that was still at {source} is lost with its QEMU there");
                self.starved = Some(why);
                Some(DestinationInput::Starved)
            }
            _ => None,
        }
    }

    /// The guest shall run, after a restart of the agent; the rest of its memory comes meanwhile.
    pub(super) async fn resume_guest(&mut self) {
        if let Some(target) = &mut self.target {
            resume(&self.host, target, self.id, Was::Fetching).await;
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
