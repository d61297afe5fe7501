//! Debian packages, fetched without touching the machine's configuration.
#![forbid(unsafe_code)]

use crate::cache::Cache;
use crate::cache::Kind;
use crate::cache::Lock;
use crate::command;
use crate::deb;
use crate::deb::Package;
use crate::failure::Failure;
use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Archive that packages come from; `VPCI_DEBIAN_MIRROR` names another.
const MIRROR: &str = "http://deb.debian.org/debian";
const MIRROR_VARIABLE: &str = "VPCI_DEBIAN_MIRROR";

/// Keys that sign Debian's archive, from package debian-archive-keyring.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Age at which an index is fetched again.
const INDEX_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// Has packages on this machine, installing from its own sources those that are missing, and says so
/// first. Without the right to install: [`Failure::Lacking`] with the command to run.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let missing: Vec<_> = packages
        .iter()
        .copied()
        .filter(|package| !is_installed(package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let arguments = ["install", "--yes", "--no-install-recommends"];
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::Lacking(format!(
            "not installed: {}; run: sudo apt-get {} {}",
            missing.join(", "),
            arguments.join(" "),
            missing.join(" ")
        ))
        .into());
    }
    require_apt()?;
    eprintln!("installing from Debian: {}", missing.join(" "));
    let install = || {
        let mut command = Command::new("apt-get");
        command.args(arguments).args(&missing);
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command::run_on_stderr(&mut command)
    };
    if install().is_ok() {
        return Ok(());
    }
    // The machine's index may be missing or stale. Some of its sources failing is no reason to
    // stop: what counts is whether the packages can be had then.
    eprintln!("fetching the package index first");
    let _ = command::run_on_stderr(Command::new("apt-get").arg("update"));
    install().map_err(|error| Failure::Lacking(format!("{error:#}")).into())
}

fn is_installed(package: &str) -> bool {
    let status = command::output(Command::new("dpkg-query").args([
        "--show",
        "--showformat",
        "${Status}",
        package,
    ]));
    status.is_ok_and(|status| status == "install ok installed")
}

fn require_apt() -> Result<()> {
    if command::output(Command::new("apt-get").arg("--version")).is_err() {
        let text = "no apt-get: packages can only be fetched on a Debian system";
        return Err(Failure::Lacking(text.into()).into());
    }
    Ok(())
}

fn mirror() -> String {
    std::env::var(MIRROR_VARIABLE).unwrap_or_else(|_| MIRROR.into())
}

/// One suite of the archive, with package-manager state of its own in the cache: neither the
/// machine's sources nor its index are read or changed. Its other settings, such as a proxy, hold.
#[derive(Debug)]
pub(crate) struct Suite<'a> {
    cache: &'a Cache,
    name: &'static str,
    /// The release that the suite's packages build on, where those are wanted as well.
    base: Option<&'static str>,
    folder: PathBuf,
}

impl<'a> Suite<'a> {
    /// The suite `name`, with an index not older than a day. Where the index cannot be fetched an
    /// older one will do, with a warning.
    pub(crate) fn open(cache: &'a Cache, name: &'static str) -> Result<Self> {
        Self::open_in(cache, name, None, cache.folder(Kind::Apt)?.join(name))
    }

    /// The suite `name` together with the release `base`, so that dependencies can be followed.
    pub(crate) fn open_on(
        cache: &'a Cache,
        name: &'static str,
        base: &'static str,
    ) -> Result<Self> {
        let folder = cache.folder(Kind::Apt)?.join(format!("{name}+{base}"));
        Self::open_in(cache, name, Some(base), folder)
    }

    fn open_in(
        cache: &'a Cache,
        name: &'static str,
        base: Option<&'static str>,
        folder: PathBuf,
    ) -> Result<Self> {
        require_apt()?;
        if !Path::new(KEYRING).exists() {
            let text = format!("no {KEYRING}: install package debian-archive-keyring");
            return Err(Failure::Lacking(text).into());
        }
        let suite = Self {
            cache,
            name,
            base,
            folder,
        };
        let lock = suite.lock()?;
        suite.write_configuration()?;
        if suite.index_is_stale() {
            suite.update()?;
        }
        drop(lock);
        Ok(suite)
    }

    /// Keeps other runs from changing the state of this suite meanwhile.
    fn lock(&self) -> Result<Lock> {
        let folder = self.folder.file_name().unwrap_or_default();
        self.cache.lock(&format!("apt-{}", folder.display()))
    }

    fn write_configuration(&self) -> Result<()> {
        for folder in [
            "state/lists/partial",
            "cache/archives/partial",
            "preferences.d",
        ] {
            fs::create_dir_all(self.folder.join(folder))?;
        }
        fs::write(self.folder.join("status"), "")?;
        let source: String = std::iter::once(self.name)
            .chain(self.base)
            .map(|name| format!("deb [signed-by={KEYRING}] {} {name} main\n", mirror()))
            .collect();
        let list = self.folder.join("sources.list");
        if fs::read_to_string(&list).is_ok_and(|old| old == source) {
            return Ok(());
        }
        // Another source: the old index says nothing about it.
        let _ = fs::remove_file(self.stamp());
        fs::write(list, source)?;
        Ok(())
    }

