//! Kernels, found by family and stored with the modules that guests and the rig load: Debian's own,
//! and one that is built from Debian's source.
#![forbid(unsafe_code)]

use crate::apt;
use crate::apt::Suite;
use crate::built_kernel;
use crate::cache;
use crate::cache::Cache;
use crate::cache::Kind;
use crate::deb::Package;
use crate::failure::Failure;
use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use guest_images::modules::ModuleTree;
use lzma_rust2::XzReader;
use std::fs;
use std::fs::File;
use std::io;
use std::io::Read;
use std::path::Path;
use std::path::PathBuf;

/// Changes with what is stored of a kernel, so that older cache entries are not used.
const LAYOUT: &str = "1";

/// Versions kept of a family.
const KEEP_KERNELS: usize = 2;
/// Package files kept; all families together have about a dozen.
const KEEP_PACKAGES: usize = 24;

/// Metapackage that depends on the newest kernel of a suite.
const METAPACKAGE: &str = "linux-image-amd64";

/// What a kernel is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// Debian's packages of kernel and modules.
    Packages,
    /// Debian's source with the project's drivers.
    Source,
}

/// A line of kernels that the project is tested with; versions are found, not pinned.
#[derive(Debug)]
pub(crate) struct Family {
    pub(crate) name: &'static str,
    suite: &'static str,
    /// Start of the versions that belong to it.
    pub(crate) version: &'static str,
    origin: Origin,
    /// What its modules are packed for.
    pub(crate) roles: &'static [Role],
}

/// All families; the first one also runs the rig's L1.
pub(crate) const FAMILIES: &[Family] = &[
    Family {
        name: "linux-7",
        suite: "trixie-backports",
        version: "7.",
        origin: Origin::Packages,
        roles: &[Role::Rig, Role::Guest],
    },
    Family {
        name: "linux-6.12",
        suite: "bookworm-backports",
        version: "6.12.",
        origin: Origin::Packages,
        roles: &[Role::Guest],
    },
    Family {
        name: "linux-6.1",
        suite: "bookworm",
        version: "6.1.",
        origin: Origin::Packages,
        roles: &[Role::Guest],
    },
];

/// The kernel that has a driver for the pvIOMMU; all else of the rig does without it.
pub(crate) const BUILT: &Family = &Family {
    name: "linux-7-pviommu",
    suite: "trixie-backports",
    version: "7.",
    origin: Origin::Source,
    roles: &[Role::Rig, Role::Guest],
};

/// Part that a kernel plays: decides which modules its initramfs carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// L1: runs the reference VMM on its KVM.
    Rig,
    /// L2: has the vPCI bus.
    Guest,
}

impl Role {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Role::Rig => "rig",
            Role::Guest => "guest",
        }
    }

    /// Modules that the part needs, where they are not built in.
    fn modules(self) -> &'static [&'static str] {
        match self {
            Role::Rig => &[
                "virtio_pci",
                "9pnet_virtio",
                "9p",
                "kvm",
                "kvm_amd",
                "vfio_iommu_type1",
                "vfio_pci",
            ],
            Role::Guest => &[
                "hv_vmbus",
                "pci_hyperv",
                "virtio_pci",
                "virtio_blk",
                "virtio_rng",
                "nvme",
                "e1000e",
            ],
        }
    }
}

/// A kernel in the cache.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) family: &'static Family,
    /// As `uname -r` prints it.
    pub(crate) release: String,
    folder: PathBuf,
}

impl Kernel {
    /// The kernel of a family that a cache entry holds.
    pub(crate) fn stored(family: &'static Family, folder: PathBuf) -> Result<Self> {
        let release = fs::read_to_string(folder.join("release"))?;
        Ok(Self {
            family,
            release,
            folder,
        })
    }

