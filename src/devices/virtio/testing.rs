//! A guest for tests: RAM, interrupt counts, a loop that is run by hand, and a driver that speaks
//! to a function through its BAR as a real one does. It shares no code with the device side.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use vm_memory::GuestAddress;

use super::spec::common as reg;
use crate::dma::{Dma, DmaPort};
use crate::mem::{GuestRam, RamMap};
use crate::vmm::{Trigger, Worker, WorkerHost};
use crate::vpci::function::{FunctionResources, InterruptLines, PciFunction};

/// Size of the guest's RAM, which starts at 0.
pub(crate) const RAM_SIZE: u64 = 8 << 20;
pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const INDIRECT: u64 = 1 << 28;
pub(crate) const NOTIFY_PAGE: u64 = 0x3000;
pub(crate) const ISR_PAGE: u64 = 0x1000;
pub(crate) const DEVICE_PAGE: u64 = 0x2000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

/// Interrupts that were raised, in order.
#[derive(Debug, Default)]
pub(crate) struct Lines(Mutex<Vec<u16>>);

impl InterruptLines for Lines {
    fn raise(&self, vector: u16) {
        self.0.lock().unwrap().push(vector);
    }
}

impl Lines {
    /// Takes the record.
    pub(crate) fn take(&self) -> Vec<u16> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

#[derive(Debug, Default)]
pub(crate) struct Flag {
    raised: AtomicBool,
    eventfd: Option<OwnedFd>,
}

impl Trigger for Flag {
    fn trigger(&self) {
        self.raised.store(true, Ordering::SeqCst);
    }

    fn eventfd(&self) -> Option<BorrowedFd<'_>> {
        self.eventfd.as_ref().map(|fd| fd.as_fd())
    }
}

/// A worker and what wakes it.
type Adopted = (Weak<dyn Worker>, Arc<Flag>);

/// A loop that is run by hand.
#[derive(Debug, Default)]
pub(crate) struct ManualHost {
    pub(crate) workers: Mutex<Vec<Adopted>>,
    /// Hand out eventfds, which nobody reads.
    pub(crate) eventfds: bool,
    /// Refuse the worker of this number.
    pub(crate) refuse: Option<usize>,
}

impl WorkerHost for ManualHost {
    fn adopt(&self, worker: Weak<dyn Worker>) -> io::Result<Arc<dyn Trigger>> {
        let mut workers = self.workers.lock().unwrap();
        if self.refuse == Some(workers.len()) {
            return Err(io::Error::other("no more workers"));
        }
        let eventfd = self.eventfds.then(|| {
            rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).expect("eventfd")
        });
        let flag = Arc::new(Flag {
            raised: AtomicBool::new(false),
            eventfd,
        });
        workers.push((worker, flag.clone()));
        Ok(flag)
    }
}

impl ManualHost {
    /// Runs triggered workers until none has work. Panics when that takes very long.
    pub(crate) fn run(&self) {
        for _ in 0..10_000 {
            if !self.step() {
                return;
            }
        }
        panic!("the workers do not come to rest");
    }

    /// Runs each triggered worker once; false if there was none.
    pub(crate) fn step(&self) -> bool {
        let workers = self.workers.lock().unwrap();
        let mut ran = false;
        for (worker, flag) in workers.iter() {
            if flag.raised.swap(false, Ordering::SeqCst)
                && let Some(worker) = worker.upgrade()
            {
                ran = true;
                if worker.process() {
                    flag.trigger();
                }
            }
        }
        ran
    }
}

/// A function and the guest around it.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) ram: GuestRam,
    pub(crate) port: Arc<DmaPort>,
    pub(crate) lines: Arc<Lines>,
    pub(crate) function: Arc<dyn PciFunction>,
}

impl Guest {
    /// Plugs the function in, with bus mastering on.
    pub(crate) fn new(function: Arc<dyn PciFunction>) -> Self {
        let map = RamMap::from_ranges(&[(GuestAddress(0), RAM_SIZE as usize)]).expect("RAM");
        let ram = GuestRam::new(&map);
        let port = DmaPort::new(ram.clone());
        port.set_master(true);
        let lines = Arc::new(Lines::default());
        function.connect(FunctionResources {
            dma: Dma::new(port.clone()),
            interrupts: lines.clone(),
        });
        Self {
            ram,
            port,
            lines,
            function,
        }
    }

