//! Do the options fit together, to the VM's state, to the policy, and to both engines?
//!
//! QEMU takes some combinations and fails later, or misbehaves; others it refuses only when the
//! destination stands already. Here each is refused before anything is begun, with the rule's reason and
//! what to leave out. Engines are judged by what their own description of QMP names; by their version
//! only where the description is the same and the behaviour is not ([`MULTIFD_POSTCOPY_FROM`]).
//!
//! Rules of QEMU that need no check here, for nothing that a user can say leads to them: a VM's
//! definition knows no VFIO devices, and neither `x-ignore-shared`, `dirty-limit`, `switchover-ack` nor
//! `postcopy-preempt` without post-copy is ever set.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Code, EngineVersion, GuestState, Verdict, refuse, warn};
use crate::names::Name;
use crate::options::{Compression, CompressionMethod, MigrateOptions, Mode};
use crate::policy::{Consent, Policy};

/// From this QEMU on post-copy works with several connections. 7.2 accepts both and then misbehaves,
/// 10.0 refuses; what both name in their description is the same as in 10.1.
pub const MULTIFD_POSTCOPY_FROM: EngineVersion = EngineVersion { major: 10, minor: 1, micro: 0 };

/// What one engine can do for a migration, by the names in its own description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EngineAbilities {
    /// Its version.
    pub version: EngineVersion,
    /// The words of `migrate-set-capabilities`.
    pub capabilities: BTreeSet<String>,
    /// The arguments of `migrate-set-parameters`.
    pub parameters: BTreeSet<String>,
    /// The words of its argument `multifd-compression`.
    pub compressions: BTreeSet<String>,
    /// Why this host cannot receive a guest by post-copy, if so (no userfaultfd for QEMU's user).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy_obstacle: Option<String>,
    /// The size of the pages in which this host gives the guest its memory, in bytes.
    pub memory_page_bytes: u64,
}

impl EngineAbilities {
    /// Whether it has a capability.
    #[must_use]
    pub fn can(&self, capability: &str) -> bool {
        self.capabilities.contains(capability)
    }

    /// Whether its parallel connections can compress so.
    #[must_use]
    pub fn compresses(&self, method: CompressionMethod) -> bool {
        match method {
            CompressionMethod::Xbzrle => self.can("xbzrle"),
            parallel => self.can("multifd") && self.compressions.contains(parallel.as_str()),
        }
    }
}

/// Whether these two engines can do post-copy with several connections.
#[must_use]
pub fn multifd_with_postcopy(source: &EngineAbilities, destination: &EngineAbilities) -> bool {
    source.version.min(destination.version) >= MULTIFD_POSTCOPY_FROM
}

/// All that the rules look at.
#[derive(Clone, Debug)]
pub struct Combination<'a> {
    /// The VM's name.
    pub vm: &'a Name,
    /// What it is doing.
    pub state: GuestState,
    /// What the user asks for; sound by itself ([`MigrateOptions::validate`]).
    pub options: &'a MigrateOptions,
    /// The policy that applies.
    pub policy: &'a Policy,
    /// The source and its engine's abilities; none where the VM has no engine.
    pub source: (&'a Name, Option<&'a EngineAbilities>),
    /// The destination, and those of the engine that would run the VM there.
    pub destination: (&'a Name, Option<&'a EngineAbilities>),
}

/// Every combination that cannot be, with its reason; empty if there is none.
#[must_use]
pub fn combinations(facts: &Combination<'_>) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    verdicts.extend(mode_and_state(facts));
    verdicts.extend(unfit_for_mode(facts));
    verdicts.extend(against_policy(facts));
    if facts.options.mode != Mode::Offline {
        verdicts.extend(streams(facts.options));
        verdicts.extend(zerocopy(facts.options));
        if let (Some(source), Some(destination)) = (facts.source.1, facts.destination.1) {
            verdicts.extend(missing_features(facts, source, destination));
            verdicts.extend(postcopy(facts, source, destination));
        }
    }
    verdicts
}

/// Whether a VM in this state can go this way.
fn mode_and_state(facts: &Combination<'_>) -> Option<Verdict> {
    let Combination { vm, state, options, .. } = facts;
    match (options.mode, state) {
        (Mode::Offline, GuestState::Running | GuestState::Paused) => Some(refuse(
            Code::VmNotStopped,
            format!("VM {vm} is {state}; only a stopped VM can be moved offline."),
            format!("Leave --offline out, or stop it with `whimbrel vm stop {vm}`."),
        )),
        (Mode::Offline, _) | (_, GuestState::Running | GuestState::Paused) => None,
        // `check` says so already.
        (_, GuestState::Stopped | GuestState::Crashed) => None,
    }
}

