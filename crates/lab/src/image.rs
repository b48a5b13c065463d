//! The test guest's initramfs: the witness as `/init`, the kernel modules that it loads, and two device nodes.
//!
//! Written here in the kernel's "newc" cpio format, uncompressed, because that is a hundred lines and takes milliseconds,
//! while the `cpio` tool would be one more package and would need the device nodes to exist. What goes in comes from the
//! cache that `scripts/setup` fills and from the witness that `scripts/guest` builds.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::LabError;

/// Says where the witness is, when it is not where `scripts/guest` builds it.
pub const WITNESS_VARIABLE: &str = "WHIMBREL_WITNESS";

/// Where `scripts/guest` leaves the witness, seen from the folder that Cargo's profile folders are in.
const WITNESS_BELOW_TARGET: &str = "guest/x86_64-unknown-linux-gnu/release/whimbrel-witness";
/// What the installed witness is called, beside the `whimbrel` binary.
const WITNESS_NAME: &str = "whimbrel-witness";

const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_CHARACTER_DEVICE: u32 = 0o020_000;

/// Finds the witness: where [`WITNESS_VARIABLE`] says, else beside this executable, else in the target folder that this
/// executable was built into.
///
/// # Errors
/// [`LabError::NoWitness`] if it is at none of these places.
pub fn find_witness() -> Result<PathBuf, LabError> {
    if let Some(path) = std::env::var_os(WITNESS_VARIABLE) {
        let path = PathBuf::from(path);
        return if path.is_file() { Ok(path) } else { Err(LabError::NoWitness) };
    }
    let executable = std::env::current_exe().map_err(|_| LabError::NoWitness)?;
    let beside = executable.parent().map(|folder| folder.join(WITNESS_NAME));
    let below = executable.ancestors().skip(1).map(|folder| folder.join(WITNESS_BELOW_TARGET));
    beside.into_iter().chain(below).find(|path| path.is_file()).ok_or(LabError::NoWitness)
}

/// Writes the initramfs to `target`, from a witness and the `kernel` folder of the cache.
///
/// # Errors
/// Whatever reading and writing these files gives.
pub fn write_initramfs(target: &Path, witness: &Path, kernel: &Path) -> io::Result<()> {
    let list = fs::read_to_string(kernel.join("modules.load"))?;
    let mut archive = Archive::new(BufWriter::new(File::create(target)?));
    archive.directory("dev")?;
    // The kernel opens /dev/console for init before init can mount anything.
    archive.character_device("dev/console", 5, 1)?;
    archive.character_device("dev/null", 1, 3)?;
    archive.directory("modules")?;
    for name in list.lines() {
        archive.file(
            &format!("modules/{name}"),
            0o644,
            &fs::read(kernel.join("modules").join(name))?,
        )?;
    }
    archive.file("modules/load", 0o644, list.as_bytes())?;
    archive.file("init", 0o755, &fs::read(witness)?)?;
    archive.finish()?.flush()
}

/// A newc archive being written.
struct Archive<W> {
    output: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    fn new(output: W) -> Self {
        Self { output, entries: 0 }
    }

    fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, TYPE_DIRECTORY | 0o755, (0, 0), &[])
    }

    fn character_device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(name, TYPE_CHARACTER_DEVICE | 0o600, (major, minor), &[])
    }

    fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, TYPE_FILE | permissions, (0, 0), content)
    }

    fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.output)
    }

    /// A header of 13 fields of 8 hexadecimal digits, the name with its NUL, and the content, each padded to 4 bytes.
    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let name_size = u32::try_from(name.len() + 1).map_err(|_| io::ErrorKind::InvalidInput)?;
        // Inode, mode, owner, group, links, time, size, device, special device, length of the name, no checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.output.write_all(b"070701")?;
        for field in fields {
            write!(self.output, "{field:08x}")?;
        }
        self.output.write_all(name.as_bytes())?;
        let header_bytes = 6 + 8 * fields.len();
        self.output.write_all(&[0; 4][..1 + padding(header_bytes + name.len() + 1)])?;
        self.output.write_all(content)?;
        self.output.write_all(&[0; 4][..padding(content.len())])
    }
}

fn padding(length: usize) -> usize {
    (4 - length % 4) % 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_the_kernels_layout() {
        let mut archive = Archive::new(Vec::new());
        archive.character_device("dev/console", 5, 1).unwrap();
        archive.file("init", 0o755, b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        let text = |range| String::from_utf8_lossy(&bytes[range]).into_owned();
        assert_eq!(text(0..6), "070701");
        assert_eq!(text(14..22), "00002180", "a character device for its owner only");
        assert_eq!((text(78..86), text(86..94)), ("00000005".to_owned(), "00000001".to_owned()));
        assert_eq!(text(94..102), "0000000c", "the length of the name");
        // 110 bytes of header and 12 of the name, padded to 124.
        assert_eq!(bytes[110..124], *b"dev/console\0\0\0");
        assert_eq!(text(124..130), "070701");
        assert_eq!(text(124 + 54..124 + 62), "00000005", "the size");
        // 110 bytes of header and 5 of the name, padded to 116; 5 of content, padded to 8.
        assert_eq!(bytes[124 + 110..124 + 124], *b"init\0\0hello\0\0\0");
        assert!(bytes.ends_with(b"TRAILER!!!\0\0\0\0") && bytes.len() % 4 == 0);
    }
}
