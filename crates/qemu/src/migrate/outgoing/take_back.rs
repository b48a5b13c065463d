//! Taking a guest back out of post-copy, as long as it has not been handed over.
//!
//! QEMU (7.2.22 and 10.0.2, tried) has no order for this. From the moment that the state has been
//! sent it takes the guest for gone: a cancel is refused (10.0), or ends nothing once the
//! connection is lost (7.2, which stays in `cancelling` for good); `cont` is refused; and if the
//! destination dies, both ways of going on are dead. Yet the source has all of the memory, as it
//! was when the guest stopped, and its devices. What it waits for is a destination that says
//! that it has everything. So it is given one: a stand-in, on a socket of the host, that answers
//! the few questions with which a lost post-copy is taken up again. It says of every page that it
//! has come. QEMU then ends the migration (10.0 as `completed`, 7.2 as `failed`), and `cont` is
//! all that it takes for the guest to run on.
//!
//! ```text
//!   QEMU, a connection that is taken up again      the stand-in
//!   ─────────────────────────────────────────      ────────────
//!   command 10, for each block: its name       ──▶ message 5: the name; which pages have come
//!   command 9: go on                           ──▶ message 6, 4 bytes: 1
//!                                                  message 1, 4 bytes: 0 (nothing more to say)
//!   the end of the stream                      ──▶
//! ```
//!
//! All numbers are big-endian; a command is the byte 8 and, like a message, 2 bytes of what it is
//! and 2 of how long. The pages are one bit each, little-endian, in whole groups of 8 bytes, with
//! their number of bytes before (8 bytes) and a fixed mark behind (8 bytes).

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Gid, Uid, chownat};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::super::settings::set_parameters;
use super::super::{MigrationStatus, Statistics};
use super::{SWITCHOVER_POLL_MILLISECONDS, pause_postcopy};
use crate::machine::{Machine, RunState};
use crate::process::UnprivilegedUser;
use crate::qmp::QmpError;

/// What begins a command in the stream.
const COMMAND: u8 = 8;
/// The commands that come when a connection is taken up again.
const COMMAND_GO_ON: u16 = 9;
const COMMAND_WHICH_PAGES: u16 = 10;
/// The messages that answer them.
const MESSAGE_END: u16 = 1;
const MESSAGE_PAGES: u16 = 5;
const MESSAGE_GOES_ON: u16 = 6;
/// What stands behind the pages.
const PAGES_END_MARK: u64 = 0x0123_4567_89ab_cdef;

/// A page, in bytes, as QEMU counts on x86.
const PAGE_BYTES: u64 = 4096;

/// The largest memory block that is believed in, in bytes (64 TiB).
const BLOCK_BYTES_MAX: u64 = 1 << 46;

