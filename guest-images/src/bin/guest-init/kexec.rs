//! Another kernel by kexec: what the rig puts into the guest's initramfs for it, and the guest's part.
#![allow(unsafe_code)]

use crate::vmm::Files;
use anyhow::{Context, Result, bail};
use guest_images::cpio;
use guest_images::scenario::Run;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

/// Directory of kernel and initramfs inside the guest's own.
const FOLDER: &str = "kexec";
const KERNEL: &str = "kexec/kernel";
const INITRAMFS: &str = "kexec/initramfs";

/// Makes an initramfs with the run's kernel and initramfs inside it.
pub(crate) fn make_initramfs(run: &Run, files: &Files<'_>) -> Result<()> {
    let read = |name: &str| {
        let path = files.share.join(name);
        fs::read(&path).with_context(|| path.display().to_string())
    };
    let initramfs = read(&run.initrd)?;
    let mut archive = cpio::Writer::new(Vec::new());
    archive.directory(FOLDER)?;
    archive.file(KERNEL, 0o600, &read(&run.kernel)?)?;
    archive.file(INITRAMFS, 0o600, &initramfs)?;
    // The kernel unpacks archives that follow each other; each starts at a multiple of four bytes
    // (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).
    let mut all = initramfs;
    all.resize(all.len().next_multiple_of(4), 0);
    all.extend(archive.finish()?);
    let path = files.initrd(run);
    fs::write(&path, all).with_context(|| path.display().to_string())
}

/// Has the running kernel load the one in its initramfs, with its own command line.
pub(crate) fn load() -> Result<()> {
    let open = |name: &str| File::open(format!("/{name}")).with_context(|| name.to_owned());
    let (kernel, initramfs) = (open(KERNEL)?, open(INITRAMFS)?);
    let cmdline = fs::read_to_string("/proc/cmdline").context("/proc/cmdline")?;
    let cmdline = CString::new(cmdline.trim()).context("/proc/cmdline")?;
    // SAFETY: both descriptors are open files, the pointer and the length, terminating zero included,
    // describe `cmdline`, which lives over the call, and there are no flags.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            cmdline.as_bytes_with_nul().len(),
            cmdline.as_ptr(),
            0_u64,
        )
    };
    if result != 0 {
        let error = io::Error::last_os_error();
        bail!("kexec_file_load: {error}");
    }
    // Their memory is the new kernel's.
    fs::remove_dir_all(format!("/{FOLDER}")).context(FOLDER)
}
