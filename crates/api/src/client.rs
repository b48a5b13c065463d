//! The client of both interfaces: [`PoolClient`] for the controller, [`AgentClient`] for an agent.
//!
//! One function a call, nothing clever: no retries (whoever calls knows whether the request may be repeated), no caching.
//! An answer that did not come is [`ErrorCode::Unreachable`]; where a certificate is the cause the code and the words name
//! its trouble. Called by the command line, the controller (to agents) and the agents (to each other).

mod agent;
mod config;
mod console;
mod pool;
mod stream;

pub use agent::AgentClient;
pub use config::{ClientConfig, ClientConfigError};
pub use console::Console;
pub use pool::PoolClient;
pub use stream::EventStream;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::Method;
use reqwest::dns::{Addrs, Name as DnsName, Resolve, Resolving};
use serde::Serialize;
use serde::de::DeserializeOwned;
use whimbrel_pki::identity::Peer;
use whimbrel_pki::tls;
use whimbrel_pki::trouble::{TlsTrouble, Whose, explain};

use crate::{ApiError, BODY_LIMIT_BYTES, ErrorCode};

/// How long a connection may take to be made, TLS included, in seconds.
const CONNECT_SECONDS: u64 = 5;
/// How long an idle connection is kept, in seconds: less than the 30 s after which the door closes it.
const IDLE_SECONDS: u64 = 20;
/// How long an answer may take where the call does not say otherwise, in seconds.
const ANSWER_SECONDS: u64 = 30;

/// Where a server is.
#[derive(Debug, Clone)]
pub enum Target {
    /// `address:port`; a host name is resolved at each connection.
    Tcp(String),
    /// A unix socket; TLS is spoken inside all the same.
    Unix(PathBuf),
}

/// Resolves every name to the one address that we mean: the name in the URL is the one in the certificate.
#[derive(Debug)]
struct Fixed(String);

impl Resolve for Fixed {
    fn resolve(&self, _name: DnsName) -> Resolving {
        let address = self.0.clone();
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host(address).await?.collect();
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// A server, how to reach it, and who we are to it.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    http: reqwest::Client,
    target: Target,
    server_name: String,
    tls: Arc<rustls::ClientConfig>,
    base: String,
}

impl Caller {
    fn new(
        target: Target,
        server_name: String,
        tls: Arc<rustls::ClientConfig>,
    ) -> Result<Self, ApiError> {
        let builder = reqwest::Client::builder()
            .tls_backend_preconfigured(tls.as_ref().clone())
            .connect_timeout(Duration::from_secs(CONNECT_SECONDS))
            .timeout(Duration::from_secs(ANSWER_SECONDS))
            .pool_idle_timeout(Duration::from_secs(IDLE_SECONDS))
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        let (builder, port) = match &target {
            Target::Tcp(address) => {
                let port = address.rsplit_once(':').map(|(_, port)| port.to_owned());
                (builder.dns_resolver(Arc::new(Fixed(address.clone()))), port)
            }
            Target::Unix(path) => (builder.unix_socket(path.clone()), None),
        };
        let base = match port {
            Some(port) => format!("https://{server_name}:{port}/v1"),
            None => format!("https://{server_name}/v1"),
        };
        let http = builder
            .build()
            .map_err(|error| ApiError::internal("cannot make an HTTP client", &error))?;
        Ok(Self { http, target, server_name, tls, base })
    }

    /// The server in words.
    fn who(&self) -> String {
        match &self.target {
            Target::Tcp(address) => format!("{} at {address}", self.server_name),
            Target::Unix(path) => format!("{} at {}", self.server_name, path.display()),
        }
    }

