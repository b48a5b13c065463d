//! Migrations on one host: the guests that leave and the guests that come.
//!
//! [`source`] and [`destination`] each tell their side as one story, [`driver`] turns the loop of both; [`knock`] tries the way
//! beforehand. Here is what both need around them: who may ask, which migrations are open, what is remembered for a restart.
//!
//! ```text
//!  http ──► prepare ─► Arrival::run      one task per incoming migration; owns the stopped QEMU
//!       ──► send ────► Departure::run    one task per outgoing migration; has the VM on loan from its task
//! ```
//!
//! A request is idempotent by the migration's id: repeated, it finds the migration open, or ended, and says how it is. An
//! ended migration's report stays until the controller has taken note (`DELETE`).
//!
//! After a restart of the agent [`mod@recover`] rebuilds every open migration from the ledger: the ownership record says what
//! may be done, the request says with whom.
//!
//! Not here: which host takes part and why (the controller), who may run the guest ([`whimbrel_migration::handoff`]).

mod destination;
mod driver;
mod knock;
mod orders;
mod reclaim;
mod recover;
mod resuming;
mod settings;
mod source;

pub use orders::{
    act, incoming_statistics, listen_again, outgoing_statistics, recover as recover_by_order, set,
};
pub use reclaim::{reclaim, superseded};
pub use recover::recover;

use std::collections::HashMap;
use std::future::Future;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tracing::{error, info, warn};
use whimbrel_api::agent::{
    Handoff, IncomingOffer, IncomingReport, IncomingRequest, KnockAddress, KnockConnect,
    KnockListen, OutgoingEnd, OutgoingReport, OutgoingRequest, Reach,
};
use whimbrel_api::error::chain;
use whimbrel_api::migration::{Mode, Stay};
use whimbrel_api::vm::VmState;
use whimbrel_api::{ApiError, Epoch, ErrorCode, MigrationId, Name, VmId};
use whimbrel_migration::handoff::{self, Destination, NotAdmitted};
use whimbrel_pki::grant::SignedGrant;
use whimbrel_pki::identity::Peer;
use whimbrel_pki::token::Secret;
use whimbrel_qemu::migrate::Statistics;

use self::source::samples::Samples;
use crate::host::Host;
use crate::ledger::{LedgerError, MigrationRow, Side};
use crate::sources::Knocks;
use crate::vm::spawn::destroy;
use crate::vm::{RunningVm, kept};

/// How long a caller waits for a destination to be prepared, in seconds: QEMU's start and its listening.
const PREPARE_SECONDS: u64 = 25;
/// How long an order waits for its answer, in seconds.
const ORDER_SECONDS: u64 = 12;
/// How long a handoff message waits for its answer, in seconds, where the task or the ledger hangs: less than its sender
/// waits.
const HANDOFF_SECONDS: u64 = 4;
/// Orders that may wait for a migration's task.
const ORDERS_MAX: usize = 16;
/// Migrations that a host keeps in mind, ended ones that nobody took note of included.
const MIGRATIONS_MAX: usize = 1024;

/// The migrations of this host that are open, or ended and not yet taken note of.
#[derive(Debug, Default)]
pub struct Migrations {
    open: Mutex<Open>,
    knocks: Knocks,
}

#[derive(Debug, Default)]
struct Open {
    incoming: HashMap<MigrationId, Incoming>,
    outgoing: HashMap<MigrationId, Outgoing>,
}

/// An incoming migration, seen from outside of its task.
#[derive(Debug, Clone)]
struct Incoming {
    vm: VmId,
    source: Name,
    ticket: String,
    orders: mpsc::Sender<destination::Order>,
    offer: watch::Receiver<Option<Result<IncomingOffer, ApiError>>>,
    report: watch::Receiver<IncomingReport>,
    statistics: watch::Receiver<Statistics>,
}

/// An outgoing migration, seen from outside of its task.
#[derive(Debug, Clone)]
struct Outgoing {
    vm: VmId,
    orders: mpsc::Sender<source::Order>,
    report: watch::Sender<OutgoingReport>,
    samples: Samples,
}

