//! Calls that are well-formed and cannot be done: each status of the table, and nothing changed.
#![forbid(unsafe_code)]

use super::{IOVA, Mapped, Scene, behind, five_levels, setup};
use crate::check::{Check, Context, Verdict, equal};
use crate::host::{BusSetup, FunctionSetup, Setup};
use crate::model::kernel::status;
use crate::model::pviommu::{
    DEFAULT, NULL, Tables, attach_input, code, configure, element, first_stage, flush_input,
    flush_list_input,
};
use crate::model::vm::PAGE;
use crate::model::vpci::Bus;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "pviommu.status.unknown-domain",
        "Every call that names a domain refuses one that does not exist.",
        &["IO-4-04", "IO-4-19", "IO-4-14"],
        unknown_domain,
    ),
    Check::new(
        "pviommu.status.reserved-numbers",
        "The numbers of the default and the null domain can be made, configured and deleted by nobody.",
        &["IO-4-15", "IO-4-16", "IO-2-08"],
        reserved_numbers,
    ),
    Check::new(
        "pviommu.status.create-again",
        "A number that is in use cannot be created, and its domain stays what it is.",
        &["IO-4-10", "IO-4-14"],
        create_again,
    ),
    Check::new(
        "pviommu.status.delete-in-use",
        "A domain with devices in it cannot be deleted, and goes on.",
        &["HV-3.4-16", "IO-4-11", "IO-4-14", "IO-2-10"],
        delete_in_use,
    ),
    Check::new(
        "pviommu.status.unknown-device",
        "ATTACH and DETACH refuse a device that is not there.",
        &["IO-4-07", "IO-4-14"],
        unknown_device,
    ),
    Check::new(
        "pviommu.status.not-behind",
        "ATTACH and DETACH refuse a function that is not behind the pvIOMMU; its DMA goes on.",
        &["IO-4-08", "IO-4-14"],
        not_behind,
    ),
    Check::new(
        "pviommu.status.already-there",
        "ATTACH to the domain that the device is in says so, and changes nothing.",
        &["IO-4-09", "IO-3-03", "IO-2-11"],
        already_there,
    ),
    Check::new(
        "pviommu.status.bad-root",
        "A root that is not a page of RAM is refused, and the former tables stay.",
        &["IO-4-04", "IO-4-14", "IO-2-13"],
        bad_root,
    ),
    Check::new(
        "pviommu.status.root-not-used",
        "A domain that needs no root takes any.",
        &["IO-4-04", "IO-2-13"],
        root_not_used,
    ),
    Check::new(
        "pviommu.status.blocked-without-translation",
        "Blocked without translation enabled is refused, with either number of levels.",
        &["IO-4-04", "IO-4-14", "IO-2-13"],
        blocked_without_translation,
    ),
    Check::new(
        "pviommu.status.five-levels",
        "Tables of 5 levels are refused where they are not offered, and taken where they are.",
        &["IO-4-04", "IO-2-20", "IO-2-13"],
        five,
    ),
    Check::new(
        "pviommu.status.flush-list-elements",
        "A bad element stops a list; those before it are done and counted.",
        &["HV-3.4-25", "IO-4-04", "IO-4-14", "IO-2-15"],
        flush_list_elements,
    ),
    Check::new(
        "pviommu.status.flush-list-limits",
        "A shift above 52 and a page beyond the width are out of range; the last ones are not.",
        &["IO-4-04", "IO-3-04", "IO-2-15"],
        flush_list_limits,
    ),
    Check::new(
        "pviommu.status.flush-anything",
        "A flush of any existing domain succeeds, used or not, configured or not.",
        &["IO-4-19", "IO-3-04", "IO-2-14"],
        flush_anything,
    ),
];

fn unknown_domain(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let (scene, iommu) = (&mapped.scene, &mapped.scene.iommu);
    let want = status::INVALID_PARAMETER;
    for number in [2, 0x100, 0x1_0001, 0x8000_0001, NULL - 1] {
        equal("DELETE", iommu.delete(number)?, want)?;
        equal("ATTACH", iommu.attach(number, scene.id)?, want)?;
        let configured = iommu.configure(number, 0, 0)?;
        equal("CONFIGURE", configured, want)?;
        equal("FLUSH", iommu.flush(number)?, want)?;
        equal("FLUSH_LIST", iommu.flush_list(number, &[IOVA])?, (want, 0))?;
    }
    mapped.is_intact()
}

