//! What can happen next, and the model for stateright made of it.

use stateright::{Model, Property};
use whimbrel_migration::handoff::{
    Action, Claim, Destination, DestinationInput, Intent, Message, Source, SourceInput, Standing,
    Superseding, supersede,
};
use whimbrel_migration::names::MigrationId;

use super::bugs::Bug;
use super::driver::Run;
use super::invariants;
use super::world::{Input, Machine, Qemu, Try, World, host_name, migration_id, other};

/// What is explored: the bounds, and which rule is removed, if any.
#[derive(Clone, Debug)]
pub(crate) struct Handoff {
    /// How many migrations the controller begins, there, back, or again.
    pub(crate) tries: usize,
    /// How many faults happen.
    pub(crate) faults: u8,
    /// What follows from an action's answer is done before (or after) what is left to do.
    pub(crate) answers_first: bool,
    /// How QEMU sends the guests.
    pub(crate) copies: Copies,
    /// Who takes a VM back from a host that does not return.
    pub(crate) operator: Operator,
    /// Disks are copied with the guest.
    pub(crate) disks: bool,
    /// The sources' drivers are not told of that.
    pub(crate) unaware: bool,
    pub(crate) bug: Option<Bug>,
}

/// In how many parts guests are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copies {
    /// Everything before the release.
    Precopy,
    /// The guest's state before the release, the rest of its memory at any time after that; at once, too,
    /// so that whatever happens with `Precopy` happens here.
    Postcopy,
}

/// Whether hosts lose their power, and what an operator says of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operator {
    /// No host loses its power, and nobody says anything.
    Absent,
    /// Takes VMs back from hosts that are without power at that moment.
    Truthful,
    /// Says so of any host at any time.
    Lying,
}

/// One thing that happens. Hosts are 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The controller thinks of a migration away from a host.
    Ask(usize),
    /// The controller asks the destination of a migration to prepare.
    Offer(usize),
    /// The controller asks the source of a migration to begin.
    Begin(usize),
    /// The agent carries out its next action.
    Run(usize, Run),
    /// A message arrives.
    Deliver(usize, Message),
    /// With disks: the source's QEMU on a host stops its guest, and waits.
    Halt(usize),
    /// The mirrors from a host end well.
    Settle(usize),
    /// The source's QEMU on a host has sent everything, and stops its guest.
    Complete(usize),
    /// The same, with a part of the memory left to send (post-copy).
    Switch(usize),
    /// The destination's QEMU on a host has taken in what was sent.
    Load(usize),
    /// The source's QEMU on a host sends the rest.
    Serve(usize),
    /// A new stream takes the place of the cut one to a host.
    Mend(usize),
    /// The agent learns of `Halt`.
    SeeHalted(usize),
    /// The agent learns of `Settle`.
    SeeSettled(usize),
    /// The agent learns of `Complete`, or of `Serve`.
    SeeCompleted(usize),
    /// The agent learns of `Switch`.
    SeeStateSent(usize),
    /// The agent learns that its QEMU holds the whole guest.
    SeeLoaded(usize),
    /// The agent learns of `Load`, while memory is still to come.
    SeeStateLoaded(usize),
    /// The agent learns of `Break`.
    SeeBroken(usize),
    /// The agent learns that its QEMU is gone.
    SeeGone(usize),
    /// The agent's timer.
    Tick(usize),
    /// Somebody cancels.
    Cancel(usize),
    /// The copy fails.
    Fail(usize),
    /// The destination's lease ends.
    Lease(usize),
    /// A killed QEMU ends.
    End(usize),
    /// A fault: a QEMU ends by itself.
    Die(usize),
    /// A fault: the stream that brings the rest to a host is cut.
    Cut(usize),
    /// A fault: the source's QEMU on a host ends a post-copy for good.
    Break(usize),
    /// A fault: an agent ends. What it had not written is lost.
    Crash(usize),
    /// A crashed agent comes back.
    Restart(usize),
    /// The user starts a crashed VM again, on the host that owns it.
    Boot(usize),
    /// A fault: a host loses its power.
    Lose(usize),
    /// It has power again.
    Return(usize),
    /// The operator says that the destination of a migration will never act on its GO.
    State(usize),
    /// The controller brings that to the source, also late and twice.
    Reclaim(usize),
    /// The controller tells the destination that the VM was taken back, also late and twice.
    Supersede(usize),
    /// The agent of a host sweeps what a migration has left of disks there.
    Sweep(usize, usize),
}

