use super::*;
use proptest::prelude::*;
use vm_memory::GuestAddress;

use crate::mem::RamMap;

#[derive(Debug)]
struct FixedClock(u64);

impl Clock for FixedClock {
    fn reference_time(&self) -> u64 {
        self.0
    }
}

const RAM_SIZE: usize = 0x8000;

fn config() -> MsrConfig {
    MsrConfig {
        vp_count: 2,
        features: Features::default(),
        hypercall_port: DEFAULT_HYPERCALL_PORT,
        tsc_hz: 2_400_000_000,
        apic_hz: 1_000_000_000,
    }
}

/// RAM in which every page is filled with its own number plus one.
fn ram() -> GuestRam {
    let map = RamMap::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).expect("test RAM");
    let ram = GuestRam::new(&map);
    for page in 0..RAM_SIZE as u64 / PAGE_SIZE {
        ram.fill(page * PAGE_SIZE, PAGE_SIZE, page as u8 + 1)
            .unwrap();
    }
    ram
}

fn msrs() -> (GuestRam, PartitionMsrs) {
    let ram = ram();
    let msrs = PartitionMsrs::new(config(), ram.clone(), Arc::new(FixedClock(77))).unwrap();
    (ram, msrs)
}

fn enabled_at(page: u64) -> (GuestRam, PartitionMsrs) {
    let (ram, msrs) = msrs();
    assert_eq!(msrs.write(0, msr::GUEST_OS_ID, 0x8100), Ok(MsrEffect::None));
    assert_eq!(msrs.write(0, msr::HYPERCALL, page | 1), Ok(MsrEffect::None));
    (ram, msrs)
}

fn contents(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; RAM_SIZE];
    ram.read(0, &mut bytes).unwrap();
    bytes
}

fn page(ram: &GuestRam, gpa: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    ram.read(gpa, &mut bytes).unwrap();
    bytes
}

fn hypercall_page() -> Vec<u8> {
    let mut bytes = vec![0xcc; PAGE];
    bytes[..7].copy_from_slice(&[0xf3, 0x0f, 0x1e, 0xfa, 0xe7, 0x8d, 0xc3]);
    bytes
}

#[test]
fn enabling_covers_the_page_and_disabling_uncovers_it() {
    let (ram, msrs) = enabled_at(0x3000);
    assert_eq!(page(&ram, 0x3000), hypercall_page());
    assert_eq!(msrs.read(1, msr::HYPERCALL), Ok(0x3001));
    assert!(msrs.hypercalls_enabled());
    assert_eq!(msrs.write(1, msr::HYPERCALL, 0x3000), Ok(MsrEffect::None));
    assert!(!msrs.hypercalls_enabled());
    assert_eq!(msrs.read(0, msr::HYPERCALL), Ok(0x3000));
    assert_eq!(page(&ram, 0x3000), vec![4; PAGE]);
}

#[test]
fn moving_uncovers_the_old_page_and_enabling_again_changes_nothing() {
    let (ram, msrs) = enabled_at(0x3000);
    assert_eq!(msrs.write(0, msr::HYPERCALL, 0x5001), Ok(MsrEffect::None));
    assert_eq!(page(&ram, 0x3000), vec![4; PAGE]);
    assert_eq!(page(&ram, 0x5000), hypercall_page());
    // Written once per enable: a store of the guest into the page stays.
    ram.write(0x5800, &[9]).unwrap();
    assert_eq!(msrs.write(0, msr::HYPERCALL, 0x5001), Ok(MsrEffect::None));
    assert_eq!(page(&ram, 0x5000)[0x800], 9);
    // The hibernation sequence: off, then on at the same place.
    assert_eq!(msrs.write(0, msr::HYPERCALL, 0x5000), Ok(MsrEffect::None));
    assert_eq!(page(&ram, 0x5000), vec![6; PAGE]);
    assert_eq!(msrs.write(0, msr::HYPERCALL, 0x5001), Ok(MsrEffect::None));
    assert_eq!(page(&ram, 0x5000), hypercall_page());
}

