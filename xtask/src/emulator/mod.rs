//! The emulator that the rig's computer runs on: QEMU of the newest Debian release's backports,
//! with the libraries it was built for, unpacked into the cache. Nothing is installed, so any
//! Debian release will do as host, and every machine runs the same emulator
//! (`docs/testing.md`, "What the emulator can break").
#![forbid(unsafe_code)]

mod mend;

use crate::apt;
use crate::apt::Suite;
use crate::cache;
use crate::cache::Cache;
use crate::cache::Kind;
use crate::command;
use crate::failure::Failure;
use anyhow::Context;
use anyhow::Result;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

/// Where the emulator comes from, and where what it depends on does.
const SUITE: &str = "trixie-backports";
const BASE: &str = "trixie";
const PACKAGE: &str = "qemu-system-x86";
const PROGRAM: &str = "qemu-system-x86_64";

/// Marks emulators in the cache that [`mend`] has seen.
const MENDED: &str = "mended 3";

/// Emulators that the cache keeps.
const KEEP: usize = 2;

/// An unpacked emulator.
#[derive(Clone, Debug)]
pub(crate) struct Emulator {
    root: PathBuf,
    version: String,
}

impl Emulator {
    /// The newest emulator of [`SUITE`], from the cache or downloaded.
    pub(crate) fn fetch(cache: &Cache) -> Result<Self> {
        let suite = Suite::open_on(cache, SUITE, BASE)?;
        match Self::fetch_from(cache, &suite) {
            Ok(emulator) => Ok(emulator),
            // The archive drops a version when the next one appears: look again, once.
            Err(error) => {
                eprintln!("emulator: {error:#}; trying with a fresh index");
                suite.refresh()?;
                Self::fetch_from(cache, &suite)
            }
        }
    }

    fn fetch_from(cache: &Cache, suite: &Suite<'_>) -> Result<Self> {
        let packages = suite.closure(PACKAGE)?;
        let (_, version) = packages
            .iter()
            .find(|(name, _)| name == PACKAGE)
            .with_context(|| format!("{SUITE} has no {PACKAGE}"))?;
        let parts = packages
            .iter()
            .flat_map(|(name, version)| [name.as_bytes(), version.as_bytes()])
            .chain([MENDED.as_bytes()]);
        let name = format!("qemu-{}", cache::content_key(parts));
        let root = cache.entry(Kind::Emulators, &name, |folder| {
            eprintln!("downloading {PACKAGE} {version} with what it needs (40 MB)");
            let archives = folder.join("archives");
            for package in suite.download_closure(PACKAGE, &archives)? {
                apt::unpack(&package, folder)?;
            }
            fs::remove_dir_all(archives)?;
            mend_program(&folder.join("usr/bin").join(PROGRAM))
        })?;
        cache.prune(Kind::Emulators, "qemu-", KEEP)?;
        let emulator = Self {
            root,
            version: version.clone(),
        };
        emulator.check()?;
        Ok(emulator)
    }

    /// Starts the emulator for a word, so that a machine it cannot run on is named as such.
    fn check(&self) -> Result<()> {
        let mut command = Command::new("setpriv");
        command.args(self.command_line()).arg("--version");
        command::output(&mut command).map(drop).map_err(|error| {
            Failure::Lacking(format!("cannot run {PACKAGE} {}: {error:#}", self.version)).into()
        })
    }

    /// Its Debian version.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// The program and its first arguments: its own dynamic linker with its own libraries, then
    /// the places of its firmware.
    pub(crate) fn command_line(&self) -> Vec<PathBuf> {
        let path = |below: &str| self.root.join(below);
        vec![
            path("usr/lib64/ld-linux-x86-64.so.2"),
            "--library-path".into(),
            path("usr/lib/x86_64-linux-gnu"),
            path("usr/bin").join(PROGRAM),
            "-L".into(),
            path("usr/share/qemu"),
            "-L".into(),
            path("usr/share/seabios"),
        ]
    }

    /// Its folder: what its packages hold.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Folder of the parts that the emulator loads at run time (`QEMU_MODULE_DIR`).
    pub(crate) fn modules(&self) -> PathBuf {
        self.root.join("usr/lib/x86_64-linux-gnu/qemu")
    }
}

/// Takes known defects out of the program, or says which do not look as expected: it may be a version
/// without them.
fn mend_program(path: &Path) -> Result<()> {
    let mut program = fs::read(path).with_context(|| path.display().to_string())?;
    if let Err(error) = mend::mend(&mut program) {
        eprintln!(
            "emulator: {PROGRAM} stays as it is in a part ({error:#}); \
             if guests die of triple faults, see docs/testing.md"
        );
    }
    fs::write(path, program).with_context(|| path.display().to_string())
}

#[cfg(test)]
impl Emulator {
    /// An emulator unpacked in `root`.
    pub(crate) fn in_folder(root: &std::path::Path) -> Self {
        Self {
            root: root.into(),
            version: "1:11.0-test".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_runs_with_its_own_linker_and_libraries() {
        let line = Emulator::in_folder(Path::new("/cache/qemu")).command_line();
        assert_eq!(
            line[0],
            Path::new("/cache/qemu/usr/lib64/ld-linux-x86-64.so.2")
        );
        for path in line.iter().filter(|path| path.is_absolute()) {
            assert!(path.starts_with("/cache/qemu"), "{}", path.display());
        }
        assert!(line[3].ends_with("usr/bin/qemu-system-x86_64"));
    }

    #[test]
    fn an_emulator_that_does_not_start_is_lacking() {
        let folder = tempfile::tempdir().unwrap();
        let error = Emulator::in_folder(folder.path()).check().unwrap_err();
        let failure = error.downcast_ref::<Failure>();
        assert!(matches!(failure, Some(Failure::Lacking(_))), "{error:#}");
    }
}
