//! DMA by `testdev`: what it reaches, and when it may.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::devices::Plain;
use crate::host::{BusSetup, FunctionSetup, HIGH_MMIO, LOW_MMIO, Setup};
use crate::model::testdev::{ERROR_FAULT, ERROR_NOT_MASTER, Job, NO_VECTOR, TestDev, register};
use crate::model::vm::{GLANCE, PAGE};
use crate::model::vpci::{Bus, slot};

const MOVES: &[Check] = &[
    Check::new(
        "dma.copy",
        "A copy moves exactly its bytes, whatever the alignment and the length.",
        &["VP-6-08", "VP-11-17"],
        copy,
    ),
    Check::new(
        "dma.fill-and-checksum",
        "A fill and a checksum see the memory that the guest sees.",
        &["VP-6-08"],
        fill_and_checksum,
    ),
    Check::new(
        "dma.across-ranges",
        "DMA reaches each range of RAM, up to its last byte.",
        &["VP-6-08"],
        across_ranges,
    ),
    Check::new(
        "dma.interrupt-after-data",
        "When a job's interrupt arrives its data is there.",
        &["VP-7.1-01", "VP-6-08"],
        interrupt_after_data,
    ),
];

const LIMITS: &[Check] = &[
    Check::new(
        "dma.hole",
        "A job that meets a hole between ranges of RAM fails there, and says where.",
        &["VP-11-06", "VP-11-17"],
        hole,
    ),
    Check::new(
        "dma.not-ram",
        "Addresses of MMIO, and those beyond all RAM, are no target and no source.",
        &["VP-11-09", "VP-11-17"],
        not_ram,
    ),
    Check::new(
        "dma.bad-jobs",
        "A job without length, too long, or unknown moves nothing and ends with an error.",
        &["VP-6-08"],
        bad_jobs,
    ),
    Check::new(
        "dma.not-master",
        "Without bus mastering a job moves nothing; with it again the next one does.",
        &["VP-6-08", "VP-11-17"],
        not_master,
    ),
    Check::new(
        "dma.master-per-function",
        "Bus mastering of one function is not that of another.",
        &["VP-6-08"],
        master_per_function,
    ),
    Check::new(
        "dma.master-off-in-flight",
        "Once bus mastering is off, DMA that was under way is over.",
        &["VP-11-17", "VP-6-08"],
        master_off_in_flight,
    ),
    Check::new(
        "dma.decode-off-in-flight",
        "Memory decode off does not stop DMA.",
        &["VP-6-18"],
        decode_off_in_flight,
    ),
];

/// All checks of this area.
pub const CHECKS: [&[Check]; 2] = [MOVES, LIMITS];

fn job(command: u32, source: u64, destination: u64, length: u32) -> Job {
    Job {
        command,
        source,
        destination,
        length,
        vector: NO_VECTOR,
    }
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|at| (at * 7 + at / 251 + seed) as u8)
        .collect()
}

