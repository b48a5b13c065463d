//! The identity folders of a host, a controller, an operator and a monitor: names of the files, loading them
//! with checks, and writing them atomically with the right modes.
//!
//! ```text
//! host        ca.pem  agent.key  agent-server.pem  agent-client.pem
//!                     qemu.key   qemu-server.pem   qemu-client.pem
//! controller  ca.pem  ca.key (see authority)
//!                     controller.key  controller-server.pem  controller-client.pem
//! operator    ca.pem  operator.key  operator.pem
//! monitor     ca.pem  monitor.key   monitor.pem
//! ```
//!
//! Keys are 0600, certificates 0644, folders that we make 0700. Certificates are renewed for the same
//! keys: whatever of a renewal is on the disk, old or new, belongs to the key beside it. Nothing here
//! watches for changes.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use crate::authority::{
    Authority, AuthorityError, CERTIFICATE_DAYS, HostCertificates, Role, Validity,
};
use crate::certificate::{Certificate, CertificateError};
use crate::identity::{IdentityError, Peer};
use crate::key::{KeyError, PrivateKey};
use crate::tls::Credentials;

/// The authority's certificate.
pub const CA_CERTIFICATE: &str = "ca.pem";
/// The authority's key; only where the authority lives.
pub const CA_KEY: &str = "ca.key";
const AGENT_KEY: &str = "agent.key";
const AGENT_SERVER: &str = "agent-server.pem";
const AGENT_CLIENT: &str = "agent-client.pem";
const QEMU_KEY: &str = "qemu.key";
const QEMU_SERVER: &str = "qemu-server.pem";
const QEMU_CLIENT: &str = "qemu-client.pem";
const CONTROLLER_KEY: &str = "controller.key";
const CONTROLLER_SERVER: &str = "controller-server.pem";
const CONTROLLER_CLIENT: &str = "controller-client.pem";
const OPERATOR_KEY: &str = "operator.key";
const OPERATOR_CERTIFICATE: &str = "operator.pem";
/// A monitor's private key, in the folder that its program is pointed to.
pub const MONITOR_KEY: &str = "monitor.key";
/// Its certificate.
pub const MONITOR_CERTIFICATE: &str = "monitor.pem";

/// Longest identity file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 16 * 1024;

const KEY_MODE: u32 = 0o600;
const CERTIFICATE_MODE: u32 = 0o644;
const FOLDER_MODE: u32 = 0o700;
const OTHERS: u32 = 0o077;

/// Why an identity folder could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The folder could not be made.
    #[error("cannot make the folder {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file could not be written; what stood there before still does.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is longer than any of its kind.
    #[error("{} is longer than {bytes_max} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The longest that is read.
        bytes_max: u64,
    },
    /// A key file that its group or others may read.
    #[error("{} holds a private key, but its mode {mode:03o} lets others at it; use chmod 600", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file holds no private key.
    #[error("{} cannot be used as a private key", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: KeyError,
    },
    /// A file holds no certificate.
    #[error("{} cannot be used as a certificate", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: CertificateError,
    },
}

