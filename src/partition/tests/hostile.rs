//! Virtual CPUs that do everything at once, while the workers run on a thread of their own.
#![forbid(unsafe_code)]

use std::sync::atomic::AtomicU64;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use super::*;

const V5_3: u32 = 0x5_0003;
const V1_4: u32 = 0x1_0004;

/// xorshift64*: the tests need variety, not quality.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[(self.roll() % of.len() as u64) as usize]
    }
}

/// A virtual CPU with a page of its own for hypercall input.
struct Cpu<'a> {
    guest: &'a Guest,
    vp: u32,
    page: u64,
    dice: Dice,
}

impl Cpu<'_> {
    fn step(&mut self) {
        // Messages are rare: the bus is to be in D0 most of the time.
        match self.dice.roll() % 128 {
            0 => self.message(),
            1..40 => self.config(),
            40..80 => self.bar(),
            80..100 => self.retarget(),
            100..120 => self.msr(),
            _ => {
                let _ = self.call(0x1_005d, self.guest.signal);
            }
        }
    }

    fn call(&self, control: u64, rdx: u64) -> Outcome {
        let mut registers = Registers {
            control,
            rdx,
            r8: 0,
        };
        self.guest.partition.hypercall(&mut registers)
    }

    fn config(&mut self) {
        let dice = &mut self.dice;
        self.guest.write::<4>(WINDOW, 0);
        match dice.roll() % 6 {
            0 => self.guest.set_config::<2>(4, dice.pick(&[0, 2, 4, 6])),
            1 => {
                let bar = dice.pick(&[LOW_BAR, WINDOW, HIGH_APERTURE, 0]);
                self.guest.set_config::<2>(4, 0);
                self.guest.set_config::<4>(0x10, bar & 0xffff_ffff);
                self.guest.set_config::<4>(0x14, bar >> 32);
                self.guest.set_config::<2>(4, 6);
            }
            // MSI-X control, then anywhere in the capabilities, MSI among them.
            2 => self
                .guest
                .set_config::<4>(0x40, dice.pick(&[0, 2, 3]) << 30),
            3 => {
                let offset = 0x40 + dice.roll() % 0x30 / 4 * 4;
                self.guest.set_config::<4>(offset, dice.roll());
            }
            _ => {
                let _ = self.guest.config(dice.roll() % 0x100 / 4 * 4);
            }
        }
    }

    fn bar(&mut self) {
        let dice = &mut self.dice;
        match dice.roll() % 5 {
            0 => {
                let entry = MSIX_TABLE + dice.roll() % 8 * 16;
                self.guest.write::<8>(entry, 0xfee0_0000);
                let data_and_mask = (dice.roll() % 4) | ((dice.roll() % 2) << 32);
                self.guest.write::<8>(entry + 8, data_and_mask);
            }
            1 => self.guest.write::<4>(LOW_BAR + 0x60, dice.roll() % 8),
            2 => {
                self.guest
                    .write::<8>(LOW_BAR + 0x18, dice.pick(&[0x3_0000, u64::MAX, 0x8_0000]));
                self.guest
                    .write::<8>(LOW_BAR + 0x20, dice.roll() % 0x2_0000);
                self.guest.write::<4>(LOW_BAR + 0x30, dice.pick(&[1, 2, 3]));
            }
            _ => {
                let _ = self.guest.read::<8>(LOW_BAR + dice.roll() % 0x4000 / 8 * 8);
            }
        }
    }

    fn retarget(&mut self) {
        let mut input = Vec::new();
        let data = (self.dice.roll() % 4) as u32;
        put(&mut input, &[u32::MAX, u32::MAX, 0x1234_ab78, 0, 1, 0]);
        put(&mut input, &[0xfee0_0000, data, 0, 0]);
        let flags = self.dice.pick(&[0, 1]);
        put(&mut input, &[0x40 + data, flags, 1 + data % 3, 0]);
        self.guest.ram.write(self.page, &input).unwrap();
        let _ = self.call(0x7e, self.page);
    }

    fn msr(&mut self) {
        let page = 0x10000 + u64::from(self.vp) * 0x2000;
        let on = u64::from(!self.dice.roll().is_multiple_of(8));
        let (msr, value) = match self.dice.roll() % 64 {
            0 => (0x4000_0083, page | on),
            1 => (0x4000_0082, (page + 0x1000) | on),
            2 => (0x4000_0080, on),
            3 => (0x4000_0092, 0xf3 | (1 - on) << 16),
            4..40 => {
                // Takes the message, as a guest that reads it does.
                let _ = self.guest.ram.store_u32(page + 0x200, 0, Ordering::SeqCst);
                (0x4000_0084, 0)
            }
            _ => (0x4000_0084, 0),
        };
        let partition = &self.guest.partition;
        let _ = partition.write_msr_forwarding(self.vp, msr, value, &mut |_, _| {});
    }

    fn message(&mut self) {
        let mut message = Vec::new();
        let (relid, gpadl) = (1, 0xe1e10);
        match self.dice.roll() % 24 {
            0 => put(&mut message, &[16, 0]),
            1 | 2 => put(&mut message, &[14, 0, V5_3, self.vp, 2, 0, 0, 0, 0, 0]),
            3..6 => put(&mut message, &[3, 0]),
            6..12 => {
                put(
                    &mut message,
                    &[8, 0, relid, gpadl, 1 << 16 | 88, 10 * 4096, 0],
                );
                for pfn in 0x20..0x2au64 {
                    message.extend(pfn.to_le_bytes());
                }
            }
            12..18 => {
                put(&mut message, &[5, 0, relid, 7, gpadl, self.vp, 5]);
                message.resize(148, 0);
            }
            18 => put(&mut message, &[7, 0, relid]),
            19 => put(&mut message, &[11, 0, relid, gpadl]),
            20 => put(&mut message, &[13, 0, relid]),
            _ => put(&mut message, &[22, 0, relid, self.vp]),
        }
        let connection = if message[0] == 14 { 4 } else { 1 };
        let mut input = Vec::new();
        put(&mut input, &[connection, 0, 1, message.len() as u32]);
        input.extend(message);
        input.resize(256, 0);
        self.guest.ram.write(self.page, &input).unwrap();
        let _ = self.call(0x5c, self.page);
    }

    /// Puts a request on the ring, as far as this guest's copy of the indices is right, and makes
    /// room in the other ring.
    fn request(&mut self, out: &GuestRing, inbound: &GuestRing) {
        let mut payload = Vec::new();
        let (kind, rest): (u32, &[u32]) = match self.dice.roll() % 16 {
            0 => match self.dice.roll() % 16 {
                0 => (0x08, &[]),
                1 => (0x11, &[0]),
                _ => (0x05, &[0]),
            },
            1 | 2 => (0x13, &[V1_4]),
            3..6 => (0x07, &[0, WINDOW as u32, 0]),
            6 => (0x16, &[0; 49]),
            7 | 8 => (0x01, &[]),
            9 => (0x04, &[0, 1]),
            10 | 11 => (0x15, &[0, 0, 0, 0xfee0_0000, 0]),
            _ => (0x14, &[0, 1 << 16 | 0x41, 0, 3, 0]),
        };
        put(&mut payload, &[0x4249_0000 + kind]);
        put(&mut payload, rest);
        let completion = self.dice.roll().is_multiple_of(2);
        if let Some(true) = out.send(1, completion, &payload) {
            let _ = self.call(0x1_005d, self.guest.signal);
        }
        inbound.store(4, inbound.load(0));
        let _ = self.call(0x1_005d, self.guest.signal);
    }
}

