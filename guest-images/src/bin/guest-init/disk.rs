//! Disks: the data check, and requests one at a time.

use crate::bounded::bounded;
use crate::pci::{self, Found};
use crate::system::{read_text, write_text};
use anyhow::{Context, Result, bail};
use guest_images::pattern::{Checksum, Pattern, generation, mix};
use guest_images::report::DiskReport;
use guest_images::scenario::PciAddress;
use rustix::fs::OFlags;
use rustix::thread::{CpuSet, sched_setaffinity};
use std::fs::{File, OpenOptions};
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Alignment that direct I/O needs, in bytes; also the size of a small request.
pub(crate) const BLOCK: usize = 4096;
/// Size of a request of the data check.
const CHUNK: usize = 256 * 1024;
/// Limit of one data check.
const DATA_LIMIT: Duration = Duration::from_secs(120);
/// Limit of a series of requests one at a time.
const SERIES_LIMIT: Duration = Duration::from_secs(30);
/// Requests of such a series.
const SERIES: u64 = 16;
/// Pause between them: the driver must have left its completion handler, so that each completion
/// needs an interrupt of its own.
const SERIES_PAUSE: Duration = Duration::from_millis(2);

/// A buffer at an address that direct I/O accepts.
#[derive(Debug)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    pub(crate) fn new(len: usize) -> Self {
        let bytes = vec![0; len + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start, len }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Longest of a number of requests.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Latency {
    pub(crate) max_us: u64,
}

impl Latency {
    /// Runs one request and takes its time.
    pub(crate) fn of<T>(&mut self, request: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let answer = request();
        let micros = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.max_us = self.max_us.max(micros);
        answer
    }
}

/// A virtio-blk disk or an NVMe namespace.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    pub(crate) function: Found,
    pub(crate) name: String,
}

impl Disk {
    pub(crate) fn open(function: &Found) -> Result<Self> {
        let name = function
            .block()
            .with_context(|| format!("{}: no block device", function.address))?;
        Ok(Self {
            function: function.clone(),
            name,
        })
    }

    pub(crate) fn address(&self) -> PciAddress {
        self.function.address
    }

    fn sysfs(&self) -> PathBuf {
        Path::new("/sys/block").join(&self.name)
    }

