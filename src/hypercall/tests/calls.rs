//! The calls of the typed traits, and the checks that every call passes.
use super::*;

const POST: u64 = 0x5c;
const SIGNAL: u64 = 0x5d;
const SIGNAL_FAST: u64 = 0x1_005d;

fn post(payload: &[u8]) -> PostMessageInput {
    let mut input = PostMessageInput {
        connection_id: 4,
        reserved: 0,
        message_type: 1,
        payload_size: payload.len() as u32,
        payload: [0; 240],
    };
    input.payload[..payload.len()].copy_from_slice(payload);
    input
}

fn retarget() -> RetargetInput {
    RetargetInput {
        partition_id: PARTITION_SELF,
        device_id: 0xffff_ffff_8765_4320,
        source: 1,
        reserved0: 0,
        msi_address: 0xfee0_1000,
        msi_data: 0x23,
        reserved1: 0,
        vector: 0x41,
        flags: 0,
        target: 1 << 3,
    }
}

/// A retarget call with a variable header of `set`.
fn retarget_with(bed: &Bed, input: RetargetInput, set: &[u64]) -> Outcome {
    let mut list = input.as_bytes().to_vec();
    set.iter()
        .for_each(|qword| list.extend_from_slice(&qword.to_le_bytes()));
    bed.call_with(0x7e | (set.len() as u64) << 17, 0x1000, &list)
}

#[test]
fn a_message_reaches_its_connection() {
    let bed = Bed::new(Features::default());
    assert_eq!(
        bed.call_with(POST, 0x1f00, post(b"hello").as_bytes()),
        done(Ok(()))
    );
    assert_eq!(
        *bed.calls.posts.lock().unwrap(),
        [(4, 1, b"hello".to_vec())]
    );
    let mut other = post(&[7; 240]);
    other.connection_id = 0x0100_0004;
    assert_eq!(
        bed.call_with(POST, 0x1000, other.as_bytes()),
        done(Err(HvStatus::INVALID_CONNECTION_ID))
    );
}

#[test]
fn malformed_messages_are_refused_before_the_connection_sees_them() {
    let bed = Bed::new(Features::default());
    let changes: [fn(&mut PostMessageInput); 4] = [
        |input| input.reserved = 1,
        |input| input.message_type = 0,
        |input| input.message_type = 0x8000_0000,
        |input| input.payload_size = 241,
    ];
    for change in changes {
        let mut input = post(b"x");
        change(&mut input);
        assert_eq!(
            bed.call_with(POST, 0x1000, input.as_bytes()),
            done(Err(HvStatus::INVALID_PARAMETER))
        );
    }
    assert!(bed.calls.posts.lock().unwrap().is_empty());
}

#[test]
fn events_are_signalled_in_both_forms() {
    let bed = Bed::new(Features::default());
    let mut fast = Registers {
        control: SIGNAL_FAST,
        input: 0x0007_0000_1234,
        ..Registers::default()
    };
    assert_eq!(bed.call(&mut fast), done(Ok(())));
    assert_eq!(fast.xmm_fetches, 0);
    let input = SignalEventInput {
        connection_id: 0x55,
        flag: 2047,
        reserved: 0,
    };
    assert_eq!(
        bed.call_with(SIGNAL, 0x1ff8, input.as_bytes()),
        done(Ok(()))
    );
    assert_eq!(
        *bed.calls.events.lock().unwrap(),
        [(0x1234, 7), (0x55, 2047)]
    );
    for input in [0x1_0000_0000_0000u64, 0x0800_0000_0000] {
        let mut registers = Registers {
            control: SIGNAL_FAST,
            input,
            ..Registers::default()
        };
        assert_eq!(
            bed.call(&mut registers),
            done(Err(HvStatus::INVALID_PARAMETER))
        );
    }
}

