//! One ring of a channel from the guest's side, as Linux `ring_buffer.c` does it
//! (docs/spec/vmbus.md, section 7). Every word of it can be written at will.
#![forbid(unsafe_code)]

use std::sync::atomic::{Ordering, fence};

use super::vm::{PAGE, Vm};
use super::wire::{Bytes, u16_at, u64_at};
use crate::check::Failure;
use crate::trace::Event;

/// Offset in the control page: write index.
pub const WRITE_INDEX: u64 = 0;
/// Offset in the control page: read index.
pub const READ_INDEX: u64 = 4;
/// Offset in the control page: interrupt mask.
pub const INTERRUPT_MASK: u64 = 8;
/// Offset in the control page: pending send size.
pub const PENDING_SEND_SIZE: u64 = 12;
/// Offset in the control page: feature bits.
pub const FEATURES: u64 = 64;

/// Packet type: in-band.
pub const IN_BAND: u16 = 6;
/// Packet type: completion.
pub const COMPLETION: u16 = 0xb;
/// Packet flag: the sender wants a completion.
pub const COMPLETION_REQUESTED: u16 = 1;

/// A packet, every field of its descriptor free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Packet type.
    pub kind: u16,
    /// Offset of the payload in units of 8 bytes; 2 for in-band packets.
    pub offset8: u16,
    /// Length of descriptor and payload in units of 8 bytes.
    pub len8: u16,
    /// Flags.
    pub flags: u16,
    /// Transaction id.
    pub id: u64,
    /// What follows the descriptor.
    pub payload: Vec<u8>,
}

impl Packet {
    /// A well-formed packet.
    pub fn new(kind: u16, flags: u16, id: u64, payload: &[u8]) -> Self {
        let padded = payload.len().next_multiple_of(8);
        let payload = Bytes(payload.to_vec()).up_to(padded).0;
        Self {
            kind,
            offset8: 2,
            len8: (2 + padded / 8) as u16,
            flags,
            id,
            payload,
        }
    }

    /// A request that is to be completed.
    pub fn request(id: u64, payload: &[u8]) -> Self {
        Self::new(IN_BAND, COMPLETION_REQUESTED, id, payload)
    }

    /// Descriptor and payload.
    pub fn encode(&self) -> Bytes {
        Bytes::new()
            .u16(self.kind)
            .u16(self.offset8)
            .u16(self.len8)
            .u16(self.flags)
            .u64(self.id)
            .bytes(&self.payload)
    }
}

/// A ring.
#[derive(Debug, Clone)]
pub struct Ring {
    vm: Vm,
    pfns: Vec<u64>,
}

impl Ring {
    /// A ring over these pages, of which the first is the control page.
    pub fn new(vm: &Vm, pfns: &[u64]) -> Self {
        Self {
            vm: vm.clone(),
            pfns: pfns.to_vec(),
        }
    }

