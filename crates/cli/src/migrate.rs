//! `whimbrel migrate`: asks for a migration, shows it to its end, and says what happened.
//!
//! The migration's id is made here, so that asking again after a lost answer is the same request. What follows is
//! [`follow`]'s, whose words `migration watch` shares. The many options are in [`options`].

pub(crate) mod options;
pub(crate) mod problems;

use std::time::Duration;

use clap::Args;
use whimbrel_api::client::PoolClient;
use whimbrel_api::migration::{MigrateRequest, Migration};
use whimbrel_api::{ApiError, MigrationId, Name};

use crate::command::Options;
use crate::failure::Failure;
use crate::follow::{self, Interrupts};
use crate::progress::Progress;
use crate::{output, values};

/// How often the request is sent before the controller counts as unreachable.
const ASK_TRIES_MAX: u32 = 4;
/// Pause before the second try, in milliseconds; it doubles with each further one.
const ASK_PAUSE_MS: u64 = 250;

/// Move a running VM to another host
#[derive(Debug, Args)]
#[command(after_help = "\
Without options the way is chosen from measurements within the policy that applies, and watched: `whimbrel plan` tells it \
beforehand, `whimbrel migration show` afterwards, with the reasons. Whatever fails before the handoff leaves the guest running \
where it is. All reasons against a move are told at once, before anything is begun.

Ctrl-C asks once whether to cancel: y cancels, d leaves it running and returns, anything else goes on; Ctrl-C again cancels. \
Where there is no terminal to ask at, or with --json, the first one cancels. Cancelled, the command waits for the end; one more \
Ctrl-C leaves without it. Once the guest has been handed over, it can no longer be cancelled.

With --json, lines of progress are followed by one with the end: outcome (moved, stayed, refused, unresolved), total_ms, \
downtime_ms, bytes, forecast, migration and more. Exit codes are listed by `whimbrel --help`.

Examples:
  whimbrel migrate web01 host-b
  whimbrel migrate web01 host-b --max-downtime 50 --bandwidth 1gbit
  whimbrel migrate web01 host-b --parallel --parallel-connections 4 --compressed --comp-methods zstd
  whimbrel migrate web01 host-b --postcopy --timeout 60 --timeout-postcopy
  whimbrel migrate web01 host-b --policy must-finish
  whimbrel migrate web01 host-b --detach          returns at once; see `whimbrel migration watch`
  whimbrel migrate web01 host-b --json | tail -n 1 | jq .downtime_ms")]
pub(crate) struct Migrate {
    /// The VM's name or id
    #[arg(value_parser = values::vm)]
    vm: String,
    /// The destination
    #[arg(value_parser = values::name)]
    host: Name,
    /// Return as soon as the migration has been admitted
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    pub(crate) options: options::MoveOptions,
}

impl Migrate {
    pub(crate) async fn run(self, options: &Options) -> Result<(), Failure> {
        let request = MigrateRequest {
            id: MigrationId::new(),
            vm: self.vm,
            destination: self.host,
            options: self.options.read()?,
        };
        let pool = options.pool()?;
        let mut interrupts = Interrupts::catch()?;
        let admitted = admit(&pool, &request, &mut interrupts).await?;
        if self.detach {
            return told_detached(options, &admitted);
        }
        let mut progress = Progress::new(options.json);
        let end = follow::to_the_end(&pool, admitted, &mut progress, &mut interrupts).await?;
        follow::conclude(options.json, &end, interrupts.cancelled())
    }
}

/// Asks until there is an answer. Ctrl-C meanwhile is answered with a cancel as soon as there is one.
async fn admit(
    pool: &PoolClient,
    request: &MigrateRequest,
    interrupts: &mut Interrupts,
) -> Result<Migration, Failure> {
    let asking = ask(pool, request);
    tokio::pin!(asking);
    loop {
        tokio::select! {
            answer = &mut asking => return answer.map_err(|error| refused(error, request)),
            presses = interrupts.next() => {
                if presses > 1 {
                    return Err(left_unanswered(request.id));
                }
                output::note("waiting for the controller's answer; Ctrl-C again leaves without it");
            }
        }
    }
}

/// Sends the request, again after a lost answer: with the same id it is the same request. A certificate's trouble is told at
/// once, unless an answer was lost before: then it is not known whether it was admitted.
async fn ask(pool: &PoolClient, request: &MigrateRequest) -> Result<Migration, ApiError> {
    let mut pause = Duration::from_millis(ASK_PAUSE_MS);
    let mut lost = None;
    for _ in 1..ASK_TRIES_MAX {
        match pool.migrate(request).await {
            Err(error) if error.code.is_certificate() => return Err(lost.unwrap_or(error)),
            Err(error) if error.is_unknown() => {
                tracing::info!(%error, "asking again");
                lost = Some(error);
            }
            answer => return answer,
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
    pool.migrate(request).await
}

fn refused(error: ApiError, request: &MigrateRequest) -> Failure {
    if !error.is_unknown() || error.code.is_certificate() {
        return Failure::from(error).with_facts(follow::open_end("refused", request.id));
    }
    let hint = format!("if it was admitted, `whimbrel migration show {}` shows it", request.id);
    Failure::from(error).hint(hint).with_facts(follow::open_end("unknown", request.id))
}

fn left_unanswered(id: MigrationId) -> Failure {
    Failure::interrupted("left before the controller answered; the migration may run")
        .hint(format!("`whimbrel migration show {id}` tells"))
        .with_facts(follow::open_end("unknown", id))
}

fn told_detached(options: &Options, admitted: &Migration) -> Result<(), Failure> {
    if options.json {
        return output::json(admitted);
    }
    output::line(&format!("{} is on its way to {}", admitted.vm_name, admitted.destination))?;
    output::line(&format!("watch it:  whimbrel migration watch {}", admitted.id))
}
