//! Joining: a token is made for an operator, and handed in by a host that has no certificate yet.
//!
//! The token's secret is kept as its hash alone. A token admits one host, within its time; the same host with the same key may
//! repeat its request, because the answer to the first may have been lost. The names in the certificates are ours to choose; of
//! the host's signing requests only the keys count.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use tracing::{info, warn};
use whimbrel_api::event::Event;
use whimbrel_api::pool::{JoinAnswer, JoinRequest, JoinToken, NewJoinToken};
use whimbrel_api::{ApiError, ErrorCode};
use whimbrel_pki::authority::{AuthorityError, HostCertificates};
use whimbrel_pki::key::SubjectKey;
use whimbrel_pki::token::{JoinToken as Token, Secret, TokenError};

use crate::store::{HostRow, JoinOutcome};
use crate::{Controller, contact};

/// Shortest time that a token may be good for, in seconds.
const TTL_MIN_SECONDS: u32 = 60;
/// Longest time that a token may be good for, in seconds.
const TTL_MAX_SECONDS: u32 = 86_400;
/// Longest address of an agent, in bytes: a DNS name, a colon and a port.
const ADDRESS_MAX_BYTES: usize = 253 + 6;

/// Makes a token.
pub(crate) async fn new_token(
    controller: &Controller,
    request: NewJoinToken,
) -> Result<JoinToken, ApiError> {
    let ttl = request.ttl_seconds;
    if !(TTL_MIN_SECONDS..=TTL_MAX_SECONDS).contains(&ttl) {
        let message = format!(
            "`ttl_seconds` is {ttl}; a join token is good for {TTL_MIN_SECONDS} to {TTL_MAX_SECONDS} s"
        );
        return Err(ApiError::new(ErrorCode::OutOfRange, message));
    }
    let authority = controller.authority().certificate().fingerprint();
    let token = Token::create(controller.addresses().to_vec(), authority).map_err(|error| {
        ApiError::internal("cannot make a join token", &error)
            .hint("set `addresses` in controller.toml to how hosts reach the controller")
    })?;
    let now = Timestamp::now();
    let expires = now + SignedDuration::from_secs(i64::from(ttl));
    controller.store().add_join_token(token.secret().hash(), expires, now).await?;
    Ok(JoinToken { token: token.to_line(), expires })
}

/// Admits a host: checks its token, issues its certificates, remembers it and begins to ask it.
pub(crate) async fn join(
    controller: &Arc<Controller>,
    request: JoinRequest,
) -> Result<JoinAnswer, ApiError> {
    check_address(&request.address)?;
    let secret =
        Secret::from_text(&request.secret).map_err(|_: TokenError| bad_token("unknown"))?;
    let key = SubjectKey::from_request_pem(&request.agent_csr).map_err(|error| {
        ApiError::new(
            ErrorCode::BadRequest,
            format!("`agent_csr`: {}", whimbrel_api::error::chain(&error)),
        )
    })?;
    let certificates = issue(controller, &request)?;
    let row = HostRow {
        name: request.name,
        address: request.address,
        enabled: true,
        agent_key: key.fingerprint().to_string(),
    };
    match controller.store().admit_host(secret.hash(), row.clone(), Timestamp::now()).await? {
        JoinOutcome::Admitted => {}
        refused => {
            warn!(host = %row.name, ?refused, "refused to let a host join");
            return Err(refusal(refused, &row));
        }
    }
    let (member, is_new) = controller.hosts().insert(&row)?;
    info!(host = %row.name, address = row.address, is_new, "a host joined");
    controller.events().publish(Event::Host { host: member.view() });
    if is_new {
        contact::spawn(controller, member);
    } else {
        member.nudge();
    }
    Ok(certificates)
}

fn issue(controller: &Controller, request: &JoinRequest) -> Result<JoinAnswer, ApiError> {
    let issued = controller.authority().issue_host(
        request.name.as_str(),
        &request.agent_csr,
        &request.qemu_csr,
    );
    let HostCertificates { ca, agent_server, agent_client, qemu_server, qemu_client } = issued
        .map_err(|error| match error {
            AuthorityError::Key(_) => {
                let chain = whimbrel_api::error::chain(&error);
                ApiError::new(
                    ErrorCode::BadRequest,
                    format!("a signing request is refused: {chain}"),
                )
            }
            other => ApiError::internal("cannot issue the host's certificates", &other),
        })?;
    Ok(JoinAnswer { ca, agent_server, agent_client, qemu_server, qemu_client })
}

fn refusal(outcome: JoinOutcome, host: &HostRow) -> ApiError {
    match outcome {
        JoinOutcome::UnknownToken | JoinOutcome::Admitted => bad_token("unknown"),
        JoinOutcome::Expired => bad_token("expired"),
        JoinOutcome::Used => bad_token("used by another host"),
        JoinOutcome::NameTaken => ApiError::new(
            ErrorCode::Exists,
            format!("a host with another key has the name `{}`", host.name),
        ),
    }
}

fn bad_token(what: &str) -> ApiError {
    ApiError::new(ErrorCode::BadToken, format!("the join token is {what}"))
        .hint("make a new one with `whimbrel pool join-token`")
}

/// `address:port`, the address being an IP address or a DNS name. Whether anybody answers there shows soon enough.
fn check_address(address: &str) -> Result<(), ApiError> {
    let host_ok = |host: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':' | '[' | ']');
        !host.is_empty() && host.chars().all(plain)
    };
    let good = address.len() <= ADDRESS_MAX_BYTES
        && address.rsplit_once(':').is_some_and(|(host, port)| {
            host_ok(host) && port.parse::<u16>().is_ok_and(|port| port != 0)
        });
    if good {
        return Ok(());
    }
    let message = "`address` must be where the host's agent listens, as ADDRESS:PORT";
    Err(ApiError::new(ErrorCode::BadRequest, message))
}
