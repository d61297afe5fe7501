//! virtio-rng (virtio 1.2, 5.4): the host's random numbers.
#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use log::warn;
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::ring::Chain;
use super::transport::{
    DeviceSpec, Next, Request, TransportCounters, VirtioPci, VirtioState, VirtioStateError,
    worth_logging,
};
use crate::vmm::{Worker, WorkerHost};
use crate::vpci::function::{DoorbellRegister, FunctionLayout, FunctionResources, PciFunction};

/// Most bytes that one request gets; the used length says so to the driver.
pub const MAX_RNG_REQUEST: usize = 4096;
/// Ring entries of the queue.
const QUEUE_SIZE: u16 = 64;
/// Requests in one step of the worker.
const STEP_REQUESTS: usize = 32;
/// The only queue.
const QUEUE: usize = 0;

/// What an entropy function is made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RngConfig {
    /// Demand of the driver that it uses the platform's IOMMU (`VIRTIO_F_ACCESS_PLATFORM`).
    pub iommu: bool,
}

/// Counts since the function was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RngCounters {
    /// Requests taken from the ring.
    pub requests: u64,
    /// Requests that got no byte: without room, with buffers outside guest memory, or for want of
    /// random numbers on the host.
    pub errors: u64,
    /// Random bytes given.
    pub bytes: u64,
}

/// A virtio-rng function.
#[derive(Debug)]
pub struct Rng {
    source: Arc<Source>,
}

/// The device and its worker.
#[derive(Debug)]
struct Source {
    pci: VirtioPci,
    /// Never contended: a worker runs once at a time.
    scratch: Mutex<Chain>,
    requests: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
}

impl Rng {
    /// A function whose worker runs on `host`.
    ///
    /// # Errors
    ///
    /// The error of `host`, if it did not take the worker.
    pub fn new(config: RngConfig, host: &dyn WorkerHost) -> io::Result<Arc<Self>> {
        let spec = DeviceSpec {
            kind: "rng",
            id: VIRTIO_ID_RNG as u16,
            // A device that fits no class.
            class: (0xff, 0x00),
            features: 0,
            iommu: config.iommu,
            queues: 1,
            queue_size: QUEUE_SIZE,
            config: Vec::new(),
        };
        let source = Arc::new(Source {
            pci: VirtioPci::new(spec).map_err(io::Error::other)?,
            scratch: Mutex::new(Chain::default()),
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        });
        let weak: Weak<Source> = Arc::downgrade(&source);
        source.pci.set_triggers(vec![host.adopt(weak)?]);
        Ok(Arc::new(Self { source }))
    }

    /// The function's state, when its worker is stopped.
    ///
    /// # Errors
    ///
    /// [`VirtioStateError::Busy`] if the worker runs nevertheless.
    pub fn save(&self) -> Result<VirtioState, VirtioStateError> {
        self.source.pci.save()
    }

    /// Takes over a saved state; the function must be plugged in and its worker stopped.
    ///
    /// # Errors
    ///
    /// [`VirtioStateError`] if the state is not one of such a function; nothing changes then.
    pub fn restore(&self, state: &VirtioState) -> Result<(), VirtioStateError> {
        self.source.pci.restore(state)
    }

    /// Counts since the function was made.
    pub fn counters(&self) -> RngCounters {
        RngCounters {
            requests: self.source.requests.load(Ordering::Relaxed),
            errors: self.source.errors.load(Ordering::Relaxed),
            bytes: self.source.bytes.load(Ordering::Relaxed),
        }
    }

    /// Counts of the transport.
    pub fn transport_counters(&self) -> TransportCounters {
        self.source.pci.counters()
    }
}

impl PciFunction for Rng {
    fn layout(&self) -> FunctionLayout {
        self.source.pci.layout()
    }

    fn connect(&self, resources: FunctionResources) {
        self.source.pci.connect(resources);
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.source.pci.bar_read(bar, offset, data);
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.source.pci.bar_write(bar, offset, data);
    }

    fn capability_read(&self, _capability: usize, offset: usize, body: &[u8], data: &mut [u8]) {
        self.source.pci.capability_read(offset, body, data);
    }

    fn capability_write(&self, _capability: usize, offset: usize, body: &[u8], _len: usize) {
        self.source.pci.capability_write(offset, body);
    }

    fn doorbells(&self) -> Vec<DoorbellRegister> {
        self.source.pci.doorbells()
    }

    fn reset(&self) {
        self.source.pci.reset();
    }
}

impl Worker for Source {
    fn name(&self) -> String {
        "rng-queue".to_owned()
    }

    fn process(&self) -> bool {
        let mut chain = self.scratch.lock().unwrap_or_else(|e| e.into_inner());
        for _ in 0..STEP_REQUESTS {
            match self.pci.pop(QUEUE, &mut chain) {
                Next::Request(request) => self.serve(request),
                Next::Idle => return false,
                Next::Again => return true,
            }
        }
        true
    }
}

impl Source {
    fn serve(&self, request: Request<'_>) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let mut bytes = [0; MAX_RNG_REQUEST];
        let room = request.writable_len().min(MAX_RNG_REQUEST as u64) as usize;
        let filled = match getrandom(&mut bytes[..room], GetRandomFlags::empty()) {
            Ok(filled) => filled,
            Err(e) => {
                if worth_logging(self.errors.load(Ordering::Relaxed)) {
                    warn!("no random numbers: {e}");
                }
                0
            }
        };
        let len = match request.write(0, &bytes[..filled]) {
            Ok(()) => filled,
            Err(_) => 0,
        };
        if len == 0 {
            self.errors.fetch_add(1, Ordering::Relaxed);
        }
        self.bytes.fetch_add(len as u64, Ordering::Relaxed);
        request.complete(0, &[], len as u32);
    }
}

#[cfg(test)]
mod tests;