#[test]
fn without_an_identity_enabling_does_not_take_effect() {
    let (ram, msrs) = msrs();
    let before = contents(&ram);
    assert_eq!(msrs.write(0, msr::HYPERCALL, 0x3001), Ok(MsrEffect::None));
    assert_eq!(msrs.read(0, msr::HYPERCALL), Ok(0));
    assert!(!msrs.hypercalls_enabled());
    assert_eq!(contents(&ram), before);
}

#[test]
fn clearing_the_identity_takes_the_page_away_and_says_so_once() {
    let (ram, msrs) = enabled_at(0x3000);
    assert_eq!(
        msrs.write(0, msr::GUEST_OS_ID, 0),
        Ok(MsrEffect::GuestOsIdCleared)
    );
    assert_eq!(msrs.read(0, msr::HYPERCALL), Ok(0x3000));
    assert!(!msrs.hypercalls_enabled());
    assert_eq!(page(&ram, 0x3000), vec![4; PAGE]);
    assert_eq!(msrs.write(0, msr::GUEST_OS_ID, 0), Ok(MsrEffect::None));
}

#[test]
fn a_locked_hypercall_msr_faults_until_reset() {
    let (ram, msrs) = enabled_at(0x3000);
    assert_eq!(msrs.write(0, msr::HYPERCALL, 0x3003), Ok(MsrEffect::None));
    assert_eq!(msrs.write(0, msr::HYPERCALL, 0x3000), Err(GpFault));
    assert_eq!(msrs.write(0, msr::HYPERCALL, 0x3003), Err(GpFault));
    assert_eq!(msrs.read(0, msr::HYPERCALL), Ok(0x3003));
    msrs.reset();
    assert_eq!(msrs.read(0, msr::HYPERCALL), Ok(0));
    assert_eq!(page(&ram, 0x3000), vec![4; PAGE]);
    assert_eq!(msrs.write(0, msr::HYPERCALL, 0x4000), Ok(MsrEffect::None));
}

#[test]
fn a_hypercall_page_outside_ram_faults_and_changes_nothing() {
    let (ram, msrs) = enabled_at(0x3000);
    let before = contents(&ram);
    for value in [0x8001, !2, 0xffff_ffff_ffff_f001] {
        assert_eq!(msrs.write(0, msr::HYPERCALL, value), Err(GpFault));
    }
    assert_eq!(msrs.read(0, msr::HYPERCALL), Ok(0x3001));
    assert_eq!(contents(&ram), before);
}

#[test]
fn registers_read_what_the_partition_was_given() {
    let (_, msrs) = msrs();
    assert_eq!(msrs.read(1, msr::VP_INDEX), Ok(1));
    assert_eq!(msrs.read(0, msr::TIME_REF_COUNT), Ok(77));
    assert_eq!(msrs.read(0, msr::TSC_FREQUENCY), Ok(2_400_000_000));
    assert_eq!(msrs.read(0, msr::APIC_FREQUENCY), Ok(1_000_000_000));
    for read_only in [
        msr::VP_INDEX,
        msr::TIME_REF_COUNT,
        msr::TSC_FREQUENCY,
        msr::APIC_FREQUENCY,
    ] {
        assert_eq!(msrs.write(0, read_only, 0), Err(GpFault));
    }
    // Crash, VP run time, reset and idle MSRs are not offered.
    for absent in [
        0x4000_0003,
        0x4000_0010,
        0x4000_0070,
        0x4000_00b0,
        0x4000_00f0,
        0x4000_0100,
        0x4000_0105,
        0x4000_0106,
        0x4000_01ff,
    ] {
        assert_eq!(msrs.read(0, absent), Err(GpFault));
        assert_eq!(msrs.write(0, absent, 0), Err(GpFault));
    }
    assert_eq!(msrs.read(2, msr::VP_INDEX), Err(GpFault));
    assert_eq!(msrs.write(2, msr::VP_ASSIST_PAGE, 0), Err(GpFault));
}

