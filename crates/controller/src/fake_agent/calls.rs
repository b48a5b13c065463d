//! The calls of a fake host that are about itself and its VMs.

use std::time::SystemTime;

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Request, State as Extract};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Extension, Json, Router};
use whimbrel_api::agent::{
    CertificateRequests, HostReport, KnockAddress, KnockConnect, KnockListen, Mobility, Reach,
    SharedToken, StorageReport, TokenSeen, VmReport,
};
use whimbrel_api::pool::{Network, Storage};
use whimbrel_api::server::{Body, Segment, no_such_path};
use whimbrel_api::vm::{StateFile, StopRequest, VmDefinition, VmState};
use whimbrel_api::{ApiError, Epoch, ErrorCode, Name, VmId};
use whimbrel_pki::authority::HostCertificates;
use whimbrel_pki::door::PeerExtension;
use whimbrel_pki::files::HostIdentity;
use whimbrel_pki::identity::Peer;
use whimbrel_pki::tls;

use super::{FakeWorld, State, lineage, measuring, moves, reclaim, steering, vm_report};

/// The guest's memory size that makes a fake host say that it has no room, in bytes.
const TOO_MUCH_MEMORY_BYTES: u64 = super::MEMORY_BYTES;

/// A host and its world: what every call works on.
#[derive(Debug, Clone)]
pub(super) struct Host {
    pub(super) world: FakeWorld,
    pub(super) name: Name,
}

impl Host {
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        self.world.with(&self.name, work)
    }
}

pub(super) fn router(world: FakeWorld, name: Name) -> Router {
    let host = Host { world, name };
    let calls = Router::new()
        .route("/host", get(report))
        .route("/certificates", get(certificate_requests).put(put_certificates))
        .route("/networks/{name}", put(put_network).delete(delete_network))
        .route("/storages/{name}", put(put_storage).delete(delete_storage))
        .route("/storages/{name}/token", post(write_token))
        .route("/storages/{name}/seen", post(token_seen))
        .route("/vms", get(vms))
        .route("/vms/{id}", get(vm).put(put_vm).delete(delete_vm))
        .route("/vms/{id}/mobility", get(mobility))
        .route("/vms/{id}/start", post(start))
        .route("/vms/{id}/stop", post(stop))
        .route("/vms/{id}/pause", post(pause))
        .route("/vms/{id}/resume", post(resume))
        .route("/vms/{id}/save", post(save))
        .route("/vms/{id}/restore", post(restore))
        .route("/vms/{id}/console", get(console))
        .route("/knock/listen", post(knock_listen))
        .route("/knock/connect", post(knock_connect))
        .merge(lineage::calls())
        .merge(moves::calls())
        .merge(reclaim::calls())
        .merge(steering::calls())
        .merge(measuring::calls())
        .route_layer(middleware::from_fn_with_state(host.clone(), gate))
        .with_state(host);
    Router::new().nest("/v1", calls).fallback(no_such_path)
}

/// Notes the call, lets only the controller and agents in, and refuses what the test wants refused.
async fn gate(
    Extract(host): Extract<Host>,
    Extension(caller): Extension<PeerExtension>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if !matches!(caller.peer, Some(Peer::Controller | Peer::Agent(_))) {
        return Err(ApiError::new(ErrorCode::NotAllowed, "a fake host hears no such caller"));
    }
    // The router of `/v1` has taken its part off the path.
    let call = format!("{} /v1{}", request.method(), request.uri().path());
    let (is_swallowed, refusal) = host.with(|state| {
        let swallowed = state.swallowed.iter().position(|prefix| call.starts_with(prefix));
        if let Some(index) = swallowed {
            state.swallowed.remove(index);
        }
        let planned = state.refusals.iter().position(|(prefix, _)| call.starts_with(prefix));
        state.calls.push(call);
        (swallowed.is_some(), planned.map(|index| state.refusals.remove(index).1))
    });
    if is_swallowed {
        return std::future::pending().await;
    }
    match refusal {
        Some(error) => Err(error),
        None => Ok(next.run(request).await),
    }
}

async fn report(Extract(host): Extract<Host>) -> Json<HostReport> {
    Json(host.with(|state| {
        let mut report = state.report.clone();
        let now = SystemTime::now();
        report.certificate_days_left = state.identity.server().certificate.days_left(now);
        report.certificate_renewal_due = state.identity.is_renewal_due(now);
        report.networks = state.networks.keys().cloned().collect();
        report.storages = state.storages.keys().map(storage_report).collect();
        report.vms = u32::try_from(state.vms.len()).unwrap_or(u32::MAX);
        report
    }))
}

