//! `whimbrel controller`: runs a pool's controller in the foreground, for a service manager.

use std::path::PathBuf;

use clap::Args;
use whimbrel_api::ErrorCode;
use whimbrel_controller::Config;

use crate::failure::Failure;

/// Where a pool's folder is that nobody put elsewhere.
pub(crate) const DIR_DEFAULT: &str = "/var/lib/whimbrel/controller";

/// Run a pool's controller
#[derive(Debug, Args)]
#[command(after_help = "\
It runs until it is told to end (SIGTERM or Ctrl-C), and logs to standard error. VMs and migrations go on without it; \
when it is back, it finds them as they are.

Examples:
  whimbrel controller
  whimbrel controller --dir /srv/pool
  whimbrel controller --config /srv/pool/controller.toml -v")]
pub(crate) struct Controller {
    /// The pool's folder, made by `whimbrel pool init`
    #[arg(long, value_name = "FOLDER", default_value = DIR_DEFAULT)]
    dir: PathBuf,
    /// Its settings, where they are not controller.toml in that folder; the pool's folder is then this file's
    #[arg(long, value_name = "FILE", conflicts_with = "dir")]
    config: Option<PathBuf>,
}

impl Controller {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        let config = Config::load(&self.config.unwrap_or(self.dir)).map_err(|error| {
            let message = whimbrel_api::error::chain(&error);
            Failure::usage(ErrorCode::BadRequest, message)
                .hint("`whimbrel pool init` makes a pool with its settings")
        })?;
        let run = whimbrel_controller::run(config).await;
        run.map_err(|error| Failure::because("the controller cannot run", &error))
    }
}
