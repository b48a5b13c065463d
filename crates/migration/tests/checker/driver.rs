//! How an agent carries out what its machines want, as the handoff's header tells it to.
//!
//! One call of [`Handoff::run`] carries out one action that others could see half done; a crash can
//! come between two of them. Sending, reporting and asking QEMU for a copy are done at once: a
//! message can be lost anyway, and the copy is an event of its own.

use whimbrel_migration::handoff::{
    Action, Body, Claim, DestinationInput, Message, Ownership, Recovered, SourceInput, Standing,
    answer, recover,
};
use whimbrel_migration::names::MigrationId;
use whimbrel_migration::phase::Outcome;

use super::bugs::Bug;
use super::events::Handoff;
use super::invariants;
use super::world::{Agent, Input, Machine, Qemu, Switchover, World, is_released, other};

/// How the next action goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    /// As it should.
    Well,
    /// It fails and does nothing.
    Fails,
    /// It does its work and fails all the same: a failed write that has landed, a `cont` that
    /// started the guest in a QEMU that died before it answered.
    FailsDone,
}

impl Handoff {
    /// Gives the machine of `migration` on `host` an input.
    pub(crate) fn input(
        &self,
        world: &mut World,
        host: usize,
        migration: MigrationId,
        input: Input,
    ) {
        let Some(agent) = &mut world.hosts[host].agent else { return };
        let find = |machine: &&mut Machine| machine.claim().migration == migration;
        let Some(machine) = agent.machines.iter_mut().find(find) else { return };
        let before = machine.clone();
        let input = self.tamper_input(&before, input);
        let mut actions = machine.step(input.clone());
        self.tamper_actions(&before, &input, &mut actions);
        agent.queue.extend(actions.into_iter().map(|action| (Some(migration), action)));
        self.run_invisible(world, host);
    }

    /// Begins a machine on a host that has none.
    pub(crate) fn begin(
        &self,
        world: &mut World,
        host: usize,
        machine: Machine,
        actions: Vec<Action>,
    ) {
        let migration = machine.claim().migration;
        let Some(agent) = &mut world.hosts[host].agent else { return };
        agent.machines.push(machine);
        agent.queue.extend(actions.into_iter().map(|action| (Some(migration), action)));
        self.run_invisible(world, host);
    }

    pub(crate) fn restart(&self, world: &mut World, host: usize) {
        world.hosts[host].agent = Some(Agent::default());
        let Some(record) = world.hosts[host].current().cloned() else { return };
        let (recovered, mut actions) = recover(&record, world.hosts[host].observe());
        self.tamper_recovery(&record, &mut actions);
        let agent = world.hosts[host].agent.get_or_insert_default();
        match recovered {
            Recovered::Source(it) => agent.machines.push(Machine::Source(self.source(it))),
            Recovered::Destination(it) => {
                agent.machines.push(Machine::Destination(self.destination(it)));
            }
            Recovered::Owner | Recovered::Bystander => {}
        }
        agent.queue.extend(actions.into_iter().map(|action| (record.migration, action)));
        self.run_invisible(world, host);
    }

    pub(crate) fn deliver(&self, world: &mut World, host: usize, message: Message) {
        let migration = self.route(&world.hosts[host], message);
        let Some(agent) = &world.hosts[host].agent else { return };
        let machine = agent.machines.iter().find(|one| one.claim().migration == migration);
        match machine {
            Some(Machine::Source(_)) => {
                let input = Input::Source(SourceInput::Receive(message));
                self.input(world, host, migration, input);
            }
            Some(Machine::Destination(_)) => {
                let input = Input::Destination(DestinationInput::Receive(message));
                self.input(world, host, migration, input);
            }
            None => {
                if let Some(reply) = answer(world.hosts[host].row(migration), &message) {
                    world.net.insert((other(host), reply));
                }
                self.tamper_answer(world, host, &message);
                self.run_invisible(world, host);
            }
        }
    }

    /// Carries out the next action, which goes as `how` says. False if it cannot go that way.
    pub(crate) fn run(&self, world: &mut World, host: usize, how: Run) -> bool {
        let Some(agent) = &mut world.hosts[host].agent else { return false };
        let Some((migration, action)) = agent.queue.pop_front() else { return false };
        let wants = |one: &&Machine| Some(one.claim().migration) == migration;
        let machine = agent.machines.iter().find(wants).cloned();
        let Ok(input) = self.carry_out(world, host, &action, how, machine.as_ref()) else {
            return false;
        };
        if let (Some(migration), Some(input)) = (migration, input) {
            self.answered(world, host, migration, input);
        }
        self.run_invisible(world, host);
        true
    }

    fn answered(&self, world: &mut World, host: usize, migration: MigrationId, input: Input) {
        let Some(agent) = &mut world.hosts[host].agent else { return };
        let left = if self.answers_first { std::mem::take(&mut agent.queue) } else { [].into() };
        self.input(world, host, migration, input);
        if let Some(agent) = &mut world.hosts[host].agent {
            agent.queue.extend(left);
        }
    }

