//! What a bus and its functions are called (docs/spec/vpci.md, section 1).
#![forbid(unsafe_code)]

use uuid::Uuid;

use super::{in_d0, with};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::host::{BusSetup, FunctionSetup, Setup};
use crate::model::kernel::{Kernel, Retarget, VMBUS_VECTOR, status};
use crate::model::vmbus::{VmBus, is_dedicated};
use crate::model::vpci::{Bus, Create, message, nt, slot};
use crate::model::wire::u16_at;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "vpci.offer.identity",
        "A bus is offered with the class of virtual PCI buses and its own instance GUID.",
        &["VP-1-01", "VP-1-02", "VP-1.1-01", "VP-1.1-02"],
        offer,
    ),
    Check::new(
        "vpci.channel.interrupt",
        "The channel interrupts the VP that its opening names, with rings of five pages each.",
        &["VP-1-04"],
        channel_interrupt,
    ),
    Check::new(
        "vpci.id.from-guid",
        "A function's logical device id is made of four GUID bytes and its number.",
        &[
            "VP-1.1-03",
            "VP-1.1-04",
            "VP-1.1-05",
            "VP-1.1-06",
            "VP-1.1-07",
            "VP-1.1-09",
            "VP-1.1-10",
            "VP-11-11",
        ],
        id_from_guid,
    ),
    Check::new(
        "vpci.id.sign-extended",
        "The upper half of a logical device id in a retarget is without meaning.",
        &["VP-1.1-11", "VP-11-11"],
        id_sign_extended,
    ),
    Check::new(
        "vpci.id.unique",
        "A bus whose functions would share an id with others is refused, and the guest sees nothing.",
        &["VP-1.1-13"],
        id_unique,
    ),
    Check::new(
        "vpci.id.device-number",
        "Functions sit on device 0; no other device number names one.",
        &["VP-1.1-12", "VP-3.2-01"],
        device_number,
    ),
];

fn offer(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let offer = VmBus::connect(&Kernel::boot(&vm)?)?.only_offer()?;
    let class = [
        0x1d, 0xf6, 0xc4, 0x44, 0x44, 0x44, 0x00, 0x44, 0x9d, 0x52, 0x80, 0x2e, 0x27, 0xed, 0xe1,
        0x9f,
    ];
    equal("class GUID", &offer.raw[8..24], &class)?;
    let instance = BusSetup::instance(1).to_bytes_le();
    equal("instance GUID", &offer.raw[24..40], &instance)?;
    let domain = u16_at(&offer.raw, 24 + 4);
    equal("bytes 4 and 5 of the instance GUID", domain, 1)?;
    equal("megabytes of MMIO", u16_at(&offer.raw, 58), 0)?;
    equal("user data", &offer.raw[60..180], &[0; 120])?;
    equal("index of the sub-channel", u16_at(&offer.raw, 180), 0)?;
    equal("monitor flag", offer.raw[189] & 1, 0)?;
    holds("the interrupt is dedicated", is_dedicated(&offer))
}

fn channel_interrupt(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let channel = vmbus.open_sized(&vmbus.only_offer()?, 5, 1)?;
    equal("bytes of a ring's data", channel.to_host.size(), 0x4000)?;
    vm.take_interrupts(0)?;
    vm.take_interrupts(1)?;
    // Opening may have raised it already.
    channel.interrupted()?;
    let bus = Bus::new(channel, 0);
    bus.negotiate(0x1_0004)?;
    vm.expect_interrupt(1, VMBUS_VECTOR)?;
    holds(
        "the channel's event flag is set",
        bus.channel().interrupted()?,
    )?;
    equal("interrupts of VP 0", vm.take_interrupts(0)?, vec![])
}

