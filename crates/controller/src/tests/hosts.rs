//! Hosts get the networks and storages of the pool, and a shared storage is proven.

use whimbrel_api::pool::{Contact, Network, Storage};
use whimbrel_api::{ApiError, ErrorCode};
use whimbrel_pki::files::HostKeys;

use super::rig::{MACHINES, Rig, eventually, name, shared};

#[tokio::test]
async fn networks_and_storages_are_on_every_host_also_on_one_that_comes_later() {
    let rig = Rig::new().await;
    let a = rig.host("host-a").await;
    let b = rig.host("host-b").await;
    rig.furnish().await;
    assert_eq!((a.has("lan", "shared"), b.has("lan", "shared")), ((true, true), (true, true)));
    let c = rig.host("host-c").await;
    eventually(|| async {
        rig.nudge("host-c");
        c.has("lan", "shared") == (true, true)
    })
    .await;
    rig.rounds(&c).await;
    let status = rig.client.storages().await.unwrap();
    let hosts: Vec<&str> = status[0].hosts.iter().map(|on| on.host.as_str()).collect();
    assert_eq!(hosts, ["host-a", "host-b", "host-c"]);
    let proven = rig.controller.store().storage_proofs(&name("shared")).await.unwrap();
    assert_eq!(proven.len(), 3);
}

#[tokio::test]
async fn a_storage_that_is_not_shared_is_not_made() {
    let rig = Rig::new().await;
    let a = rig.host("host-a").await;
    let b = rig.host("host-b").await;
    b.mount(1);
    let error = rig.client.create_storage(&shared()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NotShared);
    assert!(error.message.contains("host-b"), "{error}");
    assert_eq!((a.has("", "shared").1, b.has("", "shared").1), (false, false), "undone");
    assert!(rig.client.storages().await.unwrap().is_empty());
    let local = Storage { shared: false, ..shared() };
    rig.client.create_storage(&local).await.unwrap();
    assert_eq!((a.has("", "shared").1, b.has("", "shared").1), (true, true));
}

#[tokio::test]
async fn a_host_that_does_not_share_gets_no_shared_storage_when_it_comes_later() {
    let rig = Rig::new().await;
    let _a = rig.host("host-a").await;
    rig.client.create_storage(&shared()).await.unwrap();
    let b = rig.joined("host-b", MACHINES).await;
    b.mount(1);
    rig.until_ready("host-b").await;
    eventually(|| async {
        rig.nudge("host-b");
        b.called("DELETE /v1/storages/shared") == 1
    })
    .await;
    rig.rounds(&b).await;
    assert!(!b.has("", "shared").1, "taken away again");
    assert_eq!(b.called("POST /v1/storages/shared/seen"), 1, "and left alone for a while");
    let proven = rig.controller.store().storage_proofs(&name("shared")).await.unwrap();
    assert_eq!(proven, [name("host-a")]);
}

#[tokio::test]
async fn what_one_host_refuses_no_host_keeps() {
    let rig = Rig::new().await;
    let a = rig.host("host-a").await;
    let b = rig.host("host-b").await;
    let network = Network { name: name("lan"), bridge: "br-lan".into(), uplink: None };
    b.refuse_next("PUT /v1/networks", ApiError::new(ErrorCode::Internal, "no such uplink"));
    let error = rig.client.create_network(&network).await.unwrap_err();
    assert_eq!(error.message, "host-b: no such uplink");
    assert!(!a.has("lan", "").0);
    assert!(rig.client.networks().await.unwrap().is_empty());
    rig.client.create_network(&network).await.unwrap();
    assert_eq!(rig.client.create_network(&network).await.unwrap_err().code, ErrorCode::Exists);
    let same_bridge = Network { name: name("wan"), ..network };
    assert_eq!(rig.client.create_network(&same_bridge).await.unwrap_err().code, ErrorCode::InUse);
}

#[tokio::test]
async fn a_host_that_never_answers_is_joining_at_first_and_then_unreachable() {
    let rig = Rig::new().await;
    let keys = HostKeys::generate().unwrap();
    let free = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = free.local_addr().unwrap().to_string();
    drop(free);
    rig.join(&rig.token().await, &keys, "host-a", &address).await.unwrap();
    let contact = || async { rig.client.host(&name("host-a")).await.unwrap().contact };
    assert_eq!(contact().await, Contact::Joining);
    eventually(|| async {
        rig.nudge("host-a");
        matches!(contact().await, Contact::Unreachable { .. })
    })
    .await;
}

#[tokio::test]
async fn what_a_host_lost_it_is_given_again() {
    let rig = Rig::new().await;
    let a = rig.host("host-a").await;
    rig.furnish().await;
    let agent = rig.controller.agent(&name("host-a")).unwrap();
    agent.delete_network(&name("lan")).await.unwrap();
    agent.delete_storage(&name("shared")).await.unwrap();
    eventually(|| async {
        rig.nudge("host-a");
        a.has("lan", "shared") == (true, true)
    })
    .await;
}
