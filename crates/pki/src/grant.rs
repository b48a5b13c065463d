//! The grant: the controller's signed order that one VM may move from one host to one other.
//!
//! An agent does not take the sender's word for a migration: the peer that calls it shows a grant,
//! and the agent compares the grant's [`Claims`] with the request. This module checks who signed
//! and when; it does not know what the ids mean, and keeps no list of used grants (the migration
//! id and epoch make a second use the same migration).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::UnixTime;
use serde::{Deserialize, Serialize};

use crate::certificate::{Certificate, CertificateError, unix_seconds};
use crate::identity::{IdentityError, Peer};
use crate::key::KeyError;
use crate::tls::{self, Credentials};

/// How long a grant is good for unless told otherwise, in seconds. Long enough that clocks which
/// differ by an hour do not matter: what binds a grant is its ids, not its hours.
pub const GRANT_LIFETIME_SECONDS: u64 = 4 * 60 * 60;
/// How far a grant's validity begins in the past, in seconds.
pub const GRANT_BACKDATE_SECONDS: u64 = 2 * 60 * 60;
/// Longest claims that are read, in bytes.
pub const MAX_CLAIMS_BYTES: usize = 4096;

const MAX_SIGNATURE_CHARS: usize = 128;
const CONTEXT: &[u8] = b"whimbrel migration grant 1\0";

/// What is granted. Ids and names are text here; the caller compares them with its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    /// The VM's id.
    pub vm: String,
    /// The migration's id.
    pub migration: String,
    /// The host that gives the VM away.
    pub source: String,
    /// The host that receives it.
    pub destination: String,
    /// The ownership epoch that the source holds at the start.
    pub epoch: u64,
    /// First second of validity, Unix time.
    pub not_before: u64,
    /// First second after validity, Unix time.
    pub expires: u64,
}

impl Claims {
    /// The usual window of a grant made at `now`: `(not_before, expires)`, Unix time.
    pub fn window(now: SystemTime) -> (u64, u64) {
        let now = unix_seconds(now).unsigned_abs();
        (now.saturating_sub(GRANT_BACKDATE_SECONDS), now + GRANT_LIFETIME_SECONDS)
    }
}

/// Claims with the controller's signature and certificate, as they travel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedGrant {
    /// The claims as JSON text: exactly what was signed.
    claims: String,
    /// ECDSA P-256 with SHA-256 over the claims, ASN.1, base64.
    signature: String,
    /// The controller's client certificate, PEM.
    certificate: String,
}