impl Outgoing {
    fn ended(&self) -> bool {
        matches!(self.report.borrow().end, OutgoingEnd::Moved | OutgoingEnd::Stayed { .. })
    }
}

/// What the ledger keeps of an incoming migration besides its request.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct IncomingState {
    ticket: String,
    offer: Option<IncomingOffer>,
}

impl Migrations {
    fn open(&self) -> std::sync::MutexGuard<'_, Open> {
        // A panic elsewhere leaves two maps, which are whole at any moment.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those on their way to this host.
    pub(crate) fn incoming_open(&self) -> usize {
        self.open().incoming.values().filter(|open| !open.orders.is_closed()).count()
    }

    /// Those that leave, and those that have ended and were not taken note of.
    pub(crate) fn outgoing_reports(&self) -> Vec<OutgoingReport> {
        self.open().outgoing.values().map(|open| open.report.borrow().clone()).collect()
    }

    fn find_incoming(&self, id: MigrationId) -> Option<Incoming> {
        self.open().incoming.get(&id).cloned()
    }

    fn find_outgoing(&self, id: MigrationId) -> Option<Outgoing> {
        self.open().outgoing.get(&id).cloned()
    }
}

impl Open {
    /// Refuses a second migration of a VM that has an open one here, and more migrations than can be kept in mind.
    fn admit(&self, vm: VmId) -> Result<(), ApiError> {
        let incoming =
            self.incoming.iter().find(|(_, open)| open.vm == vm && !open.orders.is_closed());
        let outgoing = self.outgoing.iter().find(|(_, open)| open.vm == vm && !open.ended());
        if let Some(id) = incoming.map(|(id, _)| id).or(outgoing.map(|(id, _)| id)) {
            return Err(refused(&NotAdmitted::Migrating(*id)));
        }
        if self.incoming.len() + self.outgoing.len() >= MIGRATIONS_MAX {
            let message = format!(
                "this host has {MIGRATIONS_MAX} migrations in mind that nobody has taken note of"
            );
            return Err(ApiError::new(ErrorCode::Busy, message));
        }
        Ok(())
    }
}

fn refused(why: &NotAdmitted) -> ApiError {
    let code = match why {
        NotAdmitted::Migrating(_) => ErrorCode::Migrating,
        NotAdmitted::OwnedHere => ErrorCode::Exists,
        NotAdmitted::NotOwner
        | NotAdmitted::InDoubt { .. }
        | NotAdmitted::StaleEpoch { .. }
        | NotAdmitted::Spent(_) => ErrorCode::WrongState,
    };
    ApiError::new(code, why.to_string())
}

/// The grant must be for exactly this: the controller's word that this VM may go from there to here now.
fn check_grant(
    host: &Host,
    grant: &SignedGrant,
    (vm, migration, epoch): (VmId, MigrationId, Epoch),
    (source, destination): (&Name, &Name),
) -> Result<(), ApiError> {
    let claims = grant.verify(host.identity.ca(), SystemTime::now()).map_err(|error| {
        ApiError::new(ErrorCode::NotAllowed, format!("{}: {}", error.code(), chain(&error)))
    })?;
    let same = claims.vm == vm.to_string()
        && claims.migration == migration.to_string()
        && claims.source == source.as_str()
        && claims.destination == destination.as_str()
        && Epoch(claims.epoch).next() == epoch;
    if same {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::NotAllowed,
        "grant-mismatch: the grant is for another VM, migration, host or epoch",
    ))
}

/// `POST /v1/knock/listen`.
pub async fn knock_listen(
    host: &Arc<Host>,
    request: KnockListen,
) -> Result<KnockAddress, ApiError> {
    knock::listen(host, request).await
}

/// `POST /v1/knock/connect`.
pub async fn knock_connect(host: &Arc<Host>, request: KnockConnect) -> Result<Reach, ApiError> {
    knock::knock(host, request).await
}

