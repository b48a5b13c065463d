//! The TCP sockets of a QEMU, seen, tuned and cut from outside: for what it can not be asked.
//!
//! While QEMU (7.2, 10.0) waits for its peer's part of a TLS handshake, or writes the last of a
//! guest to a peer that does not read, it does nothing else: no command is answered, and its guest
//! stands still as soon as it needs a device. `yank` is answered out of band, and does not reach a
//! connection whose handshake is not over. Linux can shut a connection down from outside
//! (`pidfd_getfd`, 5.6); QEMU then fails the migration within milliseconds, as with a lost network.
//! A cancel of 7.2 that waits for a connection to come about is ended by it, too.
//!
//! The same way leads to what QEMU sets no option for: how much may wait in a connection that has not
//! been sent. A stream that is faster than the link fills Linux's send buffer with several megabytes, and
//! QEMU takes these for sent: on 1 Gbit/s the guest stood still for 20 ms until they were gone.
//!
//! `/proc/PID/fd` names a process's sockets by inode. `/proc/PID/net/tcp` has all of its network
//! namespace: the second and third columns are the local and the remote `address:port` in
//! hexadecimal, the fourth the state, the tenth the inode.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use nix::sys::socket::SetSockOpt as _;
use nix::{setsockopt_impl, sockopt_impl};
use rustix::fs::fstat;
use rustix::net::Shutdown;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use super::Process;

/// The state of a socket that listens.
const LISTEN: &str = "0A";

sockopt_impl!(
    /// How many bytes may wait in a connection before they are sent (tcp(7); Linux 3.12).
    NotSentLowWater,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_NOTSENT_LOWAT,
    u32
);

/// One line of the kernel's table.
struct Connection {
    local_port: u16,
    remote_port: u16,
    listens: bool,
    inode: u64,
}

impl Process {
    /// Whether it listens on any TCP port.
    ///
    /// # Errors
    ///
    /// Where the kernel does not tell; also when the process has ended.
    pub fn listens(&self) -> io::Result<bool> {
        Ok(self.listening_port()?.is_some())
    }

    /// A TCP port that it listens on; of several, any.
    ///
    /// # Errors
    ///
    /// As [`Process::listens`].
    pub fn listening_port(&self) -> io::Result<Option<u16>> {
        let table = table(self.identity.pid)?;
        let own = sockets(self.identity.pid)?;
        let listens = |connection: &&Connection| {
            connection.listens && own.iter().any(|(_, inode)| *inode == connection.inode)
        };
        Ok(table.iter().find(listens).map(|connection| connection.local_port))
    }

