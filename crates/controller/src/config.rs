//! `controller.toml`: where the controller listens and how hosts reach it.
//!
//! The file lies in the pool's folder, beside the authority, the certificates and the database; relative paths start there.
//! Unknown fields are errors that name the field. Written by [`crate::pool_init`], read by the binary.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use whimbrel_api::Name;

/// The configuration's file name in a pool's folder.
pub(crate) const FILE: &str = "controller.toml";
/// The database's file name in a pool's folder.
const DATABASE: &str = "pool.db";
/// The file whose lock says that a controller is running.
const LOCK: &str = "controller.lock";
/// Longest configuration file that is read, in bytes.
const FILE_MAX_BYTES: u64 = 64 << 10;
/// Longest path of a unix socket, in bytes: Linux takes 107 (`sun_path` less its final zero), and it is bound under a name
/// that is longer by one.
const SOCKET_PATH_MAX_BYTES: usize = 106;
/// Where the kernel tells this machine's name.
const HOST_NAME_FILE: &str = "/proc/sys/kernel/hostname";

/// How a controller is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The pool's folder.
    pub dir: PathBuf,
    /// The pool's name.
    pub name: Name,
    /// The TCP address that the API is served on.
    pub listen: SocketAddr,
    /// A unix socket that serves it too (0600; TLS inside all the same).
    pub socket: Option<PathBuf>,
    /// How hosts reach the controller, `host:port` each: what a join token carries.
    pub addresses: Vec<String>,
}

/// The file's form.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ConfigFile {
    pub(crate) name: Name,
    pub(crate) listen: SocketAddr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) socket: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) addresses: Vec<String>,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is longer than anybody writes.
    #[error("{} is longer than {FILE_MAX_BYTES} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// The file is not of the form of a controller's configuration.
    #[error("{} is not a controller's configuration", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// The socket's path does not fit into a socket address.
    #[error("the socket's path {} has more than {SOCKET_PATH_MAX_BYTES} bytes", path.display())]
    SocketPath {
        /// The path.
        path: PathBuf,
    },
}

impl Config {
    /// Reads a configuration file; `path` may be the pool's folder too.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let path = if path.is_dir() { path.join(FILE) } else { path.to_owned() };
        let read = |source| ConfigError::Read { path: path.clone(), source };
        if std::fs::metadata(&path).map_err(read)?.len() > FILE_MAX_BYTES {
            return Err(ConfigError::TooLong { path });
        }
        let text = std::fs::read_to_string(&path).map_err(read)?;
        let file: ConfigFile = toml::from_str(&text)
            .map_err(|source| ConfigError::Form { path: path.clone(), source: Box::new(source) })?;
        let dir = path.parent().unwrap_or(Path::new(".")).to_owned();
        Self::from_file(dir, file)
    }

    pub(crate) fn from_file(dir: PathBuf, file: ConfigFile) -> Result<Self, ConfigError> {
        let socket = file.socket.map(|socket| dir.join(socket));
        if let Some(path) = socket.as_ref().filter(|path| !fits_socket_address(path)) {
            return Err(ConfigError::SocketPath { path: path.clone() });
        }
        let addresses =
            if file.addresses.is_empty() { vec![own_address(file.listen)] } else { file.addresses };
        Ok(Self { dir, name: file.name, listen: file.listen, socket, addresses })
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.dir.join(DATABASE)
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.dir.join(LOCK)
    }
}

fn fits_socket_address(path: &Path) -> bool {
    path.as_os_str().len() <= SOCKET_PATH_MAX_BYTES
}

/// How others reach an address that we listen on: itself, or this machine's name where we listen on every address.
fn own_address(listen: SocketAddr) -> String {
    if !listen.ip().is_unspecified() {
        return listen.to_string();
    }
    let name = std::fs::read_to_string(HOST_NAME_FILE).unwrap_or_default();
    let name = name.trim();
    let name = if name.is_empty() { "localhost" } else { name };
    format!("{name}:{}", listen.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> Result<ConfigFile, toml::de::Error> {
        toml::from_str(text)
    }

    #[test]
    fn an_unknown_field_is_named() {
        let error = file("name = \"p\"\nlisten = \"127.0.0.1:1\"\nlissten = 1\n").unwrap_err();
        assert!(error.to_string().contains("lissten"), "{error}");
    }

    #[test]
    fn addresses_default_to_where_it_listens() {
        let read =
            file("name = \"p\"\nlisten = \"198.18.0.1:8440\"\nsocket = \"c.sock\"\n").unwrap();
        let config = Config::from_file("/pool".into(), read).unwrap();
        assert_eq!(config.addresses, ["198.18.0.1:8440"]);
        assert_eq!(config.socket.unwrap(), Path::new("/pool/c.sock"));
        let everywhere = own_address("0.0.0.0:8440".parse().unwrap());
        assert!(everywhere.ends_with(":8440") && !everywhere.starts_with("0.0.0.0"));
    }

    #[test]
    fn a_socket_path_that_the_kernel_would_cut_is_refused() {
        let long =
            format!("name = \"p\"\nlisten = \"127.0.0.1:1\"\nsocket = \"{}\"", "s".repeat(108));
        let refused = Config::from_file("/".into(), file(&long).unwrap());
        assert!(matches!(refused, Err(ConfigError::SocketPath { .. })));
    }
}
