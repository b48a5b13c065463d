//! What a lab consists of, before any of it exists: hosts, addresses, and where everything is in the lab's folder.
//!
//! All addresses are from 198.18.0.0/15, which is set aside for tests of network devices (RFC 2544) and routed nowhere.
//!
//! ```text
//!              198.18.0.0/24 management and migration        198.19.0.0/24 the VMs' network
//! controller   eth0 198.18.0.1                               -
//! host-a…p     eth0 198.18.0.11…26 (shaped)                  eth1, uplink of the VM bridge, no address
//! client       -                                             eth0 198.19.0.1
//! guests       -                                             198.19.0.101…
//! switch       bridge br-mgmt                                bridge br-vm
//! ```

use std::fmt;
use std::fs::{DirEntry, read_dir};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::LabError;

/// The most hosts that a lab can have.
pub const HOSTS_MAX: u8 = 16;
/// The hosts of a lab that nobody asked to be otherwise.
pub const HOSTS_DEFAULT: u8 = 3;
/// Where a lab lives that nobody put elsewhere.
pub const DIR_DEFAULT: &str = "/var/tmp/whimbrel-lab";
/// Says where the downloads of `scripts/setup` are, when they are not in [`DIR_DEFAULT`].
pub const CACHE_VARIABLE: &str = "WHIMBREL_CACHE";

/// The namespace of the controller.
pub const CONTROLLER: &str = "controller";
/// The namespace of the probe, in the VMs' network.
pub const CLIENT: &str = "client";
/// The namespace that holds the cables together.
pub(crate) const SWITCH: &str = "switch";

/// The controller's address in the management network.
pub const CONTROLLER_ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// The client's address in the VMs' network.
pub const CLIENT_ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 19, 0, 1);
/// The length of both networks' prefixes.
pub const PREFIX: u8 = 24;
/// The controller's port.
pub const CONTROLLER_PORT: u16 = 8440;
/// The agents' port.
pub const AGENT_PORT: u16 = 8441;
/// Who QEMU runs as in the lab: a number that Debian and systemd leave free, and that user namespaces of 65536 ids have.
pub const QEMU_USER: &str = "60900:60900";
/// The QEMU that Debian's package installs.
pub const SYSTEM_ENGINE: &str = "/usr/bin/qemu-system-x86_64";

/// The address of the `number`th guest, counted from 0; at most 100 are told apart.
#[must_use]
pub const fn guest_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 19, 0, 101 + number % 100)
}

/// A link's rate, written like `1gbit`, `250mbit` or `64kbit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rate {
    /// Bits a second.
    pub bits_per_s: u64,
}

impl Rate {
    const MIN_BITS_PER_S: u64 = 8_000;
    const MAX_BITS_PER_S: u64 = 400_000_000_000;
    const UNITS: [(&str, u64); 3] = [("gbit", 1_000_000_000), ("mbit", 1_000_000), ("kbit", 1_000)];
}

impl FromStr for Rate {
    type Err = LabError;

    fn from_str(text: &str) -> Result<Self, LabError> {
        let bad = || LabError::BadConfig {
            what: format!(
                "`{text}` is no link rate; write it like 1gbit, 250mbit or 64kbit, from 8kbit to 400gbit"
            ),
        };
        let lower = text.to_ascii_lowercase();
        let parsed = Self::UNITS.iter().find_map(|(unit, factor)| {
            lower.strip_suffix(unit)?.parse::<u64>().ok()?.checked_mul(*factor)
        });
        parsed
            .filter(|bits| (Self::MIN_BITS_PER_S..=Self::MAX_BITS_PER_S).contains(bits))
            .map(|bits_per_s| Self { bits_per_s })
            .ok_or_else(bad)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fitting =
            Self::UNITS.iter().find(|(_, factor)| self.bits_per_s.is_multiple_of(*factor));
        match fitting {
            Some((unit, factor)) => write!(f, "{}{unit}", self.bits_per_s / factor),
            None => write!(f, "{}bit", self.bits_per_s),
        }
    }
}

/// What a lab is to be like.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// The lab's folder, absolute; everything that the lab makes is in it.
    pub dir: PathBuf,
    /// What `scripts/setup` downloaded.
    pub cache: PathBuf,
    /// How many hosts, 1 to [`HOSTS_MAX`].
    pub hosts: u8,
    /// The rate of each host's management and migration link, each way; none is as fast as the machine.
    pub link: Option<Rate>,
    /// QEMUs, dealt out to the hosts in turn: with two, host-a and host-c have the first and host-b has the second.
    pub engines: Vec<PathBuf>,
    /// The `whimbrel` binary that the lab's controller, agents and commands are.
    pub binary: PathBuf,
}

