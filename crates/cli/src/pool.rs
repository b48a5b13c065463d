//! `whimbrel pool`: makes a pool, lets hosts join it, renews operators' files, and lets monitors read metrics.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use whimbrel_api::pool::NewJoinToken;
use whimbrel_api::{ErrorCode, Name};
use whimbrel_controller::{InitError, PoolInit, make_monitor, pool_init, renew_operator};

use crate::command::Options;
use crate::controller::DIR_DEFAULT;
use crate::failure::Failure;
use crate::{output, values, words};

/// Make a pool, let hosts join it, renew operators' files, let monitors in
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  whimbrel pool init --name main --listen 192.0.2.10:8440
  whimbrel pool join-token")]
pub(crate) enum Pool {
    Init(Init),
    /// Make a token with which one host can join the pool
    #[command(after_help = "\
The token is a secret: who has it becomes a host. It tells the host where the controller is and which authority to trust. \
A host whose certificates have expired joins again with one (whimbrel agent --join): it keeps its name, its keys and its VMs.

Examples:
  whimbrel pool join-token
  whimbrel pool join-token --minutes 60 > token")]
    JoinToken(NewToken),
    Renew(Renew),
    Monitor(Monitor),
}

/// Make a pool: its certificate authority, its controller's settings, its first operator's file
#[derive(Debug, Args)]
#[command(after_help = "\
The operator's file holds a private key and is all that is needed to command the pool: keep it as such, and copy it to \
~/.config/whimbrel/client.toml of whoever is to have it. A pool that exists is left as it is.

Examples:
  whimbrel pool init --name main --listen 192.0.2.10:8440
  whimbrel pool init --name test --listen 127.0.0.1:8440 --dir /srv/pool --socket controller.sock")]
pub(crate) struct Init {
    /// The pool's name
    #[arg(long, value_parser = values::name)]
    name: Name,
    /// The address and port that the controller is to listen on
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
    /// The pool's folder; made if missing
    #[arg(long, value_name = "FOLDER", default_value = DIR_DEFAULT)]
    dir: PathBuf,
    /// A unix socket to listen on too, for commands on the same machine; relative to the folder
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// Give an operator's file a new certificate, on the controller's machine
#[derive(Debug, Args)]
#[command(after_help = "\
The operator keeps name and key, also when the old certificate has expired. Copy the file to where the old one is used. \
Hosts and the controller need no command: the controller renews their certificates in time.

Examples:
  whimbrel pool renew
  whimbrel pool renew --file ann.toml --dir /srv/pool")]
pub(crate) struct Renew {
    /// The pool's folder
    #[arg(long, value_name = "FOLDER", default_value = DIR_DEFAULT)]
    dir: PathBuf,
    /// The operator's file; client.toml in the pool's folder without it
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

/// Make the certificate with which Prometheus reads metrics, on the controller's machine
#[derive(Debug, Args)]
#[command(after_help = "\
Who has it may read the metrics of the controller and of every agent, and nothing else. Repeated, it makes a new key and a new \
certificate: Prometheus reads the files anew. docs/operating.md has the settings for Prometheus.

Examples:
  whimbrel pool monitor prometheus --out /etc/prometheus/whimbrel")]
pub(crate) struct Monitor {
    /// A name for who reads
    #[arg(value_parser = values::name)]
    name: Name,
    /// The folder for ca.pem, monitor.pem and monitor.key; made if missing
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// The pool's folder
    #[arg(long, value_name = "FOLDER", default_value = DIR_DEFAULT)]
    dir: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct NewToken {
    /// How long it can be used, in minutes; up to a day
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=1440))]
    minutes: u32,
}

impl Pool {
    pub(crate) async fn run(self, options: &Options) -> Result<(), Failure> {
        match self {
            Self::Init(command) => command.run(options),
            Self::Renew(command) => command.run(options),
            Self::Monitor(command) => command.run(options),
            Self::JoinToken(NewToken { minutes }) => {
                let request = NewJoinToken { ttl_seconds: minutes * 60 };
                let token = options.pool()?.new_join_token(&request).await?;
                if options.json {
                    return output::json(&token);
                }
                output::note(&format!("for one host, until {}:", words::moment(token.expires)));
                output::line(&token.token)
            }
        }
    }
}

impl Renew {
    fn run(self, options: &Options) -> Result<(), Failure> {
        let renewed = renew_operator(&self.dir, self.file.as_deref());
        let renewed =
            renewed.map_err(|error| Failure::because("the certificate is not renewed", &error))?;
        let expires = jiff::Timestamp::try_from(renewed.expires);
        let expires = expires
            .map_err(|error| Failure::because("the certificate's end is out of range", &error))?;
        if options.json {
            return output::json(&serde_json::json!({
                "client": renewed.client, "operator": renewed.operator, "expires": expires,
            }));
        }
        let (client, operator) = (renewed.client.display(), renewed.operator);
        output::line(&format!("{client}: operator {operator}, until {}", words::moment(expires)))
    }
}

impl Monitor {
    fn run(self, options: &Options) -> Result<(), Failure> {
        let made = make_monitor(&self.dir, &self.name, &self.out);
        let made = made.map_err(|error| Failure::because("no certificate was made", &error))?;
        let expires = jiff::Timestamp::try_from(made.expires);
        let expires = expires
            .map_err(|error| Failure::because("the certificate's end is out of range", &error))?;
        if options.json {
            return output::json(&serde_json::json!({
                "name": self.name, "folder": self.out, "expires": expires,
            }));
        }
        let (folder, name) = (self.out.display(), self.name);
        output::line(&format!("{folder}: monitor {name}, until {}", words::moment(expires)))
    }
}

impl Init {
    fn run(self, options: &Options) -> Result<(), Failure> {
        let Self { name, listen, dir, socket } = self;
        let made = pool_init(&PoolInit { dir: dir.clone(), name: name.clone(), listen, socket });
        let made = made.map_err(|error| match error {
            InitError::Exists { .. } => Failure::refused(ErrorCode::Exists, error.to_string()),
            error => Failure::because("no pool was made", &error),
        })?;
        if options.json {
            let (config, client) = (made.config, made.client);
            return output::json(
                &serde_json::json!({"name": name, "dir": dir, "config": config, "client": client}),
            );
        }
        output::line(&format!("pool {name} is made in {}", dir.display()))?;
        output::line(&format!("run it:      whimbrel controller --dir {}", dir.display()))?;
        output::line(&format!("command it:  whimbrel --client {} host list", made.client.display()))
    }
}
