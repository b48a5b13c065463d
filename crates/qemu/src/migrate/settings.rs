//! What both ends have in common: setting capabilities and parameters, and waiting for a change.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::event::{Event, EventError, Events};
use crate::machine::Machine;
use crate::qmp::QmpError;

/// Sets migration capabilities, all in one command.
pub(super) async fn set_capabilities(
    machine: &Machine,
    capabilities: &[(&str, bool)],
) -> Result<(), QmpError> {
    let known = &machine.features().migration_capabilities;
    let list: Vec<Value> = capabilities
        .iter()
        // Switching off what this QEMU does not have is done already.
        .filter(|(name, on)| *on || known.contains(*name))
        .map(|(name, on)| json!({ "capability": name, "state": on }))
        .collect();
    machine.order("migrate-set-capabilities", json!({ "capabilities": list })).await
}

/// Sets migration parameters.
pub(super) async fn set_parameters(
    machine: &Machine,
    parameters: Map<String, Value>,
) -> Result<(), QmpError> {
    machine.order("migrate-set-parameters", Value::Object(parameters)).await
}

/// Waits until something may have changed: an event, or `at_most` for what no event tells.
///
/// A reader that lagged, or a session that ended, is a reason to ask again too.
pub(super) async fn next_change(events: &mut Events, at_most: Duration) -> Option<Event> {
    match tokio::time::timeout(at_most, events.next()).await {
        Ok(Ok(event)) => Some(event),
        Ok(Err(EventError::Lagged { .. })) | Err(_) => None,
        Ok(Err(EventError::Closed)) => {
            // The next question will tell why; without this pause a caller that ignores the
            // answer would spin.
            tokio::time::sleep(at_most).await;
            None
        }
    }
}
