//! The control port: JSON lines in and out, see [`crate::report`].

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::net;
use crate::report::{CONTROL_PORT, Command, LINE_BYTES_MAX, Reply};
use crate::witness::Witness;

/// Connections served at once; more are closed at once.
const CONNECTIONS_MAX: usize = 8;

/// The control port's listener.
pub(crate) fn listener() -> io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, CONTROL_PORT))
}

/// Serves the control port; never returns.
pub(crate) fn keep_serving(witness: &Arc<Witness>, listener: &TcpListener) -> ! {
    let connections = Arc::new(AtomicUsize::new(0));
    net::serve(listener, |stream| {
        if connections.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            connections.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let connections = Arc::clone(&connections);
        witness.spawn(move |witness| {
            // The client sees its connection close; there is nobody else to tell.
            let _ended = converse(stream, |command| witness.obey(command));
            connections.fetch_sub(1, Ordering::Relaxed);
        });
    })
}

fn converse(stream: TcpStream, obey: impl Fn(Command) -> Reply) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let mut line = Vec::new();
        reader.by_ref().take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let complete = line.ends_with(b"\n");
        let reply = if complete {
            answer(&line, &obey)
        } else {
            Reply::Refused {
                error: format!("a line is longer than {LINE_BYTES_MAX} bytes, or has no end"),
            }
        };
        let mut text = serde_json::to_vec(&reply)?;
        text.push(b'\n');
        writer.write_all(&text)?;
        if !complete {
            return Ok(());
        }
    }
}

fn answer(line: &[u8], obey: impl Fn(Command) -> Reply) -> Reply {
    match serde_json::from_slice(line) {
        Ok(command) => obey(command),
        Err(error) => Reply::Refused { error: format!("not a command: {error}") },
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn conversation(sent: &[u8]) -> Vec<Reply> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (served, _) = listener.accept().unwrap();
        let server = thread::spawn(move || {
            converse(served, |command| Reply::Refused { error: format!("{command:?}") })
        });
        client.write_all(sent).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let replies = BufReader::new(client).lines();
        let replies = replies.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
        server.join().unwrap().unwrap();
        replies
    }

    #[test]
    fn each_line_is_answered_in_order() {
        let replies = conversation(b"{\"cmd\":\"verify\"}\nnonsense\n{\"cmd\":\"panic\"}\n");
        let errors: Vec<String> = replies
            .into_iter()
            .map(|reply| match reply {
                Reply::Refused { error } => error,
                Reply::Report(_) => unreachable!(),
            })
            .collect();
        assert_eq!((errors[0].as_str(), errors[2].as_str()), ("Verify", "Panic"));
        assert!(errors[1].starts_with("not a command"), "{}", errors[1]);
    }

    #[test]
    fn an_endless_line_is_refused() {
        let replies = conversation(&vec![b' '; LINE_BYTES_MAX]);
        assert!(matches!(&replies[..], [Reply::Refused { error }] if error.contains("longer")));
    }
}
