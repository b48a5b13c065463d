//! A migration, as the controller leads it: **the page that reads as the flow**.
//!
//! ```text
//! admit ─► Admission, Preflight          nothing is begun; every reason against it is told at once
//!            │
//! carry ─►  Reservation                  do: set memory aside            undo: the page's end frees it
//!           Preparation                  do: a stopped QEMU listens      undo: the destination takes it down
//!           Precopy Switchover Handoff   do: the source copies and hands over; it undoes that by itself
//!           Retirement                   the placement moves, both sides forget
//! ```
//!
//! Each phase is recorded **before** it is asked for, and every asking is idempotent by the migration's id. So a restarted
//! controller ([`resume`]) reads the record, asks the agents how far they are ([`whereabouts`]), and goes on with the same
//! page from there; there is no second way through it.
//!
//! The controller is never needed for safety (invariant I19). Until the source has been asked this page decides, and every
//! error leads to `Stayed`: that is the `?` in [`begin`]. From then on the two agents decide and the page only asks them, for
//! as long as it takes: [`follow`] has no error to return, since an answer that does not come is unknown and not failed. Where
//! the two hosts do not reach each other, it carries their messages.
//!
//! Called by [`crate::http`] and at the start. Who may run the guest is [`whimbrel_migration::handoff`]'s matter, and what
//! QEMU is told is the agents'.

mod admission;
pub(crate) mod examine;
mod live;
mod page;
mod reclaim;
mod relay;
mod sweep;

use std::sync::Arc;
use std::time::{Duration, Instant};

use whimbrel_api::agent::{
    IncomingOffer, IncomingReport, IncomingRequest, OutgoingEnd, OutgoingReport, OutgoingRequest,
    Receive, ReceiveSettings,
};
use whimbrel_api::migration::{Migration, MigrationState, Mode, Stay, Strategy};
use whimbrel_api::{ApiError, ErrorCode, MigrationId, Name, Phase};
use whimbrel_migration::strategy::NORMAL_DOWNTIME_MS;

use crate::Controller;
use crate::controller::MovedPlacement;
use crate::store::is_active;

pub use admission::admit;
pub use live::{act, set, statistics};
pub(crate) use page::Running;
pub use reclaim::reclaim;

use page::{Page, Wish, failed};

/// How long the page waits, in milliseconds, before it asks a host again that has not answered.
const ASK_AGAIN_MS: u64 = 500;
/// How often the destination is asked again to prepare when its answer is lost.
const PREPARE_AGAIN_MAX: u32 = 3;
/// How long the source may be without an answer from the destination, in milliseconds, before the controller carries the
/// message.
const RELAY_AFTER_MS: u64 = 1_000;
/// How often a source is reminded that its VM is to be taken back, in seconds.
const RECLAIM_AGAIN_SECONDS: u64 = 5;

/// How long a host whose word is needed may be silent, in seconds, before the migration is told to be unresolved. It is asked on.
const SILENT_SECONDS: u64 = 30;
/// The same for fake hosts, in tests.
const FAKE_SILENT_SECONDS: u64 = 2;

/// How the copying ended, as the two agents have settled it.
enum Settled {
    Moved,
    Stayed(Stay),
}

/// Takes up every migration that was active when the controller ended, and what ended ones left to sweep.
pub async fn resume(controller: &Arc<Controller>) {
    match controller.store().active_migrations().await {
        Ok(active) => {
            for record in active {
                tracing::info!(migration = %record.id, phase = %record.phase, "taken up again");
                page::open(controller, record, None);
            }
        }
        Err(error) => tracing::error!(%error, "cannot read the active migrations"),
    }
    sweep::resume(controller).await;
}

