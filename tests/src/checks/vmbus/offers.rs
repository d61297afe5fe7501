//! REQUEST_OFFERS and what it brings (docs/spec/vmbus.md, sections 2.3 and 3.1).
#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use uuid::Uuid;

use super::{alive, buses, connected, no_offers, offered, post};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::host::{BusSetup, Setup};
use crate::model::kernel::{Kernel, status};
use crate::model::vmbus::{Contact, Offer, VERSIONS, VPCI_CLASS, VmBus, is_dedicated, message};
use crate::model::vpci::Bus;
use crate::model::wire::{u16_at, u32_at};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vmbus.offer.contents",
        "Every field of an offer is as documented for a channel of vPCI.",
        &[
            "VB-1.1-01",
            "VB-1-04",
            "VB-3.1-01",
            "VB-3.1-02",
            "VB-3.1-03",
            "VB-3.1-04",
            "VB-3.1-05",
            "VB-3.1-06",
            "VB-3.1-07",
            "VB-3.1-08",
            "VB-3.1-09",
            "VB-3.1-10",
            "VB-3.1-11",
            "VB-3.1-12",
            "VB-3.1-13",
            "VB-3.1-14",
            "VB-3.1-15",
            "VB-3.1-19",
            "VB-3.1-20",
        ],
        contents,
    ),
    Check::new(
        "vmbus.offer.every-version",
        "The offer is the same with every version.",
        &["VB-1.1-01", "VB-3.1-16"],
        every_version,
    ),
    Check::new(
        "vmbus.offer.none",
        "Without a bus ALL_OFFERS_DELIVERED comes alone, 8 bytes long.",
        &["VB-1.1-03", "VB-1.1-04", "VB-2.3-02"],
        none,
    ),
    Check::new(
        "vmbus.offer.ids",
        "Forty channels have relids and connections of their own, within their ranges.",
        &["VB-3.1-17", "VB-3.1-18", "VB-2.3-02"],
        ids,
    ),
    Check::new(
        "vmbus.offer.order",
        "Order and relids do not depend on the order in which buses were plugged in.",
        &["VB-2.3-04", "VB-3.1-17"],
        order,
    ),
    Check::new(
        "vmbus.offer.twice",
        "A second REQUEST_OFFERS of a connection brings nothing.",
        &["VB-2.3-01", "VB-1.1-03"],
        twice,
    ),
    Check::new(
        "vmbus.offer.only-when-asked",
        "A bus that is plugged in before REQUEST_OFFERS is offered then, once.",
        &["VB-2.3-03", "VB-5.1-06"],
        only_when_asked,
    ),
    Check::new(
        "vmbus.offer.hot-add-while-disconnected",
        "A bus that is plugged in while nobody is connected is offered to who connects.",
        &["VB-2.3-03", "VB-2.4-04"],
        hot_add_while_disconnected,
    ),
    Check::new(
        "vmbus.offer.hot-add-order",
        "Buses that are plugged in one after the other are offered in that order, alone.",
        &["VB-2.3-03", "VB-3.1-17"],
        hot_add_order,
    ),
    Check::new(
        "vmbus.offer.duplicate-instance",
        "An instance GUID that is in use cannot be offered a second time.",
        &["VB-3.1-21"],
        duplicate_instance,
    ),
    Check::new(
        "vmbus.offer.reoffer-after-released",
        "An instance that was rescinded can be offered again only after RELID_RELEASED.",
        &["VB-3.1-21", "VB-3.1-17", "VB-3.2-04", "VB-1.1-13"],
        reoffer_after_released,
    ),
    Check::new(
        "vmbus.offer.relid-reserved-until-released",
        "The relid of a rescinded channel is not given away before RELID_RELEASED.",
        &["VB-3.1-17", "VB-3.2-04"],
        relid_reserved,
    ),
    Check::new(
        "vmbus.offer.released-unasked",
        "RELID_RELEASED for a closed channel lets it go until the next connection.",
        &["VB-3.2-03", "VB-5.1-01", "VB-1.1-13"],
        released_unasked,
    ),
    Check::new(
        "vmbus.offer.released-while-open",
        "RELID_RELEASED for an open channel is without effect.",
        &["VB-5.1-03"],
        released_while_open,
    ),
    Check::new(
        "vmbus.offer.released-while-closing",
        "CLOSE and RELID_RELEASED on end close the channel and let it go.",
        &["VB-5.1-04", "VB-3.2-03"],
        released_while_closing,
    ),
    Check::new(
        "vmbus.offer.signal-before-open",
        "The connection of a channel that is not open takes no signal.",
        &["VB-3.1-14", "VB-6-05"],
        signal_before_open,
    ),
];

