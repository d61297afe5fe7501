//! What devices reach through domains.

use std::sync::Mutex;
use std::sync::Weak;

use vm_memory::{Bytes, GuestMemory, Permissions};

use super::*;
use crate::dma::{DmaError, MAX_DMA_LEN, MessageTarget};

const IOVA: u64 = 0x7f12_3456_7000;

fn fault(function: &Function, iova: u64, access: Access) -> FaultCause {
    let before = function.port.counters().faults;
    let result = match access {
        Access::Read => function.dma.read(iova, &mut [0; 8]),
        Access::Write => function.dma.write(iova, &[0xba; 8]),
    };
    assert_eq!(result, Err(DmaError::Fault { iova, len: 8 }));
    assert_eq!(function.port.counters().faults, before + 1);
    function.port.last_fault().unwrap().cause
}

#[test]
fn dma_lands_through_the_guests_tables_and_faults_after_unmap_and_flush() {
    let mut bed = Bed::new();
    let root = bed.paging_domain(1);
    bed.map(root, IOVA, 0x5000 | PAGE);
    assert_eq!(bed.attach(1, A), 0);
    bed.a.dma.write(IOVA + 8, b"through!").unwrap();
    let mut landed = [0; 8];
    bed.ram.read(0x5008, &mut landed).unwrap();
    assert_eq!(&landed, b"through!");
    // A map needs no call: nothing was cached for the page.
    assert_eq!(
        fault(&bed.a, IOVA + 0x1000, Access::Read),
        FaultCause::NotPresent { level: 1 }
    );
    bed.map(root, IOVA + 0x1000, SECOND | READ_ONLY);
    bed.a.dma.read(IOVA + 0x1000, &mut [0; 8]).unwrap();
    assert_eq!(
        fault(&bed.a, IOVA + 0x1000, Access::Write),
        FaultCause::ReadOnly { level: 1 }
    );
    // More rights need no flush either.
    bed.map(root, IOVA + 0x1000, SECOND | PAGE);
    bed.a.dma.write(IOVA + 0x1000, &[1; 8]).unwrap();
    // Unmap, flush, and the same access is a fault; its neighbour is not.
    bed.map(root, IOVA, 0);
    bed.flush_page(1, IOVA);
    assert_eq!(
        fault(&bed.a, IOVA + 8, Access::Write),
        FaultCause::NotPresent { level: 1 }
    );
    bed.a.dma.write(IOVA + 0x1000, &[2; 8]).unwrap();
    // The other function has a domain of its own.
    bed.b.dma.read(0x5008, &mut landed).unwrap();
    assert_eq!(&landed, b"through!");
    let report = bed.iommu.report();
    assert_eq!(report.domains[0].faults, 3);
    assert_eq!(report.devices[0].backend.faults, 3);
    assert_eq!(report.devices[1].backend.faults, 0);
}

#[test]
fn a_page_that_moves_is_found_in_its_new_place_after_either_flush() {
    let mut bed = Bed::new();
    let root = bed.paging_domain(1);
    assert_eq!(bed.attach(1, A), 0);
    for (round, whole) in [(0u64, false), (1, true), (2, false)] {
        let frame = 0x5000 + round * 0x1000;
        bed.map(root, IOVA, frame | PAGE);
        let status = if whole {
            bed.flush(1)
        } else {
            bed.flush_list(1, &[IOVA]).0
        };
        assert_eq!(status, 0);
        bed.a.dma.write(IOVA, &round.to_le_bytes()).unwrap();
        assert_eq!(bed.entry(frame), round);
    }
}

#[test]
fn replaced_tables_are_honoured_after_a_flush_of_one_page_below_them() {
    let mut bed = Bed::new();
    let root = bed.paging_domain(1);
    bed.map(root, IOVA, 0x5000 | PAGE);
    assert_eq!(bed.attach(1, A), 0);
    bed.a.dma.read(IOVA, &mut [0; 8]).unwrap();
    // Another page is given up together with the whole second-level table.
    let at = bed.entry_at(root, 4, 3, IOVA);
    bed.set_entry(at, 0);
    bed.flush_page(1, IOVA);
    assert_eq!(
        fault(&bed.a, IOVA, Access::Read),
        FaultCause::NotPresent { level: 3 }
    );
    // And one beside it, which was never used, does not pass through a remembered table.
    assert_eq!(
        fault(&bed.a, IOVA + 0x1000, Access::Read),
        FaultCause::NotPresent { level: 3 }
    );
}

