//! Changes to a saved partition, as if its file had been damaged or made by an enemy.
#![forbid(unsafe_code)]

use arbitrary::{Arbitrary, Result, Unstructured};
use vm_vpci::hv::vmbus::Version;
use vm_vpci::partition::PartitionState;
use vm_vpci::pviommu::{Levels, PageTable, Translation};
use vm_vpci::vmbus::GpadlState;
use vm_vpci::vmbus::server::{
    Action, AfterClose, AfterDisconnect, Channel, Connection, Contact, MessagePort, OpenParams,
    Phase,
};

use crate::values::{Blob, Gpa, Small};

/// A number: small, an address, or any.
#[derive(Debug, Clone, Copy)]
pub struct Number(u64);

impl<'a> Arbitrary<'a> for Number {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self(match u.arbitrary::<u8>()? {
            0..=95 => u.arbitrary::<Small>()?.0.into(),
            96..=191 => u.arbitrary::<Gpa>()?.0,
            _ => u.arbitrary()?,
        }))
    }
}

/// A change of one thing. What it is about may not be there; then nothing is changed.
#[derive(Debug, Clone, Arbitrary)]
pub enum Edit {
    /// A version, by layer.
    Version(u8, Small),
    /// A register of the partition, or the page that the hypercall page covers.
    Msr(u8, Number),
    /// A register of a VP.
    Synic(u8, u8, Number),
    /// A message that waits for a VP: its SINT, payload, and how often.
    Queue(u8, Small, Blob, u8),
    /// One VP more, or less.
    Vps(bool),
    /// The connection.
    Connection(u8, u8, Small),
    /// A channel.
    Channel(u8, ChannelEdit),
    /// A GPADL.
    Gpadl(u8, GpadlEdit),
    /// Something that is owed.
    Action(u8, u8),
    /// A message of the guest that waits, and how often.
    Inbox(bool, Blob, u8),
    /// The messages to the guest.
    Outbox(u8, Small),
    /// A bus.
    Bus(u8, BusEdit),
    /// A function of a bus.
    Function(u8, u8, FunctionEdit),
    /// The rings of a bus.
    Rings(u8, u8, Number),
    /// The pvIOMMU.
    Iommu(u8, u8, Number),
}

/// A change of a channel.
#[derive(Debug, Clone, Arbitrary)]
pub enum ChannelEdit {
    /// Its id towards the guest.
    Relid(Option<u16>),
    /// Whether it was taken back.
    Revoked(bool),
    /// Its state.
    Phase(u8, Small, Small, Small),
    /// It is there twice.
    Twice,
    /// It is gone.
    Gone,
    /// Another instance.
    Instance(u8),
}

/// A change of a GPADL.
#[derive(Debug, Clone, Arbitrary)]
pub enum GpadlEdit {
    /// Its channel.
    Relid(u16),
    /// Its id.
    Id(Small),
    /// Ranges that were announced.
    Announced(u16, u16),
    /// Ranges that came.
    Data(Blob),
    /// A word of them.
    Word(u8, Number),
    /// Whether it is owed.
    Owed(bool),
    /// It is there twice.
    Twice,
    /// It is gone.
    Gone,
    /// A new one.
    New(Blob),
}

/// A change of a bus.
#[derive(Debug, Clone, Arbitrary)]
pub enum BusEdit {
    /// The version agreed on.
    Protocol(Option<u8>),
    /// Where its window is.
    Window(Option<Gpa>),
    /// The slot register.
    Slot(Small),
    /// It is there twice.
    Twice,
    /// It is gone.
    Gone,
    /// A function is there twice.
    TwiceFunction,
    /// Its functions are gone.
    NoFunctions,
}

