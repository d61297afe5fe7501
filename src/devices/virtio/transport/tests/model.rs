//! Random drivers, well-behaved and not: the device never panics, always comes to rest, and a copy
//! restored from its saved state cannot be told from it.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Guest memory that the model uses, from address 0.
const ARENA: u64 = 0x20_0000;

/// One thing that a driver does.
#[derive(Debug, Clone)]
enum Op {
    /// A store of any kind to the BAR.
    Write(u64, usize, u64),
    /// A load.
    Read(u64, usize),
    /// The regular way to `DRIVER_OK` with these features.
    Start(u64),
    /// Fills a few descriptors of a queue and makes some of them available.
    Offer(u16, Vec<(u16, u64, u32, u16, u16)>, Vec<u16>),
    /// Moves a queue's available index.
    Index(u16, u16),
    /// Runs the workers.
    Run,
    /// Switches bus mastering.
    Master(bool),
    /// Reset by the bus.
    Reset,
    /// A change of configuration.
    Config(u8),
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => 0u64..16,
        2 => prop::sample::select(vec![0x10000, 0x11000, 0x12000, 0x40, 0x80, 0xffff, !0]),
        1 => any::<u64>(),
    ]
}

fn width() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![1, 2, 4, 8])
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => 0x10000..ARENA,
        1 => RAM_SIZE - 32..RAM_SIZE + 32,
        1 => any::<u64>(),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let registers = prop_oneof![
        0u64..0x40,
        0x1000u64..0x1004,
        0x2000u64..0x2010,
        0u64..0x8000
    ];
    let aligned = |offset: u64, width: usize| offset & !(width as u64 - 1);
    let descriptor = (0u16..8, address(), 0u32..100, 0u16..8, 0u16..9);
    let features = prop::sample::select(vec![
        VERSION_1,
        VERSION_1 | EVENT_IDX,
        VERSION_1 | EVENT_IDX | INDIRECT | 8,
    ]);
    prop_oneof![
        4 => (registers.clone(), width(), value())
            .prop_map(move |(o, w, v)| Op::Write(aligned(o, w), w, v)),
        3 => (registers, width()).prop_map(move |(o, w)| Op::Read(aligned(o, w), w)),
        2 => features.prop_map(Op::Start),
        6 => (0u16..2, vec(descriptor, 1..5), vec(0u16..9, 1..3))
            .prop_map(|(q, d, h)| Op::Offer(q, d, h)),
        1 => (0u16..2, 0u16..80).prop_map(|(q, i)| Op::Index(q, i)),
        4 => Just(Op::Run),
        1 => any::<bool>().prop_map(Op::Master),
        1 => Just(Op::Reset),
        1 => any::<u8>().prop_map(Op::Config),
    ]
}

/// What a driver can see of the device after an operation.
#[derive(Debug, PartialEq)]
struct Seen {
    value: u64,
    status: u8,
    vectors: Vec<u16>,
}

fn apply(bed: &Bed, op: &Op) -> Seen {
    let guest = &bed.guest;
    let base = |queue: u16| 0x10000 + u64::from(queue) * 0x4000;
    let mut value = 0;
    match op {
        Op::Write(offset, width, value) => guest.write(*offset, *width, *value),
        Op::Read(offset, width) => value = guest.read(*offset, *width),
        Op::Start(features) => {
            guest.start(*features, 2);
        }
        Op::Offer(queue, descriptors, heads) => {
            let base = base(*queue);
            for (index, gpa, len, flags, next) in descriptors {
                let mut bytes = gpa.to_le_bytes().to_vec();
                bytes.extend(len.to_le_bytes());
                bytes.extend(flags.to_le_bytes());
                bytes.extend(next.to_le_bytes());
                guest
                    .ram
                    .write(base + u64::from(*index) * 16, &bytes)
                    .unwrap();
            }
            let at = base + 0x1000;
            let mut index = u16::from_le_bytes(guest.bytes(at + 2, 2).try_into().unwrap());
            for head in heads {
                let slot = at + 4 + 2 * u64::from(index % 64);
                guest.ram.write(slot, &head.to_le_bytes()).unwrap();
                index = index.wrapping_add(1);
            }
            guest.ram.write(at + 2, &index.to_le_bytes()).unwrap();
            guest.write(NOTIFY_PAGE + u64::from(*queue) * 4, 2, 0);
        }
        Op::Index(queue, index) => {
            let at = base(*queue) + 0x1002;
            guest.ram.write(at, &index.to_le_bytes()).unwrap();
        }
        Op::Run => bed.host.run(),
        Op::Master(on) => guest.port.set_master(*on),
        Op::Reset => guest.function.reset(),
        Op::Config(byte) => {
            bed.echo.pci.update_config(|bytes| {
                bytes[0] = *byte;
                true
            });
        }
    }
    Seen {
        value,
        status: guest.status(),
        vectors: guest.lines.take(),
    }
}

