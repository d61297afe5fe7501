//! Real threads: devices that never rest, and guests that unmap, flush, move and reuse. A page that
//! was taken away is poisoned; the poison must stay.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::*;
use crate::hv::HvStatus;

/// Pages of each domain, and how many bytes of a page are looked at.
const PAGES: u64 = 12;
const LOOK: usize = 256;
const IOVA: u64 = 0x4000_0000;
const POISON: u8 = 0xa5;

/// How long to go on; `VPCI_STRESS_SECONDS` makes it longer.
fn duration() -> Duration {
    let seconds = std::env::var("VPCI_STRESS_SECONDS");
    let seconds = seconds.ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(2))
}

/// Writes that a device tries after the end, if none came through before.
const LATE: u64 = 1_000_000;

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// A domain with its own pages.
struct Space {
    number: u32,
    table: Translation,
    entries: Vec<u64>,
    frames: u64,
}

impl Space {
    fn new(bed: &mut Bed, number: u32) -> Self {
        let root = bed.paging_domain(number);
        let frames = SECOND + u64::from(number) * 0x1_0000;
        let entries = (0..PAGES)
            .map(|page| {
                let at = bed.entry_at(root, 4, 1, IOVA + page * 0x1000);
                bed.set_entry(at, (frames + page * 0x1000) | PAGE);
                at
            })
            .collect();
        let levels = Levels::Four;
        Self {
            number,
            table: Translation::Paged(PageTable { root, levels }),
            entries,
            frames,
        }
    }

    fn frame(&self, page: u64) -> u64 {
        self.frames + page * 0x1000
    }

    /// Poisons a page that nobody may use, and looks at it for a while.
    fn watch(&self, bed: &Bed, page: u64) {
        bed.ram.fill(self.frame(page), LOOK as u64, POISON).unwrap();
        for _ in 0..20 {
            std::thread::yield_now();
            let mut bytes = [0; LOOK];
            bed.ram.read(self.frame(page), &mut bytes).unwrap();
            assert!(bytes == [POISON; LOOK], "a stale access");
        }
    }
}

/// Writes to random pages of whatever domain the function is in; until it has written something, for a
/// busy machine may not have let it before.
fn device(function: &Function, stop: &AtomicBool, seed: u64) -> u64 {
    let mut state = seed;
    let mut moved = 0;
    let mut late = 0;
    while !stop.load(Ordering::Relaxed) || (moved == 0 && late < LATE) {
        late += u64::from(stop.load(Ordering::Relaxed));
        let dice = random(&mut state);
        let iova = IOVA + dice % (PAGES + 1) * 0x1000 - dice / 64 % 2 * 0x80;
        let bytes = [(dice >> 32) as u8 & 0x5f; LOOK];
        moved += u64::from(function.dma.write(iova, &bytes).is_ok());
    }
    moved
}

/// Takes pages away and gives them back.
fn guest(bed: &Bed, space: &Space, stop: &AtomicBool, seed: u64) -> u64 {
    let mut state = seed;
    let mut rounds = 0;
    let name = DomainName::FirstStage(space.number);
    while rounds == 0 || !stop.load(Ordering::Relaxed) {
        let dice = random(&mut state);
        let page = dice % PAGES;
        let at = space.entries[page as usize];
        bed.set_entry(at, 0);
        match dice / 64 % 4 {
            0 => bed.iommu.flush(name).unwrap(),
            shift => {
                let first = ((IOVA >> 12) + page) >> shift << shift;
                let range = FlushRange {
                    first,
                    shift: shift as u8,
                };
                bed.iommu.flush_ranges(name, &[range]).unwrap();
            }
        }
        space.watch(bed, page);
        bed.set_entry(at, space.frame(page) | PAGE);
        rounds += 1;
    }
    rounds
}

/// Moves a function away from its domain and back; no page of the domain may be used meanwhile.
fn mover(bed: &Bed, space: &Space, code: u64, stop: &AtomicBool, seed: u64) -> u64 {
    let mut state = seed;
    let mut rounds = 0;
    while rounds == 0 || !stop.load(Ordering::Relaxed) {
        let dice = random(&mut state);
        match dice % 3 {
            0 => bed.iommu.detach(id(code)).unwrap(),
            1 => bed
                .iommu
                .attach(DomainName::FirstStage(4), id(code))
                .unwrap(),
            _ => bed
                .iommu
                .configure(space.number, Translation::Blocked)
                .unwrap(),
        }
        space.watch(bed, dice / 64 % PAGES);
        bed.iommu.configure(space.number, space.table).unwrap();
        // It may never have left.
        let _ = bed
            .iommu
            .attach(DomainName::FirstStage(space.number), id(code));
        rounds += 1;
    }
    rounds
}

