//! Changes of the rings under whoever reads them.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use arbitrary::{Arbitrary, Result, Unstructured};

use super::Step;
use crate::guest::{Guest, Ring};
use crate::values::Blob;

/// A change of a ring.
#[derive(Debug, Clone, Arbitrary)]
pub struct RingChange {
    /// Bus 0 or 1.
    bus: bool,
    /// The ring to the guest instead of the one to the host.
    inbound: bool,
    what: What,
}

#[derive(Debug, Clone, Arbitrary)]
enum What {
    /// A word of the control page.
    Word { word: u8, value: Index },
    /// Bytes of the data area.
    Bytes { at: Index, bytes: Blob },
    /// A packet with any descriptor.
    Packet {
        descriptor: [u8; 4],
        high: u8,
        payload: Blob,
    },
    /// An index is moved.
    Move { word: bool, by: i8 },
    /// All that is there is taken.
    Drain,
    /// The host is told.
    Signal,
}

/// An index: mostly inside the ring and aligned.
#[derive(Debug, Clone, Copy)]
struct Index(u32);

impl<'a> Arbitrary<'a> for Index {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self(match u.arbitrary::<u8>()? {
            0..=191 => u32::from(u.arbitrary::<u16>()?) % Ring::size() / 8 * 8,
            192..=207 => Ring::size() - 8 * u32::from(u.arbitrary::<u8>()? % 8),
            208..=223 => u32::from(u.arbitrary::<u16>()?),
            _ => u.arbitrary()?,
        }))
    }
}

/// Offsets of the control words.
const WORDS: [u64; 5] = [0, 4, 8, 12, 64];

impl RingChange {
    /// Changes a ring in RAM; true if the host is to be told.
    pub fn change(&self, ring: Ring, ram: &vm_vpci::mem::GuestRam) -> bool {
        match &self.what {
            What::Word { word, value } => {
                let at = ring.control() + WORDS[usize::from(*word) % WORDS.len()];
                ram.store_u32(at, value.0, Ordering::Release).expect("RAM");
            }
            What::Bytes { at, bytes } => {
                for (at, byte) in (at.0 % Ring::size()..).zip(&bytes.0) {
                    ram.write(ring.at(at), &[*byte]).expect("RAM");
                }
            }
            What::Packet {
                descriptor,
                high,
                payload,
            } => {
                let mut descriptor = descriptor.map(u16::from);
                // The kinds that there are, and now and then others.
                descriptor[0] = [6, 7, 8, 9, 0xb, descriptor[0]][usize::from(descriptor[0]) % 6];
                descriptor[1] %= 8;
                descriptor[3] %= 3;
                if *high < 8 {
                    descriptor[usize::from(*high) % 4] ^= 0x8000;
                }
                ring.send(ram, descriptor, 0x1234_5678_9abc_def0, &payload.0);
            }
            What::Move { word, by } => {
                let at = ring.control() + 4 * u64::from(*word);
                let index = ram.load_u32(at, Ordering::Acquire).expect("RAM");
                let index = index.wrapping_add_signed(i32::from(*by) * 8);
                ram.store_u32(at, index, Ordering::Release).expect("RAM");
            }
            What::Drain => ring.drain(ram),
            What::Signal => return true,
        }
        false
    }

    /// Whether it is about the ring to the guest.
    pub fn is_inbound(&self) -> bool {
        self.inbound
    }
}

impl Step for RingChange {
    fn apply(&self, guest: &mut Guest) {
        let bus = usize::from(self.bus);
        let ring = Guest::rings(bus)[usize::from(self.inbound)];
        if self.change(ring, guest.ram())
            && let Some(channel) = guest.channels.get(bus)
        {
            guest.signal(channel.connection, 0);
        }
    }
}
