//! A guest that drives a virtio-blk and a virtio-rng on one bus.
//!
//! | part | what |
//! |---|---|
//! | here | the machine, its domain, and what a driver writes, right or wrong |
//! | `check` | what must hold of the queues, of RAM and of the image at any time |
//! | `polite` | a driver that does everything right, which must always be served again |
//!
//! Offsets and numbers are those of virtio 1.2, sections 2.7 (split rings), 4.1 (PCI) and 5.2 (disk).
#![forbid(unsafe_code)]

mod check;
mod polite;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_vpci::mem::GuestRam;
use vm_vpci::pviommu::IommuMode;

use crate::guest::{Guest, TABLES};
use crate::input::{Device as DeviceId, Domain, Made};
use crate::machine::{Device, Function, Machine, ram};

/// The only bus, and its number when it is plugged in.
const BUS: usize = 0;
const BUS_NUMBER: u16 = 1;
const PAGE: u64 = 4096;

/// GPA of the pages that the devices are given: those of the rings and [`PAGES`] in all.
pub const ARENA: u64 = 0xc_0000;
/// Pages of it that the domain maps to begin with.
pub const PAGES: u64 = 0x20;
/// GPA of the pages for data.
pub const DATA: u64 = 0xd_0000;
/// GPA of two pages that the domain never maps.
pub const SECRET: u64 = 0xe_0000;
/// GPA of request headers and status bytes.
pub const HEADERS: u64 = 0xc_c000;
/// GPA of the rings of the first queue. Those of the next are [`RING_STRIDE`] on.
const RINGS: u64 = ARENA;
const RING_STRIDE: u64 = 4 * PAGE;
/// What the domain adds to a GPA to make the address that a device uses.
pub const IOVA: u64 = 0x4000_0000;
/// The domain of the functions that are behind the pvIOMMU.
const DOMAIN: Domain = Domain(1 << 32 | 1);
/// Fills the secret pages; no other step of an input writes such bytes, but by a miracle.
const MARK: [u8; 8] = [0x5e, 0xc2, 0xe7, 0x0d, 0xa7, 0xa0, 0xf1, 0x9b];
/// Sectors of the disk at first.
const SECTORS: u64 = 16;
/// Bytes of a sector.
const SECTOR: usize = 512;
/// Descriptor flags: another one follows; the device writes; the buffer is a table.
pub const NEXT: u16 = 1;
/// See [`NEXT`].
pub const WRITE: u16 = 2;
/// See [`NEXT`].
pub const INDIRECT: u16 = 4;

/// Registers of the common configuration.
pub mod register {
    /// 32 bits.
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    /// 32 bits.
    pub const DEVICE_FEATURE: u64 = 4;
    /// 32 bits.
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    /// 32 bits.
    pub const DRIVER_FEATURE: u64 = 0xc;
    /// 16 bits.
    pub const CONFIG_VECTOR: u64 = 0x10;
    /// 8 bits.
    pub const STATUS: u64 = 0x14;
    /// 16 bits.
    pub const QUEUE_SELECT: u64 = 0x16;
    /// 16 bits.
    pub const QUEUE_SIZE: u64 = 0x18;
    /// 16 bits.
    pub const QUEUE_VECTOR: u64 = 0x1a;
    /// 16 bits.
    pub const QUEUE_ENABLE: u64 = 0x1c;
    /// 64 bits each: descriptor table, available ring, used ring.
    pub const QUEUE_AREAS: [u64; 3] = [0x20, 0x28, 0x30];
    /// Offset in BAR 0 of the doorbells, four bytes a queue.
    pub const DOORBELLS: u64 = 0x3000;
}

/// A queue: its function, and its number there.
#[derive(Debug, Clone, Copy)]
pub struct Queue {
    number: usize,
}

impl Queue {
    /// Any number is one of a queue that there is: two of the disk, one of the source of entropy.
    pub fn new(number: u8) -> Self {
        Self {
            number: usize::from(number) % 3,
        }
    }

    fn all() -> [Self; 3] {
        [0, 1, 2].map(Self::new)
    }

