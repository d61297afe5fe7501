//! The modern virtio-pci transport (virtio 1.2, 4.1): registers, negotiation, interrupts, and the
//! guarded way of a device to its requests.
//!
//! Lock order: registers, then rings in ascending order, then the DMA guard. Interrupts are raised
//! under the lock whose reset would make them wrong (a ring's, or the registers'), so that none is
//! raised for anything older than a reset that has returned.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use log::{debug, warn};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::ring::{Ring, RingArea};
use super::spec::{ISR_CONFIG, NO_VECTOR, common};
use crate::vmm::Trigger;
use crate::vpci::function::FunctionResources;

mod layout;
mod request;
mod state;

pub(super) use request::{Next, Request, TransferError};
pub use state::{VIRTIO_STATE_VERSION, VirtioQueueState, VirtioState, VirtioStateError};

/// The BAR of all structures.
const BAR: u8 = 0;
/// Size of that BAR. Each structure has a page of its own, and so do the MSI-X table and its PBA.
const BAR_SIZE: u64 = 0x8000;
const PAGE: u64 = 0x1000;
const COMMON_PAGE: u64 = 0;
const ISR_PAGE: u64 = 1;
const DEVICE_PAGE: u64 = 2;
const NOTIFY_PAGE: u64 = 3;
const MSIX_TABLE_PAGE: u64 = 4;
const MSIX_PBA_PAGE: u64 = 5;
/// Bytes from one queue's doorbell to the next.
const NOTIFY_MULTIPLIER: u32 = 4;

const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
/// Every status bit that virtio defines.
const STATUS_BITS: u8 = (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER) as u8
    | FEATURES_OK
    | DRIVER_OK
    | NEEDS_RESET
    | FAILED;

/// True for the first few of a kind, then ever more rarely: a guest can cause these at will.
pub(super) fn worth_logging(count: u64) -> bool {
    count < 8 || count.is_power_of_two()
}

/// What sets one virtio device apart from another in the transport.
#[derive(Debug, Clone)]
pub(super) struct DeviceSpec {
    /// Name in logs and reports.
    pub(super) kind: &'static str,
    /// Virtio device id (virtio 1.2, 5).
    pub(super) id: u16,
    /// PCI base class and sub-class.
    pub(super) class: (u8, u8),
    /// Device-specific feature bits.
    pub(super) features: u64,
    /// DMA goes through an IOMMU of the platform: `VIRTIO_F_ACCESS_PLATFORM` is offered, and
    /// demanded.
    pub(super) iommu: bool,
    /// Number of queues; each has a vector besides the one of the configuration.
    pub(super) queues: u16,
    /// Largest ring.
    pub(super) queue_size: u16,
    /// Device-specific configuration.
    pub(super) config: Vec<u8>,
}

impl DeviceSpec {
    fn offered(&self) -> u64 {
        let platform = u64::from(self.iommu) << VIRTIO_F_ACCESS_PLATFORM;
        let transport = (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | (1 << VIRTIO_RING_F_EVENT_IDX);
        self.features | transport | platform
    }

    fn acceptable(&self, accepted: u64) -> bool {
        let platform = u64::from(self.iommu) << VIRTIO_F_ACCESS_PLATFORM;
        let required = (1 << VIRTIO_F_VERSION_1) | platform;
        accepted & !self.offered() == 0 && accepted & required == required
    }

    fn vectors(&self) -> u16 {
        self.queues + 1
    }
}

/// Counts of a device's transport since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TransportCounters {
    /// Register writes that virtio does not allow, ignored.
    pub misuse: u64,
    /// Times that the device asked for a reset because a ring could not go on.
    pub broken: u64,
    /// Resets, by the driver or by the bus.
    pub resets: u64,
}

/// Device-wide registers.
#[derive(Debug)]
struct Registers {
    status: u8,
    /// A reset waits for requests that are with the host.
    resetting: bool,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    queue_select: u16,
    generation: u8,
    config: Vec<u8>,
}

