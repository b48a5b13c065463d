//! A lab with a stand-in for the `whimbrel` binary: it must come up, hold, and leave nothing behind, however it ends.
//! Needs root, and what `scripts/setup` and `scripts/guest` provide.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use whimbrel_lab::{CLIENT, Cancel, Cut, Direction, Lab, LabConfig, LabError, Status};

const WAIT_MAX: Duration = Duration::from_secs(60);
/// Names the folder for [`a_lab_that_is_killed`].
const CHILD_DIR: &str = "WHIMBREL_TEST_LAB_DIR";

/// A folder with the stand-in and a lab's folder; whatever the test does, nothing stays.
struct Place {
    root: PathBuf,
    before: Machine,
}

impl Place {
    fn new(name: &str) -> Self {
        let before = Machine::look();
        let root =
            Path::new("/var/tmp").join(format!("whimbrel-lab-test-{}-{name}", std::process::id()));
        fs::create_dir(&root).unwrap();
        let stub = root.join("whimbrel");
        fs::write(&stub, include_str!("stub.pl")).unwrap();
        fs::set_permissions(&stub, fs::Permissions::from_mode(0o755)).unwrap();
        Self { root, before }
    }

    fn dir(&self) -> PathBuf {
        self.root.join("lab")
    }

    fn config(&self, hosts: u8) -> LabConfig {
        LabConfig { hosts, ..LabConfig::new(&self.dir(), &self.root.join("whimbrel")) }
    }

    fn up(&self, hosts: u8) -> Lab {
        Lab::up(&self.config(hosts), &Cancel::default(), &mut |_| {}).unwrap()
    }