/// `PUT /v1/incoming/{migration}`: starts a stopped QEMU that listens, and says where. Repeated, it says so again.
pub async fn prepare(
    host: &Arc<Host>,
    id: MigrationId,
    request: IncomingRequest,
) -> Result<IncomingOffer, ApiError> {
    let vm = request.definition.id;
    check_grant(
        host,
        &request.grant,
        (vm, id, request.epoch),
        (&request.source, &host.config.name),
    )?;
    if host.migrations.find_incoming(id).is_none() {
        host.migrations.knocks.admit(&host.config.migration_sources, &request.source)?;
        begin_arrival(host, id, request)?;
    }
    let Some(mut incoming) = host.migrations.find_incoming(id) else {
        return Err(ApiError::new(
            ErrorCode::WrongState,
            "the migration has ended while it was prepared",
        ));
    };
    let offered =
        timeout(Duration::from_secs(PREPARE_SECONDS), incoming.offer.wait_for(Option::is_some))
            .await;
    match offered {
        Ok(Ok(offer)) => {
            offer.clone().unwrap_or_else(|| Err(ApiError::new(ErrorCode::Internal, "no offer")))
        }
        Ok(Err(_)) => {
            Err(ApiError::new(ErrorCode::WrongState, "the migration has ended on this host"))
        }
        Err(_) => {
            let message =
                format!("the destination's QEMU was not ready within {PREPARE_SECONDS} s");
            Err(ApiError::new(ErrorCode::Engine, message))
        }
    }
}

/// Makes the migration known and lets its task go on from there.
fn begin_arrival(
    host: &Arc<Host>,
    id: MigrationId,
    request: IncomingRequest,
) -> Result<(), ApiError> {
    let vm = request.definition.id;
    let ticket = Secret::generate()
        .map_err(|error| ApiError::internal("no ticket can be made", &error))?
        .to_text();
    let (orders, inbox) = mpsc::channel(ORDERS_MAX);
    let (offer, offered) = watch::channel(None);
    let (report, reported) = watch::channel(IncomingReport::Waiting);
    let (statistics, figures) = watch::channel(Statistics::default());
    {
        let mut open = host.migrations.open();
        open.admit(vm)?;
        let source = request.source.clone();
        let incoming = Incoming {
            vm,
            source,
            ticket: ticket.clone(),
            orders,
            offer: offered,
            report: reported,
            statistics: figures,
        };
        open.incoming.insert(id, incoming);
    }
    let host = host.clone();
    watch_over(&host.clone(), vm, async move {
        let admitted = admit_arrival(&host, id, &request, &ticket).await;
        match admitted {
            Ok((rules, first)) => {
                let voices = destination::Voices { offer, report, statistics };
                let arrival = destination::Arrival::new(
                    host.clone(),
                    id,
                    (request, ticket),
                    rules,
                    None,
                    voices,
                );
                arrival.run(first, inbox).await;
            }
            Err(error) => {
                host.migrations.open().incoming.remove(&id);
                offer.send_replace(Some(Err(error)));
            }
        }
    });
    Ok(())
}

/// May the VM come, by this host's own records? What is needed after a restart is written before anything is made.
async fn admit_arrival(
    host: &Arc<Host>,
    id: MigrationId,
    request: &IncomingRequest,
    ticket: &str,
) -> Result<(Destination, Vec<handoff::Action>), ApiError> {
    let vm = request.definition.id;
    let current = host.ledger.current(vm).await?;
    let spent = host.ledger.ownership(vm, Some(id)).await?.is_some();
    let claim = handoff::Claim { vm, migration: id, epoch: request.epoch };
    let (rules, first) = Destination::offer(current.as_ref(), spent, claim, request.source.clone())
        .map_err(|why| refused(&why))?;
    // It is not ours now, so a row is left over from when it was: it would name an old QEMU as the VM's own.
    host.ledger.remove_vm(vm).await?;
    kept::let_go(host, vm).await;
    remember_incoming(host, id, request, ticket, None).await?;
    Ok((rules, first))
}

