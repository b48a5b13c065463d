//! A VM's serial console: what was written lately, then what is being written, and what is typed.
//!
//! QEMU lets one client at a time onto the console's socket, so all readers of a VM share one connection: a hub, which
//! exists while somebody reads. Each reader first gets the hub's memory of the last [`MEMORY_BYTES`], which begins with
//! the tail of QEMU's own log. A reader that is too slow misses bytes and is told so.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustix::fs::OFlags;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc};
use whimbrel_api::{ApiError, ErrorCode};

use super::running::{RunDir, Spawned};

/// How much of what was written lately a new reader gets, in bytes.
const MEMORY_BYTES: usize = 16 << 10;
/// Largest log of a console, in bytes; beyond it the log begins anew.
const LOG_BYTES_MAX: u64 = 4 << 20;
/// Pieces of output that a slow reader may lag behind.
const PIECES_MAX: usize = 256;
/// Pieces of input that may wait.
const INPUT_PIECES_MAX: usize = 64;
/// Largest piece, in bytes.
const PIECE_BYTES_MAX: usize = 4096;
/// How often a quiet console looks whether it still has readers.
const LOOK_FOR_READERS: Duration = Duration::from_secs(1);
/// How long the console's socket may take to accept, in seconds.
const CONNECT_SECONDS: u64 = 5;

/// Where a console is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub(super) dir: RunDir,
    pub(super) pid: u32,
}

impl Place {
    pub(super) fn of(qemu: &Spawned) -> Self {
        Self { dir: qemu.dir.clone(), pid: qemu.process.identity().pid }
    }

    /// Begins the log anew once it is too large: QEMU appends, so that what comes is kept.
    pub(super) fn bound_log(&self) {
        let bounded = open_log(&self.dir.console_log(), true).and_then(|log| {
            let length = log.metadata()?.len();
            if length > LOG_BYTES_MAX { log.set_len(0) } else { Ok(()) }
        });
        if let Err(error) = bounded {
            tracing::debug!(%error, "the console's log was not bounded");
        }
    }

    /// Connects to QEMU, and makes sure that it is this one.
    async fn connect(&self) -> Result<UnixStream, ApiError> {
        let socket = self.dir.serial_socket();
        let failed = |why: &str| {
            ApiError::new(ErrorCode::Engine, format!("the console cannot be opened: {why}"))
        };
        let connecting = tokio::time::timeout(
            Duration::from_secs(CONNECT_SECONDS),
            UnixStream::connect(&socket),
        );
        let stream = connecting
            .await
            .map_err(|_| failed("QEMU does not accept"))?
            .map_err(|error| failed(&error.to_string()))?;
        // The folder is QEMU's to write: what stands there need not be its own socket.
        let listener = stream.peer_cred().ok().and_then(|peer| peer.pid());
        if listener.and_then(|pid| u32::try_from(pid).ok()) != Some(self.pid) {
            return Err(failed("another process listens in its place"));
        }
        Ok(stream)
    }
}

/// The hubs of a host that exist, by QEMU's process.
#[derive(Debug, Default)]
pub struct Consoles(Mutex<HashMap<u32, Weak<Hub>>>);

impl Consoles {
    /// Opens a console.
    ///
    /// # Errors
    /// `engine` where QEMU's socket cannot be reached, or is not this QEMU's.
    pub(super) async fn open(&self, place: &Place) -> Result<Reader, ApiError> {
        if let Some(reader) = self.find(place).and_then(|hub| hub.reader()) {
            return Ok(reader);
        }
        let stream = place.connect().await?;
        // Somebody else may have been faster; QEMU does not answer a second connection while the first one stands.
        if let Some(reader) = self.find(place).and_then(|hub| hub.reader()) {
            return Ok(reader);
        }
        let hub = Hub::start(place, stream);
        lock(&self.0).insert(place.pid, Arc::downgrade(&hub));
        hub.reader().ok_or_else(|| ApiError::new(ErrorCode::Engine, "the console ended at once"))
    }

    fn find(&self, place: &Place) -> Option<Arc<Hub>> {
        let mut hubs = lock(&self.0);
        hubs.retain(|_, hub| hub.strong_count() > 0);
        hubs.get(&place.pid).and_then(Weak::upgrade)
    }
}

/// One reader of a console.
#[derive(Debug)]
pub struct Reader {
    /// What was written lately.
    pub memory: Vec<u8>,
    output: broadcast::Receiver<Arc<[u8]>>,
    input: mpsc::Sender<Vec<u8>>,
    _hub: Arc<Hub>,
}

