//! `make bench`: what a migration costs, measured with the release binary on a lab of this machine.
//!
//! ```text
//! moves      an idle guest moves many times, with each QEMU       the pause, its parts, what the probe saw, what we add
//! link       a guest full of random pages moves over 1 Gbit/s     how much of the link is used while memory is copied
//! footprint  ten VMs on one host                                  memory of agent and controller, size of the binary
//! virsh      the same guests moved by us and by virsh, in turn     time and pause, and the ratios of both
//! forecast   moves over a matrix of guests, loads and links        how far `whimbrel plan` was from what came
//! ```
//! Everything is driven through the public command line, as a user would; the witness in the guest verifies memory, disk
//! and clocks after every move, and one mismatch ends the bench with an error. A target that is missed is told, and is no
//! error: figures depend on the machine, and on what else it does.
//!
//! Not here: anything that the product links, and any test.

mod bounded;
mod figures;
mod footprint;
mod forecast;
mod link;
mod machine;
mod moves;
mod stage;
mod stop;
mod versus;

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;
use serde::Serialize;
use whimbrel_lab::{Lab, LabConfig};

use crate::figures::Figure;
use crate::footprint::Footprint;
use crate::forecast::Forecasts;
use crate::link::Copy;
use crate::machine::Machine;
use crate::moves::Moves;
use crate::stage::{Engine, Stage};
use crate::stop::Stop;
use crate::versus::{Comparison, Wanted};

/// Its own folder, so that it disturbs no lab that is up.
const FOLDER: &str = "/var/tmp/whimbrel-bench";
/// The QEMU of the headline figures comes first; hosts get them in turn, so that each has two hosts.
const ENGINES: [Engine; 2] = [
    Engine { version: "10.0", machine: "pc-q35-10.0", hosts: ["host-a", "host-c"] },
    Engine { version: "7.2", machine: "pc-q35-7.2", hosts: ["host-b", "host-d"] },
];
const HOSTS: u8 = 4;
/// The pairs of a comparison that is only tried.
const QUICK_PAIRS: u32 = 2;

/// Measure what a migration costs, on a lab of this machine
#[derive(Debug, Parser)]
struct Arguments {
    /// The measured moves of an idle guest with each QEMU
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    moves: u32,
    /// Only these parts; all without it
    #[arg(long, value_enum, value_name = "PART")]
    only: Vec<Part>,
    /// The pairs of moves in each case of the comparison with virsh
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pairs: u32,
    /// Try the comparison only: 2 pairs, and at most 2 guests where there are many
    #[arg(long)]
    quick: bool,
    /// Of the comparison only the cases whose names begin so; all without it
    #[arg(long, value_name = "NAME")]
    case: Vec<String>,
    /// The binary that is measured; the one beside this program without it
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Where the lab lives meanwhile
    #[arg(long, value_name = "FOLDER", default_value = FOLDER)]
    dir: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Moves,
    Link,
    Footprint,
    Virsh,
    Forecast,
}

impl Arguments {
    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

/// All that was measured, as it is written to the file.
#[derive(Debug, Default, Serialize)]
struct Results {
    machine: Machine,
    figures: Vec<Figure>,
    moves: Vec<Moves>,
    copies: Vec<Copy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    footprint: Option<Footprint>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to be told if this fails.
            let _unheard = writeln!(io::stderr(), "bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let stop = Stop::catch()?;
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let beside = program.parent().context("this program is in no folder")?;
    let binary = arguments.binary.clone().unwrap_or_else(|| beside.join("whimbrel"));
    let folder = beside.with_file_name("bench");
    let stage = raise(&arguments.dir, &binary, &stop)?;
    if [Part::Moves, Part::Link, Part::Footprint].iter().any(|part| arguments.wants(*part)) {
        print(&ours(arguments, &stage, &binary, &folder)?)?;
    }
    if arguments.wants(Part::Virsh) {
        print(&compare(arguments, &stage, &folder)?)?;
    }
    if arguments.wants(Part::Forecast) {
        print(&foretell(arguments, &stage, &folder)?)?;
    }
    Ok(())
}

fn print(table: &str) -> Result<()> {
    writeln!(io::stdout().lock(), "{table}").context("cannot write a table")
}

/// What `whimbrel` does by itself.
fn ours(arguments: &Arguments, stage: &Stage, binary: &Path, folder: &Path) -> Result<String> {
    let mut results = Results { machine: Machine::look(), ..Results::default() };
    if arguments.wants(Part::Moves) {
        for engine in &ENGINES {
            results.moves.push(moves::measure(stage, engine, arguments.moves)?);
        }
    }
    if arguments.wants(Part::Link) {
        results.copies = link::measure(stage, &ENGINES[0])?;
    }
    if arguments.wants(Part::Footprint) {
        results.footprint = Some(footprint::measure(stage, &ENGINES[0], binary)?);
    }
    results.figures = figures::of(&results.moves, &results.copies, results.footprint.as_ref());
    let file = write(&results, folder, "figures.json")?;
    Ok(with_file(figures::table(&results.machine, &results.figures), &file))
}

/// Whimbrel beside virsh. What there is is written after every case, so that an interruption loses little.
fn compare(arguments: &Arguments, stage: &Stage, folder: &Path) -> Result<String> {
    let wanted = Wanted {
        pairs: if arguments.quick { arguments.pairs.min(QUICK_PAIRS) } else { arguments.pairs },
        quick: arguments.quick,
        cases: &arguments.case,
    };
    let name = "virsh.json";
    let mut keep = |so_far: &Comparison| write(so_far, folder, name).map(drop);
    let comparison = versus::measure(stage, &ENGINES[0], &wanted, &mut keep)?;
    Ok(with_file(versus::table(&comparison), &folder.join(name)))
}

/// Forecasts beside facts, likewise.
fn foretell(arguments: &Arguments, stage: &Stage, folder: &Path) -> Result<String> {
    let name = "forecast.json";
    let mut keep = |so_far: &Forecasts| write(so_far, folder, name).map(drop);
    let forecasts = forecast::measure(stage, &ENGINES[0], arguments.quick, &mut keep)?;
    Ok(with_file(forecast::table(&forecasts), &folder.join(name)))
}

fn with_file(table: String, file: &Path) -> String {
    format!("{table}all of it, each move by itself: {}\n", file.display())
}

fn raise(dir: &Path, binary: &Path, stop: &Stop) -> Result<Stage> {
    let mut config = LabConfig::new(dir, binary);
    config.hosts = HOSTS;
    config.engines = ENGINES.iter().map(|engine| config.engine(engine.version)).collect();
    let lab = Lab::up(&config, stop.cancel(), &mut |step| say(step))?;
    Ok(Stage::new(lab, stop.clone()))
}

/// Tells what is done now: on standard error, since the table is the output.
fn say(step: &str) {
    // Without a reader the figures are measured all the same.
    let _unheard = writeln!(io::stderr(), "bench: {step}");
}

fn write(results: &impl Serialize, folder: &Path, name: &str) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let file = folder.join(name);
    let text = serde_json::to_string_pretty(results)? + "\n";
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}