/// Options that say nothing in the mode that was asked for. They are refused, for whoever gives them
/// expects something of them.
fn unfit_for_mode(facts: &Combination<'_>) -> Option<Verdict> {
    let options = facts.options;
    let of_stream = [
        ("--suspend", options.suspend, false),
        ("--parallel-connections", options.parallel_connections.is_some(), true),
        ("--compressed", options.compression.is_some(), true),
        ("--zerocopy", options.zerocopy, true),
        ("--bandwidth", options.bandwidth_bytes_per_s.is_some(), true),
        ("--migrate-address", options.migrate_address.is_some(), true),
        ("--abort-on-error", options.abort_on_error, true),
        ("--auto-converge", options.auto_converge.is_some(), false),
        ("--postcopy", options.postcopy.is_some(), false),
        ("--timeout", options.timeout.is_some(), false),
        ("--max-downtime", options.max_downtime_ms.is_some(), false),
        (
            "--available-switchover-bandwidth",
            options.available_switchover_bandwidth_bytes_per_s.is_some(),
            false,
        ),
    ];
    let (because, fits): (&str, fn(&str, bool) -> bool) = match options.mode {
        Mode::Offline => ("no memory is moved", |_, _| false),
        Mode::Static => ("the guest stands still meanwhile", |name, static_too| {
            static_too || name == "--suspend"
        }),
        Mode::Auto | Mode::Live | Mode::Quick => return None,
    };
    let unfit: Vec<&str> = of_stream
        .iter()
        .filter(|(name, given, static_too)| *given && !fits(name, *static_too))
        .map(|(name, ..)| *name)
        .collect();
    if unfit.is_empty() {
        return None;
    }
    let (mode, unfit) = (options.mode, unfit.join(", "));
    Some(refuse(
        Code::OptionUnfit,
        format!("With --{mode} {because}, so {unfit} cannot do anything."),
        format!("Leave out {unfit}, or --{mode}."),
    ))
}

fn against_policy(facts: &Combination<'_>) -> Vec<Verdict> {
    let Combination { options, policy, .. } = facts;
    let name = &policy.name;
    let mode = options.mode;
    let forbidden = [
        ("post-copy", "--postcopy", options.postcopy.is_some(), policy.allow_postcopy),
        ("throttling", "--auto-converge", options.auto_converge.is_some(), policy.allow_throttle),
        ("stopping the guest", "--static", mode == Mode::Static, policy.allow_static),
        ("stopping the guest", "--quick", mode == Mode::Quick, policy.allow_static),
    ];
    let mut verdicts: Vec<Verdict> = forbidden
        .into_iter()
        .filter(|(_, _, asked, consent)| *asked && *consent == Consent::Never)
        .map(|(what, option, ..)| {
            refuse(
                Code::PolicyForbids,
                format!("Policy {name} forbids {what}, which {option} asks for."),
                format!("Leave out {option}, or choose another policy."),
            )
        })
        .collect();
    if policy.require_tls && !options.tls && mode != Mode::Offline {
        verdicts.push(refuse(
            Code::PolicyForbids,
            format!("Policy {name} wants an encrypted stream, and --no-tls asks for none."),
            "Leave out --no-tls, or choose another policy.",
        ));
    }
    verdicts
}

/// The methods that were asked for by name.
fn methods(options: &MigrateOptions) -> &[CompressionMethod] {
    options.compression.as_ref().map_or(&[], |compression| &compression.methods)
}

/// Whether compression was asked for and can only be xbzrle, or only zlib or zstd.
fn only(options: &MigrateOptions, parallel: bool) -> bool {
    let methods = methods(options);
    !methods.is_empty() && methods.iter().all(|method| method.is_parallel() == parallel)
}

/// Several connections are wanted by number, or by a method that knows nothing else.
fn wants_multifd(options: &MigrateOptions) -> bool {
    options.parallel_connections.is_some() || options.zerocopy || only(options, true)
}

fn streams(options: &MigrateOptions) -> Option<Verdict> {
    if options.parallel_connections.is_none() || !only(options, false) {
        return None;
    }
    Some(refuse(
        Code::XbzrleMultifd,
        "xbzrle compares a page with what was last sent of it, on one connection; it does not work on \
         parallel connections."
            .into(),
        "Leave out --parallel and --parallel-connections, or take zstd or zlib instead of xbzrle.",
    ))
}

fn zerocopy(options: &MigrateOptions) -> Vec<Verdict> {
    if !options.zerocopy {
        return Vec::new();
    }
    let mut verdicts = Vec::new();
    if options.parallel_connections.is_none() {
        verdicts.push(refuse(
            Code::ZerocopyAlone,
            "--zerocopy works on parallel connections only, and none are asked for.".into(),
            "Add --parallel-connections N, or leave out --zerocopy.",
        ));
    }
    if options.tls {
        verdicts.push(refuse(
            Code::ZerocopyTls,
            "--zerocopy sends pages as they lie in memory; TLS has to encrypt them first.".into(),
            "Leave out --zerocopy, or add --no-tls where the network is your own.",
        ));
    }
    if options.compression.is_some() {
        verdicts.push(refuse(
            Code::ZerocopyCompression,
            "--zerocopy sends pages as they lie in memory; compression makes others of them."
                .into(),
            "Leave out --zerocopy or --compressed.",
        ));
    }
    verdicts
}

