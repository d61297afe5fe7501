//! A request of three descriptors, as a disk's: `virtio-queue` takes it out of the ring, reads its
//! header, writes 4 KiB and a status byte, and puts it into the used ring. The same code on plain
//! memory, through the pvIOMMU, and through the IOMMU of `vm-memory`.

use std::hint::black_box;
use std::sync::atomic::Ordering;

use criterion::{Bencher, Criterion};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use crate::pviommu::{IOVA, bed, frame, mapped};
use crate::stock;

/// Pages of the areas: descriptors, available ring, used ring.
const RINGS: [u64; 3] = [1, 2, 3];
/// Page, length and flags of the buffers.
const BUFFERS: [(u64, u32, u16); 3] = [(4, 16, 1), (5, 4096, 3), (6, 1, 2)];
const PAGES: u64 = 16;

/// A driver's side of a queue whose page `n` the device sees at `address(n)`.
struct Driver {
    map: GuestMemoryMmap,
    available: u16,
}

impl Driver {
    fn new(map: &GuestMemoryMmap, address: impl Fn(u64) -> u64) -> (Self, Queue) {
        let descriptors = (1u16..).zip(BUFFERS).map(|(next, (page, len, flags))| {
            RawDescriptor::from(Descriptor::new(address(page), len, flags, next))
        });
        for (index, descriptor) in (0u64..).zip(descriptors) {
            let at = GuestAddress(frame(RINGS[0]) + index * 16);
            map.write_obj(descriptor, at).expect("RAM");
        }
        let mut queue = Queue::new(16).expect("a queue");
        let [descriptors, available, used] = RINGS.map(|page| GuestAddress(address(page)));
        queue
            .try_set_desc_table_address(descriptors)
            .expect("aligned");
        queue
            .try_set_avail_ring_address(available)
            .expect("aligned");
        queue.try_set_used_ring_address(used).expect("aligned");
        queue.set_ready(true);
        let driver = Self {
            map: map.clone(),
            available: 0,
        };
        driver.set_available();
        (driver, queue)
    }

    fn set_available(&self) {
        let at = GuestAddress(frame(RINGS[1]) + 2);
        let stored = self.map.store(self.available, at, Ordering::Release);
        stored.expect("RAM");
    }

    /// Makes the chain available. Each entry of the available ring is 0: the chain's head.
    fn send(&mut self) {
        self.available = self.available.wrapping_add(1);
        self.set_available();
    }
}

/// A device's side.
fn serve<M: GuestMemory>(queue: &mut Queue, memory: &M, data: &[u8]) {
    let mut chains = queue.iter(memory).expect("a ring");
    let chain = chains.next().expect("a chain");
    let head = chain.head_index();
    let mut header = [0; 16];
    let mut len = 0;
    for descriptor in chain {
        let at = descriptor.addr();
        let copied = match (descriptor.is_write_only(), descriptor.len()) {
            (false, _) => memory.read_slice(&mut header, at),
            (true, 1) => memory.write_slice(&[0], at),
            (true, _) => memory.write_slice(data, at),
        };
        copied.expect("memory");
        len += descriptor.len();
    }
    black_box(header);
    queue.add_used(memory, head, len).expect("a ring");
}

pub(crate) fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("virtio chain of 3");
    let data = [0x5a; 4096];
    let bed = bed(PAGES, 4096);
    let map = &bed.map;
    let run = |bencher: &mut Bencher<'_>, iova: bool, serve: &dyn Fn(&mut Queue)| {
        let address = |page| {
            if iova {
                IOVA + page * 0x1000
            } else {
                frame(page)
            }
        };
        let (mut driver, mut queue) = Driver::new(map, address);
        bencher.iter(|| {
            driver.send();
            serve(&mut queue);
        });
        let used: u16 = map
            .load(GuestAddress(frame(RINGS[2]) + 2), Ordering::Acquire)
            .expect("RAM");
        assert_eq!(used, driver.available);
    };
    group.bench_function("plain memory", |bencher| {
        run(bencher, false, &|queue| serve(queue, map, black_box(&data)));
    });
    group.bench_function("pvIOMMU, one session", |bencher| {
        run(bencher, true, &|queue| {
            let served = bed.dma.session(|view| serve(queue, view, black_box(&data)));
            served.expect("bus master");
        });
    });
    let stock = stock::memory(map.clone(), mapped(PAGES));
    group.bench_function("stock IommuMemory", |bencher| {
        run(bencher, true, &|queue| {
            serve(queue, &stock, black_box(&data))
        });
    });
    group.finish();
}
