//! Asking one QEMU program what it can do: it is started without a machine, over a pair of
//! sockets on its standard input and output, and ended again. Takes below 0.1 s (7.2, 10.0).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, Command};

use super::{Accelerator, CpuModel, EngineFacts, MachineType};
use crate::process::{SEARCH_PATH, UnprivilegedUser};
use crate::qmp::{ConnectError, Qmp, QmpError};
use crate::schema::Features;

/// How long one whole probe may take.
const PROBE_TIMEOUT_SECONDS: u64 = 30;

/// How long QEMU may take to end after `quit`, before it is killed.
const QUIT_TIMEOUT_SECONDS: u64 = 2;

/// How much of what QEMU complains is kept.
const COMPLAINT_BYTES_MAX: u64 = 4 * 1024;

/// The processor model with everything that a guest can have here.
const BEST_CPU_MODEL: &str = "max";

/// Why an engine's facts are not known.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It can not be run.
    #[error("can not run {}", binary.display())]
    Run {
        /// The program.
        binary: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// It ran, but is no QEMU that works.
    #[error("{} does not work as QEMU: {complaint}", binary.display())]
    NotQemu {
        /// The program.
        binary: PathBuf,
        /// What it wrote to standard error.
        complaint: String,
        /// How the session ended.
        #[source]
        source: ConnectError,
    },
    /// It did not answer a question.
    #[error("{} does not tell what it can do", binary.display())]
    Ask {
        /// The program.
        binary: PathBuf,
        /// The reason.
        #[source]
        source: QmpError,
    },
    /// It took too long.
    #[error("{} did not answer within {} s", binary.display(), after.as_secs())]
    TimedOut {
        /// The program.
        binary: PathBuf,
        /// How long.
        after: Duration,
    },
}

/// Asks an engine what it can do, as the user that it will run as. `forced` overrides the choice
/// of the accelerator.
///
/// Otherwise KVM is taken if `/dev/kvm` opens, the processor has the means (there are hosts with
/// the device where ordinary guests hang), and QEMU starts with it; else TCG.
///
/// # Errors
///
/// [`ProbeError`]; no process is left.
pub async fn probe(
    binary: &Path,
    user: Option<UnprivilegedUser>,
    forced: Option<Accelerator>,
) -> Result<EngineFacts, ProbeError> {
    if let Some(accelerator) = forced {
        let reason = "chosen by hand".to_owned();
        return ask(binary, user, accelerator, reason).await;
    }
    let reason = match kvm_obstacle() {
        None => {
            let reason = "KVM works here".to_owned();
            match ask(binary, user, Accelerator::Kvm, reason).await {
                Err(ProbeError::NotQemu { complaint, .. }) => {
                    format!("QEMU can not use KVM: {complaint}")
                }
                other => return other,
            }
        }
        Some(obstacle) => obstacle,
    };
    ask(binary, user, Accelerator::Tcg, reason).await
}

/// Why KVM can not be used on this host, or `None`.
fn kvm_obstacle() -> Option<String> {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Some(format!("/dev/kvm can not be opened: {error}"));
    }
    let cpuinfo = match std::fs::read_to_string("/proc/cpuinfo") {
        Ok(cpuinfo) => cpuinfo,
        Err(error) => return Some(format!("/proc/cpuinfo can not be read: {error}")),
    };
    (!virtualises(&cpuinfo)).then(|| "the processor has neither vmx nor svm".to_owned())
}

/// Whether the processor can run guests by its own means.
fn virtualises(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|line| {
        line.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm")
    })
}

async fn ask(
    binary: &Path,
    user: Option<UnprivilegedUser>,
    accelerator: Accelerator,
    reason: String,
) -> Result<EngineFacts, ProbeError> {
    let after = Duration::from_secs(PROBE_TIMEOUT_SECONDS);
    tokio::time::timeout(after, ask_unbounded(binary, user, accelerator, reason))
        .await
        .unwrap_or_else(|_| Err(ProbeError::TimedOut { binary: binary.to_owned(), after }))
}

async fn ask_unbounded(
    binary: &Path,
    user: Option<UnprivilegedUser>,
    accelerator: Accelerator,
    reason: String,
) -> Result<EngineFacts, ProbeError> {
    let run_error = |source| ProbeError::Run { binary: binary.to_owned(), source };
    let (mut child, stream) = start(binary, user, accelerator).map_err(run_error)?;
    let qmp = match Qmp::over(stream).await {
        Ok(qmp) => qmp,
        Err(source) => {
            let complaint = complaint(child.stderr.take()).await;
            return Err(ProbeError::NotQemu { binary: binary.to_owned(), complaint, source });
        }
    };
    let facts = facts(binary, &qmp, accelerator, reason).await;
    // A polite end leaves nothing to kill; the handle kills what is left.
    if qmp.execute("quit", Value::Null).await.is_ok() {
        let _ = tokio::time::timeout(Duration::from_secs(QUIT_TIMEOUT_SECONDS), child.wait()).await;
    }
    facts.map_err(|source| ProbeError::Ask { binary: binary.to_owned(), source })
}