fn reserved_numbers(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let (scene, iommu) = (&mapped.scene, &mapped.scene.iommu);
    let want = status::INVALID_PARAMETER;
    for number in [0, NULL] {
        equal("CREATE", iommu.create(number)?, want)?;
        let configured = iommu.configure(number, 0, 0)?;
        equal("CONFIGURE", configured, want)?;
        equal("DELETE", iommu.delete(number)?, want)?;
        equal("ATTACH", iommu.attach(number, scene.id)?, want)?;
        equal("FLUSH", iommu.flush(number)?, want)?;
    }
    // The null domain of either type.
    let null = attach_input(u64::from(NULL) << 32, scene.id);
    let attached = iommu.call(code::ATTACH, &null.0)?;
    equal("ATTACH to the null domain", attached.status, want)?;
    mapped.is_intact()?;
    // The numbers next to them are like any other.
    for number in [NULL - 1, 0x8000_0000] {
        equal("CREATE", iommu.create(number)?, 0)?;
        equal("ATTACH", iommu.attach(number, scene.id)?, 0)?;
        scene.is_in(number)?;
    }
    Ok(())
}

fn create_again(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let iommu = &mapped.scene.iommu;
    let taken = status::KEY_ALREADY_EXISTS;
    equal("status of CREATE", iommu.create(1)?, taken)?;
    mapped.is_intact()?;
    equal("status of DETACH", iommu.detach(mapped.scene.id)?, 0)?;
    equal("status of CREATE", iommu.create(1)?, taken)?;
    equal("ATTACH", iommu.attach(1, mapped.scene.id)?, 0)?;
    mapped.is_intact()
}

fn delete_in_use(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let (scene, iommu) = (&mapped.scene, &mapped.scene.iommu);
    equal("DELETE", iommu.delete(1)?, status::OBJECT_IN_USE)?;
    mapped.is_intact()?;
    equal("status of DETACH", iommu.detach(scene.id)?, 0)?;
    equal("DELETE when it is empty", iommu.delete(1)?, 0)?;
    scene.exists(1, false)?;
    scene.is_default()
}

fn unknown_device(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let iommu = &mapped.scene.iommu;
    let want = status::INVALID_DEVICE_ID;
    for bit in 0..31 {
        let id = mapped.scene.id ^ 1 << bit;
        equal(format!("ATTACH of {id:#x}"), iommu.attach(1, id)?, want)?;
        equal(format!("DETACH of {id:#x}"), iommu.detach(id)?, want)?;
    }
    mapped.is_intact()
}

fn not_behind(context: &Context) -> Verdict {
    let setup = Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: vec![FunctionSetup::testdev(0), behind(1)],
        }],
        ..setup()
    };
    let vm = context.machine(&setup)?;
    let bus = Bus::bring_up(&vm)?;
    let (off, on) = (Scene::on(&bus, 0)?, Scene::on(&bus, 1)?);
    on.paged(1, 4)?;
    let want = status::INVALID_DEVICE_STATE;
    for _ in 0..2 {
        equal("status of ATTACH", off.iommu.attach(1, off.id)?, want)?;
        equal("status of DETACH", off.iommu.detach(off.id)?, want)?;
        let default = attach_input(DEFAULT, off.id);
        let got = off.iommu.call(code::ATTACH, &default.0)?.status;
        equal("status of ATTACH to the default domain", got, want)?;
        off.is_default()?;
        on.is_in(1)?;
    }
    equal("status of DETACH", on.iommu.detach(on.id)?, 0)?;
    equal("DELETE: nobody is in it", on.iommu.delete(1)?, 0)
}

fn already_there(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    for _ in 0..3 {
        mapped.scene.is_in(1)?;
        mapped.is_intact()?;
    }
    // It is counted once.
    equal("DETACH", mapped.scene.iommu.detach(mapped.scene.id)?, 0)?;
    equal("DELETE", mapped.scene.iommu.delete(1)?, 0)
}

fn bad_root(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let (vm, iommu) = (mapped.scene.vm(), &mapped.scene.iommu);
    let page = vm.pages(1)?;
    let end = vm.setup().ram[0].end;
    let bad = [
        page + 1,
        page + 8,
        page + 0x800,
        page | 1 << 63,
        end,
        end - 1,
        0xf000_0000,
        1 << 52,
        !0xfff,
        u64::MAX,
    ];
    for root in bad {
        let got = iommu.configure(1, configure::ENABLED, root)?;
        let what = format!("status of CONFIGURE with root {root:#x}");
        equal(what, got, status::INVALID_PARAMETER)?;
    }
    mapped.is_intact()?;
    let good = iommu.configure(1, configure::ENABLED, end - PAGE)?;
    equal("status with the last page of RAM", good, 0)
}

fn root_not_used(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    equal("status of CREATE", scene.iommu.create(1)?, 0)?;
    equal("status of ATTACH", scene.iommu.attach(1, scene.id)?, 0)?;
    let blocked = configure::ENABLED | configure::BLOCKED;
    for root in [0, 1, 0xf000_0000, u64::MAX] {
        let got = scene.iommu.configure(1, 0, root)?;
        equal(format!("identity with root {root:#x}"), got, 0)?;
        scene.is_default()?;
        let got = scene.iommu.configure(1, blocked, root)?;
        equal(format!("blocked with root {root:#x}"), got, 0)?;
        scene.faults(scene.vm().pages(1)?)?;
    }
    Ok(())
}

