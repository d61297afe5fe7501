//! Tests of the transport: register rules, hostile rings, resets while requests are under way.

use super::*;
use crate::devices::virtio::ring::Chain;
use crate::devices::virtio::testing::{
    Descriptor, DriverQueue, EVENT_IDX, Guest, INDIRECT, ISR_PAGE, ManualHost, NOTIFY_PAGE,
    RAM_SIZE, VERSION_1, into, out,
};
use crate::vmm::{Worker, WorkerHost};
use crate::vpci::function::{DoorbellRegister, FunctionLayout, PciFunction};

mod model;

const DATA: u64 = 0x10_0000;
const ACCESS_PLATFORM: u64 = 1 << VIRTIO_F_ACCESS_PLATFORM;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

/// A device that answers each request with its readable bytes, turned round.
#[derive(Debug)]
struct Echo {
    pci: VirtioPci,
    chain: Mutex<Chain>,
}

impl Worker for Echo {
    fn name(&self) -> String {
        "echo".to_owned()
    }

    fn process(&self) -> bool {
        let mut chain = self.chain.lock().unwrap();
        match self.pci.pop(0, &mut chain) {
            Next::Request(request) => {
                let len = request.readable_len().min(request.writable_len()).min(64);
                let mut bytes = [0; 64];
                let bytes = &mut bytes[..len as usize];
                if request.read(0, bytes).is_err() {
                    bytes.fill(0);
                }
                bytes.reverse();
                request.complete(0, bytes, len as u32);
                true
            }
            Next::Idle => false,
            Next::Again => true,
        }
    }
}

impl PciFunction for Echo {
    fn layout(&self) -> FunctionLayout {
        self.pci.layout()
    }
    fn connect(&self, resources: FunctionResources) {
        self.pci.connect(resources);
    }
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.pci.bar_read(bar, offset, data);
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.pci.bar_write(bar, offset, data);
    }
    fn capability_read(&self, _capability: usize, offset: usize, body: &[u8], data: &mut [u8]) {
        self.pci.capability_read(offset, body, data);
    }

    fn capability_write(&self, _capability: usize, offset: usize, body: &[u8], _len: usize) {
        self.pci.capability_write(offset, body);
    }

    fn doorbells(&self) -> Vec<DoorbellRegister> {
        self.pci.doorbells()
    }
    fn reset(&self) {
        self.pci.reset();
    }
}

struct Bed {
    guest: Guest,
    host: ManualHost,
    echo: Arc<Echo>,
}

fn bed_with(iommu: bool, host: ManualHost) -> Bed {
    let spec = DeviceSpec {
        kind: "echo",
        id: 42,
        class: (0xff, 0),
        features: 1 << 3,
        iommu,
        queues: 2,
        queue_size: 64,
        config: vec![1, 2, 3, 4, 5],
    };
    let echo = Arc::new(Echo {
        pci: VirtioPci::new(spec).unwrap(),
        chain: Mutex::new(Chain::default()),
    });
    let weak = Arc::downgrade(&echo);
    let triggers = vec![host.adopt(weak.clone()).unwrap(), host.adopt(weak).unwrap()];
    echo.pci.set_triggers(triggers);
    Bed {
        guest: Guest::new(echo.clone()),
        host,
        echo,
    }
}

fn bed() -> Bed {
    bed_with(false, ManualHost::default())
}

impl Bed {
    fn misuse(&self) -> u64 {
        self.echo.pci.counters().misuse
    }

    fn works(&self) {
        let mut queue = self.guest.start(VERSION_1, 1).remove(0);
        self.guest.lines.take();
        self.exchange(&mut queue);
    }

    fn exchange(&self, queue: &mut DriverQueue) {
        let ram = &self.guest.ram;
        ram.write(DATA, b"hello").unwrap();
        let head = queue.add(ram, &[out(DATA, 5), into(DATA + 16, 8)]);
        self.guest.kick(queue);
        self.host.run();
        assert_eq!(queue.used(ram), Some((head, 5)));
        assert_eq!(self.guest.bytes(DATA + 16, 5), b"olleh");
        assert_eq!(self.guest.lines.take(), [1]);
    }

