//! A block device on a real bus: found through the config window, driven through the BAR that the
//! guest placed, heard through the messages that it programmed.

use std::io::Write;

use tempfile::NamedTempFile;

use super::spec::common;
use super::testing::{Guest, VERSION_1, into, out};
use super::*;
use crate::dma::DmaPort;
use crate::hv::vpci as wire;
use crate::vpci::MmioSpace;
use crate::vpci::function::{FunctionLayout, FunctionResources, PciFunction};
use crate::vpci::testing::{self as bus, HIGH, HandLoop, assigned, create};
use std::sync::Arc;

const BAR: u64 = HIGH + 0x10_0000;
const V1_4: u32 = 0x0001_0004;
const HEADER: u64 = 0x8_0000;
const STATUS: u64 = 0x8_0100;
const DATA: u64 = 0xa_0000;

/// The function as the guest reaches it: loads and stores in the BAR.
#[derive(Debug)]
struct ThroughBus(Arc<MmioSpace>);

impl PciFunction for ThroughBus {
    fn layout(&self) -> FunctionLayout {
        FunctionLayout::default()
    }
    fn connect(&self, _resources: FunctionResources) {}
    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        assert!(self.0.mmio_read(BAR + offset, data));
    }
    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        assert!(self.0.mmio_write(BAR + offset, data));
    }
    fn reset(&self) {}
}

struct Bed {
    bus: bus::Guest,
    guest: Guest,
    blk: Arc<Blk>,
    image: NamedTempFile,
}

fn bed() -> Bed {
    let mut image = NamedTempFile::new().unwrap();
    image.write_all(&[0x11; 512]).unwrap();
    image.write_all(&[0x22; 512]).unwrap();
    let workers = Arc::new(HandLoop::default());
    let config = BlkConfig {
        file: image.path().to_owned(),
        readonly: false,
        queues: 2,
        iommu: false,
        id: "d".to_owned(),
    };
    let blk = Blk::new(config, &*workers).unwrap();
    let mut bus = bus::Guest::new(workers, vec![(0, blk.clone())], |_| {});
    bus.power_on(V1_4);
    bus.request::<wire::ResourcesAssignedReply>(&assigned(0));
    bus.config_write(0, 4, 0);
    bus.config_write(0, 0x10, BAR as u32);
    bus.config_write(0, 0x14, (BAR >> 32) as u32);
    bus.config_write(0, 4, 6);
    let guest = Guest {
        ram: bus.ram.clone(),
        port: DmaPort::new(bus.ram.clone()),
        lines: Arc::default(),
        function: Arc::new(ThroughBus(bus.mmio.clone())),
    };
    Bed {
        bus,
        guest,
        blk,
        image,
    }
}

impl Bed {
    /// Programs an MSI-X entry with a message for `vector`.
    fn map_vector(&self, entry: u64, vector: u32) {
        let reply: wire::CreateInterruptReply = self.bus.request(&create(0, vector, 1, 0));
        let address = reply.message.address.get();
        let table = BAR + 0x4000 + entry * 16;
        self.bus.store32(table, address as u32);
        self.bus.store32(table + 4, (address >> 32) as u32);
        self.bus.store32(table + 8, reply.message.data.get());
        self.bus.store32(table + 12, 0);
    }

    /// The virtio structures in the capability list: type, BAR, offset, length, and its place.
    fn structures(&self) -> Vec<(u8, u8, u32, u32, u64)> {
        let mut found = Vec::new();
        let mut at = u64::from(self.bus.config_read(0, 0x34) & 0xff);
        while at != 0 {
            let head = self.bus.config_read(0, at);
            if head as u8 == 9 {
                let bar = self.bus.config_read(0, at + 4) as u8;
                let offset = self.bus.config_read(0, at + 8);
                let len = self.bus.config_read(0, at + 12);
                found.push(((head >> 24) as u8, bar, offset, len, at));
            }
            at = u64::from(head >> 8 & 0xff);
        }
        found
    }
}

