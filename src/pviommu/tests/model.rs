//! The real pvIOMMU and the slow model do the same: every status, every byte of RAM (accessed and
//! dirty bits among them), every fault.

use proptest::prelude::*;

use super::reference::{Device, Reference};
use super::*;

/// RAM of this test: small, so that all of it can be compared.
const REGIONS: [(u64, usize); 2] = [(0, 0x2_0000), (0x4_0000, 0x8000)];
/// Tables: any of them may be a root, lead to any other, or be mapped as a page.
const TABLES: [u64; 6] = [0x8000, 0x9000, 0xa000, 0xb000, 0x4_0000, 0x4_1000];
/// What entries lead to besides tables: data, the hole, and beyond.
const FRAMES: [u64; 7] = [
    0xc000,
    0xd000,
    0x1_f000,
    0x4_7000,
    0x2_0000,
    0,
    0x000f_ffff_ffff_f000,
];
const INDICES: [u64; 4] = [0, 1, 2, 511];

#[derive(Debug, Clone)]
enum Step {
    Create(u32),
    Delete(u32),
    Configure(u32, u64, u64),
    Attach(u32, u64),
    Detach(u64),
    Flush(u32),
    FlushList(u32, Vec<u64>),
    GuestGone,
    PowerOn(u64),
    Reset,
    SaveAndRestore,
    /// Changes a table and flushes, as a guest does.
    SetEntry(u64, u64, bool),
    Dma(u64, u64, bool, usize),
}

fn number() -> impl Strategy<Value = u32> {
    prop_oneof![8 => 1u32..5, 1 => Just(0), 1 => Just(u32::MAX)]
}

fn device() -> impl Strategy<Value = u64> {
    prop_oneof![5 => Just(A), 4 => Just(B), 1 => Just(OFF)]
}

fn page() -> impl Strategy<Value = u64> {
    prop_oneof![
        prop::sample::select(&TABLES[..]),
        prop::sample::select(&FRAMES[..])
    ]
}

fn iova() -> impl Strategy<Value = u64> {
    let index = || prop::sample::select(&INDICES[..]);
    let inside = (index(), index(), index(), index(), 0u64..0x1000).prop_map(
        |(four, three, two, one, offset)| four << 39 | three << 30 | two << 21 | one << 12 | offset,
    );
    prop_oneof![
        6 => inside.clone(),
        // Low addresses, where the identity has RAM.
        3 => 0u64..0x5_0000,
        1 => (index(), inside).prop_map(|(five, low)| five << 48 | low),
        1 => 0xfedf_ff00u64..0xfef0_0100,
        1 => any::<u64>(),
    ]
}

