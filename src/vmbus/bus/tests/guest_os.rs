//! What a guest kernel does around the bus: SynIC set-up, messages, events.
#![forbid(unsafe_code)]

use zerocopy::IntoBytes;

use super::*;
use crate::hv::msr;
use crate::hv::vmbus::guest::{GpadlHeader, InitiateContact, OpenChannel};
use crate::mem::PAGE_SIZE;
use crate::synic::{SynicConfig, UserSynic};

const PAGES: u64 = 64;
/// Pages of the channel's rings.
pub(super) const TO_HOST: [u64; 4] = [20, 25, 21, 23];
const TO_GUEST: [u64; 4] = [30, 31, 32, 40];
const GPADL: u32 = 0x10;

fn message(number: u32, body: &[u8]) -> Vec<u8> {
    [[number, 0].as_bytes(), body].concat()
}

pub(super) fn words(number: u32, words: &[u32]) -> Vec<u8> {
    message(number, words.as_bytes())
}

pub(super) fn contact(version: Version, vp: u32) -> Vec<u8> {
    let contact = InitiateContact {
        version: version.0,
        target_vp: vp,
        sint: 2,
        vtl: 0,
        reserved: 0,
        features: 0,
        monitor_to_guest: 0x1000,
        monitor_to_host: 0x2000,
    };
    message(t::INITIATE_CONTACT, contact.as_bytes())
}

pub(super) fn open(relid: u32, vp: u32) -> Vec<u8> {
    let open = OpenChannel {
        relid,
        open_id: GPADL,
        ring_gpadl: GPADL,
        target_vp: vp,
        downstream_page: TO_HOST.len() as u32,
        user_data: [0; 120],
    };
    message(t::OPEN_CHANNEL, open.as_bytes())
}

/// A VM of two VPs, its SynIC set up as Linux does.
pub(super) struct Guest {
    pub(super) ram: GuestRam,
    pub(super) synic: Arc<UserSynic>,
    pub(super) host: Loop,
    pub(super) bus: Arc<VmBus>,
    pub(super) interrupts: Arc<Interrupts>,
}

fn simp(vp: u32) -> u64 {
    0x4000 + u64::from(vp) * 0x2000
}

fn siefp(vp: u32) -> u64 {
    0x5000 + u64::from(vp) * 0x2000
}

impl Guest {
    pub(super) fn new(queue_limit: usize) -> Self {
        let ram = ram(PAGES);
        let interrupts = Arc::new(Interrupts::default());
        let config = SynicConfig {
            apic_ids: [0, 1].into(),
            queue_limit,
        };
        let synic = UserSynic::new(&config, ram.clone(), interrupts.clone());
        let synic = Arc::new(synic);
        for vp in 0..2 {
            for (msr, value) in [
                (msr::SIMP, simp(vp) | 1),
                (msr::SIEFP, siefp(vp) | 1),
                (msr::SINT0 + 2, 0xf3),
                (msr::SCONTROL, 1),
            ] {
                synic.write_msr(vp, msr, value).unwrap();
            }
        }
        let host = Loop::default();
        let config = VmBusConfig { limits: limits() };
        let bus = VmBus::new(config, ram.clone(), synic.clone(), &host).unwrap();
        Self {
            ram,
            synic,
            host,
            bus,
            interrupts,
        }
    }

    pub(super) fn post_only(&self, bytes: &[u8]) {
        self.bus.post_message(4, 1, bytes).unwrap();
    }

    /// Posts a message and lets the worker run.
    pub(super) fn post(&self, bytes: &[u8]) {
        self.post_only(bytes);
        self.host.run();
    }

