//! Why a command did not do what it was asked for: the exit code, and the words on standard error.
//!
//! ```text
//! error[preflight-refused]: web01 cannot move to host-b
//! refused[network-missing]: Network lan (net0 of VM web01) is not on host host-b.
//!   → Give host-b a bridge for lan, or choose another.
//! hint: `whimbrel host list` shows where it could go
//! ```
//! With `--json` the same is one object on standard output. A *refusal* means that nothing was begun; "unknown" means
//! that nobody knows yet, which is not "failed".

use std::error::Error;
use std::process::ExitCode;

use serde_json::{Value, json};
use whimbrel_api::error::chain;
use whimbrel_api::{ApiError, ErrorCode, Verdict};
use whimbrel_migration::preflight::Severity;

use crate::output;

/// The exit codes, as `whimbrel --help` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Something was tried and did not succeed.
    Failed = 1,
    /// The command line or a file named in it is wrong; nobody was asked.
    Usage = 2,
    /// The controller refused; nothing was begun.
    Refused = 3,
    /// The outcome is not known: no answer, or a migration that is unresolved.
    Unknown = 4,
    /// Ctrl-C.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command did not do what it was asked for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Failure {
    /// How the process ends.
    pub(crate) exit: Exit,
    /// A stable word for machines.
    pub(crate) code: String,
    /// What is the matter, in one sentence.
    pub(crate) message: String,
    /// What to do about it.
    pub(crate) hint: Option<String>,
    /// Every reason of a refused migration.
    pub(crate) verdicts: Vec<Verdict>,
    /// What else the object of `--json` holds: how far it came.
    pub(crate) facts: Option<Box<Value>>,
}

impl Failure {
    fn new(exit: Exit, code: &str, message: impl Into<String>) -> Self {
        let (code, message) = (code.to_owned(), message.into());
        Self { exit, code, message, hint: None, verdicts: Vec::new(), facts: None }
    }

    /// Something here, on this side, was tried and failed.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, "failed", message)
    }

    /// The same with all causes of an error.
    pub(crate) fn because(doing: &str, error: &(dyn Error + 'static)) -> Self {
        Self::failed(format!("{doing}: {}", chain(error)))
    }

    /// What was asked for makes no sense; nobody was asked.
    pub(crate) fn usage(code: &str, message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, code, message)
    }

    /// It would not be begun.
    pub(crate) fn refused(code: &str, message: impl Into<String>) -> Self {
        Self::new(Exit::Refused, code, message)
    }

    /// Whether it came about is not known.
    pub(crate) fn unknown(code: &str, message: impl Into<String>) -> Self {
        Self::new(Exit::Unknown, code, message)
    }

    /// The user pressed Ctrl-C.
    pub(crate) fn interrupted(message: impl Into<String>) -> Self {
        Self::new(Exit::Interrupted, "interrupted", message)
    }

    /// The same with advice.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same with the fields of `facts`, an object, in what `--json` prints.
    pub(crate) fn with_facts(mut self, facts: Value) -> Self {
        self.facts = Some(Box::new(facts));
        self
    }

    /// Tells people on standard error, or with `json` machines on standard output.
    pub(crate) fn report(&self, json_wanted: bool) {
        if json_wanted {
            // If standard output is what failed, there is nobody to tell.
            let _ = output::json(&self.as_json());
            return;
        }
        self.lines().iter().for_each(|line| output::note(line));
    }

    /// The object that `--json` prints.
    pub(crate) fn as_json(&self) -> Value {
        let mut object = json!({
            "error": self.code,
            "message": self.message,
            "exit_code": self.exit as u8,
        });
        if let Some(hint) = &self.hint {
            object["hint"] = json!(hint);
        }
        if !self.verdicts.is_empty() {
            object["verdicts"] = json!(self.verdicts);
        }
        for (name, value) in self.facts.iter().filter_map(|facts| facts.as_object()).flatten() {
            object[name] = value.clone();
        }
        object
    }

    /// What stands on standard error.
    pub(crate) fn lines(&self) -> Vec<String> {
        // Some messages have several lines: the TOML reader points to the place in the file.
        let mut lines = indented(&format!("error[{}]: ", self.code), &self.message);
        lines.extend(self.verdicts.iter().flat_map(verdict_lines));
        if let Some(hint) = &self.hint {
            lines.extend(indented("hint: ", hint));
        }
        lines
    }
}

/// A verdict of preflight in words.
pub(crate) fn verdict_lines(verdict: &Verdict) -> Vec<String> {
    let severity = match verdict.severity {
        Severity::Refuse => "refused",
        Severity::Warn => "warning",
    };
    let mut lines = indented(&format!("{severity}[{}]: ", verdict.code), &verdict.problem);
    lines.extend(indented("  → ", &verdict.advice));
    lines
}

fn indented(start: &str, text: &str) -> Vec<String> {
    let mut lines = text.trim_end().lines();
    let first = format!("{start}{}", lines.next().unwrap_or_default());
    std::iter::once(first).chain(lines.map(|line| format!("  {line}"))).collect()
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        let exit = match error.code {
            // A newer controller's code: whether something was begun cannot be read from it.
            ErrorCode::Unreachable | ErrorCode::Unknown => Exit::Unknown,
            ErrorCode::Busy => Exit::Refused,
            _ if error.is_refusal() => Exit::Refused,
            _ => Exit::Failed,
        };
        let failure = Self::new(exit, error.code.as_str(), error.message);
        Self { hint: error.hint, verdicts: error.verdicts, ..failure }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_of_the_api_has_its_exit() {
        let exit = |code| Failure::from(ApiError::new(code, "m")).exit;
        assert_eq!(exit(ErrorCode::NotFound), Exit::Refused);
        assert_eq!(exit(ErrorCode::PreflightRefused), Exit::Refused);
        assert_eq!(exit(ErrorCode::Busy), Exit::Refused);
        assert_eq!(exit(ErrorCode::Engine), Exit::Failed);
        assert_eq!(exit(ErrorCode::Internal), Exit::Failed);
        assert_eq!(exit(ErrorCode::Unreachable), Exit::Unknown);
        assert_eq!(exit(ErrorCode::Unknown), Exit::Unknown);
    }

    #[test]
    fn words_and_json_say_the_same() {
        let failure = Failure::usage("bad-request", "one\n two\n").hint("do this");
        assert_eq!(failure.lines(), ["error[bad-request]: one", "   two", "hint: do this"]);
        let json = failure.as_json();
        assert_eq!(json["error"], "bad-request");
        assert_eq!((&json["exit_code"], &json["hint"]), (&json!(2), &json!("do this")));
        let json = failure.with_facts(json!({"outcome": "refused"})).as_json();
        assert_eq!((&json["outcome"], &json["exit_code"]), (&json!("refused"), &json!(2)));
    }
}
