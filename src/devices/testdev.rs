//! `testdev`: a DMA engine made for testing.
//!
//! Copies, fills and checksums guest memory, and interrupts on each completion. A guest's test
//! program drives it with a few stores; nothing else binds to it: vendor 0x1234 is not assigned by
//! the PCI-SIG, emulators use it for devices of their own, and no Linux driver knows this device
//! id.
//!
//! | | |
//! |---|---|
//! | vendor, device | 0x1234, 0x5650 |
//! | class | 0xFF0000 (no class) |
//! | BAR 0 | 64-bit memory, 16 KiB: registers at 0, MSI-X table at 0x1000, pending bits at 0x2000 |
//! | MSI-X | 8 vectors |
//! | MSI | 8 messages |
//!
//! # Registers of BAR 0
//!
//! Loads and stores are 4 or 8 bytes, naturally aligned; an 8-byte access is one to two registers
//! next to each other. Other accesses, and registers that are not listed, read as zero and ignore
//! stores. "W1C": a store of 1 clears the bit.
//!
//! | offset | bits | access | name | meaning |
//! |---|---|---|---|---|
//! | 0x00 | 32 | R | `MAGIC` | 0x56545044 |
//! | 0x04 | 32 | R | `VECTORS` | number of interrupt vectors: 8 |
//! | 0x08 | 32 | R | `MAX_LENGTH` | longest job in bytes: 16 MiB |
//! | 0x10 | 64 | RW | `SOURCE` | I/O virtual address that a job reads |
//! | 0x18 | 64 | RW | `DESTINATION` | I/O virtual address that a job writes |
//! | 0x20 | 32 | RW | `LENGTH` | bytes of a job, 1 to `MAX_LENGTH` |
//! | 0x24 | 32 | RW | `VECTOR` | vector raised when a job ends; 0xFFFFFFFF for none |
//! | 0x28 | 64 | RW | `PATTERN` | what a fill writes, little-endian, repeated |
//! | 0x30 | 32 | W | `COMMAND` | starts a job: 1 copy, 2 fill, 3 checksum |
//! | 0x34 | 32 | R/W1C | `STATUS` | bit 0 busy (read only), bit 1 done, bit 2 failed, bit 3 overrun |
//! | 0x38 | 32 | R | `ERROR` | why the last job failed: 0 it did not, 1 bus mastering off, 2 DMA fault, 3 bad command or length |
//! | 0x40 | 64 | R | `FAULT` | I/O virtual address of the block that could not be moved |
//! | 0x48 | 64 | R | `MOVED` | bytes that the last job has moved so far |
//! | 0x50 | 64 | R | `RESULT` | 64-bit FNV-1a hash of the bytes that the last checksum read |
//! | 0x58 | 64 | R | `COMPLETIONS` | jobs that have ended since reset |
//! | 0x60 | 32 | W | `RAISE` | raises the vector stored, without any DMA |
//!
//! A job takes the values that the registers have when `COMMAND` is stored; stores during the job
//! count for the next one. A `COMMAND` while busy sets the overrun bit and does nothing else. A
//! job moves blocks of at most 32 KiB, in ascending order, each read as a whole before any of it
//! is written: that decides what a copy does to overlapping ranges. A block that faults moves no
//! byte and ends the job. Every job, failed or not, ends in one interrupt, raised after the
//! registers show its end.
#![forbid(unsafe_code)]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crate::dma::DmaError;
use crate::vmm::{Trigger, Worker, WorkerHost};
use crate::vpci::function::{
    BarSpec, FunctionLayout, FunctionResources, MsiSpec, MsixSpec, PciFunction, PciIdentity,
};

/// Vendor id.
pub const VENDOR: u16 = 0x1234;
/// Device id.
pub const DEVICE: u16 = 0x5650;
/// Value of the `MAGIC` register.
pub const MAGIC: u32 = 0x5654_5044;
/// Number of interrupt vectors.
pub const VECTORS: u16 = 8;
/// Longest job in bytes.
pub const MAX_LENGTH: u32 = 16 << 20;
/// `VECTOR` for no interrupt.
pub const NO_VECTOR: u32 = u32::MAX;

/// Bytes that a step of the worker moves.
const BLOCK: usize = 32 * 1024;

