//! Everything that changes in the pool, as server-sent events.
//!
//! A stream begins with everything there is. A reader who falls behind loses his backlog and is given everything again, which is
//! all that he can have missed.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::Sse;
use axum::response::sse::{Event as Line, KeepAlive};
use futures::{Stream, StreamExt, stream};
use serde::Serialize;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tracing::error;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use whimbrel_api::ApiError;
use whimbrel_api::event::Event;

use super::Shared;
use crate::policies;

/// How often a stream without news sends a sign of life, in seconds; readers wait three times as long.
const KEEP_ALIVE_SECONDS: u64 = 5;

pub(super) fn calls() -> OpenApiRouter<Shared> {
    OpenApiRouter::default().routes(routes!(follow_events))
}

/// Follow everything that changes in the pool; it begins with one event for everything there is.
#[utoipa::path(get, path = "/events", tag = "pool",
    responses((status = 200, description = "Server-sent events", body = Event, content_type = "text/event-stream")))]
async fn follow_events(
    State(controller): State<Shared>,
) -> Result<Sse<impl Stream<Item = Result<Line, Infallible>>>, ApiError> {
    let receiver = controller.events().subscribe();
    let backlog = everything(&controller).await?;
    let closing = {
        let controller = controller.clone();
        async move { controller.closing().await }
    };
    let reader = Reader { controller, receiver, backlog };
    let events = stream::unfold(reader, Reader::next).take_until(Box::pin(closing));
    Ok(Sse::new(events.map(|event| Ok(line(event.as_ref())))).keep_alive(keep_alive()))
}

/// One reader of everything.
struct Reader {
    controller: Shared,
    receiver: broadcast::Receiver<Arc<Event>>,
    backlog: VecDeque<Arc<Event>>,
}

impl Reader {
    async fn next(mut self) -> Option<(Arc<Event>, Self)> {
        loop {
            if let Some(event) = self.backlog.pop_front() {
                return Some((event, self));
            }
            match self.receiver.recv().await {
                Ok(event) => return Some((event, self)),
                Err(RecvError::Closed) => return None,
                Err(RecvError::Lagged(_)) => {
                    self.receiver = self.controller.events().subscribe();
                    self.backlog = everything(&self.controller).await.ok()?;
                }
            }
        }
    }
}

async fn everything(controller: &Shared) -> Result<VecDeque<Arc<Event>>, ApiError> {
    let store = controller.store();
    let mut all = VecDeque::new();
    let hosts = controller.hosts().all();
    all.extend(hosts.iter().map(|member| Event::Host { host: member.view() }));
    all.extend(store.networks().await?.into_iter().map(|network| Event::Network { network }));
    all.extend(store.storages().await?.into_iter().map(|storage| Event::Storage { storage }));
    all.extend(policies::events(controller).await?);
    let vms = store.vms().await?;
    all.extend(vms.iter().map(|row| Event::Vm { vm: controller.view(row) }));
    for stored in store.active_migrations().await? {
        let migration = controller.events().latest(stored.id).unwrap_or(stored);
        all.push_back(Event::Migration { migration });
    }
    Ok(all.into_iter().map(Arc::new).collect())
}

/// Tells a reader that hears nothing that he is still heard.
pub(super) fn keep_alive() -> KeepAlive {
    KeepAlive::new().interval(Duration::from_secs(KEEP_ALIVE_SECONDS))
}

/// One event as it goes over the wire.
pub(super) fn line(value: &impl Serialize) -> Line {
    Line::default().json_data(value).unwrap_or_else(|error| {
        error!(%error, "an event cannot be written as JSON");
        Line::default().comment("an event could not be written")
    })
}