impl Handoff {
    pub(crate) fn new(tries: usize, faults: u8, bug: Option<Bug>) -> Self {
        let (copies, operator) = (Copies::Precopy, Operator::Absent);
        Self {
            tries,
            faults,
            answers_first: true,
            copies,
            operator,
            disks: false,
            unaware: false,
            bug,
        }
    }

    pub(crate) fn disks(tries: usize, faults: u8, bug: Option<Bug>) -> Self {
        Self { disks: true, ..Self::new(tries, faults, bug) }
    }

    pub(crate) fn postcopy(tries: usize, faults: u8, bug: Option<Bug>) -> Self {
        Self { copies: Copies::Postcopy, ..Self::new(tries, faults, bug) }
    }

    /// Lets `event` happen; false if it cannot.
    pub(crate) fn apply(&self, world: &mut World, event: Event) -> bool {
        match event {
            Event::Ask(host) => self.ask(world, host),
            Event::Offer(number) => self.offer(world, number),
            Event::Begin(number) => self.begin_try(world, number),
            Event::Run(host, how) => {
                (how == Run::Well || spend_fault(world)) && self.run(world, host, how)
            }
            Event::Deliver(host, message) => {
                if world.hosts[host].ready().is_none() {
                    return false;
                }
                self.deliver(world, host, message);
                true
            }
            Event::Halt(host) => self.halt(world, host),
            Event::Settle(host) => self.settle(world, host),
            Event::Complete(host) => self.send(world, host, false),
            Event::Switch(host) => self.send(world, host, true),
            Event::Load(host) => load(world, host),
            Event::Serve(host) => serve(world, host),
            Event::Mend(host) => mend(world, host),
            Event::SeeHalted(host) => self.tell_source(world, host, SourceInput::AtSwitchover),
            Event::SeeSettled(host) => self.tell_source(world, host, SourceInput::DisksSettled),
            Event::SeeCompleted(host) => self.tell_source(world, host, SourceInput::Completed),
            Event::SeeStateSent(host) => self.tell_source(world, host, SourceInput::StateSent),
            Event::SeeBroken(host) => self.tell_source(world, host, SourceInput::StreamLost),
            Event::SeeLoaded(host) => self.tell_destination(world, host, DestinationInput::Loaded),
            Event::SeeStateLoaded(host) => {
                self.tell_destination(world, host, DestinationInput::StateLoaded)
            }
            Event::SeeGone(host) => {
                self.tell_source(world, host, SourceInput::QemuGone)
                    || self.tell_destination(world, host, DestinationInput::QemuGone)
            }
            Event::Tick(host) => {
                self.tamper_tick(world, host)
                    || self.tell_source(world, host, SourceInput::Tick)
                    || self.tell_destination(world, host, DestinationInput::Tick)
            }
            Event::Cancel(host) => self.tell_source(world, host, SourceInput::Cancel),
            Event::Fail(host) => self.tell_source(world, host, SourceInput::Fail("failed".into())),
            Event::Lease(host) => {
                self.tell_destination(world, host, DestinationInput::Abandon("lease".into()))
            }
            Event::End(host) => {
                world.hosts[host].qemu = None;
                true
            }
            Event::Die(host) => {
                world.hosts[host].qemu = None;
                world.qemu_died = true;
                spend_fault(world)
            }
            Event::Cut(host) => {
                world.hosts[host].qemu.as_mut().is_some_and(|qemu| {
                    qemu.cut = true;
                    qemu.lacks
                }) && spend_fault(world)
            }
            Event::Break(host) => break_off(world, host) && spend_fault(world),
            Event::Crash(host) => {
                world.hosts[host].agent = None;
                spend_fault(world)
            }
            Event::Restart(host) => {
                self.restart(world, host);
                true
            }
            Event::Boot(host) => self.boot(world, host),
            Event::Lose(host) => lose(world, host) && spend_fault(world),
            Event::Return(host) => {
                world.hosts[host].away = false;
                true
            }
            Event::State(number) => self.state(world, number),
            Event::Reclaim(number) => self.reclaim(world, number),
            Event::Supersede(number) => self.supersede(world, number),
            Event::Sweep(host, number) => self.sweep(world, host, number),
        }
    }

    fn ask(&self, world: &mut World, from: usize) -> bool {
        let Some(current) = world.hosts[from].current().filter(|record| record.may_run()) else {
            return false;
        };
        if world.is_taken_from(from) {
            return false;
        }
        let migration = migration_id(world.tries.len());
        let claim = Claim { vm: current.vm, migration, epoch: current.epoch.next() };
        let (loaded, whole, settled) = (false, false, false);
        let (released, cancelled, reclaimed) = (false, false, false);
        let one = Try { claim, from, loaded, whole, settled, released, cancelled, reclaimed };
        world.tries.push(one);
        true
    }

