//! The loop that both sides of a migration turn: what the rules want is done, what happens is told to them.
//!
//! ```text
//!   first ──▶ act, one after the other ──▶ finished? ──▶ listen ──▶ step ─┐
//!                ▲ ◀── step(answer) ──┘                                   │
//!                └────────────────────────────────────────────────────────┘
//! ```
//!
//! It is the loop that the header of [`whimbrel_migration::handoff`] prescribes. What is done and what is heard differs:
//! [`super::source`] and [`super::destination`]. It decides nothing, and returns no error, for there is none that could
//! lead out of a handoff.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior, interval, timeout};
use whimbrel_migration::handoff::{Action, RESEND_INTERVAL_MS, UNRESOLVED_AFTER_MS};
use whimbrel_qemu::process::Process;

/// One side: its rules, its QEMU, and what it listens to.
pub(super) trait Side {
    /// What may happen to its rules.
    type Input: Send;
    /// What it listens to.
    type Ears: Send;

    /// Tells the rules what has happened, and returns what they want done.
    fn step(&mut self, input: Self::Input) -> Vec<Action>;

    /// Whether nothing more is to be done.
    fn is_finished(&self) -> bool;

    /// Carries an action out; `Some` is the rules' answer to it.
    fn act(&mut self, action: Action) -> impl Future<Output = Option<Self::Input>> + Send;

    /// Waits for the next thing that happens; `None` if it means nothing to the rules.
    fn listen(&mut self, ears: &mut Self::Ears)
    -> impl Future<Output = Option<Self::Input>> + Send;
}

/// Turns the loop until the rules are finished. `first` is what they want done first.
pub(super) async fn drive<S: Side + Send>(side: &mut S, first: Vec<Action>, mut ears: S::Ears) {
    let mut todo = VecDeque::from(first);
    loop {
        while let Some(action) = todo.pop_front() {
            let Some(answer) = side.act(action).await else { continue };
            // What follows from an answer comes before what is left.
            for next in side.step(answer).into_iter().rev() {
                todo.push_front(next);
            }
        }
        if side.is_finished() {
            return;
        }
        if let Some(input) = side.listen(&mut ears).await {
            todo.extend(side.step(input));
        }
    }
}

/// Awaits a write to the ledger for as long as it takes, for what is not known to have failed has not failed. A disk that
/// hangs must not do so in silence: `tell` is done once [`UNRESOLVED_AFTER_MS`] have passed.
pub(super) async fn written<T>(
    write: impl Future<Output = T>,
    tell: impl Future<Output = ()>,
) -> T {
    let mut write = pin!(write);
    let patience = Duration::from_millis(UNRESOLVED_AFTER_MS);
    match timeout(patience, &mut write).await {
        Ok(done) => done,
        Err(_) => tokio::join!(write, tell).0,
    }
}

/// The rules' ticks.
pub(super) fn ticks() -> Interval {
    let mut ticks = interval(Duration::from_millis(RESEND_INTERVAL_MS));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Resolves when a process has ended, and never if there is none.
pub(super) async fn ended(process: Option<&Process>) {
    match process {
        Some(process) => {
            process.wait_exit().await;
        }
        None => std::future::pending().await,
    }
}