/// Asks for the end of a migration that has not been handed over; `handed-over` afterwards.
pub async fn cancel(controller: &Arc<Controller>, id: MigrationId) -> Result<Migration, ApiError> {
    let record = controller.migration(id).await?;
    let heard = match &record.state {
        MigrationState::Running | MigrationState::Unresolved { .. } => {
            controller.running().ask(id, Wish::Cancel).await?
        }
        MigrationState::Stayed { .. } | MigrationState::Refused => true,
        MigrationState::Moved => return Err(handed_over(&record)),
    };
    let record = controller.migration(id).await?;
    if !heard && is_active(&record.state) {
        return Err(ApiError::new(ErrorCode::Busy, "nobody leads this migration at the moment")
            .hint("is one of its hosts no longer in the pool? See `whimbrel host list` and the controller's log"));
    }
    Ok(record)
}

fn handed_over(record: &Migration) -> ApiError {
    let message = format!("{} has been handed over to {}", record.vm_name, record.destination);
    ApiError::new(ErrorCode::HandedOver, message).hint("let it end, and migrate the VM back")
}

/// One migration from its reservation to its end. A record that was begun by an earlier controller enters where it was.
async fn carry(mut page: Page) {
    let settled = match whereabouts(&mut page).await {
        Whereabouts::NotAsked => match begin(&mut page).await {
            Ok(order) => follow(&mut page, order).await,
            Err(why) => Settled::Stayed(why),
        },
        Whereabouts::Settled(settled) => settled,
    };
    match settled {
        Settled::Moved => settle(&mut page).await,
        Settled::Stayed(why) => undo(&mut page, why).await,
    }
}

/// How far a migration is that may have been begun before.
enum Whereabouts {
    /// The source has not been asked to send, as far as anybody knows: everything may be asked for, again if need be.
    NotAsked,
    /// It ended.
    Settled(Settled),
}

/// Finds out how far the agents are. Once the source may have been asked, only they know, and a source that has forgotten the
/// migration may have done so because it is over: nothing is begun, and no cancel taken, before this is known.
async fn whereabouts(page: &mut Page) -> Whereabouts {
    match page.record.settled.take() {
        Some(MigrationState::Moved) => return Whereabouts::Settled(Settled::Moved),
        Some(MigrationState::Stayed { why }) => return Whereabouts::Settled(Settled::Stayed(why)),
        _ => {}
    }
    if page.record.phase < Phase::Precopy {
        return Whereabouts::NotAsked;
    }
    let mut silence = Silence::begin();
    loop {
        let asked = page.source().outgoing(page.record.id).await;
        let settled = match asked {
            Ok(report) => {
                let settled = watch(page, report).await;
                silence = Silence::begin();
                settled
            }
            // A source that has forgotten the migration was never asked, or has seen its end; the destination knows which.
            Err(error) if error.code == ErrorCode::NotFound => {
                match page.destination().incoming(page.record.id).await {
                    Ok(IncomingReport::Owned { .. }) if page.record.reclaim.is_none() => {
                        Some(Settled::Moved)
                    }
                    Ok(IncomingReport::Refused { why }) => {
                        Some(Settled::Stayed(Stay::DestinationRefused { message: why }))
                    }
                    // It runs there, and whoever has the rest of its memory has forgotten it: only the destination will tell.
                    Ok(IncomingReport::Fetching { .. }) => {
                        let ask = page.record.destination.clone();
                        silence.goes_on(page, ask).await;
                        None
                    }
                    // Once an operator has spoken only the source knows whose it is.
                    Ok(IncomingReport::Owned { .. }) => None,
                    Ok(IncomingReport::Waiting | IncomingReport::None) => {
                        return Whereabouts::NotAsked;
                    }
                    Err(_) => {
                        let ask = page.record.destination.clone();
                        silence.goes_on(page, ask).await;
                        None
                    }
                }
            }
            Err(error) => without_source(page, &error, &silence).await,
        };
        if let Some(settled) = settled {
            return Whereabouts::Settled(settled);
        }
        page.pause(Duration::from_millis(ASK_AGAIN_MS)).await;
    }
}

/// How long a host has not answered whose word is needed.
struct Silence(Instant);

impl Silence {
    fn begin() -> Self {
        Self(Instant::now())
    }

