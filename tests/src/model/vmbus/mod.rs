//! The guest's side of VMBus (docs/spec/vmbus.md).
#![forbid(unsafe_code)]

mod channel;
mod messages;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use uuid::Uuid;

use super::kernel::{Kernel, VMBUS_SINT, status};
use super::ring::Ring;
use super::vm::{PAGE, Vm};
use super::wire::{Bytes, u32_at};
use crate::check::{Failure, equal};

pub use channel::Channel;
pub use messages::{Contact, Offer, Open, VersionResponse, is_dedicated, message};

/// Versions that the host must know, newest first, as Linux 7.3 tries them.
pub const VERSIONS: [u32; 7] = [
    0x6_0000, 0x5_0003, 0x5_0002, 0x5_0001, 0x5_0000, 0x4_0001, 0x4_0000,
];
/// 5.0.
pub const V5_0: u32 = 0x5_0000;
/// Class GUID of a virtual PCI bus (docs/spec/vpci.md, section 1).
pub const VPCI_CLASS: Uuid = uuid::uuid!("44c4f61d-4444-4400-9d52-802e27ede19f");
/// First GPADL id of Linux.
const FIRST_GPADL: u32 = 0xe1e10;
/// Tries of a message that the host has no room for.
const TRIES: usize = 100;

#[derive(Debug)]
struct Inner {
    kernel: Kernel,
    /// VP that posts messages and to which the host's go.
    vp: u32,
    version: AtomicU32,
    connection: AtomicU32,
    next_gpadl: AtomicU32,
}

/// A guest's VMBus driver.
#[derive(Debug, Clone)]
pub struct VmBus(Arc<Inner>);

impl VmBus {
    /// A driver that has not made contact, whose messages go to `vp`.
    pub fn new(kernel: &Kernel, vp: u32) -> Self {
        Self(Arc::new(Inner {
            kernel: kernel.clone(),
            vp,
            version: AtomicU32::new(0),
            connection: AtomicU32::new(1),
            next_gpadl: AtomicU32::new(FIRST_GPADL),
        }))
    }

    /// A driver in contact at the newest version, on VP 0.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the host refuses.
    pub fn connect(kernel: &Kernel) -> Result<Self, Failure> {
        Self::connect_at(kernel, VERSIONS[0])
    }

    /// A driver in contact at `version`, on VP 0.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the host refuses.
    pub fn connect_at(kernel: &Kernel, version: u32) -> Result<Self, Failure> {
        let vmbus = Self::new(kernel, 0);
        let contact = Contact::linux(kernel.vm(), version, 0)?;
        let response = vmbus.contact(&contact)?;
        equal(
            "version_supported of VERSION_RESPONSE",
            response.supported,
            true,
        )?;
        Ok(vmbus)
    }