    pub(crate) fn read(&self, offset: u64, width: usize) -> u64 {
        let mut bytes = [0; 8];
        self.function.bar_read(0, offset, &mut bytes[..width]);
        u64::from_le_bytes(bytes)
    }

    pub(crate) fn write(&self, offset: u64, width: usize, value: u64) {
        self.function
            .bar_write(0, offset, &value.to_le_bytes()[..width]);
    }

    pub(crate) fn status(&self) -> u8 {
        self.read(reg::DEVICE_STATUS, 1) as u8
    }

    pub(crate) fn set_status(&self, status: u8) {
        self.write(reg::DEVICE_STATUS, 1, u64::from(status));
    }

    pub(crate) fn offered(&self) -> u64 {
        self.write(reg::DEVICE_FEATURE_SELECT, 4, 1);
        let high = self.read(reg::DEVICE_FEATURE, 4);
        self.write(reg::DEVICE_FEATURE_SELECT, 4, 0);
        high << 32 | self.read(reg::DEVICE_FEATURE, 4)
    }

    pub(crate) fn accept(&self, features: u64) {
        self.write(reg::DRIVER_FEATURE_SELECT, 4, 0);
        self.write(reg::DRIVER_FEATURE, 4, features & 0xffff_ffff);
        self.write(reg::DRIVER_FEATURE_SELECT, 4, 1);
        self.write(reg::DRIVER_FEATURE, 4, features >> 32);
    }

    /// Reset, acknowledge, features: true if the device took them.
    pub(crate) fn negotiate(&self, features: u64) -> bool {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(1);
        self.set_status(3);
        self.accept(features);
        self.set_status(0xb);
        self.status() == 0xb
    }

    /// Enables a queue, with its rings at `base`; its vector is its number plus one.
    pub(crate) fn enable_queue(&self, index: u16, size: u16, base: u64) -> DriverQueue {
        let queue = DriverQueue {
            index,
            size,
            desc: base,
            avail: base + 0x1000,
            used: base + 0x2000,
            free: 0,
            available: 0,
            seen: 0,
        };
        self.ram.fill(base, 0x4000, 0).unwrap();
        self.write(reg::QUEUE_SELECT, 2, u64::from(index));
        self.write(reg::QUEUE_SIZE, 2, u64::from(size));
        self.write(reg::QUEUE_MSIX_VECTOR, 2, u64::from(index) + 1);
        for (offset, area) in [
            (reg::QUEUE_DESC, queue.desc),
            (reg::QUEUE_DRIVER, queue.avail),
            (reg::QUEUE_DEVICE, queue.used),
        ] {
            self.write(offset, 4, area & 0xffff_ffff);
            self.write(offset + 4, 4, area >> 32);
        }
        self.write(reg::QUEUE_ENABLE, 2, 1);
        queue
    }

    /// The whole way to `DRIVER_OK` with `queues` queues of 64 entries and vector 0 for changes.
    pub(crate) fn start(&self, features: u64, queues: u16) -> Vec<DriverQueue> {
        assert!(self.negotiate(features), "features {features:#x}");
        self.write(reg::CONFIG_MSIX_VECTOR, 2, 0);
        let started = (0..queues)
            .map(|i| self.enable_queue(i, 64, 0x10000 + u64::from(i) * 0x4000))
            .collect();
        self.set_status(0xf);
        assert_eq!(self.status(), 0xf);
        started
    }

    pub(crate) fn kick(&self, queue: &DriverQueue) {
        let index = u64::from(queue.index);
        self.write(NOTIFY_PAGE + index * 4, 2, index);
    }

    pub(crate) fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read(gpa, &mut bytes).unwrap();
        bytes
    }
}

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buf {
    pub(crate) gpa: u64,
    pub(crate) len: u32,
    pub(crate) write: bool,
}

/// A buffer for the device to read.
pub(crate) fn out(gpa: u64, len: u32) -> Buf {
    Buf {
        gpa,
        len,
        write: false,
    }
}

