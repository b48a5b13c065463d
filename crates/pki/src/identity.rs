//! The names in certificates, and what a peer's verified certificate says about who it is.
//!
//! | certificate | its one name (SAN) |
//! |---|---|
//! | agent of `host-a` (server and client) | `host-a.agent.whimbrel` |
//! | QEMU of `host-a` (server and client) | `host-a.qemu.whimbrel` |
//! | controller | `controller.whimbrel` |
//! | operator `ann` | `ann.operator.whimbrel` |
//! | monitor `prometheus` | `prometheus.monitor.whimbrel` |
//!
//! The role is the suffix. This module does not check chains or dates ([`crate::tls`] does) and
//! does not say what a peer may do (callers do).

use std::fmt;

use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The controller's name in its certificates.
pub const CONTROLLER_DNS_NAME: &str = "controller.whimbrel";

/// Longest name of a host, an operator or a monitor, in characters (one DNS label).
pub const MAX_NAME_CHARS: usize = 63;

const AGENT_SUFFIX: &str = ".agent.whimbrel";
const QEMU_SUFFIX: &str = ".qemu.whimbrel";
const OPERATOR_SUFFIX: &str = ".operator.whimbrel";
const MONITOR_SUFFIX: &str = ".monitor.whimbrel";

/// The name in a host's agent certificates.
pub fn agent_dns_name(host: &str) -> String {
    format!("{host}{AGENT_SUFFIX}")
}

/// The name in a host's QEMU certificates; QEMU's `tls-hostname`.
pub fn qemu_dns_name(host: &str) -> String {
    format!("{host}{QEMU_SUFFIX}")
}

/// The subject of a host's QEMU certificates, as QEMU's `tls-authz` sees it: `CN=<host>`.
pub fn qemu_subject(host: &str) -> String {
    format!("CN={host}")
}

/// A text that is no name of a host, an operator or a monitor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name:?} is not a name: 1 to {MAX_NAME_CHARS} of a-z, 0-9 and '-', not starting or ending with '-'"
)]
pub struct NameError {
    /// The text, shortened.
    pub name: String,
}

/// Checks that `name` is `[a-z0-9-]{1,63}` and neither starts nor ends with '-'.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let good = (1..=MAX_NAME_CHARS).contains(&name.len())
        && name.bytes().all(plain)
        && !name.starts_with('-')
        && !name.ends_with('-');
    if good {
        Ok(())
    } else {
        Err(NameError { name: name.chars().take(MAX_NAME_CHARS + 1).collect() })
    }
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// The agent of this host.
    Agent(String),
    /// The pool's controller.
    Controller,
    /// A person at the command line or console.
    Operator(String),
    /// A program that reads metrics, and may nothing else.
    Monitor(String),
    /// The QEMU processes of this host. Never admitted by [`crate::door`].
    Qemu(String),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent(host) => write!(f, "the agent of {host}"),
            Self::Controller => f.write_str("the controller"),
            Self::Operator(name) => write!(f, "operator {name}"),
            Self::Monitor(name) => write!(f, "monitor {name}"),
            Self::Qemu(host) => write!(f, "QEMU of {host}"),
        }
    }
}

impl Peer {
    /// The name that this peer's certificates carry.
    pub fn dns_name(&self) -> String {
        match self {
            Self::Agent(host) => agent_dns_name(host),
            Self::Controller => CONTROLLER_DNS_NAME.to_owned(),
            Self::Operator(name) => format!("{name}{OPERATOR_SUFFIX}"),
            Self::Monitor(name) => format!("{name}{MONITOR_SUFFIX}"),
            Self::Qemu(host) => qemu_dns_name(host),
        }
    }

    /// Reads a certificate's name, the reverse of [`Peer::dns_name`].
    pub fn from_dns_name(dns_name: &str) -> Result<Self, IdentityError> {
        let unknown = || IdentityError::UnknownName { name: shown(dns_name) };
        if dns_name == CONTROLLER_DNS_NAME {
            return Ok(Self::Controller);
        }
        for (suffix, peer) in [
            (AGENT_SUFFIX, Self::Agent as fn(String) -> Self),
            (QEMU_SUFFIX, Self::Qemu),
            (OPERATOR_SUFFIX, Self::Operator),
            (MONITOR_SUFFIX, Self::Monitor),
        ] {
            if let Some(name) = dns_name.strip_suffix(suffix) {
                check_name(name).map_err(|_| unknown())?;
                return Ok(peer(name.to_owned()));
            }
        }
        Err(unknown())
    }
}

/// Why a certificate does not say who its holder is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The certificate cannot be parsed.
    #[error("the certificate is unreadable")]
    Unreadable,
    /// The certificate has no subject alternative name.
    #[error("the certificate carries no name")]
    NoName,
    /// The certificate has more than the one name that the authority gives.
    #[error("the certificate carries {count} names instead of one")]
    SeveralNames {
        /// How many.
        count: usize,
    },
    /// The only name is of no role of the pool.
    #[error("the certificate's name {name:?} has no role in a pool")]
    UnknownName {
        /// The name, shortened.
        name: String,
    },
    /// QEMU's certificate was shown where only agents, the controller, operators and monitors are heard.
    #[error("the certificate belongs to {0}, which may only speak to another QEMU")]
    QemuAtDoor(Peer),
    /// The certificate is of somebody who was not expected at this port.
    #[error("{0} is not who was expected here")]
    NotHeard(Peer),
}

/// Reads who the holder of a certificate is. The caller has verified the certificate.
///
/// Fails unless the certificate carries exactly one subject alternative name, of DNS type, that
/// [`Peer::from_dns_name`] knows.
pub fn peer_of(certificate: &CertificateDer<'_>) -> Result<Peer, IdentityError> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|_| IdentityError::Unreadable)?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|_| IdentityError::Unreadable)?
        .ok_or(IdentityError::NoName)?;
    match names.value.general_names.as_slice() {
        [] => Err(IdentityError::NoName),
        [GeneralName::DNSName(name)] => Peer::from_dns_name(name),
        [other] => Err(IdentityError::UnknownName { name: shown(&other.to_string()) }),
        several => Err(IdentityError::SeveralNames { count: several.len() }),
    }
}

/// A foreign text for a message: bounded, without control characters.
fn shown(text: &str) -> String {
    text.chars().take(MAX_NAME_CHARS * 2).map(|c| if c.is_control() { '?' } else { c }).collect()
}
