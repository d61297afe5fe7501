//! The host as producer: the host-to-guest ring.
#![forbid(unsafe_code)]

use std::sync::atomic::{Ordering, fence};

use super::{Fuse, RingError, RingMemory};
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

/// Longest packet that is put together before it is copied to the ring, in bytes: one copy of so
/// many bytes costs less than three.
const STAGED: usize = 128;

/// Bytes in the ring of a packet with `payload_len` bytes of payload.
fn ring_len(payload_len: usize) -> u32 {
    let payload = payload_len.next_multiple_of(wire::ALIGN as usize) as u32;
    wire::DESCRIPTOR_LEN + payload + wire::TRAILER_LEN
}

impl Producer {
    fn max_payload(&self) -> usize {
        // A ring is never filled completely: equal indices mean empty.
        let ring = self.memory.size - wire::ALIGN - ring_len(0);
        (wire::MAX_HOST_PACKET - wire::DESCRIPTOR_LEN as usize).min(ring as usize)
    }

    /// Loads the guest's read index. It only moves towards our write index, so room that was there
    /// once stays there until we use it.
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
    fn fits(&self, len: u32) -> bool {
        let used = self.memory.distance(self.read, self.write);
        let taken = u64::from(used) + u64::from(self.reserved) + u64::from(len);
        taken <= u64::from(self.memory.size - wire::ALIGN)
    }

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

    fn release(&mut self, reservation: Reservation) {
        self.reserved = self.reserved.saturating_sub(reservation.len);
    }

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
        let mut head = [0; wire::DESCRIPTOR_LEN as usize];
        let (words, _) = head.as_chunks_mut::<8>();
        for (to, word) in words.iter_mut().zip(descriptor.to_words()) {
            *to = word.to_le_bytes();
        }
        let start = self.write;
        self.memory.refresh()?;
        let memory = &self.memory;
        let mut packet = [0; STAGED];
        if len as usize <= STAGED {
            let (descriptor, behind) = packet.split_at_mut(head.len());
            descriptor.copy_from_slice(&head);
            behind[..payload.len()].copy_from_slice(payload);
            let packet = &mut packet[..len as usize];
            put_trailer(packet, start);
            memory.write(start, packet)?;
        } else {
            memory.write(start, &head)?;
            let payload_at = memory.advance(start, wire::DESCRIPTOR_LEN);
            memory.write(payload_at, payload)?;
            let padding = payload.len().next_multiple_of(wire::ALIGN as usize) - payload.len();
            let tail = &mut packet[..padding + wire::TRAILER_LEN as usize];
            put_trailer(tail, start);
            let tail_at = memory.advance(payload_at, payload.len() as u32);
            memory.write(tail_at, tail)?;
        }
        self.write = memory.advance(start, len);
        // The guest unmasks, fences and looks at our index; we store our index and then look at its
        // mask: one of the two sees the other.
        let write_index = memory.control(wire::WRITE_INDEX)?;
        write_index.store(self.write, Ordering::SeqCst);
        let mask = memory.control(wire::INTERRUPT_MASK)?;
        if mask.load(Ordering::SeqCst) != 0 && !mutant!("ring-mask-ignored") {
            return Ok(false);
        }
        Ok(self.load_read()? == start || mutant!("ring-signal-always"))
    }
}

/// Ends a packet that started at index `start`.
fn put_trailer(packet: &mut [u8], start: u32) {
    let at = packet.len() - size_of::<u32>();
    let trailer = mutant!("ring-trailer", start ^ 8, start);
    packet[at..].copy_from_slice(&trailer.to_le_bytes());
}