    /// Offers one raw chain on a fresh device, which must break.
    fn breaks(&self, prepare: impl FnOnce(&mut DriverQueue)) {
        let mut queue = self.guest.start(VERSION_1 | INDIRECT, 1).remove(0);
        self.guest.lines.take();
        prepare(&mut queue);
        self.guest.kick(&queue);
        self.host.run();
        assert_eq!(queue.used(&self.guest.ram), None);
        assert_eq!(self.guest.status(), 0x4f);
        assert_eq!(self.guest.lines.take(), [0]);
        self.works();
    }
}

fn descriptor(gpa: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        gpa,
        len,
        flags,
        next,
    }
}

#[test]
fn the_layout_places_every_structure_in_a_page_of_its_own() {
    let bed = bed();
    let layout = bed.guest.function.layout();
    assert_eq!(layout.identity.vendor, 0x1af4);
    assert_eq!(layout.identity.device, 0x1040 + 42);
    let mut pages = vec![0x4000, 0x5000];
    for capability in &layout.capabilities {
        assert_eq!(capability.id, 9);
        assert_eq!(usize::from(capability.body[0]), capability.body.len() + 2);
        assert_eq!(capability.body[2], 0, "BAR 0");
        if capability.body[1] == 5 {
            continue;
        }
        assert_eq!(capability.writable, vec![0; capability.body.len()]);
        let offset = u32::from_le_bytes(capability.body[6..10].try_into().unwrap());
        pages.push(offset);
    }
    let kinds: Vec<u8> = layout.capabilities.iter().map(|c| c.body[1]).collect();
    assert_eq!(kinds, [1, 2, 3, 4, 5]);
    assert!(pages.iter().all(|p| p % 0x1000 == 0 && *p < 0x8000));
    pages.sort_unstable();
    pages.dedup();
    assert_eq!(pages.len(), 6);
    assert_eq!(layout.msix.unwrap().vectors, 3);
}

#[test]
fn the_window_capability_reaches_the_registers_it_selects() {
    let bed = bed();
    let select = |bar: u8, offset: u32, len: u32, data: u32| {
        let mut body = bed.guest.function.layout().capabilities[4].body.clone();
        body[2] = bar;
        body[6..10].copy_from_slice(&offset.to_le_bytes());
        body[10..14].copy_from_slice(&len.to_le_bytes());
        body[14..].copy_from_slice(&data.to_le_bytes());
        body
    };
    let load = |body: &[u8], width: usize| {
        let mut data = vec![0xee; width];
        bed.guest.function.capability_read(4, 14, body, &mut data);
        data
    };
    let status = common::DEVICE_STATUS as u32;
    let store = select(0, status, 1, 0xffff_ff03);
    bed.guest.function.capability_write(4, 14, &store, 4);
    assert_eq!(bed.guest.status(), 3);
    assert_eq!(load(&select(0, status, 1, 0), 4), [3, 0, 0, 0]);
    assert_eq!(load(&select(0, 0x12, 2, 0), 2), [2, 0]);
    assert_eq!(load(&select(0, 0x2000, 4, 0), 1), [1]);
    for (bar, offset, len) in [
        (1, 0x14, 1),
        (0, 0x15, 2),
        (0, 0x14, 0),
        (0, 0x14, 3),
        (0, 0x10, 8),
        (0, 0x8000, 4),
        (0, u32::MAX, 1),
    ] {
        let body = select(bar, offset, len, 0);
        assert_eq!(load(&body, 4), [0xee; 4], "{bar} {offset:#x} {len}");
        bed.guest.function.capability_write(4, 14, &body, 4);
        assert_eq!(bed.guest.status(), 3);
    }
    let mut elsewhere = [0xee; 4];
    let body = select(0, status, 1, 0);
    bed.guest
        .function
        .capability_read(4, 10, &body, &mut elsewhere);
    bed.guest
        .function
        .capability_read(4, 14, &body[..9], &mut elsewhere);
    bed.guest.function.capability_write(0, 14, &[], 4);
    assert_eq!(elsewhere, [0xee; 4]);
    assert_eq!(bed.guest.status(), 3);
}