fn blocked_without_translation(context: &Context) -> Verdict {
    for setup in [setup(), five_levels()] {
        let mapped = Mapped::of(Scene::of(context, &setup)?)?;
        let want = status::INVALID_PARAMETER;
        for flags in [
            configure::BLOCKED,
            configure::BLOCKED | configure::FIVE_LEVELS,
        ] {
            let root = mapped.tables.root();
            let got = mapped.scene.iommu.configure(1, flags, root)?;
            equal(format!("status with flags {flags}"), got, want)?;
        }
        mapped.is_intact()?;
    }
    Ok(())
}

fn five(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let tables = Tables::new(mapped.scene.vm(), 5)?;
    let got = mapped.scene.iommu.translate(1, &tables)?;
    equal("CONFIGURE", got, status::INVALID_PARAMETER)?;
    mapped.is_intact()?;
    let scene = Scene::of(context, &five_levels())?;
    let tables = scene.paged(1, 5)?;
    let page = scene.vm().pages(1)?;
    tables.map(IOVA, page)?;
    scene.reaches(IOVA, page)?;
    // 4 levels are still to be had.
    let tables = scene.paged(2, 4)?;
    tables.map(IOVA, page)?;
    scene.reaches(IOVA, page)
}

fn flush_list_elements(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let (scene, iommu) = (&mapped.scene, &mapped.scene.iommu);
    let bad = element(IOVA, 53);
    for before in [0, 1, 5, 63, 64, 65, 200] {
        for after in [0, 1, 100] {
            mapped.tables.map(IOVA, mapped.page)?;
            scene.reaches(IOVA, mapped.page)?;
            mapped.tables.unmap(IOVA)?;
            let mut list = vec![element(IOVA, 0); before];
            list.push(bad);
            list.resize(before + 1 + after, element(IOVA + PAGE, 0));
            let want = (status::INVALID_PARAMETER, before as u16);
            equal(
                "status and elements done",
                iommu.flush_list(1, &list)?,
                want,
            )?;
            if before > 0 {
                scene.faults(IOVA)?;
            }
            equal("status of FLUSH", iommu.flush(1)?, 0)?;
        }
    }
    mapped.tables.map(IOVA, mapped.page)?;
    mapped.is_intact()
}

fn flush_list_limits(context: &Context) -> Verdict {
    for (setup, width) in [(setup(), 48), (five_levels(), 57)] {
        let mapped = Mapped::of(Scene::of(context, &setup)?)?;
        let iommu = &mapped.scene.iommu;
        let last = (1 << width) - PAGE;
        for good in [
            element(0, 0),
            element(last, 0),
            element(last, 9),
            element(last, width - 12),
            element(0, 51),
            element(0, 52),
            element(last, 52),
        ] {
            let got = iommu.flush_list(1, &[good])?;
            equal(format!("answer to {good:#x}"), got, (0, 1))?;
        }
        for bad in [
            element(0, 53),
            element(0, 63),
            element(0, 64),
            element(0, 0xfff),
            element(1 << width, 0),
            element(1 << width, 9),
            element(!0, 0),
        ] {
            let got = iommu.flush_list(1, &[bad])?;
            let want = (status::INVALID_PARAMETER, 0);
            equal(format!("answer to {bad:#x}"), got, want)?;
        }
        mapped.is_intact()?;
    }
    Ok(())
}

fn flush_anything(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let iommu = &scene.iommu;
    let blocked = configure::ENABLED | configure::BLOCKED;
    equal("status of CREATE", iommu.create(1)?, 0)?;
    for (number, flags) in [(2, 0), (3, blocked)] {
        equal("status of CREATE", iommu.create(number)?, 0)?;
        let configured = iommu.configure(number, flags, 0)?;
        equal("status of CONFIGURE", configured, 0)?;
    }
    scene.domain(4, 4)?;
    let domains = (1..5).map(first_stage).chain([DEFAULT]);
    for attached in [false, true] {
        for domain in domains.clone() {
            if attached && domain != DEFAULT {
                let number = (domain >> 32) as u32;
                equal("status of ATTACH", iommu.attach(number, scene.id)?, 0)?;
            }
            let flush = iommu.call(code::FLUSH, &flush_input(domain).0)?;
            equal(format!("FLUSH of {domain:#x}"), flush.status, 0)?;
            let list = flush_list_input(domain, &[0, element(IOVA, 9)]);
            let flush = iommu.call(code::FLUSH_LIST | 2 << 32, &list.0)?;
            let what = format!("FLUSH_LIST of {domain:#x}");
            equal(what, (flush.status, flush.done), (0, 2))?;
        }
    }
    Ok(())
}
