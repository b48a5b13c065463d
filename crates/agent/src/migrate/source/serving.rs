//! The source in post-copy: its QEMU sends the rest of the memory, and a lost connection is made again.
//!
//! ```text
//!   serve ──▶ active ──▶ completed: the rules end this QEMU
//!               │  ▲
//!      cut,     │  │ recovered: the destination listens anew, both QEMUs go on
//!      hanging, ▼  │
//!      order   paused ──▶ tried again every RECOVER_PACE_MS, unless it was paused by hand
//! ```
//!
//! The guest has been given away, or is about to be: neither QEMU is ended here, whatever happens, and how long it takes is
//! nobody's to bound (invariant I23). A QEMU that gives its stream up for good is told to the rules. Where the session with
//! QEMU ends, another is opened: until then nothing would be heard, nor made again. Not here: the copy before it
//! ([`super::copy`]), and the destination's half ([`crate::migrate::destination`]).

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};
use whimbrel_api::agent::ListenAgain;
use whimbrel_api::error::chain;
use whimbrel_api::migration::{PostcopyReport, PostcopyState};
use whimbrel_api::{ApiError, ErrorCode};
use whimbrel_migration::handoff::{SourceInput, Standing};
use whimbrel_qemu::machine::Machine;
use whimbrel_qemu::migrate::outgoing::{
    Completed, Control, Outgoing, OutgoingError, pause_postcopy,
};
use whimbrel_qemu::migrate::{MigrationStatus, Statistics};

use super::news::HELD;
use super::{Departure, Ears, or_never};
use crate::vm::RunningVm;
use crate::vm::found::{Found, find_again};

/// How long after a failed attempt the connection is tried again, in milliseconds.
const RECOVER_PACE_MS: u64 = 1_000;
/// How long QEMU may take to make the connection again, in seconds.
const RECOVER_SECONDS: u64 = 10;
/// A stream on which nothing moves for so long, in seconds, is given up and made again: TCP itself would wait for a quarter
/// of an hour.
const HANGING_SECONDS: u64 = 5;
/// How soon a question is repeated that QEMU did not answer, in milliseconds.
const ASK_AGAIN_MS: u64 = 500;
/// How long QEMU may take, in milliseconds, to say that all has come, before it is ended without that.
const LAST_WORD_MS: u64 = 500;

type Serving = Pin<Box<dyn Future<Output = Result<Completed, OutgoingError>> + Send>>;
type Hearing = Pin<Box<dyn Future<Output = Machine> + Send>>;
type Recovering = Pin<Box<dyn Future<Output = Recovery> + Send>>;

/// How far an attempt has come to make the connection again.
pub(super) enum Recovery {
    /// The destination listens anew.
    Listens(SocketAddr),
    /// Memory flows again.
    Flows,
    /// It came to nothing.
    Failed(String),
}

/// What is heard of post-copy.
pub(super) enum RestTold {
    Ended(Box<Result<Completed, OutgoingError>>),
    Tried(Recovery),
    /// There is a session with QEMU again.
    Heard(Machine),
}

/// Post-copy under way.
pub(super) struct Rest {
    /// Ends with the last page.
    whole: Serving,
    /// The session with QEMU that is being opened in place of one that has ended.
    hearing: Option<Hearing>,
    /// The attempt to make the connection again that is under way.
    recovering: Option<Recovering>,
    sent_bytes: u64,
    moved_at: Instant,
    /// Before this moment no attempt is made.
    not_before: Instant,
    by_hand: bool,
    /// Why this agent gave the connection up, if it did.
    given_up: Option<&'static str>,
    /// Since when the connection is being made again.
    recovers_since: Option<Instant>,
}

/// The next thing that is heard of post-copy, and never anything without it.
pub(super) async fn rest(rest: Option<&mut Rest>) -> RestTold {
    let Some(rest) = rest else { return std::future::pending().await };
    tokio::select! {
        ended = &mut rest.whole => RestTold::Ended(Box::new(ended)),
        tried = or_never(rest.recovering.as_mut()) => RestTold::Tried(tried),
        machine = or_never(rest.hearing.as_mut()) => RestTold::Heard(machine),
    }
}

