//! Asks a running QEMU what matters to whoever wants to move its VM. Judging is the controller's business.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use whimbrel_api::ApiError;
use whimbrel_api::agent::{Mobility, VmReport};
use whimbrel_qemu::machine::Machine;

use super::running::engine_error;

/// Most reasons that are passed on.
const BLOCKERS_MAX: usize = 16;

/// Asks.
pub(super) async fn ask(report: VmReport, machine: &Machine) -> Result<Mobility, ApiError> {
    let qmp = machine.qmp();
    let failed = |error| engine_error("QEMU does not say what could keep the VM here", &error);
    let migration = qmp.execute("query-migrate", Value::Null).await.map_err(failed)?;
    let reasons = migration.get("blocked-reasons").and_then(Value::as_array);
    let reason = |value: &Value| value.as_str().map(str::to_owned);
    let blockers = reasons.into_iter().flatten().filter_map(reason).take(BLOCKERS_MAX).collect();

    // `full` names every feature with its value under this accelerator (x86, 7.2 and 10.0). A QEMU that cannot say it
    // leaves the comparison to the other checks.
    let model = json!({ "type": "full", "model": { "name": report.definition.cpu } });
    let expanded = qmp.execute("query-cpu-model-expansion", model).await.unwrap_or_default();
    let properties = expanded.pointer("/model/props").and_then(Value::as_object);
    let on = |(name, value): (&String, &Value)| (value == &Value::Bool(true)).then(|| name.clone());
    let cpu_features: BTreeSet<String> = properties.into_iter().flatten().filter_map(on).collect();
    Ok(Mobility { vm: report, cpu_features, blockers })
}