/// The transport of one device.
#[derive(Debug)]
pub(super) struct VirtioPci {
    spec: DeviceSpec,
    registers: Mutex<Registers>,
    rings: Vec<Mutex<Ring>>,
    isr: AtomicU8,
    /// Requests that are with the host since before the last reset.
    stale: AtomicU32,
    resources: OnceLock<FunctionResources>,
    triggers: OnceLock<Vec<Arc<dyn Trigger>>>,
    misuse: AtomicU64,
    broken: AtomicU64,
    resets: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl VirtioPci {
    /// A device at power-on.
    pub(super) fn new(spec: DeviceSpec) -> Result<Self, virtio_queue::Error> {
        let rings = (0..spec.queues)
            .map(|_| Ring::new(spec.queue_size).map(Mutex::new))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            registers: Mutex::new(Registers {
                status: 0,
                resetting: false,
                device_feature_select: 0,
                driver_feature_select: 0,
                driver_features: 0,
                config_vector: NO_VECTOR,
                queue_select: 0,
                generation: 0,
                config: spec.config.clone(),
            }),
            spec,
            rings,
            isr: AtomicU8::new(0),
            stale: AtomicU32::new(0),
            resources: OnceLock::new(),
            triggers: OnceLock::new(),
            misuse: AtomicU64::new(0),
            broken: AtomicU64::new(0),
            resets: AtomicU64::new(0),
        })
    }

    /// What wakes the worker of each queue, in order. Set once, before the device is plugged in.
    pub(super) fn set_triggers(&self, triggers: Vec<Arc<dyn Trigger>>) {
        let _ = self.triggers.set(triggers);
    }

    pub(super) fn connect(&self, resources: FunctionResources) {
        if self.resources.set(resources).is_err() {
            warn!("virtio {}: connected twice", self.spec.kind);
        }
    }

    pub(super) fn counters(&self) -> TransportCounters {
        TransportCounters {
            misuse: self.misuse.load(Ordering::Relaxed),
            broken: self.broken.load(Ordering::Relaxed),
            resets: self.resets.load(Ordering::Relaxed),
        }
    }

    pub(super) fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != BAR {
            return;
        }
        let (page, offset) = (offset / PAGE, offset % PAGE);
        match page {
            COMMON_PAGE => copy_from(&self.common_image(), offset, data),
            ISR_PAGE if offset == 0 => data[0] = self.isr.swap(0, Ordering::AcqRel),
            DEVICE_PAGE => copy_from(&lock(&self.registers).config, offset, data),
            _ => {}
        }
    }

    pub(super) fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        let (page, offset) = (offset / PAGE, offset % PAGE);
        let queue = offset / u64::from(NOTIFY_MULTIPLIER);
        let taken = match page {
            COMMON_PAGE if bar == BAR => self.common_write(offset, data),
            NOTIFY_PAGE if bar == BAR => self.notify(queue as usize),
            _ => false,
        };
        if !taken {
            self.misuse.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A doorbell. Which queue is told by the address; the value is ignored.
    fn notify(&self, queue: usize) -> bool {
        match self.triggers.get().and_then(|t| t.get(queue)) {
            Some(trigger) => {
                trigger.trigger();
                true
            }
            None => false,
        }
    }

    /// The common configuration structure as the driver reads it now.
    fn common_image(&self) -> [u8; common::LEN] {
        let mut image = [0; common::LEN];
        let mut put = |offset: u64, bytes: &[u8]| {
            image[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        };
        let mut regs = lock(&self.registers);
        self.finish_reset(&mut regs);
        let word = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let device = word(self.spec.offered(), regs.device_feature_select);
        let driver = word(regs.driver_features, regs.driver_feature_select);
        put(
            common::DEVICE_FEATURE_SELECT,
            &regs.device_feature_select.to_le_bytes(),
        );
        put(common::DEVICE_FEATURE, &device.to_le_bytes());
        put(
            common::DRIVER_FEATURE_SELECT,
            &regs.driver_feature_select.to_le_bytes(),
        );
        put(common::DRIVER_FEATURE, &driver.to_le_bytes());
        put(
            common::CONFIG_MSIX_VECTOR,
            &regs.config_vector.to_le_bytes(),
        );
        put(common::NUM_QUEUES, &self.spec.queues.to_le_bytes());
        put(common::DEVICE_STATUS, &[regs.status]);
        put(common::CONFIG_GENERATION, &[regs.generation]);
        put(common::QUEUE_SELECT, &regs.queue_select.to_le_bytes());
        if let Some(ring) = self.rings.get(usize::from(regs.queue_select)) {
            let ring = lock(ring);
            put(common::QUEUE_SIZE, &ring.size().to_le_bytes());
            put(common::QUEUE_MSIX_VECTOR, &ring.vector.to_le_bytes());
            put(
                common::QUEUE_ENABLE,
                &u16::from(ring.enabled()).to_le_bytes(),
            );
            put(common::QUEUE_NOTIFY_OFF, &regs.queue_select.to_le_bytes());
            for (offset, area) in AREAS {
                put(offset, &ring.area(area).to_le_bytes());
            }
        } else {
            put(common::QUEUE_MSIX_VECTOR, &NO_VECTOR.to_le_bytes());
        }
        image
    }

    /// A store to the common configuration; false if virtio does not allow it.
    fn common_write(&self, offset: u64, data: &[u8]) -> bool {
        match *data {
            [a] => self.write_field(offset, 1, u32::from(a)),
            [a, b] => self.write_field(offset, 2, u32::from(u16::from_le_bytes([a, b]))),
            [a, b, c, d] => self.write_field(offset, 4, u32::from_le_bytes([a, b, c, d])),
            // A 64-bit store to a 64-bit field is two 32-bit ones.
            [a, b, c, d, e, f, g, h] if AREAS.iter().any(|area| area.0 == offset) => {
                self.write_field(offset, 4, u32::from_le_bytes([a, b, c, d]))
                    && self.write_field(offset + 4, 4, u32::from_le_bytes([e, f, g, h]))
            }
            _ => false,
        }
    }

    fn write_field(&self, offset: u64, width: usize, value: u32) -> bool {
        let mut regs = lock(&self.registers);
        self.finish_reset(&mut regs);
        match (offset, width) {
            (common::DEVICE_FEATURE_SELECT, 4) => regs.device_feature_select = value,
            (common::DRIVER_FEATURE_SELECT, 4) => regs.driver_feature_select = value,
            (common::DRIVER_FEATURE, 4) => {
                let shift = match regs.driver_feature_select {
                    0 => 0,
                    1 => 32,
                    _ => return false,
                };
                if regs.status & FEATURES_OK != 0 {
                    return false;
                }
                regs.driver_features &= !(u64::from(u32::MAX) << shift);
                regs.driver_features |= u64::from(value) << shift;
            }
            (common::CONFIG_MSIX_VECTOR, 2) => regs.config_vector = self.vector(value as u16),
            (common::DEVICE_STATUS, 1) => return self.write_status(&mut regs, value as u8),
            (common::QUEUE_SELECT, 2) => regs.queue_select = value as u16,
            _ => return self.write_queue_field(&regs, (offset, width), value),
        }
        true
    }

    fn write_queue_field(&self, regs: &Registers, field: (u64, usize), value: u32) -> bool {
        let Some(ring) = self.rings.get(usize::from(regs.queue_select)) else {
            return false;
        };
        let mut ring = lock(ring);
        match field {
            (common::QUEUE_MSIX_VECTOR, 2) => {
                ring.vector = self.vector(value as u16);
                true
            }
            // The layout of an enabled queue is fixed until reset (virtio 1.2, 4.1.4.3.2).
            _ if ring.enabled() => false,
            (common::QUEUE_SIZE, 2) => ring.set_size(value as u16),
            (common::QUEUE_ENABLE, 2) => {
                let negotiated = regs.status & FEATURES_OK != 0;
                let working = regs.status & (FAILED | NEEDS_RESET) == 0;
                if value != 1 || !negotiated || !working {
                    return false;
                }
                ring.enable();
                if regs.status & DRIVER_OK != 0 {
                    ring.activate(regs.driver_features);
                }
                true
            }
            (offset, 4) => {
                let Some((start, area)) = AREAS
                    .into_iter()
                    .find(|(start, _)| offset == *start || offset == start + 4)
                else {
                    return false;
                };
                let old = ring.area(area);
                let new = if offset == start {
                    old & !u64::from(u32::MAX) | u64::from(value)
                } else {
                    old & u64::from(u32::MAX) | u64::from(value) << 32
                };
                ring.set_area(area, new)
            }
            _ => false,
        }
    }

    /// The vector that a driver maps, or [`NO_VECTOR`] when there is no such vector.
    fn vector(&self, value: u16) -> u16 {
        if value < self.spec.vectors() {
            value
        } else {
            NO_VECTOR
        }
    }

    /// The device status register (virtio 1.2, 2.1): 0 resets; otherwise bits are only ever added.
    fn write_status(&self, regs: &mut Registers, value: u8) -> bool {
        if value == 0 {
            self.reset_registers(regs);
            return true;
        }
        if regs.resetting {
            return false;
        }
        let old = regs.status;
        let mut added = value & STATUS_BITS & !old & !NEEDS_RESET;
        let mut allowed = value & old == old && value & !STATUS_BITS == 0;
        if added & FEATURES_OK != 0 && !self.spec.acceptable(regs.driver_features) {
            debug!(
                "virtio {}: features {:#x} refused",
                self.spec.kind, regs.driver_features
            );
            added &= !FEATURES_OK;
        }
        if added & DRIVER_OK != 0 && (old | added) & FEATURES_OK == 0 {
            added &= !DRIVER_OK;
            allowed = false;
        }
        regs.status = old | added;
        if regs.status & FAILED != 0 {
            self.deactivate();
        } else if added & DRIVER_OK != 0 && old & NEEDS_RESET == 0 {
            self.activate(regs.driver_features);
        }
        allowed
    }

    fn activate(&self, features: u64) {
        for (index, ring) in self.rings.iter().enumerate() {
            let mut ring = lock(ring);
            if ring.enabled() {
                ring.activate(features);
                // Chains may already be there, without a notification to come.
                self.notify(index);
            }
        }
    }

    fn deactivate(&self) {
        for ring in &self.rings {
            lock(ring).active = false;
        }
    }

    /// Reset by the bus.
    pub(super) fn reset(&self) {
        self.reset_registers(&mut lock(&self.registers));
    }

    fn reset_registers(&self, regs: &mut Registers) {
        for ring in &self.rings {
            let mut ring = lock(ring);
            if ring.reset() {
                self.stale.fetch_add(1, Ordering::Relaxed);
            }
        }
        regs.device_feature_select = 0;
        regs.driver_feature_select = 0;
        regs.driver_features = 0;
        regs.config_vector = NO_VECTOR;
        regs.queue_select = 0;
        self.isr.store(0, Ordering::Relaxed);
        // A write that is still on its way to the disk must not overtake one of the next driver.
        // So the reset is complete, and the status zero, only when such requests are done; drivers
        // wait for that (virtio 1.2, 4.1.4.3.2). Until then `FEATURES_OK` cannot be had.
        regs.status = NEEDS_RESET;
        regs.resetting = true;
        self.finish_reset(regs);
        self.resets.fetch_add(1, Ordering::Relaxed);
    }

    fn finish_reset(&self, regs: &mut Registers) {
        if regs.resetting && self.stale.load(Ordering::Acquire) == 0 {
            regs.resetting = false;
            regs.status = 0;
        }
    }

    /// Sets the device configuration without a word to the driver.
    pub(super) fn set_config(&self, set: impl FnOnce(&mut [u8])) {
        set(&mut lock(&self.registers).config);
    }

    /// Lets `update` change the device configuration; tells the driver if it did, and returns that.
    pub(super) fn update_config(&self, update: impl FnOnce(&mut [u8]) -> bool) -> bool {
        let mut regs = lock(&self.registers);
        let changed = update(&mut regs.config);
        if changed {
            regs.generation = regs.generation.wrapping_add(1);
            self.config_interrupt(&regs);
        }
        changed
    }

    /// Signals a change of configuration or status; not before the driver is ready.
    fn config_interrupt(&self, regs: &Registers) {
        if regs.status & DRIVER_OK != 0 {
            self.interrupt(ISR_CONFIG, regs.config_vector);
        }
    }

    fn interrupt(&self, isr: u8, vector: u16) {
        self.isr.fetch_or(isr, Ordering::AcqRel);
        if vector != NO_VECTOR
            && let Some(resources) = self.resources.get()
        {
            resources.interrupts.raise(vector);
        }
    }
}

/// The 64-bit registers of a queue.
const AREAS: [(u64, RingArea); 3] = [
    (common::QUEUE_DESC, RingArea::Desc),
    (common::QUEUE_DRIVER, RingArea::Driver),
    (common::QUEUE_DEVICE, RingArea::Device),
];

/// Copies what of `source` lies at `offset`; the rest of `data` stays.
fn copy_from(source: &[u8], offset: u64, data: &mut [u8]) {
    let Some(source) = source.get(offset as usize..) else {
        return;
    };
    let len = source.len().min(data.len());
    data[..len].copy_from_slice(&source[..len]);
}

#[cfg(test)]
mod tests;
