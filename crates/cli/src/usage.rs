//! What the parser of the command line refuses, said in the form of all other errors: a code, a sentence, a hint.
//!
//! Clap has the words; the values' own codes ([`BadValue`]) are found again here. `--help` and `--version` come this way too.

use std::error::Error as _;
use std::process::ExitCode;

use clap::CommandFactory as _;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::command::CommandLine;
use crate::failure::{Failure, OwnCode};
use crate::values::BadValue;

/// Prints what clap has to say, and the exit code for it.
pub(crate) fn answer(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // Help and version: clap knows best how. That a reader is gone is no error.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return ExitCode::from(crate::failure::Exit::Usage as u8);
    }
    let failure = failure(error);
    // What follows `--` is not ours; a wrong guess would only change the form of the message.
    let json = std::env::args_os().take_while(|arg| arg != "--").any(|arg| arg == "--json");
    failure.report(json);
    failure.exit.into()
}

/// What a usage begins with.
const USAGE: &str = "Usage: ";

/// The whole usage of the command that `told` begins with. Clap leaves optional arguments out of what it tells with an error,
/// all but those that it has a value for: `--client` from the environment, or a default, read there as if they were required.
fn usage_of(told: &str) -> String {
    let mut command = CommandLine::command();
    command.build();
    for word in told.split_whitespace().skip(1) {
        match command.find_subcommand(word) {
            Some(sub) => command = sub.clone(),
            None => break,
        }
    }
    command.render_usage().to_string()
}

fn failure(error: &clap::Error) -> Failure {
    let rendered = error.to_string();
    let mut paragraphs = rendered.trim_start_matches("error: ").split("\n\n").map(str::trim_end);
    let sentence = paragraphs.next().unwrap_or_default().replace("\n  ", " ");
    let tips = paragraphs.filter(|text| !text.starts_with("For more information"));
    let tips = tips.map(|text| match text.strip_prefix(USAGE) {
        Some(told) => usage_of(told),
        None => text.trim_start_matches("  ").to_owned(),
    });
    let hint = tips.collect::<Vec<_>>().join("\n");
    let hint = if hint.is_empty() { "try '--help'".to_owned() } else { hint };
    match error.source().and_then(|source| source.downcast_ref::<BadValue>()) {
        Some(bad) => {
            let option = match error.get(ContextKind::InvalidArg) {
                Some(ContextValue::String(name)) => format!("{name}: "),
                _ => String::new(),
            };
            Failure::usage(bad.code, format!("{option}{}", bad.message))
        }
        None => Failure::own(OwnCode::Usage, sentence).hint(hint),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_optional_is_not_told_as_required() {
        for (told, usage) in [
            (
                "whimbrel migrate --client <FILE> <VM> <HOST>",
                "whimbrel migrate [OPTIONS] <VM> <HOST>",
            ),
            ("whimbrel vm show --client <FILE> <VM>", "whimbrel vm show [OPTIONS] <VM>"),
            ("whimbrel --client <FILE>", "whimbrel [OPTIONS] <COMMAND>"),
        ] {
            assert_eq!(usage_of(told), format!("{USAGE}{usage}"), "{told}");
        }
    }
}