    /// Function number.
    pub fn function(self) -> u8 {
        u8::from(self.is_entropy())
    }

    /// True for that of the source of entropy.
    pub fn is_entropy(self) -> bool {
        self.number == 2
    }

    /// Number of the queue in its function.
    pub fn index(self) -> u16 {
        self.number as u16 % 2
    }

    /// Entries that the guest gives it.
    fn size(self) -> u16 {
        64
    }

    /// GPAs of the descriptor table, the available and the used ring, and a page for an indirect
    /// table.
    pub fn areas(self) -> [u64; 4] {
        let first = RINGS + self.number as u64 * RING_STRIDE;
        [0, 1, 2, 3].map(|page| first + page * PAGE)
    }

    /// Where request headers of this queue lie, and 16 bytes further its status bytes.
    pub fn header(self) -> u64 {
        HEADERS + self.number as u64 * 64
    }
}

/// A descriptor, with the address that the device is told.
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    /// Address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// Flags.
    pub flags: u16,
    /// The next one.
    pub next: u16,
}

/// How the machine is made.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// The functions are behind the pvIOMMU.
    pub iommu: bool,
    /// They are in a domain with tables; in the default domain otherwise.
    pub paged: bool,
    /// The disk is read-only.
    pub readonly: bool,
}

/// A guest with its two functions.
#[derive(Debug)]
pub struct Driver {
    /// The guest.
    pub guest: Guest,
    shape: Shape,
    image: Arc<File>,
    sectors: u64,
    /// Functions in the domain.
    attached: [bool; 2],
    /// A function was in the default domain, from where it reaches everything.
    was_free: bool,
    /// No buffer or table that a device was given overlaps the rings.
    clean: bool,
    /// Pages of the arena that the domain has not let the devices write since the last flush.
    protected: u64,
}

/// A disk image without a name, whose sectors differ.
fn image() -> Arc<File> {
    let file = memfd_create("disk", MemfdFlags::CLOEXEC).expect("the host has memory");
    let file = File::from(file);
    file.write_all_at(&contents(), 0)
        .expect("the host has memory");
    Arc::new(file)
}

fn contents() -> Vec<u8> {
    (1..=SECTORS as u8).flat_map(|n| [n; SECTOR]).collect()
}

impl Driver {
    /// A guest that has brought its devices up.
    pub fn new(shape: Shape) -> Self {
        let image = image();
        let mode = match shape.iommu {
            true => IommuMode::On,
            false => IommuMode::Off,
        };
        let disk = Device::Disk {
            image: image.clone(),
            readonly: shape.readonly,
        };
        let functions = [(0, disk), (1, Device::Entropy)];
        let functions = functions.map(|(number, device)| Function {
            number,
            mode,
            device,
        });
        let mut machine = Machine::new(ram());
        machine
            .plug_functions(BUS_NUMBER, functions.into())
            .expect("a bus");
        let mut driver = Self {
            guest: Guest::new(machine),
            shape: Shape {
                paged: shape.paged && shape.iommu,
                ..shape
            },
            image,
            sectors: SECTORS,
            attached: [false; 2],
            was_free: false,
            clean: false,
            protected: 0,
        };
        driver.guest.bring_up();
        driver.make_domain();
        driver.restart(u64::MAX);
        driver
    }

    fn ram(&self) -> &GuestRam {
        self.guest.ram()
    }

    /// GPA of a register of BAR 0.
    fn bar(function: u8, offset: u64) -> u64 {
        Guest::bar(BUS, function % 2) + offset
    }

    /// The address at which a function sees a page of the arena.
    pub fn seen(&self, function: u8, gpa: u64) -> u64 {
        if self.attached[usize::from(function % 2)] {
            gpa + IOVA
        } else {
            gpa
        }
    }

