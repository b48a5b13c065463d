//! The cases of the comparison with virsh, as data: the guest, the link, how each contender is called, and the targets.

use serde::Serialize;
use whimbrel_lab::Rate;

const GIGABIT: Rate = Rate { bits_per_s: 1_000_000_000 };
/// The guest of 1 GiB leaves its kernel this little.
const FILLED_MIB: u32 = 816;
/// A move may take this long: several times what the slowest that ends needs.
const WITHIN_S: u64 = 120;
/// How much worse a ratio may be with TLS on both sides.
const TLS_ALLOWANCE: f64 = 0.05;

/// What the guest of a case is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Content {
    pub(crate) memory_mib: u32,
    pub(crate) filled_mib: u32,
    /// For the witness.
    pub(crate) words: &'static str,
}

const RANDOM: Content =
    Content { memory_mib: 1024, filled_mib: FILLED_MIB, words: "witness.zero=0 witness.text=0" };
const THIRDS: Content =
    Content { memory_mib: 1024, filled_mib: FILLED_MIB, words: "witness.zero=33 witness.text=34" };
/// With 64 MiB the guest's kernel does not boot (Linux 6.1 of Debian 12), and nobody would verify anything.
const SMALL: Content = Content { memory_mib: 128, filled_mib: 16, words: "witness.journal=0" };

/// Who moves the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Tool {
    Whimbrel,
    Virsh,
}

/// One way of moving it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Contender {
    pub(crate) tool: Tool,
    pub(crate) options: Vec<&'static str>,
}

impl Contender {
    /// The command, without what is the same for all: the guest, the hosts, and what the lab needs.
    pub(crate) fn name(&self) -> String {
        let tool = match self.tool {
            Tool::Whimbrel => "whimbrel",
            Tool::Virsh => "virsh",
        };
        [&[tool], self.options.as_slice()].concat().join(" ")
    }
}

/// What is to be reached; each only where it is given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Targets {
    /// Whimbrel ÷ virsh: the command, which ends when it can say that the guest runs on the destination.
    pub(crate) command_ratio: Option<f64>,
    /// Whimbrel ÷ virsh: the pause.
    pub(crate) downtime_ratio: Option<f64>,
    /// Whimbrel's use of the link, at least.
    pub(crate) link_percent: Option<f64>,
    /// Whimbrel's command has ended after at most so many times what the memory takes on the link.
    pub(crate) times_memory_on_link: Option<f64>,
    /// Whimbrel's pause.
    pub(crate) downtime_ms: Option<f64>,
}

/// One case.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Case {
    /// What `--case` calls it.
    pub(crate) key: String,
    pub(crate) title: String,
    pub(crate) content: Content,
    /// How many such guests are moved, one after the other.
    pub(crate) guests: u8,
    pub(crate) dirty_mb_per_s: u32,
    pub(crate) link: Option<Rate>,
    /// How long a move may take until it is interrupted and counts as one that does not end.
    pub(crate) within_s: u64,
    pub(crate) contenders: Vec<Contender>,
    pub(crate) targets: Targets,
}

impl Case {
    /// What the guest's memory takes on the link, in seconds.
    pub(crate) fn memory_on_link_s(&self) -> Option<f64> {
        let bits = f64::from(self.content.memory_mib) * 8.0 * 1_048_576.0;
        self.link.map(|link| bits / link.bits_per_s as f64)
    }

    fn new(key: &str, title: &str, content: Content) -> Self {
        Self {
            key: key.to_owned(),
            title: title.to_owned(),
            content,
            guests: 1,
            dirty_mb_per_s: 0,
            link: None,
            within_s: WITHIN_S,
            contenders: Vec::new(),
            targets: Targets::default(),
        }
    }

