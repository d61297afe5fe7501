//! The file of a snapshot.
//!
//! ```text
//! "VPCISNAP"                       8 bytes
//! version                          4 bytes, little-endian like all numbers
//! sections: tag, CRC-32, length    4 + 4 + 8 bytes, then as many bytes as the length says
//!   1 state   JSON of MachineSnapshot; the first section
//!   2 pages   an address and pages of RAM, at most 1 MiB of them; ascending; pages of zeroes are left out
//!   3 end     number of sections of pages, 8 bytes; the last one
//! ```
//!
//! The checksum covers tag, length and contents.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{MachineSnapshot, RestoreError};
use crate::memory::Ram;

const MAGIC: [u8; 8] = *b"VPCISNAP";
const VERSION: u32 = 1;
const STATE: u32 = 1;
const PAGES: u32 = 2;
const END: u32 = 3;
const PAGE: usize = 4096;
/// Most bytes of RAM in a section.
const MAX_PAGES: usize = 1 << 20;
/// Most bytes of the state.
const MAX_STATE: u64 = 256 << 20;

/// Writes a snapshot.
pub(crate) struct Writer<W: Write> {
    target: W,
    sections: u64,
}

impl Writer<BufWriter<File>> {
    /// Starts a file that must not exist yet. It is for its owner alone: it holds the guest's RAM.
    ///
    /// # Errors
    ///
    /// The host's.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        Self::new(BufWriter::new(file))
    }

    /// Writes the end, and waits until everything is on disk.
    ///
    /// # Errors
    ///
    /// The host's.
    pub(crate) fn finish(self) -> io::Result<()> {
        let file = self.end()?.into_inner().map_err(|e| e.into_error())?;
        file.sync_all()
    }
}

impl<W: Write> Writer<W> {
    fn new(mut target: W) -> io::Result<Self> {
        target.write_all(&MAGIC)?;
        target.write_all(&VERSION.to_le_bytes())?;
        Ok(Self {
            target,
            sections: 0,
        })
    }

    /// Writes the state.
    ///
    /// # Errors
    ///
    /// The host's, or [`io::ErrorKind::InvalidData`] for a state that is too long to be read again.
    pub(crate) fn state(&mut self, state: &MachineSnapshot) -> io::Result<()> {
        let json = serde_json::to_vec(state)?;
        if json.len() as u64 > MAX_STATE {
            let text = format!(
                "the state takes {} bytes; {MAX_STATE} are possible",
                json.len()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        self.section(STATE, &[&json])
    }

    /// Writes guest RAM.
    ///
    /// # Errors
    ///
    /// The host's.
    pub(crate) fn ram(&mut self, ram: &Ram) -> io::Result<()> {
        let mut run = Vec::with_capacity(MAX_PAGES);
        let mut page = [0; PAGE];
        for region in ram.iter() {
            let mut start = region.start_addr().0;
            for offset in (0..region.len()).step_by(PAGE) {
                let gpa = region.start_addr().0 + offset;
                ram.read_slice(&mut page, GuestAddress(gpa))
                    .map_err(io::Error::other)?;
                let zero = page.iter().all(|byte| *byte == 0);
                if (zero || run.len() == MAX_PAGES) && !run.is_empty() {
                    self.pages(start, &run)?;
                    run.clear();
                }
                if !zero {
                    if run.is_empty() {
                        start = gpa;
                    }
                    run.extend(page);
                }
            }
            if !run.is_empty() {
                self.pages(start, &run)?;
                run.clear();
            }
        }
        Ok(())
    }

    fn pages(&mut self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        self.sections += 1;
        self.section(PAGES, &[&gpa.to_le_bytes(), bytes])
    }

    fn end(mut self) -> io::Result<W> {
        let sections = self.sections;
        self.section(END, &[&sections.to_le_bytes()])?;
        Ok(self.target)
    }

    fn section(&mut self, tag: u32, parts: &[&[u8]]) -> io::Result<()> {
        let length = parts.iter().map(|part| part.len() as u64).sum();
        let mut crc = checksum(tag, length);
        for part in parts {
            crc.update(part);
        }
        self.target.write_all(&tag.to_le_bytes())?;
        self.target.write_all(&crc.finalize().to_le_bytes())?;
        self.target.write_all(&u64::to_le_bytes(length))?;
        for part in parts {
            self.target.write_all(part)?;
        }
        Ok(())
    }
}

fn checksum(tag: u32, length: u64) -> crc32fast::Hasher {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&tag.to_le_bytes());
    crc.update(&length.to_le_bytes());
    crc
}

/// Reads a snapshot: first the state, then RAM.
#[derive(Debug)]
pub(crate) struct Reader<R: Read = BufReader<File>> {
    source: R,
}

impl Reader {
    /// Opens a file and reads its state.
    ///
    /// # Errors
    ///
    /// [`RestoreError`].
    pub(crate) fn open(path: &Path) -> Result<(Self, MachineSnapshot), RestoreError> {
        Self::new(BufReader::new(File::open(path)?))
    }
}

impl<R: Read> Reader<R> {
    fn new(mut source: R) -> Result<(Self, MachineSnapshot), RestoreError> {
        let mut magic = [0; MAGIC.len()];
        match source.read_exact(&mut magic) {
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error.into()),
            Ok(()) if magic == MAGIC => {}
            _ => return Err(RestoreError::NoSnapshot),
        }
        let mut version = [0; 4];
        read_exact(&mut source, &mut version)?;
        let version = u32::from_le_bytes(version);
        if version != VERSION {
            return Err(RestoreError::Version(version));
        }
        let mut reader = Self { source };
        let (tag, json) = reader.section()?;
        if tag != STATE {
            return Err(RestoreError::Damaged("it does not start with a state"));
        }
        let state = serde_json::from_slice(&json)?;
        Ok((reader, state))
    }