#[test]
fn large_pages_translate_cross_and_are_flushed_by_any_page_of_theirs() {
    let mut bed = Bed::new();
    let root = bed.paging_domain(1);
    let giant = 3 << 30;
    let at = bed.entry_at(root, 4, 3, giant);
    bed.set_entry(at, PAGE | LARGE);
    let large = 1 << 30;
    let at = bed.entry_at(root, 4, 2, large);
    bed.set_entry(at, 0x20_0000 | PAGE | LARGE);
    bed.set_entry(at + 8, SECOND | PAGE | LARGE);
    assert_eq!(bed.attach(1, A), 0);
    bed.a.dma.write(giant + 0x9000, &[7; 8]).unwrap();
    assert_eq!(bed.entry(0x9000), 0x0707_0707_0707_0707);
    // Outside RAM, inside the page.
    assert_eq!(
        fault(&bed.a, giant + HOLE, Access::Read),
        FaultCause::NotRam
    );
    // From one large page into the next, which is elsewhere.
    let data: Vec<u8> = (0..MAX_DMA_LEN).map(|i| i as u8).collect();
    bed.a.dma.write(large + 0x20_0000 - 5, &data).unwrap();
    let mut tail = vec![0; MAX_DMA_LEN - 5];
    bed.ram.read(SECOND, &mut tail).unwrap();
    assert_eq!(tail, data[5..]);
    bed.set_entry(at, 0);
    bed.flush_page(1, large + 0x1f_f000);
    assert_eq!(
        fault(&bed.a, large, Access::Read),
        FaultCause::NotPresent { level: 2 }
    );
}

#[test]
fn a_scattered_access_moves_every_byte_or_none() {
    let mut bed = Bed::new();
    let root = bed.paging_domain(1);
    // Pages in reverse order: no two are next to each other.
    for page in 0..17 {
        bed.map(
            root,
            IOVA + page * 0x1000,
            (0x9_0000 - page * 0x1000) | PAGE,
        );
    }
    assert_eq!(bed.attach(1, A), 0);
    let data: Vec<u8> = (0..MAX_DMA_LEN).map(|i| (i / 7) as u8).collect();
    let start = IOVA + 0x801;
    bed.a.dma.write(start, &data).unwrap();
    let mut back = vec![0; MAX_DMA_LEN];
    bed.a.dma.read(start, &mut back).unwrap();
    assert!(back == data);
    let mut piece = [0; 16];
    bed.ram.read(0x9_0000 - 0x1000, &mut piece).unwrap();
    assert_eq!(piece[..], data[0x7ff..0x80f]);
    // The last page goes: nothing moves, and the fault names the first byte that could not.
    bed.map(root, IOVA + 16 * 0x1000, 0);
    bed.flush_page(1, IOVA + 16 * 0x1000);
    let error = bed.a.dma.write(start, &vec![0xff; MAX_DMA_LEN]);
    assert!(matches!(error, Err(DmaError::Fault { iova, .. }) if iova == start));
    let last = bed.a.port.last_fault().unwrap();
    assert_eq!((last.iova, last.len), (IOVA + 0x1_0000, 0x801));
    bed.a.dma.read(start, &mut back[..0x1000]).unwrap();
    assert!(back[..0x1000] == data[..0x1000]);
}

#[test]
fn a_page_that_is_not_ram_and_an_address_that_is_too_wide_are_faults() {
    let mut bed = Bed::new();
    let root = bed.paging_domain(1);
    bed.map(root, IOVA, HOLE | PAGE);
    // The page before the hole and the page in it.
    bed.map(root, 0x10_0000, (HOLE - 0x1000) | PAGE);
    bed.map(root, 0x10_1000, HOLE | PAGE);
    assert_eq!(bed.attach(1, A), 0);
    assert_eq!(fault(&bed.a, IOVA, Access::Write), FaultCause::NotRam);
    assert_eq!(fault(&bed.a, 0x10_0ffc, Access::Write), FaultCause::NotRam);
    bed.a.dma.write(0x10_0ff8, &[1; 8]).unwrap();
    assert_eq!(fault(&bed.a, 1 << 48, Access::Read), FaultCause::Width);
    assert_eq!(fault(&bed.a, u64::MAX - 8, Access::Read), FaultCause::Width);
    // The whole width is usable, also what is not canonical for a CPU.
    bed.map(root, 0xffff_ffff_f000, 0x5000 | PAGE);
    bed.a.dma.write(0xffff_ffff_fff8, &[1; 8]).unwrap();
    assert_eq!(
        fault(&bed.a, 0xffff_ffff_fffc, Access::Read),
        FaultCause::Width
    );
}

#[test]
fn blocked_unconfigured_and_identity_domains_do_what_they_say() {
    let bed = Bed::new();
    assert_eq!(bed.create(1), 0);
    assert_eq!(bed.attach(1, A), 0);
    assert_eq!(fault(&bed.a, 0x5000, Access::Read), FaultCause::Blocked);
    assert_eq!(bed.configure(1, 0, 0x123), 0);
    bed.a.dma.write(0x5000, &[1; 8]).unwrap();
    assert_eq!(fault(&bed.a, HOLE, Access::Read), FaultCause::NotRam);
    assert_eq!(bed.configure(1, 3, 0), 0);
    assert_eq!(fault(&bed.a, 0x5000, Access::Read), FaultCause::Blocked);
    assert_eq!(bed.detach(A), 0);
    bed.a.dma.write(0x5000, &[2; 8]).unwrap();
    assert_eq!(bed.iommu.report().domains[0].faults, 3);
}

