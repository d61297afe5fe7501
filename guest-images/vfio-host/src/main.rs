//! What the DMA of a host's device reaches, in each domain and on each way between two, without a
//! guest: the layer `vfio` of the library on the real kernel, with `edu` devices doing the DMA.
//!
//! `vfio-host INTERFACE ADDRESS [SHARED SHARED]`: `type1` or `iommufd`, an `edu` in a group of its own,
//! and two that share one. Prints a line for each thing that was found to hold. Exit status: 0 if all
//! held, 1 if not, 2 for a wrong command line.

#![forbid(unsafe_code)]

mod edu;
mod paging;

use std::env;
use std::error::Error;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::GuestAddress;
use vm_vpci::backend::{AddressSpace, PagedBackend, Permissions, SpaceError};
use vm_vpci::mem::{GuestRam, RamMap};
use vm_vpci::pviommu::{Attachment, DeviceBackend, Levels, PageTable, Translation};
use vm_vpci::vfio::{Interface, MSI_IRQ, VfioDma, VfioError, VfioHost};

use edu::{Edu, IDENTIFICATION, LEN};
use paging::Given;

const MIB: usize = 1 << 20;
/// Pages of guest RAM that the tests use: what a device reads, and what it writes.
const SOURCE: u64 = 0x1_0000;
const TARGET: u64 = 0x2_0000;
/// The last page of the first region, and the first of the next.
const EDGE: u64 = 0xf_f000;
/// Where a domain has them.
const IOVA: u64 = 0x400_0000;
const READ: Permissions = Permissions::READ;
const WRITE: Permissions = Permissions::WRITE;
const BLOCKED: Attachment = translated(0, Translation::Blocked);
/// Limit of a container.
const ENTRIES: u64 = 65535;

const fn translated(domain: u32, translation: Translation) -> Attachment {
    let mut attachment = Attachment::DEFAULT;
    attachment.domain = domain;
    attachment.translation = translation;
    attachment
}

/// The domain whose table has this root.
const fn paged(domain: u32, root: u64) -> Attachment {
    let levels = Levels::Four;
    translated(domain, Translation::Paged(PageTable { root, levels }))
}

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// What has held so far.
#[derive(Debug, Default)]
struct Steps(u32);

impl Steps {
    fn hold(&mut self, what: &str, holds: bool) -> Result {
        if !holds {
            return Err(what.into());
        }
        self.0 += 1;
        println!("ok {:2} {what}", self.0);
        Ok(())
    }
}

fn main() -> ExitCode {
    let words: Vec<_> = env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let (interface, own, shared) = match words[..] {
        ["type1", own] => (Interface::Type1, own, None),
        ["iommufd", own] => (Interface::Iommufd, own, None),
        ["type1", own, a, b] => (Interface::Type1, own, Some([a, b])),
        ["iommufd", own, a, b] => (Interface::Iommufd, own, Some([a, b])),
        _ => {
            eprintln!("usage: vfio-host type1|iommufd ADDRESS [SHARED SHARED]");
            return ExitCode::from(2);
        }
    };
    let mut steps = Steps::default();
    match run(interface, own, shared, &mut steps) {
        Ok(()) => {
            println!("vfio-host: {} steps held by {interface:?}", steps.0);
            ExitCode::SUCCESS
        }
        Err(what) => {
            println!("vfio-host: FAILED behind step {}: {what}", steps.0);
            ExitCode::FAILURE
        }
    }
}

fn run(interface: Interface, own: &str, shared: Option<[&str; 2]>, steps: &mut Steps) -> Result {
    let bed = Bed::new(interface)?;
    let device = bed.open(own)?;
    bed.device(&device, steps)?;
    bed.domains(&device, steps)?;
    bed.spaces(&device, steps)?;
    drop(device);
    bed.again(own, steps)?;
    if let Some(shared) = shared {
        bed.group(shared, steps)?;
    }
    for mib in [64, 128, 256] {
        cost(interface, own, mib)?;
    }
    Ok(())
}

