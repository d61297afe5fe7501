//! The bed without a CPU: what a guest's instruction would make exit goes straight into the
//! library.
//!
//! Nothing happens by itself. The host's workers run inside [`Host::settle`], [`Host::step`] and
//! [`Guest::next_interrupt`] only, on the calling thread, so a check on one thread sees the same
//! order every time. What a CPU adds is in the `code` function: it executes the few instructions
//! that a hypercall page is made of.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;
use vm_memory::GuestAddress;
use vm_vpci::hypercall::{CallRegisters, Outcome, XmmBlock};
use vm_vpci::mem::{GuestRam, RamMap};
use vm_vpci::msr::DEFAULT_HYPERCALL_PORT;
use vm_vpci::partition::PartitionCounters;
use vm_vpci::pviommu::IommuReport;
use vm_vpci::vmm::{MonotonicClock, Msi, MsiSink};
use vm_vpci::vpci::Ejected;
use vm_vpci::vpci::bus::BusReport;
use vm_vpci::{BusSpec, FunctionSpec, Partition, PartitionConfig, PartitionHost};

use super::workers::Workers;
use crate::bed::{Bed, BedKind, BootError, Machine};
use crate::guest::{Call, Cpl, Fault, GENERAL_PROTECTION, Guest, INVALID_OPCODE, Returned};
use crate::host::{APIC_HZ, BusSetup, Host, HostError, SIM_TSC_HZ, Setup};

/// First address that the model may use: a page at 0 would look like a forgotten address.
const FREE_FROM: u64 = 0x1_0000;
/// Instructions of one hypercall after which the code is taken for a loop without an end. A rep
/// call has at most 4095 elements, and each pass does one at least.
const MOST_INSTRUCTIONS: usize = 64 * 1024;

/// The bed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sim;

impl Bed for Sim {
    fn kind(&self) -> BedKind {
        BedKind::Sim
    }

    fn available(&self) -> Result<(), String> {
        Ok(())
    }

    fn boot(&self, setup: &Setup) -> Result<Machine, BootError> {
        let vm = Arc::new(SimVm::new(setup)?);
        Ok(Machine {
            guest: vm.clone(),
            host: vm,
        })
    }
}

/// Interrupts on their way to each VP, oldest first, and those that no VP can take.
#[derive(Debug)]
struct Interrupts {
    pending: Mutex<Vec<VecDeque<u8>>>,
    stray: Mutex<Vec<Msi>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MsiSink for Interrupts {
    fn raise_msi(&self, msi: Msi) {
        let low = (msi.address >> 12) as u32 & 0xff;
        let high = (msi.address >> 32) as u32 & 0xffff_ff00;
        // Fixed, edge-triggered, physical destination.
        let fixed = msi.address as u32 & 0xfff0_0fff == 0xfee0_0000;
        let mut pending = lock(&self.pending);
        match pending.get_mut((high | low) as usize) {
            Some(vp) if fixed && (16..256).contains(&msi.data) => vp.push_back(msi.data as u8),
            _ => lock(&self.stray).push(msi),
        }
    }
}

#[derive(Debug)]
struct SimVm {
    partition: Partition,
    ram: GuestRam,
    free: Range<u64>,
    workers: Arc<Workers>,
    interrupts: Arc<Interrupts>,
    vps: u32,
}

/// Registers during a hypercall.
struct Registers {
    call: Call,
    control: u64,
    xmm: [u128; 6],
}

impl CallRegisters for Registers {
    fn cpl(&self) -> u8 {
        match self.call.cpl {
            Cpl::Kernel => 0,
            Cpl::User => 3,
        }
    }

    fn control(&self) -> u64 {
        self.control
    }

    fn input(&self) -> u64 {
        self.call.rdx
    }

    fn output(&self) -> u64 {
        self.call.r8
    }

    fn xmm(&mut self) -> Option<XmmBlock> {
        let mut block = [0; 96];
        for (bytes, register) in block.chunks_exact_mut(16).zip(self.xmm) {
            bytes.copy_from_slice(&register.to_le_bytes());
        }
        Some(block)
    }

    fn set_xmm(&mut self, xmm: &XmmBlock) {
        for (register, bytes) in self.xmm.iter_mut().zip(xmm.chunks_exact(16)) {
            *register = bytes
                .iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u128::from(*byte));
        }
    }
}

