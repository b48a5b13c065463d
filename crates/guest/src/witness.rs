//! The witness as a whole: what it watches, what it says of it, and the threads that keep it going.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::clock::{self, Clock};
use crate::config::Config;
use crate::disk::{Caching, Disk};
use crate::memory::Memory;
use crate::net::Net;
use crate::pattern::Pattern;
use crate::report::{Command, Damage, Reply, Report};
use crate::{net, power};

/// The disk that the journal is on, if the machine has one.
const DISK: &str = "/dev/vda";
/// Errors that are kept for the report.
const ERRORS_KEPT_MAX: usize = 16;

/// Everything that is watched.
pub(crate) struct Witness {
    boot_id: String,
    address: Option<Ipv4Addr>,
    errors: Mutex<Vec<String>>,
    memory: Memory,
    disk: Option<Disk>,
    clock: Clock,
    net: Arc<Net>,
}

impl Witness {
    /// Takes up the disk; everything else starts with [`Witness::start`].
    pub(crate) fn new(config: &Config, mut errors: Vec<String>) -> Self {
        let pattern = Pattern {
            seed: config.seed,
            zero_percent: config.zero_percent,
            text_percent: config.text_percent,
        };
        let disk = if Path::new(DISK).exists() {
            Disk::open(Path::new(DISK), config.seed, config.journal_records_per_s, Caching::Direct)
                .map_err(|error| errors.push(error.to_string()))
                .ok()
        } else {
            None
        };
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            boot_id: boot_id.trim().to_owned(),
            address: config.address.map(|address| address.ip),
            errors: Mutex::new(errors),
            memory: Memory::new(pattern, config.memory_mib, config.dirty_mb_per_s),
            disk,
            clock: Clock::default(),
            net: Arc::new(Net::default()),
        }
    }

    /// Starts all the threads that watch; what cannot be started is reported.
    pub(crate) fn start(self: &Arc<Self>, verify_mb_per_s: u32) {
        self.spawn(|witness| witness.clock.keep_watching());
        self.spawn(|witness| {
            witness.memory.fill();
            witness.memory.keep_dirtying()
        });
        self.spawn(move |witness| witness.memory.keep_verifying(verify_mb_per_s));
        if self.disk.is_some() {
            self.spawn(|witness| witness.disk.as_ref().map_or((), |disk| disk.keep_appending()));
            self.spawn(|witness| witness.disk.as_ref().map_or((), |disk| disk.keep_verifying()));
        }
        match (net::echo_socket(), net::stream_listener()) {
            (Ok(socket), Ok(listener)) => {
                self.spawn(move |witness| witness.net.keep_echoing(&socket));
                self.spawn(move |witness| witness.net.keep_streaming(&listener));
            }
            (Err(error), _) | (_, Err(error)) => {
                self.add_error(format!("the probe's ports cannot be opened: {error}"));
            }
        }
    }

    /// Runs one of the never-ending works in a thread of its own.
    pub(crate) fn spawn<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>) -> T + Send + 'static,
    ) {
        let witness = Arc::clone(self);
        thread::spawn(move || work(&witness));
    }

    /// Keeps an error for the report.
    pub(crate) fn add_error(&self, error: String) {
        let mut errors = lock(&self.errors);
        if errors.len() < ERRORS_KEPT_MAX {
            errors.push(error);
        }
    }

    /// Does what is asked, and says how things stand afterwards.
    pub(crate) fn obey(&self, command: Command) -> Reply {
        match self.try_obey(command) {
            Ok(()) => Reply::Report(Box::new(self.report())),
            Err(error) => Reply::Refused { error },
        }
    }

    /// How things stand.
    pub(crate) fn report(&self) -> Report {
        let mut report = Report {
            healthy: false,
            boot_id: self.boot_id.clone(),
            uptime_ms: clock::uptime_ms(),
            address: self.address,
            errors: lock(&self.errors).clone(),
            memory: self.memory.report(),
            disk: self.disk.as_ref().map(Disk::report),
            clock: self.clock.report(),
            net: self.net.report(),
        };
        let io_errors = report.disk.as_ref().map_or(0, |disk| disk.io_errors);
        report.healthy = report.mismatches() == 0 && report.errors.is_empty() && io_errors == 0;
        report
    }

    fn try_obey(&self, command: Command) -> Result<(), String> {
        let refused = |error: io::Error| format!("the kernel refuses: {error}");
        match command {
            Command::Status => Ok(()),
            Command::Verify => {
                self.memory.verify();
                self.disk.iter().for_each(Disk::verify);
                Ok(())
            }
            Command::Dirty { mb_per_s } => {
                self.memory.set_dirty_rate(mb_per_s);
                Ok(())
            }
            Command::Journal { records_per_s } => {
                self.disk.as_ref().ok_or("there is no journal")?.set_rate(records_per_s);
                Ok(())
            }
            Command::Corrupt { what } => self.damage(what),
            Command::ResetPeaks => {
                self.clock.reset_peaks();
                self.disk.iter().for_each(Disk::reset_peaks);
                Ok(())
            }
            Command::Poweroff => power::off().map_err(refused),
            Command::Reboot => power::restart().map_err(refused),
            Command::Panic => power::crash().map_err(refused),
        }
    }

    fn damage(&self, what: Damage) -> Result<(), String> {
        let done = match what {
            Damage::Page => self.memory.damage().is_some(),
            Damage::Block => self.disk.as_ref().and_then(Disk::damage).is_some(),
            Damage::Clock => self.clock.damage(),
        };
        if done { Ok(()) } else { Err("there is nothing to damage yet".to_owned()) }
    }
}

/// Locks, even if a thread died with the lock: what it was doing is reported as the panic that it was.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
