//! Who may run the guest: the passing of a VM from the agent of one host to the agent of another.
//!
//! Two state machines, [`Source`] and [`Destination`], take inputs and return actions. They do no
//! I/O and know no clock; each agent has a *driver* that feeds the one and carries out the other.
//! The checker in this crate's tests drives the same code through every order of events within
//! its bounds.
//!
//! # The promise
//! The guest runs on at most one host at any instant, whatever crashes and whichever message is
//! lost, repeated or late; and only a host whose own ledger says so may run it. No message's
//! *absence* ever means anything: where the answer is lost the guest stands still and the question
//! is asked again.
//!
//! # A normal run, message by message
//! The VM belongs to A in epoch 4 and goes to B; the [`Claim`] of all messages is {vm, M, 5}.
//! ```text
//!   A: Source                                    B: Destination
//!   ---------------------------------------------------------------------------------
//!                                                offer()
//!                                                  Persist Expected{5, from A}
//!                                                Persisted -> StartTarget (-S -incoming defer)
//!   begin()
//!     Persist Leaving{5, to B}
//!   Persisted -> BeginCopy
//!        ......... QEMU copies memory, the guest runs; then it stops at A .........
//!   Completed -> Send AskLoaded   ------------>  (answered once loaded)
//!                                                Loaded
//!   Receive Loaded                <------------    Send Loaded
//!     Persist Released{5, to B}
//!   Persisted                                    ~~~ the point of no return is A's fsync ~~~
//!     Send Go{intent}             ------------>  Receive Go
//!                                                  CloseListeners
//!                                                ListenersClosed
//!                                                  Persist Owned{5}
//!                                                Persisted
//!                                                  ContinueGuest       (guest runs on B)
//!                                                Continued
//!   Receive Owned                 <------------    Announce, Send Owned, Settle(Moved)
//!     QuitSource, Persist Gone{5, to B}, Settle(Moved)
//!   Persisted: finished
//! ```
//!
//! # With post-copy
//! The guest moves before all of its memory has: A's QEMU sends the guest's state, and the rest of
//! the memory follows while the guest runs on B. The gate is the same one, in the same place: after
//! the guest has stopped and before any `cont`. What differs is that A's QEMU is needed afterwards.
//! ```text
//!   StateSent -> Send AskLoaded   ------------>  StateLoaded
//!   Receive Loaded                <------------    Send Loaded
//!     Persist Serving{5, to B}
//!   Persisted                                    ~~~ the point of no return is A's fsync ~~~
//!     Send Go{intent}             ------------>  Receive Go
//!                                                  CloseListeners, Persist Fetching{5, from A}
//!                                                Persisted
//!                                                  ContinueGuest       (guest runs on B)
//!   Receive Owned                 <------------  Continued: Announce, Send Owned
//!     Send AskFetched             ------------>  (answered at the end)
//!        ......... A's QEMU sends the rest of the memory to B's .........
//!   Completed, or                                Loaded
//!   Receive Fetched                                Persist Owned{5}
//!     QuitSource, Persist Gone{5},               Persisted
//!     Settle(Moved)               <------------    Send Fetched, Settle(Moved)
//! ```
//! **Why the gate is not before `migrate-start-postcopy`.** With pause-before-switchover on A and
//! `-S` on B nothing runs anywhere between A's stop and B's `cont`, so the release can wait until B
//! holds the state. Until then A owns a guest whose memory is whole, and a cancel, a state that B
//! cannot load and a B that dies all end at A. A release before the switchover would make each of
//! them a VM that was given to a host that never held it. (What it takes to make QEMU let go of that
//! memory stands below, with `StopCopy`.)
//!
//! - From `Owned` until A's `Completed` or B's `Fetched` **nobody ends either QEMU**: not a cancel, a
//!   lease, a restart or a sweep. The records say so: `Serving` and `Fetching`.
//! - A cut network is nothing to these rules: both QEMUs wait, and the drivers bring them together.
//! - If A's QEMU ends, or ends its stream for good, what B lacks is lost. A says `Lost` until it is
//!   answered; B looks (`LookForRest`), and if it lacks memory and its stream has ended, it ends a
//!   guest that can never run on. The VM has crashed on B. A's memory is older, and never runs.
//! - If B's QEMU ends, the VM has crashed on B. B answers `Fetched`, which says that it needs nothing
//!   more.
//! - If B's host is gone for good, A keeps serving, tells the operator, and waits.
//! - The rest may have come before the guest runs; then all is as without post-copy.
//!
//! # With disks that are copied
//! Where source and destination have storages of their own, disks are mirrored while the guest runs. What is on the
//! destination's disks counts from the moment that the guest stands still, and then it must be *all*: each mirror ended,
//! its last error read, everything flushed. Such disks are **settled**, as long as the guest does not run again at A.
//! ```text
//!   AtSwitchover                                 (QEMU waits; the guest stands still)
//!     SettleDisks
//!   DisksSettled
//!     Send DisksSettled           ------------>  CloseExports
//!     FinishCopy
//!   Completed -> Send DisksSettled  ---------->  Loaded, and the disks are settled
//!   Receive Loaded                <------------    Send Loaded
//!   ...                                          ... Go: CloseListeners, Persist Owned, ContinueGuest
//! ```
//! - **Before the stream's end**, because QEMU gives its disks up with it: a mirror that still writes then fails, or takes
//!   QEMU with it. A stream that ends without its disks is no move: A gives it up.
//! - **B's `Loaded` covers the disks.** A B that expects disks and was never told of them holds no whole state, whatever its
//!   source believes, and takes no GO. (The machines are told by their drivers: [`Source::with_disks`],
//!   [`Destination::with_disks`].)
//! - Nothing else changes: the gate, the records and the doubt are the same. In post-copy, too: the disks are whole before
//!   the guest runs at B, only its memory is not. Its driver begins post-copy once every mirror is ready.
//! - **Files go by the record alone**: A's originals once `Gone` is on its disk, B's copies once `Refused` is
//!   ([`fate_of_originals`], [`fate_of_copies`]). What a driver remembers, and what became of a QEMU, deletes nothing.
//! - An operator's `Reclaim` starts the VM from A's disks, which are as they were at the release: what the guest wrote at B
//!   is at B alone, so those files are put aside and never deleted.
//!
//! # In doubt
//! Once `Released` may be on its disk, A does not run the guest again unless B has refused: it
//! sends GO again at every `Tick`. B answers `Owned`, or `Refused`, which is true for ever because
//! it is durable or because B's loaded QEMU was killed before it ever ran and before `Owned` was
//! ever written. (A B whose `Expected` may not be on its disk says nothing before a record is: the
//! same migration could be offered there again.) Then A takes epoch 6 and resumes. If B stays silent the VM stands still and the
//! driver's `Overdue` raises it to the operator. A migration that ends before the release also
//! burns its epoch (A goes from 4 to 6). One that ends before A has heard of it burns its epoch at B
//! alone: the next one must come with a later epoch, which A takes though it skips some. So an epoch
//! never belongs to two migrations, and the next try is not refused for the last one's sake.
//! (Safety does not hang on whoever names the epochs: the checker's controller names some twice.)
//!
//! # States of the source
//! ```text
//!             Persisted         Completed            Loaded             Persisted
//!  Recording ----------> Copying --------> Confirming -----> Releasing ----------> InDoubt
//!      |                    |                  |                 |                 |    |
//!      | PersistFailed      | Cancel, Fail,    | Cancel, Fail,   | PersistFailed   |    | Owned:
//!      |                    | Refused,         | Refused,        v                 |    | quit
//!      |                    | QemuGone         | Unknown     Retracting    Refused |    v
//!      v                    v                  v              |       |            | Retiring
//!   (abort: resume at once) ------------------ + -------------+       |            v    |
//!      |                                         Refused: resume      |        Keeping  |
//!      v         PersistFailed (it is refused): resume                |            |    |
//!   Staying <------------------------------------------------------ / | / ---------+    |
//!      | Persisted Owned{6}                                           |            |    |
//!      v                         Persisted Owned{6}: resume           |            |    v
//!   Stayed (finished) <-----------------------------------------------+------------+  Moved
//!
//!  Post-copy: Copying -- StateSent --> Confirming, and while memory is still to be sent
//!             InDoubt -- Owned --> Serving -- Completed, or Fetched: quit --> Retiring
//!
//!  Disks: Copying -- AtSwitchover, DisksSettled --> Copying, and Completed leads on only then
//!
//!  By an operator's word: InDoubt, Serving -- Reclaim: quit --> Discarding -- QemuGone --> TakingBack
//!             TakingBack -- Persisted Owned{6} --> Stayed, crashed.  Discarding -- Owned, Fetched --> as before
//! ```
//!
//! # States of the destination
//! ```text
//!             Persisted         Loaded          Go           ListenersClosed
//!  Recording ----------> Preparing ----> Ready -----> Sealing ---------------> Taking
//!      |                   |             |  ^  <--------/ CloseFailed           |   |
//!      |                   |             |  '---------- PersistFailed ----------+   |
//!      | PersistFailed     | QemuGone,   | QemuGone,                                | Persisted
//!      v                   v Abandon     v Abandon              ContinueFailed      v
//!   Refusing <----------- + <----------- + <----------------------------------- Starting
//!      | durable; or killed, and no Owned was ever written                          |
//!      v                                               Continued, or QemuGone: it   |
//!   Refusing (has answered)                            may have run for an instant  v
//!      | durable and killed                                              Owner (finished)
//!      v
//!   Refusing (finished)
//!
//!  Post-copy: Preparing -- StateLoaded --> Ready, and if memory is still to come when GO is taken
//!             Starting -- Continued --> Fetching -- Loaded, or QemuGone; Persisted --> Owner
//!
//!  Disks: Ready says `Loaded` and takes Go only after the source has said `DisksSettled`
//! ```
//!
//! # Taken back by an operator
//! Where B never returns nobody can know whether it got GO. An operator can state that it will never act on it
//! (`Reclaim`); A takes no such thing for granted by itself. A's memory never runs again even so: B may have run the guest
//! and written to its disks. So A's QEMU ends, *then* A writes that it owns epoch 6, and the VM has crashed on A. Until
//! B has heard of that ([`fn@supersede`]) whoever orders VMs to start or to move must order nothing of this VM at B, whose
//! ledger may say that it owns epoch 5.
//!
//! # What a driver does
//! One loop per migration and host, which alone calls `step`:
//! ```text
//!   loop {
//!       queue.extend(machine.step(next input));
//!       while let Some(action) = queue.pop_front() {
//!           if let Some(answer) = carry_out(action) { queue.extend(machine.step(answer)); }
//!       }
//!   }
//! ```
//! 1. Actions are carried out **one after the other, in order**. An action with an answer (table
//!    below) is awaited, and the answer stepped, before the next action. (What follows from the
//!    answer may also come before what is left of the queue: the checker explores both.) The next
//!    input of another kind is taken when the queue is empty. While a machine of a VM lives on this host, no other
//!    begins for that VM ([`NotAdmitted::Migrating`]).
//! 2. The machine is finished when `is_finished()`; messages that come later go to [`answer`].
//! 3. `Tick` comes every [`RESEND_INTERVAL_MS`], `Overdue` once, [`UNRESOLVED_AFTER_MS`] after the
//!    release was written, or its writing has failed (by the monotonic clock; nothing depends on when exactly);
//!    and each time that a B that fetches falls silent for half a minute, for nothing stands still then.
//! 4. Received messages are checked first: the peer's certificate must be that of `peer()` (or of
//!    the controller relaying for it), and the message's `migration` selects the machine. A
//!    message whose migration has no live machine goes to [`answer`].
//!
//! | action | the driver does | answers with |
//! |---|---|---|
//! | `Persist(record)` | writes the record under the key (vm, migration), replacing that key's older one, and fsyncs | `Persisted` or `PersistFailed` |
//! | `Send(message)` | sends it to the peer by any path; does not wait, does not care | – |
//! | `BeginCopy` (A) | starts the mirrors, if disks are copied, and QEMU's migration; with disks reports `AtSwitchover` when QEMU waits at `pre-switchover` with the guest stopped, and goes no further by itself; reports `Completed` when QEMU says `completed` **and** `query-status` says `postmigrate`; with post-copy `StateSent` before that (see below); any failure or deadline, of a mirror too, is `Fail` | – |
//! | `SettleDisks` (A) | ends every mirror without a pivot, waits until each has concluded, reads its error, sees that source and target are of one size, and takes the target's nodes out of QEMU, which the destination is about to close; it takes time, and so is no answer: reports `DisksSettled`, or `Fail` | – |
//! | `FinishCopy` (A) | lets QEMU send the rest (`migrate-continue`) | – |
//! | `StopCopy` (A, or the owner after a restart) | cancels QEMU's migration if one is active and waits for its end; no-op otherwise. Cancels every mirror by force, also one that only QEMU remembers, and waits for no network: a mirror whose far end is gone may hold the guest's writes. A post-copy needs more than a cancel, see below | – |
//! | `ResumeGuest` (A, or the owner after a restart, B included while it fetches) | `cont` unless the guest runs already; tries again until it works or QEMU is gone, and tells the operator meanwhile | – |
//! | `QuitSource` (A) | ends the source's QEMU, quit then kill; disks stay | – |
//! | `StartTarget` (B) | makes the images of copied disks; starts QEMU with `-S -incoming defer`, after any older one of this VM is gone, and lets the source alone write to them; reports `Loaded` when the incoming migration is `completed` and the guest stopped, with post-copy `StateLoaded` before that (see below); any failure is `Abandon` | – |
//! | `CloseExports` (B) | begins to take the disks' exports and their NBD server down; does not wait, `CloseListeners` does | – |
//! | `CloseListeners` (B) | takes down the disks' exports and the NBD server, checks that nothing listens for this VM any more (in post-copy QEMU listens to the end, and drops a second stream) | `ListenersClosed` or `CloseFailed` |
//! | `ContinueGuest` (B) | `cont` | `Continued`; `ContinueFailed` **only** if QEMU answered with an error and says that it is not running; no answer at all: `QemuGone` when it is gone |
//! | `LookForRest` (B) | asks QEMU, now, whether all memory is here (`completed`), or it lacks some and its stream has ended (`postcopy-paused`, and no new stream is being made) | `Loaded` or `Starved`; nothing where it is neither |
//! | `KillTarget` (B) | SIGKILL to B's QEMU; does not wait | `QemuGone`, whenever it is gone (at once when there is none) |
//! | `Announce` (B) | tells the network where the guest is now | – |
//! | `AcceptCancel`, `RefuseCancel` | answers whoever gave `Cancel`, all of them; until then they are told that it is not known yet | – |
//! | `RaiseUnresolved` | reports `Outcome::Unresolved` with the peer to ask, and raises it to the operator; a `Settle` may follow | – |
//! | `Settle(outcome)` | reports the outcome of the migration, which is durable by now | – |
//!
//! `QemuGone` is given whenever the host's own QEMU of this VM has ended, asked for or not.
//! Nobody else may start, continue or kill the VM's QEMU while a machine lives.
//!
//! A VM that is stopped passes by the same rules, with no QEMU at either end: the drivers answer
//! `BeginCopy` with `Completed`, `StartTarget` with `Loaded`, `CloseListeners` with `ListenersClosed`,
//! `ContinueGuest` with `Continued` and `KillTarget` with `QemuGone`, and write the definition in one
//! with `Owned`. (The definition of a VM whose disks were copied names their new places; it is written so, too.) After a restart nothing is there ([`Observed::Gone`]), so a destination that was only
//! ready refuses, as it may have done before.
//!
//! With post-copy the driver owes three proofs more: QEMU's words say less than they seem to.
//! - `StateSent`: QEMU is `postcopy-active` before it sends the state, and may yet fail in sending
//!   it. Only memory that it sent in post-copy (`postcopy-bytes` above 0), or `completed`, proves that the state has gone.
//! - The guest is stopped by the driver (`stop`) before `migrate-start-postcopy`. One that QEMU has
//!   stopped itself, QEMU lets run again by itself when the post-copy fails, and that can be after
//!   the release.
//! - `StateLoaded`: QEMU is `postcopy-active` before it has loaded the state, and takes a `cont` then
//!   for a wish. The run state tells: `paused`, and no longer `inmigrate`.
//!
//! And it owes one act. After `migrate-continue` A's memory is whole, and yet QEMU does not run its
//! guest ("Migration is not finalized yet") until the post-copy is over: 10.0 cancels none; 7.2 does
//! while it is `postcopy-active`, and stays `cancelling` for ever once it is `postcopy-paused`. What
//! ends it on both is `completed`. So `StopCopy` pauses the stream (`migrate-pause`), lets QEMU
//! resume it to the agent itself, and answers there that every page has been received: QEMU sends
//! nothing, completes, and `cont` works. `Completed` is not reported for that. A guest whose QEMU
//! cannot be brought to an end has crashed here.
//!
//! After `Owned` A's driver gives `Completed` when its QEMU says so, `StreamLost` when that says
//! `failed` or `cancelled`; B's gives `Loaded` when its QEMU says `completed`. A restarted driver
//! looks at once: what was said before it came is not said again.
//!
//! # The ledger
//! Records have the key (vm, migration); a VM that was created here has one without migration. A
//! host's word on a VM is the record with the **highest epoch** ([`current`]), and only a host whose
//! word [`Ownership::may_run`] says yes may run the guest. A record replaced is gone; records of
//! old migrations stay, so that a late question is still answered. Opening the ledger makes what
//! was read durable (one committed write) before anything acts on it.
//!
//! # After a restart
//! For every VM: [`recover`] with its current record and what its QEMU is seen to do. It rebuilds
//! the machine where one is needed and says what to do first. What is seen must be true: a QEMU
//! that does not answer is waited for, or killed and waited for, never guessed.

