//! The probe: asks a guest over the network, all the time, whether it is there, and remembers when it was not.
//!
//! A datagram every millisecond to the guest's echo port, and a TCP stream of numbers that the guest checks and sends
//! back. It runs as threads whose sockets are in the client's namespace, so it can watch a guest across any number of
//! migrations; [`Probe::take`] gives what it saw since the last time.
//!
//! The probe cannot see better than the machine lets it run: its own longest pause is reported beside the guest's.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use whimbrel_guest::report::{ECHO_PORT, STREAM_PORT};

use crate::witness::CONNECT_MAX;

/// A datagram is sent this often.
pub const DATAGRAM_PERIOD: Duration = Duration::from_millis(1);
/// Its number and its time.
const DATAGRAM_BYTES: usize = 16;
/// A piece of the stream is sent this often.
const PIECE_PERIOD: Duration = Duration::from_millis(5);
/// The 8-byte numbers in a piece: 1 KiB, so 200 KiB/s.
const PIECE_NUMBERS: u64 = 128;
/// How long echoes that are under way are waited for at the end.
const LAST_ECHOES: Duration = Duration::from_millis(300);
/// A stream that stands still longer than this is broken.
const STALL_MAX: Duration = Duration::from_secs(30);
/// The probe's threads go before everything else (-20 to 19, 0 is usual): they do little, and measure waiting.
const PRIORITY: i32 = -20;
/// A silence of the guest is kept in the list of gaps if it is at least this long.
const GAP_MIN: Duration = Duration::from_millis(5);
/// How long after a gap a loss is still its own.
const GAP_TAIL: Duration = Duration::from_millis(20);
/// The gaps that are kept of one stretch of time; of more, the longest.
const GAPS_MAX: usize = 32;
/// How often a thread that waits looks whether it is to stop.
const STOP_POLL: Duration = Duration::from_millis(50);

/// What the probe saw in a stretch of time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeReport {
    /// The stretch of time.
    pub watched_ms: f64,
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams that came back; each once.
    pub received: u64,
    /// Datagrams that did not come back though a later one did, or that were waited for in vain at the end.
    pub lost: u64,
    /// The longest time between two echoes.
    pub longest_gap_ms: f64,
    /// The silences that are worth a look, in their order; of very many, the longest.
    #[serde(default)]
    pub gaps: Vec<Gap>,
    /// The longest time between two datagrams that the probe itself managed to send: what it could not see.
    pub own_longest_gap_ms: f64,
    /// The longest time from a datagram to its echo.
    pub longest_round_trip_ms: f64,
    /// Whether the stream has never broken, and brought all bytes in order.
    pub stream_unbroken: bool,
    /// What broke it.
    pub stream_error: Option<String>,
    /// Bytes of the stream that came back as they were sent.
    pub stream_bytes: u64,
    /// The longest time in which no byte of the stream came back.
    pub stream_longest_stall_ms: f64,
}

/// A time in which nothing was heard of the guest.
///
/// It is longer than the guest's pause: what was sent after the guest ran again waits until it answers. So the datagrams
/// *lost* tell how long nobody was there, and the gap how long nobody answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gap {
    /// The last echo before it: microseconds since 1970 by this machine's clock.
    pub began_us: u64,
    /// From that echo to the next.
    pub ms: f64,
    /// Datagrams that were lost in it.
    pub lost: u64,
}

impl Gap {
    /// Whether a moment, in microseconds since 1970, lies in it.
    #[must_use]
    pub fn holds(&self, at_us: u64) -> bool {
        let length_us = (self.ms * 1e3) as u64;
        (self.began_us..=self.began_us.saturating_add(length_us)).contains(&at_us)
    }
}

/// A running probe; it ends when it is dropped.
#[derive(Debug)]
pub struct Probe {
    shared: Arc<Shared>,
    stream: TcpStream,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    seen: Mutex<Seen>,
}

/// What was seen since the last report.
#[derive(Debug)]
struct Seen {
    since: Instant,
    sent: u64,
    received: u64,
    lost: u64,
    /// The number of the next datagram; outlives reports, as does the next one.
    next_sent: u64,
    /// The number of the datagram whose echo comes next if none is lost.
    next_echo: u64,
    last_sent: Instant,
    last_echo: Instant,
    longest_gap: Duration,
    gaps: Vec<Gap>,
    /// When the last of them ended.
    gap_ended: Option<Instant>,
    own_longest_gap: Duration,
    longest_round_trip: Duration,
    stream_bytes: u64,
    last_piece: Instant,
    longest_stall: Duration,
    /// Outlives reports: a broken stream stays broken.
    stream_error: Option<String>,
}

