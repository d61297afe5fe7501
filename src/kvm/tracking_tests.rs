//! Two vCPUs on this machine's KVM that store to the same page tables.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::tracking::KvmRam;
use super::{InternalError, answer_store, internal_error, prepare_vcpu, prepare_vm, step_over};
use crate::backend::shadow::tests::FakeSpace;
use crate::backend::shadow::{Shadow, ShadowBackend, ShadowConfig};
use crate::backend::{PagedBackend, PagedDomain};
use crate::gate::{Kick, RunGate};
use crate::hv::pviommu::entry;
use crate::mem::{GuestRam, RamMap};
use crate::pviommu::{Levels, PageTable};
use crate::vmm::TrackedPages;

const RAM_SIZE: u64 = 32 << 20;
/// Tables of the CPUs: 1 GiB of identity.
const CPU_TABLES: u64 = 0x1000;
/// Code of the vCPUs, 1 MiB for each.
const CODE: u64 = 0x10_0000;
/// Descriptors of segments and of exception handlers, a stack for each vCPU, and the handlers.
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const STACKS: u64 = 0x7000;
/// Where vCPUs leave results, a page for each.
const RESULTS: u64 = 0x8000;
const HANDLERS: u64 = 0xa000;
/// Tables of the domain, and the lowest of them, which is shared.
const ROOT: u64 = 0x80_0000;
const LEVEL_3: u64 = ROOT + 0x1000;
const LEVEL_2: u64 = ROOT + 0x2000;
const SHARED: u64 = ROOT + 0x3000;
/// Where the vCPUs have tables of their own, and pages to map.
const OWN: u64 = 0x90_0000;
const DATA: u64 = 0x100_0000;

const LINK: u64 = entry::PRESENT | entry::WRITABLE | entry::USER | entry::ACCESSED;
const PAGE: u64 = LINK | entry::DIRTY;

/// An entry that maps a page of data.
fn leaf(page: u64) -> u64 {
    (DATA + page * 0x1000) | PAGE
}

/// Threads to kick, by vCPU.
#[derive(Debug, Default)]
struct Threads(Mutex<Vec<(usize, libc::pthread_t)>>);

impl Kick for Threads {
    fn kick(&self, vcpu: usize) {
        for (number, thread) in &*self.0.lock().unwrap() {
            if *number == vcpu {
                // SAFETY: the thread is alive: it takes itself off the list before it ends.
                unsafe { libc::pthread_kill(*thread, SIGRTMIN()) };
            }
        }
    }
}

/// Code under construction.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn set(&mut self, opcode: [u8; 2], value: u64) {
        self.0.extend(opcode);
        self.0.extend(value.to_le_bytes());
    }

    /// Address in RDI, value in RAX: mov [rdi], rax
    fn store(&mut self, gpa: u64, value: u64) {
        self.set([0x48, 0xbf], gpa);
        self.set([0x48, 0xb8], value);
        self.0.extend([0x48, 0x89, 0x07]);
    }

    /// lock cmpxchg [rdi], rcx; ZF goes to `result`: sete dl; mov [rdi], dl
    fn exchange(&mut self, gpa: u64, old: u64, new: u64, result: u64) {
        self.set([0x48, 0xbf], gpa);
        self.set([0x48, 0xb8], old);
        self.set([0x48, 0xb9], new);
        self.0
            .extend([0xf0, 0x48, 0x0f, 0xb1, 0x0f, 0x0f, 0x94, 0xc2]);
        self.set([0x48, 0xbf], result);
        self.0.extend([0x88, 0x17]);
    }

    /// `count` times: add 0x10 to [rdi] by compare-exchange
    fn increments(&mut self, gpa: u64, count: u64) {
        self.set([0x48, 0xbf], gpa);
        self.set([0x48, 0xbe], count);
        self.0.extend([0x48, 0x8b, 0x07]); // mov rax, [rdi]
        self.0.extend([0x48, 0x8d, 0x48, 0x10]); // lea rcx, [rax + 0x10]
        self.0.extend([0xf0, 0x48, 0x0f, 0xb1, 0x0f]); // lock cmpxchg [rdi], rcx
        self.0.extend([0x75, 0xf5]); // jnz to the lea
        self.0.extend([0x48, 0xff, 0xce, 0x75, 0xed]); // dec rsi; jnz to the mov
    }

    /// Leaves the guest: the test looks, with this number.
    fn look(&mut self, number: u32) {
        self.0.push(0xb8); // mov eax
        self.0.extend(number.to_le_bytes());
        self.0.extend([0xe7, 0x10]); // out 0x10, eax
    }

    fn end(&mut self) {
        self.0.extend([0xe6, 0x11]); // out 0x11, al
    }
}

