//! Asks a running QEMU what matters to whoever wants to move its VM. Judging is the controller's business.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use whimbrel_api::ApiError;
use whimbrel_api::agent::{Mobility, VmReport};
use whimbrel_qemu::machine::Machine;
use whimbrel_qemu::qmp::Qmp;

use super::running::engine_error;
use crate::host::abilities::abilities;

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

    // A full expansion names all properties of a processor, and many are no features (`legacy-multi-node`, set by older
    // machine types in 10.0). The model `base` has no feature at all, so what it has set is none.
    let all = switched_on(qmp, &report.definition.cpu).await;
    let none = switched_on(qmp, "base").await;
    let cpu_features = all.difference(&none).cloned().collect();
    let version = report.engine.as_ref().map_or("", |engine| engine.version.as_str());
    // What stands in the way of receiving by post-copy is the destination's matter.
    let abilities = abilities(version, machine.features(), None);
    Ok(Mobility { vm: report, cpu_features, blockers, abilities })
}

/// The properties that a CPU model has set under this QEMU's accelerator and machine (x86, 7.2 and 10.0). A QEMU that
/// cannot say it leaves the comparison to preflight's other checks.
async fn switched_on(qmp: &Qmp, model: &str) -> BTreeSet<String> {
    let model = json!({ "type": "full", "model": { "name": model } });
    let expanded = qmp.execute("query-cpu-model-expansion", model).await.unwrap_or_default();
    let properties = expanded.pointer("/model/props").and_then(Value::as_object);
    let on = |(name, value): (&String, &Value)| (value == &Value::Bool(true)).then(|| name.clone());
    properties.into_iter().flatten().filter_map(on).collect()
}
