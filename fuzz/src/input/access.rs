//! Accesses to config windows, BARs and what lies around them.
#![forbid(unsafe_code)]

use arbitrary::Arbitrary;

use super::Step;
use crate::guest::Guest;
use crate::values::{Gpa, Small};

/// A load or store.
#[derive(Debug, Clone, Arbitrary)]
pub struct Access {
    bus: bool,
    place: Place,
    /// Width: 1, 2, 4 or 8 bytes.
    width: u8,
    /// What is stored; a load without.
    value: Option<Value>,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Place {
    /// The slot register.
    Slot,
    /// The configuration space of the function that is selected.
    Config(u8),
    /// A BAR register.
    BarRegister(u8),
    /// Command and status.
    Command,
    /// Anywhere in a window.
    Window(u16),
    /// A register of the device.
    Register(u8, u8),
    /// The MSI-X table or the pending bits of a function.
    Msix(u8, u8),
    /// Anywhere in BAR 0.
    Bar(u8, u16),
    /// Anywhere.
    At(Gpa),
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Value {
    Small(Small),
    /// Where a BAR may go.
    Bar {
        function: u8,
        high: bool,
    },
    /// Where something else lies.
    At(Gpa),
    /// Command bits.
    Command(u8),
    Slot(u8),
    Any(u64),
}

impl Place {
    fn gpa(self, bus: usize) -> u64 {
        let window = Guest::window(bus);
        match self {
            Self::Slot => window,
            Self::Config(at) => window + 0x1000 + u64::from(at),
            Self::BarRegister(bar) => window + 0x1010 + u64::from(bar % 6) * 4,
            Self::Command => window + 0x1004,
            Self::Window(at) => window + u64::from(at) % 0x2000,
            Self::Register(function, at) => Guest::bar(bus, function % 3) + u64::from(at % 0x70),
            Self::Msix(function, at) => {
                // Eight entries of 16 bytes; the pending bits are a page further.
                let place = match at {
                    0..=223 => 0x1000 + u64::from(at % 128),
                    224.. => 0x2000 + u64::from(at % 16),
                };
                Guest::bar(bus, function % 3) + place
            }
            Self::Bar(function, at) => Guest::bar(bus, function % 3) + u64::from(at) % 0x4000,
            Self::At(gpa) => gpa.0,
        }
    }
}

impl Value {
    fn value(self, bus: usize) -> u64 {
        match self {
            Self::Small(value) => value.0.into(),
            Self::Bar { function, high } => {
                let bar = Guest::bar(bus, function % 3);
                if high { bar >> 32 } else { bar }
            }
            Self::At(gpa) => gpa.0,
            Self::Command(bits) => u64::from(bits) & 6,
            Self::Slot(function) => u64::from(function % 4) << 5,
            Self::Any(value) => value,
        }
    }
}

impl Step for Access {
    fn apply(&self, guest: &mut Guest) {
        let bus = usize::from(self.bus);
        let gpa = self.place.gpa(bus);
        let width = 1 << (self.width % 4);
        let partition = &guest.machine.partition;
        match self.value {
            Some(value) => {
                let bytes = value.value(bus).to_le_bytes();
                let _ = partition.mmio_write(gpa, &bytes[..width]);
            }
            None => {
                let mut bytes = [0x5a; 8];
                let claimed = partition.mmio_read(gpa, &mut bytes[..width]);
                let untouched = bytes[..width].iter().all(|byte| *byte == 0x5a);
                assert!(
                    claimed || untouched,
                    "{gpa:#x}: not claimed, and yet answered"
                );
                assert!(bytes[width..].iter().all(|byte| *byte == 0x5a));
            }
        }
    }
}
