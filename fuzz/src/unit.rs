//! A pvIOMMU alone, with the DMA ports of three functions, and a plain walk of tables to compare
//! it with.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use arbitrary::Arbitrary;
use vm_vpci::cpuid::Features;
use vm_vpci::device_id::LogicalDeviceId;
use vm_vpci::dma::{Access, Dma, DmaPort};
use vm_vpci::hypercall::{Dispatcher, Outcome};
use vm_vpci::mem::GuestRam;
use vm_vpci::pviommu::{
    DomainName, IommuConfig, IommuGroup, IommuMode, Levels, PvIommu, Translation,
};

use crate::guest::{INPUT, OUTPUT, Registers};
use crate::input::{Made, TableChange};
use crate::values::{Iova, Spoil};

const PAGE: u64 = 4096;
/// Present, writable, user, large.
const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const PS: u64 = 0x80;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Addresses of messages, which are not translated.
const MESSAGES: std::ops::Range<u64> = 0xfee0_0000..0xfef0_0000;

/// A function behind the pvIOMMU.
#[derive(Debug)]
struct Function {
    id: LogicalDeviceId,
    mode: IommuMode,
    port: Arc<DmaPort>,
    dma: Dma,
}

/// What happens to the unit.
#[derive(Debug, Clone, Arbitrary)]
pub enum Step {
    /// An entry of a table changes.
    Table(TableChange),
    /// The same, once more.
    Entry(TableChange),
    /// A call.
    Call(Made, Spoil),
    /// An access of a function, of which nothing is known unless all was flushed right before.
    Dma {
        /// The function.
        function: u8,
        /// Where.
        iova: Iova,
        /// How many bytes.
        len: u16,
        /// A write.
        write: bool,
        /// All domains are flushed before.
        flushed: bool,
    },
    /// Several accesses under one guard.
    Session(u8, Vec<(Iova, u16)>),
    /// Bus mastering.
    Master(u8, bool),
    /// GUEST_OS_ID is cleared.
    GuestGone,
    /// A function's bus enters D0.
    PowerOn(u8),
    /// Save and restore.
    Restore,
    /// Reset.
    Reset,
}

/// The unit.
#[derive(Debug)]
pub struct Unit {
    ram: GuestRam,
    iommu: Arc<PvIommu>,
    calls: Dispatcher,
    functions: Vec<Function>,
}

impl Default for Unit {
    fn default() -> Self {
        Self::new()
    }
}

impl Unit {
    /// A unit as after power-on.
    pub fn new() -> Self {
        let ram = crate::machine::ram();
        let config = IommuConfig {
            max_domains: 4,
            max_functions: 4,
            iotlb_entries: 16,
            five_levels: true,
            ..IommuConfig::default()
        };
        let iommu = PvIommu::new(config, ram.clone()).expect("such a pvIOMMU");
        let calls = Dispatcher::new(ram.clone(), Features::default())
            .with_group(Arc::new(IommuGroup::new(iommu.clone())));
        let modes = [
            IommuMode::On,
            IommuMode::On,
            IommuMode::BlockedUntilAttached,
        ];
        let functions = (0..).zip(modes).map(|(number, mode)| {
            let id = LogicalDeviceId::new(&crate::machine::instance(1), number);
            let port = DmaPort::behind_iommu(ram.clone(), iommu.port_settings(id));
            port.set_master(true);
            let added = iommu.add_device(id, mode, Some(port.clone()));
            added.expect("room for it");
            Function {
                id,
                mode,
                dma: Dma::new(port.clone()),
                port,
            }
        });
        Self {
            functions: functions.collect(),
            ram,
            iommu,
            calls,
        }
    }

    fn function(&self, number: u8) -> &Function {
        &self.functions[usize::from(number) % self.functions.len()]
    }

    /// Does a step.
    ///
    /// # Panics
    ///
    /// If DMA goes elsewhere than the tables lead.
    pub fn apply(&mut self, step: &Step) {
        match step {
            Step::Table(change) | Step::Entry(change) => change.change(&self.ram),
            Step::Call(call, spoil) => {
                let (control, input) = call.encode(&[]);
                let mut input = spoil.apply(input);
                input.truncate(PAGE as usize);
                self.ram.write(INPUT, &input).expect("RAM");
                self.call(control);
            }
            Step::Dma {
                function,
                iova,
                len,
                write,
                flushed,
            } => {
                let len = usize::from(*len);
                if *flushed {
                    self.checked(*function, iova.0, len, *write);
                } else {
                    self.access(*function, iova.0, len, *write);
                }
            }
            Step::Session(function, accesses) => {
                let _ = self.function(*function).dma.session(|view| {
                    use vm_memory::{Bytes, GuestAddress};
                    for (iova, len) in accesses {
                        let mut buffer = vec![0; usize::from(*len) % 512];
                        let _ = view.read_slice(&mut buffer, GuestAddress(iova.0));
                        let _ = view.write_slice(&buffer, GuestAddress(iova.0 ^ PAGE));
                    }
                });
            }
            Step::Master(function, on) => self.function(*function).port.set_master(*on),
            Step::GuestGone => self.iommu.guest_gone(),
            Step::PowerOn(function) => self.iommu.power_on(self.function(*function).id),
            Step::Restore => {
                let saved = self.iommu.save();
                let restored = self.iommu.restore(&saved);
                restored.expect("what was saved");
                assert_eq!(self.iommu.save(), saved);
            }
            Step::Reset => self.iommu.reset(),
        }
    }