fn entry() -> impl Strategy<Value = u64> {
    let flags = prop_oneof![
        6 => Just(TABLE),
        4 => Just(PAGE),
        2 => Just(READ_ONLY),
        3 => Just(PAGE | LARGE),
        1 => 0u64..0x100,
    ];
    let entry = (page(), flags)
        .prop_map(|(page, flags)| page | flags)
        .boxed();
    prop_oneof![
        1 => Just(0),
        12 => entry.clone(),
        1 => entry.prop_map(|entry| entry | 1 << 63),
        1 => any::<u64>(),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    let at = (
        prop::sample::select(&TABLES[..]),
        prop::sample::select(&INDICES[..]),
    );
    let element = prop_oneof![
        4 => (iova(), 0u64..53).prop_map(|(iova, shift)| iova & !0xfff | shift),
        1 => any::<u64>(),
    ];
    prop_oneof![
        2 => number().prop_map(Step::Create),
        1 => number().prop_map(Step::Delete),
        5 => (number(), prop_oneof![6 => Just(1u64), 2 => Just(5), 2 => 0u64..9], page())
            .prop_map(|(number, flags, root)| Step::Configure(number, flags, root)),
        5 => (number(), device()).prop_map(|(number, id)| Step::Attach(number, id)),
        1 => device().prop_map(Step::Detach),
        1 => number().prop_map(Step::Flush),
        1 => (number(), prop::collection::vec(element, 1..70))
            .prop_map(|(number, elements)| Step::FlushList(number, elements)),
        1 => prop_oneof![
            Just(Step::GuestGone),
            device().prop_map(Step::PowerOn),
            Just(Step::Reset)
        ],
        1 => Just(Step::SaveAndRestore),
        20 => (at, entry(), any::<bool>())
            .prop_map(|((table, index), entry, list)| Step::SetEntry(table + index * 8, entry, list)),
        30 => (device(), iova(), any::<bool>(), prop_oneof![1usize..16, 1usize..0x2800])
            .prop_map(|(id, iova, write, len)| Step::Dma(id, iova, write, len)),
    ]
}

fn small_ram() -> GuestRam {
    let ranges = REGIONS.map(|(start, len)| (GuestAddress(start), len));
    let map = RamMap::from_ranges(&ranges).expect("test RAM");
    GuestRam::new(&map)
}

const CONFIG: IommuConfig = IommuConfig {
    max_domains: 3,
    max_functions: 3,
    // So few that entries are replaced all the time.
    iotlb_entries: 16,
    five_levels: true,
    physical_bits: 52,
    nested: false,
    gigabyte_pages: true,
};

struct Both {
    bed: Bed,
    model: Reference,
}

impl Both {
    fn new() -> Self {
        let bed = Bed::over(small_ram(), CONFIG);
        let memory = REGIONS.map(|(start, len)| (start, vec![0; len])).to_vec();
        let devices = [A, B].map(|id| (id, Device::default()));
        let mut both = Self {
            bed,
            model: Reference {
                memory,
                domains: Default::default(),
                faults: [(0, 0)].into(),
                devices: devices.into(),
                limit: 3,
            },
        };
        // Four levels that lead somewhere, so that random changes start from something that works.
        for (level, table) in TABLES.iter().take(4).enumerate() {
            for index in INDICES {
                let next = TABLES.get(level + 1).filter(|_| level < 3);
                let value = next.map_or(FRAMES[(index % 4) as usize] | PAGE, |next| next | TABLE);
                both.set_entry(table + index * 8, value);
            }
        }
        both
    }

    fn set_entry(&mut self, at: u64, value: u64) {
        self.bed.set_entry(at, value);
        self.model.store(at, value);
    }

    /// Flushes every domain, as tables may be shared and contain themselves.
    fn flush_all(&self, list: bool) {
        for number in self.model.domains.keys() {
            let status = match list {
                true => self.bed.flush_list(*number, &[52]).0,
                false => self.bed.flush(*number),
            };
            assert_eq!(status, 0);
        }
    }

    fn function(&self, id: u64) -> &Function {
        if id == A { &self.bed.a } else { &self.bed.b }
    }

    fn dma(&mut self, id: u64, iova: u64, write: bool, len: usize) {
        // The model makes no calls in memory.
        let calls = &mut self.model.memory[0].1[0x1000..0x2000];
        self.bed.ram.read(0x1000, calls).unwrap();
        let mut expected: Vec<u8> = (0..len).map(|at| (at * 7 + 1) as u8).collect();
        let mut data = expected.clone();
        let outcome = self.model.dma(id, iova, write, &mut expected);
        let function = self.function(id);
        let result = match write {
            true => function.dma.write(iova, &data),
            false => function.dma.read(iova, &mut data),
        };
        let last = function.port.last_fault();
        match outcome {
            Ok(places) => {
                assert_eq!(result, Ok(()), "{last:?}");
                assert!(data == expected);
                // The device has changed tables that domains may use.
                let tables = |place: &u64| TABLES.contains(&(place & !0xfff));
                if write && places.iter().any(tables) {
                    self.flush_all(false);
                }
            }
            Err((at, cause)) => {
                assert!(result.is_err(), "expected {cause} at {at:#x}");
                let last = last.expect("a fault");
                assert_eq!(last.cause, cause);
                // A page that is partly RAM is refused as a whole.
                if cause != FaultCause::NotRam {
                    assert_eq!(last.iova, at);
                }
            }
        }
    }

    /// The state goes to another pvIOMMU over the same RAM.
    fn save_and_restore(&mut self) {
        let state = self.bed.iommu.save();
        let next = Bed::over(self.bed.ram.clone(), CONFIG);
        next.iommu.restore(&state).unwrap();
        assert_eq!(next.iommu.save(), state);
        self.bed = next;
        self.model.faults.values_mut().for_each(|count| *count = 0);
        self.model.devices.values_mut().for_each(|d| d.faults = 0);
    }

    fn step(&mut self, step: Step) {
        let (bed, model) = (&self.bed, &mut self.model);
        match step {
            Step::Create(number) => assert_eq!(bed.create(number), model.create(number)),
            Step::Delete(number) => assert_eq!(bed.delete(number), model.delete(number)),
            Step::Configure(number, flags, root) => assert_eq!(
                bed.configure(number, flags, root),
                model.configure(number, flags, root)
            ),
            Step::Attach(number, id) => {
                // First-stage number 0 is no domain; the default one has another type.
                let expected = match number {
                    0 => 0x05,
                    _ => model.attach(number, id),
                };
                assert_eq!(bed.attach(number, id), expected);
            }
            Step::Detach(id) => assert_eq!(bed.detach(id), model.attach(0, id)),
            Step::Flush(number) => assert_eq!(bed.flush(number), model.flush(number)),
            Step::FlushList(number, elements) => assert_eq!(
                bed.flush_list(number, &elements),
                model.flush_list(number, &elements)
            ),
            Step::GuestGone => {
                bed.iommu.guest_gone();
                model.start_anew(true);
            }
            Step::Reset => {
                bed.iommu.reset();
                model.start_anew(false);
            }
            Step::PowerOn(code) => {
                bed.iommu.power_on(id(code));
                if let Some(device) = model.devices.get_mut(&code) {
                    device.held = false;
                }
            }
            Step::SaveAndRestore => self.save_and_restore(),
            Step::SetEntry(at, value, list) => {
                self.set_entry(at, value);
                self.flush_all(list);
            }
            Step::Dma(OFF, ..) => {}
            Step::Dma(id, iova, write, len) => self.dma(id, iova, write, len),
        }
        self.compare();
    }

    fn compare(&self) {
        // The page in which calls are made differs.
        for (start, bytes) in &self.model.memory {
            let mut real = vec![0; bytes.len()];
            self.bed.ram.read(*start, &mut real).unwrap();
            let from = if *start == 0 { 0x2000 } else { 0 };
            if let Some(at) = (from..bytes.len()).find(|at| real[*at] != bytes[*at]) {
                let (real, model) = (real[at], bytes[at]);
                panic!("{:#x}: {real:#x}, not {model:#x}", start + at as u64);
            }
        }
        let report = self.bed.iommu.report();
        let numbers = report.domains.iter().map(|domain| domain.number);
        assert!(numbers.eq(self.model.domains.keys().copied()));
        for domain in &report.domains {
            assert_eq!(domain.faults, self.model.faults[&domain.number]);
        }
        for (code, device) in &self.model.devices {
            let mut found = report.devices.iter();
            let found = found.find(|found| found.id == id(*code)).unwrap();
            assert_eq!((found.domain, found.held), (device.domain, device.held));
            assert_eq!(found.backend.faults, device.faults);
        }
        let default = report.counters.default_domain_faults;
        assert_eq!(default, self.model.faults[&0]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn the_pviommu_is_the_model(steps in prop::collection::vec(steps(), 1..120)) {
        let mut both = Both::new();
        for step in steps {
            both.step(step);
        }
    }

    #[test]
    fn a_changed_state_is_refused_or_works(
        numbers in prop::collection::vec(number(), 0..5),
        roots in prop::collection::vec(page(), 5),
        domains in prop::collection::vec(number(), 2),
        ids in prop::collection::vec(device(), 1..4),
        version in 0u32..3,
    ) {
        let bed = Bed::over(small_ram(), CONFIG);
        let before = bed.iommu.save();
        let table = |root| Translation::Paged(PageTable { root, levels: Levels::Five });
        let state = IommuState {
            version,
            domains: numbers
                .iter()
                .zip(&roots)
                .map(|(number, root)| DomainState { number: *number, translation: Some(table(*root)) })
                .collect(),
            devices: ids
                .iter()
                .zip(domains.iter().cycle())
                .map(|(id, domain)| DeviceState { id: *id, domain: *domain, held: false })
                .collect(),
        };
        match bed.iommu.restore(&state) {
            Ok(()) => {
                let mut sorted = state;
                sorted.domains.sort_by_key(|domain| domain.number);
                sorted.devices.sort_by_key(|device| device.id);
                prop_assert_eq!(bed.iommu.save(), sorted);
            }
            Err(_) => prop_assert_eq!(bed.iommu.save(), before),
        }
    }
}