impl LabConfig {
    /// The usual lab in a folder: three hosts, no shaping, the newest QEMU of the cache.
    #[must_use]
    pub fn new(dir: &Path, binary: &Path) -> Self {
        let cache = cache_dir();
        Self {
            dir: dir.to_owned(),
            engines: vec![newest_engine(&cache)],
            cache,
            hosts: HOSTS_DEFAULT,
            link: None,
            binary: binary.to_owned(),
        }
    }

    /// The QEMU that a user means by a version of the cache, such as `10.0`, or by a path.
    #[must_use]
    pub fn engine(&self, text: &str) -> PathBuf {
        if text.contains('/') {
            PathBuf::from(text)
        } else {
            self.cache.join("engines").join(text).join("qemu-system-x86_64")
        }
    }
}

/// The newest QEMU of the cache, or the system's where there is none. Without KVM a guest of 7.2 has to have its dirty pages
/// collected a slow way (see `whimbrel_qemu::command_line`), and is held up by it.
fn newest_engine(cache: &Path) -> PathBuf {
    let version = |entry: &DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        name.split('.').map(|number| number.parse().ok()).collect::<Option<Vec<u32>>>()
    };
    let unpacked = read_dir(cache.join("engines")).into_iter().flatten().flatten();
    let engines = unpacked
        .filter_map(|entry| Some((version(&entry)?, entry.path().join("qemu-system-x86_64"))));
    let newest = engines.filter(|(_, path)| path.is_file()).max();
    newest.map_or_else(|| PathBuf::from(SYSTEM_ENGINE), |(_, path)| path)
}

/// Where the downloads of `scripts/setup` are: [`CACHE_VARIABLE`], else in [`DIR_DEFAULT`].
#[must_use]
pub fn cache_dir() -> PathBuf {
    std::env::var_os(CACHE_VARIABLE)
        .map_or_else(|| Path::new(DIR_DEFAULT).join("cache"), PathBuf::from)
}

/// A host of a lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostPlan {
    /// Its name in the pool and in the lab: `host-a` and so on.
    pub name: String,
    /// Its address in the management network.
    pub address: Ipv4Addr,
    /// Its QEMU.
    pub engine: PathBuf,
}

/// A lab as it is recorded in its folder, from before anything of it exists until all of it is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Plan {
    pub(crate) hosts: Vec<HostPlan>,
    pub(crate) link: Option<Rate>,
    pub(crate) binary: PathBuf,
    pub(crate) cache: PathBuf,
    /// Whether `up` came to its end.
    pub(crate) complete: bool,
}

impl Plan {
    pub(crate) fn new(config: &LabConfig) -> Result<Self, LabError> {
        let bad = |what: String| Err(LabError::BadConfig { what });
        if !(1..=HOSTS_MAX).contains(&config.hosts) {
            return bad(format!("a lab has 1 to {HOSTS_MAX} hosts, not {}", config.hosts));
        }
        if !config.dir.is_absolute() {
            return bad(format!(
                "the lab's folder must be an absolute path, not {}",
                config.dir.display()
            ));
        }
        if config.engines.is_empty() {
            return bad("a lab needs a QEMU".to_owned());
        }
        let host = |(number, engine): (u8, &PathBuf)| HostPlan {
            name: format!("host-{}", char::from(b'a' + number)),
            address: Ipv4Addr::new(198, 18, 0, 11 + number),
            engine: engine.clone(),
        };
        Ok(Self {
            hosts: (0..config.hosts).zip(config.engines.iter().cycle()).map(host).collect(),
            link: config.link,
            binary: config.binary.clone(),
            cache: config.cache.clone(),
            complete: false,
        })
    }

    /// Everything that has a namespace; the switch comes first, as the others are plugged into it.
    pub(crate) fn namespaces(&self) -> impl Iterator<Item = &str> {
        [SWITCH, CONTROLLER, CLIENT]
            .into_iter()
            .chain(self.hosts.iter().map(|host| host.name.as_str()))
    }
}

