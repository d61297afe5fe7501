//! What each kind of domain does to the DMA of the devices in it.
#![forbid(unsafe_code)]

use vm_vpci::pviommu::IommuMode;

use super::{IOVA, Mapped, Scene, behind, setup};
use crate::check::{Check, Context, Verdict, equal, holds};
use crate::host::{BusSetup, FunctionSetup, LOW_MMIO, Setup};
use crate::model::kernel::status;
use crate::model::pviommu::{DEFAULT, Tables, attach_input, bit, code, configure};
use crate::model::vm::PAGE;
use crate::model::vpci::Bus;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "pviommu.domain.default",
        "A device that no ATTACH has named reaches all RAM at its guest physical addresses.",
        &["IO-7-01"],
        default,
    ),
    Check::new(
        "pviommu.domain.default-is-ram-only",
        "In the default domain what is not RAM is a fault, as without a pvIOMMU.",
        &["IO-7-01", "IO-5-04"],
        default_is_ram_only,
    ),
    Check::new(
        "pviommu.domain.blocked-until-attached",
        "A device that is plugged in so has no DMA until it is attached, and none after DETACH.",
        &["IO-7-01", "IO-4-18"],
        blocked_until_attached,
    ),
    Check::new(
        "pviommu.domain.not-configured",
        "A domain that was made and not configured blocks.",
        &["IO-4-17"],
        not_configured,
    ),
    Check::new(
        "pviommu.domain.identity",
        "In an identity domain an address is a guest physical one.",
        &["IO-7-02", "IO-3-01", "IO-2-13"],
        identity,
    ),
    Check::new(
        "pviommu.domain.blocked",
        "In a blocked domain every access faults, whatever the tables say.",
        &["IO-7-02", "IO-3-01", "IO-2-13"],
        blocked,
    ),
    Check::new(
        "pviommu.domain.paging",
        "In a paging domain an access reaches what the tables say, and nothing else.",
        &["IO-3-02", "IO-2-13", "IO-5-01"],
        paging,
    ),
    Check::new(
        "pviommu.domain.map-without-call",
        "A mapping works from the moment that its entry is stored, also where a fault was before.",
        &["IO-3-02", "IO-5-07"],
        map_without_call,
    ),
    Check::new(
        "pviommu.domain.shared",
        "Several devices in a domain obey the same tables, and leave one by one.",
        &["IO-3-05", "IO-4-11", "IO-6-01"],
        shared,
    ),
    Check::new(
        "pviommu.domain.number-again",
        "A number comes back at once after DELETE, and its new domain knows nothing of the old one.",
        &["IO-2-08", "IO-2-10", "IO-4-17"],
        number_again,
    ),
    Check::new(
        "pviommu.domain.scatter",
        "A transfer over pages that lie anywhere in RAM moves every byte to its place.",
        &["IO-8-01", "IO-5-01"],
        scatter,
    ),
];

fn default(context: &Context) -> Verdict {
    let ram = vec![0..16 << 20, 32 << 20..48 << 20];
    let scene = Scene::of(
        context,
        &Setup {
            ram: ram.clone(),
            ..setup()
        },
    )?;
    for range in ram {
        for gpa in [
            range.end - PAGE,
            range.end - 8,
            (range.start + range.end) / 2,
        ] {
            scene.reaches(gpa, gpa)?;
        }
    }
    // Other domains are nothing to it.
    let tables = scene.domain(1, 4)?;
    tables.map(IOVA, scene.vm().pages(1)?)?;
    scene.faults(IOVA)?;
    scene.is_default()
}

fn default_is_ram_only(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let end = scene.vm().setup().ram[0].end;
    for iova in [
        end,
        LOW_MMIO,
        scene.device.bar(),
        scene.device.bus().window(),
        0xfec0_0000,
        1 << 48,
        1 << 57,
        u64::MAX - 7,
    ] {
        scene.faults(iova)?;
    }
    scene.is_default()
}

