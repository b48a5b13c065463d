//! `whimbrel migration`: looks at migrations, steers and cancels them. All that is known of one is in [`show`].

mod reclaim;
mod show;

pub(crate) use self::show::converges;

use clap::{Args, Subcommand};
use whimbrel_api::MigrationId;
use whimbrel_api::migration::{LiveSettings, Migration as Record, MigrationAction};

use crate::command::Options;
use crate::failure::Failure;
use crate::follow::{self, Interrupts};
use crate::migrate::problems::Problems;
use crate::progress::Progress;
use crate::values::Given;
use crate::{output, values, words};

/// List, show, watch, steer and cancel migrations
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  whimbrel migration list
  whimbrel migration list --json | jq -r 'select(.outcome == \"running\") | .id'")]
pub(crate) enum Migration {
    /// List all migrations, newest first
    #[command(after_help = "\
Examples:
  whimbrel migration list
  whimbrel migration list --json | jq 'select(.outcome == \"stayed\") | .why'")]
    List,
    /// Show all that is known of a migration: forecast beside fact, decisions, the pause by its parts
    #[command(after_help = "\
With --raw: what both QEMUs said last, untouched (raw, destination_raw), and the figures over time for a plot (samples), as JSON.

Examples:
  whimbrel migration show 01890a5d-ac96-774b-bcce-b302099a8057
  whimbrel migration show 01890a5d-ac96-774b-bcce-b302099a8057 --json | jq .downtime
  whimbrel migration show 01890a5d-ac96-774b-bcce-b302099a8057 --raw | jq '.samples[].bits_per_s'")]
    Show {
        /// Its id
        #[arg(value_parser = values::migration)]
        id: MigrationId,
        /// Show the raw figures and the samples over time instead
        #[arg(long)]
        raw: bool,
    },
    /// Follow a migration to its end; Ctrl-C only stops looking
    #[command(after_help = "\
Examples:
  whimbrel migration watch 01890a5d-ac96-774b-bcce-b302099a8057

Shown are the pass over the memory, what is left of it, what the guest writes beside what is sent, how hard it is throttled, \
the pause to be expected, and post-copy; and each decision as it is taken.

The exit code is that of `whimbrel migrate`: 0 moved, 1 stayed, 3 refused, 4 unresolved.")]
    Watch {
        /// Its id
        #[arg(value_parser = values::migration)]
        id: MigrationId,
    },
    /// Cancel a migration: the VM runs on where it is
    #[command(after_help = "\
Examples:
  whimbrel migration cancel 01890a5d-ac96-774b-bcce-b302099a8057

Once the guest has been handed over the answer is `handed-over`, exit code 3, and the migration goes on.")]
    Cancel {
        /// Its id
        #[arg(value_parser = values::migration)]
        id: MigrationId,
    },
    Set(Set),
    /// Begin post-copy now: the guest runs on at the destination, the rest of its memory follows
    #[command(after_help = "\
It has to have been made ready before the start: by --postcopy, or by a policy that allows it.

Examples:
  whimbrel migration postcopy 01890a5d-ac96-774b-bcce-b302099a8057")]
    Postcopy(Which),
    /// Hold post-copy: the guest goes on as far as its memory is there
    #[command(after_help = "\
Examples:
  whimbrel migration pause 01890a5d-ac96-774b-bcce-b302099a8057")]
    Pause(Which),
    /// Let a post-copy go on that was paused by hand
    #[command(after_help = "\
Examples:
  whimbrel migration resume 01890a5d-ac96-774b-bcce-b302099a8057")]
    Resume(Which),
    /// Take a post-copy up now whose connection is lost
    #[command(after_help = "\
It is taken up without a command as soon as the way is back, any number of times.

Examples:
  whimbrel migration recover 01890a5d-ac96-774b-bcce-b302099a8057")]
    Recover(Which),
    /// Stop the guest until the rest is sent: the migration ends, however fast the guest writes
    #[command(after_help = "\
Examples:
  whimbrel migration force-complete 01890a5d-ac96-774b-bcce-b302099a8057")]
    ForceComplete(Which),
    Reclaim(self::reclaim::Reclaim),
}

/// A migration.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// Its id
    #[arg(value_parser = values::migration)]
    id: MigrationId,
}

/// Change a running migration; what is not said stays
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  whimbrel migration set 01890a5d-ac96-774b-bcce-b302099a8057 --max-downtime 500
  whimbrel migration set 01890a5d-ac96-774b-bcce-b302099a8057 --bandwidth 2gbit --postcopy-bandwidth 1gbit")]
