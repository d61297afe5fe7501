//! Tests of virtio-blk through its registers and rings.

use std::io::{Read, Write};

use tempfile::NamedTempFile;

use super::*;
use crate::devices::virtio::testing::{
    Buf, DEVICE_PAGE, DriverQueue, EVENT_IDX, Guest, INDIRECT, ManualHost, VERSION_1, into, out,
};

mod hostile;
mod parallel;

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const HEADER: u64 = 0x8_0000;
const STATUS: u64 = 0x8_0100;
const DATA: u64 = 0x10_0000;
const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
const SECTORS: u64 = 1024;

struct Bed {
    guest: Guest,
    host: ManualHost,
    blk: Arc<Blk>,
    image: NamedTempFile,
}

fn image(sectors: u64) -> NamedTempFile {
    let mut image = NamedTempFile::new().unwrap();
    let mut bytes = Vec::new();
    for sector in 0..sectors {
        bytes.extend(sector.to_le_bytes());
        bytes.resize(bytes.len() + 504, sector as u8);
    }
    image.write_all(&bytes).unwrap();
    image
}

fn config(image: &NamedTempFile, queues: u16, readonly: bool) -> BlkConfig {
    BlkConfig {
        file: image.path().to_owned(),
        readonly,
        queues,
        iommu: false,
        id: "disk-0".to_owned(),
    }
}

fn bed_with(queues: u16, readonly: bool) -> Bed {
    let image = image(SECTORS);
    let host = ManualHost::default();
    let blk = Blk::new(config(&image, queues, readonly), &host).unwrap();
    Bed {
        guest: Guest::new(blk.clone()),
        host,
        blk,
        image,
    }
}

fn bed() -> Bed {
    bed_with(1, false)
}

impl Bed {
    fn header(&self, kind: u32, sector: u64) -> Buf {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.guest.ram.write(HEADER, &header).unwrap();
        out(HEADER, 16)
    }

    /// Sends one request and returns its status and used length.
    fn request(&self, queue: &mut DriverQueue, kind: u32, sector: u64, data: &[Buf]) -> (u8, u32) {
        let mut bufs = vec![self.header(kind, sector)];
        bufs.extend_from_slice(data);
        bufs.push(into(STATUS, 1));
        self.send(queue, &bufs)
    }

    /// Sends one chain, which must be answered.
    fn send(&self, queue: &mut DriverQueue, bufs: &[Buf]) -> (u8, u32) {
        let ram = &self.guest.ram;
        ram.write(STATUS, &[0xee]).unwrap();
        let head = queue.add(ram, bufs);
        self.guest.kick(queue);
        self.host.run();
        let (answered, len) = queue.used(ram).expect("answered");
        assert_eq!(answered, head);
        assert_eq!(queue.used(ram), None);
        (self.guest.bytes(STATUS, 1)[0], len)
    }

    fn file(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.image
            .reopen()
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        bytes
    }
}

#[test]
fn a_read_fills_scattered_buffers_and_interrupts_once() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1 | FLUSH, 1).remove(0);
    let data = [into(DATA, 100), into(DATA + 0x5000, 924)];
    let answer = bed.request(&mut queue, VIRTIO_BLK_T_IN, 3, &data);
    assert_eq!(answer, (OK, 1025));
    let mut got = bed.guest.bytes(DATA, 100);
    got.extend(bed.guest.bytes(DATA + 0x5000, 924));
    assert_eq!(got, bed.file()[3 * 512..5 * 512]);
    assert_eq!(bed.guest.lines.take(), [1]);
    assert_eq!(bed.blk.counters()[0].requests, 1);
    assert_eq!(bed.blk.counters()[0].oldest, None);
}

