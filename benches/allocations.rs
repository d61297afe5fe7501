//! The hot paths do not allocate: counted by the allocator of this program.

mod guest;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use vm_vpci::synic::{DEFAULT_QUEUE_LIMIT, SynicConfig, SynicPort, UserSynic};
use vm_vpci::vmbus::ring::{RingReader, RingWriter};

use guest::{Guest, Interrupts, ram};

/// The system's allocator, which counts what the current thread asks of it.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // A thread that is ending has no counter any more, and nobody asks for it.
    let _ = ALLOCATIONS.try_with(|cell| cell.set(cell.get() + 1));
}

// SAFETY: every call is passed on to the system's allocator unchanged; counting neither allocates
// nor unwinds.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`, which is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: `pointer` came from `System` with this layout, and the caller vouches for `size`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of `count` runs of `f`, after one that warms up what is made once.
fn allocations(count: usize, mut f: impl FnMut()) -> u64 {
    f();
    let before = ALLOCATIONS.get();
    (0..count).for_each(|_| f());
    ALLOCATIONS.get() - before
}

#[test]
fn the_counter_counts() {
    let found = allocations(10, || drop(std::hint::black_box(Box::new(1))));
    assert_eq!(found, 10);
}

#[test]
fn dispatch_does_not_allocate() {
    let guest = Guest::new();
    for (control, rdx, status) in [
        // Unknown code, fast and memory; SIGNAL_EVENT of no connection; POST_MESSAGE of nothing.
        (0x1_007f, 0, 2),
        (0x7f, 0x6000, 2),
        (0x1_005d, 0xffff, 0x12),
        (0x5c, 0x8_0000, 5),
    ] {
        assert_eq!(guest.call(control, rdx), status, "{control:#x}");
        let found = allocations(100, || {
            guest.call(control, rdx);
        });
        assert_eq!(found, 0, "{control:#x}");
    }
    assert_eq!(guest.retarget(), 0);
    let found = allocations(100, || {
        guest.retarget();
    });
    assert_eq!(found, 0, "RETARGET_INTERRUPT");
}

#[test]
fn rings_do_not_allocate() {
    let ram = ram(1 << 20);
    let pages: Vec<u64> = (1..9).collect();
    let mut writer = RingWriter::open(ram.clone(), &pages).unwrap();
    let mut reader = RingReader::open(ram, &pages).unwrap();
    let mut buffer = [0; 4080];
    for len in [0, 64, 4080] {
        let found = allocations(100, || {
            let room = writer.reserve(len).unwrap().unwrap();
            writer.complete(room, 1, &[0x5a; 4080][..len]).unwrap();
            reader.mask().unwrap();
            reader.read(&mut buffer).unwrap().unwrap();
            reader.publish().unwrap();
            reader.unmask().unwrap();
        });
        assert_eq!(found, 0, "{len} bytes");
    }
}

#[test]
fn configuration_and_registers_do_not_allocate() {
    let guest = Guest::new();
    let found = allocations(100, || {
        guest.select();
        assert_eq!(guest.config(0), 0x5650_1234);
    });
    assert_eq!(found, 0);
}

#[test]
fn dma_of_a_device_does_not_allocate() {
    let guest = Guest::new();
    guest.fill(0x5a);
    for len in [1, 64, 4096] {
        let found = allocations(100, || {
            guest.copy(len);
        });
        assert_eq!(found, 0, "{len} bytes");
    }
    assert_eq!(guest.copy(4096), 0x5a5a_5a5a_5a5a_5a5a);
}

#[test]
fn interrupts_and_messages_do_not_allocate() {
    let guest = Guest::new();
    assert_eq!(allocations(100, || guest.raise()), 0);
    let ram = ram(1 << 20);
    let config = SynicConfig {
        apic_ids: Arc::from([0]),
        queue_limit: DEFAULT_QUEUE_LIMIT,
    };
    let synic = UserSynic::new(&config, ram.clone(), Arc::new(Interrupts::default()));
    synic.write_msr(0, 0x4000_0083, 0x1_0001).unwrap();
    synic.write_msr(0, 0x4000_0082, 0x1_1001).unwrap();
    synic.write_msr(0, 0x4000_0092, 0xf3).unwrap();
    synic.write_msr(0, 0x4000_0080, 1).unwrap();
    let found = allocations(100, || {
        synic.post_message(0, 2, 1, &[1; 240]).unwrap();
        synic.signal_event(0, 2, 1).unwrap();
        ram.fill(0x1_0000, 0x2000, 0).unwrap();
    });
    assert_eq!(found, 0);
}

#[test]
fn a_message_and_its_completion_do_not_allocate() {
    let mut guest = Guest::new();
    let found = allocations(100, || {
        assert_eq!(guest.query(), 0);
    });
    assert_eq!(found, 0);
}