/// A VM without a guest.
struct Bed {
    interface: Interface,
    ram: GuestRam,
    host: Arc<VfioHost>,
    paging: Arc<Given>,
}

impl Bed {
    fn new(interface: Interface) -> Result<Self> {
        // Two regions that adjoin, and one apart.
        let region = |start: usize| (GuestAddress((start * MIB) as u64), MIB);
        let map = RamMap::from_ranges(&[region(0), region(1), region(16)])?;
        let ram = GuestRam::new(&map);
        let both = READ | WRITE;
        let domains = [
            (
                1,
                vec![
                    (IOVA, SOURCE, 0x1000, READ),
                    (IOVA + 0x1000, TARGET, 0x1000, both),
                    (IOVA + 0x10_0000, EDGE, 0x2000, both),
                ],
            ),
            (2, vec![(IOVA, TARGET, 0x1000, both)]),
            // It cannot be: the interrupt range.
            (
                3,
                vec![(IOVA, TARGET, 0x1000, both), (0xfee0_0000, 0, 0x1000, both)],
            ),
            (4, Vec::new()),
        ];
        let domains = domains.map(|(root, mappings)| (root << 12, mappings));
        Ok(Self {
            interface,
            host: VfioHost::new(ram.clone()),
            ram,
            paging: Given::new(domains.into()),
        })
    }

    fn open(&self, address: &str) -> Result<Edu> {
        let edu = Edu(self.host.open(address, self.interface)?);
        if edu.id()? != edu::ID {
            return Err(format!("{address} is no edu").into());
        }
        edu.set_master()?;
        Ok(edu)
    }

    fn dma(&self, edu: &Edu) -> std::result::Result<Arc<VfioDma>, VfioError> {
        let paging: Arc<dyn PagedBackend> = self.paging.clone();
        VfioDma::new(&self.host, edu.0.clone(), Some(paging))
    }

    /// Fills the bytes of a transfer.
    fn fill(&self, gpa: u64, byte: u8) -> Result {
        Ok(self.ram.fill(gpa, LEN, byte)?)
    }

    /// True if all bytes of a transfer are `byte`.
    fn holds(&self, gpa: u64, byte: u8) -> Result<bool> {
        let mut bytes = [0; LEN as usize];
        self.ram.read(gpa, &mut bytes)?;
        Ok(bytes.iter().all(|found| *found == byte))
    }

    /// True if the device has now read `byte` at `from` and written it at `to`, which is at `gpa`.
    fn copies(&self, edu: &Edu, byte: u8, from: u64, to: (u64, u64)) -> Result<bool> {
        self.fill(SOURCE, byte)?;
        self.fill(to.1, !byte)?;
        edu.read(from)?;
        edu.write(to.0)?;
        self.holds(to.1, byte)
    }

    /// True if a store at `iova` reaches nothing at `gpa`.
    fn is_cut_off(&self, edu: &Edu, iova: u64, gpa: u64) -> Result<bool> {
        self.fill(gpa, 0x11)?;
        edu.write(iova)?;
        self.holds(gpa, 0x11)
    }

    /// Regions, interrupts, reset.
    fn device(&self, edu: &Edu, steps: &mut Steps) -> Result {
        let device = &edu.0;
        steps.hold(
            "the device is opened as asked",
            device.interface() == self.interface,
        )?;
        let bar = &device.regions()[0];
        steps.hold(
            "its BAR has 1 MiB and can be mapped as a whole",
            bar.size == MIB as u64 && bar.mappable.len() == 1 && bar.mappable[0].end == bar.size,
        )?;
        steps.hold(
            "its register can be read",
            edu.identification()? == IDENTIFICATION,
        )?;
        let memory = device.map_region(0, 0x4_0000, 4096)?;
        steps.hold("a part of its BAR can be mapped", memory.len() == 4096)?;
        steps.hold(
            "what is not in the BAR cannot",
            device.map_region(0, MIB as u64, 4096).is_err()
                && device.region_read(0, MIB as u64 - 2, &mut [0; 4]).is_err()
                && device.map_region(5, 0, 4096).is_err(),
        )?;
        steps.hold("it has one message", device.irq_info(MSI_IRQ)?.count == 1)?;
        steps.hold(
            "it cannot be reset",
            !device.can_reset() && device.reset().is_err(),
        )?;
        let twice = self.host.open(device.address(), self.interface);
        steps.hold(
            "it is not opened twice",
            matches!(twice, Err(VfioError::Twice { .. })),
        )
    }

