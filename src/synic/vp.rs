//! The SynIC of one VP: registers, message queue, delivery. No locks; the caller holds the VP's.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use zerocopy::IntoBytes;

use crate::hv::msr;
use crate::hv::synic::{
    EVENT_FLAGS, MAX_PAYLOAD, MESSAGE_NONE, MESSAGE_PENDING, MESSAGE_SIZE_FLAGS_OFFSET,
    MESSAGE_TYPE_OFFSET, MessageBody, SINT_COUNT, SLOT_SIZE, Sint,
};
use crate::mem::{GuestRam, MemError, PAGE_SIZE};
use crate::msr::{ForwardMsr, GpFault};
use crate::vmm::{Msi, MsiSink};

use super::{SintLines, SynicCounters, SynicError};

/// Queue slots that an empty queue keeps allocated.
const KEPT_CAPACITY: usize = 16;

/// A message that waits for its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) sint: u8,
    pub(super) message_type: u32,
    len: u8,
    payload: [u8; MAX_PAYLOAD],
}

impl Message {
    /// `None` if a part is out of range.
    pub(super) fn new(sint: u8, message_type: u32, payload: &[u8]) -> Option<Self> {
        let valid = usize::from(sint) < SINT_COUNT && message_type != MESSAGE_NONE;
        let mut padded = [0; MAX_PAYLOAD];
        padded.get_mut(..payload.len())?.copy_from_slice(payload);
        valid.then_some(Self {
            sint,
            message_type,
            len: payload.len() as u8,
            payload: padded,
        })
    }

    pub(super) fn payload(&self) -> &[u8] {
        &self.payload[..usize::from(self.len)]
    }
}

/// What delivery needs besides the VP itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fabric<'a> {
    pub(super) ram: &'a GuestRam,
    pub(super) sink: &'a dyn MsiSink,
    /// Lines of the host's kernel, where it has a SynIC.
    pub(super) lines: Option<&'a dyn SintLines>,
    /// Index of the VP.
    pub(super) vp: u32,
}

/// Registers and queue of one VP.
#[derive(Debug)]
pub(super) struct VpSynic {
    pub(super) apic_id: u32,
    pub(super) scontrol: u64,
    pub(super) siefp: u64,
    pub(super) simp: u64,
    pub(super) sints: [Sint; SINT_COUNT],
    /// One queue for all SINTs: messages of a VP stay in order.
    pub(super) queue: VecDeque<Message>,
    /// A message was refused since the queue last had room.
    pub(super) refused: bool,
    pub(super) counters: SynicCounters,
}

impl VpSynic {
    /// Registers at their reset values, empty queue.
    pub(super) fn new(apic_id: u32) -> Self {
        Self {
            apic_id,
            scontrol: 0,
            siefp: 0,
            simp: 0,
            sints: [Sint::RESET; SINT_COUNT],
            queue: VecDeque::new(),
            refused: false,
            counters: SynicCounters::default(),
        }
    }

    /// Back to [`VpSynic::new`], except for the counters.
    pub(super) fn reset(&mut self) {
        let counters = self.counters;
        *self = Self::new(self.apic_id);
        self.counters = counters;
    }

    pub(super) fn read_msr(&self, number: u32) -> Result<u64, GpFault> {
        match number {
            msr::SCONTROL => Ok(self.scontrol),
            msr::SVERSION => Ok(msr::SYNIC_VERSION),
            msr::SIEFP => Ok(self.siefp),
            msr::SIMP => Ok(self.simp),
            msr::EOM => Ok(0),
            msr::SINT0..=msr::SINT15 => Ok(self.sints[(number - msr::SINT0) as usize].0),
            _ => Err(GpFault),
        }
    }

