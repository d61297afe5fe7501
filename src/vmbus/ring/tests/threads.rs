//! Host and guest on threads of their own: a signal that is missing leaves both asleep.
#![forbid(unsafe_code)]

use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use super::*;

#[derive(Debug, Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.changed.notify_one();
    }

    fn wait(&self) {
        let limit = Duration::from_secs(20);
        let rung = self.rung.lock().unwrap();
        let (mut rung, timeout) = self
            .changed
            .wait_timeout_while(rung, limit, |rung| !*rung)
            .unwrap();
        assert!(!timeout.timed_out(), "a signal was lost");
        *rung = false;
    }
}

const PACKETS: u64 = 20_000;

/// Payload lengths that fill the ring to ever different levels.
fn payload_len(id: u64) -> usize {
    (id as usize * 104 + 8) % 1000
}

#[test]
fn a_host_that_sleeps_until_signalled_gets_every_packet() {
    let (guest, mut reader) = reader();
    let (to_host, to_guest) = (Arc::new(Bell::default()), Arc::new(Bell::default()));
    thread::scope(|scope| {
        scope.spawn(|| {
            for id in 0..PACKETS {
                let payload = vec![id as u8; payload_len(id)];
                loop {
                    if let Some(signal) = guest.send(id, false, &payload) {
                        if signal {
                            to_host.ring();
                        }
                        break;
                    }
                    if !guest.wait_for_room(payload.len() as u32) {
                        to_guest.wait();
                    }
                }
            }
        });
        let mut buf = [0; 1000];
        let mut next = 0;
        while next < PACKETS {
            while let Some(packet) = reader.read(&mut buf).unwrap() {
                assert_eq!(packet.transaction_id, next);
                let payload = &buf[..payload_len(next)];
                assert!(payload.iter().all(|byte| *byte == next as u8));
                next += 1;
                if next % 3 == 0 && reader.publish().unwrap() {
                    to_guest.ring();
                }
            }
            if reader.publish().unwrap() {
                to_guest.ring();
            }
            if next < PACKETS && !reader.unmask().unwrap() {
                to_host.wait();
                reader.mask().unwrap();
            }
        }
    });
}

#[test]
fn a_guest_that_sleeps_until_signalled_gets_every_packet() {
    let (guest, mut writer) = writer();
    let (to_host, to_guest) = (Arc::new(Bell::default()), Arc::new(Bell::default()));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut next = 0;
            while next < PACKETS {
                while let Some((packet, signal)) = guest.receive() {
                    assert_eq!(packet.transaction_id, next);
                    next += 1;
                    if signal {
                        to_host.ring();
                    }
                }
                // Unmask, look again, sleep (Linux `hv_end_read`).
                guest.store(INTERRUPT_MASK, 0);
                std::sync::atomic::fence(Ordering::SeqCst);
                if next < PACKETS && guest.load(WRITE_INDEX) == guest.load(READ_INDEX) {
                    to_guest.wait();
                }
                guest.store(INTERRUPT_MASK, 1);
            }
        });
        for id in 0..PACKETS {
            let payload = vec![id as u8; payload_len(id)];
            let room = loop {
                match writer.reserve(payload.len()).unwrap() {
                    Some(room) => break room,
                    None => to_host.wait(),
                }
            };
            if writer.complete(room, id, &payload).unwrap() {
                to_guest.ring();
            }
        }
    });
}
