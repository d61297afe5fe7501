//! DMA without a pvIOMMU.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::GuestAddress;

use super::*;
use crate::mem::{GuestRam, RamMap};

fn port() -> Arc<DmaPort> {
    let ranges = [
        (GuestAddress(0), 0x2000),
        (GuestAddress(0x2000), 0x20000),
        (GuestAddress(0x100_0000), 0x1000),
    ];
    let map = RamMap::from_ranges(&ranges).expect("test RAM");
    DmaPort::new(GuestRam::new(&map))
}

#[test]
fn nothing_moves_before_bus_mastering_is_on() {
    let port = port();
    let dma = Dma::new(port.clone());
    assert_eq!(dma.write(0x1000, &[1]), Err(DmaError::NotMaster));
    port.set_master(true);
    dma.write(0x1000, &[1]).unwrap();
    port.set_master(false);
    assert_eq!(dma.read(0x1000, &mut [0]), Err(DmaError::NotMaster));
    assert_eq!(port.counters().not_master, 2);
}

#[test]
fn a_transfer_crosses_regions_and_stops_at_the_end_of_ram() {
    let port = port();
    port.set_master(true);
    let dma = Dma::new(port.clone());
    let data: Vec<u8> = (0..=255).collect();
    dma.write(0x1f80, &data).unwrap();
    let mut back = vec![0; 256];
    dma.read(0x1f80, &mut back).unwrap();
    assert_eq!(back, data);
    let fault = dma.write(0x100_0ff0, &data).unwrap_err();
    assert_eq!(
        fault,
        DmaError::Fault {
            iova: 0x100_0ff0,
            len: 256
        }
    );
    let mut tail = [0xff; 16];
    dma.read(0x100_0ff0, &mut tail).unwrap();
    assert_eq!(tail, [0; 16]);
    assert_eq!(port.counters().faults, 1);
}

#[test]
fn lengths_are_bounded_and_addresses_do_not_wrap() {
    let port = port();
    port.set_master(true);
    let dma = Dma::new(port);
    let long = vec![0; MAX_DMA_LEN + 1];
    assert_eq!(
        dma.write(0, &long),
        Err(DmaError::TooLong {
            len: MAX_DMA_LEN + 1
        })
    );
    dma.write(0, &long[..MAX_DMA_LEN]).unwrap();
    assert!(dma.write(u64::MAX, &[0; 2]).is_err());
    assert!(dma.write(u64::MAX - 1, &[0; 1]).is_err());
}

#[test]
fn revoking_waits_for_the_access_under_way() {
    let port = port();
    port.set_master(true);
    let dma = Dma::new(port.clone());
    let inside = Arc::new(std::sync::Barrier::new(2));
    let done = Arc::new(AtomicU64::new(0));
    let worker = {
        let (inside, done) = (inside.clone(), done.clone());
        std::thread::spawn(move || {
            dma.with(0, 8, Access::Write, |_| {
                inside.wait();
                std::thread::sleep(std::time::Duration::from_millis(20));
                done.store(1, Ordering::SeqCst);
            })
        })
    };
    inside.wait();
    port.set_master(false);
    assert_eq!(done.load(Ordering::SeqCst), 1);
    worker.join().unwrap().unwrap();
}

#[test]
fn an_access_uses_the_memory_map_of_the_moment() {
    let range = |start| (GuestAddress(start), 0x1000);
    let map = RamMap::from_ranges(&[range(0), range(0x1000)]).expect("test RAM");
    let ram = GuestRam::new(&map);
    let port = DmaPort::new(ram.clone());
    port.set_master(true);
    let dma = Dma::new(port.clone());
    dma.write(0xfff, &[1, 2]).unwrap();
    let (map, taken_out) = map.remove_region(GuestAddress(0x1000), 0x1000).unwrap();
    ram.replace(&map);
    assert!(dma.write(0xfff, &[3, 4]).is_err());
    assert_eq!(port.counters().faults, 1);
    ram.replace(&map.insert_region(taken_out).unwrap());
    let mut back = [0; 2];
    dma.read(0xfff, &mut back).unwrap();
    assert_eq!(back, [1, 2]);
}

#[test]
fn read_only_ram_is_read_and_a_write_there_is_a_fault() {
    let ram = crate::mem::testing::with_rom(0x1000, &[7; 0x1000]);
    let port = DmaPort::new(GuestRam::new(&ram));
    port.set_master(true);
    let dma = Dma::new(port.clone());
    let mut back = [0; 4];
    dma.read(0xffe, &mut back).unwrap();
    assert_eq!(back, [0, 0, 7, 7]);
    for iova in [0x1010, 0xffe] {
        let fault = DmaError::Fault { iova, len: 4 };
        assert_eq!(dma.write(iova, &[1; 4]), Err(fault));
    }
    assert_eq!(port.counters().faults, 2);
    dma.read(0xffe, &mut back).unwrap();
    assert_eq!(back, [0, 0, 7, 7]);
}
