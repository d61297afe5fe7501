//! Exits on this machine's KVM: a guest of two instructions calls the hypercall page, or a page like
//! it that writes another port, for ever.
#![allow(unsafe_code)]

use std::sync::Arc;

use criterion::{Criterion, Throughput};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vm_vpci::Partition;
use vm_vpci::kvm::{self, HostSupport, hypercall};
use vm_vpci::mem::GuestRam;

use crate::guest::{self, Interrupts};

const RAM: usize = 2 << 20;
/// Page tables: one 2 MiB page, mapped to itself.
const TABLES: [u64; 3] = [0x1000, 0x2000, 0x3000];
const CODE: u64 = 0x4000;
/// The hypercall page, and one that is the same but for its port.
const CALL_PAGE: u64 = 0x5000;
const BARE_PAGE: u64 = 0x7000;
const STACK: u64 = 0x9000;
/// A port without a device.
const BARE_PORT: u8 = 0x8e;
/// call rbx; jmp to the call.
const LOOP: [u8; 4] = [0xff, 0xd3, 0xeb, 0xfc];

/// A VM with one vCPU in long mode, and the partition that answers it.
struct Machine {
    vcpu: VcpuFd,
    partition: Partition,
    /// Below the partition's, and above what they refer to.
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl Machine {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        let kvm = Kvm::new()?;
        HostSupport::check(&kvm)?;
        let vm = kvm.create_vm()?;
        vm.create_irq_chip()?;
        kvm::prepare_vm(&vm)?;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)])?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: RAM as u64,
            userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        };
        // SAFETY: the memory outlives the VM, which is dropped before it.
        unsafe { vm.set_user_memory_region(region)? };
        let ram = GuestRam::new(&memory);
        let (partition, _) = guest::partition(ram, Arc::new(Interrupts::default()));
        let _effect = partition.write_msr_forwarding(0, 0x4000_0000, 0x8100 << 48, &mut |_, _| {});
        let _effect = partition.write_msr_forwarding(0, 0x4000_0001, CALL_PAGE | 1, &mut |_, _| {});
        let mut page = [0; 7];
        memory.read_slice(&mut page, GuestAddress(CALL_PAGE))?;
        let port = page
            .iter()
            .position(|byte| *byte == partition.hypercall_port());
        page[port.ok_or("no port in the hypercall page")?] = BARE_PORT;
        memory.write_slice(&page, GuestAddress(BARE_PAGE))?;
        memory.write_slice(&LOOP, GuestAddress(CODE))?;
        for (table, entry) in TABLES.iter().zip([TABLES[1] | 3, TABLES[2] | 3, 0x83]) {
            memory.write_obj(entry, GuestAddress(*table))?;
        }
        let mut vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        kvm::prepare_vcpu(&mut vcpu);
        enter_long_mode(&vcpu)?;
        Ok(Self {
            vcpu,
            partition,
            _vm: vm,
            _memory: memory,
        })
    }

    /// Lets the guest call `page` from now on, with a control word.
    fn aim(&self, page: u64, control: u64, rdx: u64) {
        let regs = kvm_regs {
            rip: CODE,
            rsp: STACK,
            rflags: 2,
            rbx: page,
            rcx: control,
            rdx,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).expect("registers");
    }

    /// Runs the guest to its next OUT; returns the port.
    fn run(&mut self) -> u16 {
        match self.vcpu.run().expect("a guest that runs") {
            VcpuExit::IoOut(port, _) => port,
            other => panic!("{other:?}"),
        }
    }

    /// Answers the hypercall that the guest has stopped in.
    fn answer(&mut self) {
        let partition = &self.partition;
        hypercall::answer(&mut self.vcpu, |registers| partition.hypercall(registers))
            .expect("registers");
    }

    fn hypercalls(&self) -> u64 {
        let counters = self.partition.counters().hypercalls;
        let known = counters
            .calls
            .iter()
            .map(|call| call.succeeded + call.failed);
        counters.unknown_codes + known.sum::<u64>()
    }
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    sregs.cr3 = TABLES[0];
    sregs.cr4 = 1 << 5;
    sregs.cr0 = 1 << 31 | 1 << 5 | 1 << 4 | 1;
    sregs.efer = 1 << 8 | 1 << 10;
    let data = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 8,
        type_: 11,
        db: 0,
        l: 1,
        ..data
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    vcpu.set_sregs(&sregs)
}

pub(crate) fn bench(criterion: &mut Criterion) {
    let mut machine = match Machine::new() {
        Ok(machine) => machine,
        Err(error) => {
            println!("SKIPPED kvm: no usable KVM: {error}");
            return;
        }
    };
    let mut group = criterion.benchmark_group("kvm");
    group.throughput(Throughput::Elements(1));
    machine.aim(BARE_PAGE, 0, 0);
    assert_eq!(machine.run(), u16::from(BARE_PORT));
    group.bench_function("bare port exit", |bencher| bencher.iter(|| machine.run()));
    let port = u16::from(machine.partition.hypercall_port());
    for (name, control, rdx) in [
        ("hypercall, unknown code", 0x1_007f, 0),
        ("hypercall, SIGNAL_EVENT of no connection", 0x1_005d, 0xffff),
    ] {
        machine.aim(CALL_PAGE, control, rdx);
        assert_eq!(machine.run(), port);
        let before = machine.hypercalls();
        // The guest waits in its OUT meanwhile: its registers are there to be read and written.
        group.bench_function(format!("host time alone: {name}"), |bencher| {
            bencher.iter(|| machine.answer());
        });
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                machine.answer();
                machine.run()
            });
            assert!(machine.hypercalls() > before);
        });
    }
    group.finish();
}
