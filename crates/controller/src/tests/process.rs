//! The controller as a process: its lock, its socket, its end.

use std::os::unix::fs::PermissionsExt;

use tokio::sync::oneshot;
use whimbrel_api::client::{ClientConfig, PoolClient};

use super::rig::{eventually, name};
use crate::serve::run_until;
use crate::{Config, PoolInit, RunError, pool_init};

#[tokio::test]
async fn a_pool_has_one_controller_and_its_socket_is_its_owners() {
    let dir = tempfile::tempdir().unwrap();
    let init = PoolInit {
        dir: dir.path().join("pool"),
        name: name("test"),
        listen: "127.0.0.1:0".parse().unwrap(),
        socket: Some("controller.sock".into()),
    };
    let made = pool_init(&init).unwrap();
    let socket = init.dir.join("controller.sock");
    // What a killed controller leaves.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let config = Config::load(&made.config).unwrap();
    let (end, ended) = oneshot::channel::<()>();
    let ended = async { drop(ended.await) };
    let running = tokio::spawn(run_until(config.clone(), ended));

    let client = PoolClient::from_config(&ClientConfig::load(&made.client).unwrap()).unwrap();
    eventually(|| async { client.hosts().await.is_ok() }).await;
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = run_until(config.clone(), std::future::pending()).await.unwrap_err();
    assert!(matches!(second, RunError::Running { .. }), "{second}");
    client.hosts().await.unwrap();

    let mut events = client.events().await.unwrap();
    drop(end);
    running.await.unwrap().unwrap();
    // What there was to tell is still on its way.
    while let Ok(Some(_)) = events.next().await {}
    assert!(!socket.exists());
    let third = run_until(config, std::future::ready(()));
    third.await.unwrap();
}
