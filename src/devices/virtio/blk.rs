//! virtio-blk on a raw image (virtio 1.2, 5.2).
//!
//! Each queue has a worker of its own, so queues run in parallel when the VMM's loop has the
//! threads. A request is moved in pieces of [`MAX_DMA_LEN`] through the worker's buffer: host I/O
//! never happens with guest memory held, and a driver's request size costs no memory here.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use log::{info, warn};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::ring::Chain;
use super::spec::blk::{self as config, HEADER_LEN, SECTOR_SIZE};
use super::transport::{
    DeviceSpec, Next, Request, TransferError, TransportCounters, VirtioPci, VirtioState,
    VirtioStateError, worth_logging,
};
use crate::dma::MAX_DMA_LEN;
use crate::vmm::{Trigger, Worker, WorkerHost};
use crate::vpci::function::{DoorbellRegister, FunctionLayout, FunctionResources, PciFunction};

/// Most queues of a block function.
pub const MAX_BLK_QUEUES: u16 = 64;
/// Ring entries of a queue.
const QUEUE_SIZE: u16 = 256;
/// Data segments of a request: a ring's entries less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of a data segment.
const SIZE_MAX: u32 = 64 * 1024;
/// Bytes of data in one request: what a driver that keeps to both limits can ask for.
const MAX_REQUEST: u64 = SEG_MAX as u64 * SIZE_MAX as u64;
/// Sectors of the largest image: file offsets are signed.
const MAX_CAPACITY: u64 = i64::MAX as u64 / SECTOR_SIZE;
/// Requests in one step of a worker.
const STEP_REQUESTS: usize = 32;
/// Bytes of data after which a step of a worker ends.
const STEP_BYTES: u64 = 4 * 1024 * 1024;

/// What a block function is made of.
#[derive(Debug, Clone)]
pub struct BlkConfig {
    /// The raw image: a regular file or a block device. Bytes behind the last whole sector of 512
    /// bytes are not used.
    pub file: PathBuf,
    /// Offer the disk read-only and open the image so.
    pub readonly: bool,
    /// Number of queues, 1 to [`MAX_BLK_QUEUES`]. For parallel I/O, one a virtual CPU.
    pub queues: u16,
    /// Demand of the driver that it uses the platform's IOMMU (`VIRTIO_F_ACCESS_PLATFORM`).
    pub iommu: bool,
    /// What GET_ID answers: up to 20 bytes, longer ones are cut.
    pub id: String,
}

/// Why there is no block function.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The image cannot be opened or measured.
    #[error("{}: {source}", file.display())]
    File {
        /// The image.
        file: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The image is a directory, a character device or the like.
    #[error("{}: neither a regular file nor a block device", file.display())]
    NotAnImage {
        /// The image.
        file: PathBuf,
    },
    /// The image is in use by another function or process (`flock`).
    #[error("{}: in use by another disk", file.display())]
    InUse {
        /// The image.
        file: PathBuf,
    },
    /// The number of queues is out of range.
    #[error("{queues} queues: must be 1 to {MAX_BLK_QUEUES}")]
    Queues {
        /// Number asked for.
        queues: u16,
    },
    /// The VMM's loop did not take a queue's worker.
    #[error("cannot start the queue workers: {0}")]
    Worker(#[source] io::Error),
    /// The transport could not be set up.
    #[error("cannot set up the queues: {0}")]
    Transport(#[source] virtio_queue::Error),
}

/// Counts of one queue since the function was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlkCounters {
    /// Requests taken from the ring.
    pub requests: u64,
    /// Requests answered with an error status.
    pub errors: u64,
    /// Bytes read from the image.
    pub bytes_read: u64,
    /// Bytes written to the image.
    pub bytes_written: u64,
    /// How long the request that is with the host has been there.
    pub oldest: Option<Duration>,
}

/// A block function as the driver sees it, at a moment when no request is with the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct BlkState {
    /// Capacity in sectors, as the driver was last told.
    pub capacity: u64,
    /// Registers and queues; also carries the version.
    pub virtio: VirtioState,
}

#[derive(Debug, Default)]
struct QueueStats {
    requests: AtomicU64,
    errors: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    /// Nanoseconds from the device's start to the start of the request under way, plus 1; 0 when
    /// there is none.
    busy_since: AtomicU64,
}

/// What the workers and the function share.
#[derive(Debug)]
struct Disk {
    pci: VirtioPci,
    file: File,
    path: PathBuf,
    readonly: bool,
    /// In sectors.
    capacity: AtomicU64,
    id: [u8; VIRTIO_BLK_ID_BYTES as usize],
    start: Instant,
    stats: Vec<QueueStats>,
}

