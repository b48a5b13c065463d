//! libvirt on the lab: a daemon on each of two hosts, and `virsh`.
//!
//! Each daemon has a mount namespace of its own, in which the folders of libvirt's that hold state and settings are folders
//! of the lab; nothing of the machine's own libvirt is seen or touched. As it runs in its host's network namespace, it and
//! the QEMUs that it starts are the lab's, and go with it, however the bench ends.
//!
//! What favours virsh is done: the two daemons speak plain TCP (people use ssh, which takes longer to connect), domains are
//! transient (nothing is written down about them), logs are quiet, QEMU needs no user namespace, cgroup or log daemon, and
//! for TLS the same certificates are used as by `whimbrel`, with prepared parameters for the key exchange.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::unistd::Pid;
use whimbrel_lab::{HostPlan, guest_address};

use crate::bounded::{self, Ran};
use crate::say;
use crate::stage::{Engine, Shape, Stage};
use crate::versus::domain::{self, Places};
use crate::versus::monitor::{self, Event};
use crate::versus::mover::{End, Mover, Trip};

/// How long a daemon may take to answer: at its first start it asks each QEMU what it can do.
const START_MAX: Duration = Duration::from_secs(60);
const START_POLL: Duration = Duration::from_millis(50);
/// How long a command may take that moves nothing.
const COMMAND_MAX: Duration = Duration::from_secs(60);
/// How long the last events may be under way when the command has ended.
const EVENTS_AFTERWARDS: Duration = Duration::from_millis(100);
const DISK_BYTES: &str = "64M";

/// What is laid over the machine's own folders, in the daemon's mount namespace alone, and the daemon.
///
/// A machine without services has no folders of libvirt's to lay something over, so those above them are taken. An unpacked
/// QEMU must not find the parts of the system's own beside its own: libvirt asks for all types of objects, for which QEMU
/// loads all parts that it finds, and 10.0.2 aborts at one of another version.
const DAEMON: &str = r#"set -eu
for laid in run:/run etc:/etc/libvirt lib:/var/lib cache:/var/cache log:/var/log; do
    mount --bind "$1/${laid%%:*}" "${laid#*:}"
done
for names in passwd group hosts; do
    mount --bind "$1/$names" "/etc/$names"
done
mount -t sysfs sysfs /sys
if [ -d "$4" ]; then
    mount --bind "$3" /usr/bin/qemu-system-x86_64
    mount --bind "$4" /usr/lib/x86_64-linux-gnu/qemu
fi
hostname "$2"
exec libvirtd --listen
"#;
const FOLDERS: [&str; 5] = ["run", "etc", "lib", "cache", "log"];
/// Where an unpacked QEMU has its loadable parts, from the folder that its starter is in.
const PARTS: &str = "usr/lib/x86_64-linux-gnu/qemu";
/// Users and groups that libvirt insists on when it starts, whoever QEMU is to run as; only Debian's package with the
/// services makes them.
const USERS: [(&str, &str); 2] = [
    ("passwd", "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin\n"),
    ("group", "libvirt-qemu:x:64055:\n"),
];
/// Where QEMUs listen for the bench, as the daemon sees it.
const MONITORS: &str = "/run/bench";
/// Files of `whimbrel`'s on a host, and what QEMU calls them.
const CERTIFICATES: [(&str, &str); 5] = [
    ("ca.pem", "ca-cert.pem"),
    ("qemu-server.pem", "server-cert.pem"),
    ("qemu.key", "server-key.pem"),
    ("qemu-client.pem", "client-cert.pem"),
    ("qemu.key", "client-key.pem"),
];
/// Without it QEMU computes such parameters for every migration, which takes seconds.
const KEY_EXCHANGE: &str = include_str!("../../../qemu/src/migrate/ffdhe2048.pem");

/// libvirt on the two hosts of an engine; it ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Libvirt<'a> {
    stage: &'a Stage,
    engine: &'a Engine,
    daemons: Vec<Daemon>,
    bridge: String,
    /// Its version, in its words.
    pub(crate) version: String,
}

#[derive(Debug)]
struct Daemon {
    host: HostPlan,
    folder: PathBuf,
    child: Child,
}

/// A guest that libvirt runs.
#[derive(Debug)]
pub(crate) struct Domain<'a> {
    libvirt: &'a Libvirt<'a>,
    name: String,
    address: Ipv4Addr,
    disk: PathBuf,
}

