//! The bus: a message and its completion, configuration space, a job of a device.

use criterion::Criterion;

use crate::guest::Guest;

pub(crate) fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("vpci");
    let mut guest = Guest::new();
    // With the guest's own work: packet, SIGNAL_EVENT, the bus's worker, completion.
    group.bench_function("message turn-around", |bencher| {
        bencher.iter(|| guest.query());
    });
    guest.select();
    assert_eq!(guest.config(0), 0x5650_1234);
    group.bench_function("config dword read", |bencher| {
        bencher.iter(|| guest.config(0));
    });
    group.bench_function("config slot selection and dword read", |bencher| {
        bencher.iter(|| {
            guest.select();
            guest.config(0)
        });
    });
    guest.fill(0x5a);
    assert_eq!(guest.copy(4096), 0x5a5a_5a5a_5a5a_5a5a);
    group.bench_function("device job: DMA copy, 4 KiB", |bencher| {
        bencher.iter(|| guest.copy(4096));
    });
    group.finish();
}