    async fn call<B: Serialize + ?Sized, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
        timeout: Option<Duration>,
    ) -> Result<T, ApiError> {
        let mut request = self.http.request(method, format!("{}{path}", self.base));
        if let Some(body) = body {
            request = request.json(body);
        }
        if let Some(timeout) = timeout {
            request = request.timeout(timeout);
        }
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        let bytes = self.bounded_body(response).await?;
        if status.is_success() {
            let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
            return serde_json::from_slice(text).map_err(|error| {
                ApiError::internal(
                    &format!("{} answered {path} in another form", self.who()),
                    &error,
                )
            });
        }
        Err(serde_json::from_slice::<ApiError>(&bytes).unwrap_or_else(|_| {
            ApiError::new(
                ErrorCode::Internal,
                format!("{} answered {path} with HTTP {status}", self.who()),
            )
        }))
    }

    async fn bounded_body(&self, mut response: reqwest::Response) -> Result<Vec<u8>, ApiError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.unreachable(&error))? {
            if bytes.len() + chunk.len() > BODY_LIMIT_BYTES {
                let message =
                    format!("{} answered with more than {BODY_LIMIT_BYTES} bytes", self.who());
                return Err(ApiError::new(ErrorCode::TooLarge, message));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    fn unreachable(&self, error: &(dyn std::error::Error + 'static)) -> ApiError {
        let who = self.who();
        let Some(trouble) = explain(error) else {
            let message = format!("{who} does not answer: {}", crate::error::chain(error));
            return ApiError::new(ErrorCode::Unreachable, message);
        };
        self.insecure(trouble)
    }

    /// Somebody answers, and the two ends do not come together; the words name both, for they are read at neither.
    fn insecure(&self, trouble: TlsTrouble) -> ApiError {
        let own = tls::shown_by(&self.tls);
        let trouble = match &own {
            Some(own) => trouble.seen_from(own, SystemTime::now()),
            None => trouble,
        };
        let we = own.and_then(|own| own.peer().ok());
        let they = Peer::from_dns_name(&self.server_name).ok();
        let name = |peer: &Option<Peer>| match peer {
            Some(Peer::Agent(host)) => host.clone(),
            Some(peer) => peer.to_string(),
            None => "this client".to_owned(),
        };
        let told = trouble.between(&name(&we), &name(&they));
        let message = format!("no secure connection to {}: {told}", self.who());
        let advice = advice(&trouble, we.as_ref(), they.as_ref());
        ApiError::new(ErrorCode::of_tls(&trouble), message).hint(advice)
    }

    /// A stream on which nothing comes any more, signs of life neither.
    fn silent(&self) -> ApiError {
        ApiError::new(ErrorCode::Unreachable, format!("{} has fallen silent", self.who()))
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        self.call(Method::GET, path, None::<&()>, None).await
    }

    async fn put<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ApiError> {
        self.call(Method::PUT, path, Some(body), None).await
    }

    async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ApiError> {
        self.call(Method::POST, path, Some(body), None).await
    }

    async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        self.call(Method::DELETE, path, None::<&()>, None).await
    }
}

/// What to do about a connection that fails for its certificates.
fn advice(trouble: &TlsTrouble, we: Option<&Peer>, they: Option<&Peer>) -> String {
    let holder = |whose: &Whose| match whose {
        Whose::Ours => we,
        Whose::Theirs => they,
    };
    match trouble {
        TlsTrouble::Expired { whose, days } if days.is_some() || *whose == Whose::Theirs => {
            match holder(whose) {
                Some(Peer::Agent(host)) => format!(
                    "make a token with `whimbrel pool join-token`, and on {host} start the agent with `--join TOKEN`: the \
                     host keeps its name, its keys and its VMs"
                ),
                Some(Peer::Controller) => "restart the controller: it renews its own certificates".to_owned(),
                _ => "on the controller's machine, `whimbrel pool renew` makes a new one".to_owned(),
            }
        }
        TlsTrouble::Expired { .. } | TlsTrouble::NotYetValid { .. } => {
            "set the clocks of both machines".to_owned()
        }
        TlsTrouble::UnknownAuthority { .. } | TlsTrouble::WrongName { .. } => {
            "see whether the address is that of the machine that is meant, and whether both are of the same pool".to_owned()
        }
        _ => "compare the certificates of both sides: `whimbrel host show HOST` tells when they expire".to_owned(),
    }
}