impl Reader {
    /// What is written next; `None` when the console has ended. Cancellation safe.
    pub async fn read(&mut self) -> Option<Vec<u8>> {
        match self.output.recv().await {
            Ok(piece) => Some(piece.to_vec()),
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                Some(format!("\r\n[{missed} pieces of output were missed]\r\n").into_bytes())
            }
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }

    /// Types bytes; `false` when the console has ended.
    pub async fn write(&self, bytes: &[u8]) -> bool {
        for piece in bytes.chunks(PIECE_BYTES_MAX) {
            if self.input.send(piece.to_vec()).await.is_err() {
                return false;
            }
        }
        true
    }
}

/// The shared connection to one console; it ends with its last reader, or with QEMU.
#[derive(Debug)]
struct Hub {
    state: Mutex<HubState>,
    input: mpsc::Sender<Vec<u8>>,
}

#[derive(Debug)]
struct HubState {
    memory: VecDeque<u8>,
    /// Gone when QEMU has closed the connection.
    output: Option<broadcast::Sender<Arc<[u8]>>>,
}

impl Hub {
    fn start(place: &Place, stream: UnixStream) -> Arc<Self> {
        let (reading, writing) = stream.into_split();
        let (input, typed) = mpsc::channel(INPUT_PIECES_MAX);
        let (output, _) = broadcast::channel(PIECES_MAX);
        // Read after connecting: what is written in between may come twice, and nothing is missed.
        let memory = log_tail(&place.dir.console_log()).unwrap_or_default().into();
        let state = HubState { memory, output: Some(output) };
        let hub = Arc::new(Self { state: Mutex::new(state), input });
        tokio::spawn(Self::pump(Arc::downgrade(&hub), reading));
        tokio::spawn(type_in(typed, writing));
        hub
    }

    /// Memory and subscription at one moment, so that nothing falls between them.
    fn reader(self: &Arc<Self>) -> Option<Reader> {
        let state = lock(&self.state);
        let output = state.output.as_ref()?.subscribe();
        let memory = state.memory.iter().copied().collect();
        Some(Reader { memory, output, input: self.input.clone(), _hub: Arc::clone(self) })
    }

    async fn pump(hub: Weak<Self>, mut reading: OwnedReadHalf) {
        let mut piece = vec![0; PIECE_BYTES_MAX];
        loop {
            let waiting = tokio::time::timeout(LOOK_FOR_READERS, reading.read(&mut piece));
            // Without readers the connection is given up, and QEMU goes on with its log alone.
            let read = waiting.await;
            let Some(hub) = hub.upgrade() else { return };
            let Ok(read) = read else { continue };
            match read {
                Ok(length) if length > 0 => hub.publish(&piece[..length]),
                _ => {
                    lock(&hub.state).output = None;
                    return;
                }
            }
        }
    }

    fn publish(&self, piece: &[u8]) {
        let mut state = lock(&self.state);
        state.memory.extend(piece);
        let surplus = state.memory.len().saturating_sub(MEMORY_BYTES);
        state.memory.drain(..surplus);
        if let Some(output) = &state.output {
            // Nobody listening is no error.
            let _ = output.send(piece.into());
        }
    }
}

async fn type_in(mut typed: mpsc::Receiver<Vec<u8>>, mut writing: OwnedWriteHalf) {
    while let Some(piece) = typed.recv().await {
        if writing.write_all(&piece).await.is_err() {
            return;
        }
    }
}

/// Opens a console's log, which stands in a folder that QEMU may write to: no link, no pipe, no second name.
fn open_log(path: &Path, write: bool) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let log = File::options()
        .read(true)
        .write(write)
        .custom_flags(i32::try_from(flags.bits()).unwrap_or_default())
        .open(path)?;
    let found = log.metadata()?;
    if found.is_file() && found.nlink() == 1 {
        Ok(log)
    } else {
        Err(io::Error::other("the console's log is not a plain file"))
    }
}

fn log_tail(path: &Path) -> io::Result<Vec<u8>> {
    let mut log = open_log(path, false)?;
    let length = log.metadata()?.len();
    let kept = u64::try_from(MEMORY_BYTES).unwrap_or(u64::MAX);
    log.seek(SeekFrom::Start(length.saturating_sub(kept)))?;
    let mut tail = Vec::new();
    log.take(kept).read_to_end(&mut tail)?;
    Ok(tail)
}

/// Each change under these locks is whole even if a holder panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