    /// Writes a register, and the host's copy of it by `forward`, and then delivers what has become
    /// deliverable. Bits that no rule is about are kept as written: guests read, modify and write
    /// them.
    pub(super) fn write_msr(
        &mut self,
        number: u32,
        value: u64,
        fabric: Fabric<'_>,
        forward: ForwardMsr<'_>,
    ) -> Result<(), GpFault> {
        match number {
            msr::SCONTROL => self.scontrol = value,
            msr::SIEFP => {
                prepare_page(self.siefp, value, fabric.ram)?;
                self.siefp = value;
            }
            msr::SIMP => {
                prepare_page(self.simp, value, fabric.ram)?;
                self.simp = value;
            }
            msr::EOM if mutant!("synic-eom-lost") => return Ok(()),
            msr::EOM => {}
            msr::SINT0..=msr::SINT15 => {
                let sint = Sint(value);
                if !sint_is_valid(sint) {
                    return Err(GpFault);
                }
                self.sints[(number - msr::SINT0) as usize] = sint;
            }
            _ => return Err(GpFault),
        }
        // Before anything is raised: a line that the host still holds masked loses its interrupt
        // (docs/spec/kvm.md#kvm-7-2).
        forward(number, value);
        self.deliver(fabric);
        Ok(())
    }

    /// All registers that have a copy in the host, in an order in which they can be written.
    pub(super) fn forwarded(&self) -> impl Iterator<Item = (u32, u64)> {
        let sints = (msr::SINT0..).zip(self.sints.map(|sint| sint.0));
        let pages = [(msr::SIEFP, self.siefp), (msr::SIMP, self.simp)];
        let control = [(msr::SCONTROL, self.scontrol)];
        pages.into_iter().chain(sints).chain(control)
    }

    /// Queues a message and tries to deliver.
    pub(super) fn post(
        &mut self,
        limit: usize,
        message: Message,
        fabric: Fabric<'_>,
    ) -> Result<(), SynicError> {
        if self.queue.len() >= limit && !mutant!("synic-queue-unlimited") {
            self.refused = true;
            self.counters.queue_full += 1;
            return Err(SynicError::QueueFull { vp: fabric.vp });
        }
        self.queue.push_back(message);
        self.counters.posted += 1;
        self.deliver(fabric);
        Ok(())
    }

    /// Sets an event flag, and raises the SINT if the flag was clear. False if the VP takes no
    /// events.
    pub(super) fn signal(&mut self, sint: u8, flag: u16, fabric: Fabric<'_>) -> bool {
        debug_assert!(flag < EVENT_FLAGS);
        let source = self.sints[usize::from(sint)];
        let enabled = self.scontrol & msr::SCONTROL_ENABLE != 0;
        let page = page(self.siefp)
            .filter(|_| (enabled || mutant!("synic-events-while-off")) && !source.is_masked());
        let former = page.and_then(|page| {
            let word = page + u64::from(sint) * SLOT_SIZE + u64::from(flag / 32) * 4;
            // Orders all that the event announces before the flag.
            let set = fabric
                .ram
                .fetch_or_u32(word, 1 << (flag % 32), Ordering::SeqCst);
            set.ok()
        });
        let Some(former) = former else {
            self.counters.events_refused += 1;
            return false;
        };
        if former & 1 << (flag % 32) != 0 && !mutant!("synic-event-raised-again") {
            self.counters.events_merged += 1;
            return true;
        }
        self.counters.events += 1;
        self.raise(sint, fabric);
        true
    }

    /// Drops the queued messages of a SINT, and delivers what they held up.
    pub(super) fn discard(&mut self, sint: u8, fabric: Fabric<'_>) {
        let before = self.queue.len();
        self.queue.retain(|message| message.sint != sint);
        self.counters.discarded += (before - self.queue.len()) as u64;
        self.deliver(fabric);
        self.release_memory();
    }

    /// True once after a refused message, as soon as the queue has room for it.
    pub(super) fn take_drained(&mut self, limit: usize) -> bool {
        self.refused && self.queue.len() < limit && std::mem::take(&mut self.refused)
    }

    /// Moves messages from the queue to their slots, in order, as far as slots are free
    /// (docs/spec/hyperv-guest-interface.md, section 6.1).
    fn deliver(&mut self, fabric: Fabric<'_>) {
        if self.scontrol & msr::SCONTROL_ENABLE == 0 {
            return;
        }
        let Some(page) = page(self.simp) else {
            return;
        };
        while let Some(message) = self.queue.front() {
            let sint = message.sint;
            // An error means that the page is no longer RAM: the message waits for a better page.
            if !matches!(fill_slot(page, message, fabric.ram), Ok(true)) {
                return;
            }
            self.queue.pop_front();
            self.counters.delivered += 1;
            self.raise(sint, fabric);
        }
        self.release_memory();
    }

