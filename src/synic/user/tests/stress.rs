//! The SynIC under real concurrency: a guest that acts on interrupts only must see everything.
use super::*;

use std::sync::Condvar;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

const CHANNELS: usize = 40;
const HOSTS: usize = 3;
const EVENTS: u64 = 8_000;
const MESSAGES: u32 = 4_000;

/// A local APIC with one vector: edges that arrive while one is pending collapse.
#[derive(Debug, Default)]
struct LocalApic {
    pending: Mutex<bool>,
    changed: Condvar,
}

impl MsiSink for LocalApic {
    fn raise_msi(&self, msi: Msi) {
        assert_eq!(msi, Msi::fixed(0, 0xf3));
        *lock(&self.pending) = true;
        self.changed.notify_one();
    }
}

impl LocalApic {
    /// Waits for the interrupt and takes it. False if none came for so long that one was lost.
    fn wait(&self) -> bool {
        let guard = lock(&self.pending);
        let (mut pending, _) = self
            .changed
            .wait_timeout_while(guard, Duration::from_secs(20), |pending| !*pending)
            .unwrap();
        std::mem::take(&mut *pending)
    }
}

#[derive(Debug, Default)]
struct Wake(Mutex<bool>, Condvar);

impl Trigger for Wake {
    fn trigger(&self) {
        *lock(&self.0) = true;
        self.1.notify_one();
    }
}

/// What host threads produce; a channel's event says that its count went up.
struct Shared {
    synic: UserSynic,
    ram: GuestRam,
    apic: Arc<LocalApic>,
    produced: [std::sync::atomic::AtomicU64; CHANNELS],
    hosts_done: std::sync::atomic::AtomicUsize,
    lost: AtomicBool,
}

/// The interrupt handler of a guest: one message, then all event flags, as Linux does.
fn handle_interrupt(shared: &Shared, messages: &mut Vec<u32>, consumed: &mut [u64; CHANNELS]) {
    let ram = &shared.ram;
    if ram.load_u32(SLOT2, Ordering::SeqCst).unwrap() != 0 {
        let mut payload = [0; 4];
        ram.read(SLOT2 + 16, &mut payload).unwrap();
        messages.push(u32::from_le_bytes(payload));
        ram.store_u32(SLOT2, 0, Ordering::SeqCst).unwrap();
        if ram.load_u32(SLOT2 + 4, Ordering::SeqCst).unwrap() & 1 << 8 != 0 {
            shared.synic.write_msr(0, msr::EOM, 0).unwrap();
        }
    }
    for word in 0..CHANNELS.div_ceil(64) {
        let gpa = FLAGS2 + word as u64 * 8;
        let mut seen = ram.load_u64(gpa, Ordering::SeqCst).unwrap();
        while let Err(now) = ram.compare_exchange_u64(gpa, seen, 0).unwrap() {
            seen = now;
        }
        for bit in (0..64).filter(|bit| seen >> bit & 1 != 0) {
            let channel = word * 64 + bit;
            consumed[channel] = shared.produced[channel].load(Ordering::SeqCst);
        }
    }
}

fn guest(shared: &Shared) -> (Vec<u32>, [u64; CHANNELS]) {
    let (mut messages, mut consumed) = (Vec::new(), [0; CHANNELS]);
    loop {
        let all_sent = shared.hosts_done.load(Ordering::SeqCst) == HOSTS + 1;
        let produced = shared.produced.each_ref().map(|n| n.load(Ordering::SeqCst));
        if all_sent && consumed == produced && messages.len() == MESSAGES as usize {
            return (messages, consumed);
        }
        if !shared.apic.wait() {
            shared.lost.store(true, Ordering::SeqCst);
            return (messages, consumed);
        }
        handle_interrupt(shared, &mut messages, &mut consumed);
    }
}

fn signal_events(shared: &Shared, seed: usize) {
    let mut channel = seed;
    for _ in 0..EVENTS {
        channel = (channel * 5 + 7) % CHANNELS;
        shared.produced[channel].fetch_add(1, Ordering::SeqCst);
        shared.synic.signal_event(0, 2, channel as u16).unwrap();
    }
    shared.hosts_done.fetch_add(1, Ordering::SeqCst);
}