/// A VM whose domain is followed.
struct Bed {
    map: RamMap,
    ram: Arc<KvmRam>,
    gate: Arc<RunGate>,
    threads: Arc<Threads>,
    shadow: Arc<Shadow>,
    space: Arc<FakeSpace>,
    domain: Arc<dyn PagedDomain>,
    vcpus: Vec<VcpuFd>,
}

impl Bed {
    /// Nothing, after saying so, where there is no KVM.
    fn new(test: &str, codes: Vec<Code>) -> Option<Self> {
        let Ok(kvm) = Kvm::new() else {
            println!("SKIPPED {test}: no /dev/kvm");
            return None;
        };
        extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), ignore).unwrap();
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        prepare_vm(&vm).unwrap();
        let map = RamMap::from_ranges(&[(GuestAddress(0), RAM_SIZE as usize)]).unwrap();
        let write = |gpa: u64, value: u64| map.write_obj(value, GuestAddress(gpa)).unwrap();
        write(CPU_TABLES, (CPU_TABLES + 0x1000) | 3);
        write(CPU_TABLES + 0x1000, (CPU_TABLES + 0x2000) | 3);
        for index in 0..512 {
            write(CPU_TABLES + 0x2000 + index * 8, index << 21 | 0x83);
        }
        // Of 64-bit code and data, as the registers have them.
        write(GDT + 0x10, 0x00af_9b00_0000_ffff);
        write(GDT + 0x18, 0x00cf_9300_0000_ffff);
        for (code, number) in codes.iter().zip(0..) {
            let gpa = GuestAddress(CODE * (number + 1));
            map.write_slice(&code.0, gpa).unwrap();
        }
        write(ROOT, LEVEL_3 | LINK);
        write(LEVEL_3, LEVEL_2 | LINK);
        write(LEVEL_2, SHARED | LINK);
        let gate = Arc::new(RunGate::new(codes.len()));
        let threads = Arc::new(Threads::default());
        let plugged = KvmRam::plug(
            vm.clone(),
            map.clone(),
            0..1000,
            true,
            gate.clone(),
            threads.clone(),
        );
        let ram = Arc::new(plugged.unwrap());
        let vcpus = (0..codes.len() as u64)
            .map(|number| vcpu(vm.create_vcpu(number).unwrap(), CODE * (number + 1)))
            .collect();
        let shadow = Shadow::new(ShadowConfig::default(), GuestRam::new(&map), ram.clone());
        let shadow = Arc::new(shadow);
        let whole = 0..RAM_SIZE;
        let space = FakeSpace::with_ram(std::slice::from_ref(&whole), None);
        let table = PageTable {
            root: ROOT,
            levels: Levels::Four,
        };
        let domain = ShadowBackend(shadow.clone()).follow(table, space.clone());
        Some(Self {
            map,
            ram,
            gate,
            threads,
            shadow,
            space,
            domain: domain.unwrap(),
            vcpus,
        })
    }

    fn get(&self, gpa: u64) -> u64 {
        self.map.read_obj(GuestAddress(gpa)).unwrap()
    }

    /// Runs all vCPUs to their ends; `look` gets the vCPU and the number of each look.
    fn run(&mut self, look: impl Fn(&Self, usize, u32) + Sync) {
        let vcpus = std::mem::take(&mut self.vcpus);
        let (bed, look) = (&*self, &look);
        thread::scope(|scope| {
            for (number, mut fd) in vcpus.into_iter().enumerate() {
                scope.spawn(move || {
                    bed.as_vcpu(number, || while bed.step(number, &mut fd, look) {});
                });
            }
        });
    }

    /// One entry into the guest. False at its end.
    fn step(&self, number: usize, fd: &mut VcpuFd, look: &dyn Fn(&Self, usize, u32)) -> bool {
        let entered = self.gate.enter(number);
        let exit = fd.run();
        drop(entered);
        match exit {
            Ok(VcpuExit::IoOut(0x10, data)) => {
                let what = u32::from_le_bytes(data.try_into().unwrap());
                look(self, number, what);
            }
            Ok(VcpuExit::IoOut(0x11, _)) => return false,
            Ok(VcpuExit::MmioWrite(..)) => {
                assert!(answer_store(fd, &self.shadow, &self.ram));
            }
            Ok(VcpuExit::InternalError) => {
                self.internal_error(number, fd);
            }
            Ok(VcpuExit::Intr) => {}
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            other => {
                let other = format!("{other:?}");
                panic!("{other} at {:#x}", fd.get_regs().unwrap().rip);
            }
        }
        true
    }
}

