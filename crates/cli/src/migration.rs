//! `whimbrel migration`: looks at migrations, and cancels them.

use clap::Subcommand;
use whimbrel_api::MigrationId;
use whimbrel_api::migration::{Migration as Record, MigrationState};

use crate::command::Options;
use crate::failure::{Failure, verdict_lines};
use crate::follow::{self, Interrupts};
use crate::progress::Progress;
use crate::{output, values, words};

/// List, show, watch and cancel migrations
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
    /// Show all that is known of a migration
    #[command(after_help = "\
Examples:
  whimbrel migration show 01890a5d-ac96-774b-bcce-b302099a8057
  whimbrel migration show 01890a5d-ac96-774b-bcce-b302099a8057 --json | jq .downtime")]
    Show {
        /// Its id
        #[arg(value_parser = values::migration)]
        id: MigrationId,
    },
    /// Follow a migration to its end; Ctrl-C only stops looking
    #[command(after_help = "\
Examples:
  whimbrel migration watch 01890a5d-ac96-774b-bcce-b302099a8057

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
}

impl Migration {
    pub(crate) async fn run(self, options: &Options) -> Result<(), Failure> {
        let pool = options.pool()?;
        match self {
            Self::List => {
                let head = ["ID", "VM", "FROM", "TO", "PHASE", "OUTCOME", "STARTED", "DOWNTIME"];
                output::list(options.json, &pool.migrations().await?, head, row)
            }
            Self::Show { id } => show(options, &pool.migration(id).await?),
            Self::Watch { id } => {
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
            Self::Cancel { id } => {
                let record = pool.cancel_migration(id).await?;
                match options.json {
                    true => output::json(&record),
                    false => output::line(&format!(
                        "{} is being cancelled: {} stays on {}",
                        record.id, record.vm_name, record.source
                    )),
                }
            }
        }
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

fn show(options: &Options, record: &Record) -> Result<(), Failure> {
    let outcome = match &record.state {
        MigrationState::Running => format!("running, in {}", record.phase),
        _ => follow::outcome_sentence(record),
    };
    let mut fields = vec![
        ("migration", record.id.to_string()),
        ("vm", format!("{} ({})", record.vm_name, record.vm)),
        ("from", record.source.to_string()),
        ("to", record.destination.to_string()),
        ("epoch", record.epoch.to_string()),
        ("outcome", outcome),
        ("started", words::moment(record.started)),
        ("ended", words::or_dash(record.ended.map(words::moment))),
    ];
    if record.cancel_requested {
        fields.push(("cancel", "requested".to_owned()));
    }
    fields.extend(follow::figures(record));
    let began = |phase: &whimbrel_api::migration::PhaseStart| {
        let since = phase.at.duration_since(record.started).as_millis();
        ("phase", format!("{:<12} +{since} ms", phase.phase.as_str()))
    };
    fields.extend(record.phases.iter().map(began));
    output::fields(options.json, record, &fields)?;
    if !options.json {
        record.verdicts.iter().flat_map(verdict_lines).try_for_each(|text| output::line(&text))?;
    }
    Ok(())
}