    fn state(&self, world: &mut World, number: usize) -> bool {
        let one = &world.tries[number];
        // Of a VM's open migration, that is: no other begins before it has ended.
        let open = number + 1 == world.tries.len() || self.bug == Some(Bug::TakenBackLater);
        if !open
            || !one.released
            || !(self.operator == Operator::Lying || world.hosts[other(one.from)].away)
        {
            return false;
        }
        world.tries[number].reclaimed = true;
        // Its guest will be ended.
        world.qemu_died = true;
        true
    }

    fn reclaim(&self, world: &mut World, number: usize) -> bool {
        let Try { claim, from, reclaimed, .. } = world.tries[number];
        reclaimed
            && machine(world, from, |one| one.claim() == claim).is_some()
            && self.tell_source(world, from, SourceInput::Reclaim)
    }

    fn supersede(&self, world: &mut World, number: usize) -> bool {
        let Try { claim, from, reclaimed, .. } = world.tries[number];
        let since = Claim { epoch: claim.epoch.next(), ..claim };
        let Some(agent) = world.hosts[other(from)].ready() else { return false };
        if !reclaimed || !world.hosts[from].took(since) {
            return false;
        }
        if let Some(open) = agent.machines.first() {
            return open.claim() == claim
                && self.tell_destination(world, other(from), DestinationInput::Superseded);
        }
        let host = &mut world.hosts[other(from)];
        let mut current = host.current().cloned();
        self.tamper_superseded(&mut current);
        let does = supersede(current.as_ref(), since, &host_name(from), host.observe());
        match self.tamper_superseding(does) {
            Superseding::Nothing => return false,
            Superseding::EndGuest => {
                if let Some(qemu) = &mut host.qemu {
                    qemu.killed = true;
                }
            }
            Superseding::Write(record) => {
                if let Some(agent) = &mut host.agent {
                    agent.queue.push_back((None, Action::Persist(record)));
                }
            }
        }
        true
    }

    fn boot(&self, world: &mut World, host: usize) -> bool {
        let it = &world.hosts[host];
        let owner = it.current().is_some_and(|record| record.standing == Standing::Owned);
        let idle = it.ready().is_some_and(|agent| agent.machines.is_empty());
        let taken = world.is_taken_from(host) && self.bug != Some(Bug::StaleOwnerStarts);
        if !owner || !idle || it.qemu.is_some() || taken {
            return false;
        }
        world.hosts[host].qemu = Some(Qemu { full: true, loaded: true, ..Qemu::default() });
        if world.intent == Intent::Run {
            world.run_guest(host);
        }
        true
    }

    fn offer(&self, world: &mut World, number: usize) -> bool {
        let Try { claim, from, .. } = world.tries[number];
        let host = &world.hosts[other(from)];
        if host.ready().is_none_or(|agent| !agent.machines.is_empty()) {
            return false;
        }
        let spent = host.row(claim.migration).is_some();
        let Ok((destination, actions)) =
            Destination::offer(host.current(), spent, claim, host_name(from))
        else {
            return false;
        };
        let machine = Machine::Destination(self.destination(destination));
        self.begin(world, other(from), machine, actions);
        true
    }

    fn begin_try(&self, world: &mut World, number: usize) -> bool {
        let Try { claim, from, .. } = world.tries[number];
        let host = &world.hosts[from];
        let Some(mut current) = host.current().cloned() else { return false };
        let mut free = host.ready().is_some_and(|agent| agent.machines.is_empty());
        let fetching = matches!(current.standing, Standing::Fetching { .. });
        if self.bug == Some(Bug::SecondMigrationAdmitted) && current.may_run()
            || self.bug == Some(Bug::MovedOnWhileFetching) && fetching
        {
            current.standing = Standing::Owned;
            free = host.ready().is_some();
        }
        let spent = host.row(claim.migration).is_some();
        let to = host_name(other(from));
        match Source::begin(&current, spent, claim, to) {
            Ok((source, actions))
                if free && (host.qemu.is_some() || self.operator == Operator::Absent) =>
            {
                self.begin(world, from, Machine::Source(self.source(source)), actions);
                true
            }
            _ => false,
        }
    }

