//! The agent's door: the calls of [`whimbrel_api::agent`]'s table, each translated and passed on.
//!
//! The controller may call everything. Agents may call the handoff of their own migration and have its destination listen
//! anew, which [`crate::migrate`] checks, have a probe of the way to here received ([`measure`]), and nothing else;
//! monitors may read the metrics; operators and strangers may call nothing. No decision about a VM is taken here.

mod console;
mod events;
mod lineage;
mod measure;
mod moving;
mod state;

use std::future::Future;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Extension, Json, Router};
use whimbrel_api::agent::{
    CertificateRequests, Handoff, HostReport, IncomingOffer, IncomingReport, IncomingRequest,
    KnockAddress, KnockConnect, KnockListen, Mobility, OutgoingReport, OutgoingRequest, Reach,
    SharedToken, StorageReport, TokenSeen, VmReport,
};
use whimbrel_api::metrics::Scrape;
use whimbrel_api::pool::{Network, Storage};
use whimbrel_api::server::{Body, Segment, no_such_path};
use whimbrel_api::vm::{StopRequest, VmAction, VmDefinition};
use whimbrel_api::{ApiError, BODY_LIMIT_BYTES, ErrorCode, MigrationId, Name, VmId};
use whimbrel_pki::authority::HostCertificates;
use whimbrel_pki::door::PeerExtension;
use whimbrel_pki::identity::Peer;

use crate::host::Host;
use crate::storage::Storages;
use crate::{migrate, vm};

type Answer<T> = Result<Json<T>, ApiError>;
type On = State<Arc<Host>>;

/// All calls, for [`whimbrel_pki::door::Door`].
pub fn router(host: Arc<Host>) -> Router {
    let controllers = Router::new()
        .route("/host", get(report))
        .route("/certificates", get(certificate_requests).put(renew))
        .route("/networks/{name}", put(put_network).delete(delete_network))
        .route("/storages/{name}", put(put_storage).delete(delete_storage))
        .route("/storages/{name}/token", post(write_token))
        .route("/storages/{name}/seen", post(token_seen))
        .route("/vms", get(vms))
        .route("/vms/{id}", get(one_vm).put(create_vm).delete(delete_vm))
        .route("/vms/{id}/mobility", get(mobility))
        .route("/vms/{id}/start", post(start_vm))
        .route("/vms/{id}/stop", post(stop_vm))
        .route("/vms/{id}/pause", post(pause_vm))
        .route("/vms/{id}/resume", post(resume_vm))
        .route("/vms/{id}/console", get(console::open))
        .route("/knock/listen", post(knock_listen))
        .route("/knock/connect", post(knock_connect))
        .route("/incoming/{migration}", put(prepare).get(incoming).delete(drop_incoming))
        .route("/outgoing/{migration}", put(send).get(outgoing).delete(retire))
        .route("/outgoing/{migration}/watch", get(events::watch))
        .route("/outgoing/{migration}/cancel", post(cancel))
        .route("/outgoing/{migration}/handoff", post(relay_answer))
        .merge(lineage::for_the_controller())
        .merge(measure::for_the_controller())
        .merge(moving::for_the_controller())
        .merge(state::for_the_controller())
        .layer(middleware::from_fn(controller_only));
    let agents = Router::new()
        .route("/incoming/{migration}/handoff", post(handoff))
        .merge(measure::for_agents())
        .merge(moving::for_agents())
        .layer(middleware::from_fn(controller_or_agent));
    let monitors =
        Router::new().route("/metrics", get(metrics)).layer(middleware::from_fn(monitor_only));
    Router::new()
        .merge(monitors)
        .nest("/v1", controllers.merge(agents))
        .fallback(no_such_path)
        .layer(axum::extract::DefaultBodyLimit::max(BODY_LIMIT_BYTES))
        .with_state(host)
}

