//! Where a new VM goes, and which machine it becomes. Pure: functions of what the hosts said last.
//!
//! Called by [`crate::vms`]; a migration's destination is the user's choice and is judged by preflight.

use std::collections::BTreeSet;

use whimbrel_api::agent::{EngineReport, HostReport};
use whimbrel_api::{ApiError, ErrorCode, Name};

use crate::definition::{Needs, machine_version};

/// The machine types among which the pool chooses: q35 has PCI Express, without which QEMU 10 deprecates half of its devices.
const MACHINE_FAMILY: &str = "pc-q35-";

/// A host that could take a new VM.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) enabled: bool,
    pub(crate) report: HostReport,
}

/// The machine type of a new VM whose user names none: the newest versioned q35 that **every** ready host of the pool offers, so
/// that the VM can move to any of them, also where they run different versions of QEMU. Only if there is none (a pool whose
/// hosts have nothing in common) it is the newest that the VM's own host offers.
///
/// QEMU keeps a versioned machine type the same in every later release for years: 10.0 builds a `pc-q35-7.2` exactly as 7.2
/// does. An unversioned `q35` is another machine in each release.
pub(crate) fn choose_machine(home: &HostReport, ready: &[Candidate]) -> Option<String> {
    let offered = |report: &HostReport| -> BTreeSet<String> {
        let machines = report.engines.iter().flat_map(|engine| engine.machines.iter());
        machines.filter(|machine| machine.starts_with(MACHINE_FAMILY)).cloned().collect()
    };
    let own = offered(home);
    let mut common = own.clone();
    for other in ready {
        let there = offered(&other.report);
        common.retain(|machine| there.contains(machine));
    }
    newest(&common).or_else(|| newest(&own))
}

fn newest(machines: &BTreeSet<String>) -> Option<String> {
    machines
        .iter()
        .filter_map(|machine| Some((machine_version(machine)?, machine)))
        .max()
        .map(|(_, machine)| machine.clone())
}

/// Which host a new VM goes to: the enabled one with most free memory that has what the VM needs.
pub(crate) fn choose_host<'a>(
    needs: &Needs,
    machine: Option<&str>,
    ready: &'a [Candidate],
) -> Result<&'a HostReport, ApiError> {
    let fits = |candidate: &&Candidate| {
        candidate.enabled && lacks(needs, machine, &candidate.report).is_empty()
    };
    let best = ready.iter().filter(fits).max_by_key(|candidate| {
        // Among equals the first by name, so that the choice can be foreseen.
        (candidate.report.memory_available_bytes, std::cmp::Reverse(&candidate.report.name))
    });
    best.map(|candidate| &candidate.report).ok_or_else(|| nobody(needs, machine, ready))
}

fn nobody(needs: &Needs, machine: Option<&str>, ready: &[Candidate]) -> ApiError {
    let reasons: Vec<String> = ready
        .iter()
        .map(|candidate| {
            let mut lacks = lacks(needs, machine, &candidate.report);
            if !candidate.enabled {
                lacks.push("is not enabled".to_owned());
            }
            format!("{} {}", candidate.report.name, lacks.join(", "))
        })
        .collect();
    let message = match reasons.as_slice() {
        [] => "no host of the pool answers".to_owned(),
        reasons => format!("no host can take the VM: {}", reasons.join("; ")),
    };
    ApiError::new(ErrorCode::NoResources, message).hint("`whimbrel host list` shows the hosts")
}

/// What a host lacks for a VM, in words that follow its name.
pub(crate) fn lacks(needs: &Needs, machine: Option<&str>, report: &HostReport) -> Vec<String> {
    let mut lacks = Vec::new();
    for network in &needs.networks {
        if !report.networks.contains(network) {
            lacks.push(format!("has not the network `{network}`"));
        }
    }
    for storage in &needs.storages {
        match report.storages.iter().find(|there| there.name == *storage) {
            None => lacks.push(format!("has not the storage `{storage}`")),
            Some(there) => {
                if let Some(trouble) = &there.trouble {
                    lacks.push(format!("cannot use the storage `{storage}` ({trouble})"));
                }
            }
        }
    }
    if !report.engines.iter().any(|engine| offers(engine, machine, &needs.cpu)) {
        let machine =
            machine.map_or(String::new(), |machine| format!(" with the machine {machine}"));
        lacks.push(format!("has no QEMU{machine} that offers the CPU model `{}`", needs.cpu));
    }
    lacks
}

fn offers(engine: &EngineReport, machine: Option<&str>, cpu: &str) -> bool {
    engine.cpu_models.iter().any(|model| model == cpu)
        && machine.is_none_or(|machine| engine.machines.iter().any(|there| there == machine))
}

