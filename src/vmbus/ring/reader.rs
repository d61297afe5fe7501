//! The host as consumer: the guest-to-host ring.
#![forbid(unsafe_code)]

use std::sync::atomic::{Ordering, fence};

use super::{Fuse, RingError, RingMemory};
use crate::hv::vmbus::ring as wire;
use crate::mem::GuestRam;

/// Kind of a packet (docs/spec/vmbus.md#vmbus-7-2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PacketKind {
    /// The payload is in the ring.
    InBand,
    /// Ranges of an agreed page set precede the payload; they are skipped.
    TransferPages,
    /// A GPADL describes more data.
    Gpadl,
    /// Ranges of guest pages precede the payload; they are skipped.
    GpaDirect,
    /// Answer to a packet of the host that asked for one.
    Completion,
}

/// A packet of the guest, its payload already in the caller's buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Kind of the packet.
    pub kind: PacketKind,
    /// Transaction id: what the completion has to carry.
    pub transaction_id: u64,
    /// The guest waits for exactly one completion; without it none may be sent.
    pub completion_requested: bool,
    /// Bytes of payload in the packet, a multiple of 8: the true length plus padding. More than
    /// the caller's buffer holds if the packet was cut.
    pub payload_len: usize,
}

/// A [`RingReader`] as plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct RingReaderState {
    /// Read index: start of the next packet.
    pub next: u32,
    /// Read index as the guest sees it.
    pub published: u32,
    /// The guest's write index as last seen.
    pub write: u32,
    /// The ring has stopped.
    pub stopped: bool,
}

/// Reads packets from the guest-to-host ring.
///
/// The guest signals only for a packet that makes the ring non-empty as published. A reader that
/// stops with packets left gets no signal for new ones and must come back by itself.
#[derive(Debug)]
pub struct RingReader {
    fuse: Fuse,
    consumer: Consumer,
}

impl RingReader {
    /// Adopts the ring in `pfns` (4 KiB page numbers, control page first), starting at the read
    /// index that the guest has set up, and asks for signals. The guest must have initialised the
    /// control page: call this at OPEN_CHANNEL, not at GPADL creation.
    ///
    /// # Errors
    ///
    /// [`RingError::Pages`] if the pages do not make a ring, [`RingError::Index`] if an index is
    /// bad.
    pub fn open(ram: GuestRam, pfns: &[u64]) -> Result<Self, RingError> {
        let memory = RingMemory::new(ram, pfns)?;
        let next = memory.load_index(wire::READ_INDEX)?;
        let write = memory.load_index(wire::WRITE_INDEX)?;
        let mask = memory.control(wire::INTERRUPT_MASK)?;
        mask.store(0, Ordering::Release);
        let consumer = Consumer {
            memory,
            next,
            published: next,
            write,
        };
        Ok(Self {
            fuse: Fuse::default(),
            consumer,
        })
    }

    /// What a reader has to remember.
    pub fn save(&self) -> RingReaderState {
        RingReaderState {
            next: self.consumer.next,
            published: self.consumer.published,
            write: self.consumer.write,
            stopped: self.fuse.0,
        }
    }

    /// A reader that goes on where [`save`](Self::save) was called, on the same pages. The control
    /// page is not touched.
    ///
    /// # Errors
    ///
    /// [`RingError::Pages`] if the pages do not make a ring, [`RingError::Index`] if an index of
    /// `state` is bad.
    pub fn restore(ram: GuestRam, pfns: &[u64], state: RingReaderState) -> Result<Self, RingError> {
        let memory = RingMemory::new(ram, pfns)?;
        let next = memory.check_index(state.next)?;
        let published = memory.check_index(state.published)?;
        let write = memory.check_index(state.write)?;
        let consumer = Consumer {
            memory,
            next,
            published,
            write,
        };
        Ok(Self {
            fuse: Fuse(state.stopped),
            consumer,
        })
    }

    /// Takes the next packet: copies its payload to the start of `buf`, cut to what fits, or
    /// returns `None` if the ring is empty. The guest gets the space back at
    /// [`publish`](Self::publish).
    ///
    /// # Errors
    ///
    /// A [`RingError`] stops the ring.
    #[inline]
    pub fn read(&mut self, buf: &mut [u8]) -> Result<Option<Packet>, RingError> {
        self.fuse.guard(|| self.consumer.read(buf))
    }

    /// Gives the space of the packets read back to the guest. Returns true if the guest, waiting
    /// for that space, is to be signalled.
    ///
    /// # Errors
    ///
    /// A [`RingError`] stops the ring.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, RingError> {
        self.fuse.guard(|| self.consumer.publish())
    }

    /// Tells the guest not to signal: the reader is at work. Optional.
    ///
    /// # Errors
    ///
    /// A [`RingError`] stops the ring.
    pub fn mask(&mut self) -> Result<(), RingError> {
        self.fuse.guard(|| {
            let memory = &mut self.consumer.memory;
            memory.refresh()?;
            let mask = memory.control(wire::INTERRUPT_MASK)?;
            mask.store(1, Ordering::Release);
            Ok(())
        })
    }

    /// Asks for signals again. Returns true if packets arrived meanwhile: the guest may not have
    /// signalled for them, so the caller must read on before it sleeps.
    ///
    /// # Errors
    ///
    /// A [`RingError`] stops the ring.
    pub fn unmask(&mut self) -> Result<bool, RingError> {
        self.fuse.guard(|| {
            let consumer = &mut self.consumer;
            consumer.memory.refresh()?;
            let mask = consumer.memory.control(wire::INTERRUPT_MASK)?;
            mask.store(0, Ordering::Release);
            fence(Ordering::SeqCst);
            Ok(consumer.available()? != 0)
        })
    }
}

