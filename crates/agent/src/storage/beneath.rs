//! A folder in which paths are opened: never out of it, never through a link, never anything but a plain file.
//!
//! Names come from users, and whoever may write into a storage (another host, a careless script) may have put a link
//! there. `openat2` with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS` (Linux 5.6) makes the kernel
//! refuse on the way; what was opened is looked at before it is used. Calls block for as long as the storage does.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags, fstat, fstatvfs, openat2,
};
use rustix::io::Errno;
use whimbrel_qemu::process::UnprivilegedUser;

const RESOLVE: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// `openat2` asks to be called again when a folder on the way was renamed meanwhile; so often it is.
const TRIES_MAX: usize = 16;

/// What `st_blocks` counts in, in bytes, whatever the file system's own blocks are.
const BLOCK_BYTES: u64 = 512;

/// A folder of a VM: QEMU's user may pass, and change nothing.
const FOLDER_MODE: Mode = Mode::from_raw_mode(0o711);

/// Why a path could not be used.
#[derive(Debug, thiserror::Error)]
pub enum BeneathError {
    /// The storage's folder itself cannot be opened.
    #[error("cannot open the storage's folder {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There is no such file.
    #[error("there is no file `{path}` in the storage")]
    Absent {
        /// The path.
        path: String,
    },
    /// The path leaves the folder, or has a symbolic link in it.
    #[error("`{path}` has a symbolic link in it, or leaves the storage")]
    Link {
        /// The path.
        path: String,
    },
    /// It is not a plain file.
    #[error("`{path}` is a {what}, not a plain file")]
    NotAFile {
        /// The path.
        path: String,
        /// What it is.
        what: &'static str,
    },
    /// The file has another name as well.
    #[error("`{path}` has {names} names (hard links); a disk may have only one")]
    HardLink {
        /// The path.
        path: String,
        /// How many.
        names: u64,
    },
    /// It is there already.
    #[error("`{path}` exists already in the storage")]
    Exists {
        /// The path.
        path: String,
    },
    /// Something else failed.
    #[error("cannot {doing} `{path}`")]
    Io {
        /// What was to be done.
        doing: &'static str,
        /// The path.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Room in a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes that may still be used (by others than root).
    pub available_bytes: u64,
    /// Whether nothing can be written there.
    pub read_only: bool,
}

/// An open folder.
#[derive(Debug)]
pub struct Folder {
    descriptor: OwnedFd,
    path: PathBuf,
}

impl Folder {
    /// Opens a folder. Its own path may have links in it: the administrator chose it.
    ///
    /// # Errors
    /// [`BeneathError::Folder`].
    pub fn open(path: &Path) -> Result<Self, BeneathError> {
        let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        let descriptor = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| {
            BeneathError::Folder { path: path.to_owned(), source: errno.into() }
        })?;
        Ok(Self { descriptor, path: path.to_owned() })
    }

    /// Room in the folder's file system.
    ///
    /// # Errors
    /// [`BeneathError::Folder`].
    pub fn space(&self) -> Result<Space, BeneathError> {
        let found = fstatvfs(&self.descriptor).map_err(|errno| BeneathError::Folder {
            path: self.path.clone(),
            source: errno.into(),
        })?;
        Ok(Space {
            total_bytes: found.f_blocks.saturating_mul(found.f_frsize),
            available_bytes: found.f_bavail.saturating_mul(found.f_frsize),
            read_only: found.f_flag.contains(StatVfsMountFlags::RDONLY),
        })
    }

    /// Which file system the folder is in.
    ///
    /// # Errors
    /// [`BeneathError::Folder`].
    pub fn device(&self) -> Result<u64, BeneathError> {
        let found = fstat(&self.descriptor).map_err(|errno| BeneathError::Folder {
            path: self.path.clone(),
            source: errno.into(),
        })?;
        Ok(found.st_dev)
    }

    /// What a plain file occupies, in bytes: holes in it are nothing.
    ///
    /// # Errors
    /// As [`Folder::open_file`].
    pub fn occupied_bytes(&self, path: &str) -> Result<u64, BeneathError> {
        let file = self.open_file(path)?;
        let found = fstat(&file).map_err(io("look at", path))?;
        Ok(u64::try_from(found.st_blocks).unwrap_or(0).saturating_mul(BLOCK_BYTES))
    }

    /// Opens an existing plain file for reading.
    ///
    /// # Errors
    /// [`BeneathError`], also for a link, a folder, a device, a pipe, a socket, and a file with a second name.
    pub fn open_file(&self, path: &str) -> Result<File, BeneathError> {
        // Without NONBLOCK the opening of a pipe would wait for its other end.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let descriptor = self.open_at(path, flags, Mode::empty(), "open")?;
        check_plain(&descriptor, path)?;
        Ok(File::from(descriptor))
    }

