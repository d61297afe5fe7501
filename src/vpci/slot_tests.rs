use super::super::function::{Capability, HostVectors, InterruptLines, MsixSpec, PciIdentity};
use super::super::testing::{HIGH, LOW, MsiLog, NoVectors, host};
use super::*;
use crate::mem::DeviceMemory;
use crate::vmbus::ring::guest::ram;
use crate::vmm::Msi;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::OnceLock;

/// A device that remembers what reaches it.
#[derive(Debug, Default)]
struct Probe {
    /// Offsets and data of stores.
    stores: Mutex<Vec<(u8, u64, Vec<u8>)>>,
    resets: AtomicU64,
    resources: OnceLock<FunctionResources>,
    share_page: bool,
    /// Raise and write memory while being reset, as a device does whose work is still under way.
    restless: AtomicBool,
    /// Stay in a store for a while: met at its start, set at its end.
    slow: Option<(std::sync::Barrier, AtomicBool)>,
    /// Have a capability of four bytes at 0x40.
    capability: bool,
    /// Offsets and lengths in BAR 2 of pieces that the guest may reach directly.
    direct: Vec<(u64, usize)>,
    master: AtomicBool,
    /// Let the host deliver the interrupts.
    hosted: bool,
}

impl PciFunction for Probe {
    fn layout(&self) -> FunctionLayout {
        let mut layout = FunctionLayout {
            kind: "probe",
            identity: PciIdentity {
                vendor: 0x1234,
                ..PciIdentity::default()
            },
            msix: Some(MsixSpec {
                vectors: 3,
                table_bar: 2,
                table_offset: 0x1000,
                pba_bar: 2,
                pba_offset: if self.share_page { 0x1800 } else { 0x2000 },
            }),
            ..FunctionLayout::default()
        };
        if self.capability {
            layout.capabilities.push(Capability {
                id: 9,
                body: vec![0; 2],
                writable: vec![0xff; 2],
            });
        }
        layout.bars[0] = BarSpec::Memory32 { size: 0x1000 };
        layout.bars[2] = BarSpec::Memory64 {
            size: 0x4000,
            prefetchable: false,
        };
        layout
    }

    fn connect(&self, resources: FunctionResources) {
        self.resources.set(resources).unwrap();
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(bar ^ offset as u8);
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if let Some((inside, left)) = &self.slow {
            inside.wait();
            std::thread::sleep(std::time::Duration::from_millis(20));
            left.store(true, Ordering::SeqCst);
        }
        lock(&self.stores).push((bar, offset, data.to_vec()));
    }

    fn capability_read(&self, _capability: usize, _offset: usize, _body: &[u8], data: &mut [u8]) {
        data.fill(0x5a);
    }

    fn capability_write(&self, _capability: usize, _offset: usize, body: &[u8], _len: usize) {
        self.bar_write(0, 0, body);
    }

    fn doorbells(&self) -> Vec<DoorbellRegister> {
        vec![DoorbellRegister {
            bar: 2,
            offset: 0x3000,
            len: 4,
            data: None,
            eventfd: OwnedFd::from(std::fs::File::open("/dev/null").unwrap()),
        }]
    }

    fn bar_areas(&self, bar: u8) -> Vec<BarArea> {
        let pieces = self.direct.iter().filter(|_| bar == 2);
        let area = |&(offset, len): &(u64, usize)| BarArea {
            offset,
            memory: Arc::new(device_memory(len)),
        };
        pieces.map(area).collect()
    }

    fn host_vectors(&self) -> Option<Arc<dyn HostVectors>> {
        self.hosted.then(|| Arc::new(NoVectors) as _)
    }

    fn set_bus_master(&self, on: bool) {
        self.master.store(on, Ordering::SeqCst);
    }

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
        if self.restless.load(Ordering::SeqCst) {
            let resources = self.resources.get().unwrap();
            resources.interrupts.raise(0);
            resources.dma.write(0, &[1]).unwrap_err();
        }
    }
}

