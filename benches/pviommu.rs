//! The pvIOMMU: a translation that is cached, one that is not, flushes, moves, and DMA next to a
//! plain copy; and the IOMMU of `vm-memory` on the same work.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Bencher, BenchmarkId, Criterion};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
use vm_vpci::device_id::LogicalDeviceId;
use vm_vpci::dma::{Dma, DmaPort};
use vm_vpci::mem::GuestRam;
use vm_vpci::pviommu::{
    DomainName, FlushRange, IommuConfig, IommuMode, Levels, PageTable, PvIommu, Translation,
};

use crate::stock;

/// I/O virtual address of the first page.
pub(crate) const IOVA: u64 = 0x7f00_0000_0000;
/// Guest RAM: tables in the lower half, pages in the upper one.
const RAM: u64 = 64 << 20;
const POPULATIONS: [u64; 3] = [1, 1_000, 100_000];
const DOMAIN: DomainName = DomainName::FirstStage(1);

pub(crate) struct Bed {
    pub(crate) map: GuestMemoryMmap,
    ram: GuestRam,
    iommu: Arc<PvIommu>,
    id: LogicalDeviceId,
    pub(crate) dma: Dma,
}

/// GPA of the page that `page` is mapped to. Pages next to each other are not so in RAM.
pub(crate) fn frame(page: u64) -> u64 {
    RAM / 2 + page * 769 % 4096 * 0x1000
}

/// I/O virtual and guest physical address of each of the first `pages` pages.
pub(crate) fn mapped(pages: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..pages).map(|page| (IOVA + page * 0x1000, frame(page)))
}

/// A function in a domain in which `pages` pages are mapped and, if they fit, cached.
pub(crate) fn bed(pages: u64, iotlb_entries: u32) -> Bed {
    let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).expect("RAM");
    let ram = GuestRam::new(&map);
    let config = IommuConfig {
        iotlb_entries,
        ..IommuConfig::default()
    };
    let iommu = PvIommu::new(config, ram.clone()).expect("a pvIOMMU");
    let id = LogicalDeviceId::from_domain_call(8).expect("an id");
    let port = DmaPort::behind_iommu(ram.clone(), iommu.port_settings(id));
    port.set_master(true);
    iommu
        .add_device(id, IommuMode::On, Some(port.clone()))
        .expect("room");
    let order = std::sync::atomic::Ordering::Relaxed;
    let store = |at, value| ram.store_u64(at, value, order).expect("RAM");
    store(0x1000 + 0xfe * 8, 0x2027);
    store(0x2000, 0x3027);
    for page in 0..pages {
        let table = 0x4000 + page / 512 * 0x1000;
        store(0x3000 + page / 512 * 8, table | 0x27);
        store(table + page % 512 * 8, frame(page) | 0x67);
    }
    for number in [1, 2] {
        iommu.create(number).expect("room");
        let table = PageTable {
            root: 0x1000,
            levels: Levels::Four,
        };
        iommu
            .configure(number, Translation::Paged(table))
            .expect("a root");
    }
    iommu.attach(DOMAIN, id).expect("a device");
    let dma = Dma::new(port);
    for page in 0..pages {
        dma.read(IOVA + page * 0x1000, &mut [0; 8]).expect("mapped");
    }
    Bed {
        map,
        ram,
        iommu,
        id,
        dma,
    }
}

pub(crate) fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pviommu");
    for pages in POPULATIONS {
        let bed = bed(pages, 1 << 17);
        let at = IOVA + pages / 2 * 0x1000;
        let check = |iova| {
            bed.dma.session(|view| {
                view.check_range(black_box(GuestAddress(iova)), 8, Permissions::Write)
            })
        };
        assert_eq!(check(at), Ok(true));
        group.bench_function(BenchmarkId::new("translate hit", pages), |bencher| {
            let hits = bed.dma.session(|view| {
                bencher
                    .iter(|| view.check_range(black_box(GuestAddress(at)), 8, Permissions::Write));
            });
            hits.expect("bus master");
        });
        let stock = stock::memory(bed.map.clone(), mapped(pages));
        group.bench_function(BenchmarkId::new("stock translate", pages), |bencher| {
            bencher.iter(|| stock.check_range(black_box(GuestAddress(at)), 8, Permissions::Write));
        });
        let range = FlushRange {
            first: (IOVA >> 12) + pages,
            shift: 0,
        };
        group.bench_function(BenchmarkId::new("flush one page", pages), |bencher| {
            bencher.iter(|| bed.iommu.flush_ranges(DOMAIN, black_box(&[range])));
        });
    }
    let small = bed(1024, 16);
    group.bench_function("translate miss, 4 levels", |bencher| {
        let misses = small.dma.session(|view| {
            let mut page = 0;
            bencher.iter(|| {
                // Far enough from the last one to be out of the cache when it comes again.
                page = (page + 7) % 1024;
                let iova = GuestAddress(IOVA + page * 0x1000);
                view.check_range(black_box(iova), 8, Permissions::Write)
            });
        });
        misses.expect("bus master");
    });
    group.bench_function("attach", |bencher| {
        let mut number = 1;
        bencher.iter(|| {
            number = 3 - number;
            small.iommu.attach(DomainName::FirstStage(number), small.id)
        });
    });
    let bed = bed(16, 4096);
    let data = [0x5a; 4096];
    let write = |bencher: &mut Bencher<'_>, write: &dyn Fn(u64, &[u8])| {
        bencher.iter(|| write(black_box(1), black_box(&data)));
    };
    group.bench_function("DMA write of 4 KiB, translated", |bencher| {
        write(bencher, &|page, data| {
            bed.dma.write(IOVA + page * 0x1000, data).expect("mapped");
        });
    });
    group.bench_function("DMA write of 4 KiB in a session", |bencher| {
        let done = bed.dma.session(|view| {
            write(bencher, &|page, data| {
                let at = GuestAddress(IOVA + page * 0x1000);
                view.write_slice(data, at).expect("mapped");
            });
        });
        done.expect("bus master");
    });
    group.bench_function("plain write of 4 KiB", |bencher| {
        write(bencher, &|page, data| {
            let at = GuestAddress(frame(page));
            bed.map.write_slice(data, at).expect("RAM");
        });
    });
    group.bench_function("plain write of 4 KiB, map looked up", |bencher| {
        write(bencher, &|page, data| {
            bed.ram.write(frame(page), data).expect("RAM");
        });
    });
    let stock = stock::memory(bed.map.clone(), mapped(16));
    group.bench_function("stock write of 4 KiB", |bencher| {
        write(bencher, &|page, data| {
            let at = GuestAddress(IOVA + page * 0x1000);
            stock.write_slice(data, at).expect("mapped");
        });
    });
    group.bench_function("session", |bencher| {
        bencher.iter(|| bed.dma.session(|_| ()));
    });
    group.finish();
}
