//! Disk images: made, copied into a storage, and looked at before they are trusted.
//!
//! Formats stay QEMU's business: `qemu-img` does the work, as QEMU's unprivileged user and with the format always said,
//! never probed. It gets the files as its standard input and output, already open, so that no name can be swapped under
//! it. What an image must not have is read from its header first: a backing file or a data file would make `qemu-img`
//! open what the image's author names. An image that stands on others is given to it with all of them by name, whatever its
//! header says; those are ours, in folders where nobody else can make a name.
//!
//! Looking at a stranger's image is bounded in time, processor and memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::process::Command;
use whimbrel_api::vm::ImageFormat;
use whimbrel_api::{ApiError, ErrorCode};
use whimbrel_qemu::process::UnprivilegedUser;

/// How long looking at an image may take, in seconds.
const LOOK_SECONDS: u64 = 60;
/// How long copying an image may take, in seconds; as long as a client waits for it.
const COPY_SECONDS: u64 = 3600;
/// How much processor looking at an image may take, in seconds.
const LOOK_CPU_SECONDS: u64 = 30;
/// How much address space looking at an image may take, in bytes. `qemu-img` itself takes some 400 MiB (7.2, 10.0), and checking
/// an image 2 bytes for each cluster of its file.
const LOOK_MEMORY_BYTES: u64 = 2 << 30;
/// Room that has to be left in a file system, in bytes: for the image's tables, and for others.
pub(crate) const SPARE_BYTES: u64 = 64 << 20;
/// Most bytes of `qemu-img`'s words that are passed on.
const WORDS_BYTES_MAX: usize = 1000;

/// Bytes of a qcow2 header, version 3, that are looked at.
const HEADER_BYTES: usize = 104;
/// Exit status of `qemu-img check` when clusters are leaked but no data is damaged (7.2, 10.0).
const CHECK_LEAKS: i32 = 3;
/// The sizes of disks are multiples of this, in bytes.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// What bounds a child, of util-linux. The agent cannot do it from outside where it may not raise limits either (containers).
const PRLIMIT: &str = "/usr/bin/prlimit";
const IN: &str = "/proc/self/fd/0";
const OUT: &str = "/proc/self/fd/1";

/// Beginnings of formats that a raw image must not have: whoever probed it would take it for that format.
const MAGICS: [(&[u8], &str); 7] = [
    (b"QFI\xfb", "qcow2"),
    (b"QED\0", "qed"),
    (b"LUKS\xba\xbe", "LUKS"),
    (b"KDMV", "VMDK"),
    (b"COWD", "VMDK"),
    (b"vhdxfile", "VHDX"),
    (b"# Disk Descriptor", "VMDK"),
];

/// The program that handles images.
#[derive(Debug, Clone)]
pub struct ImageTool {
    program: PathBuf,
    user: UnprivilegedUser,
}

/// An image that was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageFacts {
    /// What a guest would see, in bytes.
    pub virtual_bytes: u64,
    /// What it occupies, in bytes.
    pub occupied_bytes: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    virtual_size: u64,
    #[serde(default)]
    actual_size: u64,
    #[serde(default)]
    dirty_flag: bool,
    #[serde(default)]
    encrypted: bool,
    backing_filename: Option<String>,
    full_backing_filename: Option<String>,
}

impl ImageTool {
    /// The `qemu-img` beside an engine, or the system's.
    #[must_use]
    pub fn beside(engine: &std::path::Path, user: UnprivilegedUser) -> Self {
        let beside = engine.with_file_name("qemu-img");
        let program = if beside.is_file() { beside } else { PathBuf::from("/usr/bin/qemu-img") };
        Self { program, user }
    }