async fn controller_only(
    Extension(who): Extension<PeerExtension>,
    request: Request,
    next: Next,
) -> Response {
    match &who.peer {
        Some(Peer::Controller) => next.run(request).await,
        other => refuse(other.as_ref(), "the controller"),
    }
}

async fn controller_or_agent(
    Extension(who): Extension<PeerExtension>,
    request: Request,
    next: Next,
) -> Response {
    match &who.peer {
        Some(Peer::Controller | Peer::Agent(_)) => next.run(request).await,
        other => refuse(other.as_ref(), "the controller and the source's agent"),
    }
}

async fn monitor_only(
    Extension(who): Extension<PeerExtension>,
    request: Request,
    next: Next,
) -> Response {
    match &who.peer {
        Some(Peer::Monitor(_)) => next.run(request).await,
        other => refuse(other.as_ref(), "a monitor"),
    }
}

fn refuse(who: Option<&Peer>, allowed: &str) -> Response {
    let who = who.map_or_else(|| "a caller without certificate".to_owned(), Peer::to_string);
    tracing::warn!(who, "refused at the door");
    ApiError::new(ErrorCode::NotAllowed, format!("{who} may not make this call, only {allowed}"))
        .into_response()
}

async fn metrics(State(host): On) -> Scrape {
    crate::metrics::scrape(&host).await
}

async fn report(State(host): On) -> Json<HostReport> {
    Json(host.report().await)
}

async fn certificate_requests(State(host): On) -> Answer<CertificateRequests> {
    host.certificate_requests().map(Json)
}

async fn renew(State(host): On, Body(renewed): Body<HostCertificates>) -> Answer<()> {
    to_the_end(async move { host.renew(renewed).await }).await
}

async fn put_network(
    State(host): On,
    Segment(name): Segment<Name>,
    Body(network): Body<Network>,
) -> Answer<()> {
    same_name(&name, &network.name)?;
    to_the_end(async move { host.put_network(&network).await }).await
}

async fn delete_network(State(host): On, Segment(name): Segment<Name>) -> Answer<()> {
    to_the_end(async move { host.delete_network(&name).await }).await
}

async fn put_storage(
    State(host): On,
    Segment(name): Segment<Name>,
    Body(storage): Body<Storage>,
) -> Answer<StorageReport> {
    same_name(&name, &storage.name)?;
    Storages::check(&storage)?;
    host.ledger.put_storage(&storage).await?;
    host.storages.put(storage);
    let at = Arc::clone(&host);
    host.storages.aside(move |aside| at.storages.report(aside, &name)).await.map(Json)
}

async fn delete_storage(State(host): On, Segment(name): Segment<Name>) -> Answer<()> {
    to_the_end(async move { host.delete_storage(&name).await }).await
}

async fn write_token(State(host): On, Segment(name): Segment<Name>) -> Answer<SharedToken> {
    let at = Arc::clone(&host);
    host.storages.aside(move |aside| at.storages.write_token(aside, &name)).await.map(Json)
}

async fn token_seen(
    State(host): On,
    Segment(name): Segment<Name>,
    Body(token): Body<SharedToken>,
) -> Answer<TokenSeen> {
    let at = Arc::clone(&host);
    let looked = host.storages.aside(move |aside| at.storages.token_seen(aside, &name, &token));
    looked.await.map(|seen| Json(TokenSeen { seen }))
}

async fn vms(State(host): On) -> Json<Vec<VmReport>> {
    Json(host.vms.reports())
}

async fn one_vm(State(host): On, Segment(id): Segment<VmId>) -> Answer<VmReport> {
    host.vms.report(id).map(Json)
}

async fn create_vm(
    State(host): On,
    Segment(id): Segment<VmId>,
    Body(definition): Body<VmDefinition>,
) -> Answer<VmReport> {
    if definition.id != id {
        return Err(ApiError::new(ErrorCode::BadRequest, "`id` is not the id in the path"));
    }
    to_the_end(async move { vm::create(&host, definition).await }).await
}

async fn delete_vm(State(host): On, Segment(id): Segment<VmId>) -> Answer<()> {
    host.vms.delete(id).await.map(Json)
}

