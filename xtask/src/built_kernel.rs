//! A kernel built from Debian's source, with the project's configuration and drivers
//! (`guest-images/linux`): what no package of Debian has.
//!
//! The build tree stays in the cache, so that a change of a driver only compiles that and links.
#![forbid(unsafe_code)]

use crate::apt;
use crate::apt::Suite;
use crate::cache;
use crate::cache::Cache;
use crate::cache::Kind;
use crate::command;
use crate::deb::Package;
use crate::failure::Failure;
use crate::kernel;
use crate::kernel::Family;
use crate::kernel::Kernel;
use crate::workspace;
use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

/// Changes with how a kernel is built, so that older cache entries are not used.
const LAYOUT: &str = "1";

/// Kernels kept; each change of a driver makes another.
const KEEP_KERNELS: usize = 3;
/// Build trees kept: about 2 GB each.
const KEEP_TREES: usize = 1;

/// Metapackage that depends on the newest kernel source of a suite.
const METAPACKAGE: &str = "linux-source";

/// What a build needs of the machine.
const TOOLS: &[&str] = &[
    "bc",
    "bison",
    "flex",
    "gcc",
    "libc6-dev",
    "libelf-dev",
    "libssl-dev",
    "make",
    "xz-utils",
];

/// Folder of the configuration and the drivers in the project.
const FOLDER: &str = "guest-images/linux";
/// The configuration in it.
const CONFIG: &str = "rig.config";
/// Folder of the drivers in the kernel's source.
const DRIVERS: &str = "drivers/iommu/vm-vpci";

/// Lines by which the kernel's source takes the drivers in.
const HOOKS: &[(&str, &str)] = &[
    (
        "drivers/iommu/Kconfig",
        "source \"drivers/iommu/vm-vpci/Kconfig\"",
    ),
    ("drivers/iommu/Makefile", "obj-y += vm-vpci/"),
];

/// Variables that would otherwise put the time and the machine into a kernel.
const REPRODUCIBLE: &[(&str, &str)] = &[
    ("KBUILD_BUILD_TIMESTAMP", "1970-01-01"),
    ("KBUILD_BUILD_USER", "vm-vpci"),
    ("KBUILD_BUILD_HOST", "vm-vpci"),
];

/// Finds the newest source of a family and puts a kernel built from it into the cache.
pub(crate) fn fetch(cache: &Cache, family: &'static Family, suite: &Suite<'_>) -> Result<Kernel> {
    let source = find(suite, family.version)?;
    let additions = Additions::read(&workspace::root().join(FOLDER))?;
    let key = additions.key(&source);
    let folder = cache.entry(Kind::Kernels, &format!("{}-{key}", family.name), |folder| {
        // Two versions of the drivers share a tree.
        let _lock = cache.lock(&format!("build-{}", source.name))?;
        apt::install(TOOLS)?;
        let tree = Tree::open(cache, suite, &source)?;
        tree.build(&additions)?;
        fs::copy(tree.out("arch/x86/boot/bzImage"), folder.join("vmlinuz"))?;
        let release = fs::read_to_string(tree.out("include/config/kernel.release"))?;
        fs::write(folder.join("release"), release.trim())?;
        // Everything is built in.
        for role in family.roles {
            fs::create_dir(folder.join(role.name()))?;
            fs::write(folder.join(role.name()).join("list"), "")?;
        }
        Ok(())
    })?;
    cache.prune(Kind::Kernels, &format!("{}-", family.name), KEEP_KERNELS)?;
    Kernel::stored(family, folder)
}

/// The newest source package whose version starts with `version`.
fn find(suite: &Suite<'_>, version: &str) -> Result<Package> {
    let wanted = |package: &Package| package.version.starts_with(version);
    let newest = suite.newest(METAPACKAGE, wanted)?;
    let name = newest.and_then(|package| {
        let mut depends = package.depends.into_iter();
        depends.find(|dependency| dependency.name.starts_with(METAPACKAGE))
    });
    let lacking = || Failure::Lacking(format!("no {METAPACKAGE} of version {version}*"));
    let name = name.ok_or_else(lacking)?.name;
    let package = suite.newest(&name, wanted)?;
    Ok(package.ok_or_else(lacking)?)
}

/// What the project adds to a kernel.
#[derive(Debug)]
struct Additions {
    config: String,
    /// Files of the drivers by name.
    drivers: BTreeMap<String, Vec<u8>>,
}

impl Additions {
    fn read(folder: &Path) -> Result<Self> {
        let config = folder.join(CONFIG);
        let config = fs::read_to_string(&config).with_context(|| config.display().to_string())?;
        let mut drivers = BTreeMap::new();
        for file in fs::read_dir(folder)? {
            let file = file?;
            let name = file.file_name().to_string_lossy().into_owned();
            if is_source(&name) {
                drivers.insert(name, fs::read(file.path())?);
            }
        }
        Ok(Self { config, drivers })
    }

