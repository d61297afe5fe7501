//! HvRetargetDeviceInterrupt (docs/spec/vpci.md, section 7.2).
#![forbid(unsafe_code)]

use super::{arrive, device, with_vps};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::host::{BusSetup, FunctionSetup, Setup};
use crate::model::kernel::{Kernel, RETARGET_INTERRUPT, Retarget, Targets, status};
use crate::model::testdev::{Interrupt, TestDev};
use crate::model::vmbus::VmBus;
use crate::model::vpci::{Bus, Create, VERSIONS, slot};
use crate::model::wire::Bytes;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "interrupts.retarget.vector-and-vp",
        "A retarget gives a message another vector and another VP.",
        &[
            "VP-7.2-01",
            "VP-7.2-02",
            "VP-7.2-03",
            "VP-7.2-04",
            "VP-7.2-06",
            "VP-7.2-07",
            "VP-7.2-09",
            "HV-3.5-03",
            "HV-3.4-01",
        ],
        vector_and_vp,
    ),
    Check::new(
        "interrupts.retarget.mask",
        "Without the processor set flag the target is a mask of VPs 0 to 63.",
        &["VP-7.2-11", "VP-7.2-14"],
        mask,
    ),
    Check::new(
        "interrupts.retarget.sparse-set",
        "A sparse set names VPs in its banks, lowest first; empty banks are fine.",
        &[
            "VP-7.2-10",
            "VP-7.2-11",
            "VP-7.2-12",
            "VP-7.2-13",
            "VP-7.2-14",
        ],
        sparse_set,
    ),
    Check::new(
        "interrupts.retarget.one-of-a-set",
        "Without multicast an event goes to one VP of the set.",
        &["VP-7.2-15"],
        one_of_a_set,
    ),
    Check::new(
        "interrupts.retarget.multicast",
        "With multicast an event goes to every VP of the set, and back to one afterwards.",
        &["VP-7.2-15", "VP-7.2-10"],
        multicast,
    ),
    Check::new(
        "interrupts.retarget.refused",
        "Each impossible field gets its documented status; the message goes where it went.",
        &[
            "VP-7.2-16",
            "VP-7.2-04",
            "VP-7.2-05",
            "VP-7.2-08",
            "VP-11-07",
            "VP-11-08",
            "HV-3.4-05",
            "HV-3.4-09",
            "HV-3.4-18",
        ],
        refused,
    ),
    Check::new(
        "interrupts.retarget.bad-set",
        "A set that is empty, of another format, or not as long as its banks is refused.",
        &["VP-7.2-16", "VP-7.2-12", "VP-7.2-13"],
        bad_set,
    ),
    Check::new(
        "interrupts.retarget.vectors",
        "Vectors 0x10 to 0xff can be targets, and no others.",
        &["VP-7.2-16", "VP-7.2-09", "VP-11-07"],
        all_vectors,
    ),
    Check::new(
        "interrupts.retarget.unknown-handle",
        "A message that is not live, or of another function, is INVALID_PARAMETER.",
        &["VP-7.2-16", "VP-11-10"],
        unknown_handle,
    ),
    Check::new(
        "interrupts.retarget.stale-handle",
        "A deleted message stays unknown until it is given out again, and then is the new one.",
        &["VP-11-10", "VP-7.1-12"],
        stale_handle,
    ),
    Check::new(
        "interrupts.retarget.low-address",
        "The low half of the address is all that a retarget carries, and it is enough.",
        &["VP-7.1-02", "VP-7.2-06"],
        low_address,
    ),
    Check::new(
        "interrupts.retarget.effective-on-return",
        "Once a retarget has returned nothing comes the old way.",
        &["VP-7.2-17", "VP-7.1-08"],
        effective_on_return,
    ),
    Check::new(
        "interrupts.retarget.from-any-vp",
        "Any VP can retarget, to itself and to others.",
        &["VP-7.2-17"],
        from_any_vp,
    ),
    Check::new(
        "interrupts.retarget.messages-of-a-block",
        "Each message of a block has a target of its own.",
        &["VP-7.1-04"],
        messages_of_a_block,
    ),
    Check::new(
        "interrupts.retarget.after-close",
        "After close and before D0 a retarget is an error and no fault.",
        &["VP-7.2-18"],
        after_close,
    ),
];

