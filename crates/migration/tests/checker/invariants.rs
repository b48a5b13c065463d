//! What must hold: the names are those of the project's list of invariants.

use stateright::Property;
use whimbrel_migration::handoff::{Body, Claim, Destination, Intent, Source, Standing};

use super::disks::Content;
use super::driver::{Run, refused};
use super::events::{Copies, Event, Handoff, Operator};
use super::world::{Host, Qemu, World, host_name, is_released, is_taken, migration_id, other};

pub(crate) const AT_MOST_ONE: &str = "I1 AtMostOne";
pub(crate) const OWNER_RUNS: &str = "I2 OwnerRuns";
pub(crate) const EPOCHS: &str = "I3 Epochs";
pub(crate) const NO_RESUME: &str = "I4 NoResume";
pub(crate) const GO_GATE: &str = "I5 GoGate";
pub(crate) const REFUSED_FINAL: &str = "I6 RefusedFinal";
pub(crate) const NO_STALE: &str = "I7 NoStale";
pub(crate) const LAST_COPY: &str = "I9 LastCopy";
pub(crate) const ACKED_WRITES: &str = "I10 AckedWrites";
pub(crate) const CANCEL: &str = "I14 Cancel";
pub(crate) const ONE_MIGRATION: &str = "I16 OneMigration";
pub(crate) const SEALED: &str = "I17 Sealed";
pub(crate) const TRUTHFUL: &str = "I20 TruthfulStatus";
pub(crate) const PAUSE_KEPT: &str = "I21 PauseKept";
pub(crate) const JOURNAL_FIRST: &str = "I22 JournalFirst";
pub(crate) const POSTCOPY_BOTH: &str = "I23 PostcopyBoth";
/// I12 Swept, I13 RunsOrTold, I19 ControllerFree and I24 Ends in one: the fair run ends well.
pub(crate) const ENDS_WELL: &str = "I12 I13 I19 I24 EndsWell";

/// The same for a VM that was taken back, while the other host is away for good.
pub(crate) const TAKEN_BACK: &str = "I13 I24 TakenBack";

/// What is asked for where an operator lies. The guest may run twice then, and that is his word's doing.
const WHATEVER_IS_SAID: [&str; 4] = [EPOCHS, LAST_COPY, TRUTHFUL, ENDS_WELL];

/// Rounds of the fair run; more would mean that it does not end.
const FAIR_ROUNDS: usize = 40;

pub(crate) fn properties(model: &Handoff) -> Vec<Property<Handoff>> {
    let mut all = vec![
        Property::always(AT_MOST_ONE, |_, w: &World| !(w.hosts[0].runs() && w.hosts[1].runs())),
        Property::always(OWNER_RUNS, |_, w: &World| every_host(w, owner_runs)),
        Property::always(EPOCHS, |_, w: &World| {
            !w.broken.contains(EPOCHS) && one_owner_per_epoch(w)
        }),
        Property::always(NO_RESUME, |_, w: &World| every_host(w, no_resume)),
        Property::always(GO_GATE, |_, w: &World| !w.broken.contains(GO_GATE)),
        Property::always(REFUSED_FINAL, |_, w: &World| refused_final(w)),
        Property::always(NO_STALE, |_, w: &World| !w.broken.contains(NO_STALE)),
        Property::always(LAST_COPY, |_, w: &World| !w.broken.contains(LAST_COPY)),
        Property::always(ACKED_WRITES, |_, w: &World| !w.broken.contains(ACKED_WRITES)),
        Property::always(CANCEL, |_, w: &World| !w.broken.contains(CANCEL) && cancelled_stay(w)),
        Property::always(ONE_MIGRATION, |_, w: &World| one_migration(w)),
        Property::always(SEALED, |_, w: &World| {
            let closed = |q: &Qemu| !q.listening && !q.exporting;
            w.hosts.iter().filter_map(|h| h.qemu.as_ref()).all(|q| !q.running || closed(q))
        }),
        Property::always(TRUTHFUL, |_, w: &World| truthful(w)),
        Property::always(PAUSE_KEPT, |_, w: &World| {
            w.intent == Intent::Run || !w.hosts.iter().any(Host::runs)
        }),
        Property::always(JOURNAL_FIRST, |_, w: &World| w.hosts.iter().all(journal_first)),
        Property::always(POSTCOPY_BOTH, |_, w: &World| !w.broken.contains(POSTCOPY_BOTH)),
        Property::always(ENDS_WELL, ends_well),
        // The model is not empty: these things do happen.
        Property::sometimes("a released VM stays after a refusal", |_, w: &World| {
            w.hosts[0].runs() && w.net.iter().any(|(_, m)| matches!(m.body, Body::Go { .. }))
        }),
    ];
    if model.operator != Operator::Absent {
        all.push(Property::always(TAKEN_BACK, taken_back));
        all.push(Property::sometimes(
            "a VM runs again that was taken back from its owner",
            |_, w: &World| w.hosts[0].runs() && w.is_taken_from(1),
        ));
        all.push(Property::sometimes("a host hears that its VM was taken back", |_, w: &World| {
            w.tries.iter().any(|one| {
                let row = w.hosts[other(one.from)].row(one.claim.migration);
                row.is_some_and(|row| matches!(row.standing, Standing::Gone { .. }))
            })
        }));
    }
    if model.operator == Operator::Lying {
        all.retain(|one| WHATEVER_IS_SAID.contains(&one.name));
        return all;
    }
    if model.tries > 1 {
        all.push(Property::sometimes("a VM goes there and back", |_, w: &World| {
            w.hosts[0].runs()
                && w.hosts[0].current().is_some_and(|r| r.epoch.0 == 3)
                && w.reported.iter().filter(|(_, _, moved)| *moved).count() >= 2
        }));
    }
    if model.disks && !model.unaware {
        all.push(Property::sometimes(
            "a guest runs from disks that were copied",
            |_, w: &World| {
                w.hosts[1].runs() && w.files.is_some_and(|files| files[0].content == Content::Old)
            },
        ));
        all.push(Property::sometimes("the originals are taken away", |_, w: &World| {
            w.files.is_some_and(|files| files[0].content == Content::Absent)
        }));
    }
    if model.copies != Copies::Precopy {
        all.push(Property::sometimes(
            "a guest runs whose memory is still to come",
            |_, w: &World| w.serves(0) && w.hosts[1].runs(),
        ));
    }
    all
}

