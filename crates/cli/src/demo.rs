//! `whimbrel demo`: a lab, a VM, two migrations, what they cost and what was noticed of them; then everything is taken
//! down, also after Ctrl-C or an error. `make demo` calls it.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use tokio::time::{Instant, sleep};
use whimbrel_api::client::PoolClient;
use whimbrel_api::migration::{MigrateOptions, MigrateRequest, Migration, MigrationState};
use whimbrel_api::vm::{Bytes, CreateVm, VmAction, VmSpec};
use whimbrel_api::{MigrationId, Name, VmId};
use whimbrel_lab::report::Report;
use whimbrel_lab::{Lab, Probe, ProbeReport, Rate, guest_address};

use crate::command::Options;
use crate::connect;
use crate::failure::Failure;
use crate::follow::{self, Interrupts};
use crate::lab::{self, blocking};
use crate::progress::Progress;
use crate::{output, words};

/// Its own folder, so that it disturbs no lab that is up.
const FOLDER: &str = "/var/tmp/whimbrel-demo";
/// How long the guest may take from its start until its memory is filled, in seconds.
const BOOT_SECONDS_MAX: u64 = 120;
/// Pause between two looks at it, in milliseconds.
const BOOT_POLL_MS: u64 = 100;
/// How long the probe goes on after a migration, in milliseconds, so that it sees the end of any gap.
const AFTERWARDS_MS: u64 = 500;

/// See it work: a VM moves twice between hosts on this machine, and everything is taken down
#[derive(Debug, Args)]
#[command(after_help = "\
Needs root, QEMU, and what `make setup` fetches; KVM is not needed. Takes less than a minute.

Examples:
  whimbrel demo
  whimbrel demo --link 1gbit
  whimbrel demo --json | jq 'select(.outcome == \"moved\") | .downtime_ms'")]
pub(crate) struct Demo {
    /// The rate of each host's link, such as 1gbit; as fast as the machine without it
    #[arg(long, value_name = "RATE")]
    link: Option<Rate>,
    /// Where the demo's lab lives meanwhile
    #[arg(long, value_name = "FOLDER", default_value = FOLDER)]
    dir: PathBuf,
}

impl Demo {
    pub(crate) async fn run(self, options: &Options) -> Result<(), Failure> {
        let mut interrupts = Interrupts::catch_all()?;
        let screen = Screen { json: options.json };
        let mut config = lab::config(self.dir)?;
        config.link = self.link;
        let hosts = config.hosts;
        let began = Instant::now();
        screen.head("Whimbrel: a running VM moves between hosts, all of them on this machine")?;
        let lab = lab::up(config, &mut interrupts, |_| {}).await?;
        let guard = TakeDown { lab: lab.clone(), done: false };
        screen.fact("lab", &format!("{hosts} hosts ready in {}", since(began)))?;
        let told = tokio::select! {
            told = tell(&lab, &screen) => told,
            _ = interrupts.next() => Err(lab::interrupted()),
        };
        guard.now().await?;
        told?;
        screen.head(&format!("\nall in {}; everything is taken down again", since(began)))
    }
}

/// The story, from the VM's creation to its last verification.
async fn tell(lab: &Lab, screen: &Screen) -> Result<(), Failure> {
    let pool = connect::pool(Some(&lab.client_config()))?;
    let [home, first, second] = hosts(lab)?;
    let vm = boot(lab, &pool, &home, screen).await?;
    let address = guest_address(0);
    let probe = watch(lab, address).await?;
    for destination in [first, second] {
        // What was seen so far belongs to no migration.
        let _before = probe.take();
        let record = migrate(&pool, vm, &destination, screen).await?;
        sleep(Duration::from_millis(AFTERWARDS_MS)).await;
        let seen = probe.take();
        let verified = verify(lab, address).await?;
        screen.migration(&record, &seen, &verified)?;
        judge(&record, &seen, &verified)?;
    }
    Ok(())
}

fn hosts(lab: &Lab) -> Result<[Name; 3], Failure> {
    let names = lab.hosts().iter().map(|host| host.name.parse::<Name>());
    let names: Vec<Name> = names
        .collect::<Result<_, _>>()
        .map_err(|error| Failure::because("the lab's hosts have no names", &error))?;
    names.try_into().map_err(|_| Failure::failed("the demo is written for three hosts"))
}

