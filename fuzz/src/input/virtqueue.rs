//! What a hostile driver of virtio devices does.
#![forbid(unsafe_code)]

use arbitrary::{Arbitrary, Result, Unstructured};

use super::{Access, Step as _, Work};
use crate::values::{Blob, Gpa};
use crate::virtio::{
    DATA, Descriptor, Driver, HEADERS, INDIRECT, IOVA, NEXT, Queue, SECRET, WRITE, register,
};

/// Most buffers of one request.
const MOST_BUFFERS: usize = 6;

/// Where a buffer or a ring is said to be.
#[derive(Debug, Clone, Copy, Arbitrary)]
enum Place {
    /// In the pages for data.
    Data(u8, InPage),
    Same(u8, InPage),
    /// Headers and status bytes.
    Header(u8),
    /// A ring or table of a queue.
    Ring(u8, u8, InPage),
    /// Where the domain leads nowhere.
    Secret(InPage),
    /// Where a function in a domain would see nothing.
    Untranslated(Gpa),
    Gpa(Gpa),
    Any(u64),
}

/// An offset in a page.
#[derive(Debug, Clone, Copy)]
struct InPage(u64);

impl<'a> Arbitrary<'a> for InPage {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let byte = u64::from(u.arbitrary::<u8>()?);
        Ok(Self(match byte {
            0..=127 => 0,
            128..=223 => byte % 32 * 16,
            224..=239 => 4096 - byte % 16,
            _ => u64::from(u.arbitrary::<u16>()?) % 4096,
        }))
    }
}

impl Place {
    fn address(self, driver: &Driver, function: u8) -> u64 {
        let gpa = match self {
            Self::Data(page, at) | Self::Same(page, at) => {
                DATA + u64::from(page) % 16 * 4096 + at.0
            }
            Self::Header(at) => HEADERS + u64::from(at),
            Self::Ring(queue, area, at) => Queue::new(queue).areas()[usize::from(area) % 4] + at.0,
            Self::Secret(at) => SECRET + at.0,
            Self::Untranslated(gpa) => return gpa.0,
            Self::Gpa(gpa) => gpa.0,
            Self::Any(address) => return address,
        };
        // Some addresses are so high that they wrap.
        let offset = driver.seen(function, 0);
        gpa.wrapping_add(offset)
    }
}

/// A number of bytes.
#[derive(Debug, Clone, Copy)]
struct Len(u32);

impl<'a> Arbitrary<'a> for Len {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        const USUAL: [u32; 16] = [
            512,
            512,
            1024,
            0,
            1,
            15,
            16,
            17,
            511,
            513,
            4096,
            0xffff,
            0x1_0000,
            0x1_0001,
            0x7fff_ffff,
            u32::MAX,
        ];
        let byte = u.arbitrary::<u8>()?;
        Ok(Self(match byte {
            0..=239 => USUAL[usize::from(byte) % 16],
            240..=247 => u32::from(u.arbitrary::<u16>()?),
            _ => u.arbitrary()?,
        }))
    }
}

/// A sector.
#[derive(Debug, Clone, Copy)]
struct Sector(u64);

impl<'a> Arbitrary<'a> for Sector {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let byte = u.arbitrary::<u8>()?;
        Ok(Self(match byte {
            // The disk has 16 at first.
            0..=223 => u64::from(byte) % 32,
            224..=239 => (1 << 55) - u64::from(byte % 4),
            _ => u.arbitrary()?,
        }))
    }
}

/// Flags of a descriptor: mostly those that there are.
#[derive(Debug, Clone, Copy)]
struct Flags(u16);

impl<'a> Arbitrary<'a> for Flags {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let byte = u.arbitrary::<u8>()?;
        Ok(Self(match byte {
            0..=239 => u16::from(byte) % 8,
            _ => u.arbitrary()?,
        }))
    }
}

/// A request as a driver makes it, more or less.
#[derive(Debug, Clone, Arbitrary)]
struct Request {
    queue: u8,
    kind: u8,
    sector: Sector,
    /// Bytes of the header that the device is told of.
    header: Option<u8>,
    buffers: Vec<(Place, Len, bool)>,
    status: Option<Place>,
    indirect: bool,
    head: u8,
    kick: bool,
}