/// A buffer for the device to write.
pub(crate) fn into(gpa: u64, len: u32) -> Buf {
    Buf {
        gpa,
        len,
        write: true,
    }
}

/// The driver's side of a queue. Descriptors are used up in a circle and never tracked.
#[derive(Debug)]
pub(crate) struct DriverQueue {
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    free: u16,
    available: u16,
    seen: u16,
}

impl DriverQueue {
    /// Writes one descriptor.
    pub(crate) fn descriptor(&self, ram: &GuestRam, table: u64, index: u16, fields: Descriptor) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&fields.gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&fields.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&fields.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&fields.next.to_le_bytes());
        ram.write(table + u64::from(index) * 16, &bytes).unwrap();
    }

    /// Makes a descriptor head available, whatever it is.
    pub(crate) fn offer(&mut self, ram: &GuestRam, head: u16) {
        let slot = u64::from(self.available % self.size);
        ram.write(self.avail + 4 + 2 * slot, &head.to_le_bytes())
            .unwrap();
        self.available = self.available.wrapping_add(1);
        ram.write(self.avail + 2, &self.available.to_le_bytes())
            .unwrap();
    }

    /// Makes a chain available and returns its head.
    pub(crate) fn add(&mut self, ram: &GuestRam, bufs: &[Buf]) -> u16 {
        let head = self.free;
        for (i, buf) in bufs.iter().enumerate() {
            let next = (self.free + 1) % self.size;
            let more = if i + 1 < bufs.len() { NEXT } else { 0 };
            let fields = Descriptor {
                gpa: buf.gpa,
                len: buf.len,
                flags: more | if buf.write { WRITE } else { 0 },
                next,
            };
            self.descriptor(ram, self.desc, self.free, fields);
            self.free = next;
        }
        self.offer(ram, head);
        head
    }

    /// As [`DriverQueue::add`], through an indirect table at `table`.
    pub(crate) fn add_indirect(&mut self, ram: &GuestRam, table: u64, bufs: &[Buf]) -> u16 {
        for (i, buf) in bufs.iter().enumerate() {
            let more = if i + 1 < bufs.len() { NEXT } else { 0 };
            let fields = Descriptor {
                gpa: buf.gpa,
                len: buf.len,
                flags: more | if buf.write { WRITE } else { 0 },
                next: i as u16 + 1,
            };
            self.descriptor(ram, table, i as u16, fields);
        }
        let head = self.free;
        self.free = (self.free + 1) % self.size;
        let fields = Descriptor {
            gpa: table,
            len: 16 * bufs.len() as u32,
            flags: INDIRECT_FLAG,
            next: 0,
        };
        self.descriptor(ram, self.desc, head, fields);
        self.offer(ram, head);
        head
    }

    /// The next used element that was not seen yet: head and length.
    pub(crate) fn used(&mut self, ram: &GuestRam) -> Option<(u16, u32)> {
        let mut index = [0; 2];
        ram.read(self.used + 2, &mut index).unwrap();
        if u16::from_le_bytes(index) == self.seen {
            return None;
        }
        let slot = u64::from(self.seen % self.size);
        let mut element = [0; 8];
        ram.read(self.used + 4 + 8 * slot, &mut element).unwrap();
        self.seen = self.seen.wrapping_add(1);
        let [a, b, c, d, len @ ..] = element;
        Some((
            u32::from_le_bytes([a, b, c, d]) as u16,
            u32::from_le_bytes(len),
        ))
    }

    /// Asks for an interrupt when the used index passes `index` (event index feature).
    pub(crate) fn set_used_event(&self, ram: &GuestRam, index: u16) {
        let at = self.avail + 4 + 2 * u64::from(self.size);
        ram.write(at, &index.to_le_bytes()).unwrap();
    }

    /// Sets or clears `VRING_AVAIL_F_NO_INTERRUPT`.
    pub(crate) fn set_no_interrupt(&self, ram: &GuestRam, on: bool) {
        ram.write(self.avail, &u16::from(on).to_le_bytes()).unwrap();
    }
}

/// A raw descriptor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) gpa: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}