#[test]
fn a_configuration_of_a_live_domain_takes_all_its_devices_to_the_new_table() {
    let mut bed = Bed::new();
    let root = bed.paging_domain(1);
    bed.map(root, IOVA, 0x5000 | PAGE);
    assert_eq!((bed.attach(1, A), bed.attach(1, B)), (0, 0));
    bed.a.dma.read(IOVA, &mut [0; 8]).unwrap();
    bed.b.dma.read(IOVA, &mut [0; 8]).unwrap();
    let other = bed.table();
    bed.map(other, IOVA, 0x6000 | PAGE);
    assert_eq!(bed.configure(1, 1, other), 0);
    bed.a.dma.write(IOVA, &[1; 8]).unwrap();
    bed.b.dma.write(IOVA + 8, &[2; 8]).unwrap();
    assert_eq!(bed.entry(0x5000), 0);
    assert_eq!(bed.entry(0x6000), 0x0101_0101_0101_0101);
    assert_eq!(bed.entry(0x6008), 0x0202_0202_0202_0202);
}

#[test]
fn a_move_leaves_nothing_of_the_former_domain() {
    let mut bed = Bed::new();
    let (one, two) = (bed.paging_domain(1), bed.paging_domain(2));
    bed.map(one, IOVA, 0x5000 | PAGE);
    bed.map(one, IOVA + 0x1000, 0x5000 | PAGE);
    bed.map(two, IOVA, 0x6000 | PAGE);
    assert_eq!(bed.attach(1, A), 0);
    bed.a.dma.read(IOVA, &mut [0; 8]).unwrap();
    bed.a.dma.read(IOVA + 0x1000, &mut [0; 8]).unwrap();
    assert_eq!(bed.attach(2, A), 0);
    bed.a.dma.write(IOVA, &[1; 8]).unwrap();
    assert_eq!((bed.entry(0x5000), bed.entry(0x6000) & 0xff), (0, 1));
    assert_eq!(
        fault(&bed.a, IOVA + 0x1000, Access::Read),
        FaultCause::NotPresent { level: 1 }
    );
    assert_eq!(bed.a.port.last_fault().unwrap().domain, 2);
}

#[test]
fn virtio_queue_sees_the_translated_space() {
    let mut bed = Bed::new();
    let root = bed.paging_domain(1);
    bed.map(root, IOVA, 0x5000 | PAGE);
    bed.map(root, IOVA + 0x1000, 0x9000 | READ_ONLY);
    assert_eq!(bed.attach(1, A), 0);
    bed.ram.write(0x5ffe, &[1, 2]).unwrap();
    bed.ram.write(0x9000, &[3, 4]).unwrap();
    let session = bed.a.dma.session(|view| {
        let at = GuestAddress(IOVA + 0xffe);
        let word: u32 = view.read_obj(at).unwrap();
        assert_eq!(word, 0x0403_0201);
        assert!(view.write_obj(word, at).is_err());
        view.write_obj(0xabcd_u16, at).unwrap();
        view.store(9u16, GuestAddress(IOVA), Ordering::SeqCst)
            .unwrap();
        assert!(view.check_range(GuestAddress(IOVA), 0x2000, Permissions::Read));
        assert!(!view.check_range(GuestAddress(IOVA), 0x2000, Permissions::Write));
        assert!(!view.check_range(GuestAddress(IOVA), 0x2001, Permissions::Read));
        assert!(!view.check_range(GuestAddress(u64::MAX), 2, Permissions::Read));
    });
    session.unwrap();
    assert_eq!(bed.entry(0x5000), 9);
    assert_eq!(bed.entry(0x5ff8) >> 48, 0xabcd);
    assert_eq!(bed.a.port.counters().faults, 1);
}

/// Takes the messages that one function has.
#[derive(Debug, Default)]
struct Messages(Mutex<Vec<(u64, u32)>>);

impl MessageTarget for Messages {
    fn message(&self, address: u64, data: u32) -> bool {
        let live = data < 3;
        if live {
            self.0.lock().unwrap().push((address, data));
        }
        live
    }
}

