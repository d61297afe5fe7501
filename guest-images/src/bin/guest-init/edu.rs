//! QEMU's educational device (its `docs/specs/edu.rst`), driven by this program: no kernel has a
//! driver for it.

use crate::bounded::bounded;
use crate::disk::Latency;
use crate::interrupts;
use crate::ioctl::{DmaPage, PAGE};
use crate::moves::{self, Movable};
use crate::pci::Found;
use crate::system::{step, write_text};
use crate::vfio::{self, Interrupt, Iommu, User};
use anyhow::{Context, Result, bail};
use guest_images::pattern::mix;
use guest_images::report::{
    DmaOwner, DmaReport, DmaResult, DmaTest, EDU_COPIES, EDU_FACTORIAL_OF, EduReport, MoveReport,
    VectorCounts,
};
use rustix::mm::{MlockAllFlags, mlockall};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Limit of opening the device.
const OPEN_LIMIT: Duration = Duration::from_secs(60);
/// Longest that a job may take: a transfer is to take 100 ms.
const JOB_LIMIT: Duration = Duration::from_secs(5);

/// Registers.
mod register {
    pub(super) const ID: u64 = 0x00;
    pub(super) const LIVENESS: u64 = 0x04;
    pub(super) const FACTORIAL: u64 = 0x08;
    pub(super) const STATUS: u64 = 0x20;
    pub(super) const INTERRUPTS: u64 = 0x24;
    pub(super) const ACKNOWLEDGE: u64 = 0x64;
    pub(super) const SOURCE: u64 = 0x80;
    pub(super) const DESTINATION: u64 = 0x88;
    pub(super) const COUNT: u64 = 0x90;
    pub(super) const COMMAND: u64 = 0x98;
}
/// Bits of `STATUS`: a factorial is under way; it ends in an interrupt.
const COMPUTING: u32 = 0x01;
const INTERRUPT_AFTER: u32 = 0x80;
/// Bits of `COMMAND`.
const START: u64 = 1;
const TO_MEMORY: u64 = 2;
const INTERRUPT: u64 = 4;
/// The device's own memory, as it addresses it itself.
const OWN: u64 = 0x4_0000;

/// Bytes of a whole transfer: the end of a page stays as it was.
const COPY: usize = PAGE - 8;
/// What pages hold where no transfer may have reached.
const CANARY: u64 = 0xa5a5_a5a5_a5a5_a5a5;
const STALE_CANARY: u64 = 0xc3c3_c3c3_c3c3_c3c3;

/// Where pages are mapped, with an IOMMU: far from one another.
const SOURCE_IOVA: u64 = 0x1_0000_0000;
const DESTINATION_IOVA: u64 = 0x7f_ffff_f000;
const READ_ONLY_IOVA: u64 = 0x20_0000;
/// Where nothing is mapped: with an IOMMU of the guest, and without, beyond all of its memory.
const NEVER_IOVA: u64 = 0x30_0000;
const BEYOND_MEMORY: u64 = 0x40_0000_0000;

/// The device in this program's hands.
#[derive(Debug)]
pub(crate) struct Edu {
    function: Found,
    user: User,
    iommu: Iommu,
    report: EduReport,
}

impl Edu {
    /// Takes the device, and has it compute.
    pub(crate) fn open(function: &Found) -> Result<Self> {
        let address = function.address;
        step(format!("edu: take {address}"));
        let (group, iommu) = vfio::take(function)?;
        let open = move || User::open(&group, iommu, address, Interrupt::Msi);
        let user = bounded("edu: open", OPEN_LIMIT, open)?;
        let question = 0x1234_5678;
        user.store32(register::LIVENESS, question)?;
        let mut edu = Self {
            report: EduReport {
                address,
                id: user.load32(register::ID)?,
                alive: user.load32(register::LIVENESS)? == !question,
                factorial: 0,
                jobs: 0,
                interrupts: 0,
                max_latency_us: 0,
                moves: Vec::new(),
            },
            function: function.clone(),
            user,
            iommu,
        };
        edu.request()?;
        Ok(edu)
    }

    /// Moves its interrupt over `cpus`; gives the number of requests.
    pub(crate) fn move_over(&mut self, cpus: &[u32], list: &mut Vec<MoveReport>) -> Result<u64> {
        moves::over(self, cpus, list)
    }