/// Why a guest could not be taken back. It is stopped, and nothing is lost: ask again.
#[derive(Debug, thiserror::Error)]
pub enum TakeBackError {
    /// QEMU refused, or can not be asked.
    #[error("the source's QEMU can not be asked to take its guest back")]
    Query(#[source] QmpError),
    /// The migration is not in post-copy: it can be cancelled.
    #[error("there is no post-copy to take a guest back from, but {status:?}")]
    NotPostcopy {
        /// The state.
        status: MigrationStatus,
    },
    /// The socket of the stand-in can not be made.
    #[error("can not listen on {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// It did not come about in time.
    #[error("QEMU did not give the guest back within {} ms", after.as_millis())]
    TookTooLong {
        /// How long.
        after: Duration,
    },
}

/// Ends a post-copy on the source, so that its guest can run on there. **Only for who owns the
/// guest still**: if it has run at the destination, what it did there is undone.
///
/// `socket` is a path in a folder that QEMU (as `user`, if that is not ours) can reach; nothing is
/// left there. On success the migration is over and the guest stopped, as after any other; `cont`
/// lets it run, and it can be migrated again.
///
/// # Errors
///
/// [`TakeBackError`]; the guest is stopped, in post-copy or not. May be called again.
pub async fn take_back(
    machine: &Machine,
    socket: &Path,
    user: Option<UnprivilegedUser>,
    within: Duration,
) -> Result<(), TakeBackError> {
    let late = TakeBackError::TookTooLong { after: within };
    tokio::time::timeout(within, taken_back(machine, socket, user)).await.unwrap_or(Err(late))
}

async fn taken_back(
    machine: &Machine,
    socket: &Path,
    user: Option<UnprivilegedUser>,
) -> Result<(), TakeBackError> {
    if !paused(machine).await? {
        return Ok(());
    }
    let blocks = blocks(machine).await.map_err(TakeBackError::Query)?;
    let stand_in = StandIn::listen(socket, user)
        .map_err(|source| TakeBackError::Listen { path: socket.to_owned(), source })?;
    let mut plain = Map::new();
    for name in ["tls-creds", "tls-hostname"] {
        plain.insert(name.to_owned(), json!(""));
    }
    set_parameters(machine, plain).await.map_err(TakeBackError::Query)?;
    let again = json!({ "uri": format!("unix:{}", socket.display()), "resume": true });
    machine.order("migrate", again).await.map_err(TakeBackError::Query)?;
    tokio::select! {
        over = over(machine) => over,
        // It ends its part before QEMU ends its own.
        never = stand_in.answer(&blocks) => match never {},
    }
}

/// Sees to it that post-copy is paused; tells if it is over already.
async fn paused(machine: &Machine) -> Result<bool, TakeBackError> {
    loop {
        let status = status(machine).await?;
        match status {
            MigrationStatus::PostcopyPaused => return Ok(true),
            MigrationStatus::PostcopyActive
            | MigrationStatus::PostcopyRecover
            | MigrationStatus::PostcopyRecoverSetup => match pause_postcopy(machine).await {
                // A refusal means that it has gone on to another state meanwhile.
                Ok(()) | Err(QmpError::Refused { .. }) => {}
                Err(error) => return Err(TakeBackError::Query(error)),
            },
            MigrationStatus::Completed | MigrationStatus::Failed | MigrationStatus::Cancelled => {
                over(machine).await?;
                return Ok(false);
            }
            status => return Err(TakeBackError::NotPostcopy { status }),
        }
        moment().await;
    }
}

/// Waits until QEMU has ended the migration.
async fn over(machine: &Machine) -> Result<(), TakeBackError> {
    loop {
        let status = status(machine).await?;
        if matches!(
            status,
            MigrationStatus::Completed | MigrationStatus::Failed | MigrationStatus::Cancelled
        ) {
            let status = machine.status().await.map_err(TakeBackError::Query)?;
            if status.run_state != RunState::FinishMigrate {
                return Ok(());
            }
        }
        moment().await;
    }
}

async fn status(machine: &Machine) -> Result<MigrationStatus, TakeBackError> {
    let statistics = Statistics::query(machine.qmp()).await.map_err(TakeBackError::Query)?;
    Ok(statistics.status)
}

async fn moment() {
    tokio::time::sleep(Duration::from_millis(SWITCHOVER_POLL_MILLISECONDS)).await;
}

/// The memory blocks by their names, with their sizes in use. QEMU tells them only as a table for
/// people.
async fn blocks(machine: &Machine) -> Result<BTreeMap<String, u64>, QmpError> {
    const COMMAND: &str = "x-query-ramblock";
    let answer = machine.qmp().execute(COMMAND, Value::Null).await?;
    let table = answer.get("human-readable-text").and_then(Value::as_str);
    let table = table.ok_or_else(|| QmpError::malformed(COMMAND, "no table"))?;
    Ok(table.lines().filter_map(block).collect())
}

/// One line: name, page size in two words, offset, size in use, size at most.
fn block(line: &str) -> Option<(String, u64)> {
    let mut columns = line.split_ascii_whitespace();
    let name = columns.next()?;
    let used = columns.nth(3)?.strip_prefix("0x")?;
    Some((name.to_owned(), u64::from_str_radix(used, 16).ok()?))
}

/// What QEMU takes for a destination that has everything. Its socket goes with it.
struct StandIn {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for StandIn {
    fn drop(&mut self) {
        // It was ours a moment ago; one that is gone is what is wanted.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl StandIn {
    fn listen(path: &Path, user: Option<UnprivilegedUser>) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let stand_in = Self { listener: UnixListener::bind(path)?, path: path.to_owned() };
        if let Some(user) = user {
            // The folder may be QEMU's: no link that it put there meanwhile is followed.
            let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
            chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(stand_in)
    }

    /// Answers until it is dropped. The first connection is the one that matters; with preemption
    /// there is a second, on which nothing comes.
    async fn answer(&self, blocks: &BTreeMap<String, u64>) -> std::convert::Infallible {
        let mut first = true;
        let mut idle = Vec::new();
        loop {
            let Ok((stream, _)) = self.listener.accept().await else {
                moment().await;
                continue;
            };
            if !std::mem::take(&mut first) {
                idle.push(stream);
                continue;
            }
            let mut stream = stream;
            if let Err(error) = converse(&mut stream, blocks).await {
                // QEMU's next state tells what became of it.
                tracing::debug!(%error, "the stand-in was left alone");
            }
            idle.push(stream);
        }
    }
}

/// The whole conversation on one connection.
async fn converse(stream: &mut UnixStream, blocks: &BTreeMap<String, u64>) -> io::Result<()> {
    loop {
        if stream.read_u8().await? != COMMAND {
            return Err(io::Error::other("something else than a command"));
        }
        let command = stream.read_u16().await?;
        let mut about = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut about).await?;
        match command {
            COMMAND_WHICH_PAGES => {
                let name = about.get(1..).map(String::from_utf8_lossy).unwrap_or_default();
                let bytes = blocks.get(name.as_ref()).copied();
                let bytes = bytes.filter(|bytes| *bytes <= BLOCK_BYTES_MAX);
                let bytes = bytes.ok_or_else(|| io::Error::other("a block that nobody knows"))?;
                stream.write_all(&all_pages(&about, bytes)).await?;
            }
            COMMAND_GO_ON => break,
            _ => return Err(io::Error::other("another command")),
        }
    }
    let mut last = message(MESSAGE_GOES_ON, &1_u32.to_be_bytes());
    last.extend(message(MESSAGE_END, &0_u32.to_be_bytes()));
    stream.write_all(&last).await?;
    // What comes now is the end of the stream; read, so that QEMU can write it.
    let mut rest = [0; 4096];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

fn message(kind: u16, about: &[u8]) -> Vec<u8> {
    let length = u16::try_from(about.len()).unwrap_or(u16::MAX);
    [&kind.to_be_bytes(), &length.to_be_bytes(), about].concat()
}

/// The answer that all pages of a block have come.
fn all_pages(name: &[u8], bytes: u64) -> Vec<u8> {
    let pages = bytes.div_ceil(PAGE_BYTES);
    let groups = pages.div_ceil(64);
    let mut answer = message(MESSAGE_PAGES, name);
    answer.extend((groups * 8).to_be_bytes());
    for group in 0..groups {
        let left = pages - group * 64;
        let bits = if left >= 64 { u64::MAX } else { (1 << left) - 1 };
        answer.extend(bits.to_le_bytes());
    }
    answer.extend(PAGES_END_MARK.to_be_bytes());
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_blocks_is_read() {
        let line = "    /rom@etc/acpi/tables    4 KiB  0x00000000040c0000 0x0000000000020000 \
                    0x0000000000200000 0x00007f4631200000  ro";
        assert_eq!(block(line), Some(("/rom@etc/acpi/tables".to_owned(), 0x2_0000)));
        assert_eq!(block("   Block Name    PSize    Offset     Used     Total"), None);
        assert_eq!(block(""), None);
    }

    #[test]
    fn every_page_is_said_to_have_come_and_no_other() {
        let answer = all_pages(b"\x04ram0", 66 * PAGE_BYTES);
        let expected = [
            &[0, 5, 0, 5][..],
            b"\x04ram0",
            &[0, 0, 0, 0, 0, 0, 0, 16],
            &[0xff; 8],
            &[3, 0, 0, 0, 0, 0, 0, 0],
            &[0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef],
        ]
        .concat();
        assert_eq!(answer, expected);
        assert_eq!(all_pages(b"\x01a", 1)[14..22], [1, 0, 0, 0, 0, 0, 0, 0]);
    }
}
