//! `pool monitor`: the certificate with which a program reads metrics.
//!
//! It needs the authority's key, and so is run on the controller's machine, whether or not the controller runs. What such a
//! certificate is good for the doors say: `GET /metrics`, of the controller and of every agent, and nothing else.

use std::path::Path;
use std::time::SystemTime;

use whimbrel_api::Name;
use whimbrel_pki::authority::{Authority, AuthorityError};
use whimbrel_pki::files::{BundleError, MonitorIdentity};

/// A certificate that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MonitorMade {
    /// When it expires.
    pub expires: SystemTime,
}

/// Why none was made.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The authority's files cannot be used.
    #[error("the pool's authority cannot be used")]
    Authority(#[from] AuthorityError),
    /// It was not issued, or could not be written.
    #[error("the monitor's files are not made")]
    Files(#[from] BundleError),
}

/// Makes a key and a certificate for `name` in `folder`, from the pool in `dir`; what was there is replaced.
///
/// # Errors
/// [`MonitorError`]; some of the files may be new.
pub fn make_monitor(dir: &Path, name: &Name, folder: &Path) -> Result<MonitorMade, MonitorError> {
    let authority = Authority::load(dir)?;
    let identity = MonitorIdentity::issue(&authority, name.as_str())?;
    identity.save(folder)?;
    Ok(MonitorMade { expires: identity.client().certificate.not_after() })
}
