//! Writer for initramfs archives: cpio in the "new ASCII" format (`newc`), as the Linux kernel
//! unpacks it (kernel file `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Archives are reproducible: same entries in the same order, same bytes. Times, owners and device
//! numbers of the machine that writes them do not appear.
#![forbid(unsafe_code)]

use std::io;
use std::io::Write;
use thiserror::Error;

const MAGIC: &str = "070701";
const HEADER_LEN: usize = 110;
const TRAILER: &str = "TRAILER!!!";
/// Longest name the kernel accepts, terminating zero included (`PATH_MAX`).
const NAME_MAX: usize = 4096;

const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_CHARACTER: u32 = 0o020_000;
const TYPE_SYMLINK: u32 = 0o120_000;

/// Errors of the archive writer.
#[derive(Debug, Error)]
pub enum CpioError {
    /// The name is empty, too long, absolute, has an empty, `.` or `..` component, holds a zero
    /// byte, or is the one that ends an archive.
    #[error("{name:?} cannot name an archive entry")]
    Name {
        /// The name as given.
        name: String,
    },
    /// An archive entry holds less than 4 GiB.
    #[error("{name:?} has {len} bytes: too long for an archive entry")]
    TooLong {
        /// Name of the entry.
        name: String,
        /// Length of its contents in bytes.
        len: usize,
    },
    /// The archive cannot be written.
    #[error("cannot write the archive")]
    Io(#[from] io::Error),
}

/// Writes archive entries one after another; [`Writer::finish`] ends the archive.
///
/// Directories are not made for the entries inside them: write each before its contents.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    inode: u32,
}

struct Entry<'a> {
    name: &'a str,
    mode: u32,
    links: u32,
    device: (u32, u32),
    data: &'a [u8],
}

impl<W: Write> Writer<W> {
    /// A writer of an empty archive into `out`.
    pub fn new(out: W) -> Self {
        Self { out, inode: 1 }
    }

    /// Adds the directory `name` (relative, no slash at either end).
    pub fn directory(&mut self, name: &str) -> Result<(), CpioError> {
        self.named(name, TYPE_DIRECTORY | 0o755, (0, 0), &[])
    }

    /// Adds a regular file with the permission bits of `mode`.
    pub fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<(), CpioError> {
        self.named(name, TYPE_FILE | (mode & 0o7777), (0, 0), data)
    }

