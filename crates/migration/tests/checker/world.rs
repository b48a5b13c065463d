//! What there is: hosts, ledgers, QEMUs, agents, the network.

use std::collections::{BTreeSet, VecDeque};

use whimbrel_migration::handoff::{
    self, Action, Claim, Destination, DestinationInput, Intent, Message, Observed, Ownership,
    Source, SourceInput, Standing,
};
use whimbrel_migration::names::{MigrationId, Name, VmId};

use super::disks::{Content, Files};

/// Everything, at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    /// What the VM's user wants; fixed for a run.
    pub(crate) intent: Intent,
    pub(crate) hosts: [Host; 2],
    /// The migrations that the controller has thought of so far.
    pub(crate) tries: Vec<Try>,
    /// Every message ever sent, with the host it is for: each may arrive never, late, often.
    pub(crate) net: BTreeSet<(usize, Message)>,
    /// Each host's files of the VM's disks; none where both see the same ones.
    pub(crate) files: Option<[Files; 2]>,
    pub(crate) faults_left: u8,
    /// A QEMU has died by itself.
    pub(crate) qemu_died: bool,
    /// Invariants that were broken at some moment, rather than in a state.
    pub(crate) broken: BTreeSet<&'static str>,
    /// Which outcome was reported by which host: (migration, host, moved).
    pub(crate) reported: BTreeSet<(MigrationId, usize, bool)>,
}