impl Probe {
    /// Begins to watch a guest, from the network namespace of this thread.
    pub(crate) fn start(guest: Ipv4Addr) -> io::Result<Self> {
        Self::start_at((guest, ECHO_PORT).into(), (guest, STREAM_PORT).into())
    }

    fn start_at(echo: SocketAddr, stream: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&stream, CONNECT_MAX)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(STOP_POLL))?;
        stream.set_write_timeout(Some(STALL_MAX))?;
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(echo)?;
        socket.set_read_timeout(Some(STOP_POLL))?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            seen: Mutex::new(Seen::from(Instant::now())),
        });
        let (echoes, writer, reader) =
            (socket.try_clone()?, stream.try_clone()?, stream.try_clone()?);
        let began = Instant::now();
        let threads = vec![
            spawn(&shared, move |shared| shared.send_datagrams(&socket, began)),
            spawn(&shared, move |shared| shared.receive_echoes(&echoes, began)),
            spawn(&shared, move |shared| shared.judge_stream(shared.write_stream(writer))),
            spawn(&shared, move |shared| shared.judge_stream(shared.read_stream(reader))),
        ];
        Ok(Self { shared, stream, threads })
    }

    /// What was seen since the start or the last call. A gap that is still open is counted as long as it is by now.
    #[must_use]
    pub fn take(&self) -> ProbeReport {
        let now = Instant::now();
        let mut seen = self.shared.lock();
        let report = seen.report(now);
        let fresh = Seen {
            next_sent: seen.next_sent,
            next_echo: seen.next_echo,
            last_sent: seen.last_sent,
            last_echo: seen.last_echo,
            last_piece: seen.last_piece,
            stream_error: seen.stream_error.take(),
            ..Seen::from(now)
        };
        *seen = fresh;
        report
    }

    /// Ends the probe, and returns what was seen since the last [`Probe::take`]; the last echoes are waited for.
    #[must_use]
    pub fn finish(mut self) -> ProbeReport {
        let stopped = Instant::now();
        self.shared.stop.store(true, Ordering::Relaxed);
        thread::sleep(LAST_ECHOES);
        self.end();
        let mut seen = self.shared.lock();
        seen.lost += seen.next_sent - seen.next_echo;
        seen.report(stopped)
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // A closed stream wakes its reader; it may be closed already.
        let _closed = self.stream.shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing to report.
            let _panicked = thread.join();
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.end();
    }
}

