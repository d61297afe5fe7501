//! A driver that does everything right.
#![forbid(unsafe_code)]

use std::os::unix::fs::FileExt;

use super::check::u16_at;
use super::{BUS, DATA, Descriptor, Driver, NEXT, Queue, RING_STRIDE, SECTOR, WRITE, register};

impl Driver {
    /// Resets a device.
    ///
    /// # Panics
    ///
    /// If it is not at rest then.
    pub fn reset(&mut self, function: u8) {
        self.write(function, register::STATUS, 1, 0);
        let number = usize::from(function % 2);
        // Only a BAR that is where the guest believes it has heard of it.
        if self.read(function, register::STATUS, 1) == 0 {
            let state = &self.states()[number];
            assert_eq!(state.status, 0);
            for queue in &state.queues {
                assert!(!queue.enabled && queue.next_avail == 0 && queue.next_used == 0);
            }
        }
    }

    /// Both devices anew, with empty rings and what they offer of `features`.
    pub fn restart(&mut self, features: u64) {
        self.map_all();
        for function in [0, 1] {
            self.command(function, 0);
        }
        for function in [0, 1] {
            self.guest.place(BUS, function);
            self.start(function, features);
        }
        self.clean = true;
    }

    fn start(&mut self, function: u8, wanted: u64) {
        use register as reg;
        self.reset(function);
        assert_eq!(self.read(function, reg::STATUS, 1), 0);
        self.write(function, reg::STATUS, 1, 1);
        self.write(function, reg::STATUS, 1, 3);
        for word in [0, 1] {
            self.write(function, reg::DEVICE_FEATURE_SELECT, 4, word);
            self.write(function, reg::DRIVER_FEATURE_SELECT, 4, word);
            let offered = self.read(function, reg::DEVICE_FEATURE, 4);
            // Those of the transport, in the upper word, are not to be refused.
            let taken = if word == 0 { offered & wanted } else { offered };
            self.write(function, reg::DRIVER_FEATURE, 4, taken);
        }
        self.write(function, reg::STATUS, 1, 0xb);
        assert_eq!(self.read(function, reg::STATUS, 1), 0xb);
        self.write(function, reg::CONFIG_VECTOR, 2, 0);
        let queues = Queue::all().into_iter();
        for queue in queues.filter(|queue| queue.function() == function) {
            let [first, ..] = queue.areas();
            self.ram().fill(first, RING_STRIDE, 0).expect("RAM");
            self.write(function, reg::QUEUE_SELECT, 2, queue.index().into());
            self.write(function, reg::QUEUE_SIZE, 2, queue.size().into());
            self.write(function, reg::QUEUE_VECTOR, 2, 0);
            for (offset, gpa) in reg::QUEUE_AREAS.into_iter().zip(queue.areas()) {
                self.write(function, offset, 8, self.seen(function, gpa));
            }
            self.write(function, reg::QUEUE_ENABLE, 2, 1);
        }
        self.write(function, reg::STATUS, 1, 0xf);
        assert_eq!(self.read(function, reg::STATUS, 1), 0xf);
    }

    /// Sends a chain of buffers (GPA, bytes, whether the device writes) to a queue that is empty:
    /// the used length.
    fn exchange(&mut self, queue: Queue, buffers: &[(u64, u32, bool)]) -> u32 {
        let before = self.available(queue);
        for (index, (gpa, len, write)) in (0..).zip(buffers) {
            let more = usize::from(index) + 1 < buffers.len();
            let descriptor = Descriptor {
                address: self.seen(queue.function(), *gpa),
                len: *len,
                flags: if more { NEXT } else { 0 } | if *write { WRITE } else { 0 },
                next: index + 1,
            };
            self.describe(queue, false, index, descriptor);
        }
        self.offer(queue, 0);
        self.kick(queue);
        self.settle();
        let used = self.rings(queue).1;
        assert_eq!(u16_at(&used, 2), before.wrapping_add(1), "not answered");
        let at = 4 + 8 * usize::from(before % queue.size());
        assert_eq!(u16_at(&used, at), 0, "another head");
        u32::from(u16_at(&used, at + 4)) | u32::from(u16_at(&used, at + 6)) << 16
    }

    /// A request to the disk: its status.
    fn disk(&mut self, queue: Queue, kind: u8, sector: u8) -> u8 {
        let mut header = [0; 16];
        header[0] = kind;
        header[8] = sector;
        self.ram().write(queue.header(), &header).expect("RAM");
        let status = queue.header() + 16;
        self.ram().write(status, &[0xff]).expect("RAM");
        let data = (DATA, SECTOR as u32, kind == 0);
        self.exchange(
            queue,
            &[(queue.header(), 16, false), data, (status, 1, true)],
        );
        let mut bytes = [0];
        self.ram().read(status, &mut bytes).expect("RAM");
        bytes[0]
    }

    fn works(&mut self) {
        let mut sector = vec![0; SECTOR];
        if self.sectors > 1 {
            for queue in [0, 1].map(Queue::new) {
                let byte = 0xd0 | queue.index() as u8;
                self.ram().fill(DATA, SECTOR as u64, byte).expect("RAM");
                let expected = u8::from(self.shape.readonly);
                assert_eq!(self.disk(queue, 1, 1), expected, "status of a write");
                self.ram().fill(DATA, SECTOR as u64, 0).expect("RAM");
                assert_eq!(self.disk(queue, 0, 1), 0, "status of a read");
                self.ram().read(DATA, &mut sector).expect("RAM");
                let mut there = vec![0; SECTOR];
                let at = SECTOR as u64;
                self.image.read_exact_at(&mut there, at).expect("a sector");
                assert!(sector == there, "not what the image has");
                assert!(self.shape.readonly || sector[0] == byte, "not written");
            }
        }
        self.ram().fill(DATA, SECTOR as u64, 0).expect("RAM");
        let len = self.exchange(Queue::new(2), &[(DATA, 64, true)]);
        assert_eq!(len, 64);
        self.ram().read(DATA, &mut sector).expect("RAM");
        assert!(sector[..64].iter().any(|byte| *byte != 0), "no entropy");
        assert!(sector[64..].iter().all(|byte| *byte == 0), "too much of it");
    }

    /// After anything at all: the image is what the guest could make of it, the devices serve a
    /// guest that resets them, or one whose machine was reset, and leave nothing behind.
    ///
    /// # Panics
    ///
    /// If it is not so.
    pub fn works_again(mut self, machine: bool) {
        self.settle();
        self.check_image();
        if machine {
            self.guest.reset();
            self.attached = [false; 2];
            self.make_domain();
        } else {
            for function in [0, 1] {
                self.move_to(function, true);
            }
        }
        self.restart(u64::MAX);
        self.works();
        self.guest.machine.drop_all();
    }
}
