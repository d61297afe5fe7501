//! Loads a Linux kernel by the 64-bit boot protocol (kernel: Documentation/arch/x86/boot.rst).
//!
//! A bzImage only: Debian ships nothing else. The image is placed at the address it prefers, the
//! initrd as high as possible below 4 GiB, so that the kernel can decompress itself in between.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::layout::{self, HIGH_RAM, Layout, Range};
use crate::memory::Ram;

/// Offset of the 64-bit entry point in the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// `xloadflags`: the kernel has the 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// First boot protocol version with `xloadflags` (2.12, Linux 3.8).
const MIN_VERSION: u16 = 0x020c;
/// `type_of_loader`: no registered boot loader.
const UNDEFINED_LOADER: u8 = 0xff;
/// e820 type of usable RAM.
const E820_RAM: u32 = 1;
/// e820 type of reserved memory.
const E820_RESERVED: u32 = 2;
/// Largest kernel or initrd file, in bytes.
const MAX_FILE: u64 = 2 << 30;

/// Why a guest kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    /// A file cannot be opened or read.
    #[error("{option} {path}: {source}")]
    File {
        /// Option that names the file.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// A file is not a regular file of a sensible size.
    #[error("{option} {path}: not a regular file of 1 byte to 2 GiB")]
    NotAFile {
        /// Option that names the file.
        option: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The file is not a bzImage.
    #[error(
        "--kernel {path}: not a Linux kernel in bzImage form; give the vmlinuz file of a distribution"
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
    },
    /// A bzImage without the 64-bit entry point, or too old.
    #[error("--kernel {path}: a bzImage, but not for 64-bit x86 or older than Linux 3.8")]
    Not64Bit {
        /// The file.
        path: PathBuf,
    },
    /// The kernel and its initrd need more RAM.
    #[error("--memory is too small: this kernel and initrd need at least {needed_mib}M")]
    TooSmall {
        /// Least `--memory`, in MiB.
        needed_mib: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("--cmdline has {len} bytes, the kernel takes at most {max}")]
    CmdlineTooLong {
        /// Length given.
        len: usize,
        /// Length allowed.
        max: usize,
    },
    /// The command line holds a zero byte.
    #[error("--cmdline holds a zero byte")]
    CmdlineZero,
    /// Guest RAM refused a write. Cannot happen with a [`Layout`] of the same RAM.
    #[error("cannot write guest RAM at {gpa:#x}")]
    Ram {
        /// Guest physical address.
        gpa: u64,
    },
}

/// Files and command line of a guest.
#[derive(Debug, Clone)]
pub(crate) struct BootSource {
    /// Kernel image.
    pub(crate) kernel: PathBuf,
    /// Initial RAM disk, if any.
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line.
    pub(crate) cmdline: String,
}

/// Where the boot processor starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    /// First instruction, in 64-bit mode.
    pub(crate) rip: u64,
    /// Address of the zero page, in RSI.
    pub(crate) zero_page: u64,
}

/// Loads kernel, initrd, command line and zero page into `ram`. Repeatable: a guest reset loads
/// everything again.
///
/// # Errors
///
/// [`KernelError`]. Guest RAM may be partly written then.
pub(crate) fn load(source: &BootSource, layout: &Layout, ram: &Ram) -> Result<Entry, KernelError> {
    let header = read_header(&source.kernel)?;
    let initrd = source
        .initrd
        .as_deref()
        .map(|path| Ok((path, open("--initrd", path)?)))
        .transpose()?;
    let initrd_size = initrd.as_ref().map_or(0, |(_, (_, size))| *size);
    let plan = Plan::new(&header, initrd_size, layout)?;

    let (mut image, _) = open("--kernel", &source.kernel)?;
    let not_a_kernel = |_| KernelError::NotAKernel {
        path: source.kernel.clone(),
    };
    let loaded = BzImage::load(
        ram,
        Some(GuestAddress(plan.kernel)),
        &mut image,
        Some(GuestAddress(HIGH_RAM)),
    )
    .map_err(not_a_kernel)?;
    if let Some((path, (mut file, size))) = initrd {
        ram.read_exact_volatile_from(GuestAddress(plan.initrd), &mut file, size as usize)
            .map_err(|error| KernelError::File {
                option: "--initrd",
                path: path.to_owned(),
                source: io::Error::other(error),
            })?;
    }
    write_cmdline(ram, &header, &source.cmdline)?;

    let mut header = loaded.setup_header.unwrap_or(header);
    header.type_of_loader = UNDEFINED_LOADER;
    header.cmd_line_ptr = layout::CMDLINE as u32;
    header.ramdisk_image = if initrd_size == 0 {
        0
    } else {
        plan.initrd as u32
    };
    header.ramdisk_size = initrd_size as u32;
    write(ram, layout::ZERO_PAGE, zero_page(header, layout).as_slice())?;
    Ok(Entry {
        rip: loaded.kernel_load.0 + ENTRY_64,
        zero_page: layout::ZERO_PAGE,
    })
}