#[test]
fn the_interrupt_range_is_never_translated_and_raises_only_what_was_given() {
    let mut bed = Bed::new();
    let messages = Arc::new(Messages::default());
    let target: Weak<Messages> = Arc::downgrade(&messages);
    bed.a.port.set_message_target(target);
    let root = bed.paging_domain(1);
    for page in 0..3 {
        let iova = 0xfedf_f000 + page * 0x1000;
        bed.map(root, iova, (0x5000 + page * 0x1000) | PAGE);
    }
    bed.map(root, 0xfef0_0000, 0x9000 | PAGE);
    assert_eq!(bed.attach(1, A), 0);
    for domain in 0..3 {
        bed.a.dma.write(0xfee0_0000, &2u32.to_le_bytes()).unwrap();
        // No message of this function; not four bytes; not aligned; a read; half in the range.
        let bad = [
            (0xfee0_0000, 4),
            (0xfee0_0002, 4),
            (0xfee0_0000, 8),
            (0xfedf_fffe, 4),
        ];
        for (iova, len) in bad {
            let error = bed.a.dma.write(iova, &vec![9; len]);
            assert!(matches!(error, Err(DmaError::Fault { .. })));
        }
        assert!(bed.a.dma.read(0xfee0_0ffc, &mut [0; 4]).is_err());
        // Blocking a function, or giving it back to the default domain, changes nothing here.
        let _ = if domain == 0 {
            bed.configure(1, 3, 0)
        } else {
            bed.detach(A)
        };
    }
    assert_eq!(*messages.0.lock().unwrap(), [(0xfee0_0000, 2); 3]);
    assert_eq!(bed.a.port.counters().messages, 3);
    assert_eq!((bed.entry(0x5ff8), bed.entry(0x6000)), (0, 0));
    // Right before and behind it there are ordinary addresses.
    assert_eq!(bed.configure(1, 1, root), 0);
    assert_eq!(bed.attach(1, A), 0);
    bed.a.dma.write(0xfedf_fffc, &[1; 4]).unwrap();
    bed.a.dma.write(0xfef0_0000, &[1; 4]).unwrap();
    bed.a.port.set_master(false);
    assert_eq!(
        bed.a.dma.write(0xfee0_0000, &[1; 4]),
        Err(DmaError::NotMaster)
    );
}

#[test]
fn the_cache_is_bounded_and_tells_when_it_is_too_small() {
    let mut bed = Bed::with(IommuConfig {
        iotlb_entries: 16,
        ..IommuConfig::default()
    });
    let root = bed.paging_domain(1);
    for page in 0..17 {
        bed.map(root, page << 12, 0x5000 | PAGE);
    }
    assert_eq!(bed.attach(1, A), 0);
    let touch = |pages: std::ops::Range<u64>| {
        for page in pages {
            bed.a.dma.read(page << 12, &mut [0; 8]).unwrap();
        }
        bed.iommu.report().devices[0].backend.iotlb
    };
    assert_eq!(touch(0..16).evictions, 0);
    assert_eq!(touch(0..16).misses, 16);
    let counters = touch(16..17);
    assert_eq!((counters.misses, counters.evictions), (17, 1));
}

#[test]
fn what_is_unmapped_during_an_access_is_a_fault_at_most() {
    let mut bed = Bed::with(IommuConfig {
        iotlb_entries: 16,
        ..IommuConfig::default()
    });
    let root = bed.paging_domain(1);
    for page in 0..18 {
        bed.map(root, page << 12, 0x5000 | PAGE);
    }
    assert_eq!(bed.attach(1, A), 0);
    let dma = bed.a.dma.clone();
    let access = dma.session(|view| {
        let slices = view.get_slices(GuestAddress(0), 0x2000, Permissions::Write);
        let mut slices = slices.unwrap();
        assert_eq!(slices.next().unwrap().unwrap().len(), 0x1000);
        bed.map(root, 0x1000, 0);
        // Until the page is out of the cache, nothing is seen of that.
        for page in 2..18 {
            let iova = GuestAddress(page << 12);
            assert!(view.check_range(iova, 8, Permissions::Read));
        }
        assert!(slices.next().unwrap().is_err());
        assert!(slices.next().is_none());
    });
    access.unwrap();
    assert_eq!(bed.a.port.counters().faults, 1);
    let last = bed.a.port.last_fault().unwrap();
    assert_eq!((last.iova, last.len), (0x1000, 0x1000));
    assert_eq!(last.cause, FaultCause::NotPresent { level: 1 });
}

#[test]
fn an_address_above_the_advertised_width_is_a_fault() {
    let mut bed = Bed::with(IommuConfig {
        nested: true,
        ..IommuConfig::default()
    });
    let root = bed.paging_domain(1);
    let last = (1 << 47) - 0x1000;
    for iova in [last, last + 0x1000] {
        bed.map(root, iova, 0x5000 | PAGE);
    }
    assert_eq!(bed.attach(1, A), 0);
    bed.a.dma.read(last, &mut [0; 8]).unwrap();
    let wide = fault(&bed.a, last + 0x1000, Access::Read);
    assert_eq!(wide, FaultCause::Width);
}
