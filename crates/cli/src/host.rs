//! `whimbrel host`: the pool's hosts, and whether they take VMs.

use clap::Subcommand;
use whimbrel_api::Name;
use whimbrel_api::agent::EngineReport;
use whimbrel_api::pool::{Contact, Host as HostRecord, HostPatch, HostSummary};
use whimbrel_api::vm::Bytes;

use crate::command::Options;
use crate::failure::Failure;
use crate::{output, values, words};

/// List hosts, show one, or say whether it takes VMs
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  whimbrel host list
  whimbrel host list --json | jq -r 'select(.state == \"ready\") | .name'
  whimbrel host disable host-b     before its maintenance")]
pub(crate) enum Host {
    /// List all hosts of the pool
    #[command(after_help = "\
Examples:
  whimbrel host list
  whimbrel host list --json | jq .facts.memory_available_bytes")]
    List,
    /// Show all that is known of a host: processor, memory, QEMUs, networks, storages
    #[command(after_help = "\
Examples:
  whimbrel host show host-a
  whimbrel host show host-a --json | jq '.facts.engines[].version'")]
    Show {
        /// The host
        #[arg(value_parser = values::name)]
        host: Name,
    },
    /// Let a host take new VMs and migrations
    #[command(after_help = "Examples:\n  whimbrel host enable host-a")]
    Enable {
        /// The host
        #[arg(value_parser = values::name)]
        host: Name,
    },
    /// Let a host take no new VM and no migration; what runs there runs on
    #[command(after_help = "Examples:\n  whimbrel host disable host-a")]
    Disable {
        /// The host
        #[arg(value_parser = values::name)]
        host: Name,
    },
}

impl Host {
    pub(crate) async fn run(self, options: &Options) -> Result<(), Failure> {
        let pool = options.pool()?;
        match self {
            Self::List => {
                let head = ["NAME", "STATE", "ENABLED", "ADDRESS", "CPUS", "MEMORY", "FREE", "VMS"];
                output::list(options.json, &pool.hosts().await?, head, row)
            }
            Self::Show { host } => show(options, &pool.host(&host).await?),
            Self::Enable { host } => {
                show(options, &pool.patch_host(&host, &HostPatch { enabled: true }).await?)
            }
            Self::Disable { host } => {
                show(options, &pool.patch_host(&host, &HostPatch { enabled: false }).await?)
            }
        }
    }
}

fn row(host: &HostRecord) -> [String; 8] {
    let facts = host.facts.as_ref();
    let fact = |read: fn(&HostSummary) -> String| words::or_dash(facts.map(read));
    [
        host.name.to_string(),
        contact_word(&host.contact).to_owned(),
        words::yes_no(host.enabled),
        host.address.clone(),
        fact(|facts| facts.cpus.to_string()),
        fact(|facts| Bytes(facts.memory_total_bytes).to_string()),
        fact(|facts| Bytes(facts.memory_available_bytes).to_string()),
        fact(|facts| facts.vms.to_string()),
    ]
}

fn contact_word(contact: &Contact) -> &'static str {
    match contact {
        Contact::Joining => "joining",
        Contact::Ready { .. } => "ready",
        Contact::Unreachable { .. } => "unreachable",
    }
}

fn show(options: &Options, host: &HostRecord) -> Result<(), Failure> {
    let state = match &host.contact {
        Contact::Joining => "joining: not heard of yet".to_owned(),
        Contact::Ready { seen } => format!("ready, heard {}", words::moment(*seen)),
        Contact::Unreachable { since, why } => {
            format!("unreachable since {}: {why}", words::moment(*since))
        }
    };
    let mut fields = vec![
        ("name", host.name.to_string()),
        ("state", state),
        ("enabled", words::yes_no(host.enabled)),
        ("address", host.address.clone()),
    ];
    fields.extend(host.facts.iter().flat_map(facts_fields));
    output::fields(options.json, host, &fields)
}

fn facts_fields(facts: &HostSummary) -> Vec<(&'static str, String)> {
    let free = |free, total| format!("{} free of {}", Bytes(free), Bytes(total));
    let mut fields = vec![
        ("whimbrel", facts.version.clone()),
        ("processor", format!("{} × {}", facts.cpus, facts.cpu_model)),
        ("memory", free(facts.memory_available_bytes, facts.memory_total_bytes)),
        ("networks", words::comma_list(&facts.networks)),
        ("vms", facts.vms.to_string()),
        ("certificate", format!("{} days left", facts.certificate_days_left)),
    ];
    let engine = |engine: &EngineReport| format!("{} ({})", engine.version, engine.accelerator);
    fields.extend(facts.engines.iter().map(|one| ("qemu", engine(one))));
    fields.extend(facts.storages.iter().map(|storage| {
        let state = match &storage.trouble {
            Some(trouble) => trouble.clone(),
            None => free(storage.available_bytes, storage.total_bytes),
        };
        ("storage", format!("{}: {state}", storage.name))
    }));
    fields
}
