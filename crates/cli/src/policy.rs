//! `whimbrel policy`: what a move may cost, as named objects, and where they apply.

use clap::{Args, Subcommand};
use whimbrel_api::Name;
use whimbrel_api::policy::{AppliedPolicy, AttachPolicy, Consent, Policy as Rules, PolicyStatus};

use crate::command::Options;
use crate::failure::Failure;
use crate::migrate::problems::Problems;
use crate::values::{self, BadValue, Given};
use crate::{output, plan, words};

/// List, show, make and delete policies, and say where they apply
#[derive(Debug, Subcommand)]
#[command(after_help = "\
A policy says what a move may do to the guest; how it is moved is chosen within it. The one that a migration asks for applies, \
else the VM's, else the pool's, else balanced.

Examples:
  whimbrel policy list
  whimbrel policy set web01 no-postcopy
  whimbrel policy set --pool minimal-downtime")]
pub(crate) enum Policy {
    /// List all policies, the built-in ones first
    #[command(after_help = "\
Examples:
  whimbrel policy list
  whimbrel policy list --json | jq -r 'select(.allow_postcopy == \"yes\") | .name'")]
    List,
    /// Show what a policy says
    #[command(after_help = "Examples:\n  whimbrel policy show must-finish")]
    Show {
        /// The policy
        #[arg(value_parser = values::name)]
        policy: Name,
    },
    Create(Create),
    /// Delete a policy that is attached to nothing
    #[command(after_help = "Examples:\n  whimbrel policy delete nightly")]
    Delete {
        /// The policy
        #[arg(value_parser = values::name)]
        policy: Name,
    },
    Set(Set),
    /// Take a VM's or the pool's policy away
    #[command(after_help = "\
Examples:
  whimbrel policy unset web01
  whimbrel policy unset --pool")]
    Unset(Where),
    /// Say which policy applies to a VM or in the pool, and where it comes from
    #[command(after_help = "\
Examples:
  whimbrel policy which web01
  whimbrel policy which --pool")]
    Which(Where),
}

/// Make a policy, or change the one of this name; what has begun goes on as it was
#[derive(Debug, Args)]
#[command(after_help = "\
never: not even if a migration asks for it. if-asked: only if it does. yes: whenever the measurements speak for it.

Examples:
  whimbrel policy create nightly --max-downtime 5000 --static yes --description night
  whimbrel policy create careful --max-downtime 50 --max-total 600 --postcopy never --require-tls")]
pub(crate) struct Create {
    /// Its name
    #[arg(value_parser = values::name)]
    policy: Name,
    /// The longest pause of a live move, in milliseconds, 1 to 2000000
    #[arg(long, value_name = "MS", allow_negative_numbers = true, value_parser = values::given(values::downtime_ms))]
    max_downtime: Given<u64>,
    /// The longest time until the guest runs at the destination, in seconds, up to a week; any without it
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, value_parser = values::given(values::whole))]
    max_total: Option<Given<u64>>,
    /// Post-copy: never, if-asked or yes
    #[arg(long, value_name = "CONSENT", default_value = "if-asked", value_parser = values::given(consent))]
    postcopy: Given<Consent>,
    /// Slowing the guest down: never, if-asked or yes
    #[arg(long, value_name = "CONSENT", default_value = "if-asked", value_parser = values::given(consent))]
    throttle: Given<Consent>,
    /// Stopping the guest for as long as its memory takes: never, if-asked or yes
    #[arg(long = "static", value_name = "CONSENT", default_value = "if-asked", value_parser = values::given(consent))]
    stopping: Given<Consent>,
    /// Refuse to send memory in the clear
    #[arg(long)]
    require_tls: bool,
    /// What it is for, for people
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    description: String,
}

/// Attach a policy to a VM or to the pool
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  whimbrel policy set web01 must-finish
  whimbrel policy set --pool no-postcopy")]
pub(crate) struct Set {
    /// The VM's name or id
    #[arg(value_parser = values::vm, required_unless_present = "pool", requires = "policy")]
    vm: Option<String>,
    /// The policy
    #[arg(value_parser = values::name)]
    policy: Option<Name>,
    /// Attach this policy to the pool: it applies to every VM that has none
    #[arg(long, value_name = "POLICY", value_parser = values::name, conflicts_with_all = ["vm", "policy"])]
    pool: Option<Name>,
}

/// A VM or the pool.
#[derive(Debug, Args)]
pub(crate) struct Where {
    /// The VM's name or id
    #[arg(value_parser = values::vm, required_unless_present = "pool")]
    vm: Option<String>,
    /// The pool
    #[arg(long, conflicts_with = "vm")]
    pool: bool,
}