impl Bed {
    /// As a VMM does.
    fn internal_error(&self, number: usize, fd: &mut VcpuFd) {
        match internal_error(fd) {
            Some(InternalError::Emulation) => {
                let time = Duration::from_secs(5);
                step_over(fd, number, &self.shadow, &self.ram, time, false).unwrap();
            }
            Some(InternalError::Delivery { .. }) => {}
            other => panic!("{other:?}"),
        }
    }

    /// Lets all vCPUs execute `code` upon an exception.
    fn handle(&self, vector: u64, code: &[u8]) {
        let at = HANDLERS + vector * 0x80;
        self.map.write_slice(code, GuestAddress(at)).unwrap();
        let gate = (at & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | (at >> 16) << 48;
        for (word, value) in [gate, at >> 32].into_iter().zip(0..) {
            let gpa = GuestAddress(IDT + vector * 16 + value * 8);
            self.map.write_obj(word, gpa).unwrap();
        }
    }

    /// Calls `f` in a thread that can be kicked as that of the vCPU.
    fn as_vcpu<T>(&self, number: usize, f: impl FnOnce() -> T) -> T {
        // SAFETY: no more than the number of this thread.
        let this = unsafe { libc::pthread_self() };
        self.threads.0.lock().unwrap().push((number, this));
        let result = f();
        self.threads.0.lock().unwrap().retain(|(n, _)| *n != number);
        result
    }
}

/// Prepares a vCPU to run 64-bit code.
fn vcpu(mut fd: VcpuFd, rip: u64) -> VcpuFd {
    let kvm = Kvm::new().unwrap();
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
    fd.set_cpuid2(&cpuid.unwrap()).unwrap();
    let mut sregs = fd.get_sregs().unwrap();
    let data = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x18,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 0x10,
        type_: 11,
        db: 0,
        l: 1,
        ..data
    };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x1f);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 0xfff);
    sregs.cr0 = 1 | 1 << 4 | 1 << 31;
    sregs.cr3 = CPU_TABLES;
    // PAE; OSFXSR, for FXSAVE and XMM registers.
    sregs.cr4 = 1 << 5 | 1 << 9;
    sregs.efer = 1 << 8 | 1 << 10;
    fd.set_sregs(&sregs).unwrap();
    let regs = kvm_regs {
        rip,
        rsp: STACKS + (rip / CODE) * 0x800,
        rflags: 2,
        ..Default::default()
    };
    fd.set_regs(&regs).unwrap();
    // The second one does not wait for the first to start it.
    let running = kvm_bindings::kvm_mp_state {
        mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE,
    };
    fd.set_mp_state(running).unwrap();
    prepare_vcpu(&mut fd);
    fd
}

/// The entry of the shared table, and what it maps.
fn shared(index: u64) -> (u64, u64) {
    (SHARED + index * 8, index << 12)
}