    /// Gives the device back to nobody.
    pub(crate) fn close(mut self, moves: Vec<MoveReport>) -> Result<EduReport> {
        self.report.interrupts += self.user.interrupts()?;
        self.report.moves = moves;
        drop(self.user);
        vfio::release(self.report.address)?;
        Ok(self.report)
    }

    /// Starts something, waits for its interrupt and acknowledges that.
    fn job(&mut self, what: &str, start: impl FnOnce(&User) -> Result<()>) -> Result<()> {
        let mut latency = Latency {
            max_us: self.report.max_latency_us,
        };
        self.report.jobs += 1;
        let user = &self.user;
        let count = latency.of(|| {
            start(user)?;
            user.wait(what, JOB_LIMIT)
        })?;
        self.report.interrupts += count;
        self.report.max_latency_us = latency.max_us;
        let pending = user.load32(register::INTERRUPTS)?;
        user.store32(register::ACKNOWLEDGE, pending)?;
        Ok(())
    }

    /// Moves `length` bytes between memory and the start of the device's own.
    fn transfer(&mut self, address: u64, length: usize, to_memory: bool) -> Result<()> {
        let way = if to_memory { "to" } else { "from" };
        step(format!("edu: {length} bytes {way} {address:#x}"));
        self.job("transfer", |user| {
            let (source, destination, command) = match to_memory {
                true => (OWN, address, START | TO_MEMORY | INTERRUPT),
                false => (address, OWN, START | INTERRUPT),
            };
            user.store_whole64(register::SOURCE, source)?;
            user.store_whole64(register::DESTINATION, destination)?;
            user.store_whole64(register::COUNT, length as u64)?;
            Ok(user.store32(register::COMMAND, command as u32)?)
        })?;
        if self.user.load32(register::COMMAND)? & START as u32 != 0 {
            bail!("the device interrupted before its transfer was over");
        }
        Ok(())
    }

    /// DMA in order, and with `stray` DMA that must not reach memory.
    pub(crate) fn dma(&mut self, stray: bool) -> Result<Vec<DmaReport>> {
        let memory = Memory::new(&self.user, self.iommu)?;
        let mut results = Vec::new();
        let address = self.report.address;
        let mut put = |test, length, iova, intact| {
            results.push(DmaReport {
                address,
                owner: DmaOwner::User,
                test,
                result: DmaResult {
                    error: 0,
                    moved: length as u64,
                    fault: 0,
                    iova,
                    intact,
                },
            });
        };
        // Each length with contents of its own.
        const COPIES: [(u64, usize); EDU_COPIES] = [(1, 8), (2, PAGE / 2), (3, COPY)];
        for (seed, length) in COPIES {
            memory.source.fill_with(|index| mix(seed << 32 | index));
            memory.destination.fill(CANARY);
            self.transfer(memory.source_at, length, false)?;
            self.transfer(memory.destination_at, length, true)?;
            let expected = |index| match (index as usize) < length / 8 {
                true => mix(seed << 32 | index),
                false => CANARY,
            };
            let source = memory.source.holds_what(|index| mix(seed << 32 | index));
            let intact = source && memory.destination.holds_what(expected) && memory.stays()?;
            put(DmaTest::Copy, length, memory.destination_at, intact);
        }
        if !stray {
            memory.unmap(&self.user)?;
            return Ok(results);
        }
        let source = || memory.source.holds_what(|index| mix(3 << 32 | index));
        memory.destination.fill(CANARY);
        self.transfer(memory.never_at, COPY, true)?;
        let intact = source() && memory.destination.holds(CANARY);
        put(DmaTest::StrayWrite, 0, memory.never_at, intact);
        self.transfer(memory.never_at, COPY, false)?;
        let intact = source() && memory.destination.holds(CANARY);
        put(DmaTest::StrayRead, 0, memory.never_at, intact);
        if self.iommu == Iommu::Type1 {
            let page = DmaPage::leak(STALE_CANARY);
            self.user.map(READ_ONLY_IOVA, page, false)?;
            // Filled anew: what a stray read left there is the device's business.
            self.transfer(memory.source_at, COPY, false)?;
            self.transfer(READ_ONLY_IOVA, COPY, true)?;
            put(
                DmaTest::ReadOnly,
                0,
                READ_ONLY_IOVA,
                page.holds(STALE_CANARY),
            );
            self.user.unmap(READ_ONLY_IOVA)?;
            self.user.unmap(memory.destination_at)?;
            self.transfer(memory.destination_at, COPY, true)?;
            let intact = source() && memory.destination.holds(CANARY);
            put(DmaTest::Stale, 0, memory.destination_at, intact);
            self.user.unmap(memory.source_at)?;
        }
        Ok(results)
    }
}

