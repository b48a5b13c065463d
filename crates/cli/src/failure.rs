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

macro_rules! own_codes {
    ($( $(#[$doc:meta])* $variant:ident = $code:literal, $exit:ident; )*) => {
        /// The codes that the command line has besides those of the API; each has one exit code.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum OwnCode {
            $( $(#[$doc])* $variant, )*
        }

        impl OwnCode {
            /// All of them, for the manual's table.
            #[cfg(test)]
            const ALL: &'static [OwnCode] = &[$(OwnCode::$variant),*];

            fn as_str(self) -> &'static str {
                match self { $(OwnCode::$variant => $code,)* }
            }

            fn exit(self) -> Exit {
                match self { $(OwnCode::$variant => Exit::$exit,)* }
            }
        }
    };
}

own_codes! {
    /// Something on this side was tried and did not succeed.
    Failed = "failed", Failed;
    /// The command line itself makes no sense.
    Usage = "usage", Usage;
    /// No file says where the controller is, or the one that does is unusable.
    NoController = "no-controller", Usage;
    /// The lab makes namespaces, which only root may.
    NotRoot = "not-root", Usage;
    /// What the lab needs has not been fetched or built.
    NotSetUp = "not-set-up", Refused;
    /// How a migration ended is not known.
    Unknown = "unknown", Unknown;
    /// Nobody knows yet where the VM belongs.
    Unresolved = "unresolved", Unknown;
    /// Ctrl-C.
    Interrupted = "interrupted", Interrupted;
}

/// The stable word for machines. The manual's tables have each: a test compares them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Code {
    /// One of the API's, from the other side or because this side refuses for the same reason.
    Api(ErrorCode),
    /// One of the command line's own.
    Own(OwnCode),
    /// What a migration's record says of why the VM stayed.
    Stay(String),
}

impl Code {
    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Api(code) => code.as_str(),
            Self::Own(code) => code.as_str(),
            Self::Stay(code) => code,
        }
    }
}

impl From<ErrorCode> for Code {
    fn from(code: ErrorCode) -> Self {
        Self::Api(code)
    }
}

/// Why a command did not do what it was asked for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Failure {
    /// How the process ends.
    pub(crate) exit: Exit,
    /// A stable word for machines.
    pub(crate) code: Code,
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
    fn new(exit: Exit, code: Code, message: impl Into<String>) -> Self {
        Self { exit, code, message: message.into(), hint: None, verdicts: Vec::new(), facts: None }
    }

    /// What has a code of the command line's own.
    pub(crate) fn own(code: OwnCode, message: impl Into<String>) -> Self {
        Self::new(code.exit(), Code::Own(code), message)
    }

    /// Something here, on this side, was tried and failed.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::own(OwnCode::Failed, message)
    }

    /// The same with all causes of an error.
    pub(crate) fn because(doing: &str, error: &(dyn Error + 'static)) -> Self {
        Self::failed(format!("{doing}: {}", chain(error)))
    }

    /// What was asked for makes no sense; nobody was asked.
    pub(crate) fn usage(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, code.into(), message)
    }

    /// It would not be begun.
    pub(crate) fn refused(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::new(Exit::Refused, code.into(), message)
    }

    /// The VM stayed where it was, for this reason.
    pub(crate) fn stayed(why: &str, message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, Code::Stay(why.to_owned()), message)
    }

    /// The user pressed Ctrl-C.
    pub(crate) fn interrupted(message: impl Into<String>) -> Self {
        Self::own(OwnCode::Interrupted, message)
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
            "error": self.code.as_str(),
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
        let mut lines = indented(&format!("error[{}]: ", self.code.as_str()), &self.message);
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
            code if code.is_certificate() => Exit::Refused,
            _ if error.is_refusal() => Exit::Refused,
            _ => Exit::Failed,
        };
        let failure = Self::new(exit, error.code.into(), error.message);
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
        assert_eq!(exit(ErrorCode::CertificateExpired), Exit::Refused);
    }

    /// The first cell of each row of a table of codes, with the cell of the column `exit`, from 1.
    fn rows(heading: &str, exit: usize) -> Vec<(&'static str, &'static str)> {
        let manual = include_str!("../../../docs/operating.md");
        let section = manual.split_once(&format!("\n{heading}\n")).map_or("", |(_, rest)| rest);
        let lines = section.lines().take_while(|line| !line.starts_with('#'));
        let cells = lines.filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
        cells
            .map(|(code, rest)| (code, rest.split('|').nth(exit - 1).unwrap_or("").trim()))
            .collect()
    }

    #[test]
    fn the_manual_has_each_code_with_its_exit() {
        let number = |exit: Exit| (exit as u8).to_string();
        let told = |codes: &[(&str, Exit)]| -> Vec<(String, String)> {
            codes.iter().map(|(code, exit)| ((*code).to_owned(), number(*exit))).collect()
        };
        let read = |rows: Vec<(&str, &str)>| -> Vec<(String, String)> {
            rows.into_iter().map(|(code, exit)| (code.to_owned(), exit.to_owned())).collect()
        };
        let api = ErrorCode::ALL.iter();
        let api: Vec<_> =
            api.map(|c| (c.as_str(), Failure::from(ApiError::new(*c, "m")).exit)).collect();
        assert_eq!(read(rows("## Error codes", 2)), told(&api));
        let own: Vec<_> = OwnCode::ALL.iter().map(|c| (c.as_str(), c.exit())).collect();
        assert_eq!(read(rows("### Codes of the command line", 1)), told(&own));
    }

    #[test]
    fn words_and_json_say_the_same() {
        let failure = Failure::usage(ErrorCode::BadRequest, "one\n two\n").hint("do this");
        assert_eq!(failure.lines(), ["error[bad-request]: one", "   two", "hint: do this"]);
        let json = failure.as_json();
        assert_eq!(json["error"], "bad-request");
        assert_eq!((&json["exit_code"], &json["hint"]), (&json!(2), &json!("do this")));
        let json = failure.with_facts(json!({"outcome": "refused"})).as_json();
        assert_eq!((&json["outcome"], &json["exit_code"]), (&json!("refused"), &json!(2)));
    }
}