fn every_host(world: &World, holds: fn(&World, usize) -> bool) -> bool {
    holds(world, 0) && holds(world, 1)
}

/// Who runs the guest holds the highest epoch, durably. The one exception: after a refusal the
/// source resumes even if its own disk is broken; its record then still says `Released`, and
/// `no_resume` covers it.
fn owner_runs(world: &World, host: usize) -> bool {
    let it = &world.hosts[host];
    if !it.runs() {
        return true;
    }
    let Some(record) = it.current() else { return false };
    let released = is_released(record);
    let newer_elsewhere = world.hosts[other(host)]
        .current()
        .is_some_and(|elsewhere| elsewhere.may_run() && elsewhere.epoch >= record.epoch);
    (record.may_run() || released) && !newer_elsewhere
}

/// After a release the guest runs here again only if the destination has refused.
fn no_resume(world: &World, host: usize) -> bool {
    let it = &world.hosts[host];
    let Some(record) = it.current().filter(|_| it.runs()) else { return true };
    match record.standing {
        Standing::Released { .. } | Standing::Serving { .. } => {
            record.claim().is_some_and(|claim| refused(world, claim))
        }
        Standing::Gone { .. } => false,
        _ => true,
    }
}

fn one_owner_per_epoch(world: &World) -> bool {
    let owned = |host: usize| world.hosts[host].ledger.iter().filter(|row| is_taken(row));
    !owned(0).any(|row| owned(1).any(|elsewhere| elsewhere.epoch == row.epoch))
}

fn refused_final(world: &World) -> bool {
    world.net.iter().filter(|(_, message)| message.body == Body::Refused).all(|(to, message)| {
        let destination = &world.hosts[other(*to)];
        let running = destination
            .qemu
            .as_ref()
            .is_some_and(|q| q.running && q.incoming == Some(message.claim.migration));
        !running && !destination.took(message.claim)
    })
}

fn cancelled_stay(world: &World) -> bool {
    world
        .tries
        .iter()
        .filter(|one| one.cancelled)
        .all(|one| !world.hosts[other(one.from)].took(one.claim))
}

fn one_migration(world: &World) -> bool {
    let leaving = |host: &&Host| {
        host.current().is_some_and(|record| matches!(record.standing, Standing::Leaving { .. }))
    };
    let crowded = |host: &Host| host.agent.as_ref().is_some_and(|agent| agent.machines.len() > 1);
    world.hosts.iter().filter(leaving).count() <= 1 && !world.hosts.iter().any(crowded)
}

/// "Moved" is reported only once the destination owns the VM for ever, "stayed" only if it never
/// will.
fn truthful(world: &World) -> bool {
    world.reported.iter().all(|(migration, _, moved)| {
        let Some(one) = world.try_of(*migration) else { return false };
        let row = world.hosts[other(one.from)].row(*migration);
        one.reclaimed || row.is_some_and(is_taken) == *moved
    })
}

/// A QEMU that was started for a migration is in the ledger.
fn journal_first(host: &Host) -> bool {
    let incoming = host.qemu.as_ref().and_then(|qemu| qemu.incoming);
    incoming.is_none_or(|migration| host.row(migration).is_some())
}

/// From here, when faults stop and the controller is gone for good, a fair run ends well.
///
/// States in which something is half done are skipped: what they lead to is a state of its own.
fn ends_well(model: &Handoff, world: &World) -> bool {
    let settled = world
        .hosts
        .iter()
        .all(|host| host.ready().is_some() && host.qemu.as_ref().is_none_or(|qemu| !qemu.killed));
    if !settled {
        return true;
    }
    fair_run(model, world).is_some_and(|world| ended_well(&world))
}

