//! Entropy sources: reads through `/dev/hwrng`, and moves of their interrupt between CPUs.

use crate::bounded::Worker;
use crate::disk::Latency;
use crate::interrupts;
use crate::moves::{self, Movable};
use crate::pci::Found;
use crate::system::{read_text, write_text};
use anyhow::{Context, Result, bail};
use guest_images::report::{MoveReport, RngReport, VectorCounts};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

/// Control files of the kernel's entropy core.
const CONTROL: &str = "/sys/class/misc/hw_random";
/// Bytes of one read: one buffer of the driver, so that each read makes one request.
const READ: usize = 64;
/// Longest that one read may take before it counts as lost.
const READ_LIMIT: Duration = Duration::from_secs(5);

/// An entropy source and the name the entropy core knows it by.
#[derive(Debug)]
pub(crate) struct Rng {
    pub(crate) function: Found,
    reader: Worker<(), Duration>,
    name: String,
    bytes: u64,
    latency: Latency,
}

impl Rng {
    /// Finds the source's name by reading from each candidate: the right one interrupts.
    pub(crate) fn open(function: &Found) -> Result<Self> {
        let available = read_text(Path::new(CONTROL).join("rng_available"))?;
        for name in available
            .split_ascii_whitespace()
            .filter(|name| name.starts_with("virtio"))
        {
            let mut rng = Self {
                function: function.clone(),
                reader: start_reader(name),
                name: name.to_owned(),
                bytes: 0,
                latency: Latency::default(),
            };
            rng.select()?;
            let before = rng.count()?;
            for _ in 0..4 {
                rng.read()?;
            }
            std::thread::sleep(Duration::from_millis(200));
            if rng.count()? > before {
                return Ok(rng);
            }
        }
        bail!(
            "{}: none of {available:?} makes it interrupt",
            function.address
        )
    }

    /// Makes this source the one that `/dev/hwrng` reads, and keeps the kernel's own reader from
    /// using it on its own account.
    fn select(&self) -> Result<()> {
        // Older kernels lack the file; then the kernel's reader shows as a mark taken again.
        let quality = Path::new(CONTROL).join("rng_quality");
        if quality.exists() {
            let _ = write_text(quality, "0");
        }
        let current = Path::new(CONTROL).join("rng_current");
        if read_text(&current)? == self.name {
            return Ok(());
        }
        write_text(current, &self.name)
    }

    fn read(&mut self) -> Result<()> {
        let took = self.reader.ask((), READ_LIMIT)?;
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.latency.max_us = self.latency.max_us.max(micros);
        self.bytes += READ as u64;
        Ok(())
    }

    fn count(&self) -> Result<u64> {
        // Before its first interrupt the vector is listed with zeroes.
        Ok(self.vector()?.total())
    }

    /// Moves the queue's interrupt over `cpus`, reading until each has counted one. Gives the
    /// number of reads.
    pub(crate) fn move_over(&mut self, cpus: &[u32], list: &mut Vec<MoveReport>) -> Result<u64> {
        moves::over(self, cpus, list)
    }

    /// Moves the queue's interrupt to one CPU and reads until that CPU has counted one.
    pub(crate) fn move_to(&mut self, cpu: u32) -> Result<MoveReport> {
        moves::to(self, cpu)
    }

    pub(crate) fn report(self, moves: Vec<MoveReport>) -> RngReport {
        RngReport {
            address: self.function.address,
            bytes: self.bytes,
            max_latency_us: self.latency.max_us,
            moves,
        }
    }
}

impl Movable for Rng {
    /// That of the request queue.
    fn vector(&self) -> Result<VectorCounts> {
        interrupts::vectors(&self.function)?
            .into_iter()
            .find(|vector| vector.index == 1)
            .with_context(|| format!("{}: no interrupt of its queue", self.function.address))
    }

    fn prepare(&mut self) -> Result<()> {
        self.select()
    }

    /// A read. It hands its buffer back at once; that buffer's interrupt comes a bit later.
    fn request(&mut self) -> Result<()> {
        self.read()
    }
}

/// A thread that reads, so that a read which never ends can be told.
fn start_reader(name: &str) -> Worker<(), Duration> {
    let mut file = None;
    Worker::start(format!("read of {name}"), move |()| {
        let file = match &mut file {
            Some(file) => file,
            empty => empty.insert(File::open("/dev/hwrng").context("/dev/hwrng")?),
        };
        let start = Instant::now();
        let mut bytes = [0; READ];
        file.read_exact(&mut bytes).context("/dev/hwrng")?;
        if bytes.iter().all(|&byte| byte == bytes[0]) {
            bail!("/dev/hwrng: {READ} equal bytes");
        }
        Ok(start.elapsed())
    })
}