/// Doorbells that are connected, and how often each call came.
#[derive(Debug, Default)]
struct Board {
    live: Mutex<Vec<Doorbell>>,
    fail: AtomicBool,
}

impl Doorbells for Board {
    fn add(&self, doorbell: Doorbell, _eventfd: BorrowedFd<'_>) -> io::Result<()> {
        if self.fail.load(Ordering::SeqCst) {
            return Err(io::Error::other("no room"));
        }
        lock(&self.live).push(doorbell);
        Ok(())
    }

    fn remove(&self, doorbell: Doorbell, _eventfd: BorrowedFd<'_>) -> io::Result<()> {
        let mut live = lock(&self.live);
        let before = live.len();
        live.retain(|other| *other != doorbell);
        assert_eq!(live.len() + 1, before, "removed once, after it was added");
        Ok(())
    }
}

/// Memory of a device that is none.
fn device_memory(len: usize) -> DeviceMemory {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len as u64).unwrap();
    DeviceMemory::map(file.as_fd(), 0, len).unwrap()
}

/// Guest physical addresses that are mapped directly, with offset and length in the device's memory.
#[derive(Debug, Default)]
struct Window {
    live: Mutex<Vec<(u64, u64, u64)>>,
    fail: AtomicBool,
    /// Refuse to unmap this often.
    keep: AtomicU64,
}

impl BarMapper for Window {
    fn map(&self, gpa: u64, memory: &Arc<DeviceMemory>, offset: u64, len: u64) -> io::Result<()> {
        assert!(offset + len <= memory.len() as u64);
        if self.fail.load(Ordering::SeqCst) {
            return Err(io::Error::other("no room"));
        }
        lock(&self.live).push((gpa, offset, len));
        Ok(())
    }

    fn unmap(&self, gpa: u64) -> io::Result<()> {
        let keep = self.keep.load(Ordering::SeqCst);
        if keep > 0 {
            self.keep.store(keep - 1, Ordering::SeqCst);
            return Err(io::Error::other("out of memory"));
        }
        let mut live = lock(&self.live);
        let before = live.len();
        live.retain(|(other, ..)| *other != gpa);
        assert_eq!(live.len() + 1, before, "unmapped once, after it was mapped");
        Ok(())
    }
}

struct Rig {
    slot: Arc<FunctionSlot>,
    device: Arc<Probe>,
    board: Arc<Board>,
    msi: Arc<MsiLog>,
    mmio: Arc<MmioSpace>,
    window: Arc<Window>,
}

fn rig_of(device: Probe) -> Rig {
    let msi = Arc::new(MsiLog::default());
    let from = host(&ram(16), &msi);
    let board = Arc::new(Board::default());
    let window = Arc::new(Window::default());
    let host = SlotHost {
        ram: from.ram,
        mmio: from.mmio.clone(),
        msi: from.msi,
        apic_ids: from.apic_ids,
        doorbells: Some(board.clone()),
        bars: Some(window.clone()),
    };
    let device = Arc::new(device);
    let slot = FunctionSlot::new(0, false, device.clone(), &host, None).unwrap();
    slot.connect();
    Rig {
        slot,
        device,
        board,
        msi,
        mmio: from.mmio,
        window,
    }
}

fn rig() -> Rig {
    let rig = rig_of(Probe::default());
    rig.slot.set_powered(true);
    rig
}

impl Rig {
    fn write(&self, offset: usize, value: u32) {
        self.slot.config_write(offset, &value.to_le_bytes());
    }

    fn read(&self, offset: usize) -> u32 {
        let mut data = [0; 4];
        self.slot.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn place(&self, bar0: u32, bar2: u64) {
        self.write(0x10, bar0);
        self.write(0x18, bar2 as u32);
        self.write(0x1c, (bar2 >> 32) as u32);
    }

    fn load(&self, gpa: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.mmio.mmio_read(gpa, &mut data));
        u32::from_le_bytes(data)
    }
}

