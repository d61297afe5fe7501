//! The calls that the host sees, and what remains true when it refuses them.
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;

use proptest::prelude::*;

use super::*;
use crate::pviommu::{FlushRange, Levels, Translation};

const DEFAULT: ObjectId = ObjectId(1);
const CAPABILITIES: NestedCapabilities = NestedCapabilities {
    five_levels: false,
    gigabyte_pages: true,
    max_shift: 18,
};

/// Pages that the model of a cache has.
const PAGES: u64 = 8;

/// An object of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Object {
    Parent,
    Nested { parent: ObjectId, table: PageTable },
}

/// What the device reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Ram,
    Nothing,
    Table(ObjectId),
}

/// How an operation fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// Nothing has happened.
    Clean,
    /// As much as the operation's contract lets happen: a failed move has blocked the device, a
    /// failed invalidation has done all entries but the last.
    Dirty,
}

/// A model of iommufd with one device. It enforces what the kernel enforces: nothing in use is
/// destroyed, nothing unknown is used.
#[derive(Debug)]
struct Model {
    objects: RefCell<BTreeMap<ObjectId, Object>>,
    next: Cell<u32>,
    reach: Cell<Reach>,
    /// Pages of which an older translation is cached, by first-stage table.
    stale: RefCell<BTreeMap<ObjectId, BTreeSet<u64>>>,
    operations: RefCell<Vec<Operation>>,
    /// Operations that fail, from the next one on; none behind its end.
    failures: RefCell<Vec<Option<Failure>>>,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            objects: RefCell::default(),
            next: Cell::new(10),
            reach: Cell::new(Reach::Ram),
            stale: RefCell::default(),
            operations: RefCell::default(),
            failures: RefCell::default(),
        }
    }
}

impl Model {
    fn fail_next(&self, failures: impl IntoIterator<Item = Option<Failure>>) {
        let mut failures: Vec<_> = failures.into_iter().collect();
        failures.reverse();
        *self.failures.borrow_mut() = failures;
    }

    fn take_operations(&self) -> Vec<Operation> {
        self.operations.take()
    }

    /// The guest changes the entry of a page, of which the device has the old one cached.
    fn change(&self, page: u64) {
        if let Reach::Table(object) = self.reach.get() {
            self.stale
                .borrow_mut()
                .entry(object)
                .or_default()
                .insert(page);
        }
    }

    fn add(&self, object: Object) -> Answer {
        let id = ObjectId(self.next.replace(self.next.get() + 1));
        self.objects.borrow_mut().insert(id, object);
        Answer::Object(id)
    }

    fn forget(&self, table: ObjectId, entries: &[Invalidation]) {
        let mut stale = self.stale.borrow_mut();
        let Some(stale) = stale.get_mut(&table) else {
            return;
        };
        for entry in entries {
            match *entry {
                Invalidation::All => stale.clear(),
                Invalidation::Pages { first, shift } => {
                    stale.retain(|page| page >> shift != first >> shift);
                }
            }
        }
    }

    fn stale_pages(&self) -> BTreeSet<u64> {
        match self.reach.get() {
            Reach::Table(object) => self
                .stale
                .borrow()
                .get(&object)
                .cloned()
                .unwrap_or_default(),
            _ => BTreeSet::new(),
        }
    }