/// XMM registers that a caller holds who does not pass anything in them.
const HELD_XMM: [u128; 6] = [
    0x1111_2222_3333_4444_5555_6666_7777_8880,
    0x1111_2222_3333_4444_5555_6666_7777_8881,
    0x1111_2222_3333_4444_5555_6666_7777_8882,
    0x1111_2222_3333_4444_5555_6666_7777_8883,
    0x1111_2222_3333_4444_5555_6666_7777_8884,
    0x1111_2222_3333_4444_5555_6666_7777_8885,
];

impl SimVm {
    fn new(setup: &Setup) -> Result<Self, BootError> {
        let failed = |error: &dyn std::error::Error| BootError::Failed(error.to_string());
        let regions: Vec<_> = setup
            .ram
            .iter()
            .map(|range| {
                (
                    GuestAddress(range.start),
                    (range.end - range.start) as usize,
                )
            })
            .collect();
        let map = RamMap::from_ranges(&regions).map_err(|error| failed(&error))?;
        let ram = GuestRam::new(&map);
        let Some(first) = setup.ram.first() else {
            return Err(BootError::Failed("no RAM".into()));
        };
        let workers = Arc::new(Workers::default());
        let interrupts = Arc::new(Interrupts {
            pending: Mutex::new(vec![VecDeque::new(); setup.vps as usize]),
            stray: Mutex::default(),
        });
        let config = PartitionConfig {
            apic_ids: (0..setup.vps).collect(),
            tsc_hz: SIM_TSC_HZ,
            apic_hz: APIC_HZ,
            mmio: setup.mmio.clone(),
            features: setup.features,
            hypercall_port: DEFAULT_HYPERCALL_PORT,
            vmbus: setup.vmbus,
            iommu: setup.iommu,
        };
        let services = PartitionHost {
            ram: ram.clone(),
            msi: interrupts.clone(),
            workers: workers.clone(),
            clock: Arc::new(MonotonicClock::default()),
            doorbells: None,
            bars: None,
        };
        let partition = Partition::new(config, services).map_err(|error| failed(&error))?;
        let vm = Self {
            partition,
            ram,
            free: FREE_FROM..first.end,
            workers,
            interrupts,
            vps: setup.vps,
        };
        for bus in &setup.buses {
            vm.plug(bus).map_err(|error| failed(&error))?;
        }
        Ok(vm)
    }

    /// Executes the code at `call.entry` up to its return, as far as such code goes.
    fn code(&self, registers: &mut Registers) -> Result<u64, Fault> {
        let entry = registers.call.entry;
        let mut rip = entry;
        let mut rax = 0;
        for _ in 0..MOST_INSTRUCTIONS {
            let mut code = [0; 4];
            if self.ram.read(rip, &mut code).is_err() {
                let reason = format!("the call goes to {rip:#x}, which is not RAM");
                return Err(Fault::Host(reason));
            }
            match code {
                [0xf3, 0x0f, 0x1e, 0xfa] => rip += 4,
                [0xe7, port, ..] if port == self.partition.hypercall_port() => {
                    match self.partition.hypercall(registers) {
                        Outcome::Complete { result } => {
                            rax = result;
                            rip += 2;
                        }
                        Outcome::Restart { control } => {
                            registers.control = control;
                            rip = entry;
                        }
                        Outcome::InvalidOpcode => return Err(exception(INVALID_OPCODE, None, rip)),
                    }
                }
                [0xc3, ..] => return Ok(rax),
                [0xcc, ..] => return Err(exception(3, None, rip)),
                [0x0f, 0x0b, ..] => return Err(exception(INVALID_OPCODE, None, rip)),
                _ => {
                    let reason = format!("the code {code:02x?} at {rip:#x} is not for this bed");
                    return Err(Fault::Host(reason));
                }
            }
        }
        Err(Fault::Host("the hypercall does not end".into()))
    }
}

fn exception(vector: u8, error_code: Option<u32>, address: u64) -> Fault {
    Fault::Exception {
        vector,
        error_code,
        address,
    }
}

impl Guest for SimVm {
    fn vps(&self) -> u32 {
        self.vps
    }

    fn memory(&self) -> &GuestRam {
        &self.ram
    }

    fn free_ram(&self) -> Range<u64> {
        self.free.clone()
    }

