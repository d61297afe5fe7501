//! Control messages: contact, offers, GPADLs, channels (docs/spec/vmbus.md, sections 1 to 6, 8
//! and 10).
#![forbid(unsafe_code)]

use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::host::{BusSetup, Setup};
use crate::model::kernel::Kernel;
use crate::model::vm::{PAGE, Vm};
use crate::model::vmbus::{Offer, Open, VmBus, message};
use crate::model::wire::{Bytes, u32_at};

mod channels;
mod contact;
mod gpadls;
mod messages;
mod offers;
mod opening;
mod rescind;
mod unload;

/// All checks of this area.
pub const CHECKS: [&[Check]; 8] = [
    contact::CHECKS,
    offers::CHECKS,
    gpadls::CHECKS,
    opening::CHECKS,
    channels::CHECKS,
    rescind::CHECKS,
    unload::CHECKS,
    messages::CHECKS,
];

/// TL_CONNECT_REQUEST.
const TL_CONNECT_REQUEST: u32 = 21;
/// TL_CONNECT_RESULT.
const TL_CONNECT_RESULT: u32 = 23;

/// A guest in contact on the usual machine.
fn connected(context: &Context) -> Result<VmBus, Failure> {
    VmBus::connect(&Kernel::boot(&context.usual()?)?)
}

/// The same with the offer of its bus.
fn offered(context: &Context) -> Result<(VmBus, Offer), Failure> {
    let vmbus = connected(context)?;
    let offer = vmbus.only_offer()?;
    Ok((vmbus, offer))
}

/// A machine with a `testdev` on each of the buses 1 to `count`.
fn buses(count: u16) -> Setup {
    Setup {
        buses: (1..=count).map(BusSetup::testdev).collect(),
        ..Setup::default()
    }
}

/// A guest in contact on a machine with two buses, and their offers.
fn two_offers(context: &Context) -> Result<(VmBus, Offer, Offer), Failure> {
    let vmbus = VmBus::connect(&Kernel::boot(&context.machine(&buses(2))?)?)?;
    let offers = vmbus.offers()?;
    match <[Offer; 2]>::try_from(offers) {
        Ok([first, second]) => Ok((vmbus, first, second)),
        Err(offers) => Err(Failure::Unmet {
            what: "number of offers".into(),
            expected: "2".into(),
            got: offers.len().to_string(),
        }),
    }
}

/// What a guest of version 4.1 or newer gets an answer to in every state of a connection.
fn hvsock_request(tag: u8) -> Bytes {
    Bytes::words(&[TL_CONNECT_REQUEST, 0]).bytes(&[tag; 32])
}

/// The connection is up, and the host has sent nothing else.
fn alive(vmbus: &VmBus) -> Verdict {
    vmbus.send(&hvsock_request(0x5c).0)?;
    let answer = vmbus.expect(TL_CONNECT_RESULT, 44)?;
    equal("GUIDs of TL_CONNECT_RESULT", &answer[8..40], &[0x5c; 32])
}

/// No VP has a message in its slot.
fn all_silent(vm: &Vm, kernel: &Kernel) -> Verdict {
    vm.settle();
    for vp in 0..vm.vps() {
        let slot = kernel.synic(vp).pending(crate::model::kernel::VMBUS_SINT)?;
        equal(format!("message in the slot of VP {vp}"), slot, 0)?;
    }
    Ok(())
}

/// Page numbers of fresh pages in a row.
fn fresh(vm: &Vm, count: u64) -> Result<Vec<u64>, Failure> {
    let first = vm.pages(count)? / PAGE;
    Ok((first..first + count).collect())
}

/// A GPADL of fresh pages in a row, good for two rings of half as many: its id and pages.
fn ring_gpadl(vmbus: &VmBus, offer: &Offer, pages: u64) -> Result<(u32, Vec<u64>), Failure> {
    let (pfns, id) = (fresh(vmbus.vm(), pages)?, vmbus.gpadl_id());
    let status = vmbus.create_gpadl(offer.relid, id, &pfns)?;
    equal("status of GPADL_CREATED", status, 0)?;
    Ok((id, pfns))
}

/// An OPEN_CHANNEL that works for a GPADL of ten zeroed pages.
fn open_of(offer: &Offer, gpadl: u32) -> Open {
    Open {
        relid: offer.relid,
        id: 0x1234,
        gpadl,
        vp: 0,
        downstream: 5,
    }
}

/// Posts a message whose answer is not waited for; it must be taken.
fn post(vmbus: &VmBus, words: &[u32]) -> Verdict {
    vmbus.send(&Bytes::words(words).0)
}

/// A status is a failure.
fn refused(what: &str, status: u32) -> Verdict {
    holds(
        format!("{what}: status {status:#x} is a failure"),
        status != 0,
    )
}

/// The next message is a GPADL_CREATED with a failure.
fn gpadl_refused(vmbus: &VmBus, relid: u32, id: u32, what: &str) -> Verdict {
    let status = vmbus.gpadl_created(relid, id);
    refused(what, status.map_err(|failure| failure.during(what))?)
}

/// Asks for offers where the host owes none: it stays silent.
fn no_offers(vmbus: &VmBus) -> Verdict {
    post(vmbus, &[message::REQUEST_OFFERS, 0])?;
    vmbus.expect_silence()
}

/// The number of each message that waits, all taken.
fn drain(vmbus: &VmBus, vp: u32) -> Result<Vec<u32>, Failure> {
    let mut numbers = Vec::new();
    while let Some(message) = vmbus.receive_on(vp)? {
        numbers.push(u32_at(&message, 0));
    }
    Ok(numbers)
}