/// Why an identity could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// A key could not be made or read.
    #[error("cannot make or use a private key")]
    Key(#[from] KeyError),
    /// A file could not be read or written.
    #[error("the identity folder cannot be used")]
    Files(#[from] FilesError),
    /// The authority did not issue.
    #[error("the authority did not issue a certificate")]
    Authority(#[from] AuthorityError),
    /// A received certificate is unusable.
    #[error("the certificate {file} cannot be used")]
    Certificate {
        /// Its name in the folder.
        file: &'static str,
        /// Why.
        #[source]
        source: CertificateError,
    },
    /// A certificate does not say who it is for.
    #[error("the certificate {file} names nobody of a pool")]
    Identity {
        /// Its name in the folder.
        file: &'static str,
        /// Why.
        #[source]
        source: IdentityError,
    },
    /// A certificate is for somebody else.
    #[error("the certificate {file} is for {found}, not for {expected}")]
    WrongHolder {
        /// Its name in the folder.
        file: &'static str,
        /// Who should hold it.
        expected: String,
        /// Whom it names.
        found: Peer,
    },
    /// New certificates are of another pool than the host.
    #[error("the new certificates are of another authority than this host's pool")]
    OtherAuthority,
    /// A certificate and the key beside it do not belong together.
    #[error("the certificate {file} does not belong to the key beside it")]
    Mismatch {
        /// Its name in the folder.
        file: &'static str,
    },
}

/// A joining host's new keys, before the authority has certified them.
#[derive(Clone, Debug)]
pub struct HostKeys {
    agent: PrivateKey,
    qemu: PrivateKey,
}

impl HostKeys {
    /// Makes both keys.
    pub fn generate() -> Result<Self, KeyError> {
        Ok(Self { agent: PrivateKey::generate()?, qemu: PrivateKey::generate()? })
    }

    /// The signing request for the agent's certificates.
    pub fn agent_request_pem(&self) -> Result<String, KeyError> {
        self.agent.request_pem()
    }

    /// The signing request for QEMU's certificates.
    pub fn qemu_request_pem(&self) -> Result<String, KeyError> {
        self.qemu.request_pem()
    }
}

/// All that makes a host known in its pool.
///
/// Its certificates can be renewed ([`HostIdentity::renew`]): all clones then give out the new ones.
#[derive(Clone, Debug)]
pub struct HostIdentity {
    host: String,
    ca: Certificate,
    keys: HostKeys,
    issued: Arc<RwLock<Issued>>,
}

/// A host's certificates, which are renewed together.
#[derive(Clone, Debug)]
struct Issued {
    agent_server: Certificate,
    agent_client: Certificate,
    qemu_server: Certificate,
    qemu_client: Certificate,
}

impl Issued {
    fn read(received: &HostCertificates) -> Result<Self, BundleError> {
        Ok(Self {
            agent_server: received_certificate(AGENT_SERVER, &received.agent_server)?,
            agent_client: received_certificate(AGENT_CLIENT, &received.agent_client)?,
            qemu_server: received_certificate(QEMU_SERVER, &received.qemu_server)?,
            qemu_client: received_certificate(QEMU_CLIENT, &received.qemu_client)?,
        })
    }

    /// Each certificate belongs to its key and to `host`.
    fn check(&self, host: &str, keys: &HostKeys) -> Result<(), BundleError> {
        let agent = Peer::Agent(host.to_owned());
        let qemu = Peer::Qemu(host.to_owned());
        check_pair(AGENT_SERVER, &self.agent_server, &keys.agent, &agent)?;
        check_pair(AGENT_CLIENT, &self.agent_client, &keys.agent, &agent)?;
        check_pair(QEMU_SERVER, &self.qemu_server, &keys.qemu, &qemu)?;
        check_pair(QEMU_CLIENT, &self.qemu_client, &keys.qemu, &qemu)
    }

    fn save(&self, folder: &Path) -> Result<(), FilesError> {
        write_certificate(folder, AGENT_SERVER, &self.agent_server)?;
        write_certificate(folder, AGENT_CLIENT, &self.agent_client)?;
        write_certificate(folder, QEMU_SERVER, &self.qemu_server)?;
        write_certificate(folder, QEMU_CLIENT, &self.qemu_client)
    }

    fn all(&self) -> [&Certificate; 4] {
        [&self.agent_server, &self.agent_client, &self.qemu_server, &self.qemu_client]
    }
}

impl HostIdentity {
    /// Makes a host's identity where the authority is at hand (the lab, tests).
    pub fn issue(authority: &Authority, host: &str) -> Result<Self, BundleError> {
        let validity = Validity::days_from(SystemTime::now(), CERTIFICATE_DAYS);
        Self::issue_within(authority, host, validity)
    }

    /// The same with a chosen validity.
    pub fn issue_within(
        authority: &Authority,
        host: &str,
        validity: Validity,
    ) -> Result<Self, BundleError> {
        let keys = HostKeys::generate()?;
        let (agent, qemu) = (keys.agent_request_pem()?, keys.qemu_request_pem()?);
        let certificates = authority.issue_host_within(host, &agent, &qemu, validity)?;
        Self::assemble(keys, &certificates, host)
    }

    /// Puts together the keys and what the join answer brought, checking that every certificate
    /// belongs to its key and to `host`.
    pub fn assemble(
        keys: HostKeys,
        received: &HostCertificates,
        host: &str,
    ) -> Result<Self, BundleError> {
        let issued = Issued::read(received)?;
        issued.check(host, &keys)?;
        let ca = received_certificate(CA_CERTIFICATE, &received.ca)?;
        Ok(Self { host: host.to_owned(), ca, keys, issued: Arc::new(RwLock::new(issued)) })
    }

    /// Writes the folder, keys first.
    pub fn save(&self, folder: &Path) -> Result<(), BundleError> {
        ensure_folder(folder)?;
        write_key(folder, AGENT_KEY, &self.keys.agent)?;
        write_key(folder, QEMU_KEY, &self.keys.qemu)?;
        self.issued().save(folder)?;
        // Last: a folder with ca.pem is complete, so a join that was cut off is seen as none.
        write_certificate(folder, CA_CERTIFICATE, &self.ca)?;
        Ok(())
    }

    /// Reads and checks the folder. The host's name is what its certificates say.
    pub fn load(folder: &Path) -> Result<Self, BundleError> {
        let agent_server = read_certificate(folder, AGENT_SERVER)?;
        let host = match holder(AGENT_SERVER, &agent_server)? {
            Peer::Agent(host) => host,
            found => {
                let expected = "an agent".to_owned();
                return Err(BundleError::WrongHolder { file: AGENT_SERVER, expected, found });
            }
        };
        let ca = read_certificate(folder, CA_CERTIFICATE)?;
        let keys =
            HostKeys { agent: read_key(folder, AGENT_KEY)?, qemu: read_key(folder, QEMU_KEY)? };
        let issued = Issued {
            agent_server,
            agent_client: read_certificate(folder, AGENT_CLIENT)?,
            qemu_server: read_certificate(folder, QEMU_SERVER)?,
            qemu_client: read_certificate(folder, QEMU_CLIENT)?,
        };
        issued.check(&host, &keys)?;
        Ok(Self { host, ca, keys, issued: Arc::new(RwLock::new(issued)) })
    }

    /// Takes new certificates for the same keys: first to `folder`, each file in one step, then to
    /// whoever asks this identity or a clone of it from now on.
    ///
    /// Postcondition: on an error the certificates in use are the old ones, and the folder can be
    /// loaded.
    pub fn renew(&self, received: &HostCertificates, folder: &Path) -> Result<(), BundleError> {
        if received_certificate(CA_CERTIFICATE, &received.ca)? != self.ca {
            return Err(BundleError::OtherAuthority);
        }
        let issued = Issued::read(received)?;
        issued.check(&self.host, &self.keys)?;
        issued.save(folder)?;
        *self.issued.write().unwrap_or_else(PoisonError::into_inner) = issued;
        Ok(())
    }

    /// Whether `folder` holds a complete identity (its last-written file exists).
    pub fn exists(folder: &Path) -> bool {
        folder.join(CA_CERTIFICATE).exists()
    }

    /// The host's name.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The pool's authority.
    pub fn ca(&self) -> &Certificate {
        &self.ca
    }

    /// The keys, for signing requests.
    pub fn keys(&self) -> &HostKeys {
        &self.keys
    }

    /// Whether any of the certificates is over at `now`.
    pub fn is_expired(&self, now: SystemTime) -> bool {
        self.issued().all().iter().any(|certificate| certificate.is_expired(now))
    }

    /// Whether it is time at `now` to renew the certificates.
    pub fn is_renewal_due(&self, now: SystemTime) -> bool {
        self.issued().all().iter().any(|certificate| certificate.is_renewal_due(now))
    }

    /// What the agent's door shows.
    pub fn server(&self) -> Credentials {
        credentials(&self.ca, &self.issued().agent_server, &self.keys.agent)
    }

    /// What the agent shows when it calls.
    pub fn client(&self) -> Credentials {
        credentials(&self.ca, &self.issued().agent_client, &self.keys.agent)
    }

    /// What a receiving QEMU shows; see [`crate::qemu_credentials`].
    pub fn qemu_server(&self) -> Credentials {
        credentials(&self.ca, &self.issued().qemu_server, &self.keys.qemu)
    }

    /// What a sending QEMU shows; see [`crate::qemu_credentials`].
    pub fn qemu_client(&self) -> Credentials {
        credentials(&self.ca, &self.issued().qemu_client, &self.keys.qemu)
    }

    fn issued(&self) -> Issued {
        self.issued.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// All that makes a controller known in its pool.
#[derive(Clone, Debug)]
pub struct ControllerIdentity {
    ca: Certificate,
    key: PrivateKey,
    server: Certificate,
    client: Certificate,
}

impl ControllerIdentity {
    /// Makes the controller's key and certificates.
    pub fn issue(authority: &Authority) -> Result<Self, BundleError> {
        let validity = Validity::days_from(SystemTime::now(), CERTIFICATE_DAYS);
        Self::issue_within(authority, validity)
    }

    /// The same with a chosen validity.
    pub fn issue_within(authority: &Authority, validity: Validity) -> Result<Self, BundleError> {
        Self::certified(authority, PrivateKey::generate()?, validity)
    }

    fn certified(
        authority: &Authority,
        key: PrivateKey,
        validity: Validity,
    ) -> Result<Self, BundleError> {
        let subject = key.subject()?;
        Ok(Self {
            ca: authority.certificate().clone(),
            server: authority.issue_within(Role::ControllerServer, &subject, validity)?,
            client: authority.issue_within(Role::ControllerClient, &subject, validity)?,
            key,
        })
    }

    /// New certificates for the same key.
    pub fn renewed(&self, authority: &Authority) -> Result<Self, BundleError> {
        let validity = Validity::days_from(SystemTime::now(), CERTIFICATE_DAYS);
        Self::certified(authority, self.key.clone(), validity)
    }

    /// Whether it is time at `now` to renew the certificates.
    pub fn is_renewal_due(&self, now: SystemTime) -> bool {
        self.server.is_renewal_due(now) || self.client.is_renewal_due(now)
    }

    /// Writes the folder, the key first.
    pub fn save(&self, folder: &Path) -> Result<(), BundleError> {
        ensure_folder(folder)?;
        write_key(folder, CONTROLLER_KEY, &self.key)?;
        write_certificate(folder, CONTROLLER_SERVER, &self.server)?;
        write_certificate(folder, CONTROLLER_CLIENT, &self.client)?;
        write_certificate(folder, CA_CERTIFICATE, &self.ca)?;
        Ok(())
    }

    /// Reads and checks the folder.
    pub fn load(folder: &Path) -> Result<Self, BundleError> {
        let identity = Self {
            ca: read_certificate(folder, CA_CERTIFICATE)?,
            key: read_key(folder, CONTROLLER_KEY)?,
            server: read_certificate(folder, CONTROLLER_SERVER)?,
            client: read_certificate(folder, CONTROLLER_CLIENT)?,
        };
        check_pair(CONTROLLER_SERVER, &identity.server, &identity.key, &Peer::Controller)?;
        check_pair(CONTROLLER_CLIENT, &identity.client, &identity.key, &Peer::Controller)?;
        Ok(identity)
    }

    /// The pool's authority.
    pub fn ca(&self) -> &Certificate {
        &self.ca
    }

    /// What the controller's door shows.
    pub fn server(&self) -> Credentials {
        credentials(&self.ca, &self.server, &self.key)
    }

    /// What the controller shows when it calls an agent, and signs grants with.
    pub fn client(&self) -> Credentials {
        credentials(&self.ca, &self.client, &self.key)
    }
}

/// All that makes an operator's command line known in a pool.
#[derive(Clone, Debug)]
pub struct OperatorIdentity {
    name: String,
    ca: Certificate,
    key: PrivateKey,
    certificate: Certificate,
}

impl OperatorIdentity {
    /// Makes an operator's key and certificate.
    pub fn issue(authority: &Authority, name: &str) -> Result<Self, BundleError> {
        let key = PrivateKey::generate()?;
        let certificate = authority.issue(Role::Operator(name), &key.subject()?)?;
        Ok(Self { name: name.to_owned(), ca: authority.certificate().clone(), key, certificate })
    }

    /// Writes the folder, the key first.
    pub fn save(&self, folder: &Path) -> Result<(), BundleError> {
        ensure_folder(folder)?;
        write_key(folder, OPERATOR_KEY, &self.key)?;
        write_certificate(folder, OPERATOR_CERTIFICATE, &self.certificate)?;
        write_certificate(folder, CA_CERTIFICATE, &self.ca)?;
        Ok(())
    }

    /// Reads and checks the folder. The operator's name is what the certificate says.
    pub fn load(folder: &Path) -> Result<Self, BundleError> {
        let certificate = read_certificate(folder, OPERATOR_CERTIFICATE)?;
        let peer = holder(OPERATOR_CERTIFICATE, &certificate)?;
        let Peer::Operator(name) = peer.clone() else {
            let expected = "an operator".to_owned();
            let file = OPERATOR_CERTIFICATE;
            return Err(BundleError::WrongHolder { file, expected, found: peer });
        };
        let key = read_key(folder, OPERATOR_KEY)?;
        check_pair(OPERATOR_CERTIFICATE, &certificate, &key, &peer)?;
        Ok(Self { name, ca: read_certificate(folder, CA_CERTIFICATE)?, key, certificate })
    }

    /// The operator's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the command line shows.
    pub fn client(&self) -> Credentials {
        credentials(&self.ca, &self.certificate, &self.key)
    }
}

/// All that makes a program known in a pool that reads metrics.
#[derive(Clone, Debug)]
pub struct MonitorIdentity {
    ca: Certificate,
    key: PrivateKey,
    certificate: Certificate,
}

impl MonitorIdentity {
    /// Makes a monitor's key and certificate.
    pub fn issue(authority: &Authority, name: &str) -> Result<Self, BundleError> {
        let key = PrivateKey::generate()?;
        let certificate = authority.issue(Role::Monitor(name), &key.subject()?)?;
        Ok(Self { ca: authority.certificate().clone(), key, certificate })
    }

    /// Writes the folder, the key first; what was there is replaced.
    pub fn save(&self, folder: &Path) -> Result<(), BundleError> {
        ensure_folder(folder)?;
        write_key(folder, MONITOR_KEY, &self.key)?;
        write_certificate(folder, MONITOR_CERTIFICATE, &self.certificate)?;
        write_certificate(folder, CA_CERTIFICATE, &self.ca)?;
        Ok(())
    }

    /// What the program shows.
    pub fn client(&self) -> Credentials {
        credentials(&self.ca, &self.certificate, &self.key)
    }
}

fn credentials(ca: &Certificate, certificate: &Certificate, key: &PrivateKey) -> Credentials {
    Credentials { ca: ca.clone(), certificate: certificate.clone(), key: key.clone() }
}

fn received_certificate(file: &'static str, pem: &str) -> Result<Certificate, BundleError> {
    Certificate::from_pem(pem).map_err(|source| BundleError::Certificate { file, source })
}

fn holder(file: &'static str, certificate: &Certificate) -> Result<Peer, BundleError> {
    certificate.peer().map_err(|source| BundleError::Identity { file, source })
}

fn check_pair(
    file: &'static str,
    certificate: &Certificate,
    key: &PrivateKey,
    expected: &Peer,
) -> Result<(), BundleError> {
    let found = holder(file, certificate)?;
    if &found != expected {
        let expected = expected.to_string();
        return Err(BundleError::WrongHolder { file, expected, found });
    }
    if certificate.public_point() != key.public_point() {
        return Err(BundleError::Mismatch { file });
    }
    Ok(())
}

/// Makes `folder` (0700, with its parents) if it is missing; an existing one is left as it is.
pub(crate) fn ensure_folder(folder: &Path) -> Result<(), FilesError> {
    DirBuilder::new()
        .recursive(true)
        .mode(FOLDER_MODE)
        .create(folder)
        .map_err(|source| FilesError::Folder { path: folder.to_owned(), source })
}

pub(crate) fn write_key(folder: &Path, name: &str, key: &PrivateKey) -> Result<(), FilesError> {
    write_atomically(folder, name, key.to_pem().as_bytes(), KEY_MODE)
}

pub(crate) fn write_certificate(
    folder: &Path,
    name: &str,
    certificate: &Certificate,
) -> Result<(), FilesError> {
    write_atomically(folder, name, certificate.to_pem().as_bytes(), CERTIFICATE_MODE)
}

pub(crate) fn read_certificate(folder: &Path, name: &str) -> Result<Certificate, FilesError> {
    let path = folder.join(name);
    let file = SmallFile::read(&path, MAX_FILE_BYTES)?;
    Certificate::from_pem(file.text()).map_err(|source| FilesError::Certificate { path, source })
}

/// Reads a private key, refusing a file that others than its owner may touch.
pub(crate) fn read_key(folder: &Path, name: &str) -> Result<PrivateKey, FilesError> {
    let path = folder.join(name);
    let file = SmallFile::read(&path, MAX_FILE_BYTES)?;
    PrivateKey::from_pem(file.private()?).map_err(|source| FilesError::Key { path, source })
}

/// The text of a small file that may hold a secret. It has no `Debug` form.
pub struct SmallFile {
    path: PathBuf,
    text: String,
    mode: u32,
}

impl SmallFile {
    /// Reads a file of at most `bytes_max` bytes.
    pub fn read(path: &Path, bytes_max: u64) -> Result<Self, FilesError> {
        let failed = |source| FilesError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
        let mut text = String::new();
        file.take(bytes_max.saturating_add(1)).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > bytes_max {
            return Err(FilesError::TooLong { path: path.to_owned(), bytes_max });
        }
        Ok(Self { path: path.to_owned(), text, mode })
    }

    /// What stands in it, secret or not.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What stands in it, if nobody but its owner may touch the file.
    pub fn private(&self) -> Result<&str, FilesError> {
        if self.mode & OTHERS != 0 {
            return Err(FilesError::Exposed { path: self.path.clone(), mode: self.mode });
        }
        Ok(&self.text)
    }
}

/// Replaces the secret file `path` (0600) in one step; on failure the old one stands.
pub fn replace_private(path: &Path, text: &str) -> Result<(), FilesError> {
    let no_file = || FilesError::Write {
        path: path.to_owned(),
        source: io::Error::from(io::ErrorKind::InvalidInput),
    };
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(no_file)?;
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    write_atomically(folder.unwrap_or(Path::new(".")), name, text.as_bytes(), KEY_MODE)
}

/// Replaces `folder/name` in one step: written beside it, synced, renamed, folder synced. On
/// failure the old file stands and nothing is left beside it.
fn write_atomically(folder: &Path, name: &str, bytes: &[u8], mode: u32) -> Result<(), FilesError> {
    let path = folder.join(name);
    let beside = folder.join(format!(".{name}.{}.new", std::process::id()));
    let replace = || {
        write_new(&beside, bytes, mode)?;
        fs::rename(&beside, &path)?;
        File::open(folder)?.sync_all()
    };
    replace().map_err(|source| {
        // The cause is reported; a second failure while cleaning up would only hide it.
        let _ = fs::remove_file(&beside);
        FilesError::Write { path: path.clone(), source }
    })
}

/// Writes and syncs a file that must not exist yet, with exactly `mode` from its birth on.
pub(crate) fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let open = || OpenOptions::new().write(true).create_new(true).mode(mode & KEY_MODE).open(path);
    let mut file = match open() {
        // Left by a process with our id that was killed half-way.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_file(path)?;
            open()?
        }
        other => other?,
    };
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    file.sync_all()
}