impl Departure {
    /// Waits for the end of post-copy, beside everything else.
    pub(super) fn serve(&mut self) {
        let now = Instant::now();
        let Some(whole) = self.wait_whole(Duration::ZERO) else { return };
        // Known where it is taken up again.
        let noted = self.report.borrow().postcopy.as_ref().map(|postcopy| postcopy.state.clone());
        self.serving = Some(Rest {
            whole,
            hearing: None,
            recovering: None,
            sent_bytes: 0,
            moved_at: now,
            not_before: now,
            by_hand: matches!(noted, Some(PostcopyState::Paused { by_hand: true, .. })),
            given_up: None,
            recovers_since: None,
        });
        let begun = Timestamp::now();
        self.report.send_modify(|report| {
            report.postcopy.get_or_insert(PostcopyReport {
                state: PostcopyState::Active,
                since: begun,
                begun,
                recoveries: 0,
                blocktime_ms: None,
                vcpu_blocktime_ms: Vec::new(),
            });
        });
    }

    /// Goes on where an earlier life of the agent was in post-copy.
    pub(super) async fn serve_again(&mut self) {
        let serves =
            |guest: &&RunningVm| matches!(guest.ownership.standing, Standing::Serving { .. });
        let Some(guest) = self.guest.as_ref().filter(serves) else { return };
        self.steering.control().send_replace(Some(Control::of(&guest.qemu.machine)));
        match Statistics::query(guest.qemu.machine.qmp()).await {
            Ok(seen) if seen.status.is_postcopy() => {
                self.serve();
                self.look_after_postcopy(&seen);
            }
            Ok(Statistics {
                status:
                    MigrationStatus::Completed | MigrationStatus::Failed | MigrationStatus::Cancelled,
                ..
            })
            // Nothing is known of it, and it is asked on.
            | Err(_) => self.serve(),
            Ok(_) => {}
        }
    }

    fn wait_whole(&self, after: Duration) -> Option<Serving> {
        let machine = self.guest.as_ref()?.qemu.machine.clone();
        let statistics = self.statistics.clone();
        Some(Box::pin(async move {
            sleep(after).await;
            Outgoing::reattach(&machine).wait_postcopy_done(&statistics).await
        }))
    }

    /// Whether post-copy is held by hand.
    pub(super) fn is_held(&self) -> bool {
        self.serving.as_ref().is_some_and(|rest| rest.by_hand)
    }

    /// Something is heard of post-copy.
    pub(super) fn told_of_rest(&mut self, told: RestTold, ears: &mut Ears) -> Option<SourceInput> {
        match told {
            RestTold::Ended(ended) => return self.served(*ended),
            RestTold::Tried(recovery) => self.tried(recovery),
            RestTold::Heard(machine) => {
                ears.events = Some(machine.events());
                self.heard_qemu(machine);
            }
        }
        None
    }

    /// The session with QEMU has ended: another is opened. With one that is gone there is none, and its end is heard
    /// elsewhere.
    fn hear_qemu(&self) -> Option<Hearing> {
        let guest = self.guest.as_ref()?;
        let (host, record) = (self.host.clone(), guest.qemu.record());
        warn!(migration = %self.id, "the session with QEMU has ended in post-copy; opening another");
        Some(Box::pin(async move {
            match find_again(&host, &record).await {
                Found::Alive(found) => found.machine,
                Found::Gone { .. } => std::future::pending().await,
            }
        }))
    }

    fn heard_qemu(&mut self, machine: Machine) {
        self.steering.control().send_replace(Some(Control::of(&machine)));
        if let Some(guest) = &mut self.guest {
            guest.qemu.machine = machine;
        }
        let whole = self.wait_whole(Duration::ZERO);
        if let (Some(rest), Some(whole)) = (self.serving.as_mut(), whole) {
            (rest.hearing, rest.whole) = (None, whole);
        }
    }

    /// QEMU has said how post-copy ended, or could not be asked.
    fn served(&mut self, ended: Result<Completed, OutgoingError>) -> Option<SourceInput> {
        match ended {
            Ok(completed) => {
                self.samples.keep_raw(&completed.statistics);
                self.copied_more(&completed.statistics);
                self.serving = None;
                self.enter_postcopy_state(PostcopyState::Done);
                Some(SourceInput::Completed)
            }
            Err(OutgoingError::Failed { .. } | OutgoingError::Cancelled { .. })
                if self.rules.is_past_release() =>
            {
                self.serving = None;
                Some(SourceInput::StreamLost)
            }
            Err(error @ (OutgoingError::Failed { .. } | OutgoingError::Cancelled { .. })) => {
                self.serving = None;
                let phase = self.report.borrow().phase;
                Some(self.failed(phase, ErrorCode::Engine, chain(&error)))
            }
            // Its end is heard elsewhere; until then it is asked again.
            Err(_) => {
                self.ask_whole_again();
                None
            }
        }
    }

