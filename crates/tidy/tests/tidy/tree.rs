//! The tree as files with their text. Files that are no UTF-8 are passed over.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders that hold nothing written by us.
const PASSED_OVER: [&str; 3] = ["target", ".git", "node_modules"];

/// A file of the tree.
pub(crate) struct TextFile {
    /// Its path from the root, with `/`.
    pub(crate) path: String,
    pub(crate) text: String,
}

/// The root of the workspace.
pub(crate) fn root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    root.expect("this package lies two folders deep").to_owned()
}

/// Every text file of the tree, sorted by path.
pub(crate) fn files() -> Vec<TextFile> {
    let root = root();
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        for entry in entries.flatten() {
            let (path, kind) = (entry.path(), entry.file_type().expect("read_dir knows it"));
            let name = entry.file_name().to_string_lossy().into_owned();
            if kind.is_dir() && !PASSED_OVER.contains(&name.as_str()) {
                folders.push(path);
            } else if kind.is_file() {
                let path_text = path.strip_prefix(&root).expect("found below the root");
                let path_text = path_text.to_str().expect("our names are ASCII").to_owned();
                // A file may vanish while the tree is read: an editor's, or another test's.
                if let Ok(text) = fs::read_to_string(&path) {
                    found.push(TextFile { path: path_text, text });
                }
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(
        found.iter().any(|file| file.path == "Cargo.toml"),
        "{} is no workspace",
        root.display()
    );
    found
}

/// Every Rust file of the tree.
pub(crate) fn rust_files() -> Vec<TextFile> {
    files().into_iter().filter(|file| file.path.ends_with(".rs")).collect()
}