mod copies;
mod destination;
mod record;
mod source;
mod supersede;
#[cfg(test)]
mod tests;

pub use copies::{CopyFate, fate_of_copies, fate_of_originals};
pub use destination::{Destination, DestinationInput};
pub use record::{Claim, Intent, NotAdmitted, Ownership, Standing, current};
pub use source::{Source, SourceInput};
pub use supersede::{Superseding, supersede};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::phase::Outcome;

/// How often a driver gives `Tick`, in milliseconds: unanswered questions are asked again.
pub const RESEND_INTERVAL_MS: u64 = 200;

/// How long after the release the operator is told that the outcome is unknown, in milliseconds.
pub const UNRESOLVED_AFTER_MS: u64 = 5_000;

/// What one agent tells the other. Every message names the claim it is about.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// The VM, the migration and the epoch in question.
    pub claim: Claim,
    /// What is said about it.
    pub body: Body,
}

/// The kinds of [`Message`].
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Body {
    /// Source: my QEMU has sent everything; do you hold the whole state, stopped?
    AskLoaded,
    /// Source: like `AskLoaded`, and the disks that are copied along are settled: what is on yours is what the guest
    /// last wrote, and nothing more comes. Repeated until answered.
    DisksSettled,
    /// Destination: I hold the whole state, stopped; the disks that are copied along belong to it.
    Loaded,
    /// Source: the VM is yours in this epoch. Repeated until answered.
    Go {
        /// Whether the guest shall run.
        intent: Intent,
    },
    /// Destination: this epoch is mine, for ever.
    Owned,
    /// Destination: this epoch is never going to be mine.
    Refused,
    /// Source: there will be no GO; take down what you have prepared.
    Abandon,
    /// Source: do you still need my QEMU? Repeated until answered.
    AskFetched,
    /// Source: my QEMU can send nothing more; what you lack is lost. Repeated until answered.
    Lost,
    /// Destination: I need nothing more from your QEMU: all memory is here, or the guest has ended.
    Fetched,
    /// Destination: my ledger has never heard of this migration. Proves nothing: a ledger can be
    /// lost.
    Unknown,
}