/// A change of a function.
#[derive(Debug, Clone, Arbitrary)]
pub enum FunctionEdit {
    /// Its number.
    Number(u8),
    /// A dword of its configuration space.
    Config(u8, Number),
    /// The configuration space is longer or shorter.
    ConfigLen(u16),
    /// A live message: its data, and where it goes.
    Message(Small, u8, Vec<Small>),
    /// An entry of the MSI-X table.
    Entry(u8, Number, Small, u8),
    /// The table is longer or shorter.
    EntriesLen(u8),
    /// Pending MSIs.
    MsiPending(u32),
    /// Counts.
    Counters(u8),
}

fn at<T>(all: &mut [T], index: u8) -> Option<&mut T> {
    let len = all.len();
    (len > 0).then(|| &mut all[usize::from(index) % len])
}

impl Edit {
    /// Changes `state`.
    pub fn apply(&self, state: &mut PartitionState) {
        // None where there is nothing of the kind.
        let _ = self.change(state);
    }

    fn change(&self, state: &mut PartitionState) -> Option<()> {
        let server = &mut state.vmbus.server;
        match self {
            Self::Version(layer, version) => {
                *match layer % 7 {
                    0 => &mut state.version,
                    1 => &mut state.msrs.version,
                    2 => &mut state.synic.version,
                    3 => &mut state.vmbus.version,
                    4 => &mut server.version,
                    5 => &mut state.iommu.as_mut()?.version,
                    _ => &mut at(&mut state.buses, *layer)?.bus.version,
                } = version.0;
            }
            Self::Msr(which, value) => match which % 7 {
                0 => state.msrs.guest_os_id = value.0,
                1 => state.msrs.hypercall = value.0,
                2 => state.msrs.reference_tsc = value.0,
                3 => state.msrs.tsc_invariant = value.0,
                4 => *at(&mut state.msrs.vp_assist, 0)? = value.0,
                5 => state.msrs.vp_assist.resize(value.0 as usize % 4, 0),
                _ => state
                    .msrs
                    .hypercall_backing
                    .resize(value.0 as usize % 0x1800, 0xcc),
            },
            Self::Synic(vp, which, value) => {
                let vp = at(&mut state.synic.vps, *vp)?;
                match which % 20 {
                    0 => vp.scontrol = value.0,
                    1 => vp.siefp = value.0,
                    2 => vp.simp = value.0,
                    3 => vp.refused = value.0 & 1 != 0,
                    sint => vp.sints[usize::from(sint) - 4] = value.0,
                }
            }
            Self::Queue(vp, sint, payload, count) => {
                let vp = at(&mut state.synic.vps, *vp)?;
                for _ in 0..*count {
                    vp.queue.push(vm_vpci::synic::MessageState {
                        sint: sint.0 as u8,
                        message_type: 1,
                        payload: payload.0.clone(),
                    });
                }
            }
            Self::Vps(more) => match (more, state.synic.vps.first().cloned()) {
                (true, Some(vp)) => state.synic.vps.push(vp),
                _ => drop(state.synic.vps.pop()),
            },
            Self::Connection(which, version, vp) => {
                let contact = Contact {
                    version: Version([0x4_0000, 0x5_0003, 0x6_0000, 7][usize::from(version % 4)]),
                    vp: vp.0,
                    sint: if version & 0x40 == 0 { 2 } else { version % 16 },
                    offers_requested: version & 0x80 != 0,
                };
                server.connection = match which % 4 {
                    0 => Connection::Disconnected,
                    1 => Connection::Connected(contact),
                    2 => Connection::Disconnecting(contact, AfterDisconnect::Reset),
                    _ => Connection::Disconnecting(contact, AfterDisconnect::Unload),
                };
            }
            Self::Channel(index, edit) => edit.change(&mut server.channels, *index)?,
            Self::Gpadl(index, edit) => edit.change(&mut server.gpadls, *index)?,
            Self::Action(channel, what) => {
                let id = at(&mut server.channels, *channel)?.0;
                match what % 6 {
                    0 => server.actions.push(Action::Open(id)),
                    1 => server.actions.push(Action::Close(id)),
                    2 => server.actions.push(Action::Retarget(id, (*what).into())),
                    3 => server.actions.push(Action::Released(id)),
                    4 => server.actions.push(Action::DiscardMessages(*what)),
                    _ => server.actions.clear(),
                }
            }
            Self::Inbox(contact, bytes, count) => {
                let port = match contact {
                    true => MessagePort::Contact,
                    false => MessagePort::Message,
                };
                for _ in 0..*count {
                    state.vmbus.inbox.push((port, bytes.0.clone()));
                }
            }
            Self::Outbox(which, value) => match which % 4 {
                0 => server.next_id = value.0.into(),
                1 => server.refused_sints = value.0 as u16,
                2 => at(&mut server.outbox, *which)?.vp = value.0,
                _ => at(&mut server.outbox, *which)?.sint = value.0 as u8,
            },
            Self::Bus(index, edit) => edit.change(state, *index)?,
            Self::Function(bus, function, edit) => {
                let bus = &mut at(&mut state.buses, *bus)?.bus;
                edit.change(at(&mut bus.functions, *function)?)?;
            }
            Self::Rings(bus, which, value) => {
                let bus = at(&mut state.buses, *bus)?;
                let rings = bus.rings.as_mut();
                let index = value.0 as u32;
                match which % 9 {
                    0 => rings?.reader.next = index,
                    1 => rings?.reader.published = index,
                    2 => rings?.reader.write = index,
                    3 => rings?.reader.stopped ^= true,
                    4 => rings?.writer.write = index,
                    5 => rings?.writer.read = index,
                    6 => rings?.writer.waiting ^= true,
                    7 => rings?.writer.stopped ^= true,
                    _ => bus.rings = None,
                }
            }
            Self::Iommu(which, index, value) => {
                let number = value.0 as u32;
                let translation = Translation::Paged(PageTable {
                    root: value.0,
                    levels: [Levels::Four, Levels::Five][usize::from(index & 1)],
                });
                if *which == 0 {
                    state.iommu = None;
                }
                let iommu = state.iommu.as_mut()?;
                match which % 8 {
                    0 => at(&mut iommu.domains, *index)?.number = number,
                    1 => at(&mut iommu.domains, *index)?.translation = Some(translation),
                    2 => at(&mut iommu.domains, *index)?.translation = None,
                    3 => {
                        let domain = *at(&mut iommu.domains, *index)?;
                        iommu.domains.push(domain);
                    }
                    4 => at(&mut iommu.devices, *index)?.id = value.0,
                    5 => at(&mut iommu.devices, *index)?.domain = number,
                    6 => at(&mut iommu.devices, *index)?.held ^= true,
                    _ => drop(iommu.devices.pop()),
                }
            }
        }
        Some(())
    }
}