/// Looks at the files without loading anything.
///
/// # Errors
///
/// [`KernelError`].
pub(crate) fn check(source: &BootSource) -> Result<(), KernelError> {
    let header = read_header(&source.kernel)?;
    if let Some(path) = &source.initrd {
        open("--initrd", path)?;
    }
    check_cmdline(&header, &source.cmdline)
}

fn open(option: &'static str, path: &Path) -> Result<(File, u64), KernelError> {
    let failed = |source| KernelError::File {
        option,
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() || meta.len() == 0 || meta.len() > MAX_FILE {
        let path = path.to_owned();
        return Err(KernelError::NotAFile { option, path });
    }
    Ok((file, meta.len()))
}

/// Reads and checks the setup header without touching guest RAM.
fn read_header(path: &Path) -> Result<setup_header, KernelError> {
    use std::os::unix::fs::FileExt;
    const OFFSET: u64 = 0x1f1;
    const MAGIC: u32 = 0x5372_6448;
    let (file, _) = open("--kernel", path)?;
    let path = path.to_owned();
    let mut header = setup_header::default();
    if file.read_exact_at(header.as_mut_slice(), OFFSET).is_err() || { header.header } != MAGIC {
        return Err(KernelError::NotAKernel { path });
    }
    if header.version < MIN_VERSION || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::Not64Bit { path });
    }
    Ok(header)
}

/// Addresses of kernel and initrd.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    kernel: u64,
    initrd: u64,
}

impl Plan {
    fn new(header: &setup_header, initrd_size: u64, layout: &Layout) -> Result<Self, KernelError> {
        const PAGE: u64 = 0x1000;
        let kernel = header.pref_address.max(HIGH_RAM);
        // The kernel decompresses itself at its own address and uses `init_size` bytes there.
        let kernel_end = kernel.saturating_add(header.init_size.into());
        let needed = kernel_end.saturating_add(initrd_size.next_multiple_of(PAGE));
        // `initrd_addr_max` is the address of the last byte.
        let limit = layout.low_ram.min(u64::from(header.initrd_addr_max) + 1);
        if needed > limit {
            return Err(KernelError::TooSmall {
                needed_mib: needed.div_ceil(1 << 20),
            });
        }
        Ok(Self {
            kernel,
            initrd: (limit - initrd_size) & !(PAGE - 1),
        })
    }
}

fn check_cmdline(header: &setup_header, cmdline: &str) -> Result<(), KernelError> {
    // Room up to the end of conventional memory; the header's limit excludes the final zero.
    let room = (layout::LOW_END - layout::CMDLINE) as usize - 1;
    let max = (header.cmdline_size as usize).min(room);
    if cmdline.len() > max {
        let len = cmdline.len();
        return Err(KernelError::CmdlineTooLong { len, max });
    }
    if cmdline.contains('\0') {
        return Err(KernelError::CmdlineZero);
    }
    Ok(())
}

fn write_cmdline(ram: &Ram, header: &setup_header, cmdline: &str) -> Result<(), KernelError> {
    check_cmdline(header, cmdline)?;
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    write(ram, layout::CMDLINE, &bytes)
}

fn zero_page(header: setup_header, layout: &Layout) -> boot_params {
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: layout::ACPI_TABLES,
        ..Default::default()
    };
    let entries = e820(layout);
    params.e820_entries = entries.len() as u8;
    params.e820_table[..entries.len()].copy_from_slice(&entries);
    params
}

/// The firmware memory map: RAM, and the ACPI tables inside the legacy hole.
fn e820(layout: &Layout) -> Vec<boot_e820_entry> {
    let entry = |range: Range, kind| boot_e820_entry {
        addr: range.start,
        size: range.size,
        r#type: kind,
    };
    let tables = Range {
        start: layout::ACPI_TABLES,
        size: HIGH_RAM - layout::ACPI_TABLES,
    };
    let usable = layout.usable().into_iter().map(|r| entry(r, E820_RAM));
    let mut map: Vec<_> = usable.chain([entry(tables, E820_RESERVED)]).collect();
    map.sort_by_key(|e| e.addr);
    map
}

