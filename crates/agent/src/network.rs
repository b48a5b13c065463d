//! The host's side of the pool's networks: a bridge for each, the uplink in it, and a tap for each network card.
//!
//! Everything happens in the network namespace in which the agent was started. Interfaces are changed with
//! `change()` (RTM_NEWLINK) and read back: rtnetlink's `set()` (RTM_SETLINK) silently ignores what it cannot do to a
//! bridge. A tap is not persistent: it lives as long as QEMU holds its descriptor, and vanishes with it.

mod tap;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use futures::TryStreamExt;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkUnspec};
use whimbrel_api::pool::Network;
use whimbrel_api::vm::Nic;
use whimbrel_api::{ApiError, ErrorCode, Name};

pub use tap::TapError;

/// Longest name of an interface, in bytes (Linux' IFNAMSIZ is 16 with the closing zero).
pub const INTERFACE_NAME_BYTES_MAX: usize = 15;

/// Why an interface is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is no netlink socket.
    #[error("cannot open a netlink socket")]
    Netlink(#[source] std::io::Error),
    /// The kernel refused.
    #[error("cannot {doing} {interface}")]
    Kernel {
        /// What was to be done.
        doing: &'static str,
        /// The interface.
        interface: String,
        /// Why.
        #[source]
        source: rtnetlink::Error,
    },
    /// There is no such interface.
    #[error("there is no interface {0} on this host")]
    NoInterface(String),
    /// The interface of that name is not a bridge.
    #[error("{0} exists on this host and is not a bridge")]
    NotABridge(String),
    /// The uplink is a port of another bridge.
    #[error("{uplink} is a port of another bridge already")]
    UplinkTaken {
        /// The uplink.
        uplink: String,
    },
    /// The kernel said yes, and it is not so.
    #[error("{interface} was to be {what}, and is not")]
    NotDone {
        /// The interface.
        interface: String,
        /// What it should be.
        what: &'static str,
    },
    /// The tap could not be made.
    #[error("cannot make the tap {name}")]
    Tap {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: TapError,
    },
    /// No such network.
    #[error("this host has no network `{0}`")]
    Unknown(Name),
}

impl From<NetworkError> for ApiError {
    fn from(error: NetworkError) -> Self {
        let code = match &error {
            NetworkError::Unknown(_) | NetworkError::NoInterface(_) => ErrorCode::NotFound,
            NetworkError::NotABridge(_) | NetworkError::UplinkTaken { .. } => ErrorCode::InUse,
            _ => ErrorCode::Internal,
        };
        ApiError::new(code, whimbrel_api::error::chain(&error))
    }
}

/// A tap that was made for a network card; the interface vanishes when the descriptor and its copies are closed.
#[derive(Debug)]
pub struct Tap {
    /// The interface's name.
    pub name: String,
    /// For QEMU.
    pub descriptor: OwnedFd,
}

/// An interface as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Interface {
    index: u32,
    up: bool,
    controller: Option<u32>,
    mtu: u32,
    is_bridge: bool,
}

/// The networks of this host.
#[derive(Debug)]
pub struct Networks {
    handle: Handle,
    known: Mutex<BTreeMap<Name, Network>>,
}

