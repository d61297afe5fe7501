//! Buses that come and go leave nothing behind: counted by the allocator of this program.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use vm_vpci::pviommu::{IommuConfig, IommuMode};
use vpci_conformance::beds::sim::Sim;
use vpci_conformance::check::{Context, Failure, Verdict, equal};
use vpci_conformance::host::{BusSetup, FunctionSetup, Setup};
use vpci_conformance::model::kernel::Kernel;
use vpci_conformance::model::testdev::TestDev;
use vpci_conformance::model::vm::{PAGE, Vm};
use vpci_conformance::model::vmbus::{Offer, VmBus};
use vpci_conformance::model::vpci::{Bus, VERSIONS, message, slot};
use vpci_conformance::model::wire::Bytes;
use vpci_conformance::trace::Trace;

/// Cycles after which everything that is made once is there.
const WARM_UP: u32 = 100;
/// All cycles.
const CYCLES: u32 = 1000;
/// What may come and go by chance in a thousand cycles, such as longer words in the trace. A cycle
/// that loses one block in ten loses more.
const BLOCKS: i64 = 40;
const BYTES: i64 = 16 * 1024;

/// The system's allocator, which counts what is in use.
struct Counting;

static IN_USE: [AtomicI64; 2] = [AtomicI64::new(0), AtomicI64::new(0)];

fn count(blocks: i64, bytes: i64) {
    IN_USE[0].fetch_add(blocks, Ordering::Relaxed);
    IN_USE[1].fetch_add(bytes, Ordering::Relaxed);
}

// SAFETY: every call is passed on to the system's allocator unchanged; counting neither allocates
// nor unwinds.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(1, layout.size() as i64);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`, which is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-1, -(layout.size() as i64));
        // SAFETY: `pointer` came from `System` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(0, size as i64 - layout.size() as i64);
        // SAFETY: `pointer` came from `System` with this layout, and the caller vouches for `size`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn in_use() -> [i64; 2] {
    [0, 1].map(|what: usize| IN_USE[what].load(Ordering::Relaxed))
}

/// A bus with two functions, one of them behind the pvIOMMU.
fn setup() -> BusSetup {
    BusSetup {
        instance: BusSetup::instance(1),
        functions: vec![
            FunctionSetup::testdev(0).with_iommu(IommuMode::On),
            FunctionSetup::testdev(1),
        ],
    }
}

/// Brings a bus into use, with data and an interrupt from each function.
fn use_all(vmbus: &VmBus, offer: &Offer, pages: u64) -> Result<Bus, Failure> {
    let vm = vmbus.vm();
    let bus = Bus::probe(vmbus, offer, VERSIONS[0])?;
    for function in 0..2 {
        let device = TestDev::start(&bus, function)?;
        device.interrupt(0, 0x41 + function, 1)?;
        device.copy(pages, pages + PAGE, 4096, 0)?;
        vm.expect_interrupt(1, 0x41 + function)?;
    }
    for vp in 0..vm.vps() {
        vm.take_interrupts(vp)?;
    }
    Ok(bus)
}

/// The host takes the bus away: in order, or torn out.
fn take_away(vm: &Vm, bus: &Bus, orderly: bool) -> Verdict {
    let (instance, relid) = (bus.channel().offer.instance, bus.channel().offer.relid);
    if orderly {
        let told = vm.eject(instance)?;
        equal("packets that ask", bus.channel().receive()?.len(), 2)?;
        for function in [1, 0] {
            let done = Bytes::words(&[message::EJECTION_COMPLETE, slot(function), 0]);
            bus.send(&done.0)?;
        }
        vm.settle();
        equal("times that the operator was told", told.times(), 1)?;
    }
    vm.remove(instance)?;
    equal(
        "channel that is rescinded",
        bus.vmbus().expect_rescind()?,
        relid,
    )?;
    bus.channel().close()?;
    bus.vmbus().release(relid)?;
    bus.vmbus().expect_silence()
}

fn cycles() -> Verdict {
    let context = Context::new(Arc::new(Sim), Arc::new(Trace::default()));
    let vm = context.machine(&Setup {
        // Each cycle has rings of its own.
        ram: vec![std::ops::Range {
            start: 0,
            end: 64 << 20,
        }],
        iommu: Some(IommuConfig::default()),
        buses: vec![],
        ..Setup::default()
    })?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    equal("buses at first", vmbus.offers()?.len(), 0)?;
    let pages = vm.pages(2)?;
    let mut warm = [0; 2];
    for cycle in 0..CYCLES {
        vm.plug(&setup())?;
        let offer = vmbus.expect_offer()?;
        let bus = use_all(&vmbus, &offer, pages)?;
        take_away(&vm, &bus, cycle % 2 == 0)?;
        drop(bus);
        if cycle + 1 == WARM_UP {
            warm = in_use();
        }
    }
    let end = in_use();
    println!("in use: {warm:?} after {WARM_UP} cycles, {end:?} after {CYCLES} (blocks, bytes)");
    let grown = [end[0] - warm[0], end[1] - warm[1]];
    assert!(grown[0] < BLOCKS && grown[1] < BYTES, "grown by {grown:?}");
    Ok(())
}

#[test]
fn a_thousand_buses_that_come_and_go_leave_nothing_behind() {
    cycles().unwrap_or_else(|failure| panic!("{failure}"));
}