    /// Tells after [`SILENT_SECONDS`] that nobody knows how the migration stands, and whom to `ask`.
    async fn goes_on(&self, page: &mut Page, ask: Name) {
        let most = if cfg!(test) { FAKE_SILENT_SECONDS } else { SILENT_SECONDS };
        if self.0.elapsed() >= Duration::from_secs(most) {
            page.unresolved(ask).await;
        }
    }
}

/// Everything up to the moment when the source is asked to send.
///
/// Postcondition: `Ok`: the destination listens, and the order for the source is complete. `Err`: the VM has not been touched;
/// [`undo`] takes down what the destination may have prepared.
async fn begin(page: &mut Page) -> Result<OutgoingRequest, Stay> {
    page.enter(Phase::Reservation).await?;
    page.reserve_memory()?;

    // The destination before the source: the source is told an address, and a destination that cannot has cost nothing.
    page.enter(Phase::Preparation).await?;
    let offer = prepare(page).await?;

    page.enter(Phase::Precopy).await?;
    let policy = page.policy().await?;
    let measurements = page.measurements().await;
    let record = &page.record;
    Ok(OutgoingRequest {
        vm: record.vm,
        destination: record.destination.clone(),
        epoch: record.epoch,
        options: record.options.clone(),
        strategy: strategy(record),
        policy,
        forecast: record.forecast.clone(),
        measurements,
        offer,
        grant: page.grant()?,
    })
}

/// How memory goes. Of a record that is older than strategies: by a single stream.
fn strategy(record: &Migration) -> Strategy {
    let pause = record.options.max_downtime_ms.unwrap_or(NORMAL_DOWNTIME_MS);
    record.strategy.clone().unwrap_or_else(|| Strategy::plain(pause))
}

/// What the destination is to be ready for.
fn receive(record: &Migration) -> Receive {
    if record.options.mode == Mode::Offline {
        return Receive::Definition;
    }
    let listen = record.options.migrate_address.clone();
    Receive::Guest(ReceiveSettings::of(&strategy(record), listen))
}

/// Asks the destination for a stopped QEMU. An answer that is lost is asked for again: the destination gives the same one.
async fn prepare(page: &mut Page) -> Result<IncomingOffer, Stay> {
    let request = IncomingRequest {
        definition: page.definition().await?,
        source: page.record.source.clone(),
        epoch: page.record.epoch,
        receive: receive(&page.record),
        grant: page.grant()?,
    };
    let (agent, id) = (page.destination(), page.record.id);
    let mut tries_left = PREPARE_AGAIN_MAX;
    loop {
        let asked = agent.put_incoming(id, &request);
        match page.unless_cancelled(asked).await? {
            Ok(offer) => return Ok(offer),
            Err(error) if error.is_unknown() && tries_left > 0 => {
                tries_left -= 1;
                tokio::time::sleep(Duration::from_millis(ASK_AGAIN_MS)).await;
            }
            Err(error) => return Err(failed(Phase::Preparation, &error)),
        }
    }
}

/// Orders the source to send, and follows it to its end.
///
/// Postcondition: one of the two agents has said how it ended. There is no error: until one of them has, the page asks.
async fn follow(page: &mut Page, order: OutgoingRequest) -> Settled {
    let mut silence = Silence::begin();
    let mut begun = false;
    loop {
        match page.source().put_outgoing(page.record.id, &order).await {
            Ok(report) => {
                begun = true;
                if let Some(settled) = watch(page, report).await {
                    return settled;
                }
                silence = Silence::begin();
            }
            Err(error) if error.is_refusal() && !begun && knows_nothing(page).await => {
                return Settled::Stayed(failed(Phase::Precopy, &error));
            }
            Err(error) => {
                if let Some(settled) = without_source(page, &error, &silence).await {
                    return settled;
                }
            }
        }
        page.pause(Duration::from_millis(ASK_AGAIN_MS)).await;
    }
}

/// Whether the source, which says no to an order, has never begun with it: an earlier asking may have been heard without an
/// answer, and one that was taken up may be refused after a restart.
async fn knows_nothing(page: &Page) -> bool {
    let asked = page.source().outgoing(page.record.id).await;
    asked.is_err_and(|error| error.code == ErrorCode::NotFound)
}