/// What an option needs, and which of the two engines does not have it.
fn missing_features(
    facts: &Combination<'_>,
    source: &EngineAbilities,
    destination: &EngineAbilities,
) -> Vec<Verdict> {
    let options = facts.options;
    let mut verdicts = Vec::new();
    let mut need = |option: &str, feature: &str, at_source: bool, at_destination: bool| {
        for (has, (host, _), engine) in
            [(at_source, facts.source, source), (at_destination, facts.destination, destination)]
        {
            if !has {
                verdicts.push(refuse(
                    Code::EngineFeature,
                    format!(
                        "QEMU {} on host {host} has no {feature}, which {option} needs.",
                        engine.version
                    ),
                    format!("Leave out {option}, or install a newer QEMU on {host}."),
                ));
            }
        }
    };
    let mut both = |option: &str, capability: &str| {
        need(option, capability, source.can(capability), destination.can(capability));
    };
    if options.parallel_connections.is_some() {
        both("--parallel-connections", "multifd");
    }
    if options.postcopy.is_some() {
        both("--postcopy", "postcopy-ram");
    }
    // These are matters of the source alone.
    if options.auto_converge.is_some() {
        need("--auto-converge", "auto-converge", source.can("auto-converge"), true);
    }
    if options.zerocopy {
        need("--zerocopy", "zero-copy-send", source.can("zero-copy-send"), true);
    }
    if options.available_switchover_bandwidth_bytes_per_s.is_some() {
        let parameter = "avail-switchover-bandwidth";
        let has = source.parameters.contains(parameter);
        need("--available-switchover-bandwidth", parameter, has, true);
    }
    if let Some(compression) = &options.compression {
        let (at_source, at_destination) =
            (compresses(source, compression), compresses(destination, compression));
        let names: Vec<&str> = wanted(compression).iter().map(|method| method.as_str()).collect();
        need(
            "--compressed",
            &format!("compression by {}", names.join(" or ")),
            at_source,
            at_destination,
        );
    }
    verdicts
}

fn wanted(compression: &Compression) -> &[CompressionMethod] {
    if compression.methods.is_empty() { &CompressionMethod::ALL } else { &compression.methods }
}

fn compresses(engine: &EngineAbilities, compression: &Compression) -> bool {
    wanted(compression).iter().any(|method| engine.compresses(*method))
}

fn postcopy(
    facts: &Combination<'_>,
    source: &EngineAbilities,
    destination: &EngineAbilities,
) -> Vec<Verdict> {
    let options = facts.options;
    if options.postcopy.is_none() {
        return Vec::new();
    }
    let mut verdicts = Vec::new();
    if wants_multifd(options) && !multifd_with_postcopy(source, destination) {
        let (least, what) = (
            source.version.min(destination.version),
            if options.parallel_connections.is_some() {
                "--parallel-connections"
            } else {
                "zlib and zstd"
            },
        );
        verdicts.push(refuse(
            Code::PostcopyMultifd,
            format!(
                "Post-copy does not work on parallel connections before QEMU {MULTIFD_POSTCOPY_FROM}, and \
                 one of the two is {least}; {what} wants parallel connections."
            ),
            format!("Leave out --postcopy, or {what}."),
        ));
    }
    let host = facts.destination.0;
    if let Some(because) = &destination.postcopy_obstacle {
        verdicts.push(refuse(
            Code::PostcopyObstacle,
            format!("Host {host} cannot receive by post-copy: {because}."),
            format!("Leave out --postcopy, or allow userfaultfd to QEMU's user on {host}."),
        ));
    }
    let (here, there) = (source.memory_page_bytes, destination.memory_page_bytes);
    if here != there {
        verdicts.push(refuse(
            Code::PostcopyPageSize,
            format!(
                "Post-copy places whole pages of the host, and they are of {} KiB on {} and of {} KiB on \
                 {host}.",
                here >> 10,
                facts.source.0,
                there >> 10
            ),
            "Leave out --postcopy, or give the guest pages of the same size on both hosts.",
        ));
    }
    let allowed = facts.policy.allow_postcopy != Consent::Never;
    if verdicts.is_empty() && allowed && options.mode != Mode::Static {
        verdicts.push(warn(
            Code::PostcopyRisk,
            format!(
                "While post-copy lasts, VM {} depends on both hosts: if either QEMU ends, or the network \
                 between them never comes back, its memory is lost and it starts again from its disks.",
                facts.vm
            ),
            "Leave out --postcopy if that is no price for a short pause.",
        ));
    }
    verdicts
}

#[cfg(test)]
pub(crate) mod tests;