/// What a machine wants done. The module's table says what each one means to a driver.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the table in the module's header explains each")]
pub enum Action {
    Persist(Ownership),
    Send(Message),
    BeginCopy,
    SettleDisks,
    FinishCopy,
    StopCopy,
    ResumeGuest,
    QuitSource,
    StartTarget,
    CloseExports,
    CloseListeners,
    ContinueGuest,
    LookForRest,
    KillTarget,
    Announce,
    AcceptCancel,
    RefuseCancel,
    RaiseUnresolved,
    Settle(Outcome),
}

/// What a restarted agent sees of a VM's QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Observed {
    /// There is no process.
    Gone,
    /// It waits for, or is receiving, an incoming migration (run state `inmigrate`).
    Incoming,
    /// It holds a whole guest that does not run.
    Stopped,
    /// It holds a guest's state, does not run it, and lacks part of its memory (post-copy).
    Part,
    /// The guest runs.
    Running,
}

/// What a restarted agent has to do with a VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Recovered {
    /// A migration from here is to be brought to its end.
    Source(Source),
    /// A migration to here is to be brought to its end.
    Destination(Destination),
    /// The VM is this host's and no migration is open. (If its QEMU is gone, the guest has crashed
    /// or the host was restarted: it may be started again, here and only here.)
    Owner,
    /// The VM is not this host's.
    Bystander,
}

