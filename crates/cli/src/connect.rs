//! Which controller is meant: finds the operator's `client.toml` and makes the client that it describes.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use whimbrel_api::ErrorCode;
use whimbrel_api::client::{ClientConfig, ClientConfigError, PoolClient};

use crate::failure::{Failure, OwnCode};
use crate::output;

/// Largest file with settings that is read, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Where the running lab's file is.
const LAB_FILE: &str = "/var/tmp/whimbrel-lab/client.toml";
/// How many days before its end an operator's certificate is worth a note.
const EXPIRY_NOTE_DAYS: i64 = 30;

/// The controller that the user means: `given` if it is, else the first file of [`places`] that exists.
pub(crate) fn pool(given: Option<&Path>) -> Result<PoolClient, Failure> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => {
            let places = places();
            places.iter().find(|path| path.exists()).cloned().ok_or_else(|| none_found(&places))?
        }
    };
    let unusable = |error: ClientConfigError| {
        let message = whimbrel_api::error::chain(&error);
        Failure::own(OwnCode::NoController, message)
            .hint("`whimbrel --help` tells where this file is looked for")
    };
    let config = ClientConfig::load(&path).map_err(unusable)?;
    let left = config.certificate().map_err(unusable)?.days_left(SystemTime::now());
    if let Some(note) = expiry_note(&path, left) {
        output::note(&note);
    }
    PoolClient::from_config(&config).map_err(unusable)
}

/// What is said of an operator's certificate that is about to expire. One that has expired is told by the refusal.
fn expiry_note(path: &Path, days_left: i64) -> Option<String> {
    (0..EXPIRY_NOTE_DAYS).contains(&days_left).then(|| {
        format!(
            "note: the certificate in {} expires in {days_left} days; `whimbrel pool renew` on the controller's machine makes a new one",
            path.display()
        )
    })
}

/// Where a `client.toml` is looked for, in this order.
fn places() -> Vec<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".config"));
    let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).or_else(home);
    let own = config.map(|folder| folder.join("whimbrel/client.toml"));
    own.into_iter().chain(["/etc/whimbrel/client.toml".into(), LAB_FILE.into()]).collect()
}

fn none_found(places: &[PathBuf]) -> Failure {
    let places: Vec<String> = places.iter().map(|path| path.display().to_string()).collect();
    let message =
        format!("no client.toml says where the controller is; looked for {}", places.join(", "));
    Failure::own(OwnCode::NoController, message)
        .hint("start a lab with `whimbrel lab up`, or give the operator's file: --client FILE, or WHIMBREL_CLIENT")
}

/// The text of a settings file that the user named.
pub(crate) fn read_bounded(path: &Path) -> Result<String, Failure> {
    let cannot = |error: std::io::Error| {
        Failure::usage(ErrorCode::BadPath, format!("cannot read {}: {error}", path.display()))
    };
    let file = File::open(path).map_err(cannot)?;
    let mut text = String::new();
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(cannot)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        let message = format!("{} is larger than {FILE_BYTES_MAX} bytes", path.display());
        return Err(Failure::usage(ErrorCode::TooLarge, message));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm.toml");
        std::fs::write(&path, "#".repeat(FILE_BYTES_MAX as usize)).unwrap();
        assert_eq!(read_bounded(&path).unwrap().len() as u64, FILE_BYTES_MAX);
        std::fs::write(&path, "#".repeat(FILE_BYTES_MAX as usize + 1)).unwrap();
        assert_eq!(read_bounded(&path).unwrap_err().code, ErrorCode::TooLarge.into());
        assert_eq!(
            read_bounded(&folder.path().join("none")).unwrap_err().code,
            ErrorCode::BadPath.into()
        );
        assert_eq!(read_bounded(folder.path()).unwrap_err().code, ErrorCode::BadPath.into());
    }

    #[test]
    fn a_file_that_is_none_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("client.toml");
        std::fs::write(&path, "controller = \"unix:/s\"\ncolour = 1").unwrap();
        let failure = pool(Some(&path)).unwrap_err();
        assert!(failure.message.contains("colour"), "{}", failure.message);
        assert_eq!(failure.exit, crate::failure::Exit::Usage);
        let failure = pool(Some(&folder.path().join("none"))).unwrap_err();
        assert!(failure.message.contains("none"), "{}", failure.message);
    }

    #[test]
    fn the_last_month_of_a_certificate_is_told() {
        let note = |days| expiry_note(Path::new("/etc/client.toml"), days);
        assert!(
            note(EXPIRY_NOTE_DAYS - 1).unwrap().contains("/etc/client.toml expires in 29 days")
        );
        assert!(note(0).is_some());
        assert_eq!((note(EXPIRY_NOTE_DAYS), note(-1)), (None, None));
    }
}
