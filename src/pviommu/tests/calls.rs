//! Each row of docs/spec/pviommu.md#pviommu-4, and that a failing call changes nothing.

use super::*;

/// Makes a call that must fail, and compares the state.
fn refused(bed: &Bed, code: u16, input: &[u8], status: u16) {
    let before = bed.state();
    assert_eq!(bed.call(code, input), status, "{input:02x?}");
    assert_eq!(bed.state(), before);
}

fn u64s(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn the_driver_boots_as_documented() {
    let bed = Bed::new();
    let (status, _, output) = bed.raw(CAPABILITIES.into(), &u64s(&[SELF, 0]));
    assert_eq!(status, 0);
    // Size 24, reserved 0, width 48, no PASID; present and S1; 4 KiB, 2 MiB, 1 GiB.
    let expected = u64s(&[24 | 48 << 48, 1 | 1 << 2, 1 << 12 | 1 << 21 | 1 << 30]);
    assert_eq!(output[..], expected);
    assert_eq!((bed.create(1), bed.configure(1, 0, 0)), (0, 0));
    assert_eq!((bed.create(2), bed.configure(2, 3, 0)), (0, 0));
    for (device, behind) in [(A, 1), (B, 1), (OFF, 0)] {
        let (status, _, output) = bed.raw(PROPERTY.into(), &u64s(&[SELF, device, 10]));
        assert_eq!((status, &output[..16]), (0, &u64s(&[behind, 0])[..]));
    }
    assert_eq!((bed.create(3), bed.configure(3, 1, 0x2000)), (0, 0));
    assert_eq!(bed.attach(3, A), 0);
    assert_eq!(bed.attach(3, A), 0x66);
    // The sign-extended form of an id with bit 31.
    assert_eq!(bed.attach(3, 0xffff_ffff_0000_0000 | B), 0);
    assert_eq!(bed.attach(2, A), 0);
    assert_eq!(bed.delete(3), 0x19);
    assert_eq!(bed.detach(B), 0);
    assert_eq!(bed.delete(3), 0);
    // The lowest free number comes back at once.
    assert_eq!(bed.create(3), 0);
    assert_eq!(bed.attach(3, B), 0);
}

#[test]
fn five_levels_are_offered_when_configured_and_refused_otherwise() {
    let bed = Bed::new();
    assert_eq!(bed.create(1), 0);
    for flags in [4, 5, 7] {
        let before = bed.state();
        assert_eq!(bed.configure(1, flags, 0x2000), 5);
        assert_eq!(bed.state(), before);
    }
    let bed = Bed::with(IommuConfig {
        five_levels: true,
        ..IommuConfig::default()
    });
    let (_, _, output) = bed.raw(CAPABILITIES.into(), &u64s(&[SELF, 0]));
    assert_eq!((output[6], output[8]), (57, 0b1101));
    assert_eq!((bed.create(1), bed.configure(1, 5, 0x2000)), (0, 0));
}

#[test]
fn tables_for_hardware_have_one_bit_less_and_its_page_sizes() {
    for (five_levels, width) in [(false, 47), (true, 56)] {
        let bed = Bed::with(IommuConfig {
            five_levels,
            nested: true,
            gigabyte_pages: false,
            ..IommuConfig::default()
        });
        let (_, _, output) = bed.raw(CAPABILITIES.into(), &u64s(&[SELF, 0]));
        assert_eq!(output[6], width);
        assert_eq!(output[16..24], 0x20_1000u64.to_le_bytes());
    }
}

#[test]
fn another_partition_is_not_for_a_child() {
    let bed = Bed::new();
    assert_eq!(bed.create(1), 0);
    let other = |tail: &[u8]| [&domain_of(1, 0, 1 << 32 | 1)[..], tail].concat();
    refused(&bed, CREATE, &other(&[0; 4]), 0x0d);
    refused(&bed, DELETE, &other(&[]), 0x0d);
    refused(&bed, ATTACH, &other(&A.to_le_bytes()), 0x0d);
    refused(&bed, DETACH, &u64s(&[1, A]), 0x0d);
    refused(&bed, CONFIGURE, &other(&[0; 16]), 0x0d);
    refused(&bed, FLUSH, &other(&[0; 8]), 0x0d);
    refused(&bed, CAPABILITIES, &u64s(&[1, 0]), 0x0d);
    refused(&bed, PROPERTY, &u64s(&[1, A, 10]), 0x0d);
    let list = other(&u64s(&[1, 0x1000]));
    let (status, done, _) = bed.raw(u64::from(FLUSH_LIST) | 1 << 32, &list);
    assert_eq!((status, done), (0x0d, 0));
}

#[test]
fn reserved_fields_and_impossible_domains_are_refused() {
    let bed = Bed::new();
    assert_eq!(bed.create(1), 0);
    let mut reserved = domain(1);
    reserved[15] = 1;
    let bad = [
        reserved,
        // Trust level 1, a reserved bit beside it, a reserved bit of the id, type SOC, and a
        // second-stage domain of the guest's own.
        domain_of(SELF, 1, 1 << 32 | 1),
        domain_of(SELF, 0x20, 1 << 32 | 1),
        domain_of(SELF, 0, 1 << 32 | 1 << 31 | 1),
        domain_of(SELF, 0, 1 << 32 | 2),
        domain_of(SELF, 0, 1 << 32),
        // Numbers that mean something else, and one that nobody made.
        domain(0),
        domain(u32::MAX),
        domain(9),
    ];
    for (index, name) in bad.iter().enumerate() {
        let with = |tail: &[u8]| [&name[..], tail].concat();
        if index != 8 {
            refused(&bed, CREATE, &with(&[0; 4]), 5);
        }
        refused(&bed, DELETE, name, 5);
        refused(&bed, ATTACH, &with(&A.to_le_bytes()), 5);
        refused(&bed, CONFIGURE, &with(&[0; 16]), 5);
        refused(&bed, FLUSH, &with(&[0; 8]), 5);
        let list = with(&u64s(&[1, 0x1000]));
        let (status, done, _) = bed.raw(u64::from(FLUSH_LIST) | 1 << 32, &list);
        assert_eq!((status, done), (5, 0));
    }
    // Level 0, "used", is level 0.
    assert_eq!(bed.call(DELETE, &domain_of(SELF, 0x10, 1 << 32 | 1)), 0);
}

#[test]
fn unknown_flags_are_refused() {
    let bed = Bed::new();
    let with = |tail: &[u8]| [&domain(1)[..], tail].concat();
    refused(&bed, CREATE, &with(&4u32.to_le_bytes()), 5);
    assert_eq!(bed.call(CREATE, &with(&3u32.to_le_bytes())), 0);
    for flags in [8, 1 << 63, 2] {
        // The last: blocked without translation.
        refused(&bed, CONFIGURE, &with(&u64s(&[flags, 0x2000])), 5);
    }
    for tail in [1u64, 1 << 32] {
        refused(&bed, FLUSH, &with(&u64s(&[tail])), 5);
    }
    for tail in [0u64, 3, 1 << 32 | 1] {
        let list = with(&u64s(&[tail, 0x1000]));
        let (status, done, _) = bed.raw(u64::from(FLUSH_LIST) | 1 << 32, &list);
        assert_eq!((status, done), (5, 0));
    }
    refused(&bed, CAPABILITIES, &u64s(&[SELF, 1]), 5);
    refused(&bed, PROPERTY, &u64s(&[SELF, A, 1 << 32 | 10]), 5);
    for code in [0, 9, 11] {
        refused(&bed, PROPERTY, &u64s(&[SELF, A, code]), 9);
    }
}

#[test]
fn roots_must_be_whole_pages_of_ram() {
    let bed = Bed::new();
    assert_eq!(bed.create(1), 0);
    for root in [0x2008, HOLE, RAM_END, 1 << 52, !0xfff] {
        let before = bed.state();
        assert_eq!(bed.configure(1, 1, root), 5, "{root:#x}");
        assert_eq!(bed.state(), before);
    }
    for root in [0, HOLE - 0x1000, SECOND, RAM_END - 0x1000] {
        assert_eq!(bed.configure(1, 1, root), 0, "{root:#x}");
    }
}

#[test]
fn devices_that_are_unknown_or_not_behind_it_have_their_statuses() {
    let bed = Bed::new();
    assert_eq!(bed.create(1), 0);
    let unknown = [
        A + 1,
        0,
        1 << 32 | A,
        // A sign that the lower half does not have; the other types of device.
        0xffff_ffff_0000_0000 | A,
        1 << 62 | A,
        1 << 63 | A,
        3 << 62 | A,
    ];
    for device in unknown {
        let attach = [&domain(1)[..], &device.to_le_bytes()].concat();
        refused(&bed, ATTACH, &attach, 0x57);
        refused(&bed, DETACH, &u64s(&[SELF, device]), 0x57);
        refused(&bed, PROPERTY, &u64s(&[SELF, device, 10]), 0x57);
    }
    let attach = [&domain(1)[..], &OFF.to_le_bytes()].concat();
    refused(&bed, ATTACH, &attach, 0x58);
    refused(&bed, DETACH, &u64s(&[SELF, OFF]), 0x58);
    bed.iommu.begin_removal(id(A));
    let attach = [&domain(1)[..], &A.to_le_bytes()].concat();
    refused(&bed, ATTACH, &attach, 0x58);
    refused(&bed, DETACH, &u64s(&[SELF, A]), 0x58);
}

#[test]
fn the_default_domain_is_reached_by_attach_and_by_detach() {
    let bed = Bed::new();
    assert_eq!(bed.create(1), 0);
    let default = [&domain_of(SELF, 0, 0)[..], &A.to_le_bytes()].concat();
    assert_eq!(bed.call(ATTACH, &default), 0);
    assert_eq!(bed.detach(A), 0);
    assert_eq!(bed.attach(1, A), 0);
    assert_eq!(bed.call(ATTACH, &default), 0);
    assert_eq!(bed.delete(1), 0);
    let null = [&domain_of(SELF, 0, 0xffff_ffff << 32)[..], &A.to_le_bytes()].concat();
    refused(&bed, ATTACH, &null, 5);
    let flush = [&domain_of(SELF, 0, 0)[..], &[0; 8]].concat();
    assert_eq!(bed.call(FLUSH, &flush), 0);
}

#[test]
fn numbers_in_use_and_the_limit_on_domains_have_their_statuses() {
    let bed = Bed::new();
    for number in 1..=4 {
        assert_eq!(bed.create(number), 0);
    }
    assert_eq!(bed.create(2), 0x65);
    assert_eq!(bed.create(5), 0x38);
    assert_eq!(bed.create(5), 0x38);
    assert_eq!(bed.iommu.report().counters.domains_refused, 2);
    assert_eq!(bed.delete(2), 0);
    assert_eq!(bed.create(0xffff_fffe), 0);
}

#[test]
fn the_limit_on_functions_holds_and_a_removal_makes_room() {
    let bed = Bed::new();
    let add = |code| bed.iommu.add_device(id(code), IommuMode::Off, None);
    assert_eq!(add(5), Ok(()));
    assert_eq!(add(5), Err(AddDeviceError::Exists { id: id(5) }));
    assert_eq!(add(6), Err(AddDeviceError::Full { max: 4 }));
    assert_eq!(bed.iommu.report().counters.functions_refused, 1);
    bed.iommu.remove_device(id(OFF));
    assert_eq!(add(6), Ok(()));
}

#[test]
fn flush_lists_count_their_elements_and_stop_at_a_bad_one() {
    let bed = Bed::new();
    assert_eq!(bed.create(1), 0);
    assert_eq!(bed.flush(1), 0);
    // Up to what a page holds: more than one execution does.
    for count in [1, 64, 65, 508] {
        let elements = vec![0x5000; count];
        assert_eq!(bed.flush_list(1, &elements), (0, count as u16));
    }
    // Everything; over-covering; ignored bits below the shift.
    let good = [52, 0xffff_ffff_f000 | 36, 0xffff_ffff_f000, 0x3000 | 9];
    assert_eq!(bed.flush_list(1, &good), (0, 4));
    for bad in [53, 0xfff, 1 << 48, 1 << 63] {
        assert_eq!(bed.flush_list(1, &[0x1000, 0x2000, bad, 0x3000]), (5, 2));
    }
    let mut long = vec![0x1000; 100];
    long[80] = 53;
    assert_eq!(bed.flush_list(1, &long), (5, 80));
}

#[test]
fn malformed_control_words_and_lists_are_refused() {
    let bed = Bed::new();
    let create = [&domain(1)[..], &[0; 4]].concat();
    let status = |control: u64| bed.raw(control, &create).0;
    let code = u64::from(CREATE);
    assert_eq!(status(code | 1 << 27), 3);
    assert_eq!(status(code | 1 << 63), 3);
    assert_eq!(status(code | 1 << 32), 3);
    assert_eq!(status(code | 1 << 17), 3);
    assert_eq!(status(u64::from(FLUSH_LIST)), 3);
    assert_eq!(status(u64::from(FLUSH_LIST) | 1 << 32 | 1 << 48), 3);
    let at = |input, output| {
        let mut registers = Registers {
            control: CAPABILITIES.into(),
            input,
            output,
        };
        match bed.calls.call(true, &mut registers) {
            Outcome::Complete { result } => result,
            other => panic!("{other:?}"),
        }
    };
    bed.ram.write(0x5000, &u64s(&[SELF, 0])).unwrap();
    assert_eq!(at(0x5000, 0x5010), 0);
    for (input, output) in [
        (0x5004, 0x6000),
        (0x5000, 0x6004),
        (0x5ff8, 0x6000),
        (0x5000, 0x6ff0),
        (0x5000, 0x5008),
        (HOLE, 0x6000),
        (0x5000, RAM_END),
    ] {
        assert_eq!(at(input, output), 4, "{input:#x} {output:#x}");
    }
    // Calls of the same family that are not offered.
    for code in [0xb3, 0xb4, 0xc6, 0xc7, 0xc8, 0x126] {
        assert_eq!(bed.call(code, &create), 2);
    }
    assert!(bed.state().0.is_empty());
}

#[test]
fn a_fast_call_carries_a_detach() {
    let bed = Bed::new();
    assert_eq!(bed.create(1), 0);
    assert_eq!(bed.attach(1, A), 0);
    let mut registers = Registers {
        control: u64::from(DETACH) | 1 << 16,
        input: SELF,
        output: A,
    };
    let outcome = bed.calls.call(true, &mut registers);
    assert_eq!(outcome, Outcome::Complete { result: 0 });
    assert_eq!(bed.state().1[0].domain, 0);
}

#[test]
fn impossible_configurations_are_refused_by_name() {
    let default = IommuConfig::default();
    let bad = [
        IommuConfig {
            max_domains: 0,
            ..default
        },
        IommuConfig {
            max_functions: 1 << 17,
            ..default
        },
        IommuConfig {
            iotlb_entries: 8,
            ..default
        },
        IommuConfig {
            physical_bits: 53,
            ..default
        },
    ];
    let names = [
        "max_domains",
        "max_functions",
        "iotlb_entries",
        "physical_bits",
    ];
    for (config, name) in bad.into_iter().zip(names) {
        let error = PvIommu::new(config, guest_ram()).unwrap_err();
        assert_eq!(error.what, name);
        assert!(error.to_string().contains(name));
    }
}

#[test]
fn lists_in_read_only_ram_are_read_and_not_written() {
    let rom = 0x1_0000;
    let list = [&u64s(&[SELF, 0])[..], &[0; 0xff0]].concat();
    let map = crate::mem::testing::with_rom(rom, &list);
    let bed = Bed::over(GuestRam::new(&map), IommuConfig::default());
    let call = |input, output| {
        let control = CAPABILITIES.into();
        let mut registers = Registers {
            control,
            input,
            output,
        };
        match bed.calls.call(true, &mut registers) {
            Outcome::Complete { result } => result as u16,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(call(rom, 0x1000), 0);
    assert_eq!(call(rom, rom + 0x100), 4, "as an output outside RAM");
    assert_eq!(call(rom, rom + 0x2000), 4);
}