    /// The bzImage.
    pub(crate) fn image(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// Name of the cache entry: stands for everything in it.
    pub(crate) fn key(&self) -> String {
        let name = self.folder.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The modules of a role in load order: name and uncompressed image.
    pub(crate) fn modules(&self, role: Role) -> Result<Vec<(String, Vec<u8>)>> {
        let folder = self.folder.join(role.name());
        let list = fs::read_to_string(folder.join("list"))
            .with_context(|| format!("{}: no modules for {}", self.key(), role.name()))?;
        let read = |name: &str| Ok((name.to_string(), fs::read(folder.join(name))?));
        list.lines().map(read).collect()
    }
}

#[cfg(test)]
impl Kernel {
    /// A kernel whose cache entry is `folder`.
    pub(crate) fn in_folder(folder: &Path) -> Self {
        Self {
            family: &FAMILIES[0],
            release: "7.0-test".into(),
            folder: folder.into(),
        }
    }
}

/// The family of that name.
pub(crate) fn family(name: &str) -> Result<&'static Family> {
    let mut all = FAMILIES.iter().chain([BUILT]);
    all.find(|family| family.name == name)
        .ok_or_else(|| Failure::Usage(format!("no kernel family {name}")).into())
}

/// Finds the newest kernel of a family and puts it into the cache.
pub(crate) fn fetch(cache: &Cache, family: &'static Family) -> Result<Kernel> {
    let suite = Suite::open(cache, family.suite)?;
    if family.origin == Origin::Source {
        return built_kernel::fetch(cache, family, &suite);
    }
    match fetch_packaged(cache, family, &suite) {
        Ok(kernel) => Ok(kernel),
        // The archive drops a version when the next one appears: look again, once.
        Err(error) => {
            eprintln!("{}: {error:#}; trying with a fresh index", family.name);
            suite.refresh()?;
            fetch_packaged(cache, family, &suite)
        }
    }
}

fn fetch_packaged(cache: &Cache, family: &'static Family, suite: &Suite<'_>) -> Result<Kernel> {
    let in_family = |package: &Package| package.version.starts_with(family.version);
    let Some(metapackage) = suite.newest(METAPACKAGE, in_family)? else {
        let (version, suite) = (family.version, family.suite);
        let text = format!("{suite} has no {METAPACKAGE} of version {version}*");
        return Err(Failure::Lacking(text).into());
    };
    let packages = same_build(metapackage, &mut |name, version| {
        suite.newest(name, |package| package.version == version)
    })?;
    let modules: Vec<String> = family
        .roles
        .iter()
        .map(|role| format!("{}:{}", role.name(), role.modules().join(",")))
        .collect();
    let digests = packages.iter().map(|package| package.sha256.as_str());
    let parts = std::iter::once(LAYOUT)
        .chain(modules.iter().map(String::as_str))
        .chain(digests);
    let name = format!(
        "{}-{}",
        family.name,
        cache::content_key(parts.map(str::as_bytes))
    );
    let folder = cache.entry(Kind::Kernels, &name, |folder| {
        let files: Vec<_> = packages
            .iter()
            .map(|package| suite.download(package))
            .collect::<Result<_>>()?;
        eprintln!("unpacking {} {}", family.name, packages[0].version);
        store(family, &files, folder)
    })?;
    cache.prune(Kind::Kernels, &format!("{}-", family.name), KEEP_KERNELS)?;
    cache.prune(Kind::Packages, "", KEEP_PACKAGES)?;
    Kernel::stored(family, folder)
}

/// `first` and, transitively, the packages it depends on in one exact version. Debian builds a
/// kernel as one package or as several, which pin each other; what a kernel needs of the rest of
/// the system (boot loader hooks, initramfs tools) is not pinned.
fn same_build(
    first: Package,
    find: &mut dyn FnMut(&str, &str) -> Result<Option<Package>>,
) -> Result<Vec<Package>> {
    let mut packages = vec![first];
    let mut next = 0;
    while next < packages.len() {
        for dependency in packages[next].depends.clone() {
            let Some(version) = dependency.exactly else {
                continue;
            };
            if packages
                .iter()
                .any(|package| package.name == dependency.name)
            {
                continue;
            }
            let Some(package) = find(&dependency.name, &version)? else {
                bail!("package {} {version} does not exist", dependency.name);
            };
            packages.push(package);
        }
        next += 1;
    }
    Ok(packages)
}

/// Stores kernel image, release and, by role, the modules in load order.
fn store(family: &Family, packages: &[PathBuf], folder: &Path) -> Result<()> {
    let unpacked = folder.join("unpacked");
    for package in packages {
        apt::unpack(package, &unpacked)?;
    }
    let files = files_below(&unpacked)?;
    let image = only(&files, "kernel image", |name| name.starts_with("vmlinuz"))?;
    let builtin = only(&files, "list of built-in modules", |name| {
        name == "modules.builtin"
    })?;
    let release = builtin
        .parent()
        .and_then(Path::file_name)
        .unwrap_or_default();
    fs::write(folder.join("release"), release.as_encoded_bytes())?;
    fs::copy(image, folder.join("vmlinuz"))?;
    let tree = ModuleTree::new(files.iter().cloned(), &fs::read_to_string(builtin)?);
    for role in family.roles {
        let modules = tree
            .closure(role.modules(), &mut read_module)
            .with_context(|| format!("modules of {} for {}", family.name, role.name()))?;
        let destination = folder.join(role.name());
        fs::create_dir(&destination)?;
        let mut list = String::new();
        for module in modules {
            fs::write(destination.join(&module.name), module.image)?;
            list += &module.name;
            list.push('\n');
        }
        fs::write(destination.join("list"), list)?;
    }
    fs::remove_dir_all(unpacked)?;
    Ok(())
}

fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}

