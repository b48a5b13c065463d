//! The two tasks of a session, and the table of commands that wait for their answers.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, broadcast, mpsc, oneshot};
use tokio::task::AbortHandle;

use super::wire::{self, Incoming, Outcome, Priority};
use super::{
    EVENTS_KEPT_MAX, Greeting, IN_BAND_IN_FLIGHT_MAX, LINE_BYTES_MAX, QmpError, SessionEnd,
};
use crate::event::{Event, Events};

/// Lines that may wait for the writer. Callers wait their turn beyond it, within their timeout.
const QUEUED_LINES_MAX: usize = 16;

/// One open session. Dropping it ends both tasks and closes the socket.
#[derive(Debug)]
pub(super) struct Session {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Line>,
    next_id: AtomicU64,
    in_band: Arc<Semaphore>,
    descriptor_turn: Arc<AsyncMutex<()>>,
    reader: AbortHandle,
    writer: AbortHandle,
}

/// What the handle and the tasks share.
#[derive(Debug)]
struct Shared {
    waiting: Mutex<HashMap<u64, Waiting>>,
    events: Mutex<Option<broadcast::Sender<Event>>>,
    end: watch::Sender<Option<SessionEnd>>,
}

/// A command under way. It stays here after its caller has given up, so that QEMU's queue is
/// counted truly.
#[derive(Debug)]
struct Waiting {
    reply: oneshot::Sender<Outcome>,
    _turns: Turns,
}

/// What a command under way occupies.
#[derive(Debug, Default)]
struct Turns {
    _in_band: Option<OwnedSemaphorePermit>,
    _descriptor: Option<OwnedMutexGuard<()>>,
}

/// One line for the writer.
#[derive(Debug)]
struct Line {
    bytes: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

impl Session {
    /// Reads the greeting and starts the tasks.
    pub(super) async fn open(stream: UnixStream) -> Result<(Self, Greeting), SessionEnd> {
        let (read_half, write_half) = stream.into_split();
        let mut reader = BufReader::new(read_half);
        let greeting = wire::greeting(&read_line(&mut reader).await?)?;

        let (events, _) = broadcast::channel(EVENTS_KEPT_MAX);
        let shared = Arc::new(Shared {
            waiting: Mutex::default(),
            events: Mutex::new(Some(events)),
            end: watch::Sender::new(None),
        });
        let (queue, lines) = mpsc::channel(QUEUED_LINES_MAX);
        let reading = tokio::spawn(read_all(reader, Arc::clone(&shared)));
        let writing = tokio::spawn(write_all(write_half, lines, Arc::clone(&shared)));
        let session = Self {
            shared,
            queue,
            next_id: AtomicU64::new(1),
            in_band: Arc::new(Semaphore::new(IN_BAND_IN_FLIGHT_MAX)),
            descriptor_turn: Arc::default(),
            reader: reading.abort_handle(),
            writer: writing.abort_handle(),
        };
        Ok((session, greeting))
    }

    /// Queues one command and waits for its answer, all within `timeout`.
    pub(super) async fn run(
        &self,
        command: &str,
        arguments: Value,
        priority: Priority,
        descriptor: Option<OwnedFd>,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let answered = tokio::time::timeout(timeout, async {
            let turns = self.take_turns(priority, descriptor.is_some()).await;
            let (reply, answer) = oneshot::channel();
            let id = self.next_id.fetch_add(1, Ordering::Relaxed);
            let bytes = wire::command_line(id, command, arguments, priority);
            // A slot in the queue first: nothing awaits between entering the table and the
            // queue, so a command is in both or in neither, wherever the caller gives up.
            let slot = match self.queue.reserve().await {
                Ok(slot) if self.shared.enter(id, Waiting { reply, _turns: turns }) => slot,
                _ => return Err(self.disconnected(command)),
            };
            slot.send(Line { bytes, descriptor });
            answer.await.map_err(|_| self.disconnected(command))
        });
        match answered.await {
            Ok(outcome) => outcome?.of_command(command),
            Err(_) => Err(QmpError::TimedOut { command: command.to_owned(), after: timeout }),
        }
    }

    async fn take_turns(&self, priority: Priority, with_descriptor: bool) -> Turns {
        let mut turns = Turns::default();
        if with_descriptor {
            turns._descriptor = Some(Arc::clone(&self.descriptor_turn).lock_owned().await);
        }
        if priority == Priority::InBand {
            // The semaphore is never closed; an error would only lift the bound.
            turns._in_band = Arc::clone(&self.in_band).acquire_owned().await.ok();
        }
        turns
    }

    fn disconnected(&self, command: &str) -> QmpError {
        let end = self.ended().unwrap_or(SessionEnd::GivenUp);
        QmpError::Disconnected { command: command.to_owned(), end }
    }

