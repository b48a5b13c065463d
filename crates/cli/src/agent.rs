//! `whimbrel agent`: runs a host's agent in the foreground, for a service manager.

use std::io::Read as _;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use whimbrel_agent::config::{AcceleratorChoice, AgentConfig};
use whimbrel_agent::join::JoinError;
use whimbrel_agent::sources::AllowedSource;
use whimbrel_api::{ErrorCode, Name};

use crate::failure::{Failure, OwnCode};
use crate::values::{self, BadValue};

/// Where an agent keeps its state that nobody put elsewhere.
const DIR_DEFAULT: &str = "/var/lib/whimbrel/agent";
/// The longest token that is read from standard input, in bytes.
const TOKEN_BYTES_MAX: u64 = 16 << 10;

/// Run a host's agent
#[derive(Debug, Args)]
#[command(after_help = "\
It runs until it is told to end (SIGTERM or Ctrl-C), and logs to standard error. Its VMs run on without it; when it is \
back, it finds them as they are. A service manager must therefore end only the agent itself (systemd: KillMode=process).

Examples:
  whimbrel agent --name host-a --listen 192.0.2.11:8441 --join -
  whimbrel agent --name host-a --listen 192.0.2.11:8441
  whimbrel agent --config /etc/whimbrel/agent.toml

A file has the same settings:
  dir = \"/var/lib/whimbrel/agent\"
  name = \"host-a\"
  listen = \"192.0.2.11:8441\"
  migration_address = \"10.0.0.11\"          # where other hosts' QEMUs connect to; that of `listen` without it
  migration_ports = [49152, 49215]
  migration_sources = []                   # who may send guests here; [] for every host
  qemu_user = [65534, 65534]               # the unprivileged user and group that QEMU runs as
  engines = [\"/usr/bin/qemu-system-x86_64\"]
  accelerator = \"auto\"                     # or kvm, tcg")]
pub(crate) struct Agent {
    /// A TOML file with all settings
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Join the pool that made this token, if that is not done yet or the certificates have expired; `-` reads it from
    /// standard input
    #[arg(long, value_name = "TOKEN")]
    join: Option<String>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Debug, Args)]
#[group(id = "settings", multiple = true, conflicts_with = "config")]
struct Settings {
    /// The host's name in the pool
    #[arg(long, value_parser = values::name, required_unless_present = "config")]
    name: Option<Name>,
    /// The address and port to listen on
    #[arg(long, value_name = "ADDRESS:PORT", required_unless_present = "config")]
    listen: Option<SocketAddr>,
    /// The folder for keys, ledger and running QEMUs; other users must be able to pass through its parents
    #[arg(long, value_name = "FOLDER", default_value = DIR_DEFAULT)]
    dir: PathBuf,
    /// The address and port at which others reach the agent; that of --listen without it
    #[arg(long, value_name = "ADDRESS:PORT")]
    advertise: Option<String>,
    /// The address or host name that other hosts' QEMUs connect to; that of --listen without it
    #[arg(long, value_name = "ADDRESS")]
    migration_address: Option<String>,
    /// First and last port for QEMU to listen on; 49152-49215 without it
    #[arg(long, value_name = "FIRST-LAST", value_parser = ports)]
    migration_ports: Option<(u16, u16)>,
    /// Who may send guests here: a host's name, an address, or a network such as 192.0.2.0/24; may be repeated. Every host
    /// of the pool without it
    #[arg(long, value_name = "SOURCE")]
    migration_source: Vec<AllowedSource>,
    /// The unprivileged user and group that QEMU runs as, by number; nobody and the group of /dev/kvm without it
    #[arg(long, value_name = "UID:GID", value_parser = user)]
    qemu_user: Option<(u32, u32)>,
    /// A QEMU program, by its absolute path; the first one is for new VMs
    #[arg(long, value_name = "PATH")]
    engine: Vec<PathBuf>,
    /// What runs guests: auto, kvm or tcg
    #[arg(long, default_value = "auto")]
    accelerator: AcceleratorChoice,
}

impl Agent {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        let wrong = |error: whimbrel_agent::config::ConfigError| {
            Failure::usage(ErrorCode::BadRequest, whimbrel_api::error::chain(&error))
        };
        let config = match &self.config {
            Some(file) => AgentConfig::load(file).map_err(wrong)?,
            None => {
                let config = self.settings.config()?;
                config.check().map_err(wrong)?;
                config
            }
        };
        if let Some(given) = self.join {
            whimbrel_agent::join::join(&config, &token(given)?).await.map_err(not_joined)?;
        }
        let run = whimbrel_agent::run(config).await;
        run.map_err(|error| Failure::because("the agent cannot run", &error))
    }
}

impl Settings {
    fn config(self) -> Result<AgentConfig, Failure> {
        let (Some(name), Some(listen)) = (self.name, self.listen) else {
            return Err(Failure::own(
                OwnCode::Usage,
                "an agent needs --name and --listen, or --config",
            ));
        };
        let defaults = AgentConfig::new(self.dir, name, listen);
        Ok(AgentConfig {
            advertise: self.advertise,
            migration_address: self.migration_address,
            migration_ports: self.migration_ports.unwrap_or(defaults.migration_ports),
            migration_sources: self.migration_source,
            qemu_user: self.qemu_user.unwrap_or(defaults.qemu_user),
            engines: if self.engine.is_empty() { defaults.engines } else { self.engine },
            accelerator: self.accelerator,
            ..defaults
        })
    }
}

fn not_joined(error: JoinError) -> Failure {
    match error {
        JoinError::Token(_) => {
            Failure::usage(ErrorCode::BadToken, whimbrel_api::error::chain(&error))
                .hint("`whimbrel pool join-token` makes one")
        }
        JoinError::Controller(error) => Failure::from(error),
        error => Failure::because("this host cannot join", &error),
    }
}

/// The token as given, or from standard input, where no list of processes shows it.
fn token(given: String) -> Result<String, Failure> {
    if given != "-" {
        return Ok(given);
    }
    let mut text = String::new();
    let read = std::io::stdin().lock().take(TOKEN_BYTES_MAX).read_to_string(&mut text);
    read.map_err(|error| Failure::because("cannot read the token from standard input", &error))?;
    Ok(text.trim().to_owned())
}

fn pair<T: std::str::FromStr>(text: &str, between: char) -> Option<(T, T)> {
    let (first, second) = text.split_once(between)?;
    Some((first.parse().ok()?, second.parse().ok()?))
}

fn ports(text: &str) -> Result<(u16, u16), BadValue> {
    pair(text, '-').ok_or_else(|| BadValue::bad("write two ports, such as 49152-49215"))
}

fn user(text: &str) -> Result<(u32, u32), BadValue> {
    pair(text, ':').ok_or_else(|| BadValue::bad("write two numbers, such as 65534:65534"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_of_the_help_is_one() {
        let mut command = <crate::command::CommandLine as clap::CommandFactory>::command();
        let agent = command.find_subcommand_mut("agent").unwrap();
        let help = agent.get_after_help().unwrap().to_string();
        let (_, file) = help.split_once("same settings:\n").unwrap();
        let config: AgentConfig = toml::from_str(file).unwrap();
        config.check().unwrap();
        assert_eq!(config.migration_host(), "10.0.0.11");
        let said = AgentConfig::new(config.dir.clone(), config.name.clone(), config.listen);
        assert_eq!(
            AgentConfig { migration_address: None, ..config },
            said,
            "it shows the defaults"
        );
    }
}
