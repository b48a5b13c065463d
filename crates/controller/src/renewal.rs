//! Certificates are renewed before they end: each host's through its agent's door, and the controller's own.
//!
//! A host says itself when it is time ([`whimbrel_api::agent::HostReport`]); it proves who it is by the certificate that still is
//! valid, its keys stay, and its name is the one under which it was admitted. What has expired cannot be renewed so: such a host
//! joins again ([`crate::join`]). The authority is at hand here, so that the controller's own are renewed even when they have
//! expired. Nobody needs to be restarted: who shakes hands from then on sees the new ones. Called by [`crate::reconcile`] and by
//! [`Controller`].

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tracing::{error, info};
use whimbrel_api::ApiError;
use whimbrel_pki::authority::Authority;
use whimbrel_pki::files::{BundleError, ControllerIdentity};
use whimbrel_pki::tls::{self, ClientConfig, Credentials, ServerConfig, TlsConfigError};

use crate::Controller;
use crate::hosts::Member;

/// How often the controller looks at its own certificates, in seconds.
const LOOK_SECONDS: u64 = 60 * 60;

/// The controller's own certificates, as they are now.
#[derive(Debug)]
pub(crate) struct Own {
    dir: PathBuf,
    identity: RwLock<ControllerIdentity>,
    door: watch::Sender<Arc<ServerConfig>>,
}

/// Why the controller has no usable certificates.
#[derive(Debug, thiserror::Error)]
pub enum OwnError {
    /// They cannot be read, issued or written.
    #[error("the controller's certificates cannot be used")]
    Identity(#[from] BundleError),
    /// They cannot be used for TLS.
    #[error("the controller's certificates cannot be used for TLS")]
    Tls(#[from] TlsConfigError),
}

impl Own {
    /// Reads the certificates in the pool's folder, and renews them first if it is time.
    pub(crate) fn open(dir: &Path, authority: &Authority) -> Result<Self, OwnError> {
        let mut identity = ControllerIdentity::load(dir)?;
        if identity.is_renewal_due(SystemTime::now()) {
            identity = identity.renewed(authority)?;
            identity.save(dir)?;
            info!("the controller's certificates are renewed");
        }
        let door = watch::Sender::new(tls::join_server_config(&identity.server())?);
        Ok(Self { dir: dir.to_owned(), identity: RwLock::new(identity), door })
    }

    /// What the controller calls agents with, and signs grants with.
    pub(crate) fn client(&self) -> Credentials {
        self.identity.read().unwrap_or_else(PoisonError::into_inner).client()
    }

    /// What the controller's door shows, now and later.
    pub(crate) fn door(&self) -> watch::Receiver<Arc<ServerConfig>> {
        self.door.subscribe()
    }

    /// Renews the certificates if it is time at `now`: on the disk first, then at the door. The answer is what agents are to be
    /// called with from then on; `None` if it is not time.
    fn renew_if_due(
        &self,
        authority: &Authority,
        now: SystemTime,
    ) -> Result<Option<ClientConfig>, OwnError> {
        let present = self.identity.read().unwrap_or_else(PoisonError::into_inner).clone();
        if !present.is_renewal_due(now) {
            return Ok(None);
        }
        let renewed = present.renewed(authority)?;
        let door = tls::join_server_config(&renewed.server())?;
        let client = tls::client_config(&renewed.client())?;
        renewed.save(&self.dir)?;
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = renewed;
        self.door.send_replace(door);
        Ok(Some(client))
    }
}

/// Looks after the controller's own certificates, for as long as it lives.
pub(crate) async fn keep_own(controller: &Controller) {
    loop {
        tokio::time::sleep(Duration::from_secs(LOOK_SECONDS)).await;
        if let Err(failed) = renew_own(controller, SystemTime::now()) {
            let error = whimbrel_api::error::chain(&failed);
            error!(error, "the controller's certificates are not renewed; tried again");
        }
    }
}

/// Renews the controller's own certificates if it is time at `now`.
pub(crate) fn renew_own(controller: &Controller, now: SystemTime) -> Result<(), OwnError> {
    if let Some(client) = controller.own().renew_if_due(controller.authority(), now)? {
        controller.hosts().call_with(Arc::new(client));
        info!("the controller's certificates are renewed");
    }
    Ok(())
}

/// Gives a host new certificates for the keys that it has.
pub(crate) async fn renew_host(controller: &Controller, member: &Member) -> Result<(), ApiError> {
    let agent = member.agent();
    let asked = agent.certificate_requests().await?;
    let issued =
        controller.authority().issue_host(member.name.as_str(), &asked.agent_csr, &asked.qemu_csr);
    let issued = issued
        .map_err(|error| ApiError::internal("cannot issue the host's certificates", &error))?;
    agent.put_certificates(&issued).await
}
