//! Explores the handoff further than the test does, and shows what was explored and which
//! invariant caught each planted bug.
//!
//! `cargo run -p whimbrel-migration --release --example explore [TRIES [FAULTS]]`: how many
//! migrations and how many faults happen in a run; by default 2 and 2, in both orders in which a
//! driver may carry out what follows from an answer.
#![allow(clippy::print_stdout, dead_code, unreachable_pub, missing_docs)] // a command for people

#[path = "../tests/checker/mod.rs"]
mod checker;

use std::time::Instant;

use checker::bugs::Bug;
use checker::{ALL_BUGS, Handoff};
use stateright::{Checker, HasDiscoveries, Model};

fn main() {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<u8>());
    let mut sound = match (numbers.next(), numbers.next()) {
        (None, _) => explore(2, 2, true) & explore(2, 2, false),
        (Some(Ok(tries)), None) => explore(tries, 1, true),
        (Some(Ok(tries)), Some(Ok(faults))) => explore(tries, faults, true),
        _ => {
            println!("usage: explore [TRIES [FAULTS]]");
            false
        }
    };
    for bug in ALL_BUGS {
        sound &= catch(*bug);
    }
    std::process::exit(i32::from(!sound));
}

fn explore(tries: u8, faults: u8, answers_first: bool) -> bool {
    let begun = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let model = Handoff { answers_first, ..Handoff::new(usize::from(tries), faults, None) };
    let checker = model.checker().threads(threads).spawn_bfs().join();
    println!(
        "{tries} migrations, {faults} faults, answers {}: {} states, {} unique, depth {}, {:.1} s",
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
            println!("{:#?}", path.into_actions());
        }
        sound &= ok;
    }
    sound
}

fn catch(bug: Bug) -> bool {
    let wanted = bug.caught_by();
    let (tries, faults) = bug.bounds();
    let begun = Instant::now();
    let checker = Handoff::new(tries, faults, Some(bug))
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
