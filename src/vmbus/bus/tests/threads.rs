//! Posts, signals, offers and revocations from several threads at once.
#![forbid(unsafe_code)]

use std::sync::Condvar;
use std::thread;
use std::time::Duration;

use super::*;

/// A worker thread's doorbell.
#[derive(Debug, Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Trigger for Bell {
    fn trigger(&self) {
        *lock(&self.rung) = true;
        self.changed.notify_one();
    }
}

impl Bell {
    /// Waits for a ring; false if none came for a long time.
    fn wait(&self) -> bool {
        let limit = Duration::from_secs(20);
        let rung = lock(&self.rung);
        let (mut rung, timeout) = self
            .changed
            .wait_timeout_while(rung, limit, |rung| !*rung)
            .unwrap();
        *rung = false;
        !timeout.timed_out()
    }
}

#[derive(Debug)]
struct BellHost(Arc<Bell>);

impl WorkerHost for BellHost {
    fn adopt(&self, _: Weak<dyn Worker>) -> io::Result<Arc<dyn Trigger>> {
        Ok(self.0.clone())
    }
}

/// Posts as Linux does: again while the host asks for it.
fn post(bus: &VmBus, bytes: &[u8]) {
    while let Err(status) = bus.post_message(4, 1, bytes) {
        assert_eq!(status, HvStatus::INSUFFICIENT_BUFFERS);
        thread::yield_now();
    }
}

/// Reads messages until one of type `last`, and lets go of rescinded channels.
fn read_until(guest: &Guest, bus: &VmBus, last: u8) {
    loop {
        for message in guest.messages() {
            if message[0] == 2 {
                let relid = u32::from_le_bytes(message[8..12].try_into().unwrap());
                post(bus, &words(t::RELID_RELEASED, &[relid]));
            }
            if message[0] == last {
                return;
            }
        }
        thread::yield_now();
    }
}

#[test]
fn hot_plug_races_with_a_guest_that_comes_and_goes() {
    let guest = Guest::new(2);
    let bell = Arc::new(Bell::default());
    let host = BellHost(bell.clone());
    let config = VmBusConfig::default();
    let bus = VmBus::new(config, guest.ram.clone(), guest.synic.clone(), &host).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                while bus.process() {}
                assert!(bell.wait(), "no work for a long time");
            }
        });
        let plugs = scope.spawn(|| {
            for round in 0..300 {
                let id = bus.offer(Echo::new(round + 1)).unwrap();
                thread::yield_now();
                bus.revoke(id);
            }
        });
        for round in 0..60 {
            post(&bus, &guest_os::contact(Version::V5_3, 1));
            read_until(&guest, &bus, 15);
            post(&bus, &words(t::REQUEST_OFFERS, &[]));
            for _ in 0..round {
                let _ = bus.signal_event(0x2001, 0);
            }
            read_until(&guest, &bus, 4);
            post(&bus, &words(t::UNLOAD, &[]));
            read_until(&guest, &bus, 17);
        }
        plugs.join().unwrap();
        done.store(true, Ordering::SeqCst);
        bell.trigger();
    });
    while bus.process() {}
    assert_eq!(lock(&bus.devices).len(), 0, "every channel was released");
    assert_eq!(bus.counters().connections, 60);
}
