//! rustls configurations for the pool: TLS 1.3 only, both sides show certificates of the pool's
//! authority, no session resumption.
//!
//! No resumption, because a resumed session would outlive the certificates that it was made with;
//! a full handshake costs about a millisecond. What goes wrong in a handshake is put into words by
//! [`crate::trouble`].

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore,
    SignatureScheme,
};
pub use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::certificate::{Certificate, Fingerprint};
use crate::identity::{self, IdentityError, Peer};
use crate::key::PrivateKey;

/// What one side shows in a handshake, and whom it trusts.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// The pool's authority: the only one trusted.
    pub ca: Certificate,
    /// The certificate that is shown.
    pub certificate: Certificate,
    /// Its key.
    pub key: PrivateKey,
}

/// Why no TLS configuration could be made; each means unusable credentials.
#[derive(Debug, thiserror::Error)]
pub enum TlsConfigError {
    /// The authority's certificate cannot be a trust anchor.
    #[error("the pool authority's certificate cannot be trusted")]
    Anchor(#[source] rustls::Error),
    /// The verifier could not be built.
    #[error("cannot build the verifier of certificates")]
    Verifier(#[source] VerifierBuilderError),
    /// The certificate and key are not accepted, or there is no TLS 1.3.
    #[error("the own certificate and key cannot be used for TLS")]
    Own(#[source] rustls::Error),
}

/// For a door that hears only holders of the pool's client certificates (of agents, the
/// controller, operators and monitors; not of QEMU).
pub fn server_config(own: &Credentials) -> Result<Arc<ServerConfig>, TlsConfigError> {
    server(own, Anonymous::Refused, Heard::Speakers, vec![own.certificate.der().clone()])
}

/// For the controller's door where hosts join: a client without certificate is let in as `None`
/// (whoever shows one is held to the rules of [`server_config`]). The authority's certificate is
/// sent along, because a joining host knows only its fingerprint.
pub fn join_server_config(own: &Credentials) -> Result<Arc<ServerConfig>, TlsConfigError> {
    let chain = vec![own.certificate.der().clone(), own.ca.der().clone()];
    server(own, Anonymous::Admitted, Heard::Speakers, chain)
}

/// For a port on which QEMU will listen, tried beforehand: hears only the QEMU of host `from`, as QEMU's own `tls-authz`
/// will.
pub fn qemu_server_config(
    own: &Credentials,
    from: &str,
) -> Result<Arc<ServerConfig>, TlsConfigError> {
    let heard = Heard::QemuOf(from.to_owned());
    server(own, Anonymous::Refused, heard, vec![own.certificate.der().clone()])
}

/// For calling a pool's door. Which name the server must prove is given per connection: to
/// [`crate::dial::connect`], or to an HTTP client as the host of its URL.
pub fn client_config(own: &Credentials) -> Result<ClientConfig, TlsConfigError> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsConfigError::Own)?
        .with_root_certificates(anchors(&own.ca).map_err(TlsConfigError::Anchor)?)
        .with_client_auth_cert(vec![own.certificate.der().clone()], own.key.to_der())
        .map_err(TlsConfigError::Own)?;
    Ok(without_resumption(config))
}

/// The certificate that a configuration of [`client_config`] shows.
pub fn shown_by(config: &ClientConfig) -> Option<Certificate> {
    // The configuration has one certificate: it is shown whatever the server asks for.
    let shown = config.client_auth_cert_resolver.resolve(&[], &[])?;
    Certificate::from_der(shown.end_entity_cert().ok()?.clone().into_owned()).ok()
}

/// For a host that joins: no certificate of its own yet, and trust in the one authority whose
/// fingerprint stands in the join token.
pub fn join_client_config(authority: Fingerprint) -> Result<ClientConfig, TlsConfigError> {
    let provider = provider();
    let verifier = PinnedAuthority { fingerprint: authority, provider: provider.clone() };
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsConfigError::Own)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    Ok(without_resumption(config))
}

#[derive(Clone, Copy)]
enum Anonymous {
    Refused,
    Admitted,
}

fn server(
    own: &Credentials,
    anonymous: Anonymous,
    heard: Heard,
    chain: Vec<CertificateDer<'static>>,
) -> Result<Arc<ServerConfig>, TlsConfigError> {
    let anchors = Arc::new(anchors(&own.ca).map_err(TlsConfigError::Anchor)?);
    let builder = WebPkiClientVerifier::builder_with_provider(anchors, provider());
    let builder = match anonymous {
        Anonymous::Refused => builder,
        Anonymous::Admitted => builder.allow_unauthenticated(),
    };
    let usual = builder.build().map_err(TlsConfigError::Verifier)?;
    let verifier = PoolMembers { usual, heard };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsConfigError::Own)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(chain, own.key.to_der())
        .map_err(TlsConfigError::Own)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

fn without_resumption(mut config: ClientConfig) -> ClientConfig {
    config.resumption = Resumption::disabled();
    config
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

pub(crate) fn anchors(ca: &Certificate) -> Result<RootCertStore, rustls::Error> {
    let mut store = RootCertStore::empty();
    store.add(ca.der().clone())?;
    Ok(store)
}

/// The usual check of client certificates, and then that the name in it is of somebody who may
/// speak at a door at all.
#[derive(Debug)]
struct PoolMembers {
    usual: Arc<dyn ClientCertVerifier>,
    heard: Heard,
}

/// Who may speak.
#[derive(Debug)]
enum Heard {
    /// Agents, the controller, operators and monitors.
    Speakers,
    /// The QEMU of one host.
    QemuOf(String),
}

impl ClientCertVerifier for PoolMembers {
    fn offer_client_auth(&self) -> bool {
        self.usual.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.usual.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.usual.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.usual.verify_client_cert(end_entity, intermediates, now)?;
        let named = identity::peer_of(end_entity).and_then(|peer| match (&self.heard, &peer) {
            (
                Heard::Speakers,
                Peer::Agent(_) | Peer::Controller | Peer::Operator(_) | Peer::Monitor(_),
            ) => Ok(()),
            (Heard::QemuOf(host), Peer::Qemu(name)) if name == host => Ok(()),
            (Heard::QemuOf(_), _) => Err(IdentityError::NotHeard(peer)),
            (Heard::Speakers, Peer::Qemu(_)) => Err(IdentityError::QemuAtDoor(peer)),
        });
        match named {
            Ok(()) => Ok(verified),
            Err(why) => Err(CertificateError::Other(OtherError(Arc::new(why))).into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}

/// Finds the authority with the known fingerprint among the certificates that the server sends,
/// and then checks the server against that authority in the usual way.
struct PinnedAuthority {
    fingerprint: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for PinnedAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedAuthority({})", self.fingerprint)
    }
}

impl PinnedAuthority {
    fn algorithms(&self) -> &WebPkiSupportedAlgorithms {
        &self.provider.signature_verification_algorithms
    }
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = intermediates
            .iter()
            .find(|sent| Fingerprint::of(sent) == self.fingerprint)
            .ok_or(CertificateError::UnknownIssuer)?;
        let mut store = RootCertStore::empty();
        store.add(pinned.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(store), self.provider.clone())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?
            .verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, self.algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, self.algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms().supported_schemes()
    }
}
