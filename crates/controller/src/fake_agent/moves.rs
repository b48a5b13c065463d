//! Both sides of a migration between fake hosts. The source's side runs as a task and hands the VM over inside the world's one
//! lock, so that a fake VM has one owner at any instant; the messages of the handoff are not exchanged.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State as Extract;
use axum::response::Sse;
use axum::response::sse::Event;
use axum::routing::{get, post, put};
use axum::{Json, Router};
use futures::{Stream, StreamExt, stream};
use tokio::sync::{Notify, watch};
use whimbrel_api::agent::{
    IncomingOffer, IncomingReport, IncomingRequest, OutgoingEnd, OutgoingReport, OutgoingRequest,
};
use whimbrel_api::migration::{Mode, PostcopyState, Progress, Stay};
use whimbrel_api::server::{Body, Segment};
use whimbrel_api::vm::VmState;
use whimbrel_api::{ApiError, Downtime, Epoch, ErrorCode, MigrationId, Phase};

use super::calls::Host;
use super::{Incoming, Outgoing, Pace, steering, vm_report};

pub(super) fn calls() -> Router<Host> {
    Router::new()
        .route("/incoming/{id}", put(put_incoming).get(incoming).delete(delete_incoming))
        .route("/outgoing/{id}", put(put_outgoing).get(outgoing).delete(delete_outgoing))
        .route("/outgoing/{id}/watch", get(watch_outgoing))
        .route("/outgoing/{id}/cancel", post(cancel_outgoing))
}

async fn put_incoming(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
    Body(request): Body<IncomingRequest>,
) -> Result<Json<IncomingOffer>, ApiError> {
    host.with(|state| {
        let incoming = state.incoming.entry(id).or_insert_with(|| Incoming {
            request: request.clone(),
            report: IncomingReport::Waiting,
        });
        if incoming.request.definition.id != request.definition.id {
            return Err(ApiError::new(ErrorCode::Exists, "another migration has this id"));
        }
        Ok(())
    })?;
    Ok(Json(IncomingOffer {
        address: ([127, 0, 0, 1], 49_152).into(),
        agent: format!("{}:0", host.name),
        ticket: format!("ticket-{id}"),
        start_ms: 1,
        disks: None,
    }))
}

async fn incoming(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
) -> Json<IncomingReport> {
    let report = host.with(|state| state.incoming.get(&id).map(|found| found.report.clone()));
    Json(report.unwrap_or(IncomingReport::None))
}

async fn delete_incoming(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
) -> Json<IncomingReport> {
    let gone = host.with(|state| state.incoming.remove(&id));
    Json(match gone.map(|found| found.report) {
        None => IncomingReport::None,
        Some(IncomingReport::Waiting) => IncomingReport::Refused { why: "abandoned".to_owned() },
        Some(other) => other,
    })
}

async fn put_outgoing(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
    Body(request): Body<OutgoingRequest>,
) -> Result<Json<OutgoingReport>, ApiError> {
    let begun = host.with(|state| {
        if let Some(known) = state.outgoing.get(&id) {
            return Ok(Err(known.report.borrow().clone()));
        }
        let vm = state.vms.get_mut(&request.vm);
        let vm = vm.ok_or_else(|| ApiError::not_found("VM", request.vm))?;
        let offline = request.options.mode == Mode::Offline && vm.state == VmState::Stopped;
        if !offline && !matches!(vm.state, VmState::Running | VmState::Paused) {
            let message = format!("the VM is {}", vm.state.word());
            return Err(ApiError::new(ErrorCode::WrongState, message));
        }
        let was = std::mem::replace(&mut vm.state, VmState::Migrating { migration: id });
        let report = watch::Sender::new(OutgoingReport::begun(id, request.vm));
        let outgoing = Outgoing {
            report: report.clone(),
            request: request.clone(),
            settings: Vec::new(),
            cancelled: false,
            cancel: Arc::default(),
            postcopy: Arc::default(),
            complete: Arc::default(),
        };
        let (cancel, postcopy) = (outgoing.cancel.clone(), outgoing.postcopy.clone());
        let complete = outgoing.complete.clone();
        state.outgoing.insert(id, outgoing);
        Ok(Ok(Copy { order: request, id, report, cancel, postcopy, complete, was }))
    })?;
    let copy = match begun {
        Ok(copy) => copy,
        Err(known) => return Ok(Json(known)),
    };
    let report = copy.report.borrow().clone();
    tokio::spawn(copy.run(host));
    Ok(Json(report))
}

/// The source's side at work.
struct Copy {
    order: OutgoingRequest,
    id: MigrationId,
    report: watch::Sender<OutgoingReport>,
    cancel: Arc<Notify>,
    postcopy: Arc<Notify>,
    complete: Arc<Notify>,
    was: VmState,
}

impl Copy {
    async fn run(self, host: Host) {
        let pace = host.world.lock().pace.clone();
        let progress = Progress { ram_total_bytes: 1 << 30, passes: 1, ..Progress::default() };
        self.report.send_modify(|report| report.progress = Some(progress));
        if matches!(pace, Pace::HangsInSwitchover) {
            self.report.send_modify(|report| report.phase = Phase::Switchover);
        }
        let why = match pace {
            Pace::Hangs | Pace::HangsInSwitchover => match self.hang(&host).await {
                Ok(()) => return,
                Err(why) => why,
            },
            Pace::Fails(after, why) => self.wait(after).await.err().unwrap_or(why),
            Pace::Moves(step) => match self.hand_over(&host, step).await {
                Ok(()) => return,
                Err(why) => why,
            },
        };
        self.stay(&host, why);
    }