#[test]
fn stores_of_every_size_are_seen_before_the_guest_goes_on() {
    let mut code = Code::default();
    let (entry, iova) = shared(5);
    code.store(entry, leaf(0));
    code.look(0);
    // Half an entry: mov [rdi], eax
    code.set([0x48, 0xb8], leaf(1));
    code.0.extend([0x89, 0x07]);
    code.look(1);
    // Across two entries, with the upper half of one: mov [rdi], rax
    let both = (leaf(2)) << 32;
    code.store(entry + 4, both);
    code.look(2);
    // From the page before into the table, which is tracked.
    let (first, _) = shared(0);
    code.store(first - 4, (leaf(3)) << 32);
    code.look(3);
    // 16 bytes that KVM emulates by halves: movdqu xmm0, [rdi]; movdqu [rdi], xmm0
    code.store(RESULTS, leaf(4));
    code.store(RESULTS + 8, leaf(5));
    code.set([0x48, 0xbf], RESULTS);
    code.0.extend([0xf3, 0x0f, 0x6f, 0x07]);
    code.set([0x48, 0xbf], shared(8).0);
    code.0.extend([0xf3, 0x0f, 0x7f, 0x07]);
    code.look(4);
    // rep stosq of 3 entries
    code.set([0x48, 0xbf], shared(10).0);
    code.set([0x48, 0xb8], leaf(6));
    code.set([0x48, 0xb9], 3);
    code.0.extend([0xf3, 0x48, 0xab]);
    code.look(5);
    code.end();
    let name = "stores_of_every_size_are_seen_before_the_guest_goes_on";
    let Some(mut bed) = Bed::new(name, vec![code]) else {
        return;
    };
    let looks = AtomicU32::new(0);
    bed.run(|bed, _, number| {
        looks.fetch_add(1, Ordering::Relaxed);
        let found = |index| bed.space.find(shared(index).1);
        let data = |page: u64| Some((DATA + page * 0x1000, true));
        match number {
            0 => assert_eq!(bed.space.find(iova), data(0)),
            1 => assert_eq!(found(5), data(1)),
            2 => assert_eq!((found(5), found(6)), (data(1), data(2))),
            3 => assert_eq!(found(0), data(3)),
            4 => assert_eq!((found(8), found(9)), (data(4), data(5))),
            _ => assert_eq!([10, 11, 12].map(found), [data(6); 3]),
        }
    });
    assert_eq!(looks.load(Ordering::Relaxed), 6);
    assert_eq!(bed.get(first - 4) as u32, 0);
    assert_eq!(bed.get(shared(9).0), leaf(5));
}

/// movq xmm0, rax; movq [rdi], xmm0: no KVM emulates the second.
fn store_xmm(code: &mut Code, gpa: u64, value: u64) {
    code.set([0x48, 0xbf], gpa);
    code.set([0x48, 0xb8], value);
    code.0.extend([0x66, 0x48, 0x0f, 0x6e, 0xc0]);
    code.0.extend([0x66, 0x0f, 0xd6, 0x07]);
}

#[test]
fn what_kvm_cannot_emulate_is_stepped_over_and_seen() {
    let name = "what_kvm_cannot_emulate_is_stepped_over_and_seen";
    let mut probe = Code::default();
    store_xmm(&mut probe, RESULTS, 1);
    probe.end();
    let Some(mut bed) = Bed::new(name, vec![probe]) else {
        return;
    };
    if !matches!(bed.vcpus[0].run(), Ok(VcpuExit::IoOut(0x11, _))) {
        println!("SKIPPED {name}: this KVM emulates every instruction");
        return;
    }
    let mut code = Code::default();
    store_xmm(&mut code, shared(5).0, leaf(0));
    code.look(0);
    // lock cmpxchg16b [rdi], with 0 in RDX:RAX
    code.set([0x48, 0xbf], shared(6).0);
    code.set([0x48, 0xbb], leaf(1));
    code.set([0x48, 0xb9], leaf(2));
    code.0
        .extend([0x31, 0xd2, 0x31, 0xc0, 0xf0, 0x48, 0x0f, 0xc7, 0x0f]);
    code.look(1);
    // The pages are tracked as before.
    code.store(shared(8).0, leaf(3));
    code.look(2);
    code.end();
    // Meanwhile another vCPU stores as well.
    let mut other = Code::default();
    for round in 0..50 {
        other.store(shared(100).0, leaf(round));
        other.look(10 + round as u32);
    }
    other.end();
    let Some(mut bed) = Bed::new(name, vec![code, other]) else {
        return;
    };
    bed.run(|bed, _, number| {
        let found = |index| bed.space.find(shared(index).1);
        let data = |page: u64| Some((DATA + page * 0x1000, true));
        match number {
            0 => assert_eq!(found(5), data(0)),
            1 => assert_eq!((found(6), found(7)), (data(1), data(2))),
            2 => assert_eq!(found(8), data(3)),
            round => assert_eq!(found(100), data(u64::from(round) - 10)),
        }
    });
    assert_eq!(bed.get(shared(7).0), leaf(2));
}

