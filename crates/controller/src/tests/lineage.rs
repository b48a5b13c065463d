//! Clones, and what stands on what: nothing goes that a clone needs, wherever the clone is. Default storages.

use whimbrel_api::lineage::{CloneVm, SetTemplate, TakeSnapshot};
use whimbrel_api::pool::{SetStorageDefaults, Storage};
use whimbrel_api::{ApiError, ErrorCode, VmId};

use super::rig::{Rig, name};

fn clone(text: &str, linked: bool, snapshot: Option<&str>) -> CloneVm {
    CloneVm {
        id: VmId::new(),
        name: name(text),
        linked,
        snapshot: snapshot.map(name),
        storage: None,
    }
}

/// Refused as in use, with that VM's name.
fn needed_by<T: std::fmt::Debug>(told: Result<T, ApiError>, who: &str) {
    let error = told.unwrap_err();
    assert_eq!(error.code, ErrorCode::InUse, "{error}");
    assert!(error.message.contains(who), "{error}");
}

#[tokio::test]
async fn a_clone_is_the_same_hardware_under_another_identity() {
    let rig = Rig::new().await;
    let agent = rig.host("host-a").await;
    rig.furnish().await;
    let web01 = rig.create("web01", None).await;
    let asked = clone("web02", false, None);
    let made = rig.client.clone_vm("web01", &asked).await.unwrap();
    let (old, new) = (&web01.definition, &made.definition);
    assert_eq!((made.id, made.name.as_str(), made.host.as_str()), (asked.id, "web02", "host-a"));
    assert_eq!(
        (new.vcpus, new.memory_bytes, &new.machine),
        (old.vcpus, old.memory_bytes, &old.machine)
    );
    assert_ne!(new.nics[0].mac, old.nics[0].mac);
    assert_ne!(new.disks[0].file, old.disks[0].file);

    let before = agent.called("PUT /v1/vms");
    assert_eq!(rig.client.clone_vm("web01", &asked).await.unwrap().definition, made.definition);
    assert_eq!(agent.called("PUT /v1/vms"), before, "the same request makes no second clone");
    let refused = |request: CloneVm| {
        let client = rig.client.clone();
        async move { client.clone_vm("web01", &request).await.unwrap_err().code }
    };
    assert_eq!(refused(CloneVm { linked: true, ..asked.clone() }).await, ErrorCode::Exists);
    assert_eq!(refused(clone("web01", false, None)).await, ErrorCode::Exists);
    assert_eq!(refused(clone("web03", false, Some("none"))).await, ErrorCode::NotFound);
    let elsewhere = CloneVm { storage: Some(name("nowhere")), ..clone("web03", false, None) };
    assert_eq!(refused(elsewhere.clone()).await, ErrorCode::NotFound);
    assert_eq!(refused(CloneVm { linked: true, ..elsewhere }).await, ErrorCode::BadRequest);
    agent.refuse_next("PUT /v1/vms", ApiError::new(ErrorCode::WrongState, "it runs"));
    assert_eq!(refused(clone("web03", false, None)).await, ErrorCode::WrongState);
    assert_eq!(rig.client.vm("web03").await.unwrap_err().code, ErrorCode::NotFound);
}

#[tokio::test]
async fn what_a_clone_stands_on_does_not_go() {
    let rig = Rig::new().await;
    let agent = rig.host("host-a").await;
    rig.furnish().await;
    rig.create("golden", None).await;
    let set = |template| {
        let client = rig.client.clone();
        async move { client.set_template("golden", &SetTemplate { template }).await }
    };
    set(true).await.unwrap();
    rig.client.clone_vm("golden", &clone("web01", true, None)).await.unwrap();
    needed_by(rig.client.delete_vm("golden").await, "web01");
    needed_by(set(false).await, "web01");
    rig.client.take_snapshot("web01", &TakeSnapshot { name: name("one") }).await.unwrap();
    rig.client.take_snapshot("web01", &TakeSnapshot { name: name("two") }).await.unwrap();
    rig.client.clone_vm("web01", &clone("web02", true, Some("one"))).await.unwrap();
    needed_by(rig.client.delete_snapshot("web01", &name("one")).await, "web02");
    rig.client.delete_snapshot("web01", &name("two")).await.unwrap();
    needed_by(rig.client.delete_vm("web01").await, "web02");

    // A clone that is being made, as far as anybody knows.
    agent.refuse_next("PUT /v1/vms", ApiError::new(ErrorCode::Unreachable, "lost"));
    rig.client.clone_vm("web02", &clone("web03", false, None)).await.unwrap_err();
    needed_by(rig.client.delete_vm("web02").await, "web03");
    rig.client.delete_vm("web03").await.unwrap();
    for gone in ["web02", "web01", "golden"] {
        rig.client.delete_vm(gone).await.unwrap();
    }
}

#[tokio::test]
async fn default_storages_are_the_pools_or_a_hosts() {
    let mut rig = Rig::new().await;
    let _agent = rig.host("host-a").await;
    rig.furnish().await;
    let fast = Storage { name: name("fast"), path: "/srv/fast".into(), shared: false };
    rig.client.create_storage(&fast).await.unwrap();
    let set = async |host: Option<&str>, storages: &[&str]| {
        let storages = storages.iter().map(|text| name(text)).collect();
        let request = SetStorageDefaults { host: host.map(name), storages };
        rig.client.set_storage_defaults(&request).await.map_err(|error| error.code)
    };
    assert_eq!(set(None, &["fast", "shared"]).await, Err(ErrorCode::BadRequest));
    assert_eq!(set(None, &["nowhere"]).await, Err(ErrorCode::NotFound));
    assert_eq!(set(Some("host-x"), &["fast"]).await, Err(ErrorCode::NotFound));
    assert_eq!(set(Some("host-a"), &["fast", "fast"]).await, Err(ErrorCode::BadRequest));
    set(None, &["shared"]).await.unwrap();
    let defaults = set(Some("host-a"), &["fast", "shared"]).await.unwrap();
    assert_eq!(defaults.of(&name("host-a")), Some(&name("fast")));
    assert_eq!(defaults.of(&name("host-b")), Some(&name("shared")));
    rig.restart().await;
    assert_eq!(rig.client.storage_defaults().await.unwrap(), defaults);
    rig.until_ready("host-a").await;
    let shown = rig.client.storage(&name("shared")).await.unwrap();
    assert!(shown.default && shown.hosts[0].proven);
    assert_eq!(shown.hosts[0].default_place, Some(2));
    let local = rig.client.storage(&name("fast")).await.unwrap();
    assert!(!local.default && !local.hosts[0].proven);
    assert_eq!(rig.client.storage(&name("nowhere")).await.unwrap_err().code, ErrorCode::NotFound);
}