    fn ways(mut self, whimbrel: &[&'static str], virsh: &[&[&'static str]]) -> Self {
        let way = |tool, options: &[&'static str]| Contender { tool, options: options.to_vec() };
        self.contenders = vec![way(Tool::Whimbrel, whimbrel)];
        self.contenders.extend(virsh.iter().map(|options| way(Tool::Virsh, options)));
        self
    }

    fn ratios(mut self, command: f64, downtime: f64) -> Self {
        self.targets.command_ratio = Some(command);
        self.targets.downtime_ratio = Some(downtime);
        self
    }

    /// The same with TLS on both sides.
    fn with_tls(&self) -> Self {
        let mut case = self.clone();
        // virsh's best is told once, without.
        case.contenders.truncate(2);
        case.key.push_str("-tls");
        case.title.push_str(", TLS");
        for contender in &mut case.contenders {
            match contender.tool {
                // It is what `whimbrel` does when nobody says otherwise.
                Tool::Whimbrel => contender.options.retain(|option| *option != NO_TLS),
                Tool::Virsh => contender.options.push("--tls"),
            }
        }
        for ratio in [&mut case.targets.command_ratio, &mut case.targets.downtime_ratio] {
            *ratio = ratio.map(|ratio| ((ratio + TLS_ALLOWANCE) * 100.0).round() / 100.0);
        }
        case
    }
}

const NO_TLS: &str = "--no-tls";

/// All cases, those with the same guest one after the other.
pub(crate) fn all() -> Vec<Case> {
    let unshaped = Case::new("random-unshaped", "1 GiB random, idle, unshaped", RANDOM)
        .ways(&[NO_TLS], &[&[], &["--parallel"]])
        .ratios(0.55, 0.20);
    let mut gigabit = Case::new("random-1gbit", "1 GiB random, idle, 1 Gbit/s", RANDOM)
        .ways(&[NO_TLS], &[&[], &["--parallel"]])
        .ratios(0.85, 0.10);
    gigabit.link = Some(GIGABIT);
    gigabit.targets.link_percent = Some(97.0);
    let mut thirds =
        Case::new("thirds-1gbit", "1 GiB, one third zero, one third text-like, 1 Gbit/s", THIRDS)
            .ways(&[NO_TLS], &[&[], &["--parallel"]])
            .ratios(0.60, 0.10);
    thirds.link = Some(GIGABIT);
    let small = Case {
        guests: 20,
        ..Case::new("small-20", "20 VMs of 128 MiB, one after the other", SMALL)
            .ways(&[NO_TLS], &[&[], &["--parallel"]])
            .ratios(0.30, 0.20)
    };
    let tls = [&unshaped, &gigabit, &thirds, &small].map(Case::with_tls);
    let [unshaped_tls, gigabit_tls, thirds_tls, small_tls] = tls;
    let random = [unshaped, unshaped_tls, gigabit, gigabit_tls, dirtying()];
    random.into_iter().chain([thirds, thirds_tls, small, small_tls]).collect()
}

/// Twice what the link carries is dirtied: no pre-copy ends.
fn dirtying() -> Case {
    let virsh_best = ["--postcopy", "--timeout", "1", "--timeout-postcopy"];
    let mut case = Case::new("dirtying-1gbit", "dirtying at twice the link's rate", RANDOM)
        .ways(&[NO_TLS, "--postcopy"], &[&[], &virsh_best]);
    case.dirty_mb_per_s = 250;
    case.link = Some(GIGABIT);
    case.within_s = 30;
    case.targets.times_memory_on_link = Some(1.6);
    case.targets.downtime_ms = Some(100.0);
    case
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_unique_and_guests_are_shared_by_neighbours() {
        let cases = all();
        let mut keys: Vec<&str> = cases.iter().map(|case| case.key.as_str()).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), cases.len());
        let changes = cases.windows(2).filter(|two| two[0].content != two[1].content).count();
        assert_eq!(changes, 2, "guests are made anew more often than needed");
    }

    #[test]
    fn tls_is_on_for_all_or_for_none() {
        for case in all() {
            for contender in &case.contenders {
                let encrypted = match contender.tool {
                    Tool::Whimbrel => !contender.options.contains(&NO_TLS),
                    Tool::Virsh => contender.options.contains(&"--tls"),
                };
                assert_eq!(encrypted, case.key.ends_with("-tls"), "{} {contender:?}", case.key);
            }
        }
    }
}
