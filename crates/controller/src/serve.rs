//! The controller's process: one pool's folder, its listeners, its loops, until it is asked to end.
//!
//! Ending is unremarkable: every record is on the disk before what it is about is done, so that SIGTERM, SIGKILL and a power cut
//! differ only in how politely open connections are closed.

use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;
use whimbrel_pki::door::{Door, Listener};

use crate::config::Config;
use crate::controller::{Controller, OpenError};
use crate::{http, migrate};

const SOCKET_MODE: u32 = 0o600;

/// Why a controller does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The lock file cannot be used.
    #[error("cannot lock {}", path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A controller of this pool is running.
    #[error("a controller of this pool is running already (it holds {})", path.display())]
    Running {
        /// The lock that it holds.
        path: PathBuf,
    },
    /// The pool's folder cannot be used.
    #[error("the pool cannot be opened")]
    Open(#[from] OpenError),
    /// The TCP address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The unix socket cannot be listened on.
    #[error("cannot listen on {}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The signals that end the process cannot be waited for.
    #[error("cannot wait for signals")]
    Signals(#[source] io::Error),
}

/// Runs a pool's controller until SIGTERM or SIGINT.
pub async fn run(config: Config) -> Result<(), RunError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    let signalled = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    run_until(config, signalled).await
}

/// Runs a pool's controller until `ended`.
pub(crate) async fn run_until(
    config: Config,
    ended: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let _lock = lock(&config.lock())?;
    let controller = Controller::open(&config).await?;
    let door = door(&controller);
    let listeners = listeners(&config).await?;
    controller.start();
    let resuming = controller.clone();
    tokio::spawn(async move { migrate::resume(&resuming).await });
    info!(pool = %config.name, listen = %config.listen, "the controller serves");
    let shutdown = async {
        ended.await;
        info!("the controller ends");
        controller.close();
    };
    door.serve(listeners, shutdown).await;
    if let Some(socket) = &config.socket {
        // Gone already is as good.
        let _ = std::fs::remove_file(socket);
    }
    Ok(())
}

/// The API behind mutual TLS.
pub(crate) fn door(controller: &Arc<Controller>) -> Door {
    Door::renewable(http::router(controller.clone()), controller.own().door())
}

/// Two controllers on one database would both lead migrations; the lock ends with the process, however it ends.
fn lock(path: &Path) -> Result<File, RunError> {
    let failed = |source| RunError::Lock { path: path.to_owned(), source };
    let file =
        OpenOptions::new().create(true).truncate(false).write(true).open(path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(RunError::Running { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

async fn listeners(config: &Config) -> Result<Vec<Listener>, RunError> {
    let listen = |source| RunError::Listen { address: config.listen, source };
    let tcp = TcpListener::bind(config.listen).await.map_err(listen)?;
    let mut listeners = vec![Listener::Tcp(tcp)];
    if let Some(path) = &config.socket {
        let socket = bind_unix(path);
        let socket = socket.map_err(|source| RunError::Socket { path: path.clone(), source })?;
        listeners.push(Listener::Unix(socket));
    }
    Ok(listeners)
}

/// Binds beside the path and moves the socket there, so that nobody finds it with a wider mode than [`SOCKET_MODE`]. What stood
/// there was a dead controller's: we hold the lock.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let mut beside = path.as_os_str().to_owned();
    beside.push("~");
    let beside = PathBuf::from(beside);
    if let Err(error) = std::fs::remove_file(&beside)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let listener = UnixListener::bind(&beside)?;
    std::fs::set_permissions(&beside, Permissions::from_mode(SOCKET_MODE))?;
    std::fs::rename(&beside, path)?;
    Ok(listener)
}