/// Rebuilds what a restarted agent needs for one VM from the VM's current record ([`current`]) and
/// what its QEMU is seen to do. The actions come first, as after a `step`; for `Owner` and
/// `Bystander` nobody wants their answers.
///
/// Postcondition: the guest is made to run only if the record says that this host may.
#[must_use]
pub fn recover(record: &Ownership, observed: Observed) -> (Recovered, Vec<Action>) {
    match &record.standing {
        Standing::Leaving { .. } | Standing::Released { .. } | Standing::Serving { .. } => {
            match Source::recover(record, observed) {
                Some((source, actions)) => (Recovered::Source(source), actions),
                None => (Recovered::Bystander, Vec::new()),
            }
        }
        Standing::Expected { .. } | Standing::Fetching { .. } => {
            match Destination::recover(record, observed) {
                Some((destination, actions)) => (Recovered::Destination(destination), actions),
                None => (Recovered::Bystander, Vec::new()),
            }
        }
        Standing::Owned => {
            let mut actions = Vec::new();
            if observed == Observed::Stopped && record.migration.is_some() {
                // A source that stayed may not have got so far: QEMU would not let the guest run.
                actions.push(Action::StopCopy);
            }
            if observed == Observed::Stopped && record.intent == Intent::Run {
                actions.extend([Action::ResumeGuest, Action::Announce]);
            }
            (Recovered::Owner, actions)
        }
        Standing::Gone { .. } => (Recovered::Bystander, unless_gone(observed, Action::QuitSource)),
        Standing::Refused { .. } => {
            (Recovered::Bystander, unless_gone(observed, Action::KillTarget))
        }
    }
}

