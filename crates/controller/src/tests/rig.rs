//! A pool in a temporary folder: a served controller, an operator's client, and fake hosts that join by token.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use whimbrel_api::client::{ClientConfig, PoolClient, Target};
use whimbrel_api::pool::{Contact, JoinAnswer, JoinRequest, Network, NewJoinToken, Storage};
use whimbrel_api::vm::{CreateVm, Vm, VmSpec};
use whimbrel_api::{ApiError, Name, VmId};
use whimbrel_pki::authority::HostCertificates;
use whimbrel_pki::door::{Limits, Listener};
use whimbrel_pki::files::{HostIdentity, HostKeys};
use whimbrel_pki::tls;
use whimbrel_pki::token::JoinToken;

use crate::fake_agent::{FakeAgent, FakeWorld};
use crate::{Config, Controller, PoolInit, pool_init, serve};

/// How long a test waits for something that must come, in seconds.
const WAIT_SECONDS: u64 = 20;
/// The machines of a fake host unless the test says otherwise.
pub(super) const MACHINES: &[&str] = &["pc-q35-6.2", "pc-q35-7.2"];

pub(super) struct Rig {
    pub(super) dir: TempDir,
    pub(super) address: SocketAddr,
    pub(super) controller: Arc<Controller>,
    pub(super) client: PoolClient,
    pub(super) world: FakeWorld,
    stop: Option<oneshot::Sender<()>>,
    served: Option<JoinHandle<()>>,
}

pub(super) fn name(text: &str) -> Name {
    text.parse().unwrap()
}

impl Rig {
    pub(super) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let init = PoolInit {
            dir: dir.path().join("pool"),
            name: name("test"),
            listen: address,
            socket: None,
        };
        let made = pool_init(&init).unwrap();
        let client = PoolClient::from_config(&ClientConfig::load(&made.client).unwrap()).unwrap();
        let (controller, stop, served) = start(&dir, listener).await;
        let world = FakeWorld::default();
        Self { dir, address, controller, client, world, stop: Some(stop), served: Some(served) }
    }

    /// Ends the controller and starts it again on the same folder and address.
    pub(super) async fn restart(&mut self) {
        self.stop().await;
        self.start().await;
    }

    pub(super) async fn stop(&mut self) {
        self.controller.close();
        drop(self.stop.take());
        self.served.take().unwrap().await.unwrap();
    }

    pub(super) async fn start(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        let (controller, stop, served) = start(&self.dir, listener).await;
        self.controller = controller;
        self.stop = Some(stop);
        self.served = Some(served);
    }

    pub(super) fn config(&self) -> Config {
        Config::load(&self.dir.path().join("pool")).unwrap()
    }

    /// A token as an operator gets it.
    pub(super) async fn token(&self) -> JoinToken {
        let made = self.client.new_join_token(&NewJoinToken { ttl_seconds: 60 }).await.unwrap();
        made.token.parse().unwrap()
    }

    /// The client of somebody who has nothing but a token.
    pub(super) fn stranger(&self, token: &JoinToken) -> PoolClient {
        let tls = Arc::new(tls::join_client_config(token.authority()).unwrap());
        PoolClient::new(Target::Tcp(self.address.to_string()), tls).unwrap()
    }

    pub(super) async fn join(
        &self,
        token: &JoinToken,
        keys: &HostKeys,
        host: &str,
        address: &str,
    ) -> Result<JoinAnswer, ApiError> {
        let request = JoinRequest {
            secret: token.secret().to_text(),
            name: name(host),
            address: address.to_owned(),
            agent_csr: keys.agent_request_pem().unwrap(),
            qemu_csr: keys.qemu_request_pem().unwrap(),
        };
        self.stranger(token).join(&request).await
    }

    /// A fake host that has joined and answers.
    pub(super) async fn host(&self, host: &str) -> FakeAgent {
        self.host_with(host, MACHINES).await
    }

    pub(super) async fn host_with(&self, host: &str, machines: &[&str]) -> FakeAgent {
        let agent = self.joined(host, machines).await;
        self.until_ready(host).await;
        agent
    }

    /// A fake host that has joined and was not asked anything yet: the caller may change it before its next await.
    pub(super) async fn joined(&self, host: &str, machines: &[&str]) -> FakeAgent {
        self.joined_with(host, machines, HostKeys::generate().unwrap()).await
    }

    /// The same with these keys.
    pub(super) async fn joined_with(
        &self,
        host: &str,
        machines: &[&str],
        keys: HostKeys,
    ) -> FakeAgent {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let answer = self.join(&self.token().await, &keys, host, &address).await.unwrap();
        self.world.start_as(identity(keys, answer, host), listener, machines)
    }

    pub(super) async fn until_ready(&self, host: &str) {
        eventually(|| async {
            self.nudge(host);
            let found = self.client.host(&name(host)).await.unwrap();
            matches!(found.contact, Contact::Ready { .. })
        })
        .await;
    }

    pub(super) fn nudge(&self, host: &str) {
        self.controller.hosts().get(&name(host)).unwrap().nudge();
    }

    /// Waits until a host was asked for everything after this call, twice: the first round may have been under way.
    pub(super) async fn rounds(&self, agent: &FakeAgent) {
        let before = agent.called("GET /v1/vms");
        eventually(|| async {
            self.nudge(agent.name.as_str());
            agent.called("GET /v1/vms") >= before + 3
        })
        .await;
    }

    /// The network `lan` and the shared storage `shared`, on every host that answers.
    pub(super) async fn furnish(&self) {
        let network = Network { name: name("lan"), bridge: "br-lan".into(), uplink: None };
        self.client.create_network(&network).await.unwrap();
        self.client.create_storage(&shared()).await.unwrap();
        for member in self.controller.hosts().all() {
            let furnished = || async {
                member.nudge();
                let report = member.ready_report();
                report.is_none_or(|r| !r.networks.is_empty() && !r.storages.is_empty())
            };
            eventually(furnished).await;
        }
    }

    pub(super) async fn create(&self, vm: &str, host: Option<&str>) -> Vm {
        self.client.create_vm(&request(vm, host)).await.unwrap()
    }

    /// Waits until the API says that a VM is in a state.
    pub(super) async fn until_state(&self, vm: &str, word: &str) {
        eventually(|| async {
            let found = self.client.vm(vm).await.unwrap();
            self.nudge(found.host.as_str());
            found.state.word() == word
        })
        .await;
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.controller.close();
    }
}