impl Daemon {
    fn start(stage: &Stage, host: &HostPlan) -> Result<Self> {
        let folder = stage.lab().dir().join("run/libvirt").join(&host.name);
        for name in FOLDERS.into_iter().chain(["etc/tls", "run/bench"]) {
            let made = folder.join(name);
            fs::create_dir_all(&made).with_context(|| format!("cannot make {}", made.display()))?;
        }
        let write = |name: &str, text: String| {
            let file = folder.join("etc").join(name);
            fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
        };
        write("libvirtd.conf", daemon_settings(host))?;
        write("qemu.conf", engine_settings(host))?;
        write("tls/dh-params.pem", KEY_EXCHANGE.to_owned())?;
        // libvirt asks for its own name again and again, which takes time where nobody knows it.
        let names = |host: &HostPlan| format!("{} {}\n", host.address, host.name);
        let hosts: String = stage.lab().hosts().iter().map(names).collect();
        fs::write(folder.join("hosts"), hosts).context("cannot write the hosts' names")?;
        for (names, more) in USERS {
            let known = fs::read_to_string(Path::new("/etc").join(names));
            let all = known.with_context(|| format!("cannot read /etc/{names}"))? + more;
            fs::write(folder.join(names), all).with_context(|| format!("cannot write {names}"))?;
        }
        let pki = stage.lab().dir().join(&host.name).join("pki");
        for (ours, theirs) in CERTIFICATES {
            fs::copy(pki.join(ours), folder.join("etc/tls").join(theirs))
                .with_context(|| format!("cannot copy {ours} of {}", host.name))?;
        }
        let log = fs::File::create(folder.join("log/daemon.log")).context("cannot make a log")?;
        let errors = log.try_clone().context("cannot make a log")?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--uts", "--", "sh", "-c", DAEMON, "libvirtd"]);
        let engine = &host.engine;
        let parts = engine.parent().map(|beside| beside.join(PARTS)).unwrap_or_default();
        command.arg(&folder).arg(&host.name).arg(engine).arg(parts);
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        let child = stage.lab().spawn(&host.name, &mut command)?;
        Ok(Self { host: host.clone(), folder, child })
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("run/libvirt/libvirt-sock")
    }

    fn wait_ready(&mut self, stage: &Stage) -> Result<()> {
        let began = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            let ended = self.child.try_wait().context("cannot look at libvirtd")?;
            if ended.is_some() || began.elapsed() > START_MAX {
                let log =
                    fs::read_to_string(self.folder.join("log/daemon.log")).unwrap_or_default();
                bail!("libvirtd of {} does not run: {}", self.host.name, log.trim());
            }
            stage.pause(START_POLL)?;
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has no guests by now, and the lab ends what is left.
        let _ended_already = self.child.kill();
        let _reaped_already = self.child.wait();
    }
}

fn daemon_settings(host: &HostPlan) -> String {
    // Two daemons of one machine would take each other for the same host.
    let id = u32::from(host.address);
    format!(
        "listen_tls = 0\nlisten_tcp = 1\nlisten_addr = \"{}\"\nauth_tcp = \"none\"\nauth_unix_rw = \"none\"\n\
         unix_sock_rw_perms = \"0700\"\nhost_uuid = \"00000000-0000-4000-8000-0000{id:08x}\"\nlog_level = 3\n",
        host.address
    )
}

fn engine_settings(host: &HostPlan) -> String {
    format!(
        "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\nnamespaces = []\ncgroup_controllers = []\n\
         stdio_handler = \"file\"\nremember_owner = 0\nmigration_host = \"{}\"\n\
         migrate_tls_x509_cert_dir = \"/etc/libvirt/tls\"\nmigrate_tls_x509_verify = 1\n",
        host.address
    )
}