    /// The answer to a visible action, if it has one; an error if it cannot go as `how` says.
    fn carry_out(
        &self,
        world: &mut World,
        host: usize,
        action: &Action,
        how: Run,
        machine: Option<&Machine>,
    ) -> Result<Option<Input>, ()> {
        let source = matches!(machine, Some(Machine::Source(_)));
        if let Action::Persist(record) = action {
            self.persist(world, host, record, how);
            let well = how == Run::Well || self.takes_failed_write_for_done(record);
            return Ok(Some(match (source, well) {
                (true, true) => Input::Source(SourceInput::Persisted),
                (true, false) => Input::Source(SourceInput::PersistFailed),
                (false, true) => Input::Destination(DestinationInput::Persisted),
                (false, false) => Input::Destination(DestinationInput::PersistFailed),
            }));
        }
        let input = match action {
            Action::CloseListeners => Some(self.close_listeners(world, host, how)?),
            Action::ContinueGuest => self.continue_guest(world, host, how)?,
            _ if how != Run::Well => return Err(()),
            Action::ResumeGuest => {
                // QEMU refuses in the middle of a post-copy.
                let can = |qemu: &Qemu| !qemu.running && !qemu.serving;
                if world.hosts[host].qemu.as_ref().is_some_and(can) {
                    world.run_guest(host);
                }
                None
            }
            Action::StartTarget => {
                Self::start_target(world, host, machine.map(|one| one.claim().migration));
                None
            }
            Action::StopCopy => {
                if let Some(qemu) = &mut world.hosts[host].qemu {
                    qemu.sending = None;
                    qemu.switchover = Switchover::Far;
                    qemu.serving = false;
                    qemu.completed = false;
                    qemu.broken = false;
                }
                None
            }
            Action::LookForRest => look_for_rest(world, host),
            Action::KillTarget => kill_target(world, host),
            Action::QuitSource => {
                Self::quit_source(world, host);
                None
            }
            invisible => unreachable!("{invisible:?} is carried out at once"),
        };
        // After a restart the owner continues a guest without a machine that waits for the answer.
        Ok(input.map(Input::Destination))
    }

    fn persist(&self, world: &mut World, host: usize, record: &Ownership, how: Run) {
        let one = record.migration.and_then(|id| world.try_of(id));
        let settled = world.files.is_none() || one.is_some_and(|one| one.settled);
        let gate = match record.standing {
            Standing::Released { .. } => one.is_some_and(|one| one.whole),
            Standing::Serving { .. } => one.is_some_and(|one| one.loaded),
            _ => true,
        };
        if !gate || is_released(record) && !settled {
            world.broken.insert(invariants::GO_GATE);
        }
        if let (true, Some(id)) = (is_released(record), record.migration)
            && let Some(one) = world.try_mut(id)
        {
            one.released = true;
        }
        if world.hosts[host].current().is_some_and(|current| current.epoch > record.epoch) {
            world.broken.insert(invariants::EPOCHS);
        }
        if how != Run::Fails && self.writes(record) {
            if self.bug == Some(Bug::LedgerKeepsOneRow) {
                world.hosts[host].ledger.clear();
            }
            world.hosts[host].write(record.clone());
            Self::wrote(world, host, record);
        }
        if how != Run::Well {
            self.tamper_failed_write(world, host, record);
        }
    }

    /// What a record on the disk changes besides.
    fn wrote(world: &mut World, host: usize, record: &Ownership) {
        let Some(one) = record.migration.and_then(|id| world.try_of(id)) else { return };
        let since = Claim { epoch: one.claim.epoch.next(), ..one.claim };
        if one.reclaimed && one.from == host && world.hosts[host].took(since) {
            world.take_back_disks(host);
        }
    }

    fn end_mirrors(&self, qemu: &mut Qemu, action: &Action) {
        match action {
            Action::SettleDisks => qemu.switchover = Switchover::Settling,
            Action::FinishCopy => qemu.switchover = Switchover::Told,
            _ => qemu.exporting &= self.bug == Some(Bug::ExportsLeftOpen),
        }
    }

    fn close_listeners(
        &self,
        world: &mut World,
        host: usize,
        how: Run,
    ) -> Result<DestinationInput, ()> {
        let qemu = world.hosts[host].qemu.as_mut().filter(|qemu| !qemu.killed);
        match (how, qemu) {
            (Run::Well, Some(qemu)) => {
                qemu.listening = self.bug == Some(Bug::ListenersLeftOpen);
                qemu.exporting &= self.bug == Some(Bug::ExportsLeftOpen);
                Ok(DestinationInput::ListenersClosed)
            }
            (Run::Well, None) | (Run::Fails, Some(_)) => Ok(DestinationInput::CloseFailed),
            _ => Err(()),
        }
    }

