//! The host as producer: the host-to-guest ring.
#![forbid(unsafe_code)]

use std::sync::atomic::{Ordering, fence};

use super::{Fuse, Piece, RingError, RingMemory};
use crate::hv::vmbus::ring as wire;
use crate::mem::GuestRam;

/// Room in the host-to-guest ring for one packet. Spent by [`RingWriter::send`] or
/// [`RingWriter::complete`], or given back with [`RingWriter::release`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the room stays taken until the reservation is spent or released"]
pub struct Reservation {
    /// Bytes in the ring, with descriptor and trailer.
    len: u32,
}

/// A [`RingWriter`] as plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct RingWriterState {
    /// Write index.
    pub write: u32,
    /// The guest's read index as last seen.
    pub read: u32,
    /// The guest was asked to signal when there is room.
    pub waiting: bool,
    /// The ring has stopped.
    pub stopped: bool,
}

/// Writes packets to the host-to-guest ring.
///
/// Room is reserved before it is used. A device reserves the room for a completion before it reads
/// the request, so that no completion is ever dropped for want of room.
#[derive(Debug)]
pub struct RingWriter {
    fuse: Fuse,
    producer: Producer,
}

impl RingWriter {
    /// Adopts the ring in `pfns` (4 KiB page numbers, control page first), starting at the write
    /// index that the guest has set up. The guest must have initialised the control page: call
    /// this at OPEN_CHANNEL, not at GPADL creation.
    ///
    /// # Errors
    ///
    /// [`RingError::Pages`] if the pages do not make a ring, [`RingError::Index`] if an index is
    /// bad.
    pub fn open(ram: GuestRam, pfns: &[u64]) -> Result<Self, RingError> {
        let memory = RingMemory::new(ram, pfns)?;
        let write = memory.load_index(wire::WRITE_INDEX)?;
        let read = memory.load_index(wire::READ_INDEX)?;
        let pending = memory.control(wire::PENDING_SEND_SIZE)?;
        pending.store(0, Ordering::Relaxed);
        memory.control(wire::FEATURE_BITS)?.store(
            mutant!("ring-no-features", 0, wire::FEATURE_PENDING_SEND_SIZE),
            Ordering::Release,
        );
        let producer = Producer {
            memory,
            write,
            read,
            reserved: 0,
            waiting: false,
        };
        Ok(Self {
            fuse: Fuse::default(),
            producer,
        })
    }

    /// What a writer has to remember. Reservations are not part of it: the device spends or drops
    /// them before it is saved.
    pub fn save(&self) -> RingWriterState {
        RingWriterState {
            write: self.producer.write,
            read: self.producer.read,
            waiting: self.producer.waiting,
            stopped: self.fuse.0,
        }
    }

    /// A writer that goes on where [`save`](Self::save) was called, on the same pages. The control
    /// page is not touched.
    ///
    /// # Errors
    ///
    /// [`RingError::Pages`] if the pages do not make a ring, [`RingError::Index`] if an index of
    /// `state` is bad.
    pub fn restore(ram: GuestRam, pfns: &[u64], state: RingWriterState) -> Result<Self, RingError> {
        let memory = RingMemory::new(ram, pfns)?;
        let write = memory.check_index(state.write)?;
        let read = memory.check_index(state.read)?;
        let producer = Producer {
            memory,
            write,
            read,
            reserved: 0,
            waiting: state.waiting,
        };
        Ok(Self {
            fuse: Fuse(state.stopped),
            producer,
        })
    }

    /// Longest payload that one packet can have, in bytes.
    pub fn max_payload(&self) -> usize {
        self.producer.max_payload()
    }

    /// Reserves room for one packet with up to `payload_len` bytes of payload, or returns `None`
    /// if there is none. The guest has then been asked to signal the channel when there is; the
    /// caller tries again when it does, or when it has spent or released other reservations.
    ///
    /// # Errors
    ///
    /// [`RingError::TooLong`] if no packet can be that long; any other error stops the ring.
    #[inline]
    pub fn reserve(&mut self, payload_len: usize) -> Result<Option<Reservation>, RingError> {
        self.fuse.guard(|| self.producer.reserve(payload_len))
    }

    /// Gives unused room back.
    pub fn release(&mut self, reservation: Reservation) {
        self.producer.release(reservation);
    }