    /// Raises a SINT's vector as an edge, unless that is masked or polled: on the host's own line
    /// of the SINT, where it has one, else as an MSI.
    fn raise(&mut self, sint: u8, fabric: Fabric<'_>) {
        let source = self.sints[usize::from(sint)];
        let masked = source.is_masked() && !mutant!("synic-masked-sint-raises");
        let polling = source.is_polling() && !mutant!("synic-polled-sint-raises");
        if masked || polling {
            return;
        }
        self.counters.interrupts += 1;
        let raised = fabric
            .lines
            .is_some_and(|lines| lines.raise(fabric.vp, sint));
        if !raised {
            fabric
                .sink
                .raise_msi(Msi::fixed(self.apic_id, source.vector()));
        }
    }

    /// Gives back the memory of a burst.
    fn release_memory(&mut self) {
        if self.queue.is_empty() && self.queue.capacity() > KEPT_CAPACITY {
            self.queue.shrink_to(KEPT_CAPACITY);
        }
    }
}

/// True if a guest may write this value to a SINT: an unmasked vector below 16 faults.
pub(super) fn sint_is_valid(sint: Sint) -> bool {
    sint.is_masked() || sint.vector() >= 16 || mutant!("synic-low-vector")
}

/// Address of the page that SIEFP or SIMP puts in force.
fn page(register: u64) -> Option<u64> {
    (register & msr::PAGE_ENABLE != 0).then_some(register & msr::PAGE_ADDRESS)
}

/// True if SIEFP or SIMP may hold `register`: the page is off, or it is RAM that can
/// be written.
pub(super) fn page_is_valid(register: u64, ram: &GuestRam) -> bool {
    page(register).is_none_or(|page| ram.is_writable(page, PAGE_SIZE))
}

/// Zeroes the page on enable and on move, as the overlay that it stands for would be: stale RAM
/// looks like an occupied slot. Faults, with memory unchanged, if the page is not RAM that can be
/// written.
fn prepare_page(old: u64, new: u64, ram: &GuestRam) -> Result<(), GpFault> {
    match page(new) {
        Some(gpa) if page(old) != Some(gpa) && !mutant!("synic-page-not-cleared") => {
            ram.fill(gpa, PAGE_SIZE, 0).map_err(|_| GpFault)
        }
        Some(gpa) if !ram.is_writable(gpa, PAGE_SIZE) => Err(GpFault),
        _ => Ok(()),
    }
}

/// Writes a message to its slot. False if the slot is occupied; the guest then knows that another
/// message is pending, and will write EOM.
fn fill_slot(page: u64, message: &Message, ram: &GuestRam) -> Result<bool, MemError> {
    let slot = page + u64::from(message.sint) * SLOT_SIZE;
    let owner = slot + MESSAGE_TYPE_OFFSET;
    if ram.load_u32(owner, Ordering::SeqCst)? != MESSAGE_NONE {
        let flags = slot + MESSAGE_SIZE_FLAGS_OFFSET;
        let pending = mutant!("synic-no-pending-flag", 0, MESSAGE_PENDING);
        ram.fetch_or_u32(flags, pending, Ordering::SeqCst)?;
        // The guest frees the slot and then reads the flag; this stores the flag and then reads the
        // slot. One of the two sees the other.
        if ram.load_u32(owner, Ordering::SeqCst)? != MESSAGE_NONE
            && !mutant!("synic-slot-overwritten")
        {
            return Ok(false);
        }
    }
    let body = MessageBody {
        payload_size: message.len,
        flags: 0,
        reserved: 0,
        sender: 0,
        payload: message.payload,
    };
    ram.write(slot + MESSAGE_SIZE_FLAGS_OFFSET, body.as_bytes())?;
    ram.store_u32(owner, message.message_type, Ordering::Release)?;
    Ok(true)
}