/// A virtio-blk function.
#[derive(Debug)]
pub struct Blk {
    disk: Arc<Disk>,
    /// Kept alive here; the VMM's loop holds weak references.
    _workers: Vec<Arc<QueueWorker>>,
}

impl Blk {
    /// Opens the image, takes an advisory lock on it, and gives a worker for each queue to `host`.
    ///
    /// # Errors
    ///
    /// [`BlkError`]; nothing is left behind.
    pub fn new(config: BlkConfig, host: &dyn WorkerHost) -> Result<Arc<Self>, BlkError> {
        if !(1..=MAX_BLK_QUEUES).contains(&config.queues) {
            let queues = config.queues;
            return Err(BlkError::Queues { queues });
        }
        let file = open(&config)?;
        let capacity = sectors(&file).map_err(|source| BlkError::File {
            file: config.file.clone(),
            source,
        })?;
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        let len = config.id.len().min(id.len());
        id[..len].copy_from_slice(&config.id.as_bytes()[..len]);
        let spec = device_spec(&config, capacity);
        let disk = Arc::new(Disk {
            pci: VirtioPci::new(spec).map_err(BlkError::Transport)?,
            file,
            path: config.file,
            readonly: config.readonly,
            capacity: AtomicU64::new(capacity),
            id,
            start: Instant::now(),
            stats: (0..config.queues).map(|_| QueueStats::default()).collect(),
        });
        let mut workers = Vec::new();
        let mut triggers: Vec<Arc<dyn Trigger>> = Vec::new();
        for index in 0..usize::from(config.queues) {
            let worker = Arc::new(QueueWorker {
                disk: disk.clone(),
                index,
                scratch: Mutex::new(Scratch::default()),
            });
            let weak: Weak<QueueWorker> = Arc::downgrade(&worker);
            triggers.push(host.adopt(weak).map_err(BlkError::Worker)?);
            workers.push(worker);
        }
        disk.pci.set_triggers(triggers);
        Ok(Arc::new(Self {
            disk,
            _workers: workers,
        }))
    }

    /// Measures the image again. If its size changed, the capacity follows, and the driver is told
    /// by a configuration change. Returns true then.
    ///
    /// # Errors
    ///
    /// The host's error; the capacity stays.
    pub fn resize(&self) -> io::Result<bool> {
        let disk = &self.disk;
        let capacity = sectors(&disk.file)?;
        Ok(disk.pci.update_config(|bytes| {
            let old = disk.capacity.swap(capacity, Ordering::AcqRel);
            put_capacity(bytes, capacity);
            if old != capacity {
                let file = disk.path.display();
                info!("{file}: capacity changed from {old} to {capacity} sectors");
            }
            old != capacity
        }))
    }

    /// Capacity in bytes, as the driver was last told.
    pub fn capacity(&self) -> u64 {
        self.disk.capacity.load(Ordering::Acquire) * SECTOR_SIZE
    }

    /// The function's state, when its workers are stopped. The image is not part of it.
    ///
    /// # Errors
    ///
    /// [`VirtioStateError::Busy`] if a worker runs nevertheless.
    pub fn save(&self) -> Result<BlkState, VirtioStateError> {
        Ok(BlkState {
            capacity: self.disk.capacity.load(Ordering::Acquire),
            virtio: self.disk.pci.save()?,
        })
    }

    /// Takes over a saved state; the function must be plugged in and its workers stopped. The
    /// driver goes on with the capacity that it knows: call [`Blk::resize`] afterwards, in case the
    /// image has another size here.
    ///
    /// # Errors
    ///
    /// [`VirtioStateError`] if the state is not one of such a function; nothing changes then.
    pub fn restore(&self, state: &BlkState) -> Result<(), VirtioStateError> {
        if state.capacity > MAX_CAPACITY {
            let sectors = state.capacity;
            return Err(VirtioStateError::Capacity { sectors });
        }
        self.disk.pci.restore(&state.virtio)?;
        self.disk.pci.set_config(|bytes| {
            self.disk.capacity.store(state.capacity, Ordering::Release);
            put_capacity(bytes, state.capacity);
        });
        Ok(())
    }

    /// Counts of each queue.
    pub fn counters(&self) -> Vec<BlkCounters> {
        let now = self.disk.now();
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let count = |stats: &QueueStats| BlkCounters {
            requests: get(&stats.requests),
            errors: get(&stats.errors),
            bytes_read: get(&stats.bytes_read),
            bytes_written: get(&stats.bytes_written),
            oldest: Some(get(&stats.busy_since))
                .filter(|since| *since != 0)
                .map(|since| Duration::from_nanos(now.saturating_sub(since))),
        };
        self.disk.stats.iter().map(count).collect()
    }