#[test]
fn negotiation_follows_the_rules() {
    let bed = bed();
    let guest = &bed.guest;
    let transport = VERSION_1 | INDIRECT | EVENT_IDX;
    assert_eq!(guest.offered(), transport | 1 << 3);
    assert!(!guest.negotiate(0), "VERSION_1 is required");
    assert!(!guest.negotiate(VERSION_1 | 1 << 4), "not offered");
    assert!(!guest.negotiate(VERSION_1 | ACCESS_PLATFORM), "not offered");
    assert!(guest.negotiate(VERSION_1));
    guest.accept(VERSION_1 | 1 << 3);
    guest.write(common::DRIVER_FEATURE_SELECT, 4, 0);
    assert_eq!(guest.read(common::DRIVER_FEATURE, 4), 0, "fixed by now");
    guest.write(common::DEVICE_FEATURE_SELECT, 4, 2);
    assert_eq!(guest.read(common::DEVICE_FEATURE, 4), 0);
    bed.works();
}

#[test]
fn the_platform_iommu_is_demanded_when_asked_for() {
    let bed = bed_with(true, ManualHost::default());
    assert_ne!(bed.guest.offered() & ACCESS_PLATFORM, 0);
    assert!(!bed.guest.negotiate(VERSION_1));
    assert!(bed.guest.negotiate(VERSION_1 | ACCESS_PLATFORM));
}

#[test]
fn status_bits_are_only_added_and_driver_ok_needs_features_ok() {
    let bed = bed();
    let guest = &bed.guest;
    guest.set_status(7);
    assert_eq!(guest.status(), 3);
    assert_eq!(bed.misuse(), 1);
    guest.set_status(1);
    assert_eq!(guest.status(), 3);
    assert_eq!(bed.misuse(), 2);
    guest.set_status(0x43);
    assert_eq!(guest.status(), 3, "only the device sets DEVICE_NEEDS_RESET");
    guest.set_status(0x33);
    assert_eq!(guest.status(), 3, "bits that virtio does not define");
    assert_eq!(bed.misuse(), 3);
    guest.set_status(0);
    assert_eq!(guest.status(), 0);
    bed.works();
}

#[test]
fn a_failed_driver_gets_no_more_service() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1, 1).remove(0);
    bed.exchange(&mut queue);
    bed.guest.set_status(0x8f);
    queue.add(&bed.guest.ram, &[into(DATA, 8)]);
    bed.guest.kick(&queue);
    bed.host.run();
    assert_eq!(queue.used(&bed.guest.ram), None);
    bed.works();
}

#[test]
fn queue_registers_refuse_bad_values_and_stay_fixed_once_enabled() {
    let bed = bed();
    let guest = &bed.guest;
    guest.negotiate(VERSION_1);
    let before = bed.misuse();
    assert_eq!(guest.read(common::QUEUE_SIZE, 2), 64);
    for size in [0, 3, 65, 128, 0xffff] {
        guest.write(common::QUEUE_SIZE, 2, size);
        assert_eq!(guest.read(common::QUEUE_SIZE, 2), 64);
    }
    guest.write(common::QUEUE_DESC, 4, 0x1008);
    guest.write(common::QUEUE_DRIVER, 4, 0x1001);
    guest.write(common::QUEUE_DEVICE, 4, 0x1002);
    guest.write(common::QUEUE_ENABLE, 2, 2);
    guest.write(common::QUEUE_NOTIFY_OFF, 2, 5);
    guest.write(common::NUM_QUEUES, 2, 5);
    assert_eq!(bed.misuse(), before + 11);
    for area in [
        common::QUEUE_DESC,
        common::QUEUE_DRIVER,
        common::QUEUE_DEVICE,
    ] {
        assert_eq!(guest.read(area, 8), 0);
    }
    guest.write(common::QUEUE_DESC, 8, 0x1_0000_1000);
    assert_eq!(guest.read(common::QUEUE_DESC, 4), 0x1000);
    assert_eq!(guest.read(common::QUEUE_DESC + 4, 4), 1);
    guest.write(common::QUEUE_ENABLE, 2, 1);
    assert_eq!(guest.read(common::QUEUE_ENABLE, 2), 1);
    for (offset, width) in [
        (common::QUEUE_SIZE, 2),
        (common::QUEUE_DESC, 4),
        (common::QUEUE_ENABLE, 2),
    ] {
        let value = guest.read(offset, width);
        guest.write(offset, width, 0);
        assert_eq!(guest.read(offset, width), value);
    }
    assert_eq!(bed.misuse(), before + 14);
}

