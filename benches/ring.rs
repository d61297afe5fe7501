//! A packet through a ring: written by one end, read by the other, both the library's.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use vm_memory::{Bytes, GuestAddress};
use vm_vpci::mem::GuestRam;
use vm_vpci::vmbus::ring::{RingReader, RingWriter};

use crate::guest::map;

/// Control page and 16 data pages.
const PAGES: std::ops::Range<u64> = 16..33;
/// Where the plain copy goes.
const PLAIN: u64 = 0x4_0000;

pub(crate) fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ring");
    // The longest payload of a packet is 4080 bytes: a packet of a page.
    for len in [64, 4080] {
        let map = map(1 << 20);
        let ram = GuestRam::new(&map);
        let pages: Vec<u64> = PAGES.collect();
        let mut writer = RingWriter::open(ram.clone(), &pages).expect("a ring");
        let mut reader = RingReader::open(ram.clone(), &pages).expect("a ring");
        let payload = vec![0x5a; len];
        let mut buffer = vec![0; len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("round, {len} B"), |bencher| {
            bencher.iter(|| {
                let room = writer.reserve(len).expect("a ring").expect("room");
                let signal = writer.send(room, black_box(&payload)).expect("a ring");
                let packet = reader.read(&mut buffer).expect("a ring").expect("a packet");
                (reader.publish().expect("a ring"), signal, packet)
            });
            assert_eq!(buffer, payload);
        });
        // The same bytes in and out of a `vm-memory` map, and nothing else; the place moves on as
        // in the ring.
        let mut at = 0;
        group.bench_function(format!("plain copy, {len} B"), |bencher| {
            bencher.iter(|| {
                let place = GuestAddress(PLAIN + at);
                map.write_slice(black_box(&payload), place).expect("RAM");
                map.read_slice(black_box(&mut buffer), place).expect("RAM");
                at = (at + len as u64 + 24) % 0x1_0000;
            });
        });
    }
    group.finish();
}