/// Refuses a host that the user named but that cannot take the VM.
pub(crate) fn check_host(
    needs: &Needs,
    machine: Option<&str>,
    candidate: &Candidate,
) -> Result<(), ApiError> {
    let name: &Name = &candidate.report.name;
    if !candidate.enabled {
        return Err(ApiError::new(ErrorCode::WrongState, format!("{name} is not enabled"))
            .hint(format!("`whimbrel host enable {name}`, or choose another host")));
    }
    let lacks = lacks(needs, machine, &candidate.report);
    if lacks.is_empty() {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::NoResources, format!("{name} {}", lacks.join(", "))))
}

#[cfg(test)]
mod tests {
    use whimbrel_api::agent::StorageReport;

    use super::*;

    fn host(name: &str, free_gib: u64, machines: &[&str]) -> Candidate {
        let engine = EngineReport {
            version: "7.2.0".into(),
            accelerator: "tcg".into(),
            machines: machines.iter().map(|&m| m.to_owned()).collect(),
            cpu_models: vec!["qemu64".into()],
            abilities: None,
        };
        let storage = StorageReport {
            reserved_bytes: 0,
            name: "shared".parse().unwrap(),
            trouble: None,
            total_bytes: 1,
            available_bytes: 1,
        };
        let report = HostReport {
            name: name.parse().unwrap(),
            version: String::new(),
            cpus: 1,
            cpu_model: String::new(),
            cpu_features: BTreeSet::new(),
            memory_total_bytes: 8 << 30,
            memory_available_bytes: free_gib << 30,
            engines: vec![engine],
            networks: vec!["lan".parse().unwrap()],
            storages: vec![storage],
            migration_address: String::new(),
            vms: 0,
            certificate_days_left: 1,
            certificate_renewal_due: false,
        };
        Candidate { enabled: true, report }
    }

    fn needs() -> Needs {
        Needs {
            networks: ["lan".parse().unwrap()].into(),
            storages: ["shared".parse().unwrap()].into(),
            cpu: "qemu64".into(),
        }
    }

    #[test]
    fn the_machine_is_the_newest_that_all_have() {
        let old = host("a", 1, &["q35", "pc-q35-6.2", "pc-q35-7.2", "pc-i440fx-7.2"]);
        let new = host("b", 1, &["pc-q35-6.2", "pc-q35-7.2", "pc-q35-10.0", "pc-q35-9.2"]);
        let both = [old.clone(), new.clone()];
        assert_eq!(choose_machine(&new.report, &both).unwrap(), "pc-q35-7.2");
        // By number, not by letter.
        assert_eq!(choose_machine(&new.report, std::slice::from_ref(&new)).unwrap(), "pc-q35-10.0");
        let foreign = host("c", 1, &["virt-9.0"]);
        assert_eq!(
            choose_machine(&new.report, &[foreign.clone(), new.clone()]).unwrap(),
            "pc-q35-10.0"
        );
        assert_eq!(choose_machine(&foreign.report, &both), None);
    }

    #[test]
    fn the_host_is_the_enabled_one_with_most_memory_that_has_everything() {
        let m = ["pc-q35-7.2"];
        let mut hosts = [host("a", 2, &m), host("b", 4, &m), host("c", 8, &m), host("d", 16, &m)];
        hosts[3].enabled = false;
        hosts[2].report.storages[0].trouble = Some("not mounted".into());
        let chosen = choose_host(&needs(), None, &hosts).unwrap();
        assert_eq!(chosen.name.as_str(), "b");
        hosts[0].report.memory_available_bytes = 4 << 30;
        assert_eq!(choose_host(&needs(), None, &hosts).unwrap().name.as_str(), "a");
        let error = choose_host(&needs(), Some("pc-q35-10.0"), &hosts).unwrap_err();
        assert_eq!(error.code, ErrorCode::NoResources);
        for part in ["not mounted", "d has no QEMU", "is not enabled"] {
            assert!(error.message.contains(part), "{}", error.message);
        }
    }

    #[test]
    fn a_named_host_must_fit_too() {
        let mut named = host("a", 1, &["pc-q35-7.2"]);
        check_host(&needs(), Some("pc-q35-7.2"), &named).unwrap();
        let mut other = needs();
        other.cpu = "EPYC".into();
        assert_eq!(check_host(&other, None, &named).unwrap_err().code, ErrorCode::NoResources);
        named.enabled = false;
        assert_eq!(check_host(&needs(), None, &named).unwrap_err().code, ErrorCode::WrongState);
    }
}