#[test]
fn a_queue_cannot_be_enabled_before_features_are_agreed() {
    let bed = bed();
    bed.guest.set_status(3);
    bed.guest.write(common::QUEUE_ENABLE, 2, 1);
    assert_eq!(bed.guest.read(common::QUEUE_ENABLE, 2), 0);
}

#[test]
fn queues_and_vectors_that_do_not_exist_read_as_such() {
    let bed = bed();
    let guest = &bed.guest;
    guest.write(common::QUEUE_SELECT, 2, 2);
    assert_eq!(guest.read(common::QUEUE_SIZE, 2), 0);
    assert_eq!(guest.read(common::QUEUE_MSIX_VECTOR, 2), 0xffff);
    guest.write(common::QUEUE_SIZE, 2, 16);
    guest.write(common::QUEUE_ENABLE, 2, 1);
    assert_eq!(bed.misuse(), 2);
    guest.write(common::QUEUE_SELECT, 2, 1);
    for (vector, mapped) in [(0, 0), (2, 2), (3, 0xffff), (0xffff, 0xffff)] {
        guest.write(common::QUEUE_MSIX_VECTOR, 2, vector);
        assert_eq!(guest.read(common::QUEUE_MSIX_VECTOR, 2), mapped);
        guest.write(common::CONFIG_MSIX_VECTOR, 2, vector);
        assert_eq!(guest.read(common::CONFIG_MSIX_VECTOR, 2), mapped);
    }
    guest.write(NOTIFY_PAGE + 8, 2, 2);
    guest.write(0x6000, 4, 2);
    guest.write(ISR_PAGE, 1, 2);
    assert_eq!(bed.misuse(), 5);
    assert_eq!(guest.read(0x6000, 8), 0);
}

#[test]
fn the_isr_tells_what_happened_and_clears_when_read() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1, 1).remove(0);
    bed.exchange(&mut queue);
    bed.echo.pci.update_config(|bytes| {
        bytes[0] = 9;
        true
    });
    assert_eq!(bed.guest.read(ISR_PAGE, 1), 3);
    assert_eq!(bed.guest.read(ISR_PAGE, 1), 0);
    assert_eq!(bed.guest.read(0x2000, 8), 0x0005_0403_0209);
}

#[test]
fn doorbells_lie_where_the_registers_are() {
    let host = ManualHost {
        eventfds: true,
        ..ManualHost::default()
    };
    let bed = bed_with(false, host);
    let doorbells = bed.guest.function.doorbells();
    let offsets: Vec<u64> = doorbells.iter().map(|d| d.offset).collect();
    assert_eq!(offsets, [NOTIFY_PAGE, NOTIFY_PAGE + 4]);
    assert!(doorbells.iter().all(|d| d.bar == 0 && d.len == 2));
    assert!(self::bed().guest.function.doorbells().is_empty());
}

#[test]
fn chains_that_wait_at_driver_ok_are_served_without_a_notification() {
    let bed = bed();
    assert!(bed.guest.negotiate(VERSION_1));
    let mut queue = bed.guest.enable_queue(0, 64, 0x10000);
    let head = queue.add(&bed.guest.ram, &[into(DATA, 8)]);
    bed.guest.kick(&queue);
    bed.host.run();
    assert_eq!(queue.used(&bed.guest.ram), None, "not before DRIVER_OK");
    bed.guest.set_status(0xf);
    bed.host.run();
    assert_eq!(queue.used(&bed.guest.ram), Some((head, 0)));
}