    fn table(&self, object: ObjectId) -> Option<PageTable> {
        match self.objects.borrow().get(&object) {
            Some(Object::Nested { table, .. }) => Some(*table),
            _ => None,
        }
    }
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

const EINVAL: i32 = 22;
const EBUSY: i32 = 16;

impl Host for Model {
    fn execute(&self, operation: &Operation) -> io::Result<Answer> {
        self.operations.borrow_mut().push(operation.clone());
        let failure = self.failures.borrow_mut().pop().flatten();
        if let Some(failure) = failure {
            match operation {
                Operation::Attach { .. } if failure == Failure::Dirty => {
                    self.reach.set(Reach::Nothing);
                }
                Operation::Invalidate { table, entries } if failure == Failure::Dirty => {
                    self.forget(*table, &entries[..entries.len().saturating_sub(1)]);
                }
                _ => {}
            }
            return Err(errno(EINVAL));
        }
        match operation {
            Operation::AllocateParent => Ok(self.add(Object::Parent)),
            Operation::AllocateNested { parent, table } => {
                assert_eq!(self.objects.borrow().get(parent), Some(&Object::Parent));
                let (parent, table) = (*parent, *table);
                Ok(self.add(Object::Nested { parent, table }))
            }
            Operation::Attach { to } if *to == DEFAULT => {
                self.reach.set(Reach::Ram);
                Ok(Answer::Done)
            }
            Operation::Attach { to } => {
                assert!(self.table(*to).is_some(), "attached to {to}");
                self.reach.set(Reach::Table(*to));
                // What a table's cache held is gone when a device comes to it.
                self.stale.borrow_mut().remove(to);
                Ok(Answer::Done)
            }
            Operation::Detach => {
                self.reach.set(Reach::Nothing);
                Ok(Answer::Done)
            }
            Operation::Invalidate { table, entries } => {
                assert!(self.table(*table).is_some(), "invalidated {table}");
                self.forget(*table, entries);
                Ok(Answer::Done)
            }
            Operation::Destroy { object } => {
                let mut objects = self.objects.borrow_mut();
                assert!(objects.contains_key(object), "destroyed {object} twice");
                let attached = self.reach.get() == Reach::Table(*object);
                let has_children = objects.values().any(
                    |other| matches!(other, Object::Nested { parent, .. } if parent == object),
                );
                if attached || has_children {
                    return Err(errno(EBUSY));
                }
                objects.remove(object);
                Ok(Answer::Done)
            }
        }
    }
}

fn table(root: u64) -> PageTable {
    let levels = Levels::Four;
    PageTable { root, levels }
}

fn open(model: Model) -> NestedUnit<Model> {
    match NestedUnit::open(model, CAPABILITIES, DEFAULT, Place::Default, Levels::Four) {
        Ok(unit) => unit,
        Err((_, error)) => panic!("{error}"),
    }
}

/// A unit in a first-stage domain of the table at 0x1000, with its object.
fn nested() -> (NestedUnit<Model>, ObjectId) {
    let mut unit = open(Model::default());
    unit.attach(&Translation::Paged(table(0x1000))).unwrap();
    let Place::Nested { object, .. } = unit.place() else {
        panic!("not nested")
    };
    unit.host().take_operations();
    (unit, object)
}

fn range(first: u64, shift: u8) -> FlushRange {
    FlushRange { first, shift }
}

/// The whole life of a unit, call by call: what `vfio::nested` encodes and the kernel's mock device
/// runs.
#[test]
fn the_operations_of_a_life_are_these() {
    let mut unit = open(Model::default());
    let (parent, trial) = (ObjectId(10), ObjectId(11));
    assert_eq!(
        unit.host().take_operations(),
        [
            Operation::AllocateParent,
            Operation::AllocateNested {
                parent,
                table: table(0)
            },
            Operation::Invalidate {
                table: trial,
                entries: vec![]
            },
            Operation::Destroy { object: trial },
        ]
    );

    unit.attach(&Translation::Paged(table(0x1000))).unwrap();
    let first = ObjectId(12);
    assert_eq!(
        unit.host().take_operations(),
        [
            Operation::AllocateNested {
                parent,
                table: table(0x1000)
            },
            Operation::Attach { to: first },
        ]
    );

    unit.flush(&[range(2, 0), range(8, 3)]).unwrap();
    let pages = |first, shift| Invalidation::Pages { first, shift };
    assert_eq!(
        unit.host().take_operations(),
        [Operation::Invalidate {
            table: first,
            entries: vec![pages(2, 0), pages(8, 3)]
        }]
    );

    unit.attach(&Translation::Paged(table(0x2000))).unwrap();
    let second = ObjectId(13);
    assert_eq!(
        unit.host().take_operations(),
        [
            Operation::AllocateNested {
                parent,
                table: table(0x2000)
            },
            Operation::Attach { to: second },
            Operation::Destroy { object: first },
        ]
    );

    unit.attach(&Translation::Identity).unwrap();
    assert_eq!(
        unit.host().take_operations(),
        [
            Operation::Attach { to: DEFAULT },
            Operation::Destroy { object: second },
        ]
    );

    unit.attach(&Translation::Blocked).unwrap();
    unit.attach(&Translation::Blocked).unwrap();
    assert_eq!(unit.host().take_operations(), [Operation::Detach]);

    unit.close().unwrap();
    assert_eq!(
        unit.host().take_operations(),
        [Operation::Destroy { object: parent }]
    );
    assert_eq!(unit.objects().count(), 0);
}

#[test]
fn closing_destroys_tables_before_their_parent() {
    let (mut unit, object) = nested();
    unit.close().unwrap();
    assert_eq!(
        unit.host().take_operations(),
        [
            Operation::Detach,
            Operation::Destroy { object },
            Operation::Destroy {
                object: ObjectId(10)
            },
        ]
    );
    assert!(unit.host().objects.borrow().is_empty());
    assert!(unit.attach(&Translation::Paged(table(0))).is_err());
}

#[test]
fn the_same_table_again_is_a_flush_of_everything() {
    let (mut unit, object) = nested();
    unit.host().change(3);
    unit.attach(&Translation::Paged(table(0x1000))).unwrap();
    let all = vec![Invalidation::All];
    let flush = Operation::Invalidate {
        table: object,
        entries: all,
    };
    assert_eq!(unit.host().take_operations(), [flush]);
    assert_eq!(unit.host().stale_pages(), BTreeSet::new());
    // If that fails, a new table takes the place of the old one.
    unit.host().fail_next([Some(Failure::Clean)]);
    unit.attach(&Translation::Paged(table(0x1000))).unwrap();
    assert_ne!(unit.host().reach.get(), Reach::Table(object));
    assert_eq!(unit.host().objects.borrow().len(), 2);
}

#[test]
fn a_host_that_cannot_nest_is_left_as_it_was() {
    let steps = [
        "make a nesting parent of guest RAM",
        "make a first-stage table",
        "invalidate a first-stage table",
    ];
    for (at, step) in steps.into_iter().enumerate() {
        let model = Model::default();
        let before = std::iter::repeat_n(None, at);
        model.fail_next(before.chain([Some(Failure::Clean)]));
        let opened = NestedUnit::open(model, CAPABILITIES, DEFAULT, Place::Default, Levels::Four);
        let (model, error) = opened.map(drop).unwrap_err();
        let NestedError::Unavailable { what, left, .. } = error else {
            panic!("{error}")
        };
        assert_eq!((what, left.len()), (step, 0));
        assert!(model.objects.borrow().is_empty());
        assert_eq!(model.reach.get(), Reach::Ram);
    }
}

#[test]
fn tables_that_the_host_keeps_are_named() {
    let model = Model::default();
    // The invalidation fails, and then both destructions.
    model.fail_next([None, None].into_iter().chain([Some(Failure::Clean); 3]));
    let opened = NestedUnit::open(model, CAPABILITIES, DEFAULT, Place::Default, Levels::Four);
    let (model, error) = opened.map(drop).unwrap_err();
    let NestedError::Unavailable { left, .. } = error else {
        panic!("{error}")
    };
    let objects: Vec<_> = model.objects.borrow().keys().copied().collect();
    let mut left = left.to_vec();
    left.sort();
    assert_eq!(left, objects);
}

#[test]
fn five_levels_need_hardware_for_them() {
    let opened = NestedUnit::open(
        Model::default(),
        CAPABILITIES,
        DEFAULT,
        Place::Default,
        Levels::Five,
    );
    let (model, error) = opened.map(drop).unwrap_err();
    assert!(matches!(error, NestedError::FiveLevels));
    assert!(model.take_operations().is_empty());
    let (mut unit, _) = nested();
    let levels = Levels::Five;
    let five = PageTable {
        root: 0x1000,
        levels,
    };
    assert!(unit.attach(&Translation::Paged(five)).is_err());
    assert!(unit.host().take_operations().is_empty());
}

#[test]
fn a_range_that_is_too_large_becomes_everything() {
    let (mut unit, object) = nested();
    unit.flush(&[range(1, 0), range(1 << 19, 19)]).unwrap();
    let entries = vec![Invalidation::All];
    let table = object;
    assert_eq!(
        unit.host().take_operations(),
        [Operation::Invalidate { table, entries }]
    );
    unit.flush(&[range(0, 18)]).unwrap();
    let entries = vec![Invalidation::Pages {
        first: 0,
        shift: 18,
    }];
    assert_eq!(
        unit.host().take_operations(),
        [Operation::Invalidate { table, entries }]
    );
    unit.flush(&[]).unwrap();
    assert!(unit.host().take_operations().is_empty());
}

#[test]
fn a_flush_that_fails_midway_is_made_good_by_one_of_everything() {
    let (mut unit, _) = nested();
    (0..3).for_each(|page| unit.host().change(page));
    unit.host().fail_next([Some(Failure::Dirty)]);
    unit.flush(&[range(0, 0), range(1, 0)]).unwrap();
    assert_eq!(unit.host().stale_pages(), BTreeSet::new());
    assert!(matches!(unit.place(), Place::Nested { .. }));
    let counters = unit.counters();
    assert_eq!((counters.widened, counters.blocked), (1, 0));
}

#[test]
fn a_host_that_cannot_flush_has_the_device_blocked() {
    for ranges in [&[range(0, 0)][..], &[range(0, 40)]] {
        let (mut unit, _) = nested();
        unit.host().change(0);
        unit.host().fail_next([Some(Failure::Clean); 2]);
        if ranges[0].shift == 40 {
            // It is everything already: there is no second attempt.
            unit.host().fail_next([Some(Failure::Clean)]);
        }
        unit.flush(ranges).unwrap();
        assert_eq!(unit.place(), Place::Blocked);
        assert_eq!(unit.host().reach.get(), Reach::Nothing);
        assert_eq!(unit.counters().blocked, 1);
        // The table went with it, and the guest gets out by another attachment.
        assert_eq!(unit.host().objects.borrow().len(), 1);
        unit.attach(&Translation::Paged(table(0x1000))).unwrap();
    }
}

#[test]
fn a_device_that_cannot_be_blocked_is_not_passed_over() {
    let (mut unit, _) = nested();
    unit.host().fail_next([Some(Failure::Clean); 3]);
    let error = unit.flush(&[range(0, 0)]).unwrap_err();
    assert!(matches!(error, NestedError::Stuck { .. }));
    unit.host().fail_next([None, Some(Failure::Clean)]);
    let (mut unit, _) = nested();
    unit.host().fail_next([Some(Failure::Clean)]);
    let error = unit.attach(&Translation::Blocked).unwrap_err();
    assert!(matches!(error, NestedError::Stuck { .. }));
}

#[test]
fn a_unit_that_a_failed_move_has_blocked_goes_back() {
    let (mut unit, object) = nested();
    unit.host().fail_next([None, Some(Failure::Dirty)]);
    let refused = unit.attach(&Translation::Paged(table(0x2000)));
    assert!(matches!(refused, Err(NestedError::Refused { .. })));
    assert_eq!(unit.host().reach.get(), Reach::Table(object));
    // If that fails as well it is blocked, and knows.
    let failures = [Some(Failure::Dirty), Some(Failure::Clean)];
    unit.host().fail_next(failures);
    let blocked = unit.attach(&Translation::Identity);
    assert!(matches!(blocked, Err(NestedError::Blocked { .. })));
    assert_eq!(unit.place(), Place::Blocked);
    unit.attach(&Translation::Identity).unwrap();
    assert_eq!(unit.host().reach.get(), Reach::Ram);
    // If not even that is possible, the next move does not take its place for granted.
    let failures = [None, Some(Failure::Dirty), Some(Failure::Clean)];
    unit.host()
        .fail_next(failures.into_iter().chain([Some(Failure::Clean)]));
    let stuck = unit.attach(&Translation::Paged(table(0x1000)));
    assert!(matches!(stuck, Err(NestedError::Stuck { .. })));
    unit.attach(&Translation::Identity).unwrap();
    assert_eq!(unit.host().reach.get(), Reach::Ram);
}

#[test]
fn tables_that_stay_are_bounded() {
    let mut unit = open(Model::default());
    let mut moves = 0;
    for step in 1..100 {
        // Whatever is to be destroyed is not.
        let failures = |count| (0..count).map(|_| Some(Failure::Clean));
        let retired = unit.counters().retired as usize;
        let sweep: Vec<_> = failures(retired).collect();
        let last = failures(1);
        unit.host()
            .fail_next(sweep.into_iter().chain([None, None]).chain(last));
        match unit.attach(&Translation::Paged(table(step << 12))) {
            Ok(()) => moves += 1,
            Err(error) => assert!(matches!(error, NestedError::Retired), "{error}"),
        }
        assert!(unit.counters().retired < 4);
        assert!(unit.host().objects.borrow().len() <= 6);
    }
    assert_eq!(moves, 4);
    // And gone once the host destroys again.
    unit.host().fail_next([]);
    unit.attach(&Translation::Identity).unwrap();
    unit.attach(&Translation::Blocked).unwrap();
    assert_eq!(unit.counters().retired, 0);
    assert_eq!(unit.host().objects.borrow().len(), 1);
}

/// What a guest, or the host's owner, does.
#[derive(Debug, Clone)]
enum Step {
    Attach(Translation),
    Change(u64),
    Flush(Vec<FlushRange>),
    FlushAll,
}

fn step() -> impl Strategy<Value = Step> {
    let root = (1u64..4).prop_map(|page| Translation::Paged(table(page << 12)));
    let ranges = prop::collection::vec((0..PAGES, 0u8..4), 0..4);
    let ranges = ranges.prop_map(|ranges| {
        let aligned = |(page, shift): (u64, u8)| range(page >> shift << shift, shift);
        ranges.into_iter().map(aligned).collect()
    });
    prop_oneof![
        4 => root.prop_map(Step::Attach),
        1 => Just(Step::Attach(Translation::Identity)),
        1 => Just(Step::Attach(Translation::Blocked)),
        4 => (0..PAGES).prop_map(Step::Change),
        3 => ranges.prop_map(Step::Flush),
        1 => Just(Step::FlushAll),
    ]
}

fn failures() -> impl Strategy<Value = Vec<Option<Failure>>> {
    let failure = prop_oneof![
        4 => Just(None),
        1 => Just(Some(Failure::Clean)),
        1 => Just(Some(Failure::Dirty)),
    ];
    prop::collection::vec(failure, 0..8)
}

/// True if the device reaches what `wanted` allows, or nothing.
fn obeys(model: &Model, wanted: &Translation) -> bool {
    match (model.reach.get(), wanted) {
        (Reach::Nothing, _) => true,
        (Reach::Ram, wanted) => *wanted == Translation::Identity,
        (Reach::Table(object), Translation::Paged(table)) => model.table(object) == Some(*table),
        (Reach::Table(_), _) => false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    /// Any call may fail at any time: the device reaches no more than it may, no flush is lost,
    /// and no object is forgotten.
    #[test]
    fn whatever_fails_the_promises_hold(
        opening in failures(),
        steps in prop::collection::vec((step(), failures()), 0..24),
    ) {
        let model = Model::default();
        model.fail_next(opening);
        let opened = NestedUnit::open(model, CAPABILITIES, DEFAULT, Place::Default, Levels::Four);
        let mut unit = match opened {
            Ok(unit) => unit,
            Err((model, error)) => {
                let NestedError::Unavailable { left, .. } = error else {
                    return Err(TestCaseError::fail(error.to_string()));
                };
                let known: BTreeSet<_> = left.into_iter().collect();
                let objects: BTreeSet<_> = model.objects.borrow().keys().copied().collect();
                prop_assert_eq!(known, objects);
                prop_assert_eq!(model.reach.get(), Reach::Ram);
                return Ok(());
            }
        };
        // The domain that was last taken.
        let mut domain = Translation::Identity;
        for (step, failures) in steps {
            unit.host().fail_next(failures);
            let result = match &step {
                Step::Attach(to) => unit.attach(to).inspect(|()| domain = *to),
                Step::Change(page) => {
                    unit.host().change(*page);
                    Ok(())
                }
                Step::Flush(ranges) => unit.flush(ranges),
                Step::FlushAll => unit.flush_all(),
            };
            let model = unit.host();
            let stale = model.stale_pages();
            match (&step, &result) {
                // The owner stops the VM.
                (_, Err(NestedError::Stuck { .. })) => return Ok(()),
                (Step::Flush(ranges), result) => {
                    prop_assert!(result.is_ok());
                    let covers = |page: &u64| {
                        ranges.iter().any(|range| page >> range.shift == range.first >> range.shift)
                    };
                    prop_assert!(!stale.iter().any(covers));
                }
                (Step::FlushAll, result) => {
                    prop_assert!(result.is_ok());
                    prop_assert!(stale.is_empty());
                }
                (Step::Attach(to), Ok(())) => {
                    prop_assert!(stale.is_empty());
                    prop_assert_eq!(
                        unit.place() == Place::Blocked,
                        *to == Translation::Blocked
                    );
                }
                (Step::Attach(to), Err(_)) => prop_assert_ne!(*to, Translation::Blocked),
                (Step::Change(_), _) => {}
            }
            prop_assert!(obeys(model, &domain), "{:?} in {domain:?}", model.reach.get());
            // What the unit believes is what is.
            match (unit.place(), model.reach.get()) {
                (Place::Blocked, Reach::Nothing) | (Place::Default, Reach::Ram) => {}
                (Place::Nested { object, .. }, Reach::Table(reached)) => {
                    prop_assert_eq!(object, reached);
                }
                (place, reach) => prop_assert!(false, "{place:?} but {reach:?}"),
            }
            let known: BTreeSet<_> = unit.objects().collect();
            let objects: BTreeSet<_> = model.objects.borrow().keys().copied().collect();
            prop_assert_eq!(known, objects);
            prop_assert!(unit.counters().retired <= 4);
        }
        unit.host().fail_next([]);
        unit.close().unwrap();
        prop_assert!(unit.host().objects.borrow().is_empty());
    }
}
