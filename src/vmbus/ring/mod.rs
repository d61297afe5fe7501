//! Host side of a channel's two rings (docs/spec/vmbus.md#vmbus-7).
//!
//! The rings live in pages that the guest writes at any moment. Nothing read from them is trusted:
//! the indices that the host owns are private copies and never read back; each index of the guest
//! is checked at each load; a descriptor is copied once and then checked; a payload is copied once
//! into the caller's buffer. A ring that breaks a rule stops: every later call answers
//! [`RingError::Stopped`], until the channel is closed and opened again.
//!
//! No call waits, and each does work bounded by one packet. Calls return whether the *guest* is to
//! be signalled; the caller does it with [`ChannelSignal`](super::channel::ChannelSignal), once for
//! as many calls as it likes.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::{VolatileMemory, VolatileSlice};

use crate::hv::vmbus::ring as wire;
use crate::mem::{GuestRam, MemError, PAGE_SIZE, Span};

#[cfg(test)]
pub(crate) mod guest;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub use reader::{Packet, PacketKind, RingReader, RingReaderState};
pub use writer::{Reservation, RingWriter, RingWriterState};

/// Why a ring call was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The pages are not a control page and at least one page of data, all of them RAM.
    #[error("{pages} pages do not make a ring")]
    Pages {
        /// Number of pages given.
        pages: usize,
    },
    /// An index is outside the data area or not a multiple of 8. Stops the ring.
    #[error("ring index {index:#x} in a data area of {size:#x} bytes")]
    Index {
        /// The index as loaded.
        index: u32,
        /// Bytes of the data area.
        size: u32,
    },
    /// The guest took back an index that it had published. Stops the ring.
    #[error("ring index went back from {from:#x} to {to:#x}")]
    IndexWentBack {
        /// The index as loaded before.
        from: u32,
        /// The index as loaded now.
        to: u32,
    },
    /// Too few bytes for the packet that starts there. Stops the ring.
    #[error("packet of {len} bytes where the ring holds {available}")]
    Truncated {
        /// Bytes that the packet takes with its trailer.
        len: u32,
        /// Bytes between the indices.
        available: u32,
    },
    /// A descriptor with an unknown type or flag, or with impossible lengths. Stops the ring.
    #[error("bad packet: type {packet_type}, offset8 {offset8}, len8 {len8}, flags {flags:#x}")]
    Descriptor {
        /// Packet type.
        packet_type: u16,
        /// Payload start in units of 8 bytes.
        offset8: u16,
        /// Length in units of 8 bytes.
        len8: u16,
        /// Flags.
        flags: u16,
    },
    /// A page of the ring is no longer RAM. Stops the ring.
    #[error(transparent)]
    Memory(#[from] MemError),
    /// The host's own packet is longer than a guest takes, than its reservation, or than the ring.
    /// The ring stays usable and unchanged.
    #[error("payload of {len} bytes where {limit} fit")]
    TooLong {
        /// Bytes of payload given.
        len: usize,
        /// Bytes of payload possible.
        limit: usize,
    },
    /// An error was met before: the ring has stopped.
    #[error("the ring has stopped")]
    Stopped,
}

/// Consecutive bytes of the data area that are consecutive in host memory.
#[derive(Debug)]
struct Run {
    /// Offset of the first byte in the data area.
    start: u32,
    /// Offset behind the last byte.
    end: u32,
    memory: Span,
}

/// Consecutive memory of the data area.
#[derive(Debug)]
struct Piece<'a>(VolatileSlice<'a>);