#[test]
fn rings_outside_guest_memory_break_the_device() {
    for area in [
        common::QUEUE_DESC,
        common::QUEUE_DRIVER,
        common::QUEUE_DEVICE,
    ] {
        for address in [0, 1 << 40, RAM_SIZE - 16, !0xf] {
            let bed = bed();
            assert!(bed.guest.negotiate(VERSION_1));
            bed.guest.write(common::CONFIG_MSIX_VECTOR, 2, 0);
            for good in [
                common::QUEUE_DESC,
                common::QUEUE_DRIVER,
                common::QUEUE_DEVICE,
            ] {
                bed.guest.write(good, 8, 0x10000);
            }
            bed.guest.write(area, 8, address);
            bed.guest.write(common::QUEUE_ENABLE, 2, 1);
            bed.guest.set_status(0xf);
            bed.host.run();
            assert_eq!(bed.guest.status(), 0x4f, "{area:#x} at {address:#x}");
            assert_eq!(bed.guest.lines.take(), [0]);
        }
    }
}

#[test]
fn malformed_chains_break_the_device_and_a_reset_mends_it() {
    let bed = bed();
    let ram = bed.guest.ram.clone();
    type Chains = Vec<(u64, u16, Descriptor)>;
    let table = 0x9_0000;
    let chains: Vec<(&str, Chains)> = vec![
        ("loop", vec![(0, 0, descriptor(DATA, 8, WRITE | NEXT, 0))]),
        ("index", vec![(0, 0, descriptor(DATA, 8, WRITE | NEXT, 64))]),
        (
            "order",
            vec![
                (0, 0, descriptor(DATA, 8, WRITE | NEXT, 1)),
                (0, 1, descriptor(DATA, 8, 0, 0)),
            ],
        ),
        (
            "more than 4 GiB",
            vec![
                (0, 0, descriptor(DATA, u32::MAX, NEXT, 1)),
                (0, 1, descriptor(DATA, u32::MAX, WRITE, 0)),
            ],
        ),
        (
            "empty table",
            vec![(0, 0, descriptor(table, 0, INDIRECT_FLAG, 0))],
        ),
        (
            "odd table",
            vec![(0, 0, descriptor(table, 17, INDIRECT_FLAG, 0))],
        ),
        (
            "table outside RAM",
            vec![(0, 0, descriptor(1 << 40, 16, INDIRECT_FLAG, 0))],
        ),
        (
            "table in a table",
            vec![
                (0, 0, descriptor(table, 16, INDIRECT_FLAG, 0)),
                (table, 0, descriptor(table, 16, INDIRECT_FLAG, 0)),
            ],
        ),
        (
            "loop in a table",
            vec![
                (0, 0, descriptor(table, 32, INDIRECT_FLAG, 0)),
                (table, 0, descriptor(DATA, 8, NEXT, 1)),
                (table, 1, descriptor(DATA, 8, NEXT, 0)),
            ],
        ),
        (
            "huge table",
            vec![(0, 0, descriptor(table, 0xffff_fff0, INDIRECT_FLAG, 0))],
        ),
    ];
    for (name, chain) in chains {
        println!("{name}");
        bed.breaks(|queue| {
            for (table, index, fields) in chain {
                let table = if table == 0 { queue.desc } else { table };
                queue.descriptor(&ram, table, index, fields);
            }
            queue.offer(&ram, 0);
        });
    }
    assert_eq!(bed.echo.pci.counters().broken, 10);
}

#[test]
fn indirect_chains_longer_than_the_ring_break_the_device() {
    let bed = bed();
    let ram = bed.guest.ram.clone();
    let bufs = |count| vec![into(DATA, 1); count];
    bed.breaks(|queue| {
        queue.add_indirect(&ram, 0x9_0000, &bufs(65));
    });
    let mut queue = bed.guest.start(VERSION_1 | INDIRECT, 1).remove(0);
    let head = queue.add_indirect(&ram, 0x9_0000, &bufs(64));
    bed.guest.kick(&queue);
    bed.host.run();
    assert_eq!(queue.used(&ram), Some((head, 0)));
}

