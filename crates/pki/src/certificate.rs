//! A certificate as the pool uses it: DER, its dates, its fingerprint and its PEM form.
//!
//! Parsing here trusts nothing: that a certificate was issued by the pool is checked by
//! [`crate::tls`] and [`crate::grant`].

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::{self, PemObject as _};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{self, IdentityError, Peer};

/// Longest certificate that is read, in bytes of PEM; ours are about 800.
pub const MAX_CERTIFICATE_BYTES: usize = 16 * 1024;

/// A certificate is to be renewed when less than one part of so many is left of its lifetime.
pub const RENEWAL_PARTS: i64 = 3;

const SECONDS_PER_DAY: i64 = 24 * 60 * 60;
const PEM_LINE_CHARS: usize = 64;

/// Why a text or byte string is no usable certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// Longer than [`MAX_CERTIFICATE_BYTES`].
    #[error("the certificate has {0} bytes, more than {MAX_CERTIFICATE_BYTES}")]
    TooLong(usize),
    /// Not PEM, or no certificate in it.
    #[error("not a certificate in PEM")]
    Pem(#[source] pem::Error),
    /// More than one certificate in the text.
    #[error("more than one certificate where one is expected")]
    Several,
    /// Not an X.509 certificate, or followed by other bytes.
    #[error("not an X.509 certificate")]
    Malformed,
}

/// One X.509 certificate.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate {
    der: CertificateDer<'static>,
    not_before_unix: i64,
    not_after_unix: i64,
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Certificate({})", self.fingerprint())
    }
}

impl Certificate {
    /// Parses one certificate from DER.
    pub fn from_der(der: CertificateDer<'static>) -> Result<Self, CertificateError> {
        if der.len() > MAX_CERTIFICATE_BYTES {
            return Err(CertificateError::TooLong(der.len()));
        }
        let (not_before_unix, not_after_unix) = match X509Certificate::from_der(&der) {
            Ok(([], parsed)) => {
                let validity = parsed.validity();
                (validity.not_before.timestamp(), validity.not_after.timestamp())
            }
            _ => return Err(CertificateError::Malformed),
        };
        Ok(Self { der, not_before_unix, not_after_unix })
    }

    /// Parses a text with exactly one PEM certificate.
    pub fn from_pem(text: &str) -> Result<Self, CertificateError> {
        if text.len() > MAX_CERTIFICATE_BYTES {
            return Err(CertificateError::TooLong(text.len()));
        }
        let mut found = CertificateDer::pem_slice_iter(text.as_bytes());
        let first =
            found.next().unwrap_or(Err(pem::Error::NoItemsFound)).map_err(CertificateError::Pem)?;
        match found.next() {
            None => Self::from_der(first.into_owned()),
            Some(_) => Err(CertificateError::Several),
        }
    }

    /// The certificate as PEM.
    pub fn to_pem(&self) -> String {
        let body = STANDARD.encode(&self.der);
        let mut text = String::with_capacity(body.len() + body.len() / PEM_LINE_CHARS + 64);
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let mut rest = body.as_str();
        while !rest.is_empty() {
            let (line, tail) = rest.split_at(rest.len().min(PEM_LINE_CHARS));
            text.push_str(line);
            text.push('\n');
            rest = tail;
        }
        text.push_str("-----END CERTIFICATE-----\n");
        text
    }

    /// The certificate as DER.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// SHA-256 over the DER form.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.der)
    }

    /// Who the certificate was issued to; see [`identity::peer_of`].
    pub fn peer(&self) -> Result<Peer, IdentityError> {
        identity::peer_of(&self.der)
    }

    /// First second of validity.
    pub fn not_before(&self) -> SystemTime {
        at_unix(self.not_before_unix)
    }

    /// Last second of validity.
    pub fn not_after(&self) -> SystemTime {
        at_unix(self.not_after_unix)
    }

    /// Whole days of validity left at `now`; negative once expired.
    pub fn days_left(&self, now: SystemTime) -> i64 {
        (self.not_after_unix - unix_seconds(now)).div_euclid(SECONDS_PER_DAY)
    }

    /// Whether it is over at `now`.
    pub fn is_expired(&self, now: SystemTime) -> bool {
        unix_seconds(now) > self.not_after_unix
    }

    /// Whether so little is left at `now` that it is time for a new one; see [`RENEWAL_PARTS`].
    pub fn is_renewal_due(&self, now: SystemTime) -> bool {
        let lifetime = self.not_after_unix.saturating_sub(self.not_before_unix);
        let left = self.not_after_unix.saturating_sub(unix_seconds(now));
        left.saturating_mul(RENEWAL_PARTS) < lifetime
    }

    /// The public point that the certificate certifies.
    pub(crate) fn public_point(&self) -> Vec<u8> {
        X509Certificate::from_der(&self.der)
            .map(|(_, parsed)| parsed.public_key().subject_public_key.data.to_vec())
            .unwrap_or_default()
    }
}

/// Seconds since 1970 of a clock reading, negative before.
pub(crate) fn unix_seconds(time: SystemTime) -> i64 {
    let seconds = |d: Duration| i64::try_from(d.as_secs()).unwrap_or(i64::MAX);
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => seconds(since),
        Err(before) => -seconds(before.duration()),
    }
}

fn at_unix(seconds: i64) -> SystemTime {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    if seconds >= 0 { UNIX_EPOCH + distance } else { UNIX_EPOCH - distance }
}

/// SHA-256 of a certificate's DER form.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub(crate) [u8; Fingerprint::BYTES]);

impl Fingerprint {
    /// Length in bytes.
    pub const BYTES: usize = 32;

    /// The fingerprint of a certificate in DER.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(sha256(&[certificate]))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not 64 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not 64 hexadecimal digits")]
pub struct HexError;

impl FromStr for Fingerprint {
    type Err = HexError;

    fn from_str(text: &str) -> Result<Self, HexError> {
        parse_hex(text).map(Self)
    }
}

/// Reads 32 bytes from 64 hexadecimal digits.
pub(crate) fn parse_hex(text: &str) -> Result<[u8; 32], HexError> {
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(HexError);
    }
    let mut bytes = [0; 32];
    for (index, byte) in bytes.iter_mut().enumerate() {
        let pair = &text[2 * index..2 * index + 2];
        *byte = u8::from_str_radix(pair, 16).map_err(|_| HexError)?;
    }
    Ok(bytes)
}

/// SHA-256 over the concatenation of `parts`.
pub(crate) fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    parts.iter().for_each(|part| context.update(part));
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}