    fn device(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// Size in bytes.
    pub(crate) fn size(&self) -> Result<u64> {
        let text = read_text(self.sysfs().join("size"))?;
        let sectors: u64 = text
            .parse()
            .with_context(|| format!("{}: size {text}", self.name))?;
        Ok(sectors * 512)
    }

    pub(crate) fn readonly(&self) -> Result<bool> {
        Ok(read_text(self.sysfs().join("ro"))? != "0")
    }

    fn queues(&self) -> Result<u32> {
        Ok(pci::names(&self.sysfs().join("mq"))?.len() as u32)
    }

    /// Opens the device past the page cache.
    pub(crate) fn direct(&self, write: bool) -> Result<File> {
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(OFlags::DIRECT.bits() as i32)
            .open(self.device())
            .with_context(|| self.device().display().to_string())
    }

    /// Generation named by the label on the disk.
    pub(crate) fn generation(&self) -> Result<u64> {
        let disk = self.clone();
        let found = bounded("read the disk's label", SERIES_LIMIT, move || {
            let mut block = Buffer::new(BLOCK);
            disk.direct(false)?.read_exact_at(&mut block, 0)?;
            Ok(generation(&block))
        });
        found
            .with_context(|| self.name.clone())?
            .with_context(|| format!("{}: no label at its start", self.name))
    }

    /// Checks that the disk holds generation `from`, writes generation `to`, flushes, and reads it
    /// back past the page cache. A read-only disk is read only.
    pub(crate) fn check(&self, from: u64, to: u64) -> Result<DiskReport> {
        let disk = self.clone();
        let what = format!("data check of {}", self.name);
        bounded(&what, DATA_LIMIT, move || disk.check_now(from, to)).context(what)
    }

    fn check_now(&self, from: u64, to: u64) -> Result<DiskReport> {
        let size = self.size()?;
        let mut report = DiskReport {
            address: self.address(),
            name: self.name.clone(),
            size,
            readonly: self.readonly()?,
            queues: self.queues()?,
            initial_ok: 0,
            written: 0,
            verified: 0,
            flushed: false,
            checksum: String::new(),
            max_latency_us: 0,
        };
        let mut latency = Latency::default();
        report.initial_ok = self.verify(from, 0..size, &mut latency)?.0;
        if !report.readonly {
            self.write(to, 0..size)?;
            report.written = size;
            report.flushed = true;
        }
        write_text("/proc/sys/vm/drop_caches", "3")?;
        let expected = if report.readonly { from } else { to };
        let (verified, checksum) = self.verify(expected, 0..size, &mut latency)?;
        report.verified = verified;
        report.checksum = checksum.hex();
        report.max_latency_us = latency.max_us;
        Ok(report)
    }

    /// Writes a generation through the page cache, so that many requests are under way, and
    /// flushes.
    pub(crate) fn write(&self, to: u64, range: std::ops::Range<u64>) -> Result<()> {
        let pattern = Pattern::new(self.address(), to);
        let file = OpenOptions::new()
            .write(true)
            .open(self.device())
            .with_context(|| self.device().display().to_string())?;
        let mut buffer = vec![0; CHUNK];
        for offset in range.clone().step_by(CHUNK) {
            let buffer = &mut buffer[..CHUNK.min((range.end - offset) as usize)];
            pattern.fill(offset, buffer);
            file.write_all_at(buffer, offset)
                .with_context(|| format!("{}: write at {offset:#x}", self.name))?;
        }
        file.sync_all()
            .with_context(|| format!("{}: flush", self.name))
    }

    /// Reads past the page cache and counts the bytes up to the first wrong one, which is an error.
    pub(crate) fn verify(
        &self,
        generation: u64,
        range: std::ops::Range<u64>,
        latency: &mut Latency,
    ) -> Result<(u64, Checksum)> {
        let pattern = Pattern::new(self.address(), generation);
        let file = self.direct(false)?;
        let mut buffer = Buffer::new(CHUNK);
        let mut checksum = Checksum::default();
        let mut good = 0;
        for offset in range.clone().step_by(CHUNK) {
            let buffer = &mut buffer[..CHUNK.min((range.end - offset) as usize)];
            latency
                .of(|| file.read_exact_at(buffer, offset))
                .with_context(|| format!("{}: read at {offset:#x}", self.name))?;
            if let Some(wrong) = pattern.mismatch(offset, buffer) {
                let at = offset + wrong as u64;
                let found = &buffer[wrong..wrong + 8];
                bail!(
                    "{}: not generation {generation} at {at:#x}: {found:02x?}",
                    self.name
                );
            }
            checksum.add(buffer);
            good += buffer.len() as u64;
        }
        Ok((good, checksum))
    }

    /// Sends requests from one CPU, each after the one before has completed, and gives their
    /// number. Reads and writes take turns; writes keep the disk at `generation`.
    pub(crate) fn one_at_a_time(&self, cpu: u32, generation: u64) -> Result<u64> {
        let disk = self.clone();
        bounded("requests one at a time", SERIES_LIMIT, move || {
            disk.series(cpu, generation)
        })
    }

    fn series(&self, cpu: u32, generation: u64) -> Result<u64> {
        pin(cpu)?;
        let write = !self.readonly()?;
        let pattern = Pattern::new(self.address(), generation);
        let file = self.direct(write)?;
        let blocks = self.size()? / BLOCK as u64;
        let mut buffer = Buffer::new(BLOCK);
        for index in 0..SERIES {
            let offset = mix(index ^ (u64::from(cpu) << 32)) % blocks * BLOCK as u64;
            if write && index % 2 == 1 {
                pattern.fill(offset, &mut buffer);
                file.write_all_at(&buffer, offset)
                    .with_context(|| format!("{}: write at {offset:#x}", self.name))?;
            } else {
                file.read_exact_at(&mut buffer, offset)
                    .with_context(|| format!("{}: read at {offset:#x}", self.name))?;
                if pattern.mismatch(offset, &buffer).is_some() {
                    bail!("{}: wrong data at {offset:#x}", self.name);
                }
            }
            std::thread::sleep(SERIES_PAUSE);
        }
        Ok(SERIES)
    }
}

/// Keeps the calling thread on one CPU.
pub(crate) fn pin(cpu: u32) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu as usize);
    sched_setaffinity(None, &set).with_context(|| format!("pin to CPU {cpu}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_for_direct_io() {
        for len in [BLOCK, CHUNK] {
            let mut buffer = Buffer::new(len);
            assert_eq!(buffer.as_ptr() as usize % BLOCK, 0);
            assert_eq!(buffer.len(), len);
            buffer.fill(7);
            assert!(buffer.iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn latency_keeps_the_longest_request() {
        let mut latency = Latency::default();
        latency.of(|| std::thread::sleep(Duration::from_millis(3)));
        let longest = latency.max_us;
        assert!(longest >= 3000);
        latency.of(|| ());
        assert_eq!(latency.max_us, longest);
    }
}
