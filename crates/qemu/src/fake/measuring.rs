//! An imitated measuring of how fast a guest writes.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::vm::Vm;

/// How long it takes when nothing else is ordered, whatever was asked for.
const MEASURING_MILLISECONDS: u64 = 20;

/// `calc-dirty-rate`.
pub(super) fn begin(vm: &Vm, arguments: &Value) -> Result<(), String> {
    if goes_on(vm) {
        return Err("Still in progress".to_owned());
    }
    match arguments["mode"].as_str() {
        Some("page-sampling" | "dirty-bitmap") => {}
        _ => return Err("dirty ring is disabled, use sample-pages method instead.".to_owned()),
    }
    let milliseconds = arguments["calc-time-unit"] == json!("millisecond");
    let period = arguments["calc-time"].as_u64().unwrap_or(0);
    let period = if milliseconds { period } else { period.saturating_mul(1000) };
    let shortest = if milliseconds { 50 } else { 1000 };
    if !(shortest..=60_000).contains(&period) {
        return Err("Calculation time is out of range".to_owned());
    }
    vm.state().measuring = Some((arguments.clone(), Instant::now()));
    Ok(())
}

/// `query-dirty-rate`.
pub(super) fn query(vm: &Vm) -> Value {
    let going_on = goes_on(vm);
    let rate = vm.faults.setting("dirty-rate", 0);
    let state = vm.state();
    let Some((told, _)) = &state.measuring else {
        return json!({ "status": "unstarted", "start-time": 0, "calc-time": 0,
            "sample-pages": 512, "mode": "page-sampling" });
    };
    let mut answer = json!({
        "status": if going_on { "measuring" } else { "measured" }, "start-time": 1,
        "calc-time": told["calc-time"], "mode": told["mode"], "sample-pages": 512,
    });
    if let Some(unit) = told.get("calc-time-unit") {
        answer["calc-time-unit"] = unit.clone();
    }
    if !going_on {
        answer["dirty-rate"] = json!(rate);
    }
    answer
}

fn goes_on(vm: &Vm) -> bool {
    let period = vm.faults.setting("measuring-ms", MEASURING_MILLISECONDS);
    let state = vm.state();
    let begun = state.measuring.as_ref().map(|(_, begun)| *begun);
    begun.is_some_and(|begun| begun.elapsed() < Duration::from_millis(period))
}