/// The same while the host that it was taken from stays away: the operator's word is enough.
fn taken_back(model: &Handoff, world: &World) -> bool {
    world.tries.iter().filter(|one| one.reclaimed).all(|one| {
        let it = &world.hosts[one.from];
        let settled = it.ready().is_some() && it.qemu.as_ref().is_none_or(|qemu| !qemu.killed);
        if !settled || !world.hosts[other(one.from)].away {
            return true;
        }
        fair_run(model, world).is_some_and(|world| {
            let it = &world.hosts[one.from];
            let idle = it.ready().is_some_and(|agent| agent.machines.is_empty());
            let decided = it.current().is_some_and(|record| !record.is_open());
            idle && decided
        })
    })
}

/// What a fair run leads to, if it comes to an end. Who is away stays away.
fn fair_run(model: &Handoff, world: &World) -> Option<World> {
    let mut world = world.clone();
    world.faults_left = 0;
    let mut patience_ended = false;
    for _ in 0..FAIR_ROUNDS {
        let before = world.clone();
        fair_round(model, &mut world);
        if world == before {
            if patience_ended {
                return Some(world);
            }
            // The copy's deadline and the destination's lease.
            patience_ended = true;
            for host in 0..2 {
                happen(model, &mut world, Event::Fail(host));
                happen(model, &mut world, Event::Lease(host));
            }
        }
    }
    None
}

fn fair_round(model: &Handoff, world: &mut World) {
    for host in 0..2 {
        if world.hosts[host].qemu.as_ref().is_some_and(|qemu| qemu.killed) {
            happen(model, world, Event::End(host));
        }
        if world.hosts[host].agent.is_none() && !world.hosts[host].away {
            happen(model, world, Event::Restart(host));
        }
        if model.disks {
            happen(model, world, Event::Halt(host));
            happen(model, world, Event::Settle(host));
        }
        happen(model, world, Event::Mend(host));
        happen(model, world, Event::Serve(host));
        if world.hosts[host].qemu.as_ref().is_some_and(|qemu| !qemu.serving && !qemu.broken) {
            let event =
                if model.copies == Copies::Postcopy { Event::Switch } else { Event::Complete };
            happen(model, world, event(host));
        }
        if world.hosts[host].qemu.as_ref().is_some_and(|qemu| qemu.full) {
            happen(model, world, Event::Load(host));
        }
        for event in [
            Event::SeeGone,
            Event::SeeHalted,
            Event::SeeSettled,
            Event::SeeBroken,
            Event::SeeCompleted,
            Event::SeeStateSent,
            Event::SeeLoaded,
            Event::SeeStateLoaded,
            Event::Tick,
        ] {
            happen(model, world, event(host));
        }
    }
    for number in 0..world.tries.len() {
        happen(model, world, Event::Reclaim(number));
        happen(model, world, Event::Supersede(number));
        happen(model, world, Event::Sweep(0, number));
        happen(model, world, Event::Sweep(1, number));
    }
    for (host, message) in world.net.clone() {
        happen(model, world, Event::Deliver(host, message));
    }
}

/// Lets an event happen, if it can, and all that follows from it by itself.
fn happen(model: &Handoff, world: &mut World, event: Event) {
    let _possible = model.apply(world, event);
    for host in 0..2 {
        while world.hosts[host].agent.as_ref().is_some_and(|agent| !agent.queue.is_empty()) {
            let _done = model.apply(world, Event::Run(host, Run::Well));
        }
    }
}

/// One host owns the VM, its guest is as its user wants it (or has died by a fault, at its owner),
/// nothing else is left, and the next migration can begin.
fn ended_well(world: &World) -> bool {
    let idle = |host: &Host| host.ready().is_some_and(|agent| agent.machines.is_empty());
    let owns = |host: &Host| host.current().is_some_and(|r| r.standing == Standing::Owned);
    let [a, b] = &world.hosts;
    let ((owner, bystander), left) = if owns(a) { ((a, b), 1) } else { ((b, a), 0) };
    let guest = match &owner.qemu {
        None => world.qemu_died,
        Some(qemu) => {
            let whole = qemu.loaded && !qemu.lacks && !qemu.stale;
            whole && qemu.running == (world.intent == Intent::Run)
        }
    };
    idle(a)
        && idle(b)
        && owns(owner)
        && !bystander.may_run()
        && bystander.qemu.is_none()
        && guest
        && world.disks_are_swept(left)
        && next_try_is_admitted(world, owner, bystander)
}

/// A migration with an epoch of its own is free to begin on both hosts.
fn next_try_is_admitted(world: &World, owner: &Host, bystander: &Host) -> bool {
    let Some(current) = owner.current() else { return false };
    let named = world.tries.iter().map(|one| one.claim.epoch);
    let epoch = named.chain([current.epoch]).max().unwrap_or(current.epoch).next();
    let claim = Claim { vm: current.vm, migration: migration_id(world.tries.len()), epoch };
    let peer = || host_name(0);
    Source::begin(current, false, claim, peer()).is_ok()
        && Destination::offer(bystander.current(), false, claim, peer()).is_ok()
}
