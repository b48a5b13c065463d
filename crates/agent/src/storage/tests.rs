//! With the real `qemu-img`. Needs root: files are given to another user.

use std::fs;
use std::process::Command;

use whimbrel_api::vm::ImageFormat;
use whimbrel_qemu::process::UnprivilegedUser;

use super::image::ImageTool;
use super::*;

/// A test has nobody to hold up.
const ASIDE: Aside = Aside(());

const NOBODY: UnprivilegedUser = UnprivilegedUser { uid: 65534, gid: 65534 };

struct Place {
    dir: tempfile::TempDir,
    storages: Storages,
}

fn name() -> Name {
    "shared".parse().unwrap()
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let storages = Storages::default();
    let path = dir.path().to_str().unwrap().to_owned();
    storages.put(Storage { name: name(), path, shared: true });
    Place { dir, storages }
}

impl Place {
    fn folder(&self) -> Folder {
        self.storages.folder(&ASIDE, &name()).unwrap()
    }

    /// The code with which a path is refused.
    fn refused(&self, path: &str) -> ErrorCode {
        let file = StoragePath { storage: name(), path: path.to_owned() };
        self.storages.existing_file(&ASIDE, &file).unwrap_err().code
    }
}

fn tool() -> ImageTool {
    ImageTool::beside(Path::new("/usr/bin/qemu-system-x86_64"), NOBODY)
}

/// Runs the real `qemu-img` as root, to make what the agent shall look at.
fn qemu_img(dir: &Path, arguments: &[&str]) {
    let done = Command::new("qemu-img").current_dir(dir).args(arguments).output().unwrap();
    assert!(done.status.success(), "{arguments:?}: {done:?}");
}

#[test]
fn only_plain_files_beneath_the_storage_are_opened() {
    let place = place();
    let dir = place.dir.path();
    fs::create_dir(dir.join("sub")).unwrap();
    fs::write(dir.join("sub/plain"), "x").unwrap();
    std::os::unix::fs::symlink("sub/plain", dir.join("link")).unwrap();
    std::os::unix::fs::symlink("sub", dir.join("linked-folder")).unwrap();
    std::os::unix::fs::symlink("/etc", dir.join("out")).unwrap();
    fs::write(dir.join("first"), "x").unwrap();
    fs::hard_link(dir.join("first"), dir.join("second")).unwrap();
    nix::unistd::mkfifo(&dir.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap();

    let good = StoragePath::new(name(), "sub/plain").unwrap();
    assert_eq!(place.storages.existing_file(&ASIDE, &good).unwrap(), dir.join("sub/plain"));
    let bad = [
        "link",
        "linked-folder/plain",
        "out/passwd",
        "second",
        "pipe",
        "socket",
        "sub",
        "absent",
        "sub/plain/x",
        "../x",
        "/etc/passwd",
        "sub/../../x",
    ];
    for path in bad {
        assert_eq!(place.refused(path), ErrorCode::BadPath, "{path}");
    }
}

#[test]
fn new_files_are_the_owners_alone_and_never_replace() {
    use std::os::unix::fs::MetadataExt;
    let place = place();
    let folder = place.folder();
    folder.create_folders("vms/a").unwrap();
    folder.create_folders("vms/a").unwrap();
    folder.create_file("vms/a/vda.raw", NOBODY).unwrap();
    let made = fs::metadata(place.dir.path().join("vms/a/vda.raw")).unwrap();
    assert_eq!((made.mode() & 0o7777, made.uid(), made.gid()), (0o600, 65534, 65534));
    let above = fs::metadata(place.dir.path().join("vms/a")).unwrap();
    assert_eq!((above.mode() & 0o7777, above.uid()), (0o711, 0));
    let again = folder.create_file("vms/a/vda.raw", NOBODY).unwrap_err();
    assert!(matches!(again, BeneathError::Exists { .. }), "{again}");

    std::os::unix::fs::symlink("/tmp", place.dir.path().join("vms/b")).unwrap();
    assert!(folder.create_folders("vms/b/c").is_err());
    assert!(folder.create_file("vms/b/x", NOBODY).is_err());
    assert!(folder.remove_file("vms/b/x").is_err());
    folder.remove_empty_folder("vms/a").unwrap();
    folder.remove_file("vms/a/vda.raw").unwrap();
    folder.remove_file("vms/a/vda.raw").unwrap();
    folder.remove_empty_folder("vms/a").unwrap();
    assert!(!place.dir.path().join("vms/a").exists());
}

#[tokio::test]
async fn images_are_made_copied_and_grown() {
    let place = place();
    let dir = place.dir.path();
    let folder = place.folder();
    let new = folder.create_file("new.qcow2", NOBODY).unwrap();
    tool().create(new, ImageFormat::Qcow2, 10 << 20).await.unwrap();
    let made = folder.open_file("new.qcow2").unwrap();
    let facts = tool().inspect(&made, "new", ImageFormat::Qcow2).await.unwrap();
    assert_eq!(facts.virtual_bytes, 10 << 20);

    fs::write(dir.join("source.raw"), vec![7_u8; 1 << 20]).unwrap();
    let source = folder.open_file("source.raw").unwrap();
    let facts = tool().inspect(&source, "source", ImageFormat::Raw).await.unwrap();
    assert_eq!(facts.virtual_bytes, 1 << 20);
    let target = folder.create_file("copy.qcow2", NOBODY).unwrap();
    tool().copy(source, ImageFormat::Raw, target, ImageFormat::Qcow2, Some(2 << 20)).await.unwrap();
    let copy = folder.open_file("copy.qcow2").unwrap();
    let facts = tool().inspect(&copy, "copy", ImageFormat::Qcow2).await.unwrap();
    assert_eq!(facts.virtual_bytes, 2 << 20);
    qemu_img(dir, &["convert", "-f", "qcow2", "-O", "raw", "copy.qcow2", "back.raw"]);
    let back = fs::read(dir.join("back.raw")).unwrap();
    assert!(back[..1 << 20].iter().all(|byte| *byte == 7));
    assert!(back[1 << 20..].iter().all(|byte| *byte == 0));
}

#[tokio::test]
async fn images_that_hide_something_are_refused() {
    let place = place();
    let dir = place.dir.path();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "base", "1M"]);
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "backed"]);
    qemu_img(
        dir,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "data_file=elsewhere,data_file_raw=on",
            "outside",
            "1M",
        ],
    );
    let patched = |at: usize, byte: u8| {
        let mut bytes = fs::read(dir.join("base")).unwrap();
        bytes[at] |= byte;
        bytes
    };
    fs::write(dir.join("locked"), patched(35, 2)).unwrap();
    fs::write(dir.join("dirty"), patched(79, 1)).unwrap();
    fs::write(dir.join("corrupt"), patched(79, 2)).unwrap();
    fs::write(dir.join("from-the-future"), patched(7, 4)).unwrap();
    let mut damaged = fs::read(dir.join("base")).unwrap();
    // The L1 table: its one entry points far beyond the end of the file.
    let l1 = usize::try_from(u64::from_be_bytes(damaged[40..48].try_into().unwrap())).unwrap();
    damaged[l1..l1 + 8].copy_from_slice(&(1_u64 << 63 | 1 << 40).to_be_bytes());
    fs::write(dir.join("damaged"), damaged).unwrap();
    fs::write(dir.join("short"), b"QFI\xfb\0\0").unwrap();
    fs::write(dir.join("text"), "a plain text").unwrap();

    let folder = place.folder();
    let refused = [
        "backed",
        "outside",
        "locked",
        "dirty",
        "corrupt",
        "from-the-future",
        "damaged",
        "short",
        "text",
    ];
    for image in refused {
        let file = folder.open_file(image).unwrap();
        let error = tool().inspect(&file, image, ImageFormat::Qcow2).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::BadImage, "{image}: {error}");
    }
    let base = folder.open_file("base").unwrap();
    tool().inspect(&base, "base", ImageFormat::Qcow2).await.unwrap();
    let as_raw = tool().inspect(&base, "base", ImageFormat::Raw).await.unwrap_err();
    assert!(as_raw.message.contains("begins like a qcow2"), "{as_raw}");
    fs::write(dir.join("empty"), "").unwrap();
    let empty = folder.open_file("empty").unwrap();
    assert!(tool().inspect(&empty, "empty", ImageFormat::Raw).await.is_err());
}