/// The one file whose name `accept` takes.
fn only<'a>(
    files: &'a [PathBuf],
    what: &str,
    accept: impl Fn(&str) -> bool,
) -> Result<&'a PathBuf> {
    let name = |path: &PathBuf| {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let mut found = files.iter().filter(|path| accept(&name(path)));
    match (found.next(), found.next()) {
        (Some(file), None) => Ok(file),
        (None, _) => bail!("the packages hold no {what}"),
        (Some(_), Some(_)) => bail!("the packages hold more than one {what}"),
    }
}

/// Reads a module, decompressing what Debian compresses.
fn read_module(path: &Path) -> io::Result<Vec<u8>> {
    let mut image = Vec::new();
    let mut file = File::open(path)?;
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => file.read_to_end(&mut image)?,
        Some("xz") => XzReader::new(io::BufReader::new(file), true).read_to_end(&mut image)?,
        _ => return Err(io::Error::other("compressed in an unknown way")),
    };
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deb::Dependency;

    fn package(name: &str, version: &str, depends: &[(&str, Option<&str>)]) -> Package {
        let depend = |(name, exactly): &(&str, Option<&str>)| Dependency {
            name: name.to_string(),
            exactly: exactly.map(Into::into),
        };
        Package {
            name: name.into(),
            version: version.into(),
            depends: depends.iter().map(depend).collect(),
            size: 0,
            sha256: String::new(),
        }
    }

    fn names(first: &str, archive: &[Package]) -> Result<Vec<String>> {
        let mut find = |name: &str, version: &str| {
            let mut all = archive.iter();
            Ok(all
                .find(|p| p.name == name && p.version == version)
                .cloned())
        };
        let first = archive.iter().rfind(|p| p.name == first).unwrap().clone();
        let packages = same_build(first, &mut find)?;
        Ok(packages
            .into_iter()
            .map(|p| format!("{}_{}", p.name, p.version))
            .collect())
    }

    #[test]
    fn a_split_kernel_is_followed_to_image_and_modules() {
        let v = Some("7.3");
        let archive = [
            package("image-7.2", "7.2", &[]),
            package(
                "image-7.3",
                "7.3",
                &[("dracut", None), ("binary-7.3", v), ("modules-7.3", v)],
            ),
            package("binary-7.3", "7.3", &[]),
            package("modules-7.3", "7.3", &[("kmod", None), ("base-7.3", v)]),
            package("base-7.3", "7.3", &[]),
            package("meta", "7.3", &[("image-7.3", v), ("base-7.3", v)]),
        ];
        let found = names("meta", &archive).unwrap();
        assert_eq!(
            found,
            [
                "meta_7.3",
                "image-7.3_7.3",
                "base-7.3_7.3",
                "binary-7.3_7.3",
                "modules-7.3_7.3"
            ]
        );
    }

    #[test]
    fn a_pinned_package_that_is_gone_is_an_error_and_a_circle_ends() {
        let archive = [
            package("meta", "2", &[("image", Some("2"))]),
            package("image", "1", &[]),
        ];
        let error = names("meta", &archive).unwrap_err().to_string();
        assert_eq!(error, "package image 2 does not exist");
        let archive = [
            package("a", "1", &[("b", Some("1"))]),
            package("b", "1", &[("a", Some("1"))]),
        ];
        assert_eq!(names("a", &archive).unwrap(), ["a_1", "b_1"]);
    }

    #[test]
    fn exactly_one_file_must_match() {
        let files = [
            "boot/vmlinuz-7",
            "lib/modules.builtin",
            "lib/modules.builtin.modinfo",
        ];
        let files: Vec<_> = files.iter().map(PathBuf::from).collect();
        let builtin = only(&files, "list", |name| name == "modules.builtin").unwrap();
        assert_eq!(builtin, Path::new("lib/modules.builtin"));
        assert!(only(&files, "list", |name| name.starts_with("modules")).is_err());
        assert!(only(&files, "list", |name| name == "System.map").is_err());
    }

    #[test]
    fn modules_are_read_plain_and_compressed() {
        // "module\n" as `xz --check=crc32` writes it.
        const XZ: &[u8] = &[
            0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x01, 0x69, 0x22, 0xde, 0x36, 0x02, 0x00,
            0x21, 0x01, 0x16, 0x00, 0x00, 0x00, 0x74, 0x2f, 0xe5, 0xa3, 0x01, 0x00, 0x06, 0x6d,
            0x6f, 0x64, 0x75, 0x6c, 0x65, 0x0a, 0x00, 0x00, 0x4f, 0x8a, 0x6e, 0x07, 0x00, 0x01,
            0x1b, 0x07, 0x12, 0xeb, 0xd4, 0x17, 0x90, 0x42, 0x99, 0x0d, 0x01, 0x00, 0x00, 0x00,
            0x00, 0x01, 0x59, 0x5a,
        ];
        let dir = tempfile::tempdir().unwrap();
        let plain = dir.path().join("a.ko");
        fs::write(&plain, "module\n").unwrap();
        assert_eq!(read_module(&plain).unwrap(), b"module\n");
        let whole = dir.path().join("a.ko.xz");
        fs::write(&whole, XZ).unwrap();
        assert_eq!(read_module(&whole).unwrap(), b"module\n");
        let cut = dir.path().join("b.ko.xz");
        fs::write(&cut, &XZ[..XZ.len() - 20]).unwrap();
        assert!(read_module(&cut).is_err(), "a cut file is an error");
        let other = dir.path().join("c.ko.zst");
        fs::write(&other, "").unwrap();
        assert!(read_module(&other).is_err());
    }

    #[test]
    fn families_have_distinct_names_and_the_first_can_run_the_rig() {
        assert!(FAMILIES.iter().all(|family| family.name != BUILT.name));
        for (index, family) in FAMILIES.iter().enumerate() {
            assert!(
                FAMILIES[..index]
                    .iter()
                    .all(|other| other.name != family.name)
            );
            assert!(family.roles.contains(&Role::Guest));
        }
        assert!(FAMILIES[0].roles.contains(&Role::Rig));
        assert!(family("linux-2.4").is_err());
    }
}
