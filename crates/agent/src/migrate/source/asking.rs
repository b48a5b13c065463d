//! The questions to the destination, and what its answers mean.
//!
//! They are asked beside everything else: the driver never waits for one, it hears the answer when it comes. An answer
//! that does not come is not missed, for the rules ask again at the next tick; after GO the question also stands in the
//! report, so that the controller can carry it where the source does not get through.
//!
//! Not here: what the answers lead to ([`whimbrel_migration::handoff::Source`]).

use std::future::Future;
use std::pin::Pin;
use std::time::Instant;

use tracing::debug;
use whimbrel_api::ApiError;
use whimbrel_api::agent::Handoff;
use whimbrel_api::migration::Stay;
use whimbrel_migration::handoff::{Body, Intent, Message, SourceInput};

use super::Departure;
use super::pause::now_us;

/// Questions to the destination under way at the same time; more are not asked. Of all messages, twice as many.
const ASKING_MAX: usize = 4;

/// A question under way.
pub(super) type Asking = Pin<Box<dyn Future<Output = Result<Handoff, ApiError>> + Send>>;

impl Departure {
    /// Asks the destination, and lets the driver hear the answer.
    pub(super) fn send(&mut self, mut message: Message) {
        if message.body == Body::AskLoaded && std::mem::take(&mut self.answer_due) {
            // One more question would only hold the connection at the moment when GO needs it.
            return;
        }
        if let Body::Go { intent } = &mut message.body
            && self.request.options.suspend
        {
            // Every GO of this migration says so, for the request is in the ledger before the first one is sent. Here the
            // guest's user still wants it to run, should it stay.
            *intent = Intent::Pause;
        }
        let handoff = Handoff { ticket: self.request.offer.ticket.clone(), message, resumed: None };
        if matches!(message.body, Body::Go { .. }) {
            let relay = Some(handoff.clone());
            self.report.send_if_modified(|report| {
                let new = report.relay.is_none();
                report.relay = relay;
                new
            });
        }
        // Unanswered questions must not keep the source from telling what it has decided.
        let most = if message.body == Body::AskLoaded { ASKING_MAX } else { 2 * ASKING_MAX };
        if self.asking.len() >= most {
            return;
        }
        let (peer, id) = (self.peer.clone(), self.id);
        self.asking.push(Box::pin(async move { peer.handoff(id, &handoff).await }));
    }

    /// Asks without being told to by the rules. Early, it renews the destination's lease; once the guest stands still, the
    /// answer is on its way while QEMU still sends. An answer means what it always means.
    pub(super) fn ask_loaded(&mut self) {
        self.send(Message { claim: self.rules.claim(), body: Body::AskLoaded });
    }

    /// An answer, or none: `busy` and the like are no answer to the rules, and yet a sign of life.
    pub(super) fn answered(&mut self, answer: Result<Handoff, ApiError>) -> Option<SourceInput> {
        match answer {
            Ok(answer) => {
                self.lively_at = Instant::now();
                Some(self.heard(answer))
            }
            Err(error) => {
                debug!(migration = %self.id, %error, "no answer to a handoff message yet");
                if !error.is_unknown() {
                    self.lively_at = Instant::now();
                }
                None
            }
        }
    }

    /// What an answer means, with the moments that it marks.
    fn heard(&mut self, answer: Handoff) -> SourceInput {
        self.denied = answer.message.body == Body::Unknown;
        match answer.message.body {
            Body::Loaded => {
                self.pause.confirmed.get_or_insert_with(now_us);
            }
            Body::Owned => {
                if let Some(downtime) = self.pause.over(answer.resumed) {
                    self.report.send_modify(|report| report.downtime = Some(downtime));
                    self.changed = true;
                }
            }
            Body::Refused => self.refused_there(),
            _ => {}
        }
        SourceInput::Receive(answer.message)
    }

    /// The destination has refused: unless something was known before, this is why the VM stays.
    pub(super) fn refused_there(&mut self) {
        let message = "the destination refused the VM; its own event says why".to_owned();
        self.why.get_or_insert(Stay::DestinationRefused { message });
    }
}