/// A step would take all pages out of KVM's slots and put them back, with all vCPUs held.
#[test]
fn with_many_pages_tracked_nothing_is_stepped_over_and_the_guest_goes_on() {
    let mut code = Code::default();
    // Any store: some KVMs emulate all.
    code.store(shared(5).0, leaf(0));
    code.end();
    let name = "with_many_pages_tracked_nothing_is_stepped_over_and_the_guest_goes_on";
    let Some(mut bed) = Bed::new(name, vec![code]) else {
        return;
    };
    let link = |index: u64, value: u64| {
        let stored = bed.shadow.store(LEVEL_2 + index * 8, &value.to_le_bytes());
        stored.unwrap();
    };
    let table = |index: u64| OWN + index * 0x2000;
    let max = ShadowConfig::default().max_stepped_pages as u64;
    for index in 1..=max {
        link(index, table(index) | LINK);
    }
    link(max, 0);
    let mut vcpu = bed.vcpus.remove(0);
    let start = Instant::now();
    let mut step = |again| {
        let time = Duration::from_secs(5);
        step_over(&mut vcpu, 0, &bed.shadow, &bed.ram, time, again).unwrap()
    };
    assert!(step(false));
    assert!(!bed.shadow.is_tracked(table(max)));
    // What it wants may have been let go of for another vCPU.
    assert!(!step(false));
    assert!(bed.shadow.is_tracked(SHARED) && !bed.domain.is_blocked());
    assert!(step(true));
    assert!(bed.domain.is_blocked());
    assert_eq!(bed.shadow.counters().tracked_pages, 0);
    assert_eq!(bed.shadow.counters().blocked, 1);
    println!("{:?}", start.elapsed());
    assert!(matches!(vcpu.run(), Ok(VcpuExit::IoOut(0x11, _))));
    assert_eq!(bed.get(shared(5).0), leaf(0));
}

/// True where `store_xmm` needs a step; says so where it does not.
fn needs_step(test: &str) -> bool {
    let mut probe = Code::default();
    store_xmm(&mut probe, RESULTS, 1);
    probe.end();
    let mut tracked = Code::default();
    store_xmm(&mut tracked, shared(5).0, 1);
    tracked.end();
    let Some(mut bed) = Bed::new(test, vec![probe, tracked]) else {
        return false;
    };
    let executes = matches!(bed.vcpus[0].run(), Ok(VcpuExit::IoOut(0x11, _)));
    let emulates = !matches!(bed.vcpus[1].run(), Ok(VcpuExit::InternalError));
    if !executes || emulates {
        println!("SKIPPED {test}: this KVM emulates every instruction");
    }
    executes && !emulates
}

/// The guest has its handler of page faults stay there for ever, and provokes one in the step.
#[test]
fn a_step_that_ends_in_a_handler_holds_nobody_for_long() {
    let name = "a_step_that_ends_in_a_handler_holds_nobody_for_long";
    if !needs_step(name) {
        return;
    }
    // By itself, and by somebody who wants the thread.
    for (time, kick) in [(20, false), (3_600_000, true)] {
        let mut code = Code::default();
        store_xmm(&mut code, shared(5).0, leaf(0));
        code.end();
        let mut other = Code::default();
        for round in 0..50 {
            other.store(RESULTS, round);
            other.look(round as u32);
        }
        other.end();
        let Some(mut bed) = Bed::new(name, vec![code, other]) else {
            return;
        };
        bed.handle(14, &[0xeb, 0xfe]); // jmp .
        let mut vcpus = std::mem::take(&mut bed.vcpus).into_iter();
        let (mut first, mut second) = (vcpus.next().unwrap(), vcpus.next().unwrap());
        let (bed, time) = (&bed, Duration::from_millis(time));
        let is_stepping = AtomicU32::new(0);
        let is_stepping = &is_stepping;
        let wait = || {
            while is_stepping.load(Ordering::Acquire) == 0 {
                thread::yield_now();
            }
        };
        thread::scope(|scope| {
            scope.spawn(move || {
                wait();
                bed.as_vcpu(1, || while bed.step(1, &mut second, &|_, _, _| {}) {});
                assert_eq!(bed.get(RESULTS), 49);
            });
            scope.spawn(move || {
                wait();
                thread::sleep(Duration::from_millis(100));
                if kick {
                    bed.threads.kick(0);
                }
            });
            bed.as_vcpu(0, || {
                loop {
                    let entered = bed.gate.enter(0);
                    let exit = first.run();
                    drop(entered);
                    assert!(matches!(exit, Ok(VcpuExit::InternalError)), "{exit:?}");
                    if internal_error(&mut first) == Some(InternalError::Emulation) {
                        break;
                    }
                }
                // The tables of the CPU do not lead to the page any more.
                let gpa = CPU_TABLES + 0x2000 + (SHARED >> 21) * 8;
                bed.map.write_obj(0u64, GuestAddress(gpa)).unwrap();
                is_stepping.store(1, Ordering::Release);
                let start = Instant::now();
                let stepped = step_over(&mut first, 0, &bed.shadow, &bed.ram, time, false);
                assert!(start.elapsed() < Duration::from_secs(10));
                assert!(stepped.unwrap());
                let regs = first.get_regs().unwrap();
                assert_eq!(regs.rip, HANDLERS + 14 * 0x80);
                assert_eq!(regs.rflags & 1 << 8, 0, "it is not stepping any more");
            });
        });
        assert!(bed.shadow.is_tracked(SHARED));
    }
}

