//! The MSI capability (docs/spec/vpci.md, section 7.1).
#![forbid(unsafe_code)]

use super::{arrive, bus, device, vectors};
use crate::check::{Check, Context, Failure, Verdict, equal};
use crate::devices::Plain;
use crate::host::{BusSetup, Setup};
use crate::model::kernel::Retarget;
use crate::model::testdev::{CAP_MSI, TestDev};
use crate::model::vpci::{Bus, Create, Message};

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "interrupts.msi.single",
        "One MSI message works as an MSI-X entry does.",
        &["VP-7.1-01", "VP-7.1-02"],
        single,
    ),
    Check::new(
        "interrupts.msi.multiple",
        "Of several messages each is the data with its low bits replaced, and goes its own way.",
        &["VP-7.1-04"],
        multiple,
    ),
    Check::new(
        "interrupts.msi.thirty-two",
        "32 messages of one block all arrive.",
        &["VP-7.1-04"],
        thirty_two,
    ),
    Check::new(
        "interrupts.msi.three-of-four",
        "Three messages with the capability enabled for four: three arrive, the fourth is nothing.",
        &["VP-7.1-04"],
        three_of_four,
    ),
    Check::new(
        "interrupts.msi.masked",
        "An event of a masked message shows as pending, and is raised once when it is unmasked.",
        &["VP-7.1-08"],
        masked,
    ),
    Check::new(
        "interrupts.msi.disabled",
        "With MSI off nothing is raised, then or when it is on again; nor is there INTx.",
        &["VP-7.1-13", "VP-7.1-08"],
        disabled,
    ),
    Check::new(
        "interrupts.msi.foreign-messages",
        "MSI raises live messages of its function alone, whatever is written to it.",
        &["VP-11-09", "VP-7.1-09"],
        foreign,
    ),
    Check::new(
        "interrupts.msi.msix-goes-first",
        "With both on MSI-X counts.",
        &["VP-11-15"],
        msix_first,
    ),
];

/// The registers of a function's MSI capability.
struct Msi<'a> {
    bus: &'a Bus,
    at: u64,
}

impl<'a> Msi<'a> {
    fn of(bus: &'a Bus) -> Result<Self, Failure> {
        match bus.capability(0, CAP_MSI)? {
            Some(at) => Ok(Self { bus, at }),
            None => Err(Failure::Host("the device has no MSI".into())),
        }
    }

    /// Address and data.
    fn message(&self, message: Message) -> Verdict {
        self.bus
            .set_config(0, self.at + 4, 4, message.address & 0xffff_ffff)?;
        self.bus
            .set_config(0, self.at + 8, 4, message.address >> 32)?;
        Ok(self
            .bus
            .set_config(0, self.at + 12, 2, message.data.into())?)
    }

    /// Enables 1 << `log2` messages, or none.
    fn enable(&self, on: bool, log2: u64) -> Verdict {
        let bits = u64::from(on) | log2 << 4;
        Ok(self.bus.set_config(0, self.at + 2, 2, bits)?)
    }

    fn mask(&self, mask: u64) -> Verdict {
        Ok(self.bus.set_config(0, self.at + 16, 4, mask)?)
    }

    fn pending(&self) -> Result<u64, Failure> {
        Ok(self.bus.config(0, self.at + 20, 4)?)
    }
}

fn block(bus: &Bus, vector: u8, count: u16) -> Result<Message, Failure> {
    bus.must_create(&Create {
        count,
        ..Create::one(0, vector, 0)
    })
}

fn single(context: &Context) -> Verdict {
    let device = device(context)?;
    let bus = device.bus();
    let msi = Msi::of(bus)?;
    let message = block(bus, 0x60, 1)?;
    msi.message(message)?;
    msi.enable(true, 0)?;
    // A device with more vectors than messages shares the one out.
    for entry in [0, 5] {
        device.raise(entry)?;
        arrive("one message", bus.vm(), &[(0, 0x60)])?;
    }
    bus.kernel()
        .must_retarget(0, &bus.retarget(0, message, 0x61, 1))?;
    device.raise(0)?;
    arrive("after a retarget", bus.vm(), &[(1, 0x61)])
}

fn multiple(context: &Context) -> Verdict {
    let device = device(context)?;
    let bus = device.bus();
    // Something before it, so that the block's data is not 0.
    block(bus, 0x50, 3)?;
    let message = block(bus, 0x60, 8)?;
    let msi = Msi::of(bus)?;
    // Low bits of the data that the device replaces.
    msi.message(Message {
        data: message.data | 5,
        ..message
    })?;
    msi.enable(true, 3)?;
    for index in 1..8 {
        let moved = Retarget::new(
            bus.logical_id(0),
            message.address,
            message.data + index,
            0x70 + index as u8,
            index % 2,
        );
        bus.kernel().must_retarget(0, &moved)?;
    }
    device.raise(0)?;
    arrive("message 0", bus.vm(), &[(0, 0x60)])?;
    for index in (1..8).rev() {
        device.raise(index)?;
        let expected = [(index % 2, 0x70 + index as u8)];
        arrive(&format!("message {index}"), bus.vm(), &expected)?;
    }
    Ok(())
}