async fn remember_incoming(
    host: &Arc<Host>,
    id: MigrationId,
    request: &IncomingRequest,
    ticket: &str,
    offer: Option<&IncomingOffer>,
) -> Result<(), LedgerError> {
    let state = IncomingState { ticket: ticket.to_owned(), offer: offer.cloned() };
    let row = MigrationRow {
        id,
        side: Side::Incoming,
        vm: request.definition.id,
        request: serde_json::to_value(request).unwrap_or_default(),
        state: serde_json::to_value(state).unwrap_or_default(),
    };
    host.ledger.put_migration(&row).await
}

/// `GET /v1/incoming/{migration}`.
pub async fn incoming(host: &Arc<Host>, id: MigrationId) -> Result<IncomingReport, ApiError> {
    Ok(host
        .migrations
        .find_incoming(id)
        .map_or(IncomingReport::None, |incoming| incoming.report.borrow().clone()))
}

/// `DELETE /v1/incoming/{migration}`: takes down what no GO has come for, and forgets what has ended.
pub async fn drop_incoming(host: &Arc<Host>, id: MigrationId) -> Result<IncomingReport, ApiError> {
    let Some(incoming) = host.migrations.find_incoming(id) else {
        return Ok(IncomingReport::None);
    };
    let why = "the controller gave the migration up".to_owned();
    // It is over when its task is: a refusal is told before it is on the disk, and an agent that is restarted in between
    // has to find the migration.
    let over = async {
        // Fails if the task has ended, and then the report says how.
        let _ended = incoming.orders.send(destination::Order::Abandon(why)).await;
        incoming.orders.closed().await;
    };
    let ended = timeout(Duration::from_secs(ORDER_SECONDS), over).await;
    let report = incoming.report.borrow().clone();
    if ended.is_err() || report == IncomingReport::Waiting {
        // It is kept, and asked for again.
        return Ok(IncomingReport::Waiting);
    }
    host.ledger.remove_migration(id, Side::Incoming).await?;
    host.migrations.open().incoming.remove(&id);
    Ok(report)
}

/// `POST /v1/incoming/{migration}/handoff`: a message of the rules, from the source's agent or from the controller for it.
pub async fn handoff(
    host: &Arc<Host>,
    peer: &Peer,
    id: MigrationId,
    said: Handoff,
) -> Result<Handoff, ApiError> {
    let answer = answer_handoff(host, peer, id, said);
    let answered = timeout(Duration::from_secs(HANDOFF_SECONDS), answer).await;
    answered.unwrap_or_else(|_| Err(no_answer_yet()))
}

fn no_answer_yet() -> ApiError {
    ApiError::new(ErrorCode::Busy, "there is no answer to that yet; ask again")
}

async fn answer_handoff(
    host: &Arc<Host>,
    peer: &Peer,
    id: MigrationId,
    said: Handoff,
) -> Result<Handoff, ApiError> {
    if said.message.claim.migration != id {
        return Err(ApiError::new(ErrorCode::BadRequest, "the message is about another migration"));
    }
    if let Some(incoming) = host.migrations.find_incoming(id) {
        let from_source = *peer == Peer::Agent(incoming.source.to_string());
        if !from_source && *peer != Peer::Controller {
            let message =
                format!("only {} or the controller may speak for this migration", incoming.source);
            return Err(ApiError::new(ErrorCode::NotAllowed, message));
        }
        if !same_ticket(&said.ticket, &incoming.ticket) {
            return Err(ApiError::new(
                ErrorCode::BadToken,
                "the ticket is not that of this migration",
            ));
        }
        let (answer, answered) = oneshot::channel();
        if incoming.orders.send(destination::Order::Message(said.message, answer)).await.is_ok() {
            // The task lets nobody wait for ever: it drops the question, and the source asks again.
            return answered.await.map_err(|_| no_answer_yet());
        }
    }
    let record = host.ledger.ownership(said.message.claim.vm, Some(id)).await?;
    let answer = handoff::answer(record.as_ref(), &said.message);
    answer
        .map(|message| Handoff { ticket: String::new(), message, resumed: None })
        .ok_or_else(|| ApiError::new(ErrorCode::WrongState, "this host has nothing to say to that"))
}

