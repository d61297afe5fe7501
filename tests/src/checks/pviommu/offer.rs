//! What is offered, and that nothing is where there is no pvIOMMU.
#![forbid(unsafe_code)]

use vm_vpci::cpuid::Features;
use vm_vpci::pviommu::IommuMode;

use super::{IOVA, Mapped, Scene, behind, five_levels, setup};
use crate::check::{Check, Context, Verdict, equal, holds};
use crate::devices::Plain;
use crate::guest::Call;
use crate::host::{BusSetup, FunctionSetup, Setup};
use crate::model::kernel::{FAST, Kernel, status};
use crate::model::pviommu::{Answer, PROPERTY_PVIOMMU, PvIommu, Tables, code, configure};
use crate::model::pviommu::{capabilities_input, first_stage, property_input};
use crate::model::wire::u64_at;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "pviommu.offer.none",
        "Without a pvIOMMU none of its calls exists, and CPUID says nothing of it.",
        &["IO-2-21", "IO-2-22", "IO-4-01"],
        none,
    ),
    Check::new(
        "pviommu.offer.capabilities",
        "GET_IOMMU_CAPABILITIES says: first-stage tables of 4 levels, 48 bits, three page sizes.",
        &["IO-2-01", "IO-2-16", "IO-2-18", "IO-2-19", "IO-2-24"],
        capabilities,
    ),
    Check::new(
        "pviommu.offer.five-levels",
        "With tables of 5 levels it says so, and 57 bits.",
        &["IO-2-18", "IO-2-20", "IO-2-24"],
        five,
    ),
    Check::new(
        "pviommu.offer.second-stage",
        "Second-stage domains are not offered, and none of their calls exists.",
        &["IO-2-02", "IO-2-18", "IO-4-01"],
        second_stage,
    ),
    Check::new(
        "pviommu.offer.cpuid",
        "CPUID has both device domain features in a VM with a pvIOMMU.",
        &["IO-2-22"],
        cpuid,
    ),
    Check::new(
        "pviommu.offer.property",
        "GET_LOGICAL_DEVICE_PROPERTY answers per function whether it is behind the pvIOMMU.",
        &["IO-2-17"],
        property,
    ),
    Check::new(
        "pviommu.offer.property-codes",
        "A property that does not exist is refused as such.",
        &["HV-3.4-25", "IO-4-06", "IO-2-17"],
        property_codes,
    ),
    Check::new(
        "pviommu.offer.output-behind-input",
        "The output may lie behind the input in the same page; nothing else is stored.",
        &["IO-2-03", "IO-2-16", "IO-2-17", "IO-4-14"],
        output_behind_input,
    ),
    Check::new(
        "pviommu.offer.fast",
        "A call whose 16 bytes of input are in registers is executed.",
        &["IO-4-22", "IO-2-12"],
        fast,
    ),
    Check::new(
        "pviommu.offer.xmm",
        "With XMM registers offered the longer calls are executed, and output comes back in them.",
        &["HV-3.2-08", "IO-4-22", "IO-2-09", "IO-2-17"],
        xmm,
    ),
    Check::new(
        "pviommu.offer.boot-sequence",
        "The driver's boot works as listed: capabilities, two static domains, then the devices.",
        &["IO-3-01", "IO-3-02", "IO-7-02", "IO-2-13"],
        boot_sequence,
    ),
    Check::new(
        "pviommu.offer.any-vp",
        "The calls work on any VP, with interrupts off and no worker of the host at work.",
        &["IO-2-01", "IO-3-02"],
        any_vp,
    ),
];

fn none(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let iommu = PvIommu::new(&Kernel::boot(&vm)?);
    for (code, size) in code::ALL {
        for control in [code, code | 1 << 32] {
            let got = iommu.call(control, &vec![0xff; size])?;
            let what = format!("status of call {code:#x}");
            equal(what, got.status, status::INVALID_HYPERCALL_CODE)?;
            equal("output", got.output, vec![0xee; 40])?;
        }
    }
    let features = vm.cpuid(0, 0x4000_0003)?[3];
    equal("EDX bits 25:24 of the features", features >> 24 & 3, 0)
}

fn capabilities(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let answer = scene
        .iommu
        .call(code::CAPABILITIES, &capabilities_input().0)?;
    equal("status", answer.status, status::SUCCESS)?;
    let mut want = vec![24, 0, 0, 0, 0, 0, 48, 0];
    want.extend(0b101_u64.to_le_bytes());
    want.extend((1_u64 << 12 | 1 << 21 | 1 << 30).to_le_bytes());
    equal("output", &answer.output[..24], &want[..])?;
    equal("bytes behind the output", &answer.output[24..], &[0xee; 16])
}

