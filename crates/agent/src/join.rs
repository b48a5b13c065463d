//! How a host becomes a member of a pool: keys of its own, a signing request with the token, certificates in return.
//!
//! Private keys never leave the host. The controller is known before there is any certificate, by the authority's
//! fingerprint in the token. A host whose certificates have expired joins again with the keys that it has. Called by the
//! command line before [`crate::run`].

use std::sync::Arc;
use std::time::SystemTime;

use whimbrel_api::ApiError;
use whimbrel_api::client::{PoolClient, Target};
use whimbrel_api::pool::JoinRequest;
use whimbrel_pki::authority::HostCertificates;
use whimbrel_pki::files::{BundleError, HostIdentity, HostKeys};
use whimbrel_pki::key::KeyError;
use whimbrel_pki::tls::{self, TlsConfigError};
use whimbrel_pki::token::{JoinToken, TokenError};

use crate::config::AgentConfig;

/// Why a host did not become a member.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token cannot be read.
    #[error("the join token cannot be used")]
    Token(#[from] TokenError),
    /// The keys could not be made.
    #[error("cannot make the host's keys")]
    Keys(#[from] KeyError),
    /// No TLS configuration could be made.
    #[error("cannot prepare the connection to the controller")]
    Tls(#[from] TlsConfigError),
    /// No controller has admitted the host; the last one's words.
    #[error("the controller did not admit this host")]
    Controller(#[source] ApiError),
    /// What it sent, or what stands in the folder, cannot be used.
    #[error("the host's certificates cannot be used")]
    Identity(#[from] BundleError),
    /// The folder's identity is another host's.
    #[error("the identity in this folder is that of host {found}, not of {wanted}")]
    OtherHost {
        /// Whose it is.
        found: String,
        /// Whose it should be.
        wanted: String,
    },
    /// The agent's folder cannot be made.
    #[error("cannot make the folder {}", path.display())]
    Folder {
        /// The folder.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Joins the pool that the token is of. A host that has joined already, and whose certificates have not expired, has nothing
/// to do: the token is not used.
///
/// # Errors
/// [`JoinError`]; the folder holds a whole identity or none, and the one that it had if it had one.
pub async fn join(config: &AgentConfig, token: &str) -> Result<(), JoinError> {
    let folder = config.pki_dir();
    let expired = if HostIdentity::exists(&folder) {
        let identity = load(config)?;
        if !identity.is_expired(SystemTime::now()) {
            return Ok(());
        }
        Some(identity)
    } else {
        None
    };
    let token: JoinToken = token.parse()?;
    crate::make_folder(&config.dir)
        .map_err(|source| JoinError::Folder { path: config.dir.clone(), source })?;
    // The controller lets nobody else but the holder of these keys come again under the host's name.
    let keys = match &expired {
        Some(identity) => identity.keys().clone(),
        None => HostKeys::generate()?,
    };
    let request = JoinRequest {
        secret: token.secret().to_text(),
        name: config.name.clone(),
        address: config.advertised(),
        agent_csr: keys.agent_request_pem()?,
        qemu_csr: keys.qemu_request_pem()?,
    };
    let answer = ask(&token, &request).await?;
    let certificates = HostCertificates {
        ca: answer.ca,
        agent_server: answer.agent_server,
        agent_client: answer.agent_client,
        qemu_server: answer.qemu_server,
        qemu_client: answer.qemu_client,
    };
    match expired {
        Some(identity) => identity.renew(&certificates, &folder)?,
        None => {
            HostIdentity::assemble(keys, &certificates, config.name.as_str())?.save(&folder)?;
        }
    }
    tracing::info!(host = %config.name, "joined the pool");
    Ok(())
}

/// Loads the identity of a host that has joined.
///
/// # Errors
/// [`JoinError::Identity`], or [`JoinError::OtherHost`].
pub fn load(config: &AgentConfig) -> Result<HostIdentity, JoinError> {
    let identity = HostIdentity::load(&config.pki_dir())?;
    if identity.host() == config.name.as_str() {
        return Ok(identity);
    }
    Err(JoinError::OtherHost { found: identity.host().to_owned(), wanted: config.name.to_string() })
}

/// Asks the controller at each of the token's addresses in turn, until one answers.
async fn ask(
    token: &JoinToken,
    request: &JoinRequest,
) -> Result<whimbrel_api::pool::JoinAnswer, JoinError> {
    let tls = Arc::new(tls::join_client_config(token.authority())?);
    let mut last = ApiError::not_found("controller's address", "in the token");
    for address in token.addresses() {
        let client = PoolClient::new(Target::Tcp(address.clone()), Arc::clone(&tls))
            .map_err(JoinError::Controller)?;
        match client.join(request).await {
            Ok(answer) => return Ok(answer),
            // Whoever answers decides; only who does not answer may be asked at another address.
            Err(error) if error.is_unknown() => last = error,
            Err(error) => return Err(JoinError::Controller(error)),
        }
    }
    Err(JoinError::Controller(last))
}