#[test]
fn bad_available_entries_break_the_device() {
    let bed = bed();
    let ram = bed.guest.ram.clone();
    bed.breaks(|queue| queue.offer(&ram, 64));
    bed.breaks(|queue| queue.offer(&ram, 0xffff));
    // More chains than the ring has entries.
    bed.breaks(|queue| ram.write(queue.avail + 2, &65u16.to_le_bytes()).unwrap());
    // An index that goes back.
    bed.breaks(|queue| {
        ram.write(queue.avail + 2, &0xffffu16.to_le_bytes())
            .unwrap()
    });
}

#[test]
fn nothing_is_taken_without_bus_mastering() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1, 1).remove(0);
    bed.guest.port.set_master(false);
    let head = queue.add(&bed.guest.ram, &[into(DATA, 8)]);
    bed.guest.kick(&queue);
    bed.host.run();
    bed.guest.port.set_master(true);
    assert_eq!(queue.used(&bed.guest.ram), None);
    assert_eq!(bed.guest.status(), 0xf);
    bed.guest.kick(&queue);
    bed.host.run();
    assert_eq!(queue.used(&bed.guest.ram), Some((head, 0)));
}

#[test]
fn a_request_that_loses_bus_mastering_breaks_the_device() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1, 1).remove(0);
    queue.add(&bed.guest.ram, &[into(DATA, 8)]);
    let mut chain = Chain::default();
    let Next::Request(request) = bed.echo.pci.pop(0, &mut chain) else {
        panic!("no request");
    };
    bed.guest.port.set_master(false);
    request.complete(0, b"12345678", 8);
    assert_eq!(bed.guest.status(), 0x4f);
}

#[test]
fn a_reset_leaves_a_request_under_way_without_effect_and_waits_for_it() {
    for by_bus in [false, true] {
        let bed = bed();
        let mut queue = bed.guest.start(VERSION_1, 1).remove(0);
        queue.add(&bed.guest.ram, &[out(DATA, 8), into(DATA, 8)]);
        let mut chain = Chain::default();
        let Next::Request(request) = bed.echo.pci.pop(0, &mut chain) else {
            panic!("no request");
        };
        if by_bus {
            bed.guest.function.reset();
        } else {
            bed.guest.set_status(0);
        }
        // Twice, as an impatient driver does it.
        bed.guest.set_status(0);
        assert_eq!(bed.guest.status(), 0x40, "still resetting");
        bed.guest.set_status(0xf);
        assert_eq!(bed.guest.status(), 0x40);
        assert_eq!(request.read(0, &mut [0; 8]), Err(TransferError::Gone));
        assert_eq!(request.write(0, b"12345678"), Err(TransferError::Gone));
        request.complete(0, b"12345678", 8);
        assert_eq!(bed.guest.status(), 0);
        assert_eq!(bed.guest.bytes(DATA, 8), [0; 8]);
        assert_eq!(queue.used(&bed.guest.ram), None);
        assert!(bed.guest.lines.take().is_empty());
        bed.works();
    }
}

#[test]
fn the_other_queue_of_a_broken_device_answers_no_more() {
    let bed = bed();
    let mut queues = bed.guest.start(VERSION_1, 2);
    queues[0].add(&bed.guest.ram, &[into(DATA, 8)]);
    let mut chain = Chain::default();
    let Next::Request(request) = bed.echo.pci.pop(0, &mut chain) else {
        panic!("no request");
    };
    queues[1].offer(&bed.guest.ram, 999);
    assert!(matches!(
        bed.echo.pci.pop(1, &mut Chain::default()),
        Next::Idle
    ));
    assert_eq!(bed.guest.status(), 0x4f);
    request.complete(0, b"12345678", 8);
    assert_eq!(queues[0].used(&bed.guest.ram), None);
    assert_eq!(bed.guest.lines.take(), [0]);
    bed.works();
}
