//! In a network namespace of the test's own: it vanishes with the thread. Needs root.

use std::future::Future;

use super::*;

/// Runs `test` on a thread with a fresh network namespace and a runtime of its own.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("root");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
    thread.join().unwrap();
}

fn network(bridge: &str, uplink: Option<&str>) -> Network {
    Network {
        name: "blue".parse().unwrap(),
        bridge: bridge.to_owned(),
        uplink: uplink.map(str::to_owned),
    }
}

fn nic() -> Nic {
    Nic { network: "blue".parse().unwrap(), mac: "52:54:00:12:34:56".to_owned() }
}

#[test]
fn bridge_uplink_and_tap_come_and_the_tap_goes_with_its_descriptor() {
    in_namespace(|| async {
        let networks = Networks::new().unwrap();
        let blue = network("wb0", Some("up0"));
        let missing = networks.ensure(&blue).await;
        assert!(matches!(missing, Err(NetworkError::NoInterface(_))), "{missing:?}");

        let up0 = rtnetlink::LinkVeth::new("up0", "up1").build();
        networks.handle.link().add(up0).execute().await.unwrap();
        let bridge = networks.must_find("wb0").await.unwrap();
        let message = LinkUnspec::new_with_index(bridge.index).mtu(1400).build();
        networks.handle.link().change(message).execute().await.unwrap();
        networks.ensure(&blue).await.unwrap();
        networks.ensure(&blue).await.unwrap();
        assert_eq!(networks.present().await, ["blue".parse::<Name>().unwrap()]);
        let up0 = networks.must_find("up0").await.unwrap();
        assert_eq!((up0.controller, up0.up), (Some(bridge.index), true));

        let tap = networks.make_tap("wt0", &nic()).await.unwrap();
        let found = networks.must_find("wt0").await.unwrap();
        assert_eq!((found.controller, found.mtu, found.up), (Some(bridge.index), 1400, true));
        let second = networks.make_tap("wt0", &nic()).await;
        assert!(matches!(second, Err(NetworkError::Tap { .. })), "{second:?}");
        assert!(networks.find("wt0").await.unwrap().is_some(), "the first one is untouched");
        drop(tap);
        assert_eq!(networks.find("wt0").await.unwrap(), None);
    });
}

#[test]
fn what_is_not_a_bridge_and_who_is_taken_is_said() {
    in_namespace(|| async {
        let networks = Networks::new().unwrap();
        let loopback = networks.ensure(&network("lo", None)).await;
        assert!(matches!(loopback, Err(NetworkError::NotABridge(_))), "{loopback:?}");
        let up0 = rtnetlink::LinkVeth::new("up0", "up1").build();
        networks.handle.link().add(up0).execute().await.unwrap();
        networks.ensure(&network("wb0", Some("up0"))).await.unwrap();
        let taken = networks.ensure(&network("wb1", Some("up0"))).await;
        assert!(matches!(taken, Err(NetworkError::UplinkTaken { .. })), "{taken:?}");
        let unknown = Nic { network: "red".parse().unwrap(), ..nic() };
        let refused = networks.make_tap("wt0", &unknown).await;
        assert!(matches!(refused, Err(NetworkError::Unknown(_))), "{refused:?}");
        networks.remove("wb1").await.unwrap();
        networks.remove("wb1").await.unwrap();
        assert!(!networks.bridge_exists("wb1").await.unwrap());
    });
}

#[test]
fn interface_names_are_checked() {
    for bad in ["", "0123456789abcdef", "a/b", "a b", "-a", "..", "wb\n0"] {
        let refused = Networks::check(&network(bad, None)).unwrap_err();
        assert_eq!(refused.code, ErrorCode::BadName, "{bad:?}");
        assert!(Networks::check(&network("wb0", Some(bad))).is_err(), "{bad:?}");
    }
    Networks::check(&network("0123456789abcde", Some("eth0.12"))).unwrap();
}

#[test]
fn tap_names_fit_and_differ() {
    let run = "01890a5d-ac96-774b-bcce-b302099a8057";
    let names = [tap_name(run, 0), tap_name(run, 15), tap_name(&format!("{run}.0a1b2c3d"), 0)];
    assert!(names.iter().all(|name| name.len() <= INTERFACE_NAME_BYTES_MAX), "{names:?}");
    assert!(names[0] != names[2]);
}