/// Compares in a time that does not depend on the answer.
fn same_ticket(shown: &str, expected: &str) -> bool {
    match (Secret::from_text(shown), Secret::from_text(expected)) {
        (Ok(shown), Ok(expected)) => expected.hash().matches(&shown),
        _ => false,
    }
}

/// `PUT /v1/outgoing/{migration}`: takes the VM from its task and sends it. Repeated, it says how far that is.
pub async fn send(
    host: &Arc<Host>,
    id: MigrationId,
    request: OutgoingRequest,
) -> Result<OutgoingReport, ApiError> {
    // Only a beginning needs the permission: a copy may well last longer than it.
    if let Some(outgoing) = host.migrations.find_outgoing(id) {
        return Ok(outgoing.report.borrow().clone());
    }
    if let Err(lost) = refuse_lost(host, request.vm, id).await {
        // Asked for twice at once: the other one has begun it meanwhile.
        let begun = host.migrations.find_outgoing(id);
        return begun.map(|outgoing| outgoing.report.borrow().clone()).ok_or(lost);
    }
    let names = (&host.config.name, &request.destination);
    check_grant(host, &request.grant, (request.vm, id, request.epoch), names)?;
    begin_departure(host, id, request).await
}

async fn begin_departure(
    host: &Arc<Host>,
    id: MigrationId,
    request: OutgoingRequest,
) -> Result<OutgoingReport, ApiError> {
    let peer = host.agent_client(&request.destination, &request.offer.agent)?;
    let (orders, inbox) = mpsc::channel(ORDERS_MAX);
    let report = watch::Sender::new(OutgoingReport::begun(id, request.vm));
    let samples = Samples::default();
    {
        let mut open = host.migrations.open();
        open.admit(request.vm)?;
        let samples = samples.clone();
        let outgoing = Outgoing { vm: request.vm, orders, report: report.clone(), samples };
        open.outgoing.insert(id, outgoing);
    }
    let voices = source::Voices { report: report.clone(), samples };
    let begun = source::Departure::begin(host, id, &request, peer, voices).await;
    let (departure, first) = begun.inspect_err(|_| {
        host.migrations.open().outgoing.remove(&id);
    })?;
    let host = host.clone();
    let answer = report.borrow().clone();
    let vm = departure.request.vm;
    watch_over(&host.clone(), vm, async move {
        Box::pin(depart(&host, departure, first, inbox)).await;
    });
    Ok(answer)
}

/// Lets a migration's task go on by itself. One that breaks off (a defect) takes the VM with it, and what it had written
/// tells the next life of the agent how to go on: until then it is told.
fn watch_over(host: &Arc<Host>, vm: VmId, work: impl Future<Output = ()> + Send + 'static) {
    let host = host.clone();
    tokio::spawn(async move {
        if tokio::spawn(work).await.is_err_and(|error| error.is_panic()) {
            error!(%vm, "the task of a migration has broken off; restart the agent: it takes the migration up again");
            let why = "its migration has broken off; a restart of the agent takes it up again";
            // One that was still to come is no VM of this host.
            if host.vms.has(vm) {
                host.vms.loan_news(vm, VmState::Unknown { why: why.to_owned() }).await;
            }
        }
    });
}

/// Lets the VM go, and does with it what the end says.
async fn depart(
    host: &Arc<Host>,
    departure: source::Departure,
    first: Vec<handoff::Action>,
    inbox: mpsc::Receiver<source::Order>,
) {
    let (id, vm) = (departure.id, departure.request.vm);
    let request = departure.request.clone();
    let report = departure.report.clone();
    let source::Ended { guest, end } = departure.run(first, inbox).await;
    if request.options.keeps_definition() && end != OutgoingEnd::Moved {
        kept::let_go(host, vm).await;
    }
    if request.options.mode == Mode::Offline && end != OutgoingEnd::Moved {
        host.vms.give_back_stopped(vm).await;
    } else {
        bring_home(host, vm, guest, &end).await;
    }
    let ended = OutgoingReport { relay: None, end, ..report.borrow().clone() };
    info!(migration = %id, %vm, end = ?ended.end, "the migration has ended here");
    // A test that wants the agent to die before it has noted how it ended says so; a failure changes nothing.
    let _noted = host.failpoints.hit("source.before-end").await;
    // Written before it is told: whoever hears it may ask at once for the row to be removed.
    if let Err(error) = remember_outgoing(host, id, &request, Some(&ended)).await {
        warn!(migration = %id, error = chain(&error), "the end is only in memory: the ledger could not be written");
    }
    report.send_replace(ended);
}

