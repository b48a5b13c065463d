//! `pool init`: a new pool's folder, with everything that its controller and its first operator need; and `pool renew`, which
//! gives an operator's file a new certificate.
//!
//! ```text
//! DIR/ (0700)  ca.pem ca.key                 the authority
//!              controller.key controller-*.pem
//!              controller.toml               written last but one
//!              client.toml (0600)            the operator's key and certificates in one file, to be copied
//! ```
//!
//! An existing pool is never overwritten: its authority is what every certificate hangs on. Both need the authority's key, and
//! so are run on the controller's machine, whether or not the controller runs.

use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use whimbrel_api::Name;
use whimbrel_api::client::{ClientConfig, ClientConfigError};
use whimbrel_pki::authority::{Authority, AuthorityError, Role};
use whimbrel_pki::files::{
    BundleError, CA_CERTIFICATE, CA_KEY, ControllerIdentity, FilesError, OperatorIdentity,
    replace_private,
};
use whimbrel_pki::identity::Peer;
use whimbrel_pki::key::KeyError;

use crate::config::{self, Config, ConfigError, ConfigFile};

/// The client configuration's file name in a pool's folder.
const CLIENT_FILE: &str = "client.toml";
/// The name in the first operator's certificate.
const FIRST_OPERATOR: &str = "admin";
const FOLDER_MODE: u32 = 0o700;
const CONFIG_MODE: u32 = 0o644;
const SECRET_MODE: u32 = 0o600;

/// A pool to be made.
#[derive(Debug, Clone)]
pub struct PoolInit {
    /// Its folder; made if missing.
    pub dir: PathBuf,
    /// Its name.
    pub name: Name,
    /// The TCP address that the controller will listen on.
    pub listen: SocketAddr,
    /// A unix socket that it will listen on too; relative to `dir`.
    pub socket: Option<PathBuf>,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolMade {
    /// The controller's configuration.
    pub config: PathBuf,
    /// The operator's configuration, secrets included.
    pub client: PathBuf,
}

/// An operator's file with a new certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewed {
    /// The file.
    pub client: PathBuf,
    /// The operator's name.
    pub operator: String,
    /// When the new certificate expires.
    pub expires: SystemTime,
}

