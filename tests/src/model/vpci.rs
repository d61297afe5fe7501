//! The guest's side of a virtual PCI bus, as Linux `pci-hyperv.c` does it (docs/spec/vpci.md).
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::kernel::{Kernel, Retarget};
use super::ring::{COMPLETION, IN_BAND, Packet};
use super::vm::Vm;
use super::vmbus::{Channel, Offer, VmBus};
use super::wire::{Bytes, u16_at, u32_at, u64_at};
use crate::check::{Failure, equal};
use crate::guest::Fault;
use crate::host::LOW_MMIO;

/// Message numbers (docs/spec/vpci.md#vpci-3-1).
pub mod message {
    /// Added to each number.
    pub const BASE: u32 = 0x4249_0000;
    /// Host: functions, below version 1.3.
    pub const BUS_RELATIONS: u32 = BASE;
    /// Asks for the functions.
    pub const QUERY_BUS_RELATIONS: u32 = BASE + 0x01;
    /// Memory decode.
    pub const POWER_STATE_CHANGE: u32 = BASE + 0x04;
    /// Asks for probed BARs.
    pub const QUERY_RESOURCE_REQUIREMENTS: u32 = BASE + 0x05;
    /// Asks for assigned resources.
    pub const GET_RESOURCES: u32 = BASE + 0x06;
    /// Maps the config window.
    pub const BUS_D0ENTRY: u32 = BASE + 0x07;
    /// Unmaps it.
    pub const BUS_D0EXIT: u32 = BASE + 0x08;
    /// Back channel.
    pub const READ_BLOCK: u32 = BASE + 0x09;
    /// Back channel.
    pub const WRITE_BLOCK: u32 = BASE + 0x0a;
    /// Host: let a function go.
    pub const EJECT: u32 = BASE + 0x0b;
    /// It was let go.
    pub const EJECTION_COMPLETE: u32 = BASE + 0x0f;
    /// Function in use, 1.1.
    pub const RESOURCES_ASSIGNED: u32 = BASE + 0x10;
    /// Function in use no more.
    pub const RESOURCES_RELEASED: u32 = BASE + 0x11;
    /// Version.
    pub const QUERY_PROTOCOL_VERSION: u32 = BASE + 0x13;
    /// Interrupt, 1.1.
    pub const CREATE_INTERRUPT: u32 = BASE + 0x14;
    /// Interrupt no more.
    pub const DELETE_INTERRUPT: u32 = BASE + 0x15;
    /// Function in use, from 1.2 on.
    pub const RESOURCES_ASSIGNED2: u32 = BASE + 0x16;
    /// Interrupt, 1.2 and 1.3.
    pub const CREATE_INTERRUPT2: u32 = BASE + 0x17;
    /// Interrupt no more.
    pub const DELETE_INTERRUPT2: u32 = BASE + 0x18;
    /// Host: functions, from 1.3 on.
    pub const BUS_RELATIONS2: u32 = BASE + 0x19;
    /// Function in use, 1.4.
    pub const RESOURCES_ASSIGNED3: u32 = BASE + 0x1a;
    /// Interrupt, 1.4.
    pub const CREATE_INTERRUPT3: u32 = BASE + 0x1b;
    /// Resets a function, 1.5.
    pub const RESET_DEVICE: u32 = BASE + 0x1c;
    /// To a function's trusted module.
    pub const TDISP: u32 = BASE + 0x1d;
}

/// NTSTATUS values (docs/spec/vpci.md, section 3).
pub mod nt {
    /// Success.
    pub const SUCCESS: u32 = 0;
    /// The version is not known.
    pub const REVISION_MISMATCH: u32 = 0xc000_0059;
    /// Malformed.
    pub const BAD_DATA: u32 = 0xc000_090b;
    /// Not offered.
    pub const NOT_SUPPORTED: u32 = 0xc000_00bb;
    /// Not now.
    pub const INVALID_DEVICE_STATE: u32 = 0xc000_0184;
    /// Limit reached.
    pub const INSUFFICIENT_RESOURCES: u32 = 0xc000_009a;
}