fn copy(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    let vm = device.vm();
    let (from, to) = (vm.pages(32)?, vm.pages(32)?);
    let cases = [
        (0, 0, 1),
        (0, 0, 4096),
        (1, 2, 3),
        (4095, 4095, 2),
        (4093, 7, 4096),
        (5, 4094, 12_345),
        (0, 1, 65_537),
        (8, 8, 32 * 1024),
        (3, 3, 32 * 1024 + 1),
    ];
    for (round, (source, destination, length)) in (1..).zip(cases) {
        let data = pattern(round, length);
        vm.write(from + source, &data)?;
        vm.ram().fill(to, 32 * PAGE, 0xee)?;
        device.copy(from + source, to + destination, length as u32, NO_VECTOR)?;
        let mut expected = vec![0xee; 32 * PAGE as usize];
        expected[destination as usize..destination as usize + length].copy_from_slice(&data);
        let what = format!("{length} bytes from +{source:#x} to +{destination:#x} are right");
        holds(what, vm.read(to, 32 * PAGE as usize)? == expected)?;
        equal("MOVED", device.load(register::MOVED, 8)?, length as u64)?;
    }
    Ok(())
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn fill_and_checksum(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    let vm = device.vm();
    let page = vm.pages(4)?;
    device.store(register::PATTERN, 8, 0x8877_6655_4433_2211)?;
    equal(
        "status and error",
        device.run(&job(2, 0, page + 3, 11))?,
        (2, 0),
    )?;
    let filled = vm.read(page, 16)?;
    equal(
        "what was filled",
        &filled[3..11],
        &[0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88],
    )?;
    equal("its end", &filled[11..], &[0x11, 0x22, 0x33, 0, 0])?;
    let data = pattern(3, 3 * PAGE as usize);
    vm.write(page, &data)?;
    equal(
        "status and error",
        device.run(&job(3, page, 0, 3 * PAGE as u32))?,
        (2, 0),
    )?;
    equal("checksum", device.load(register::RESULT, 8)?, fnv(&data))
}

/// Two ranges of RAM with a hole between them.
const RANGES: [Range<u64>; 2] = [0..16 << 20, 32 << 20..48 << 20];

fn with_hole(context: &Context) -> Result<TestDev, Failure> {
    TestDev::bring_up(&context.machine(&Setup {
        ram: RANGES.to_vec(),
        ..Setup::default()
    })?)
}

fn across_ranges(context: &Context) -> Verdict {
    let device = with_hole(context)?;
    let vm = device.vm();
    let data = pattern(9, 8192);
    vm.write(RANGES[0].end - 8192, &data)?;
    device.copy(RANGES[0].end - 8192, RANGES[1].start, 8192, NO_VECTOR)?;
    equal(
        "the start of the second range",
        vm.read(RANGES[1].start, 8192)?,
        data.clone(),
    )?;
    device.copy(RANGES[1].start, RANGES[1].end - 8192, 8192, NO_VECTOR)?;
    equal(
        "the end of the second range",
        vm.read(RANGES[1].end - 8192, 8192)?,
        data,
    )
}

fn interrupt_after_data(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    let vm = device.vm();
    let (from, to) = (vm.pages(16)?, vm.pages(16)?);
    device.interrupt(0, 0x41, 1)?;
    for round in 0..20 {
        let data = pattern(round, 16 * PAGE as usize);
        vm.write(from, &data)?;
        device.begin(&Job {
            vector: 0,
            ..job(1, from, to, 16 * PAGE as u32)
        })?;
        vm.expect_interrupt(1, 0x41)?;
        holds("the data is there", vm.read(to, data.len())? == data)?;
        equal("STATUS", device.load(register::STATUS, 4)?, 2)?;
    }
    equal(
        "jobs that ended",
        device.load(register::COMPLETIONS, 8)?,
        20,
    )
}

fn hole(context: &Context) -> Verdict {
    let device = with_hole(context)?;
    let vm = device.vm();
    let end = RANGES[0].end;
    let page = vm.pages(32)?;
    vm.write(end - 0x1_0000, &pattern(1, 0x1_0000))?;
    let failed = (6, ERROR_FAULT);
    for (what, bad) in [
        (
            "a source that runs into the hole",
            job(1, end - 0x1000, page, 0x2000),
        ),
        (
            "a destination that runs into the hole",
            job(1, page, end - 0x1000, 0x2000),
        ),
        ("a source in the hole", job(1, end, page, 8)),
        (
            "a destination in the hole",
            job(1, page, RANGES[1].start - 8, 16),
        ),
        ("a source behind all RAM", job(3, RANGES[1].end - 4, 0, 5)),
    ] {
        equal(
            format!("status and error of {what}"),
            device.run(&bad)?,
            failed,
        )?;
        equal(
            format!("bytes moved of {what}"),
            device.load(register::MOVED, 8)?,
            0,
        )?;
    }
    // One that gets somewhere first: blocks are of 32 KiB.
    let bad = job(1, end - 0x8000, page, 0x1_0000);
    equal("status and error", device.run(&bad)?, failed)?;
    equal("bytes moved", device.load(register::MOVED, 8)?, 0x8000)?;
    equal("where it failed", device.load(register::FAULT, 8)?, end)?;
    let moved = pattern(1, 0x1_0000).split_off(0x8000);
    holds("what was moved is right", vm.read(page, 0x8000)? == moved)?;
    equal(
        "what was not moved",
        vm.read(page + 0x8000, 16)?,
        vec![0; 16],
    )?;
    device.copy(page, page + 0x1_0000, 64, NO_VECTOR)
}

fn not_ram(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    let vm = device.vm();
    let page = vm.pages(1)?;
    let places = [
        device.bus().window() + 0x1000,
        device.bar(),
        LOW_MMIO,
        HIGH_MMIO,
        0xfee0_0000,
        0xfec0_0000,
        16 << 20,
        1 << 52,
        u64::MAX - 7,
        u64::MAX,
    ];
    for place in places {
        for bad in [
            job(1, place, page, 8),
            job(1, page, place, 8),
            job(2, 0, place, 4096),
        ] {
            let what = format!("status and error of command {} at {place:#x}", bad.command);
            equal(what, device.run(&bad)?, (6, ERROR_FAULT))?;
        }
    }
    equal("interrupts of VP 1", vm.take_interrupts(1)?, vec![])?;
    device.copy(page, page + 8, 8, NO_VECTOR)
}

fn bad_jobs(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    let vm = device.vm();
    let page = vm.pages(2)?;
    vm.write(page, &[0x77; 16])?;
    for bad in [
        job(1, page, page + PAGE, 0),
        job(1, page, page + PAGE, (16 << 20) + 1),
        job(1, page, page + PAGE, u32::MAX),
        job(0, page, page + PAGE, 8),
        job(4, page, page + PAGE, 8),
        job(u32::MAX, page, page + PAGE, 8),
    ] {
        let what = format!(
            "status and error of {:#x}, {:#x} bytes",
            bad.command, bad.length
        );
        equal(what, device.run(&bad)?, (6, 3))?;
        equal("the destination", vm.read(page + PAGE, 16)?, vec![0; 16])?;
    }
    device.copy(page, page + PAGE, 16, NO_VECTOR)
}

fn not_master(context: &Context) -> Verdict {
    let device = TestDev::bring_up(&context.usual()?)?;
    let vm = device.vm();
    let page = vm.pages(2)?;
    vm.write(page, &[0x77; 16])?;
    device.interrupt(0, 0x41, 1)?;
    device.set_command(2)?;
    for command in 1..=3 {
        let bad = Job {
            vector: 0,
            ..job(command, page, page + PAGE, 16)
        };
        let what = format!("status and error of command {command}");
        equal(what, device.run(&bad)?, (6, ERROR_NOT_MASTER))?;
        equal("the destination", vm.read(page + PAGE, 16)?, vec![0; 16])?;
        vm.take_interrupts(1)?;
    }
    device.set_command(6)?;
    device.copy(page, page + PAGE, 16, NO_VECTOR)?;
    equal("the destination", vm.read(page + PAGE, 16)?, vec![0x77; 16])
}

fn master_per_function(context: &Context) -> Verdict {
    let plain = Plain::wide();
    let vm = context.machine(&Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: vec![FunctionSetup::testdev(0), plain.function(1)],
        }],
        ..Setup::default()
    })?;
    let bus = Bus::bring_up(&vm)?;
    let device = TestDev::start(&bus, 0)?;
    let page = vm.pages(1)?;
    holds("function 1 has no DMA yet", !plain.write(page, &[1; 8]))?;
    bus.set_config(slot(1), 4, 2, 4)?;
    holds("function 1 has DMA", plain.write(page, &[1; 8]))?;
    device.set_command(2)?;
    holds("function 1 still has DMA", plain.write(page, &[2; 8]))?;
    let bad = job(1, page, page + 64, 8);
    equal("function 0", device.run(&bad)?, (6, ERROR_NOT_MASTER))?;
    device.set_command(6)?;
    bus.set_config(slot(1), 4, 2, 0)?;
    holds(
        "function 1 has no DMA any more",
        !plain.write(page, &[3; 8]),
    )?;
    equal("RAM", vm.read(page, 8)?, vec![2; 8])?;
    device.copy(page, page + 64, 8, NO_VECTOR)
}