    /// Takes all messages for a VP (Linux `vmbus_on_msg_dpc`), and lets the worker run as slots
    /// become free.
    pub(super) fn messages_of(&self, vp: u32) -> Vec<Vec<u8>> {
        let slot = simp(vp) + 0x200;
        let mut messages = Vec::new();
        while self.ram.load_u32(slot, Ordering::Acquire).unwrap() == 1 {
            let mut bytes = [0; 256];
            self.ram.read(slot, &mut bytes).unwrap();
            messages.push(bytes[16..16 + usize::from(bytes[4])].to_vec());
            self.ram.store_u32(slot, 0, Ordering::SeqCst).unwrap();
            std::sync::atomic::fence(Ordering::SeqCst);
            let flags = self.ram.load_u32(slot + 4, Ordering::SeqCst).unwrap();
            if flags & 0x100 != 0 {
                self.synic.write_msr(vp, msr::EOM, 0).unwrap();
            }
            self.host.run();
        }
        messages
    }

    pub(super) fn messages(&self) -> Vec<Vec<u8>> {
        self.messages_of(1)
    }

    /// Takes a channel's event flag.
    pub(super) fn take_event(&self, vp: u32, relid: u32) -> bool {
        let word = siefp(vp) + 0x200 + u64::from(relid / 32 * 4);
        let flags = self.ram.load_u32(word, Ordering::SeqCst).unwrap();
        let rest = flags & !(1 << (relid % 32));
        self.ram.store_u32(word, rest, Ordering::SeqCst).unwrap();
        flags != rest
    }

    /// Connects with messages on VP 1, and returns the relids of the offers.
    pub(super) fn connect(&self, version: Version) -> Vec<u32> {
        let interrupts = self.interrupts.0[1].load(Ordering::SeqCst);
        self.post(&contact(version, 1));
        let answer = self.messages();
        assert_eq!((answer[0][0], answer[0][8]), (15, 1), "VERSION_RESPONSE");
        assert!(self.interrupts.0[1].load(Ordering::SeqCst) > interrupts);
        self.post(&words(t::REQUEST_OFFERS, &[]));
        let mut offers = self.messages();
        assert_eq!(offers.pop(), Some(words(t::ALL_OFFERS_DELIVERED, &[])));
        let relid = |offer: &Vec<u8>| u32::from_le_bytes(offer[184..188].try_into().unwrap());
        offers.iter().map(relid).collect()
    }

    /// Creates the GPADL, then sets up the rings, then opens, and returns the answer to that.
    pub(super) fn try_open(&self, relid: u32, vp: u32) -> Vec<Vec<u8>> {
        for pfn in TO_HOST.iter().chain(&TO_GUEST) {
            self.ram.fill(pfn * PAGE_SIZE, PAGE_SIZE, 0xff).unwrap();
        }
        let pfns = [TO_HOST, TO_GUEST].concat();
        let header = GpadlHeader {
            relid,
            gpadl: GPADL,
            range_len: 8 + 8 * pfns.len() as u16,
            range_count: 1,
        };
        let range = [pfns.len() as u32 * 4096, 0];
        let body = [header.as_bytes(), range.as_bytes(), pfns.as_bytes()].concat();
        self.post(&message(t::GPADL_HEADER, &body));
        let created = words(t::GPADL_CREATED, &[relid, GPADL, 0]);
        assert_eq!(self.messages(), [created]);
        for pfns in [TO_HOST, TO_GUEST] {
            GuestRing::new(&self.ram, &pfns);
        }
        self.post(&open(relid, vp));
        self.messages()
    }

    /// Opens a channel and returns its rings: to the host, to the guest.
    pub(super) fn open(&self, relid: u32, vp: u32) -> (GuestRing, GuestRing) {
        let result = words(t::OPEN_CHANNEL_RESULT, &[relid, GPADL, 0]);
        assert_eq!(self.try_open(relid, vp), [result]);
        (
            GuestRing::attach(&self.ram, &TO_HOST),
            GuestRing::attach(&self.ram, &TO_GUEST),
        )
    }

    /// All of guest memory.
    pub(super) fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; (PAGES * PAGE_SIZE) as usize];
        self.ram.read(0, &mut bytes).unwrap();
        bytes
    }
}
