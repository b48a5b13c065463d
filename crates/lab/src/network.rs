//! The lab's cables: namespaces, a switch with two bridges, and a veth pair for every plug; shaping and cutting of links.
//!
//! Every link is made inside the namespaces that it joins, so nothing ever appears in the machine's own network, and all
//! of it goes with the namespaces. Names of links have at most 15 bytes (IFNAMSIZ).

use std::process::Command;

use crate::command;
use crate::error::LabError;
use crate::namespace::Namespace;
use crate::plan::{
    CLIENT, CLIENT_ADDRESS, CONTROLLER, CONTROLLER_ADDRESS, Folder, PREFIX, Plan, Rate, SWITCH,
};

/// How much of a shaped link's rate may be sent at once, within the next two bounds.
const BURST_MS: u64 = 2;
/// More than the largest packet that segmentation offload makes (64 KiB); more would only blur the rate.
const BURST_BYTES_MAX: u64 = 256 * 1024;
/// A few packets: a larger one than the burst would never be sent.
const BURST_BYTES_MIN: u64 = 8 * 1024;
/// How long a packet may wait in a shaped link's queue; short, as control messages wait behind the bulk.
const QUEUE_MS: u64 = 5;
/// The shortest queue of a slow link, so that it can hold what TCP sends to begin with.
const QUEUE_BYTES_MIN: u64 = 32 * 1024;
/// The nft table that a cut link has.
const CUT_TABLE: &str = "inet whimbrel_lab_cut";

/// Which packets a cut link drops, seen from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What arrives.
    In,
    /// What is sent.
    Out,
    /// Both.
    Both,
}

/// What is dropped on a host's management and migration link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// One-way or both ways.
    pub direction: Direction,
    /// Only TCP connections from or to these ports, first and last; none is everything.
    pub ports: Option<(u16, u16)>,
}

impl Cut {
    /// Nothing gets through.
    pub const ALL: Self = Self { direction: Direction::Both, ports: None };
    /// Only migration streams and disk copies, on QEMU's ports, are cut; the control plane goes on.
    pub const STREAMS: Self = Self { direction: Direction::Both, ports: Some((49152, 49215)) };
}

/// Makes all namespaces and joins them.
pub(crate) fn build(folder: &Folder, plan: &Plan) -> Result<(), LabError> {
    for name in plan.namespaces() {
        Namespace::at(folder.namespace(name))
            .create()
            .map_err(LabError::namespace("make", name))?;
    }
    ip(folder, SWITCH, &switch_batch(folder, plan))?;
    let end = |address, prefix| {
        format!("link set lo up\naddress add {address}/{prefix} dev eth0\nlink set eth0 up\n")
    };
    ip(folder, CONTROLLER, &end(CONTROLLER_ADDRESS, PREFIX))?;
    ip(folder, CLIENT, &end(CLIENT_ADDRESS, PREFIX))?;
    for host in &plan.hosts {
        ip(folder, &host.name, &(end(host.address, PREFIX) + "link set eth1 up\n"))?;
    }
    for host in &plan.hosts {
        shape(folder, &host.name, plan.link)?;
    }
    Ok(())
}

/// Sets the rate of a host's management and migration link, both ways.
pub(crate) fn shape(folder: &Folder, host: &str, rate: Option<Rate>) -> Result<(), LabError> {
    for (namespace, link) in [(host, "eth0".to_owned()), (SWITCH, port("m", host))] {
        tc(folder, namespace, &shape_line(&link, rate))?;
    }
    Ok(())
}

/// Drops packets on a host's management and migration link, instead of what was dropped before.
pub(crate) fn cut(folder: &Folder, host: &str, cut: Cut) -> Result<(), LabError> {
    nft(folder, host, &cut_rules(cut))
}

/// Drops nothing any more.
pub(crate) fn restore(folder: &Folder, host: &str) -> Result<(), LabError> {
    nft(folder, host, &restore_rules())
}

