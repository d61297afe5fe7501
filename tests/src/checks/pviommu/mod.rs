//! The pvIOMMU: calls, domains, tables, flushes, and what ends them (docs/spec/pviommu.md).
//!
//! What a domain does is seen by the DMA of `testdev`; in which domain a device is, by what an
//! ATTACH and a DELETE answer.
#![forbid(unsafe_code)]

mod calls;
mod domains;
mod faults;
mod flush;
mod ids;
mod limits;
mod moves;
mod offer;
mod parting;
mod races;
mod statuses;
mod tables;

use vm_vpci::pviommu::{IommuConfig, IommuMode};

use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::host::{BusSetup, FunctionSetup, Setup};
use crate::model::kernel::{Kernel, status};
use crate::model::pviommu::{PvIommu, Tables};
use crate::model::testdev::{ERROR_FAULT, Job, NO_VECTOR, TestDev, register};
use crate::model::vm::{PAGE, Vm};
use crate::model::vmbus::VmBus;
use crate::model::vpci::{Bus, VERSIONS};

/// All checks of this area.
pub const CHECKS: [&[Check]; 12] = [
    offer::CHECKS,
    ids::CHECKS,
    calls::CHECKS,
    statuses::CHECKS,
    domains::CHECKS,
    moves::CHECKS,
    limits::CHECKS,
    tables::CHECKS,
    faults::CHECKS,
    flush::CHECKS,
    races::CHECKS,
    parting::CHECKS,
];

/// A `testdev` behind the pvIOMMU.
fn behind(number: u8) -> FunctionSetup {
    FunctionSetup::testdev(number).with_iommu(IommuMode::On)
}

/// A bus with one `testdev` behind the pvIOMMU.
fn bus(number: u16) -> BusSetup {
    BusSetup {
        instance: BusSetup::instance(number),
        functions: vec![behind(0)],
    }
}

/// The usual machine with a pvIOMMU, its `testdev` behind it.
fn setup() -> Setup {
    with(IommuConfig::default())
}

/// The same with a pvIOMMU of another shape.
fn with(iommu: IommuConfig) -> Setup {
    Setup {
        iommu: Some(iommu),
        buses: vec![bus(1)],
        ..Setup::default()
    }
}

/// A pvIOMMU that offers tables of 5 levels.
fn five_levels() -> Setup {
    with(IommuConfig {
        five_levels: true,
        ..IommuConfig::default()
    })
}

/// An address that no test uses as a guest physical one.
const IOVA: u64 = 0x12_3456_7000;

/// What a fill stores, and what is in memory before.
const STORED: u64 = 0x7766_5544_3322_1101;
const BEFORE: u64 = 0x1122_3344_5566_7702;

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A device behind the pvIOMMU.
#[derive(Debug, Clone)]
struct Scene {
    device: TestDev,
    iommu: PvIommu,
    /// Its logical device id.
    id: u64,
}

impl Scene {
    /// From boot to a device that works.
    fn new(context: &Context) -> Result<Self, Failure> {
        Self::of(context, &setup())
    }

    /// The same with another machine, whose first bus is taken.
    fn of(context: &Context, setup: &Setup) -> Result<Self, Failure> {
        Self::boot(&context.machine(setup)?)
    }

    /// The same on a machine in which nobody has booted yet.
    fn boot(vm: &Vm) -> Result<Self, Failure> {
        let vmbus = VmBus::connect(&Kernel::boot(vm)?)?;
        let offers = vmbus.offers()?;
        let Some(offer) = offers.first() else {
            return Err(Failure::Host("no bus is offered".into()));
        };
        Self::on(&Bus::probe(&vmbus, offer, VERSIONS[0])?, 0)
    }

    /// Function `number` of a bus in D0.
    fn on(bus: &Bus, number: u8) -> Result<Self, Failure> {
        let device = TestDev::start(bus, number)?;
        Ok(Self {
            iommu: PvIommu::new(bus.kernel()),
            id: bus.logical_id(device.slot()),
            device,
        })
    }

    fn vm(&self) -> &Vm {
        self.device.vm()
    }

    /// A domain with empty tables of `levels` levels, with the device in it.
    fn paged(&self, number: u32, levels: u32) -> Result<Tables, Failure> {
        let tables = self.domain(number, levels)?;
        equal("status of ATTACH", self.iommu.attach(number, self.id)?, 0)?;
        Ok(tables)
    }

    /// A domain with empty tables of `levels` levels.
    fn domain(&self, number: u32, levels: u32) -> Result<Tables, Failure> {
        let tables = Tables::new(self.vm(), levels)?;
        equal("status of CREATE", self.iommu.create(number)?, 0)?;
        let configured = self.iommu.translate(number, &tables)?;
        equal("status of CONFIGURE", configured, 0)?;
        Ok(tables)
    }