#[test]
fn calls_from_user_mode_or_without_a_page_are_invalid_opcodes() {
    let bed = Bed::new(Features::default());
    let mut registers = Registers {
        control: SIGNAL_FAST,
        ..Registers::default()
    };
    for cpl in 1..=3 {
        registers.cpl = cpl;
        assert_eq!(bed.call(&mut registers), Outcome::InvalidOpcode);
    }
    registers.cpl = 0;
    assert_eq!(
        bed.dispatcher.call(false, &mut registers),
        Outcome::InvalidOpcode
    );
    assert!(bed.calls.events.lock().unwrap().is_empty());
    assert_eq!(bed.dispatcher.counters().invalid_opcodes, 4);
}

#[test]
fn unknown_codes_and_malformed_control_words_have_their_statuses() {
    let bed = Bed::new(Features::default());
    for code in [0, 0x46, 0x5b, 0x7f, 0x125, 0x8001, 0xffff] {
        assert_eq!(
            bed.memory_call(code, 0, 0),
            done(Err(HvStatus::INVALID_HYPERCALL_CODE))
        );
    }
    for bit in [17, 26, 27, 30, 31, 32, 43, 44, 47, 48, 59, 60, 63] {
        assert_eq!(
            bed.memory_call(SIGNAL | 1 << bit, 0x1000, 0),
            done(Err(HvStatus::INVALID_HYPERCALL_INPUT)),
            "bit {bit}"
        );
    }
    assert!(bed.calls.events.lock().unwrap().is_empty());
}

#[test]
fn input_lists_must_be_aligned_in_one_page_and_in_ram() {
    let bed = Bed::new(Features::default());
    let misplaced = done(Err(HvStatus::INVALID_ALIGNMENT));
    for gpa in [
        0x1004,
        0x1f08,
        0x1ff8,
        RAM_SIZE as u64,
        u64::MAX - 7,
        !0xfff,
        1 << 63,
    ] {
        assert_eq!(bed.memory_call(POST, gpa, 0), misplaced, "{gpa:#x}");
    }
    // The output address does not matter to a call without output.
    assert_eq!(
        bed.call_with(POST, 0x3f00, post(b"").as_bytes()),
        done(Ok(()))
    );
    let ignored = Registers {
        control: POST,
        input: 0x3f00,
        output: !0,
        ..Registers::default()
    };
    assert_eq!(bed.call(&mut ignored.clone()), done(Ok(())));
}

#[test]
fn fast_input_is_bounded_by_the_registers() {
    for xmm in [false, true] {
        let bed = Bed::new(features(xmm, xmm));
        assert_eq!(
            bed.memory_call(POST | 1 << 16, 0, 0),
            done(Err(HvStatus::INVALID_HYPERCALL_INPUT))
        );
    }
    // The fixed header of a retarget call fits, if XMM registers may be used.
    let mut registers = Registers {
        control: 0x7e | 1 << 16,
        input: PARTITION_SELF,
        output: 9,
        xmm: Some(retarget().as_bytes()[16..].to_vec()),
        ..Registers::default()
    };
    registers.xmm.as_mut().unwrap().resize(96, 0);
    let bed = Bed::new(features(false, false));
    assert_eq!(bed.call(&mut registers.clone()), Outcome::InvalidOpcode);
    let bed = Bed::new(features(true, false));
    assert_eq!(bed.call(&mut registers), done(Ok(())));
    assert_eq!(bed.calls.retargets.lock().unwrap()[0].device_id, 9);
    // A transport that cannot reach the registers.
    registers.xmm = None;
    assert_eq!(bed.call(&mut registers), Outcome::InvalidOpcode);
}

#[test]
fn a_retarget_with_a_mask_is_parsed() {
    let bed = Bed::new(Features::default());
    assert_eq!(retarget_with(&bed, retarget(), &[]), done(Ok(())));
    let expected = RetargetInterrupt {
        device_id: 0xffff_ffff_8765_4320,
        msi_address: 0xfee0_1000,
        msi_data: 0x23,
        vector: 0x41,
        multicast: false,
        targets: VpSet::from_mask(8),
    };
    assert_eq!(*bed.calls.retargets.lock().unwrap(), [expected]);
}

