//! The host's files: `/sys`, `/proc` and `/dev`, below a root that tests choose.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// Where the host's files are.
#[derive(Debug, Clone)]
pub(super) struct Root(PathBuf);

impl Root {
    /// The files below `path`; `/` for the host itself.
    pub(super) fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The place of `path`, which is relative to the root.
    pub(super) fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.0.join(path)
    }

    /// A text file without surrounding white space.
    pub(super) fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let bytes = fs::read(self.path(path)).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// Names in a directory, in order; numbers by value; none where there is no directory.
    pub(super) fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(path)) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
        names
    }

    /// Opens a device for reading and writing, and closes it again.
    ///
    /// # Errors
    ///
    /// What the host says.
    pub(super) fn open(&self, path: impl AsRef<Path>) -> io::Result<()> {
        let mut options = File::options();
        options.read(true).write(true);
        options.open(self.path(path)).map(drop)
    }

    /// The value of `key` in a file of `key: value` lines.
    pub(super) fn field(&self, path: impl AsRef<Path>, key: &str) -> Option<String> {
        let text = self.text(path)?;
        text.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == key).then(|| value.trim().to_owned())
        })
    }

    /// True if the CPUs have a feature, by its name in `/proc/cpuinfo`.
    pub(super) fn has_cpu_flag(&self, flag: &str) -> bool {
        let flags = self.field("proc/cpuinfo", "flags").unwrap_or_default();
        flags.split_whitespace().any(|word| word == flag)
    }
}