    /// Sends a packet of the host's own, to which no answer is expected (transaction id 0).
    /// Returns true if the guest is to be signalled.
    ///
    /// # Errors
    ///
    /// [`RingError::TooLong`] if the payload is longer than its reservation, which is given back;
    /// any other error stops the ring.
    #[inline]
    pub fn send(&mut self, room: Reservation, payload: &[u8]) -> Result<bool, RingError> {
        let producer = &mut self.producer;
        self.fuse
            .guard(|| producer.write(room, wire::TYPE_IN_BAND, 0, payload))
    }

    /// Answers the request `transaction_id`, which asked for a completion and had none yet.
    /// Returns true if the guest is to be signalled.
    ///
    /// # Errors
    ///
    /// As for [`RingWriter::send`].
    #[inline]
    pub fn complete(
        &mut self,
        room: Reservation,
        transaction_id: u64,
        payload: &[u8],
    ) -> Result<bool, RingError> {
        let producer = &mut self.producer;
        self.fuse
            .guard(|| producer.write(room, wire::TYPE_COMPLETION, transaction_id, payload))
    }

    /// True if the guest has packets left to read, as far as it lets us see: after an open or a
    /// restore the caller signals once more then, as an earlier signal may have been lost.
    ///
    /// # Errors
    ///
    /// A [`RingError`] stops the ring.
    pub fn is_unread(&mut self) -> Result<bool, RingError> {
        let producer = &mut self.producer;
        self.fuse.guard(|| {
            producer.memory.refresh()?;
            Ok(producer.load_read()? != producer.write)
        })
    }
}

#[derive(Debug)]
struct Producer {
    memory: RingMemory,
    /// Our write index.
    write: u32,
    /// The guest's read index as last loaded and checked.
    read: u32,
    /// Bytes that reservations hold.
    reserved: u32,
    /// The pending send size is not 0.
    waiting: bool,
}

/// Bytes in the ring of a packet with `payload_len` bytes of payload.
fn ring_len(payload_len: usize) -> u32 {
    let payload = payload_len.next_multiple_of(wire::ALIGN as usize) as u32;
    wire::DESCRIPTOR_LEN + payload + wire::TRAILER_LEN
}

impl Producer {
    #[inline]
    fn max_payload(&self) -> usize {
        // A ring is never filled completely: equal indices mean empty.
        let ring = self.memory.size - wire::ALIGN - ring_len(0);
        (wire::MAX_HOST_PACKET - wire::DESCRIPTOR_LEN as usize).min(ring as usize)
    }

    /// Loads the guest's read index. It only moves towards our write index, so room that was there
    /// once stays there until we use it.
    #[inline]
    fn load_read(&mut self) -> Result<u32, RingError> {
        let read = self.memory.load_index(wire::READ_INDEX)?;
        let used = self.memory.distance(read, self.write);
        if used > self.memory.distance(self.read, self.write) && !mutant!("ring-index-may-go-back")
        {
            return Err(RingError::IndexWentBack {
                from: self.read,
                to: read,
            });
        }
        self.read = read;
        Ok(read)
    }

    /// True if `len` more bytes fit beside the packets and reservations there are.
    #[inline]
    fn fits(&self, len: u32) -> bool {
        let used = self.memory.distance(self.read, self.write);
        let taken = u64::from(used) + u64::from(self.reserved) + u64::from(len);
        taken <= u64::from(self.memory.size - wire::ALIGN)
    }

    #[inline]
    fn reserve(&mut self, payload_len: usize) -> Result<Option<Reservation>, RingError> {
        let limit = self.max_payload();
        if payload_len > limit {
            return Err(RingError::TooLong {
                len: payload_len,
                limit,
            });
        }
        let len = ring_len(payload_len);
        // Most often there is room by what is known already, and nobody waits.
        if (!self.fits(len) || self.waiting) && !self.look_for_room(len)? {
            return Ok(None);
        }
        self.reserved += len;
        Ok(Some(Reservation { len }))
    }

    /// Looks whether the guest has made room for `len` bytes, and asks it to tell if it has not.
    #[inline(never)]
    fn look_for_room(&mut self, len: u32) -> Result<bool, RingError> {
        self.memory.refresh()?;
        if !self.fits(len) {
            self.load_read()?;
        }
        if !self.fits(len) {
            let pending = (self.reserved + len).min(self.memory.size - wire::ALIGN);
            let word = self.memory.control(wire::PENDING_SEND_SIZE)?;
            word.store(pending, Ordering::Release);
            self.waiting = true;
            // The guest stores its index, fences and looks at the pending size; so look once more.
            fence(Ordering::SeqCst);
            self.load_read()?;
        }
        if !self.fits(len) {
            return Ok(false);
        }
        if std::mem::take(&mut self.waiting) {
            let word = self.memory.control(wire::PENDING_SEND_SIZE)?;
            word.store(0, Ordering::Release);
        }
        Ok(true)
    }