fn storage_report(name: &Name) -> StorageReport {
    StorageReport {
        reserved_bytes: 0,
        name: name.clone(),
        trouble: None,
        total_bytes: 1 << 40,
        available_bytes: 1 << 39,
    }
}

async fn certificate_requests(
    Extract(host): Extract<Host>,
) -> Result<Json<CertificateRequests>, ApiError> {
    let keys = host.with(|state| state.identity.keys().clone());
    let failed = |error| ApiError::internal("cannot make a signing request", &error);
    Ok(Json(CertificateRequests {
        agent_csr: keys.agent_request_pem().map_err(failed)?,
        qemu_csr: keys.qemu_request_pem().map_err(failed)?,
    }))
}

/// A fake host keeps nothing on a disk: new certificates are put together with its keys, and shown from then on.
async fn put_certificates(
    Extract(host): Extract<Host>,
    Body(renewed): Body<HostCertificates>,
) -> Result<(), ApiError> {
    host.with(|state| {
        let keys = state.identity.keys().clone();
        state.identity = HostIdentity::assemble(keys, &renewed, host.name.as_str())
            .map_err(|error| ApiError::internal("these are not mine", &error))?;
        let tls = tls::server_config(&state.identity.server());
        state.door.send_replace(tls.map_err(|error| ApiError::internal("no TLS", &error))?);
        Ok(())
    })
}

async fn put_network(
    Extract(host): Extract<Host>,
    Segment(name): Segment<Name>,
    Body(network): Body<Network>,
) {
    host.with(|state| state.networks.insert(name, network));
}

async fn delete_network(
    Extract(host): Extract<Host>,
    Segment(name): Segment<Name>,
) -> Result<(), ApiError> {
    let found = host.with(|state| state.networks.remove(&name));
    found.map(drop).ok_or_else(|| ApiError::not_found("network", name))
}

async fn put_storage(
    Extract(host): Extract<Host>,
    Segment(name): Segment<Name>,
    Body(storage): Body<Storage>,
) -> Json<StorageReport> {
    let report = storage_report(&name);
    host.with(|state| state.storages.insert(name, storage));
    Json(report)
}

async fn delete_storage(
    Extract(host): Extract<Host>,
    Segment(name): Segment<Name>,
) -> Result<(), ApiError> {
    let found = host.with(|state| state.storages.remove(&name));
    found.map(drop).ok_or_else(|| ApiError::not_found("storage", name))
}

/// Writes a token into the file systems that this host sees: every host that sees the same ones sees it too.
async fn write_token(
    Extract(host): Extract<Host>,
    Segment(name): Segment<Name>,
) -> Result<Json<SharedToken>, ApiError> {
    let token = uuid::Uuid::new_v4().simple().to_string();
    let mut world = host.world.lock();
    let writer = world
        .hosts
        .get(&host.name)
        .map(|state| (state.file_systems, state.storages.contains_key(&name)));
    let Some((number, true)) = writer else { return Err(ApiError::not_found("storage", name)) };
    for state in world.hosts.values_mut().filter(|state| state.file_systems == number) {
        state.tokens.insert(format!("{name}/{token}"));
    }
    Ok(Json(SharedToken { token }))
}

async fn token_seen(
    Extract(host): Extract<Host>,
    Segment(name): Segment<Name>,
    Body(token): Body<SharedToken>,
) -> Result<Json<TokenSeen>, ApiError> {
    host.with(|state| {
        if !state.storages.contains_key(&name) {
            return Err(ApiError::not_found("storage", &name));
        }
        Ok(Json(TokenSeen { seen: state.tokens.contains(&format!("{name}/{}", token.token)) }))
    })
}

async fn vms(Extract(host): Extract<Host>) -> Json<Vec<VmReport>> {
    Json(host.with(|state| state.vms.values().cloned().collect()))
}

async fn vm(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
) -> Result<Json<VmReport>, ApiError> {
    change(&host, id, |_| Ok(()))
}

async fn mobility(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
) -> Result<Json<Mobility>, ApiError> {
    let Json(vm) = change(&host, id, |_| Ok(()))?;
    let abilities = vm.engine.is_some().then(measuring::abilities);
    Ok(Json(Mobility { vm, cpu_features: Default::default(), blockers: Vec::new(), abilities }))
}