const BAR0: u64 = LOW + 0x5000;

#[test]
fn bars_answer_while_decode_is_on() {
    let rig = rig();
    rig.place(BAR0 as u32, HIGH);
    assert_eq!(rig.load(BAR0 + 4), !0);
    rig.write(4, 2);
    assert_eq!(
        rig.slot.mapped_bars(),
        [Some(BAR0), None, Some(HIGH), None, None, None]
    );
    assert_eq!(rig.load(BAR0 + 4), 0x0404_0404);
    assert_eq!(rig.load(HIGH + 8), 0x0a0a_0a0a);
    assert!(rig.mmio.mmio_write(HIGH + 0x3008, &[1; 8]));
    assert_eq!(*lock(&rig.device.stores), [(2, 0x3008, vec![1; 8])]);
    rig.write(4, 0);
    assert_eq!(rig.load(BAR0 + 4), !0);
    // The other bits of the command register do not disturb the mappings.
    rig.write(4, 2);
    rig.write(4, 0x402);
    assert_eq!(rig.load(BAR0 + 4), 0x0404_0404);
}

#[test]
fn unaligned_accesses_do_not_reach_the_device() {
    let rig = rig();
    rig.place(BAR0 as u32, HIGH);
    rig.write(4, 2);
    assert!(rig.mmio.mmio_write(BAR0 + 2, &[0; 4]));
    assert_eq!(rig.load(BAR0 + 2), !0);
    assert!(lock(&rig.device.stores).is_empty());
    assert!(rig.mmio.mmio_write(BAR0 + 2, &[0; 2]));
    assert_eq!(lock(&rig.device.stores).len(), 1);
}

#[test]
fn a_bar_in_a_bad_place_is_not_mapped_and_is_checked_anew_at_each_enable() {
    let rig = rig();
    for bad in [0, 0x1000, LOW - 0x1000] {
        rig.place(bad as u32, HIGH);
        rig.write(4, 2);
        assert_eq!(rig.slot.mapped_bars()[0], None);
        assert_eq!(rig.slot.mapped_bars()[2], Some(HIGH));
        rig.write(4, 0);
    }
    assert_eq!(rig.slot.refused_bars(), 3);
    // Two BARs in one place: the first has it.
    rig.place(BAR0 as u32, LOW + 0x4000);
    rig.write(4, 2);
    assert_eq!(rig.slot.mapped_bars()[..3], [Some(BAR0), None, None]);
    rig.write(4, 0);
    rig.place(BAR0 as u32, u64::MAX);
    rig.write(4, 2);
    assert_eq!(rig.slot.mapped_bars()[2], None);
    rig.write(4, 0);
    rig.place(BAR0 as u32, HIGH);
    rig.write(4, 2);
    assert_eq!(rig.slot.mapped_bars()[..3], [Some(BAR0), None, Some(HIGH)]);
}

#[test]
fn the_bus_answers_for_the_msix_pages() {
    for share_page in [false, true] {
        let rig = rig_of(Probe {
            share_page,
            ..Probe::default()
        });
        rig.slot.set_powered(true);
        rig.place(BAR0 as u32, HIGH);
        rig.write(4, 2);
        assert_eq!(rig.load(HIGH + 0x1000 + 12), 1, "masked after reset");
        assert!(rig.mmio.mmio_write(HIGH + 0x1004, &7u32.to_le_bytes()));
        assert_eq!(rig.load(HIGH + 0x1004), 7);
        // Behind the table's three entries, and in the pending bits, there are zeros.
        for offset in [0x1030, 0x17fc, 0x1800, 0x1ffc] {
            assert!(rig.mmio.mmio_write(HIGH + offset, &[0xff; 4]));
            assert_eq!(rig.load(HIGH + offset), 0, "{offset:#x}");
        }
        let pba = if share_page { 0x1800 } else { 0x2000 };
        rig.write(0x40, 0xc000_0000);
        rig.slot.interrupts.raise(1);
        assert_eq!(rig.load(HIGH + pba), 2);
        assert!(lock(&rig.device.stores).is_empty());
        assert_eq!(rig.load(HIGH + 0x3000), 0x0202_0202);
    }
}

