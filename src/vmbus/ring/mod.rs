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

use std::sync::atomic::Ordering;

use crate::hv::vmbus::ring as wire;
use crate::mem::{GuestRam, MemError, PAGE_SIZE, RamPage, RamView};

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

/// Consecutive bytes of the data area that are consecutive in guest RAM.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// Offset of the first byte in the data area.
    start: u32,
    /// Bytes in the run.
    len: u32,
    /// Guest physical address of the first byte.
    gpa: u64,
}

/// The pages of one ring: control words and a data area that wraps.
#[derive(Debug)]
struct RingMemory {
    ram: GuestRam,
    control: u64,
    runs: Box<[Run]>,
    size: u32,
}

impl RingMemory {
    /// `pfns`: the control page, then the data pages, as 4 KiB page numbers.
    fn new(ram: GuestRam, pfns: &[u64]) -> Result<Self, RingError> {
        let error = RingError::Pages { pages: pfns.len() };
        let (control, data) = pfns.split_first().ok_or(error)?;
        let size = u32::try_from(data.len() as u64 * PAGE_SIZE).map_err(|_| error)?;
        if size == 0 || size > i32::MAX as u32 {
            return Err(error);
        }
        let gpa_of = |pfn: u64| {
            let gpa = pfn.checked_mul(PAGE_SIZE)?;
            ram.is_ram(gpa, PAGE_SIZE).then_some(gpa)
        };
        let control = gpa_of(*control).ok_or(error)?;
        let mut runs: Vec<Run> = Vec::new();
        let mut start = 0;
        for pfn in data {
            let gpa = gpa_of(*pfn).ok_or(error)?;
            match runs.last_mut() {
                Some(run) if run.gpa + u64::from(run.len) == gpa => run.len += PAGE_SIZE as u32,
                _ => runs.push(Run {
                    start,
                    len: PAGE_SIZE as u32,
                    gpa,
                }),
            }
            start += PAGE_SIZE as u32;
        }
        Ok(Self {
            ram,
            control,
            runs: runs.into_boxed_slice(),
            size,
        })
    }

    /// RAM as it is now, for the accesses of one call.
    fn view(&self) -> RamView {
        self.ram.view()
    }

    fn control<'v>(&self, view: &'v RamView) -> Result<Control<'v>, RingError> {
        Ok(Control(view.page(self.control)?))
    }

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
    fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from {
            to - from
        } else {
            self.size - from + to
        }
    }

    /// The index `len` bytes behind `index`; `len` is at most the size of the data area.
    fn advance(&self, index: u32, len: u32) -> u32 {
        let next = index + len;
        if next < self.size {
            next
        } else {
            next - self.size
        }
    }

    /// Loads an index and checks that it lies in the data area.
    fn load_index(&self, control: &Control<'_>, word: u64) -> Result<u32, RingError> {
        let index = control.load(word, Ordering::Acquire)?;
        self.check_index(index)
    }

    /// Copies out of the data area, wrapping at its end.
    fn read(&self, view: &RamView, index: u32, buf: &mut [u8]) -> Result<(), RingError> {
        let mut done = 0;
        self.for_each_piece(index, buf.len(), |gpa, len| {
            let result = view.read(gpa, &mut buf[done..done + len]);
            done += len;
            result
        })
    }

    /// Copies into the data area, wrapping at its end.
    fn write(&self, view: &RamView, index: u32, buf: &[u8]) -> Result<(), RingError> {
        let mut done = 0;
        self.for_each_piece(index, buf.len(), |gpa, len| {
            let result = view.write(gpa, &buf[done..done + len]);
            done += len;
            result
        })
    }

    /// Splits `len` bytes at `index` at run ends and at the end of the data area. `len` is at most
    /// the size of the data area, so that no byte is met twice.
    fn for_each_piece(
        &self,
        index: u32,
        len: usize,
        mut f: impl FnMut(u64, usize) -> Result<(), MemError>,
    ) -> Result<(), RingError> {
        debug_assert!(index < self.size && len <= self.size as usize);
        let mut at = self.runs.partition_point(|run| run.start <= index) - 1;
        let mut skip = index - self.runs[at].start;
        let mut left = len;
        while left > 0 {
            let run = self.runs[at];
            let piece = left.min((run.len - skip) as usize);
            f(run.gpa + u64::from(skip), piece)?;
            left -= piece;
            skip = 0;
            at = (at + 1) % self.runs.len();
        }
        Ok(())
    }
}

/// The control words of a ring, found for the time of one call.
#[derive(Debug)]
struct Control<'v>(RamPage<'v>);

impl Control<'_> {
    fn load(&self, word: u64, order: Ordering) -> Result<u32, RingError> {
        Ok(self.0.load_u32(word, order)?)
    }

    fn store(&self, word: u64, value: u32, order: Ordering) -> Result<(), RingError> {
        Ok(self.0.store_u32(word, value, order)?)
    }
}

/// Remembers that a ring has failed, so that it stays stopped.
#[derive(Debug, Default)]
struct Fuse(bool);

impl Fuse {
    /// Runs `f` unless the ring has stopped, and stops it if `f` meets an error of the guest's.
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
