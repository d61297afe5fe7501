//! A guest's driver makes the nine calls, and devices do DMA behind them.
//!
//! Calls are written against the wire, with offsets from `docs/spec/pviommu.md`.
#![forbid(unsafe_code)]

mod calls;
mod dma;
mod lifecycle;
mod model;
mod reference;
mod stress;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::GuestAddress;

use super::*;
use crate::cpuid::Features;
use crate::device_id::LogicalDeviceId;
use crate::dma::{Dma, DmaPort};
use crate::hypercall::{CallRegisters, Dispatcher, Outcome};
use crate::mem::{GuestRam, RamMap};

pub(super) const SELF: u64 = u64::MAX;
/// Two functions behind the pvIOMMU, and one that is not.
pub(super) const A: u64 = 0x1234_ab78;
pub(super) const B: u64 = 0x9234_ab79;
pub(super) const OFF: u64 = 0x2000_0000;

pub(super) const CREATE: u16 = 0xb1;
pub(super) const ATTACH: u16 = 0xb2;
pub(super) const DETACH: u16 = 0xc4;
pub(super) const DELETE: u16 = 0xc5;
pub(super) const CONFIGURE: u16 = 0xce;
pub(super) const FLUSH: u16 = 0xd0;
pub(super) const FLUSH_LIST: u16 = 0xd1;
pub(super) const CAPABILITIES: u16 = 0x125;
pub(super) const PROPERTY: u16 = 0x127;

/// RAM: 4 MiB at 0, a hole of 4 MiB, 4 MiB in two adjoining regions.
pub(super) const HOLE: u64 = 0x40_0000;
pub(super) const SECOND: u64 = 0x80_0000;
pub(super) const RAM_END: u64 = 0xc0_0000;
const LISTS: u64 = 0x1000;
/// Page tables come from here on.
const TABLES: u64 = 0x10_0000;

/// P, RW, U, A on a table; D besides on a page.
pub(super) const TABLE: u64 = 0x27;
pub(super) const PAGE: u64 = 0x67;
pub(super) const READ_ONLY: u64 = 0x25;
pub(super) const LARGE: u64 = 0x80;

pub(super) struct Registers {
    pub(super) control: u64,
    pub(super) input: u64,
    pub(super) output: u64,
}

impl CallRegisters for Registers {
    fn cpl(&self) -> u8 {
        0
    }
    fn control(&self) -> u64 {
        self.control
    }
    fn input(&self) -> u64 {
        self.input
    }
    fn output(&self) -> u64 {
        self.output
    }
}

/// A function behind the pvIOMMU.
pub(super) struct Function {
    pub(super) port: Arc<DmaPort>,
    pub(super) dma: Dma,
}

pub(super) struct Bed {
    pub(super) ram: GuestRam,
    pub(super) iommu: Arc<PvIommu>,
    pub(super) calls: Dispatcher,
    pub(super) a: Function,
    pub(super) b: Function,
    next_table: u64,
}

pub(super) fn guest_ram() -> GuestRam {
    let ranges = [
        (GuestAddress(0), HOLE as usize),
        (GuestAddress(SECOND), 0x20_0000),
        (GuestAddress(SECOND + 0x20_0000), 0x20_0000),
    ];
    let map = RamMap::from_ranges(&ranges).expect("test RAM");
    GuestRam::new(&map)
}

pub(super) fn id(code: u64) -> LogicalDeviceId {
    LogicalDeviceId::from_domain_call(code).unwrap()
}

pub(super) fn plug(iommu: &PvIommu, ram: &GuestRam, code: u64, mode: IommuMode) -> Function {
    let port = DmaPort::behind_iommu(ram.clone(), iommu.port_settings(id(code)));
    port.set_master(true);
    iommu
        .add_device(id(code), mode, Some(port.clone()))
        .unwrap();
    Function {
        dma: Dma::new(port.clone()),
        port,
    }
}

impl Bed {
    pub(super) fn new() -> Self {
        Self::with(IommuConfig {
            max_domains: 4,
            max_functions: 4,
            ..IommuConfig::default()
        })
    }

    pub(super) fn with(config: IommuConfig) -> Self {
        Self::over(guest_ram(), config)
    }

    pub(super) fn over(ram: GuestRam, config: IommuConfig) -> Self {
        let iommu = PvIommu::new(config, ram.clone()).unwrap();
        let calls = Dispatcher::new(ram.clone(), Features::default())
            .with_group(Arc::new(IommuGroup::new(iommu.clone())));
        let a = plug(&iommu, &ram, A, IommuMode::On);
        let b = plug(&iommu, &ram, B, IommuMode::On);
        iommu.add_device(id(OFF), IommuMode::Off, None).unwrap();
        Self {
            ram,
            iommu,
            calls,
            a,
            b,
            next_table: TABLES,
        }
    }

