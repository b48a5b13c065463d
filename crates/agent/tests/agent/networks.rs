//! A host's networks, and the VMs in them.

use whimbrel_agent::vm;
use whimbrel_api::ErrorCode;
use whimbrel_api::pool::Network;
use whimbrel_api::vm::{Nic, VmAction};

use crate::place::{Place, definition, in_namespace, start};

fn blue(bridge: &str) -> Network {
    Network { name: "blue".parse().unwrap(), bridge: bridge.to_owned(), uplink: None }
}

#[test]
fn the_bridge_of_a_network_that_vms_use_is_not_changed() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            host.put_network(&blue("wb0")).await.unwrap();
            host.put_network(&blue("wb1")).await.unwrap();
            let mut asked = definition();
            let mac = "52:54:00:00:00:01".to_owned();
            asked.nics.push(Nic { network: blue("wb1").name, mac });
            let id = vm::create(&host, asked).await.unwrap().definition.id;
            start(&host, id).await;
            host.put_network(&blue("wb1")).await.unwrap();
            for used in
                [host.put_network(&blue("wb2")).await, host.delete_network(&blue("").name).await]
            {
                let refused = used.unwrap_err();
                assert_eq!(refused.code, ErrorCode::InUse);
                assert!(refused.message.contains("web01"), "{refused}");
            }
            assert_eq!(host.networks.get(&blue("").name).unwrap().bridge, "wb1");
            assert!(!host.networks.bridge_exists("wb2").await.unwrap());

            host.vms.act(id, VmAction::Stop, true).await.unwrap();
            host.vms.delete(id).await.unwrap();
            host.put_network(&blue("wb2")).await.unwrap();
        });
    });
}
