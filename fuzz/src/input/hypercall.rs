//! Hypercalls.
#![forbid(unsafe_code)]

use arbitrary::{Arbitrary, Result, Unstructured};

use super::Step;
use crate::guest::{Channel, Guest, Registers};
use crate::values::{Blob, Gpa, Iova, Small, Spoil, words};

/// The calls that the host knows.
const CODES: [u16; 13] = [
    0x5c, 0x5d, 0x7e, 0xb1, 0xb2, 0xc4, 0xc5, 0xce, 0xd0, 0xd1, 0x125, 0x127, 0x08,
];

/// A hypercall.
#[derive(Debug, Clone, Arbitrary)]
pub enum Hypercall {
    /// Any registers, over memory as it is.
    Registers {
        /// Registers.
        registers: AnyRegisters,
    },
    /// Any control word, over any bytes.
    Bytes {
        /// Control word.
        control: Control,
        /// Input.
        bytes: Blob,
    },
    /// A call as a driver makes it, more or less.
    Made {
        /// The call.
        call: Made,
        /// What is wrong with its input.
        spoil: Spoil,
        /// Elements to start at.
        start: bool,
    },
}

/// Registers of any kind.
#[derive(Debug, Clone, Arbitrary)]
pub struct AnyRegisters {
    user: bool,
    control: Control,
    input: Gpa,
    output: Gpa,
    xmm: Option<[u128; 6]>,
}

/// A control word.
#[derive(Debug, Clone, Copy)]
pub struct Control(u64);

impl<'a> Arbitrary<'a> for Control {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        if u.ratio(1, 8)? {
            return Ok(Self(u.arbitrary()?));
        }
        let code = u64::from(*u.choose(&CODES)?);
        let fast = u64::from(u.ratio(1, 3)?) << 16;
        let header = u64::from(u.arbitrary::<Small>()?.0 & 0x3ff) << 17;
        let count = match u.ratio(1, 8)? {
            true => u64::from(u.arbitrary::<u16>()?) & 0xfff,
            false => u64::from(u.arbitrary::<Small>()?.0 & 0xfff),
        };
        let start = u64::from(u.arbitrary::<Small>()?.0 & 0xfff);
        Ok(Self(code | fast | header | count << 32 | start << 48))
    }
}

/// A call with the fields that it has.
#[derive(Debug, Clone, Arbitrary)]
pub enum Made {
    /// HvPostMessage.
    Post {
        /// Connection.
        connection: Small,
        /// Message type.
        kind: Small,
        /// Payload size.
        size: u8,
    },
    /// HvSignalEvent.
    Signal {
        /// Channel.
        bus: u8,
        /// Event flag.
        flag: Small,
    },
    /// HvRetargetDeviceInterrupt.
    Retarget {
        /// Device.
        device: Device,
        /// Message data.
        data: Small,
        /// Vector.
        vector: u8,
        /// Flags.
        flags: Small,
        /// Banks.
        banks: Small,
        /// VPs of each bank.
        masks: [u8; 3],
        /// Number of qwords in the variable header.
        header: u8,
    },
    /// A domain is made.
    Create(Domain),
    /// A domain is deleted.
    Delete(Domain),
    /// A domain gets its tables.
    Configure {
        /// Domain.
        domain: Domain,
        /// Flags.
        flags: Small,
        /// Which of the tables, or anything.
        root: Gpa,
    },
    /// A function moves to a domain.
    Attach(Domain, Device),
    /// A function moves to the default domain.
    Detach(Device),
    /// A flush of a domain.
    Flush(Domain),
    /// A flush of ranges.
    FlushList {
        /// Domain.
        domain: Domain,
        /// Addresses, and how many pages.
        ranges: Vec<(Iova, u8)>,
        /// Elements that the control word speaks of, beside those.
        more: u8,
    },
    /// What there is.
    Capabilities,
    /// What a function is.
    Property(Device, Small),
}

/// A device, as calls name it.
#[derive(Debug, Clone, Copy)]
pub struct Device(pub u64);

impl<'a> Arbitrary<'a> for Device {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let byte: u8 = u.arbitrary()?;
        let id = (1 + u64::from(byte >> 4 & 3)) << 16 | 0xab78 | u64::from(byte & 3);
        Ok(Self(match byte {
            0..=223 => id,
            224..=239 => id | 0xffff_ffff << 32,
            _ => u.arbitrary()?,
        }))
    }
}

/// A domain, as calls name it.
#[derive(Debug, Clone, Copy)]
pub struct Domain(pub u64);