/// Offsets of the registers in BAR 0.
pub mod register {
    /// Read-only: [`super::MAGIC`].
    pub const MAGIC: u64 = 0x00;
    /// Read-only: [`super::VECTORS`].
    pub const VECTORS: u64 = 0x04;
    /// Read-only: [`super::MAX_LENGTH`].
    pub const MAX_LENGTH: u64 = 0x08;
    /// Address read, 64 bits.
    pub const SOURCE: u64 = 0x10;
    /// Address written, 64 bits.
    pub const DESTINATION: u64 = 0x18;
    /// Bytes.
    pub const LENGTH: u64 = 0x20;
    /// Vector of the completion.
    pub const VECTOR: u64 = 0x24;
    /// Fill pattern, 64 bits.
    pub const PATTERN: u64 = 0x28;
    /// Starts a job.
    pub const COMMAND: u64 = 0x30;
    /// Status bits.
    pub const STATUS: u64 = 0x34;
    /// Why the last job failed.
    pub const ERROR: u64 = 0x38;
    /// Address of the fault, 64 bits.
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

/// `COMMAND`: copy `SOURCE` to `DESTINATION`.
pub const COMMAND_COPY: u32 = 1;
/// `COMMAND`: fill `DESTINATION` with `PATTERN`.
pub const COMMAND_FILL: u32 = 2;
/// `COMMAND`: checksum `SOURCE`.
pub const COMMAND_CHECKSUM: u32 = 3;

/// `STATUS`: a job is under way.
pub const STATUS_BUSY: u32 = 1 << 0;
/// `STATUS`: a job has ended.
pub const STATUS_DONE: u32 = 1 << 1;
/// `STATUS`: a job has failed.
pub const STATUS_FAILED: u32 = 1 << 2;
/// `STATUS`: a command was stored while busy.
pub const STATUS_OVERRUN: u32 = 1 << 3;

/// `ERROR`: none.
pub const ERROR_NONE: u32 = 0;
/// `ERROR`: bus mastering is off.
pub const ERROR_NOT_MASTER: u32 = 1;
/// `ERROR`: an address does not translate.
pub const ERROR_FAULT: u32 = 2;
/// `ERROR`: the command or the length is out of range.
pub const ERROR_REQUEST: u32 = 3;

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// The checksum that the device computes: 64-bit FNV-1a.
pub fn checksum(bytes: &[u8]) -> u64 {
    extend(FNV_OFFSET, bytes)
}

fn extend(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(FNV_PRIME)
    })
}

/// A job under way: the registers as they were when it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Job {
    /// [`COMMAND_COPY`], [`COMMAND_FILL`] or [`COMMAND_CHECKSUM`].
    pub command: u32,
    /// Address read.
    pub source: u64,
    /// Address written.
    pub destination: u64,
    /// Bytes, 1 to [`MAX_LENGTH`].
    pub length: u32,
    /// Fill pattern.
    pub pattern: u64,
    /// Vector of the completion.
    pub vector: u32,
}

/// The device as plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct TestDeviceState {
    /// 1.
    pub version: u32,
    /// `SOURCE`.
    pub source: u64,
    /// `DESTINATION`.
    pub destination: u64,
    /// `LENGTH`.
    pub length: u32,
    /// `VECTOR`.
    pub vector: u32,
    /// `PATTERN`.
    pub pattern: u64,
    /// `STATUS` without the busy bit.
    pub status: u32,
    /// `ERROR`.
    pub error: u32,
    /// `FAULT`.
    pub fault: u64,
    /// `MOVED`.
    pub moved: u64,
    /// `RESULT`; during a checksum, that of the bytes read so far.
    pub result: u64,
    /// `COMPLETIONS`.
    pub completions: u64,
    /// The job under way.
    pub job: Option<Job>,
}

/// Why a saved device was refused. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TestDeviceStateError {
    /// The version is not known.
    #[error("testdev state has the unknown version {version}")]
    Version {
        /// Version found.
        version: u32,
    },
    /// The job has a bad command or length, or has moved more than its length.
    #[error("testdev state has an impossible job")]
    Job,
    /// The status or error register has an impossible value.
    #[error("testdev state has an impossible status")]
    Status,
}

/// Registers and the job under way; valid by construction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Engine(TestDeviceState);

impl Default for Engine {
    fn default() -> Self {
        Self(TestDeviceState {
            version: 1,
            source: 0,
            destination: 0,
            length: 0,
            vector: NO_VECTOR,
            pattern: 0,
            status: 0,
            error: ERROR_NONE,
            fault: 0,
            moved: 0,
            result: 0,
            completions: 0,
            job: None,
        })
    }
}

impl TryFrom<TestDeviceState> for Engine {
    type Error = TestDeviceStateError;

    fn try_from(state: TestDeviceState) -> Result<Self, Self::Error> {
        if state.version != 1 {
            return Err(TestDeviceStateError::Version {
                version: state.version,
            });
        }
        if state.status & !(STATUS_DONE | STATUS_FAILED | STATUS_OVERRUN) != 0
            || state.error > ERROR_REQUEST
        {
            return Err(TestDeviceStateError::Status);
        }
        let possible = state.job.is_none_or(|job| {
            is_valid(job.command, job.length) && state.moved < u64::from(job.length)
        });
        if possible {
            Ok(Self(state))
        } else {
            Err(TestDeviceStateError::Job)
        }
    }
}

