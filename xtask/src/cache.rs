//! The cache for downloads, kernels and images, shared by all runs on this machine.
//!
//! Entries are named by their contents, made in a temporary place and renamed into the cache, so
//! an entry that exists is whole. File locks keep two runs from making the same entry, and
//! `clean-cache` from removing what a run uses.
#![forbid(unsafe_code)]

use crate::failure::Failure;
use anyhow::Context;
use anyhow::Result;
use sha2::Digest;
use sha2::Sha256;
use std::fs;
use std::fs::File;
use std::fs::TryLockError;
use std::path::Path;
use std::path::PathBuf;

/// Everything that the cache may hold: what `clean-cache` removes.
const KINDS: &[Kind] = &[
    Kind::Apt,
    Kind::Packages,
    Kind::Kernels,
    Kind::Images,
    Kind::Emulators,
    Kind::Builds,
    Kind::Tools,
];

/// The kinds of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// State of the package manager, one entry an archive suite.
    Apt,
    /// Debian packages as downloaded.
    Packages,
    /// Kernels with the modules that guests and the rig load.
    Kernels,
    /// Initramfs archives.
    Images,
    /// What the rig's computer runs on.
    Emulators,
    /// Source and objects of kernels that are built.
    Builds,
    /// Programs that tasks run, where the machine has none.
    Tools,
}

impl Kind {
    fn folder(self) -> &'static str {
        match self {
            Kind::Apt => "apt",
            Kind::Packages => "packages",
            Kind::Kernels => "kernels",
            Kind::Images => "images",
            Kind::Emulators => "emulators",
            Kind::Builds => "builds",
            Kind::Tools => "tools",
        }
    }
}

/// The cache, in use by this program: as long as this value lives, `clean-cache` of another
/// program waits for nothing and fails.
#[derive(Debug)]
pub(crate) struct Cache {
    root: PathBuf,
    _in_use: File,
}

/// A lock of the cache, released when dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Cache {
    /// Opens the cache at `${VPCI_CACHE:-${XDG_CACHE_HOME:-~/.cache}/vm-vpci}`, made if need be.
    pub(crate) fn open() -> Result<Self> {
        Self::open_at(default_root()?)
    }

    /// Opens the cache at `root`.
    pub(crate) fn open_at(root: PathBuf) -> Result<Self> {
        let in_use = lock_file(&root, "in-use")?;
        in_use.lock_shared()?;
        Ok(Self {
            root,
            _in_use: in_use,
        })
    }

    /// Folder of a kind of entries, made if need be.
    pub(crate) fn folder(&self, kind: Kind) -> Result<PathBuf> {
        let folder = self.root.join(kind.folder());
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(folder)
    }

    /// Takes the lock `name`; says so when another run holds it and then waits.
    pub(crate) fn lock(&self, name: &str) -> Result<Lock> {
        let file = lock_file(&self.root, name)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("waiting for another run that is preparing {name}");
                file.lock()?;
            }
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        Ok(Lock { _file: file })
    }

    /// The folder `name` of a kind of entries. When it does not exist, `fill` puts its contents
    /// into the empty folder it is given, which then becomes the entry.
    pub(crate) fn entry(
        &self,
        kind: Kind,
        name: &str,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let entry = self.folder(kind)?.join(name);
        if entry.exists() {
            return Ok(entry);
        }
        let _lock = self.lock(&format!("{}-{name}", kind.folder()))?;
        if entry.exists() {
            return Ok(entry);
        }
        // Nobody else uses this name while the lock is held: what is there is left over from a
        // run that was killed.
        let making = entry.with_file_name(format!("{name}.partial"));
        remove(&making)?;
        fs::create_dir(&making).with_context(|| format!("cannot make {}", making.display()))?;
        if let Err(error) = fill(&making) {
            remove(&making)?;
            return Err(error);
        }
        fs::rename(&making, &entry)
            .with_context(|| format!("cannot rename {} to {name}", making.display()))?;
        Ok(entry)
    }

    /// Removes the oldest entries of a kind whose names start with `prefix`, but for the newest
    /// `keep`. Entries of the last day stay in any case: another run may be reading them.
    pub(crate) fn prune(&self, kind: Kind, prefix: &str, keep: usize) -> Result<()> {
        let day = std::time::Duration::from_secs(24 * 60 * 60);
        let mut entries = Vec::new();
        for entry in fs::read_dir(self.folder(kind)?)? {
            let entry = entry?;
            let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                entries.push((age, entry.path()));
            }
        }
        entries.sort();
        for (age, path) in entries.into_iter().skip(keep) {
            if age > day {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

/// Removes all that the cache holds; fails when another run is using it.
pub(crate) fn clean() -> Result<()> {
    let root = default_root()?;
    if !root.exists() {
        println!("{} does not exist: nothing to remove", root.display());
        return Ok(());
    }
    clean_at(&root)?;
    println!("removed the contents of {}", root.display());
    Ok(())
}

fn clean_at(root: &Path) -> Result<()> {
    let in_use = lock_file(root, "in-use")?;
    match in_use.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let text = format!(
                "{} is in use by another run; try again later",
                root.display()
            );
            return Err(Failure::Failed(text).into());
        }
        Err(TryLockError::Error(error)) => return Err(error.into()),
    }
    for kind in KINDS {
        remove(&root.join(kind.folder()))?;
    }
    Ok(())
}

fn default_root() -> Result<PathBuf> {
    root_from(|name| std::env::var_os(name).filter(|value| !value.is_empty()))
}