fn write(ram: &Ram, gpa: u64, bytes: &[u8]) -> Result<(), KernelError> {
    ram.write_slice(bytes, GuestAddress(gpa))
        .map_err(|_| KernelError::Ram { gpa })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::map_ram;
    use std::io::Write;

    const PREF: u64 = 0x100_0000;

    fn header() -> setup_header {
        setup_header {
            setup_sects: 1,
            boot_flag: 0xaa55,
            header: 0x5372_6448,
            version: 0x020f,
            loadflags: 1,
            code32_start: 0x10_0000,
            initrd_addr_max: 0x7fff_ffff,
            xloadflags: XLF_KERNEL_64,
            cmdline_size: 255,
            pref_address: PREF,
            init_size: 0x30_0000,
            ..Default::default()
        }
    }

    /// A file with the given header, one set-up sector and `payload`.
    fn image(header: setup_header, payload: &[u8]) -> tempfile::NamedTempFile {
        let mut bytes = vec![0; 1024];
        let raw = header.as_slice();
        bytes[0x1f1..0x1f1 + raw.len()].copy_from_slice(raw);
        bytes.extend_from_slice(payload);
        file(&bytes)
    }

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn source(kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> BootSource {
        BootSource {
            kernel: kernel.to_owned(),
            initrd: initrd.map(Path::to_owned),
            cmdline: cmdline.into(),
        }
    }

    fn layout() -> Layout {
        Layout::new(64 << 20, 40).unwrap()
    }

    #[test]
    fn kernel_initrd_and_command_line_land_where_the_zero_page_says() {
        let kernel = image(header(), b"kernel text");
        let initrd = file(&[7; 5000]);
        let source = source(kernel.path(), Some(initrd.path()), "console=ttyS0");
        let ram = map_ram(&layout()).unwrap();
        let entry = load(&source, &layout(), &ram).unwrap();
        assert_eq!(entry.rip, PREF + 0x200);
        let params: boot_params = ram.read_obj(GuestAddress(entry.zero_page)).unwrap();
        let (image, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((image, size), ((64 << 20) - 0x2000, 5000));
        let byte: u8 = ram.read_obj(GuestAddress(u64::from(image) + 4999)).unwrap();
        assert_eq!(byte, 7);
        let mut text = [0; 11];
        ram.read_slice(&mut text, GuestAddress(PREF)).unwrap();
        assert_eq!(&text, b"kernel text");
        let mut line = [0xff; 14];
        ram.read_slice(&mut line, GuestAddress(params.hdr.cmd_line_ptr.into()))
            .unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
        assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI_TABLES);
        assert_eq!(params.hdr.type_of_loader, 0xff);
    }

    #[test]
    fn the_memory_map_lists_ram_and_the_acpi_tables_in_order() {
        let big = Layout::new(5 << 30, 40).unwrap();
        let map: Vec<(u64, u64, u32)> = e820(&big)
            .iter()
            .map(|e| (e.addr, e.addr + e.size, e.r#type))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0xa_0000, E820_RAM),
                (0xe_0000, 0x10_0000, E820_RESERVED),
                (0x10_0000, 3 << 30, E820_RAM),
                (4 << 30, 6 << 30, E820_RAM),
            ]
        );
    }

    #[test]
    fn files_that_are_no_kernel_are_refused_by_name() {
        let ram = map_ram(&layout()).unwrap();
        let try_load = |path: &Path| load(&source(path, None, ""), &layout(), &ram).unwrap_err();
        let text = file(b"#!/bin/sh\necho no kernel\n");
        let error = try_load(text.path()).to_string();
        assert!(
            error.contains("not a Linux kernel") && error.contains("--kernel"),
            "{error}"
        );
        assert!(matches!(
            try_load(Path::new("/")),
            KernelError::NotAFile { .. }
        ));
        assert!(matches!(
            try_load(file(b"").path()),
            KernelError::NotAFile { .. }
        ));
        assert!(matches!(
            try_load(Path::new("/none")),
            KernelError::File { .. }
        ));
        let mut old = header();
        old.xloadflags = 0;
        assert!(matches!(
            try_load(image(old, b"").path()),
            KernelError::Not64Bit { .. }
        ));
        let mut short = header();
        short.setup_sects = 200;
        assert!(matches!(
            try_load(image(short, b"").path()),
            KernelError::NotAKernel { .. }
        ));
    }

    #[test]
    fn too_little_ram_is_refused_with_the_amount_needed() {
        let small = Layout::new(32 << 20, 40).unwrap();
        let mut big = header();
        big.init_size = 0x400_0000;
        let error = Plan::new(&big, 0x1001, &small).unwrap_err();
        assert!(error.to_string().contains("81M"), "{error}");
        let mut exact = header();
        exact.init_size = (32 << 20) - PREF as u32;
        assert!(Plan::new(&exact, 0, &small).is_ok());
        assert!(Plan::new(&exact, 1, &small).is_err());
        exact.pref_address = u64::MAX;
        assert!(Plan::new(&exact, u64::MAX >> 1, &small).is_err());
    }

    #[test]
    fn the_command_line_is_limited_by_the_kernel() {
        let ram = map_ram(&layout()).unwrap();
        assert!(write_cmdline(&ram, &header(), &"x".repeat(255)).is_ok());
        let error = write_cmdline(&ram, &header(), &"x".repeat(256)).unwrap_err();
        assert!(matches!(
            error,
            KernelError::CmdlineTooLong { len: 256, max: 255 }
        ));
        assert!(write_cmdline(&ram, &header(), "a\0b").is_err());
    }
}
