//! A lab with one guest, `web01`, and what every story asks of it. Waits are bounded, and generous: nothing here measures.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use whimbrel_lab::report::{self, Report};
use whimbrel_lab::{
    CONTROLLER, Cancel, Lab, LabConfig, Process, SYSTEM_ENGINE, guest_address, vm_definition,
};

/// How long anything may take that is to happen, on a machine with much else to do.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(90);
/// How long what a migration made may stay after its end.
const SWEEP_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
/// Begins the names of the tests' folders, before the process id and a word of at most 5 letters: there are sockets in them,
/// whose paths have an end.
const FOLDERS: &str = "/var/tmp/whimbrel-test-";
/// How much of each log is shown when a test has failed.
const LOG_BYTES_MAX: usize = 8192;
/// The one guest.
pub(crate) const VM: &str = "web01";
/// Slow enough that there is time for faults in the middle of the copy: tens of seconds for this guest.
pub(crate) const SLOW: [&str; 2] = ["--bandwidth", "1MiB/s"];
/// QEMU's ports for guests that come.
const MIGRATION_PORTS: std::ops::RangeInclusive<u16> = 49152..=49215;

/// Several labs at once would share two processors: one story at a time, also where the tests share a process.
static ALONE: Mutex<()> = Mutex::new(());

/// What a command said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    #[expect(dead_code, reason = "for whoever reads why a test failed")]
    err: String,
}

