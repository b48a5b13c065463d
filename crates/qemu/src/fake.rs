//! An imitation of QEMU for tests: a process that takes the real command line, answers QMP, keeps
//! a run state, and moves "guests" to other fakes over real TCP. It runs no guest.
//!
//! The program is `fake-qemu` (feature `fake`). Another crate gets one of its own by an example
//! (which `cargo test` builds) whose `main` returns [`main`]`()`. It is faithful where callers lean on QEMU: the
//! order of states and events, what is refused, who lets a guest run again when a migration fails,
//! what is answered to a probe. It refuses arguments and commands that [`crate::schema::SENT`]
//! does not name. TLS is imitated: the certificates are read, both ends must use it or neither, the
//! CA must be the same and the names must fit; but the bytes are plain. Disks must exist and are
//! locked as QEMU does, but not read. `tests/real_qemu` runs the same tests against both.
//!
//! # Faults
//!
//! What goes wrong is read again at each point, from the environment (`FAKE_QEMU_FAULTS`, for a
//! script around the program) and from a file that a test may write at any time: the socket's path
//! with `.faults` behind it, and the file that `FAKE_QEMU_FAULTS_FILE` names. Faults are separated
//! by commas, white space or lines:
//!
//! | fault | what happens |
//! |---|---|
//! | `refuse:POINT` | the command is answered with an error; a stage fails |
//! | `stall:POINT` | nothing goes on there (nor in QMP, for a command) until the fault is taken away |
//! | `die:POINT` | the process kills itself there |
//! | `lie:POINT` | the command is answered with success and not carried out; see below for stages |
//! | `silent:qmp` | commands are read and not answered, events not sent |
//! | `silent:in-band` | the same but for what comes out of band, and nothing is carried out: as while a device waits |
//! | `power-off:STAGE`, `panic:STAGE`, `reset:STAGE` | the guest does that there, once |
//! | `sleep:guest` | a guest that runs is said to be suspended, and `cont` changes nothing |
//! | `full:mirror` | there is no room left in a mirror's target |
//! | `vanish:mirror` | no mirror is told of, whatever becomes of it |
//!
//! A point is a QMP command by its name, or a stage: `start`, and of a source `copying`,
//! `pre-switchover`, `device`, `completed`, `settling` (it has failed, and its guest does not run
//! again yet); of a destination `accepted`, `loading`, `loaded`. In post-copy both pass `postcopy`
//! before each piece of memory, and `recovering` when it is taken up again; refused there they give
//! up the connection, and stalled they stay in post-copy. `refuse:userfaultfd` is a destination
//! whose host does not let it receive in post-copy. Of
//! the stages, `lie:completed` makes a source say `completed` without having sent the guest, and
//! `lie:loaded` makes a destination say so as soon as it is connected to. A mirror passes `mirroring` before it copies,
//! `mirror-ready` when it has said that it is ready, and `mirror-end` when it is to end: refused there it fails with an
//! I/O error.
//!
//! # Settings
//!
//! Among the faults, `copying-ms=N` is how long the copying of the memory takes at least (50), `mirroring-ms=N` that of a
//! disk (20), `written-bytes=N` is what the guest has written to each, and
//! `postcopy-ms=N` how long the rest takes in post-copy (50); `dirty-pages-rate=N`,
//! `dirty-sync-count=N` and `throttle=N` are what is reported, and `dirty-rate=N` (MiB/s) what is
//! measured, in `measuring-ms=N` (20). `FAKE_QEMU_VERSION` is `7.2` or `10.0` (default), with
//! the differences that matter. `FAKE_QEMU_WATCH_DIR` names a folder in which each fake holds a lock
//! on the guest's uuid while the guest "runs": one that finds it taken writes a line to
//! `violations` there, which is how a test sees a guest that runs twice. So does one that runs with a disk exported, or
//! leaves with a mirror that was not settled, to which a real one says nothing.

mod commands;
mod disks;
mod faults;
mod incoming;
mod measuring;
mod mirroring;
mod monitor;
mod options;
mod outgoing;
mod receiving;
mod serving;
mod state_file;
mod tls;
mod vm;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use self::faults::Faults;
use self::options::{Invocation, Options};
use self::vm::Vm;

/// The whole program: reads the process's own arguments and runs until it is told to end.
#[must_use]
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let version = Version::from_environment();
    let invocation = match Invocation::parse(&arguments) {
        Ok(invocation) => invocation,
        Err(complaint) => return complain(&complaint),
    };
    if matches!(invocation, Invocation::TellVersion) {
        let (major, minor, micro) = version.number();
        let text = format!("QEMU emulator version {major}.{minor}.{micro} (fake)\n");
        return match std::io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(run(invocation, version)),
        Err(error) => Err(error.to_string()),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(complaint) => complain(&complaint),
    }
}

/// As QEMU does: the program's name, the complaint, status 1.
fn complain(complaint: &str) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "fake-qemu: {complaint}");
    ExitCode::FAILURE
}

async fn run(invocation: Invocation, version: Version) -> Result<(), String> {
    match invocation {
        Invocation::TellVersion => Ok(()),
        Invocation::Probe => {
            let mut options = Options::none();
            options.incoming = true;
            let vm = Arc::new(Vm::new(options, version, Faults::of(None)));
            monitor::serve_standard_streams(&vm).await;
            Ok(())
        }
        Invocation::Run(options) => {
            let faults = Faults::of(options.qmp_socket.as_deref());
            options.check(version)?;
            let vm = Arc::new(Vm::new(*options, version, faults));
            if !vm.options.incoming {
                vm.take_disks()?;
            }
            vm.faults.at("start").await.map_err(|refused| refused.to_string())?;
            monitor::serve_sockets(&vm).await
        }
    }
}

/// Which QEMU is imitated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V7_2,
    V10_0,
}

impl Version {
    fn from_environment() -> Self {
        match std::env::var("FAKE_QEMU_VERSION").as_deref() {
            Ok("7.2") => Self::V7_2,
            _ => Self::V10_0,
        }
    }

    fn number(self) -> (u32, u32, u32) {
        match self {
            Self::V7_2 => (7, 2, 22),
            Self::V10_0 => (10, 0, 2),
        }
    }

    fn machine_types(self) -> &'static [(&'static str, Option<&'static str>)] {
        match self {
            Self::V7_2 => &[("pc-q35-7.2", Some("q35")), ("pc-i440fx-7.2", Some("pc"))],
            Self::V10_0 => &[
                ("pc-q35-7.2", None),
                ("pc-i440fx-7.2", None),
                ("pc-q35-10.0", Some("q35")),
                ("pc-i440fx-10.0", Some("pc")),
            ],
        }
    }
}
