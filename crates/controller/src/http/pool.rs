//! Hosts, joining, networks and storages.

use axum::Json;
use axum::extract::State;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use whimbrel_api::event::Event;
use whimbrel_api::pool::{
    Host, HostPatch, JoinAnswer, JoinRequest, JoinToken, Network, NewJoinToken, SetStorageDefaults,
    Storage, StorageDefaults, StorageStatus,
};
use whimbrel_api::server::{Body, Segment};
use whimbrel_api::{ApiError, Name};

use super::{Shared, to_the_end};
use crate::{join as joining, networks, storages};

pub(super) fn calls() -> OpenApiRouter<Shared> {
    OpenApiRouter::default()
        .routes(routes!(new_join_token))
        .routes(routes!(list_hosts))
        .routes(routes!(get_host, patch_host))
        .routes(routes!(list_networks, create_network))
        .routes(routes!(list_storages, create_storage))
        .routes(routes!(get_storage))
        .routes(routes!(get_storage_defaults, set_storage_defaults))
}

/// Make a join token: it admits one host, once, within its time.
#[utoipa::path(post, path = "/join-tokens", tag = "pool", request_body = NewJoinToken,
    responses((status = 200, description = "The token; it is shown only once", body = JoinToken)))]
async fn new_join_token(
    State(controller): State<Shared>,
    Body(request): Body<NewJoinToken>,
) -> Result<Json<JoinToken>, ApiError> {
    joining::new_token(&controller, request).await.map(Json)
}

/// Join the pool as a host. No certificate is needed but the secret of a join token.
#[utoipa::path(post, path = "/join", tag = "pool", request_body = JoinRequest, security(()),
    responses((status = 200, description = "The host's certificates", body = JoinAnswer)))]
pub(super) async fn join(
    State(controller): State<Shared>,
    Body(request): Body<JoinRequest>,
) -> Result<Json<JoinAnswer>, ApiError> {
    to_the_end(async move { joining::join(&controller, request).await }).await.map(Json)
}

/// All hosts, by name.
#[utoipa::path(get, path = "/hosts", tag = "hosts",
    responses((status = 200, description = "The hosts", body = Vec<Host>)))]
async fn list_hosts(State(controller): State<Shared>) -> Json<Vec<Host>> {
    Json(controller.hosts().all().iter().map(|member| member.view()).collect())
}

/// One host.
#[utoipa::path(get, path = "/hosts/{name}", tag = "hosts",
    params(("name" = Name, Path, description = "The host's name")),
    responses((status = 200, description = "The host", body = Host)))]
async fn get_host(
    State(controller): State<Shared>,
    Segment(name): Segment<Name>,
) -> Result<Json<Host>, ApiError> {
    Ok(Json(controller.hosts().get(&name)?.view()))
}

/// Enable or disable a host. A disabled one takes no new VM and is no destination; what runs there goes on.
#[utoipa::path(patch, path = "/hosts/{name}", tag = "hosts", request_body = HostPatch,
    params(("name" = Name, Path, description = "The host's name")),
    responses((status = 200, description = "The host", body = Host)))]
async fn patch_host(
    State(controller): State<Shared>,
    Segment(name): Segment<Name>,
    Body(patch): Body<HostPatch>,
) -> Result<Json<Host>, ApiError> {
    to_the_end(async move {
        let member = controller.hosts().get(&name)?;
        controller.store().enable_host(&name, patch.enabled).await?;
        member.set_enabled(patch.enabled);
        controller.events().publish(Event::Host { host: member.view() });
        Ok(Json(member.view()))
    })
    .await
}

/// All networks, by name.
#[utoipa::path(get, path = "/networks", tag = "networks",
    responses((status = 200, description = "The networks", body = Vec<Network>)))]
async fn list_networks(State(controller): State<Shared>) -> Result<Json<Vec<Network>>, ApiError> {
    Ok(Json(controller.store().networks().await?))
}

/// Make a network on every host that answers; the others get it when they come back.
#[utoipa::path(post, path = "/networks", tag = "networks", request_body = Network,
    responses((status = 200, description = "The network", body = Network)))]
async fn create_network(
    State(controller): State<Shared>,
    Body(network): Body<Network>,
) -> Result<Json<Network>, ApiError> {
    to_the_end(async move { networks::create(&controller, network).await }).await.map(Json)
}

/// All storages, by name, with what each host sees.
#[utoipa::path(get, path = "/storages", tag = "storages",
    responses((status = 200, description = "The storages", body = Vec<StorageStatus>)))]
async fn list_storages(
    State(controller): State<Shared>,
) -> Result<Json<Vec<StorageStatus>>, ApiError> {
    storages::list(&controller).await.map(Json)
}

/// Make a storage known to every host that answers. A shared one is proven first: a token that one host writes must be seen by
/// every other one.
#[utoipa::path(post, path = "/storages", tag = "storages", request_body = Storage,
    responses((status = 200, description = "The storage", body = StorageStatus)))]
async fn create_storage(
    State(controller): State<Shared>,
    Body(storage): Body<Storage>,
) -> Result<Json<StorageStatus>, ApiError> {
    to_the_end(async move { storages::create(&controller, storage).await }).await.map(Json)
}

/// One storage, with what each host sees.
#[utoipa::path(get, path = "/storages/{name}", tag = "storages",
    params(("name" = Name, Path, description = "The storage's name")),
    responses((status = 200, description = "The storage", body = StorageStatus)))]
async fn get_storage(
    State(controller): State<Shared>,
    Segment(name): Segment<Name>,
) -> Result<Json<StorageStatus>, ApiError> {
    storages::show(&controller, &name).await.map(Json)
}

/// Which storages are used where none is named.
#[utoipa::path(get, path = "/storage-defaults", tag = "storages",
    responses((status = 200, description = "The pool's and the hosts' default storages", body = StorageDefaults)))]
async fn get_storage_defaults(
    State(controller): State<Shared>,
) -> Result<Json<StorageDefaults>, ApiError> {
    Ok(Json(controller.store().storage_defaults().await?))
}

/// Say which storages are used where none is named, in the pool or on one host.
#[utoipa::path(put, path = "/storage-defaults", tag = "storages", request_body = SetStorageDefaults,
    responses((status = 200, description = "The pool's and the hosts' default storages", body = StorageDefaults)))]
async fn set_storage_defaults(
    State(controller): State<Shared>,
    Body(request): Body<SetStorageDefaults>,
) -> Result<Json<StorageDefaults>, ApiError> {
    to_the_end(async move { storages::set_defaults(&controller, request).await }).await.map(Json)
}
