use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::*;
use crate::vfio::ioctl;
use crate::vmm::Msi;

/// A line whose signals a test makes: kept, or delivered to a log.
#[derive(Debug)]
struct Line {
    fd: OwnedFd,
    to: Mutex<Option<Msi>>,
    kept: Mutex<bool>,
    log: Arc<Mutex<Vec<Msi>>>,
    fail: Arc<Mutex<bool>>,
}

impl Line {
    fn signal(&self) {
        match *lock(&self.to) {
            Some(to) => lock(&self.log).push(to),
            None => *lock(&self.kept) = true,
        }
    }
}

impl HostLine for Line {
    fn eventfd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
    fn connect(&self, to: Msi) -> io::Result<()> {
        if *lock(&self.fail) {
            *lock(&self.to) = None;
            return Err(io::Error::other("no route"));
        }
        *lock(&self.to) = Some(to);
        if std::mem::take(&mut *lock(&self.kept)) {
            lock(&self.log).push(to);
        }
        Ok(())
    }
    fn disconnect(&self) {
        *lock(&self.to) = None;
    }
    fn is_pending(&self) -> bool {
        *lock(&self.kept)
    }
    fn discard(&self) {
        *lock(&self.kept) = false;
    }
}

/// Lines, up to a limit, found again by their descriptor.
#[derive(Debug, Default)]
struct Lines {
    left: Mutex<u32>,
    made: Mutex<Vec<std::sync::Weak<Line>>>,
    log: Arc<Mutex<Vec<Msi>>>,
    fail: Arc<Mutex<bool>>,
}

impl HostLines for Lines {
    fn add(&self) -> io::Result<Arc<dyn HostLine>> {
        let mut left = lock(&self.left);
        *left = left
            .checked_sub(1)
            .ok_or_else(|| io::Error::other("no line left"))?;
        let line = Arc::new(Line {
            fd: std::fs::File::open("/dev/null")?.into(),
            to: Mutex::default(),
            kept: Mutex::default(),
            log: self.log.clone(),
            fail: self.fail.clone(),
        });
        lock(&self.made).push(Arc::downgrade(&line));
        Ok(line)
    }
}

/// The device: which descriptor each vector signals, and the calls.
#[derive(Debug, Default)]
struct Device {
    on: Mutex<Option<(u32, Vec<i32>)>>,
    calls: Mutex<Vec<(u32, u32, usize)>>,
    dynamic: bool,
    fail: Mutex<bool>,
    /// How many vectors the host has for it, if not enough.
    scarce: Mutex<Option<usize>>,
    /// The pending bits: vectors with an event while they were masked, as those without an eventfd are.
    pending: Mutex<BTreeSet<usize>>,
    lines: Arc<Lines>,
}

impl Irqs for Device {
    fn set(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> io::Result<()> {
        lock(&self.calls).push((index, start, fds.len()));
        if *lock(&self.fail) {
            return Err(io::Error::other("no vector"));
        }
        let mut on = lock(&self.on);
        let end = start as usize + fds.len();
        if let Some(most) = *lock(&self.scarce)
            && end > most
        {
            // One by one they are just refused.
            return match &*on {
                None => ioctl::all_vectors(most as i32, end as u32),
                Some(_) => Err(io::ErrorKind::StorageFull.into()),
            };
        }
        let (mode, vectors) = on.get_or_insert_with(|| (index, vec![-1; end]));
        assert_eq!(*mode, index, "one kind of interrupts at a time");
        if end > vectors.len() {
            assert!(self.dynamic, "more vectors than were enabled first");
            vectors.resize(end, -1);
        }
        for (vector, fd) in vectors[start as usize..].iter_mut().zip(fds) {
            *vector = fd.map_or(-1, |fd| fd.as_raw_fd());
        }
        let pending = std::mem::take(&mut *lock(&self.pending));
        drop(on);
        for vector in pending {
            self.event(vector);
        }
        Ok(())
    }

    fn disable(&self, index: u32) -> io::Result<()> {
        let on = lock(&self.on).take();
        assert_eq!(on.map(|on| on.0), Some(index), "disabled once");
        lock(&self.pending).clear();
        Ok(())
    }
}

impl Device {
    /// The device signals a vector: nothing happens if it sends no messages.
    fn event(&self, vector: usize) {
        let on = lock(&self.on);
        let Some((_, vectors)) = &*on else {
            return;
        };
        let fd = vectors.get(vector).copied().unwrap_or(-1);
        let made = lock(&self.lines.made);
        let mut live = made.iter().filter_map(std::sync::Weak::upgrade);
        match live.find(|line| line.fd.as_raw_fd() == fd) {
            Some(line) => line.signal(),
            None => {
                lock(&self.pending).insert(vector);
            }
        }
    }
}

struct Rig {
    vectors: Vectors,
    device: Arc<Device>,
    lines: Arc<Lines>,
}

impl Rig {
    fn new(dynamic: bool, left: u32) -> Self {
        let lines = Arc::new(Lines {
            left: Mutex::new(left),
            made: Mutex::default(),
            log: Arc::default(),
            fail: Arc::default(),
        });
        let device = Arc::new(Device {
            dynamic,
            lines: lines.clone(),
            ..Device::default()
        });
        let counts = Counts {
            msi: 4,
            msix: 8,
            dynamic,
        };
        let vectors = Vectors::new("test", device.clone(), lines.clone(), counts);
        Self {
            vectors,
            device,
            lines,
        }
    }