fn is_valid(command: u32, length: u32) -> bool {
    (COMMAND_COPY..=COMMAND_CHECKSUM).contains(&command) && (1..=MAX_LENGTH).contains(&length)
}

/// What a store asks for besides its register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    Nothing,
    /// Run the worker.
    Work,
    /// Raise a vector.
    Raise(u32),
}

impl Engine {
    fn load(&self, offset: u64) -> u32 {
        let state = &self.0;
        let wide = |value: u64| (value >> (offset % 8 * 8)) as u32;
        match offset {
            register::MAGIC => MAGIC,
            register::VECTORS => VECTORS.into(),
            register::MAX_LENGTH => MAX_LENGTH,
            register::LENGTH => state.length,
            register::VECTOR => state.vector,
            register::STATUS => state.status | u32::from(state.job.is_some()),
            register::ERROR => state.error,
            0x10..0x18 => wide(state.source),
            0x18..0x20 => wide(state.destination),
            0x28..0x30 => wide(state.pattern),
            0x40..0x48 => wide(state.fault),
            0x48..0x50 => wide(state.moved),
            0x50..0x58 => wide(state.result),
            0x58..0x60 => wide(state.completions),
            _ => 0,
        }
    }

    fn store(&mut self, offset: u64, value: u32) -> Effect {
        let state = &mut self.0;
        let wide = |register: &mut u64| {
            let shift = offset % 8 * 8;
            *register = *register & !(0xffff_ffff << shift) | u64::from(value) << shift;
        };
        match offset {
            0x10..0x18 => wide(&mut state.source),
            0x18..0x20 => wide(&mut state.destination),
            0x28..0x30 => wide(&mut state.pattern),
            register::LENGTH => state.length = value,
            register::VECTOR => state.vector = value,
            register::STATUS => {
                state.status &= !(value & (STATUS_DONE | STATUS_FAILED | STATUS_OVERRUN));
            }
            register::COMMAND => return self.start(value),
            register::RAISE => return Effect::Raise(value),
            _ => {}
        }
        Effect::Nothing
    }

    fn start(&mut self, command: u32) -> Effect {
        let state = &mut self.0;
        if state.job.is_some() {
            state.status |= STATUS_OVERRUN;
            return Effect::Nothing;
        }
        state.moved = 0;
        state.error = ERROR_NONE;
        state.fault = 0;
        if !is_valid(command, state.length) {
            let vector = state.vector;
            self.end(ERROR_REQUEST, 0);
            return Effect::Raise(vector);
        }
        if command == COMMAND_CHECKSUM {
            state.result = FNV_OFFSET;
        }
        state.job = Some(Job {
            command,
            source: state.source,
            destination: state.destination,
            length: state.length,
            pattern: state.pattern,
            vector: state.vector,
        });
        Effect::Work
    }

    /// Ends a job.
    fn end(&mut self, error: u32, fault: u64) {
        let state = &mut self.0;
        state.job = None;
        state.error = error;
        state.fault = fault;
        state.completions = state.completions.wrapping_add(1);
        state.status |= STATUS_DONE;
        if error != ERROR_NONE {
            state.status |= STATUS_FAILED;
        }
    }
}

/// The device. See the [module](self) for its registers.
#[derive(Debug)]
pub struct TestDevice {
    serial: u32,
    resources: OnceLock<FunctionResources>,
    trigger: OnceLock<Arc<dyn Trigger>>,
    /// Held for a step of the worker, and by reset, which thereby waits for DMA under way. Taken
    /// before `engine`.
    block: Mutex<Box<[u8]>>,
    engine: Mutex<Engine>,
}

impl TestDevice {
    /// A device with the serial number `serial`, whose worker `workers` adopts.
    ///
    /// # Errors
    ///
    /// That of the VMM's loop.
    pub fn new(serial: u32, workers: &dyn WorkerHost) -> io::Result<Arc<Self>> {
        let device = Arc::new(Self {
            serial,
            resources: OnceLock::new(),
            trigger: OnceLock::new(),
            block: Mutex::new(vec![0; BLOCK].into()),
            engine: Mutex::default(),
        });
        let weak: Weak<Self> = Arc::downgrade(&device);
        let trigger = workers.adopt(weak)?;
        // The cell was made a moment ago: nobody else has filled it.
        let _ = device.trigger.set(trigger);
        Ok(device)
    }

    /// The device as plain data, between two steps of its worker.
    pub fn save(&self) -> TestDeviceState {
        let _idle = lock(&self.block);
        lock(&self.engine).0
    }

    /// Takes over a saved device, and goes on with its job.
    ///
    /// # Errors
    ///
    /// [`TestDeviceStateError`]; nothing has changed then.
    pub fn restore(&self, state: TestDeviceState) -> Result<(), TestDeviceStateError> {
        let engine = Engine::try_from(state)?;
        let _idle = lock(&self.block);
        *lock(&self.engine) = engine;
        self.work();
        Ok(())
    }