    /// Adds a symbolic link to `target`.
    pub fn symlink(&mut self, name: &str, target: &str) -> Result<(), CpioError> {
        self.named(name, TYPE_SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device node with mode 0600.
    pub fn character_device(
        &mut self,
        name: &str,
        major: u32,
        minor: u32,
    ) -> Result<(), CpioError> {
        self.named(name, TYPE_CHARACTER | 0o600, (major, minor), &[])
    }

    /// Ends the archive and returns what it was written into.
    pub fn finish(mut self) -> Result<W, CpioError> {
        self.inode = 0;
        self.entry(&Entry {
            name: TRAILER,
            mode: 0,
            links: 1,
            device: (0, 0),
            data: &[],
        })?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn named(
        &mut self,
        name: &str,
        mode: u32,
        device: (u32, u32),
        data: &[u8],
    ) -> Result<(), CpioError> {
        let bad_component = |part: &str| matches!(part, "" | "." | "..");
        if name == TRAILER
            || name.len() >= NAME_MAX
            || name.contains('\0')
            || name.split('/').any(bad_component)
        {
            return Err(CpioError::Name { name: name.into() });
        }
        let links = if mode & TYPE_DIRECTORY != 0 && mode & TYPE_FILE == 0 {
            2
        } else {
            1
        };
        self.entry(&Entry {
            name,
            mode,
            links,
            device,
            data,
        })
    }

    fn entry(&mut self, entry: &Entry<'_>) -> Result<(), CpioError> {
        let len = u32::try_from(entry.data.len()).map_err(|_| CpioError::TooLong {
            name: entry.name.into(),
            len: entry.data.len(),
        })?;
        let fields = [
            self.inode,
            entry.mode,
            0, // user
            0, // group
            entry.links,
            0, // time
            len,
            0, // device of the file system: major
            0, // and minor
            entry.device.0,
            entry.device.1,
            entry.name.len() as u32 + 1,
            0, // checksum, unused in this format
        ];
        self.inode += 1;
        self.out.write_all(MAGIC.as_bytes())?;
        for field in fields {
            write!(self.out, "{field:08X}")?;
        }
        self.out.write_all(entry.name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(HEADER_LEN + entry.name.len() + 1)?;
        self.out.write_all(entry.data)?;
        self.pad(entry.data.len())
    }

    /// Fills up to a multiple of four bytes after `written` bytes.
    fn pad(&mut self, written: usize) -> Result<(), CpioError> {
        let gap = written.next_multiple_of(4) - written;
        self.out.write_all(&[0; 3][..gap])?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Parsed {
        name: String,
        mode: u32,
        links: u32,
        device: (u32, u32),
        data: Vec<u8>,
    }

    /// Reads an archive by the format's own rules and returns its entries without the trailer.
    fn parse(archive: &[u8]) -> Vec<Parsed> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(at % 4, 0, "an entry starts on a multiple of four");
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |index: usize| {
                let start = at + 6 + index * 8;
                let text = std::str::from_utf8(&archive[start..start + 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, links, len, name_len) = (field(1), field(4), field(6), field(11));
            let device = (field(9), field(10));
            let name_at = at + HEADER_LEN;
            let name_end = name_at + name_len as usize - 1;
            assert_eq!(archive[name_end], 0);
            let name = std::str::from_utf8(&archive[name_at..name_end]).unwrap();
            let data_at = (name_end + 1).next_multiple_of(4);
            let data_end = data_at + len as usize;
            at = data_end.next_multiple_of(4);
            if name == TRAILER {
                assert_eq!(at, archive.len(), "nothing follows the trailer");
                return entries;
            }
            entries.push(Parsed {
                name: name.into(),
                mode,
                links,
                device,
                data: archive[data_at..data_end].to_vec(),
            });
        }
    }

    #[test]
    fn entries_read_back_as_written() {
        let mut writer = Writer::new(Vec::new());
        writer.directory("dev").unwrap();
        writer.character_device("dev/console", 5, 1).unwrap();
        writer.file("init", 0o755, b"#!").unwrap();
        writer.symlink("bin", "usr/bin").unwrap();
        let entries = parse(&writer.finish().unwrap());
        let entry = |name: &str, mode, links, device, data: &[u8]| Parsed {
            name: name.into(),
            mode,
            links,
            device,
            data: data.into(),
        };
        assert_eq!(
            entries,
            [
                entry("dev", 0o040_755, 2, (0, 0), b""),
                entry("dev/console", 0o020_600, 1, (5, 1), b""),
                entry("init", 0o100_755, 1, (0, 0), b"#!"),
                entry("bin", 0o120_777, 1, (0, 0), b"usr/bin"),
            ]
        );
    }

    #[test]
    fn every_length_of_name_and_data_is_padded() {
        let mut writer = Writer::new(Vec::new());
        let data = [0xa5; 9];
        for name_len in 1..10 {
            for data_len in 0..9 {
                let name = "n".repeat(name_len);
                writer.file(&name, 0o644, &data[..data_len]).unwrap();
            }
        }
        let entries = parse(&writer.finish().unwrap());
        assert_eq!(entries.len(), 81);
        for (index, entry) in entries.iter().enumerate() {
            assert_eq!(entry.name.len(), index / 9 + 1);
            assert_eq!(entry.data, data[..index % 9]);
        }
    }

    #[test]
    fn an_empty_archive_is_the_trailer_alone() {
        assert!(parse(&Writer::new(Vec::new()).finish().unwrap()).is_empty());
    }

    #[test]
    fn names_that_mean_something_else_are_refused_and_leave_no_trace() {
        let mut writer = Writer::new(Vec::new());
        let long = "x".repeat(NAME_MAX);
        for name in [
            "",
            "/init",
            "a//b",
            "dir/",
            "../up",
            "a/./b",
            "zero\0byte",
            TRAILER,
            &long,
        ] {
            let error = writer.file(name, 0o644, b"data").unwrap_err();
            assert!(matches!(error, CpioError::Name { .. }), "{name:?}");
        }
        writer.file(&long[1..], 0o644, b"").unwrap();
        assert_eq!(parse(&writer.finish().unwrap()).len(), 1);
    }
}