    /// Looks at an image that is said to have a format, and refuses what must not be used.
    ///
    /// # Errors
    /// `bad-image`, with the reason.
    pub async fn inspect(
        &self,
        image: &File,
        name: &str,
        format: ImageFormat,
    ) -> Result<ImageFacts, ApiError> {
        let opened = image.try_clone().map_err(share)?;
        let named = name.to_owned();
        aside(move || check_header(&opened, &named, format)).await?;
        let arguments = ["info", "--output=json", "-f", format.as_str(), IN];
        let (status, words) = self.look(&arguments, image).await?;
        if !status.success() {
            return Err(bad_image(
                name,
                &format!("qemu-img cannot read it: {}", shown(&words.errors)),
            ));
        }
        let info: Info = serde_json::from_slice(&words.output)
            .map_err(|error| ApiError::internal("qemu-img answered in another form", &error))?;
        if info.backing_filename.is_some() || info.full_backing_filename.is_some() {
            return Err(bad_image(name, "it has a backing file"));
        }
        if info.encrypted {
            return Err(bad_image(name, "it is encrypted"));
        }
        if info.dirty_flag {
            return Err(bad_image(
                name,
                "it was not closed (dirty); repair it with `qemu-img check -r all`",
            ));
        }
        if format == ImageFormat::Qcow2 {
            self.check(image, name).await?;
        }
        Ok(ImageFacts { virtual_bytes: info.virtual_size, occupied_bytes: info.actual_size })
    }

    /// Makes the new, empty file an image.
    ///
    /// # Errors
    /// `internal` with `qemu-img`'s words.
    pub async fn create(
        &self,
        file: File,
        format: ImageFormat,
        size_bytes: u64,
    ) -> Result<(), ApiError> {
        let size = size_bytes.to_string();
        let arguments =
            ["create", "-q", "-f", format.as_str(), "-o", "preallocation=off", OUT, &size];
        self.change(&arguments, Stdio::null(), &file, LOOK_SECONDS).await?;
        aside(move || sync(&file)).await
    }

    /// Makes the new, empty file an image that stands on another. What it stands on is noted in its header for other tools; the
    /// name is not opened.
    ///
    /// # Errors
    /// `internal` with `qemu-img`'s words.
    pub async fn create_on(
        &self,
        file: File,
        size_bytes: u64,
        below: (&Path, ImageFormat),
    ) -> Result<(), ApiError> {
        let (path, format) = below;
        let (size, path) = (size_bytes.to_string(), utf8(path)?);
        let arguments =
            ["create", "-q", "-f", "qcow2", "-u", "-b", path, "-F", format.as_str(), OUT, &size];
        self.change(&arguments, Stdio::null(), &file, LOOK_SECONDS).await?;
        aside(move || sync(&file)).await
    }

    /// Copies an image of ours, with what it stands on, into the new, empty file, which then stands on nothing. `chain` begins
    /// with the image that has the latest data.
    ///
    /// # Errors
    /// `internal` with `qemu-img`'s words.
    pub async fn flatten(
        &self,
        chain: &[(PathBuf, ImageFormat)],
        file: File,
        format: ImageFormat,
    ) -> Result<(), ApiError> {
        let source = described(chain)?;
        let arguments = ["convert", "-q", "-O", format.as_str(), &source, OUT];
        self.change(&arguments, Stdio::null(), &file, COPY_SECONDS).await?;
        aside(move || sync(&file)).await
    }

    /// Writes what the first image of `chain` has into the second one. Repeating it changes nothing, and whatever it leaves when it
    /// breaks off, the first on top of the second reads as before.
    ///
    /// # Errors
    /// `internal` with `qemu-img`'s words.
    pub async fn merge_down(&self, chain: &[(PathBuf, ImageFormat)]) -> Result<(), ApiError> {
        let images = described(chain)?;
        let arguments = ["commit", "-q", "-d", &images];
        let (status, words) = self
            .run(&arguments, Stdio::null(), Stdio::piped(), (COPY_SECONDS, Bounds::None))
            .await?;
        if !status.success() {
            return Err(failed_to("commit", &words));
        }
        let Some((below, _)) = chain.get(1).cloned() else { return Ok(()) };
        aside(move || {
            let file = File::open(&below).map_err(share)?;
            sync(&file)
        })
        .await
    }