fn blocked_until_attached(context: &Context) -> Verdict {
    let scene = Scene::of(
        context,
        &Setup {
            buses: vec![BusSetup {
                instance: BusSetup::instance(1),
                functions: vec![
                    FunctionSetup::testdev(0).with_iommu(IommuMode::BlockedUntilAttached),
                ],
            }],
            ..setup()
        },
    )?;
    let iommu = &scene.iommu;
    let page = scene.vm().pages(1)?;
    equal("property", iommu.is_behind(scene.id)?, Ok(1))?;
    scene.faults(page)?;
    let tables = scene.paged(1, 4)?;
    tables.map(IOVA, page)?;
    scene.reaches(IOVA, page)?;
    equal("status of DETACH", iommu.detach(scene.id)?, 0)?;
    scene.faults(page)?;
    scene.faults(IOVA)?;
    equal("status of CREATE", iommu.create(2)?, 0)?;
    equal("status of CONFIGURE", iommu.configure(2, 0, 0)?, 0)?;
    equal("status of ATTACH", iommu.attach(2, scene.id)?, 0)?;
    scene.reaches(page, page)?;
    let back = iommu.call(code::ATTACH, &attach_input(DEFAULT, scene.id).0)?;
    equal("ATTACH to the default domain", back.status, 0)?;
    scene.faults(page)
}

fn not_configured(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    equal("status of CREATE", scene.iommu.create(1)?, 0)?;
    equal("status of ATTACH", scene.iommu.attach(1, scene.id)?, 0)?;
    scene.faults(scene.vm().pages(1)?)?;
    scene.faults(IOVA)?;
    scene.is_in(1)?;
    let tables = Tables::new(scene.vm(), 4)?;
    equal("CONFIGURE", scene.iommu.translate(1, &tables)?, 0)?;
    let page = scene.vm().pages(1)?;
    tables.map(IOVA, page)?;
    scene.reaches(IOVA, page)
}

fn identity(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let iommu = &scene.iommu;
    equal("status of CREATE", iommu.create(1)?, 0)?;
    equal("status of CONFIGURE", iommu.configure(1, 0, 0)?, 0)?;
    equal("status of ATTACH", iommu.attach(1, scene.id)?, 0)?;
    scene.is_in(1)?;
    scene.is_default()?;
    let end = scene.vm().setup().ram[0].end;
    scene.reaches(end - 8, end - 8)?;
    for iova in [end, LOW_MMIO, 1 << 48, u64::MAX - 7] {
        scene.faults(iova)?;
    }
    Ok(())
}

fn blocked(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let scene = &mapped.scene;
    let root = mapped.tables.root();
    for flags in [configure::ENABLED | configure::BLOCKED] {
        let got = scene.iommu.configure(1, flags, root)?;
        equal("status of CONFIGURE", got, 0)?;
        for iova in [IOVA, IOVA + 8, mapped.page, 0, u64::MAX - 7] {
            scene.faults(iova)?;
        }
    }
    equal("CONFIGURE", scene.iommu.translate(1, &mapped.tables)?, 0)?;
    mapped.is_intact()
}

fn paging(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let tables = scene.paged(1, 4)?;
    let vm = scene.vm();
    let iovas = [
        0,
        PAGE,
        0x1f_f000,
        0x20_0000,
        0x3fff_f000,
        0x4000_0000,
        0x7f_ffff_f000,
        0x80_0000_0000,
        0x7fff_ffff_f000,
        0x8000_0000_0000,
        0xffff_ffff_f000,
    ];
    let mut pages = Vec::new();
    for iova in iovas {
        let page = vm.pages(1)?;
        tables.map(iova, page)?;
        pages.push(page);
    }
    for _ in 0..2 {
        for (iova, page) in iovas.into_iter().zip(&pages) {
            for offset in [0, 8, PAGE - 8] {
                scene.reaches(iova + offset, page + offset)?;
            }
        }
    }
    for iova in [2 * PAGE, 0x1f_e000, 0x20_1000, 0x4000_1000, IOVA] {
        scene.faults(iova)?;
    }
    // Guest physical addresses mean nothing here.
    scene.faults(pages[3])
}

