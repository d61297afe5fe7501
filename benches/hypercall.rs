//! Dispatch: from the registers to a group that does nothing, and back.

use std::hint::black_box;
use std::sync::Arc;

use criterion::Criterion;
use vm_vpci::cpuid::Features;
use vm_vpci::hv::HvStatus;
use vm_vpci::hypercall::{
    Call, CallFormat, CallGroup, Dispatcher, MessageCalls, MessageGroup, Outcome, PostMessage,
    RepProgress,
};

use crate::guest::{Guest, Registers, ram};

/// Takes every message and event.
#[derive(Debug)]
struct Sink;

impl MessageCalls for Sink {
    fn post_message(&self, message: &PostMessage<'_>) -> Result<(), HvStatus> {
        black_box(message.payload);
        Ok(())
    }

    fn signal_event(&self, connection_id: u32, flag: u16) -> Result<(), HvStatus> {
        black_box((connection_id, flag));
        Ok(())
    }
}

/// A rep call of 8-byte elements, as long as the pvIOMMU's and the flush calls' are.
#[derive(Debug)]
struct Elements;

const REP_CODE: u16 = 0x14;

impl CallGroup for Elements {
    fn format(&self, code: u16) -> Option<CallFormat> {
        const FORMAT: CallFormat = CallFormat::simple(24).with_elements(8, 0);
        (code == REP_CODE).then_some(FORMAT)
    }

    fn execute(&self, _call: &Call<'_>, _output: &mut [u8]) -> Result<(), HvStatus> {
        Err(HvStatus::INVALID_HYPERCALL_CODE)
    }

    fn execute_rep(&self, call: &Call<'_>, _output: &mut [u8]) -> RepProgress {
        black_box(call.elements);
        RepProgress {
            done: call.count,
            status: Ok(()),
        }
    }
}

fn call(dispatcher: &Dispatcher, control: u64, rdx: u64) -> u64 {
    let mut registers = Registers {
        control: black_box(control),
        rdx: black_box(rdx),
        r8: 0,
    };
    match dispatcher.call(true, &mut registers) {
        Outcome::Complete { result } => result,
        other => panic!("{other:?}"),
    }
}

/// Input page.
const INPUT: u64 = 0x6000;

pub(crate) fn bench(criterion: &mut Criterion) {
    let ram = ram(1 << 20);
    let dispatcher = Dispatcher::new(ram.clone(), Features::default())
        .with_group(Arc::new(MessageGroup::new(Arc::new(Sink))))
        .with_group(Arc::new(Elements));
    // POST_MESSAGE of 16 bytes; a list for the rep call lies behind it.
    let mut input = [0; 256];
    input[0] = 1;
    input[8] = 1;
    input[12] = 16;
    ram.write(INPUT, &input).expect("RAM");
    let rep = |count: u64| u64::from(REP_CODE) | count << 32;
    let mut group = criterion.benchmark_group("hypercall");
    for (name, control, result) in [
        ("fast", 0x1_005d, 0),
        ("memory, 256 B", 0x5c, 0),
        ("memory, 16 B", 0x5d, 0),
        ("rep, 8 elements", rep(8), 8 << 32),
        ("rep, 64 elements", rep(64), 64 << 32),
        ("unknown code", 0x1_007f, 2),
    ] {
        let rdx = if control >> 16 & 1 == 1 { 1 } else { INPUT };
        assert_eq!(call(&dispatcher, control, rdx), result, "{name}");
        group.bench_function(name, |bencher| {
            bencher.iter(|| call(&dispatcher, control, rdx));
        });
    }
    let guest = Guest::new();
    group.bench_function("RETARGET_INTERRUPT on a partition", |bencher| {
        bencher.iter(|| guest.retarget());
    });
    group.finish();
}