    /// Copies an image that was looked at into the new, empty file, and makes it as large as asked for.
    ///
    /// # Errors
    /// `bad-image` or `internal` with `qemu-img`'s words.
    pub async fn copy(
        &self,
        source: File,
        source_format: ImageFormat,
        file: File,
        format: ImageFormat,
        grow_to_bytes: Option<u64>,
    ) -> Result<(), ApiError> {
        let arguments =
            ["convert", "-q", "-f", source_format.as_str(), "-O", format.as_str(), IN, OUT];
        self.change(&arguments, Stdio::from(source), &file, COPY_SECONDS).await?;
        if let Some(bytes) = grow_to_bytes {
            let size = bytes.to_string();
            let arguments = ["resize", "-q", "-f", format.as_str(), OUT, &size];
            self.change(&arguments, Stdio::null(), &file, LOOK_SECONDS).await?;
        }
        aside(move || sync(&file)).await
    }

    async fn check(&self, image: &File, name: &str) -> Result<(), ApiError> {
        let (status, words) = self.look(&["check", "-q", "-f", "qcow2", IN], image).await?;
        if status.success() || status.code() == Some(CHECK_LEAKS) {
            return Ok(());
        }
        Err(bad_image(name, &format!("qemu-img finds it damaged: {}", shown(&words.errors))))
    }

    async fn look(
        &self,
        arguments: &[&str],
        image: &File,
    ) -> Result<(ExitStatus, Words), ApiError> {
        let image = image.try_clone().map_err(share)?;
        let bounds = (LOOK_SECONDS, Bounds::Stranger);
        self.run(arguments, Stdio::from(image), Stdio::piped(), bounds).await
    }

    async fn change(
        &self,
        arguments: &[&str],
        input: Stdio,
        file: &File,
        seconds: u64,
    ) -> Result<(), ApiError> {
        let file = file.try_clone().map_err(share)?;
        let bounds = (seconds, Bounds::None);
        let (status, words) = self.run(arguments, input, Stdio::from(file), bounds).await?;
        if status.success() {
            return Ok(());
        }
        Err(failed_to(arguments.first().copied().unwrap_or_default(), &words))
    }

    fn command(&self, bounds: Bounds) -> Command {
        if bounds == Bounds::None {
            return Command::new(&self.program);
        }
        // It bounds itself and then becomes the other.
        let mut command = Command::new(PRLIMIT);
        command.arg(format!("--cpu={LOOK_CPU_SECONDS}")).arg(format!("--as={LOOK_MEMORY_BYTES}"));
        command.args(["--core=0", "--"]).arg(&self.program);
        command
    }

    async fn run(
        &self,
        arguments: &[&str],
        input: Stdio,
        output: Stdio,
        (seconds, bounds): (u64, Bounds),
    ) -> Result<(ExitStatus, Words), ApiError> {
        let mut command = self.command(bounds);
        command.args(arguments).uid(self.user.uid).gid(self.user.gid).env_clear();
        command.stdin(input).stdout(output).stderr(Stdio::piped()).kill_on_drop(true);
        let failed =
            |error| ApiError::internal(&format!("cannot run {}", self.program.display()), &error);
        let child = command.spawn().map_err(failed)?;
        let ended = tokio::time::timeout(Duration::from_secs(seconds), child.wait_with_output());
        let output = ended
            .await
            .map_err(|_| {
                let doing = arguments.first().copied().unwrap_or_default();
                ApiError::new(
                    ErrorCode::Internal,
                    format!("qemu-img {doing} took more than {seconds} s"),
                )
            })?
            .map_err(failed)?;
        Ok((output.status, Words { output: output.stdout, errors: output.stderr }))
    }
}

/// What a child may take besides its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bounds {
    /// As much as there is: the image is ours.
    None,
    /// Little: the image is a stranger's.
    Stranger,
}