fn root_from(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Result<PathBuf> {
    if let Some(path) = variable("VPCI_CACHE") {
        return Ok(std::path::absolute(path)?);
    }
    if let Some(path) = variable("XDG_CACHE_HOME") {
        return Ok(PathBuf::from(path).join("vm-vpci"));
    }
    match variable("HOME") {
        Some(path) => Ok(PathBuf::from(path).join(".cache/vm-vpci")),
        None => {
            Err(Failure::Lacking("no HOME: set VPCI_CACHE to a folder for downloads".into()).into())
        }
    }
}

fn lock_file(root: &Path, name: &str) -> Result<File> {
    let folder = root.join("locks");
    let path = folder.join(name);
    fs::create_dir_all(&folder)
        .and_then(|()| File::options().create(true).append(true).open(&path))
        .map_err(|error| {
            let text = format!(
                "cannot open {}: {error}; VPCI_CACHE names another place",
                path.display()
            );
            Failure::Lacking(text).into()
        })
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Name for contents: the first 16 hexadecimal digits of the SHA-256 over `parts`, each with its
/// length.
pub(crate) fn content_key<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open_at(dir.path().join("cache")).unwrap();
        (dir, cache)
    }

    #[test]
    fn an_entry_is_made_once() {
        let (_dir, cache) = cache();
        for round in 0..3 {
            let entry = cache.entry(Kind::Images, "name", |folder| {
                assert_eq!(round, 0, "made again");
                Ok(fs::write(folder.join("file"), "contents")?)
            });
            assert_eq!(
                fs::read_to_string(entry.unwrap().join("file")).unwrap(),
                "contents"
            );
        }
    }

    #[test]
    fn an_entry_that_cannot_be_made_leaves_nothing_behind() {
        let (_dir, cache) = cache();
        let result = cache.entry(Kind::Images, "name", |folder| {
            fs::write(folder.join("file"), "half")?;
            anyhow::bail!("disk full")
        });
        assert!(result.is_err());
        let folder = cache.folder(Kind::Images).unwrap();
        assert_eq!(fs::read_dir(folder).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_run_left_does_not_get_into_an_entry() {
        let (_dir, cache) = cache();
        let partial = cache.folder(Kind::Kernels).unwrap().join("k.partial");
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join("rubbish"), "").unwrap();
        let entry = cache.entry(Kind::Kernels, "k", |_| Ok(())).unwrap();
        assert_eq!(fs::read_dir(entry).unwrap().count(), 0);
        assert!(!partial.exists());
    }

    #[test]
    fn two_threads_make_one_entry_between_them() {
        let (dir, _cache) = cache();
        let made = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let cache = Cache::open_at(dir.path().join("cache")).unwrap();
                    let fill = |folder: &Path| {
                        made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        std::thread::sleep(std::time::Duration::from_millis(50));
                        Ok(fs::write(folder.join("file"), "whole")?)
                    };
                    let entry = cache.entry(Kind::Images, "name", fill).unwrap();
                    assert_eq!(fs::read_to_string(entry.join("file")).unwrap(), "whole");
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn cleaning_waits_for_nobody_and_spares_what_is_not_ours() {
        let (_dir, cache) = cache();
        let root = cache.root.clone();
        cache.entry(Kind::Packages, "p", |_| Ok(())).unwrap();
        fs::write(root.join("something-else"), "").unwrap();
        let error = clean_at(&root).unwrap_err().to_string();
        assert!(error.contains("in use"), "{error}");
        assert!(root.join("packages/p").exists());
        drop(cache);
        clean_at(&root).unwrap();
        assert!(!root.join("packages").exists());
        assert!(root.join("something-else").exists());
    }

    #[test]
    fn recent_entries_are_not_pruned() {
        let (_dir, cache) = cache();
        for name in ["a-1", "a-2", "b-1"] {
            cache.entry(Kind::Images, name, |_| Ok(())).unwrap();
        }
        let old = cache.folder(Kind::Images).unwrap().join("a-1");
        let then = std::time::SystemTime::now() - std::time::Duration::from_secs(3 * 24 * 3600);
        File::open(&old).unwrap().set_modified(then).unwrap();
        cache.prune(Kind::Images, "a-", 1).unwrap();
        assert!(!old.exists());
        cache.prune(Kind::Images, "a-", 0).unwrap();
        assert!(cache.folder(Kind::Images).unwrap().join("a-2").exists());
        assert!(cache.folder(Kind::Images).unwrap().join("b-1").exists());
    }

    #[test]
    fn the_place_of_the_cache_follows_the_environment() {
        let place = |pairs: &[(&str, &str)]| {
            let map: BTreeMap<_, _> = pairs.iter().copied().collect();
            root_from(|name| map.get(name).map(|value| value.into()))
        };
        assert_eq!(
            place(&[("VPCI_CACHE", "/c"), ("HOME", "/h")]).unwrap(),
            Path::new("/c")
        );
        assert_eq!(
            place(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]).unwrap(),
            Path::new("/x/vm-vpci")
        );
        assert_eq!(
            place(&[("HOME", "/h")]).unwrap(),
            Path::new("/h/.cache/vm-vpci")
        );
        assert!(place(&[]).is_err());
        assert!(place(&[("VPCI_CACHE", "relative")]).unwrap().is_absolute());
    }

    #[test]
    fn content_keys_depend_on_every_part_and_its_length() {
        let key = |parts: &[&[u8]]| content_key(parts.iter().copied());
        assert_eq!(key(&[b"ab", b"c"]), key(&[b"ab", b"c"]));
        assert_ne!(key(&[b"ab", b"c"]), key(&[b"a", b"bc"]));
        assert_eq!(key(&[b""]).len(), 16);
    }
}