    /// Domains, and the ways between them.
    fn domains(&self, edu: &Edu, steps: &mut Steps) -> Result {
        steps.hold(
            "before its DMA is set up it reaches nothing",
            self.is_cut_off(edu, TARGET, TARGET)?,
        )?;
        let dma = self.dma(edu)?;
        let target = (TARGET, TARGET);
        steps.hold(
            "in the default domain it reaches guest RAM",
            self.copies(edu, 0x21, SOURCE, target)?,
        )?;
        let far = 16 * MIB as u64 + 0x5000;
        steps.hold(
            "in each region",
            self.copies(edu, 0x22, SOURCE, (far, far))?,
        )?;
        let nowhere = 2 * MIB as u64;
        edu.write(nowhere)?;
        edu.read(nowhere)?;
        self.interrupt(edu, steps)?;
        dma.attach(&BLOCKED)?;
        steps.hold(
            "blocked it reaches nothing",
            self.is_cut_off(edu, TARGET, TARGET)?,
        )?;
        dma.attach(&Attachment::DEFAULT)?;
        steps.hold("and back it does", self.copies(edu, 0x23, SOURCE, target)?)?;

        dma.attach(&paged(5, 0x1000))?;
        let target = (IOVA + 0x1000, TARGET);
        steps.hold(
            "in a domain of its own it reaches what is mapped there",
            self.copies(edu, 0x24, IOVA, target)?,
        )?;
        let edge = (IOVA + 0x10_1000 - LEN / 2, EDGE + 0x1000 - LEN / 2);
        steps.hold("across regions of RAM", self.copies(edu, 0x25, IOVA, edge)?)?;
        steps.hold(
            "only reads what is read-only",
            self.is_cut_off(edu, IOVA, SOURCE)?,
        )?;
        steps.hold(
            "and not by the guest's physical address",
            self.is_cut_off(edu, TARGET, TARGET)?,
        )?;
        dma.attach(&paged(6, 0x2000))?;
        edu.write(IOVA + 0x1000)?;
        steps.hold(
            "in another domain it reaches what is mapped there",
            !self.is_cut_off(edu, IOVA, TARGET)? && self.is_cut_off(edu, IOVA + 0x1000, TARGET)?,
        )?;
        let refused = dma.attach(&paged(7, 0x3000));
        let text = refused
            .err()
            .map(|error| error.0.to_string())
            .unwrap_or_default();
        println!("   {text}");
        steps.hold(
            "a domain that cannot be is refused, and the device stays where it was",
            text.contains("0xfee00000")
                && !text.contains("blocked")
                && !self.is_cut_off(edu, IOVA, TARGET)?,
        )?;
        dma.attach(&Attachment::DEFAULT)?;
        steps.hold(
            "and goes to the default domain from there",
            self.copies(edu, 0x26, SOURCE, (TARGET, TARGET))?,
        )?;
        drop(dma);
        steps.hold(
            "when its DMA is given up it reaches nothing",
            self.is_cut_off(edu, TARGET, TARGET)?,
        )
    }

