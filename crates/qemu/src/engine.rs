//! What one QEMU program can do on this host: version, machine types, accelerators, processors.
//!
//! Found by starting it without a machine (`-machine none`), asking over QMP, and ending it; that
//! takes well below a second. Nothing is concluded from the version number.

mod probe;

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use self::probe::{ProbeError, probe};
use crate::schema::Features;

/// How vCPUs are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// By the processor's own means.
    Kvm,
    /// By translation: any host can, slowly.
    Tcg,
}

impl Accelerator {
    /// QEMU's word.
    #[must_use]
    pub fn as_wire(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What one QEMU program can do on this host.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineFacts {
    /// The program that was asked.
    pub binary: PathBuf,
    /// Its version as (major, minor, micro).
    pub version: (u32, u32, u32),
    /// The packager's word on the version.
    pub package: String,
    /// Machine types, versioned ones and aliases.
    pub machine_types: Vec<MachineType>,
    /// The accelerator that VMs use here: chosen by hand, or the best that works.
    pub accelerator: Accelerator,
    /// Why that one, in a sentence for people.
    pub accelerator_reason: String,
    /// Processor models.
    pub cpu_models: Vec<CpuModel>,
    /// The features that the best possible guest processor (`max`) has here under the
    /// accelerator, by QEMU's names.
    pub host_cpu_features: BTreeSet<String>,
    /// Features of the QMP side.
    pub features: Features,
    /// Why this host does not let it receive a guest in post-copy, or `None`: it must be let use
    /// userfaultfd, for faults of the kernel too. QEMU from 8.1 on opens `/dev/userfaultfd`, which
    /// its user may be given; 7.2 needs the setting `vm.unprivileged_userfaultfd=1`.
    pub postcopy_obstacle: Option<String>,
}

/// One machine type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineType {
    /// Its full name, e.g. `pc-q35-7.2`.
    pub name: String,
    /// Another name for it in this version, e.g. `q35`.
    pub alias: Option<String>,
    /// Whether it is what QEMU takes when told none.
    pub is_default: bool,
    /// Whether QEMU is about to drop it.
    pub deprecated: bool,
    /// The vCPUs that it can have.
    pub vcpus_max: Option<u64>,
}

/// One processor model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuModel {
    /// Its name, e.g. `Nehalem-v1`.
    pub name: String,
    /// What the name stands for in this version, e.g. `Nehalem` → `Nehalem-v1`.
    pub alias_of: Option<String>,
    /// Features it has that this host can not give; empty means that it runs here.
    pub unavailable_features: Vec<String>,
    /// Whether it means the same on every host, so that a VM with it can move.
    pub migration_safe: bool,
    /// Whether QEMU is about to drop it.
    pub deprecated: bool,
}

impl EngineFacts {
    /// The versioned machine type that a name stands for here, so that a VM can be pinned to it;
    /// `None` where there is no such machine type.
    #[must_use]
    pub fn pinned_machine_type(&self, name: &str) -> Option<&str> {
        let named =
            |machine: &&MachineType| machine.name == name || machine.alias.as_deref() == Some(name);
        self.machine_types.iter().find(named).map(|machine| machine.name.as_str())
    }

    /// A processor model by its name.
    #[must_use]
    pub fn cpu_model(&self, name: &str) -> Option<&CpuModel> {
        self.cpu_models.iter().find(|model| model.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> EngineFacts {
        let machine = |name: &str, alias: Option<&str>| MachineType {
            name: name.to_owned(),
            alias: alias.map(str::to_owned),
            is_default: false,
            deprecated: false,
            vcpus_max: None,
        };
        EngineFacts {
            binary: "/usr/bin/qemu-system-x86_64".into(),
            version: (7, 2, 0),
            package: String::new(),
            machine_types: vec![machine("pc-q35-7.1", None), machine("pc-q35-7.2", Some("q35"))],
            accelerator: Accelerator::Tcg,
            accelerator_reason: String::new(),
            cpu_models: Vec::new(),
            host_cpu_features: BTreeSet::new(),
            features: Features::default(),
            postcopy_obstacle: None,
        }
    }

    #[test]
    fn an_alias_is_pinned_to_its_version() {
        assert_eq!(facts().pinned_machine_type("q35"), Some("pc-q35-7.2"));
        assert_eq!(facts().pinned_machine_type("pc-q35-7.1"), Some("pc-q35-7.1"));
        assert_eq!(facts().pinned_machine_type("pc-q35-9.9"), None);
    }
}