    /// Counts of the transport.
    pub fn transport_counters(&self) -> TransportCounters {
        self.disk.pci.counters()
    }
}

impl PciFunction for Blk {
    fn layout(&self) -> FunctionLayout {
        self.disk.pci.layout()
    }

    fn connect(&self, resources: FunctionResources) {
        self.disk.pci.connect(resources);
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.disk.pci.bar_read(bar, offset, data);
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.disk.pci.bar_write(bar, offset, data);
    }

    fn capability_read(&self, _capability: usize, offset: usize, body: &[u8], data: &mut [u8]) {
        self.disk.pci.capability_read(offset, body, data);
    }

    fn capability_write(&self, _capability: usize, offset: usize, body: &[u8], _len: usize) {
        self.disk.pci.capability_write(offset, body);
    }

    fn doorbells(&self) -> Vec<DoorbellRegister> {
        self.disk.pci.doorbells()
    }

    fn reset(&self) {
        self.disk.pci.reset();
    }
}

/// Opens and locks the image.
fn open(config: &BlkConfig) -> Result<File, BlkError> {
    let path = config.file.clone();
    let file_error = |source| BlkError::File {
        file: path.clone(),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(!config.readonly)
        .open(&config.file)
        .map_err(file_error)?;
    let kind = file.metadata().map_err(file_error)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(BlkError::NotAnImage { file: path });
    }
    let locked = if config.readonly {
        file.try_lock_shared()
    } else {
        file.try_lock()
    };
    match locked {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(BlkError::InUse { file: path }),
        // Some file systems have no locks; the user's care must do.
        Err(TryLockError::Error(e)) => {
            warn!("{}: cannot be locked: {e}", path.display());
            Ok(file)
        }
    }
}

fn put_capacity(bytes: &mut [u8], sectors: u64) {
    bytes[config::CAPACITY..][..8].copy_from_slice(&sectors.to_le_bytes());
}

/// Size of an image in sectors. Seeking also measures block devices.
fn sectors(mut file: &File) -> io::Result<u64> {
    Ok(file.seek(SeekFrom::End(0))? / SECTOR_SIZE)
}

fn device_spec(blk: &BlkConfig, capacity: u64) -> DeviceSpec {
    let mut features = (1 << VIRTIO_BLK_F_SIZE_MAX)
        | (1 << VIRTIO_BLK_F_SEG_MAX)
        | (1 << VIRTIO_BLK_F_BLK_SIZE)
        | (1 << VIRTIO_BLK_F_FLUSH)
        | (1 << VIRTIO_BLK_F_MQ);
    if blk.readonly {
        features |= 1 << VIRTIO_BLK_F_RO;
    }
    let mut bytes = vec![0; config::LEN];
    let mut put = |offset: usize, value: &[u8]| {
        bytes[offset..][..value.len()].copy_from_slice(value);
    };
    put(config::SIZE_MAX, &SIZE_MAX.to_le_bytes());
    put(config::SEG_MAX, &SEG_MAX.to_le_bytes());
    put(config::BLK_SIZE, &(SECTOR_SIZE as u32).to_le_bytes());
    put(config::NUM_QUEUES, &blk.queues.to_le_bytes());
    put_capacity(&mut bytes, capacity);
    DeviceSpec {
        kind: "blk",
        id: VIRTIO_ID_BLOCK as u16,
        // Mass storage controller, SCSI, as other virtio-blk devices say.
        class: (0x01, 0x00),
        features,
        iommu: blk.iommu,
        queues: blk.queues,
        queue_size: QUEUE_SIZE,
        config: bytes,
    }
}

/// A worker's memory, reused from request to request.
#[derive(Debug)]
struct Scratch {
    chain: Chain,
    buffer: Box<[u8]>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            chain: Chain::default(),
            buffer: vec![0; MAX_DMA_LEN].into_boxed_slice(),
        }
    }
}

/// The worker of one queue.
#[derive(Debug)]
struct QueueWorker {
    disk: Arc<Disk>,
    index: usize,
    /// Never contended: a worker runs once at a time.
    scratch: Mutex<Scratch>,
}

impl Worker for QueueWorker {
    fn name(&self) -> String {
        format!("blk-queue-{}", self.index)
    }

    fn process(&self) -> bool {
        let mut scratch = self.scratch.lock().unwrap_or_else(|e| e.into_inner());
        let Scratch { chain, buffer } = &mut *scratch;
        let stats = &self.disk.stats[self.index];
        let moved = || {
            stats.bytes_read.load(Ordering::Relaxed) + stats.bytes_written.load(Ordering::Relaxed)
        };
        let start = moved();
        for _ in 0..STEP_REQUESTS {
            match self.disk.pci.pop(self.index, chain) {
                Next::Request(request) => self.disk.serve(request, stats, buffer),
                Next::Idle => return false,
                Next::Again => return true,
            }
            if moved() - start >= STEP_BYTES {
                break;
            }
        }
        true
    }
}