/// A chain of images as `qemu-img` takes it, each with its format, the lowest standing on nothing.
fn described(chain: &[(PathBuf, ImageFormat)]) -> Result<String, ApiError> {
    let mut below = serde_json::Value::Null;
    for (path, format) in chain.iter().rev() {
        let file = json!({ "driver": "file", "filename": utf8(path)? });
        let mut image = json!({ "driver": format.as_str(), "file": file });
        if *format == ImageFormat::Qcow2 {
            image["backing"] = below;
        }
        below = image;
    }
    Ok(format!("json:{below}"))
}

fn utf8(path: &Path) -> Result<&str, ApiError> {
    path.to_str().ok_or_else(|| {
        ApiError::new(ErrorCode::BadPath, format!("{} is not UTF-8", path.display()))
    })
}

struct Words {
    output: Vec<u8>,
    errors: Vec<u8>,
}

/// What the header alone tells. Offsets: QEMU's `docs/interop/qcow2.txt`.
fn check_header(image: &File, name: &str, format: ImageFormat) -> Result<(), ApiError> {
    let mut header = [0_u8; HEADER_BYTES];
    let mut length = 0;
    while length < HEADER_BYTES {
        match image.read_at(&mut header[length..], length as u64) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) => return Err(bad_image(name, &format!("it cannot be read: {error}"))),
        }
    }
    let header = &header[..length];
    match format {
        ImageFormat::Raw => {
            if length == 0 {
                return Err(bad_image(name, "it is empty"));
            }
            match MAGICS.iter().find(|(magic, _)| header.starts_with(magic)) {
                None => Ok(()),
                Some((_, what)) => Err(bad_image(
                    name,
                    &format!("it is said to be raw, but begins like a {what} image"),
                )),
            }
        }
        ImageFormat::Qcow2 => check_qcow2_header(header, name),
    }
}

fn check_qcow2_header(header: &[u8], name: &str) -> Result<(), ApiError> {
    let number = |at: usize, bytes: usize| -> u64 {
        let field = header.get(at..at + bytes).unwrap_or_default();
        field.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    if !header.starts_with(b"QFI\xfb") || header.len() < 72 {
        return Err(bad_image(name, "it is said to be qcow2, and is not"));
    }
    let version = number(4, 4);
    if !(2..=3).contains(&version) {
        return Err(bad_image(name, &format!("it is qcow2 of the unknown version {version}")));
    }
    if number(8, 8) != 0 {
        return Err(bad_image(name, "it has a backing file; flatten it with `qemu-img convert`"));
    }
    if number(32, 4) != 0 {
        return Err(bad_image(name, "it is encrypted"));
    }
    let incompatible = if version == 3 { number(72, 8) } else { 0 };
    let flags = [
        (1 << 0, "it was not closed (dirty); repair it with `qemu-img check -r all`"),
        (1 << 1, "it is marked as corrupt; repair it with `qemu-img check -r all`"),
        (1 << 2, "its data is in another file (data file)"),
    ];
    match flags.iter().find(|(bit, _)| incompatible & bit != 0) {
        None => Ok(()),
        Some((_, why)) => Err(bad_image(name, why)),
    }
}

fn failed_to(doing: &str, words: &Words) -> ApiError {
    let message = format!("qemu-img {doing} failed: {}", shown(&words.errors));
    ApiError::new(ErrorCode::Internal, message)
}

fn bad_image(name: &str, why: &str) -> ApiError {
    ApiError::new(ErrorCode::BadImage, format!("the image `{name}` cannot be used: {why}"))
}

fn shown(words: &[u8]) -> String {
    let bounded = words.get(..WORDS_BYTES_MAX).unwrap_or(words);
    let text = String::from_utf8_lossy(bounded);
    text.trim().replace('\n', "; ")
}

/// Reads or writes on a thread of its own: storage may be slow.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| ApiError::internal("the work on an image broke off", &error))?
}

fn share(error: std::io::Error) -> ApiError {
    ApiError::internal("cannot share a file", &error)
}

fn sync(file: &File) -> Result<(), ApiError> {
    file.sync_all().map_err(|error| ApiError::internal("cannot sync a new image", &error))
}
