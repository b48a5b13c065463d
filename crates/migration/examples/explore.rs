//! Explores the handoff further than the test does, and shows what was explored and which
//! invariant caught each planted bug.
//!
//! `cargo run -p whimbrel-migration --release --example explore [TRIES [FAULTS [COPIES [OPERATOR [DISKS]]]]]`: how
//! many migrations and how many faults happen in a run, whether guests are sent by `precopy` or `postcopy`,
//! whether hosts lose their power and a `truthful` or a `lying` operator takes their VMs back (else `absent`), and
//! whether disks are `shared` or `copied`. By default 2 and 2
//! by pre-copy, in both orders in which a driver may carry out what follows from an answer; 1 and 3; 2 and 1
//! by post-copy; and with operators.
#![allow(clippy::print_stdout, dead_code, unreachable_pub, missing_docs)] // a command for people

#[path = "../tests/checker/mod.rs"]
mod checker;

use std::time::Instant;

use checker::bugs::Bug;
use checker::{ALL_BUGS, Copies, Handoff, Operator};
use stateright::{Checker, HasDiscoveries, Model};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut sound = match asked(&words) {
        _ if words.is_empty() => {
            let last = Handoff { answers_first: false, ..Handoff::new(2, 2, None) };
            let (truthful, lying) = (Operator::Truthful, Operator::Lying);
            explore(Handoff::new(2, 2, None))
                & explore(last)
                & explore(Handoff::new(1, 3, None))
                & explore(Handoff::postcopy(2, 1, None))
                & explore(Handoff { operator: truthful, ..Handoff::new(2, 1, None) })
                & explore(Handoff { operator: truthful, ..Handoff::postcopy(1, 2, None) })
                & explore(Handoff { operator: lying, ..Handoff::postcopy(1, 1, None) })
                & explore(Handoff::disks(2, 1, None))
                & explore(Handoff { disks: true, ..Handoff::postcopy(1, 2, None) })
                & explore(Handoff { operator: truthful, ..Handoff::disks(1, 2, None) })
                & explore(Handoff { operator: lying, ..Handoff::disks(1, 1, None) })
        }
        Some(model) => explore(model),
        None => {
            println!(
                "usage: explore [TRIES [FAULTS [precopy|postcopy [absent|truthful|lying [shared|copied]]]]]"
            );
            false
        }
    };
    for bug in ALL_BUGS {
        sound &= catch(*bug);
    }
    std::process::exit(i32::from(!sound));
}

fn asked(words: &[&str]) -> Option<Handoff> {
    let mut said = ["", "1", "precopy", "absent", "shared"];
    said.get_mut(..words.len())?.copy_from_slice(words);
    let [tries, faults, copies, operator, disks] = said;
    let disks = match disks {
        "shared" => false,
        "copied" => true,
        _ => return None,
    };
    let operator = match operator {
        "absent" => Operator::Absent,
        "truthful" => Operator::Truthful,
        "lying" => Operator::Lying,
        _ => return None,
    };
    let copies = match copies {
        "precopy" => Copies::Precopy,
        "postcopy" => Copies::Postcopy,
        _ => return None,
    };
    let model = Handoff::new(tries.parse().ok()?, faults.parse().ok()?, None);
    Some(Handoff { copies, operator, disks, ..model })
}

fn explore(model: Handoff) -> bool {
    let begun = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let Handoff { tries, faults, answers_first, copies, operator, disks, .. } = model;
    let checker = model.checker().threads(threads).spawn_bfs().join();
    println!(
        "{tries} migrations by {copies:?}, {faults} faults, operator {operator:?}, disks {}, answers {}: {} states, {} unique, depth {}, {:.1} s",
        if disks { "copied" } else { "shared" },
        if answers_first { "first" } else { "last" },
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64(),
    );
    let mut sound = true;
    for property in checker.model().properties() {
        let found = checker.discovery(property.name);
        let failure = property.expectation == stateright::Expectation::Always;
        let ok = found.is_some() != failure;
        println!("  {} {}", if ok { "holds" } else { "FAILS" }, property.name);
        if let (false, Some(path)) = (ok, found) {
            for event in path.into_actions() {
                println!("    {event:?}");
            }
        }
        sound &= ok;
    }
    sound
}

fn catch(bug: Bug) -> bool {
    let wanted = bug.caught_by();
    let begun = Instant::now();
    let checker = bug
        .model()
        .checker()
        .finish_when(HasDiscoveries::AnyOf([wanted].into()))
        .spawn_bfs()
        .join();
    let found = checker.discovery(wanted);
    let events = found.as_ref().map_or(0, |path| path.clone().into_actions().len());
    println!(
        "planted: {} {} {wanted}, after {} states, in {events} events, {:.1} s",
        bug.what(),
        if found.is_some() { "Caught by" } else { "NOT CAUGHT by" },
        checker.unique_state_count(),
        begun.elapsed().as_secs_f64(),
    );
    found.is_some()
}