    fn continue_guest(
        &self,
        world: &mut World,
        host: usize,
        how: Run,
    ) -> Result<Option<DestinationInput>, ()> {
        let qemu = world.hosts[host].qemu.as_ref().filter(|qemu| !qemu.killed);
        let Some(qemu) = qemu else {
            // No answer; that it is gone will be noticed.
            return if how == Run::Well { Ok(None) } else { Err(()) };
        };
        if !qemu.loaded {
            return Ok(Some(DestinationInput::ContinueFailed));
        }
        match how {
            Run::Well => {
                if !qemu.running {
                    world.run_guest(host);
                }
                Ok(Some(DestinationInput::Continued))
            }
            Run::Fails if qemu.running => Err(()),
            Run::Fails => Ok(Some(DestinationInput::ContinueFailed)),
            Run::FailsDone if self.bug == Some(Bug::NoAnswerTakenForContinueFailed) => {
                world.run_guest(host);
                Ok(Some(DestinationInput::ContinueFailed))
            }
            Run::FailsDone => {
                world.run_guest(host);
                world.hosts[host].qemu = None;
                world.qemu_died = true;
                Ok(None)
            }
        }
    }

    fn start_target(world: &mut World, host: usize, incoming: Option<MigrationId>) {
        // It first makes sure that no QEMU is left; one that is not being killed would be lost.
        if world.hosts[host].qemu.as_ref().is_some_and(|qemu| !qemu.killed) {
            world.broken.insert(invariants::LAST_COPY);
        }
        let exporting = world.files.is_some();
        world.make_target(host, incoming);
        let qemu = Qemu { incoming, listening: true, exporting, ..Qemu::default() };
        world.hosts[host].qemu = Some(qemu);
    }

    fn quit_source(world: &mut World, host: usize) {
        if world.serves(host) {
            world.broken.insert(invariants::POSTCOPY_BOTH);
        }
        if world.hosts[host].qemu.take().is_none() {
            return;
        }
        let released = world.hosts[host].current().and_then(Ownership::claim);
        let confirmed = released.is_some_and(|claim| {
            let stated = world.try_of(claim.migration).is_some_and(|one| one.reclaimed);
            stated || world.hosts[other(host)].took(claim)
        });
        if !confirmed {
            world.broken.insert(invariants::LAST_COPY);
        }
    }

    /// Carries out what nobody else could see half done, and lets go of finished machines.
    pub(crate) fn run_invisible(&self, world: &mut World, host: usize) {
        while let Some(agent) = &mut world.hosts[host].agent {
            let Some((migration, action)) = agent.queue.front().cloned() else {
                agent.machines.retain(|machine| !machine.is_finished());
                return;
            };
            if !self.invisible(world, host, migration, &action) {
                return;
            }
            if let Some(agent) = &mut world.hosts[host].agent {
                agent.queue.pop_front();
            }
        }
    }

    fn invisible(
        &self,
        world: &mut World,
        host: usize,
        migration: Option<MigrationId>,
        action: &Action,
    ) -> bool {
        match action {
            Action::Send(message) => {
                let message = self.tamper_message(*message);
                world.net.insert((other(host), message));
            }
            Action::BeginCopy => {
                if let Some(qemu) = &mut world.hosts[host].qemu {
                    qemu.sending = migration;
                    qemu.completed = false;
                }
            }
            Action::SettleDisks | Action::FinishCopy | Action::CloseExports => {
                if let Some(qemu) = &mut world.hosts[host].qemu {
                    self.end_mirrors(qemu, action);
                }
            }
            Action::AcceptCancel => {
                if let Some(one) = migration.and_then(|id| world.try_mut(id)) {
                    one.cancelled = true;
                }
            }
            Action::RefuseCancel => {
                let gone = |row: &Ownership| matches!(row.standing, Standing::Gone { .. });
                let row = migration.and_then(|id| world.hosts[host].row(id));
                let stated =
                    migration.and_then(|id| world.try_of(id)).is_some_and(|one| one.reclaimed);
                if !stated && !row.is_some_and(|row| is_released(row) || gone(row)) {
                    world.broken.insert(invariants::CANCEL);
                }
            }
            Action::Settle(outcome) => {
                if let Some(id) = migration {
                    world.reported.insert((id, host, *outcome == Outcome::Moved));
                }
            }
            Action::Announce | Action::RaiseUnresolved => {}
            _ => return false,
        }
        true
    }
}

fn kill_target(world: &mut World, host: usize) -> Option<DestinationInput> {
    let owned = world.hosts[host].may_run();
    if owned && world.serves(other(host)) {
        world.broken.insert(invariants::POSTCOPY_BOTH);
    }
    match &mut world.hosts[host].qemu {
        Some(qemu) => {
            qemu.killed = true;
            None
        }
        None => Some(DestinationInput::QemuGone),
    }
}

/// What QEMU says of the memory that it may lack.
fn look_for_rest(world: &World, host: usize) -> Option<DestinationInput> {
    let qemu = world.hosts[host].qemu.as_ref().filter(|qemu| !qemu.killed)?;
    if !qemu.lacks {
        return Some(DestinationInput::Loaded);
    }
    world.starves(host).then_some(DestinationInput::Starved)
}

/// Whether the destination of `claim` has refused it.
pub(crate) fn refused(world: &World, claim: Claim) -> bool {
    let message = Message { claim, body: Body::Refused };
    (0..2).any(|host| world.net.contains(&(host, message)))
}
