//! Nested first-stage tables on the kernel's mock device: the operations of `backend::nested`, the
//! calls of `vfio::nested`, and a real iommufd behind them. Only the driver's data differs from VT-d.
//!
//! Prints a line for each operation and each thing that was found to hold. Exit status: 0 if all
//! held, 1 if not, 3 if the kernel has no iommufd or none with `CONFIG_IOMMUFD_TEST`.

#![deny(unsafe_code)]

mod kernel;

use std::fs::File;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::MmapRegion;
use vm_vpci::backend::nested::{
    Answer, Host, Invalidation, NestedCapabilities, NestedError, NestedUnit, ObjectId, Operation,
    Place,
};
use vm_vpci::pviommu::{FlushRange, Levels, PageTable, Translation};
use vm_vpci::vfio::IommuFd;
use vm_vpci::vfio::nested::{self, CannotNest, Driver, IommufdHost, Vtd};

use kernel::{APERTURE, IOTLB_ENTRIES, MockDevice, MockDriver};

const ENOENT: i32 = 2;
const EBUSY: i32 = 16;
const EINVAL: i32 = 22;
const ENOTTY: i32 = 25;

/// What the mock IOMMU counts as.
const CAPABILITIES: NestedCapabilities = NestedCapabilities {
    five_levels: false,
    gigabyte_pages: false,
    max_shift: 18,
};

/// Why the program ends early.
#[derive(Debug)]
enum Stop {
    /// Something did not hold.
    Failed(String),
    /// The kernel lacks something.
    Lacks(String),
}

