//! Arbitrary registers and memory: no panic, no effect of a failing call, and round trips.
use super::*;

use proptest::prelude::*;

use super::rep::{NEXT, SUM, SWAP};

/// Control words near valid ones, and any others.
fn any_control() -> impl Strategy<Value = u64> {
    let code = prop_oneof![
        Just(0x5cu64),
        Just(0x5d),
        Just(0x7e),
        Just(u64::from(SUM)),
        Just(u64::from(NEXT)),
        Just(u64::from(SWAP)),
        any::<u16>().prop_map(u64::from),
    ];
    let variable = prop_oneof![4 => Just(0u64), 4 => 0u64..6, 1 => 0u64..0x400];
    let reps = prop_oneof![
        4 => Just((0u64, 0u64)),
        4 => (1u64..20, 0u64..20),
        1 => (0u64..0x1000, 0u64..0x1000),
    ];
    let valid =
        (code, any::<bool>(), variable, reps).prop_map(|(code, fast, variable, (count, start))| {
            code | u64::from(fast) << 16 | variable << 17 | count << 32 | start << 48
        });
    let mostly_valid = (valid, proptest::option::weighted(0.1, 0u32..64))
        .prop_map(|(control, flip)| control ^ flip.map_or(0, |bit| 1 << bit));
    prop_oneof![9 => mostly_valid, 1 => any::<u64>()]
}

fn any_gpa() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => (0..RAM_SIZE as u64 / 8).prop_map(|qword| qword * 8),
        3 => (0..RAM_SIZE as u64 / PAGE_SIZE).prop_map(|page| page * PAGE_SIZE),
        1 => 0..RAM_SIZE as u64 + 16,
        1 => any::<u64>(),
    ]
}

fn any_registers() -> impl Strategy<Value = Registers> {
    let xmm = proptest::option::weighted(0.9, proptest::collection::vec(any::<u8>(), 96));
    let cpl = prop_oneof![9 => Just(0u8), 1 => 0u8..4];
    (cpl, any_control(), any_gpa(), any_gpa(), xmm).prop_map(
        |(cpl, control, input, output, xmm)| Registers {
            cpl,
            control,
            input,
            output,
            xmm,
            xmm_fetches: 0,
        },
    )
}

fn any_features() -> impl Strategy<Value = Features> {
    (any::<bool>(), any::<bool>()).prop_map(|(input, output)| features(input, output))
}

/// Fills RAM with a pattern that parses now and then: small words.
fn fill(ram: &GuestRam, seed: u64) {
    let mut state = seed | 1;
    let bytes: Vec<u8> = (0..RAM_SIZE)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            let byte = (state >> 56) as u8;
            if byte < 40 { byte & 3 } else { 0 }
        })
        .collect();
    ram.write(0, &bytes).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_registers_panic_and_failing_calls_change_nothing(
        features in any_features(),
        seed in any::<u64>(),
        mut registers in any_registers(),
    ) {
        let bed = Bed::new(features);
        fill(&bed.ram, seed);
        let (memory, before) = (contents(&bed.ram), registers.clone());
        let control = Control(registers.control);
        let changed = match bed.call(&mut registers) {
            Outcome::Complete { result } => {
                let (status, reps) = (result as u16, Control(result).rep_count());
                prop_assert_eq!(result & !0xfff_0000_ffff, 0);
                prop_assert!(reps <= control.rep_count());
                if status == 0 {
                    prop_assert_eq!(reps, control.rep_count());
                }
                status == 0 || reps > control.rep_start()
            }
            Outcome::Restart { control: next } => {
                let next = Control(next);
                prop_assert!(next.rep_start() > control.rep_start());
                prop_assert!(next.rep_start() < control.rep_count());
                prop_assert_eq!(next.with_rep_start(control.rep_start()), control);
                true
            }
            Outcome::InvalidOpcode => false,
        };
        if !changed {
            prop_assert!(contents(&bed.ram) == memory, "memory changed");
            prop_assert_eq!(registers.xmm, before.xmm);
        }
    }

    #[test]
    fn what_the_guest_says_in_a_retarget_is_what_the_device_hears(
        device_id in any::<u64>(),
        msi_address in any::<u32>(),
        msi_data in any::<u32>(),
        vector in 0x10u8..,
        multicast in any::<bool>(),
        vps in proptest::collection::btree_set(0..VPS, 1..12),
        extra_banks in 0usize..3,
        gpa in (0u64..3).prop_map(|page| page * PAGE_SIZE + 0x40),
    ) {
        let bed = Bed::new(Features::default());
        let mut targets = VpSet::new();
        for vp in &vps {
            targets.insert(*vp);
        }
        let mut input = RetargetInput {
            partition_id: PARTITION_SELF,
            device_id,
            source: 1,
            reserved0: 0,
            msi_address,
            msi_data,
            reserved1: 0,
            vector: vector.into(),
            flags: u32::from(multicast) | 2,
            target: 0,
        };
        let mut banks = vec![0u64; VPS.div_ceil(64) as usize + extra_banks];
        for vp in &vps {
            banks[*vp as usize / 64] |= 1 << (vp % 64);
        }
        let mut variable = vec![(1u64 << banks.len()) - 1];
        variable.extend(&banks);
        let encode = |input: &RetargetInput, variable: &[u64]| {
            let mut list = input.as_bytes().to_vec();
            list.extend(variable.iter().flat_map(|qword| qword.to_le_bytes()));
            list
        };
        let control = 0x7e | (variable.len() as u64) << 17;
        prop_assert_eq!(bed.call_with(control, gpa, &encode(&input, &variable)), done(Ok(())));
        // The same as a mask, where the VPs fit one.
        if vps.last().is_some_and(|vp| *vp < 64) {
            input.flags &= 1;
            input.target = banks[0];
            prop_assert_eq!(bed.call_with(0x7e, gpa, &encode(&input, &[])), done(Ok(())));
        }
        let expected = RetargetInterrupt {
            device_id,
            msi_address,
            msi_data,
            vector,
            multicast,
            targets,
        };
        for seen in bed.calls.retargets.lock().unwrap().iter() {
            prop_assert_eq!(seen, &expected);
        }
    }

    #[test]
    fn memory_and_register_forms_of_a_call_agree(
        words in proptest::array::uniform2(0u64..3),
        offset in 0u64..0x1f0,
    ) {
        let bed = Bed::new(features(true, true));
        let (input, output) = (offset * 8, 0x2000 + offset * 8);
        bed.ram.write(input, words.as_bytes()).unwrap();
        let in_memory = bed.memory_call(SWAP.into(), input, output);
        let mut registers = Registers {
            control: u64::from(SWAP) | 1 << 16,
            input: words[0],
            output: words[1],
            xmm: Some(vec![0; 96]),
            ..Registers::default()
        };
        prop_assert_eq!(bed.call(&mut registers), in_memory);
        let mut written = [0; 16];
        bed.ram.read(output, &mut written).unwrap();
        prop_assert_eq!(&registers.xmm.unwrap()[..16], &written[..]);
    }
}