#[tokio::test]
async fn a_token_is_seen_where_it_was_written_and_nowhere_else() {
    let (here, elsewhere) = (place(), place());
    let token = here.storages.write_token(&ASIDE, &name()).unwrap();
    assert!(here.storages.token_seen(&ASIDE, &name(), &token).unwrap());
    assert!(!elsewhere.storages.token_seen(&ASIDE, &name(), &token).unwrap());
    for bad in ["", "../../etc/passwd", &"a".repeat(33), &"G".repeat(32)] {
        let refused =
            here.storages.token_seen(&ASIDE, &name(), &SharedToken { token: bad.to_owned() });
        assert_eq!(refused.unwrap_err().code, ErrorCode::BadRequest, "{bad}");
    }
    let file = here.dir.path().join(format!(".whimbrel-token-{}", token.token));
    here.storages.sweep_tokens(&ASIDE);
    assert!(file.exists());
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    fs::File::options().write(true).open(&file).unwrap().set_modified(old).unwrap();
    here.storages.sweep_tokens(&ASIDE);
    assert!(!file.exists());
}

#[test]
fn a_storage_that_is_not_there_says_so() {
    let storages = Storages::default();
    let nowhere = Storage { name: name(), path: "/nonexistent/x".to_owned(), shared: false };
    storages.put(nowhere);
    assert!(storages.report(&ASIDE, &name()).unwrap().trouble.is_some());
    for bad in ["", "relative", "/a/../b", "/a\nb"] {
        let storage = Storage { name: name(), path: bad.to_owned(), shared: false };
        assert_eq!(Storages::check(&storage).unwrap_err().code, ErrorCode::BadPath, "{bad:?}");
    }
    let unknown: Name = "unknown".parse().unwrap();
    assert_eq!(storages.report(&ASIDE, &unknown).unwrap_err().code, ErrorCode::NotFound);
}

