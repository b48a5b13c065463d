//! The client's configuration: which controller, and who we are to it. One TOML file with mode 0600, to be copied whole.
//!
//! ```toml
//! controller = "198.18.0.1:8440"        # or "unix:/run/whimbrel/controller.sock"
//! ca = "-----BEGIN CERTIFICATE-----…"   # PEM text, or the path of a PEM file, relative to this file
//! certificate = "…"
//! key = "…"
//! ```
//!
//! Written by `whimbrel pool init`, read by the command line.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use whimbrel_pki::certificate::{Certificate, CertificateError};
use whimbrel_pki::key::{KeyError, PrivateKey};
use whimbrel_pki::tls::{self, Credentials, TlsConfigError};

use super::{PoolClient, Target};
use crate::ApiError;

/// Longest file that is read, the PEM files that it names included, in bytes.
const FILE_MAX_BYTES: u64 = 64 << 10;
/// What a PEM text begins with; anything else is a path.
const PEM_START: &str = "-----BEGIN";
/// What a socket's path comes after.
const UNIX_PREFIX: &str = "unix:";
/// The permission bits that nobody but the owner of a private key may have.
const OTHERS: u32 = 0o077;

/// How a client reaches a pool.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientConfig {
    /// `address:port`, or `unix:/path`.
    pub controller: String,
    /// The pool's authority: PEM, or a file with it.
    pub ca: String,
    /// Our certificate: PEM, or a file with it.
    pub certificate: String,
    /// Our private key: PEM, or a file with it.
    pub key: String,
}

impl fmt::Debug for ClientConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientConfig").field("controller", &self.controller).finish_non_exhaustive()
    }
}

/// Why a client's configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ClientConfigError {
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is longer than 64 KiB.
    #[error("{} is longer than {FILE_MAX_BYTES} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// Others may read the private key.
    #[error("{} holds a private key, but its mode {mode:03o} lets others at it; use chmod 600", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is not of the right form; the cause names the field.
    #[error("{} is not a client's configuration", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// One of the certificates cannot be used.
    #[error("`{field}` is not a certificate")]
    Certificate {
        /// Which.
        field: &'static str,
        /// Why.
        #[source]
        source: CertificateError,
    },
    /// The key cannot be used.
    #[error("`key` is not a private key")]
    Key(#[source] KeyError),
    /// Certificate and key do not make a TLS client.
    #[error("the certificate and key cannot be used together")]
    Tls(#[source] TlsConfigError),
    /// No client could be made.
    #[error("no client could be made")]
    Client(#[source] ApiError),
}

impl ClientConfig {
    /// Reads a file; afterwards every PEM is inline.
    pub fn load(path: &Path) -> Result<Self, ClientConfigError> {
        let (text, mode) = read(path)?;
        let form = |source| ClientConfigError::Form { path: path.into(), source: Box::new(source) };
        let mut config: Self = toml::from_str(&text).map_err(form)?;
        if is_pem(&config.key) && mode & OTHERS != 0 {
            return Err(ClientConfigError::Exposed { path: path.into(), mode });
        }
        let folder = path.parent().unwrap_or(Path::new("."));
        for field in [&mut config.ca, &mut config.certificate] {
            if !is_pem(field) {
                (*field, _) = read(&folder.join(&*field))?;
            }
        }
        if !is_pem(&config.key) {
            let path = folder.join(&config.key);
            let (key, mode) = read(&path)?;
            if mode & OTHERS != 0 {
                return Err(ClientConfigError::Exposed { path, mode });
            }
            config.key = key;
        }
        Ok(config)
    }

    fn target(&self) -> Target {
        match self.controller.strip_prefix(UNIX_PREFIX) {
            Some(path) => Target::Unix(path.into()),
            None => Target::Tcp(self.controller.clone()),
        }
    }

    fn credentials(&self) -> Result<Credentials, ClientConfigError> {
        let certificate = |field, pem: &str| {
            let read = Certificate::from_pem(pem);
            read.map_err(|source| ClientConfigError::Certificate { field, source })
        };
        Ok(Credentials {
            ca: certificate("ca", &self.ca)?,
            certificate: certificate("certificate", &self.certificate)?,
            key: PrivateKey::from_pem(&self.key).map_err(ClientConfigError::Key)?,
        })
    }
}

impl PoolClient {
    /// The client that a configuration describes.
    pub fn from_config(config: &ClientConfig) -> Result<Self, ClientConfigError> {
        let tls = tls::client_config(&config.credentials()?).map_err(ClientConfigError::Tls)?;
        Self::new(config.target(), Arc::new(tls)).map_err(ClientConfigError::Client)
    }
}

fn is_pem(text: &str) -> bool {
    text.trim_start().starts_with(PEM_START)
}

/// The text of a file and its permission bits.
fn read(path: &Path) -> Result<(String, u32), ClientConfigError> {
    let failed = |source| ClientConfigError::Read { path: path.into(), source };
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
    let mut text = String::new();
    file.take(FILE_MAX_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > FILE_MAX_BYTES {
        return Err(ClientConfigError::TooLong { path: path.into() });
    }
    Ok((text, mode))
}