fn contents(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let raw = &offer.raw;
    equal("length", raw.len(), 196)?;
    equal("padding of the header", u32_at(raw, 4), 0)?;
    equal("class", offer.class, VPCI_CLASS)?;
    equal(
        "instance",
        offer.instance,
        vmbus.vm().setup().buses[0].instance,
    )?;
    equal("reserved bytes 40 to 55", &raw[40..56], &[0; 16])?;
    let flags = u16_at(raw, 56);
    // Confidential, pinned, pipe, loopback, hvsock: none is a channel of vPCI.
    equal("flags that are not for vPCI", flags & !1, 0)?;
    equal("mmio_megabytes", u16_at(raw, 58), 0)?;
    equal("user defined data", &raw[60..180], &[0; 120])?;
    equal("sub-channel index", u16_at(raw, 180), 0)?;
    equal("mmio_megabytes_optional", u16_at(raw, 182), 0)?;
    holds("relid is 1 to 2047", (1..=2047).contains(&offer.relid))?;
    equal("monitor id", raw[188], 0xff)?;
    equal("monitor allocated", raw[189], 0)?;
    equal("dedicated interrupt", is_dedicated(&offer), true)?;
    equal("other bits beside it", u16_at(raw, 190) & !1, 0)?;
    let connection = offer.connection;
    let usable = !(1..=4).contains(&connection) && connection != 0 && connection < 1 << 24;
    holds(format!("connection {connection:#x} is usable"), usable)
}

fn every_version(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let vmbus = VmBus::new(&Kernel::boot(&vm)?, 0);
    let mut first: Option<Offer> = None;
    for version in VERSIONS {
        equal(
            "version_supported",
            vmbus.contact(&Contact::linux(&vm, version, 0)?)?.supported,
            true,
        )?;
        let offer = vmbus.only_offer()?;
        let expected = first.get_or_insert_with(|| offer.clone());
        equal(format!("offer with version {version:#x}"), &offer, expected)?;
    }
    Ok(())
}

fn none(context: &Context) -> Verdict {
    let vmbus = VmBus::connect(&Kernel::boot(&context.machine(&buses(0))?)?)?;
    post(&vmbus, &[message::REQUEST_OFFERS, 0])?;
    let answer = vmbus.expect(message::ALL_OFFERS_DELIVERED, 8)?;
    equal("length of ALL_OFFERS_DELIVERED", answer.len(), 8)?;
    vmbus.expect_silence()
}

fn ids(context: &Context) -> Verdict {
    let vmbus = VmBus::connect(&Kernel::boot(&context.machine(&buses(40))?)?)?;
    let offers = vmbus.offers()?;
    equal("number of offers", offers.len(), 40)?;
    let relids: BTreeSet<u32> = offers.iter().map(|offer| offer.relid).collect();
    equal("number of relids", relids.len(), 40)?;
    let connections: BTreeSet<u32> = offers.iter().map(|offer| offer.connection).collect();
    equal("number of connections", connections.len(), 40)?;
    let instances: BTreeSet<Uuid> = offers.iter().map(|offer| offer.instance).collect();
    equal("number of instances", instances.len(), 40)?;
    for offer in &offers {
        holds("relid is 1 to 2047", (1..=2047).contains(&offer.relid))?;
        let connection = offer.connection;
        let usable = connection > 4 && connection < 1 << 24;
        holds(format!("connection {connection:#x} is usable"), usable)?;
    }
    Ok(())
}

/// Instances and relids in the order of their offers.
fn order_of(offers: &[Offer]) -> Vec<(Uuid, u32)> {
    let pairs = offers.iter().map(|offer| (offer.instance, offer.relid));
    pairs.collect()
}

fn order(context: &Context) -> Verdict {
    let mut expected = None;
    for numbers in [[1, 2, 3], [3, 1, 2], [2, 3, 1]] {
        let setup = Setup {
            buses: numbers.into_iter().map(BusSetup::testdev).collect(),
            ..Setup::default()
        };
        let vmbus = VmBus::connect(&Kernel::boot(&context.machine(&setup)?)?)?;
        let offers = order_of(&vmbus.offers()?);
        let expected: &Vec<_> = expected.get_or_insert_with(|| offers.clone());
        equal(format!("offers of buses {numbers:?}"), &offers, expected)?;
        // And with the next connection, as after hibernation.
        vmbus.unload()?;
        vmbus.contact(&Contact::linux(vmbus.vm(), VERSIONS[0], 0)?)?;
        equal(
            "offers of the next connection",
            &order_of(&vmbus.offers()?),
            expected,
        )?;
    }
    Ok(())
}

fn twice(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    no_offers(&vmbus)?;
    let bus = Bus::probe(&vmbus, &offer, 0x1_0004)?;
    no_offers(&vmbus)?;
    bus.relations().map(drop)
}

