//! CLOSE_CHANNEL, MODIFY_CHANNEL, and channels side by side (docs/spec/vmbus.md, sections 5 and
//! 6).
#![forbid(unsafe_code)]

use super::opening::works;
use super::{alive, offered, ring_gpadl, two_offers};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::model::kernel::{Kernel, VMBUS_SINT, VMBUS_VECTOR, status};
use crate::model::testdev::TestDev;
use crate::model::vm::PAGE;
use crate::model::vmbus::{VERSIONS, VmBus, message};
use crate::model::vpci::{Bus, message as vpci};
use crate::model::wire::{Bytes, u32_at};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vmbus.close.silent",
        "CLOSE_CHANNEL is not answered; afterwards the connection takes no signal.",
        &["VB-1.1-07", "VB-5-08", "VB-6-05", "VB-5.1-03"],
        silent,
    ),
    Check::new(
        "vmbus.close.torn-down-at-last",
        "After GPADL_TORNDOWN of its rings nothing of a closed channel is read or written.",
        &["VB-5-09", "VB-8-16", "VB-4-12"],
        torn_down_at_last,
    ),
    Check::new(
        "vmbus.close.of-closed",
        "A close of a channel that is closed, or does not exist, is without effect.",
        &["VB-5.1-01", "VB-5.1-04", "VB-8-13"],
        of_closed,
    ),
    Check::new(
        "vmbus.close.of-one",
        "Closing one channel leaves the other one at work.",
        &["VB-5-08", "VB-8-14"],
        of_one,
    ),
    Check::new(
        "vmbus.modify.moves-interrupts",
        "After MODIFY_CHANNEL_RESPONSE interrupts come to the new VP alone.",
        &["VB-1.1-20", "VB-1.1-22", "VB-5-11", "VB-5-12", "VB-5-13"],
        moves_interrupts,
    ),
    Check::new(
        "vmbus.modify.refused",
        "A modification that is impossible is answered with a failure and changes nothing.",
        &["VB-5-12", "VB-5-14", "VB-8-13"],
        modify_refused,
    ),
    Check::new(
        "vmbus.modify.every-version",
        "MODIFY_CHANNEL works from 4.1 on, is answered from 5.3 on, and ignored with 4.0.",
        &["VB-5-12", "VB-5-15", "VB-1.1-20"],
        modify_every_version,
    ),
    Check::new(
        "vmbus.modify.to-and-fro",
        "While a channel moves between VPs no interrupt is lost.",
        &["VB-5-13", "VB-6-01"],
        to_and_fro,
    ),
    Check::new(
        "vmbus.modify.ends-with-the-channel",
        "A channel that was closed and opened again has the VP of its open.",
        &["VB-5-05", "VB-5-11"],
        modify_ends,
    ),
    Check::new(
        "vmbus.channels.side-by-side",
        "Two buses work at once, each with its own rings, event flag and interrupts.",
        &["VB-6-01", "VB-6-02", "VB-3.1-18", "HV-3.5-02"],
        side_by_side,
    ),
    Check::new(
        "vmbus.channels.wrong-connection",
        "Signals to the connections next to a channel's reach nobody.",
        &["VB-6-02", "VB-8-13"],
        wrong_connection,
    ),
    Check::new(
        "vmbus.channels.event-flag-number",
        "HvSignalEvent with a flag other than 0 is refused.",
        &["VB-6-02", "HV-5.2-03"],
        event_flag_number,
    ),
    Check::new(
        "vmbus.channels.needless-signals",
        "Signals without need change nothing, however many there are.",
        &["VB-6-04"],
        needless_signals,
    ),
];

fn silent(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let channel = vmbus.open(&offer)?;
    vmbus.send_close(offer.relid)?;
    alive(&vmbus)?;
    for _ in 0..3 {
        equal(
            "status of a signal",
            channel.signal()?,
            status::INVALID_CONNECTION_ID,
        )?;
    }
    vmbus.tear_down(offer.relid, channel.gpadl)
}

/// The bytes of a channel's rings.
fn ring_bytes(bus: &Bus) -> Result<Vec<u8>, Failure> {
    let channel = bus.channel();
    let mut bytes = Vec::new();
    for ring in [&channel.to_host, &channel.to_guest] {
        bytes.extend(bus.vm().read(ring.control(), PAGE as usize)?);
        bytes.extend(ring.get(0, ring.size())?);
    }
    Ok(bytes)
}

fn torn_down_at_last(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let device = TestDev::bring_up(&vm)?;
    let (bus, vmbus) = (device.bus(), device.bus().vmbus());
    let channel = bus.channel();
    // Requests that nobody has read yet, and may never.
    for _ in 0..20 {
        let request = Bytes::words(&[vpci::QUERY_BUS_RELATIONS]);
        let packet = crate::model::ring::Packet::request(9, &request.0);
        channel.to_host.send(&packet)?;
    }
    channel.signal()?;
    channel.close()?;
    bus.channel().interrupted()?;
    vm.take_interrupts(0)?;
    let before = ring_bytes(bus)?;
    equal(
        "status of a signal",
        channel.signal()?,
        status::INVALID_CONNECTION_ID,
    )?;
    alive(vmbus)?;
    holds("the rings are untouched", ring_bytes(bus)? == before)?;
    equal("the channel's event flag", channel.interrupted()?, false)
}