/// Why an operator's file was not renewed; it is as it was.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// The authority's files cannot be used, or it did not issue.
    #[error("the pool's authority cannot be used")]
    Authority(#[from] AuthorityError),
    /// The file cannot be read.
    #[error("the operator's file {} cannot be used", path.display())]
    Client {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ClientConfigError,
    },
    /// The file's certificate was not issued to an operator of this pool.
    #[error("the certificate in {} is not that of an operator of this pool", path.display())]
    NotOurs {
        /// The file.
        path: PathBuf,
    },
    /// The key in the file cannot be certified.
    #[error("the operator's key cannot be certified")]
    Key(#[from] KeyError),
    /// The file's text could not be made.
    #[error("cannot write the configuration as TOML")]
    Text(#[from] toml::ser::Error),
    /// The file could not be written.
    #[error("the operator's file is not renewed")]
    Write(#[from] FilesError),
}

/// Gives the operator's file `client` (the one in the pool's folder `dir` unless told otherwise) a new certificate for its name
/// and key, also when the old one has expired. The file is replaced in one step.
pub fn renew_operator(dir: &Path, client: Option<&Path>) -> Result<Renewed, RenewError> {
    let path = client.map_or_else(|| dir.join(CLIENT_FILE), Path::to_owned);
    let authority = Authority::load(dir)?;
    let unusable = |source| RenewError::Client { path: path.clone(), source };
    let not_ours = || RenewError::NotOurs { path: path.clone() };
    let config = ClientConfig::load(&path).map_err(unusable)?;
    let operator = match config.certificate().map_err(unusable)?.peer() {
        Ok(Peer::Operator(name)) if config.ca == authority.certificate().to_pem() => name,
        _ => return Err(not_ours()),
    };
    let key = config.key().map_err(unusable)?.subject()?;
    let certificate = authority.issue(Role::Operator(&operator), &key)?;
    let renewed = ClientConfig { certificate: certificate.to_pem(), ..config };
    let text = toml::to_string(&renewed)?;
    let head = "# Makes the command line an operator of its pool. It holds a private key.\n";
    replace_private(&path, &format!("{head}{text}"))?;
    Ok(Renewed { client: path, operator, expires: certificate.not_after() })
}

/// Why no pool was made.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// There is a pool in that folder.
    #[error("{} exists: there is a pool in this folder already, and it is left as it is", path.display())]
    Exists {
        /// The file that says so.
        path: PathBuf,
    },
    /// The folder could not be made.
    #[error("cannot make the folder {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The authority could not be made.
    #[error("cannot make the pool's authority")]
    Authority(#[from] AuthorityError),
    /// The certificates could not be made.
    #[error("cannot make the controller's or the operator's certificates")]
    Certificates(#[from] BundleError),
    /// The configuration would not be readable.
    #[error("the controller could not be configured so")]
    Config(#[from] ConfigError),
    /// A file's text could not be made.
    #[error("cannot write the configuration as TOML")]
    Text(#[from] toml::ser::Error),
    /// A file could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Makes a pool. On an error nothing is promised but that an existing pool is untouched.
pub fn pool_init(init: &PoolInit) -> Result<PoolMade, InitError> {
    let made = PoolMade { config: init.dir.join(config::FILE), client: init.dir.join(CLIENT_FILE) };
    let ours = [made.config.clone(), made.client.clone(), init.dir.join(CA_KEY)];
    if let Some(path) = ours.into_iter().find(|path| path.exists()) {
        return Err(InitError::Exists { path });
    }
    let file = || ConfigFile {
        name: init.name.clone(),
        listen: init.listen,
        socket: init.socket.clone(),
        addresses: Vec::new(),
    };
    let config = Config::from_file(init.dir.clone(), file())?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(FOLDER_MODE)
        .create(&init.dir)
        .map_err(|source| InitError::Folder { path: init.dir.clone(), source })?;

    let authority = Authority::create()?;
    authority.save(&init.dir)?;
    ControllerIdentity::issue(&authority)?.save(&init.dir)?;
    let operator = OperatorIdentity::issue(&authority, FIRST_OPERATOR)?;
    write_new(&made.client, &client_text(&config, &operator)?, SECRET_MODE)?;
    write_new(&made.config, &config_text(&file())?, CONFIG_MODE)?;
    debug_assert!(init.dir.join(CA_CERTIFICATE).exists());
    Ok(made)
}

fn config_text(file: &ConfigFile) -> Result<String, InitError> {
    let text = toml::to_string(file)?;
    Ok(format!(
        "# The controller of this pool. `addresses` are how hosts reach it (for join tokens);\n\
         # without it, the address above, or this machine's name where that is 0.0.0.0.\n\
         {text}# addresses = [\"controller.example.org:8440\"]\n"
    ))
}

/// The operator's file: reaches the controller over its socket where there is one, because that works on this machine whatever
/// the controller listens on.
fn client_text(config: &Config, operator: &OperatorIdentity) -> Result<String, InitError> {
    let credentials = operator.client();
    let by_tcp = config.addresses.first().cloned().unwrap_or_else(|| config.listen.to_string());
    let by_socket =
        config.socket.as_ref().map(|socket| format!("unix:{}", absolute(socket).display()));
    let client = ClientConfig {
        controller: by_socket.unwrap_or_else(|| by_tcp.clone()),
        ca: credentials.ca.to_pem(),
        certificate: credentials.certificate.to_pem(),
        key: credentials.key.to_pem(),
    };
    let text = toml::to_string(&client)?;
    Ok(format!(
        "# Makes the command line an operator of the pool {}. It holds a private key.\n\
         # From another machine: controller = \"{by_tcp}\"\n{text}",
        config.name
    ))
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), InitError> {
    let write = || {
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|source| InitError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn init(dir: &Path) -> PoolInit {
        PoolInit {
            dir: dir.join("pool"),
            name: "lab".parse().unwrap(),
            listen: "127.0.0.1:8440".parse().unwrap(),
            socket: Some("controller.sock".into()),
        }
    }

    #[test]
    fn a_pool_is_made_once_and_can_be_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let made = pool_init(&init(dir.path())).unwrap();
        let config = Config::load(&made.config).unwrap();
        assert_eq!(config.name.as_str(), "lab");
        let client = ClientConfig::load(&made.client).unwrap();
        assert!(client.controller.starts_with("unix:/") && client.key.contains("PRIVATE KEY"));
        let mode = std::fs::metadata(&made.client).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        ControllerIdentity::load(&config.dir).unwrap();
        let before = std::fs::read(dir.path().join("pool").join(CA_KEY)).unwrap();
        assert!(matches!(pool_init(&init(dir.path())), Err(InitError::Exists { .. })));
        assert_eq!(std::fs::read(dir.path().join("pool").join(CA_KEY)).unwrap(), before);
    }

    #[test]
    fn an_operators_file_is_renewed_for_its_own_name_and_key() {
        let dir = tempfile::tempdir().unwrap();
        let made = pool_init(&init(dir.path())).unwrap();
        let pool = dir.path().join("pool");
        let old = ClientConfig::load(&made.client).unwrap();
        let renewed = renew_operator(&pool, None).unwrap();
        assert_eq!((renewed.client.as_path(), renewed.operator.as_str()), (&*made.client, "admin"));
        let new = ClientConfig::load(&made.client).unwrap();
        assert_eq!((&new.controller, &new.key, &new.ca), (&old.controller, &old.key, &old.ca));
        assert_ne!(new.certificate, old.certificate);
        assert_eq!(new.certificate().unwrap().peer().unwrap(), Peer::Operator("admin".to_owned()));
        whimbrel_api::client::PoolClient::from_config(&new).unwrap();
        let mode = std::fs::metadata(&made.client).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        // Another pool's, and one that is no operator's.
        let other = pool_init(&PoolInit { dir: dir.path().join("other"), ..init(dir.path()) });
        let refused = renew_operator(&pool, Some(&other.unwrap().client)).unwrap_err();
        assert!(matches!(refused, RenewError::NotOurs { .. }), "{refused}");
        let agent = std::fs::read_to_string(pool.join("controller-client.pem")).unwrap();
        let disguised = toml::to_string(&ClientConfig { certificate: agent, ..new }).unwrap();
        std::fs::write(&made.client, &disguised).unwrap();
        let refused = renew_operator(&pool, None).unwrap_err();
        assert!(matches!(refused, RenewError::NotOurs { .. }), "{refused}");
        assert_eq!(std::fs::read_to_string(&made.client).unwrap(), disguised);
    }
}