    fn work(&self) {
        if let Some(trigger) = self.trigger.get() {
            trigger.trigger();
        }
    }

    fn raise(&self, vector: u32) {
        let Ok(vector) = u16::try_from(vector) else {
            return;
        };
        if let (true, Some(resources)) = (vector < VECTORS, self.resources.get()) {
            resources.interrupts.raise(vector);
        }
    }

    fn act(&self, effect: Effect) {
        match effect {
            Effect::Nothing => {}
            Effect::Work => self.work(),
            Effect::Raise(vector) => self.raise(vector),
        }
    }
}

/// Moves one block of a job; `hash` is the checksum so far. On failure, the error and the address.
fn move_block(
    resources: &FunctionResources,
    job: &Job,
    moved: u64,
    hash: &mut u64,
    block: &mut [u8],
) -> Result<(), (u32, u64)> {
    let refused = |error, address| match error {
        DmaError::NotMaster => (ERROR_NOT_MASTER, address),
        DmaError::Fault { .. } | DmaError::TooLong { .. } => (ERROR_FAULT, address),
    };
    // An address beyond the end of the address space is no RAM: let it saturate, not wrap.
    let source = job.source.saturating_add(moved);
    let destination = job.destination.saturating_add(moved);
    if job.command == COMMAND_FILL {
        // Blocks are whole patterns long, but for the last one.
        let pattern = job.pattern.to_le_bytes();
        for (index, byte) in block.iter_mut().enumerate() {
            *byte = pattern[index % 8];
        }
    } else {
        let read = resources.dma.read(source, block);
        read.map_err(|error| refused(error, source))?;
    }
    if job.command == COMMAND_CHECKSUM {
        *hash = extend(*hash, block);
        return Ok(());
    }
    let written = resources.dma.write(destination, block);
    written.map_err(|error| refused(error, destination))
}

impl Worker for TestDevice {
    fn name(&self) -> String {
        format!("testdev-{:x}", self.serial)
    }

    fn process(&self) -> bool {
        let mut block = lock(&self.block);
        let TestDeviceState {
            job, moved, result, ..
        } = lock(&self.engine).0;
        let (Some(job), Some(resources)) = (job, self.resources.get()) else {
            return false;
        };
        let count = (u64::from(job.length) - moved).min(BLOCK as u64);
        let mut hash = result;
        let outcome = move_block(
            resources,
            &job,
            moved,
            &mut hash,
            &mut block[..count as usize],
        );
        let mut engine = lock(&self.engine);
        match outcome {
            Ok(()) => {
                engine.0.result = hash;
                engine.0.moved = moved + count;
                if engine.0.moved < u64::from(job.length) {
                    return true;
                }
                engine.end(ERROR_NONE, 0);
            }
            Err((error, address)) => engine.end(error, address),
        }
        drop(engine);
        // Still under the block's lock, so that no interrupt comes after a reset.
        self.raise(job.vector);
        false
    }
}

impl PciFunction for TestDevice {
    fn layout(&self) -> FunctionLayout {
        let mut layout = FunctionLayout {
            kind: "testdev",
            identity: PciIdentity {
                vendor: VENDOR,
                device: DEVICE,
                revision: 1,
                base_class: 0xff,
                subsystem_vendor: VENDOR,
                subsystem: DEVICE,
                serial: self.serial,
                ..PciIdentity::default()
            },
            msix: Some(MsixSpec {
                vectors: VECTORS,
                table_bar: 0,
                table_offset: 0x1000,
                pba_bar: 0,
                pba_offset: 0x2000,
            }),
            msi: Some(MsiSpec {
                messages: VECTORS as u8,
            }),
            ..FunctionLayout::default()
        };
        layout.bars[0] = BarSpec::Memory64 {
            size: 0x4000,
            prefetchable: false,
        };
        layout
    }

    fn connect(&self, resources: FunctionResources) {
        // A second bus gets nothing: the device stays with its first.
        let _ = self.resources.set(resources);
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (dwords, rest) = data.as_chunks_mut::<4>();
        if !rest.is_empty() {
            return;
        }
        let engine = lock(&self.engine);
        for (at, bytes) in (offset..).step_by(4).zip(dwords) {
            *bytes = engine.load(at).to_le_bytes();
        }
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        let (dwords, rest) = data.as_chunks::<4>();
        if !rest.is_empty() {
            return;
        }
        for (at, bytes) in (offset..).step_by(4).zip(dwords) {
            let effect = lock(&self.engine).store(at, u32::from_le_bytes(*bytes));
            self.act(effect);
        }
    }

    fn reset(&self) {
        let _idle = lock(&self.block);
        *lock(&self.engine) = Engine::default();
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "testdev_tests.rs"]
mod tests;