/// Starts QEMU without a machine; it is killed when the handle goes away.
fn start(
    binary: &Path,
    user: Option<UnprivilegedUser>,
    accelerator: Accelerator,
) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let theirs_too = theirs.try_clone()?;
    let mut command = Command::new(binary);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-S"]);
    command.args(["-machine", "none", "-accel", accelerator.as_wire(), "-qmp", "stdio"]);
    // Only a destination is asked whether it could receive in post-copy.
    command.args(["-incoming", "defer"]);
    command.env_clear().env("PATH", SEARCH_PATH).process_group(0).kill_on_drop(true);
    command.stdin(Stdio::from(OwnedFd::from(theirs)));
    command.stdout(Stdio::from(OwnedFd::from(theirs_too)));
    command.stderr(Stdio::piped());
    if let Some(user) = user {
        command.uid(user.uid).gid(user.gid);
    }
    Ok((command.spawn()?, UnixStream::from_std(ours)?))
}

/// What it wrote to standard error, in one line.
async fn complaint(stderr: Option<ChildStderr>) -> String {
    let mut bytes = Vec::new();
    if let Some(stderr) = stderr {
        // Whatever could be read is what there is to say.
        let _ = stderr.take(COMPLAINT_BYTES_MAX).read_to_end(&mut bytes).await;
    }
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { "it said nothing".to_owned() } else { lines.join("; ") }
}

async fn facts(
    binary: &Path,
    qmp: &Qmp,
    accelerator: Accelerator,
    accelerator_reason: String,
) -> Result<EngineFacts, QmpError> {
    let machines = qmp.execute("query-machines", Value::Null).await?;
    let models = qmp.execute("query-cpu-definitions", Value::Null).await?;
    let best = json!({ "type": "full", "model": { "name": BEST_CPU_MODEL } });
    let best = qmp.execute("query-cpu-model-expansion", best).await?;
    let features = Features::query(qmp).await?;
    let postcopy_obstacle = postcopy_obstacle(qmp, &features).await?;

    let entries = |list: &Value| list.as_array().cloned().unwrap_or_default();
    let properties = best.pointer("/model/props").and_then(Value::as_object);
    let on = |(name, value): (&String, &Value)| (value == &json!(true)).then(|| name.clone());
    Ok(EngineFacts {
        binary: binary.to_owned(),
        version: qmp.greeting().version,
        package: qmp.greeting().package.clone(),
        machine_types: entries(&machines).iter().filter_map(machine_type).collect(),
        accelerator,
        accelerator_reason,
        cpu_models: entries(&models).iter().filter_map(cpu_model).collect(),
        host_cpu_features: properties.into_iter().flatten().filter_map(on).collect(),
        features,
        postcopy_obstacle,
    })
}

/// Why it can not receive in post-copy. QEMU (7.2, 10.0) tries that out when a destination is told
/// that it shall be able to, and refuses if not.
async fn postcopy_obstacle(qmp: &Qmp, features: &Features) -> Result<Option<String>, QmpError> {
    if !features.postcopy {
        return Ok(Some("this QEMU has no post-copy".to_owned()));
    }
    let wanted = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": true }] });
    match qmp.execute("migrate-set-capabilities", wanted).await {
        Ok(_) => Ok(None),
        Err(QmpError::Refused { description, .. }) => Ok(Some(description)),
        Err(error) => Err(error),
    }
}

fn text(entry: &Value, key: &str) -> Option<String> {
    entry.get(key).and_then(Value::as_str).map(str::to_owned)
}

fn flag(entry: &Value, key: &str) -> bool {
    entry.get(key).and_then(Value::as_bool).unwrap_or(false)
}

fn machine_type(entry: &Value) -> Option<MachineType> {
    Some(MachineType {
        name: text(entry, "name")?,
        alias: text(entry, "alias"),
        is_default: flag(entry, "is-default"),
        deprecated: flag(entry, "deprecated"),
        vcpus_max: entry.get("cpu-max").and_then(Value::as_u64),
    })
}

fn cpu_model(entry: &Value) -> Option<CpuModel> {
    let unavailable = entry.get("unavailable-features").and_then(Value::as_array);
    let words = unavailable.into_iter().flatten().filter_map(Value::as_str);
    Some(CpuModel {
        name: text(entry, "name")?,
        alias_of: text(entry, "alias-of"),
        unavailable_features: words.map(str::to_owned).collect(),
        migration_safe: flag(entry, "migration-safe"),
        deprecated: flag(entry, "deprecated"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_is_a_whole_word() {
        assert!(virtualises("processor : 0\nflags\t\t: fpu vmx sse\n"));
        assert!(virtualises("flags : svm\n"));
        assert!(!virtualises("flags : fpu svm_lock avmx\n"));
        assert!(!virtualises("model name : vmx svm\nflags : fpu\n"));
        assert!(!virtualises(""));
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let error = probe(Path::new("/nonexistent/qemu"), None, None).await.unwrap_err();
        assert!(matches!(error, ProbeError::Run { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn a_program_that_is_no_qemu_is_named() {
        let error = probe(Path::new("/bin/true"), None, Some(Accelerator::Tcg)).await.unwrap_err();
        assert!(matches!(error, ProbeError::NotQemu { .. }), "{error:?}");
    }
}