    /// The kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.0.kernel
    }

    /// The machine.
    pub fn vm(&self) -> &Vm {
        self.0.kernel.vm()
    }

    /// The version agreed on; 0 before.
    pub fn version(&self) -> u32 {
        self.0.version.load(Ordering::Relaxed)
    }

    /// Connection for messages.
    pub fn connection(&self) -> u32 {
        self.0.connection.load(Ordering::Relaxed)
    }

    /// A GPADL id that was not used before.
    pub fn gpadl_id(&self) -> u32 {
        self.0.next_gpadl.fetch_add(1, Ordering::Relaxed)
    }

    /// Posts any bytes to a connection, once, and returns the status of the hypercall.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the hypercall faults.
    pub fn post(&self, connection: u32, message: &[u8]) -> Result<u16, Failure> {
        self.0.kernel.post(self.0.vp, connection, message)
    }

    /// Sends a message as Linux does: again while the host has no room. It must be taken.
    ///
    /// # Errors
    ///
    /// [`Failure`] if it is not.
    pub fn send(&self, message: &[u8]) -> Result<(), Failure> {
        for _ in 0..TRIES {
            let got = self.post(self.connection(), message)?;
            if got != status::INSUFFICIENT_BUFFERS && got != status::INSUFFICIENT_MEMORY {
                return equal("status of HvPostMessage", got, status::SUCCESS);
            }
            self.vm().settle();
        }
        equal(
            "status of HvPostMessage after many tries",
            status::INSUFFICIENT_BUFFERS,
            status::SUCCESS,
        )
    }

    /// The host's next message, once it has come to rest.
    ///
    /// # Errors
    ///
    /// [`Failure`] if what came is not a VMBus message.
    pub fn receive(&self) -> Result<Option<Vec<u8>>, Failure> {
        self.receive_on(self.0.vp)
    }

    /// The same, on another VP.
    ///
    /// # Errors
    ///
    /// [`Failure`] if what came is not a VMBus message.
    pub fn receive_on(&self, vp: u32) -> Result<Option<Vec<u8>>, Failure> {
        self.vm().settle();
        let Some(message) = self.0.kernel.synic(vp).take(VMBUS_SINT)? else {
            return Ok(None);
        };
        equal("SynIC message type", message.message_type, 1)?;
        if message.payload.len() < 8 {
            return Err(Failure::Unmet {
                what: "length of a VMBus message".into(),
                expected: "at least 8".into(),
                got: message.payload.len().to_string(),
            });
        }
        Ok(Some(message.payload))
    }

    /// The host's next message, which must be of this number and at least `len` bytes long.
    ///
    /// # Errors
    ///
    /// [`Failure::Unmet`] if it is another, too short, or none.
    pub fn expect(&self, number: u32, len: usize) -> Result<Vec<u8>, Failure> {
        let message = self.receive()?;
        let got = message.as_ref().map(|message| u32_at(message, 0));
        equal("the host's next message", got, Some(number))?;
        let message = message.unwrap_or_default();
        if message.len() < len {
            return Err(Failure::Unmet {
                what: format!("length of message {number}"),
                expected: format!("at least {len}"),
                got: message.len().to_string(),
            });
        }
        Ok(message)
    }

    /// Nothing must be there.
    ///
    /// # Errors
    ///
    /// [`Failure::Unmet`] if there is a message.
    pub fn expect_silence(&self) -> Result<(), Failure> {
        equal("messages of the host", self.receive()?, None)
    }

    /// Makes contact and remembers what was agreed on.
    ///
    /// # Errors
    ///
    /// [`Failure`] if there is no answer.
    pub fn contact(&self, contact: &Contact) -> Result<VersionResponse, Failure> {
        let got = self.post(contact.connection, &contact.encode().0)?;
        equal("status of HvPostMessage", got, status::SUCCESS)?;
        let raw = self.expect(message::VERSION_RESPONSE, 16)?;
        let response = VersionResponse {
            supported: raw[8] != 0,
            state: raw[9],
            connection: u32_at(&raw, 12),
            raw,
        };
        if response.supported {
            self.0.version.store(contact.version, Ordering::Relaxed);
            let connection = match contact.version {
                V5_0.. => response.connection,
                _ => 1,
            };
            self.0.connection.store(connection, Ordering::Relaxed);
        }
        Ok(response)
    }

    /// REQUEST_OFFERS, and what came up to ALL_OFFERS_DELIVERED.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn offers(&self) -> Result<Vec<Offer>, Failure> {
        self.send(&Bytes::words(&[message::REQUEST_OFFERS, 0]).0)?;
        let mut offers = Vec::new();
        while let Some(raw) = self.receive()? {
            match u32_at(&raw, 0) {
                message::ALL_OFFERS_DELIVERED => return Ok(offers),
                message::OFFER_CHANNEL => offers.push(Offer::decode(raw)?),
                number => equal("number of a message between offers", number, 1)?,
            }
        }
        Err(Failure::Unmet {
            what: "answer to REQUEST_OFFERS".into(),
            expected: "ALL_OFFERS_DELIVERED at the end".into(),
            got: format!("{} offers and nothing more", offers.len()),
        })
    }

    /// The offers, of which there must be exactly one.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn only_offer(&self) -> Result<Offer, Failure> {
        let mut offers = self.offers()?;
        equal("number of offers", offers.len(), 1)?;
        Ok(offers.remove(0))
    }

    /// An offer that comes by itself.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the next message is no offer.
    pub fn expect_offer(&self) -> Result<Offer, Failure> {
        Offer::decode(self.expect(message::OFFER_CHANNEL, 196)?)
    }

    /// Sends GPADL_HEADER and, as needed, GPADL_BODY messages for one range of whole pages.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn send_gpadl(&self, relid: u32, id: u32, pfns: &[u64]) -> Result<(), Failure> {
        let range_len = (8 + pfns.len() * 8) as u16;
        let (first, rest) = pfns.split_at(pfns.len().min(26));
        let header = Bytes::words(&[message::GPADL_HEADER, 0, relid, id])
            .u16(range_len)
            .u16(1)
            .u32(pfns.len() as u32 * PAGE as u32)
            .u32(0);
        self.send(&qwords(header, first).0)?;
        for chunk in rest.chunks(28) {
            let body = Bytes::words(&[message::GPADL_BODY, 0, 0, id]);
            self.send(&qwords(body, chunk).0)?;
        }
        Ok(())
    }

    /// Creates a GPADL; returns the status of GPADL_CREATED.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the answer is about something else.
    pub fn create_gpadl(&self, relid: u32, id: u32, pfns: &[u64]) -> Result<u32, Failure> {
        self.send_gpadl(relid, id, pfns)?;
        self.gpadl_created(relid, id)
    }

    /// The status of the GPADL_CREATED that comes next.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the next message is another, or about something else.
    pub fn gpadl_created(&self, relid: u32, id: u32) -> Result<u32, Failure> {
        let created = self.expect(message::GPADL_CREATED, 20)?;
        let about = (u32_at(&created, 8), u32_at(&created, 12));
        equal("relid and GPADL of GPADL_CREATED", about, (relid, id))?;
        Ok(u32_at(&created, 16))
    }

    /// Takes a GPADL back and waits for the host's word.
    ///
    /// # Errors
    ///
    /// [`Failure`] if it does not come.
    pub fn tear_down(&self, relid: u32, id: u32) -> Result<(), Failure> {
        self.send(&Bytes::words(&[message::GPADL_TEARDOWN, 0, relid, id]).0)?;
        let torndown = self.expect(message::GPADL_TORNDOWN, 12)?;
        equal("GPADL of GPADL_TORNDOWN", u32_at(&torndown, 8), id)
    }

    /// OPEN_CHANNEL with these fields; returns the status of the result.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the answer is about something else.
    pub fn send_open(&self, open: &Open) -> Result<u32, Failure> {
        self.send(&open.encode().0)?;
        let result = self.expect(message::OPEN_CHANNEL_RESULT, 20)?;
        let about = (u32_at(&result, 8), u32_at(&result, 12));
        let what = "relid and id of OPEN_CHANNEL_RESULT";
        equal(what, about, (open.relid, open.id))?;
        Ok(u32_at(&result, 16))
    }

    /// Opens a channel as Linux does for a virtual PCI bus: rings of five pages each, interrupts
    /// to the VP of the contact.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the host refuses.
    pub fn open(&self, offer: &Offer) -> Result<Channel, Failure> {
        self.open_sized(offer, 5, self.0.vp)
    }

    /// The same with rings of `pages` pages each (at least 2) and interrupts to `vp`.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the host refuses.
    pub fn open_sized(&self, offer: &Offer, pages: u64, vp: u32) -> Result<Channel, Failure> {
        let first = self.vm().pages(2 * pages)? / PAGE;
        let pfns: Vec<u64> = (first..first + 2 * pages).collect();
        let gpadl = self.gpadl_id();
        let created = self.create_gpadl(offer.relid, gpadl, &pfns)?;
        equal("status of GPADL_CREATED", created, 0)?;
        let (to_host, to_guest) = pfns.split_at(pages as usize);
        let to_host = Ring::new(self.vm(), to_host);
        let to_guest = Ring::new(self.vm(), to_guest);
        to_host.reset()?;
        to_guest.reset()?;
        let open = Open {
            relid: offer.relid,
            id: offer.relid,
            gpadl,
            vp,
            downstream: pages as u32,
        };
        equal("status of OPEN_CHANNEL_RESULT", self.send_open(&open)?, 0)?;
        Ok(Channel {
            vmbus: self.clone(),
            offer: offer.clone(),
            vp,
            gpadl,
            to_host,
            to_guest,
        })
    }

    /// MODIFY_CHANNEL; returns the status of the response, `None` where the version has none.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn modify(&self, relid: u32, vp: u32) -> Result<Option<u32>, Failure> {
        self.send(&Bytes::words(&[message::MODIFY_CHANNEL, 0, relid, vp]).0)?;
        if self.version() < 0x5_0003 {
            self.vm().settle();
            return Ok(None);
        }
        let response = self.expect(message::MODIFY_CHANNEL_RESPONSE, 16)?;
        equal(
            "relid of MODIFY_CHANNEL_RESPONSE",
            u32_at(&response, 8),
            relid,
        )?;
        Ok(Some(u32_at(&response, 12)))
    }

    /// CLOSE_CHANNEL alone.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn send_close(&self, relid: u32) -> Result<(), Failure> {
        self.send(&Bytes::words(&[message::CLOSE_CHANNEL, 0, relid]).0)
    }

    /// RELID_RELEASED.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn release(&self, relid: u32) -> Result<(), Failure> {
        self.send(&Bytes::words(&[message::RELID_RELEASED, 0, relid]).0)
    }

    /// The RESCIND_CHANNEL_OFFER that comes next: its channel.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the next message is another.
    pub fn expect_rescind(&self) -> Result<u32, Failure> {
        Ok(u32_at(&self.expect(message::RESCIND, 12)?, 8))
    }

    /// UNLOAD, up to its response.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the next message is another.
    pub fn unload(&self) -> Result<(), Failure> {
        self.send(&Bytes::words(&[message::UNLOAD, 0]).0)?;
        self.expect(message::UNLOAD_RESPONSE, 8)?;
        Ok(())
    }
}

fn qwords(bytes: Bytes, values: &[u64]) -> Bytes {
    values.iter().fold(bytes, |bytes, value| bytes.u64(*value))
}