#[derive(Debug)]
struct Consumer {
    memory: RingMemory,
    /// Our read index: start of the next packet.
    next: u32,
    /// The read index that the guest sees.
    published: u32,
    /// The guest's write index as last loaded and checked.
    write: u32,
}

impl Consumer {
    /// Loads the guest's write index and returns the bytes between the indices.
    fn available(&mut self) -> Result<u32, RingError> {
        let write = mutant!(
            "ring-index-not-reread",
            self.write,
            self.memory.load_index(wire::WRITE_INDEX)?
        );
        let available = self.memory.distance(self.next, write);
        if available < self.memory.distance(self.next, self.write) {
            return Err(RingError::IndexWentBack {
                from: self.write,
                to: write,
            });
        }
        self.write = write;
        Ok(available)
    }

    #[inline]
    fn read(&mut self, buf: &mut [u8]) -> Result<Option<Packet>, RingError> {
        self.memory.refresh()?;
        let mut available = self.memory.distance(self.next, self.write);
        if available == 0 {
            available = self.available()?;
        }
        if available == 0 {
            return Ok(None);
        }
        if available < wire::DESCRIPTOR_LEN {
            return Err(RingError::Truncated {
                len: wire::DESCRIPTOR_LEN,
                available,
            });
        }
        // Loaded once, and only this copy is looked at.
        let memory = &self.memory;
        let piece = memory.piece(self.next, available)?;
        let words = [
            piece.load(0).ok_or_else(|| memory.no_memory(self.next))?,
            match piece.load(wire::ALIGN) {
                Some(second) => second,
                // It wraps or leaves consecutive memory.
                None => memory.word(memory.advance(self.next, wire::ALIGN))?,
            },
        ];
        let descriptor = wire::PacketDescriptor::from_words(words);
        let kind = check(&descriptor)?;
        let len = u32::from(descriptor.len8) * wire::ALIGN + wire::TRAILER_LEN;
        if len > available && !mutant!("ring-packet-too-long") {
            return Err(RingError::Truncated { len, available });
        }
        let offset = u32::from(descriptor.offset8) * wire::ALIGN;
        let payload_len = usize::from(descriptor.len8 - descriptor.offset8) * wire::ALIGN as usize;
        let copied = payload_len.min(buf.len());
        let to = &mut buf[..copied];
        if piece.read(offset, to).is_none() {
            memory.read(memory.advance(self.next, offset), to)?;
        }
        self.next = self.memory.advance(self.next, len);
        Ok(Some(Packet {
            kind,
            transaction_id: descriptor.transaction_id,
            completion_requested: descriptor.flags & wire::FLAG_COMPLETION_REQUESTED != 0,
            payload_len,
        }))
    }

    #[inline]
    fn publish(&mut self) -> Result<bool, RingError> {
        if self.published == self.next {
            return Ok(false);
        }
        self.memory.refresh()?;
        let read_index = self.memory.control(wire::READ_INDEX)?;
        // The guest stores its pending size, fences and looks at our index; we store our index and
        // then look at its pending size: one of the two sees the other. The only store that has to
        // be more than a plain one.
        read_index.store(self.next, Ordering::SeqCst);
        let before = std::mem::replace(&mut self.published, self.next);
        // Free space is a multiple of 8, so the guests that ask for one byte less than they need
        // are woken at the same time as those that do not.
        let pending = self.memory.control(wire::PENDING_SEND_SIZE)?;
        let pending = pending.load(Ordering::SeqCst);
        if pending == 0 {
            return Ok(false);
        }
        let free = self.memory.size - self.available()?;
        let freed = self.memory.distance(before, self.next);
        // Less than nothing if the guest has already refilled what was freed.
        Ok(free.saturating_sub(freed) <= pending
            && free > pending
            && !mutant!("ring-room-not-signalled"))
    }
}

/// Checks a private copy of a descriptor.
fn check(descriptor: &wire::PacketDescriptor) -> Result<PacketKind, RingError> {
    let wire::PacketDescriptor {
        packet_type,
        offset8,
        len8,
        flags,
        ..
    } = *descriptor;
    let error = RingError::Descriptor {
        packet_type,
        offset8,
        len8,
        flags,
    };
    let (kind, header8) = match packet_type {
        wire::TYPE_IN_BAND => (PacketKind::InBand, 2),
        wire::TYPE_TRANSFER_PAGES => (PacketKind::TransferPages, 3),
        wire::TYPE_GPADL => (PacketKind::Gpadl, 2),
        wire::TYPE_GPA_DIRECT => (PacketKind::GpaDirect, 3),
        wire::TYPE_COMPLETION => (PacketKind::Completion, 2),
        _ => return Err(error),
    };
    let flags_known = flags & !wire::FLAG_COMPLETION_REQUESTED == 0;
    if offset8 < header8 || len8 < offset8 || (!flags_known && !mutant!("ring-unknown-flags")) {
        return Err(error);
    }
    Ok(kind)
}
