//! A driver of `testdev`, the device that the suite plugs in (`vm_vpci::devices::testdev` has the
//! table of its registers).
#![forbid(unsafe_code)]

use super::vm::Vm;
use super::vpci::{Bus, Create, Message, slot};
use crate::check::{Failure, equal};
use crate::guest::Fault;
use crate::host::HIGH_MMIO;

/// Vendor id.
pub const VENDOR: u16 = 0x1234;
/// Device id.
pub const DEVICE: u16 = 0x5650;
/// Interrupt vectors.
pub const VECTORS: u32 = 8;
/// Bytes of BAR 0.
pub const BAR_SIZE: u64 = 0x4000;
/// Offset of the MSI-X table in BAR 0.
pub const MSIX_TABLE: u64 = 0x1000;
/// Offset of the pending bits in BAR 0.
pub const MSIX_PENDING: u64 = 0x2000;
/// Vector register: no interrupt.
pub const NO_VECTOR: u32 = u32::MAX;

/// Registers in BAR 0.
pub mod register {
    /// Read-only.
    pub const MAGIC: u64 = 0;
    /// 64 bits.
    pub const SOURCE: u64 = 0x10;
    /// 64 bits.
    pub const DESTINATION: u64 = 0x18;
    /// Bytes.
    pub const LENGTH: u64 = 0x20;
    /// Vector on completion.
    pub const VECTOR: u64 = 0x24;
    /// Fill pattern, 64 bits.
    pub const PATTERN: u64 = 0x28;
    /// Starts a job.
    pub const COMMAND: u64 = 0x30;
    /// Bit 0 busy, 1 done, 2 failed, 3 overrun.
    pub const STATUS: u64 = 0x34;
    /// Why the last job failed.
    pub const ERROR: u64 = 0x38;
    /// Where, 64 bits.
    pub const FAULT: u64 = 0x40;
    /// Bytes moved, 64 bits.
    pub const MOVED: u64 = 0x48;
    /// Checksum, 64 bits.
    pub const RESULT: u64 = 0x50;
    /// Jobs ended, 64 bits.
    pub const COMPLETIONS: u64 = 0x58;
    /// Raises a vector.
    pub const RAISE: u64 = 0x60;
}

/// Value of `MAGIC`.
pub const MAGIC: u64 = 0x5654_5044;

/// Why a job failed: bus mastering is off.
pub const ERROR_NOT_MASTER: u64 = 1;
/// Why a job failed: an address is no memory.
pub const ERROR_FAULT: u64 = 2;

/// Capability id of MSI.
pub const CAP_MSI: u8 = 5;
/// Capability id of MSI-X.
pub const CAP_MSIX: u8 = 0x11;

/// An interrupt that was set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interrupt {
    /// MSI-X table entry.
    pub entry: u32,
    /// The message in it.
    pub message: Message,
    /// Vector on the VP.
    pub vector: u8,
    /// The VP.
    pub vp: u32,
}

/// A device with its BAR placed and memory decode and bus mastering on.
#[derive(Debug, Clone)]
pub struct TestDev {
    bus: Bus,
    slot: u32,
    bar: u64,
}