    /// Initialises the control page as Linux does before it opens the channel.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn reset(&self) -> Result<(), Failure> {
        self.vm.ram().fill(self.control(), PAGE, 0)?;
        self.store(FEATURES, 1)
    }

    /// GPA of the control page.
    pub fn control(&self) -> u64 {
        self.pfns[0] * PAGE
    }

    /// Bytes of the data area.
    pub fn size(&self) -> u32 {
        (self.pfns.len() as u32 - 1) * PAGE as u32
    }

    /// A word of the control page.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn load(&self, offset: u64) -> Result<u32, Failure> {
        Ok(self
            .vm
            .ram()
            .load_u32(self.control() + offset, Ordering::Acquire)?)
    }

    /// Stores a word of the control page.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn store(&self, offset: u64, value: u32) -> Result<(), Failure> {
        let gpa = self.control() + offset;
        Ok(self.vm.ram().store_u32(gpa, value, Ordering::Release)?)
    }

    /// Address and part of a buffer of `len` bytes for each piece of a page that a range of the
    /// data area touches.
    fn pieces(&self, index: u32, len: usize) -> Vec<(u64, std::ops::Range<usize>)> {
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < len {
            let at = (index as usize + done) % self.size() as usize;
            let end = len.min(done + PAGE as usize - at % PAGE as usize);
            let gpa = self.pfns[1 + at / PAGE as usize] * PAGE + at as u64 % PAGE;
            pieces.push((gpa, done..end));
            done = end;
        }
        pieces
    }

    /// Stores bytes into the data area from a ring offset on, wrapping at its end. The indices
    /// stay.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn put(&self, index: u32, bytes: &[u8]) -> Result<(), Failure> {
        for (gpa, range) in self.pieces(index, bytes.len()) {
            self.vm.write(gpa, &bytes[range])?;
        }
        Ok(())
    }

    /// Bytes of the data area from a ring offset on.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn get(&self, index: u32, len: u32) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        for (gpa, range) in self.pieces(index, len as usize) {
            bytes.extend(self.vm.read(gpa, range.len())?);
        }
        Ok(bytes)
    }

    /// Free bytes, by the indices as they stand.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn free(&self) -> Result<u32, Failure> {
        let (write, read) = (self.load(WRITE_INDEX)?, self.load(READ_INDEX)?);
        Ok(if write >= read {
            self.size() - (write - read)
        } else {
            read - write
        })
    }

    /// Sends a packet; `None` if the ring has no room. Otherwise whether the host wants a signal.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn send(&self, packet: &Packet) -> Result<Option<bool>, Failure> {
        let start = self.load(WRITE_INDEX)?;
        let bytes = packet.encode();
        let bytes = bytes.u64(u64::from(start) << 32).0;
        if self.free()? <= bytes.len() as u32 {
            return Ok(None);
        }
        self.vm.trace(&Event::Packet {
            sent: true,
            kind: packet.kind,
            id: packet.id,
            payload: packet.payload.clone(),
        });
        self.put(start, &bytes)?;
        self.store(WRITE_INDEX, (start + bytes.len() as u32) % self.size())?;
        fence(Ordering::SeqCst);
        let wanted = self.load(INTERRUPT_MASK)? == 0 && self.load(READ_INDEX)? == start;
        Ok(Some(wanted))
    }

    /// Takes a packet, if there is one, and says whether the host wants a signal for the room.
    ///
    /// # Errors
    ///
    /// [`Failure::Unmet`] if what lies there is not a packet.
    pub fn receive(&self) -> Result<Option<(Packet, bool)>, Failure> {
        let (write, read) = (self.load(WRITE_INDEX)?, self.load(READ_INDEX)?);
        if write == read {
            return Ok(None);
        }
        let used = self.size() - self.free()?;
        let malformed = |what: &str, got: String| Failure::Unmet {
            what: format!("host-to-guest ring at {read:#x} (indices {write:#x}, {read:#x})"),
            expected: what.to_owned(),
            got,
        };
        if write >= self.size() || write % 8 != 0 || used < 16 {
            return Err(malformed("a valid write index", format!("{write:#x}")));
        }
        let head = self.get(read, 16)?;
        let (offset8, len8) = (u16_at(&head, 2), u16_at(&head, 4));
        let (offset, len) = (u32::from(offset8) * 8, u32::from(len8) * 8);
        if offset < 16 || len < offset || len > 4096 || len + 8 > used {
            let got = format!("offset8 {offset8}, len8 {len8}, {used} bytes in use");
            return Err(malformed("a descriptor within the bytes in use", got));
        }
        let trailer = self.get(read + len, 8)?;
        if trailer != (u64::from(read) << 32).to_le_bytes() {
            return Err(malformed(
                "the packet's own offset behind it",
                format!("{trailer:x?}"),
            ));
        }
        let packet = Packet {
            kind: u16_at(&head, 0),
            offset8,
            len8,
            flags: u16_at(&head, 6),
            id: u64_at(&head, 8),
            payload: self.get(read + offset, len - offset)?,
        };
        self.vm.trace(&Event::Packet {
            sent: false,
            kind: packet.kind,
            id: packet.id,
            payload: packet.payload.clone(),
        });
        let signal = self.consume(read, len + 8)?;
        Ok(Some((packet, signal)))
    }

    /// Moves the read index past `bytes` bytes from `read` on, and says whether the host wants a
    /// signal for the room.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn consume(&self, read: u32, bytes: u32) -> Result<bool, Failure> {
        self.store(READ_INDEX, (read + bytes) % self.size())?;
        fence(Ordering::SeqCst);
        let pending = self.load(PENDING_SEND_SIZE)?;
        let free = self.free()?;
        let before = free.wrapping_sub(bytes);
        let supported = self.load(FEATURES)? & 1 == 1;
        Ok(supported && pending != 0 && free > pending && before <= pending)
    }
}
