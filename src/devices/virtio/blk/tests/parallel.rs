//! The block device on real threads: the event loop runs its queues while drivers hammer it.

use std::num::NonZeroUsize;
use std::thread;

use super::*;
use crate::devices::event_loop::EventLoop;
use crate::devices::virtio::testing::NOTIFY_PAGE;

const LIMIT: Duration = Duration::from_secs(30);

/// Waits for the next used element.
fn wait(queue: &mut DriverQueue, guest: &Guest) -> (u16, u32) {
    let start = Instant::now();
    loop {
        if let Some(used) = queue.used(&guest.ram) {
            return used;
        }
        assert!(start.elapsed() < LIMIT, "no answer");
        thread::yield_now();
    }
}

fn threaded(threads: usize, queues: u16) -> (EventLoop, Guest, Arc<Blk>, NamedTempFile) {
    let host = EventLoop::new("test", NonZeroUsize::new(threads).unwrap()).unwrap();
    let image = image(SECTORS);
    let blk = Blk::new(config(&image, queues, false), &host).unwrap();
    (host, Guest::new(blk.clone()), blk, image)
}

fn write_header(guest: &Guest, at: u64, kind: u32, sector: u64) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    guest.ram.write(at, &header).unwrap();
}

#[test]
fn four_drivers_on_four_queues_get_what_they_wrote_and_no_interrupt_is_lost() {
    const ROUNDS: u64 = 200;
    let (_host, guest, blk, _image) = threaded(3, 4);
    let queues = guest.start(VERSION_1 | FLUSH | INDIRECT, 4);
    thread::scope(|scope| {
        for mut queue in queues {
            let guest = &guest;
            scope.spawn(move || {
                let at = DATA + u64::from(queue.index) * 0x1_0000;
                let (header, status, table) = (at + 0x8000, at + 0x8100, at + 0x9000);
                for round in 0..ROUNDS {
                    let sector = u64::from(queue.index) * 256 + round % 200;
                    let byte = (round as u8).wrapping_mul(7) ^ queue.index as u8;
                    guest.ram.fill(at, 2048, byte).unwrap();
                    guest.ram.fill(at + 4096, 2048, !byte).unwrap();
                    for (kind, data) in [
                        (VIRTIO_BLK_T_OUT, out(at, 2048)),
                        (VIRTIO_BLK_T_IN, into(at + 4096, 2048)),
                    ] {
                        write_header(guest, header, kind, sector);
                        guest.ram.write(status, &[0xee]).unwrap();
                        let bufs = [out(header, 16), data, into(status, 1)];
                        let head = queue.add_indirect(&guest.ram, table, &bufs);
                        guest.kick(&queue);
                        assert_eq!(wait(&mut queue, guest).0, head);
                        assert_eq!(guest.bytes(status, 1), [OK]);
                    }
                    assert_eq!(guest.bytes(at + 4096, 2048), vec![byte; 2048]);
                }
            });
        }
    });
    // The interrupt follows the used index: give the last ones a moment.
    let mut counts = [0; 5];
    let start = Instant::now();
    while counts[1..].iter().sum::<u64>() < 4 * 2 * ROUNDS && start.elapsed() < LIMIT {
        for vector in guest.lines.take() {
            counts[usize::from(vector)] += 1;
        }
    }
    assert_eq!(counts, [0, 2 * ROUNDS, 2 * ROUNDS, 2 * ROUNDS, 2 * ROUNDS]);
    for counters in blk.counters() {
        assert_eq!((counters.requests, counters.errors), (2 * ROUNDS, 0));
    }
}

#[test]
fn the_doorbell_eventfd_alone_gets_a_request_served() {
    let (_host, guest, _blk, _image) = threaded(1, 2);
    let doorbells = guest.function.doorbells();
    assert_eq!(doorbells[1].offset, NOTIFY_PAGE + 4);
    let mut queue = guest.start(VERSION_1 | FLUSH, 2).remove(1);
    write_header(&guest, HEADER, VIRTIO_BLK_T_FLUSH, 0);
    let head = queue.add(&guest.ram, &[out(HEADER, 16), into(STATUS, 1)]);
    rustix::io::write(&doorbells[1].eventfd, &1u64.to_ne_bytes()).unwrap();
    assert_eq!(wait(&mut queue, &guest), (head, 1));
}

#[test]
fn nothing_reaches_the_guest_after_a_reset_has_returned() {
    const LEN: u64 = SECTORS * 512;
    const CANARY: [u8; 512] = [0x5a; 512];
    let (_host, guest, blk, _image) = threaded(2, 2);
    for round in 0..200u64 {
        let mut queues = guest.start(VERSION_1 | FLUSH, 2);
        // Each request takes several DMA accesses, the last of which reaches the canary.
        let area = |queue: u64, slot: u64| DATA + (queue * 2 + slot) * (LEN + 0x1000);
        let areas = [area(0, 0), area(0, 1), area(1, 0), area(1, 1)];
        for queue in &mut queues {
            for slot in 0..2 {
                let at = area(queue.index.into(), slot);
                let header = at + LEN;
                write_header(&guest, header, VIRTIO_BLK_T_IN, 0);
                let data = into(at, LEN as u32);
                let bufs = [out(header, 16), data, into(header + 0x800, 1)];
                queue.add(&guest.ram, &bufs);
            }
            guest.kick(queue);
        }
        // Half the time in the middle of a request, unless all are done before that is seen.
        let start = Instant::now();
        let mut done = 0;
        while round % 2 == 0 && done < 4 && blk.counters().iter().all(|q| q.oldest.is_none()) {
            done += queues.iter_mut().filter_map(|q| q.used(&guest.ram)).count();
            assert!(start.elapsed() < LIMIT, "no request under way");
        }
        guest.function.reset();
        // From here on the memory is the guest's alone.
        let canaries = areas.map(|at| at + LEN - 512);
        for at in canaries.into_iter().chain(queues.iter().map(|q| q.used)) {
            guest.ram.write(at, &CANARY).unwrap();
        }
        guest.lines.take();
        while guest.status() != 0 {
            assert!(start.elapsed() < LIMIT, "the reset does not end");
            thread::yield_now();
        }
        assert!(guest.lines.take().is_empty());
        for at in canaries.into_iter().chain(queues.iter().map(|q| q.used)) {
            assert_eq!(guest.bytes(at, 512), CANARY, "round {round} at {at:#x}");
        }
    }
    assert_eq!(blk.transport_counters().broken, 0);
}