    fn call(&self, control: u64) {
        let mut registers = Registers {
            cpl: 0,
            control,
            rdx: INPUT,
            r8: OUTPUT,
            xmm: None,
        };
        while let Outcome::Restart { control } = self.calls.call(true, &mut registers) {
            assert_ne!(registers.control, control, "no progress");
            registers.control = control;
        }
    }

    /// An access; true if it went through. A read gets the bytes.
    fn access(&self, function: u8, iova: u64, len: usize, write: bool) -> Option<Vec<u8>> {
        let dma = &self.function(function).dma;
        let mut buffer = vec![0xd6; len];
        let done = match write {
            true => dma.write(iova, &buffer),
            false => dma.read(iova, &mut buffer),
        };
        done.ok().map(|()| buffer)
    }

    /// An access inside a page, which goes where the tables lead.
    fn checked(&self, function: u8, iova: u64, len: usize, write: bool) {
        let len = 1 + len % 64;
        let len = len.min((PAGE - iova % PAGE) as usize);
        let flushed = self.iommu.flush(DomainName::Default);
        flushed.expect("there is a default domain");
        for domain in self.iommu.save().domains {
            let flushed = self.iommu.flush(DomainName::FirstStage(domain.number));
            flushed.expect("the domain is there");
        }
        let access = if write { Access::Write } else { Access::Read };
        let expected = self.expected(function, iova, len as u64, access);
        let got = self.access(function, iova, len, write);
        let what = (function, iova, len, access);
        assert_eq!(
            expected.is_some(),
            got.is_some(),
            "{what:x?}: {expected:x?}"
        );
        if let (Some(gpa), Some(bytes)) = (expected, got) {
            let mut there = vec![0; len];
            self.ram.read(gpa, &mut there).expect("RAM");
            // A read may meet the very entries that it marks as accessed; those are marked by now.
            assert_eq!(there, bytes, "{what:x?} at {gpa:#x}");
        }
    }

    /// Where an access inside a page goes.
    fn expected(&self, function: u8, iova: u64, len: u64, access: Access) -> Option<u64> {
        let Function { id, mode, port, .. } = self.function(function);
        let saved = self.iommu.save();
        let device = saved.devices.iter().find(|saved| saved.id == id.code());
        let device = device.expect("it is behind the pvIOMMU");
        if !port.is_master() || device.held || MESSAGES.contains(&iova) {
            return None;
        }
        let domain = saved
            .domains
            .iter()
            .find(|saved| saved.number == device.domain);
        let translation = match domain {
            None if *mode == IommuMode::BlockedUntilAttached => Translation::Blocked,
            None => Translation::Identity,
            Some(domain) => domain.translation.unwrap_or(Translation::Blocked),
        };
        let gpa = match translation {
            Translation::Identity => iova,
            Translation::Blocked => return None,
            Translation::Paged(table) => self.walk(table.root, table.levels, iova, access)?,
        };
        self.ram.is_ram(gpa, len).then_some(gpa)
    }

    fn walk(&self, root: u64, levels: Levels, iova: u64, access: Access) -> Option<u64> {
        if iova >> levels.width() != 0 {
            return None;
        }
        let mut table = root;
        for level in (1..=levels.count()).rev() {
            let shift = 12 + 9 * (level - 1);
            let at = table + (iova >> shift) % 512 * 8;
            let entry = self.ram.load_u64(at, Ordering::SeqCst).ok()?;
            let leaf = level == 1 || entry & PS != 0;
            let inside = (1 << shift) - 1;
            let possible = entry & P != 0
                && entry & US != 0
                && (access == Access::Read || entry & RW != 0)
                && (!leaf || level <= 3 && entry & ADDRESS & inside == 0);
            if !possible {
                return None;
            }
            if leaf {
                return Some(entry & ADDRESS | iova & inside);
            }
            table = entry & ADDRESS;
        }
        None
    }
}