impl<'a> Libvirt<'a> {
    /// Starts the daemons.
    pub(crate) fn start(stage: &'a Stage, engine: &'a Engine) -> Result<Self> {
        say("starting libvirt");
        let hosts = stage.lab().hosts().iter().filter(|host| engine.hosts.contains(&&*host.name));
        let daemons: Result<Vec<Daemon>> = hosts.map(|host| Daemon::start(stage, host)).collect();
        let bridge = stage.bridge()?;
        let mut libvirt = Self { stage, engine, daemons: daemons?, bridge, version: String::new() };
        for daemon in &mut libvirt.daemons {
            daemon.wait_ready(stage)?;
        }
        // libvirt asks a QEMU what it can do when it meets it first, and remembers: that is no part of a move.
        for host in engine.hosts {
            let program = libvirt.daemon(host)?.host.engine.display().to_string();
            let words = ["domcapabilities", "--emulatorbin", &program, "--virttype", "qemu"];
            libvirt.virsh(host, &words, COMMAND_MAX)?;
        }
        let version = libvirt.virsh(engine.hosts[0], &["version", "--daemon"], COMMAND_MAX)?;
        let daemons_own = |line: &&str| line.starts_with("Running against daemon");
        let line = version.lines().find(daemons_own).and_then(|line| line.split(": ").nth(1));
        line.unwrap_or("an unknown version").clone_into(&mut libvirt.version);
        Ok(libvirt)
    }

    fn daemon(&self, host: &str) -> Result<&Daemon> {
        let found = self.daemons.iter().find(|daemon| daemon.host.name == host);
        found.with_context(|| format!("{host} has no libvirt"))
    }

    fn run(
        &self,
        host: &str,
        words: &[&str],
        within: Duration,
        cancel: impl FnOnce(Pid) -> Result<()>,
    ) -> Result<Ran> {
        let socket = self.daemon(host)?.socket();
        let mut command = Command::new("virsh");
        command.arg("--connect").arg(format!("qemu+unix:///system?socket={}", socket.display()));
        command.args(words);
        let lab = self.stage.lab();
        let spawn = |command: &mut Command| Ok(lab.spawn(host, command)?);
        bounded::run(&mut command, spawn, within, self.stage.stop(), cancel)
    }

    /// Runs `virsh` against a host's daemon, and returns what it prints.
    fn virsh(&self, host: &str, words: &[&str], within: Duration) -> Result<String> {
        let ran = self.run(host, words, within, bounded::interrupt)?;
        ensure!(ran.output.status.success(), "virsh {}: {}", words.join(" "), ran.words());
        Ok(String::from_utf8_lossy(&ran.output.stdout).into_owned())
    }

    /// Starts a guest on a host.
    pub(crate) fn start_guest(&self, shape: &Shape, host: &str) -> Result<Domain<'_>> {
        say(&format!("starting {} on {host}, libvirt {}", shape.name, self.version));
        let daemon = self.daemon(host)?;
        let shared = self.stage.lab().shared();
        let disk = shared.join(format!("{}.qcow2", shape.name));
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg(DISK_BYTES);
        let made = command.status().context("cannot start qemu-img")?;
        ensure!(made.success(), "qemu-img cannot make {}", disk.display());
        let places = Places {
            engine: &daemon.host.engine,
            boot: &shared.join("boot"),
            disk: &disk,
            monitor: &format!("{MONITORS}/{}", shape.name),
            bridge: &self.bridge,
        };
        let file = shared.join(format!("{}.xml", shape.name));
        fs::write(&file, domain::xml(shape, self.engine, &places))
            .context("cannot write a domain's definition")?;
        self.virsh(host, &["create", &file.to_string_lossy()], COMMAND_MAX)?;
        let address = guest_address(shape.number);
        Ok(Domain { libvirt: self, name: shape.name.clone(), address, disk })
    }
}

impl Domain<'_> {
    fn monitor(&self, host: &str) -> Result<PathBuf> {
        Ok(self.libvirt.daemon(host)?.folder.join("run/bench").join(&self.name))
    }

    fn command(&self, at: &str, verb: &str) -> Result<()> {
        self.libvirt.virsh(at, &[verb, &self.name], COMMAND_MAX).map(drop)
    }
}