#[test]
fn a_write_longer_than_one_dma_access_reaches_the_image_and_is_read_back() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1 | FLUSH, 1).remove(0);
    let data: Vec<u8> = (0..200 * 1024u32).map(|i| (i % 251) as u8).collect();
    bed.guest.ram.write(DATA + 1, &data).unwrap();
    let bufs = [out(DATA + 1, 1), out(DATA + 2, 200 * 1024 - 1)];
    let answer = bed.request(&mut queue, VIRTIO_BLK_T_OUT, 7, &bufs);
    assert_eq!(answer, (OK, 1));
    assert_eq!(bed.file()[7 * 512..][..data.len()], data);
    let back = [into(DATA + 0x10_0000, 200 * 1024)];
    let answer = bed.request(&mut queue, VIRTIO_BLK_T_IN, 7, &back);
    assert_eq!(answer, (OK, 200 * 1024 + 1));
    assert_eq!(bed.guest.bytes(DATA + 0x10_0000, data.len()), data);
    assert_eq!(bed.request(&mut queue, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    let counters = bed.blk.counters()[0];
    assert_eq!(counters.requests, 3);
    assert_eq!(counters.errors, 0);
    assert_eq!(counters.bytes_written, 200 * 1024);
}

#[test]
fn the_header_may_be_split_and_the_status_may_share_a_buffer() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1 | FLUSH, 1).remove(0);
    bed.header(VIRTIO_BLK_T_IN, 1);
    let bufs = [
        out(HEADER, 5),
        out(HEADER + 5, 11),
        into(DATA, 0),
        into(STATUS - 512, 513),
    ];
    assert_eq!(bed.send(&mut queue, &bufs), (OK, 513));
    assert_eq!(bed.guest.bytes(STATUS - 512, 512), bed.file()[512..1024]);
}

#[test]
fn indirect_chains_work_and_each_queue_uses_its_own_vector() {
    let bed = bed_with(4, false);
    let queues = bed.guest.start(VERSION_1 | FLUSH | INDIRECT, 4);
    for mut queue in queues {
        let header = bed.header(VIRTIO_BLK_T_IN, 5);
        let bufs = [header, into(DATA, 512), into(STATUS, 1)];
        let head = queue.add_indirect(&bed.guest.ram, 0x9_0000, &bufs);
        bed.guest.kick(&queue);
        bed.host.run();
        assert_eq!(queue.used(&bed.guest.ram), Some((head, 513)));
        assert_eq!(bed.guest.bytes(DATA, 512), bed.file()[5 * 512..6 * 512]);
        assert_eq!(bed.guest.lines.take(), [queue.index + 1]);
    }
}

#[test]
fn get_id_answers_twenty_bytes_or_what_fits() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1, 1).remove(0);
    let answer = bed.request(&mut queue, VIRTIO_BLK_T_GET_ID, 0, &[into(DATA, 20)]);
    assert_eq!(answer, (OK, 21));
    assert_eq!(&bed.guest.bytes(DATA, 8), b"disk-0\0\0");
    let answer = bed.request(&mut queue, VIRTIO_BLK_T_GET_ID, 0, &[into(DATA, 4)]);
    assert_eq!(answer, (OK, 5));
}

#[test]
fn unknown_requests_are_unsupported() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1, 1).remove(0);
    for kind in [2, 11, 13, 0x8000_0000, u32::MAX] {
        let answer = bed.request(&mut queue, kind, 0, &[into(DATA, 512)]);
        assert_eq!(answer, (UNSUPP, 0), "{kind:#x}");
    }
    assert_eq!(bed.blk.counters()[0].errors, 5);
}