/// Why a grant could not be signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The claims could not be written as JSON.
    #[error("cannot encode the grant's claims")]
    Encode(#[source] serde_json::Error),
    /// The claims are longer than [`MAX_CLAIMS_BYTES`].
    #[error("the grant's claims have {0} bytes, more than {MAX_CLAIMS_BYTES}")]
    TooLong(usize),
    /// The key did not sign.
    #[error("cannot sign the grant")]
    Sign(#[source] KeyError),
}

/// Why a grant is not accepted. Every one is a refusal: nothing was begun.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// Too long, not base64, or the claims are not what they should be.
    #[error("the grant is malformed: {what}")]
    Malformed {
        /// Which part.
        what: &'static str,
    },
    /// The signer's certificate cannot be read.
    #[error("the grant's certificate cannot be read")]
    Certificate(#[source] CertificateError),
    /// The signer's certificate was not issued by this pool's authority.
    #[error("the grant was signed in another pool, or by nobody known")]
    Foreign(#[source] rustls::Error),
    /// The signer's certificate is not valid now.
    #[error("the certificate that signed the grant has expired or is not valid yet")]
    SignerExpired(#[source] rustls::Error),
    /// The signer's certificate is one for servers, which do not grant.
    #[error("the grant was signed with a certificate that is not meant for granting")]
    SignerPurpose(#[source] rustls::Error),
    /// The signer's certificate names nobody of a pool.
    #[error("the grant's certificate names nobody of a pool")]
    Nobody(#[source] IdentityError),
    /// Somebody of the pool signed who may not.
    #[error("the grant was signed by {0}; only the controller grants")]
    NotController(Peer),
    /// The signature does not belong to the claims.
    #[error("the grant's signature does not match its claims")]
    Forged,
    /// The window has not begun.
    #[error(
        "the grant is valid in {seconds} s only; compare this host's clock with the controller's"
    )]
    NotYetValid {
        /// Seconds until it begins.
        seconds: u64,
    },
    /// The window is over.
    #[error("the grant expired {seconds} s ago; ask for the migration again")]
    Expired {
        /// Seconds since it ended.
        seconds: u64,
    },
}

impl GrantError {
    /// The stable code of this refusal.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed { .. } | Self::Certificate(_) => "grant-malformed",
            Self::Foreign(_) => "grant-foreign",
            Self::SignerExpired(_) => "grant-signer-expired",
            Self::SignerPurpose(_) | Self::Nobody(_) | Self::NotController(_) => {
                "grant-not-from-controller"
            }
            Self::Forged => "grant-forged",
            Self::NotYetValid { .. } => "grant-not-yet-valid",
            Self::Expired { .. } => "grant-expired",
        }
    }
}

impl SignedGrant {
    /// Signs `claims` with the controller's *client* credentials
    /// ([`crate::files::ControllerIdentity::client`]).
    pub fn sign(claims: &Claims, controller: &Credentials) -> Result<Self, SignError> {
        let claims = serde_json::to_string(claims).map_err(SignError::Encode)?;
        if claims.len() > MAX_CLAIMS_BYTES {
            return Err(SignError::TooLong(claims.len()));
        }
        let signature = controller.key.sign(&signed_bytes(&claims)).map_err(SignError::Sign)?;
        Ok(Self {
            claims,
            signature: STANDARD.encode(signature),
            certificate: controller.certificate.to_pem(),
        })
    }

    /// Checks that this pool's controller signed, that the certificate and the grant are valid at
    /// `now`, and returns the claims, which the caller compares with what it was asked to do.
    pub fn verify(&self, ca: &Certificate, now: SystemTime) -> Result<Claims, GrantError> {
        if self.claims.len() > MAX_CLAIMS_BYTES {
            return Err(GrantError::Malformed { what: "claims too long" });
        }
        if self.signature.len() > MAX_SIGNATURE_CHARS {
            return Err(GrantError::Malformed { what: "signature too long" });
        }
        let signature = STANDARD
            .decode(&self.signature)
            .map_err(|_| GrantError::Malformed { what: "signature is not base64" })?;
        let signer = Certificate::from_pem(&self.certificate).map_err(GrantError::Certificate)?;
        verify_signer(&signer, ca, now)?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, signer.public_point())
            .verify(&signed_bytes(&self.claims), &signature)
            .map_err(|_| GrantError::Forged)?;
        let claims: Claims = serde_json::from_str(&self.claims)
            .map_err(|_| GrantError::Malformed { what: "claims are not those of a grant" })?;
        check_window(&claims, now)?;
        Ok(claims)
    }
}

fn verify_signer(
    signer: &Certificate,
    ca: &Certificate,
    now: SystemTime,
) -> Result<(), GrantError> {
    let anchors = tls::anchors(ca).map_err(GrantError::Foreign)?;
    let since = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    WebPkiClientVerifier::builder_with_provider(anchors.into(), tls::provider())
        .build()
        .map_err(|error| GrantError::Foreign(rustls::Error::General(error.to_string())))?
        .verify_client_cert(signer.der(), &[], UnixTime::since_unix_epoch(since))
        .map_err(|error| match error {
            rustls::Error::InvalidCertificate(
                rustls::CertificateError::Expired
                | rustls::CertificateError::ExpiredContext { .. }
                | rustls::CertificateError::NotValidYet
                | rustls::CertificateError::NotValidYetContext { .. },
            ) => GrantError::SignerExpired(error),
            rustls::Error::InvalidCertificate(
                rustls::CertificateError::InvalidPurpose
                | rustls::CertificateError::InvalidPurposeContext { .. },
            ) => GrantError::SignerPurpose(error),
            other => GrantError::Foreign(other),
        })?;
    match signer.peer().map_err(GrantError::Nobody)? {
        Peer::Controller => Ok(()),
        other => Err(GrantError::NotController(other)),
    }
}

fn check_window(claims: &Claims, now: SystemTime) -> Result<(), GrantError> {
    let now = u64::try_from(unix_seconds(now)).unwrap_or(0);
    if now < claims.not_before {
        Err(GrantError::NotYetValid { seconds: claims.not_before - now })
    } else if now >= claims.expires {
        Err(GrantError::Expired { seconds: now - claims.expires })
    } else {
        Ok(())
    }
}

/// The context keeps a signature made for another purpose from ever being a grant.
fn signed_bytes(claims: &str) -> Vec<u8> {
    [CONTEXT, claims.as_bytes()].concat()
}