fn retarget(device: &TestDev, interrupt: &Interrupt) -> Retarget {
    let Interrupt {
        message,
        vector,
        vp,
        ..
    } = *interrupt;
    device.bus().retarget(device.slot(), message, vector, vp)
}

fn vector_and_vp(context: &Context) -> Verdict {
    let device = device(context)?;
    let interrupt = device.interrupt(0, 0x41, 0)?;
    for (vector, vp) in [(0x41, 0), (0x42, 0), (0x42, 1), (0x43, 1), (0xfe, 0)] {
        let moved = Interrupt {
            vector,
            vp,
            ..interrupt
        };
        device.retarget(&moved)?;
        device.raise(0)?;
        arrive("after a retarget", device.vm(), &[(vp, vector)])?;
    }
    Ok(())
}

fn mask(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    let bus = Bus::probe(&vmbus, &vmbus.only_offer()?, VERSIONS[3])?;
    let device = TestDev::start(&bus, 0)?;
    let interrupt = device.interrupt(0, 0x41, 0)?;
    for (mask, vp) in [(1, 0), (2, 1)] {
        let by_mask = Retarget {
            targets: Targets::Mask(mask),
            vector: 0x50 + vp,
            ..retarget(&device, &interrupt)
        };
        bus.kernel().must_retarget(0, &by_mask)?;
        device.raise(0)?;
        arrive("after a retarget by mask", &vm, &[(vp, 0x50 + vp as u8)])?;
    }
    for mask in [0, 4, 1 << 63] {
        let by_mask = Retarget {
            targets: Targets::Mask(mask),
            ..retarget(&device, &interrupt)
        };
        let got = bus.kernel().retarget(0, &by_mask)?;
        equal(
            format!("status of mask {mask:#x}"),
            got,
            status::INVALID_PARAMETER,
        )?;
    }
    Ok(())
}

fn set(banks: u64, masks: &[u64]) -> Targets {
    Targets::Set {
        format: 0,
        banks,
        masks: masks.to_vec(),
    }
}

fn sparse_set(context: &Context) -> Verdict {
    let vm = context.machine(&with_vps(66))?;
    let device = TestDev::bring_up(&vm)?;
    let interrupt = device.interrupt(0, 0x41, 0)?;
    for (targets, vp) in [
        (set(1, &[1 << 3]), 3),
        (set(2, &[2]), 65),
        (set(3, &[0, 1]), 64),
        (set(3, &[1 << 63, 0]), 63),
        (set(7, &[0, 2, 0]), 65),
        (set(1 << 63 | 1, &[1, 0]), 0),
        (set(u64::MAX, &[&[0; 1][..], &[1], &[0; 62]].concat()), 64),
    ] {
        let moved = Retarget {
            targets,
            ..retarget(&device, &interrupt)
        };
        device.bus().kernel().must_retarget(0, &moved)?;
        device.raise(0)?;
        let what = format!("after {:?}", moved.targets);
        let arrived = vm.expect_interrupt(vp, 0x41);
        arrived.map_err(|failure| failure.during(what))?;
        equal("more of them", super::vectors(&vm, vp)?, vec![])?;
    }
    for (targets, what) in [
        (set(2, &[4]), "VP 66"),
        (set(4, &[1]), "VP 128"),
        (set(3, &[1, 4]), "VP 0 and 66"),
        (set(1 << 63, &[1 << 63]), "VP 4095"),
    ] {
        let moved = Retarget {
            targets,
            ..retarget(&device, &interrupt)
        };
        let got = device.bus().kernel().retarget(0, &moved)?;
        equal(
            format!("status of a set with {what}"),
            got,
            status::INVALID_PARAMETER,
        )?;
    }
    Ok(())
}

fn to_both(device: &TestDev, interrupt: &Interrupt, flags: u32) -> Verdict {
    let moved = Retarget {
        flags,
        targets: Targets::all(&[0, 1, 2]),
        ..retarget(device, interrupt)
    };
    device.bus().kernel().must_retarget(0, &moved)
}

fn one_of_a_set(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.machine(&with_vps(3))?)?;
    let interrupt = device.interrupt(0, 0x41, 0)?;
    to_both(&device, &interrupt, 0)?;
    for _ in 0..10 {
        device.raise(0)?;
        let mut came = 0;
        for vp in 0..3 {
            came += super::vectors(device.vm(), vp)?.len();
        }
        equal("interrupts of all VPs", came, 1)?;
    }
    Ok(())
}