/// A request that ends with an error status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// VIRTIO_BLK_S_IOERR.
    Io,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

impl From<TransferError> for Failure {
    fn from(_: TransferError) -> Self {
        Self::Io
    }
}

impl Disk {
    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64 + 1
    }

    /// Serves one request and answers it.
    fn serve(&self, request: Request<'_>, stats: &QueueStats, buffer: &mut [u8]) {
        stats.requests.fetch_add(1, Ordering::Relaxed);
        stats.busy_since.store(self.now(), Ordering::Relaxed);
        match request.writable_len().checked_sub(1) {
            Some(room) => {
                let mut written = 0;
                let result = self.execute(&request, room, buffer, &mut written, stats);
                let status = match result {
                    Ok(()) => VIRTIO_BLK_S_OK,
                    Err(Failure::Io) => VIRTIO_BLK_S_IOERR,
                    Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
                };
                if result.is_err() {
                    stats.errors.fetch_add(1, Ordering::Relaxed);
                }
                // The used length vouches for bytes from the start on (virtio 1.2, 2.7.8.2): the
                // status byte counts only if everything before it was written.
                let len = written + u64::from(written == room);
                request.complete(room, &[status as u8], u32::try_from(len).unwrap_or(0));
            }
            None => {
                stats.errors.fetch_add(1, Ordering::Relaxed);
                request.fail();
            }
        }
        stats.busy_since.store(0, Ordering::Relaxed);
    }

    /// Does what the header asks. `room` is the number of writable bytes before the status byte,
    /// `written` counts those that were written.
    fn execute(
        &self,
        request: &Request<'_>,
        room: u64,
        buffer: &mut [u8],
        written: &mut u64,
        stats: &QueueStats,
    ) -> Result<(), Failure> {
        let mut header = [0; HEADER_LEN as usize];
        request.read(0, &mut header)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => {
                let start = self.range(sector, room)?;
                while *written < room {
                    let piece = piece(buffer, room - *written);
                    self.host(self.file.read_exact_at(piece, start + *written))?;
                    request.write(*written, piece)?;
                    *written += piece.len() as u64;
                    stats
                        .bytes_read
                        .fetch_add(piece.len() as u64, Ordering::Relaxed);
                }
                Ok(())
            }
            VIRTIO_BLK_T_OUT => {
                let len = request.readable_len() - HEADER_LEN;
                if self.readonly {
                    return Err(Failure::Io);
                }
                let start = self.range(sector, len)?;
                let mut done = 0;
                while done < len {
                    let piece = piece(buffer, len - done);
                    request.read(HEADER_LEN + done, piece)?;
                    self.host(self.file.write_all_at(piece, start + done))?;
                    done += piece.len() as u64;
                    stats
                        .bytes_written
                        .fetch_add(piece.len() as u64, Ordering::Relaxed);
                }
                // Without a way to flush, a completed write is a stable one (virtio 1.2, 5.2.6.2).
                if !request.has_feature(VIRTIO_BLK_F_FLUSH) {
                    self.host(self.file.sync_data())?;
                }
                Ok(())
            }
            VIRTIO_BLK_T_FLUSH => self.host(self.file.sync_data()),
            VIRTIO_BLK_T_GET_ID => {
                let len = room.min(u64::from(VIRTIO_BLK_ID_BYTES));
                request.write(0, &self.id[..len as usize])?;
                *written = len;
                Ok(())
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// The place in the image of `len` bytes from `sector` on: whole sectors, inside the capacity,
    /// and not more than a request may have.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let end = sector.checked_add(len / SECTOR_SIZE).ok_or(Failure::Io)?;
        let inside = end <= self.capacity.load(Ordering::Acquire);
        if len.is_multiple_of(SECTOR_SIZE) && len <= MAX_REQUEST && inside {
            Ok(sector * SECTOR_SIZE)
        } else {
            Err(Failure::Io)
        }
    }

    /// Logs a host error.
    fn host(&self, result: io::Result<()>) -> Result<(), Failure> {
        result.map_err(|e| {
            let errors: u64 = self
                .stats
                .iter()
                .map(|s| s.errors.load(Ordering::Relaxed))
                .sum();
            if worth_logging(errors) {
                warn!("{}: {e}", self.path.display());
            }
            Failure::Io
        })
    }
}

/// As much of the buffer as `left` bytes need.
fn piece(buffer: &mut [u8], left: u64) -> &mut [u8] {
    let len = left.min(buffer.len() as u64) as usize;
    &mut buffer[..len]
}

#[cfg(test)]
mod tests;