#[test]
fn no_access_is_stale_while_guests_unmap_flush_and_move() {
    let mut bed = Bed::with(IommuConfig {
        iotlb_entries: 16,
        ..IommuConfig::default()
    });
    let c = plug(&bed.iommu, &bed.ram, 8, IommuMode::On);
    let spaces = [1, 2, 3].map(|number| Space::new(&mut bed, number));
    assert_eq!((bed.create(4), bed.configure(4, 3, 0)), (0, 0));
    assert_eq!(
        (bed.attach(1, A), bed.attach(2, B), bed.attach(3, 8)),
        (0, 0, 0)
    );
    let stop = AtomicBool::new(false);
    let (bed, c, spaces, stop) = (&bed, &c, &spaces, &stop);
    std::thread::scope(|scope| {
        // Two threads on one function: queues of one device share its cache.
        let devices = [(&bed.a, 11), (&bed.a, 22), (&bed.b, 33), (c, 44)]
            .map(|(function, seed)| scope.spawn(move || device(function, stop, seed)));
        let guests = [
            scope.spawn(|| guest(bed, &spaces[0], stop, 55)),
            scope.spawn(|| guest(bed, &spaces[1], stop, 66)),
            scope.spawn(|| mover(bed, &spaces[2], 8, stop, 77)),
        ];
        let end = Instant::now() + duration();
        while Instant::now() < end && !guests.iter().any(|guest| guest.is_finished()) {
            std::thread::sleep(Duration::from_millis(10));
        }
        stop.store(true, Ordering::Relaxed);
        for device in devices {
            assert!(device.join().unwrap() > 0);
        }
        for guest in guests {
            assert!(guest.join().unwrap() > 0);
        }
    });
}

/// Takes functions away, and kernels with all that they made; no page of a domain may be used
/// meanwhile.
fn host(bed: &Bed, spaces: &[Space; 2], stop: &AtomicBool, seed: u64) -> u64 {
    let functions = [(A, &bed.a), (B, &bed.b)];
    let mut state = seed;
    let mut rounds = 0;
    while rounds == 0 || !stop.load(Ordering::Relaxed) {
        let dice = random(&mut state);
        let at = (dice / 8 % 2) as usize;
        let (code, function) = functions[at];
        match dice % 4 {
            0 => {
                bed.iommu.guest_gone();
                for space in spaces {
                    space.watch(bed, 0);
                }
                // Attached again too early: it stays away until D0.
                bed.iommu.create(spaces[at].number).unwrap();
                let name = DomainName::FirstStage(spaces[at].number);
                let to = spaces[at].table;
                bed.iommu.configure(spaces[at].number, to).unwrap();
                bed.iommu.attach(name, id(code)).unwrap();
                spaces[at].watch(bed, 1);
                for (code, _) in functions {
                    bed.iommu.power_on(id(code));
                }
                bed.iommu.reset();
            }
            1 => bed.iommu.reset(),
            _ => {
                bed.iommu.begin_removal(id(code));
                spaces[at].watch(bed, 2);
                bed.iommu.remove_device(id(code));
                let port = function.port.clone();
                bed.iommu
                    .add_device(id(code), IommuMode::On, Some(port))
                    .unwrap();
            }
        }
        spaces[at].watch(bed, dice / 64 % PAGES);
        for (space, (code, _)) in spaces.iter().zip(functions) {
            // Those that a removal left alone are there already.
            let _ = bed.iommu.create(space.number);
            bed.iommu.configure(space.number, space.table).unwrap();
            let name = DomainName::FirstStage(space.number);
            let _ = bed.iommu.attach(name, id(code));
        }
        rounds += 1;
    }
    rounds
}

/// Calls that change nothing, of domains that come and go.
fn bystander(bed: &Bed, stop: &AtomicBool) -> u64 {
    let mut rounds = 0;
    while rounds == 0 || !stop.load(Ordering::Relaxed) {
        let name = DomainName::FirstStage(1 + rounds as u32 % 2);
        let flushed = match rounds % 3 {
            0 => bed.iommu.flush(name),
            _ => {
                let first = IOVA >> 12;
                let shift = (rounds % 8) as u8;
                bed.iommu.flush_ranges(name, &[FlushRange { first, shift }])
            }
        };
        assert!(matches!(flushed, Ok(()) | Err(HvStatus::INVALID_PARAMETER)));
        assert!(bed.iommu.report().devices.len() >= 2);
        assert!(bed.iommu.save().domains.len() <= 2);
        rounds += 1;
    }
    rounds
}

#[test]
fn no_access_is_stale_while_functions_and_kernels_come_and_go() {
    let mut bed = Bed::with(IommuConfig {
        iotlb_entries: 16,
        ..IommuConfig::default()
    });
    let spaces = [1, 2].map(|number| Space::new(&mut bed, number));
    assert_eq!((bed.attach(1, A), bed.attach(2, B)), (0, 0));
    let stop = AtomicBool::new(false);
    let (bed, spaces, stop) = (&bed, &spaces, &stop);
    std::thread::scope(|scope| {
        let devices = [(&bed.a, 12), (&bed.a, 23), (&bed.b, 34)]
            .map(|(function, seed)| scope.spawn(move || device(function, stop, seed)));
        let host = scope.spawn(|| host(bed, spaces, stop, 45));
        let bystander = scope.spawn(|| bystander(bed, stop));
        let end = Instant::now() + duration();
        while Instant::now() < end && !host.is_finished() && !bystander.is_finished() {
            std::thread::sleep(Duration::from_millis(10));
        }
        stop.store(true, Ordering::Relaxed);
        for device in devices {
            assert!(device.join().unwrap() > 0);
        }
        assert!(host.join().unwrap() > 0);
        assert!(bystander.join().unwrap() > 0);
    });
}