    /// Makes a new file, mode 0600 and `owner`'s from birth, and opens it for writing.
    ///
    /// # Errors
    /// [`BeneathError`]; [`BeneathError::Exists`] for whatever stands there already.
    pub fn create_file(&self, path: &str, owner: UnprivilegedUser) -> Result<File, BeneathError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let descriptor = self.open_at(path, flags, Mode::RUSR | Mode::WUSR, "make")?;
        let (uid, gid) =
            (rustix::fs::Uid::from_raw(owner.uid), rustix::fs::Gid::from_raw(owner.gid));
        // Nothing is in it yet, so that it was root's for a moment tells nobody anything.
        rustix::fs::fchown(&descriptor, Some(uid), Some(gid)).map_err(io("give away", path))?;
        Ok(File::from(descriptor))
    }

    /// Makes a folder and those above it, where they are not there yet.
    ///
    /// # Errors
    /// [`BeneathError`].
    pub fn create_folders(&self, path: &str) -> Result<(), BeneathError> {
        for (at, _) in path.match_indices('/').chain([(path.len(), "")]) {
            let part = &path[..at];
            let (parent, name) = part.rsplit_once('/').unwrap_or((".", part));
            let parent = self.open_folder(parent)?;
            match rustix::fs::mkdirat(&parent, name, FOLDER_MODE) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(io("make the folder", part)(errno)),
            }
            // The umask may have taken the right to pass.
            let made = openat2(
                &parent,
                name,
                OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
                Mode::empty(),
                RESOLVE,
            )
            .map_err(|errno| refusal(errno, "open the folder", part))?;
            let mode = Mode::from_raw_mode(fstat(&made).map_err(io("look at", part))?.st_mode);
            if !mode.contains(FOLDER_MODE) {
                rustix::fs::fchmod(&made, mode | FOLDER_MODE).map_err(io("open up", part))?;
            }
        }
        Ok(())
    }

    /// Removes a plain file; one that is not there is no error.
    ///
    /// # Errors
    /// [`BeneathError`].
    pub fn remove_file(&self, path: &str) -> Result<(), BeneathError> {
        self.unlink(path, AtFlags::empty())
    }

    /// Removes an empty folder; one that is not there, or not empty, is no error.
    ///
    /// # Errors
    /// [`BeneathError`].
    pub fn remove_empty_folder(&self, path: &str) -> Result<(), BeneathError> {
        self.unlink(path, AtFlags::REMOVEDIR)
    }

    /// Makes durable which names a folder has.
    ///
    /// # Errors
    /// [`BeneathError`].
    pub fn sync_folder(&self, path: &str) -> Result<(), BeneathError> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let folder = self.open_at(path, flags, Mode::empty(), "open the folder")?;
        rustix::fs::fsync(&folder).map_err(io("sync the folder", path))
    }

    fn unlink(&self, path: &str, flags: AtFlags) -> Result<(), BeneathError> {
        let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
        let parent = match self.open_folder(parent) {
            Err(BeneathError::Absent { .. }) => return Ok(()),
            other => other?,
        };
        match rustix::fs::unlinkat(&parent, name, flags) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::NOTEMPTY) if flags == AtFlags::REMOVEDIR => Ok(()),
            Err(errno) => Err(io("remove", path)(errno)),
        }
    }

    fn open_folder(&self, path: &str) -> Result<OwnedFd, BeneathError> {
        let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        self.open_at(path, flags, Mode::empty(), "open the folder")
    }

    pub(super) fn open_at(
        &self,
        path: &str,
        flags: OFlags,
        mode: Mode,
        doing: &'static str,
    ) -> Result<OwnedFd, BeneathError> {
        for _ in 1..TRIES_MAX {
            match openat2(&self.descriptor, path, flags, mode, RESOLVE) {
                Err(Errno::AGAIN) => {}
                other => return other.map_err(|errno| refusal(errno, doing, path)),
            }
        }
        Err(io(doing, path)(Errno::AGAIN))
    }
}

fn refusal(errno: Errno, doing: &'static str, path: &str) -> BeneathError {
    let path = path.to_owned();
    match errno {
        Errno::NOENT => BeneathError::Absent { path },
        Errno::LOOP | Errno::XDEV => BeneathError::Link { path },
        Errno::EXIST => BeneathError::Exists { path },
        // ENXIO: a socket, or a device without driver. ENOTDIR: a file where a folder is needed.
        Errno::NXIO => BeneathError::NotAFile { path, what: "socket or device" },
        Errno::ISDIR => BeneathError::NotAFile { path, what: "folder" },
        Errno::NOTDIR => BeneathError::NotAFile { path, what: "path through a file" },
        errno => BeneathError::Io { doing, path, source: errno.into() },
    }
}

fn check_plain(descriptor: &OwnedFd, path: &str) -> Result<(), BeneathError> {
    let found = fstat(descriptor).map_err(io("look at", path))?;
    let what = match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile if found.st_nlink > 1 => {
            return Err(BeneathError::HardLink { path: path.to_owned(), names: found.st_nlink });
        }
        FileType::RegularFile => return Ok(()),
        FileType::Directory => "folder",
        FileType::Fifo => "named pipe",
        FileType::CharacterDevice | FileType::BlockDevice => "device",
        FileType::Socket => "socket",
        _ => "special file",
    };
    Err(BeneathError::NotAFile { path: path.to_owned(), what })
}

fn io(doing: &'static str, path: &str) -> impl FnOnce(Errno) -> BeneathError {
    let path = path.to_owned();
    move |errno| BeneathError::Io { doing, path, source: errno.into() }
}