async fn mobility(State(host): On, Segment(id): Segment<VmId>) -> Answer<Mobility> {
    host.vms.mobility(id).await.map(Json)
}

async fn start_vm(State(host): On, Segment(id): Segment<VmId>) -> Answer<VmReport> {
    host.vms.act(id, VmAction::Start, false).await.map(Json)
}

async fn stop_vm(
    State(host): On,
    Segment(id): Segment<VmId>,
    Body(how): Body<StopRequest>,
) -> Answer<VmReport> {
    host.vms.act(id, VmAction::Stop, how.force).await.map(Json)
}

async fn pause_vm(State(host): On, Segment(id): Segment<VmId>) -> Answer<VmReport> {
    host.vms.act(id, VmAction::Pause, false).await.map(Json)
}

async fn resume_vm(State(host): On, Segment(id): Segment<VmId>) -> Answer<VmReport> {
    host.vms.act(id, VmAction::Resume, false).await.map(Json)
}

async fn knock_listen(State(host): On, Body(request): Body<KnockListen>) -> Answer<KnockAddress> {
    migrate::knock_listen(&host, request).await.map(Json)
}

async fn knock_connect(State(host): On, Body(request): Body<KnockConnect>) -> Answer<Reach> {
    migrate::knock_connect(&host, request).await.map(Json)
}

async fn prepare(
    State(host): On,
    Segment(id): Segment<MigrationId>,
    Body(request): Body<IncomingRequest>,
) -> Answer<IncomingOffer> {
    to_the_end(async move { migrate::prepare(&host, id, request).await }).await
}

async fn incoming(State(host): On, Segment(id): Segment<MigrationId>) -> Answer<IncomingReport> {
    migrate::incoming(&host, id).await.map(Json)
}

async fn drop_incoming(
    State(host): On,
    Segment(id): Segment<MigrationId>,
) -> Answer<IncomingReport> {
    to_the_end(async move { migrate::drop_incoming(&host, id).await }).await
}

async fn handoff(
    State(host): On,
    Extension(who): Extension<PeerExtension>,
    Segment(id): Segment<MigrationId>,
    Body(message): Body<Handoff>,
) -> Answer<Handoff> {
    let peer = who
        .peer
        .ok_or_else(|| ApiError::new(ErrorCode::NotAllowed, "a handoff needs a certificate"))?;
    to_the_end(async move { migrate::handoff(&host, &peer, id, message).await }).await
}

async fn send(
    State(host): On,
    Segment(id): Segment<MigrationId>,
    Body(request): Body<OutgoingRequest>,
) -> Answer<OutgoingReport> {
    to_the_end(async move { migrate::send(&host, id, request).await }).await
}

async fn outgoing(State(host): On, Segment(id): Segment<MigrationId>) -> Answer<OutgoingReport> {
    migrate::outgoing(&host, id).await.map(Json)
}

async fn cancel(State(host): On, Segment(id): Segment<MigrationId>) -> Answer<OutgoingReport> {
    to_the_end(async move { migrate::cancel(&host, id).await }).await
}

async fn relay_answer(
    State(host): On,
    Segment(id): Segment<MigrationId>,
    Body(answer): Body<Handoff>,
) -> Answer<OutgoingReport> {
    to_the_end(async move { migrate::answered(&host, id, answer).await }).await
}

async fn retire(State(host): On, Segment(id): Segment<MigrationId>) -> Answer<()> {
    to_the_end(async move { migrate::retire(&host, id).await }).await
}

/// Carries a call out to its end, also when the caller goes away: a cancelled half would be nobody's.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Answer<T> {
    let done = tokio::spawn(work).await;
    done.map_err(|error| ApiError::internal("the call broke off", &error))?.map(Json)
}

fn same_name(path: &Name, body: &Name) -> Result<(), ApiError> {
    if path == body {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::BadRequest, "`name` is not the name in the path"))
}