impl Piece<'_> {
    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.len() as u32
    }

    /// The word at `offset`; `None` if it is not in the piece or not aligned.
    #[inline(always)]
    fn word(&self, offset: u32) -> Option<&AtomicU64> {
        self.0.get_atomic_ref(offset as usize).ok()
    }

    #[inline(always)]
    fn load(&self, offset: u32) -> Option<u64> {
        let word = self.word(offset)?.load(Ordering::Relaxed);
        Some(u64::from_le(word))
    }

    #[inline(always)]
    fn store(&self, offset: u32, value: u64) -> Option<()> {
        let word = self.word(offset)?;
        word.store(value.to_le(), Ordering::Relaxed);
        Some(())
    }

    /// Copies out of the piece; `None` if it is too short.
    #[inline(always)]
    fn read(&self, offset: u32, buf: &mut [u8]) -> Option<()> {
        let memory = self.0.subslice(offset as usize, buf.len()).ok()?;
        memory.copy_to(buf);
        Some(())
    }

    /// Copies into the piece; `None` if it is too short.
    #[inline(always)]
    fn write(&self, offset: u32, buf: &[u8]) -> Option<()> {
        let memory = self.0.subslice(offset as usize, buf.len()).ok()?;
        memory.copy_from(buf);
        Some(())
    }
}

/// The pages of one ring: control words and a data area that wraps. They are found once, and again
/// when the VMM has replaced the memory map.
#[derive(Debug)]
struct RingMemory {
    ram: GuestRam,
    /// Page numbers: the control page, then the data pages.
    pfns: Box<[u64]>,
    /// That of the map in which the pages were found.
    generation: u64,
    control: Span,
    runs: Vec<Run>,
    size: u32,
}

impl RingMemory {
    /// `pfns`: the control page, then the data pages, as 4 KiB page numbers.
    fn new(ram: GuestRam, pfns: &[u64]) -> Result<Self, RingError> {
        let error = RingError::Pages { pages: pfns.len() };
        let data = pfns.split_first().ok_or(error)?.1;
        let size = u32::try_from(data.len() as u64 * PAGE_SIZE).map_err(|_| error)?;
        if size == 0 || size > i32::MAX as u32 {
            return Err(error);
        }
        let generation = ram.generation();
        let (control, runs) = find(&ram, pfns).map_err(|_| error)?;
        Ok(Self {
            ram,
            pfns: pfns.into(),
            generation,
            control,
            runs,
            size,
        })
    }

    /// Starts a call: sees to it that the pages are those of the current memory map.
    #[inline]
    fn refresh(&mut self) -> Result<(), RingError> {
        if self.ram.generation() == self.generation {
            return Ok(());
        }
        self.find_again()
    }

    #[cold]
    fn find_again(&mut self) -> Result<(), RingError> {
        let generation = self.ram.generation();
        (self.control, self.runs) = find(&self.ram, &self.pfns)?;
        self.generation = generation;
        Ok(())
    }

    #[inline]
    fn check_index(&self, index: u32) -> Result<u32, RingError> {
        if index >= self.size || !index.is_multiple_of(wire::ALIGN) {
            return Err(RingError::Index {
                index,
                size: self.size,
            });
        }
        Ok(index)
    }