fn spawn(shared: &Arc<Shared>, work: impl FnOnce(&Shared) + Send + 'static) -> JoinHandle<()> {
    let shared = Arc::clone(shared);
    thread::spawn(move || {
        // On Linux this is the priority of the calling thread alone. Without the right to it, the probe sees less well, and
        // says how well.
        let _refused = rustix::process::setpriority_process(None, PRIORITY);
        work(&shared);
    })
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// A datagram is its number, and the time at which it was sent in nanoseconds since the probe began.
    fn send_datagrams(&self, socket: &UdpSocket, began: Instant) {
        let mut due = Instant::now();
        while !self.stopping() {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let now = Instant::now();
            // After a pause of its own the probe goes on at its pace, not with a burst.
            due = (due + DATAGRAM_PERIOD).max(now);
            let number = self.count_datagram(now);
            let mut datagram = [0; DATAGRAM_BYTES];
            datagram[..8].copy_from_slice(&number.to_le_bytes());
            datagram[8..]
                .copy_from_slice(&(now.duration_since(began).as_nanos() as u64).to_le_bytes());
            // A refused datagram (the guest's port is closed for the moment) is as lost as any other.
            let _refused = socket.send(&datagram);
        }
    }

    fn count_datagram(&self, now: Instant) -> u64 {
        let mut seen = self.lock();
        let number = seen.next_sent;
        seen.next_sent += 1;
        seen.sent += 1;
        seen.own_longest_gap = seen.own_longest_gap.max(now.duration_since(seen.last_sent));
        seen.last_sent = now;
        number
    }

    /// Goes on for a while after the probe was stopped, for the echoes that are under way.
    fn receive_echoes(&self, socket: &UdpSocket, began: Instant) {
        let mut stopped: Option<Instant> = None;
        while stopped.is_none_or(|stopped| stopped.elapsed() < LAST_ECHOES) {
            if self.stopping() {
                stopped.get_or_insert_with(Instant::now);
            }
            let mut echo = [0; DATAGRAM_BYTES];
            if let Ok(DATAGRAM_BYTES) = socket.recv(&mut echo) {
                self.count_echo(echo, began);
            }
        }
    }

    fn count_echo(&self, echo: [u8; DATAGRAM_BYTES], began: Instant) {
        let now = Instant::now();
        let half = |at: usize| u64::from_le_bytes(std::array::from_fn(|index| echo[at + index]));
        let mut seen = self.lock();
        // A copy of an echo, or one that was overtaken, is no news of the guest.
        if half(0) < seen.next_echo {
            return;
        }
        let lost = half(0) - seen.next_echo;
        seen.lost += lost;
        seen.next_echo = half(0) + 1;
        seen.received += 1;
        seen.note_gap(now, lost);
        seen.last_echo = now;
        let round_trip = now.duration_since(began).saturating_sub(Duration::from_nanos(half(8)));
        seen.longest_round_trip = seen.longest_round_trip.max(round_trip);
    }

    fn write_stream(&self, mut stream: TcpStream) -> io::Result<()> {
        let mut next = 0;
        while !self.stopping() {
            let piece: Vec<u8> = (next..next + PIECE_NUMBERS).flat_map(u64::to_le_bytes).collect();
            stream.write_all(&piece)?;
            next += PIECE_NUMBERS;
            thread::sleep(PIECE_PERIOD);
        }
        Ok(())
    }

    fn read_stream(&self, mut stream: TcpStream) -> io::Result<()> {
        let mut buffer = vec![0; 16 * 1024];
        let mut position = 0;
        while !self.stopping() {
            let length = match stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.lock().last_piece.elapsed() > STALL_MAX {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            if !is_stream(position, &buffer[..length]) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "other bytes came back than were sent",
                ));
            }
            position += length as u64;
            let now = Instant::now();
            let mut seen = self.lock();
            seen.stream_bytes += length as u64;
            seen.longest_stall = seen.longest_stall.max(now.duration_since(seen.last_piece));
            seen.last_piece = now;
        }
        Ok(())
    }

    /// Keeps the first error, unless the stream was being closed.
    fn judge_stream(&self, ended: io::Result<()>) {
        if let (Err(error), false) = (ended, self.stopping()) {
            self.lock().stream_error.get_or_insert(error.to_string());
        }
    }
}

/// Whether bytes at a position are those of the numbers 0, 1, 2, …
fn is_stream(position: u64, bytes: &[u8]) -> bool {
    bytes.iter().enumerate().all(|(index, byte)| {
        let at = position + index as u64;
        *byte == (at / 8).to_le_bytes()[(at % 8) as usize]
    })
}

impl Seen {
    fn from(now: Instant) -> Self {
        Self {
            since: now,
            sent: 0,
            received: 0,
            lost: 0,
            next_sent: 0,
            next_echo: 0,
            last_sent: now,
            last_echo: now,
            longest_gap: Duration::ZERO,
            gaps: Vec::new(),
            gap_ended: None,
            own_longest_gap: Duration::ZERO,
            longest_round_trip: Duration::ZERO,
            stream_bytes: 0,
            last_piece: now,
            longest_stall: Duration::ZERO,
            stream_error: None,
        }
    }

    /// The silence that ends now.
    fn note_gap(&mut self, now: Instant, lost: u64) {
        let length = now.duration_since(self.last_echo);
        self.longest_gap = self.longest_gap.max(length);
        if length < GAP_MIN {
            // The last datagram that the guest had taken before it stood still is answered first, and then comes the loss.
            let soon = self.gap_ended.is_some_and(|ended| now.duration_since(ended) <= GAP_TAIL);
            if let Some(gap) = self.gaps.last_mut().filter(|_| soon) {
                gap.lost += lost;
            }
            return;
        }
        self.gap_ended = Some(now);
        let ended = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let began_us = ended.saturating_sub(length).as_micros() as u64;
        self.gaps.push(Gap { began_us, ms: length.as_secs_f64() * 1000.0, lost });
        if self.gaps.len() > GAPS_MAX {
            let shortest =
                self.gaps.iter().enumerate().min_by(|(_, a), (_, b)| a.ms.total_cmp(&b.ms));
            if let Some((index, _)) = shortest {
                self.gaps.remove(index);
            }
        }
    }