    /// The source's QEMU stops its guest and sends everything, or all but a part of the memory.
    fn send(&self, world: &mut World, host: usize, leaves: bool) -> bool {
        let Some(sender) = &world.hosts[host].qemu else { return false };
        let (sending, stale, at) = (sender.sending, sender.stale, sender.switchover);
        let Some(target) = &mut world.hosts[other(host)].qemu else { return false };
        let waits = target.listening && !target.full && !target.killed;
        if sending.is_none() || target.incoming != sending || !waits || !self.may_send(at) {
            return false;
        }
        target.full = true;
        target.stale = stale;
        target.lacks = leaves;
        if let Some(sender) = &mut world.hosts[host].qemu {
            sender.running = false;
            sender.serving = leaves;
            sender.completed = !leaves;
        }
        true
    }

    /// What the driver knows of its migration and the rules do not.
    pub(crate) fn source(&self, source: Source) -> Source {
        if self.disks && !self.unaware { source.with_disks() } else { source }
    }

    pub(crate) fn destination(&self, destination: Destination) -> Destination {
        let unaware = self.bug == Some(Bug::TargetUnaware);
        if self.disks && !unaware { destination.with_disks() } else { destination }
    }

    fn tell_source(&self, world: &mut World, host: usize, input: SourceInput) -> bool {
        let source = machine(world, host, |machine| matches!(machine, Machine::Source(_)));
        let Some(migration) = source else { return false };
        let sees = world.hosts[host].qemu.as_ref();
        let holds = match input {
            SourceInput::Completed => {
                sees.is_some_and(|qemu| qemu.completed && qemu.sending == Some(migration))
            }
            SourceInput::StateSent => {
                sees.is_some_and(|qemu| qemu.serving && qemu.sending == Some(migration))
            }
            SourceInput::AtSwitchover | SourceInput::DisksSettled => sees.is_some_and(|qemu| {
                qemu.sending == Some(migration) && self.holds_of_disks(qemu.switchover, &input)
            }),
            SourceInput::StreamLost => sees.is_some_and(|qemu| qemu.broken),
            SourceInput::QemuGone => sees.is_none(),
            _ => true,
        };
        if holds {
            self.input(world, host, migration, Input::Source(input));
        }
        holds
    }

    fn tell_destination(&self, world: &mut World, host: usize, input: DestinationInput) -> bool {
        let it = machine(world, host, |machine| matches!(machine, Machine::Destination(_)));
        let Some(migration) = it else { return false };
        let sees = world.hosts[host].qemu.as_ref();
        let holds = match input {
            DestinationInput::Loaded => {
                let whole = sees.filter(|qemu| qemu.loaded && !qemu.lacks);
                whole.is_some_and(|qemu| qemu.incoming == Some(migration))
            }
            DestinationInput::StateLoaded => {
                let part = sees.filter(|qemu| qemu.loaded && qemu.lacks);
                part.is_some_and(|qemu| qemu.incoming == Some(migration))
            }
            DestinationInput::QemuGone => sees.is_none(),
            _ => true,
        };
        if holds {
            self.input(world, host, migration, Input::Destination(input));
        }
        holds
    }

    fn events_of(&self, world: &World, host: usize, events: &mut Vec<Event>) {
        let fault = world.faults_left > 0;
        let it = &world.hosts[host];
        if it.away {
            events.push(Event::Return(host));
            return;
        }
        if fault && self.operator != Operator::Absent {
            events.push(Event::Lose(host));
        }
        if let Some(qemu) = &it.qemu {
            if qemu.sending.is_some() && !qemu.completed && !qemu.serving && !qemu.broken {
                if self.disks {
                    events.extend([Event::Halt(host), Event::Settle(host)]);
                }
                events.push(match self.copies {
                    Copies::Precopy => Event::Complete(host),
                    Copies::Postcopy => Event::Switch(host),
                });
            }
            if qemu.serving {
                events.push(Event::Serve(host));
                if fault {
                    events.push(Event::Break(host));
                }
            }
            if qemu.cut {
                events.push(Event::Mend(host));
            } else if qemu.lacks && fault {
                events.push(Event::Cut(host));
            }
            if qemu.full && !qemu.loaded && !qemu.killed {
                events.push(Event::Load(host));
            }
            if qemu.killed {
                events.push(Event::End(host));
            } else if fault {
                events.push(Event::Die(host));
            }
        }
        let Some(agent) = &it.agent else {
            // A QEMU that is being killed answers nothing: its end is waited for.
            if it.qemu.as_ref().is_none_or(|qemu| !qemu.killed) {
                events.push(Event::Restart(host));
            }
            return;
        };
        if fault {
            events.push(Event::Crash(host));
        }
        if !agent.queue.is_empty() {
            events.push(Event::Run(host, Run::Well));
            if fault {
                events.extend([Event::Run(host, Run::Fails), Event::Run(host, Run::FailsDone)]);
            }
            return;
        }
        events.push(Event::Boot(host));
        let here = |(to, _): &&(usize, Message)| *to == host;
        events.extend(world.net.iter().filter(here).map(|(_, m)| Event::Deliver(host, *m)));
        if !agent.machines.is_empty() {
            events.extend([
                Event::SeeCompleted(host),
                Event::SeeLoaded(host),
                Event::SeeGone(host),
                Event::Tick(host),
                Event::Cancel(host),
                Event::Fail(host),
                Event::Lease(host),
            ]);
            if self.disks {
                events.extend([Event::SeeHalted(host), Event::SeeSettled(host)]);
            }
            if self.copies != Copies::Precopy {
                events.extend([
                    Event::SeeStateSent(host),
                    Event::SeeStateLoaded(host),
                    Event::SeeBroken(host),
                ]);
            }
        }
    }
}