fn multicast(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.machine(&with_vps(3))?)?;
    let interrupt = device.interrupt(0, 0x41, 0)?;
    to_both(&device, &interrupt, 1)?;
    for _ in 0..3 {
        device.raise(0)?;
        arrive("to all", device.vm(), &[(0, 0x41), (1, 0x41), (2, 0x41)])?;
    }
    // A set of one VP, with the flag and without.
    for flags in [1, 0] {
        let one = Retarget {
            flags,
            targets: Targets::one(2),
            ..retarget(&device, &interrupt)
        };
        device.bus().kernel().must_retarget(0, &one)?;
        device.raise(0)?;
        arrive("to one", device.vm(), &[(2, 0x41)])?;
    }
    Ok(())
}

fn still(device: &TestDev, what: &str) -> Verdict {
    device.raise(0)?;
    arrive(what, device.vm(), &[(1, 0x41)])
}

fn refused(context: &Context) -> Verdict {
    let device = device(context)?;
    let interrupt = device.interrupt(0, 0x41, 1)?;
    let kernel = device.bus().kernel();
    let good = Retarget {
        vector: 0x55,
        targets: Targets::one(0),
        ..retarget(&device, &interrupt)
    };
    let with = |change: fn(&mut Retarget)| {
        let mut bad = good.clone();
        change(&mut bad);
        bad
    };
    let parameter = status::INVALID_PARAMETER;
    for (what, bad, expected) in [
        (
            "partition 0",
            with(|bad| bad.partition = 0),
            status::INVALID_PARTITION_ID,
        ),
        (
            "partition 5",
            with(|bad| bad.partition = 5),
            status::INVALID_PARTITION_ID,
        ),
        (
            "another device",
            with(|bad| bad.device += 8),
            status::INVALID_DEVICE_ID,
        ),
        (
            "function 1",
            with(|bad| bad.device += 1),
            status::INVALID_DEVICE_ID,
        ),
        (
            "device 0",
            with(|bad| bad.device = 0),
            status::INVALID_DEVICE_ID,
        ),
        ("source 0", with(|bad| bad.source = 0), parameter),
        ("source IO-APIC", with(|bad| bad.source = 2), parameter),
        ("source 0x101", with(|bad| bad.source = 0x101), parameter),
        ("vector 15", with(|bad| bad.vector = 15), parameter),
        ("vector 0", with(|bad| bad.vector = 0), parameter),
        ("vector 0x100", with(|bad| bad.vector = 0x100), parameter),
        (
            "vector 0x80000041",
            with(|bad| bad.vector = 0x8000_0041),
            parameter,
        ),
        ("proxy redirection", with(|bad| bad.flags = 4), parameter),
        ("flag 8", with(|bad| bad.flags = 8), parameter),
        ("flag 31", with(|bad| bad.flags = 1 << 31), parameter),
        ("VP 2", with(|bad| bad.targets = Targets::one(2)), parameter),
        (
            "VP 0 and 2",
            with(|bad| bad.targets = Targets::all(&[0, 2])),
            parameter,
        ),
    ] {
        let got = kernel.retarget(0, &bad)?;
        equal(format!("status for {what}"), got, expected)?;
        still(&device, what)?;
    }
    // Reserved fields.
    let (control, input) = good.encode();
    for offset in [20, 23, 32, 36, 39] {
        let mut bytes = input.0.clone();
        bytes[offset] = 1;
        let got = kernel.call_with(0, control, &bytes)?;
        equal(format!("status for reserved byte {offset}"), got, parameter)?;
        still(&device, "a reserved byte")?;
    }
    kernel.must_retarget(0, &good)?;
    device.raise(0)?;
    arrive("the good one", device.vm(), &[(0, 0x55)])
}

