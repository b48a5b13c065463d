//! What the parser of the command line refuses, said in the form of all other errors: a code, a sentence, a hint.
//!
//! Clap has the words; the values' own codes ([`BadValue`]) are found again here. `--help` and `--version` come this way too.

use std::error::Error as _;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};

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

fn failure(error: &clap::Error) -> Failure {
    let rendered = error.to_string();
    let mut paragraphs = rendered.trim_start_matches("error: ").split("\n\n").map(str::trim_end);
    let sentence = paragraphs.next().unwrap_or_default().replace("\n  ", " ");
    let tips = paragraphs.filter(|text| !text.starts_with("For more information"));
    let hint =
        tips.map(|text| text.trim_start_matches("  ").to_owned()).collect::<Vec<_>>().join("\n");
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
