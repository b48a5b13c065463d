//! What an agent is told at its start: a TOML file, or flags that fill the same struct.
//!
//! Only shape and bounds are checked here ([`AgentConfig::check`]); whether a program runs or an address can be
//! listened on is found out by whoever uses it. Called by the command line.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use whimbrel_api::Name;

use crate::sources::AllowedSource;

/// Largest configuration file that is read, in bytes.
pub const CONFIG_BYTES_MAX: u64 = 64 << 10;
/// The ports that QEMU listens on for a stream, unless told otherwise: libvirt's range, which firewalls know.
pub const MIGRATION_PORTS: (u16, u16) = (49152, 49215);
/// The user and group that QEMU runs as, unless told otherwise: `nobody` and `nogroup` of Debian.
pub const QEMU_USER: (u32, u32) = (65534, 65534);
/// Most QEMUs on one host.
const ENGINES_MAX: usize = 16;
/// Longest list of those who may send guests.
const SOURCES_MAX: usize = 256;

/// How an agent is set up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// Where the agent keeps its keys, its ledger and the folders of running QEMUs. Absolute. Other users must be able
    /// to pass through its parents, since QEMU runs as one of them.
    pub dir: PathBuf,
    /// The host's name in the pool.
    pub name: Name,
    /// Where the agent listens, `address:port`.
    pub listen: SocketAddr,
    /// Where others reach the agent, `address:port`; without it, `listen`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// Where other hosts' QEMUs connect to: an IP address or a host name, without port; without it, the address of
    /// `listen`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_address: Option<String>,
    /// First and last port that QEMU may listen on for a stream.
    #[serde(default = "default_migration_ports")]
    pub migration_ports: (u16, u16),
    /// Who may send guests here: names of hosts, addresses (`192.0.2.11`), networks (`192.0.2.0/24`). Every host of the pool
    /// where nothing is listed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub migration_sources: Vec<AllowedSource>,
    /// The unprivileged user and group, by number, that QEMU runs as; without it, `nobody` and the group that may use
    /// `/dev/kvm`. The user is to be the same on all hosts that share a storage.
    #[serde(default = "default_qemu_user")]
    pub qemu_user: (u32, u32),
    /// The QEMU programs; the first one is for new VMs.
    #[serde(default = "default_engines")]
    pub engines: Vec<PathBuf>,
    /// What runs guests.
    #[serde(default)]
    pub accelerator: AcceleratorChoice,
}