impl ChannelEdit {
    fn change(
        &self,
        channels: &mut Vec<(vm_vpci::vmbus::ChannelId, Channel)>,
        index: u8,
    ) -> Option<()> {
        let (_, channel) = at(channels, index)?;
        match self {
            Self::Relid(relid) => channel.relid = *relid,
            Self::Revoked(revoked) => channel.revoked = *revoked,
            Self::Phase(which, gpadl, vp, page) => {
                let params = OpenParams {
                    open_id: 7,
                    gpadl: match gpadl.0 {
                        0..=3 => 0xe1e10 + gpadl.0,
                        other => other,
                    },
                    target_vp: vp.0,
                    downstream_page: page.0,
                };
                channel.phase = match which % 8 {
                    0 => Phase::Withheld,
                    1 => Phase::Offered,
                    2 => Phase::Opening(params),
                    3 => Phase::Open(params),
                    4 => Phase::Closing(params, AfterClose::Offer),
                    5 => Phase::Closing(params, AfterClose::Reopen(params)),
                    6 => Phase::Closing(params, AfterClose::Release),
                    _ => Phase::Rescinded,
                };
            }
            Self::Twice => {
                let twin = *at(channels, index)?;
                channels.push(twin);
            }
            Self::Gone => drop(channels.remove(usize::from(index) % channels.len())),
            Self::Instance(number) => {
                channel.identity.instance = crate::machine::instance((*number % 4).into());
            }
        }
        Some(())
    }
}