async fn put_vm(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
    Body(definition): Body<VmDefinition>,
) -> Result<Json<VmReport>, ApiError> {
    host.with(|state| {
        if let Some(known) = state.vms.get(&id) {
            return Ok(Json(known.clone()));
        }
        let mut definition = definition;
        for disk in &mut definition.disks {
            // An imported image says itself how large it is.
            if disk.size_bytes == 0 {
                disk.size_bytes = 1 << 30;
            }
        }
        lineage::link(state, &mut definition);
        let report = vm_report(&definition, VmState::Stopped, Epoch::FIRST);
        state.vms.insert(id, report.clone());
        Ok(Json(report))
    })
}

async fn delete_vm(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
) -> Result<(), ApiError> {
    let Json(_stopped) = change(&host, id, |vm| must_be(vm, &["stopped", "crashed"]))?;
    host.with(|state| state.vms.remove(&id));
    Ok(())
}

async fn start(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
) -> Result<Json<VmReport>, ApiError> {
    change(&host, id, |vm| {
        must_be(vm, &["stopped", "crashed"])?;
        if vm.definition.memory_bytes > TOO_MUCH_MEMORY_BYTES {
            return Err(ApiError::new(ErrorCode::NoResources, "the fake host has not the memory"));
        }
        *vm = vm_report(&vm.definition, VmState::Running, vm.epoch);
        Ok(())
    })
}

async fn stop(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
    Body(_): Body<StopRequest>,
) -> Result<Json<VmReport>, ApiError> {
    change(&host, id, |vm| {
        must_be(vm, &["running", "paused"])?;
        *vm = vm_report(&vm.definition, VmState::Stopped, vm.epoch);
        Ok(())
    })
}

async fn save(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
    Body(_): Body<StateFile>,
) -> Result<Json<VmReport>, ApiError> {
    change(&host, id, |vm| {
        must_be(vm, &["running", "paused"])?;
        *vm = vm_report(&vm.definition, VmState::Stopped, vm.epoch);
        Ok(())
    })
}

async fn restore(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
    Body(_): Body<StateFile>,
) -> Result<Json<VmReport>, ApiError> {
    change(&host, id, |vm| {
        must_be(vm, &["stopped"])?;
        *vm = vm_report(&vm.definition, VmState::Running, vm.epoch);
        Ok(())
    })
}

async fn pause(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
) -> Result<Json<VmReport>, ApiError> {
    change(&host, id, |vm| {
        must_be(vm, &["running"])?;
        vm.state = VmState::Paused;
        Ok(())
    })
}

async fn resume(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
) -> Result<Json<VmReport>, ApiError> {
    change(&host, id, |vm| {
        must_be(vm, &["paused"])?;
        vm.state = VmState::Running;
        Ok(())
    })
}

pub(super) fn change(
    host: &Host,
    id: VmId,
    change: impl FnOnce(&mut VmReport) -> Result<(), ApiError>,
) -> Result<Json<VmReport>, ApiError> {
    host.with(|state| {
        let vm = state.vms.get_mut(&id).ok_or_else(|| ApiError::not_found("VM", id))?;
        change(vm)?;
        Ok(Json(vm.clone()))
    })
}

fn must_be(vm: &VmReport, states: &[&str]) -> Result<(), ApiError> {
    let word = vm.state.word();
    if states.contains(&word) {
        return Ok(());
    }
    let message = format!("the VM is {word}; it must be {}", states.join(" or "));
    Err(ApiError::new(ErrorCode::WrongState, message))
}

/// A guest that says everything twice.
async fn console(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
    upgrade: WebSocketUpgrade,
) -> Response {
    match change(&host, id, |vm| must_be(vm, &["running", "paused"])) {
        Ok(_) => upgrade.on_upgrade(echo),
        Err(error) => error.into_response(),
    }
}

async fn echo(mut socket: WebSocket) {
    while let Some(Ok(message)) = socket.recv().await {
        let Message::Binary(bytes) = message else { continue };
        let twice = [bytes.as_ref(), bytes.as_ref()].concat();
        if socket.send(Message::Binary(twice.into())).await.is_err() {
            return;
        }
    }
}

async fn knock_listen(Body(_): Body<KnockListen>) -> Json<KnockAddress> {
    Json(KnockAddress { host: "127.0.0.1".to_owned(), port: 49_152 })
}

async fn knock_connect(Body(knock): Body<KnockConnect>) -> Json<Reach> {
    Json(Reach::Open { address: ([127, 0, 0, 1], knock.address.port).into() })
}