pub(crate) struct Set {
    /// Its id
    #[arg(value_parser = values::migration)]
    id: MigrationId,
    /// The longest pause of the guest to aim at, in milliseconds, 1 to 2000000
    #[arg(long, value_name = "MS", allow_negative_numbers = true, value_parser = values::given(values::downtime_ms))]
    max_downtime: Option<Given<u64>>,
    /// The most to send a second: 500MiB/s, 1gbit, or a number of bytes
    #[arg(long, value_name = "RATE", allow_negative_numbers = true, value_parser = values::given(values::rate))]
    bandwidth: Option<Given<u64>>,
    /// The most to send a second in post-copy of what the guest is not waiting for
    #[arg(long, value_name = "RATE", allow_negative_numbers = true, value_parser = values::given(values::rate))]
    postcopy_bandwidth: Option<Given<u64>>,
}

impl Set {
    fn settings(self) -> Result<LiveSettings, Failure> {
        let mut problems = Problems::default();
        let nothing = self.max_downtime.is_none()
            && self.bandwidth.is_none()
            && self.postcopy_bandwidth.is_none();
        let settings = LiveSettings {
            max_downtime_ms: problems.value("--max-downtime", self.max_downtime),
            bandwidth_bytes_per_s: problems.value("--bandwidth", self.bandwidth),
            postcopy_bandwidth_bytes_per_s: problems
                .value("--postcopy-bandwidth", self.postcopy_bandwidth),
        };
        // Where a value was given that is none, it has been told.
        if nothing || settings != LiveSettings::default() {
            problems.found(&settings.validate());
        }
        problems.end().map(|()| settings)
    }
}

impl Migration {
    pub(crate) async fn run(self, options: &Options) -> Result<(), Failure> {
        match self {
            Self::List => {
                let head = ["ID", "VM", "FROM", "TO", "PHASE", "OUTCOME", "STARTED", "DOWNTIME"];
                output::list(options.json, &options.pool()?.migrations().await?, head, row)
            }
            Self::Show { id, raw: true } => {
                show::raw(options, &options.pool()?.migration_statistics(id).await?)
            }
            Self::Show { id, raw: false } => show::show(options, id).await,
            Self::Watch { id } => watch(options, id).await,
            Self::Cancel { id } => {
                let record = options.pool()?.cancel_migration(id).await?;
                let (vm, source) = (&record.vm_name, &record.source);
                told(options, &record, &format!("is being cancelled: {vm} stays on {source}"))
            }
            Self::Set(command) => {
                let id = command.id;
                let settings = command.settings()?;
                let record = options.pool()?.set_migration(id, &settings).await?;
                told(options, &record, "is changed")
            }
            Self::Postcopy(which) => act(options, which.id, MigrationAction::Postcopy).await,
            Self::Pause(which) => act(options, which.id, MigrationAction::Pause).await,
            Self::Resume(which) => act(options, which.id, MigrationAction::Resume).await,
            Self::Recover(which) => act(options, which.id, MigrationAction::Recover).await,
            Self::ForceComplete(which) => {
                act(options, which.id, MigrationAction::ForceComplete).await
            }
            Self::Reclaim(command) => command.run(options).await,
        }
    }
}

async fn watch(options: &Options, id: MigrationId) -> Result<(), Failure> {
    let pool = options.pool()?;
    let mut interrupts = Interrupts::catch()?;
    let record = pool.migration(id).await?;
    let mut progress = Progress::new(options.json);
    tokio::select! {
        end = follow::watch(&pool, record, &mut progress) => {
            follow::conclude(options.json, &end?, false)
        }
        _ = interrupts.next() => {
            Err(Failure::interrupted("no longer watching; the migration goes on"))
        }
    }
}

async fn act(options: &Options, id: MigrationId, action: MigrationAction) -> Result<(), Failure> {
    let record = options.pool()?.migration_action(id, action).await?;
    let what = match action {
        MigrationAction::Postcopy => "goes on by post-copy",
        MigrationAction::Pause => "is being held",
        MigrationAction::Resume => "goes on",
        MigrationAction::Recover => "is being taken up again",
        MigrationAction::ForceComplete => {
            "is being completed: the guest stands still until the rest is sent"
        }
    };
    told(options, &record, what)
}

/// One line about a migration that something was done with.
fn told(options: &Options, record: &Record, what: &str) -> Result<(), Failure> {
    match options.json {
        true => output::json(record),
        false => output::line(&format!("{} {what}", record.id)),
    }
}

fn row(record: &Record) -> [String; 8] {
    [
        record.id.to_string(),
        record.vm_name.to_string(),
        record.source.to_string(),
        record.destination.to_string(),
        record.phase.to_string(),
        follow::outcome_word(&record.state).to_owned(),
        words::moment(record.started),
        words::or_dash(record.downtime.map(|d| words::duration(words::ms_of_us(d.total_us)))),
    ]
}