fn map_without_call(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let tables = scene.paged(1, 4)?;
    for round in 0..20 {
        // Each time other levels of the tables are made as well.
        let iova = IOVA + (round << (12 + round % 30));
        scene.faults(iova)?;
        let page = scene.vm().pages(1)?;
        tables.map(iova, page)?;
        scene.reaches(iova, page)?;
    }
    // A page that becomes writable needs none either.
    let iova = IOVA + (1 << 46);
    let page = scene.vm().pages(1)?;
    tables.set(iova, 1, page | bit::READ_ONLY)?;
    scene.reads(iova, page)?;
    holds("a write fails", !scene.write(iova, 1)?)?;
    tables.map(iova, page)?;
    scene.iommu.flush_range(1, iova, 0)?;
    scene.reaches(iova, page)
}

fn shared(context: &Context) -> Verdict {
    let vm = context.machine(&Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: (0..3).map(behind).collect(),
        }],
        ..setup()
    })?;
    let bus = Bus::bring_up(&vm)?;
    let mut scenes = Vec::new();
    for function in 0..3 {
        scenes.push(Scene::on(&bus, function)?);
    }
    let iommu = scenes[0].iommu.clone();
    let tables = scenes[0].domain(1, 4)?;
    let page = vm.pages(1)?;
    tables.map(IOVA, page)?;
    for scene in &scenes {
        equal("status of ATTACH", iommu.attach(1, scene.id)?, 0)?;
    }
    for scene in &scenes {
        scene.reaches(IOVA, page)?;
    }
    // One flush is for all of them.
    let other = vm.pages(1)?;
    tables.map(IOVA, other)?;
    iommu.flush_range(1, IOVA, 0)?;
    for scene in &scenes {
        scene.reaches(IOVA, other)?;
    }
    while let Some(scene) = scenes.pop() {
        equal("DELETE", iommu.delete(1)?, status::OBJECT_IN_USE)?;
        equal("status of DETACH", iommu.detach(scene.id)?, 0)?;
        scene.is_default()?;
        for left in &scenes {
            left.reaches(IOVA, other)?;
        }
    }
    equal("DELETE of the empty domain", iommu.delete(1)?, 0)
}

fn number_again(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let (scene, iommu) = (&mapped.scene, &mapped.scene.iommu);
    for _ in 0..5 {
        equal("status of DETACH", iommu.detach(scene.id)?, 0)?;
        equal("status of DELETE", iommu.delete(1)?, 0)?;
        scene.exists(1, false)?;
        equal("status of CREATE", iommu.create(1)?, 0)?;
        equal("status of ATTACH", iommu.attach(1, scene.id)?, 0)?;
        // Not the tables of the former one, and not what is cached of them.
        scene.faults(IOVA)?;
        scene.faults(mapped.page)?;
        equal("CONFIGURE", iommu.translate(1, &mapped.tables)?, 0)?;
        mapped.is_intact()?;
    }
    Ok(())
}

fn scatter(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let (vm, tables) = (scene.vm(), scene.paged(1, 4)?);
    let (from, to) = (IOVA, IOVA + (64 << 20));
    let count = 24;
    let (sources, targets) = (vm.pages(count)?, vm.pages(count)?);
    // Neighbours in one space are far apart in the other.
    let place = |base, index| base + index * 7 % count * PAGE;
    for index in 0..count {
        tables.map(from + index * PAGE, place(sources, index))?;
        let target = place(targets, count - 1 - index);
        tables.map(to + index * PAGE, target)?;
    }
    for (offset, shift, length) in [
        (0, 0, 24 * PAGE),
        (1, 0, 23 * PAGE),
        (4095, 4093, 2),
        (4000, 17, 50_000),
        (5, 4094, 12_345),
    ] {
        let data: Vec<u8> = (0..length)
            .map(|at| (at * 31 + at / 249 + length) as u8)
            .collect();
        for (at, byte) in (offset..).zip(&data) {
            vm.write(place(sources, at / PAGE) + at % PAGE, &[*byte])?;
        }
        let copied = scene
            .device
            .copy(from + offset, to + shift, length as u32, u32::MAX);
        copied.map_err(|failure| failure.during(format!("{length} bytes")))?;
        let mut got = Vec::new();
        for at in shift..shift + length {
            let target = place(targets, count - 1 - at / PAGE);
            got.extend(vm.read(target + at % PAGE, 1)?);
        }
        holds(format!("{length} bytes are right"), got == data)?;
    }
    Ok(())
}
