//! Tokens by which hosts prove to each other that they see the same folder.
//!
//! The writer removes its token after [`LIFETIME`]; what a killed agent left is removed by age. Nothing is concluded
//! here from what is seen.

use std::fs::File;
use std::io::{Read, Write};
use std::time::{Duration, SystemTime};

use rustix::fs::{Dir, Mode, OFlags};
use uuid::Uuid;
use whimbrel_api::agent::SharedToken;
use whimbrel_api::{ApiError, ErrorCode};
use whimbrel_qemu::process::UnprivilegedUser;

use super::beneath::{BeneathError, Folder};

/// How long a token stays.
pub(super) const LIFETIME: Duration = Duration::from_secs(60);
/// A token older than this has lost its writer.
const STALE: Duration = Duration::from_secs(600);

const PREFIX: &str = ".whimbrel-token-";
const TOKEN_DIGITS: usize = 32;

/// Whether it is a token at all: it becomes part of a file's name.
pub(super) fn check(token: &SharedToken) -> Result<(), ApiError> {
    let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if token.token.len() == TOKEN_DIGITS && token.token.bytes().all(digit) {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::BadRequest,
        format!("`token` is {TOKEN_DIGITS} hexadecimal digits, lower case"),
    ))
}

/// Writes a new token, durably: another host may read it past this one's caches.
pub(super) fn write(folder: &Folder) -> Result<SharedToken, BeneathError> {
    let token = Uuid::new_v4().simple().to_string();
    let name = format!("{PREFIX}{token}");
    let io = |source| BeneathError::Io { doing: "write", path: name.clone(), source };
    // Root's own: QEMU has nothing to do with it.
    let mut file = folder.create_file(&name, UnprivilegedUser { uid: 0, gid: 0 })?;
    file.write_all(token.as_bytes()).map_err(io)?;
    file.sync_all().map_err(io)?;
    folder.sync_folder(".")?;
    Ok(SharedToken { token })
}

/// Whether the token's file is there with the token in it.
pub(super) fn seen(folder: &Folder, token: &SharedToken) -> bool {
    let Ok(file) = folder.open_file(&format!("{PREFIX}{}", token.token)) else { return false };
    let mut content = String::new();
    let read = file.take(TOKEN_DIGITS as u64 + 1).read_to_string(&mut content);
    read.is_ok() && content == token.token
}

/// Removes a token.
pub(super) fn remove(folder: &Folder, token: &SharedToken) {
    if let Err(error) = folder.remove_file(&format!("{PREFIX}{}", token.token)) {
        tracing::warn!(error = whimbrel_api::error::chain(&error), "a token was not removed");
    }
}

/// Removes tokens whose writer is gone.
pub(super) fn sweep(folder: &Folder) {
    let Ok(names) = folder.names() else { return };
    for name in names.iter().filter(|name| name.starts_with(PREFIX)) {
        let stale = folder.open_file(name).is_ok_and(|file| is_stale(&file));
        if stale && folder.remove_file(name).is_ok() {
            tracing::info!(name, "removed a token that nobody had removed");
        }
    }
}

fn is_stale(file: &File) -> bool {
    let written = file.metadata().and_then(|data| data.modified());
    written
        .is_ok_and(|written| SystemTime::now().duration_since(written).is_ok_and(|age| age > STALE))
}

impl Folder {
    /// The names in the folder itself.
    fn names(&self) -> Result<Vec<String>, BeneathError> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let folder = self.open_at(".", flags, Mode::empty(), "open the folder")?;
        let failed = |errno: rustix::io::Errno| BeneathError::Io {
            doing: "list",
            path: ".".to_owned(),
            source: errno.into(),
        };
        let mut names = Vec::new();
        for entry in Dir::read_from(&folder).map_err(failed)? {
            names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
        }
        Ok(names)
    }
}
