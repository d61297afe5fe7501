//! A packet through a ring: written by one end, read by the other, both the library's.

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use criterion::{Bencher, Criterion, Throughput};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory, VolatileSlice};
use vm_vpci::mem::GuestRam;
use vm_vpci::vmbus::ring::{RingReader, RingWriter};

use crate::guest::map;

/// Control page and 16 data pages.
const PAGES: std::ops::Range<u64> = 16..33;
/// Where the plain copy goes.
const PLAIN: u64 = 0x4_0000;
/// Where the least that a round can be takes place.
const LEAST: u64 = 0x6_0000;
/// Bytes of a packet beside its payload.
const FRAME: usize = 24;

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
                at = (at + (len + FRAME) as u64) % 0x1_0000;
            });
        });
        group.bench_function(format!("least, {len} B"), |bencher| {
            let pages = map.get_slice(GuestAddress(LEAST), 17 * 4096).expect("RAM");
            least(bencher, &pages, &payload, &mut buffer);
        });
    }
    group.finish();
}

/// What the protocol has both ends of a round do, and nothing else: the words and bytes go in and
/// out, each end stores its index with sequential consistency and then looks at what the other asks
/// for. No index is checked, no packet wraps, and the place of each is known.
fn least(bencher: &mut Bencher<'_>, pages: &VolatileSlice<'_>, payload: &[u8], buffer: &mut [u8]) {
    let control = |at| pages.get_atomic_ref::<AtomicU32>(at).expect("aligned");
    let [write, read, mask, pending] = [0, 4, 8, 12].map(control);
    let data = pages.offset(4096).expect("17 pages");
    let len = payload.len() + FRAME;
    let mut at = 0;
    bencher.iter(|| {
        let packet = data.subslice(at, len).expect("no wrap");
        let word = |at| packet.get_atomic_ref::<AtomicU64>(at).expect("aligned");
        let [first, second, trailer] = [0, 8, len - 8].map(word);
        let body = packet.subslice(16, payload.len()).expect("a payload");
        first.store(len as u64, Ordering::Relaxed);
        second.store(0, Ordering::Relaxed);
        body.copy_from(black_box(payload));
        trailer.store(at as u64, Ordering::Relaxed);
        let start = at as u32;
        at = if at + 2 * len <= data.len() {
            at + len
        } else {
            0
        };
        write.store(at as u32, Ordering::SeqCst);
        let signal = mask.load(Ordering::SeqCst) == 0 && read.load(Ordering::Acquire) == start;
        let seen = write.load(Ordering::Acquire);
        let words = [first, second].map(|word| word.load(Ordering::Relaxed));
        body.copy_to(black_box(&mut *buffer));
        read.store(at as u32, Ordering::SeqCst);
        (signal, seen, words, pending.load(Ordering::SeqCst))
    });
}