    /// Reads the rest into RAM, which is all zeroes.
    ///
    /// # Errors
    ///
    /// [`RestoreError`]; RAM is of no use then.
    pub(crate) fn ram(mut self, ram: &Ram) -> Result<(), RestoreError> {
        let mut next = 0;
        let mut count = 0_u64;
        loop {
            let (tag, payload) = self.section()?;
            match tag {
                PAGES => {
                    let damaged = RestoreError::Damaged("a section of RAM is malformed");
                    let Some((gpa, pages)) = payload.split_first_chunk() else {
                        return Err(damaged);
                    };
                    let gpa = u64::from_le_bytes(*gpa);
                    let whole = gpa.is_multiple_of(PAGE as u64)
                        && pages.len().is_multiple_of(PAGE)
                        && !pages.is_empty();
                    let end = gpa.checked_add(pages.len() as u64);
                    let (true, true, Some(end)) = (whole, gpa >= next, end) else {
                        return Err(damaged);
                    };
                    ram.write_slice(pages, GuestAddress(gpa))
                        .map_err(|_| RestoreError::Ram { gpa })?;
                    next = end;
                    count += 1;
                }
                END => {
                    if payload != count.to_le_bytes() {
                        return Err(RestoreError::Damaged("sections of RAM are missing"));
                    }
                    let mut more = [0];
                    return match self.source.read(&mut more)? {
                        0 => Ok(()),
                        _ => Err(RestoreError::Damaged("something follows its end")),
                    };
                }
                _ => return Err(RestoreError::Damaged("a section of an unknown kind")),
            }
        }
    }

    fn section(&mut self) -> Result<(u32, Vec<u8>), RestoreError> {
        let (mut tag, mut crc, mut length) = ([0; 4], [0; 4], [0; 8]);
        read_exact(&mut self.source, &mut tag)?;
        read_exact(&mut self.source, &mut crc)?;
        read_exact(&mut self.source, &mut length)?;
        let (tag, crc, length) = (
            u32::from_le_bytes(tag),
            u32::from_le_bytes(crc),
            u64::from_le_bytes(length),
        );
        let most = match tag {
            STATE => MAX_STATE,
            PAGES => 8 + MAX_PAGES as u64,
            _ => 8,
        };
        if length > most {
            return Err(RestoreError::Damaged("a section is too long"));
        }
        // Grows with what is there, not with what the file promises.
        let mut payload = Vec::new();
        (&mut self.source).take(length).read_to_end(&mut payload)?;
        if (payload.len() as u64) < length {
            return Err(RestoreError::Damaged("it is cut off"));
        }
        let mut expected = checksum(tag, length);
        expected.update(&payload);
        if expected.finalize() != crc {
            return Err(RestoreError::Damaged("a checksum does not match"));
        }
        Ok((tag, payload))
    }
}

fn read_exact(source: &mut impl Read, bytes: &mut [u8]) -> Result<(), RestoreError> {
    source
        .read_exact(bytes)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => RestoreError::Damaged("it is cut off"),
            _ => error.into(),
        })
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