#[test]
fn the_assist_page_is_per_vp_and_the_reference_page_partition_wide() {
    let (_, msrs) = msrs();
    assert!(msrs.write(1, msr::VP_ASSIST_PAGE, 0x1001).is_ok());
    assert_eq!(msrs.read(0, msr::VP_ASSIST_PAGE), Ok(0));
    assert_eq!(msrs.read(1, msr::VP_ASSIST_PAGE), Ok(0x1001));
    assert!(msrs.write(1, msr::REFERENCE_TSC, 0x2000).is_ok());
    assert_eq!(msrs.read(0, msr::REFERENCE_TSC), Ok(0x2000));
}

#[test]
fn the_invariant_tsc_is_forwarded_and_cannot_be_taken_back() {
    let (_, msrs) = msrs();
    let invariant = msr::TSC_INVARIANT_CONTROL;
    assert_eq!(msrs.write(0, invariant, 2), Err(GpFault));
    assert_eq!(msrs.write(0, invariant, 0), Ok(MsrEffect::TscInvariant(0)));
    assert_eq!(msrs.write(0, invariant, 1), Ok(MsrEffect::TscInvariant(1)));
    assert_eq!(msrs.write(0, invariant, 0), Err(GpFault));
    assert_eq!(msrs.read(1, invariant), Ok(1));
}

#[test]
fn msrs_of_features_that_are_off_fault() {
    let features = Features {
        reference_counter: false,
        frequencies: false,
        tsc_invariant: false,
        ..Features::default()
    };
    let config = MsrConfig {
        features,
        tsc_hz: 0,
        ..config()
    };
    let msrs = PartitionMsrs::new(config, ram(), Arc::new(FixedClock(0))).unwrap();
    for absent in [0x4000_0020, 0x4000_0022, 0x4000_0023, 0x4000_0118] {
        assert_eq!(msrs.read(0, absent), Err(GpFault));
        assert_eq!(msrs.write(0, absent, 0), Err(GpFault));
    }
}

#[test]
fn impossible_configurations_are_refused() {
    let build = |config| PartitionMsrs::new(config, ram(), Arc::new(FixedClock(0))).map(|_| ());
    for port in [0x7e, 0x80, 0xed] {
        let config = MsrConfig {
            hypercall_port: port,
            ..config()
        };
        assert_eq!(build(config), Err(MsrError::Port { port }));
    }
    for count in [0, 4097, u32::MAX] {
        let config = MsrConfig {
            vp_count: count,
            ..config()
        };
        assert_eq!(build(config), Err(MsrError::Vps { count }));
    }
    let most_vps = MsrConfig {
        vp_count: 4096,
        ..config()
    };
    assert_eq!(build(most_vps), Ok(()));
    let no_tsc = MsrConfig {
        tsc_hz: 0,
        ..config()
    };
    assert_eq!(build(no_tsc), Err(MsrError::Frequency));
}

#[test]
fn states_that_no_guest_can_reach_are_refused_and_change_nothing() {
    let (ram, msrs) = enabled_at(0x3000);
    let good = msrs.save();
    let before = contents(&ram);
    let broken = |change: fn(&mut PartitionMsrsState)| {
        let mut state = good.clone();
        change(&mut state);
        msrs.restore(&state).unwrap_err()
    };
    assert_eq!(broken(|s| s.version = 2), MsrError::Version { version: 2 });
    assert_eq!(
        broken(|s| s.vp_assist.clear()),
        MsrError::VpCount {
            expected: 2,
            found: 0
        }
    );
    assert!(matches!(
        broken(|s| s.guest_os_id = 0),
        MsrError::Value { .. }
    ));
    assert!(matches!(
        broken(|s| s.hypercall = 0x8001),
        MsrError::Value { .. }
    ));
    assert!(matches!(
        broken(|s| s.tsc_invariant = 3),
        MsrError::Value { .. }
    ));
    assert_eq!(
        broken(|s| s.hypercall_backing.truncate(9)),
        MsrError::Backing { len: 9 }
    );
    assert_eq!(broken(|s| s.hypercall = 0), MsrError::Backing { len: PAGE });
    assert_eq!(msrs.save(), good);
    assert_eq!(contents(&ram), before);
    assert_eq!(msrs.restore(&good), Ok(()));
}