impl Said {
    fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    /// The last line, which `--json` makes an object.
    pub(crate) fn last(&self) -> Value {
        let line = self.out.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// A lab, until dropped.
pub(crate) struct Stage {
    pub(crate) lab: Lab,
    dir: PathBuf,
    /// The links that each host had before there was a guest.
    links: BTreeMap<String, BTreeSet<String>>,
    /// How long each log was when its agent last got orders for failpoints.
    logged: RefCell<BTreeMap<String, usize>>,
    _alone: MutexGuard<'static, ()>,
}

impl Stage {
    /// Two hosts with the system's QEMU.
    pub(crate) fn two_hosts(name: &str) -> Self {
        Self::with_engines(name, &[SYSTEM_ENGINE; 2])
    }

    /// A host with each of these engines: paths, or versions in the cache.
    pub(crate) fn with_engines(name: &str, engines: &[&str]) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        remove_orphans();
        let dir = PathBuf::from(format!("{FOLDERS}{}-{name}", std::process::id()));
        let mut config = LabConfig::new(&dir, Path::new(env!("CARGO_BIN_EXE_whimbrel")));
        config.hosts = u8::try_from(engines.len()).unwrap();
        config.engines = engines.iter().map(|engine| config.engine(engine)).collect();
        let lab = match Lab::up(&config, &Cancel::default(), &mut |_| {}) {
            Ok(lab) => lab,
            Err(error) => {
                remove(&dir);
                panic!("no lab: {error:?}");
            }
        };
        let mut stage =
            Self { lab, dir, links: BTreeMap::new(), logged: RefCell::default(), _alone: alone };
        for host in stage.hosts() {
            stage.links.insert(host.clone(), stage.links_of(&host));
        }
        stage
    }

    /// The same with the guest running on a host, its memory filled.
    pub(crate) fn guest_on(self, host: &str) -> Self {
        self.create_guest(host);
        self.ok(&["vm", "start", VM]);
        self.wait_filled();
        self
    }

    /// Defines the guest, stopped: small, and with little to do, so that it is soon copied.
    pub(crate) fn create_guest(&self, host: &str) {
        let definition = vm_definition(VM, 0, 64).replace("\"1GiB\"", "\"256MiB\"");
        assert!(definition.contains("256MiB"));
        let file = self.dir.join("small.toml");
        fs::write(&file, definition).unwrap();
        self.ok(&["vm", "create", "-f", file.to_str().unwrap(), "--host", host]);
    }

    /// Waits until the guest answers and has filled its memory.
    pub(crate) fn wait_filled(&self) -> Report {
        self.wait_filled_after("")
    }

    /// The same for a guest that boots again: another boot than this one.
    pub(crate) fn wait_filled_after(&self, boot_id: &str) -> Report {
        self.wait("a guest with its memory filled", || {
            let report = self.lab.witness(guest()).ok()?.status().ok()?;
            let memory = &report.memory;
            (memory.filled_pages == memory.pages && report.boot_id != boot_id).then_some(report)
        })
    }

    pub(crate) fn hosts(&self) -> Vec<String> {
        self.lab.hosts().iter().map(|host| host.name.clone()).collect()
    }

    /// Runs `whimbrel` as the pool's operator.
    pub(crate) fn run(&self, args: &[&str]) -> Said {
        Said::of(self.lab.operator_command(args).stdin(Stdio::null()).output().unwrap())
    }

    /// The same, and it must work.
    pub(crate) fn ok(&self, args: &[&str]) -> Said {
        let said = self.run(args);
        assert_eq!(said.code, Some(0), "{args:?}: {said:?}");
        said
    }

    /// The same, and it must fail with this word.
    pub(crate) fn fails(&self, code: &str, args: &[&str]) -> Value {
        let said = self.run(&[args, &["--json"]].concat());
        let last = said.last();
        assert_eq!(last["error"], code, "{args:?}: {said:?}");
        last
    }

    /// Moves the guest and returns how it ended.
    pub(crate) fn moves(&self, to: &str) -> Value {
        let end = self.ok(&["migrate", VM, to, "--json"]).last();
        assert_eq!(end["outcome"], "moved", "{end}");
        assert_eq!(end["host"], to, "{end}");
        self.assert_runs_on(to);
        end
    }

    /// Begins a migration and returns its id.
    pub(crate) fn begins(&self, to: &str, options: &[&str]) -> String {
        let args = [&["migrate", VM, to, "--detach", "--json"], options].concat();
        self.ok(&args).last()["id"].as_str().unwrap().to_owned()
    }

    /// Begins a slow migration and returns its id when the copy is under way.
    pub(crate) fn copies(&self, to: &str) -> String {
        let id = self.begins(to, &SLOW);
        self.wait_copy(&id);
        id
    }

    /// Waits until some of the memory has been sent.
    pub(crate) fn wait_copy(&self, id: &str) {
        self.wait_record(id, "the middle of the copy", |record| {
            let sent = record["progress"]["transferred_bytes"].as_u64();
            record["phase"] == "precopy" && sent > Some(2_000_000)
        });
    }

    /// What the controller has written down; nothing while it does not answer.
    pub(crate) fn record(&self, id: &str) -> Option<Value> {
        let said = self.run(&["migration", "show", id, "--json"]);
        (said.code == Some(0)).then(|| said.last())
    }

    pub(crate) fn wait_record(
        &self,
        id: &str,
        what: &str,
        is_so: impl Fn(&Value) -> bool,
    ) -> Value {
        let mut last = None;
        let began = Instant::now();
        while began.elapsed() < WAIT_MAX {
            last = self.record(id).or(last);
            if let Some(record) = last.as_ref().filter(|record| is_so(record)) {
                return record.clone();
            }
            thread::sleep(POLL);
        }
        panic!("not within {WAIT_MAX:?}: {what}; the record is {last:?}");
    }

    /// Waits until a migration has ended, and says how.
    pub(crate) fn wait_end(&self, id: &str) -> Value {
        let open = ["running", "unresolved"];
        let record = self.wait_record(id, "its end", |record| {
            !open.contains(&record["outcome"].as_str().unwrap_or("running"))
        });
        assert!(record["ended"].is_string(), "{record}");
        record
    }

    /// What the controller says of the guest.
    pub(crate) fn vm(&self) -> Option<Value> {
        let said = self.run(&["vm", "show", VM, "--json"]);
        (said.code == Some(0)).then(|| said.last())
    }

    pub(crate) fn wait_vm(&self, state: &str, host: &str) -> Value {
        let what = format!("{VM} {state} on {host}");
        self.wait(&what, || self.vm().filter(|vm| vm["state"] == state && vm["host"] == host))
    }

    /// The guest runs on this host and on no other, is healthy, and all else that a migration made is gone.
    pub(crate) fn assert_runs_on(&self, host: &str) -> Report {
        self.wait_vm("running", host);
        let report = self.assert_healthy();
        self.assert_only_on(host);
        report
    }

    /// Memory, disk and clocks hold what they held. A guest that still waits for the network is asked again.
    pub(crate) fn assert_healthy(&self) -> Report {
        let report =
            self.wait("an answer of the guest", || self.lab.witness(guest()).ok()?.verify().ok());
        assert!(report.healthy && report.mismatches() == 0, "{report:?}");
        assert_eq!(report.memory.filled_pages, report.memory.pages);
        assert!(report.disk.as_ref().is_some_and(|disk| disk.acknowledged > 0), "{report:?}");
        report
    }

    /// One QEMU on this host and none elsewhere, and nothing that belonged to another.
    pub(crate) fn assert_only_on(&self, host: &str) {
        for name in self.hosts() {
            self.assert_left(&name, usize::from(name == host));
        }
    }

    /// Within [`SWEEP_MAX`] a host has nothing but what `guests` guests need.
    pub(crate) fn assert_left(&self, host: &str, guests: usize) {
        let began = Instant::now();
        loop {
            let left = self.left_on(host);
            if left.fits(guests) {
                return;
            }
            assert!(began.elapsed() < SWEEP_MAX, "left over on {host}, {guests} guests: {left:?}");
            thread::sleep(POLL);
        }
    }

    fn left_on(&self, host: &str) -> Left {
        let lines = |path: &Path| {
            let entries = fs::read_dir(path).into_iter().flatten().flatten();
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        };
        let known = &self.links[host];
        Left {
            qemus: self.lab.qemus(host).unwrap().into_iter().map(|qemu| qemu.pid).collect(),
            links: self.links_of(host).difference(known).cloned().collect(),
            runs: lines(&self.dir.join(host).join("run")),
            ports: self.listening(host),
        }
    }

    fn links_of(&self, host: &str) -> BTreeSet<String> {
        // The thread's own, since it alone is in the host's namespace.
        let table = self.lab.run(host, || fs::read_to_string("/proc/thread-self/net/dev").unwrap());
        let table = table.unwrap();
        let lines = table.lines().skip(2).filter_map(|line| line.split_once(':'));
        // The VMs' bridge comes with the first of them, and stays.
        lines.map(|(name, _)| name.trim().to_owned()).filter(|name| name != "br-lab").collect()
    }

    fn listening(&self, host: &str) -> Vec<u16> {
        let table = self.lab.run(host, || fs::read_to_string("/proc/thread-self/net/tcp").unwrap());
        let table = table.unwrap();
        let listens = |line: &str| {
            let columns: Vec<&str> = line.split_ascii_whitespace().collect();
            let port = columns[1].split_once(':').unwrap().1;
            (columns[3] == "0A").then(|| u16::from_str_radix(port, 16).unwrap())
        };
        let ports = table.lines().skip(1).filter_map(listens);
        ports.filter(|port| MIGRATION_PORTS.contains(port)).collect()
    }

    /// The guest's QEMU on a host.
    pub(crate) fn qemu(&self, host: &str) -> Process {
        let qemus = self.lab.qemus(host).unwrap();
        assert_eq!(qemus.len(), 1, "{host}: {qemus:?}");
        qemus.into_iter().next().unwrap()
    }

    /// Kills the agent of a host, or the controller, or what is given.
    pub(crate) fn kill(&self, process: &Process) {
        self.lab.kill(process).unwrap();
    }

    pub(crate) fn kill_daemon(&self, name: &str) {
        self.kill(&self.lab.daemon(name).unwrap());
    }

    pub(crate) fn start_daemon(&self, name: &str) {
        self.lab.start_daemon(name).unwrap();
    }

    /// Orders for an agent's failpoints; empty takes them back.
    pub(crate) fn failpoints(&self, host: &str, orders: &str) {
        let length = fs::metadata(self.lab.log(host)).unwrap().len();
        self.logged.borrow_mut().insert(host.to_owned(), usize::try_from(length).unwrap());
        fs::write(self.dir.join(host).join("failpoints"), orders).unwrap();
    }

    /// Waits until an agent stands at one of its failpoints.
    pub(crate) fn wait_stalled(&self, host: &str) {
        self.wait_log(host, "failpoint: stall");
    }

    /// Waits for words in an agent's log since it last got orders.
    pub(crate) fn wait_log(&self, host: &str, words: &str) {
        let (log, from) = (self.lab.log(host), self.logged.borrow()[host]);
        self.wait(words, || fs::read_to_string(&log).ok()?[from..].contains(words).then_some(()));
    }

    /// No QEMU of any host lets its guest run: the guest is silent, and none of them uses the processor.
    pub(crate) fn assert_stands_still(&self) {
        let before = self.ticks();
        assert!(before.len() > 1, "{before:?}");
        // The witness looks at its clock every millisecond: a guest that runs uses the processor all the time.
        thread::sleep(Duration::from_secs(1));
        let after = self.ticks();
        let used: Vec<u64> =
            before.iter().filter_map(|(pid, ticks)| Some(after.get(pid)? - ticks)).collect();
        assert!(used.iter().all(|ticks| *ticks < 5), "a guest runs: {used:?} ticks of 10 ms");
        assert!(self.lab.witness(guest()).and_then(|mut witness| witness.status()).is_err());
    }

    /// The processor time of each QEMU so far, in ticks of 10 ms.
    fn ticks(&self) -> BTreeMap<i32, u64> {
        let qemus = self.hosts().into_iter().flat_map(|host| self.lab.qemus(&host).unwrap());
        let ticks = qemus.filter_map(|qemu| {
            let stat = fs::read_to_string(format!("/proc/{}/stat", qemu.pid)).ok()?;
            let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace().skip(11);
            let (user, system): (u64, u64) =
                (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            Some((qemu.pid, user + system))
        });
        ticks.collect()
    }

    /// Drops what one host sends to another, until [`Stage::join`]; the controller still reaches both.
    pub(crate) fn part(&self, from: &str, to: &str) {
        let address = self.lab.hosts().iter().find(|host| host.name == to).unwrap().address;
        let hook = "type filter hook output priority 0";
        let rules = format!("chain out {{\n{hook}\nip daddr {address} drop\n}}");
        self.nft(from, &format!("table inet parted {{\n{rules}\n}}"));
    }

    /// Takes [`Stage::part`] back.
    pub(crate) fn join(&self, from: &str) {
        self.nft(from, "delete table inet parted");
    }

    fn nft(&self, host: &str, rules: &str) {
        let status = self.lab.spawn(host, Command::new("nft").arg(rules)).unwrap().wait().unwrap();
        assert!(status.success(), "{rules}");
    }

    /// Slows the link of a host down, so that a copy takes half a minute, or lets it be as fast as it can.
    pub(crate) fn slow_link(&self, host: &str, slow: bool) {
        let rate = slow.then(|| "20mbit".parse().unwrap());
        self.lab.set_link(host, rate).unwrap();
    }

    /// Asks until there is something.
    pub(crate) fn wait<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(began.elapsed() < WAIT_MAX, "not within {WAIT_MAX:?}: {what}; {:?}", self.vm());
            thread::sleep(POLL);
        }
    }