#[tokio::test]
async fn a_storage_that_hangs_holds_nobody_up_but_those_who_wait_for_it() {
    let storages = Arc::new(Storages::default());
    let (let_go, hanging) = std::sync::mpsc::channel::<()>();
    let hanging = Arc::new(Mutex::new(hanging));
    let mut calls = Vec::new();
    for _ in 0..CALLS_MAX {
        let (storages, hanging) = (Arc::clone(&storages), Arc::clone(&hanging));
        calls.push(tokio::spawn(async move {
            let hangs = move |_: &Aside| {
                // Until the other end is dropped.
                let _closed = hanging.lock().map(|it| it.recv());
                Ok(())
            };
            storages.aside(hangs).await
        }));
    }
    // This runtime has one thread, and it is here: nobody blocks it.
    while storages.calls.available_permits() > 0 {
        tokio::task::yield_now().await;
    }
    let refused = storages.aside(|_| Ok(())).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Busy);
    drop(let_go);
    for call in calls {
        call.await.unwrap().unwrap();
    }
    storages.aside(|_| Ok(())).await.unwrap();
}

/// Every image that a user could name and must not get, and every place where none may be: refused by the code that says what is
/// wrong, and what is near to it is taken.
#[tokio::test]
async fn what_stands_where_an_image_should_be_is_refused_for_what_it_is() {
    let place = place();
    let dir = place.dir.path();
    let make = |arguments: &[&str]| qemu_img(dir, arguments);
    fs::write(dir.join("raw"), vec![1; 1 << 20]).unwrap();
    make(&["create", "-q", "-f", "qcow2", "small-clusters", "8M", "-o", "cluster_size=512"]);
    make(&["create", "-q", "-f", "qcow2", "large-clusters", "8M", "-o", "cluster_size=2M"]);
    make(&["create", "-q", "-f", "qcow2", "old", "8M", "-o", "compat=0.10"]);
    make(&["create", "-q", "-f", "qcow2", "snapshots", "8M"]);
    make(&["snapshot", "-c", "inner", "snapshots"]);
    make(&["create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", "out", "8M"]);
    make(&["convert", "-O", "qcow2", "raw", "whole"]);
    fs::write(dir.join("luks"), b"LUKS\xba\xbe\0\x01....").unwrap();
    let whole = fs::read(dir.join("whole")).unwrap();
    // By a byte, a sector, a cluster, and to the middle of its tables.
    for (name, less) in
        [("byte", 1), ("sector", 512), ("cluster", 65_536), ("most", whole.len() - 65_600)]
    {
        fs::write(dir.join(format!("short-{name}")), &whole[..whole.len() - less]).unwrap();
    }
    fs::write(dir.join("vmdk"), b"KDMV....").unwrap();
    fs::write(dir.join("odd"), vec![1; (1 << 20) + 1]).unwrap();

    use ImageFormat::{Qcow2, Raw};
    let cases: [(&str, ImageFormat, bool); 19] = [
        ("raw", Raw, true),
        ("raw", Qcow2, false),
        ("small-clusters", Qcow2, true),
        ("large-clusters", Qcow2, true),
        ("old", Qcow2, true),
        ("snapshots", Qcow2, true),
        ("whole", Qcow2, true),
        ("whole", Raw, false),
        ("out", Qcow2, false),
        ("out", Raw, false),
        ("luks", Raw, false),
        ("luks", Qcow2, false),
        ("short-byte", Qcow2, true),
        ("short-sector", Qcow2, true),
        ("short-cluster", Qcow2, false),
        ("short-most", Qcow2, false),
        ("vmdk", Raw, false),
        ("vmdk", Qcow2, false),
        ("odd", Raw, true),
    ];
    let folder = place.folder();
    for (image, format, good) in cases {
        let before = fs::read(dir.join(image)).unwrap();
        let file = folder.open_file(image).unwrap();
        let found = tool().inspect(&file, image, format).await;
        assert_eq!(found.is_ok(), good, "{image} as {}: {found:?}", format.as_str());
        if let Err(error) = found {
            assert_eq!(error.code, ErrorCode::BadImage, "{image}: {error}");
        }
        assert!(fs::read(dir.join(image)).unwrap() == before, "{image} was changed");
    }
}

/// A program in the place of `qemu-img` that takes all it can get.
#[tokio::test]
async fn whoever_looks_at_a_strangers_image_is_bounded() {
    use std::os::unix::fs::PermissionsExt;
    let place = place();
    let engine = place.dir.path().join("qemu-system-x86_64");
    let program = place.dir.path().join("qemu-img");
    fs::write(&program, "#!/bin/sh\necho \"$(ulimit -v) $(ulimit -t) $(ulimit -c)\" >&2\nexit 1\n")
        .unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(place.dir.path().join("raw"), "raw").unwrap();
    let file = place.folder().open_file("raw").unwrap();
    let tool = ImageTool::beside(&engine, NOBODY);
    let told = tool.inspect(&file, "raw", ImageFormat::Raw).await.unwrap_err();
    assert!(told.message.ends_with("2097152 30 0"), "{told}");
}