#[test]
fn requests_outside_the_disk_or_not_of_whole_sectors_are_io_errors() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1 | FLUSH, 1).remove(0);
    let before = bed.file();
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 511),
        (0, 513),
    ] {
        let read = bed.request(&mut queue, VIRTIO_BLK_T_IN, sector, &[into(DATA, len)]);
        assert_eq!(read, (IOERR, 0), "read {len} at {sector}");
        let write = bed.request(&mut queue, VIRTIO_BLK_T_OUT, sector, &[out(DATA, len)]);
        assert_eq!(write, (IOERR, 1), "write {len} at {sector}");
    }
    assert_eq!(bed.file(), before);
    let last = bed.request(&mut queue, VIRTIO_BLK_T_OUT, SECTORS - 1, &[out(DATA, 512)]);
    assert_eq!(last, (OK, 1));
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let bed = bed_with(1, true);
    assert_ne!(bed.guest.offered() & (1 << VIRTIO_BLK_F_RO), 0);
    let mut queue = bed.guest.start(VERSION_1 | FLUSH, 1).remove(0);
    let before = bed.file();
    let answer = bed.request(&mut queue, VIRTIO_BLK_T_OUT, 0, &[out(DATA, 512)]);
    assert_eq!(answer, (IOERR, 1));
    assert_eq!(bed.file(), before);
    let answer = bed.request(&mut queue, VIRTIO_BLK_T_IN, 0, &[into(DATA, 512)]);
    assert_eq!(answer, (OK, 513));
    assert_eq!(bed.request(&mut queue, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn a_short_header_is_an_io_error() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1, 1).remove(0);
    let bufs = [out(HEADER, 15), into(STATUS, 1)];
    assert_eq!(bed.send(&mut queue, &bufs), (IOERR, 1));
    assert_eq!(bed.send(&mut queue, &[into(STATUS, 1)]), (IOERR, 1));
}

#[test]
fn data_outside_guest_memory_is_an_io_error_and_the_queue_goes_on() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1 | FLUSH, 1).remove(0);
    for gpa in [
        1 << 40,
        u64::MAX - 100,
        super::super::testing::RAM_SIZE - 256,
    ] {
        let answer = bed.request(&mut queue, VIRTIO_BLK_T_IN, 0, &[into(gpa, 512)]);
        assert_eq!(answer, (IOERR, 0), "{gpa:#x}");
        let answer = bed.request(&mut queue, VIRTIO_BLK_T_OUT, 0, &[out(gpa, 512)]);
        assert_eq!(answer, (IOERR, 1), "{gpa:#x}");
    }
    let answer = bed.request(&mut queue, VIRTIO_BLK_T_IN, 0, &[into(DATA, 512)]);
    assert_eq!(answer, (OK, 513));
}

#[test]
fn the_longest_request_is_served_and_one_sector_more_is_not() {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(MAX_REQUEST + 4096).unwrap();
    let host = ManualHost::default();
    let blk = Blk::new(config(&image, 1, false), &host).unwrap();
    let guest = Guest::new(blk.clone());
    let bed = Bed {
        guest,
        host,
        blk,
        image,
    };
    let mut queue = bed.guest.start(VERSION_1 | FLUSH | INDIRECT, 1).remove(0);
    let ask = |queue: &mut DriverQueue, extra: u32| {
        let mut bufs = vec![bed.header(VIRTIO_BLK_T_IN, 0)];
        bufs.extend((0..SEG_MAX).map(|_| into(DATA, SIZE_MAX)));
        bufs[1].len += extra;
        bufs.push(into(STATUS, 1));
        queue.add_indirect(&bed.guest.ram, 0x9_0000, &bufs);
        bed.guest.kick(queue);
        bed.host.run();
        let used = queue.used(&bed.guest.ram).unwrap();
        (bed.guest.bytes(STATUS, 1)[0], used.1)
    };
    assert_eq!(ask(&mut queue, 0), (OK, MAX_REQUEST as u32 + 1));
    assert_eq!(ask(&mut queue, 512), (IOERR, 0));
}

#[test]
fn a_chain_without_room_for_a_status_breaks_the_device_until_reset() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1, 1).remove(0);
    let header = bed.header(VIRTIO_BLK_T_FLUSH, 0);
    queue.add(&bed.guest.ram, &[header]);
    bed.guest.kick(&queue);
    bed.host.run();
    assert_eq!(queue.used(&bed.guest.ram), None);
    assert_eq!(bed.guest.status(), 0x4f);
    assert_eq!(bed.guest.lines.take(), [0], "a configuration change");
    let mut queue = bed.guest.start(VERSION_1, 1).remove(0);
    assert_eq!(bed.request(&mut queue, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn a_status_byte_outside_guest_memory_breaks_the_device() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1, 1).remove(0);
    let header = bed.header(VIRTIO_BLK_T_FLUSH, 0);
    queue.add(&bed.guest.ram, &[header, into(1 << 40, 1)]);
    bed.guest.kick(&queue);
    bed.host.run();
    assert_eq!(queue.used(&bed.guest.ram), None);
    assert_eq!(bed.guest.status() & 0x40, 0x40);
}