/// The guest has its stack in a table and takes an exception: KVM can neither say what is stored nor
/// execute it.
#[test]
fn a_stack_in_a_table_blocks_the_domain_and_the_guest_goes_on() {
    let name = "a_stack_in_a_table_blocks_the_domain_and_the_guest_goes_on";
    let mut code = Code::default();
    code.store(shared(5).0, leaf(0));
    code.look(0);
    code.set([0x48, 0xbc], SHARED + 0x800); // mov rsp
    code.0.push(0xcc); // int3
    let Some(mut bed) = Bed::new(name, vec![code]) else {
        return;
    };
    let mut handler = Code::default();
    handler.look(1);
    handler.end();
    bed.handle(3, &handler.0);
    let mut vcpu = bed.vcpus.remove(0);
    let (mut looks, mut tries) = (0, 0);
    let delivers = bed.as_vcpu(0, || {
        loop {
            let entered = bed.gate.enter(0);
            let exit = vcpu.run();
            drop(entered);
            match exit {
                Ok(VcpuExit::IoOut(0x10, _)) => {
                    assert_eq!(bed.space.find(shared(5).1).is_some(), looks == 0);
                    looks += 1;
                }
                Ok(VcpuExit::IoOut(0x11, _)) => break true,
                Ok(VcpuExit::MmioWrite(..)) => {
                    assert!(answer_store(&mut vcpu, &bed.shadow, &bed.ram));
                }
                Ok(VcpuExit::InternalError) => match internal_error(&mut vcpu) {
                    Some(InternalError::Delivery { .. }) if tries < 8 => tries += 1,
                    Some(InternalError::Delivery { gpa: Some(gpa) }) => {
                        assert_eq!(gpa & !0xfff, SHARED);
                        assert!(bed.shadow.give_up(gpa));
                        tries = 0;
                    }
                    // As before 6.14.
                    Some(InternalError::Emulation) => break false,
                    other => panic!("{other:?}"),
                },
                Err(error) if error.errno() == libc::EINTR => {}
                other => panic!("{other:?}"),
            }
        }
    });
    if !delivers {
        println!("SKIPPED {name}: this KVM does not say that an event cannot be delivered");
        return;
    }
    assert_eq!(looks, 2);
    assert_eq!(bed.shadow.counters().blocked, 1);
    assert!(bed.space.ranges().is_empty());
    assert!(!bed.shadow.is_tracked(SHARED));
    // RFLAGS, CS and RIP are in RAM.
    assert_eq!(bed.get(SHARED + 0x800 - 0x20), 0x10);
}

/// Increments a counter by compare-exchanges, and ends.
fn incrementing(counter: u64, count: u64) -> Code {
    let mut code = Code::default();
    code.increments(counter, count);
    code.end();
    code
}

#[test]
fn no_compare_exchange_of_two_vcpus_is_lost() {
    const COUNT: u64 = 3000;
    let (counter, _) = shared(7);
    let code = || incrementing(counter, COUNT);
    let name = "no_compare_exchange_of_two_vcpus_is_lost";
    // On a busy machine the two may not meet at once.
    for _ in 0..5 {
        let Some(mut bed) = Bed::new(name, vec![code(), code()]) else {
            return;
        };
        bed.run(|_, _, _| {});
        assert_eq!(bed.get(counter), 2 * COUNT * 0x10);
        let lost = bed.shadow.counters().lost_exchanges;
        println!("{lost} exchanges came too late");
        if lost > 0 {
            break;
        }
    }
}

