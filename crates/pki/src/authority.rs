//! The pool's certificate authority: made once by `pool init`, held by the controller's host.
//!
//! It decides every name: a certificate's role comes from [`Role`], never from the request. It
//! keeps no list of what it issued (there is no revocation list; certificates live one year).
//! Called by the controller and by the lab.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyUsagePurpose, SanType, SerialNumber,
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::certificate::{Certificate, CertificateError};
use crate::files::{self, FilesError};
use crate::identity::{self, NameError, Peer};
use crate::key::{KeyError, PrivateKey, SubjectKey};

/// How long a new authority is valid, in days.
pub const AUTHORITY_DAYS: u64 = 3653;
/// How long a new certificate is valid, in days.
pub const CERTIFICATE_DAYS: u64 = 365;
/// How far a certificate's validity begins in the past, in seconds, so that hosts whose clocks
/// differ by an hour can use it at once.
pub const BACKDATE_SECONDS: u64 = 2 * 60 * 60;

const SECONDS_PER_DAY: u64 = 24 * 60 * 60;
const SERIAL_BYTES: usize = 16;
const POOL_TAG_BYTES: usize = 4;

/// What a certificate is for: who holds it and at which end of a connection it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role<'a> {
    /// A host's agent, accepting connections.
    AgentServer(&'a str),
    /// A host's agent, calling the controller or another agent.
    AgentClient(&'a str),
    /// A host's QEMU, receiving a migration or a disk copy.
    QemuServer(&'a str),
    /// A host's QEMU, sending a migration or a disk copy.
    QemuClient(&'a str),
    /// The controller, accepting connections.
    ControllerServer,
    /// The controller, calling agents; also signs grants.
    ControllerClient,
    /// An operator's command line.
    Operator(&'a str),
    /// A program that reads metrics.
    Monitor(&'a str),
}

impl Role<'_> {
    /// Who holds the certificate.
    pub fn peer(self) -> Peer {
        match self {
            Self::AgentServer(host) | Self::AgentClient(host) => Peer::Agent(host.to_owned()),
            Self::QemuServer(host) | Self::QemuClient(host) => Peer::Qemu(host.to_owned()),
            Self::ControllerServer | Self::ControllerClient => Peer::Controller,
            Self::Operator(name) => Peer::Operator(name.to_owned()),
            Self::Monitor(name) => Peer::Monitor(name.to_owned()),
        }
    }

    /// The certificate's subject. QEMU compares the whole subject with `tls-authz`, so a QEMU
    /// certificate's is exactly `CN=<host>`.
    fn common_name(self) -> String {
        match self {
            Self::QemuServer(host) | Self::QemuClient(host) => host.to_owned(),
            other => other.peer().dns_name(),
        }
    }

    fn usage(self) -> ExtendedKeyUsagePurpose {
        match self {
            Self::AgentServer(_) | Self::QemuServer(_) | Self::ControllerServer => {
                ExtendedKeyUsagePurpose::ServerAuth
            }
            Self::AgentClient(_)
            | Self::QemuClient(_)
            | Self::ControllerClient
            | Self::Operator(_)
            | Self::Monitor(_) => ExtendedKeyUsagePurpose::ClientAuth,
        }
    }

    fn check(self) -> Result<(), NameError> {
        match self {
            Self::AgentServer(name)
            | Self::AgentClient(name)
            | Self::QemuServer(name)
            | Self::QemuClient(name)
            | Self::Operator(name)
            | Self::Monitor(name) => identity::check_name(name),
            Self::ControllerServer | Self::ControllerClient => Ok(()),
        }
    }
}

/// From when to when a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// First moment.
    pub not_before: SystemTime,
    /// Last moment.
    pub not_after: SystemTime,
}

impl Validity {
    /// From [`BACKDATE_SECONDS`] before `now` to `days` after it.
    pub fn days_from(now: SystemTime, days: u64) -> Self {
        Self {
            not_before: now
                .checked_sub(Duration::from_secs(BACKDATE_SECONDS))
                .unwrap_or(UNIX_EPOCH),
            not_after: now + Duration::from_secs(days * SECONDS_PER_DAY),
        }
    }
}

/// Why the authority could not be made, read, saved, or could not issue.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A key could not be made or used.
    #[error("the authority's key or a request's key cannot be used")]
    Key(#[from] KeyError),
    /// A name is not allowed.
    #[error("the authority refuses the name")]
    Name(#[from] NameError),
    /// The certificate could not be signed.
    #[error("cannot sign a certificate")]
    Sign(#[source] rcgen::Error),
    /// A certificate that was read or made is unusable.
    #[error("the authority's certificate cannot be used")]
    Certificate(#[from] CertificateError),
    /// The authority's key belongs to another certificate.
    #[error("the authority's key does not belong to its certificate")]
    Mismatch,
    /// A file could not be read or written.
    #[error("the authority's files cannot be used")]
    Files(#[from] FilesError),
    /// The system gave no random bytes.
    #[error("no random bytes from the system")]
    Random,
}

/// The certificates that a joining host receives, in PEM: what travels in the join answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostCertificates {
    /// The pool's authority.
    pub ca: String,
    /// For the agent's door.
    pub agent_server: String,
    /// For the agent's calls.
    pub agent_client: String,
    /// For QEMU when it receives.
    pub qemu_server: String,
    /// For QEMU when it sends.
    pub qemu_client: String,
}

/// The pool's certificate authority with its private key.
#[derive(Clone, Debug)]
pub struct Authority {
    certificate: Certificate,
    key: PrivateKey,
}

impl Authority {
    /// Makes a new authority, valid for [`AUTHORITY_DAYS`].
    ///
    /// Its subject carries a random tag: two pools then never share a subject, and a certificate
    /// of the other pool is reported as issued by an unknown authority, not as badly signed.
    pub fn create() -> Result<Self, AuthorityError> {
        let key = PrivateKey::generate()?;
        let tag: String =
            random_bytes::<POOL_TAG_BYTES>()?.iter().map(|b| format!("{b:02x}")).collect();
        let validity = Validity::days_from(SystemTime::now(), AUTHORITY_DAYS);
        let mut params = parameters(&format!("whimbrel pool {tag}"), validity)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let made = params.self_signed(key.pair()).map_err(AuthorityError::Sign)?;
        Ok(Self { certificate: Certificate::from_der(made.der().clone())?, key })
    }

    /// Writes `ca.pem` and `ca.key` (0600) into `folder`, which is made if missing.
    ///
    /// Each file is replaced atomically; the key first, so that a certificate on disk always has
    /// its key beside it.
    pub fn save(&self, folder: &Path) -> Result<(), AuthorityError> {
        files::ensure_folder(folder)?;
        files::write_key(folder, files::CA_KEY, &self.key)?;
        files::write_certificate(folder, files::CA_CERTIFICATE, &self.certificate)?;
        Ok(())
    }

    /// Reads what [`Authority::save`] wrote.
    pub fn load(folder: &Path) -> Result<Self, AuthorityError> {
        let certificate = files::read_certificate(folder, files::CA_CERTIFICATE)?;
        let key = files::read_key(folder, files::CA_KEY)?;
        if certificate.public_point() != key.public_point() {
            return Err(AuthorityError::Mismatch);
        }
        Ok(Self { certificate, key })
    }

    /// The authority's own certificate: what everyone in the pool trusts.
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// Issues a certificate valid for [`CERTIFICATE_DAYS`] from now.
    pub fn issue(&self, role: Role<'_>, key: &SubjectKey) -> Result<Certificate, AuthorityError> {
        self.issue_within(role, key, Validity::days_from(SystemTime::now(), CERTIFICATE_DAYS))
    }

    /// Issues a certificate with a chosen validity, cut at the authority's own end.
    pub fn issue_within(
        &self,
        role: Role<'_>,
        key: &SubjectKey,
        validity: Validity,
    ) -> Result<Certificate, AuthorityError> {
        role.check()?;
        let not_after = validity.not_after.min(self.certificate.not_after());
        let mut params = parameters(&role.common_name(), Validity { not_after, ..validity })?;
        let name = role.peer().dns_name();
        params.subject_alt_names =
            vec![SanType::DnsName(name.try_into().map_err(AuthorityError::Sign)?)];
        params.is_ca = IsCa::ExplicitNoCa;
        // QEMU 10.0.2 refuses credentials without keyEncipherment, though an ECDSA key enciphers
        // nothing; 7.2.22 takes them either way.
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![role.usage()];
        params.use_authority_key_identifier_extension = true;
        let issuer = Issuer::from_ca_cert_der(self.certificate.der(), self.key.pair())
            .map_err(AuthorityError::Sign)?;
        let made = params.signed_by(key.info(), &issuer).map_err(AuthorityError::Sign)?;
        Ok(Certificate::from_der(made.der().clone())?)
    }

    /// Issues all certificates of a joining host from its two signing requests.
    pub fn issue_host(
        &self,
        host: &str,
        agent_request_pem: &str,
        qemu_request_pem: &str,
    ) -> Result<HostCertificates, AuthorityError> {
        let validity = Validity::days_from(SystemTime::now(), CERTIFICATE_DAYS);
        self.issue_host_within(host, agent_request_pem, qemu_request_pem, validity)
    }

    /// The same with a chosen validity.
    pub fn issue_host_within(
        &self,
        host: &str,
        agent_request_pem: &str,
        qemu_request_pem: &str,
        validity: Validity,
    ) -> Result<HostCertificates, AuthorityError> {
        let agent = SubjectKey::from_request_pem(agent_request_pem)?;
        let qemu = SubjectKey::from_request_pem(qemu_request_pem)?;
        let issue = |role, key| self.issue_within(role, key, validity).map(|made| made.to_pem());
        Ok(HostCertificates {
            ca: self.certificate.to_pem(),
            agent_server: issue(Role::AgentServer(host), &agent)?,
            agent_client: issue(Role::AgentClient(host), &agent)?,
            qemu_server: issue(Role::QemuServer(host), &qemu)?,
            qemu_client: issue(Role::QemuClient(host), &qemu)?,
        })
    }
}

fn parameters(common_name: &str, validity: Validity) -> Result<CertificateParams, AuthorityError> {
    let mut serial = random_bytes::<SERIAL_BYTES>()?;
    // A serial number is a positive integer: no sign bit, no leading zero.
    serial[0] = (serial[0] & 0x7f) | 0x40;
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = OffsetDateTime::from(validity.not_before);
    params.not_after = OffsetDateTime::from(validity.not_after);
    Ok(params)
}

fn random_bytes<const N: usize>() -> Result<[u8; N], AuthorityError> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| AuthorityError::Random)?;
    Ok(bytes)
}