impl Mover for Domain<'_> {
    fn address(&self) -> Ipv4Addr {
        self.address
    }

    fn rest(&self, at: &str) -> Result<()> {
        self.command(at, "suspend")
    }

    fn wake(&self, at: &str) -> Result<()> {
        self.command(at, "resume")
    }

    fn go(&self, from: &str, to: &str, options: &[&str], within: Duration) -> Result<End> {
        let destination = format!("qemu+tcp://{}/system", self.libvirt.daemon(to)?.host.address);
        let certified = format!("{to}.qemu.whimbrel");
        // The lab's one folder is shared by all hosts, and libvirt, which sees an ordinary file system, does not believe it.
        let mut words = [&["migrate", "--live", "--unsafe"], options].concat();
        if options.contains(&"--tls") {
            words.extend(["--tls-destination", &certified]);
        }
        words.extend([self.name.as_str(), destination.as_str()]);
        let done = AtomicBool::new(false);
        let (source, target) = (self.monitor(from)?, self.monitor(to)?);
        let (ran, left, arrived) = thread::scope(|scope| {
            let left = scope.spawn(|| monitor::watch(&source, &done));
            let arrived = scope.spawn(|| monitor::watch(&target, &done));
            // `virsh migrate` does not answer Ctrl-C where it has no terminal (9.0).
            let abort = |_| self.command(from, "domjobabort");
            let ran = self.libvirt.run(from, &words, within, abort);
            thread::sleep(EVENTS_AFTERWARDS);
            done.store(true, Ordering::Relaxed);
            (ran, left.join(), arrived.join())
        });
        let ended = |_| anyhow::anyhow!("the thread of a monitor has ended");
        let (ran, left, arrived) = (ran?, left.map_err(ended)??, arrived.map_err(ended)??);
        match (ran.output.status.success(), ran.late) {
            (true, _) => Ok(End::Arrived(trip(&ran, &left, &arrived)?)),
            (false, true) => Ok(End::TooSlow),
            (false, false) => bail!("virsh {}: {}", words.join(" "), ran.words()),
        }
    }

    fn remove(self: Box<Self>, at: &str) -> Result<()> {
        self.command(at, "destroy")?;
        let disk = &self.disk;
        fs::remove_file(disk).with_context(|| format!("cannot remove {}", disk.display()))
    }
}

/// What the events of both QEMUs tell.
fn trip(ran: &Ran, left: &[Event], arrived: &[Event]) -> Result<Trip> {
    let first = |events: &[Event], name: &str, status: &str, from: u64| {
        let wanted =
            |event: &&Event| event.name == name && event.status == status && event.at_us >= from;
        let found = events.iter().find(wanted).map(|event| event.at_us);
        found.with_context(|| format!("QEMU's event {name} {status} was missed"))
    };
    let stop = left.iter().rev().find(|event| event.name == "STOP");
    let stopped_us = stop.context("QEMU's STOP event was missed")?.at_us;
    let setup = first(left, "MIGRATION", "setup", ran.spawned_us)?;
    let completed = first(left, "MIGRATION", "completed", setup)?;
    Ok(Trip {
        spawned_us: ran.spawned_us,
        ended_us: ran.ended_us,
        copying_us: first(left, "MIGRATION", "active", setup)?,
        stopped_us,
        resumed_us: first(arrived, "RESUME", "", stopped_us)?,
        engine_ms: completed.saturating_sub(setup) as f64 / 1e3,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{ExitStatus, Output};

    use super::*;

    fn event(at_us: u64, name: &str, status: &str) -> Event {
        Event { at_us, name: name.to_owned(), status: status.to_owned() }
    }

    #[test]
    fn a_move_is_told_by_the_events_of_both_sides() {
        let output = Output { status: ExitStatus::from_raw(0), stdout: vec![], stderr: vec![] };
        let ran = Ran { spawned_us: 1_000, ended_us: 9_000, late: false, output };
        let left = [
            event(10, "MIGRATION", "completed"), // of a move before
            event(2_000, "MIGRATION", "setup"),
            event(2_100, "MIGRATION", "active"),
            event(2_200, "STOP", ""),
            event(2_300, "RESUME", ""), // libvirt let it run on once more
            event(5_000, "STOP", ""),
            event(6_000, "MIGRATION", "completed"),
        ];
        let arrived = [event(1_500, "RESUME", ""), event(7_000, "RESUME", "")];
        let trip = trip(&ran, &left, &arrived).unwrap();
        assert_eq!((trip.copying_us, trip.stopped_us, trip.resumed_us), (2_100, 5_000, 7_000));
        assert_eq!(trip.engine_ms, 4.0);
        assert!(super::trip(&ran, &left, &arrived[..1]).is_err(), "it never ran on");
    }
}