impl<'a> Arbitrary<'a> for Domain {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let byte: u8 = u.arbitrary()?;
        Ok(Self(match byte {
            0..=223 => u64::from(byte % 6) << 32 | 1,
            224..=231 => 0,
            _ => u.arbitrary()?,
        }))
    }
}

impl Made {
    /// Control word and input, of a guest with these channels.
    pub fn encode(&self, channels: &[Channel]) -> (u64, Vec<u8>) {
        let domain = |domain: &Domain| {
            let id = [domain.0 as u32, (domain.0 >> 32) as u32];
            words(&[u32::MAX, u32::MAX, 0, 0, id[0], id[1]])
        };
        let device = |bytes: &mut Vec<u8>, device: &Device| bytes.extend(device.0.to_le_bytes());
        match self {
            Self::Post {
                connection,
                kind,
                size,
            } => (0x5c, {
                let mut input = words(&[connection.0, 0, kind.0, u32::from(*size)]);
                input.resize(256, 0);
                input
            }),
            Self::Signal { bus, flag } => {
                let channel = channels.get(usize::from(*bus) % channels.len().max(1));
                let connection = channel.map_or(u32::from(*bus), |channel| channel.connection);
                (0x5d, words(&[connection, flag.0 & 0xffff]))
            }
            Self::Retarget {
                device: id,
                data,
                vector,
                flags,
                banks,
                masks,
                header,
            } => {
                let mut input = words(&[u32::MAX, u32::MAX]);
                device(&mut input, id);
                input.extend(words(&[1, 0, 0xfee0_0000, data.0, 0, 0]));
                input.extend(words(&[u32::from(*vector), flags.0, 0, 0, banks.0, 0]));
                for mask in masks {
                    input.extend(u64::from(*mask).to_le_bytes());
                }
                (0x7e | u64::from(*header % 8) << 17, input)
            }
            Self::Create(id) => (0xb1, {
                let mut input = domain(id);
                input.extend([0; 4]);
                input
            }),
            Self::Delete(id) => (0xc5, domain(id)),
            Self::Configure {
                domain: id,
                flags,
                root,
            } => (0xce, {
                let mut input = domain(id);
                input.extend(u64::from(flags.0).to_le_bytes());
                input.extend((root.0 & !0xfff).to_le_bytes());
                input
            }),
            Self::Attach(id, function) => (0xb2, {
                let mut input = domain(id);
                device(&mut input, function);
                input
            }),
            Self::Detach(function) => (0xc4, {
                let mut input = words(&[u32::MAX, u32::MAX]);
                device(&mut input, function);
                input
            }),
            Self::Flush(id) => (0xd0, {
                let mut input = domain(id);
                input.extend([0; 8]);
                input
            }),
            Self::FlushList {
                domain: id,
                ranges,
                more,
            } => {
                let mut input = domain(id);
                input.extend(words(&[1, 0]));
                for (iova, shift) in ranges {
                    let element = iova.0 & !0xfff | u64::from(*shift);
                    input.extend(element.to_le_bytes());
                }
                let count = ranges.len() as u64 + u64::from(*more / 16);
                (0xd1 | (count & 0xfff) << 32, input)
            }
            Self::Capabilities => (0x125, words(&[u32::MAX, u32::MAX, 0, 0])),
            Self::Property(function, property) => (0x127, {
                let mut input = words(&[u32::MAX, u32::MAX]);
                device(&mut input, function);
                input.extend(words(&[property.0, 0]));
                input
            }),
        }
    }
}

impl Step for Hypercall {
    fn apply(&self, guest: &mut Guest) {
        let _ = match self {
            Self::Registers { registers } => {
                let xmm = registers.xmm.map(|values| {
                    let mut block = [0; 96];
                    for (bytes, value) in block.chunks_exact_mut(16).zip(values) {
                        bytes.copy_from_slice(&value.to_le_bytes());
                    }
                    block
                });
                guest.call(Registers {
                    cpl: 3 * u8::from(registers.user),
                    control: registers.control.0,
                    rdx: registers.input.0,
                    r8: registers.output.0,
                    xmm,
                })
            }
            Self::Bytes { control, bytes } => guest.memory_call(0, control.0, &bytes.0),
            Self::Made { call, spoil, start } => {
                let (control, input) = call.encode(&guest.channels);
                let control = control | u64::from(*start) << 48;
                guest.memory_call(1, control, &spoil.apply(input))
            }
        };
    }
}