fn five(context: &Context) -> Verdict {
    let scene = Scene::of(context, &five_levels())?;
    let got = scene.iommu.capabilities()?;
    let got = got.map(|got| (got.size, got.width, got.pasid_width, got.bits));
    equal(
        "size, widths and capabilities",
        got,
        Ok((24, 57, 0, 0b1101)),
    )
}

fn second_stage(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let bits = scene.iommu.capabilities()?.map(|got| got.bits & !0b101);
    equal("capabilities besides present and S1", bits, Ok(0))?;
    for code in code::SECOND_STAGE {
        for control in [code, code | 1 << 32] {
            let got = scene.iommu.call(control, &[0xff; 64])?;
            let what = format!("status of call {code:#x}");
            equal(what, got.status, status::INVALID_HYPERCALL_CODE)?;
        }
    }
    Ok(())
}

fn cpuid(context: &Context) -> Verdict {
    let vm = context.machine(&setup())?;
    let with = vm.cpuid(0, 0x4000_0003)?;
    equal("EDX bits 25:24 of the features", with[3] >> 24 & 3, 3)?;
    let without = context.usual()?.cpuid(0, 0x4000_0003)?;
    let but = |[a, b, c, d]: [u32; 4]| [a, b, c, d & !(3 << 24)];
    equal("all else", but(with), but(without))
}

/// A bus whose function 0 is behind the pvIOMMU and whose function 3 is not.
fn mixed() -> Setup {
    Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: vec![behind(0), FunctionSetup::testdev(3)],
        }],
        ..setup()
    }
}

fn property(context: &Context) -> Verdict {
    let scene = Scene::of(context, &mixed())?;
    for function in 0..8 {
        let want = match function {
            0 => Ok(1),
            3 => Ok(0),
            _ => Err(status::INVALID_DEVICE_ID),
        };
        let got = scene.iommu.is_behind(scene.id | function)?;
        equal(format!("property of function {function}"), got, want)?;
    }
    Ok(())
}

fn property_codes(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    for property in [0, 1, 9, 11, 0x10_000a, u32::MAX] {
        let input = property_input(scene.id, property);
        let got = scene.iommu.call(code::PROPERTY, &input.0)?;
        let what = format!("status of property {property:#x}");
        equal(what, got.status, status::UNKNOWN_PROPERTY)?;
        equal("output", got.output, vec![0xee; 40])?;
    }
    equal("property 10", scene.iommu.is_behind(scene.id)?, Ok(1))
}

fn output_behind_input(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let kernel = scene.iommu.kernel();
    let (vm, page) = (scene.vm(), scene.vm().pages(1)?);
    let cases = [
        (code::CAPABILITIES, capabilities_input(), 24),
        (
            code::PROPERTY,
            property_input(scene.id, PROPERTY_PVIOMMU),
            16,
        ),
    ];
    for (code, input, size) in cases {
        let len = input.0.len() as u64;
        for at in [0, 8, 0x800, 0x1000 - len - size] {
            vm.ram().fill(page, 0x1000, 0xee)?;
            vm.write(page + at, &input.0)?;
            let returned = kernel.call(0, code, page + at, page + at + len)?;
            let what = format!("result of {code:#x} with input at {at:#x}");
            equal(what, returned.rax, 0)?;
            let after = vm.read(page, 0x1000)?;
            let (input_at, output_at) = (at as usize, (at + len) as usize);
            let end = output_at + size as usize;
            equal("input", &after[input_at..output_at], &input.0[..])?;
            holds(
                "the output was stored",
                after[output_at..end].iter().all(|byte| *byte != 0xee),
            )?;
            let rest = after[..input_at].iter().chain(&after[end..]);
            holds(
                "nothing else was stored",
                { rest }.all(|byte| *byte == 0xee),
            )?;
        }
    }
    Ok(())
}

fn fast(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let scene = &mapped.scene;
    let kernel = scene.iommu.kernel();
    let bad = kernel.call(0, code::DETACH | FAST, u64::MAX, scene.id ^ 1 << 20)?;
    equal(
        "result for another id",
        bad.rax,
        status::INVALID_DEVICE_ID.into(),
    )?;
    mapped.is_intact()?;
    let good = kernel.call(0, code::DETACH | FAST, u64::MAX, scene.id)?;
    equal("result", good.rax, 0)?;
    scene.faults(IOVA)?;
    scene.is_default()
}