    fn report(&self, until: Instant) -> ProbeReport {
        let ms = |duration: Duration| duration.as_secs_f64() * 1000.0;
        let open = |last: Instant| until.saturating_duration_since(last);
        ProbeReport {
            watched_ms: ms(open(self.since)),
            sent: self.sent,
            received: self.received,
            lost: self.lost,
            longest_gap_ms: ms(self.longest_gap.max(open(self.last_echo))),
            gaps: self.gaps.clone(),
            own_longest_gap_ms: ms(self.own_longest_gap.max(open(self.last_sent))),
            longest_round_trip_ms: ms(self.longest_round_trip),
            stream_unbroken: self.stream_error.is_none(),
            stream_error: self.stream_error.clone(),
            stream_bytes: self.stream_bytes,
            stream_longest_stall_ms: ms(self.longest_stall.max(open(self.last_piece))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest on the loopback interface: what a test drops or breaks, the probe must see.
    struct Guest {
        echo: UdpSocket,
        listener: std::net::TcpListener,
    }

    impl Guest {
        fn new() -> Self {
            let echo = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            Self { echo, listener }
        }

        fn probe(&self) -> (Probe, TcpStream) {
            let (echo, stream) =
                (self.echo.local_addr().unwrap(), self.listener.local_addr().unwrap());
            let probe = Probe::start_at(echo, stream).unwrap();
            (probe, self.listener.accept().unwrap().0)
        }

        /// Echoes `count` datagrams of which the `dropped`th are swallowed.
        fn echo(&self, count: u64, dropped: std::ops::Range<u64>) {
            for number in 0..count {
                let mut datagram = [0; 64];
                let (length, from) = self.echo.recv_from(&mut datagram).unwrap();
                if !dropped.contains(&number) {
                    self.echo.send_to(&datagram[..length], from).unwrap();
                }
            }
        }
    }

    fn wait_until(happened: impl Fn() -> bool) {
        let began = Instant::now();
        while !happened() {
            assert!(began.elapsed() < Duration::from_secs(20), "it never happened");
            thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn counts_exactly_the_datagrams_that_are_lost() {
        let guest = Guest::new();
        let (probe, _stream) = guest.probe();
        guest.echo(100, 40..70);
        wait_until(|| probe.shared.lock().received == 70);
        let report = probe.take();
        assert_eq!((report.received, report.lost), (70, 30));
        assert!(report.longest_gap_ms >= 29.0, "{report:?}");
        let gap = report.gaps.iter().max_by_key(|gap| gap.lost).unwrap();
        assert_eq!(gap.lost, 30);
        assert!(gap.holds(gap.began_us + 10_000) && !gap.holds(gap.began_us - 1), "{gap:?}");
        guest.echo(50, 0..0);
        wait_until(|| probe.shared.lock().received == 50);
        assert_eq!(probe.take().lost, 0, "what was reported once is not reported again");
    }

    #[test]
    fn a_guest_that_never_comes_back_is_seen() {
        let guest = Guest::new();
        let (probe, _stream) = guest.probe();
        guest.echo(10, 0..0);
        wait_until(|| probe.shared.lock().sent >= 60);
        let report = probe.finish();
        assert!(report.lost >= 50 && report.longest_gap_ms >= 45.0, "{report:?}");
    }

    #[test]
    fn a_stream_of_other_bytes_is_broken_for_ever() {
        let guest = Guest::new();
        let (probe, mut stream) = guest.probe();
        let mut piece = [0; 1024];
        stream.read_exact(&mut piece).unwrap();
        stream.write_all(&piece).unwrap();
        wait_until(|| probe.shared.lock().stream_bytes == 1024);
        assert!(probe.take().stream_unbroken);
        stream.write_all(&piece).unwrap();
        wait_until(|| probe.shared.lock().stream_error.is_some());
        assert!(!probe.take().stream_unbroken && !probe.take().stream_unbroken);
    }

    #[test]
    fn a_closed_stream_is_broken() {
        let guest = Guest::new();
        let (probe, stream) = guest.probe();
        drop(stream);
        wait_until(|| probe.shared.lock().stream_error.is_some());
        assert!(!probe.finish().stream_unbroken);
    }
}