/// A device with 32 messages.
fn plain(context: &Context) -> Result<(std::sync::Arc<Plain>, Bus), Failure> {
    let device = Plain::wide();
    let setup = Setup {
        buses: vec![BusSetup::clone(&device.bus(1))],
        ..Setup::default()
    };
    let bus = Bus::bring_up(&context.machine(&setup)?)?;
    Ok((device, bus))
}

fn thirty_two(context: &Context) -> Verdict {
    let (device, bus) = plain(context)?;
    let message = block(&bus, 0x80, 32)?;
    let msi = Msi::of(&bus)?;
    msi.message(message)?;
    msi.enable(true, 5)?;
    for index in 0..32 {
        device.raise(index);
        let expected = [(0, 0x80 + index as u8)];
        arrive(&format!("message {index}"), bus.vm(), &expected)?;
    }
    Ok(())
}

fn three_of_four(context: &Context) -> Verdict {
    let (device, bus) = plain(context)?;
    let message = block(&bus, 0x80, 3)?;
    equal("messages of the reply", message.count, 3)?;
    // Whoever comes next must not be hit by the fourth.
    let next = block(&bus, 0x90, 1)?;
    let msi = Msi::of(&bus)?;
    msi.message(message)?;
    msi.enable(true, 2)?;
    for index in 0..3 {
        device.raise(index);
        let expected = [(0, 0x80 + index as u8)];
        arrive(&format!("message {index}"), bus.vm(), &expected)?;
    }
    device.raise(3);
    arrive("the fourth message", bus.vm(), &[])?;
    equal(
        "whose data it would be",
        next.data == message.data + 3,
        false,
    )
}

fn masked(context: &Context) -> Verdict {
    let device = device(context)?;
    let bus = device.bus();
    let msi = Msi::of(bus)?;
    msi.message(block(bus, 0x60, 4)?)?;
    msi.mask(0b1010)?;
    msi.enable(true, 2)?;
    for entry in [0, 1, 3, 1] {
        device.raise(entry)?;
    }
    arrive("with two masked", bus.vm(), &[(0, 0x60)])?;
    equal("pending bits", msi.pending()?, 0b1010)?;
    msi.mask(0b1000)?;
    arrive("after one was unmasked", bus.vm(), &[(0, 0x61)])?;
    equal("pending bits", msi.pending()?, 0b1000)?;
    msi.mask(0)?;
    arrive("after both were", bus.vm(), &[(0, 0x63)])?;
    equal("pending bits", msi.pending()?, 0)
}

fn disabled(context: &Context) -> Verdict {
    let device = device(context)?;
    let bus = device.bus();
    let msi = Msi::of(bus)?;
    msi.message(block(bus, 0x60, 1)?)?;
    device.raise(0)?;
    arrive("with MSI off", bus.vm(), &[])?;
    equal("pending bits", msi.pending()?, 0)?;
    // Neither INTx, nor a sign of it.
    equal("interrupt status", bus.config(0, 6, 2)? & 8, 0)?;
    msi.enable(true, 0)?;
    arrive("when it is on", bus.vm(), &[])?;
    device.raise(0)?;
    arrive("with MSI on", bus.vm(), &[(0, 0x60)])?;
    msi.mask(1)?;
    device.raise(0)?;
    msi.enable(false, 0)?;
    msi.mask(0)?;
    arrive("masked, then off", bus.vm(), &[])?;
    msi.enable(true, 0)?;
    arrive("and on again", bus.vm(), &[])
}

fn foreign(context: &Context) -> Verdict {
    let device = device(context)?;
    let bus = device.bus();
    let live = block(bus, 0x60, 1)?;
    let msi = Msi::of(bus)?;
    msi.enable(true, 0)?;
    for (address, data) in [
        (0, 0),
        (live.address, live.data + 1),
        (live.address, 0x60),
        (live.address, 0xffff),
        (live.address + 4, live.data),
        (live.address | 1 << 32, live.data),
        (0xfee0_1000, 0x60),
        (0x10_0000, 1),
    ] {
        let message = Message {
            count: 1,
            data,
            address,
        };
        msi.message(message)?;
        device.raise(0)?;
        arrive(&format!("{address:#x}, {data:#x}"), bus.vm(), &[])?;
    }
    msi.message(live)?;
    device.raise(0)?;
    arrive("its own message", bus.vm(), &[(0, 0x60)])
}

fn msix_first(context: &Context) -> Verdict {
    let device = TestDev::start(&bus(context)?, 0)?;
    let bus = device.bus();
    let msi = Msi::of(bus)?;
    msi.message(block(bus, 0x60, 1)?)?;
    msi.enable(true, 0)?;
    device.interrupt(0, 0x41, 1)?;
    device.raise(0)?;
    arrive("with both on", bus.vm(), &[(1, 0x41)])?;
    equal("interrupts of VP 0", vectors(bus.vm(), 0)?, vec![])?;
    device.enable_msix(false)?;
    device.raise(0)?;
    arrive("with MSI alone", bus.vm(), &[(0, 0x60)])
}