#[test]
fn an_image_that_shrank_gives_io_errors() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1 | FLUSH, 1).remove(0);
    bed.image.as_file().set_len(512).unwrap();
    let answer = bed.request(&mut queue, VIRTIO_BLK_T_IN, 4, &[into(DATA, 512)]);
    assert_eq!(answer, (IOERR, 0));
}

#[test]
fn a_resize_changes_capacity_and_generation_and_interrupts_once() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1 | FLUSH, 1).remove(0);
    let generation = bed.guest.read(0x15, 1);
    assert!(!bed.blk.resize().unwrap());
    assert!(bed.guest.lines.take().is_empty());
    bed.image
        .as_file()
        .set_len((SECTORS + 8) * 512 + 100)
        .unwrap();
    assert!(bed.blk.resize().unwrap());
    assert_eq!(bed.guest.lines.take(), [0]);
    assert_eq!(bed.guest.read(DEVICE_PAGE, 8), SECTORS + 8);
    assert_ne!(bed.guest.read(0x15, 1), generation);
    assert_eq!(bed.blk.capacity(), (SECTORS + 8) * 512);
    let answer = bed.request(&mut queue, VIRTIO_BLK_T_IN, SECTORS + 7, &[into(DATA, 512)]);
    assert_eq!(answer, (OK, 513));
}

#[test]
fn a_resize_before_the_driver_is_ready_is_silent() {
    let bed = bed();
    bed.image.as_file().set_len(512).unwrap();
    assert!(bed.blk.resize().unwrap());
    assert!(bed.guest.lines.take().is_empty());
    assert_eq!(bed.guest.read(DEVICE_PAGE, 8), 1);
}

#[test]
fn the_configuration_tells_the_limits() {
    let bed = bed_with(3, false);
    assert_eq!(bed.guest.read(DEVICE_PAGE, 8), SECTORS);
    assert_eq!(bed.guest.read(DEVICE_PAGE + 8, 4), u64::from(SIZE_MAX));
    assert_eq!(bed.guest.read(DEVICE_PAGE + 12, 4), u64::from(SEG_MAX));
    assert_eq!(bed.guest.read(DEVICE_PAGE + 20, 4), 512);
    assert_eq!(bed.guest.read(DEVICE_PAGE + 34, 2), 3);
    assert_eq!(bed.guest.read(DEVICE_PAGE + 0x3c, 4), 0);
    assert_eq!(bed.guest.read(0x12, 2), 3);
    assert_eq!(bed.blk.layout().msix.unwrap().vectors, 4);
}

#[test]
fn bad_configurations_are_refused_by_name() {
    let image = image(1);
    let host = ManualHost::default();
    for queues in [0, MAX_BLK_QUEUES + 1] {
        let error = Blk::new(config(&image, queues, false), &host).unwrap_err();
        assert!(matches!(error, BlkError::Queues { .. }), "{error}");
    }
    let mut missing = config(&image, 1, false);
    missing.file = "/nonexistent/d0.img".into();
    let error = Blk::new(missing, &host).unwrap_err().to_string();
    assert!(error.starts_with("/nonexistent/d0.img: "), "{error}");
    for (file, readonly) in [("/dev/null", false), ("/", true)] {
        let mut odd = config(&image, 1, readonly);
        odd.file = file.into();
        let error = Blk::new(odd, &host).unwrap_err();
        assert!(matches!(error, BlkError::NotAnImage { .. }), "{error}");
    }
    let first = Blk::new(config(&image, MAX_BLK_QUEUES, false), &host).unwrap();
    let error = Blk::new(config(&image, 1, true), &host).unwrap_err();
    assert!(matches!(error, BlkError::InUse { .. }), "{error}");
    drop(first);
    let full = ManualHost {
        refuse: Some(1),
        ..ManualHost::default()
    };
    let error = Blk::new(config(&image, 2, false), &full).unwrap_err();
    assert!(matches!(error, BlkError::Worker(_)), "{error}");
    Blk::new(config(&image, 2, true), &host).unwrap();
}