/// Protocol versions that the host must know, newest first, as Linux tries them.
pub const VERSIONS: [u32; 4] = [0x1_0004, 0x1_0003, 0x1_0002, 0x1_0001];
/// Bytes of the config window.
pub const WINDOW_SIZE: u64 = 0x2000;
/// Requests that Linux has outstanding at most; their ids are 1 to this.
const MAX_ID: u64 = 64;

/// The slot of a function of device 0 (docs/spec/vpci.md, section 3.2).
pub const fn slot(function: u8) -> u32 {
    (function as u32) << 5
}

/// A function as the bus relations describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The whole description: 20 bytes, 28 from version 1.3 on.
    pub raw: Vec<u8>,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Slot.
    pub slot: u32,
    /// Serial number.
    pub serial: u32,
}

/// What answered a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// NTSTATUS.
    pub status: u32,
    /// Payload of the completion, with the status.
    pub payload: Vec<u8>,
    /// Payloads of packets that came without a request, before or after it.
    pub unsolicited: Vec<Vec<u8>>,
}

/// An interrupt message: what the guest programs into the function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Number of messages.
    pub count: u16,
    /// Data of the first one.
    pub data: u32,
    /// Address.
    pub address: u64,
}

/// A request for an interrupt, in the form of any version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Create {
    /// Slot of the function.
    pub slot: u32,
    /// Vector.
    pub vector: u32,
    /// Delivery mode: 0 fixed.
    pub mode: u8,
    /// Number of messages.
    pub count: u16,
    /// Number of VPs, as the message says.
    pub vp_count: u16,
    /// VPs.
    pub vps: Vec<u16>,
}

impl Create {
    /// One message for `vector` on `vp`.
    pub fn one(slot: u32, vector: u8, vp: u16) -> Self {
        Self {
            slot,
            vector: vector.into(),
            mode: 0,
            count: 1,
            vp_count: 1,
            vps: vec![vp],
        }
    }

    /// The message of a protocol version, as long as Linux sends it.
    pub fn encode(&self, version: u32) -> Bytes {
        let vps = |bytes: Bytes| self.vps.iter().fold(bytes, |bytes, vp| bytes.u16(*vp));
        let head = |number| Bytes::words(&[number, self.slot]);
        match version {
            0x1_0001 => head(message::CREATE_INTERRUPT)
                .u8(self.vector as u8)
                .u8(self.mode)
                .u16(self.count)
                .u32(0)
                .u64(u64::MAX),
            0x1_0002 | 0x1_0003 => {
                let bytes = head(message::CREATE_INTERRUPT2)
                    .u8(self.vector as u8)
                    .u8(self.mode)
                    .u16(self.count)
                    .u16(self.vp_count);
                vps(bytes).up_to(78)
            }
            _ => {
                let bytes = head(message::CREATE_INTERRUPT3)
                    .u32(self.vector)
                    .u8(self.mode)
                    .u8(0)
                    .u16(self.count)
                    .u16(self.vp_count);
                vps(bytes).up_to(82)
            }
        }
    }
}

#[derive(Debug)]
struct Inner {
    channel: Channel,
    window: u64,
    version: AtomicU64,
    next_id: AtomicU64,
}

/// A guest's driver of a bus.
#[derive(Debug, Clone)]
pub struct Bus(Arc<Inner>);

impl Bus {
    /// A driver on an open channel that has sent nothing yet. Its config window will be the
    /// `index`th piece of the low MMIO range.
    pub fn new(channel: Channel, index: u64) -> Self {
        Self(Arc::new(Inner {
            channel,
            window: LOW_MMIO + index * WINDOW_SIZE,
            version: AtomicU64::new(0),
            next_id: AtomicU64::new(0),
        }))
    }

