//! `whimbrel storage`: the named places for disks.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use whimbrel_api::pool::{
    SetStorageDefaults, Storage as StorageRecord, StorageDefaults, StorageOnHost, StorageStatus,
};
use whimbrel_api::vm::Bytes;
use whimbrel_api::{ErrorCode, Name};

use crate::command::Options;
use crate::failure::Failure;
use crate::{output, values, words};

/// List and show storages, make one known, or say which are used where none is named
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  whimbrel storage list
  whimbrel storage set-default images
  whimbrel storage create images --path /srv/images --shared")]
pub(crate) enum Storage {
    /// List all storages, and what each host sees of them
    #[command(after_help = "\
Examples:
  whimbrel storage list
  whimbrel storage list --json | jq '.hosts[] | select(.trouble) | .trouble'")]
    List,
    /// Show a storage: what each host sees of it, what is free, and whether they were proven to share it
    #[command(after_help = "\
Examples:
  whimbrel storage show images
  whimbrel storage show images --json | jq '.hosts[] | {host, available_bytes, reserved_bytes}'")]
    Show {
        /// Its name
        #[arg(value_parser = values::name)]
        name: Name,
    },
    /// Say which storages are used where none is named, in the pool or on one host
    #[command(after_help = "\
A host may have several, the first being the first choice; they go before the pool's.

Examples:
  whimbrel storage set-default images
  whimbrel storage set-default fast bulk --host host-a
  whimbrel storage set-default --none --host host-a")]
    SetDefault(SetDefault),
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

#[derive(Debug, Args)]
pub(crate) struct SetDefault {
    /// The storages, the first choice first; for the pool only one
    #[arg(value_parser = values::name, required_unless_present = "none")]
    storages: Vec<Name>,
    /// The default storages of this host instead of the pool's
    #[arg(long, value_parser = values::name)]
    host: Option<Name>,
    /// No default at all
    #[arg(long, conflicts_with = "storages")]
    none: bool,
}

impl Storage {
    pub(crate) async fn run(self, options: &Options) -> Result<(), Failure> {
        let pool = options.pool()?;
        let storages = match self {
            Self::List => pool.storages().await?,
            Self::Show { name } => return show(options, &pool.storage(&name).await?),
            Self::SetDefault(SetDefault { storages, host, none: _ }) => {
                let request = SetStorageDefaults { host, storages };
                return defaults(options, &pool.set_storage_defaults(&request).await?);
            }
            Self::Create(Create { name, path, shared }) => {
                let path = path.into_os_string().into_string().map_err(|path| {
                    let shown = path.to_string_lossy().into_owned();
                    Failure::usage(ErrorCode::BadPath, format!("--path: {shown} is not UTF-8"))
                })?;
                vec![pool.create_storage(&StorageRecord { name, path, shared }).await?]
            }
        };
        output::list(options.json, &storages, ["NAME", "SHARED", "DEFAULT", "PATH", "HOSTS"], row)
    }
}

fn row(status: &StorageStatus) -> [String; 5] {
    [
        status.storage.name.to_string(),
        words::yes_no(status.storage.shared),
        words::yes_no(status.default),
        status.storage.path.clone(),
        words::comma_list(status.hosts.iter().map(on_host)),
    ]
}

fn on_host(StorageOnHost { host, report, .. }: &StorageOnHost) -> String {
    match &report.trouble {
        Some(trouble) => format!("{host} ({trouble})"),
        None => format!("{host} ({} free)", Bytes(report.available_bytes)),
    }
}

fn show(options: &Options, status: &StorageStatus) -> Result<(), Failure> {
    let storage = &status.storage;
    let kind = if storage.shared { "folder, shared" } else { "folder on each host" };
    let mut fields = vec![
        ("name", storage.name.to_string()),
        ("type", kind.to_owned()),
        ("path", storage.path.clone()),
        ("default", words::yes_no(status.default)),
    ];
    fields.extend(status.hosts.iter().map(|on| ("host", host_text(on, storage.shared))));
    output::fields(options.json, status, &fields)
}

fn host_text(on: &StorageOnHost, shared: bool) -> String {
    let StorageOnHost { host, proven, default_place, report } = on;
    let mut text = match &report.trouble {
        Some(trouble) => format!("{host}: {trouble}"),
        None => {
            let (free, total) = (Bytes(report.available_bytes), Bytes(report.total_bytes));
            format!("{host}: {free} free of {total}, {} reserved", Bytes(report.reserved_bytes))
        }
    };
    if shared {
        text.push_str(if *proven { ", proven to be shared" } else { ", not proven to be shared" });
    }
    if let Some(place) = default_place {
        text.push_str(&format!(", its default no. {place}"));
    }
    text
}

fn defaults(options: &Options, defaults: &StorageDefaults) -> Result<(), Failure> {
    if options.json {
        return output::json(defaults);
    }
    output::line(&format!("pool: {}", words::or_dash(defaults.pool.as_ref())))?;
    for (host, storages) in &defaults.hosts {
        output::line(&format!("{host}: {}", words::comma_list(storages)))?;
    }
    Ok(())
}
