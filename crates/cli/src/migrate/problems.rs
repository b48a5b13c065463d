//! Everything that is wrong with the options of one command, told at once.
//!
//! Values are read by the parser, but judged here: it would stop at the first bad one.

use serde_json::json;
use whimbrel_api::ErrorCode;
use whimbrel_api::migration::{OptionProblem, ProblemCode};

use crate::failure::Failure;
use crate::values::Given;

/// The options by the names that they have in requests; longer ones before those that are parts of them.
const NAMES: [(&str, &str); 19] = [
    ("available_switchover_bandwidth_bytes_per_s", "--available-switchover-bandwidth"),
    ("postcopy_bandwidth_bytes_per_s", "--postcopy-bandwidth"),
    ("postcopy.bandwidth_bytes_per_s", "--postcopy-bandwidth"),
    ("bandwidth_bytes_per_s", "--bandwidth"),
    ("max_downtime_ms", "--max-downtime"),
    ("max_total_s", "--max-total"),
    ("description", "--description"),
    ("parallel_connections", "--parallel-connections"),
    ("auto_converge.initial_percent", "--auto-converge-initial"),
    ("auto_converge.increment_percent", "--auto-converge-increment"),
    ("compression.methods", "--comp-methods"),
    ("compression.zlib_level", "--comp-zlib-level"),
    ("compression.zstd_level", "--comp-zstd-level"),
    ("compression.xbzrle_cache_bytes", "--comp-xbzrle-cache"),
    ("timeout.seconds", "--timeout"),
    ("timeout.then", "--timeout-postcopy"),
    ("undefine_source", "--undefine-source"),
    ("persistent", "--persistent"),
    ("migrate_address", "--migrate-address"),
];

/// What is wrong with one option.
#[derive(Debug, PartialEq, Eq)]
struct Problem {
    option: String,
    code: ErrorCode,
    sentence: String,
}

/// What is wrong, in the order in which it was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Problems(Vec<Problem>);

impl Problems {
    /// The value of an option, if it was given and is one.
    pub(crate) fn value<T>(&mut self, option: &str, given: Option<Given<T>>) -> Option<T> {
        match given?.0 {
            Ok(value) => Some(value),
            Err(bad) => {
                self.add(option, bad.code, bad.message);
                None
            }
        }
    }

    /// The values of an option that can be given several times.
    pub(crate) fn values<T>(&mut self, option: &str, given: Vec<Given<T>>) -> Vec<T> {
        given.into_iter().filter_map(|given| self.value(option, Some(given))).collect()
    }

    /// Two options that cannot both be meant, or one without the other.
    pub(crate) fn contradiction(&mut self, option: &str, sentence: impl Into<String>) {
        self.add(option, ErrorCode::BadRequest, sentence.into());
    }

    /// A setting of something that was not asked for.
    pub(crate) fn need(&mut self, option: &str, given: bool, of: &str, asked: bool) {
        if given && !asked {
            self.contradiction(option, format!("says how, but {of} is not given: add it"));
        }
    }

    /// What the rules have found, in the words of the command line. What has been told already is not told again.
    pub(crate) fn found(&mut self, problems: &[OptionProblem]) {
        for OptionProblem { field, code, sentence } in problems {
            let option = option_of(field);
            if self.0.iter().any(|problem| problem.option == option) {
                continue;
            }
            let sentence = NAMES
                .iter()
                .fold(sentence.clone(), |text, (field, option)| text.replace(field, option));
            let told = sentence.strip_prefix(&format!("{option} ")).unwrap_or(&sentence).to_owned();
            let code = match code {
                ProblemCode::OutOfRange => ErrorCode::OutOfRange,
                _ => ErrorCode::BadRequest,
            };
            self.add(&option, code, told);
        }
    }

    fn add(&mut self, option: &str, code: ErrorCode, sentence: String) {
        self.0.push(Problem { option: option.to_owned(), code, sentence });
    }

    /// Whether there were none. The code of several is their common one, else `bad-request`.
    pub(crate) fn end(self) -> Result<(), Failure> {
        let Some(first) = self.0.first() else { return Ok(()) };
        let alike = self.0.iter().all(|problem| problem.code == first.code);
        let code = if alike { first.code } else { ErrorCode::BadRequest };
        let told = |problem: &Problem| format!("{}: {}", problem.option, problem.sentence);
        let message = match self.0.as_slice() {
            [one] => told(one),
            several => {
                let lines: Vec<String> = several.iter().map(told).collect();
                format!("{} options are wrong\n{}", several.len(), lines.join("\n"))
            }
        };
        let object = |problem: &Problem| json!({"option": problem.option, "code": problem.code.as_str(), "sentence": problem.sentence});
        let facts = json!({"problems": self.0.iter().map(object).collect::<Vec<_>>()});
        Err(Failure::usage(code, message).with_facts(facts))
    }
}

fn option_of(field: &str) -> String {
    let named = NAMES.iter().find(|(name, _)| *name == field);
    named.map_or_else(|| format!("`{field}`"), |(_, option)| (*option).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::values;

    #[test]
    fn all_are_told_at_once_by_the_names_of_the_command_line() {
        let mut problems = Problems::default();
        let given = values::given(values::rate);
        assert_eq!(problems.value("--bandwidth", Some(given("64KiB").unwrap())), Some(65536));
        assert_eq!(problems.value("--bandwidth", Some(given("0").unwrap())), None);
        problems.need("--comp-methods", true, "--compressed", false);
        let rule = OptionProblem {
            field: "postcopy.bandwidth_bytes_per_s".into(),
            code: ProblemCode::OutOfRange,
            sentence: "postcopy.bandwidth_bytes_per_s is 1; it can be 2 to 3".into(),
        };
        problems.found(&[rule.clone(), rule]);
        let failure = problems.end().unwrap_err();
        assert_eq!(failure.code.as_str(), "bad-request");
        let lines: Vec<&str> = failure.message.lines().collect();
        assert_eq!(lines[0], "3 options are wrong");
        assert!(lines[1].starts_with("--bandwidth: a rate is"), "{lines:?}");
        assert_eq!(lines[2], "--comp-methods: says how, but --compressed is not given: add it");
        assert_eq!(lines[3], "--postcopy-bandwidth: is 1; it can be 2 to 3");
        assert_eq!(failure.as_json()["problems"][2]["code"], "out-of-range");
    }

    #[test]
    fn one_keeps_its_code() {
        let mut problems = Problems::default();
        problems.value("--bandwidth", Some(values::given(values::rate)("NaN").unwrap()));
        assert_eq!(problems.end().unwrap_err().code.as_str(), "out-of-range");
        assert_eq!(Problems::default().end(), Ok(()));
    }
}