/// Gives the VM back to its task, or lets the host forget it.
async fn bring_home(host: &Arc<Host>, vm: VmId, guest: Option<RunningVm>, end: &OutgoingEnd) {
    match (guest, end) {
        (guest, OutgoingEnd::Moved) => {
            host.vms.forget(vm).await;
            let Some(RunningVm { qemu, .. }) = guest else { return };
            let host = host.clone();
            // A gigabyte of guest takes its time to go; nobody has to wait for it.
            tokio::spawn(async move {
                if let Err(error) = destroy(&host, &qemu).await {
                    warn!(%vm, %error, "what the VM leaves behind is left to the next sweep");
                }
            });
        }
        (guest, OutgoingEnd::Stayed { why: Stay::GuestPoweredOff }) => {
            // QEMU outlives its guest's power-off (`-no-shutdown`).
            if let Some(RunningVm { qemu, .. }) = guest
                && let Err(error) = destroy(host, &qemu).await
            {
                warn!(%vm, %error, "what the VM leaves behind is left to the next sweep");
            }
            host.vms.give_back_ended(vm, None).await;
        }
        (Some(guest), _) if guest.qemu.process.exited().is_none() => {
            host.vms.give_back(guest).await
        }
        (_, OutgoingEnd::Stayed { why: Stay::Failed { message, .. } }) => {
            host.vms.give_back_ended(vm, Some(message.clone())).await;
        }
        (_, OutgoingEnd::Stayed { why: Stay::Reclaimed { .. } }) => {
            let why = "it was taken back from a host that does not answer, and its memory given up";
            host.vms.give_back_ended(vm, Some(why.to_owned())).await;
        }
        _ => host.vms.give_back_ended(vm, Some("QEMU ended during a migration".to_owned())).await,
    }
}

async fn remember_outgoing(
    host: &Arc<Host>,
    id: MigrationId,
    request: &OutgoingRequest,
    ended: Option<&OutgoingReport>,
) -> Result<(), LedgerError> {
    let row = MigrationRow {
        id,
        side: Side::Outgoing,
        vm: request.vm,
        request: serde_json::to_value(request).unwrap_or_default(),
        state: serde_json::to_value(ended).unwrap_or_default(),
    };
    host.ledger.put_migration(&row).await
}

/// The address that this host's QEMUs listen on for guests: the one that a migration names, or that of the configuration.
async fn migration_ip(host: &Host, named: Option<&str>) -> Result<IpAddr, ApiError> {
    let name = named.map_or_else(|| host.config.migration_host(), str::to_owned);
    let found = tokio::net::lookup_host((name.as_str(), 0)).await;
    let address = found.ok().and_then(|mut addresses| addresses.next());
    address.map(|address| address.ip()).ok_or_else(|| {
        ApiError::new(
            ErrorCode::NoResources,
            format!("this host's migration address {name} has no IP address here"),
        )
        .hint("correct `migration_address` in the agent's configuration, or the address that the migration names")
    })
}

fn unknown(id: MigrationId) -> ApiError {
    ApiError::not_found("outgoing migration", id)
}

/// An outgoing migration that an earlier life of the agent had begun and this one could not take up.
fn lost(id: MigrationId) -> ApiError {
    let message = format!("migration {id} could not be taken up again; how it stands is not known");
    ApiError::new(ErrorCode::WrongState, message)
        .hint("the agent's log says why; when that is mended, restart the agent")
}

