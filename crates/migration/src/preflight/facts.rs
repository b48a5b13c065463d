//! What preflight has to know of the two hosts and of the VM. Plain data: the agents collect the
//! facts, the controller brings them together.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

use crate::names::{MigrationId, Name};
use crate::options::Mode;

/// All that preflight looks at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Question {
    /// The VM to move.
    pub vm: VmFacts,
    /// Which way it shall go.
    #[serde(default)]
    pub mode: Mode,
    /// The host on which it is.
    pub source: Name,
    /// The host to which it shall go.
    pub destination: HostFacts,
    /// The storages of which it is *proven* that both hosts see the same one: a token written on
    /// the source was read on the destination.
    pub shared_storages: BTreeSet<Name>,
    /// What the source found when it tried the destination's migration address.
    pub reach: Reach,
}

/// A host that could take the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostFacts {
    /// The host's name.
    pub name: Name,
    /// Whether the host takes VMs at present.
    pub enabled: bool,
    /// The QEMUs that can be used on it.
    pub engines: Vec<EngineFacts>,
    /// The processor features that a guest can be given there, by QEMU's names.
    pub cpu_features: BTreeSet<String>,
    /// Memory that the host has, in bytes.
    pub memory_total_bytes: u64,
    /// Memory that new VMs can have, in bytes.
    pub memory_available_bytes: u64,
    /// The networks that have a bridge there.
    pub networks: BTreeSet<Name>,
    /// The storages that are mounted there.
    pub storages: BTreeSet<Name>,
}

/// One QEMU of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EngineFacts {
    /// Its version.
    pub version: EngineVersion,
    /// What it can run guests with.
    pub accelerators: BTreeSet<Accelerator>,
    /// Its versioned machine types, such as `pc-q35-7.2`.
    pub machine_types: BTreeSet<String>,
    /// The CPU models that it knows.
    pub cpu_models: BTreeSet<String>,
    /// Whether it can restore a state in which each page of memory has its place.
    pub maps_memory: bool,
}

/// What runs the guest's instructions.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The processor, by Linux' KVM.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kvm => "KVM",
            Self::Tcg => "TCG",
        })
    }
}

/// A QEMU version: three numbers, written `7.2.22`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EngineVersion {
    /// The first number.
    pub major: u16,
    /// The second number.
    pub minor: u16,
    /// The third number.
    pub micro: u16,
}

// By hand: on the wire it is a string, which the derive cannot say of a struct with fields.
impl PartialSchema for EngineVersion {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .pattern(Some(r"^\d+\.\d+\.\d+$"))
            .description(Some("A QEMU version: three numbers."))
            .examples(["7.2.22"])
            .into()
    }
}

impl ToSchema for EngineVersion {}

/// A text that is no [`EngineVersion`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a QEMU version is three numbers, such as 7.2.22")]
pub struct NoVersion;

impl FromStr for EngineVersion {
    type Err = NoVersion;

    fn from_str(text: &str) -> Result<Self, NoVersion> {
        let mut numbers = text.splitn(3, '.').map(|part| part.parse().map_err(|_| NoVersion));
        let mut next = || numbers.next().unwrap_or(Err(NoVersion));
        Ok(Self { major: next()?, minor: next()?, micro: next()? })
    }
}

impl TryFrom<String> for EngineVersion {
    type Error = NoVersion;

    fn try_from(text: String) -> Result<Self, NoVersion> {
        text.parse()
    }
}

impl From<EngineVersion> for String {
    fn from(version: EngineVersion) -> Self {
        version.to_string()
    }
}

impl fmt::Display for EngineVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// The VM to move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmFacts {
    /// Its name.
    pub name: Name,
    /// What it is doing.
    pub state: GuestState,
    /// Its memory in bytes.
    pub memory_bytes: u64,
    /// Whether its state is saved, with a place for each page of memory.
    pub saved_mapped: bool,
    /// The QEMU that runs it.
    pub engine: EngineVersion,
    /// What runs its instructions.
    pub accelerator: Accelerator,
    /// Its versioned machine type, pinned when it was created.
    pub machine_type: String,
    /// Its CPU model, by QEMU's name.
    pub cpu_model: String,
    /// The processor features that its guest can see, by QEMU's names.
    pub cpu_features: BTreeSet<String>,
    /// Its disks, and the files that it boots from.
    pub files: Vec<FileFacts>,
    /// Its network interfaces.
    pub nics: Vec<NicFacts>,
    /// Its devices that cannot be moved while it runs.
    pub unmovable: Vec<UnmovableDevice>,
    /// The migration of it that is under way.
    pub migration: Option<MigrationId>,
}

/// What a guest is doing.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum GuestState {
    /// It runs.
    Running,
    /// It stands still because its user wanted it.
    Paused,
    /// It has no QEMU.
    Stopped,
    /// Its QEMU has ended by itself, or its kernel has.
    Crashed,
}

impl fmt::Display for GuestState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
        })
    }
}

/// A file that the VM's QEMU has open: a disk, a kernel, an initrd, a firmware's variables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileFacts {
    /// What it is to the VM, such as `disk root` or `kernel`.
    pub label: String,
    /// The storage on which it is.
    pub storage: Name,
    /// Its path in that storage.
    pub path: String,
}

/// A network interface of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NicFacts {
    /// What it is to the VM, such as `nic 0`.
    pub label: String,
    /// The network that it is on.
    pub network: Name,
}

/// A device that cannot be moved while the VM runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnmovableDevice {
    /// The device, by a name that the user knows.
    pub device: String,
    /// Why not, as the end of the sentence "it cannot be moved because ...".
    pub because: String,
}

/// What the source found at the destination's migration address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum Reach {
    /// It was not tried.
    NotProbed,
    /// A mutually authenticated connection worked.
    Reachable,
    /// The host name has no address.
    Unresolvable {
        /// The host that looked it up.
        by: Name,
        /// The name that was looked up.
        host: String,
        /// What the resolver said.
        because: String,
    },
    /// The destination cannot listen there: the address is another machine's.
    NotItsOwn {
        /// What the destination said.
        because: String,
    },
    /// Nothing answered, or it was refused.
    PortClosed {
        /// Address and port that were tried.
        address: String,
        /// What the connection attempt said.
        because: String,
    },
    /// The destination's list of those who may send guests there has neither the source nor its address.
    NotAllowed {
        /// What is not in the list.
        because: String,
    },
    /// Something answered, but it is not the destination, or does not accept the source.
    TlsFailed {
        /// Address and port that were tried.
        address: String,
        /// What was wrong with the handshake.
        because: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_three_numbers_and_ordered() {
        let version = |text: &str| text.parse::<EngineVersion>();
        assert!(version("10.0.2").unwrap() > version("7.2.22").unwrap());
        assert_eq!(version("7.2.22").unwrap().to_string(), "7.2.22");
        for bad in ["", "7", "7.2", "7.2.x", "7.2.1.0", "-1.0.0", "70000.0.0"] {
            assert_eq!(version(bad), Err(NoVersion), "{bad}");
        }
    }
}