    /// Shuts down its TCP connections to a remote port, those that are still being made included;
    /// tells how many there were.
    ///
    /// # Errors
    ///
    /// Where the kernel does not tell or not allow it; some may have been shut down.
    pub fn cut(&self, remote_port: u16) -> io::Result<usize> {
        let connections = self.connections_to(remote_port)?;
        for socket in &connections {
            match rustix::net::shutdown(socket, Shutdown::Both) {
                Ok(()) | Err(rustix::io::Errno::NOTCONN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(connections.len())
    }

    /// Lets no more than about so many bytes wait in each of its TCP connections to a remote port that have
    /// not been sent; tells how many connections there were. What is sent and not acknowledged is not counted,
    /// so a long way is filled as before.
    ///
    /// # Errors
    ///
    /// As [`Process::cut`].
    pub fn shorten_queues(&self, remote_port: u16, bytes: u32) -> io::Result<usize> {
        let connections = self.connections_to(remote_port)?;
        for socket in &connections {
            NotSentLowWater.set(socket, &bytes)?;
        }
        Ok(connections.len())
    }

    /// Its TCP connections to a remote port, those that are still being made included.
    fn connections_to(&self, remote_port: u16) -> io::Result<Vec<OwnedFd>> {
        let table = table(self.identity.pid)?;
        let mut connections = Vec::new();
        for (number, inode) in sockets(self.identity.pid)? {
            let is_it = |connection: &Connection| {
                connection.inode == inode
                    && connection.remote_port == remote_port
                    && !connection.listens
            };
            if !table.iter().any(is_it) {
                continue;
            }
            let socket = pidfd_getfd(&self.pidfd, number, PidfdGetfdFlags::empty())?;
            // The number may have been given again meanwhile.
            if fstat(&socket)?.st_ino == inode {
                connections.push(socket);
            }
        }
        Ok(connections)
    }
}

/// Its sockets, each with its number and its inode.
fn sockets(pid: u32) -> io::Result<Vec<(RawFd, u64)>> {
    let mut sockets = Vec::new();
    for descriptor in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let descriptor = descriptor?;
        // One that was closed meanwhile is of no interest.
        let Ok(target) = std::fs::read_link(descriptor.path()) else { continue };
        let inode = target
            .to_str()
            .and_then(|name| name.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        let number = descriptor.file_name().to_str().and_then(|name| name.parse().ok());
        sockets.extend(number.zip(inode));
    }
    Ok(sockets)
}

fn table(pid: u32) -> io::Result<Vec<Connection>> {
    let mut text = std::fs::read_to_string(format!("/proc/{pid}/net/tcp"))?;
    // Not there where the machine has no IPv6.
    text.push_str(&std::fs::read_to_string(format!("/proc/{pid}/net/tcp6")).unwrap_or_default());
    Ok(text.lines().filter_map(connection).collect())
}

/// `None` for the heading.
fn connection(line: &str) -> Option<Connection> {
    let mut columns = line.split_ascii_whitespace().skip(1);
    let mut port = || {
        let (_, port) = columns.next()?.rsplit_once(':')?;
        u16::from_str_radix(port, 16).ok()
    };
    let (local_port, remote_port) = (port()?, port()?);
    let state = columns.next()?;
    Some(Connection {
        local_port,
        remote_port,
        listens: state == LISTEN,
        inode: columns.nth(5)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::path::Path;

    use super::super::ProcessIdentity;
    use super::*;

    fn this_process() -> Process {
        let identity = ProcessIdentity::of(std::process::id()).unwrap();
        Process::adopt(&identity, Path::new("/nonexistent")).unwrap()
    }

    #[tokio::test]
    async fn what_listens_is_seen_and_a_connection_is_cut() {
        let own = this_process();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(own.listening_port().unwrap(), Some(port));
        let mut near = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let mut far = listener.accept().unwrap().0;
        assert_eq!(own.cut(1).unwrap(), 0);
        assert_eq!(own.cut(port).unwrap(), 1);
        assert_eq!(near.read(&mut [0]).unwrap(), 0);
        assert_eq!(far.read(&mut [0]).unwrap(), 0);
        assert!(own.listens().unwrap(), "what listens stays");
    }

    #[tokio::test]
    async fn a_short_queue_takes_less_than_linux_would() {
        let own = this_process();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut taken = [0, 0];
        for (short, taken) in [false, true].into_iter().zip(&mut taken) {
            let mut near = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let _reads_nothing = listener.accept().unwrap().0;
            if short {
                assert_eq!(own.shorten_queues(port, 4096).unwrap(), 1);
            }
            near.set_nonblocking(true).unwrap();
            while let Ok(bytes) = near.write(&[0; 4096]) {
                *taken += bytes;
            }
        }
        assert!(taken[1] < taken[0], "{taken:?}");
    }

    #[tokio::test]
    async fn a_listener_is_its_own_process_alone() {
        let _listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut command = std::process::Command::new("cat");
        let mut other = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
        let identity = ProcessIdentity::of(other.id()).unwrap();
        let process = Process::adopt(&identity, Path::new("/nonexistent")).unwrap();
        assert!(!process.listens().unwrap());
        drop(other.stdin.take());
        other.wait().unwrap();
        assert!(process.listens().is_err(), "nobody knows of a process that is gone");
    }
}