fn bad_set(context: &Context) -> Verdict {
    let device = device(context)?;
    let interrupt = device.interrupt(0, 0x41, 1)?;
    let kernel = device.bus().kernel();
    let of_format = |format| Targets::Set {
        format,
        banks: 1,
        masks: vec![1],
    };
    for (what, targets) in [
        ("no bank", set(0, &[])),
        ("one empty bank", set(1, &[0])),
        ("two empty banks", set(3, &[0, 0])),
        ("a bank that is not there", set(3, &[1])),
        ("a bank that is not named", set(1, &[1, 1])),
        ("a bank named by nothing", set(0, &[1])),
        ("all VPs", of_format(1)),
        ("format 2", of_format(2)),
        ("format 1 << 32", of_format(1 << 32)),
    ] {
        let bad = Retarget {
            vector: 0x55,
            targets,
            ..retarget(&device, &interrupt)
        };
        let got = kernel.retarget(0, &bad)?;
        equal(format!("status for {what}"), got, status::INVALID_PARAMETER)?;
        still(&device, what)?;
    }
    // A mask has no variable part, and a set has one.
    let (control, input) = retarget(&device, &interrupt).encode();
    let got = kernel.call_with(0, RETARGET_INTERRUPT, &input.0)?;
    equal(
        "status for a set without its banks",
        got,
        status::INVALID_PARAMETER,
    )?;
    let by_mask = Retarget {
        targets: Targets::Mask(1),
        ..retarget(&device, &interrupt)
    };
    let input = Bytes(by_mask.encode().1.0).u64(1).u64(1);
    let got = kernel.call_with(0, control, &input.0)?;
    equal(
        "status for a mask with banks",
        got,
        status::INVALID_PARAMETER,
    )?;
    still(&device, "a set without its banks")
}

fn all_vectors(context: &Context) -> Verdict {
    let device = device(context)?;
    let interrupt = device.interrupt(0, 0x41, 1)?;
    for vector in 0..=0xff {
        let moved = Interrupt {
            vector,
            ..interrupt
        };
        let got = device
            .bus()
            .kernel()
            .retarget(0, &retarget(&device, &moved))?;
        let expected = match vector {
            0x10.. => status::SUCCESS,
            _ => status::INVALID_PARAMETER,
        };
        equal(format!("status for vector {vector:#x}"), got, expected)?;
    }
    device.raise(0)?;
    arrive("the last vector", device.vm(), &[(1, 0xff)])
}

fn two_devices(context: &Context) -> Result<[TestDev; 2], Failure> {
    let vm = context.machine(&Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: vec![FunctionSetup::testdev(0), FunctionSetup::testdev(1)],
        }],
        ..Setup::default()
    })?;
    let bus = Bus::bring_up(&vm)?;
    Ok([TestDev::start(&bus, 0)?, TestDev::start(&bus, 1)?])
}

fn unknown_handle(context: &Context) -> Verdict {
    let [first, second] = two_devices(context)?;
    let interrupt = first.interrupt(0, 0x41, 1)?;
    let kernel = first.bus().kernel();
    let good = retarget(&first, &interrupt);
    for (what, address, data) in [
        ("the next data", good.address, good.data + 1),
        ("data beyond all", good.address, 1024),
        ("data of all ones", good.address, u32::MAX),
        ("data with a high bit", good.address, good.data | 1 << 31),
        ("the next address", good.address + 4, good.data),
        ("address 0", 0, 0),
        ("a raw message", 0xfee0_0000, 0x41),
        ("a raw message to APIC 1", 0xfee0_1000, good.data),
    ] {
        let bad = Retarget {
            address,
            data,
            vector: 0x55,
            ..good.clone()
        };
        let got = kernel.retarget(0, &bad)?;
        equal(format!("status for {what}"), got, status::INVALID_PARAMETER)?;
    }
    let bad = second.bus().retarget(slot(1), interrupt.message, 0x55, 0);
    let got = kernel.retarget(0, &bad)?;
    equal(
        "status for the other function",
        got,
        status::INVALID_PARAMETER,
    )?;
    still(&first, "unknown messages")?;
    // Two functions may have equal messages: the id tells which is meant.
    let other = second.interrupt(0, 0x51, 0)?;
    equal(
        "the other function's message",
        other.message,
        interrupt.message,
    )?;
    second.retarget(&Interrupt {
        vector: 0x52,
        ..other
    })?;
    still(&first, "the other function's retarget")?;
    second.raise(0)?;
    arrive("the other function", first.vm(), &[(0, 0x52)])
}

