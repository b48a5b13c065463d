//! `whimbrel man`: the manual pages, made from the same words as `--help`, so that they cannot differ.

use std::path::PathBuf;

use clap::{Args, CommandFactory as _};
use clap_mangen::Man as Page;

use crate::command::{CommandLine, Options};
use crate::failure::{Failure, OwnCode};
use crate::output;

/// Print a manual page, or write all of them
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  whimbrel man migrate | man -l -
  whimbrel man vm create > whimbrel-vm-create.1
  whimbrel man --into /usr/local/share/man/man1       all of them, a file each")]
pub(crate) struct Man {
    /// The command, such as `migrate` or `vm create`; the whole without any
    #[arg(value_name = "COMMAND")]
    words: Vec<String>,
    /// Write all pages to this folder, a file each
    #[arg(long, value_name = "FOLDER", conflicts_with = "words")]
    into: Option<PathBuf>,
}

impl Man {
    pub(crate) fn run(self, options: &Options) -> Result<(), Failure> {
        if let Some(folder) = self.into {
            clap_mangen::generate_to(CommandLine::command(), &folder).map_err(|error| {
                Failure::because(&format!("cannot write to {}", folder.display()), &error)
            })?;
            return match options.json {
                true => output::json(&serde_json::json!({"folder": folder})),
                false => output::line(&format!("the pages are in {}", folder.display())),
            };
        }
        let text = page(&self.words)?;
        match options.json {
            true => output::json(&serde_json::json!({"page": text})),
            false => text.lines().try_for_each(output::line),
        }
    }
}

/// The page of a command, in roff.
fn page(words: &[String]) -> Result<String, Failure> {
    let mut whole = CommandLine::command();
    whole.build();
    let mut command = &whole;
    for word in words {
        command = command.find_subcommand(word).ok_or_else(|| {
            Failure::own(OwnCode::Usage, format!("there is no command `{}`", words.join(" ")))
        })?;
    }
    let title = std::iter::once("whimbrel").chain(words.iter().map(String::as_str));
    let title = title.collect::<Vec<_>>().join("-");
    let mut roff = Vec::new();
    Page::new(command.clone())
        .title(title)
        .render(&mut roff)
        .map_err(|error| Failure::because("cannot make the page", &error))?;
    String::from_utf8(roff).map_err(|error| Failure::because("the page is no text", &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_migrate_has_all_its_options() {
        let text = page(&["migrate".to_owned()]).unwrap();
        assert!(text.contains(".TH whimbrel-migrate"), "{text}");
        let plain = text.replace('\\', "");
        let command = CommandLine::command();
        let migrate = command.find_subcommand("migrate").unwrap();
        for long in migrate.get_arguments().filter_map(clap::Arg::get_long) {
            assert!(plain.contains(&format!("--{long}")), "--{long}");
        }
        assert!(plain.contains("Default: 20. Refused without --auto-converge"), "{plain}");
    }

    #[test]
    fn every_command_has_a_page_and_nothing_else_does() {
        fn all(command: &clap::Command, path: &[String]) {
            page(path).unwrap();
            for sub in command.get_subcommands() {
                all(sub, &[path, &[sub.get_name().to_owned()]].concat());
            }
        }
        all(&CommandLine::command(), &[]);
        assert_eq!(page(&["fly".to_owned()]).unwrap_err().code.as_str(), "usage");
    }
}