    /// From boot to D0 at the newest versions, on the machine's only bus.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn bring_up(vm: &Vm) -> Result<Self, Failure> {
        let vmbus = VmBus::connect(&Kernel::boot(vm)?)?;
        Self::probe(&vmbus, &vmbus.only_offer()?, VERSIONS[0])
    }

    /// Opens the channel of an offer and goes through Linux's probe up to the bus scan, at a
    /// protocol version: version, relations, requirements, D0, resources assigned. The config
    /// window's place is made from the relid.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn probe(vmbus: &VmBus, offer: &Offer, version: u32) -> Result<Self, Failure> {
        let bus = Self::new(vmbus.open(offer)?, u64::from(offer.relid) - 1);
        let status = bus.negotiate(version)?;
        equal("status of QUERY_PROTOCOL_VERSION", status, nt::SUCCESS)?;
        let functions = bus.relations()?;
        for function in &functions {
            bus.requirements(function.slot)?;
        }
        equal(
            "status of BUS_D0ENTRY",
            bus.d0_entry(bus.window())?,
            nt::SUCCESS,
        )?;
        for function in &functions {
            let status = bus.assigned(function.slot)?;
            equal("status of RESOURCES_ASSIGNED", status, nt::SUCCESS)?;
        }
        Ok(bus)
    }

    /// The channel.
    pub fn channel(&self) -> &Channel {
        &self.0.channel
    }

    /// The VMBus driver.
    pub fn vmbus(&self) -> &VmBus {
        self.0.channel.vmbus()
    }

    /// The kernel.
    pub fn kernel(&self) -> &Kernel {
        self.vmbus().kernel()
    }

    /// The machine.
    pub fn vm(&self) -> &Vm {
        self.vmbus().vm()
    }

    /// GPA of the config window.
    pub fn window(&self) -> u64 {
        self.0.window
    }

    /// Protocol version agreed on; 0 before.
    pub fn version(&self) -> u32 {
        self.0.version.load(Ordering::Relaxed) as u32
    }

    fn id(&self) -> u64 {
        1 + self.0.next_id.fetch_add(1, Ordering::Relaxed) % MAX_ID
    }

    /// Sends any bytes as an in-band packet that wants no completion.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn send(&self, payload: &[u8]) -> Result<(), Failure> {
        self.0.channel.send(&Packet::new(IN_BAND, 0, 0, payload))
    }

    /// Sends any bytes as a request, and returns everything that came, once the host has come to
    /// rest. Exactly one completion must answer it.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn request(&self, payload: &[u8]) -> Result<Reply, Failure> {
        let id = self.id();
        self.0.channel.send(&Packet::request(id, payload))?;
        let mut completions = Vec::new();
        let mut unsolicited = Vec::new();
        for packet in self.0.channel.receive()? {
            if packet.payload.len() < 8 {
                // Linux ignores packets of 20 bytes and less: VP-3-03.
                return Err(Failure::Unmet {
                    what: "payload of a packet".into(),
                    expected: "at least 4 bytes, padded to 8".into(),
                    got: format!("{} bytes", packet.payload.len()),
                });
            }
            match packet.kind {
                COMPLETION => {
                    equal("flags of the completion", packet.flags, 0)?;
                    equal("transaction id of the completion", packet.id, id)?;
                    completions.push(packet.payload);
                }
                kind => {
                    equal("type of an unsolicited packet", kind, IN_BAND)?;
                    equal("flags of an unsolicited packet", packet.flags, 0)?;
                    equal("transaction id of an unsolicited packet", packet.id, 0)?;
                    unsolicited.push(packet.payload);
                }
            }
        }
        equal("number of completions", completions.len(), 1)?;
        let payload = completions.remove(0);
        Ok(Reply {
            status: u32_at(&payload, 0),
            payload,
            unsolicited,
        })
    }

    /// Sends a request of these dwords and returns its status.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn status(&self, words: &[u32]) -> Result<u32, Failure> {
        Ok(self.request(&Bytes::words(words).0)?.status)
    }

    /// QUERY_PROTOCOL_VERSION; returns the status, and remembers a version that was accepted.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn negotiate(&self, version: u32) -> Result<u32, Failure> {
        let status = self.status(&[message::QUERY_PROTOCOL_VERSION, version])?;
        if status == nt::SUCCESS {
            self.0.version.store(version.into(), Ordering::Relaxed);
        }
        Ok(status)
    }

    /// QUERY_BUS_RELATIONS, and the functions in the answer.
    ///
    /// # Errors
    ///
    /// [`Failure`] if there is no answer, or one of another version.
    pub fn relations(&self) -> Result<Vec<Description>, Failure> {
        self.send(&Bytes::words(&[message::QUERY_BUS_RELATIONS]).0)?;
        let packets = self.0.channel.receive()?;
        equal("packets that answer QUERY_BUS_RELATIONS", packets.len(), 1)?;
        equal("type of the packet", packets[0].kind, IN_BAND)?;
        equal("transaction id of the packet", packets[0].id, 0)?;
        self.decode_relations(&packets[0].payload)
    }

    /// The functions in a BUS_RELATIONS or BUS_RELATIONS2, whichever the version calls for.
    ///
    /// # Errors
    ///
    /// [`Failure`] if it is another message, or too short.
    pub fn decode_relations(&self, payload: &[u8]) -> Result<Vec<Description>, Failure> {
        let (number, size) = match self.version() {
            0x1_0003.. => (message::BUS_RELATIONS2, 28),
            _ => (message::BUS_RELATIONS, 20),
        };
        equal("message", u32_at(payload, 0), number)?;
        let count = u32_at(payload, 4) as usize;
        let len = (8 + count * size).next_multiple_of(8);
        equal("bytes of the bus relations", payload.len(), len)?;
        let descriptions = payload[8..8 + count * size].chunks_exact(size);
        Ok(descriptions
            .map(|raw| Description {
                raw: raw.to_vec(),
                vendor: u16_at(raw, 0),
                device: u16_at(raw, 2),
                slot: u32_at(raw, 12),
                serial: u32_at(raw, 16),
            })
            .collect())
    }

    /// QUERY_RESOURCE_REQUIREMENTS: the probed values of the BARs.
    ///
    /// # Errors
    ///
    /// [`Failure`] if it does not succeed.
    pub fn requirements(&self, slot: u32) -> Result<[u32; 6], Failure> {
        let request = Bytes::words(&[message::QUERY_RESOURCE_REQUIREMENTS, slot]);
        let reply = self.request(&request.0)?;
        let what = "status of QUERY_RESOURCE_REQUIREMENTS";
        equal(what, reply.status, nt::SUCCESS)?;
        equal("payload of the reply", reply.payload.len(), 32)?;
        Ok(std::array::from_fn(|bar| {
            u32_at(&reply.payload, 4 + 4 * bar)
        }))
    }

    /// BUS_D0ENTRY with the config window at `gpa`; returns the status.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn d0_entry(&self, gpa: u64) -> Result<u32, Failure> {
        let request = Bytes::words(&[message::BUS_D0ENTRY, 0]).u64(gpa);
        Ok(self.request(&request.0)?.status)
    }

    /// BUS_D0EXIT; returns the status.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn d0_exit(&self) -> Result<u32, Failure> {
        self.status(&[message::BUS_D0EXIT])
    }

    /// RESOURCES_ASSIGNED as Linux sends it for the version: no resources; returns the status.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn assigned(&self, slot: u32) -> Result<u32, Failure> {
        let (number, len) = match self.version() {
            0x1_0001 => (message::RESOURCES_ASSIGNED, 148),
            _ => (message::RESOURCES_ASSIGNED2, 202),
        };
        let request = Bytes::words(&[number, slot]).up_to(len);
        Ok(self.request(&request.0)?.status)
    }

    /// RESOURCES_RELEASED, which has no answer.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn released(&self, slot: u32) -> Result<(), Failure> {
        self.send(&Bytes::words(&[message::RESOURCES_RELEASED, slot]).0)?;
        self.vm().settle();
        Ok(())
    }

    /// A CREATE_INTERRUPT of the version; returns status and, on success, the message.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn create(&self, create: &Create) -> Result<(u32, Option<Message>), Failure> {
        let reply = self.request(&create.encode(self.version()).0)?;
        if reply.status != nt::SUCCESS {
            return Ok((reply.status, None));
        }
        equal("payload of the reply", reply.payload.len(), 24)?;
        let message = Message {
            count: u16_at(&reply.payload, 10),
            data: u32_at(&reply.payload, 12),
            address: u64_at(&reply.payload, 16),
        };
        Ok((reply.status, Some(message)))
    }

    /// The same, which must succeed.
    ///
    /// # Errors
    ///
    /// [`Failure`] if it does not.
    pub fn must_create(&self, create: &Create) -> Result<Message, Failure> {
        match self.create(create)? {
            (_, Some(message)) => Ok(message),
            (status, None) => Err(Failure::Unmet {
                what: "status of CREATE_INTERRUPT".into(),
                expected: "0".into(),
                got: format!("{status:#x}"),
            }),
        }
    }

    /// DELETE_INTERRUPT, which Linux sends without asking for a completion.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn delete(&self, slot: u32, message: Message) -> Result<(), Failure> {
        let request = Bytes::words(&[message::DELETE_INTERRUPT, slot])
            .u16(0)
            .u16(message.count)
            .u32(message.data)
            .u64(message.address);
        self.send(&request.0)?;
        self.vm().settle();
        Ok(())
    }

    /// Logical device id of a function (docs/spec/vpci.md, section 1.1), zero-extended.
    pub fn logical_id(&self, slot: u32) -> u64 {
        let (_, data2, data3, _) = self.0.channel.offer.instance.as_fields();
        u64::from(data2) << 16 | u64::from(data3 & 0xfff8) | u64::from(slot >> 5 & 7)
    }

    /// A retarget of a message of a function to one VP, in the form of the version.
    pub fn retarget(&self, slot: u32, message: Message, vector: u8, vp: u32) -> Retarget {
        let id = self.logical_id(slot);
        Retarget::new(id, message.address, message.data, vector, vp)
    }

    /// A load from configuration space: the slot is written first, as Linux does.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn config(&self, slot: u32, offset: u64, width: usize) -> Result<u64, Fault> {
        self.vm().store(0, self.window(), 4, slot.into())?;
        self.vm().load(0, self.window() + 0x1000 + offset, width)
    }

    /// A store to configuration space.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn set_config(
        &self,
        slot: u32,
        offset: u64,
        width: usize,
        value: u64,
    ) -> Result<(), Fault> {
        self.vm().store(0, self.window(), 4, slot.into())?;
        self.vm()
            .store(0, self.window() + 0x1000 + offset, width, value)
    }

    /// Offset of a capability of a function; `None` if it has none such.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the list has no end.
    pub fn capability(&self, slot: u32, id: u8) -> Result<Option<u64>, Failure> {
        let mut at = self.config(slot, 0x34, 1)?;
        for _ in 0..48 {
            if at == 0 {
                return Ok(None);
            }
            let header = self.config(slot, at, 2)?;
            if header as u8 == id {
                return Ok(Some(at));
            }
            at = header >> 8;
        }
        Err(Failure::Unmet {
            what: "capability list".into(),
            expected: "an end".into(),
            got: "more than 48 capabilities".into(),
        })
    }

    /// Places a 64-bit BAR with memory decode off, as Linux does.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn place_bar(&self, slot: u32, bar: u64, gpa: u64) -> Result<(), Fault> {
        let command = self.config(slot, 4, 2)?;
        self.set_config(slot, 4, 2, command & !2)?;
        self.set_config(slot, 0x10 + 4 * bar, 4, gpa & 0xffff_ffff)?;
        self.set_config(slot, 0x14 + 4 * bar, 4, gpa >> 32)
    }

    /// Leaves the bus as Linux does when its driver is unbound: D0EXIT, close.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn unbind(&self) -> Result<(), Failure> {
        equal("status of BUS_D0EXIT", self.d0_exit()?, nt::SUCCESS)?;
        self.0.channel.close()
    }
}