    /// For whoever reads why a test failed: what the lab's processes and the guest said last.
    #[expect(clippy::print_stderr, reason = "the test harness shows it with the failure")]
    fn show_logs(&self) {
        let mut logs: Vec<PathBuf> = self.hosts().iter().map(|host| self.lab.log(host)).collect();
        logs.push(self.lab.log(CONTROLLER));
        for host in self.hosts() {
            let runs = fs::read_dir(self.dir.join(&host).join("run")).into_iter().flatten();
            logs.extend(runs.flatten().map(|run| run.path().join("q/console.log")));
        }
        for log in logs {
            let text = fs::read(&log).unwrap_or_default();
            let text = String::from_utf8_lossy(&text[text.len().saturating_sub(LOG_BYTES_MAX)..]);
            eprintln!("--- the end of {}\n{text}", log.display());
        }
    }

    /// Sends the guest a command that it answers.
    pub(crate) fn tell(&self, command: report::Command) -> Report {
        self.lab.witness(guest()).unwrap().command(command).unwrap()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if thread::panicking() {
            self.show_logs();
        }
        remove(&self.dir);
    }
}

/// What a host has beyond what an idle one has.
#[derive(Debug)]
struct Left {
    qemus: Vec<i32>,
    links: Vec<String>,
    runs: Vec<String>,
    ports: Vec<u16>,
}

impl Left {
    fn fits(&self, guests: usize) -> bool {
        let counts = [self.qemus.len(), self.links.len(), self.runs.len()];
        counts == [guests; 3] && self.ports.is_empty()
    }
}

/// Where the guest answers.
pub(crate) fn guest() -> Ipv4Addr {
    guest_address(0)
}

/// Best effort: a test that passed has looked already, and the next one sweeps what stays.
fn remove(dir: &Path) {
    if Lab::down(dir).is_ok() {
        let _gone = fs::remove_dir_all(dir);
    }
}

/// Removes the labs of tests that were killed.
fn remove_orphans() {
    let (folder, prefix) = FOLDERS.rsplit_once('/').unwrap();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(prefix).and_then(|rest| rest.split('-').next());
        let is_dead = |pid: &str| {
            pid.parse::<u32>().is_ok_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
        };
        if pid.is_some_and(is_dead) {
            remove(&entry.path());
        }
    }
}