    fn key(&self, source: &Package) -> String {
        let fixed = [LAYOUT, &source.sha256, &self.config].map(str::as_bytes);
        let files = self.drivers.iter();
        let files = files.flat_map(|(name, contents)| [name.as_bytes(), contents]);
        cache::content_key(fixed.into_iter().chain(files))
    }
}

/// Whether the kernel's build reads a file; the others are for people.
fn is_source(name: &str) -> bool {
    name == "Kconfig" || name == "Makefile" || name.ends_with(".c") || name.ends_with(".h")
}

/// Source and objects of a kernel, in the cache.
#[derive(Debug)]
struct Tree {
    root: PathBuf,
}

impl Tree {
    /// The tree of a source package, unpacked if it is not there.
    fn open(cache: &Cache, suite: &Suite<'_>, source: &Package) -> Result<Self> {
        let digest: String = source.sha256.chars().take(16).collect();
        let root = cache.entry(Kind::Builds, &format!("linux-{digest}"), |folder| {
            let package = suite.download(source);
            // The archive drops a version when the next one appears.
            let package = package.or_else(|error| {
                suite.refresh()?;
                Err(error.context("the index is fresh now: run this once more"))
            })?;
            eprintln!("unpacking {} {}", source.name, source.version);
            let unpacked = folder.join("package");
            apt::unpack(&package, &unpacked)?;
            let archive = unpacked.join(format!("usr/src/{}.tar.xz", source.name));
            let destination = folder.join("source");
            fs::create_dir(&destination)?;
            let mut tar = Command::new("tar");
            tar.args(["--extract", "--xz", "--strip-components=1", "--file"]);
            tar.arg(archive).arg("--directory").arg(&destination);
            command::run_on_stderr(&mut tar)?;
            for (file, line) in HOOKS {
                let path = destination.join(file);
                let file = File::options().append(true).open(&path);
                let mut file = file.with_context(|| path.display().to_string())?;
                writeln!(file, "\n{line}")?;
            }
            fs::create_dir(folder.join("out"))?;
            Ok(fs::remove_dir_all(unpacked)?)
        })?;
        cache.prune(Kind::Builds, "linux-", KEEP_TREES)?;
        Ok(Self { root })
    }

    fn out(&self, path: &str) -> PathBuf {
        self.root.join("out").join(path)
    }

    /// Builds the kernel with these additions.
    fn build(&self, additions: &Additions) -> Result<()> {
        let start = Instant::now();
        let drivers = self.root.join("source").join(DRIVERS);
        write_changed(&drivers, &additions.drivers)?;
        let fragment = self.root.join(CONFIG);
        fs::write(&fragment, &additions.config)?;
        let mut setting = std::ffi::OsString::from("KCONFIG_ALLCONFIG=");
        setting.push(&fragment);
        self.make(Command::new("make").arg(setting).arg("allnoconfig"))?;
        let missing = missing(&additions.config, &fs::read_to_string(self.out(".config"))?);
        if !missing.is_empty() {
            bail!("{CONFIG}: Kconfig does not take {}", missing.join(", "));
        }
        eprintln!(
            "building the kernel: 12 to 35 minutes on two cores the first time, 1 to 2 after a \
             change of a driver; the compiler's output is in {}",
            self.log().display()
        );
        let jobs = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        self.make(Command::new("make").arg(format!("-j{jobs}")).arg("bzImage"))?;
        eprintln!("kernel built in {} s", start.elapsed().as_secs());
        Ok(())
    }

    fn log(&self) -> PathBuf {
        self.root.join("build.log")
    }

    /// Runs make in the source, with its output in the log; errors also on standard error.
    fn make(&self, command: &mut Command) -> Result<()> {
        let log = File::create(self.log())?;
        command.current_dir(self.root.join("source"));
        command.arg("O=../out").envs(REPRODUCIBLE.iter().copied());
        command::run(command.stdout(log))
    }
}

/// Makes `folder` hold exactly `files`, touching only what differs: make looks at times.
fn write_changed(folder: &Path, files: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    fs::create_dir_all(folder)?;
    for file in fs::read_dir(folder)? {
        let file = file?;
        if !files.contains_key(&*file.file_name().to_string_lossy()) {
            fs::remove_file(file.path())?;
        }
    }
    for (name, contents) in files {
        let path = folder.join(name);
        if !fs::read(&path).is_ok_and(|old| old == *contents) {
            fs::write(path, contents)?;
        }
    }
    Ok(())
}