    /// Bytes from `from` up to `to`, both inside the data area.
    #[inline]
    fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from {
            to - from
        } else {
            self.size - from + to
        }
    }

    /// The index `len` bytes behind `index`; `len` is at most the size of the data area.
    #[inline]
    fn advance(&self, index: u32, len: u32) -> u32 {
        let next = index + len;
        if next < self.size {
            next
        } else {
            next - self.size
        }
    }

    /// Loads an index and checks that it lies in the data area.
    #[inline]
    fn load_index(&self, word: u64) -> Result<u32, RingError> {
        let index = self.control(word)?.load(Ordering::Acquire);
        self.check_index(index)
    }

    /// A control word.
    #[inline(always)]
    fn control(&self, word: u64) -> Result<&AtomicU32, RingError> {
        let found = self.control.u32(word as usize);
        found.ok_or_else(|| self.bad_control(word))
    }

    #[cold]
    fn bad_control(&self, word: u64) -> RingError {
        let gpa = self.pfns[0] * PAGE_SIZE + word;
        MemError::Misaligned { gpa, align: 4 }.into()
    }

    /// Number of the run that `index` lies in.
    #[inline]
    fn run_of(&self, index: u32) -> usize {
        match self.runs.len() {
            1 => 0,
            _ => self.runs.partition_point(|run| run.end <= index),
        }
    }

    /// The memory at `index` as far as it is consecutive, at most `len` bytes.
    #[inline(always)]
    fn piece(&self, index: u32, len: u32) -> Result<Piece<'_>, RingError> {
        let run = self.runs.get(self.run_of(index));
        let memory = run.and_then(|run| {
            let most = run.end.checked_sub(index)?;
            let offset = index.checked_sub(run.start)?;
            run.memory.slice(offset as usize, most.min(len) as usize)
        });
        memory.map(Piece).ok_or_else(|| self.no_memory(index))
    }

    #[cold]
    fn no_memory(&self, index: u32) -> RingError {
        let size = self.size;
        RingError::Index { index, size }
    }

    /// Loads a word of the data area. An index that was checked is aligned, and so no word wraps.
    #[inline]
    fn word(&self, index: u32) -> Result<u64, RingError> {
        let word = self.piece(index, wire::ALIGN)?.load(0);
        word.ok_or_else(|| self.no_memory(index))
    }

    /// Copies out of the data area, wrapping at its end.
    fn read(&self, index: u32, buf: &mut [u8]) -> Result<(), RingError> {
        let mut rest = buf;
        self.for_each_piece(index, rest.len(), |memory| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(memory.len());
            memory.copy_to(now);
            rest = later;
        })
    }

    /// Copies into the data area, wrapping at its end.
    fn write(&self, index: u32, buf: &[u8]) -> Result<(), RingError> {
        let mut rest = buf;
        self.for_each_piece(index, rest.len(), |memory| {
            let (now, later) = rest.split_at(memory.len());
            memory.copy_from(now);
            rest = later;
        })
    }

    /// Splits `len` bytes at `index` at run ends and at the end of the data area. `len` is at most
    /// the size of the data area, so that no byte is met twice.
    #[inline]
    fn for_each_piece(
        &self,
        index: u32,
        len: usize,
        mut f: impl FnMut(VolatileSlice<'_>),
    ) -> Result<(), RingError> {
        debug_assert!(index < self.size && len <= self.size as usize);
        let mut index = index;
        let mut left = len as u32;
        while left > 0 {
            let piece = self.piece(index, left)?;
            let count = piece.len();
            if count == 0 {
                return Err(self.no_memory(index));
            }
            f(piece.0);
            left -= count;
            index = self.advance(index, count);
        }
        Ok(())
    }
}

/// Finds the pages of a ring: the control page and the data area.
fn find(ram: &GuestRam, pfns: &[u64]) -> Result<(Span, Vec<Run>), MemError> {
    let view = ram.view();
    let page = |pfn: u64| view.span(pfn.saturating_mul(PAGE_SIZE), PAGE_SIZE as usize);
    let control = page(pfns[0])?;
    let mut runs: Vec<Run> = Vec::new();
    let mut start = 0;
    for pfn in &pfns[1..] {
        let memory = page(*pfn)?;
        let end = start + PAGE_SIZE as u32;
        if let Some(run) = runs.last_mut()
            && run.memory.append(&memory)
        {
            run.end = end;
        } else {
            runs.push(Run { start, end, memory });
        }
        start = end;
    }
    Ok((control, runs))
}

/// Remembers that a ring has failed, so that it stays stopped.
#[derive(Debug, Default)]
struct Fuse(bool);

impl Fuse {
    /// Runs `f` unless the ring has stopped, and stops it if `f` meets an error of the guest's.
    #[inline(always)]
    fn guard<R>(&mut self, f: impl FnOnce() -> Result<R, RingError>) -> Result<R, RingError> {
        if self.0 {
            return Err(RingError::Stopped);
        }
        let result = f();
        if let Err(error) = &result {
            self.0 = !matches!(error, RingError::TooLong { .. }) && !mutant!("ring-goes-on-broken");
        }
        result
    }
}
