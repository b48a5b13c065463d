//! The monitor: one client after another, on the socket or (probe) on the standard streams.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};

use super::commands::{self, Answer};
use super::vm::Vm;

/// Serves the VM's sockets until `quit` or SIGTERM.
pub(super) async fn serve_sockets(vm: &Arc<Vm>) -> Result<(), String> {
    let qmp = listen(vm.options.qmp_socket.as_deref().ok_or("no monitor")?)?;
    let console = vm.options.console_socket.as_deref().map(listen).transpose()?;
    let mut terminated = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
    let clients = async {
        loop {
            if let Ok((stream, _)) = qmp.accept().await {
                let (reader, writer) = stream.into_split();
                serve(vm, reader, writer).await;
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
        () = serve(vm, tokio::io::stdin(), tokio::io::stdout()) => {}
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
async fn serve(vm: &Arc<Vm>, reader: impl AsyncRead + Unpin, mut writer: impl AsyncWrite + Unpin) {
    let (major, minor, micro) = vm.version.number();
    let version = json!({ "major": major, "minor": minor, "micro": micro });
    let greeting = json!({
        "QMP": { "version": { "qemu": version, "package": "fake" }, "capabilities": ["oob"] },
    });
    if say(&mut writer, &greeting.to_string()).await.is_err() {
        return;
    }
    let mut events = vm.events.subscribe();
    let mut lines = BufReader::new(reader).lines();
    let mut negotiated = false;
    loop {
        let line = tokio::select! {
            line = lines.next_line() => match line {
                Ok(Some(line)) => line,
                _ => return,
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
        let Some(answer) = answer(vm, &line, &mut negotiated).await else { continue };
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
async fn answer(vm: &Arc<Vm>, line: &str, negotiated: &mut bool) -> Option<Answer> {
    let command: Value = serde_json::from_str(line).unwrap_or_default();
    let answer = commands::run(vm, &command, negotiated).await;
    (!vm.faults.silent()).then_some(answer)
}

async fn say(writer: &mut (impl AsyncWrite + Unpin), line: &str) -> std::io::Result<()> {
    writer.write_all(format!("{line}\r\n").as_bytes()).await?;
    writer.flush().await
}