/// A register and what is written there.
#[derive(Debug, Clone, Arbitrary)]
enum Register {
    /// A status, whatever the order.
    Status(u8),
    /// One of the usual ones.
    NextStatus(u8),
    FeatureSelect(u8),
    Feature(u32),
    ConfigVector(u8),
    QueueSelect(u8),
    QueueSize(u16),
    QueueVector(u8),
    QueueEnable(bool),
    /// A ring is said to be elsewhere.
    Area(u8, Place),
    /// Anything anywhere, with any width.
    Any {
        page: u8,
        at: u8,
        width: u8,
        value: u64,
    },
}

#[derive(Debug, Clone, Arbitrary)]
enum Act {
    Request(Request),
    SameRequest(Request),
    /// One descriptor.
    Describe {
        queue: u8,
        indirect: bool,
        index: u8,
        place: Place,
        len: Len,
        flags: Flags,
        next: u8,
    },
    /// A chain that leads to itself.
    Loop {
        queue: u8,
        indirect: bool,
        head: u8,
        len: u8,
    },
    Offer(u8, u16),
    Jump(u8, u16),
    NotifyAt(u8, bool, u16),
    Kick(u8),
    Work(Work),
    SameWork(Work),
    Register(u8, Register),
    Read {
        function: u8,
        page: u8,
        at: u16,
        width: u8,
    },
    /// Bytes of rings, tables or data.
    Fill(u32, Blob),
    Command(u8, u8),
    Map {
        page: u8,
        access: u8,
        flush: bool,
    },
    Flush,
    Move(u8, bool),
    Reset(u8),
    Restart(u64),
    Resize(u8),
    Access(Access),
    Migrate,
}

/// A step of a hostile driver.
#[derive(Debug, Clone, Arbitrary)]
pub struct VirtioStep(Act);

impl Request {
    fn send(&self, driver: &mut Driver) {
        let queue = Queue::new(self.queue);
        let function = queue.function();
        let kinds = [0u32, 1, 0, 1, 4, 8, 11, 0xffff_ffff];
        let kind = kinds[usize::from(self.kind) % 8];
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&self.sector.0.to_le_bytes());
        let _ = driver.guest.ram().write(queue.header(), &header);
        let mut chain = Vec::new();
        if !queue.is_entropy() {
            let at = driver.seen(function, queue.header());
            chain.push((at, self.header.map_or(16, u32::from), false));
        }
        let writes = queue.is_entropy() || matches!(kind, 0 | 8);
        for (place, len, other) in self.buffers.iter().take(MOST_BUFFERS) {
            // Those that have more to read behind them are wrong, so not too often.
            let odd = *other && len.0 % 2 == 1;
            chain.push((place.address(driver, function), len.0, writes != odd));
        }
        if !queue.is_entropy() {
            let status = match self.status {
                Some(place) => place.address(driver, function),
                None => driver.seen(function, queue.header() + 16),
            };
            chain.push((status, 1, true));
        }
        let (first, count) = match self.indirect {
            true => (0, chain.len()),
            false => (u16::from(self.head % 64), chain.len()),
        };
        for (index, (address, len, write)) in (0..).zip(chain) {
            let more = usize::from(index) + 1 < count;
            let descriptor = Descriptor {
                address,
                len,
                flags: if more { NEXT } else { 0 } | if write { WRITE } else { 0 },
                next: (first + index + 1) % 64,
            };
            driver.describe(queue, self.indirect, (first + index) % 64, descriptor);
        }
        if self.indirect {
            let descriptor = Descriptor {
                address: driver.seen(function, queue.areas()[3]),
                len: 16 * count as u32,
                flags: INDIRECT,
                next: 0,
            };
            driver.describe(queue, false, u16::from(self.head % 64), descriptor);
        }
        driver.offer(queue, u16::from(self.head % 64));
        if self.kick {
            driver.kick(queue);
        }
    }
}

