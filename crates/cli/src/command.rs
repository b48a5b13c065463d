//! The command line as a whole: its commands, its global options, and what `--help` says of both.
//!
//! A file per group of commands turns arguments into requests and answers into words; nothing is decided there. This one
//! only brings them together and hands each what it needs to reach the controller.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use whimbrel_api::client::PoolClient;

use crate::failure::Failure;
use crate::{
    agent, connect, controller, demo, host, lab, man, migrate, migration, network, plan, policy,
    pool, runtime, storage, vm,
};

const AFTER_HELP: &str = "\
Examples:
  whimbrel lab up                          three hosts on this machine, to try it all
  whimbrel vm list                         what runs where
  whimbrel plan web01                      what moving it would take, and where to
  whimbrel migrate web01 host-b            moves a running VM
  whimbrel migrate web01 host-b --json     the same, for a script

Exit codes:
  0    done
  1    failed: something was tried and did not succeed
  2    wrong usage or input; nobody was asked
  3    refused: the controller or the lab said no, nothing was begun
  4    unknown: no answer, or a migration that is unresolved; ask again
  130  interrupted by Ctrl-C

The controller is named by the first of these files that exists: --client FILE (or WHIMBREL_CLIENT), \
~/.config/whimbrel/client.toml, /etc/whimbrel/client.toml, /var/tmp/whimbrel-lab/client.toml (a running lab's).

Results go to standard output; progress, logs and errors to standard error.";

/// Moves running virtual machines between QEMU/KVM hosts without stopping them.
#[derive(Debug, Parser)]
#[command(
    name = "whimbrel",
    version,
    after_help = AFTER_HELP,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
pub(crate) struct CommandLine {
    #[command(flatten)]
    pub(crate) options: Options,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The operator's file: where is the controller, who asks?
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "WHIMBREL_CLIENT",
        hide_env_values = true
    )]
    #[arg(help_heading = "Global options")]
    pub(crate) client: Option<PathBuf>,

    /// Print JSON, one object a line; an error is an object too
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) json: bool,

    /// Log more to standard error (-vv and -vvv still more)
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Global options")]
    pub(crate) verbose: u8,
}

impl Options {
    /// The controller.
    pub(crate) fn pool(&self) -> Result<PoolClient, Failure> {
        connect::pool(self.client.as_deref())
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Move a running VM to another host
    Migrate(Box<migrate::Migrate>),
    Plan(Box<plan::Plan>),
    #[command(subcommand)]
    Migration(migration::Migration),
    #[command(subcommand)]
    Policy(policy::Policy),
    #[command(subcommand)]
    Vm(vm::Vm),
    #[command(subcommand)]
    Host(host::Host),
    #[command(subcommand)]
    Network(network::Network),
    #[command(subcommand)]
    Storage(storage::Storage),
    #[command(subcommand)]
    Pool(pool::Pool),
    Agent(Box<agent::Agent>),
    Controller(controller::Controller),
    #[command(subcommand)]
    Lab(lab::Lab),
    Demo(demo::Demo),
    Man(man::Man),
}

/// Carries a command out. Success is what its exit code says: only `lab exec` has another one than 0.
pub(crate) fn run(command: Command, options: &Options) -> Result<ExitCode, Failure> {
    let done = |()| ExitCode::SUCCESS;
    match command {
        Command::Migrate(command) => runtime::block_on(command.run(options)).map(done),
        Command::Plan(command) => runtime::block_on(command.run(options)).map(done),
        Command::Policy(command) => runtime::block_on(command.run(options)).map(done),
        Command::Migration(command) => runtime::block_on(command.run(options)).map(done),
        Command::Vm(command) => runtime::block_on(command.run(options)).map(done),
        Command::Host(command) => runtime::block_on(command.run(options)).map(done),
        Command::Network(command) => runtime::block_on(command.run(options)).map(done),
        Command::Storage(command) => runtime::block_on(command.run(options)).map(done),
        Command::Pool(command) => runtime::block_on(command.run(options)).map(done),
        Command::Agent(command) => runtime::serve(command.run()).map(done),
        Command::Controller(command) => runtime::serve(command.run()).map(done),
        Command::Lab(command) => runtime::block_on(command.run(options)),
        Command::Demo(command) => runtime::block_on(command.run(options)).map(done),
        Command::Man(command) => command.run(options).map(done),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    /// Every command with its path, the whole first.
    fn all(command: &clap::Command, path: &str, found: &mut Vec<(String, clap::Command)>) {
        let path = format!("{path} {}", command.get_name()).trim_start().to_owned();
        found.push((path.clone(), command.clone()));
        command.get_subcommands().for_each(|sub| all(sub, &path, found));
    }

    fn commands() -> Vec<(String, clap::Command)> {
        let mut command = CommandLine::command();
        command.build();
        let mut found = Vec::new();
        all(&command, "", &mut found);
        found
    }

    #[test]
    fn every_help_is_as_it_was_read() {
        let visible = commands().into_iter().filter(|(_, command)| !command.is_hide_set());
        let help = |(path, _): (String, clap::Command)| {
            let words = path.split(' ').chain(["--help"]);
            let command = CommandLine::command().term_width(100);
            let help = command.try_get_matches_from(words).unwrap_err().to_string();
            format!("$ {path} --help\n{}\n", help.trim_end())
        };
        let text: Vec<String> = visible.map(help).collect();
        insta::assert_snapshot!("help", text.join("\n"));
    }

    #[test]
    fn every_help_has_a_sentence_and_an_example() {
        for (path, command) in commands().into_iter().filter(|(_, command)| !command.is_hide_set())
        {
            assert!(command.get_about().is_some(), "{path} has no sentence");
            let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(after.contains("Example"), "{path} has no example");
        }
    }

    /// The lines of a text that are commands of ours, continued lines joined.
    fn commands_in(text: &str) -> Vec<String> {
        let joined = text.replace("\\\n", " ");
        let lines = joined.lines().map(|line| line.trim().trim_start_matches("sudo "));
        // What holds an ellipsis is a picture.
        let ours = lines.filter(|line| line.starts_with("whimbrel ") && !line.contains('…'));
        ours.map(|line| line.split(['|', '<', '>', '#', ';']).next().unwrap_or(line).to_owned())
            .collect()
    }

    fn parse(line: &str) -> Result<CommandLine, clap::Error> {
        // Two spaces set a remark apart from the command that it is about.
        let command = line.trim().split("   ").next().unwrap_or(line);
        CommandLine::try_parse_from(command.split_whitespace())
    }

    #[test]
    fn every_example_is_a_command() {
        let mut count = 0;
        for (path, command) in commands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            for line in commands_in(&help) {
                count += 1;
                parse(&line).unwrap_or_else(|error| panic!("{path}: {line}: {error}"));
            }
        }
        assert!(count > 40, "{count} examples");
    }

    #[test]
    fn every_command_of_the_pages_is_one() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
        let mut count = 0;
        for folder in [root.to_owned(), format!("{root}/docs")] {
            for page in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if page.extension().is_none_or(|ending| ending != "md") {
                    continue;
                }
                let text = std::fs::read_to_string(&page).unwrap();
                for line in text.split("```").skip(1).step_by(2).flat_map(commands_in) {
                    count += 1;
                    parse(&line)
                        .unwrap_or_else(|error| panic!("{}: {line}: {error}", page.display()));
                }
            }
        }
        assert!(count > 15, "{count} commands");
    }
}