impl TestDev {
    /// From boot to a device that works, on the machine's only bus, function 0.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn bring_up(vm: &Vm) -> Result<Self, Failure> {
        Self::start(&Bus::bring_up(vm)?, 0)
    }

    /// Places BAR 0 of a function and switches it on. The place is made from the bus's window and
    /// the function's number.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the device does not answer.
    pub fn start(bus: &Bus, function: u8) -> Result<Self, Failure> {
        let index = bus.window() / 0x2000 % 0x1000 * 8 + u64::from(function);
        let device = Self {
            bus: bus.clone(),
            slot: slot(function),
            bar: HIGH_MMIO + 0x10_0000 + index * BAR_SIZE,
        };
        bus.place_bar(device.slot, 0, device.bar)?;
        device.set_command(6)?;
        equal("MAGIC of testdev", device.load(register::MAGIC, 4)?, MAGIC)?;
        Ok(device)
    }

    /// The bus.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// The machine.
    pub fn vm(&self) -> &Vm {
        self.bus.vm()
    }

    /// The function's slot.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// GPA of BAR 0.
    pub fn bar(&self) -> u64 {
        self.bar
    }

    /// Writes the command register: bit 1 memory decode, bit 2 bus mastering.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn set_command(&self, value: u64) -> Result<(), Fault> {
        self.bus.set_config(self.slot, 4, 2, value)
    }

    /// A load from BAR 0, on VP 0.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn load(&self, offset: u64, width: usize) -> Result<u64, Fault> {
        self.vm().load(0, self.bar + offset, width)
    }

    /// A store to BAR 0, on VP 0.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn store(&self, offset: u64, width: usize, value: u64) -> Result<(), Fault> {
        self.vm().store(0, self.bar + offset, width, value)
    }

    /// Enables or disables MSI-X.
    ///
    /// # Errors
    ///
    /// [`Failure`] if there is no such capability.
    pub fn enable_msix(&self, on: bool) -> Result<(), Failure> {
        let Some(at) = self.bus.capability(self.slot, CAP_MSIX)? else {
            return Err(Failure::Unmet {
                what: "capabilities of testdev".into(),
                expected: "MSI-X".into(),
                got: "none".into(),
            });
        };
        let control = self.bus.config(self.slot, at + 2, 2)?;
        let control = control & 0x3fff | u64::from(on) << 15;
        Ok(self.bus.set_config(self.slot, at + 2, 2, control)?)
    }

    /// Stores address, data and mask of an MSI-X entry.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn set_entry(
        &self,
        entry: u32,
        address: u64,
        data: u32,
        masked: bool,
    ) -> Result<(), Fault> {
        let at = MSIX_TABLE + u64::from(entry) * 16;
        self.store(at, 4, address & 0xffff_ffff)?;
        self.store(at + 4, 4, address >> 32)?;
        self.store(at + 8, 4, data.into())?;
        self.store(at + 12, 4, masked.into())
    }

    /// Gives an MSI-X entry an interrupt, as Linux does: create, write the entry masked, retarget,
    /// unmask. MSI-X is enabled afterwards.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn interrupt(&self, entry: u32, vector: u8, vp: u32) -> Result<Interrupt, Failure> {
        let create = Create::one(self.slot, 0xef, vp as u16);
        let message = self.bus.must_create(&create)?;
        self.set_entry(entry, message.address, message.data, true)?;
        let interrupt = Interrupt {
            entry,
            message,
            vector,
            vp,
        };
        self.retarget(&interrupt)?;
        self.set_entry(entry, message.address, message.data, false)?;
        self.enable_msix(true)?;
        Ok(interrupt)
    }

    /// Sends the interrupt's message to its vector and VP from now on.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn retarget(&self, interrupt: &Interrupt) -> Result<(), Failure> {
        let Interrupt {
            message,
            vector,
            vp,
            ..
        } = *interrupt;
        let retarget = self.bus.retarget(self.slot, message, vector, vp);
        self.bus.kernel().must_retarget(0, &retarget)
    }

    /// Has the device raise a vector of its own.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn raise(&self, entry: u32) -> Result<(), Fault> {
        self.store(register::RAISE, 4, entry.into())
    }

    /// Starts a job with whatever addresses, and waits for its end. Returns status and error.
    ///
    /// # Errors
    ///
    /// [`Failure`] if it does not end.
    pub fn run(&self, job: &Job) -> Result<(u64, u64), Failure> {
        self.begin(job)?;
        self.vm().settle();
        let status = self.load(register::STATUS, 4)?;
        equal("busy bit of testdev after its job", status & 1, 0)?;
        Ok((status, self.load(register::ERROR, 4)?))
    }

    /// Starts a job.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn begin(&self, job: &Job) -> Result<(), Fault> {
        self.store(register::STATUS, 4, 0xe)?;
        self.store(register::SOURCE, 8, job.source)?;
        self.store(register::DESTINATION, 8, job.destination)?;
        self.store(register::LENGTH, 4, job.length.into())?;
        self.store(register::VECTOR, 4, job.vector.into())?;
        self.store(register::COMMAND, 4, job.command.into())
    }

    /// Has the device copy memory; it must succeed.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn copy(
        &self,
        source: u64,
        destination: u64,
        length: u32,
        vector: u32,
    ) -> Result<(), Failure> {
        let job = Job {
            command: 1,
            source,
            destination,
            length,
            vector,
        };
        equal("status and error of testdev", self.run(&job)?, (2, 0))
    }
}

/// A job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// 1 copy, 2 fill, 3 checksum.
    pub command: u32,
    /// Address read.
    pub source: u64,
    /// Address written.
    pub destination: u64,
    /// Bytes.
    pub length: u32,
    /// MSI-X entry raised at the end, or [`NO_VECTOR`].
    pub vector: u32,
}