fn only_when_asked(context: &Context) -> Verdict {
    let vmbus = connected(context)?;
    vmbus.expect_silence()?;
    vmbus.vm().plug(&BusSetup::testdev(2))?;
    vmbus.expect_silence()?;
    equal("number of offers", vmbus.offers()?.len(), 2)?;
    vmbus.expect_silence()
}

fn hot_add_while_disconnected(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let kernel = Kernel::boot(&vm)?;
    vm.plug(&BusSetup::testdev(2))?;
    super::all_silent(&vm, &kernel)?;
    let vmbus = VmBus::connect(&kernel)?;
    equal("number of offers", vmbus.offers()?.len(), 2)?;
    vmbus.unload()?;
    vm.plug(&BusSetup::testdev(3))?;
    vmbus.expect_silence()?;
    vmbus.contact(&Contact::linux(&vm, VERSIONS[0], 0)?)?;
    equal("number of offers", vmbus.offers()?.len(), 3)
}

fn hot_add_order(context: &Context) -> Verdict {
    let (vmbus, first) = offered(context)?;
    let mut relids = BTreeSet::from([first.relid]);
    for number in [9, 5, 7] {
        let bus = BusSetup::testdev(number);
        vmbus.vm().plug(&bus)?;
        let offer = vmbus.expect_offer()?;
        equal("instance that is offered", offer.instance, bus.instance)?;
        holds("the relid is new", relids.insert(offer.relid))?;
        vmbus.expect_silence()?;
    }
    Ok(())
}

/// Plugging in must fail, and the guest hears nothing of it.
fn cannot_plug(vmbus: &VmBus, number: u16) -> Verdict {
    match vmbus.vm().plug(&BusSetup::testdev(number)) {
        Err(Failure::Host(_)) => vmbus.expect_silence(),
        Err(other) => Err(other),
        Ok(()) => holds("an instance that is in use is refused", false),
    }
}

fn duplicate_instance(context: &Context) -> Verdict {
    let (vmbus, _) = offered(context)?;
    cannot_plug(&vmbus, 1)
}

fn reoffer_after_released(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    vmbus.vm().remove(offer.instance)?;
    equal("rescinded relid", vmbus.expect_rescind()?, offer.relid)?;
    cannot_plug(&vmbus, 1)?;
    vmbus.release(offer.relid)?;
    vmbus.expect_silence()?;
    vmbus.vm().plug(&BusSetup::testdev(1))?;
    let again = vmbus.expect_offer()?;
    equal("instance that is offered", again.instance, offer.instance)?;
    Bus::probe(&vmbus, &again, 0x1_0004).map(drop)
}

fn relid_reserved(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let vm = vmbus.vm();
    vm.remove(offer.instance)?;
    equal("rescinded relid", vmbus.expect_rescind()?, offer.relid)?;
    vm.plug(&BusSetup::testdev(2))?;
    let second = vmbus.expect_offer()?;
    holds("another relid is offered", second.relid != offer.relid)?;
    holds(
        "on another connection",
        second.connection != offer.connection,
    )?;
    vmbus.release(offer.relid)?;
    vmbus.expect_silence()?;
    vm.plug(&BusSetup::testdev(3))?;
    let third = vmbus.expect_offer()?;
    holds("the third relid is not in use", third.relid != second.relid)?;
    Bus::probe(&vmbus, &second, 0x1_0004).map(drop)
}

fn released_unasked(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    vmbus.release(offer.relid)?;
    vmbus.send(&super::open_of(&offer, 1).encode().0)?;
    vmbus.release(offer.relid)?;
    alive(&vmbus)?;
    vmbus.contact(&Contact::linux(vmbus.vm(), VERSIONS[0], 0)?)?;
    equal("instance", vmbus.only_offer()?.instance, offer.instance)
}

fn released_while_open(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let bus = Bus::probe(&vmbus, &offer, 0x1_0004)?;
    vmbus.release(offer.relid)?;
    alive(&vmbus)?;
    equal("functions of the bus", bus.relations()?.len(), 1)?;
    bus.unbind()
}

fn released_while_closing(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let bus = Bus::probe(&vmbus, &offer, 0x1_0004)?;
    vmbus.send_close(offer.relid)?;
    vmbus.release(offer.relid)?;
    alive(&vmbus)?;
    let signal = bus.channel().signal()?;
    equal("status of a signal", signal, status::INVALID_CONNECTION_ID)?;
    vmbus.send(&super::open_of(&offer, bus.channel().gpadl).encode().0)?;
    alive(&vmbus)
}

fn signal_before_open(context: &Context) -> Verdict {
    let (vmbus, offer) = offered(context)?;
    let got = vmbus.kernel().signal(0, offer.connection, 0)?;
    equal(
        "status of HvSignalEvent",
        got,
        status::INVALID_CONNECTION_ID,
    )?;
    alive(&vmbus)
}