    fn interrupt(&self, edu: &Edu, steps: &mut Steps) -> Result {
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        edu.0.set_irqs(MSI_IRQ, 0, &[Some(event.as_fd())])?;
        let came = || {
            let start = Instant::now();
            let mut count = [0; 8];
            while start.elapsed() < Duration::from_secs(2) {
                if rustix::io::read(&event, &mut count).is_ok() {
                    return u64::from_ne_bytes(count) == 1;
                }
                thread::sleep(Duration::from_millis(5));
            }
            false
        };
        edu.read_with_interrupt(SOURCE)?;
        steps.hold("its interrupt comes by eventfd, once", came())?;
        edu.acknowledge()?;
        edu.0.disable_irqs(MSI_IRQ)?;
        edu.read_with_interrupt(SOURCE)?;
        steps.hold("and not when it is disabled", !came())?;
        Ok(edu.acknowledge()?)
    }

    /// Mapping and unmapping under a device.
    fn spaces(&self, edu: &Edu, steps: &mut Steps) -> Result {
        let dma = self.dma(edu)?;
        dma.attach(&paged(5, 0x4000))?;
        let space = self.paging.take_space().ok_or("no address space")?;
        println!("   {:x?}", space.limits());
        steps.hold(
            "the interrupt range is no address",
            !space.limits().allow(0xfee0_0000, 0x1000) && space.limits().allow(0xfef0_0000, 0x1000),
        )?;
        let both = READ | WRITE;
        space.map(IOVA, TARGET, 0x1000, both)?;
        steps.hold(
            "a page that is mapped is reached",
            !self.is_cut_off(edu, IOVA, TARGET)?,
        )?;
        space.unmap(IOVA, 0x1000)?;
        steps.hold(
            "and when it is unmapped, not",
            self.is_cut_off(edu, IOVA, TARGET)?,
        )?;
        space.map(IOVA, EDGE, 0x2000, both)?;
        let cut = |result| matches!(result, Err(SpaceError::PartlyInside { .. }));
        steps.hold(
            "a mapping goes as a whole or not at all",
            cut(space.unmap(IOVA, 0x1000)) && cut(space.unmap(IOVA + 0x1000, 0x4000)),
        )?;
        let taken = space.map(IOVA + 0x1000, 0, 0x1000, both);
        steps.hold(
            "nor is it mapped over",
            matches!(taken, Err(SpaceError::Exists { .. })),
        )?;
        space.unmap(IOVA - 0x10_0000, 0x20_0000)?;
        space.unmap(IOVA, 0x1000)?;
        steps.hold("holes are fine", self.is_cut_off(edu, IOVA, EDGE)?)?;
        let width = space.map(1 << 60, 0, 0x1000, both);
        steps.hold(
            "what is too wide is refused",
            matches!(width, Err(SpaceError::OutOfRange { .. })),
        )?;
        self.many(&*space, steps)?;
        drop(dma);
        drop(space);
        Ok(())
    }

    /// As many mappings as a container takes, and one more.
    fn many(&self, space: &dyn AddressSpace, steps: &mut Steps) -> Result {
        let start = Instant::now();
        // Every other page, so that nothing merges.
        for i in 0..ENTRIES {
            space.map(IOVA + (i << 13), SOURCE, 0x1000, READ)?;
        }
        let mapped = start.elapsed();
        let next = space.map(IOVA + (ENTRIES << 13), SOURCE, 0x1000, READ);
        let holds = match self.interface {
            Interface::Iommufd => next.is_ok(),
            _ => matches!(next, Err(SpaceError::Full { max }) if max as u64 == ENTRIES),
        };
        steps.hold("the limit on mappings is that of the interface", holds)?;
        let start = Instant::now();
        space.clear()?;
        let per = |time: Duration| time.as_micros() as f64 / ENTRIES as f64;
        println!(
            "   {ENTRIES} pages: {:.1} us to map one, {:.1} us to clear one",
            per(mapped),
            per(start.elapsed())
        );
        space.map(IOVA, TARGET, 0x1000, READ)?;
        Ok(space.clear()?)
    }

