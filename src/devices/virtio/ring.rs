//! One split virtqueue, seen from the device: configuration, the way of a chain out of the
//! available ring, and the way back into the used ring.
//!
//! The ring arithmetic is that of the `virtio-queue` crate. Added here is what that crate leaves to
//! its user: every malformed chain is told from a well-formed one, indices are checked before they
//! are used, and `VRING_AVAIL_F_NO_INTERRUPT` is honoured.
#![forbid(unsafe_code)]

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::spec::NO_VECTOR;
use super::transport::VirtioQueueState;
use crate::dma::DmaView;

/// Why a ring cannot go on. The device needs a reset then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RingError {
    /// A part of the ring lies outside guest memory.
    #[error("the ring is not in guest memory")]
    Unreachable,
    /// The ring could not be read or written, or its available index jumped.
    #[error("ring access failed: {0}")]
    Ring(virtio_queue::Error),
    /// The available ring names a descriptor that does not exist.
    #[error("available descriptor {head} of {size}")]
    Head { head: u16, size: u16 },
    /// A chain leads to no descriptor, loops, or is longer than 4 GiB.
    #[error("the descriptor chain has no end")]
    Endless,
    /// A chain has more descriptors than the ring.
    #[error("the descriptor chain has more than {limit} descriptors")]
    TooLong { limit: u16 },
    /// A buffer for the device to read follows one for it to write.
    #[error("readable buffer behind a writable one")]
    Order,
    /// A request has no writable byte for its status, or that byte is not in guest memory.
    #[error("no way to answer the request")]
    NoAnswer,
}

impl From<virtio_queue::Error> for RingError {
    fn from(error: virtio_queue::Error) -> Self {
        Self::Ring(error)
    }
}

/// A guest buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    iova: u64,
    len: u32,
}

/// A piece of guest memory of a chain was not reachable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault;

/// One direction of a chain's buffers, as one run of bytes.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    segments: Vec<Segment>,
    len: u64,
}

impl Buffers {
    /// Total bytes, at most 4 GiB.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    fn clear(&mut self) {
        self.segments.clear();
        self.len = 0;
    }

    fn push(&mut self, iova: u64, len: u32) {
        if len != 0 {
            self.segments.push(Segment { iova, len });
            self.len += u64::from(len);
        }
    }

    /// Calls `copy(address, range of the buffer)` for each piece of `offset..offset + len`.
    fn pieces(
        &self,
        offset: u64,
        len: usize,
        mut copy: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let mut skip = offset;
        let mut done = 0;
        for segment in &self.segments {
            if done == len {
                break;
            }
            let size = u64::from(segment.len);
            if skip >= size {
                skip -= size;
                continue;
            }
            let count = ((size - skip) as usize).min(len - done);
            let start = segment.iova.checked_add(skip).ok_or(Fault)?;
            copy(GuestAddress(start), done..done + count)?;
            done += count;
            skip = 0;
        }
        if done == len { Ok(()) } else { Err(Fault) }
    }

    /// Copies `buf.len()` bytes at `offset` of the run out of guest memory.
    pub(crate) fn read(
        &self,
        view: &DmaView<'_>,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), Fault> {
        self.pieces(offset, buf.len(), |addr, range| {
            view.read_slice(&mut buf[range], addr).map_err(|_| Fault)
        })
    }

    /// Copies `buf` to `offset` of the run in guest memory. Pieces before one that faults stay
    /// written.
    pub(crate) fn write(&self, view: &DmaView<'_>, offset: u64, buf: &[u8]) -> Result<(), Fault> {
        self.pieces(offset, buf.len(), |addr, range| {
            view.write_slice(&buf[range], addr).map_err(|_| Fault)
        })
    }
}

/// A descriptor chain, copied out of the ring once. Reused from request to request, so that its
/// memory is allocated once; it never holds more segments than the ring has entries.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    pub(crate) head: u16,
    pub(crate) readable: Buffers,
    pub(crate) writable: Buffers,
}

