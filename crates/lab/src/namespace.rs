//! Network namespaces that are kept by a bind mount in the lab's own folder.
//!
//! Not `ip netns`: its names are the whole machine's, and the first one mounts a folder that no `ip netns` removes again.
//! Here the file that a namespace is bound to exists before the namespace does, so whatever a killed `lab up` left behind
//! is found by looking into the lab's folder.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, statfs};

/// Mounts that may lie over one another on a namespace's file before removing it gives up.
const MOUNTS_MAX: usize = 8;

/// A namespace that exists, or existed.
#[derive(Clone, Debug)]
pub(crate) struct Namespace {
    path: PathBuf,
}

/// What tells one namespace from another while it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct NamespaceId {
    device: u64,
    inode: u64,
}

impl Namespace {
    /// The namespace that is bound to a file, if there is one.
    pub(crate) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the namespace, with its loopback interface on and IPv6 off: nothing in a lab uses IPv6, and its
    /// announcements and address checks would be noise on links that are measured.
    pub(crate) fn create(&self) -> io::Result<()> {
        File::create_new(&self.path)?;
        in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let own = "/proc/thread-self/ns/net";
            mount(Some(own), &self.path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            for which in ["all", "default"] {
                let switch = PathBuf::from(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"));
                // A kernel without IPv6 has nothing to switch off.
                if switch.exists() {
                    fs::write(switch, "1")?;
                }
            }
            Ok(())
        })
    }

    /// Runs something in the namespace, in a thread of its own: sockets and processes that it makes stay there.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let file = File::open(&self.path)?;
        in_thread(|| {
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        })
    }

    /// What the namespace is known as to the kernel; none if it does not exist (any more).
    pub(crate) fn id(&self) -> Option<NamespaceId> {
        if statfs(&self.path).ok()?.filesystem_type() != NSFS_MAGIC {
            return None;
        }
        NamespaceId::of(&self.path).ok()
    }

    /// Lets go of the namespace; the kernel removes it, and all links in it, once no process is in it.
    pub(crate) fn remove(&self) -> io::Result<()> {
        for _ in 0..MOUNTS_MAX {
            if self.id().is_none() {
                break;
            }
            umount2(&self.path, MntFlags::MNT_DETACH)?;
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

impl NamespaceId {
    /// The namespace behind a file, such as a process's `/proc/PID/ns/net`.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self { device: metadata.dev(), inode: metadata.ino() })
    }
}

/// A thread that changes its namespace cannot always change back, so it ends with its work.
fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
}