    fn event(&self, vector: usize) {
        self.device.event(vector);
    }

    fn delivered(&self) -> Vec<Msi> {
        std::mem::take(&mut lock(&self.lines.log))
    }

    fn calls(&self) -> Vec<(u32, u32, usize)> {
        std::mem::take(&mut lock(&self.device.calls))
    }
}

fn to(vector: u8) -> VectorRoute {
    VectorRoute::To(Msi::fixed(0, vector))
}

#[test]
fn vectors_of_msix_are_enabled_one_by_one() {
    let rig = Rig::new(true, 8);
    rig.vectors.set_mode(InterruptMode::Msix);
    assert_eq!(rig.calls(), [(MSIX_IRQ, 0, 1)], "on, with no vector");
    rig.vectors.route(5, VectorRoute::Held);
    assert_eq!(rig.calls(), []);
    rig.vectors.route(5, to(0x51));
    assert_eq!(rig.calls(), [(MSIX_IRQ, 5, 1)]);
    rig.vectors.route(7, to(0x71));
    assert_eq!(rig.calls(), [(MSIX_IRQ, 7, 1)]);
    rig.event(5);
    rig.event(7);
    rig.event(6);
    assert_eq!(rig.delivered(), [Msi::fixed(0, 0x51), Msi::fixed(0, 0x71)]);
    rig.vectors.set_mode(InterruptMode::Off);
    assert!(lock(&rig.device.on).is_none());
    rig.event(5);
    assert_eq!(rig.delivered(), []);
}

#[test]
fn where_vectors_cannot_be_added_later_all_are_enabled_at_first() {
    let rig = Rig::new(false, 8);
    rig.vectors.set_mode(InterruptMode::Msix);
    rig.vectors.route(2, to(0x21));
    rig.vectors.route(6, to(0x61));
    let calls = [(MSIX_IRQ, 0, 8), (MSIX_IRQ, 2, 1), (MSIX_IRQ, 6, 1)];
    assert_eq!(rig.calls(), calls);
    rig.event(6);
    assert_eq!(rig.delivered(), [Msi::fixed(0, 0x61)]);
}

#[test]
fn an_event_of_a_vector_that_was_masked_from_the_beginning_is_kept() {
    for dynamic in [false, true] {
        let rig = Rig::new(dynamic, 8);
        rig.vectors.set_mode(InterruptMode::Msix);
        rig.vectors.route(3, VectorRoute::Held);
        rig.event(3);
        rig.vectors.route(3, to(0x31));
        assert_eq!(rig.delivered(), [Msi::fixed(0, 0x31)]);
        // Switched off and on again: what was pending is gone.
        rig.vectors.route(3, VectorRoute::Held);
        rig.vectors.set_mode(InterruptMode::Off);
        rig.vectors.set_mode(InterruptMode::Msix);
        rig.vectors.route(3, to(0x32));
        assert_eq!(rig.delivered(), []);
    }
}

#[test]
fn a_held_vector_keeps_one_event_and_a_dropped_one_none() {
    let rig = Rig::new(true, 8);
    rig.vectors.set_mode(InterruptMode::Msix);
    rig.vectors.route(1, to(0x31));
    rig.vectors.route(1, VectorRoute::Held);
    rig.event(1);
    rig.event(1);
    assert!(rig.vectors.is_pending(1));
    assert_eq!(rig.delivered(), []);
    rig.vectors.route(1, to(0x32));
    assert_eq!(rig.delivered(), [Msi::fixed(0, 0x32)]);
    rig.vectors.route(1, VectorRoute::Dropped);
    rig.event(1);
    assert!(!rig.vectors.is_pending(1));
    rig.vectors.route(1, VectorRoute::Held);
    rig.vectors.route(1, to(0x33));
    assert_eq!(rig.delivered(), []);
    // Held, then dropped: what was kept is gone.
    rig.vectors.route(1, VectorRoute::Held);
    rig.event(1);
    rig.vectors.route(1, VectorRoute::Dropped);
    rig.vectors.route(1, to(0x34));
    assert_eq!(rig.delivered(), []);
}

#[test]
fn msi_is_enabled_as_a_whole_and_keeps_its_lines_to_the_end() {
    let rig = Rig::new(true, 8);
    rig.vectors.set_mode(InterruptMode::Msi { messages: 4 });
    assert_eq!(rig.calls(), [(MSI_IRQ, 0, 4)]);
    rig.event(2);
    rig.vectors.route(2, to(0x42));
    assert_eq!(rig.delivered(), [], "nothing led anywhere at the time");
    rig.event(2);
    assert_eq!(rig.delivered(), [Msi::fixed(0, 0x42)]);
    rig.vectors.set_mode(InterruptMode::Msix);
    assert_eq!(*lock(&rig.device.on), Some((MSIX_IRQ, vec![-1])));
    let made = lock(&rig.lines.made);
    assert!(made.iter().all(|line| line.upgrade().is_none()));
}

#[test]
fn what_the_host_refuses_is_counted_and_can_be_tried_again() {
    let rig = Rig::new(true, 2);
    rig.vectors.set_mode(InterruptMode::Msix);
    *lock(&rig.device.fail) = true;
    rig.vectors.route(0, to(0x30));
    assert_eq!(rig.vectors.failures(), 1);
    *lock(&rig.device.fail) = false;
    rig.vectors.route(0, to(0x30));
    *lock(&rig.lines.fail) = true;
    rig.vectors.route(0, to(0x31));
    assert_eq!(rig.vectors.failures(), 2);
    rig.event(0);
    *lock(&rig.lines.fail) = false;
    rig.vectors.route(0, to(0x31));
    rig.event(0);
    assert_eq!(rig.delivered(), [Msi::fixed(0, 0x31)]);
    // The third line is one too many.
    rig.vectors.route(1, to(0x32));
    assert_eq!(rig.vectors.failures(), 3);
    // More messages than the device has.
    rig.vectors.set_mode(InterruptMode::Off);
    rig.vectors.set_mode(InterruptMode::Msi { messages: 8 });
    assert_eq!(rig.vectors.failures(), 4);
    rig.vectors.route(0, to(0x33));
    rig.vectors.set_mode(InterruptMode::Off);
    assert!(lock(&rig.device.on).is_none());
}

#[test]
fn vectors_that_the_host_lacks_are_a_failure_and_can_be_had_later() {
    for dynamic in [true, false] {
        let rig = Rig::new(dynamic, 16);
        *lock(&rig.device.scarce) = Some(2);
        rig.vectors.set_mode(InterruptMode::Msix);
        rig.vectors.route(5, to(0x51));
        // Where they come all together, not even switching MSI-X on works.
        let before = if dynamic { 1 } else { 2 };
        assert_eq!(rig.vectors.failures(), before);
        rig.event(5);
        assert_eq!(rig.delivered(), []);
        *lock(&rig.device.scarce) = None;
        rig.vectors.route(5, to(0x51));
        rig.event(5);
        assert_eq!(rig.delivered(), [Msi::fixed(0, 0x51)]);
        // Messages of MSI come all together.
        *lock(&rig.device.scarce) = Some(2);
        let four = InterruptMode::Msi { messages: 4 };
        rig.vectors.set_mode(four);
        assert_eq!(rig.vectors.failures(), before + 1);
        rig.vectors.route(3, to(0x43));
        *lock(&rig.device.scarce) = None;
        rig.vectors.set_mode(InterruptMode::Off);
        rig.vectors.set_mode(four);
        rig.vectors.route(3, to(0x43));
        rig.event(3);
        assert_eq!(rig.delivered(), [Msi::fixed(0, 0x43)]);
        assert_eq!(rig.vectors.failures(), before + 1);
    }
}