fn post_messages(shared: &Shared, wake: &Wake) {
    for number in 0..MESSAGES {
        while let Err(error) = shared.synic.post_message(0, 2, 1, &number.to_le_bytes()) {
            assert_eq!(error, SynicError::QueueFull { vp: 0 });
            let guard = lock(&wake.0);
            let (mut woken, _) = wake
                .1
                .wait_timeout_while(guard, Duration::from_secs(20), |woken| !*woken)
                .unwrap();
            assert!(std::mem::take(&mut *woken), "the drain trigger was lost");
        }
    }
    shared.hosts_done.fetch_add(1, Ordering::SeqCst);
}

#[test]
fn no_message_event_or_interrupt_is_lost_between_threads() {
    let apic = Arc::new(LocalApic::default());
    let map = RamMap::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).expect("test RAM");
    let ram = GuestRam::new(&map);
    let config = SynicConfig {
        apic_ids: Arc::new([0]),
        queue_limit: 8,
    };
    let shared = Shared {
        synic: UserSynic::new(&config, ram.clone(), apic.clone()),
        ram,
        apic,
        produced: [const { std::sync::atomic::AtomicU64::new(0) }; CHANNELS],
        hosts_done: Default::default(),
        lost: AtomicBool::new(false),
    };
    let wake = Arc::new(Wake::default());
    shared.synic.set_drain_trigger(wake.clone());
    for (msr, value) in [
        (msr::SIMP, SIMP_PAGE | 1),
        (msr::SIEFP, SIEFP_PAGE | 1),
        (SINT2, 0xf3),
        (msr::SCONTROL, 1),
    ] {
        shared.synic.write_msr(0, msr, value).unwrap();
    }
    let (messages, consumed) = thread::scope(|scope| {
        let shared = &shared;
        let guest = scope.spawn(|| guest(shared));
        for seed in 0..HOSTS {
            scope.spawn(move || signal_events(shared, seed));
        }
        scope.spawn(|| post_messages(shared, &wake));
        guest.join().unwrap()
    });
    assert!(!shared.lost.load(Ordering::SeqCst), "an interrupt was lost");
    assert_eq!(messages, (0..MESSAGES).collect::<Vec<_>>());
    assert_eq!(consumed.iter().sum::<u64>(), HOSTS as u64 * EVENTS);
    let counters = shared.synic.counters();
    assert_eq!(counters.delivered, u64::from(MESSAGES));
    assert_eq!(
        counters.events + counters.events_merged,
        HOSTS as u64 * EVENTS
    );
    assert_eq!(counters.interrupts, counters.delivered + counters.events);
}

/// Waits until `clock` reaches `time`.
fn wait_for(clock: &AtomicU32, time: u32) {
    let mut spins = 0;
    while clock.load(Ordering::SeqCst) < time {
        spins += 1;
        match spins % 1000 {
            0 => thread::yield_now(),
            _ => std::hint::spin_loop(),
        }
    }
}

#[test]
fn a_slot_freed_while_the_next_message_is_posted_gets_that_message() {
    const ROUNDS: u32 = 6_000;
    let bed = Bed::linux(1, 4);
    let (go, freed) = (AtomicU32::new(0), AtomicU32::new(0));
    let mut stuck = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            // The guest's own accesses are much faster than the host's, so they fall in between.
            let view = bed.ram.view();
            let owner = view.u32(SLOT2).unwrap().writable().unwrap();
            let flags = view.u32(SLOT2 + 4).unwrap();
            for round in 1..=ROUNDS {
                wait_for(&go, round);
                // Sweeps over the steps of the delivery.
                for _ in 0..round % 200 {
                    std::hint::spin_loop();
                }
                owner.swap(0, Ordering::SeqCst);
                if flags.load(Ordering::SeqCst) & 1 << 8 != 0 {
                    bed.eom();
                }
                freed.store(round, Ordering::SeqCst);
            }
        });
        for round in 1..=ROUNDS {
            bed.post(b"first");
            go.store(round, Ordering::SeqCst);
            bed.post(b"second");
            wait_for(&freed, round);
            if bed.slot().2 != b"second" {
                stuck.push(round);
                bed.synic.discard_messages(2);
            }
            bed.consume();
        }
    });
    assert_eq!(stuck, [0; 0]);
}