    fn stamp(&self) -> PathBuf {
        self.folder.join("updated")
    }

    fn index_is_stale(&self) -> bool {
        let modified = fs::metadata(self.stamp()).and_then(|data| data.modified());
        let age = modified.map(|time| time.elapsed().unwrap_or(Duration::ZERO));
        !age.is_ok_and(|age| age < INDEX_AGE)
    }

    /// Fetches the index again, however old it is.
    pub(crate) fn refresh(&self) -> Result<()> {
        let _lock = self.lock()?;
        self.update()
    }

    fn update(&self) -> Result<()> {
        eprintln!("fetching the index of {}", self.name);
        let mut command = self.apt("apt-get");
        command.args(["update", "--error-on=any"]);
        match command::run_on_stderr(&mut command) {
            Ok(()) => Ok(fs::write(self.stamp(), "")?),
            Err(_) if self.stamp().exists() => {
                eprintln!("warning: going on with an older index of {}", self.name);
                Ok(())
            }
            Err(_) => {
                let text = format!(
                    "cannot fetch the index of {} from {} (see above); {MIRROR_VARIABLE} names \
                     another mirror",
                    self.name,
                    mirror()
                );
                Err(Failure::Lacking(text).into())
            }
        }
    }

    fn apt(&self, program: &str) -> Command {
        let folder = |name: &str| self.folder.join(name).display().to_string();
        let mut command = Command::new(program);
        command.env("LC_ALL", "C");
        for (key, value) in [
            ("Dir::State", folder("state")),
            ("Dir::State::status", folder("status")),
            ("Dir::Cache", folder("cache")),
            ("Dir::Etc::sourcelist", folder("sources.list")),
            ("Dir::Etc::sourceparts", "-".into()),
            ("Dir::Etc::preferences", folder("preferences")),
            ("Dir::Etc::preferencesparts", folder("preferences.d")),
            ("APT::Architecture", "amd64".into()),
            ("APT::Architectures", "amd64".into()),
            ("APT::Sandbox::User", "root".into()),
            ("Acquire::Languages", "none".into()),
            (
                "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled",
                "false".into(),
            ),
            ("Acquire::Retries", "3".into()),
        ] {
            command.arg("-o").arg(format!("{key}={value}"));
        }
        command
    }

    /// Every version of package `name` in this suite; none when there is no such package.
    pub(crate) fn versions(&self, name: &str) -> Result<Vec<Package>> {
        let mut command = self.apt("apt-cache");
        command.args(["show", "--all-versions", name]);
        let _lock = self.lock()?;
        let text = match command::output(&mut command) {
            Ok(text) => text,
            Err(error) if error.to_string().contains("No packages found") => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let packages = deb::parse_packages(&text)
            .with_context(|| format!("index of {}: package {name}", self.name))?;
        Ok(packages
            .into_iter()
            .filter(|package| package.name == name)
            .collect())
    }

    /// The newest version of package `name` in this suite that `accept` takes.
    pub(crate) fn newest(
        &self,
        name: &str,
        accept: impl Fn(&Package) -> bool,
    ) -> Result<Option<Package>> {
        let versions = self.versions(name)?.into_iter().filter(accept);
        Ok(versions.max_by(|a, b| deb::compare_versions(&a.version, &b.version)))
    }

    /// The package's file, from the cache or downloaded and verified by apt.
    pub(crate) fn download(&self, package: &Package) -> Result<PathBuf> {
        let entry = self.cache.entry(Kind::Packages, &package.sha256, |folder| {
            let megabytes = package.size as f64 / 1e6;
            eprintln!(
                "downloading {} {} ({megabytes:.1} MB)",
                package.name, package.version
            );
            let mut command = self.apt("apt-get");
            command.arg("download").current_dir(folder);
            command.arg(format!("{}={}", package.name, package.version));
            command::run_on_stderr(&mut command)
        });
        let entry = entry.with_context(|| format!("package {} of {}", package.name, self.name))?;
        for file in fs::read_dir(&entry)? {
            let path = file?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                return Ok(path);
            }
        }
        bail!(
            "{} holds no package; run `cargo xtask clean-cache`",
            entry.display()
        )
    }

    /// `apt-get install` of package `name` into an empty system, preferring this suite to its
    /// base.
    fn install(&self, name: &str) -> Command {
        let mut command = self.apt("apt-get");
        command.args(["install", "--yes", "--no-install-recommends"]);
        command.args(["--target-release", self.name, name]);
        command
    }

    /// Name and version of package `name` and of everything that it needs, sorted by name.
    pub(crate) fn closure(&self, name: &str) -> Result<Vec<(String, String)>> {
        let _lock = self.lock()?;
        let text = command::output(self.install(name).arg("--simulate"))?;
        let mut packages = parse_simulation(&text);
        packages.sort_unstable();
        Ok(packages)
    }

