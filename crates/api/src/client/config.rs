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
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use whimbrel_pki::certificate::{Certificate, CertificateError};
use whimbrel_pki::files::{FilesError, SmallFile};
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
    /// A file cannot be read, or others may touch the private key in it.
    #[error("the client's configuration cannot be read")]
    File(#[from] FilesError),
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
        let file = SmallFile::read(path, FILE_MAX_BYTES)?;
        let form = |source| ClientConfigError::Form { path: path.into(), source: Box::new(source) };
        let mut config: Self = toml::from_str(file.text()).map_err(form)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        for field in [&mut config.ca, &mut config.certificate] {
            if !is_pem(field) {
                *field = SmallFile::read(&folder.join(&*field), FILE_MAX_BYTES)?.text().to_owned();
            }
        }
        if is_pem(&config.key) {
            file.private()?;
        } else {
            let key = SmallFile::read(&folder.join(&config.key), FILE_MAX_BYTES)?;
            config.key = key.private()?.to_owned();
        }
        Ok(config)
    }

    /// Our certificate.
    pub fn certificate(&self) -> Result<Certificate, ClientConfigError> {
        certificate("certificate", &self.certificate)
    }

    /// Our key.
    pub fn key(&self) -> Result<PrivateKey, ClientConfigError> {
        PrivateKey::from_pem(&self.key).map_err(ClientConfigError::Key)
    }

    fn target(&self) -> Target {
        match self.controller.strip_prefix(UNIX_PREFIX) {
            Some(path) => Target::Unix(path.into()),
            None => Target::Tcp(self.controller.clone()),
        }
    }

    fn credentials(&self) -> Result<Credentials, ClientConfigError> {
        Ok(Credentials {
            ca: certificate("ca", &self.ca)?,
            certificate: self.certificate()?,
            key: self.key()?,
        })
    }
}

fn certificate(field: &'static str, pem: &str) -> Result<Certificate, ClientConfigError> {
    let read = Certificate::from_pem(pem);
    read.map_err(|source| ClientConfigError::Certificate { field, source })
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