#[test]
fn a_retarget_with_a_sparse_set_is_parsed() {
    let bed = Bed::new(Features::default());
    let mut input = retarget();
    input.flags = 3;
    input.target = 0;
    // Linux names banks densely from bank 0, empty ones too.
    assert_eq!(retarget_with(&bed, input, &[3, 0, 1 << 15]), done(Ok(())));
    let seen = bed.calls.retargets.lock().unwrap();
    assert!(seen[0].multicast);
    assert_eq!(seen[0].targets.iter().collect::<Vec<_>>(), [79]);
}

#[test]
fn malformed_retargets_are_refused_before_the_device_sees_them() {
    let bed = Bed::new(Features::default());
    let mut input = retarget();
    input.partition_id = 0;
    assert_eq!(
        retarget_with(&bed, input, &[]),
        done(Err(HvStatus::INVALID_PARTITION_ID))
    );
    let refused = done(Err(HvStatus::INVALID_PARAMETER));
    let changes: [fn(&mut RetargetInput); 10] = [
        |input| input.source = 0,
        |input| input.source = 2,
        |input| input.reserved0 = 1,
        |input| input.reserved1 = 1 << 63,
        |input| input.vector = 0xf,
        |input| input.vector = 0x100,
        |input| input.flags = 4,
        |input| input.flags = 8,
        |input| input.target = 0,
        |input| input.flags = 2, // a sparse set without its bank mask
    ];
    for change in changes {
        let mut input = retarget();
        change(&mut input);
        assert_eq!(retarget_with(&bed, input, &[]), refused, "{input:?}");
    }
    // A mask and a variable header.
    assert_eq!(retarget_with(&bed, retarget(), &[1, 1]), refused);
    input = retarget();
    input.flags = 2;
    input.target = 1; // the set of all VPs
    assert_eq!(retarget_with(&bed, input, &[]), refused);
    assert_eq!(retarget_with(&bed, input, &[1, 1]), refused);
    input.target = 0;
    for set in [
        &[1u64][..],         // a bank is missing
        &[1, 1, 1],          // a bank too many
        &[3, 0, 0],          // no VP
        &[0],                // no bank
        &[2, 1 << 16],       // VP 80 of 80
        &[1 << 63, 1 << 63], // VP 4095
    ] {
        assert_eq!(retarget_with(&bed, input, set), refused, "{set:?}");
    }
    assert!(bed.calls.retargets.lock().unwrap().is_empty());
}

#[test]
fn the_largest_sparse_set_is_parsed_and_a_longer_list_does_not_fit_its_page() {
    let bed = Bed::new(Features::default());
    let mut input = retarget();
    input.flags = 2;
    input.target = 0;
    let mut set = [0u64; 65];
    set[0] = !0;
    set[1] = 1;
    assert_eq!(retarget_with(&bed, input, &set), done(Ok(())));
    assert_eq!(
        bed.memory_call(0x7e | 0x3ff << 17, 0x1000, 0),
        done(Err(HvStatus::INVALID_ALIGNMENT))
    );
}

#[test]
fn counters_tell_calls_and_statuses_apart() {
    let bed = Bed::new(Features::default());
    let _ = bed.memory_call(SIGNAL_FAST, 0, 0);
    let _ = bed.memory_call(SIGNAL_FAST, 0, 0);
    let _ = bed.memory_call(SIGNAL, 4, 0);
    let _ = bed.memory_call(0xffff, 0, 0);
    let counters = bed.dispatcher.counters();
    assert_eq!(
        counters.calls,
        [CallCount {
            code: 0x5d,
            succeeded: 2,
            failed: 1
        }]
    );
    assert_eq!(counters.statuses, [(2, 1), (4, 1)]);
    assert_eq!(counters.unknown_codes, 1);
}