    /// A load of the guest, which may hit nothing.
    ///
    /// # Panics
    ///
    /// If it is answered although nobody claims it, or beyond its width.
    pub fn read(&self, function: u8, offset: u64, width: usize) -> u64 {
        let gpa = Self::bar(function, offset);
        let mut bytes = [0x5a; 8];
        let partition = &self.guest.machine.partition;
        let claimed = partition.mmio_read(gpa, &mut bytes[..width]);
        let untouched = bytes[..width].iter().all(|byte| *byte == 0x5a);
        assert!(claimed || untouched, "{gpa:#x}: answered by nobody");
        assert!(bytes[width..].iter().all(|byte| *byte == 0x5a));
        bytes[width..].fill(0);
        u64::from_le_bytes(bytes)
    }

    /// A store of the guest, which may hit nothing.
    pub fn write(&self, function: u8, offset: u64, width: usize, value: u64) {
        let gpa = Self::bar(function, offset);
        let bytes = value.to_le_bytes();
        let _ = self
            .guest
            .machine
            .partition
            .mmio_write(gpa, &bytes[..width]);
    }

    /// Rings a queue's doorbell.
    pub fn kick(&self, queue: Queue) {
        let offset = register::DOORBELLS + u64::from(queue.index()) * 4;
        self.write(queue.function(), offset, 2, queue.index().into());
    }

    /// Bus mastering and decoding of a function.
    pub fn command(&self, function: u8, command: u16) {
        self.guest.set_command(BUS, function % 2, command);
    }

    // The domain.

    fn call(&self, call: &Made) -> u64 {
        let (control, input) = call.encode(&[]);
        let result = self.guest.memory_call(0, control, &input);
        result.expect("the hypercall page is enabled")
    }

    fn must(&self, call: &Made) {
        assert_eq!(self.call(call), 0, "{call:x?}");
    }

    /// Tables, a domain of them, and both functions in it.
    fn make_domain(&mut self) {
        self.ram()
            .write(SECRET, &MARK.repeat(2 * PAGE as usize / 8))
            .expect("RAM");
        if !self.shape.paged {
            return;
        }
        for level in 0..3 {
            let table = TABLES + level * PAGE;
            let index = IOVA >> (39 - 9 * level) & 511;
            let entry = (table + PAGE) | 0x27;
            let ram = self.ram();
            ram.store_u64(table + index * 8, entry, Ordering::SeqCst)
                .expect("RAM");
        }
        let root = crate::values::Gpa(TABLES);
        let flags = crate::values::Small(1);
        self.must(&Made::Create(DOMAIN));
        self.must(&Made::Configure {
            domain: DOMAIN,
            flags,
            root,
        });
        self.map_all();
        for function in [0, 1] {
            self.move_to(function, true);
        }
        assert_eq!(self.attached, [true; 2]);
    }

    /// All pages of the arena but the secret ones, as at first.
    fn map_all(&mut self) {
        if self.shape.paged {
            for page in 0..PAGES {
                self.map(page as u8, 3, false);
            }
            self.flush();
        }
    }

    /// Maps a page of the arena to itself: bit 0 of `access` readable, bit 1 writable as well.
    pub fn map(&mut self, page: u8, access: u8, flush: bool) {
        if !self.shape.paged {
            return;
        }
        let page = u64::from(page) % PAGES;
        let gpa = ARENA + page * PAGE;
        // Present, writable, user; and no entry at all.
        let bits = [0, 5, 0, 7][usize::from(access) % 4];
        let entry = if bits == 0 { 0 } else { gpa | bits };
        let at = TABLES + 3 * PAGE + (gpa + IOVA) / PAGE % 512 * 8;
        self.ram()
            .store_u64(at, entry, Ordering::SeqCst)
            .expect("RAM");
        if bits == 7 {
            self.protected &= !(1 << page);
        } else if page < (DATA - ARENA) / PAGE {
            // The rings are not where the queue was told.
            self.clean = false;
        }
        if flush {
            self.flush();
        }
    }

    /// Flushes the domain.
    pub fn flush(&mut self) {
        if !self.shape.paged {
            return;
        }
        self.must(&Made::Flush(DOMAIN));
        self.protected = 3 << PAGES;
        for page in 0..PAGES {
            let at = TABLES + 3 * PAGE + (ARENA + IOVA + page * PAGE) / PAGE % 512 * 8;
            let entry = self.ram().load_u64(at, Ordering::SeqCst).expect("RAM");
            self.protected |= u64::from(entry & 3 != 3) << page;
        }
    }