    /// The copying goes on until somebody orders something.
    async fn hang(&self, host: &Host) -> Result<(), Stay> {
        tokio::select! {
            () = self.cancel.notified() => return Err(Stay::Cancelled),
            () = self.complete.notified() => return self.hand_over(host, Duration::ZERO).await,
            () = self.postcopy.notified() => {}
        }
        self.give(host)?;
        host.with(|state| {
            if let Some(outgoing) = state.outgoing.get(&self.id) {
                steering::tell(outgoing, PostcopyState::Active);
            }
        });
        self.complete.notified().await;
        host.with(|state| {
            if let Some(outgoing) = state.outgoing.get(&self.id) {
                steering::tell(outgoing, PostcopyState::Done);
            }
        });
        self.report.send_modify(|report| {
            report.downtime = Some(Downtime { total_us: 30_000, ..Downtime::default() });
            report.end = OutgoingEnd::Moved;
        });
        Ok(())
    }

    async fn wait(&self, step: Duration) -> Result<(), Stay> {
        tokio::select! {
            () = tokio::time::sleep(step) => Ok(()),
            () = self.cancel.notified() => Err(Stay::Cancelled),
        }
    }

    async fn hand_over(&self, host: &Host, step: Duration) -> Result<(), Stay> {
        self.wait(step).await?;
        self.report.send_modify(|report| report.phase = Phase::Switchover);
        self.wait(step).await?;
        self.give(host)?;
        self.report.send_modify(|report| {
            report.downtime = Some(Downtime { total_us: 9_000, ..Downtime::default() });
            report.end = OutgoingEnd::Moved;
        });
        Ok(())
    }

    /// In one step of the world: the VM is the destination's, unless a cancel was accepted before.
    fn give(&self, host: &Host) -> Result<(), Stay> {
        let mut world = host.world.lock();
        let source = world.hosts.get_mut(&host.name).expect("a fake host is in its world");
        if source.outgoing.get(&self.id).is_none_or(|outgoing| outgoing.cancelled) {
            return Err(Stay::Cancelled);
        }
        self.report.send_modify(|report| report.phase = Phase::Handoff);
        let vm = source.vms.remove(&self.order.vm).expect("a VM that is copied is there");
        let destination = world.hosts.get_mut(&self.order.destination);
        let destination = destination.expect("the destination is in the same world");
        let given = destination.incoming.get(&self.id).map(|it| it.request.definition.clone());
        let definition = given.unwrap_or(vm.definition);
        let moved = vm_report(&definition, self.was.clone(), self.order.epoch);
        if let Some(incoming) = destination.incoming.get_mut(&self.id) {
            let (epoch, vm) = (self.order.epoch, moved.state.clone());
            incoming.report = IncomingReport::Owned { epoch, vm };
        }
        destination.vms.insert(self.order.vm, moved);
        Ok(())
    }

    /// The VM is the source's as before, in an epoch that no migration had.
    fn stay(&self, host: &Host, why: Stay) {
        host.with(|state| {
            if let Some(vm) = state.vms.get_mut(&self.order.vm) {
                vm.state = self.was.clone();
                vm.epoch = Epoch(self.order.epoch.0 + 1);
            }
        });
        self.report.send_modify(|report| report.end = OutgoingEnd::Stayed { why });
    }
}

fn sender(host: &Host, id: MigrationId) -> Result<watch::Sender<OutgoingReport>, ApiError> {
    let found = host.with(|state| state.outgoing.get(&id).map(|found| found.report.clone()));
    found.ok_or_else(|| ApiError::not_found("outgoing migration", id))
}

async fn outgoing(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<OutgoingReport>, ApiError> {
    Ok(Json(sender(&host, id)?.borrow().clone()))
}

async fn watch_outgoing(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let mut receiver = sender(&host, id)?.subscribe();
    receiver.mark_changed();
    let reports = stream::unfold(Some(receiver), |receiver| async move {
        let mut receiver = receiver?;
        receiver.changed().await.ok()?;
        let report = receiver.borrow_and_update().clone();
        let over = !matches!(report.end, OutgoingEnd::Open);
        Some((report, (!over).then_some(receiver)))
    });
    Ok(Sse::new(reports.map(|report| {
        Ok(Event::default().json_data(report).expect("a report can be written as JSON"))
    })))
}

async fn cancel_outgoing(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
) -> Result<Json<OutgoingReport>, ApiError> {
    host.with(|state| {
        let outgoing = state.outgoing.get_mut(&id);
        let outgoing = outgoing.ok_or_else(|| ApiError::not_found("outgoing migration", id))?;
        if outgoing.report.borrow().phase >= Phase::Handoff {
            return Err(ApiError::new(ErrorCode::HandedOver, "the guest has been given away"));
        }
        outgoing.cancelled = true;
        outgoing.cancel.notify_one();
        Ok(Json(outgoing.report.borrow().clone()))
    })
}

async fn delete_outgoing(
    Extract(host): Extract<Host>,
    Segment(id): Segment<MigrationId>,
) -> Result<(), ApiError> {
    let found = host.with(|state| state.outgoing.remove(&id));
    found.map(drop).ok_or_else(|| ApiError::not_found("outgoing migration", id))
}