impl Chain {
    /// Copies the descriptors, at most `limit`.
    fn fill<'a>(
        &mut self,
        descriptors: DescriptorChain<&'a DmaView<'a>>,
        limit: u16,
    ) -> Result<(), RingError> {
        self.head = descriptors.head_index();
        self.readable.clear();
        self.writable.clear();
        let mut writing = false;
        // `DescriptorChain` ends in the same way at the last descriptor and at a mistake: in the
        // latter case the descriptor before still had a successor.
        let mut open = true;
        for (count, descriptor) in descriptors.enumerate() {
            if count >= usize::from(limit) {
                return Err(RingError::TooLong { limit });
            }
            let (iova, len) = (descriptor.addr().0, descriptor.len());
            if descriptor.is_write_only() {
                writing = true;
                self.writable.push(iova, len);
            } else if writing {
                return Err(RingError::Order);
            } else {
                self.readable.push(iova, len);
            }
            open = descriptor.has_next();
        }
        if open {
            return Err(RingError::Endless);
        }
        Ok(())
    }
}

/// What [`Ring::pop`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Popped {
    /// A chain.
    Chain,
    /// Nothing; the driver will notify.
    Empty,
    /// Nothing, but the driver is at it: look again later.
    Again,
}

/// Where the queue's rings lie; a 64-bit register of the common configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RingArea {
    /// Descriptor table.
    Desc,
    /// Available ring.
    Driver,
    /// Used ring.
    Device,
}

/// A queue and its state in the transport.
#[derive(Debug)]
pub(crate) struct Ring {
    queue: Queue,
    /// MSI-X vector or [`NO_VECTOR`].
    pub(crate) vector: u16,
    /// Features that the driver accepted; valid while active.
    pub(crate) features: u64,
    /// Chains may be taken and returned.
    pub(crate) active: bool,
    /// Changes at reset: a request of another epoch must not touch guest memory.
    pub(crate) epoch: u64,
    /// The worker has a request that is not finished.
    pub(crate) busy: bool,
    /// The worker's request is older than the last reset.
    pub(crate) stale: bool,
    /// The ring was found to lie in guest memory since it became active.
    checked: bool,
    /// The driver was told not to notify since the ring was last found empty.
    suppressed: bool,
}

impl Ring {
    /// A disabled queue of at most `max_size` entries (a power of two).
    pub(crate) fn new(max_size: u16) -> Result<Self, virtio_queue::Error> {
        Ok(Self::from_queue(Queue::new(max_size)?, NO_VECTOR))
    }

    fn from_queue(queue: Queue, vector: u16) -> Self {
        Self {
            queue,
            vector,
            features: 0,
            active: false,
            epoch: 0,
            busy: false,
            stale: false,
            checked: false,
            suppressed: false,
        }
    }

    /// The driver's view of the queue.
    pub(crate) fn save(&self) -> VirtioQueueState {
        VirtioQueueState {
            vector: self.vector,
            size: self.queue.size(),
            enabled: self.queue.ready(),
            desc: self.queue.desc_table(),
            driver: self.queue.avail_ring(),
            device: self.queue.used_ring(),
            next_avail: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }

    /// A queue that is not active yet.
    pub(crate) fn restore(
        max_size: u16,
        state: &VirtioQueueState,
    ) -> Result<Self, virtio_queue::Error> {
        let queue = Queue::try_from(QueueState {
            max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: false,
            size: state.size,
            ready: state.enabled,
            desc_table: state.desc,
            avail_ring: state.driver,
            used_ring: state.device,
        })?;
        Ok(Self::from_queue(queue, state.vector))
    }

    /// Back to power-on. Returns true if that left a request of the worker without an answer to
    /// come, and it had not been left so before.
    pub(crate) fn reset(&mut self) -> bool {
        self.queue.reset();
        self.vector = NO_VECTOR;
        self.active = false;
        self.epoch += 1;
        let newly_stale = self.busy && !self.stale;
        self.stale |= self.busy;
        newly_stale
    }

    /// Starts service with the accepted features.
    pub(crate) fn activate(&mut self, features: u64) {
        self.queue
            .set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        self.features = features;
        self.active = true;
        self.checked = false;
        self.suppressed = false;
    }

    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
    }