/// What makes a compare-exchange known is looked up by KVM while slots change, those of the CPUs' tables
/// among them.
#[test]
fn no_compare_exchange_is_lost_while_slots_change() {
    const COUNT: u64 = 8000;
    let (counter, _) = shared(7);
    let code = || incrementing(counter, COUNT);
    let name = "no_compare_exchange_is_lost_while_slots_change";
    let Some(mut bed) = Bed::new(name, vec![code(), code()]) else {
        return;
    };
    let ram = bed.ram.clone();
    let alive = Arc::new(());
    thread::scope(|scope| {
        let alive = alive;
        let watch = Arc::downgrade(&alive);
        scope.spawn(move || {
            // In the slot of the CPU's tables, which is taken away for a moment each time.
            let page = [ROOT - 0x1000];
            while watch.strong_count() > 0 {
                ram.change(&page, &[]).unwrap();
                ram.change(&[], &page).unwrap();
                // Let the vCPUs in.
                thread::sleep(Duration::from_micros(200));
            }
        });
        bed.run(|_, _, _| {});
        drop(alive);
    });
    assert_eq!(bed.get(counter), 2 * COUNT * 0x10);
    let lost = bed.shadow.counters().lost_exchanges;
    println!("{lost} exchanges came too late");
}

/// RAM comes and goes under a vCPU that would never leave the guest by itself.
#[test]
fn a_vcpu_does_not_notice_that_slots_change() {
    const CHANGES: u64 = 500;
    let mut code = Code::default();
    code.set([0x48, 0xbf], RESULTS);
    code.0.extend([0x48, 0xff, 0x07]); // inc qword [rdi]
    code.0.extend([0x48, 0x83, 0x7f, 0x08, 0x00, 0x74, 0xf6]); // cmp qword [rdi + 8], 0; jz to the inc
    code.end();
    let Some(mut bed) = Bed::new("a_vcpu_does_not_notice_that_slots_change", vec![code]) else {
        return;
    };
    let (ram, map) = (bed.ram.clone(), bed.map.clone());
    thread::scope(|scope| {
        scope.spawn(move || {
            for change in 0..CHANGES {
                let page = [DATA - 0x1000 * (1 + change / 2 % 5)];
                let (track, untrack) = match change % 2 {
                    0 => (&page[..], &[][..]),
                    _ => (&[][..], &page[..]),
                };
                ram.change(track, untrack).unwrap();
                // Let the vCPU in.
                let count = || map.read_obj::<u64>(GuestAddress(RESULTS)).unwrap();
                let (before, start) = (count(), Instant::now());
                while count() == before && start.elapsed() < Duration::from_secs(5) {
                    thread::yield_now();
                }
            }
            map.write_obj(1u64, GuestAddress(RESULTS + 8)).unwrap();
        });
        bed.run(|_, _, _| {});
    });
    assert!(bed.get(RESULTS) > CHANGES / 2, "{}", bed.get(RESULTS));
}