    /// A call in memory form: status, elements done, output.
    pub(super) fn raw(&self, control: u64, input: &[u8]) -> (u16, u16, [u8; 24]) {
        // Like the driver: output right behind the input, in the same page.
        let output = LISTS + (input.len() as u64).next_multiple_of(8);
        self.ram.write(LISTS, input).unwrap();
        self.ram.write(output, &[0xee; 24]).unwrap();
        let mut registers = Registers {
            control,
            input: LISTS,
            output,
        };
        let result = loop {
            match self.calls.call(true, &mut registers) {
                Outcome::Complete { result } => break result,
                Outcome::Restart { control } => registers.control = control,
                other => panic!("{other:?}"),
            }
        };
        let mut bytes = [0; 24];
        self.ram.read(output, &mut bytes).unwrap();
        (result as u16, (result >> 32) as u16 & 0xfff, bytes)
    }

    pub(super) fn call(&self, code: u16, input: &[u8]) -> u16 {
        self.raw(code.into(), input).0
    }

    pub(super) fn create(&self, number: u32) -> u16 {
        self.call(CREATE, &[&domain(number)[..], &[0; 4]].concat())
    }

    pub(super) fn delete(&self, number: u32) -> u16 {
        self.call(DELETE, &domain(number))
    }

    pub(super) fn configure(&self, number: u32, flags: u64, root: u64) -> u16 {
        let tail = [flags.to_le_bytes(), root.to_le_bytes()].concat();
        self.call(CONFIGURE, &[&domain(number)[..], &tail].concat())
    }

    pub(super) fn attach(&self, number: u32, device: u64) -> u16 {
        self.call(
            ATTACH,
            &[&domain(number)[..], &device.to_le_bytes()].concat(),
        )
    }

    pub(super) fn detach(&self, device: u64) -> u16 {
        self.call(DETACH, &[SELF.to_le_bytes(), device.to_le_bytes()].concat())
    }

    pub(super) fn flush(&self, number: u32) -> u16 {
        self.call(FLUSH, &[&domain(number)[..], &[0; 8]].concat())
    }

    /// Status and elements done.
    pub(super) fn flush_list(&self, number: u32, elements: &[u64]) -> (u16, u16) {
        let mut input = [&domain(number)[..], &[1, 0, 0, 0, 0, 0, 0, 0]].concat();
        for element in elements {
            input.extend(element.to_le_bytes());
        }
        let control = u64::from(FLUSH_LIST) | (elements.len() as u64) << 32;
        let (status, done, _) = self.raw(control, &input);
        (status, done)
    }

    /// Unmaps as the driver does: the entry is cleared already.
    pub(super) fn flush_page(&self, number: u32, iova: u64) {
        assert_eq!(self.flush_list(number, &[iova & !0xfff]), (0, 1));
    }

    /// A zeroed page for a table.
    pub(super) fn table(&mut self) -> u64 {
        let gpa = self.next_table;
        self.next_table += 0x1000;
        // The last tables lie in the other region.
        if self.next_table == HOLE {
            self.next_table = SECOND + 0x20_0000;
        }
        self.ram.fill(gpa, 0x1000, 0).unwrap();
        gpa
    }

    pub(super) fn entry(&self, at: u64) -> u64 {
        self.ram.load_u64(at, Ordering::SeqCst).unwrap()
    }

    pub(super) fn set_entry(&self, at: u64, value: u64) {
        self.ram.store_u64(at, value, Ordering::SeqCst).unwrap();
    }

    /// Address of the entry of `level` for `iova`, making the tables on the way.
    pub(super) fn entry_at(&mut self, root: u64, levels: u32, level: u32, iova: u64) -> u64 {
        let mut table = root;
        let mut now = levels;
        loop {
            let at = table + (iova >> (12 + 9 * (now - 1)) & 0x1ff) * 8;
            if now == level {
                return at;
            }
            if self.entry(at) & 1 == 0 {
                let next = self.table();
                self.set_entry(at, next | TABLE);
            }
            table = self.entry(at) & 0x000f_ffff_ffff_f000;
            now -= 1;
        }
    }

    /// Maps a 4 KiB page in a table of 4 levels.
    pub(super) fn map(&mut self, root: u64, iova: u64, leaf: u64) {
        let at = self.entry_at(root, 4, 1, iova);
        self.set_entry(at, leaf);
    }

    /// A domain with a table of 4 levels, and its root.
    pub(super) fn paging_domain(&mut self, number: u32) -> u64 {
        let root = self.table();
        assert_eq!(self.create(number), 0);
        assert_eq!(self.configure(number, 1, root), 0);
        root
    }

    /// Domains and devices, without counters.
    pub(super) fn state(&self) -> (Vec<DomainReport>, Vec<DeviceReport>) {
        let mut report = self.iommu.report();
        for device in &mut report.devices {
            device.backend = BackendReport::default();
        }
        (report.domains, report.devices)
    }
}

/// `DeviceDomain` of a first-stage domain.
pub(super) fn domain(number: u32) -> [u8; 24] {
    domain_of(SELF, 0, u64::from(number) << 32 | 1)
}

pub(super) fn domain_of(partition: u64, vtl: u8, domain: u64) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&partition.to_le_bytes());
    bytes[8] = vtl;
    bytes[16..].copy_from_slice(&domain.to_le_bytes());
    bytes
}