/// What runs guests on a host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorChoice {
    /// KVM where device and processor have it, else TCG.
    #[default]
    Auto,
    /// The processor, through KVM; the agent does not start where that fails.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl std::str::FromStr for AcceleratorChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            _ => Err("an accelerator is `auto`, `kvm` or `tcg`".to_owned()),
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is larger than [`CONFIG_BYTES_MAX`].
    #[error("{} is larger than {CONFIG_BYTES_MAX} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is no TOML, or has an unknown or a missing field.
    #[error("{} is not an agent's configuration", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: toml::de::Error,
    },
    /// A value is out of its bounds.
    #[error("`{field}` {problem}")]
    Value {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

fn default_migration_ports() -> (u16, u16) {
    MIGRATION_PORTS
}

fn default_qemu_user() -> (u32, u32) {
    let device = std::fs::metadata("/dev/kvm").ok();
    (QEMU_USER.0, device.map_or(QEMU_USER.1, |device| qemu_group(device.mode(), device.gid())))
}

/// The group that QEMU runs as, by mode and group of `/dev/kvm`. Debian and most others give the device to a group `kvm`
/// (0660); without it the guests would have to be translated.
fn qemu_group(mode: u32, group: u32) -> u32 {
    const READ_AND_WRITE: u32 = 0o060;
    if group != 0 && mode & READ_AND_WRITE == READ_AND_WRITE { group } else { QEMU_USER.1 }
}

fn default_engines() -> Vec<PathBuf> {
    vec![PathBuf::from("/usr/bin/qemu-system-x86_64")]
}

impl AgentConfig {
    /// A configuration with the defaults for all that is not given.
    #[must_use]
    pub fn new(dir: PathBuf, name: Name, listen: SocketAddr) -> Self {
        Self {
            dir,
            name,
            listen,
            advertise: None,
            migration_address: None,
            migration_ports: default_migration_ports(),
            migration_sources: Vec::new(),
            qemu_user: default_qemu_user(),
            engines: default_engines(),
            accelerator: AcceleratorChoice::default(),
        }
    }

    /// Reads a TOML file and checks it.
    ///
    /// # Errors
    /// [`ConfigError`]; unknown fields are errors that name the field.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(read)?;
        let mut text = String::new();
        std::io::Read::read_to_string(
            &mut std::io::Read::take(file, CONFIG_BYTES_MAX + 1),
            &mut text,
        )
        .map_err(read)?;
        if text.len() as u64 > CONFIG_BYTES_MAX {
            return Err(ConfigError::TooLarge { path: path.to_owned() });
        }
        let config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source })?;
        config.check()?;
        Ok(config)
    }

    /// Checks the bounds of every value.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for the first one that is out of bounds.
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong =
            |field, problem: &str| Err(ConfigError::Value { field, problem: problem.to_owned() });
        if !self.dir.is_absolute() {
            return wrong("dir", "must be an absolute path");
        }
        if self.listen.port() == 0 {
            return wrong("listen", "must name a port: others have to find it again");
        }
        if self.listen.ip().is_unspecified() && self.advertise.is_none() {
            return wrong("advertise", "must be given when `listen` is an unspecified address");
        }
        if self.listen.ip().is_unspecified() && self.migration_address.is_none() {
            return wrong(
                "migration_address",
                "must be given when `listen` is an unspecified address",
            );
        }
        let (first, last) = self.migration_ports;
        if first < 1024 || last < first {
            return wrong("migration_ports", "must be two rising ports from 1024 on");
        }
        if self.migration_sources.len() > SOURCES_MAX {
            return wrong("migration_sources", &format!("must name at most {SOURCES_MAX}"));
        }
        if self.qemu_user.0 == 0 || self.qemu_user.1 == 0 {
            return wrong("qemu_user", "must not be root");
        }
        if self.engines.is_empty() || self.engines.len() > ENGINES_MAX {
            return wrong("engines", &format!("must name 1 to {ENGINES_MAX} programs"));
        }
        if self.engines.iter().any(|engine| !engine.is_absolute()) {
            return wrong("engines", "must be absolute paths");
        }
        Ok(())
    }

    /// Where others reach the agent, `address:port`.
    #[must_use]
    pub fn advertised(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| self.listen.to_string())
    }

    /// Where other hosts' QEMUs connect to, without port.
    #[must_use]
    pub fn migration_host(&self) -> String {
        self.migration_address.clone().unwrap_or_else(|| self.listen.ip().to_string())
    }

    /// The ports that QEMU may listen on for a stream.
    #[must_use]
    pub fn migration_port_range(&self) -> RangeInclusive<u16> {
        self.migration_ports.0..=self.migration_ports.1
    }

    /// The folder with the host's keys and certificates.
    #[must_use]
    pub fn pki_dir(&self) -> PathBuf {
        self.dir.join("pki")
    }

    /// The folder with one folder for each running QEMU.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The ledger's file.
    #[must_use]
    pub fn ledger_file(&self) -> PathBuf {
        self.dir.join("ledger.sqlite")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minimal() -> AgentConfig {
        toml::from_str("dir = '/d'\nname = 'host-a'\nlisten = '10.0.0.1:7440'").unwrap()
    }

    #[test]
    fn qemu_is_in_the_group_that_may_use_kvm() {
        assert_eq!(qemu_group(0o20_660, 104), 104);
        assert_eq!(qemu_group(0o20_666, 104), 104);
        assert_eq!(qemu_group(0o20_640, 104), QEMU_USER.1, "reading is not enough");
        assert_eq!(qemu_group(0o20_600, 104), QEMU_USER.1);
        assert_eq!(qemu_group(0o20_660, 0), QEMU_USER.1, "never root's group");
    }

    #[test]
    fn what_is_not_said_has_its_default() {
        let config = minimal();
        config.check().unwrap();
        let listen = "10.0.0.1:7440".parse().unwrap();
        assert_eq!(config, AgentConfig::new("/d".into(), "host-a".parse().unwrap(), listen));
        assert_eq!(config.advertised(), "10.0.0.1:7440");
        assert_eq!(config.migration_host(), "10.0.0.1");
        assert_eq!(config.migration_port_range(), 49152..=49215);
    }

    #[test]
    fn unknown_fields_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agent.toml");
        std::fs::write(&file, "dir = '/d'\nname = 'a'\nlisten = '1.1.1.1:1'\nengine = 'q'")
            .unwrap();
        let error = AgentConfig::load(&file).unwrap_err();
        let text = whimbrel_api::error::chain(&error);
        assert!(text.contains("engine"), "{text}");
    }

    #[test]
    fn values_out_of_bounds_are_refused() {
        type Spoil = fn(&mut AgentConfig);
        let spoils: [(&str, Spoil); 7] = [
            ("dir", |c| c.dir = "relative".into()),
            ("listen", |c| c.listen.set_port(0)),
            ("advertise", |c| c.listen = "0.0.0.0:1".parse().unwrap()),
            ("migration_ports", |c| c.migration_ports = (49152, 49151)),
            ("qemu_user", |c| c.qemu_user = (0, 1)),
            ("engines", |c| c.engines.clear()),
            ("engines", |c| c.engines.push("qemu".into())),
        ];
        for (field, spoil) in spoils {
            let mut config = minimal();
            spoil(&mut config);
            match config.check() {
                Err(ConfigError::Value { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
}