fn stale_handle(context: &Context) -> Verdict {
    let device = device(context)?;
    let bus = device.bus();
    let old = device.interrupt(0, 0x41, 1)?;
    bus.delete(0, old.message)?;
    let got = bus.kernel().retarget(0, &retarget(&device, &old))?;
    equal(
        "status for a deleted message",
        got,
        status::INVALID_PARAMETER,
    )?;
    device.raise(0)?;
    arrive("a deleted message", bus.vm(), &[])?;
    let new = bus.must_create(&Create::one(0, 0x61, 0))?;
    equal("the next message", new, old.message)?;
    device.raise(0)?;
    arrive("the message given out again", bus.vm(), &[(0, 0x61)])?;
    bus.kernel().must_retarget(0, &retarget(&device, &old))?;
    still(&device, "the message given out again")
}

fn low_address(context: &Context) -> Verdict {
    let device = device(context)?;
    let interrupt = device.interrupt(0, 0x41, 0)?;
    let address = interrupt.message.address;
    equal("upper half of the address", address >> 32, 0)?;
    let moved = Retarget::new(
        device.bus().logical_id(0),
        address | 0x1234_5678 << 32,
        interrupt.message.data,
        0x42,
        1,
    );
    device.bus().kernel().must_retarget(0, &moved)?;
    device.raise(0)?;
    arrive("a retarget by the low half", device.vm(), &[(1, 0x42)])
}

fn effective_on_return(context: &Context) -> Verdict {
    let device = device(context)?;
    let interrupt = device.interrupt(0, 0x41, 0)?;
    for round in 0..100u8 {
        let (vector, vp) = (0x60 + round % 16, u32::from(round % 2));
        device.retarget(&Interrupt {
            vector,
            vp,
            ..interrupt
        })?;
        device.raise(0)?;
        let mut came = Vec::new();
        for vp in 0..2 {
            came.push(super::vectors(device.vm(), vp)?);
        }
        let mut expected = vec![vec![], vec![]];
        expected[vp as usize] = vec![vector];
        equal(format!("interrupts of round {round}"), came, expected)?;
    }
    Ok(())
}

fn from_any_vp(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.machine(&with_vps(3))?)?;
    let interrupt = device.interrupt(0, 0x41, 0)?;
    for from in 0..3 {
        for to in 0..3 {
            let vector = 0x50 + (from * 3 + to) as u8;
            let moved = device.bus().retarget(0, interrupt.message, vector, to);
            device.bus().kernel().must_retarget(from, &moved)?;
            device.raise(0)?;
            arrive("after a retarget", device.vm(), &[(to, vector)])?;
        }
    }
    Ok(())
}

fn messages_of_a_block(context: &Context) -> Verdict {
    let device = device(context)?;
    let bus = device.bus();
    let create = Create {
        count: 4,
        ..Create::one(0, 0x60, 0)
    };
    let block = bus.must_create(&create)?;
    device.enable_msix(true)?;
    for entry in 0..4 {
        device.set_entry(entry, block.address, block.data + entry, false)?;
    }
    let id = bus.logical_id(0);
    for index in [1, 3] {
        let moved = Retarget::new(id, block.address, block.data + index, 0x80 + index as u8, 1);
        bus.kernel().must_retarget(0, &moved)?;
    }
    for (entry, vp, vector) in [(0, 0, 0x60), (1, 1, 0x81), (2, 0, 0x62), (3, 1, 0x83)] {
        device.raise(entry)?;
        arrive(&format!("message {entry}"), bus.vm(), &[(vp, vector)])?;
    }
    Ok(())
}

fn after_close(context: &Context) -> Verdict {
    let device = device(context)?;
    let bus = device.bus();
    let interrupt = device.interrupt(0, 0x41, 1)?;
    let moved = retarget(&device, &interrupt);
    let fails = |what: &str| -> Verdict {
        let got = bus.kernel().retarget(1, &moved)?;
        holds(format!("a retarget {what} fails"), got != status::SUCCESS)
    };
    equal("status of D0 exit", bus.d0_exit()?, 0)?;
    fails("after D0 exit")?;
    bus.channel().close()?;
    fails("after close")?;
    let again = Bus::new(bus.vmbus().open(&bus.channel().offer)?, 0);
    fails("after another open")?;
    bus.vm().remove(again.channel().offer.instance)?;
    let got = bus.kernel().retarget(1, &moved)?;
    equal("status after removal", got, status::INVALID_DEVICE_ID)
}
