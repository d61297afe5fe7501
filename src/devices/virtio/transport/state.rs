//! Saved state of a virtio transport, and its validated way back.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use super::{DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET, STATUS_BITS, VirtioPci, lock};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::spec::{ISR_CONFIG, ISR_QUEUE, NO_VECTOR};

/// Version of [`VirtioState`].
pub const VIRTIO_STATE_VERSION: u32 = 1;

/// A virtio device as the driver sees it, at a moment when no request is with the host. Plain data:
/// nothing in it is trusted when it is restored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct VirtioState {
    /// [`VIRTIO_STATE_VERSION`].
    pub version: u32,
    /// Device status.
    pub status: u8,
    /// Feature word that the driver looks at.
    pub device_feature_select: u32,
    /// Feature word that the driver writes.
    pub driver_feature_select: u32,
    /// Features that the driver wrote; agreed once the status has `FEATURES_OK`.
    pub driver_features: u64,
    /// Vector of configuration changes, or 0xFFFF.
    pub config_vector: u16,
    /// Selected queue; may be one that does not exist.
    pub queue_select: u16,
    /// Configuration generation.
    pub generation: u8,
    /// ISR status.
    pub isr: u8,
    /// The queues, in order.
    pub queues: Vec<VirtioQueueState>,
}

/// A queue of a [`VirtioState`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct VirtioQueueState {
    /// Vector of the queue, or 0xFFFF.
    pub vector: u16,
    /// Ring entries: a power of two, up to the queue's maximum.
    pub size: u16,
    /// The driver enabled the queue.
    pub enabled: bool,
    /// I/O virtual address of the descriptor table, a multiple of 16.
    pub desc: u64,
    /// I/O virtual address of the available ring, a multiple of 2.
    pub driver: u64,
    /// I/O virtual address of the used ring, a multiple of 4.
    pub device: u64,
    /// Chains taken so far, modulo 2^16.
    pub next_avail: u16,
    /// Chains returned so far, modulo 2^16.
    pub next_used: u16,
}

/// Why a virtio device was not saved or restored. It is unchanged then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VirtioStateError {
    /// A request is with the host: stop the workers first.
    #[error("queue {queue} has a request under way")]
    Busy {
        /// The queue.
        queue: usize,
    },
    /// The state is of another version.
    #[error("state version {version}, not {VIRTIO_STATE_VERSION}")]
    Version {
        /// Version of the state.
        version: u32,
    },
    /// The device has another number of queues.
    #[error("state of {found} queues for a device of {expected}")]
    Queues {
        /// Queues in the state.
        found: usize,
        /// Queues of the device.
        expected: usize,
    },
    /// No driver can bring a device to this status.
    #[error("impossible device status {status:#04x}")]
    Status {
        /// Device status of the state.
        status: u8,
    },
    /// The agreed features are not offered by this device, or lack one that it demands.
    #[error("features {features:#x} do not suit the device")]
    Features {
        /// Features of the state.
        features: u64,
    },
    /// The device has no such vector.
    #[error("vector {vector} does not exist")]
    Vector {
        /// The vector.
        vector: u16,
    },
    /// The ISR status has unknown bits.
    #[error("impossible ISR status {isr:#04x}")]
    Isr {
        /// ISR status of the state.
        isr: u8,
    },
    /// No image is that large.
    #[error("impossible capacity of {sectors} sectors")]
    Capacity {
        /// Capacity of the state.
        sectors: u64,
    },
    /// A queue's size or addresses are not valid, or its indices do not suit its status.
    #[error("queue {queue} is not valid")]
    Queue {
        /// The queue.
        queue: usize,
    },
}

impl VirtioPci {
    /// The state, when no worker runs.
    pub(in crate::devices::virtio) fn save(&self) -> Result<VirtioState, VirtioStateError> {
        let mut regs = lock(&self.registers);
        let mut queues = Vec::with_capacity(self.rings.len());
        for (queue, ring) in self.rings.iter().enumerate() {
            let ring = lock(ring);
            if ring.busy {
                return Err(VirtioStateError::Busy { queue });
            }
            queues.push(ring.save());
        }
        self.finish_reset(&mut regs);
        Ok(VirtioState {
            version: VIRTIO_STATE_VERSION,
            status: regs.status,
            device_feature_select: regs.device_feature_select,
            driver_feature_select: regs.driver_feature_select,
            driver_features: regs.driver_features,
            config_vector: regs.config_vector,
            queue_select: regs.queue_select,
            generation: regs.generation,
            isr: self.isr.load(Ordering::Acquire),
            queues,
        })
    }

    /// Takes over a saved state, and looks at each active queue for chains whose notification was
    /// lost. Call it after [`VirtioPci::connect`], when no worker runs.
    pub(in crate::devices::virtio) fn restore(
        &self,
        state: &VirtioState,
    ) -> Result<(), VirtioStateError> {
        let rings = self.validate(state)?;
        let mut regs = lock(&self.registers);
        for (queue, ring) in self.rings.iter().enumerate() {
            if lock(ring).busy {
                return Err(VirtioStateError::Busy { queue });
            }
        }
        regs.status = state.status;
        regs.resetting = false;
        regs.device_feature_select = state.device_feature_select;
        regs.driver_feature_select = state.driver_feature_select;
        regs.driver_features = state.driver_features;
        regs.config_vector = state.config_vector;
        regs.queue_select = state.queue_select;
        regs.generation = state.generation;
        self.isr.store(state.isr, Ordering::Release);
        for (old, mut new) in self.rings.iter().zip(rings) {
            let mut old = lock(old);
            new.epoch = old.epoch + 1;
            *old = new;
        }
        if state.is_serving() {
            self.activate(state.driver_features);
        }
        Ok(())
    }

    fn validate(&self, state: &VirtioState) -> Result<Vec<Ring>, VirtioStateError> {
        let &VirtioState {
            version,
            status,
            driver_features: features,
            isr,
            ..
        } = state;
        if version != VIRTIO_STATE_VERSION {
            return Err(VirtioStateError::Version { version });
        }
        if state.queues.len() != self.rings.len() {
            return Err(VirtioStateError::Queues {
                found: state.queues.len(),
                expected: self.rings.len(),
            });
        }
        let agreed = status & FEATURES_OK != 0;
        if status & !STATUS_BITS != 0 || status & (DRIVER_OK | FEATURES_OK) == DRIVER_OK {
            return Err(VirtioStateError::Status { status });
        }
        if agreed && !self.spec.acceptable(features) {
            return Err(VirtioStateError::Features { features });
        }
        if isr & !(ISR_QUEUE | ISR_CONFIG) != 0 {
            return Err(VirtioStateError::Isr { isr });
        }
        let vectors = state.queues.iter().map(|queue| queue.vector);
        for vector in vectors.chain([state.config_vector]) {
            if vector != NO_VECTOR && vector >= self.spec.vectors() {
                return Err(VirtioStateError::Vector { vector });
            }
        }
        let rings = state.queues.iter().enumerate().map(|(index, queue)| {
            let moved = queue.next_avail != 0 || queue.next_used != 0;
            let enabled = queue.enabled && agreed;
            // A device that works answers each request before it takes the next.
            let outstanding = state.is_serving() && queue.next_avail != queue.next_used;
            if (queue.enabled || moved) && !enabled || outstanding {
                return Err(VirtioStateError::Queue { queue: index });
            }
            Ring::restore(self.spec.queue_size, queue)
                .map_err(|_| VirtioStateError::Queue { queue: index })
        });
        rings.collect()
    }
}

impl VirtioState {
    /// True if the device takes requests.
    fn is_serving(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK
    }
}