    /// Moves a function into the domain or out of it.
    pub fn move_to(&mut self, function: u8, domain: bool) {
        let function = function % 2;
        if !self.shape.paged || self.attached[usize::from(function)] == domain {
            return;
        }
        let id = DeviceId(u64::from(BUS_NUMBER) << 16 | 0xab78 | u64::from(function));
        let call = match domain {
            true => Made::Attach(DOMAIN, id),
            false => Made::Detach(id),
        };
        self.must(&call);
        self.attached[usize::from(function)] = domain;
        self.was_free |= !domain;
    }

    // The rings.

    /// Writes a descriptor into a queue's table, or into its indirect one.
    pub fn describe(&mut self, queue: Queue, indirect: bool, index: u16, descriptor: Descriptor) {
        let [table, .., indirect_table] = queue.areas();
        let table = if indirect { indirect_table } else { table };
        let Descriptor {
            address,
            len,
            flags,
            next,
        } = descriptor;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = table + u64::from(index) % 256 * 16;
        self.ram().write(at, &bytes).expect("RAM");
        let end = address.saturating_add(len.into());
        let overlaps = |base: u64| address < base + 3 * RING_STRIDE && base < end;
        let is_written = flags & WRITE != 0 && (overlaps(RINGS) || overlaps(RINGS + IOVA));
        let tables = Queue::all().map(|queue| queue.areas()[3]);
        let is_table = tables.contains(&address) || tables.contains(&address.wrapping_sub(IOVA));
        if is_written || flags & INDIRECT != 0 && !is_table {
            self.clean = false;
        }
    }

    /// Available index of a queue, as the guest left it.
    fn available(&self, queue: Queue) -> u16 {
        let mut bytes = [0; 2];
        self.ram()
            .read(queue.areas()[1] + 2, &mut bytes)
            .expect("RAM");
        u16::from_le_bytes(bytes)
    }

    /// Makes a head available.
    pub fn offer(&self, queue: Queue, head: u16) {
        let index = self.available(queue);
        let slot = u64::from(index % queue.size());
        let at = queue.areas()[1] + 4 + 2 * slot;
        self.ram().write(at, &head.to_le_bytes()).expect("RAM");
        self.jump(queue, 1);
    }

    /// Moves the available index.
    pub fn jump(&self, queue: Queue, by: u16) {
        let index = self.available(queue).wrapping_add(by);
        let at = queue.areas()[1] + 2;
        self.ram().write(at, &index.to_le_bytes()).expect("RAM");
    }

    /// Flags of the available ring, or the used index at which the guest wants an interrupt.
    pub fn notify_at(&self, queue: Queue, event: bool, value: u16) {
        let at = match event {
            true => 4 + 2 * u64::from(queue.size()),
            false => 0,
        };
        let at = queue.areas()[1] + at;
        self.ram().write(at, &value.to_le_bytes()).expect("RAM");
    }

    /// Writes any bytes into the arena.
    pub fn fill(&mut self, gpa: u64, bytes: &[u8]) {
        let gpa = ARENA + gpa % (SECRET - ARENA);
        self.clean &= gpa >= DATA;
        let len = bytes.len().min((SECRET - gpa) as usize);
        self.ram().write(gpa, &bytes[..len]).expect("RAM");
    }

    /// A register of an area was written, or may have been.
    pub fn rings_may_move(&mut self) {
        self.clean = false;
    }

    /// The image gets another size, and the guest is told.
    pub fn resize(&mut self, sectors: u8) {
        if self.shape.readonly {
            return;
        }
        self.sectors = u64::from(sectors) % 32;
        let len = self.sectors * SECTOR as u64;
        self.image.set_len(len).expect("the host has memory");
        if let Some(disk) = &self.guest.machine.disk {
            disk.resize().expect("an image that can be measured");
        }
    }
}