/// Options that the fragment asks for and the configuration does not have: Kconfig drops what has
/// an unmet dependency without a word.
fn missing(fragment: &str, config: &str) -> Vec<String> {
    let option = |line: &&str| line.starts_with("CONFIG_") || line.starts_with("# CONFIG_");
    let has = |wanted: &str| config.lines().any(|line| line == wanted);
    let is_unset = |line: &str| {
        let name = line
            .strip_prefix("# ")
            .and_then(|rest| rest.split(' ').next());
        let set = |name: &str| {
            config
                .lines()
                .any(|line| line.starts_with(&format!("{name}=")))
        };
        name.is_some_and(|name| !set(name))
    };
    let lines = fragment.lines().filter(option);
    let lines = lines.filter(|line| !has(line) && !is_unset(line));
    lines.map(String::from).collect()
}

/// Builds the kernel and prints where it is.
pub(crate) fn run() -> Result<()> {
    let cache = Cache::open()?;
    let kernel = kernel::fetch(&cache, kernel::BUILT)?;
    println!("{} {}", kernel.release, kernel.image().display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> Package {
        Package {
            name: "linux-source-7.3".into(),
            version: "7.3.4-1".into(),
            depends: Vec::new(),
            size: 0,
            sha256: "0123456789abcdef0123".into(),
        }
    }

    #[test]
    fn the_project_has_a_configuration_and_both_drivers() {
        let additions = Additions::read(&workspace::root().join(FOLDER)).unwrap();
        for name in ["Kconfig", "Makefile", "pviommu.c", "testdev.c"] {
            assert!(additions.drivers.contains_key(name), "{name}");
        }
        assert_eq!(additions.drivers.len(), 4, "what is for people stays out");
        for option in ["PCI_HYPERV", "VM_VPCI_PVIOMMU", "VM_VPCI_TESTDEV"] {
            let line = format!("CONFIG_{option}=y");
            assert!(additions.config.lines().any(|other| other == line));
        }
        for contents in additions.drivers.values() {
            let text = String::from_utf8_lossy(contents);
            let first = text.lines().next().unwrap_or_default();
            assert!(first.contains("SPDX-License-Identifier: GPL-2.0-only"));
        }
    }

    #[test]
    fn every_input_of_a_build_is_in_its_key() {
        let additions = |config: &str, name: &str, text: &str| Additions {
            config: config.into(),
            drivers: BTreeMap::from([(name.to_string(), text.into())]),
        };
        let key = additions("c", "a.c", "x").key(&source());
        assert_eq!(key, additions("c", "a.c", "x").key(&source()));
        assert_ne!(key, additions("d", "a.c", "x").key(&source()));
        assert_ne!(key, additions("c", "b.c", "x").key(&source()));
        assert_ne!(key, additions("c", "a.c", "y").key(&source()));
        let other = Package {
            sha256: "f".into(),
            ..source()
        };
        assert_ne!(key, additions("c", "a.c", "x").key(&other));
    }

    #[test]
    fn only_files_that_changed_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("drivers");
        let mut files = BTreeMap::from([
            ("a.c".to_string(), b"one".to_vec()),
            ("b.c".to_string(), b"two".to_vec()),
        ]);
        write_changed(&folder, &files).unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH;
        let at = |name: &str| folder.join(name);
        for name in ["a.c", "b.c"] {
            let file = File::options().write(true).open(at(name)).unwrap();
            file.set_modified(old).unwrap();
        }
        fs::write(at("gone.c"), "").unwrap();
        files.insert("b.c".into(), b"three".to_vec());
        write_changed(&folder, &files).unwrap();
        let modified = |name: &str| fs::metadata(at(name)).unwrap().modified().unwrap();
        assert_eq!(modified("a.c"), old);
        assert_ne!(modified("b.c"), old);
        assert_eq!(fs::read(at("b.c")).unwrap(), b"three");
        assert!(!at("gone.c").exists());
    }

    #[test]
    fn options_that_kconfig_drops_are_found() {
        let fragment = "# About this\n# CONFIG_OFF is not set\nCONFIG_A=y\nCONFIG_N=8\n";
        let good = "CONFIG_A=y\nCONFIG_N=8\n# CONFIG_OFF is not set\n";
        assert!(missing(fragment, good).is_empty());
        assert!(missing(fragment, "CONFIG_A=y\nCONFIG_N=8\n").is_empty());
        let bad = "# CONFIG_A is not set\nCONFIG_N=64\nCONFIG_OFF=y\n";
        assert_eq!(
            missing(fragment, bad),
            ["# CONFIG_OFF is not set", "CONFIG_A=y", "CONFIG_N=8"]
        );
    }
}