#[test]
fn doorbells_follow_their_bar() {
    let rig = rig();
    let live = || lock(&rig.board.live).clone();
    rig.place(BAR0 as u32, HIGH);
    rig.write(4, 2);
    let at = |gpa| Doorbell {
        gpa,
        len: 4,
        data: None,
    };
    assert_eq!(live(), [at(HIGH + 0x3000)]);
    rig.write(4, 0);
    assert_eq!(live(), []);
    rig.place(BAR0 as u32, HIGH + 0x4000);
    rig.write(4, 2);
    assert_eq!(live(), [at(HIGH + 0x7000)]);
    rig.slot.reset(false);
    assert_eq!(live(), []);
    // A host without room for one more leaves the register to MMIO.
    rig.board.fail.store(true, Ordering::SeqCst);
    rig.slot.set_powered(true);
    rig.place(BAR0 as u32, HIGH);
    rig.write(4, 2);
    assert!(rig.mmio.mmio_write(HIGH + 0x3000, &[1; 4]));
    assert_eq!(lock(&rig.device.stores).len(), 1);
    rig.write(4, 0);
}

#[test]
fn bus_mastering_follows_the_command_register() {
    let rig = rig();
    let dma = &rig.device.resources.get().unwrap().dma;
    assert!(dma.write(0, &[1]).is_err());
    rig.write(4, 4);
    dma.write(0, &[1]).unwrap();
    rig.write(4, 0);
    assert!(dma.write(0, &[1]).is_err());
}

#[test]
fn a_reset_function_neither_interrupts_nor_writes_memory_and_cannot_be_programmed() {
    let rig = rig();
    rig.device.restless.store(true, Ordering::SeqCst);
    rig.place(BAR0 as u32, HIGH);
    rig.write(4, 6);
    rig.write(0x40, 0x8000_0000);
    let data = rig.slot.interrupts.handles.create(0x33, 1, 1).unwrap();
    let entry = HIGH + 0x1000;
    for (offset, value) in [(0, LOW_MESSAGE), (8, data), (12, 0)] {
        assert!(rig.mmio.mmio_write(entry + offset, &value.to_le_bytes()));
    }
    rig.slot.interrupts.raise(0);
    assert_eq!(rig.msi.take(), [Msi::fixed(2, 0x33)]);
    rig.slot.reset(false);
    assert_eq!(rig.device.resets.load(Ordering::SeqCst), 1);
    assert!(rig.msi.take().is_empty());
    assert_eq!(rig.slot.mapped_bars(), [None; 6]);
    rig.write(4, 6);
    assert_eq!(rig.read(4) & 0xffff, 0);
    rig.slot.set_memory_decode(true);
    assert_eq!(rig.read(4) & 0xffff, 0);
    // Nothing to do the second time: the guest has not had the function since.
    rig.slot.reset(false);
    assert_eq!(rig.device.resets.load(Ordering::SeqCst), 1);
    rig.slot.reset(true);
    rig.slot.set_powered(true);
    rig.write(4, 4);
    assert_eq!(rig.read(4) & 0xffff, 4);
    rig.slot.reset(true);
    assert_eq!(rig.device.resets.load(Ordering::SeqCst), 2);
    rig.write(4, 4);
    assert_eq!(
        rig.read(4) & 0xffff,
        4,
        "released, but still in the guest's hands"
    );
}

const LOW_MESSAGE: u32 = 0xfee0_0000;