fn unless_gone(observed: Observed, action: Action) -> Vec<Action> {
    if observed == Observed::Gone { Vec::new() } else { vec![action] }
}

/// The answer to a message about a migration that has no live machine on this host, from the
/// ledger's record of *that* migration (not the VM's current one).
#[must_use]
pub fn answer(record: Option<&Ownership>, message: &Message) -> Option<Message> {
    let reply = |body| Some(Message { claim: message.claim, body });
    let asked = matches!(
        message.body,
        Body::AskLoaded | Body::DisksSettled | Body::Go { .. } | Body::AskFetched | Body::Lost
    );
    let Some(record) = record else {
        return if asked { reply(Body::Unknown) } else { None };
    };
    if record.claim() != Some(message.claim) {
        return None;
    }
    match (&record.standing, message.body) {
        (Standing::Owned | Standing::Fetching { .. }, Body::Go { .. } | Body::DisksSettled) => {
            reply(Body::Owned)
        }
        (Standing::Owned, Body::AskFetched | Body::Lost) => reply(Body::Fetched),
        (
            Standing::Refused { .. },
            Body::AskLoaded | Body::DisksSettled | Body::Go { .. } | Body::Abandon,
        ) => reply(Body::Refused),
        _ => None,
    }
}

fn stayed(why: &str) -> Action {
    Action::Settle(Outcome::Stayed { why: why.to_owned() })
}
