//! What the probe talks to: a UDP echo, and a TCP stream of numbers that is checked and sent back.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::report::{ECHO_PORT, NetReport, STREAM_PORT};

/// Streams served at once; more are closed at once.
const STREAMS_MAX: usize = 8;
/// Bytes of a stream that are read in one go.
const STREAM_BUFFER_BYTES: usize = 16 * 1024;
/// The largest datagram that is echoed.
const DATAGRAM_BYTES_MAX: usize = 2048;
/// The pause after a socket failed, so that a lasting failure does not eat the processor.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// What was seen of the network.
#[derive(Default)]
pub(crate) struct Net {
    echoed: AtomicU64,
    stream_bytes: AtomicU64,
    stream_mismatches: AtomicU64,
    streams: AtomicUsize,
}

impl Net {
    /// Echoes datagrams; never returns.
    pub(crate) fn keep_echoing(&self, socket: &UdpSocket) -> ! {
        let mut datagram = [0; DATAGRAM_BYTES_MAX];
        loop {
            let echoed = socket
                .recv_from(&mut datagram)
                .and_then(|(length, from)| socket.send_to(&datagram[..length], from));
            match echoed {
                Ok(_) => self.echoed.fetch_add(1, Ordering::Relaxed),
                Err(_) => {
                    thread::sleep(RETRY_PAUSE);
                    continue;
                }
            };
        }
    }

    /// Serves streams; never returns.
    pub(crate) fn keep_streaming(self: &Arc<Self>, listener: &TcpListener) -> ! {
        serve(listener, |stream| {
            if self.streams.fetch_add(1, Ordering::Relaxed) >= STREAMS_MAX {
                self.streams.fetch_sub(1, Ordering::Relaxed);
                return;
            }
            let net = Arc::clone(self);
            thread::spawn(move || {
                // The end of a stream is the client's to judge: it knows whether it wanted it.
                let _ended = net.stream(stream);
                net.streams.fetch_sub(1, Ordering::Relaxed);
            });
        })
    }

    pub(crate) fn report(&self) -> NetReport {
        NetReport {
            echoed: self.echoed.load(Ordering::Relaxed),
            stream_bytes: self.stream_bytes.load(Ordering::Relaxed),
            stream_mismatches: self.stream_mismatches.load(Ordering::Relaxed),
        }
    }

    fn stream(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut buffer = vec![0; STREAM_BUFFER_BYTES];
        let mut position = 0;
        loop {
            let length = stream.read(&mut buffer)?;
            if length == 0 {
                return Ok(());
            }
            if !continues(position, &buffer[..length]) {
                self.stream_mismatches.fetch_add(1, Ordering::Relaxed);
                return Err(io::ErrorKind::InvalidData.into());
            }
            position += length as u64;
            self.stream_bytes.fetch_add(length as u64, Ordering::Relaxed);
            stream.write_all(&buffer[..length])?;
        }
    }
}

/// The UDP socket of the echo.
pub(crate) fn echo_socket() -> io::Result<UdpSocket> {
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ECHO_PORT))
}

/// The TCP listener of the streams.
pub(crate) fn stream_listener() -> io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, STREAM_PORT))
}

/// Hands every connection to `handle`, for ever.
pub(crate) fn serve(listener: &TcpListener, handle: impl Fn(TcpStream)) -> ! {
    loop {
        match listener.accept() {
            Ok((stream, _)) => handle(stream),
            Err(_) => thread::sleep(RETRY_PAUSE),
        }
    }
}

/// Whether bytes at a position are those of the stream of 8-byte little-endian numbers 0, 1, 2, …
fn continues(position: u64, bytes: &[u8]) -> bool {
    bytes.iter().enumerate().all(|(index, byte)| {
        let at = position + index as u64;
        *byte == (at / 8).to_le_bytes()[(at % 8) as usize]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_continue_at_any_cut() {
        let stream: Vec<u8> = (0_u64..600).flat_map(u64::to_le_bytes).collect();
        for cut in [0, 1, 7, 8, 2049, 4799] {
            assert!(continues(0, &stream[..cut]) && continues(cut as u64, &stream[cut..]), "{cut}");
        }
        assert!(!continues(8, &stream[..16]), "repeated");
        assert!(!continues(0, &stream[8..16]), "skipped");
    }

    #[test]
    fn a_stream_is_echoed_until_it_does_not_continue() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let net = Arc::new(Net::default());
        let (served, _) = listener.accept().unwrap();
        let server = thread::spawn({
            let net = Arc::clone(&net);
            move || net.stream(served)
        });
        let sent: Vec<u8> = (0_u64..1000).flat_map(u64::to_le_bytes).collect();
        for part in sent.chunks(4001) {
            client.write_all(part).unwrap();
            let mut echoed = vec![0; part.len()];
            client.read_exact(&mut echoed).unwrap();
            assert_eq!(echoed, part);
        }
        client.write_all(&999_u64.to_le_bytes()).unwrap();
        assert!(server.join().unwrap().is_err());
        let report = net.report();
        assert_eq!((report.stream_bytes, report.stream_mismatches), (8000, 1));
    }
}