#[test]
fn a_doorbell_outside_its_bar_is_the_authors_mistake() {
    let layout = Probe::default().layout();
    let register = |bar, offset, len| DoorbellRegister {
        bar,
        offset,
        len,
        data: None,
        eventfd: OwnedFd::from(std::fs::File::open("/dev/null").unwrap()),
    };
    check_doorbell(&layout, &register(2, 0x3ffc, 4)).unwrap();
    check_doorbell(&layout, &register(2, 0x3fff, 0)).unwrap();
    for (bar, offset, len) in [
        (2, 0x3ffd, 4),
        (2, u64::MAX, 1),
        (1, 0, 4),
        (6, 0, 4),
        (2, 0, 3),
    ] {
        assert_eq!(
            check_doorbell(&layout, &register(bar, offset, len)),
            Err(LayoutError::Doorbell { bar, offset })
        );
    }
}

#[test]
fn saved_registers_come_back_with_their_effects() {
    let rig = rig();
    rig.place(BAR0 as u32, HIGH);
    rig.write(4, 6);
    let saved = rig.slot.save_config();
    let copy = rig_of(Probe::default());
    assert!(copy.slot.accepts_config(&saved));
    copy.slot.restore_config(&saved, true);
    assert_eq!(copy.slot.mapped_bars(), rig.slot.mapped_bars());
    assert!(copy.slot.dma.is_master());
    assert_eq!(lock(&copy.board.live).len(), 1);
}

/// A guest polls the vendor id with interrupts off; a write of another VP may be waiting for DMA to
/// drain at that time.
#[test]
fn configuration_reads_do_not_wait_for_a_write_under_way() {
    let rig = rig();
    let write_under_way = lock(&rig.slot.placement);
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| send.send(rig.read(0) & 0xffff).unwrap());
        let answer = receive.recv_timeout(std::time::Duration::from_secs(10));
        drop(write_under_way);
        assert_eq!(answer, Ok(0x1234));
    });
}

/// A guest that keeps switching things on while the bus's worker takes the function away.
#[test]
fn nothing_is_switched_on_behind_a_reset() {
    let rig = rig();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                rig.place(BAR0 as u32, HIGH);
                rig.write(4, 6);
                rig.write(0x40, 0x8000_0000);
                rig.write(4, 0);
            }
        });
        for _ in 0..500 {
            rig.slot.set_powered(true);
            std::thread::yield_now();
            rig.slot.reset(false);
            assert!(!rig.slot.dma.is_master());
            assert_eq!(rig.slot.mapped_bars(), [None; 6]);
            assert_eq!(rig.read(4) & 0xffff, 0);
            assert_eq!(rig.read(0x40) >> 16, 2);
            assert!(lock(&rig.board.live).is_empty());
        }
        done.store(true, Ordering::SeqCst);
    });
}

#[test]
fn a_reset_finds_no_access_under_way() {
    let accesses: [fn(&Rig); 2] = [
        |rig| assert!(rig.mmio.mmio_write(BAR0, &[0; 4])),
        |rig| rig.slot.config_write(0x42, &[1]),
    ];
    for access in accesses {
        let rig = rig_of(Probe {
            slow: Some((std::sync::Barrier::new(2), AtomicBool::new(false))),
            capability: true,
            ..Probe::default()
        });
        rig.slot.set_powered(true);
        rig.place(BAR0 as u32, HIGH);
        rig.write(4, 2);
        let (inside, left) = rig.device.slow.as_ref().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| access(&rig));
            inside.wait();
            rig.slot.reset(false);
            assert!(left.load(Ordering::SeqCst));
        });
    }
}

#[test]
fn an_access_across_a_double_word_does_not_reach_a_capability() {
    let rig = rig_of(Probe {
        capability: true,
        ..Probe::default()
    });
    rig.slot.set_powered(true);
    let read = |offset: usize, len: usize| {
        let mut data = [0; 8];
        rig.slot.config_read(offset, &mut data[..len]);
        data[..len].to_vec()
    };
    for (offset, len) in [(0x42, 4), (0x43, 2), (0x42, 8), (0x42, 3)] {
        assert_eq!(read(offset, len), vec![0xff; len]);
        rig.slot.config_write(offset, &[1; 8][..len]);
    }
    assert!(lock(&rig.device.stores).is_empty());
    assert_eq!(read(0x42, 2), [0x5a; 2]);
    rig.slot.config_write(0x42, &[1, 2]);
    assert_eq!(*lock(&rig.device.stores), [(0, 0, vec![1, 2])]);
}