/// A migration, as the controller thought of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Try {
    pub(crate) claim: Claim,
    pub(crate) from: usize,
    /// The destination's QEMU held the guest's state at some time.
    pub(crate) loaded: bool,
    /// It held everything, all memory included, at some time.
    pub(crate) whole: bool,
    /// Its disks were settled at some time.
    pub(crate) settled: bool,
    /// A write of its release was tried.
    pub(crate) released: bool,
    /// A cancel was accepted.
    pub(crate) cancelled: bool,
    /// An operator has said that the destination will never act on its GO.
    pub(crate) reclaimed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Host {
    /// Durable: one row for each (vm, migration).
    pub(crate) ledger: Vec<Ownership>,
    /// The VM's QEMU on this host.
    pub(crate) qemu: Option<Qemu>,
    /// None while crashed.
    pub(crate) agent: Option<Agent>,
    /// It has lost its power, and may come back at any time or never.
    pub(crate) away: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Qemu {
    /// The migration for whose incoming side it was started.
    pub(crate) incoming: Option<MigrationId>,
    /// The stream has been received to its end, or to the end of the guest's state.
    pub(crate) full: bool,
    /// It holds a guest's state.
    pub(crate) loaded: bool,
    /// Part of the guest's memory is still to come (post-copy).
    pub(crate) lacks: bool,
    /// The stream that brings it is cut; both QEMUs wait for a new one.
    pub(crate) cut: bool,
    pub(crate) listening: bool,
    /// Its disks can be written to from outside (NBD).
    pub(crate) exporting: bool,
    pub(crate) running: bool,
    /// Its guest's memory is older than what has been executed elsewhere since.
    pub(crate) stale: bool,
    /// SIGKILL is on its way.
    pub(crate) killed: bool,
    /// The migration that it sends.
    pub(crate) sending: Option<MigrationId>,
    /// Where disks are copied: how far it is between the guest's last instruction and the stream's last byte.
    pub(crate) switchover: Switchover,
    /// It has sent the guest's state and stands still; it still has memory to send (post-copy).
    pub(crate) serving: bool,
    /// It has sent everything, and stands still.
    pub(crate) completed: bool,
    /// It has ended a post-copy for good without having sent everything.
    pub(crate) broken: bool,
}

/// The end of a copy with disks, on the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Switchover {
    /// Not there yet.
    #[default]
    Far,
    /// The guest stands still.
    Waiting,
    /// The mirrors are being ended.
    Settling,
    /// They have ended well.
    Settled,
    /// QEMU has been told to send the rest.
    Told,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Agent {
    /// Unfinished machines, by the rules at most one.
    pub(crate) machines: Vec<Machine>,
    /// Actions to carry out, with the migration whose machine wants the answer.
    pub(crate) queue: VecDeque<(Option<MigrationId>, Action)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Machine {
    Source(Source),
    Destination(Destination),
}

#[derive(Clone, Debug)]
pub(crate) enum Input {
    Source(SourceInput),
    Destination(DestinationInput),
}

pub(crate) fn host_name(host: usize) -> Name {
    Name::new(["a", "b"][host]).expect("a good name")
}

pub(crate) const fn other(host: usize) -> usize {
    1 - host
}

pub(crate) fn migration_id(number: usize) -> MigrationId {
    MigrationId::from(uuid::Uuid::from_u128(number as u128 + 1))
}

impl Machine {
    pub(crate) const fn claim(&self) -> Claim {
        match self {
            Self::Source(source) => source.claim(),
            Self::Destination(destination) => destination.claim(),
        }
    }

    pub(crate) const fn is_finished(&self) -> bool {
        match self {
            Self::Source(source) => source.is_finished(),
            Self::Destination(destination) => destination.is_finished(),
        }
    }

    pub(crate) fn step(&mut self, input: Input) -> Vec<Action> {
        match (self, input) {
            (Self::Source(source), Input::Source(input)) => source.step(input),
            (Self::Destination(destination), Input::Destination(input)) => destination.step(input),
            (machine, input) => unreachable!("{input:?} for {machine:?}"),
        }
    }
}

impl World {
    /// The VM was created on host 0 and is as its user wants it.
    pub(crate) fn new(intent: Intent, faults: u8, disks: bool) -> Self {
        let vm = VmId::from(uuid::Uuid::from_u128(0xa));
        let qemu =
            Qemu { full: true, loaded: true, running: intent == Intent::Run, ..Qemu::default() };
        let host = |ledger, qemu| Host { ledger, qemu, agent: Some(Agent::default()), away: false };
        Self {
            intent,
            hosts: [host(vec![Ownership::created(vm, intent)], Some(qemu)), host(vec![], None)],
            tries: Vec::new(),
            net: BTreeSet::new(),
            files: disks.then_some([Content::Current, Content::Absent].map(Files::with)),
            faults_left: faults,
            qemu_died: false,
            broken: BTreeSet::new(),
            reported: BTreeSet::new(),
        }
    }

    pub(crate) fn try_of(&self, migration: MigrationId) -> Option<&Try> {
        self.tries.iter().find(|one| one.claim.migration == migration)
    }

    pub(crate) fn try_mut(&mut self, migration: MigrationId) -> Option<&mut Try> {
        self.tries.iter_mut().find(|one| one.claim.migration == migration)
    }

    /// Whether the QEMU on `host` has the memory that the one on the other host lacks, and sends it.
    pub(crate) fn serves(&self, host: usize) -> bool {
        let [target, sender] = [other(host), host].map(|host| self.hosts[host].qemu.as_ref());
        let (Some(target), Some(sender)) = (target, sender) else { return false };
        target.lacks && sender.serving && target.incoming == sender.sending
    }

    /// Whether the VM was taken back from `host`, which may not have heard of it: whoever gives orders gives it none.
    pub(crate) fn is_taken_from(&self, host: usize) -> bool {
        self.tries.iter().any(|one| {
            let id = one.claim.migration;
            let confirmed = self.hosts[one.from]
                .row(id)
                .is_some_and(|row| matches!(row.standing, Standing::Gone { .. }));
            one.reclaimed
                && other(one.from) == host
                && self.hosts[host].took(one.claim)
                && !confirmed
        })
    }

    /// Whether the QEMU on `host` lacks memory that it will not get over the stream that it had.
    pub(crate) fn starves(&self, host: usize) -> bool {
        self.hosts[host]
            .qemu
            .as_ref()
            .is_some_and(|qemu| qemu.lacks && (qemu.cut || !self.serves(other(host))))
    }

    /// The guest runs on `host` from now on: whatever any other QEMU holds is old.
    pub(crate) fn run_guest(&mut self, host: usize) {
        if let Some(elsewhere) = &mut self.hosts[other(host)].qemu {
            elsewhere.stale |= elsewhere.full && !elsewhere.running;
        }
        let Some(qemu) = &mut self.hosts[host].qemu else { return };
        if qemu.stale {
            self.broken.insert(super::invariants::NO_STALE);
        }
        qemu.running = true;
        self.write_disks(host);
    }
}

/// Whether a record says that its host owns the VM by its migration.
pub(crate) const fn is_taken(record: &Ownership) -> bool {
    matches!(record.standing, Standing::Owned | Standing::Fetching { .. })
}

/// Whether a record says that its host has given the VM away and may not have been answered.
pub(crate) const fn is_released(record: &Ownership) -> bool {
    matches!(record.standing, Standing::Released { .. } | Standing::Serving { .. })
}

impl Host {
    pub(crate) fn current(&self) -> Option<&Ownership> {
        handoff::current(&self.ledger)
    }

    pub(crate) fn may_run(&self) -> bool {
        self.current().is_some_and(Ownership::may_run)
    }

    pub(crate) fn row(&self, migration: MigrationId) -> Option<&Ownership> {
        self.ledger.iter().find(|row| row.migration == Some(migration))
    }

    /// Whether this host durably owns, or owned, the VM by `claim`.
    pub(crate) fn took(&self, claim: Claim) -> bool {
        self.row(claim.migration).is_some_and(|row| is_taken(row) && row.claim() == Some(claim))
    }

    pub(crate) fn write(&mut self, record: Ownership) {
        self.ledger.retain(|row| row.migration != record.migration);
        self.ledger.push(record);
        self.ledger.sort_by_key(|row| row.migration);
    }

    pub(crate) fn runs(&self) -> bool {
        self.qemu.as_ref().is_some_and(|qemu| qemu.running)
    }

    pub(crate) fn observe(&self) -> Observed {
        match &self.qemu {
            None => Observed::Gone,
            Some(qemu) if qemu.running => Observed::Running,
            Some(qemu) if qemu.loaded && qemu.lacks => Observed::Part,
            Some(qemu) if qemu.loaded => Observed::Stopped,
            Some(_) => Observed::Incoming,
        }
    }

    /// The agent, if it is up and takes inputs: its queue of actions is empty.
    pub(crate) fn ready(&self) -> Option<&Agent> {
        self.agent.as_ref().filter(|agent| agent.queue.is_empty())
    }
}
