//! Runs the tools that the lab is made with (`ip`, `tc`, `nft`, `whimbrel`), and says what failed in their words.
//!
//! A child is in the network namespace of the thread that starts it; see [`crate::namespace`].

use std::io::Write;
use std::process::{Command, Output, Stdio};

use crate::error::LabError;

/// Runs a command to its end, with text on its standard input, and returns its standard output.
pub(crate) fn run(command: &mut Command, input: &str) -> Result<String, LabError> {
    let output = collect(command, input)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
    Err(LabError::Tool {
        command: describe(command),
        output: format!("{} ({})", String::from_utf8_lossy(said).trim(), output.status),
    })
}

fn collect(command: &mut Command, input: &str) -> Result<Output, LabError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |source| LabError::Spawn { program: program.clone(), source };
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that ends before it has read everything says why by itself.
        let _written = stdin.write_all(input.as_bytes());
    }
    child.wait_with_output().map_err(failed)
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
