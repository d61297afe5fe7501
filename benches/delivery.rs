//! Towards the guest: a SynIC message into its slot, an event flag, a device's interrupt.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use criterion::Criterion;
use vm_vpci::synic::{DEFAULT_QUEUE_LIMIT, SynicConfig, SynicPort, UserSynic};

use crate::guest::{Guest, Interrupts, ram};

/// Message page and event page of VP 0.
const MESSAGES: u64 = 0x1_0000;
const EVENTS: u64 = 0x1_1000;
const SINT: u8 = 2;

pub(crate) fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("delivery");
    let ram = ram(1 << 20);
    let interrupts = Arc::new(Interrupts::default());
    let config = SynicConfig {
        apic_ids: Arc::from([0]),
        queue_limit: DEFAULT_QUEUE_LIMIT,
    };
    let synic = UserSynic::new(&config, ram.clone(), interrupts.clone());
    for (msr, value) in [
        (0x4000_0083, MESSAGES | 1),
        (0x4000_0082, EVENTS | 1),
        (0x4000_0092, 0xf3),
        (0x4000_0080, 1),
    ] {
        synic.write_msr(0, msr, value).expect("an MSR that exists");
    }
    let slot = MESSAGES + u64::from(SINT) * 256;
    let payload = [0x5a; 240];
    group.bench_function("message of 240 B, slot freed", |bencher| {
        bencher.iter(|| {
            synic
                .post_message(0, SINT, 1, black_box(&payload))
                .expect("room");
            ram.store_u32(slot, 0, Ordering::Release).expect("RAM");
        });
        assert!(interrupts.0.load(Ordering::Relaxed) > 0);
    });
    let flag = EVENTS + u64::from(SINT) * 256;
    group.bench_function("event flag, flag cleared", |bencher| {
        bencher.iter(|| {
            synic.signal_event(0, SINT, 1).expect("a SynIC");
            ram.store_u32(flag, 0, Ordering::Release).expect("RAM");
        });
    });
    let guest = Guest::new();
    let before = guest.interrupts.0.load(Ordering::Relaxed);
    group.bench_function("interrupt of a device, MSI-X", |bencher| {
        bencher.iter(|| guest.raise());
        assert!(guest.interrupts.0.load(Ordering::Relaxed) > before);
    });
    group.finish();
}