impl Networks {
    /// For the network namespace of the calling thread. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`NetworkError::Netlink`].
    pub fn new() -> Result<Self, NetworkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Netlink)?;
        tokio::spawn(connection);
        Ok(Self { handle, known: Mutex::default() })
    }

    /// Checks a definition before anything is touched.
    ///
    /// # Errors
    /// `bad-name` for an interface name that Linux, or a careful reader, would not take.
    pub fn check(network: &Network) -> Result<(), ApiError> {
        for interface in std::iter::once(&network.bridge).chain(&network.uplink) {
            let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            let good = (1..=INTERFACE_NAME_BYTES_MAX).contains(&interface.len())
                && interface.chars().all(plain)
                && !interface.starts_with(['.', '-']);
            if !good {
                return Err(ApiError::new(
                    ErrorCode::BadName,
                    format!(
                        "`{}` is no interface name: 1 to {INTERFACE_NAME_BYTES_MAX} of letters, digits, '.', '_' and '-'",
                        interface.chars().take(32).collect::<String>().escape_debug()
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Makes a network known, whether its bridge is there or not.
    pub fn remember(&self, network: Network) {
        self.known().insert(network.name.clone(), network);
    }

    /// Makes sure that a network's bridge is there and up, with its uplink in it; from then on the network is known.
    /// Repeating it changes nothing.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn ensure(&self, network: &Network) -> Result<(), NetworkError> {
        let bridge = self.ensure_bridge(&network.bridge).await?;
        if let Some(uplink) = &network.uplink {
            self.ensure_uplink(uplink, &bridge).await?;
        }
        self.known().insert(network.name.clone(), network.clone());
        Ok(())
    }

    /// Whether a bridge is on this host.
    ///
    /// # Errors
    /// [`NetworkError::Kernel`].
    pub async fn bridge_exists(&self, bridge: &str) -> Result<bool, NetworkError> {
        Ok(self.find(bridge).await?.is_some())
    }

    /// Whether a known network uses a bridge.
    #[must_use]
    pub fn bridge_is_used(&self, bridge: &str) -> bool {
        self.known().values().any(|network| network.bridge == bridge)
    }

    /// A known network.
    #[must_use]
    pub fn get(&self, name: &Name) -> Option<Network> {
        self.known().get(name).cloned()
    }

    /// Forgets a network; its bridge stays.
    pub fn forget(&self, name: &Name) -> Option<Network> {
        self.known().remove(name)
    }

    /// The known networks whose bridge is there.
    pub async fn present(&self) -> Vec<Name> {
        let known: Vec<Network> = self.known().values().cloned().collect();
        let mut present = Vec::new();
        for network in known {
            if matches!(self.find(&network.bridge).await, Ok(Some(found)) if found.is_bridge) {
                present.push(network.name);
            }
        }
        present
    }

    /// Makes a tap for a network card and puts it into its network's bridge.
    ///
    /// # Errors
    /// [`NetworkError`]; nothing is left then.
    pub async fn make_tap(&self, name: &str, nic: &Nic) -> Result<Tap, NetworkError> {
        let network = self.get(&nic.network).ok_or(NetworkError::Unknown(nic.network.clone()))?;
        let bridge = self.get_bridge(&network.bridge).await?;
        let descriptor = tap::open(name)
            .map_err(|source| NetworkError::Tap { name: name.to_owned(), source })?;
        // From here on dropping the descriptor takes the interface away.
        disable_ipv6(name);
        let found = self.must_find(name).await?;
        let mut message =
            LinkUnspec::new_with_index(found.index).mtu(bridge.mtu).controller(bridge.index).up();
        if let Some(address) = host_side_address(&nic.mac) {
            message = message.address(address);
        }
        let change = self.handle.link().change(message.build()).execute().await;
        change.map_err(kernel("set up", name))?;
        let found = self.must_find(name).await?;
        if found.controller != Some(bridge.index) {
            return Err(not_done(name, "in its bridge"));
        }
        if !found.up || found.mtu != bridge.mtu {
            return Err(not_done(name, "up with its bridge's MTU"));
        }
        Ok(Tap { name: name.to_owned(), descriptor })
    }

    /// Removes an interface; one that is not there is no error.
    ///
    /// # Errors
    /// [`NetworkError::Kernel`].
    pub async fn remove(&self, name: &str) -> Result<(), NetworkError> {
        let Some(found) = self.find(name).await? else { return Ok(()) };
        match self.handle.link().del(found.index).execute().await {
            Err(error) if is_absent(&error) => Ok(()),
            other => other.map_err(kernel("remove", name)),
        }
    }

    async fn ensure_bridge(&self, name: &str) -> Result<Interface, NetworkError> {
        if self.find(name).await?.is_none() {
            // Without STP a new port forwards at once, which a migrated guest needs.
            let made = self.handle.link().add(LinkBridge::new(name).build()).execute().await;
            made.map_err(kernel("make the bridge", name))?;
            disable_ipv6(name);
        }
        let bridge = self.get_bridge(name).await?;
        self.set_up(name, &bridge).await
    }

    async fn ensure_uplink(&self, uplink: &str, bridge: &Interface) -> Result<(), NetworkError> {
        let found =
            self.find(uplink).await?.ok_or_else(|| NetworkError::NoInterface(uplink.to_owned()))?;
        match found.controller {
            Some(index) if index == bridge.index => {}
            Some(_) => return Err(NetworkError::UplinkTaken { uplink: uplink.to_owned() }),
            None => {
                let message =
                    LinkUnspec::new_with_index(found.index).controller(bridge.index).build();
                let change = self.handle.link().change(message).execute().await;
                change.map_err(kernel("attach", uplink))?;
                if self.must_find(uplink).await?.controller != Some(bridge.index) {
                    return Err(not_done(uplink, "in its bridge"));
                }
            }
        }
        self.set_up(uplink, &found).await.map(drop)
    }

    async fn set_up(&self, name: &str, found: &Interface) -> Result<Interface, NetworkError> {
        if !found.up {
            let message = LinkUnspec::new_with_index(found.index).up().build();
            let change = self.handle.link().change(message).execute().await;
            change.map_err(kernel("bring up", name))?;
        }
        let found = self.must_find(name).await?;
        if found.up { Ok(found) } else { Err(not_done(name, "up")) }
    }

    async fn get_bridge(&self, name: &str) -> Result<Interface, NetworkError> {
        match self.find(name).await? {
            None => Err(NetworkError::NoInterface(name.to_owned())),
            Some(found) if !found.is_bridge => Err(NetworkError::NotABridge(name.to_owned())),
            Some(found) => Ok(found),
        }
    }

    async fn must_find(&self, name: &str) -> Result<Interface, NetworkError> {
        self.find(name).await?.ok_or_else(|| NetworkError::NoInterface(name.to_owned()))
    }

    async fn find(&self, name: &str) -> Result<Option<Interface>, NetworkError> {
        let request = self.handle.link().get().match_name(name);
        match request.execute().try_next().await {
            Ok(message) => Ok(message.map(|message| interface(&message))),
            Err(error) if is_absent(&error) => Ok(None),
            Err(source) => Err(kernel("look at", name)(source)),
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, BTreeMap<Name, Network>> {
        // Each change is one call, so the map is whole even after a panic.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name of the tap of a run's `index`-th card: `wt`, ten hexadecimal digits of the run's name, `-`, the index. Two
/// runs of one VM (a failed try and the next one) have different ones.
#[must_use]
pub fn tap_name(run: &str, index: usize) -> String {
    // FNV-1a: short, and the same in every version of the agent, since the journal holds the names.
    let hash = run.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("wt{:010x}-{index}", hash >> 24)
}

/// The tap's own address: the card's with `fe` in front, as libvirt does. A bridge takes the lowest address of its
/// ports for its own; this one is never the lowest, so that the bridge's address stays when guests come and go.
fn host_side_address(mac: &str) -> Option<Vec<u8>> {
    let bytes: Option<Vec<u8>> =
        mac.split(':').map(|pair| u8::from_str_radix(pair, 16).ok()).collect();
    let mut bytes = bytes.filter(|bytes| bytes.len() == 6)?;
    *bytes.first_mut()? = 0xfe;
    Some(bytes)
}

/// The host has nothing to say in a guests' network; without this the kernel gives the interface an address of its own.
fn disable_ipv6(interface: &str) {
    // A kernel without IPv6 has no such file, and no such address either.
    let file = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    if let Err(error) = std::fs::write(file, "1") {
        tracing::debug!(interface, %error, "IPv6 was not switched off");
    }
}

fn interface(message: &LinkMessage) -> Interface {
    let mut found = Interface {
        index: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        controller: None,
        mtu: 0,
        is_bridge: false,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Controller(index) => found.controller = Some(*index),
            LinkAttribute::Mtu(mtu) => found.mtu = *mtu,
            LinkAttribute::LinkInfo(infos) => {
                found.is_bridge =
                    infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Bridge)));
            }
            _ => {}
        }
    }
    found
}

fn kernel(doing: &'static str, interface: &str) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    let interface = interface.to_owned();
    move |source| NetworkError::Kernel { doing, interface, source }
}

fn not_done(interface: &str, what: &'static str) -> NetworkError {
    NetworkError::NotDone { interface: interface.to_owned(), what }
}

fn is_absent(error: &rtnetlink::Error) -> bool {
    let absent = rustix::io::Errno::NODEV.raw_os_error();
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == -absent)
}

#[cfg(test)]
mod tests;
