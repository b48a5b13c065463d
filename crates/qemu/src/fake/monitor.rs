//! The monitor: one client after another, on the socket or (probe) on the standard streams.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWrite, AsyncWriteExt, BufReader, Interest, Lines, Stdin};
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};

use super::commands::{self, Answer};
use super::vm::Vm;

/// How much is read at once.
const READ_BYTES: usize = 4096;

/// Serves the VM's sockets until `quit` or SIGTERM.
pub(super) async fn serve_sockets(vm: &Arc<Vm>) -> Result<(), String> {
    let qmp = listen(vm.options.qmp_socket.as_deref().ok_or("no monitor")?)?;
    let console = vm.options.console_socket.as_deref().map(listen).transpose()?;
    let mut terminated = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
    let clients = async {
        loop {
            if let Ok((stream, _)) = qmp.accept().await {
                let (reader, writer) = stream.into_split();
                serve(vm, Commands::of(reader), writer).await;
            }
        }
    };
    tokio::select! {
        () = clients => Ok(()),
        () = echo(console) => Ok(()),
        () = vm.quit.notified() => Ok(()),
        _ = terminated.recv() => Ok(()),
    }
}

/// Serves the standard streams until `quit` or their end.
pub(super) async fn serve_standard_streams(vm: &Arc<Vm>) {
    tokio::select! {
        () = serve(vm, BufReader::new(tokio::io::stdin()).lines(), tokio::io::stdout()) => {}
        () = vm.quit.notified() => {}
    }
}

fn listen(path: &Path) -> Result<UnixListener, String> {
    // QEMU replaces what an earlier one left.
    let _ = std::fs::remove_file(path);
    UnixListener::bind(path)
        .map_err(|error| format!("Failed to bind socket to {}: {error}", path.display()))
}

/// A console that gives back what is typed.
async fn echo(listener: Option<UnixListener>) {
    let Some(listener) = listener else { return std::future::pending().await };
    loop {
        if let Ok((mut stream, _)) = listener.accept().await {
            let _: Result<(), std::io::Error> = greet_and_echo(&mut stream).await;
        }
    }
}

async fn greet_and_echo(stream: &mut UnixStream) -> Result<(), std::io::Error> {
    stream.write_all(b"fake guest\r\n").await?;
    let (mut reader, mut writer) = stream.split();
    tokio::io::copy(&mut reader, &mut writer).await?;
    Ok(())
}

/// Serves one client to its end. Errors of its connection end it like its going away does.
async fn serve(vm: &Arc<Vm>, mut lines: impl CommandLines, mut writer: impl AsyncWrite + Unpin) {
    let (major, minor, micro) = vm.version.number();
    let version = json!({ "major": major, "minor": minor, "micro": micro });
    let greeting = json!({
        "QMP": { "version": { "qemu": version, "package": "fake" }, "capabilities": ["oob"] },
    });
    if say(&mut writer, &greeting.to_string()).await.is_err() {
        return;
    }
    let mut events = vm.events.subscribe();
    let mut negotiated = false;
    loop {
        let (line, descriptor) = tokio::select! {
            line = lines.next_command() => match line {
                Some(line) => line,
                None => return,
            },
            event = events.recv() => {
                if let Ok(event) = event
                    && negotiated
                    && !vm.faults.silent()
                    && say(&mut writer, &event).await.is_err()
                {
                    return;
                }
                continue;
            }
        };
        let answer = answer(vm, &line, descriptor, &mut negotiated).await;
        let Some(answer) = answer else { continue };
        // Events of what the command did come before its answer, as QEMU has it.
        while let Ok(event) = events.try_recv() {
            if say(&mut writer, &event).await.is_err() {
                return;
            }
        }
        if say(&mut writer, &answer.line).await.is_err() {
            return;
        }
        if answer.ends {
            vm.quit.notify_one();
            return std::future::pending().await;
        }
    }
}

/// The answer to one line, or none where the monitor is silent.
async fn answer(
    vm: &Arc<Vm>,
    line: &str,
    descriptor: Option<OwnedFd>,
    negotiated: &mut bool,
) -> Option<Answer> {
    let command: Value = serde_json::from_str(line).unwrap_or_default();
    if vm.faults.blocked() && command.get("exec-oob").is_none() {
        return None;
    }
    let answer = commands::run(vm, &command, descriptor, negotiated).await;
    (!vm.faults.silent()).then_some(answer)
}

async fn say(writer: &mut (impl AsyncWrite + Unpin), line: &str) -> std::io::Result<()> {
    writer.write_all(format!("{line}\r\n").as_bytes()).await?;
    writer.flush().await
}

/// Where commands come from, each with the descriptor that came with it.
trait CommandLines {
    /// The next line; none at the end, or where it can not be read. Cancellation safe.
    async fn next_command(&mut self) -> Option<(String, Option<OwnedFd>)>;
}

impl CommandLines for Lines<BufReader<Stdin>> {
    async fn next_command(&mut self) -> Option<(String, Option<OwnedFd>)> {
        Some((self.next_line().await.ok()??, None))
    }
}

/// Commands from a socket. As with QEMU, only the newest descriptor is kept.
struct Commands {
    reader: OwnedReadHalf,
    bytes: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

impl Commands {
    fn of(reader: OwnedReadHalf) -> Self {
        Self { reader, bytes: Vec::new(), descriptor: None }
    }

    fn line(&mut self) -> Option<String> {
        let end = self.bytes.iter().position(|byte| *byte == b'\n')?;
        let line = self.bytes.drain(..=end).collect::<Vec<u8>>();
        Some(String::from_utf8_lossy(&line).trim().to_owned())
    }

    /// Reads what is there; how much that was.
    fn receive(&mut self) -> io::Result<usize> {
        let stream: &UnixStream = self.reader.as_ref();
        let mut bytes = [0; READ_BYTES];
        let (received, descriptor) = stream.try_io(Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = recvmsg(
                stream,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
            )?;
            debug_assert!(!received.flags.contains(ReturnFlags::CTRUNC), "more than one");
            let descriptor = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
                _ => None,
            });
            Ok((received.bytes, descriptor))
        })?;
        self.bytes.extend_from_slice(&bytes[..received]);
        if descriptor.is_some() {
            self.descriptor = descriptor;
        }
        Ok(received)
    }
}

impl CommandLines for Commands {
    async fn next_command(&mut self) -> Option<(String, Option<OwnedFd>)> {
        loop {
            if let Some(line) = self.line() {
                return Some((line, self.descriptor.take()));
            }
            self.reader.readable().await.ok()?;
            match self.receive() {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return None,
            }
        }
    }
}