impl Policy {
    pub(crate) async fn run(self, options: &Options) -> Result<(), Failure> {
        match self {
            Self::List => {
                let head =
                    ["NAME", "PAUSE", "TOTAL", "POST-COPY", "THROTTLE", "STATIC", "TLS", "FOR"];
                output::list(options.json, &options.pool()?.policies().await?, head, row)
            }
            Self::Show { policy } => show(options, &options.pool()?.policy(&policy).await?),
            Self::Create(command) => {
                let policy = command.policy()?;
                show(options, &options.pool()?.put_policy(&policy).await?)
            }
            Self::Delete { policy } => {
                options.pool()?.delete_policy(&policy).await?;
                match options.json {
                    true => output::json(&serde_json::json!({"deleted": policy})),
                    false => output::line(&format!("{policy} is deleted")),
                }
            }
            Self::Set(Set { vm, policy, pool }) => {
                let policy = policy.or(pool);
                attach(options, vm, AttachPolicy { policy }).await
            }
            Self::Unset(place) => attach(options, place.vm, AttachPolicy::default()).await,
            Self::Which(place) => {
                let pool = options.pool()?;
                let applied = match &place.vm {
                    Some(vm) => pool.vm_policy(vm).await?,
                    None => pool.pool_policy().await?,
                };
                told(options, place.vm.as_deref(), &applied)
            }
        }
    }
}

impl Create {
    fn policy(self) -> Result<Rules, Failure> {
        let mut problems = Problems::default();
        let pause = problems.value("--max-downtime", Some(self.max_downtime));
        let mut consent = |option, given| problems.value(option, Some(given)).unwrap_or_default();
        let policy = Rules {
            name: self.policy,
            description: self.description,
            allow_postcopy: consent("--postcopy", self.postcopy),
            allow_throttle: consent("--throttle", self.throttle),
            allow_static: consent("--static", self.stopping),
            // Without a pause that is one, the problem has been told.
            max_downtime_ms: pause.unwrap_or(1),
            max_total_s: problems.value("--max-total", self.max_total),
            require_tls: self.require_tls,
        };
        problems.found(&policy.validate());
        problems.end().map(|()| policy)
    }
}

fn consent(text: &str) -> Result<Consent, BadValue> {
    let all = [Consent::Never, Consent::IfAsked, Consent::Yes];
    let found = all.into_iter().find(|consent| word(*consent) == text);
    found.ok_or_else(|| BadValue::bad("write never, if-asked or yes"))
}

fn word(consent: Consent) -> &'static str {
    match consent {
        Consent::Never => "never",
        Consent::IfAsked => "if-asked",
        Consent::Yes => "yes",
    }
}

async fn attach(
    options: &Options,
    vm: Option<String>,
    attach: AttachPolicy,
) -> Result<(), Failure> {
    let pool = options.pool()?;
    let applied = match &vm {
        Some(vm) => pool.attach_vm_policy(vm, &attach).await?,
        None => pool.attach_pool_policy(&attach).await?,
    };
    told(options, vm.as_deref(), &applied)
}

/// What applies now.
fn told(options: &Options, vm: Option<&str>, applied: &AppliedPolicy) -> Result<(), Failure> {
    if options.json {
        return output::json(applied);
    }
    let place = vm.map_or_else(|| "in the pool".to_owned(), |vm| format!("to {vm}"));
    let origin = plan::origin(applied.origin);
    output::line(&format!("{} applies {place} ({origin})", applied.policy))
}

fn row(status: &PolicyStatus) -> [String; 8] {
    let policy = &status.policy;
    [
        policy.name.to_string(),
        words::duration(policy.max_downtime_ms as f64),
        words::or_dash(policy.max_total_s.map(total)),
        word(policy.allow_postcopy).to_owned(),
        word(policy.allow_throttle).to_owned(),
        word(policy.allow_static).to_owned(),
        tls(policy).to_owned(),
        policy.description.clone(),
    ]
}

fn total(seconds: u64) -> String {
    words::duration(seconds as f64 * 1e3)
}

fn tls(policy: &Rules) -> &'static str {
    if policy.require_tls { "required" } else { "default" }
}

fn show(options: &Options, status: &PolicyStatus) -> Result<(), Failure> {
    let policy = &status.policy;
    let fields = [
        ("name", policy.name.to_string()),
        ("description", policy.description.clone()),
        ("built in", words::yes_no(status.built_in)),
        ("pause", format!("up to {}", words::duration(policy.max_downtime_ms as f64))),
        (
            "total",
            policy.max_total_s.map_or_else(|| "any".to_owned(), |s| format!("up to {}", total(s))),
        ),
        ("post-copy", word(policy.allow_postcopy).to_owned()),
        ("throttle", word(policy.allow_throttle).to_owned()),
        ("static", word(policy.allow_static).to_owned()),
        ("tls", tls(policy).to_owned()),
    ];
    output::fields(options.json, status, &fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consent_is_read_as_it_is_written() {
        for consent_of in [Consent::Never, Consent::IfAsked, Consent::Yes] {
            assert_eq!(consent(word(consent_of)), Ok(consent_of));
            assert_eq!(serde_json::json!(consent_of), word(consent_of));
        }
        assert!(consent("no").is_err());
    }
}