/// Steps of each virtual CPU.
const STEPS: usize = 5000;

/// Three virtual CPUs and the workers, until the former have made their steps.
fn storm(guest: &Guest) {
    let running = AtomicU64::new(3);
    thread::scope(|scope| {
        for index in 0..3 {
            let running = &running;
            scope.spawn(move || {
                let mut cpu = Cpu {
                    guest,
                    vp: index % 2,
                    page: 0x6000 + u64::from(index) * 0x1000,
                    dice: Dice(0x9e37_79b9 + u64::from(index)),
                };
                let (out, inbound) = guest.rings.as_ref().unwrap();
                for _ in 0..STEPS {
                    match index {
                        0 => cpu.request(out, inbound),
                        _ => cpu.step(),
                    }
                }
                running.fetch_sub(1, Ordering::Relaxed);
            });
        }
        while running.load(Ordering::Relaxed) != 0 {
            guest.host.run();
        }
    });
}

#[test]
fn after_a_storm_from_all_sides_nobody_hangs_and_a_reset_brings_the_main_job_back() {
    let (done, ended) = channel();
    thread::spawn(move || {
        let (mut guest, _) = main_job(V5_3, V1_4);
        storm(&guest);
        guest.host.run();
        guest.partition.reset();
        let bus = guest.partition.buses().remove(0);
        assert!(!bus.open && bus.window.is_none());
        let function = &bus.functions[0];
        assert_eq!((function.live_messages, function.bars), (0, [None; 6]));
        guest.main_job(V5_3, V1_4);
        done.send(()).unwrap();
    });
    // Far more than it takes, even on a machine that is busy with something else.
    ended
        .recv_timeout(Duration::from_secs(600))
        .expect("a virtual CPU or a worker hangs or has panicked");
}

#[test]
fn a_dropped_partition_frees_its_devices_whatever_the_guest_had_mapped() {
    let (guest, _) = main_job(V5_3, V1_4);
    let Guest {
        partition,
        host,
        device,
        ..
    } = guest;
    drop(device);
    let bus = &partition.buses()[0];
    assert!(bus.open && bus.window.is_some() && bus.functions[0].bars[0].is_some());
    drop(partition);
    for (_, worker) in &*host.workers.lock().unwrap() {
        let alive = worker.upgrade().map(|worker| worker.name());
        assert_eq!(alive, None);
    }
}
