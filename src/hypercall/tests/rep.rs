//! Rep calls and calls with output, with a group made for it.
use super::*;

/// Rep call: adds its elements to a sum; a few elements a round; element `!0` is refused.
pub(super) const SUM: u16 = 0x01d1;
/// Rep call: gives each element back, plus one.
pub(super) const NEXT: u16 = 0x01d2;
/// Simple call: gives back two words.
pub(super) const SWAP: u16 = 0x01d3;
/// Elements that one round does.
const ROUND: u16 = 100;

#[derive(Debug, Default)]
pub(super) struct TestGroup {
    sum: Mutex<u64>,
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    let (chunks, _) = bytes.as_chunks::<8>();
    chunks.iter().map(|chunk| u64::from_le_bytes(*chunk))
}

impl CallGroup for TestGroup {
    fn format(&self, code: u16) -> Option<CallFormat> {
        match code {
            SUM => Some(CallFormat::simple(32).with_elements(8, 0)),
            NEXT => Some(
                CallFormat::simple(16)
                    .with_variable_header()
                    .with_elements(8, 8),
            ),
            SWAP => Some(CallFormat::simple(16).with_output(16)),
            _ => None,
        }
    }

    fn execute(&self, call: &Call<'_>, output: &mut [u8]) -> Result<(), HvStatus> {
        let [low, high]: [u64; 2] = call.header()?;
        output[..8].copy_from_slice(&high.to_le_bytes());
        output[8..].copy_from_slice(&low.to_le_bytes());
        if low == high {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        Ok(())
    }

    fn execute_rep(&self, call: &Call<'_>, output: &mut [u8]) -> RepProgress {
        let mut done = 0;
        assert_eq!(call.elements.len(), usize::from(call.count) * 8);
        for (index, word) in words(call.elements).take(ROUND.into()).enumerate() {
            if word == !0 {
                let status = Err(HvStatus::INVALID_PARAMETER);
                return RepProgress { done, status };
            }
            if call.code == NEXT {
                output[index * 8..][..8].copy_from_slice(&(word + 1).to_le_bytes());
            } else {
                let mut sum = self.sum.lock().unwrap();
                *sum = sum.wrapping_add(word);
            }
            done += 1;
        }
        RepProgress {
            done,
            status: Ok(()),
        }
    }
}

fn control(code: u16, count: u64, start: u64) -> u64 {
    u64::from(code) | count << 32 | start << 48
}

fn complete(status: Result<(), HvStatus>, reps: u16) -> Outcome {
    Outcome::Complete {
        result: result_word(status, reps),
    }
}

fn write_words(ram: &GuestRam, gpa: u64, words: impl IntoIterator<Item = u64>) {
    for (index, word) in words.into_iter().enumerate() {
        ram.write(gpa + index as u64 * 8, &word.to_le_bytes())
            .unwrap();
    }
}

fn read_words(ram: &GuestRam, gpa: u64, count: usize) -> Vec<u64> {
    let mut bytes = vec![0; count * 8];
    ram.read(gpa, &mut bytes).unwrap();
    words(&bytes).collect()
}

fn summing() -> (GuestRam, Arc<TestGroup>, Dispatcher) {
    let ram = ram();
    let group = Arc::new(TestGroup::default());
    let dispatcher = Dispatcher::new(ram.clone(), features(true, true)).with_group(group.clone());
    (ram, group, dispatcher)
}

/// Calls until the call is complete, as a guest's hypercall page does; counts the rounds.
fn run(dispatcher: &Dispatcher, registers: &mut Registers) -> (Outcome, u32) {
    let mut rounds = 0;
    loop {
        rounds += 1;
        match dispatcher.call(true, registers) {
            Outcome::Restart { control } => {
                assert!(Control(control).rep_start() > Control(registers.control).rep_start());
                registers.control = control;
            }
            outcome => return (outcome, rounds),
        }
    }
}

#[test]
fn a_long_rep_call_goes_on_until_every_element_is_done_once() {
    let (ram, group, dispatcher) = summing();
    // 32 + 508 * 8 fills the page.
    write_words(&ram, 0x1020, 1..=508);
    let mut registers = Registers {
        control: control(SUM, 508, 0),
        input: 0x1000,
        ..Registers::default()
    };
    let (outcome, rounds) = run(&dispatcher, &mut registers);
    assert_eq!(outcome, complete(Ok(()), 508));
    assert_eq!(rounds, 6);
    assert_eq!(*group.sum.lock().unwrap(), (1..=508).sum::<u64>());
    let counters = dispatcher.counters();
    assert_eq!(counters.restarts, 5);
    assert_eq!(counters.calls.len(), 1);
    assert_eq!(counters.calls[0].succeeded, 1);
    registers.control = control(SUM, 509, 0);
    assert_eq!(
        dispatcher.call(true, &mut registers),
        complete(Err(HvStatus::INVALID_ALIGNMENT), 0)
    );
}

#[test]
fn a_rep_call_starts_at_the_element_it_is_told() {
    let (ram, group, dispatcher) = summing();
    write_words(&ram, 0x1020, [1, 10, 100]);
    let mut registers = Registers {
        control: control(SUM, 3, 2),
        input: 0x1000,
        ..Registers::default()
    };
    let (outcome, _) = run(&dispatcher, &mut registers);
    assert_eq!(outcome, complete(Ok(()), 3));
    assert_eq!(*group.sum.lock().unwrap(), 100);
}

#[test]
fn a_failing_rep_call_tells_absolute_progress() {
    let (ram, group, dispatcher) = summing();
    write_words(&ram, 0x1020, [1, 10, 100, !0, 1000]);
    let mut registers = Registers {
        control: control(SUM, 5, 1),
        input: 0x1000,
        ..Registers::default()
    };
    let (outcome, _) = run(&dispatcher, &mut registers);
    assert_eq!(outcome, complete(Err(HvStatus::INVALID_PARAMETER), 3));
    assert_eq!(*group.sum.lock().unwrap(), 110);
}

#[test]
fn rep_fields_must_fit_the_call() {
    let (_, _, dispatcher) = summing();
    let refused = complete(Err(HvStatus::INVALID_HYPERCALL_INPUT), 0);
    for control in [
        control(SUM, 0, 0),
        control(SUM, 3, 3),
        control(SUM, 3, 4),
        control(SWAP, 1, 0),
        control(SWAP, 0, 1),
        control(SUM, 1, 0) | 1 << 17,
    ] {
        let mut registers = Registers {
            control,
            input: 0x1000,
            output: 0x2000,
            ..Registers::default()
        };
        assert_eq!(dispatcher.call(true, &mut registers), refused);
    }
}

#[test]
fn elements_that_are_done_reach_the_guest_and_no_others() {
    let (ram, _, dispatcher) = summing();
    ram.fill(0x2000, PAGE_SIZE, 0xaa).unwrap();
    const OLD: u64 = 0xaaaa_aaaa_aaaa_aaaa;
    // Two qwords of variable header lie between the fixed one and the elements.
    write_words(&ram, 0x1020, [1, 2, 3, !0, 5]);
    let mut registers = Registers {
        control: control(NEXT, 5, 1) | 2 << 17,
        input: 0x1000,
        output: 0x2000,
        ..Registers::default()
    };
    let (outcome, _) = run(&dispatcher, &mut registers);
    assert_eq!(outcome, complete(Err(HvStatus::INVALID_PARAMETER), 3));
    assert_eq!(read_words(&ram, 0x2000, 6), [OLD, 3, 4, OLD, OLD, OLD]);
}

#[test]
fn rep_output_is_placed_behind_that_of_earlier_rounds() {
    let (ram, _, dispatcher) = summing();
    write_words(&ram, 0x1010, 0..300);
    let mut registers = Registers {
        control: control(NEXT, 300, 0),
        input: 0x1000,
        output: 0x2008,
        ..Registers::default()
    };
    let (outcome, rounds) = run(&dispatcher, &mut registers);
    assert_eq!((outcome, rounds), (complete(Ok(()), 300), 3));
    assert_eq!(
        read_words(&ram, 0x2008, 300),
        (1..=300).collect::<Vec<u64>>()
    );
    assert_eq!(read_words(&ram, 0x2000, 1), [0]);
}

#[test]
fn simple_output_is_written_on_success_only() {
    let (ram, _, dispatcher) = summing();
    // Input and output in one page, next to each other.
    write_words(&ram, 0x1000, [1, 2]);
    let mut registers = Registers {
        control: SWAP.into(),
        input: 0x1000,
        output: 0x1010,
        ..Registers::default()
    };
    assert_eq!(dispatcher.call(true, &mut registers), complete(Ok(()), 0));
    assert_eq!(read_words(&ram, 0x1000, 4), [1, 2, 2, 1]);
    write_words(&ram, 0x1000, [7, 7]);
    assert_eq!(
        dispatcher.call(true, &mut registers),
        complete(Err(HvStatus::INVALID_PARAMETER), 0)
    );
    assert_eq!(read_words(&ram, 0x1000, 4), [7, 7, 2, 1]);
}

#[test]
fn output_lists_must_be_aligned_in_one_page_in_ram_and_apart_from_the_input() {
    let (ram, _, dispatcher) = summing();
    write_words(&ram, 0x1000, [1, 2]);
    let before = contents(&ram);
    for output in [0x1000, 0x1008, 0xff8, 0x1014, 0x1ff8, 0x4000, !7] {
        let mut registers = Registers {
            control: SWAP.into(),
            input: 0x1000,
            output,
            ..Registers::default()
        };
        assert_eq!(
            dispatcher.call(true, &mut registers),
            complete(Err(HvStatus::INVALID_ALIGNMENT), 0),
            "{output:#x}"
        );
    }
    assert_eq!(contents(&ram), before);
}

#[test]
fn fast_output_follows_the_input_in_the_xmm_registers() {
    let (ram, _, dispatcher) = summing();
    let registers = Registers {
        control: u64::from(SWAP) | 1 << 16,
        input: 1,
        output: 2,
        xmm: Some(vec![0xee; 96]),
        ..Registers::default()
    };
    let mut swap = registers.clone();
    assert_eq!(dispatcher.call(true, &mut swap), complete(Ok(()), 0));
    let xmm = swap.xmm.unwrap();
    assert_eq!(words(&xmm[..16]).collect::<Vec<_>>(), [2, 1]);
    assert!(xmm[16..].iter().all(|byte| *byte == 0xee));
    // Elements come and go in registers too: 16 + 6 * 8 is 64, and 48 are left.
    let mut next = registers.clone();
    next.control = control(NEXT, 6, 0) | 1 << 16;
    next.xmm = Some((0..96).map(|byte| byte / 8).collect());
    assert_eq!(dispatcher.call(true, &mut next), complete(Ok(()), 6));
    let xmm = next.xmm.unwrap();
    let expected: Vec<u64> = (0..6).map(|n| n * 0x0101_0101_0101_0101 + 1).collect();
    assert_eq!(words(&xmm[48..96]).collect::<Vec<_>>(), expected);
    next.xmm = Some(xmm);
    next.control = control(NEXT, 7, 0) | 1 << 16;
    assert_eq!(
        dispatcher.call(true, &mut next),
        complete(Err(HvStatus::INVALID_HYPERCALL_INPUT), 0)
    );
    // Not offered: the call has no effect.
    let plain = Dispatcher::new(ram, features(true, false)).with_group(Arc::<TestGroup>::default());
    assert_eq!(
        plain.call(true, &mut registers.clone()),
        Outcome::InvalidOpcode
    );
}