async fn start(
    dir: &TempDir,
    listener: TcpListener,
) -> (Arc<Controller>, oneshot::Sender<()>, JoinHandle<()>) {
    let config = Config::load(&dir.path().join("pool")).unwrap();
    let controller = Controller::open(&config).await.unwrap();
    let limits = Limits { drain: Duration::ZERO, ..Limits::default() };
    let door = serve::door(&controller).with_limits(limits);
    controller.start();
    crate::migrate::resume(&controller).await;
    let (stop, stopped) = oneshot::channel::<()>();
    let served = tokio::spawn(async move {
        let stopped = async { drop(stopped.await) };
        door.serve(vec![Listener::Tcp(listener)], stopped).await;
    });
    (controller, stop, served)
}

/// What a host makes of the answer to its joining.
pub(super) fn identity(keys: HostKeys, answer: JoinAnswer, host: &str) -> HostIdentity {
    let JoinAnswer { ca, agent_server, agent_client, qemu_server, qemu_client } = answer;
    let received = HostCertificates { ca, agent_server, agent_client, qemu_server, qemu_client };
    HostIdentity::assemble(keys, &received, host).unwrap()
}

pub(super) fn shared() -> Storage {
    Storage { name: name("shared"), path: "/srv/shared".into(), shared: true }
}

pub(super) fn spec(vm: &str) -> VmSpec {
    serde_json::from_value(serde_json::json!({
        "name": vm, "memory": "1GiB",
        "disk": [{"storage": "shared", "size": "1GiB"}],
        "nic": [{"network": "lan"}],
    }))
    .unwrap()
}

pub(super) fn request(vm: &str, host: Option<&str>) -> CreateVm {
    CreateVm { id: VmId::new(), host: host.map(name), spec: spec(vm) }
}

/// Waits until something is so, asking again and again, at most 20 seconds.
pub(super) async fn eventually<F: Future<Output = bool>>(mut so: impl FnMut() -> F) {
    let waiting = async {
        while !so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(WAIT_SECONDS), waiting)
        .await
        .expect("it came in time");
}