    fn ask_whole_again(&mut self) {
        let deaf = |guest: &RunningVm| guest.qemu.machine.qmp().ended().is_some();
        let hearing = if self.guest.as_ref().is_some_and(deaf) { self.hear_qemu() } else { None };
        let again: Option<Serving> = match &hearing {
            Some(_) => Some(Box::pin(std::future::pending())),
            None => self.wait_whole(Duration::from_millis(ASK_AGAIN_MS)),
        };
        match (self.serving.as_mut(), again) {
            (Some(rest), Some(again)) => (rest.whole, rest.hearing) = (again, hearing),
            _ => self.serving = None,
        }
    }

    /// The destination needs nothing more. Most often it has said so a moment before QEMU here knows that all has come.
    pub(super) async fn hear_last_word(&mut self) {
        let Some(rest) = self.serving.as_mut().filter(|rest| !rest.by_hand) else { return };
        let within = Duration::from_millis(LAST_WORD_MS);
        if let Ok(ended) = timeout(within, &mut rest.whole).await {
            // The rules know it from the destination.
            let _known = self.served(ended);
        }
    }

    /// What QEMU's figures say of post-copy: told, and a lost connection is made again.
    pub(super) fn look_after_postcopy(&mut self, statistics: &Statistics) {
        let Some(rest) = self.serving.as_mut() else { return };
        let sent = statistics.ram.transferred_bytes.unwrap_or(0);
        if sent != rest.sent_bytes {
            (rest.sent_bytes, rest.moved_at) = (sent, Instant::now());
        }
        let hangs = rest.moved_at.elapsed() >= Duration::from_secs(HANGING_SECONDS);
        let by_hand = rest.by_hand;
        match &statistics.status {
            MigrationStatus::PostcopyActive if hangs => {
                rest.moved_at = Instant::now();
                rest.given_up = Some("nothing came through to the destination any more");
                warn!(migration = %self.id, "nothing moves in post-copy; its connection is given up and made again");
                self.pause_stream();
            }
            // The order was given to a QEMU that did not hear it.
            MigrationStatus::PostcopyActive if by_hand && rest.not_before <= Instant::now() => {
                rest.not_before = Instant::now() + Duration::from_millis(RECOVER_PACE_MS);
                self.pause_stream();
            }
            MigrationStatus::PostcopyActive => {
                rest.recovers_since = None;
                self.enter_postcopy_state(PostcopyState::Active);
            }
            MigrationStatus::PostcopyPaused => {
                (rest.moved_at, rest.recovers_since) = (Instant::now(), None);
                // QEMU would say of either that its user wanted it.
                let why = match (by_hand, rest.given_up, &statistics.error_desc) {
                    (true, ..) => HELD.to_owned(),
                    (false, Some(why), _) => why.to_owned(),
                    (false, None, Some(why)) => why.clone(),
                    (false, None, None) => "the connection to the destination is lost".to_owned(),
                };
                self.enter_postcopy_state(PostcopyState::Paused { why, by_hand });
                if !by_hand {
                    self.recover(None);
                }
            }
            MigrationStatus::PostcopyRecover | MigrationStatus::PostcopyRecoverSetup => {
                rest.moved_at = Instant::now();
                let since = *rest.recovers_since.get_or_insert_with(Instant::now);
                self.enter_postcopy_state(PostcopyState::Recovering);
                if since.elapsed() >= Duration::from_secs(2 * RECOVER_SECONDS) {
                    // The way was lost again in the middle of it. 10.0 is paused by this, and tried again; 7.2 refuses.
                    if let Some(rest) = self.serving.as_mut() {
                        rest.recovers_since = Some(Instant::now());
                    }
                    warn!(migration = %self.id, "post-copy's new connection does not come about; it is given up");
                    self.pause_stream();
                }
            }
            _ => {}
        }
    }

    fn enter_postcopy_state(&mut self, state: PostcopyState) {
        self.report.send_if_modified(|report| {
            let Some(postcopy) = &mut report.postcopy else { return false };
            let new = postcopy.state != state;
            if std::mem::discriminant(&postcopy.state) != std::mem::discriminant(&state) {
                postcopy.since = Timestamp::now();
            }
            postcopy.state = state;
            new
        });
    }

    fn pause_stream(&self) {
        let Some(guest) = &self.guest else { return };
        let (machine, id) = (guest.qemu.machine.clone(), self.id);
        tokio::spawn(async move {
            if let Err(error) = pause_postcopy(&machine).await {
                warn!(migration = %id, error = chain(&error), "QEMU did not give the connection up");
            }
        });
    }