fn of_closed(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    vmbus.send_close(offer.relid)?;
    alive(&vmbus)?;
    let channel = vmbus.open(&offer)?;
    for relid in [
        0,
        offer.relid + 1,
        2047,
        2048,
        0x1_0000 + offer.relid,
        u32::MAX,
    ] {
        vmbus.send_close(relid)?;
    }
    alive(&vmbus)?;
    works(channel.clone())?;
    channel.close()?;
    vmbus.send_close(offer.relid)?;
    vmbus.send_close(offer.relid)?;
    alive(&vmbus)?;
    works(vmbus.open(&offer)?)
}

fn of_one(context: &Context) -> Verdict {
    let (vmbus, first, second) = two_offers(context)?;
    let kept = TestDev::start(&Bus::probe(&vmbus, &first, 0x1_0004)?, 0)?;
    let gone = TestDev::start(&Bus::probe(&vmbus, &second, 0x1_0004)?, 0)?;
    gone.bus().channel().close()?;
    equal(
        "a load from the closed bus's BAR",
        gone.load(0, 4)?,
        0xffff_ffff,
    )?;
    equal(
        "a load from the other one's",
        kept.load(0, 4)?,
        crate::model::testdev::MAGIC,
    )?;
    equal(
        "functions of the other bus",
        kept.bus().relations()?.len(),
        1,
    )?;
    works(vmbus.open(&second)?)
}

/// Has the bus send a packet into its empty ring, and takes it.
fn cause(bus: &Bus) -> Verdict {
    bus.send(&Bytes::words(&[vpci::QUERY_BUS_RELATIONS]).0)?;
    equal("packets of the host", bus.channel().receive()?.len(), 1)
}

/// Takes the channel's event flag and interrupts of each VP; returns the VPs that had one.
fn taken(bus: &Bus) -> Result<Vec<u32>, Failure> {
    let (vm, relid) = (bus.vm(), bus.channel().offer.relid as u16);
    let mut vps = Vec::new();
    for vp in 0..vm.vps() {
        let raised = vm.take_interrupts(vp)?.contains(&VMBUS_VECTOR);
        let flag = bus.kernel().synic(vp).take_event(VMBUS_SINT, relid)?;
        equal(
            format!("event flag of VP {vp} with an interrupt"),
            flag,
            raised,
        )?;
        if flag {
            vps.push(vp);
        }
    }
    Ok(vps)
}

/// A bus at a version, quiet.
fn quiet(context: &Context, version: u32) -> Result<Bus, Failure> {
    let vmbus = VmBus::connect_at(&Kernel::boot(&context.usual()?)?, version)?;
    let bus = Bus::probe(&vmbus, &vmbus.only_offer()?, 0x1_0004)?;
    taken(&bus)?;
    Ok(bus)
}

fn moves_interrupts(context: &Context) -> Verdict {
    let bus = quiet(context, VERSIONS[0])?;
    let (vmbus, relid) = (bus.vmbus(), bus.channel().offer.relid);
    for vp in [1, 1, 0, 1] {
        super::post(vmbus, &[message::MODIFY_CHANNEL, 0, relid, vp])?;
        let response = vmbus.expect(message::MODIFY_CHANNEL_RESPONSE, 16)?;
        equal("length of the response", response.len(), 16)?;
        let words = [8, 12].map(|at| u32_at(&response, at));
        equal("relid and status", words, [relid, 0])?;
        bus.vm().take_interrupts(0)?;
        cause(&bus)?;
        equal("VPs with an interrupt", taken(&bus)?, vec![vp])?;
    }
    Ok(())
}

fn modify_refused(context: &Context) -> Verdict {
    let bus = quiet(context, VERSIONS[0])?;
    let (vmbus, offer) = (bus.vmbus(), &bus.channel().offer);
    let (relid, vps) = (offer.relid, bus.vm().vps());
    let cases = [
        (relid, vps),
        (relid, 0x1_0000),
        (relid, u32::MAX),
        (0, 1),
        (relid + 1, 1),
        (2048, 1),
        (0x1_0000 + relid, 1),
        (u32::MAX, 1),
    ];
    for (relid, vp) in cases {
        let status = vmbus.modify(relid, vp)?.unwrap_or(0);
        super::refused(&format!("channel {relid:#x} to VP {vp:#x}"), status)?;
    }
    alive(vmbus)?;
    bus.vm().take_interrupts(0)?;
    cause(&bus)?;
    equal("VPs with an interrupt", taken(&bus)?, vec![0])?;
    bus.unbind()?;
    let status = vmbus.modify(relid, 1)?.unwrap_or(0);
    super::refused("a closed channel", status)?;
    alive(vmbus)
}