/// A second guest in the same state, restored.
fn restored(old: &Bed) -> Bed {
    let new = bed();
    let arena = old.guest.bytes(0, ARENA as usize);
    new.guest.ram.write(0, &arena).unwrap();
    new.guest.port.set_master(old.guest.port.is_master());
    let state = old.echo.pci.save().unwrap();
    new.echo.pci.restore(&state).unwrap();
    assert_eq!(new.echo.pci.save().unwrap(), state);
    let mut config = vec![0; 5];
    old.echo
        .pci
        .set_config(|bytes| config.copy_from_slice(bytes));
    new.echo
        .pci
        .set_config(|bytes| bytes.copy_from_slice(&config));
    new
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn a_restored_device_goes_on_like_the_saved_one(
        before in vec(op(), 0..24),
        after in vec(op(), 0..24),
    ) {
        let old = bed();
        for op in &before {
            apply(&old, op);
        }
        // Restoring looks at each queue once, notified or not.
        for queue in 0..2 {
            apply(&old, &Op::Write(NOTIFY_PAGE + 4 * queue, 2, 0));
        }
        apply(&old, &Op::Run);
        let new = restored(&old);
        prop_assert!(apply(&new, &Op::Run).vectors.is_empty());
        for op in &after {
            prop_assert_eq!(apply(&old, op), apply(&new, op), "{:?}", op);
        }
        prop_assert!(old.guest.bytes(0, ARENA as usize) == new.guest.bytes(0, ARENA as usize));
        prop_assert_eq!(old.echo.pci.save(), new.echo.pci.save());
    }

    #[test]
    fn a_random_state_is_refused_or_restored_as_it_is(
        status in prop::sample::select(vec![0u8, 1, 3, 0xb, 0xf, 0x4f, 0x8f, 7, 0x1f, 0xff]),
        features in prop::sample::select(vec![0, VERSION_1, VERSION_1 | 8, VERSION_1 | 16]),
        vectors in vec(prop::sample::select(vec![0u16, 2, 3, 0xfffe, 0xffff]), 3),
        size in prop::sample::select(vec![0u16, 1, 3, 64, 128]),
        areas in vec(prop::sample::select(vec![0u64, 0x10000, 0x10001, 0x10002, 0x10004, !0]), 3),
        enabled: bool,
        indices in (0u16..3, 0u16..3),
        isr in 0u8..6,
    ) {
        let bed = bed();
        let fresh = bed.echo.pci.save().unwrap();
        let queue = VirtioQueueState {
            vector: vectors[0],
            size,
            enabled,
            desc: areas[0],
            driver: areas[1],
            device: areas[2],
            next_avail: indices.0,
            next_used: indices.1,
        };
        let state = VirtioState {
            status,
            driver_features: features,
            config_vector: vectors[1],
            isr,
            queues: vec![queue, VirtioQueueState { vector: vectors[2], ..fresh.queues[1] }],
            ..fresh.clone()
        };
        match bed.echo.pci.restore(&state) {
            Ok(()) => prop_assert_eq!(bed.echo.pci.save().unwrap(), state),
            Err(_) => prop_assert_eq!(bed.echo.pci.save().unwrap(), fresh),
        }
        bed.host.run();
        bed.works();
    }
}

#[test]
fn a_working_device_is_saved_and_restored_in_the_middle_of_its_ring() {
    let old = bed();
    let mut queue = old.guest.start(VERSION_1 | EVENT_IDX, 1).remove(0);
    for _ in 0..3 {
        let head = queue.add(&old.guest.ram, &[into(DATA, 8)]);
        old.guest.kick(&queue);
        old.host.run();
        assert_eq!(queue.used(&old.guest.ram), Some((head, 0)));
    }
    // One more, whose notification gets lost.
    let head = queue.add(&old.guest.ram, &[into(DATA, 8)]);
    let new = restored(&old);
    assert_eq!(new.guest.status(), 0xf);
    new.host.run();
    assert_eq!(queue.used(&new.guest.ram), Some((head, 0)));
}

#[test]
fn each_part_of_a_state_is_checked() {
    let bed = bed();
    bed.guest.start(VERSION_1, 2);
    let good = bed.echo.pci.save().unwrap();
    type Spoil = fn(&mut VirtioState);
    let cases: [(Spoil, VirtioStateError); 10] = [
        (|s| s.version = 2, VirtioStateError::Version { version: 2 }),
        (
            |s| s.queues.truncate(1),
            VirtioStateError::Queues {
                found: 1,
                expected: 2,
            },
        ),
        (
            |s| s.status = 0x1f,
            VirtioStateError::Status { status: 0x1f },
        ),
        (|s| s.status = 7, VirtioStateError::Status { status: 7 }),
        (
            |s| s.driver_features = 0,
            VirtioStateError::Features { features: 0 },
        ),
        (
            |s| s.config_vector = 3,
            VirtioStateError::Vector { vector: 3 },
        ),
        (
            |s| s.queues[1].vector = 9,
            VirtioStateError::Vector { vector: 9 },
        ),
        (|s| s.isr = 4, VirtioStateError::Isr { isr: 4 }),
        (
            |s| s.queues[1].next_avail = 1,
            VirtioStateError::Queue { queue: 1 },
        ),
        (
            |s| s.queues[0].size = 5,
            VirtioStateError::Queue { queue: 0 },
        ),
    ];
    for (spoil, error) in cases {
        let mut bad = good.clone();
        spoil(&mut bad);
        assert_eq!(bed.echo.pci.restore(&bad), Err(error));
        assert_eq!(bed.echo.pci.save().unwrap(), good);
    }
    bed.echo.pci.restore(&good).unwrap();
}

#[test]
fn a_request_under_way_is_neither_saved_nor_overwritten() {
    let bed = bed();
    let fresh = bed.echo.pci.save().unwrap();
    let mut queue = bed.guest.start(VERSION_1, 1).remove(0);
    queue.add(&bed.guest.ram, &[into(DATA, 8)]);
    let mut chain = Chain::default();
    let Next::Request(request) = bed.echo.pci.pop(0, &mut chain) else {
        panic!("no request");
    };
    let busy = VirtioStateError::Busy { queue: 0 };
    assert_eq!(bed.echo.pci.save(), Err(busy.clone()));
    assert_eq!(bed.echo.pci.restore(&fresh), Err(busy));
    request.complete(0, &[], 0);
    bed.echo.pci.save().unwrap();
}