fn spend_fault(world: &mut World) -> bool {
    match world.faults_left.checked_sub(1) {
        Some(left) => world.faults_left = left,
        None => return false,
    }
    true
}

/// The migration of the machine on a ready host that `wanted` picks.
fn machine(world: &World, host: usize, wanted: impl Fn(&Machine) -> bool) -> Option<MigrationId> {
    let agent = world.hosts[host].ready()?;
    agent.machines.iter().find(|machine| wanted(machine)).map(|machine| machine.claim().migration)
}

/// The rest of the memory gets there.
fn serve(world: &mut World, host: usize) -> bool {
    if !world.serves(host) || world.starves(other(host)) {
        return false;
    }
    if let Some(sender) = &mut world.hosts[host].qemu {
        sender.serving = false;
        sender.completed = true;
    }
    let Some(target) = &mut world.hosts[other(host)].qemu else { return false };
    target.lacks = false;
    let whole = target.loaded.then_some(target.incoming).flatten();
    if let Some(one) = whole.and_then(|id| world.try_mut(id)) {
        one.whole = true;
    }
    true
}

fn mend(world: &mut World, host: usize) -> bool {
    let serves = world.serves(other(host));
    let Some(target) = &mut world.hosts[host].qemu else { return false };
    target.cut &= !serves;
    serves
}

fn break_off(world: &mut World, host: usize) -> bool {
    let Some(qemu) = world.hosts[host].qemu.as_mut().filter(|qemu| qemu.serving) else {
        return false;
    };
    qemu.serving = false;
    qemu.broken = true;
    world.qemu_died = true;
    true
}

fn load(world: &mut World, host: usize) -> bool {
    let Some(qemu) = &mut world.hosts[host].qemu else { return false };
    qemu.loaded = true;
    let (incoming, whole) = (qemu.incoming, !qemu.lacks);
    if let Some(one) = incoming.and_then(|id| world.try_mut(id)) {
        one.loaded = true;
        one.whole |= whole;
    }
    true
}

fn lose(world: &mut World, host: usize) -> bool {
    let it = &mut world.hosts[host];
    it.away = true;
    it.agent = None;
    world.qemu_died |= it.qemu.take().is_some();
    true
}

impl Model for Handoff {
    type State = World;
    type Action = Event;

    fn init_states(&self) -> Vec<World> {
        [Intent::Run, Intent::Pause]
            .map(|intent| World::new(intent, self.faults, self.disks))
            .into()
    }

    fn actions(&self, world: &World, events: &mut Vec<Event>) {
        for host in 0..2 {
            if world.tries.len() < self.tries {
                events.push(Event::Ask(host));
            }
            self.events_of(world, host, events);
        }
        for number in 0..world.tries.len() {
            events.extend([Event::Offer(number), Event::Begin(number)]);
            if self.disks {
                events.extend([Event::Sweep(0, number), Event::Sweep(1, number)]);
            }
            if self.operator != Operator::Absent {
                events.extend([
                    Event::State(number),
                    Event::Reclaim(number),
                    Event::Supersede(number),
                ]);
            }
        }
    }

    fn next_state(&self, world: &World, event: Event) -> Option<World> {
        let mut next = world.clone();
        (self.apply(&mut next, event) && next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        invariants::properties(self)
    }
}