    pub(crate) fn enabled(&self) -> bool {
        self.queue.ready()
    }

    pub(crate) fn enable(&mut self) {
        self.queue.set_ready(true);
    }

    /// False, and no change, if `size` is not a power of two up to the maximum.
    pub(crate) fn set_size(&mut self, size: u16) -> bool {
        self.queue.try_set_size(size).is_ok()
    }

    pub(crate) fn area(&self, area: RingArea) -> u64 {
        match area {
            RingArea::Desc => self.queue.desc_table(),
            RingArea::Driver => self.queue.avail_ring(),
            RingArea::Device => self.queue.used_ring(),
        }
    }

    /// False, and no change, if the address is not aligned as the area must be.
    pub(crate) fn set_area(&mut self, area: RingArea, address: u64) -> bool {
        let address = GuestAddress(address);
        match area {
            RingArea::Desc => self.queue.try_set_desc_table_address(address),
            RingArea::Driver => self.queue.try_set_avail_ring_address(address),
            RingArea::Device => self.queue.try_set_used_ring_address(address),
        }
        .is_ok()
    }

    /// Checks that all three areas are in guest memory (split ring layout, virtio 1.2, 2.7).
    fn check(&self, view: &DmaView<'_>) -> Result<(), RingError> {
        let size = usize::from(self.queue.size());
        let areas = [
            (RingArea::Desc, 16 * size, Permissions::Read),
            (RingArea::Driver, 6 + 2 * size, Permissions::Read),
            (RingArea::Device, 6 + 8 * size, Permissions::Write),
        ];
        let reachable = |(area, len, access)| {
            let address = self.area(area);
            address != 0 && view.check_range(GuestAddress(address), len, access)
        };
        if areas.into_iter().all(reachable) {
            Ok(())
        } else {
            Err(RingError::Unreachable)
        }
    }

    /// Takes the next chain out of the available ring.
    pub(crate) fn pop(
        &mut self,
        view: &DmaView<'_>,
        chain: &mut Chain,
    ) -> Result<Popped, RingError> {
        if !self.checked {
            self.check(view)?;
            self.checked = true;
        }
        // Twice: a chain may arrive between the look and the request to be notified. Not more
        // often, so that a driver that plays with the index keeps nobody busy.
        for _ in 0..2 {
            let available = self.queue.avail_idx(view, Ordering::Acquire)?.0;
            if available == self.queue.next_avail() {
                self.suppressed = false;
                if !self.queue.enable_notification(view)? {
                    return Ok(Popped::Empty);
                }
                continue;
            }
            if !self.suppressed {
                self.queue.disable_notification(view)?;
                self.suppressed = true;
            }
            let descriptors = self.queue.iter(view)?.next().ok_or(RingError::Endless)?;
            let (head, size) = (descriptors.head_index(), self.queue.size());
            if head >= size {
                return Err(RingError::Head { head, size });
            }
            chain.fill(descriptors, self.queue.max_size())?;
            return Ok(Popped::Chain);
        }
        Ok(Popped::Again)
    }

    /// Puts a chain into the used ring. Returns true if the driver wants an interrupt.
    pub(crate) fn push(
        &mut self,
        view: &DmaView<'_>,
        head: u16,
        len: u32,
    ) -> Result<bool, RingError> {
        self.queue.add_used(view, head, len)?;
        if self.queue.event_idx_enabled() {
            return Ok(self.queue.needs_notification(view)?);
        }
        // The used index must be visible before the flag is read: the driver sets the flag, then
        // looks at the index.
        fence(Ordering::SeqCst);
        let flags: u16 = view
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}