impl Movable for Edu {
    fn vector(&self) -> Result<VectorCounts> {
        let mut vectors = interrupts::vectors(&self.function)?.into_iter();
        let found = vectors.find(|vector| vector.index == 0);
        found.with_context(|| format!("{}: no interrupt", self.function.address))
    }

    /// A factorial.
    fn request(&mut self) -> Result<()> {
        self.job("factorial", |user| {
            user.store32(register::STATUS, INTERRUPT_AFTER)?;
            Ok(user.store32(register::FACTORIAL, EDU_FACTORIAL_OF)?)
        })?;
        if self.user.load32(register::STATUS)? & COMPUTING != 0 {
            bail!("the device interrupted before its factorial was computed");
        }
        self.report.factorial = self.user.load32(register::FACTORIAL)?;
        Ok(())
    }
}

/// Two pages, and where the device reaches them.
struct Memory {
    source: &'static DmaPage,
    destination: &'static DmaPage,
    source_at: u64,
    destination_at: u64,
    never_at: u64,
    iommu: Iommu,
}

impl Memory {
    fn new(user: &User, iommu: Iommu) -> Result<Self> {
        let (source, destination) = (DmaPage::leak(0), DmaPage::leak(CANARY));
        let (source_at, destination_at, never_at) = match iommu {
            Iommu::Type1 => {
                user.map(SOURCE_IOVA, source, false)?;
                user.map(DESTINATION_IOVA, destination, true)?;
                (SOURCE_IOVA, DESTINATION_IOVA, NEVER_IOVA)
            }
            Iommu::None => {
                keep_pages_in_place()?;
                let (source, destination) = (physical(source)?, physical(destination)?);
                (source, destination, BEYOND_MEMORY)
            }
        };
        Ok(Self {
            source,
            destination,
            source_at,
            destination_at,
            never_at,
            iommu,
        })
    }

    /// Whether the pages are still where they were.
    fn stays(&self) -> Result<bool> {
        Ok(match self.iommu {
            Iommu::Type1 => true,
            Iommu::None => {
                physical(self.source)? == self.source_at
                    && physical(self.destination)? == self.destination_at
            }
        })
    }

    fn unmap(&self, user: &User) -> Result<()> {
        if self.iommu == Iommu::Type1 {
            user.unmap(self.source_at)?;
            user.unmap(self.destination_at)?;
        }
        Ok(())
    }
}

/// Has the kernel leave this program's pages where they are: no swap, no compaction, no gathering
/// into huge pages.
fn keep_pages_in_place() -> Result<()> {
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE).context("mlockall")?;
    write_text("/proc/sys/vm/compact_unevictable_allowed", "0")?;
    write_text("/sys/kernel/mm/transparent_hugepage/enabled", "never")
}

/// Physical address of a page (`Documentation/admin-guide/mm/pagemap.rst`).
fn physical(page: &'static DmaPage) -> Result<u64> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let path = "/proc/self/pagemap";
    let file = File::open(path).context(path)?;
    let mut entry = [0; 8];
    let index = std::ptr::from_ref(page).addr() / PAGE;
    file.read_exact_at(&mut entry, index as u64 * 8)
        .context(path)?;
    let entry = u64::from_le_bytes(entry);
    if entry & PRESENT == 0 || entry & FRAME == 0 {
        bail!("{path}: a page has no address");
    }
    Ok((entry & FRAME) * PAGE as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_in_use_has_a_physical_address_where_the_kernel_tells_it() {
        let page = DmaPage::leak(1);
        match physical(page) {
            Ok(address) => assert_eq!(address % PAGE as u64, 0),
            // Hidden from programs without rights.
            Err(error) => assert!(error.to_string().contains("no address"), "{error:#}"),
        }
    }
}