impl From<NestedError> for Stop {
    fn from(error: NestedError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Prints what is asked of the kernel, and what it says.
#[derive(Debug)]
struct Shown<H>(H);

impl<H: Host> Host for Shown<H> {
    fn execute(&self, operation: &Operation) -> io::Result<Answer> {
        let answer = self.0.execute(operation);
        match &answer {
            Ok(Answer::Done) => println!("   {operation:?}"),
            Ok(Answer::Object(object)) => println!("   {operation:?} = {object}"),
            Err(error) => println!("   {operation:?}: {error}"),
        }
        answer
    }
}

/// What has held so far.
#[derive(Debug, Default)]
struct Steps(u32);

impl Steps {
    fn hold(&mut self, what: &str, holds: bool) -> Result<(), Stop> {
        if !holds {
            return Err(Stop::Failed(what.into()));
        }
        self.0 += 1;
        println!("ok {:2} {what}", self.0);
        Ok(())
    }

    /// Checks that the kernel refuses with an error of its own.
    fn refused<T>(&mut self, what: &str, result: &io::Result<T>, error: i32) -> Result<(), Stop> {
        let found = match result {
            Ok(_) => None,
            Err(error) => error.raw_os_error(),
        };
        if found != Some(error) {
            return Err(Stop::Failed(format!("{what}: error {found:?}")));
        }
        self.hold(what, true)
    }
}

/// The driver is shared with whoever breaks it.
type Unit = NestedUnit<Shown<IommufdHost<MockDevice, Arc<MockDriver>>>>;

fn main() -> ExitCode {
    let mut steps = Steps::default();
    match run(&mut steps) {
        Ok(()) => {
            println!("nested-mock: {} steps held", steps.0);
            ExitCode::SUCCESS
        }
        Err(Stop::Failed(what)) => {
            println!("nested-mock: FAILED behind step {}: {what}", steps.0);
            ExitCode::FAILURE
        }
        Err(Stop::Lacks(what)) => {
            println!("nested-mock: {what}");
            ExitCode::from(3)
        }
    }
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> Stop {
    move |error| Stop::Failed(format!("{what}: {error}"))
}

fn run(steps: &mut Steps) -> Result<(), Stop> {
    let file = File::options().read(true).write(true).open("/dev/iommu");
    let lacks = |error| Stop::Lacks(format!("/dev/iommu: {error}; it needs CONFIG_IOMMUFD"));
    let iommufd = Arc::new(IommuFd::new(file.map_err(lacks)?));
    let space = |what| iommufd.alloc_ioas().map(ObjectId).map_err(failed(what));
    let ram_space = space("make an address space")?;
    let nothing = space("make an empty address space")?;
    let ram = MmapRegion::new(2 << 20).map_err(|error| Stop::Failed(error.to_string()))?;
    kernel::map(&iommufd, ram_space, APERTURE, &ram).map_err(failed("map RAM"))?;
    let device = match MockDevice::new(&iommufd, ram_space, nothing) {
        Err(error) if error.raw_os_error() == Some(ENOTTY) => {
            let text = "the kernel has no mock devices; they need CONFIG_IOMMUFD_TEST";
            return Err(Stop::Lacks(text.into()));
        }
        made => made.map_err(failed("make a mock device"))?,
    };
    let bed = Bed {
        iommufd,
        ram,
        ram_space,
    };
    let device = bed.find_out(device, steps)?;
    bed.live(device, steps)
}

/// The kernel's side.
struct Bed {
    iommufd: Arc<IommuFd>,
    ram: MmapRegion,
    ram_space: ObjectId,
}

fn table(root: u64) -> PageTable {
    let levels = Levels::Four;
    PageTable { root, levels }
}

fn pages(numbers: &[u64]) -> Vec<FlushRange> {
    let range = |first: &u64| FlushRange {
        first: *first,
        shift: 0,
    };
    numbers.iter().map(range).collect()
}

/// The object of the first-stage table that the unit is in.
fn object(unit: &Unit) -> Result<ObjectId, Stop> {
    match unit.place() {
        Place::Nested { object, .. } => Ok(object),
        place => Err(Stop::Failed(format!("the device is at {place:?}"))),
    }
}

/// What the device is attached to, as the kernel says.
fn reached(unit: &Unit) -> Result<ObjectId, Stop> {
    let reached = unit.host().0.device().reaches();
    reached.ok_or_else(|| Stop::Failed("the device is not where it was moved to".into()))
}

impl Bed {
    /// What the mock IOMMU says of itself, and what happens where a driver is not the right one.
    fn find_out(&self, device: MockDevice, steps: &mut Steps) -> Result<MockDevice, Stop> {
        let mut data = [0; 64];
        let id = nested::Attachable::id(&device);
        let info = self.iommufd.hw_info(id, &mut data);
        let info = info.map_err(failed("ask about the IOMMU"))?;
        let found = nested::capabilities(info.kind, &data);
        let kind = kernel::HW_INFO_TYPE;
        steps.hold(
            "the IOMMU's type is known, and is not VT-d: nesting is not picked for it",
            info.kind == kind && found == Err(CannotNest::Unknown { kind }),
        )?;
        let host = self.host(device, Vtd);
        let opened = NestedUnit::open(
            host,
            CAPABILITIES,
            self.ram_space,
            Place::Default,
            Levels::Four,
        );
        let Err((host, error)) = opened else {
            return Err(Stop::Failed("the mock IOMMU took VT-d's data".into()));
        };
        let NestedError::Unavailable { what, left, .. } = &error else {
            return Err(error.into());
        };
        steps.hold(
            "VT-d's data is refused, and the parent is gone again",
            *what == "make a first-stage table" && left.is_empty(),
        )?;
        Ok(host.0.into_device())
    }

    fn host<D: Driver>(&self, device: MockDevice, driver: D) -> Shown<IommufdHost<MockDevice, D>> {
        let iommufd = self.iommufd.clone();
        Shown(IommufdHost::new(iommufd, device, driver, self.ram_space))
    }

    /// True if each entry of the table's cache holds `values`.
    fn iotlb(&self, table: ObjectId, values: [u32; IOTLB_ENTRIES as usize]) -> bool {
        let mut entries = (0..).zip(values);
        entries
            .all(|(entry, value)| kernel::check_iotlb(&self.iommufd, table, entry, value).is_ok())
    }

    fn maps_ram(&self, table: ObjectId) -> bool {
        kernel::maps(&self.iommufd, table, APERTURE, &self.ram)
    }

    /// The life of a unit.
    fn live(&self, device: MockDevice, steps: &mut Steps) -> Result<(), Stop> {
        let driver = Arc::new(MockDriver {
            broken: AtomicBool::new(false),
        });
        let host = self.host(device, driver.clone());
        let opened = NestedUnit::open(
            host,
            CAPABILITIES,
            self.ram_space,
            Place::Default,
            Levels::Four,
        );
        let mut unit = opened.map_err(|(_, error)| error)?;
        let parent = unit.objects().next();
        let parent = parent.ok_or_else(|| Stop::Failed("no parent".into()))?;
        steps.hold("the parent maps guest RAM", self.maps_ram(parent))?;

        unit.attach(&Translation::Paged(table(0x10_1000)))?;
        let first = object(&unit)?;
        let (a, b) = (0x101, 0x102);
        steps.hold(
            "the device is attached to a table of the guest's root",
            reached(&unit)? == first && self.iotlb(first, [a; 4]),
        )?;
        let busy = self.iommufd.destroy(first.0);
        steps.refused("a table in use is not destroyed", &busy, EBUSY)?;
        let busy = self.iommufd.destroy(parent.0);
        steps.refused("nor a parent that has a table", &busy, EBUSY)?;

        unit.flush(&pages(&[1, 3]))?;
        steps.hold(
            "a flush of two pages forgets these two",
            self.iotlb(first, [a, 0, a, 0]),
        )?;
        self.bad_entry(&mut unit, &driver, first, steps)?;

        unit.attach(&Translation::Paged(table(0x10_2000)))?;
        let second = object(&unit)?;
        steps.hold(
            "the device moved to another table in one call",
            reached(&unit)? == second && second != first && self.iotlb(second, [b; 4]),
        )?;
        let gone = kernel::check_iotlb(&self.iommufd, first, 0, 0);
        steps.refused("the table that it left is gone", &gone, ENOENT)?;
        unit.attach(&Translation::Paged(table(0x10_2000)))?;
        steps.hold(
            "the same table again is a flush of everything, and no move",
            object(&unit)? == second && self.iotlb(second, [0; 4]),
        )?;

        self.broken_driver(&mut unit, &driver, second, steps)?;
        self.leave(&mut unit, parent, steps)
    }

    /// The second of three entries is one that the kernel refuses.
    fn bad_entry(
        &self,
        unit: &mut Unit,
        driver: &MockDriver,
        first: ObjectId,
        steps: &mut Steps,
    ) -> Result<(), Stop> {
        let a = 0x101;
        let bad = IOTLB_ENTRIES.into();
        let entries = [0, bad, 2].map(|first| Invalidation::Pages { first, shift: 0 });
        let array = driver.invalidations(&entries);
        let (done, result) = self.iommufd.invalidate(first.0, &array);
        let what = "an array with a bad second entry is refused";
        steps.refused(what, &result, EINVAL)?;
        steps.hold(
            "one entry of it was done, and the third was not",
            done == 1 && self.iotlb(first, [0, 0, a, 0]),
        )?;
        unit.flush(&pages(&[0, bad, 2]))?;
        let counters = unit.counters();
        steps.hold(
            "as a guest's flush it becomes one of everything",
            self.iotlb(first, [0; 4]) && counters.widened == 1 && object(unit)? == first,
        )
    }

    /// The kernel refuses each invalidation.
    fn broken_driver(
        &self,
        unit: &mut Unit,
        driver: &MockDriver,
        second: ObjectId,
        steps: &mut Steps,
    ) -> Result<(), Stop> {
        driver.broken.store(true, Ordering::Relaxed);
        unit.flush(&pages(&[0]))?;
        driver.broken.store(false, Ordering::Relaxed);
        let now = reached(unit)?;
        steps.hold(
            "where nothing can be flushed the device is blocked, and the flush succeeds",
            unit.place() == Place::Blocked
                && unit.counters().blocked == 1
                && now != second
                && !self.maps_ram(now),
        )?;
        let gone = kernel::check_iotlb(&self.iommufd, second, 0, 0);
        steps.refused("its table is gone", &gone, ENOENT)?;
        unit.attach(&Translation::Paged(table(0x10_3000)))?;
        let third = object(unit)?;
        steps.hold(
            "an attachment brings it back",
            reached(unit)? == third && self.iotlb(third, [0x103; 4]),
        )
    }

    /// Out of the first-stage domain, and the end.
    fn leave(&self, unit: &mut Unit, parent: ObjectId, steps: &mut Steps) -> Result<(), Stop> {
        let third = object(unit)?;
        unit.attach(&Translation::Identity)?;
        let gone = kernel::check_iotlb(&self.iommufd, third, 0, 0);
        steps.refused("in the default domain its table is gone", &gone, ENOENT)?;
        let ram = reached(unit)?;
        steps.hold("and the device reaches RAM", self.maps_ram(ram))?;
        unit.attach(&Translation::Paged(table(0x10_1000)))?;
        let last = object(unit)?;
        unit.close()?;
        let gone = kernel::check_iotlb(&self.iommufd, last, 0, 0);
        steps.refused("at the end the last table is gone", &gone, ENOENT)?;
        let gone = self.iommufd.destroy(parent.0);
        steps.refused("and its parent after it", &gone, ENOENT)?;
        steps.hold("nothing is left", unit.objects().next().is_none())
    }
}
