//! What must hold whenever a worker has run. The guest does nothing meanwhile, so that the rings are
//! as they were but for what the worker did.
#![forbid(unsafe_code)]

use std::os::unix::fs::FileExt;

use vm_vpci::devices::virtio::{MAX_RNG_REQUEST, VirtioQueueState, VirtioState};

use super::{ARENA, Driver, MARK, PAGE, Queue, SECTOR, contents};

/// Status bit: the device needs a reset.
const NEEDS_RESET: u8 = 0x40;
/// Steps after which workers are taken for a loop without an end.
const MOST_STEPS: usize = 20_000;

/// A queue before a worker runs.
#[derive(Debug)]
struct Look {
    state: VirtioQueueState,
    /// Available and used ring, if it is certain that nothing but the queue itself writes them.
    rings: Option<(Vec<u8>, Vec<u8>)>,
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

impl Driver {
    /// The state of both devices.
    pub(super) fn states(&self) -> [VirtioState; 2] {
        let machine = &self.guest.machine;
        let disk = machine.disk.as_ref().expect("a disk").save();
        let entropy = machine.entropy.as_ref().expect("entropy").save();
        let at_rest = "no worker runs";
        [disk.expect(at_rest).virtio, entropy.expect(at_rest)]
    }

    fn look(&self) -> [Look; 3] {
        let states = self.states();
        Queue::all().map(|queue| {
            let function = queue.function();
            let state = states[usize::from(function)].queues[usize::from(queue.index())];
            let home = queue.areas().map(|gpa| self.seen(function, gpa));
            let at_home = [state.desc, state.driver, state.device] == home[..3];
            let rings = (self.clean && at_home).then(|| self.rings(queue));
            Look { state, rings }
        })
    }

    pub(super) fn rings(&self, queue: Queue) -> (Vec<u8>, Vec<u8>) {
        let [_, available, used, _] = queue.areas();
        let mut rings = (vec![0; 6 + 2 * 256], vec![0; 6 + 8 * 256]);
        self.ram().read(available, &mut rings.0).expect("RAM");
        self.ram().read(used, &mut rings.1).expect("RAM");
        rings
    }

    /// Pages that the devices cannot write now.
    fn guarded(&self) -> Vec<(u64, Vec<u8>)> {
        if self.attached != [true; 2] {
            return Vec::new();
        }
        let pages = (0..64).filter(|page| self.protected >> page & 1 != 0);
        let pages = pages.map(|page| {
            let gpa = ARENA + page * PAGE;
            let mut bytes = vec![0; PAGE as usize];
            self.ram().read(gpa, &mut bytes).expect("RAM");
            (gpa, bytes)
        });
        pages.collect()
    }

    /// One step of a worker. False if none has anything to do.
    ///
    /// # Panics
    ///
    /// If it takes or returns other chains than those that are available, or writes to pages that
    /// the domain does not let it write.
    pub fn step(&self, first: usize) -> bool {
        let (before, guarded) = (self.look(), self.guarded());
        if !self.guest.machine.workers.step(first) {
            return false;
        }
        for (gpa, bytes) in guarded {
            let mut now = vec![0; bytes.len()];
            self.ram().read(gpa, &mut now).expect("RAM");
            assert!(now == bytes, "written without leave: {gpa:#x}");
        }
        let states = self.states();
        for (queue, look) in Queue::all().into_iter().zip(before) {
            self.check_queue(queue, &look, &states[usize::from(queue.function())]);
        }
        true
    }