/// A device with a long fill under way, and the range that it fills.
fn filling(context: &Context) -> Result<(TestDev, Range<u64>), Failure> {
    let range = 32 << 20..48 << 20;
    let device = with_hole(context)?;
    device.store(register::PATTERN, 8, 0x5a5a_5a5a_5a5a_5a5a)?;
    device.begin(&job(2, 0, range.start, 16 << 20))?;
    Ok((device, range))
}

fn master_off_in_flight(context: &Context) -> Verdict {
    let (device, range) = filling(context)?;
    let vm = device.vm();
    vm.step();
    device.set_command(2)?;
    let len = range.end - range.start;
    vm.ram().fill(range.start, len, 0x11)?;
    vm.settle();
    std::thread::sleep(GLANCE);
    let after = vm.read(range.start, len as usize)?;
    holds(
        "nothing was stored after that",
        after.iter().all(|byte| *byte == 0x11),
    )?;
    let error = device.load(register::ERROR, 4)?;
    let moved = device.load(register::MOVED, 8)?;
    let cut = error == u64::from(ERROR_NOT_MASTER as u32) && moved < len;
    holds(
        "the job failed, or was over by then",
        cut || (error == 0 && moved == len),
    )
}

fn decode_off_in_flight(context: &Context) -> Verdict {
    let (device, range) = filling(context)?;
    let vm = device.vm();
    device.set_command(4)?;
    vm.settle();
    device.set_command(6)?;
    equal("STATUS", device.load(register::STATUS, 4)?, 2)?;
    equal("the last bytes", vm.read(range.end - 8, 8)?, vec![0x5a; 8])
}