/// Where everything is in a lab's folder.
#[derive(Clone, Debug)]
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    /// The lab's record: a [`Plan`].
    pub(crate) fn record(&self) -> PathBuf {
        self.0.join("lab.json")
    }

    /// Held while a command changes the lab.
    pub(crate) fn lock(&self) -> PathBuf {
        self.0.join(".lab.lock")
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.0.join("run")
    }

    /// The file that a namespace is bound to.
    pub(crate) fn namespace(&self, name: &str) -> PathBuf {
        self.run().join("netns").join(name)
    }

    /// The process that is a host's agent, or the controller.
    pub(crate) fn daemon(&self, name: &str) -> PathBuf {
        self.run().join(format!("{name}.json"))
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.0.join("log")
    }

    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.logs().join(format!("{name}.log"))
    }

    pub(crate) fn controller(&self) -> PathBuf {
        self.0.join("controller")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.0.join("controller.sock")
    }

    pub(crate) fn client_config(&self) -> PathBuf {
        self.0.join("client.toml")
    }

    pub(crate) fn host(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn shared(&self) -> PathBuf {
        self.0.join("shared")
    }

    pub(crate) fn vm(&self) -> PathBuf {
        self.0.join("web01.toml")
    }

    /// Everything that a lab makes beside its record, its logs and its lock: what `up` finds in the way and `down` removes.
    pub(crate) fn contents(&self) -> impl Iterator<Item = PathBuf> {
        let hosts =
            (0..HOSTS_MAX).map(|number| self.host(&format!("host-{}", char::from(b'a' + number))));
        let others = [
            self.run(),
            self.controller(),
            self.socket(),
            self.client_config(),
            self.shared(),
            self.vm(),
        ];
        others.into_iter().chain(hosts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(hosts: u8) -> LabConfig {
        let engines = vec![PathBuf::from("/q7"), PathBuf::from("/q10")];
        LabConfig { hosts, engines, ..LabConfig::new(Path::new("/lab"), Path::new("/whimbrel")) }
    }

    #[test]
    fn ten_is_newer_than_seven() {
        let cache = tempfile::tempdir().unwrap();
        assert_eq!(newest_engine(cache.path()), Path::new(SYSTEM_ENGINE));
        for version in ["7.2", "10.0", "broken", "11.0"] {
            std::fs::create_dir_all(cache.path().join("engines").join(version)).unwrap();
        }
        for version in ["7.2", "10.0", "broken"] {
            let program = cache.path().join("engines").join(version).join("qemu-system-x86_64");
            std::fs::write(program, "").unwrap();
        }
        let newest = cache.path().join("engines/10.0/qemu-system-x86_64");
        assert_eq!(newest_engine(cache.path()), newest);
    }

    #[test]
    fn hosts_have_names_addresses_and_engines_in_turn() {
        let plan = Plan::new(&config(16)).unwrap();
        let of = |number: usize| {
            let host = &plan.hosts[number];
            (host.name.as_str(), host.address.to_string(), host.engine.to_str().unwrap())
        };
        assert_eq!(of(0), ("host-a", "198.18.0.11".to_owned(), "/q7"));
        assert_eq!(of(1), ("host-b", "198.18.0.12".to_owned(), "/q10"));
        assert_eq!(of(15), ("host-p", "198.18.0.26".to_owned(), "/q10"));
        assert_eq!(plan.namespaces().count(), 19);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for config in [
            config(0),
            config(17),
            LabConfig { dir: PathBuf::from("lab"), ..config(1) },
            LabConfig { engines: Vec::new(), ..config(1) },
        ] {
            assert!(matches!(Plan::new(&config), Err(LabError::BadConfig { .. })), "{config:?}");
        }
    }

    #[test]
    fn rates_are_read_and_written() {
        for (text, bits) in
            [("1gbit", 1_000_000_000), ("2500mbit", 2_500_000_000), ("64kbit", 64_000)]
        {
            let rate: Rate = text.parse().unwrap();
            assert_eq!((rate.bits_per_s, rate.to_string().parse::<Rate>().unwrap()), (bits, rate));
        }
        assert_eq!("1GBit".parse::<Rate>().unwrap().to_string(), "1gbit");
        for text in [
            "",
            "gbit",
            "1",
            "-1gbit",
            "1.5gbit",
            "7kbit",
            "401gbit",
            "99999999999gbit",
            "1gbit; reboot",
        ] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }

    #[test]
    fn engines_are_named_by_version_or_path() {
        let config = LabConfig { cache: PathBuf::from("/c"), ..config(1) };
        assert_eq!(config.engine("10.0"), Path::new("/c/engines/10.0/qemu-system-x86_64"));
        assert_eq!(config.engine("/opt/qemu"), Path::new("/opt/qemu"));
    }
}
