//! The way of a device to its requests: short sessions on a ring, under the ring's lock and the DMA
//! guard, with nothing held in between.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use log::warn;

use super::{NEEDS_RESET, VirtioPci, lock, worth_logging};
use crate::devices::virtio::ring::{Chain, Fault, Popped, Ring, RingError};
use crate::devices::virtio::spec::ISR_QUEUE;
use crate::dma::{DmaView, MAX_DMA_LEN};

/// Why a request's memory was not reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::devices::virtio) enum TransferError {
    /// The range is not part of the request's buffers, or these are not in guest memory.
    Fault,
    /// The device was reset or broke down: there is nobody to answer.
    Gone,
}

/// What [`VirtioPci::pop`] found.
#[derive(Debug)]
pub(in crate::devices::virtio) enum Next<'a> {
    /// A request to serve.
    Request(Request<'a>),
    /// Nothing to do until the queue is notified.
    Idle,
    /// Nothing now, but look again soon.
    Again,
}

impl VirtioPci {
    /// Runs `f` on an active ring under the DMA guard. `f` returns its result and whether the
    /// driver wants an interrupt.
    fn session<R>(
        &self,
        queue: usize,
        epoch: Option<u64>,
        f: impl FnOnce(&mut Ring, &DmaView<'_>) -> Result<(R, bool), RingError>,
    ) -> Result<R, TransferError> {
        let (Some(ring), Some(resources)) = (self.rings.get(queue), self.resources.get()) else {
            return Err(TransferError::Gone);
        };
        let mut ring = lock(ring);
        if !ring.active || epoch.is_some_and(|epoch| epoch != ring.epoch) {
            return Err(TransferError::Gone);
        }
        // Without bus mastering a new request waits; one under way can never be answered.
        let answer = resources.dma.session(|view| f(&mut ring, view));
        let error = match answer {
            Ok(Ok((value, interrupt))) => {
                if interrupt {
                    self.interrupt(ISR_QUEUE, ring.vector);
                }
                return Ok(value);
            }
            Ok(Err(error)) => error,
            Err(_) if epoch.is_none() => return Err(TransferError::Gone),
            Err(_) => RingError::NoAnswer,
        };
        let epoch = ring.epoch;
        drop(ring);
        self.fail(queue, epoch, &error);
        Err(TransferError::Gone)
    }

    /// Stops the device until the driver resets it (virtio 1.2, 2.1.2).
    fn fail(&self, queue: usize, epoch: u64, error: &RingError) {
        let mut regs = lock(&self.registers);
        if lock(&self.rings[queue]).epoch != epoch || regs.status & NEEDS_RESET != 0 {
            return;
        }
        if worth_logging(self.broken.fetch_add(1, Ordering::Relaxed)) {
            warn!(
                "virtio {}: queue {queue}: {error}; the device needs a reset",
                self.spec.kind
            );
        }
        self.deactivate();
        regs.status |= NEEDS_RESET;
        self.config_interrupt(&regs);
    }

    /// Takes the next request of a queue. Only for the queue's worker, and one at a time.
    pub(in crate::devices::virtio) fn pop<'a>(
        &'a self,
        queue: usize,
        chain: &'a mut Chain,
    ) -> Next<'a> {
        let popped = self.session(queue, None, |ring, view| {
            let popped = ring.pop(view, chain)?;
            ring.busy = popped == Popped::Chain;
            Ok(((popped, ring.epoch, ring.features), false))
        });
        match popped {
            Ok((Popped::Chain, epoch, features)) => Next::Request(Request {
                pci: self,
                queue,
                epoch,
                features,
                chain,
            }),
            Ok((Popped::Again, ..)) => Next::Again,
            Ok((Popped::Empty, ..)) | Err(_) => Next::Idle,
        }
    }
}

/// A request that the driver made available and that is not answered yet. Dropping it without an
/// answer is right only when the device was reset meanwhile.
#[derive(Debug)]
pub(in crate::devices::virtio) struct Request<'a> {
    pci: &'a VirtioPci,
    queue: usize,
    epoch: u64,
    features: u64,
    chain: &'a Chain,
}

impl Request<'_> {
    /// True if the driver accepted feature bit `bit`.
    pub(in crate::devices::virtio) fn has_feature(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// Bytes for the device to read.
    pub(in crate::devices::virtio) fn readable_len(&self) -> u64 {
        self.chain.readable.len()
    }

    /// Bytes for the device to write.
    pub(in crate::devices::virtio) fn writable_len(&self) -> u64 {
        self.chain.writable.len()
    }

    /// Copies at most [`MAX_DMA_LEN`] bytes at `offset` of the readable ones.
    pub(in crate::devices::virtio) fn read(
        &self,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), TransferError> {
        debug_assert!(buf.len() <= MAX_DMA_LEN);
        self.transfer(|view| self.chain.readable.read(view, offset, buf))
    }

    /// Copies at most [`MAX_DMA_LEN`] bytes to `offset` of the writable ones.
    pub(in crate::devices::virtio) fn write(
        &self,
        offset: u64,
        buf: &[u8],
    ) -> Result<(), TransferError> {
        debug_assert!(buf.len() <= MAX_DMA_LEN);
        self.transfer(|view| self.chain.writable.write(view, offset, buf))
    }

    fn transfer(
        &self,
        copy: impl FnOnce(&DmaView<'_>) -> Result<(), Fault>,
    ) -> Result<(), TransferError> {
        let copied = self.pci.session(self.queue, Some(self.epoch), |_, view| {
            Ok((copy(view), false))
        })?;
        copied.map_err(|Fault| TransferError::Fault)
    }

    /// Answers: writes `answer` to `offset` of the writable bytes, returns the chain with `len`
    /// written bytes, and interrupts the driver if it wants that. Nothing happens if the device was
    /// reset meanwhile.
    pub(in crate::devices::virtio) fn complete(self, offset: u64, answer: &[u8], len: u32) {
        // An error has already been dealt with, and there is nobody else to tell.
        let _ = self
            .pci
            .session(self.queue, Some(self.epoch), |ring, view| {
                self.chain
                    .writable
                    .write(view, offset, answer)
                    .map_err(|Fault| RingError::NoAnswer)?;
                let interrupt = ring.push(view, self.chain.head, len)?;
                ring.busy = false;
                Ok(((), interrupt))
            });
    }

    /// Gives up: there is no way to answer.
    pub(in crate::devices::virtio) fn fail(self) {
        self.pci.fail(self.queue, self.epoch, &RingError::NoAnswer);
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        let mut ring = lock(&self.pci.rings[self.queue]);
        ring.busy = false;
        if std::mem::take(&mut ring.stale) {
            self.pci.stale.fetch_sub(1, Ordering::Release);
        }
    }
}