/// Refuses what the ledger knows and this life of the agent does not: it is no new migration, and nothing of it may be begun.
async fn refuse_lost(host: &Host, vm: VmId, id: MigrationId) -> Result<(), ApiError> {
    let word = host.ledger.ownership(vm, Some(id)).await?;
    if word.is_some_and(|word| word.is_open()) {
        return Err(lost(id));
    }
    match why_missing(host, id).await {
        error if error.code == ErrorCode::NotFound => Ok(()),
        error => Err(error),
    }
}

/// Why an outgoing migration is not in mind: it never was here, its end was taken note of, or it could not be taken up.
async fn why_missing(host: &Host, id: MigrationId) -> ApiError {
    match host.ledger.migrations(Side::Outgoing).await {
        Ok(rows) if rows.iter().any(|row| row.id == id) => lost(id),
        Ok(_) => unknown(id),
        Err(error) => error.into(),
    }
}

/// An outgoing migration, or why it is none.
async fn known(host: &Host, id: MigrationId) -> Result<Outgoing, ApiError> {
    match host.migrations.find_outgoing(id) {
        Some(outgoing) => Ok(outgoing),
        None => Err(why_missing(host, id).await),
    }
}

/// `GET /v1/outgoing/{migration}`.
pub async fn outgoing(host: &Arc<Host>, id: MigrationId) -> Result<OutgoingReport, ApiError> {
    let outgoing = known(host, id).await?;
    Ok(outgoing.report.borrow().clone())
}

/// `GET /v1/outgoing/{migration}/watch`: every change, until the end.
pub async fn watch(
    host: &Arc<Host>,
    id: MigrationId,
) -> Result<watch::Receiver<OutgoingReport>, ApiError> {
    let outgoing = known(host, id).await?;
    Ok(outgoing.report.subscribe())
}

/// `POST /v1/outgoing/{migration}/cancel`.
pub async fn cancel(host: &Arc<Host>, id: MigrationId) -> Result<OutgoingReport, ApiError> {
    let outgoing = known(host, id).await?;
    let (answer, answered) = oneshot::channel();
    let asked = async {
        outgoing.orders.send(source::Order::Cancel(answer)).await.ok()?;
        answered.await.ok()
    };
    // No answer: it ended in that moment, and the report says how, or it is in the midst of something.
    let accepted = timeout(Duration::from_secs(ORDER_SECONDS), asked).await.ok().flatten();
    let report = outgoing.report.borrow().clone();
    match (accepted, &report.end) {
        (Some(true), _) | (_, OutgoingEnd::Stayed { .. }) => Ok(report),
        (Some(false), _) | (None, OutgoingEnd::Moved) => Err(ApiError::new(
            ErrorCode::HandedOver,
            "the guest has been given to the destination; it cannot be cancelled any more",
        )
        .hint("let it end, and migrate the VM back")),
        (None, OutgoingEnd::Open | OutgoingEnd::Unresolved { .. }) => {
            let message = format!("the cancel was not answered within {ORDER_SECONDS} s");
            Err(ApiError::new(ErrorCode::Busy, message).hint("ask again"))
        }
    }
}

/// `POST /v1/outgoing/{migration}/handoff`: an answer of the destination, brought by the controller.
pub async fn answered(
    host: &Arc<Host>,
    id: MigrationId,
    said: Handoff,
) -> Result<OutgoingReport, ApiError> {
    let outgoing = known(host, id).await?;
    match outgoing.orders.try_send(source::Order::Answer(said.message)) {
        Err(mpsc::error::TrySendError::Full(_)) => Err(no_answer_yet()),
        // A migration that has ended needs no answer.
        Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(outgoing.report.borrow().clone()),
    }
}

/// `DELETE /v1/outgoing/{migration}`: the controller has taken note of the end.
pub async fn retire(host: &Arc<Host>, id: MigrationId) -> Result<(), ApiError> {
    let outgoing = match known(host, id).await {
        Ok(outgoing) => outgoing,
        Err(error) if error.code == ErrorCode::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !outgoing.ended() {
        return Err(ApiError::new(
            ErrorCode::Migrating,
            "the migration has not ended on this host",
        ));
    }
    host.ledger.remove_migration(id, Side::Outgoing).await?;
    host.migrations.open().outgoing.remove(&id);
    Ok(())
}