    pub(super) fn events(&self) -> Events {
        match &*lock(&self.shared.events) {
            Some(sender) => Events::new(sender.subscribe()),
            // The session is over: a channel without a sender says so to its reader.
            None => Events::new(broadcast::channel(1).1),
        }
    }

    pub(super) fn ended(&self) -> Option<SessionEnd> {
        self.shared.end.borrow().clone()
    }

    pub(super) async fn wait_ended(&self) -> SessionEnd {
        let mut end = self.shared.end.subscribe();
        match end.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or(SessionEnd::GivenUp),
            Err(_) => SessionEnd::GivenUp,
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
        self.shared.finish(SessionEnd::GivenUp);
    }
}

impl Shared {
    /// Puts a command into the table, unless the session is over already.
    fn enter(&self, id: u64, waiting: Waiting) -> bool {
        let mut table = lock(&self.waiting);
        // `finish` sets the end before it empties the table under this lock.
        if self.end.borrow().is_some() {
            return false;
        }
        table.insert(id, waiting);
        true
    }

    fn answer(&self, id: u64, outcome: Outcome) {
        match lock(&self.waiting).remove(&id) {
            // Its caller may have given up: then the answer is dropped here.
            Some(waiting) => drop(waiting.reply.send(outcome)),
            None => tracing::warn!(id, "QEMU answered a command that was not sent"),
        }
    }

    fn publish(&self, event: Event) {
        if let Some(events) = &*lock(&self.events) {
            // Nobody listening is no error.
            let _ = events.send(event);
        }
    }

    /// Ends the session; only the first reason counts.
    fn finish(&self, reason: SessionEnd) {
        self.end.send_if_modified(|end| {
            let first = end.is_none();
            if first {
                *end = Some(reason);
            }
            first
        });
        lock(&self.events).take();
        lock(&self.waiting).clear();
    }
}

/// The tables stay whole even if a holder panicked: every change to them is one call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn read_all(mut reader: BufReader<OwnedReadHalf>, shared: Arc<Shared>) {
    let reason = loop {
        let incoming = match read_line(&mut reader).await {
            Ok(line) => wire::incoming(&line),
            Err(reason) => break reason,
        };
        match incoming {
            Ok(Incoming::Reply { id, outcome }) => shared.answer(id, outcome),
            Ok(Incoming::Event(event)) => {
                tracing::debug!(?event, "event of QEMU");
                shared.publish(event);
            }
            Ok(Incoming::Other(value)) => tracing::warn!(%value, "QEMU sent an unknown object"),
            Err(reason) => break reason,
        }
    };
    tracing::debug!(%reason, "session with QEMU ended");
    shared.finish(reason);
}

/// Reads one line within the bound.
async fn read_line(reader: &mut BufReader<OwnedReadHalf>) -> Result<Vec<u8>, SessionEnd> {
    let mut line = Vec::new();
    let bound = u64::try_from(LINE_BYTES_MAX).unwrap_or(u64::MAX);
    let mut bounded = reader.take(bound);
    match bounded.read_until(b'\n', &mut line).await {
        Err(error) => Err(SessionEnd::Read(Arc::new(error))),
        Ok(_) if line.ends_with(b"\n") => Ok(line),
        Ok(_) if line.len() >= LINE_BYTES_MAX => {
            Err(SessionEnd::LineTooLong { limit_bytes: LINE_BYTES_MAX })
        }
        // The rest of a line that QEMU could not finish says nothing.
        Ok(_) => Err(SessionEnd::ClosedByQemu),
    }
}

/// Writes until the session is over, whoever ended it: QEMU has one session at a time, and greets nobody else while any
/// half of this one is open.
async fn write_all(
    mut write_half: OwnedWriteHalf,
    mut lines: mpsc::Receiver<Line>,
    shared: Arc<Shared>,
) {
    let mut end = shared.end.subscribe();
    let written = async {
        while let Some(line) = lines.recv().await {
            if let Err(error) = write_line(&mut write_half, line).await {
                shared.finish(SessionEnd::Write(Arc::new(error)));
                return;
            }
        }
    };
    tokio::select! {
        () = written => {}
        _ = end.wait_for(Option::is_some) => {}
    }
}

async fn write_line(write_half: &mut OwnedWriteHalf, line: Line) -> io::Result<()> {
    let mut sent = 0;
    if let Some(descriptor) = line.descriptor {
        let stream: &UnixStream = write_half.as_ref();
        sent = stream
            .async_io(Interest::WRITABLE, || {
                send_with_descriptor(stream.as_fd(), &line.bytes, descriptor.as_fd())
            })
            .await?;
    }
    write_half.write_all(line.bytes.get(sent..).unwrap_or_default()).await
}

/// Sends the first bytes of a line together with a descriptor; returns how many were taken.
fn send_with_descriptor(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptor: BorrowedFd<'_>,
) -> io::Result<usize> {
    let descriptors = [descriptor];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no room for a descriptor in the control message"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?)
}