impl GpadlEdit {
    fn change(&self, all: &mut Vec<GpadlState>, index: u8) -> Option<()> {
        if let Self::New(data) = self {
            all.push(GpadlState {
                relid: u16::from(index),
                gpadl: 0xe1e10,
                range_count: 1,
                range_len: data.0.len() as u16,
                data: data.0.clone(),
                teardown_pending: false,
            });
            return Some(());
        }
        let gpadl = at(all, index)?;
        match self {
            Self::Relid(relid) => gpadl.relid = *relid,
            Self::Id(id) => gpadl.gpadl = id.0,
            Self::Announced(count, len) => (gpadl.range_count, gpadl.range_len) = (*count, *len),
            Self::Data(data) => gpadl.data = data.0.clone(),
            Self::Word(at, value) => {
                let at = usize::from(*at) * 8;
                let word = gpadl.data.get_mut(at..at + 8)?;
                word.copy_from_slice(&value.0.to_le_bytes());
            }
            Self::Owed(owed) => gpadl.teardown_pending = *owed,
            Self::Twice => {
                let twin = gpadl.clone();
                all.push(twin);
            }
            Self::Gone => drop(all.remove(usize::from(index) % all.len())),
            Self::New(_) => {}
        }
        Some(())
    }
}

impl BusEdit {
    fn change(&self, state: &mut PartitionState, index: u8) -> Option<()> {
        let plugged = at(&mut state.buses, index)?;
        let bus = &mut plugged.bus;
        match self {
            Self::Protocol(version) => {
                bus.protocol_version = version.map(|version| 0x1_0000 + u32::from(version % 8));
            }
            Self::Window(window) => bus.window = window.map(|gpa| gpa.0),
            Self::Slot(slot) => bus.slot = slot.0,
            Self::Twice => {
                let twin = plugged.clone();
                state.buses.push(twin);
            }
            Self::Gone => drop(state.buses.remove(usize::from(index) % state.buses.len())),
            Self::TwiceFunction => {
                let function = bus.functions.first()?.clone();
                bus.functions.push(function);
            }
            Self::NoFunctions => bus.functions.clear(),
        }
        Some(())
    }
}

impl FunctionEdit {
    fn change(&self, function: &mut vm_vpci::vpci::FunctionState) -> Option<()> {
        use vm_vpci::vpci::interrupts::{MessageState, RouteState};
        let interrupts = &mut function.interrupts;
        match self {
            Self::Number(number) => function.number = *number,
            Self::Config(index, value) => {
                *at(&mut function.config, *index)? = value.0 as u32;
            }
            Self::ConfigLen(len) => function.config.resize(usize::from(*len) % 2048, 0),
            Self::Message(data, vector, vps) => {
                let route = RouteState {
                    vector: *vector,
                    vps: vps.iter().map(|vp| vp.0).collect(),
                };
                interrupts.messages.push(MessageState {
                    data: data.0,
                    routes: vec![route; usize::from(*vector % 5)],
                });
            }
            Self::Entry(index, address, data, flags) => {
                let entry = at(&mut interrupts.entries, *index)?;
                entry.address = address.0;
                entry.data = data.0;
                (entry.masked, entry.pending) = (flags & 1 != 0, flags & 2 != 0);
            }
            Self::EntriesLen(len) => {
                let first = *interrupts.entries.first()?;
                interrupts.entries.resize(usize::from(*len), first);
            }
            Self::MsiPending(pending) => interrupts.msi_pending = *pending,
            Self::Counters(len) => {
                let first = *interrupts.counters.first()?;
                interrupts.counters.resize(usize::from(*len), first);
            }
        }
        Some(())
    }
}