fn xmm(context: &Context) -> Verdict {
    let scene = Scene::of(
        context,
        &Setup {
            features: Features {
                xmm_input: true,
                xmm_output: true,
                ..Features::default()
            },
            ..setup()
        },
    )?;
    let kernel = scene.iommu.kernel();
    let call = |control: u64, rdx: u64, r8: u64, xmm: [u128; 6]| {
        let call = Call {
            entry: kernel.page(),
            control: control | FAST,
            rdx,
            r8,
            xmm: Some(xmm),
            ..Call::default()
        };
        scene.vm().hypercall(0, &call)
    };
    let id = u128::from(first_stage(7));
    let created = call(code::CREATE, u64::MAX, 0, [id, 0, 0, 0, 0, 0])?;
    equal("result of CREATE", created.rax, 0)?;
    scene.exists(7, true)?;
    let flush = call(
        code::FLUSH_LIST | 2 << 32,
        u64::MAX,
        0,
        [id | 1 << 64, 0, 0, 0, 0, 0],
    )?;
    equal("result of FLUSH_LIST", flush.rax, 2 << 32)?;
    // 24 bytes of input reach into XMM0; the output begins at the next register.
    let number = u128::from(PROPERTY_PVIOMMU);
    let answer = call(code::PROPERTY, u64::MAX, scene.id, [number, 5, 6, 7, 8, 9])?;
    equal("result of GET_LOGICAL_DEVICE_PROPERTY", answer.rax, 0)?;
    equal("XMM0 to XMM5", answer.xmm, [number, 1, 6, 7, 8, 9])
}

fn boot_sequence(context: &Context) -> Verdict {
    let plain = Plain::wide();
    let scene = Scene::of(
        context,
        &Setup {
            buses: vec![BusSetup {
                instance: BusSetup::instance(1),
                functions: vec![behind(0), plain.function(1).with_iommu(IommuMode::On)],
            }],
            ..setup()
        },
    )?;
    let (iommu, vm) = (&scene.iommu, scene.vm());
    let found = iommu.capabilities()?.map(|got| got.bits & 5);
    equal("capabilities present and S1", found, Ok(5))?;
    // Identity and blocked, then a paging domain for each device.
    for (number, flags) in [(1, 0), (2, configure::ENABLED | configure::BLOCKED)] {
        equal("status of CREATE", iommu.create(number)?, 0)?;
        let configured = iommu.configure(number, flags, 0)?;
        equal("status of CONFIGURE", configured, 0)?;
    }
    for (number, id) in [(3, scene.id), (4, scene.id | 1)] {
        equal("property", iommu.is_behind(id)?, Ok(1))?;
        let tables = Tables::new(vm, 4)?;
        equal("status of CREATE", iommu.create(number)?, 0)?;
        let configured = iommu.translate(number, &tables)?;
        equal("status of CONFIGURE", configured, 0)?;
        equal("status of ATTACH", iommu.attach(number, id)?, 0)?;
        let page = vm.pages(1)?;
        tables.map(IOVA, page)?;
        if number == 3 {
            scene.reaches(IOVA, page)?;
            scene.faults(page)?;
        }
    }
    equal("ATTACH to identity", iommu.attach(1, scene.id)?, 0)?;
    scene.is_default()?;
    scene.faults(IOVA)?;
    equal("ATTACH to blocked", iommu.attach(2, scene.id)?, 0)?;
    scene.faults(IOVA)?;
    scene.faults(vm.pages(1)?)
}

fn any_vp(context: &Context) -> Verdict {
    let vm = context.machine(&Setup { vps: 4, ..setup() })?;
    let scene = Scene::boot(&vm)?;
    for vp in 0..4 {
        let iommu = scene.iommu.on(vp);
        equal("status of CREATE", iommu.create(vp + 1)?, 0)?;
        let tables = Tables::new(&vm, 4)?;
        equal("status of CONFIGURE", iommu.translate(vp + 1, &tables)?, 0)?;
        equal("status of ATTACH", iommu.attach(vp + 1, scene.id)?, 0)?;
        let page = vm.pages(1)?;
        tables.map(IOVA, page)?;
        scene.reaches(IOVA, page)?;
        tables.unmap(IOVA)?;
        iommu.flush_range(vp + 1, IOVA, 0)?;
        scene.faults(IOVA)?;
        equal("property", iommu.is_behind(scene.id)?, Ok(1))?;
        let Answer { status, output, .. } =
            iommu.call(code::CAPABILITIES, &capabilities_input().0)?;
        equal(
            "status and capabilities",
            (status, u64_at(&output, 8)),
            (0, 5),
        )?;
        equal("status of DETACH", iommu.detach(scene.id)?, 0)?;
        equal("status of DELETE", iommu.delete(vp + 1)?, 0)?;
    }
    Ok(())
}
