//! Networks: made on every host that answers, or on none and told; the other hosts get them when they come back.

use std::sync::Arc;

use tracing::warn;
use whimbrel_api::event::Event;
use whimbrel_api::pool::Network;
use whimbrel_api::{ApiError, ErrorCode, Name};

use crate::Controller;
use crate::hosts::Member;

/// Longest name of a Linux interface, in bytes (IFNAMSIZ less its final zero).
const INTERFACE_NAME_MAX_BYTES: usize = 15;

/// Makes a network on all hosts that answer.
///
/// # Errors
/// `exists`, `in-use` (the bridge belongs to another network), or what a host answered, naming the host; then no host keeps it.
pub(crate) async fn create(controller: &Controller, network: Network) -> Result<Network, ApiError> {
    check(&network)?;
    let _layout = controller.layout.lock().await;
    for known in controller.store().networks().await? {
        if known.name == network.name {
            return Err(exists(&network.name));
        }
        if known.bridge == network.bridge {
            let message = format!("the bridge {} is the network {}'s", known.bridge, known.name);
            return Err(ApiError::new(ErrorCode::InUse, message));
        }
    }
    let mut made: Vec<Arc<Member>> = Vec::new();
    for (member, report) in ready(controller) {
        if let Err(error) = member.agent().put_network(&network).await {
            undo(&network.name, &made).await;
            return Err(at_host(&member.name, error));
        }
        if !report.networks.contains(&network.name) {
            made.push(member);
        }
    }
    if !controller.store().add_network(&network).await? {
        return Err(exists(&network.name));
    }
    made.iter().for_each(|member| member.nudge());
    controller.events().publish(Event::Network { network: network.clone() });
    Ok(network)
}

async fn undo(name: &Name, made: &[Arc<Member>]) {
    for member in made {
        if let Err(error) = member.agent().delete_network(name).await {
            warn!(host = %member.name, network = %name, %error, "a half-made network stays on a host");
        }
    }
}

fn exists(name: &Name) -> ApiError {
    ApiError::new(ErrorCode::Exists, format!("there is a network `{name}` already"))
}

/// The hosts that answer, with what they last said.
pub(crate) fn ready(
    controller: &Controller,
) -> Vec<(Arc<Member>, whimbrel_api::agent::HostReport)> {
    let all = controller.hosts().all().into_iter();
    all.filter_map(|member| member.ready_report().map(|report| (member, report))).collect()
}

/// A host's error with the host's name.
pub(crate) fn at_host(host: &Name, mut error: ApiError) -> ApiError {
    error.message = format!("{host}: {}", error.message);
    error
}

fn check(network: &Network) -> Result<(), ApiError> {
    check_interface("bridge", &network.bridge)?;
    let Some(uplink) = &network.uplink else { return Ok(()) };
    check_interface("uplink", uplink)?;
    if *uplink == network.bridge {
        let message = "a bridge cannot be its own uplink".to_owned();
        return Err(ApiError::new(ErrorCode::BadRequest, message));
    }
    Ok(())
}

/// Linux takes nearly everything as an interface's name; we take what needs no thought in a path or a log.
fn check_interface(field: &str, name: &str) -> Result<(), ApiError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let good = (1..=INTERFACE_NAME_MAX_BYTES).contains(&name.len())
        && name.chars().all(plain)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if good {
        return Ok(());
    }
    let message = format!(
        "`{field}` is not the name of an interface: 1 to {INTERFACE_NAME_MAX_BYTES} of a-z, A-Z, 0-9, '-', '_' and '.'"
    );
    Err(ApiError::new(ErrorCode::BadName, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(bridge: &str, uplink: Option<&str>) -> Network {
        Network {
            name: "lan".parse().unwrap(),
            bridge: bridge.to_owned(),
            uplink: uplink.map(str::to_owned),
        }
    }

    #[test]
    fn interface_names_are_checked() {
        check(&network("br-lan", Some("eth1.7"))).unwrap();
        for bad in ["", "..", "a/b", "a b", "sixteen-letters-", "-x", "ä"] {
            assert_eq!(check(&network(bad, None)).unwrap_err().code, ErrorCode::BadName, "{bad}");
            assert!(check(&network("br0", Some(bad))).is_err(), "{bad}");
        }
        assert!(check(&network("br0", Some("br0"))).is_err());
    }
}