const KNOWN: [u32; 10] = [
    msr::GUEST_OS_ID,
    msr::HYPERCALL,
    msr::VP_INDEX,
    msr::TIME_REF_COUNT,
    msr::REFERENCE_TSC,
    msr::TSC_FREQUENCY,
    msr::APIC_FREQUENCY,
    msr::VP_ASSIST_PAGE,
    msr::TSC_INVARIANT_CONTROL,
    0x4000_0105,
];

fn any_msr() -> impl Strategy<Value = u32> {
    prop_oneof![
        8 => proptest::sample::select(&KNOWN[..]),
        3 => Just(msr::HYPERCALL),
        1 => msr::FIRST..=msr::LAST,
    ]
}

fn any_value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        Just(0),
        // Pages in and just outside RAM, with and without the enable and lock bits.
        (0u64..10, 0u64..4).prop_map(|(page, bits)| page << 12 | bits),
        (0u64..10).prop_map(|page| page << 12 | 1),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_faulting_write_changes_neither_registers_nor_memory(
        writes in proptest::collection::vec((0u32..3, any_msr(), any_value()), 1..60)
    ) {
        let (ram, msrs) = msrs();
        for (vp, msr, value) in writes {
            let (state, memory) = (msrs.save(), contents(&ram));
            if msrs.write(vp, msr, value).is_err() {
                prop_assert_eq!(msrs.save(), state);
                prop_assert_eq!(contents(&ram), memory);
            }
            let state = msrs.save();
            prop_assert_eq!(msrs.hypercalls_enabled(), state.hypercall & 1 != 0);
            if state.hypercall & 1 == 0 {
                prop_assert_eq!(contents(&ram), contents(&super::tests::ram()));
            }
        }
    }

    #[test]
    fn a_restored_partition_answers_as_the_saved_one_would(
        before in proptest::collection::vec((0u32..2, any_msr(), any_value()), 0..30),
        after in proptest::collection::vec((0u32..2, any_msr(), any_value()), 0..30),
    ) {
        let (ram, original) = msrs();
        for (vp, msr, value) in before {
            let _ = original.write(vp, msr, value);
        }
        let other_ram = super::tests::ram();
        other_ram.write(0, &contents(&ram)).unwrap();
        let restored =
            PartitionMsrs::new(config(), other_ram.clone(), Arc::new(FixedClock(77))).unwrap();
        restored.restore(&original.save()).unwrap();
        for (vp, msr, value) in after {
            prop_assert_eq!(restored.write(vp, msr, value), original.write(vp, msr, value));
            for known in KNOWN {
                prop_assert_eq!(restored.read(vp, known), original.read(vp, known));
            }
            prop_assert_eq!(restored.hypercalls_enabled(), original.hypercalls_enabled());
            prop_assert_eq!(contents(&other_ram), contents(&ram));
        }
    }
}

#[test]
fn a_hypercall_page_in_read_only_ram_is_as_one_outside_ram() {
    let rom = RAM_SIZE as u64;
    let map = crate::mem::testing::with_rom(rom, &[7; 0x1000]);
    let ram = GuestRam::new(&map);
    let msrs = PartitionMsrs::new(config(), ram, Arc::new(FixedClock(77))).unwrap();
    assert_eq!(msrs.write(0, msr::GUEST_OS_ID, 0x8100), Ok(MsrEffect::None));
    assert_eq!(msrs.write(0, msr::HYPERCALL, rom | 1), Err(GpFault));
    assert_eq!(msrs.read(0, msr::HYPERCALL), Ok(0));
    assert!(!msrs.hypercalls_enabled());
}
