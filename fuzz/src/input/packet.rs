//! Packets to a virtual PCI bus.
#![forbid(unsafe_code)]

use arbitrary::Arbitrary;

use super::Step;
use crate::guest::Guest;
use crate::values::{Blob, Gpa, Small, Spoil, words};

/// A packet on the ring of a bus.
#[derive(Debug, Clone, Arbitrary)]
pub struct Request {
    bus: bool,
    what: What,
    spoil: Spoil,
    /// A descriptor of its own instead of the one that fits.
    descriptor: Option<Descriptor>,
    /// Asks for no completion.
    quiet: bool,
    /// Is not followed by a signal.
    silent: bool,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
struct Descriptor {
    kind: Small,
    offset8: Small,
    len8: Small,
    flags: Small,
}

#[derive(Debug, Clone, Arbitrary)]
enum What {
    Version(u8),
    Relations,
    Requirements(Small),
    Resources,
    D0Entry(Gpa),
    D0Exit,
    Power(Small, Small),
    Assigned {
        form: u8,
        function: u8,
        descriptors: Blob,
    },
    Released(u8),
    Create {
        form: u8,
        function: u8,
        vector: u8,
        mode: Small,
        count: Small,
        vps: Vec<Small>,
    },
    Delete {
        form: u8,
        function: u8,
        data: Small,
        count: Small,
    },
    Ejected(u8),
    Any {
        number: Small,
        body: Blob,
    },
}

/// Mostly the slot of a function that may be there.
fn slot(function: u8) -> u32 {
    match function {
        0..=239 => u32::from(function % 3) << 5,
        240.. => u32::from(function),
    }
}

impl What {
    fn encode(&self) -> Vec<u8> {
        let number = |number: u32| 0x4249_0000 + number;
        match self {
            Self::Version(version) => words(&[number(0x13), 0x1_0000 + u32::from(version % 7)]),
            Self::Relations => words(&[number(1)]),
            Self::Requirements(function) => words(&[number(5), function.0 << 5]),
            Self::Resources => words(&[number(6), 0]),
            Self::D0Entry(window) => {
                let window = window.0 & !0xfff;
                words(&[number(7), 0, window as u32, (window >> 32) as u32])
            }
            Self::D0Exit => words(&[number(8)]),
            Self::Power(function, state) => words(&[number(4), function.0 << 5, state.0]),
            Self::Assigned {
                form,
                function,
                descriptors,
            } => {
                let code = [0x10, 0x16, 0x1a][usize::from(*form) % 3];
                let mut message = words(&[number(code), slot(*function)]);
                message.extend(&descriptors.0);
                message.resize(message.len().max(200), 0);
                message
            }
            Self::Released(function) => words(&[number(0x11), slot(*function)]),
            Self::Create {
                form,
                function,
                vector,
                mode,
                count,
                vps,
            } => {
                let (vector, mode) = (u32::from(*vector), mode.0 & 0xff);
                let slot = slot(*function);
                let vps = vps.iter().map(|vp| vp.0 as u16);
                match form % 3 {
                    0 => words(&[
                        number(0x14),
                        slot,
                        vector | mode << 8 | count.0 << 16,
                        0,
                        vps.fold(0, |mask, vp| mask | 1 << (vp % 32)),
                        0,
                    ]),
                    1 => {
                        let mut message =
                            words(&[number(0x17), slot, vector | mode << 8 | count.0 << 16]);
                        message.extend((vps.len() as u16).to_le_bytes());
                        message.extend(vps.flat_map(u16::to_le_bytes));
                        message.resize(message.len().max(78), 0);
                        message
                    }
                    _ => {
                        let mut message =
                            words(&[number(0x1b), slot, vector, mode | count.0 << 16]);
                        message.extend((vps.len() as u16).to_le_bytes());
                        message.extend(vps.flat_map(u16::to_le_bytes));
                        message.resize(message.len().max(82), 0);
                        message
                    }
                }
            }
            Self::Delete {
                form,
                function,
                data,
                count,
            } => {
                let code = [0x15, 0x18][usize::from(*form) % 2];
                let head = [number(code), slot(*function), count.0 << 16, data.0];
                let mut message = words(&head);
                message.extend(words(&[0xfee0_0000, 0]));
                message
            }
            Self::Ejected(function) => words(&[number(0xf), slot(*function)]),
            Self::Any { number: kind, body } => {
                let mut message = words(&[number(kind.0 & 0x3f)]);
                message.extend(&body.0);
                message
            }
        }
    }
}

impl Step for Request {
    fn apply(&self, guest: &mut Guest) {
        let bus = usize::from(self.bus);
        let payload = self.spoil.apply(self.what.encode());
        let len8 = 2 + payload.len().div_ceil(8) as u16;
        let descriptor = match self.descriptor {
            None => [6, 2, len8, u16::from(!self.quiet)],
            Some(own) => [
                own.kind.0 as u16,
                own.offset8.0 as u16,
                own.len8.0 as u16,
                own.flags.0 as u16,
            ],
        };
        Guest::rings(bus)[0].send(guest.ram(), descriptor, 7, &payload);
        if !self.silent
            && let Some(channel) = guest.channels.get(bus)
        {
            guest.signal(channel.connection, 0);
        }
    }
}
