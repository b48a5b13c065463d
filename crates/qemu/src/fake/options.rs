//! The command line: the same that the real QEMU gets, and nothing else.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use serde_json::Value;
use uuid::Uuid;

use super::Version;

/// Options without a value.
const FLAGS: &[&str] = &["-nodefaults", "-no-user-config", "-S", "-no-shutdown"];

/// Options whose value does not matter here.
const PASSED_OVER: &[&str] = &[
    "-name", "-display", "-msg", "-sandbox", "-accel", "-cpu", "-smp", "-m", "-rtc", "-boot",
    "-append", "-mon",
];

/// What the program was started for.
#[derive(Debug)]
pub(super) enum Invocation {
    TellVersion,
    Probe,
    Run(Box<Options>),
}

/// What matters of the command line of a VM.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) uuid: Uuid,
    pub(super) machine_type: String,
    pub(super) memory_bytes: u64,
    pub(super) qmp_socket: Option<PathBuf>,
    pub(super) console_socket: Option<PathBuf>,
    pub(super) console_log: Option<PathBuf>,
    pub(super) incoming: bool,
    pub(super) block_nodes: Vec<Value>,
    /// Devices that a destination must have too.
    pub(super) devices: usize,
    files: Vec<PathBuf>,
    descriptors: Vec<i32>,
}

impl Invocation {
    pub(super) fn parse(arguments: &[OsString]) -> Result<Self, String> {
        let mut options = Options::none();
        let mut probe = false;
        let mut rest = arguments.iter().map(|argument| argument.to_string_lossy().into_owned());
        while let Some(option) = rest.next() {
            if matches!(option.as_str(), "-version" | "--version") {
                return Ok(Self::TellVersion);
            }
            if FLAGS.contains(&option.as_str()) {
                continue;
            }
            let value = rest.next().ok_or_else(|| format!("{option}: requires an argument"))?;
            if option == "-qmp" && value == "stdio" {
                probe = true;
            } else {
                options.take(&option, &value)?;
            }
        }
        Ok(if probe { Self::Probe } else { Self::Run(Box::new(options)) })
    }
}

impl Options {
    pub(super) fn none() -> Self {
        Self {
            uuid: Uuid::nil(),
            machine_type: "none".to_owned(),
            memory_bytes: 0,
            qmp_socket: None,
            console_socket: None,
            console_log: None,
            incoming: false,
            block_nodes: Vec::new(),
            devices: 0,
            files: Vec::new(),
            descriptors: Vec::new(),
        }
    }

    fn take(&mut self, option: &str, value: &str) -> Result<(), String> {
        match option {
            "-uuid" => {
                self.uuid = value.parse().map_err(|_| "Failed to parse UUID string".to_owned())?;
            }
            "-machine" => {
                self.machine_type = value.split(',').next().unwrap_or_default().to_owned();
            }
            "-kernel" | "-initrd" => self.files.push(value.into()),
            "-incoming" if value == "defer" => self.incoming = true,
            "-chardev" => self.take_chardev(value)?,
            "-object" => {
                let object = json(value)?;
                if object["qom-type"] == "memory-backend-ram" {
                    self.memory_bytes = object["size"].as_u64().unwrap_or(0);
                }
            }
            "-netdev" => {
                let number = json(value)?["fd"].as_str().and_then(|text| text.parse().ok());
                self.descriptors.push(number.ok_or("a netdev without a descriptor")?);
            }
            "-blockdev" => {
                let node = json(value)?;
                let file = node.pointer("/file/filename").and_then(Value::as_str);
                self.files.push(file.ok_or("a blockdev without a file")?.into());
                self.block_nodes.push(node);
            }
            "-device" => {
                json(value)?;
                self.devices += 1;
            }
            _ if PASSED_OVER.contains(&option) => {}
            _ => return Err(format!("{option}: invalid option")),
        }
        Ok(())
    }

    fn take_chardev(&mut self, value: &str) -> Result<(), String> {
        let pairs = split(value);
        let of = |key: &str| pairs.iter().find_map(|pair| pair.strip_prefix(&format!("{key}=")));
        let path = of("path").map(PathBuf::from).ok_or("a chardev without a path")?;
        match of("id") {
            Some("qmp") => self.qmp_socket = Some(path),
            Some("console") => {
                self.console_socket = Some(path);
                self.console_log = of("logfile").map(PathBuf::from);
            }
            _ => return Err("an unknown chardev".to_owned()),
        }
        Ok(())
    }

    /// The files of the disks that the guest can write.
    pub(super) fn writable_disks(&self) -> impl Iterator<Item = &Path> {
        let writable =
            self.block_nodes.iter().filter(|node| node["read-only"] != Value::Bool(true));
        let files = writable.filter_map(|node| node.pointer("/file/filename"));
        files.filter_map(Value::as_str).map(Path::new)
    }

    /// What a real one looks at before it runs.
    pub(super) fn check(&self, version: Version) -> Result<(), String> {
        let machine = &self.machine_type;
        if !version.machine_types().iter().any(|(name, _)| name == machine) {
            return Err(format!("unsupported machine type: \"{machine}\""));
        }
        for file in &self.files {
            OpenOptions::new()
                .read(true)
                .open(file)
                .map_err(|error| format!("Could not open '{}': {error}", file.display()))?;
        }
        for number in &self.descriptors {
            if !Path::new(&format!("/proc/self/fd/{number}")).exists() {
                return Err(format!("Unable to query TUNGETIFF on FD {number}"));
            }
        }
        Ok(())
    }
}

fn json(value: &str) -> Result<Value, String> {
    serde_json::from_str(value).map_err(|error| format!("{value}: {error}"))
}

/// Splits at single commas; a doubled one stands for itself.
fn split(value: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = value.chars().peekable();
    while let Some(character) = characters.next() {
        let doubled = character == ',' && characters.next_if_eq(&',').is_some();
        if character == ',' && !doubled {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(character);
        }
    }
    parts
}