/// Makes the VM, starts it, and waits until its memory is filled with what can be verified.
async fn boot(lab: &Lab, pool: &PoolClient, host: &Name, screen: &Screen) -> Result<VmId, Failure> {
    let began = Instant::now();
    let text = connect::read_bounded(&lab.vm_file())?;
    let spec: VmSpec = toml::from_str(&text)
        .map_err(|error| Failure::because("the lab's VM cannot be read", &error))?;
    let request = CreateVm { id: VmId::new(), host: Some(host.clone()), spec };
    let vm = pool.create_vm(&request).await?;
    let running = pool.vm_action(&vm.id.to_string(), VmAction::Start).await?;
    let deadline = began + Duration::from_secs(BOOT_SECONDS_MAX);
    while !is_ready(lab).await {
        if Instant::now() > deadline {
            let what = format!("the guest is not ready after {BOOT_SECONDS_MAX} s");
            return Err(Failure::failed(what));
        }
        sleep(Duration::from_millis(BOOT_POLL_MS)).await;
    }
    let engine = running.engine.map(|e| format!(", QEMU {} with {}", e.version, e.accelerator));
    let what = format!(
        "{} of memory, a disk, a network card{}; runs on {host} after {}",
        Bytes(vm.definition.memory_bytes),
        engine.unwrap_or_default(),
        since(began)
    );
    screen.fact(vm.name.as_str(), &what)?;
    Ok(vm.id)
}

/// Whether the guest answers, and has filled its memory. While it boots it does not.
async fn is_ready(lab: &Lab) -> bool {
    let lab = lab.clone();
    let status = blocking(move || lab.witness(guest_address(0))?.status()).await;
    status.is_ok_and(|report| report.memory.filled_pages == report.memory.pages)
}

async fn watch(lab: &Lab, guest: Ipv4Addr) -> Result<Probe, Failure> {
    let lab = lab.clone();
    blocking(move || lab.probe(guest)).await
}

async fn verify(lab: &Lab, guest: Ipv4Addr) -> Result<Report, Failure> {
    let lab = lab.clone();
    blocking(move || lab.witness(guest)?.verify()).await
}

async fn migrate(
    pool: &PoolClient,
    vm: VmId,
    destination: &Name,
    screen: &Screen,
) -> Result<Migration, Failure> {
    let request = MigrateRequest {
        id: MigrationId::new(),
        vm: vm.to_string(),
        destination: destination.clone(),
        options: MigrateOptions::default(),
    };
    let record = pool.migrate(&request).await?;
    let way = format!("\n{}: {} → {}", record.vm_name, record.source, record.destination);
    screen.head(&way)?;
    follow::watch(pool, record, &mut Progress::new(screen.json)).await
}

/// Whether all went as promised; what did not is the demo's failure.
fn judge(record: &Migration, seen: &ProbeReport, verified: &Report) -> Result<(), Failure> {
    if record.state != MigrationState::Moved {
        return follow::conclude(false, record, false);
    }
    if !seen.stream_unbroken {
        return Err(Failure::failed("the TCP stream broke"));
    }
    if !verified.healthy || verified.mismatches() > 0 {
        let what = format!(
            "the guest found {} mismatches; {}",
            verified.mismatches(),
            verified.errors.join("; ")
        );
        return Err(Failure::failed(what));
    }
    Ok(())
}

fn since(began: Instant) -> String {
    words::duration(began.elapsed().as_secs_f64() * 1_000.0)
}

/// Where the story is told.
struct Screen {
    json: bool,
}

impl Screen {
    fn head(&self, text: &str) -> Result<(), Failure> {
        if self.json { Ok(()) } else { text.lines().try_for_each(output::line) }
    }

    fn fact(&self, name: &str, text: &str) -> Result<(), Failure> {
        if self.json { Ok(()) } else { output::line(&format!("  {name:<9} {text}")) }
    }

    fn migration(
        &self,
        record: &Migration,
        seen: &ProbeReport,
        verified: &Report,
    ) -> Result<(), Failure> {
        if self.json {
            let mut end = json!(follow::End::of(record));
            end["network"] = json!(seen);
            end["witness"] = json!(verified);
            return output::json(&end);
        }
        for (name, value) in follow::figures(record) {
            self.fact(name, &value)?;
        }
        self.fact("network", &lab::probe_words(seen))?;
        self.fact("witness", &lab::witness_words(verified))
    }
}

/// Takes the lab down when it is dropped, if that has not been done in order: after a panic.
struct TakeDown {
    lab: Lab,
    done: bool,
}

impl TakeDown {
    /// Takes the lab down, and says whether that worked.
    async fn now(mut self) -> Result<(), Failure> {
        self.done = true;
        let dir = self.lab.dir().to_owned();
        blocking(move || Lab::down(&dir)).await.map(drop)
    }
}

impl Drop for TakeDown {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = Lab::down(self.lab.dir())
        {
            tracing::error!(%error, "the demo's lab could not be taken down; `whimbrel lab down --dir` does");
        }
    }
}