    #[inline]
    fn release(&mut self, reservation: Reservation) {
        self.reserved = self.reserved.saturating_sub(reservation.len);
    }

    #[inline]
    fn write(
        &mut self,
        room: Reservation,
        packet_type: u16,
        transaction_id: u64,
        payload: &[u8],
    ) -> Result<bool, RingError> {
        let limit = (room.len - ring_len(0)) as usize;
        self.release(room);
        if payload.len() > limit {
            return Err(RingError::TooLong {
                len: payload.len(),
                limit,
            });
        }
        let len = ring_len(payload.len());
        debug_assert!(self.fits(len), "a reservation of another ring");
        let descriptor = wire::PacketDescriptor {
            packet_type,
            offset8: (wire::DESCRIPTOR_LEN / wire::ALIGN) as u16,
            len8: ((len - wire::TRAILER_LEN) / wire::ALIGN) as u16,
            flags: 0,
            transaction_id,
        };
        let words = descriptor.to_words();
        let start = self.write;
        self.memory.refresh()?;
        let memory = &self.memory;
        let whole = memory.piece(start, len)?;
        // One is cut where the ring wraps or its pages do not adjoin.
        if whole.len() < len || put(&whole, words, payload, trailer(start)).is_none() {
            put_in_parts(memory, start, words, payload)?;
        }
        self.write = memory.advance(start, len);
        // The guest unmasks, fences and looks at our index; we store our index and then look at its
        // mask: one of the two sees the other. The only store that has to be more than a plain one:
        // it publishes the packet too.
        let write_index = memory.control(wire::WRITE_INDEX)?;
        write_index.store(self.write, Ordering::SeqCst);
        let mask = memory.control(wire::INTERRUPT_MASK)?;
        if mask.load(Ordering::SeqCst) != 0 && !mutant!("ring-mask-ignored") {
            return Ok(false);
        }
        Ok(self.load_read()? == start || mutant!("ring-signal-always"))
    }
}

/// Writes a packet to memory that is as long as the packet. Word by word around the payload: the
/// guest sees none of it before the index.
#[inline(always)]
fn put(piece: &Piece<'_>, words: [u64; 2], payload: &[u8], trailer: u64) -> Option<()> {
    piece.store(0, words[0])?;
    piece.store(wire::ALIGN, words[1])?;
    let trailer_at = piece.len().checked_sub(wire::TRAILER_LEN)?;
    if !payload.len().is_multiple_of(wire::ALIGN as usize) {
        // The padding.
        piece.store(trailer_at.checked_sub(wire::ALIGN)?, 0)?;
    }
    piece.write(wire::DESCRIPTOR_LEN, payload)?;
    piece.store(trailer_at, trailer)
}

/// Writes a packet at `start` that wraps or leaves consecutive memory.
#[inline(never)]
fn put_in_parts(
    memory: &RingMemory,
    start: u32,
    words: [u64; 2],
    payload: &[u8],
) -> Result<(), RingError> {
    let mut head = [0; wire::DESCRIPTOR_LEN as usize];
    let (to, _) = head.as_chunks_mut::<8>();
    for (to, word) in to.iter_mut().zip(words) {
        *to = word.to_le_bytes();
    }
    memory.write(start, &head)?;
    let payload_at = memory.advance(start, wire::DESCRIPTOR_LEN);
    memory.write(payload_at, payload)?;
    let padding = payload.len().next_multiple_of(wire::ALIGN as usize) - payload.len();
    let mut tail = [0; (wire::ALIGN + wire::TRAILER_LEN) as usize];
    let tail = &mut tail[..padding + wire::TRAILER_LEN as usize];
    tail[padding..].copy_from_slice(&trailer(start).to_le_bytes());
    memory.write(memory.advance(payload_at, payload.len() as u32), tail)
}

/// The word behind a packet that started at index `start`.
#[inline]
fn trailer(start: u32) -> u64 {
    u64::from(mutant!("ring-trailer", start ^ 8, start)) << 32
}