    /// Downloads package `name` and everything that it needs into the new folder `archives`; the
    /// files, verified by apt.
    pub(crate) fn download_closure(&self, name: &str, archives: &Path) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(archives.join("partial"))?;
        let _lock = self.lock()?;
        let mut command = self.install(name);
        command.arg("--download-only").arg("-o");
        command.arg(format!("Dir::Cache::archives={}", archives.display()));
        command::run_on_stderr(&mut command)?;
        let files = fs::read_dir(archives)?.map(|file| Ok(file?.path()));
        let files = files.collect::<Result<Vec<_>>>()?;
        let is_package = |path: &PathBuf| path.extension().is_some_and(|name| name == "deb");
        Ok(files.into_iter().filter(is_package).collect())
    }
}

/// The `Inst NAME (VERSION ...)` lines of a simulated installation.
fn parse_simulation(text: &str) -> Vec<(String, String)> {
    let parse = |line: &str| {
        let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
        let version = rest.split([' ', ')']).next()?;
        Some((name.to_string(), version.to_string()))
    };
    text.lines().filter_map(parse).collect()
}

/// Unpacks a package's files into `folder`.
pub(crate) fn unpack(package: &Path, folder: &Path) -> Result<()> {
    command::run_on_stderr(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(package)
            .arg(folder),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suite<'a>(cache: &'a Cache, folder: &Path) -> Suite<'a> {
        Suite {
            cache,
            name: "bookworm",
            base: None,
            folder: folder.join("apt"),
        }
    }

    #[test]
    fn what_is_installed_is_not_installed_again() {
        assert!(!is_installed("no-such-package"));
        // Part of every Debian system.
        if is_installed("dpkg") {
            install(&["dpkg"]).unwrap();
        }
    }

    #[test]
    fn a_suite_on_a_base_names_both() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open_at(dir.path().join("cache")).unwrap();
        let suite = Suite {
            name: "trixie-backports",
            base: Some("trixie"),
            ..suite(&cache, dir.path())
        };
        suite.write_configuration().unwrap();
        let source = fs::read_to_string(suite.folder.join("sources.list")).unwrap();
        assert_eq!(source.lines().count(), 2);
        assert!(source.lines().all(|line| line.contains(KEYRING)));
    }

    #[test]
    fn a_simulated_installation_tells_names_and_versions() {
        let text = "NOTE: This is only a simulation!\n\
                    Inst libc6 (2.41-12 Debian:13.1/stable [amd64]) []\n\
                    Inst qemu-system-x86 (1:11.1.3+ds-1~bpo13+1 Debian [amd64])\n\
                    Conf libc6 (2.41-12 Debian:13.1/stable [amd64])\n";
        let pair = |name: &str, version: &str| (name.to_string(), version.to_string());
        assert_eq!(
            parse_simulation(text),
            [
                pair("libc6", "2.41-12"),
                pair("qemu-system-x86", "1:11.1.3+ds-1~bpo13+1")
            ]
        );
    }

    #[test]
    fn a_suite_names_one_signed_source_and_keeps_its_state_to_itself() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open_at(dir.path().join("cache")).unwrap();
        let suite = suite(&cache, dir.path());
        suite.write_configuration().unwrap();
        let source = fs::read_to_string(suite.folder.join("sources.list")).unwrap();
        assert!(
            source.starts_with(&format!("deb [signed-by={KEYRING}] ")),
            "{source}"
        );
        assert!(source.ends_with(" bookworm main\n"), "{source}");
        let command = suite.apt("apt-get");
        let options: Vec<_> = command
            .get_args()
            .map(|arg| arg.to_string_lossy())
            .collect();
        for key in [
            "Dir::State",
            "Dir::State::status",
            "Dir::Cache",
            "Dir::Etc::sourcelist",
        ] {
            let option = format!("{key}={}", suite.folder.display());
            assert!(options.iter().any(|arg| arg.starts_with(&option)), "{key}");
        }
    }

    #[test]
    fn an_index_is_stale_when_missing_old_or_of_another_source() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open_at(dir.path().join("cache")).unwrap();
        let suite = suite(&cache, dir.path());
        suite.write_configuration().unwrap();
        assert!(suite.index_is_stale());
        fs::write(suite.stamp(), "").unwrap();
        assert!(!suite.index_is_stale());
        let old = std::time::SystemTime::now() - INDEX_AGE;
        fs::File::options()
            .write(true)
            .open(suite.stamp())
            .unwrap()
            .set_modified(old)
            .unwrap();
        assert!(suite.index_is_stale());
        fs::write(suite.stamp(), "").unwrap();
        suite.write_configuration().unwrap();
        assert!(!suite.index_is_stale(), "the same source");
        fs::write(
            suite.folder.join("sources.list"),
            "deb http://other bookworm main\n",
        )
        .unwrap();
        suite.write_configuration().unwrap();
        assert!(suite.index_is_stale(), "another source");
    }
}