    /// Nothing of the lab but its logs and its lock is left, and the machine is as it was.
    fn assert_clean(&self) {
        let left: BTreeSet<String> = names(&self.dir());
        assert!(
            left.is_subset(&BTreeSet::from([".lab.lock".to_owned(), "log".to_owned()])),
            "{left:?}"
        );
        let began = Instant::now();
        // Other tests of this file come and go; theirs are told apart by their folder's name.
        while !self.own_leftovers().is_empty() {
            assert!(began.elapsed() < WAIT_MAX, "left: {:?}", self.own_leftovers());
            thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(Machine::look().links, self.before.links);
    }

    fn own_leftovers(&self) -> Vec<String> {
        let now = Machine::look();
        let root = self.root.to_string_lossy().into_owned();
        now.mounts.into_iter().chain(now.processes).filter(|line| line.contains(&root)).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Best effort, for a test that failed; one that passed has looked already.
        let _down = Lab::down(&self.dir());
        let _gone = fs::remove_dir_all(&self.root);
    }
}

/// What a lab could leave behind outside its folder.
struct Machine {
    links: BTreeSet<String>,
    mounts: Vec<String>,
    processes: Vec<String>,
}

impl Machine {
    fn look() -> Self {
        let processes = names(Path::new("/proc")).into_iter().filter_map(|pid| {
            let words = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
            (pid.bytes().all(|byte| byte.is_ascii_digit()) && pid != std::process::id().to_string())
                .then(|| format!("{pid} {}", words.replace('\0', " ")))
        });
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        Self {
            links: names(Path::new("/sys/class/net")),
            mounts: mounts.lines().map(str::to_owned).collect(),
            processes: processes.collect(),
        }
    }
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn wait_until(what: &str, happened: impl Fn() -> bool) {
    let began = Instant::now();
    while !happened() {
        assert!(began.elapsed() < WAIT_MAX, "{what}: not within {WAIT_MAX:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a TCP connection between two places carries a word there and back.
fn talks(lab: &Lab, from: &str, to: &str, address: Ipv4Addr, port: u16) -> bool {
    let listener = lab.run(to, || TcpListener::bind((address, port)).unwrap()).unwrap();
    listener.set_nonblocking(true).unwrap();
    let peer = SocketAddr::from((address, port));
    let connected =
        lab.run(from, || TcpStream::connect_timeout(&peer, Duration::from_millis(1500))).unwrap();
    let Ok(mut stream) = connected else { return false };
    let (mut served, _) = listener.accept().unwrap();
    served.set_nonblocking(false).unwrap();
    stream.write_all(b"word").unwrap();
    let mut word = [0; 4];
    served.read_exact(&mut word).unwrap();
    &word == b"word"
}

#[test]
fn comes_up_and_goes_down_without_a_trace() {
    let place = Place::new("up-down");
    let lab = place.up(3);
    let Status::Up { hosts, controller, .. } = Status::of(&place.dir()).unwrap() else {
        panic!("{:?}", Status::of(&place.dir()))
    };
    assert!(
        controller.pid.is_some() && hosts.iter().all(|host| host.agent_pid.is_some()),
        "{hosts:?}"
    );
    assert_eq!(
        hosts.iter().map(|host| host.name.as_str()).collect::<Vec<_>>(),
        ["host-a", "host-b", "host-c"]
    );
    assert!(place.dir().join("shared/boot/witness.initramfs").exists() && lab.vm_file().exists());
    // The stand-in's agents have a child each, as a real one has its QEMUs.
    assert_eq!(lab.processes("host-a").unwrap().len(), 2);

    let output = lab
        .spawn("host-b", Command::new("ip").args(["-br", "address"]).stdout(Stdio::piped()))
        .unwrap();
    let output = String::from_utf8(output.wait_with_output().unwrap().stdout).unwrap();
    assert!(output.contains("198.18.0.12/24") && output.contains("eth1"), "{output}");
    assert!(matches!(lab.processes("host-d"), Err(LabError::UnknownHost { .. })));

    let again = Lab::up(&place.config(3), &Cancel::default(), &mut |_| {});
    assert!(matches!(again, Err(LabError::AlreadyUp { .. })), "{again:?}");
    assert!(Lab::down(&place.dir()).unwrap());
    place.assert_clean();
    assert!(!Lab::down(&place.dir()).unwrap(), "a second down finds nothing");
    assert_eq!(Status::of(&place.dir()).unwrap(), Status::Down { dir: place.dir() });
    place.up(1);
    assert!(Lab::down(&place.dir()).unwrap());
    place.assert_clean();
}

#[test]
fn links_are_cut_and_restored() {
    let place = Place::new("links");
    let lab = place.up(2);
    let b = Ipv4Addr::new(198, 18, 0, 12);
    assert!(talks(&lab, "host-a", "host-b", b, 5000));
    for cut in [
        Cut::ALL,
        Cut { direction: Direction::In, ports: None },
        Cut { direction: Direction::Out, ports: None },
    ] {
        lab.cut("host-b", cut).unwrap();
        assert!(!talks(&lab, "host-a", "host-b", b, 5000), "{cut:?}");
    }
    lab.cut("host-b", Cut::STREAMS).unwrap();
    assert!(
        talks(&lab, "host-a", "host-b", b, 5000) && !talks(&lab, "host-a", "host-b", b, 49_200)
    );
    lab.restore("host-b").unwrap();
    lab.restore("host-b").unwrap();
    assert!(talks(&lab, "host-a", "host-b", b, 49_200));

    let shaping = || {
        let tc = lab.spawn(
            "host-a",
            Command::new("tc").args(["qdisc", "show", "dev", "eth0"]).stdout(Stdio::piped()),
        );
        String::from_utf8(tc.unwrap().wait_with_output().unwrap().stdout).unwrap()
    };
    assert!(!shaping().contains("tbf"));
    lab.set_link("host-a", Some("250mbit".parse().unwrap())).unwrap();
    assert!(shaping().contains("tbf") && shaping().contains("250Mbit"), "{}", shaping());
    lab.set_link("host-a", None).unwrap();
    assert!(!shaping().contains("tbf"));
    assert!(matches!(lab.cut("nobody", Cut::ALL), Err(LabError::UnknownHost { .. })));
    assert!(Lab::down(&place.dir()).unwrap());
    place.assert_clean();
}

#[test]
fn daemons_are_killed_frozen_and_started_again() {
    let place = Place::new("daemons");
    let lab = place.up(1);
    let agent = lab.daemon("host-a").unwrap();
    assert!(matches!(lab.start_daemon("host-a"), Err(LabError::AlreadyUp { .. })));
    lab.kill(&agent).unwrap();
    assert!(!agent.is_alive() && lab.daemon("host-a").is_none());
    assert_eq!(lab.processes("host-a").unwrap().len(), 1, "its child lives on");
    let again = lab.start_daemon("host-a").unwrap();
    assert!(again.is_alive() && again != agent);
    lab.freeze(&again, true);
    let state =
        || fs::read_to_string(format!("/proc/{}/stat", again.pid)).unwrap().contains(") T ");
    wait_until("the stop", state);
    lab.freeze(&again, false);
    wait_until("the continuation", || !state());
    assert!(Lab::down(&place.dir()).unwrap());
    place.assert_clean();
}

#[test]
fn an_interrupt_or_an_error_leaves_nothing() {
    let place = Place::new("interrupt");
    let mut steps = 0;
    let up = Lab::up(&place.config(2), &Cancel::default(), &mut |_| steps += 1);
    up.unwrap();
    Lab::down(&place.dir()).unwrap();
    assert!(steps >= 4, "{steps}");
    for step in 1..=steps {
        let cancel = Cancel::default();
        let mut seen = 0;
        let interrupted = Lab::up(&place.config(2), &cancel, &mut |_| {
            seen += 1;
            if seen == step {
                cancel.cancel();
            }
        });
        assert!(matches!(interrupted, Err(LabError::Interrupted)), "{step}: {interrupted:?}");
        place.assert_clean();
    }
    let broken = LabConfig { binary: PathBuf::from("/bin/false"), ..place.config(2) };
    let failed = Lab::up(&broken, &Cancel::default(), &mut |_| {});
    assert!(matches!(failed, Err(LabError::Tool { .. })), "{failed:?}");
    place.assert_clean();
}

/// Runs only as a child of [`a_kill_is_cleaned_up_after`].
#[test]
#[ignore = "a child process of another test, which kills it"]
fn a_lab_that_is_killed() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let dir = PathBuf::from(dir);
    let config = LabConfig { hosts: 2, ..LabConfig::new(&dir, &dir.with_file_name("whimbrel")) };
    let step_file = dir.with_file_name("steps");
    let mut steps = String::new();
    let _up = Lab::up(&config, &Cancel::default(), &mut |step| {
        steps.push_str(step);
        steps.push('\n');
        fs::write(&step_file, &steps).unwrap();
    });
    fs::write(&step_file, steps + "up\n").unwrap();
    loop {
        thread::sleep(WAIT_MAX);
    }
}

#[test]
fn a_kill_is_cleaned_up_after() {
    let place = Place::new("kill");
    let step_file = place.root.join("steps");
    let start = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_lab_that_is_killed", "--ignored"])
            .env(CHILD_DIR, place.dir())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    // After each of the steps, the last of which is a finished lab; cleaned up in turn by `down` and by the next `up`.
    for (step, by_up) in [(1, false), (2, true), (3, true), (4, false), (5, false)] {
        let mut child = start();
        let steps = || fs::read_to_string(&step_file).unwrap_or_default().lines().count();
        wait_until(&format!("step {step}"), || steps() >= step);
        child.kill().unwrap();
        child.wait().unwrap();
        fs::remove_file(&step_file).unwrap();
        if by_up {
            place.up(1);
        }
        assert!(Lab::down(&place.dir()).unwrap(), "step {step}");
        place.assert_clean();
    }
    // And at whatever moment these come to.
    for ms in (0..200).step_by(25) {
        let mut child = start();
        thread::sleep(Duration::from_millis(ms));
        child.kill().unwrap();
        child.wait().unwrap();
        Lab::down(&place.dir()).unwrap();
        place.assert_clean();
    }
}

#[test]
fn two_commands_do_not_meet() {
    let place = Place::new("busy");
    let mut met = None;
    let up = Lab::up(&place.config(1), &Cancel::default(), &mut |_| {
        met.get_or_insert_with(|| Lab::down(&place.dir()));
    });
    assert!(matches!(met, Some(Err(LabError::Busy { .. }))), "{met:?}");
    up.unwrap();
    assert!(Lab::down(&place.dir()).unwrap());
    place.assert_clean();
}

#[test]
fn a_folder_of_somebody_else_is_left_alone() {
    let place = Place::new("foreign");
    fs::create_dir_all(place.dir().join("shared")).unwrap();
    fs::write(place.dir().join("shared/letter"), "mine").unwrap();
    let up = Lab::up(&place.config(1), &Cancel::default(), &mut |_| {});
    assert!(matches!(up, Err(LabError::InTheWay { .. })), "{up:?}");
    assert!(!Lab::down(&place.dir()).unwrap());
    assert_eq!(fs::read_to_string(place.dir().join("shared/letter")).unwrap(), "mine");

    // Also where nothing has a name that a lab would use: its logs, say, are emptied.
    let home = place.root.join("home");
    fs::create_dir_all(home.join("log")).unwrap();
    fs::write(home.join("log/diary"), "mine").unwrap();
    let config = LabConfig { dir: home.clone(), ..place.config(1) };
    let up = Lab::up(&config, &Cancel::default(), &mut |_| {});
    assert!(matches!(up, Err(LabError::InTheWay { .. })), "{up:?}");
    let left: Vec<_> =
        fs::read_dir(&home).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["log"]);
    assert_eq!(fs::read_to_string(home.join("log/diary")).unwrap(), "mine");

    let closed = place.root.join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let config = LabConfig { dir: closed.join("lab"), ..place.config(1) };
    let up = Lab::up(&config, &Cancel::default(), &mut |_| {});
    assert!(matches!(up, Err(LabError::NotTraversable { path }) if path == closed));
}

#[test]
fn the_network_of_the_guests_reaches_every_host() {
    let place = Place::new("guests");
    let lab = place.up(2);
    // In the place of an agent's bridge and a guest: an address on the uplink itself.
    let address = Ipv4Addr::new(198, 19, 0, 101);
    let add = ["address", "add", "198.19.0.101/24", "dev", "eth1"];
    assert!(lab.spawn("host-b", Command::new("ip").args(add)).unwrap().wait().unwrap().success());
    assert!(talks(&lab, CLIENT, "host-b", address, 7000));
    assert!(Lab::down(&place.dir()).unwrap());
    place.assert_clean();
}