    /// Makes the connection again, if nobody is at it and the last attempt is some time ago. `to` is where the destination
    /// listens anew, if the controller has asked it.
    fn recover(&mut self, to: Option<SocketAddr>) {
        let Some(rest) = self.serving.as_mut() else { return };
        if rest.recovering.is_some() || (to.is_none() && Instant::now() < rest.not_before) {
            return;
        }
        let (peer, id) = (self.peer.clone(), self.id);
        let ticket = self.request.offer.ticket.clone();
        rest.recovering = Some(Box::pin(async move {
            if let Some(to) = to {
                return Recovery::Listens(to);
            }
            match peer.listen_again(id, &ListenAgain { ticket }).await {
                Ok(listening) => Recovery::Listens(listening.address),
                Err(error) => Recovery::Failed(error.to_string()),
            }
        }));
    }

    /// The destination listens anew: QEMU connects. From now on this is where its stream goes.
    fn connect_anew(&mut self, to: SocketAddr) {
        (self.settings.to, self.request.offer.address) = (to, to);
        self.changed = true;
        let (Some(rest), Some(guest)) = (self.serving.as_mut(), &self.guest) else { return };
        let machine = guest.qemu.machine.clone();
        rest.recovering = Some(Box::pin(async move {
            let within = Duration::from_secs(RECOVER_SECONDS);
            match Outgoing::reattach(&machine).recover(to, within).await {
                Ok(()) => Recovery::Flows,
                Err(error) => Recovery::Failed(chain(&error)),
            }
        }));
    }

    /// An attempt has come further, or ended.
    fn tried(&mut self, recovery: Recovery) {
        let Some(rest) = self.serving.as_mut() else { return };
        rest.recovering = None;
        rest.moved_at = Instant::now();
        rest.not_before = Instant::now() + Duration::from_millis(RECOVER_PACE_MS);
        match recovery {
            Recovery::Listens(to) => self.connect_anew(to),
            Recovery::Flows => {
                rest.given_up = None;
                info!(migration = %self.id, "post-copy goes on over a new connection");
                self.changed = true;
                self.report.send_modify(|report| {
                    if let Some(postcopy) = &mut report.postcopy {
                        postcopy.recoveries += 1;
                    }
                });
            }
            Recovery::Failed(why) => {
                info!(migration = %self.id, why, "post-copy is paused still; trying again");
            }
        }
    }

    /// Post-copy is held, by order.
    pub(super) fn order_pause(&mut self) -> Result<(), ApiError> {
        let refusal = self.no_fit("hold post-copy");
        let flows = matches!(
            self.report.borrow().postcopy.as_ref().map(|postcopy| &postcopy.state),
            Some(PostcopyState::Active)
        );
        match self.serving.as_mut() {
            // A connection that is lost is kept so, and not made again.
            Some(rest) => rest.by_hand = true,
            None => return Err(refusal),
        }
        if flows {
            self.pause_stream();
        }
        Ok(())
    }

    /// A post-copy that was held goes on, by order.
    pub(super) fn order_resume(&mut self) -> Result<(), ApiError> {
        let refusal = self.no_fit("let post-copy go on");
        match self.serving.as_mut() {
            Some(rest) if rest.by_hand => {
                rest.by_hand = false;
                self.recover(None);
                Ok(())
            }
            Some(_) => {
                Err(ApiError::new(ErrorCode::WrongState, "post-copy was not paused by hand").hint(
                    "a lost connection is made again by itself, or at once by `migration recover`",
                ))
            }
            None => Err(refusal),
        }
    }

    /// A lost connection is made again now, by order.
    pub(super) fn order_recovery(&mut self, to: Option<SocketAddr>) -> Result<(), ApiError> {
        let refusal = self.no_fit("recover post-copy");
        let paused = matches!(
            self.report.borrow().postcopy.as_ref().map(|postcopy| &postcopy.state),
            Some(PostcopyState::Paused { .. } | PostcopyState::Recovering)
        );
        match self.serving.as_mut() {
            Some(rest) if paused => {
                rest.by_hand = false;
                rest.not_before = Instant::now();
                self.recover(to);
                Ok(())
            }
            Some(_) => Err(ApiError::new(ErrorCode::WrongState, "post-copy is not paused")
                .hint("there is nothing to recover while memory flows")),
            None => Err(refusal),
        }
    }
}
