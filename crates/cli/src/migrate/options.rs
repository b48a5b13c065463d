//! How a VM is to be moved, as flags: every option of `virsh migrate` that makes sense here, under virsh's name.
//!
//! `migrate` and `plan` take the same ones. What is wrong with them by themselves is told here, all at once, before anybody
//! is asked; what does not fit the VM, the policy or the two QEMUs is preflight's matter. Each help text says the default and
//! what refuses the option; `docs/operating.md` has the same as a table, which a test compares.

use clap::Args;
use whimbrel_api::Name;
use whimbrel_api::migration::{
    AutoConverge, Compression, CompressionMethod, MigrateOptions, Mode, Postcopy, Timeout,
    TimeoutAction, limits,
};

use super::problems::Problems;
use crate::failure::Failure;
use crate::values::{self, Given};

/// All of them.
#[derive(Debug, Args)]
pub(crate) struct MoveOptions {
    #[command(flatten)]
    way: Way,
    #[command(flatten)]
    definition: Definition,
    #[command(flatten)]
    stream: Stream,
    #[command(flatten)]
    fast: WhenFast,
    #[command(flatten)]
    packing: Packing,
}

impl MoveOptions {
    /// The options as the request has them; or all that is wrong with them.
    pub(crate) fn read(self) -> Result<MigrateOptions, Failure> {
        let mut problems = Problems::default();
        let mut options = MigrateOptions::default();
        self.way.read(&mut options, &mut problems);
        self.definition.read(&mut options, &mut problems);
        self.stream.read(&mut options, &mut problems);
        self.fast.read(&mut options, &mut problems);
        self.packing.read(&mut options, &mut problems);
        problems.found(&options.validate());
        problems.end().map(|()| options)
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Way")]
struct Way {
    /// Live or not at all
    ///
    /// Default: auto. Refused with another way; for a VM that is not running.
    #[arg(long)]
    live: bool,
    /// Move a stopped VM's definition and firmware variables; it stays stopped
    ///
    /// Default: auto. Refused for a VM that is not stopped; with another way; with any option about memory.
    #[arg(long)]
    offline: bool,
    /// The guest stands still while its state is moved
    ///
    /// Default: auto. Refused with another way, --auto-converge, --postcopy, --timeout, --max-downtime or
    /// --available-switchover-bandwidth; where the policy forbids stopping the guest.
    #[arg(long = "static")]
    stand_still: bool,
    /// Live if that converges, else as --static
    ///
    /// Default: auto. Refused with another way; where the policy forbids stopping the guest.
    #[arg(long)]
    quick: bool,
    /// The policy that says what the move may cost; see `whimbrel policy list`
    ///
    /// Default: the VM's, else the pool's, else balanced. Refused if there is none of that name.
    #[arg(long, value_name = "NAME", value_parser = values::given(values::name))]
    policy: Option<Given<Name>>,
}

impl Way {
    fn read(self, options: &mut MigrateOptions, problems: &mut Problems) {
        let ways = [
            ("--live", self.live, Mode::Live),
            ("--offline", self.offline, Mode::Offline),
            ("--static", self.stand_still, Mode::Static),
            ("--quick", self.quick, Mode::Quick),
        ];
        let given: Vec<_> = ways.into_iter().filter(|(_, given, _)| *given).collect();
        match given.as_slice() {
            [] => {}
            [(_, _, mode)] => options.mode = *mode,
            [(first, ..), others @ ..] => {
                let others: Vec<&str> = others.iter().map(|(option, ..)| *option).collect();
                let others = others.join(" and ");
                problems.contradiction(first, format!("and {others} are different ways: take one"));
            }
        }
        options.policy = problems.value("--policy", self.policy);
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "The VM here and there")]
struct Definition {
    /// The VM arrives paused
    ///
    /// Default: as it was; one that is paused arrives paused in any case. Refused with --offline.
    #[arg(long)]
    suspend: bool,
    /// The destination keeps the VM's definition: always done (for those who know virsh)
    ///
    /// Default: done. Refused by nothing.
    #[arg(long)]
    persistent: bool,
    /// The source forgets the VM's definition: done unless --copy says otherwise
    ///
    /// Default: done. Refused with --copy.
    #[arg(long, visible_alias = "undefinesource")]
    undefine_source: bool,
    /// Keep a stopped definition on the source
    ///
    /// Default: not kept. Refused with --undefine-source.
    #[arg(long)]
    copy: bool,
    /// The VM's name at the destination
    ///
    /// Default: the same. Refused if another VM has the name.
    #[arg(long, value_name = "NAME", value_parser = values::given(values::name))]
    dname: Option<Given<Name>>,
}

impl Definition {
    fn read(self, options: &mut MigrateOptions, problems: &mut Problems) {
        options.suspend = self.suspend;
        options.persistent = self.persistent.then_some(true);
        options.undefine_source = self.undefine_source.then_some(true);
        options.copy = self.copy;
        options.dname = problems.value("--dname", self.dname);
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Stream and pause")]
struct Stream {
    /// The longest pause of the guest to aim at, in milliseconds, 1 to 2000000
    ///
    /// Default: as short as it gets, up to the policy's limit. Refused with --offline and --static.
    #[arg(long, value_name = "MS", allow_negative_numbers = true, value_parser = values::given(values::downtime_ms))]
    max_downtime: Option<Given<u64>>,
    /// The most to send a second: 500MiB/s, 1gbit, or a number of bytes (virsh: of MiB)
    ///
    /// Default: unlimited. Refused with --offline.
    #[arg(long, value_name = "RATE", allow_negative_numbers = true, value_parser = values::given(values::rate))]
    bandwidth: Option<Given<u64>>,
    /// The rate to reckon with for the last pass, where QEMU's own measurement misleads
    ///
    /// Default: as QEMU measures. Refused with --offline and --static; before QEMU 8.2 on the source.
    #[arg(long, value_name = "RATE", allow_negative_numbers = true, value_parser = values::given(values::rate))]
    available_switchover_bandwidth: Option<Given<u64>>,
    /// Send memory over several connections at once
    ///
    /// Default: as measurements advise. Refused with --offline; with xbzrle alone; with --postcopy before QEMU 10.1.
    #[arg(long)]
    parallel: bool,
    /// How many connections, 1 to 255; says --parallel too. One for each 10 Gbit/s is good advice
    ///
    /// Default: 2 with --parallel. Refused like --parallel.
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = values::given(values::whole))]
    parallel_connections: Option<Given<u64>>,
    /// Send pages without copying them in the kernel
    ///
    /// Default: copied. Refused with TLS (add --no-tls), with --compressed, without --parallel; with --offline.
    #[arg(long)]
    zerocopy: bool,
    /// Encrypt and authenticate the stream: done unless --no-tls says otherwise
    ///
    /// Default: done. Refused with --no-tls and --zerocopy.
    #[arg(long)]
    tls: bool,
    /// Send the guest's memory in the clear, to whoever answers at the address
    ///
    /// Default: encrypted. Refused with --tls; where the policy wants TLS.
    #[arg(long)]
    no_tls: bool,
    /// The address of the destination to send memory to: an IP address or a host name, without port
    ///
    /// Default: the one in the host's settings. Refused if hosts cannot reach it (loopback, multicast, link-local); with
    /// --offline.
    #[arg(long, value_name = "ADDRESS")]
    migrate_address: Option<String>,
    /// Give up at an I/O error of a disk meanwhile
    ///
    /// Default: the guest's own policy decides. Refused with --offline.
    #[arg(long)]
    abort_on_error: bool,
}

impl Stream {
    fn read(self, options: &mut MigrateOptions, problems: &mut Problems) {
        options.max_downtime_ms = problems.value("--max-downtime", self.max_downtime);
        options.bandwidth_bytes_per_s = problems.value("--bandwidth", self.bandwidth);
        let option = "--available-switchover-bandwidth";
        options.available_switchover_bandwidth_bytes_per_s =
            problems.value(option, self.available_switchover_bandwidth);
        let connections = problems.value("--parallel-connections", self.parallel_connections);
        let unnumbered = self.parallel.then_some(limits::CONNECTIONS_DEFAULT);
        options.parallel_connections = connections.or(unnumbered);
        options.zerocopy = self.zerocopy;
        if self.tls && self.no_tls {
            problems.contradiction("--tls", "and --no-tls say the opposite: take one");
        }
        options.tls = !self.no_tls;
        options.migrate_address = self.migrate_address;
        options.abort_on_error = self.abort_on_error;
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Where the guest writes faster than can be sent")]
struct WhenFast {
    /// Slow the guest down until its memory can be sent
    ///
    /// Default: as the policy allows and measurements advise. Refused with --offline and --static; where the policy forbids
    /// it.
    #[arg(long)]
    auto_converge: bool,
    /// By how much at first, in percent, 1 to 99
    ///
    /// Default: 20. Refused without --auto-converge.
    #[arg(long, value_name = "PERCENT", allow_negative_numbers = true, value_parser = values::given(values::whole))]
    auto_converge_initial: Option<Given<u64>>,
    /// By how much more at each step, in percent, 1 to 99
    ///
    /// Default: 10. Refused without --auto-converge.
    #[arg(long, value_name = "PERCENT", allow_negative_numbers = true, value_parser = values::given(values::whole))]
    auto_converge_increment: Option<Given<u64>>,
    /// Allow post-copy: the guest runs at the destination before all its memory is there
    ///
    /// It begins when `whimbrel migration postcopy` orders it, or by --timeout-postcopy or --postcopy-after-precopy. If either
    /// QEMU ends meanwhile, or the network never comes back, the guest's memory is lost.
    ///
    /// Default: only where the policy allows it unasked. Refused with --offline and --static; with parallel connections before
    /// QEMU 10.1; where the policy forbids it; where the destination cannot (userfaultfd, page sizes).
    #[arg(long)]
    postcopy: bool,
    /// Begin post-copy after one pass over the memory
    ///
    /// Default: when it is ordered. Refused without --postcopy.
    #[arg(long)]
    postcopy_after_precopy: bool,
    /// The most to send a second in post-copy of what the guest is not waiting for
    ///
    /// Default: unlimited. Refused without --postcopy.
    #[arg(long, value_name = "RATE", allow_negative_numbers = true, value_parser = values::given(values::rate))]
    postcopy_bandwidth: Option<Given<u64>>,
    /// After so many seconds from the request, do what --timeout-suspend or --timeout-postcopy says; 3 to 604800
    ///
    /// Default: no limit. Refused with --offline and --static; if shorter than the preparation may take.
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, value_parser = values::given(values::whole))]
    timeout: Option<Given<u64>>,
    /// Then stop the guest until the rest is sent
    ///
    /// Default: this one. Refused without --timeout; with --timeout-postcopy.
    #[arg(long)]
    timeout_suspend: bool,
    /// Then begin post-copy
    ///
    /// Default: --timeout-suspend. Refused without --timeout or --postcopy; with --timeout-suspend.
    #[arg(long)]
    timeout_postcopy: bool,
}

impl WhenFast {
    fn read(self, options: &mut MigrateOptions, problems: &mut Problems) {
        let slowed = self.auto_converge;
        for (option, given) in [
            ("--auto-converge-initial", self.auto_converge_initial.is_some()),
            ("--auto-converge-increment", self.auto_converge_increment.is_some()),
        ] {
            problems.need(option, given, "--auto-converge", slowed);
        }
        let throttle = AutoConverge {
            initial_percent: problems.value("--auto-converge-initial", self.auto_converge_initial),
            increment_percent: problems
                .value("--auto-converge-increment", self.auto_converge_increment),
        };
        options.auto_converge = slowed.then_some(throttle);

        let allowed = self.postcopy;
        for (option, given) in [
            ("--postcopy-after-precopy", self.postcopy_after_precopy),
            ("--postcopy-bandwidth", self.postcopy_bandwidth.is_some()),
            ("--timeout-postcopy", self.timeout_postcopy),
        ] {
            problems.need(option, given, "--postcopy", allowed);
        }
        let postcopy = Postcopy {
            after_precopy: self.postcopy_after_precopy,
            bandwidth_bytes_per_s: problems.value("--postcopy-bandwidth", self.postcopy_bandwidth),
        };
        options.postcopy = allowed.then_some(postcopy);

        let timed = self.timeout.is_some();
        problems.need("--timeout-suspend", self.timeout_suspend, "--timeout", timed);
        problems.need("--timeout-postcopy", self.timeout_postcopy, "--timeout", timed);
        if self.timeout_suspend && self.timeout_postcopy {
            let sentence = "and --timeout-postcopy are different ends: take one";
            problems.contradiction("--timeout-suspend", sentence);
        }
        let then = match self.timeout_postcopy {
            true => TimeoutAction::Postcopy,
            false => TimeoutAction::Suspend,
        };
        options.timeout =
            problems.value("--timeout", self.timeout).map(|seconds| Timeout { seconds, then });
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Compression")]
struct Packing {
    /// Compress memory on its way
    ///
    /// Default: as measurements advise. Refused with --offline and --zerocopy; where a QEMU cannot.
    #[arg(long)]
    compressed: bool,
    /// Which: zlib, zstd, xbzrle, or several with commas, of which the best is taken
    ///
    /// Default: any. Refused without --compressed; xbzrle alone with --parallel; zlib and zstd with --postcopy before QEMU 10.1.
    #[arg(long, value_name = "METHODS", value_delimiter = ',', value_parser = values::given(values::compression))]
    comp_methods: Vec<Given<CompressionMethod>>,
    /// Level of zlib, 0 to 9
    ///
    /// Default: 1. Refused without --compressed; if --comp-methods lists others only.
    #[arg(long, value_name = "LEVEL", allow_negative_numbers = true, value_parser = values::given(values::whole))]
    comp_zlib_level: Option<Given<u64>>,
    /// Level of zstd, 0 to 20
    ///
    /// Default: 1. Refused without --compressed; if --comp-methods lists others only.
    #[arg(long, value_name = "LEVEL", allow_negative_numbers = true, value_parser = values::given(values::whole))]
    comp_zstd_level: Option<Given<u64>>,
    /// Cache of xbzrle, a power of two from 1MiB to 64GiB
    ///
    /// Default: 64MiB. Refused without --compressed; if --comp-methods lists others only.
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true, value_parser = values::given(values::bytes))]
    comp_xbzrle_cache: Option<Given<u64>>,
}

impl Packing {
    fn read(self, options: &mut MigrateOptions, problems: &mut Problems) {
        for (option, given) in [
            ("--comp-methods", !self.comp_methods.is_empty()),
            ("--comp-zlib-level", self.comp_zlib_level.is_some()),
            ("--comp-zstd-level", self.comp_zstd_level.is_some()),
            ("--comp-xbzrle-cache", self.comp_xbzrle_cache.is_some()),
        ] {
            problems.need(option, given, "--compressed", self.compressed);
        }
        let compression = Compression {
            methods: problems.values("--comp-methods", self.comp_methods),
            zlib_level: problems.value("--comp-zlib-level", self.comp_zlib_level),
            zstd_level: problems.value("--comp-zstd-level", self.comp_zstd_level),
            xbzrle_cache_bytes: problems.value("--comp-xbzrle-cache", self.comp_xbzrle_cache),
        };
        options.compression = self.compressed.then_some(compression);
    }
}

#[cfg(test)]
mod tests;
