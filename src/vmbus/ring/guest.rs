//! A guest's side of a ring pair, for tests: the algorithms of Linux `ring_buffer.c` in the plainest
//! form, sharing no code with the host side.
#![forbid(unsafe_code)]

use std::sync::atomic::{Ordering, fence};

use crate::mem::{GuestRam, RamMap};
use vm_memory::GuestAddress;

/// RAM of `pages` pages from address 0.
pub(crate) fn ram(pages: u64) -> GuestRam {
    GuestRam::new(&map(pages))
}

/// Fresh memory of `pages` pages from address 0.
pub(crate) fn map(pages: u64) -> RamMap {
    RamMap::from_ranges(&[(GuestAddress(0), (pages * 4096) as usize)]).unwrap()
}

/// One ring, from the guest's view.
#[derive(Debug, Clone)]
pub(crate) struct GuestRing {
    ram: GuestRam,
    pfns: Vec<u64>,
}

/// A packet that the guest received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) packet_type: u16,
    pub(crate) flags: u16,
    pub(crate) transaction_id: u64,
    pub(crate) payload: Vec<u8>,
}

impl GuestRing {
    /// Initialises the control page as Linux does before it opens the channel.
    pub(crate) fn new(ram: &GuestRam, pfns: &[u64]) -> Self {
        ram.fill(pfns[0] * 4096, 4096, 0).unwrap();
        let ring = Self::attach(ram, pfns);
        ring.store(64, 1);
        ring
    }

    /// A ring that is set up already.
    pub(crate) fn attach(ram: &GuestRam, pfns: &[u64]) -> Self {
        Self {
            ram: ram.clone(),
            pfns: pfns.to_vec(),
        }
    }

    pub(crate) fn ram(&self) -> GuestRam {
        self.ram.clone()
    }

    pub(crate) fn size(&self) -> u32 {
        (self.pfns.len() as u32 - 1) * 4096
    }

    pub(crate) fn load(&self, word: u64) -> u32 {
        let gpa = self.pfns[0] * 4096 + word;
        self.ram.load_u32(gpa, Ordering::Acquire).unwrap()
    }

    pub(crate) fn store(&self, word: u64, value: u32) {
        let gpa = self.pfns[0] * 4096 + word;
        self.ram.store_u32(gpa, value, Ordering::Release).unwrap();
    }

    /// Calls `f` with address and length of each piece of a page that the range touches.
    fn pieces(&self, index: u32, len: usize, mut f: impl FnMut(u64, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < len {
            let index = (index + done as u32) % self.size();
            let offset = index % 4096;
            let end = len.min(done + 4096 - offset as usize);
            let gpa = self.pfns[1 + index as usize / 4096] * 4096 + u64::from(offset);
            f(gpa, done..end);
            done = end;
        }
    }

    pub(crate) fn put(&self, index: u32, bytes: &[u8]) {
        self.pieces(index, bytes.len(), |gpa, range| {
            self.ram.write(gpa, &bytes[range]).unwrap();
        });
    }

    fn get(&self, index: u32, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.pieces(index, len as usize, |gpa, range| {
            self.ram.read(gpa, &mut bytes[range]).unwrap();
        });
        bytes
    }

    fn free(&self) -> u32 {
        let (write, read) = (self.load(0), self.load(4));
        if write >= read {
            self.size() - (write - read)
        } else {
            read - write
        }
    }

    /// Sends a packet (Linux `hv_ringbuffer_write`). Returns whether to signal the host, or `None`
    /// if the ring is full.
    pub(crate) fn send(
        &self,
        transaction_id: u64,
        completion: bool,
        payload: &[u8],
    ) -> Option<bool> {
        let padded = payload.len().next_multiple_of(8);
        let len = 16 + padded as u32;
        if self.free() <= len + 8 {
            return None;
        }
        let start = self.load(0);
        let mut packet = Vec::new();
        packet.extend(6u16.to_le_bytes());
        packet.extend(2u16.to_le_bytes());
        packet.extend(((len / 8) as u16).to_le_bytes());
        packet.extend(u16::from(completion).to_le_bytes());
        packet.extend(transaction_id.to_le_bytes());
        packet.extend(payload);
        packet.resize(len as usize, 0);
        packet.extend((u64::from(start) << 32).to_le_bytes());
        self.put(start, &packet);
        self.store(0, (start + len + 8) % self.size());
        fence(Ordering::SeqCst);
        Some(self.load(8) == 0 && self.load(4) == start)
    }

    /// Asks for room for a packet of `payload_len` bytes (hv_sock does this), and returns whether
    /// it is there after all.
    pub(crate) fn wait_for_room(&self, payload_len: u32) -> bool {
        let len = 16 + payload_len.next_multiple_of(8) + 8;
        self.store(12, len);
        fence(Ordering::SeqCst);
        self.free() > len
    }

    /// Receives a packet (Linux `hv_pkt_iter_first` to `hv_pkt_iter_close` of one packet). The
    /// second value tells whether to signal the host.
    pub(crate) fn receive(&self) -> Option<(Received, bool)> {
        let (write, read) = (self.load(0), self.load(4));
        let available = self.size() - self.free();
        if write == read {
            return None;
        }
        let header = self.get(read, 16);
        let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let (offset, len) = (u32::from(word(2)) * 8, u32::from(word(4)) * 8);
        assert!(offset == 16 && (16..=4096).contains(&len) && len + 8 <= available);
        let trailer = self.get(read + len, 8);
        assert_eq!(trailer, (u64::from(read) << 32).to_le_bytes());
        let received = Received {
            packet_type: word(0),
            flags: word(6),
            transaction_id: u64::from_le_bytes(header[8..].try_into().unwrap()),
            payload: self.get(read + offset, len - offset),
        };
        let next = (read + len + 8) % self.size();
        self.store(4, next);
        fence(Ordering::SeqCst);
        let pending = self.load(12);
        let free = self.free();
        let signal = self.load(64) & 1 == 1 && pending != 0 && free > pending // As Linux does it: wraps if the host has already refilled the space.
            && free.wrapping_sub(len + 8) <= pending;
        Some((received, signal))
    }
}