/// The source does not answer, or denies what it has told: perhaps the destination knows the end.
async fn without_source(page: &mut Page, error: &ApiError, silence: &Silence) -> Option<Settled> {
    tracing::warn!(migration = %page.record.id, %error, "the source does not say how it is; asking on");
    let settled = settled_by_destination(page, error).await;
    if settled.is_none() {
        let ask = page.record.source.clone();
        silence.goes_on(page, ask).await;
    }
    settled
}

/// Takes note of everything that the source says until it has ended; `None` if it fell silent before.
async fn watch(page: &mut Page, first: OutgoingReport) -> Option<Settled> {
    let mut report = first;
    let mut events = page.source().watch_outgoing(page.record.id).await.ok();
    loop {
        page.note(&report).await;
        if report.phase == Phase::Postcopy {
            place(page).await;
        }
        match &report.end {
            OutgoingEnd::Moved => return Some(Settled::Moved),
            OutgoingEnd::Stayed { why } => return Some(Settled::Stayed(why.clone())),
            OutgoingEnd::Open | OutgoingEnd::Unresolved { .. } => {}
        }
        let events = events.as_mut()?;
        tokio::select! {
            next = events.next() => match next {
                Ok(Some(next)) => report = next,
                Ok(None) | Err(_) => return None,
            },
            wish = page.next_wish() => page.pass_on(wish).await,
            () = tokio::time::sleep(Duration::from_secs(RECLAIM_AGAIN_SECONDS)), if page.record.reclaim.is_some() => {
                page.reclaim_again(&report).await;
            }
            () = tokio::time::sleep(Duration::from_millis(RELAY_AFTER_MS)), if report.relay.is_some() && page.record.reclaim.is_none() => {
                relay::carry_message(page, &report).await;
            }
        }
    }
}

/// How it ended by the destination's word, which counts whatever the source would say: an epoch that it owns, or that it
/// will never own, is settled. `silence` is why the source cannot be asked.
async fn settled_by_destination(page: &Page, silence: &ApiError) -> Option<Settled> {
    match page.destination().incoming(page.record.id).await.ok()? {
        IncomingReport::Owned { .. } if page.record.reclaim.is_some() => None,
        IncomingReport::Owned { .. } => Some(Settled::Moved),
        IncomingReport::Refused { why } => {
            let message = format!("{why}; the source has not been heard of since: {silence}");
            Some(Settled::Stayed(Stay::DestinationRefused { message }))
        }
        IncomingReport::Waiting | IncomingReport::Fetching { .. } | IncomingReport::None => None,
    }
}

/// The VM runs on the destination: the placement moves, then both sides may forget.
async fn settle(page: &mut Page) {
    page.settled(MigrationState::Moved).await;
    place(page).await;
    page.keep_statistics().await;
    sweep::both_sides(page).await;
    page.end(MigrationState::Moved).await;
}

/// The VM is the destination's: in post-copy before all of its memory is there. Once is enough, and again is harmless.
async fn place(page: &mut Page) {
    if page.placed {
        return;
    }
    let moved = MovedPlacement {
        vm: page.record.vm,
        host: page.record.destination.clone(),
        epoch: page.record.epoch,
        generation: page.generation,
        state: None,
    };
    // Not without this record: a source that has forgotten the VM could not be asked any more.
    while let Err(error) = page.move_placement(&moved).await {
        tracing::error!(migration = %page.record.id, %error, "the placement cannot be written; trying again");
        page.pause(Duration::from_millis(ASK_AGAIN_MS)).await;
    }
    page.placed = true;
}

/// The VM stays: what the destination prepared is taken down.
async fn undo(page: &mut Page, why: Stay) {
    page.settled(MigrationState::Stayed { why: why.clone() }).await;
    page.place_back(Duration::from_millis(ASK_AGAIN_MS)).await;
    if page.record.phase >= Phase::Precopy {
        page.keep_statistics().await;
    }
    sweep::both_sides(page).await;
    page.end(MigrationState::Stayed { why }).await;
}
