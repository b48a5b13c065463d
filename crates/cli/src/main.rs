//! `whimbrel`: agent, controller, lab and command line in one binary.
//!
//! Here is only the way in and out: reading the arguments, the log, and the exit code. [`command`] has the commands.

mod agent;
mod command;
mod connect;
mod controller;
mod demo;
mod failure;
mod follow;
mod host;
mod lab;
mod man;
mod migrate;
mod migration;
mod network;
mod output;
mod plan;
mod policy;
mod pool;
mod progress;
mod runtime;
mod storage;
mod usage;
mod values;
mod vm;
mod words;

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser as _;
use tracing_subscriber::EnvFilter;

use crate::command::{Command, CommandLine};

/// Names what is logged, as `RUST_LOG` does elsewhere.
const LOG_VARIABLE: &str = "WHIMBREL_LOG";

fn main() -> ExitCode {
    let line = match CommandLine::try_parse() {
        Ok(line) => line,
        Err(error) => return usage::answer(&error),
    };
    start_log(&line);
    match command::run(line.command, &line.options) {
        Ok(code) => code,
        Err(failure) => {
            failure.report(line.options.json);
            failure.exit.into()
        }
    }
}

fn start_log(line: &CommandLine) {
    let serves = matches!(line.command, Command::Agent(_) | Command::Controller(_));
    let level = match (line.options.verbose, serves) {
        (0, false) => "error",
        (0, true) => "info",
        (1, false) => "whimbrel=info,warn",
        (1 | 2, _) => "whimbrel=debug,info",
        _ => "whimbrel=trace,debug",
    };
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(line.options.verbose > 0)
        .init();
}