fn modify_every_version(context: &Context) -> Verdict {
    for version in VERSIONS {
        let bus = quiet(context, version)?;
        let course = |failure: Failure| failure.during(format!("version {version:#x}"));
        let relid = bus.channel().offer.relid;
        let status = bus.vmbus().modify(relid, 1).map_err(course)?;
        let expected = (version >= 0x5_0003).then_some(0);
        equal("status of the response", status, expected).map_err(course)?;
        bus.vmbus().expect_silence().map_err(course)?;
        bus.vm().take_interrupts(0)?;
        cause(&bus).map_err(course)?;
        let vp = u32::from(version > 0x4_0000);
        equal("VPs with an interrupt", taken(&bus)?, vec![vp]).map_err(course)?;
    }
    Ok(())
}

fn to_and_fro(context: &Context) -> Verdict {
    let bus = quiet(context, VERSIONS[0])?;
    let (vmbus, relid) = (bus.vmbus(), bus.channel().offer.relid);
    for round in 0..50 {
        // On its way when the channel moves: it may come to either VP, but must come.
        bus.send(&Bytes::words(&[vpci::QUERY_BUS_RELATIONS]).0)?;
        super::post(vmbus, &[message::MODIFY_CHANNEL, 0, relid, round % 2])?;
        let response = vmbus.expect(message::MODIFY_CHANNEL_RESPONSE, 16)?;
        equal("status", u32_at(&response, 12), 0)?;
        let mut events = 0;
        for vp in 0..2 {
            let synic = bus.kernel().synic(vp);
            events += u32::from(synic.take_event(VMBUS_SINT, relid as u16)?);
            bus.vm().take_interrupts(vp)?;
        }
        equal(format!("event flags in round {round}"), events, 1)?;
        equal("packets of the host", bus.channel().receive()?.len(), 1)?;
    }
    Ok(())
}

fn modify_ends(context: &Context) -> Verdict {
    let bus = quiet(context, VERSIONS[0])?;
    let (vmbus, offer) = (bus.vmbus(), bus.channel().offer.clone());
    equal("status", vmbus.modify(offer.relid, 1)?, Some(0))?;
    bus.unbind()?;
    let bus = Bus::probe(vmbus, &offer, 0x1_0004)?;
    taken(&bus)?;
    cause(&bus)?;
    equal("VPs with an interrupt", taken(&bus)?, vec![0])
}

fn side_by_side(context: &Context) -> Verdict {
    let (vmbus, first, second) = two_offers(context)?;
    let buses = [
        Bus::probe(&vmbus, &first, 0x1_0004)?,
        Bus::probe(&vmbus, &second, 0x1_0004)?,
    ];
    for bus in &buses {
        bus.channel().interrupted()?;
    }
    for round in 0..20 {
        let (asked, other) = (&buses[round % 2], &buses[1 - round % 2]);
        let relations = asked.relations()?;
        equal("functions", relations.len(), 1)?;
        equal(
            "event flag of the bus asked",
            asked.channel().interrupted()?,
            true,
        )?;
        equal(
            "event flag of the other",
            other.channel().interrupted()?,
            false,
        )?;
        equal("packets of the other", other.channel().receive()?.len(), 0)?;
    }
    for bus in &buses {
        bus.send(&Bytes::words(&[vpci::QUERY_BUS_RELATIONS]).0)?;
    }
    for bus in &buses {
        equal("packets of the host", bus.channel().receive()?.len(), 1)?;
        equal("event flag", bus.channel().interrupted()?, true)?;
    }
    Ok(())
}

fn wrong_connection(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let channel = vmbus.open(&offer)?;
    let own = offer.connection;
    for connection in [
        own - 1,
        own + 1,
        own & 0xfff,
        own | 1 << 16,
        own | 1 << 24,
        own | 1 << 31,
    ] {
        let got = vmbus.kernel().signal(0, connection, 0)?;
        holds(
            format!("a signal to {connection:#x} gets status {got:#x}"),
            got != status::SUCCESS,
        )?;
    }
    works(channel)
}

fn event_flag_number(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let channel = vmbus.open(&offer)?;
    for flag in [1, 7, 2047, 2048, u16::MAX] {
        let got = vmbus.kernel().signal(0, offer.connection, flag)?;
        equal(
            format!("status with flag {flag}"),
            got,
            status::INVALID_PARAMETER,
        )?;
    }
    works(channel)
}

fn needless_signals(context: &Context) -> Verdict {
    let bus = quiet(context, VERSIONS[0])?;
    for _ in 0..500 {
        equal(
            "status of a signal",
            bus.channel().signal()?,
            status::SUCCESS,
        )?;
    }
    equal("VPs with an interrupt", taken(&bus)?, vec![])?;
    equal("packets of the host", bus.channel().receive()?.len(), 0)?;
    cause(&bus)?;
    ring_gpadl(bus.vmbus(), &bus.channel().offer, 10)?;
    Ok(())
}