#[test]
fn memory_of_the_device_is_mapped_with_its_bar_but_never_the_msix_pages() {
    let rig = rig_of(Probe {
        direct: vec![(0, 0x3000), (0x3000, 0x1000)],
        ..Probe::default()
    });
    rig.slot.set_powered(true);
    rig.place(BAR0 as u32, HIGH);
    assert!(lock(&rig.window.live).is_empty());
    rig.write(4, 2);
    // The table is in the second page, the pending bits in the third.
    let mapped = [(HIGH, 0, 0x1000), (HIGH + 0x3000, 0, 0x1000)];
    assert_eq!(*lock(&rig.window.live), mapped);
    rig.write(4, 0);
    assert!(lock(&rig.window.live).is_empty());
    rig.place(BAR0 as u32, HIGH + 0x4000);
    rig.write(4, 2);
    assert_eq!(lock(&rig.window.live)[0], (HIGH + 0x4000, 0, 0x1000));
    rig.slot.reset(true);
    assert!(lock(&rig.window.live).is_empty());
}

#[test]
fn memory_that_cannot_be_mapped_answers_as_mmio() {
    let rig = rig_of(Probe {
        direct: vec![(0, 0x4000)],
        ..Probe::default()
    });
    rig.slot.set_powered(true);
    rig.window.fail.store(true, Ordering::SeqCst);
    rig.place(BAR0 as u32, HIGH);
    rig.write(4, 2);
    assert_eq!(rig.load(HIGH + 8), 0x0a0a_0a0a);
    rig.write(4, 0);
    // The guest can do it at will: counted, so that the log is not its to fill.
    rig.write(4, 2);
    rig.write(4, 0);
    assert_eq!(rig.slot.refused_areas.load(Ordering::SeqCst), 4);
    // A BAR in a bad place maps nothing.
    rig.window.fail.store(false, Ordering::SeqCst);
    rig.place(BAR0 as u32, 0x1000);
    rig.write(4, 2);
    assert!(lock(&rig.window.live).is_empty());
}

#[test]
fn memory_that_cannot_be_unmapped_is_not_forgotten() {
    let mapped = || {
        let rig = rig_of(Probe {
            direct: vec![(0, 0x1000), (0x3000, 0x1000)],
            ..Probe::default()
        });
        rig.slot.set_powered(true);
        rig.place(BAR0 as u32, HIGH);
        rig.write(4, 2);
        rig.window.keep.store(1, Ordering::SeqCst);
        rig
    };
    let places = |window: &Window| -> Vec<u64> {
        let live = lock(&window.live);
        live.iter().map(|(gpa, ..)| *gpa).collect()
    };
    type Way = fn(&Rig);
    // Each way to take it away, and whatever may come next.
    let ways: [(Way, Way, &[u64]); 6] = [
        (|rig| rig.write(4, 0), |rig| rig.write(4, 4), &[]),
        (|rig| rig.write(4, 0), |rig| rig.slot.reset(false), &[]),
        (|rig| rig.slot.reset(true), |rig| rig.slot.reset(true), &[]),
        // Nobody has had it in between.
        (
            |rig| rig.slot.reset(false),
            |rig| rig.slot.reset(false),
            &[],
        ),
        (
            |rig| rig.slot.assign_bars([0; 6]),
            |rig| rig.slot.set_memory_decode(false),
            &[],
        ),
        // The same place, of which it must be gone first.
        (
            |rig| rig.write(4, 0),
            |rig| rig.write(4, 2),
            &[HIGH, HIGH + 0x3000],
        ),
    ];
    for (away, next, expected) in ways {
        let rig = mapped();
        away(&rig);
        assert_eq!(places(&rig.window), [HIGH], "the other one is gone");
        assert_eq!(rig.slot.failed_unmaps(), 1);
        next(&rig);
        assert_eq!(places(&rig.window), expected);
        assert_eq!(rig.slot.failed_unmaps(), 1);
        rig.slot.reset(false);
        assert!(places(&rig.window).is_empty());
    }
    // While it stays, what else there is comes and goes as ever.
    let rig = mapped();
    rig.window.keep.store(2, Ordering::SeqCst);
    rig.slot.assign_bars([BAR0, 0, HIGH + 0x4000, 0, 0, 0]);
    assert_eq!(places(&rig.window), [HIGH, HIGH + 0x3000]);
    rig.window.keep.store(1, Ordering::SeqCst);
    rig.write(4, 2);
    assert_eq!(places(&rig.window), [HIGH, HIGH + 0x4000, HIGH + 0x7000]);
    assert_eq!(rig.slot.failed_unmaps(), 3);
    rig.write(4, 6);
    assert_eq!(places(&rig.window), [HIGH + 0x4000, HIGH + 0x7000]);
    // At the latest when the function is gone.
    rig.window.keep.store(2, Ordering::SeqCst);
    rig.slot.reset(false);
    let Rig { slot, window, .. } = rig;
    assert_eq!(places(&window), [HIGH + 0x4000, HIGH + 0x7000]);
    drop(slot);
    assert!(places(&window).is_empty());
}

