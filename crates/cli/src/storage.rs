//! `whimbrel storage`: the named places for disks.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use whimbrel_api::pool::{Storage as StorageRecord, StorageOnHost, StorageStatus};
use whimbrel_api::vm::Bytes;
use whimbrel_api::{ErrorCode, Name};

use crate::command::Options;
use crate::failure::Failure;
use crate::{output, values, words};

/// List storages, or make one known
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  whimbrel storage list
  whimbrel storage create images --path /srv/images --shared")]
pub(crate) enum Storage {
    /// List all storages, and what each host sees of them
    #[command(after_help = "\
Examples:
  whimbrel storage list
  whimbrel storage list --json | jq '.hosts[] | select(.trouble) | .trouble'")]
    List,
    /// Make a folder that every host has known as a storage
    #[command(after_help = "\
A shared one is proven before it is believed: what one host writes there, the others must read.

Examples:
  whimbrel storage create images --path /srv/images --shared
  whimbrel storage create local --path /var/lib/vms")]
    Create(Create),
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Its name
    #[arg(value_parser = values::name)]
    name: Name,
    /// Its folder on each host, an absolute path
    #[arg(long, value_name = "FOLDER")]
    path: PathBuf,
    /// All hosts see the same files there (NFS, a cluster file system)
    #[arg(long)]
    shared: bool,
}

impl Storage {
    pub(crate) async fn run(self, options: &Options) -> Result<(), Failure> {
        let pool = options.pool()?;
        let storages = match self {
            Self::List => pool.storages().await?,
            Self::Create(Create { name, path, shared }) => {
                let path = path.into_os_string().into_string().map_err(|path| {
                    let shown = path.to_string_lossy().into_owned();
                    Failure::usage(ErrorCode::BadPath, format!("--path: {shown} is not UTF-8"))
                })?;
                vec![pool.create_storage(&StorageRecord { name, path, shared }).await?]
            }
        };
        output::list(options.json, &storages, ["NAME", "SHARED", "PATH", "HOSTS"], row)
    }
}

fn row(status: &StorageStatus) -> [String; 4] {
    [
        status.storage.name.to_string(),
        words::yes_no(status.storage.shared),
        status.storage.path.clone(),
        words::comma_list(status.hosts.iter().map(on_host)),
    ]
}

fn on_host(StorageOnHost { host, report }: &StorageOnHost) -> String {
    match &report.trouble {
        Some(trouble) => format!("{host} ({trouble})"),
        None => format!("{host} ({} free)", Bytes(report.available_bytes)),
    }
}