/// The switch's port for an end: short, as link names are.
fn port(bridge: &str, end: &str) -> String {
    format!("{bridge}-{end}")
}

fn switch_batch(folder: &Folder, plan: &Plan) -> String {
    let mut lines = vec!["link set lo up".to_owned()];
    for bridge in ["br-mgmt", "br-vm"] {
        lines.push(format!(
            "link add dev {bridge} up type bridge forward_delay 0 stp_state 0 mcast_snooping 0"
        ));
    }
    let mut plug = |bridge: &str, prefix: &str, end: &str, link: &str| {
        let (port, path) = (port(prefix, end), folder.namespace(end));
        lines.push(format!(
            "link add dev {port} type veth peer name {link} netns {}",
            path.display()
        ));
        lines.push(format!("link set {port} master {bridge} up"));
    };
    plug("br-mgmt", "m", CONTROLLER, "eth0");
    plug("br-vm", "v", CLIENT, "eth0");
    for host in &plan.hosts {
        plug("br-mgmt", "m", &host.name, "eth0");
        plug("br-vm", "v", &host.name, "eth1");
    }
    lines.join("\n") + "\n"
}

fn shape_line(link: &str, rate: Option<Rate>) -> Vec<String> {
    let words = match rate {
        // What a veth has by itself; a deletion would fail where there is nothing to delete.
        None => format!("qdisc replace dev {link} root noqueue"),
        Some(rate) => {
            let bytes_per_s = rate.bits_per_s / 8;
            let burst = (bytes_per_s * BURST_MS / 1000).clamp(BURST_BYTES_MIN, BURST_BYTES_MAX);
            let limit = burst + (bytes_per_s * QUEUE_MS / 1000).max(QUEUE_BYTES_MIN);
            format!(
                "qdisc replace dev {link} root tbf rate {}bit burst {burst} limit {limit}",
                rate.bits_per_s
            )
        }
    };
    words.split(' ').map(str::to_owned).collect()
}

fn cut_rules(cut: Cut) -> String {
    let matches: Vec<String> = match cut.ports {
        None => vec![String::new()],
        Some((first, last)) => {
            ["sport", "dport"].iter().map(|side| format!(" tcp {side} {first}-{last}")).collect()
        }
    };
    let chain = |hook: &str, link: &str| {
        let drops: String =
            matches.iter().map(|what| format!("    {link} eth0{what} drop\n")).collect();
        format!("  chain {hook} {{\n    type filter hook {hook} priority 0\n{drops}  }}\n")
    };
    let input =
        if cut.direction == Direction::Out { String::new() } else { chain("input", "iifname") };
    let output =
        if cut.direction == Direction::In { String::new() } else { chain("output", "oifname") };
    format!("{}table {CUT_TABLE} {{\n{input}{output}}}\n", restore_rules())
}

/// `delete table` fails where there is none, so one is made first.
fn restore_rules() -> String {
    format!("table {CUT_TABLE} {{ }}\ndelete table {CUT_TABLE}\n")
}

fn ip(folder: &Folder, namespace: &str, batch: &str) -> Result<(), LabError> {
    tool(folder, namespace, "ip", &["-batch", "-"], batch)
}

fn tc(folder: &Folder, namespace: &str, words: &[String]) -> Result<(), LabError> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    tool(folder, namespace, "tc", &words, "")
}

fn nft(folder: &Folder, namespace: &str, rules: &str) -> Result<(), LabError> {
    tool(folder, namespace, "nft", &["-f", "-"], rules)
}

fn tool(
    folder: &Folder,
    namespace: &str,
    program: &str,
    args: &[&str],
    input: &str,
) -> Result<(), LabError> {
    Namespace::at(folder.namespace(namespace))
        .run(|| command::run(Command::new(program).args(args), input))
        .map_err(LabError::namespace("enter", namespace))??;
    Ok(())
}