#[test]
fn read_only_images_can_be_shared() {
    let image = image(1);
    let host = ManualHost::default();
    let _first = Blk::new(config(&image, 1, true), &host).unwrap();
    let _second = Blk::new(config(&image, 1, true), &host).unwrap();
}

#[test]
fn interrupts_follow_the_event_index() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1 | FLUSH | EVENT_IDX, 1).remove(0);
    let ram = &bed.guest.ram;
    queue.set_used_event(ram, 2);
    for expected in [vec![], vec![], vec![1], vec![]] {
        let answer = bed.request(&mut queue, VIRTIO_BLK_T_FLUSH, 0, &[]);
        assert_eq!(answer, (OK, 1));
        assert_eq!(bed.guest.lines.take(), expected);
    }
}

#[test]
fn interrupts_follow_the_no_interrupt_flag() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1 | FLUSH, 1).remove(0);
    queue.set_no_interrupt(&bed.guest.ram, true);
    bed.request(&mut queue, VIRTIO_BLK_T_FLUSH, 0, &[]);
    assert!(bed.guest.lines.take().is_empty());
    queue.set_no_interrupt(&bed.guest.ram, false);
    bed.request(&mut queue, VIRTIO_BLK_T_FLUSH, 0, &[]);
    assert_eq!(bed.guest.lines.take(), [1]);
}

#[test]
fn a_step_serves_a_bounded_number_of_requests() {
    let bed = bed();
    let mut queue = bed.guest.start(VERSION_1 | FLUSH, 1).remove(0);
    bed.host.run();
    for _ in 0..64 {
        queue.offer(&bed.guest.ram, 0);
    }
    let header = bed.header(VIRTIO_BLK_T_FLUSH, 0);
    queue.add(&bed.guest.ram, &[header, into(STATUS, 1)]);
    // One too many is available now: the index is taken back.
    bed.guest
        .ram
        .write(queue.avail + 2, &64u16.to_le_bytes())
        .unwrap();
    bed.guest.kick(&queue);
    assert!(bed.host.step());
    assert_eq!(bed.blk.counters()[0].requests, STEP_REQUESTS as u64);
    bed.host.run();
    assert_eq!(bed.blk.counters()[0].requests, 64);
}

#[test]
fn a_saved_disk_goes_on_where_it_stopped_with_the_capacity_its_driver_knows() {
    let old = bed();
    let mut queue = old.guest.start(VERSION_1 | FLUSH, 1).remove(0);
    old.request(&mut queue, VIRTIO_BLK_T_FLUSH, 0, &[]);
    old.guest.lines.take();
    let state = old.blk.save().unwrap();
    assert_eq!(state.capacity, SECTORS);
    let new = bed();
    let ram = old.guest.bytes(0, 0x20_0000);
    new.guest.ram.write(0, &ram).unwrap();
    new.image.as_file().set_len(8 * 512).unwrap();
    assert!(new.blk.resize().unwrap());
    new.blk.restore(&state).unwrap();
    assert_eq!(new.guest.read(DEVICE_PAGE, 8), SECTORS);
    assert_eq!(new.blk.save().unwrap(), state);
    assert!(new.blk.resize().unwrap());
    assert_eq!(new.guest.lines.take(), [0]);
    assert_eq!(new.guest.read(DEVICE_PAGE, 8), 8);
    let answer = new.request(&mut queue, VIRTIO_BLK_T_IN, 7, &[into(DATA, 512)]);
    assert_eq!(answer, (OK, 513));
    let mut huge = state;
    huge.capacity = MAX_CAPACITY + 1;
    let error = VirtioStateError::Capacity {
        sectors: MAX_CAPACITY + 1,
    };
    assert_eq!(new.blk.restore(&huge), Err(error));
    huge.capacity = MAX_CAPACITY;
    new.blk.restore(&huge).unwrap();
    let answer = new.request(
        &mut queue,
        VIRTIO_BLK_T_IN,
        MAX_CAPACITY - 1,
        &[into(DATA, 512)],
    );
    assert_eq!(answer, (IOERR, 0));
}
