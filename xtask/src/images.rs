//! Initramfs archives: the static init and the modules of one role, packed for one kernel.
#![forbid(unsafe_code)]

use crate::apt;
use crate::apt::Suite;
use crate::binaries;
use crate::binaries::Binaries;
use crate::cache;
use crate::cache::Cache;
use crate::cache::Kind;
use crate::failure::Failure;
use crate::kernel;
use crate::kernel::FAMILIES;
use crate::kernel::Kernel;
use crate::kernel::Role;
use anyhow::Context;
use anyhow::Result;
use guest_images::cpio::Writer;
use guest_images::modules::MODULE_DIR;
use guest_images::modules::MODULE_LIST;
use std::fs;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::path::PathBuf;

/// Changes with the layout of the archives, so that older cache entries are not used.
const LAYOUT: &[u8] = b"2";

/// Archives kept for one kernel and role; each new build of the init makes another.
const KEEP: usize = 4;

/// Folders that every archive starts with.
const FOLDERS: &[&str] = &["bin", "dev", "host", "lib", "proc", "run", "sys", "tmp"];

/// A kernel with one of its archives.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
}

/// What runs in an archive as `/init`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Init<'a> {
    /// The project's own init, a static binary.
    Program(&'a Path),
    /// A shell script for this static busybox.
    Script { busybox: &'a Path, script: &'a str },
}

/// Packs the archive for a role of a kernel, or takes it from the cache.
pub(crate) fn pack(cache: &Cache, kernel: &Kernel, role: Role, init: Init<'_>) -> Result<Image> {
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let files = match init {
        Init::Program(path) => vec![("init", read(path)?)],
        Init::Script { busybox, script } => {
            vec![("bin/busybox", read(busybox)?), ("init", script.into())]
        }
    };
    let kernel_key = kernel.key();
    let parts = [LAYOUT, kernel_key.as_bytes()].into_iter();
    let key = cache::content_key(parts.chain(files.iter().map(|(_, data)| data.as_slice())));
    let prefix = format!("{}-{}-", kernel.family.name, role.name());
    let folder = cache.entry(Kind::Images, &format!("{prefix}{key}"), |folder| {
        let out = BufWriter::new(File::create(folder.join("initramfs"))?);
        let mut writer = Writer::new(out);
        for folder in FOLDERS {
            writer.directory(folder)?;
        }
        writer.character_device("dev/console", 5, 1)?;
        for (name, data) in &files {
            writer.file(name, 0o755, data)?;
        }
        pack_modules(&mut writer, kernel, role)?;
        writer.finish()?;
        Ok(())
    })?;
    cache.prune(Kind::Images, &prefix, KEEP)?;
    Ok(Image {
        kernel: kernel.image(),
        initrd: folder.join("initramfs"),
    })
}

fn pack_modules(writer: &mut Writer<BufWriter<File>>, kernel: &Kernel, role: Role) -> Result<()> {
    let entry = |path: &str| path.trim_start_matches('/').to_string();
    writer.directory(&entry(MODULE_DIR))?;
    let mut list = String::new();
    for (name, image) in kernel.modules(role)? {
        let path = format!("{MODULE_DIR}/{name}.ko");
        writer.file(&entry(&path), 0o644, &image)?;
        list += &path;
        list.push('\n');
    }
    writer.file(&entry(MODULE_LIST), 0o644, list.as_bytes())?;
    Ok(())
}

/// A static busybox for shell commands in L1, from Debian.
pub(crate) fn busybox(cache: &Cache) -> Result<PathBuf> {
    let suite = Suite::open(cache, "bookworm")?;
    let Some(package) = suite.newest("busybox-static", |_| true)? else {
        return Err(Failure::Lacking("bookworm has no busybox-static".into()).into());
    };
    let name = format!("busybox-{}", &package.sha256);
    let folder = cache.entry(Kind::Images, &name, |folder| {
        let file = suite.download(&package)?;
        apt::unpack(&file, folder)
    })?;
    ["bin/busybox", "usr/bin/busybox"]
        .iter()
        .map(|path| folder.join(path))
        .find(|path| path.exists())
        .context("busybox-static holds no busybox")
}

/// Fetches every kernel and packs every archive; prints where they are.
pub(crate) fn run() -> Result<()> {
    let cache = Cache::open()?;
    let Binaries { init, .. } = binaries::build()?;
    for family in FAMILIES {
        let kernel = kernel::fetch(&cache, family)?;
        println!(
            "{} {}: {}",
            family.name,
            kernel.release,
            kernel.image().display()
        );
        for role in family.roles {
            let image = pack(&cache, &kernel, *role, Init::Program(&init))?;
            println!("  {:<6} {}", role.name(), image.initrd.display());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(folder: &Path) -> Kernel {
        fs::create_dir(folder.join("guest")).unwrap();
        fs::write(folder.join("vmlinuz"), "kernel").unwrap();
        fs::write(folder.join("guest/list"), "hv_vmbus\npci_hyperv\n").unwrap();
        fs::write(folder.join("guest/hv_vmbus"), "first module").unwrap();
        fs::write(folder.join("guest/pci_hyperv"), "second module").unwrap();
        Kernel::in_folder(folder)
    }

    fn position(archive: &[u8], text: &str) -> usize {
        let mut windows = archive.windows(text.len());
        windows
            .position(|window| window == text.as_bytes())
            .unwrap_or_else(|| panic!("no {text:?}"))
    }

    #[test]
    fn an_archive_holds_the_init_and_the_modules_with_their_list() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open_at(dir.path().join("cache")).unwrap();
        let kernel = kernel(dir.path());
        let init = dir.path().join("init");
        fs::write(&init, "program").unwrap();
        let image = pack(&cache, &kernel, Role::Guest, Init::Program(&init)).unwrap();
        assert_eq!(fs::read(&image.kernel).unwrap(), b"kernel");
        let archive = fs::read(&image.initrd).unwrap();
        position(&archive, "program");
        position(&archive, "first module");
        position(&archive, "second module");
        position(
            &archive,
            "/lib/modules/hv_vmbus.ko\n/lib/modules/pci_hyperv.ko\n",
        );
        let file = position(&archive, "lib/modules/hv_vmbus.ko\0");
        assert!(
            position(&archive, "lib/modules\0") < file,
            "folders come first"
        );

        let again = pack(&cache, &kernel, Role::Guest, Init::Program(&init)).unwrap();
        assert_eq!(
            again.initrd, image.initrd,
            "the same contents, the same entry"
        );
        fs::write(&init, "another program").unwrap();
        let other = pack(&cache, &kernel, Role::Guest, Init::Program(&init)).unwrap();
        assert_ne!(other.initrd, image.initrd);
    }

    #[test]
    fn a_role_that_the_kernel_is_not_stored_for_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open_at(dir.path().join("cache")).unwrap();
        let kernel = kernel(dir.path());
        let init = dir.path().join("init");
        fs::write(&init, "program").unwrap();
        let error = pack(&cache, &kernel, Role::Rig, Init::Program(&init)).unwrap_err();
        assert!(format!("{error:#}").contains("rig"), "{error:#}");
        let missing = dir.path().join("missing");
        let error = pack(&cache, &kernel, Role::Guest, Init::Program(&missing)).unwrap_err();
        assert!(format!("{error:#}").contains("missing"), "{error:#}");
    }
}