#[test]
fn memory_outside_its_bar_or_twice_is_refused() {
    let from = host(&ram(16), &Arc::new(MsiLog::default()));
    for (direct, offset) in [
        (vec![(0, 0x5000)], 0),
        (vec![(0x800, 0x1000)], 0x800),
        (vec![(0, 0x2000), (0x1000, 0x1000)], 0x1000),
        (vec![(u64::MAX - 0xfff, 0x1000)], u64::MAX - 0xfff),
    ] {
        let device = Arc::new(Probe {
            direct,
            ..Probe::default()
        });
        let host = SlotHost {
            ram: from.ram.clone(),
            mmio: from.mmio.clone(),
            msi: from.msi.clone(),
            apic_ids: from.apic_ids.clone(),
            doorbells: None,
            bars: None,
        };
        let error = FunctionSlot::new(0, false, device, &host, None).unwrap_err();
        assert_eq!(error, LayoutError::Area { bar: 2, offset });
    }
}

#[test]
fn a_device_hears_of_bus_mastering_and_of_its_end_at_a_reset() {
    let rig = rig();
    let master = || rig.device.master.load(Ordering::SeqCst);
    assert!(!master());
    rig.write(4, 4);
    assert!(master());
    rig.write(4, 0);
    assert!(!master());
    rig.write(4, 4);
    rig.slot.reset(true);
    assert!(!master());
}

#[test]
fn registers_of_a_host_device_may_share_a_page_with_the_msix_structures() {
    let rig = rig_of(Probe {
        hosted: true,
        ..Probe::default()
    });
    rig.slot.set_powered(true);
    rig.place(BAR0 as u32, HIGH);
    rig.write(4, 2);
    // Three entries of 16 bytes, and a word of pending bits in the next page.
    assert!(rig.mmio.mmio_write(HIGH + 0x1000, &[0x44; 4]));
    assert_eq!(rig.load(HIGH + 0x1000), 0x4444_4444);
    assert_eq!(rig.load(HIGH + 0x2000), 0);
    assert!(lock(&rig.device.stores).is_empty());
    assert_eq!(rig.load(HIGH + 0x1030), 0x3232_3232);
    assert_eq!(rig.load(HIGH + 0x2008), 0x0a0a_0a0a);
    assert!(rig.mmio.mmio_write(HIGH + 0x1030, &[1; 4]));
    assert_eq!(*lock(&rig.device.stores), [(2, 0x1030, vec![1; 4])]);
}
