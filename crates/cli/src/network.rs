//! `whimbrel network`: the pool's layer-2 networks.

use clap::{Args, Subcommand};
use whimbrel_api::Name;
use whimbrel_api::pool::Network as NetworkRecord;

use crate::command::Options;
use crate::failure::Failure;
use crate::{output, values, words};

/// List or make networks
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  whimbrel network list
  whimbrel network create lan --bridge br-lan --uplink eth1")]
pub(crate) enum Network {
    /// List all networks of the pool
    #[command(after_help = "Examples:\n  whimbrel network list\n  whimbrel network list --json")]
    List,
    /// Make a network: a bridge of that name on every host
    #[command(after_help = "\
Examples:
  whimbrel network create lan --bridge br-lan --uplink eth1
  whimbrel network create backup --bridge br0      a bridge that is there already")]
    Create(Create),
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Its name
    #[arg(value_parser = values::name)]
    name: Name,
    /// The bridge for it on each host, at most 15 bytes; made where there is none
    #[arg(long, value_name = "BRIDGE")]
    bridge: String,
    /// The interface that joins each host's bridge to the others; left alone without it
    #[arg(long, value_name = "INTERFACE")]
    uplink: Option<String>,
}

impl Network {
    pub(crate) async fn run(self, options: &Options) -> Result<(), Failure> {
        let pool = options.pool()?;
        let networks = match self {
            Self::List => pool.networks().await?,
            Self::Create(Create { name, bridge, uplink }) => {
                vec![pool.create_network(&NetworkRecord { name, bridge, uplink }).await?]
            }
        };
        output::list(options.json, &networks, ["NAME", "BRIDGE", "UPLINK"], row)
    }
}

fn row(network: &NetworkRecord) -> [String; 3] {
    [network.name.to_string(), network.bridge.clone(), words::or_dash(network.uplink.as_ref())]
}