impl Register {
    fn write(&self, driver: &mut Driver, function: u8) {
        let (offset, width, value) = match *self {
            Self::Status(status) => (register::STATUS, 1, u64::from(status)),
            Self::NextStatus(status) => {
                let usual = [1, 3, 0xb, 0xf, 0x8f, 0x4f, 0, 0xf];
                (register::STATUS, 1, usual[usize::from(status) % 8])
            }
            Self::FeatureSelect(word) => (register::DRIVER_FEATURE_SELECT, 4, (word % 3).into()),
            Self::Feature(bits) => (register::DRIVER_FEATURE, 4, bits.into()),
            Self::ConfigVector(vector) => (register::CONFIG_VECTOR, 2, (vector % 5).into()),
            Self::QueueSelect(queue) => (register::QUEUE_SELECT, 2, (queue % 4).into()),
            Self::QueueSize(size) => {
                let sizes = [0, 1, 2, 4, 32, 64, 256, 512, 0x8000, u64::from(size)];
                let size = sizes[usize::from(size) % sizes.len()];
                (register::QUEUE_SIZE, 2, size)
            }
            Self::QueueVector(vector) => (register::QUEUE_VECTOR, 2, (vector % 5).into()),
            Self::QueueEnable(on) => (register::QUEUE_ENABLE, 2, on.into()),
            Self::Area(area, place) => {
                driver.rings_may_move();
                let offset = register::QUEUE_AREAS[usize::from(area) % 3];
                let mut address = place.address(driver, function);
                if area & 0x40 != 0 {
                    address &= !0xf;
                }
                let width = if area & 0x80 == 0 { 8 } else { 4 };
                (offset, width, address)
            }
            Self::Any {
                page,
                at,
                width,
                value,
            } => {
                driver.rings_may_move();
                let page = u64::from(page % 8) * 4096;
                (page + u64::from(at), 1 << (width % 4), value)
            }
        };
        driver.write(function, offset, width, value);
    }
}

impl VirtioStep {
    /// Does it.
    pub fn apply(&self, driver: &mut Driver) {
        match &self.0 {
            Act::Request(request) | Act::SameRequest(request) => request.send(driver),
            Act::Describe {
                queue,
                indirect,
                index,
                place,
                len,
                flags,
                next,
            } => {
                let queue = Queue::new(*queue);
                let descriptor = Descriptor {
                    address: place.address(driver, queue.function()),
                    len: len.0,
                    flags: flags.0,
                    next: (*next).into(),
                };
                driver.describe(queue, *indirect, (*index).into(), descriptor);
            }
            Act::Loop {
                queue,
                indirect,
                head,
                len,
            } => loop_of(driver, Queue::new(*queue), *indirect, *head, *len),
            Act::Offer(queue, head) => {
                // Mostly one that there is.
                let head = if head % 8 == 0 { *head } else { head % 64 };
                driver.offer(Queue::new(*queue), head);
            }
            Act::Jump(queue, by) => {
                let by = if by % 4 == 0 { *by } else { by % 80 };
                driver.jump(Queue::new(*queue), by);
            }
            Act::NotifyAt(queue, event, value) => {
                driver.notify_at(Queue::new(*queue), *event, *value);
            }
            Act::Kick(queue) => driver.kick(Queue::new(*queue)),
            Act::Work(Work::One(first)) | Act::SameWork(Work::One(first)) => {
                driver.step((*first).into());
            }
            Act::Work(Work::All) | Act::SameWork(Work::All) => driver.settle(),
            Act::Register(function, register) => register.write(driver, function % 2),
            Act::Read {
                function,
                page,
                at,
                width,
            } => {
                let offset = u64::from(page % 8) * 4096 + u64::from(at % 4096);
                driver.read(*function, offset, 1 << (width % 4));
            }
            Act::Fill(at, bytes) => driver.fill(u64::from(*at), &bytes.0),
            Act::Command(function, bits) => driver.command(*function, u16::from(bits & 6)),
            Act::Map {
                page,
                access,
                flush,
            } => driver.map(*page, *access, *flush),
            Act::Flush => driver.flush(),
            Act::Move(function, domain) => driver.move_to(*function, *domain),
            Act::Reset(function) => driver.reset(*function),
            Act::Restart(features) => driver.restart(*features),
            Act::Resize(sectors) => driver.resize(*sectors),
            Act::Access(access) => {
                driver.rings_may_move();
                access.apply(&mut driver.guest);
            }
            Act::Migrate => driver.migrate(),
        }
    }
}

/// Descriptors in a circle, or an indirect table that names itself.
fn loop_of(driver: &mut Driver, queue: Queue, indirect: bool, head: u8, len: u8) {
    let function = queue.function();
    let table = driver.seen(function, queue.areas()[3]);
    let len = u16::from(len % 64) + 1;
    let first = u16::from(head % 64);
    for index in 0..len {
        let descriptor = Descriptor {
            address: if indirect { table } else { DATA + IOVA },
            len: if indirect { 16 * u32::from(len) } else { 0 },
            flags: NEXT | if indirect { INDIRECT } else { 0 },
            next: (index + 1) % len,
        };
        driver.describe(queue, true, index, descriptor);
        let descriptor = Descriptor {
            next: (first + descriptor.next) % 64,
            ..descriptor
        };
        driver.describe(queue, false, (first + index) % 64, descriptor);
    }
    driver.offer(queue, first);
    driver.kick(queue);
}