    /// What was closed can be opened again.
    fn again(&self, address: &str, steps: &mut Steps) -> Result {
        let edu = self.open(address)?;
        let dma = self.dma(&edu)?;
        let copied = self.copies(&edu, 0x31, SOURCE, (TARGET, TARGET))?;
        drop(dma);
        steps.hold("a device that was closed can be opened again", copied)
    }

    /// Two devices of one group.
    fn group(&self, addresses: [&str; 2], steps: &mut Steps) -> Result {
        let [a, b] = [self.open(addresses[0])?, self.open(addresses[1])?];
        steps.hold("two devices share a group", a.0.group() == b.0.group())?;
        let (dma_a, dma_b) = (self.dma(&a)?, self.dma(&b)?);
        steps.hold(
            "both reach guest RAM",
            self.copies(&a, 0x41, SOURCE, (TARGET, TARGET))?
                && self.copies(&b, 0x42, SOURCE, (TARGET, TARGET))?,
        )?;
        let refused = dma_a.attach(&paged(5, 0x1000));
        let text = refused
            .err()
            .map(|error| error.0.to_string())
            .unwrap_or_default();
        println!("   {text}");
        let group = format!("group {}", a.0.group());
        steps.hold(
            "one alone cannot go to another domain; group and other device are named",
            text.contains(&group) && text.contains(addresses[1]),
        )?;
        steps.hold(
            "and stays where it was",
            self.copies(&a, 0x43, SOURCE, (TARGET, TARGET))?,
        )?;
        dma_b.attach(&BLOCKED)?;
        steps.hold(
            "while one is blocked the other is, too",
            self.is_cut_off(&a, TARGET, TARGET)? && self.is_cut_off(&b, TARGET, TARGET)?,
        )?;
        dma_a.attach(&paged(5, 0x1000))?;
        steps.hold(
            "wherever it goes",
            self.is_cut_off(&a, IOVA + 0x1000, TARGET)?,
        )?;
        dma_b.attach(&paged(5, 0x1000))?;
        let target = (IOVA + 0x1000, TARGET);
        steps.hold(
            "together they can go",
            self.copies(&a, 0x44, IOVA, target)? && self.copies(&b, 0x45, IOVA, target)?,
        )?;
        dma_a.attach(&paged(5, 0x2000))?;
        steps.hold(
            "a domain that is configured anew takes both along",
            !self.is_cut_off(&a, IOVA, TARGET)? && !self.is_cut_off(&b, IOVA, TARGET)?,
        )?;
        drop(dma_a);
        steps.hold(
            "one stays when the other goes",
            !self.is_cut_off(&b, IOVA, TARGET)?,
        )?;
        drop(dma_b);
        steps.hold(
            "and the last leaves nothing",
            self.is_cut_off(&b, IOVA, TARGET)?,
        )
    }
}

/// Prints what it costs to leave the default domain and to come back, by the size of guest RAM.
fn cost(interface: Interface, address: &str, mib: usize) -> Result {
    let map = RamMap::from_ranges(&[(GuestAddress(0), mib * MIB)])?;
    let ram = GuestRam::new(&map);
    // Otherwise the kernel makes the pages when they are mapped first.
    ram.fill(0, (mib * MIB) as u64, 1)?;
    let host = VfioHost::new(ram);
    let device = host.open(address, interface)?;
    let start = Instant::now();
    let dma = VfioDma::new(&host, device, None)?;
    let first = start.elapsed();
    let mut times = Vec::new();
    for _ in 0..3 {
        for to in [BLOCKED, Attachment::DEFAULT] {
            let start = Instant::now();
            dma.attach(&to)?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    println!(
        "   {mib} MiB of guest RAM by {interface:?}: {:.1} ms at first; to blocked and back, ms: \
         {times:.2?}",
        first.as_secs_f64() * 1e3
    );
    Ok(())
}
