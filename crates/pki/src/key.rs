//! Key pairs (ECDSA P-256) and the public halves that the authority certifies.
//!
//! Private keys are made where they are used and never leave that host; what travels is a
//! certificate signing request, of which the authority uses the public key alone. Called by
//! [`crate::authority`], [`crate::files`] and [`crate::grant`].

use std::fmt;
use std::sync::Arc;

use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, KeyPair,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, SigningKey, SubjectPublicKeyInfo,
};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::certificate::{Fingerprint, sha256};

/// Longest signing request that is read, in bytes; ours are about 350.
pub const MAX_REQUEST_BYTES: usize = 4096;

/// Why a key or a signing request could not be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The key pair could not be generated.
    #[error("cannot generate an ECDSA P-256 key")]
    Generate(#[source] rcgen::Error),
    /// The PEM text is no ECDSA P-256 key in PKCS#8.
    #[error("not an ECDSA P-256 private key in PKCS#8 PEM")]
    Parse(#[source] rcgen::Error),
    /// The public half could not be encoded.
    #[error("cannot encode the public key")]
    Encode(#[source] rcgen::Error),
    /// The signing request could not be made.
    #[error("cannot make a certificate signing request")]
    Request(#[source] rcgen::Error),
    /// The signing request is longer than [`MAX_REQUEST_BYTES`].
    #[error("the certificate signing request has {0} bytes, more than {MAX_REQUEST_BYTES}")]
    RequestTooLong(usize),
    /// The signing request is unreadable, or not signed by the key that it carries.
    #[error("the certificate signing request is damaged or not signed by its own key")]
    BadRequest(#[source] rcgen::Error),
    /// The signing request carries another kind of key.
    #[error("the certificate signing request carries a key that is not ECDSA P-256")]
    RequestAlgorithm,
    /// Signing failed.
    #[error("cannot sign")]
    Sign(#[source] rcgen::Error),
}

/// A private key. Its `Debug` form shows nothing of it.
#[derive(Clone)]
pub struct PrivateKey(Arc<KeyPair>);

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(…)")
    }
}

impl PrivateKey {
    /// Makes a new key from the system's randomness.
    pub fn generate() -> Result<Self, KeyError> {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(KeyError::Generate)?;
        Ok(Self(Arc::new(pair)))
    }

    /// Reads a PKCS#8 PEM key, as [`PrivateKey::to_pem`] writes it.
    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        let pair = KeyPair::from_pkcs8_pem_and_sign_algo(pem, &PKCS_ECDSA_P256_SHA256)
            .map_err(KeyError::Parse)?;
        Ok(Self(Arc::new(pair)))
    }

    /// The key as PKCS#8 PEM: a secret, for a 0600 file only.
    pub fn to_pem(&self) -> String {
        self.0.serialize_pem()
    }

    /// The public half, as the authority certifies it.
    pub fn subject(&self) -> Result<SubjectKey, KeyError> {
        SubjectPublicKeyInfo::from_der(&self.0.subject_public_key_info())
            .map(SubjectKey)
            .map_err(KeyError::Encode)
    }

    /// A certificate signing request in PEM. It names nobody: names are the authority's to give.
    pub fn request_pem(&self) -> Result<String, KeyError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .serialize_request(&*self.0)
            .and_then(|request| request.pem())
            .map_err(KeyError::Request)
    }

    /// Signs `message` (ECDSA P-256, SHA-256, ASN.1 form).
    pub(crate) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        self.0.sign(message).map_err(KeyError::Sign)
    }

    pub(crate) fn pair(&self) -> &KeyPair {
        &self.0
    }

    pub(crate) fn to_der(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.0.serialize_der()).into()
    }

    /// The raw public point, as it stands in a certificate.
    pub(crate) fn public_point(&self) -> &[u8] {
        self.0.der_bytes()
    }
}

/// A public key that is to be certified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubjectKey(SubjectPublicKeyInfo);

impl SubjectKey {
    /// Takes the public key out of a signing request, whose own signature is checked; every name
    /// and extension that the request asks for is ignored.
    pub fn from_request_pem(pem: &str) -> Result<Self, KeyError> {
        if pem.len() > MAX_REQUEST_BYTES {
            return Err(KeyError::RequestTooLong(pem.len()));
        }
        let request =
            CertificateSigningRequestParams::from_pem(pem).map_err(KeyError::BadRequest)?;
        if request.public_key.algorithm() != &PKCS_ECDSA_P256_SHA256 {
            return Err(KeyError::RequestAlgorithm);
        }
        SubjectPublicKeyInfo::from_der(&request.public_key.subject_public_key_info())
            .map(SubjectKey)
            .map_err(KeyError::Encode)
    }

    /// SHA-256 over the public key: tells whether two requests come from the same holder.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint(sha256(&[self.0.der_bytes()]))
    }

    pub(crate) fn info(&self) -> &SubjectPublicKeyInfo {
        &self.0
    }
}