/// Both vCPUs map and unmap in one table, link and unlink tables of their own, and race for places to
/// link a table at; a third thread flushes all the time.
#[test]
fn two_vcpus_map_and_unmap_in_the_same_tables_at_once() {
    const ROUNDS: u64 = 60;
    let code = |vcpu: u64| {
        let mut code = Code::default();
        for round in 0..ROUNDS {
            let page = |n: u64| leaf((round * 16 + n) % 1024);
            for index in 0..8 {
                code.store(shared(vcpu * 8 + index).0, page(index));
            }
            // A table that is filled first, then linked, then written, and in the end unlinked.
            let own = OWN + vcpu * 0x10_0000 + round * 0x2000;
            code.store(own, page(9));
            code.store(LEVEL_2 + (64 + vcpu) * 8, own | LINK);
            code.store(own + 8, page(10));
            // A race for a place.
            let raced = own + 0x1000;
            code.store(raced, page(11));
            let result = RESULTS + vcpu * 0x1000 + round;
            code.exchange(LEVEL_2 + (128 + round) * 8, 0, raced | LINK, result);
            code.look(round as u32 * 2);
            for index in 0..8 {
                code.store(shared(vcpu * 8 + index).0, 0);
            }
            code.store(LEVEL_2 + (64 + vcpu) * 8, 0);
            code.look(round as u32 * 2 + 1);
        }
        code.end();
        code
    };
    let name = "two_vcpus_map_and_unmap_in_the_same_tables_at_once";
    let Some(mut bed) = Bed::new(name, vec![code(0), code(1)]) else {
        return;
    };
    let domain = bed.domain.clone();
    let alive = Arc::new(());
    let start = Instant::now();
    thread::scope(|scope| {
        let alive = alive;
        let watch = Arc::downgrade(&alive);
        scope.spawn(move || {
            while watch.strong_count() > 0 {
                domain.flush_all();
                thread::sleep(Duration::from_millis(1));
            }
        });
        bed.run(|bed, vcpu, number| {
            let (vcpu, round) = (vcpu as u64, u64::from(number) / 2);
            let page = |n: u64| Some((DATA + ((round * 16 + n) % 1024) * 0x1000, true));
            let shared = (0..8).map(|index| bed.space.find(shared(vcpu * 8 + index).1));
            let own = (64 + vcpu) << 21;
            if number % 2 == 0 {
                assert!(shared.eq((0..8).map(page)), "round {round}");
                assert_eq!(bed.space.find(own), page(9));
                assert_eq!(bed.space.find(own + 0x1000), page(10));
                let raced = bed.space.find((128 + round) << 21);
                assert_eq!(raced, page(11), "one of the two has linked its table");
            } else {
                bed.domain.flush_all();
                assert!(bed.space.find(own).is_none());
                assert!(bed.space.find(own + 0x1000).is_none());
                assert!({ shared }.all(|found| found.is_none()), "round {round}");
            }
        });
        drop(alive);
    });
    let time = start.elapsed();
    for round in 0..ROUNDS {
        let byte = |vcpu: u64| bed.get(RESULTS + vcpu * 0x1000 + round) & 0xff;
        assert_eq!(byte(0) + byte(1), 1, "round {round}: who has linked?");
        let winner = if byte(0) == 1 { 0 } else { 1 };
        let raced = OWN + winner * 0x10_0000 + round * 0x2000 + 0x1000;
        assert_eq!(bed.get(LEVEL_2 + (128 + round) * 8), raced | LINK);
    }
    bed.domain.flush_all();
    assert_eq!(
        bed.space.ranges().len() as u64,
        ROUNDS,
        "the raced tables' leaves"
    );
    let counters = bed.shadow.counters();
    println!("{time:?}, {counters:?}");
    assert_eq!(counters.blocked, 0);
}

#[test]
fn a_region_that_this_process_cannot_write_is_read_only_for_the_guest() {
    let Ok(kvm) = Kvm::new() else {
        println!("SKIPPED a_region_that_this_process_cannot_write: no /dev/kvm");
        return;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    vm.create_irq_chip().unwrap();
    vm.set_tss_address(0xfffb_d000).unwrap();
    let map = crate::mem::testing::with_rom(0x3000, &[7; 0x1000]);
    // mov al, [0x3000]; mov [0x3001], al; out 0x11, al
    let code = [0xa0, 0x00, 0x30, 0xa2, 0x01, 0x30, 0xe6, 0x11];
    map.write_slice(&code, GuestAddress(0x1000)).unwrap();
    let gate = Arc::new(RunGate::new(1));
    let threads = Arc::new(Threads::default());
    let ram = KvmRam::plug(vm.clone(), map, 0..10, true, gate, threads);
    let ram = Arc::new(ram.unwrap());
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = 0x1000;
    vcpu.set_regs(&regs).unwrap();
    let stored = vcpu.run().unwrap();
    assert!(matches!(stored, VcpuExit::MmioWrite(0x3001, [7])));
    let shadow = Shadow::new(
        ShadowConfig::default(),
        GuestRam::new(ram.map()),
        ram.clone(),
    );
    assert!(!answer_store(&mut vcpu, &shadow, &ram), "nobody's");
    let loaded = vcpu.run().unwrap();
    assert!(matches!(loaded, VcpuExit::IoOut(0x11, [7])));
}