    /// Has the device read 8 bytes. Their checksum, or `None` for a DMA fault.
    fn read(&self, iova: u64) -> Result<Option<u64>, Failure> {
        let job = Job {
            command: 3,
            source: iova,
            destination: 0,
            length: 8,
            vector: NO_VECTOR,
        };
        match self.device.run(&job)? {
            (2, 0) => Ok(Some(self.device.load(register::RESULT, 8)?)),
            (6, ERROR_FAULT) => Ok(None),
            (status, error) => Err(Failure::Host(format!(
                "testdev ends with status {status} and error {error}"
            ))),
        }
    }

    /// Has the device write 8 bytes. False for a DMA fault.
    fn write(&self, iova: u64, value: u64) -> Result<bool, Failure> {
        self.fill(iova, 8, value)
    }

    /// Has the device fill a range. False for a DMA fault.
    fn fill(&self, iova: u64, length: u32, value: u64) -> Result<bool, Failure> {
        self.device.store(register::PATTERN, 8, value)?;
        let job = Job {
            command: 2,
            source: 0,
            destination: iova,
            length,
            vector: NO_VECTOR,
        };
        match self.device.run(&job)? {
            (2, 0) => Ok(true),
            (6, ERROR_FAULT) => Ok(false),
            (status, error) => Err(Failure::Host(format!(
                "testdev ends with status {status} and error {error}"
            ))),
        }
    }

    /// The 8 bytes of RAM at `gpa`.
    fn peek(&self, gpa: u64) -> Result<u64, Failure> {
        let bytes = self.vm().read(gpa, 8)?;
        Ok(crate::model::wire::u64_at(&bytes, 0))
    }

    /// Demands that the device reads and writes the RAM at `gpa` when it uses `iova`.
    fn reaches(&self, iova: u64, gpa: u64) -> Verdict {
        self.reads(iova, gpa)?;
        let written = self.write(iova, STORED)?;
        holds(format!("a write to {iova:#x} succeeds"), written)?;
        let what = format!("RAM at {gpa:#x} after a write to {iova:#x}");
        equal(what, self.peek(gpa)?, STORED)
    }

    /// Demands that the device reads the RAM at `gpa` when it uses `iova`.
    fn reads(&self, iova: u64, gpa: u64) -> Verdict {
        let fresh = BEFORE.wrapping_add(gpa << 8);
        self.vm().write(gpa, &fresh.to_le_bytes())?;
        let what = format!("checksum of what is read at {iova:#x}");
        equal(what, self.read(iova)?, Some(fnv(&fresh.to_le_bytes())))
    }

    /// Demands that neither a read nor a write of `iova` happens.
    fn faults(&self, iova: u64) -> Verdict {
        let what = format!("checksum of what is read at {iova:#x}");
        equal(what, self.read(iova)?, None)?;
        let written = self.write(iova, STORED)?;
        holds(format!("a write to {iova:#x} fails"), !written)?;
        equal(
            "FAULT of testdev",
            self.device.load(register::FAULT, 8)?,
            iova,
        )
    }

    /// Demands that the device is in this domain, by what it answers.
    fn is_in(&self, number: u32) -> Verdict {
        equal(
            format!("status of an ATTACH to domain {number}, in which the device is"),
            self.iommu.attach(number, self.id)?,
            status::DEVICE_ALREADY_IN_DOMAIN,
        )
    }

    /// Demands that the device is in the default domain: addresses are guest physical ones.
    fn is_default(&self) -> Verdict {
        let page = self.vm().pages(1)?;
        self.reaches(page + 0x10, page + 0x10)
    }

    /// Demands that a domain exists, or not.
    fn exists(&self, number: u32, wanted: bool) -> Verdict {
        let want = match wanted {
            true => status::SUCCESS,
            false => status::INVALID_PARAMETER,
        };
        equal(
            format!("status of a FLUSH of domain {number}"),
            self.iommu.flush(number)?,
            want,
        )
    }
}

/// A page of RAM that the device's address [`IOVA`] leads to, in domain 1, with the device in it.
#[derive(Debug)]
struct Mapped {
    scene: Scene,
    tables: Tables,
    page: u64,
}

impl Mapped {
    fn new(context: &Context) -> Result<Self, Failure> {
        Self::of(Scene::new(context)?)
    }

    fn of(scene: Scene) -> Result<Self, Failure> {
        let tables = scene.paged(1, 4)?;
        let page = scene.vm().pages(1)?;
        tables.map(IOVA, page)?;
        let mapped = Self {
            scene,
            tables,
            page,
        };
        mapped.is_intact()?;
        Ok(mapped)
    }

    /// Demands that everything is as it was made.
    fn is_intact(&self) -> Verdict {
        self.scene.is_in(1)?;
        self.scene.reaches(IOVA + 0x18, self.page + 0x18)?;
        self.scene.faults(IOVA + PAGE)?;
        self.scene.faults(self.page)
    }
}