#[test]
fn a_driver_finds_the_structures_and_reads_a_sector_with_an_interrupt() {
    let bed = bed();
    assert_eq!(bed.bus.config_read(0, 0), 0x1042_1af4);
    let found: Vec<_> = bed
        .structures()
        .iter()
        .map(|s| (s.0, s.1, s.2, s.3))
        .collect();
    let expected = [
        (1, 0, 0x0000, 56),
        (2, 0, 0x3000, 8),
        (3, 0, 0x1000, 1),
        (4, 0, 0x2000, 60),
        (5, 0, 0, 0),
    ];
    assert_eq!(found, expected);
    let msix = bed.bus.capability(0, 0x11);
    assert_eq!(bed.bus.config_read(0, msix) >> 16, 2, "three vectors");
    bed.bus.config_write(0, msix, 0x8000_0000);
    for entry in 0..3 {
        bed.map_vector(entry, 0x40 + entry as u32);
    }
    let mut queue = bed.guest.start(VERSION_1, 2).remove(1);
    bed.guest.ram.write(HEADER, &[0; 16]).unwrap();
    bed.guest.ram.write(HEADER + 8, &[1]).unwrap();
    let bufs = [out(HEADER, 16), into(DATA, 512), into(STATUS, 1)];
    let head = queue.add(&bed.guest.ram, &bufs);
    bed.bus.msi.take();
    bed.guest.kick(&queue);
    bed.bus.workers.run();
    assert_eq!(queue.used(&bed.guest.ram), Some((head, 513)));
    assert_eq!(bed.guest.bytes(DATA, 512), [0x22; 512]);
    let vectors: Vec<u32> = bed.bus.msi.take().iter().map(|msi| msi.data).collect();
    assert_eq!(vectors, [0x42]);
    bed.image.as_file().set_len(4096).unwrap();
    assert!(bed.blk.resize().unwrap());
    let vectors: Vec<u32> = bed.bus.msi.take().iter().map(|msi| msi.data).collect();
    assert_eq!(vectors, [0x40]);
}

#[test]
fn switching_bus_mastering_off_stops_the_device_and_a_reset_revives_it() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1, 2).remove(0);
    bed.bus.config_write(0, 4, 2);
    queue.add(&bed.guest.ram, &[out(HEADER, 16), into(STATUS, 1)]);
    bed.guest.kick(&queue);
    bed.bus.workers.run();
    assert_eq!(queue.used(&bed.guest.ram), None);
    bed.bus.config_write(0, 4, 6);
    let mut queue = bed.guest.start(VERSION_1, 2).remove(0);
    bed.guest.ram.write(HEADER, &[4, 0, 0, 0]).unwrap();
    let head = queue.add(&bed.guest.ram, &[out(HEADER, 16), into(STATUS, 1)]);
    bed.guest.kick(&queue);
    bed.bus.workers.run();
    assert_eq!(queue.used(&bed.guest.ram), Some((head, 1)));
}

#[test]
fn the_window_in_the_configuration_space_reaches_the_device_status() {
    let bed = bed();
    let window = bed.structures()[4].4;
    let select = |offset: u32, len: u32| {
        bed.bus.config_write(0, window + 4, 0);
        bed.bus.config_write(0, window + 8, offset);
        bed.bus.config_write(0, window + 12, len);
    };
    select(common::DEVICE_STATUS as u32, 1);
    bed.bus.config_write(0, window + 16, 3);
    assert_eq!(bed.guest.status(), 3);
    assert_eq!(bed.bus.config_read(0, window + 16), 3);
    select(common::NUM_QUEUES as u32, 2);
    assert_eq!(bed.bus.config_read(0, window + 16), 2);
    select(0x2000, 4);
    assert_eq!(bed.bus.config_read(0, window + 16), 2, "capacity");
    bed.bus.config_write(0, 4, 0);
    select(common::DEVICE_STATUS as u32, 1);
    bed.bus.config_write(0, window + 16, 0);
    assert_eq!(
        bed.bus.config_read(0, window + 16),
        0,
        "also without decode"
    );
}