    fn check_queue(&self, queue: Queue, before: &Look, now: &VirtioState) {
        let (was, is) = (before.state, now.queues[usize::from(queue.index())]);
        let shape = |state| VirtioQueueState {
            next_avail: 0,
            next_used: 0,
            ..state
        };
        assert_eq!(shape(was), shape(is), "a worker changed {queue:?}");
        let taken = is.next_avail.wrapping_sub(was.next_avail);
        let returned = is.next_used.wrapping_sub(was.next_used);
        let broke = now.status & NEEDS_RESET != 0;
        assert!(
            returned == taken || broke && returned + 1 == taken,
            "{queue:?}: {taken} taken, {returned} returned, status {:#x}",
            now.status
        );
        let Some((available, used)) = &before.rings else {
            return;
        };
        let there = u16_at(available, 2).wrapping_sub(was.next_avail);
        assert!(taken <= there, "{queue:?}: {taken} taken of {there}");
        let mut expected = used.clone();
        let now = self.rings(queue).1;
        for count in 0..returned {
            let slot = |next: u16| usize::from(next.wrapping_add(count) % was.size);
            let head = u16_at(available, 4 + 2 * slot(was.next_avail));
            let at = 4 + 8 * slot(was.next_used);
            expected[at..at + 4].copy_from_slice(&u32::from(head).to_le_bytes());
            // The length is the device's to say, within reason.
            expected[at + 4..at + 8].copy_from_slice(&now[at + 4..at + 8]);
            let len = u16_at(&now, at + 4);
            let too_long = usize::from(len) > MAX_RNG_REQUEST || u16_at(&now, at + 6) != 0;
            assert!(!queue.is_entropy() || !too_long);
        }
        if returned != 0 {
            expected[2..4].copy_from_slice(&is.next_used.to_le_bytes());
        }
        // What the device says of notifications: the flags, or an index behind the entries.
        let event = 4 + 8 * usize::from(was.size);
        expected[..2].copy_from_slice(&now[..2]);
        expected[event..event + 2].copy_from_slice(&now[event..event + 2]);
        assert!(
            expected == now,
            "{queue:?}: the used ring has more than was returned: {was:x?}, {is:x?}"
        );
    }

    /// Runs all workers until none has anything to do.
    ///
    /// # Panics
    ///
    /// As [`Driver::step`], or if they do not come to rest.
    pub fn settle(&self) {
        for first in 0..MOST_STEPS {
            if !self.step(first) {
                return;
            }
        }
        panic!("the workers do not come to rest");
    }

    /// Saves the machine and its devices, and goes on with what was restored.
    ///
    /// # Panics
    ///
    /// If a device is not as it was saved.
    pub fn migrate(&mut self) {
        let machine = &self.guest.machine;
        let disk = machine.disk.as_ref().expect("a disk").save();
        let entropy = machine.entropy.as_ref().expect("entropy").save();
        self.guest.migrate();
        let machine = &self.guest.machine;
        let at_rest = "no worker runs";
        let (disk, entropy) = (disk.expect(at_rest), entropy.expect(at_rest));
        let (new_disk, new_entropy) = (&machine.disk, &machine.entropy);
        let new_disk = new_disk.as_ref().expect("a disk");
        let new_entropy = new_entropy.as_ref().expect("entropy");
        let taken = "taken as it was saved";
        new_disk.restore(&disk).expect(taken);
        new_entropy.restore(&entropy).expect(taken);
        assert_eq!(new_disk.save().expect(at_rest), disk);
        assert_eq!(new_entropy.save().expect(at_rest), entropy);
    }

    /// The image is what the guest may have made of it.
    ///
    /// # Panics
    ///
    /// If it grew, was written although it is read-only, or has what the domain hides.
    pub(super) fn check_image(&self) {
        let mut bytes = vec![0; SECTOR * 64];
        let len = self.image.read_at(&mut bytes, 0).expect("an image");
        assert_eq!(
            len as u64,
            self.sectors * SECTOR as u64,
            "size of the image"
        );
        if self.shape.readonly {
            assert!(bytes[..len] == contents(), "written although read-only");
        }
        if self.shape.paged && !self.was_free {
            let leaked = bytes.windows(MARK.len()).any(|bytes| bytes == MARK);
            assert!(!leaked, "read without leave");
        }
    }
}