    fn cpuid(&self, _vp: u32, leaf: u32, _subleaf: u32) -> Result<[u32; 4], Fault> {
        let leaves = self.partition.cpuid_leaves();
        let found = leaves.iter().find(|found| found.function == leaf);
        Ok(found.map_or([0; 4], |leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]))
    }

    fn rdmsr(&self, vp: u32, msr: u32) -> Result<u64, Fault> {
        let value = self.partition.read_msr(vp, msr);
        value.map_err(|_| exception(GENERAL_PROTECTION, Some(0), 0))
    }

    fn wrmsr(&self, vp: u32, msr: u32, value: u64) -> Result<(), Fault> {
        let partition = &self.partition;
        match partition.write_msr_forwarding(vp, msr, value, &mut |_, _| {}) {
            Ok(_effect) => Ok(()),
            Err(_) => Err(exception(GENERAL_PROTECTION, Some(0), 0)),
        }
    }

    fn hypercall(&self, _vp: u32, call: &Call) -> Result<Returned, Fault> {
        let before = call.xmm.unwrap_or(HELD_XMM);
        let mut registers = Registers {
            call: *call,
            control: call.control,
            xmm: before,
        };
        let rax = self.code(&mut registers)?;
        Ok(Returned {
            rax,
            rcx: registers.control,
            rdx: registers.call.rdx,
            r8: registers.call.r8,
            xmm: registers.xmm,
            preserved: call.xmm.is_some() || registers.xmm == before,
        })
    }

    fn mmio_read(&self, _vp: u32, gpa: u64, width: usize) -> Result<u64, Fault> {
        let mut data = [0xff; 8];
        if !self.partition.mmio_read(gpa, &mut data[..width]) {
            data = [0xff; 8];
        }
        data[width..].fill(0);
        Ok(u64::from_le_bytes(data))
    }

    fn mmio_write(&self, _vp: u32, gpa: u64, width: usize, value: u64) -> Result<(), Fault> {
        // A store that nobody claims goes nowhere, as on a PC.
        let _claimed = self
            .partition
            .mmio_write(gpa, &value.to_le_bytes()[..width]);
        Ok(())
    }

    fn next_interrupt(&self, vp: u32, _timeout: Duration) -> Result<Option<u8>, Fault> {
        self.workers.settle();
        if let Some(stray) = lock(&self.interrupts.stray).first() {
            return Err(Fault::Host(format!(
                "no VP can take the interrupt {stray:x?}"
            )));
        }
        let mut pending = lock(&self.interrupts.pending);
        Ok(pending.get_mut(vp as usize).and_then(VecDeque::pop_front))
    }
}

impl Host for SimVm {
    fn plug(&self, bus: &BusSetup) -> Result<(), HostError> {
        let refused = |error: &dyn std::error::Error| HostError::Refused(error.to_string());
        let mut functions = Vec::new();
        for function in &bus.functions {
            let made = function
                .make(&*self.workers)
                .map_err(|error| refused(&error))?;
            functions.push(FunctionSpec::new(function.number, made).with_iommu(function.iommu));
        }
        let spec = BusSpec {
            instance: bus.instance,
            functions,
        };
        self.partition.plug(spec).map_err(|error| refused(&error))
    }

    fn eject(&self, instance: Uuid, done: Ejected) -> Result<(), HostError> {
        let asked = self.partition.eject(&instance, done);
        asked.map_err(|error| HostError::Refused(error.to_string()))
    }

    fn eject_function(&self, instance: Uuid, function: u8, done: Ejected) -> Result<(), HostError> {
        let asked = self.partition.eject_function(&instance, function, done);
        asked.map_err(|error| HostError::Refused(error.to_string()))
    }

    fn remove_function(&self, instance: Uuid, function: u8) -> Result<(), HostError> {
        let removed = self.partition.remove_function(&instance, function);
        removed
            .map(drop)
            .map_err(|error| HostError::Refused(error.to_string()))
    }

    fn remove(&self, instance: Uuid) -> Result<(), HostError> {
        match self.partition.remove(&instance) {
            true => Ok(()),
            false => Err(HostError::Refused(format!("no bus {instance}"))),
        }
    }

    fn reset(&self) -> Result<(), HostError> {
        self.partition.reset();
        for vp in &mut *lock(&self.interrupts.pending) {
            vp.clear();
        }
        Ok(())
    }

    fn settle(&self) {
        self.workers.settle();
    }

    fn step(&self) -> bool {
        self.workers.step()
    }

    fn counters(&self) -> PartitionCounters {
        self.partition.counters()
    }

    fn buses(&self) -> Vec<BusReport> {
        self.partition.buses()
    }

    fn iommu(&self) -> Option<IommuReport> {
        self.partition.iommu()
    }
}