/// A machine whose only bus has this GUID and these functions, in D0.
fn named(context: &Context, instance: Uuid, functions: &[u8]) -> Result<Bus, Failure> {
    let functions = functions.iter().copied().map(FunctionSetup::testdev);
    let buses = vec![BusSetup {
        instance,
        functions: functions.collect(),
    }];
    Bus::bring_up(&context.machine(&Setup {
        buses,
        ..Setup::default()
    })?)
}

/// The retarget of a message of `id`'s device.
fn to(id: u64, data: u32) -> Retarget {
    Retarget::new(id, 0xfee0_0000, data, 0x41, 0)
}

fn id_from_guid(context: &Context) -> Verdict {
    // The low three bits of data3 do not reach the id.
    let instance = Uuid::from_fields(0xdead_beef, 0x1234, 0xab7f, &[9; 8]);
    let bus = named(context, instance, &[0, 1, 7])?;
    let kernel = bus.kernel();
    for function in [0, 1, 7] {
        let message = bus.must_create(&Create::one(slot(function), 0x60, 0))?;
        let id = 0x1234_ab78 + u64::from(function);
        let retarget = Retarget::new(id, message.address, message.data, 0x41, 1);
        equal(
            format!("status of a retarget of {id:#x}"),
            kernel.retarget(0, &retarget)?,
            status::SUCCESS,
        )?;
    }
    for id in [0x1234_ab7a, 0x1234_ab7e, 0xab78_1234, 0x1234_ab80, 0, 1] {
        equal(
            format!("status of a retarget of {id:#x}"),
            kernel.retarget(0, &to(id, 0))?,
            status::INVALID_DEVICE_ID,
        )?;
    }
    Ok(())
}

fn id_sign_extended(context: &Context) -> Verdict {
    let instance = Uuid::from_fields(1, 0x9234, 0xab78, &[9; 8]);
    let bus = named(context, instance, &[0, 1])?;
    let message = bus.must_create(&Create::one(slot(1), 0x60, 0))?;
    for upper in [0xffff_ffff, 0, 0x1234_5678u64] {
        let id = upper << 32 | 0x9234_ab79;
        let retarget = Retarget::new(id, message.address, message.data, 0x41, 1);
        let what = format!("status of a retarget of {id:#x}");
        equal(what, bus.kernel().retarget(0, &retarget)?, status::SUCCESS)?;
    }
    Ok(())
}

fn id_unique(context: &Context) -> Verdict {
    let bus = in_d0(context)?;
    let (_, data2, data3, _) = BusSetup::instance(1).as_fields();
    let twin = BusSetup {
        instance: Uuid::from_fields(0x7777, data2, data3, &[3; 8]),
        functions: vec![FunctionSetup::testdev(0)],
    };
    holds(
        "a bus with taken ids is refused",
        bus.vm().plug(&twin).is_err(),
    )?;
    bus.vmbus().expect_silence()?;
    equal("buses", bus.vm().host().buses().len(), 1)?;
    equal("vendor of the first bus", bus.config(0, 0, 2)?, 0x1234)?;
    // What was refused leaves nothing behind: another name is free.
    bus.vm().plug(&BusSetup::testdev(2))?;
    bus.vmbus().expect_offer()?;
    Ok(())
}

fn device_number(context: &Context) -> Verdict {
    let setup = with(vec![FunctionSetup::testdev(0), FunctionSetup::testdev(3)]);
    let bus = Bus::bring_up(&context.machine(&setup)?)?;
    for code in 0..=0xffu32 {
        let exists = code == 0 || code == 3 << 5;
        let vendor = if exists { 0x1234 } else { 0xffff };
        let what = format!("vendor id behind slot {code:#x}");
        equal(what, bus.config(code, 0, 2)?, vendor)?;
    }
    for code in [1, 3, 0x1f, 3 << 5 | 1, 1 << 5, 7 << 5] {
        let request = [message::QUERY_RESOURCE_REQUIREMENTS, code];
        let what = format!("status for slot {code:#x}");
        equal(what, bus.status(&request)?, nt::BAD_DATA)?;
    }
    Ok(())
}
