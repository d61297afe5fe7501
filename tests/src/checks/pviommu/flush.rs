//! Flushes: after one returns, nothing of what it covers is used any more.
#![forbid(unsafe_code)]

use super::{IOVA, Mapped, Scene, behind, five_levels, setup};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::host::{BusSetup, Setup};
use crate::model::pviommu::{MOST_ELEMENTS, Tables, bit, code, element, first_stage, flush_input};
use crate::model::vm::PAGE;
use crate::model::vpci::Bus;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "pviommu.flush.list-4k",
        "After unmap and FLUSH_LIST of a 4 KiB page the same access faults.",
        &["IO-6-01", "IO-3-04", "IO-2-15"],
        |context| unmapped(context, 1, false),
    ),
    Check::new(
        "pviommu.flush.list-2m",
        "The same for a 2 MiB page, whichever part of it was used.",
        &["IO-6-01", "IO-3-04", "IO-2-15"],
        |context| unmapped(context, 2, false),
    ),
    Check::new(
        "pviommu.flush.list-1g",
        "The same for a 1 GiB page.",
        &["IO-6-01", "IO-3-04", "IO-2-15"],
        |context| unmapped(context, 3, false),
    ),
    Check::new(
        "pviommu.flush.all-4k",
        "After unmap and FLUSH the same access faults.",
        &["IO-6-01", "IO-3-04", "IO-2-14"],
        |context| unmapped(context, 1, true),
    ),
    Check::new(
        "pviommu.flush.all-large",
        "The same for a 2 MiB and a 1 GiB page.",
        &["IO-6-01", "IO-3-04", "IO-2-14"],
        |context| unmapped(context, 2, true).and_then(|()| unmapped(context, 3, true)),
    ),
    Check::new(
        "pviommu.flush.other-page",
        "After a page gave way to another one and a flush, the other one is reached.",
        &["IO-6-01"],
        other_page,
    ),
    Check::new(
        "pviommu.flush.read-only",
        "After a page became read-only and a flush, writes fault.",
        &["IO-6-01", "IO-5-02"],
        read_only,
    ),
    Check::new(
        "pviommu.flush.non-leaf",
        "A flush of an address forgets the tables on its way, at every level.",
        &["IO-6-01", "IO-3-04"],
        non_leaf,
    ),
    Check::new(
        "pviommu.flush.tables-freed",
        "After a flush the host reads nothing of tables that the guest has freed.",
        &["IO-6-01", "IO-3-04"],
        tables_freed,
    ),
    Check::new(
        "pviommu.flush.every-shift",
        "An element covers as many pages as its shift says, up to the whole space.",
        &["IO-2-15", "IO-3-04", "IO-6-01"],
        every_shift,
    ),
    Check::new(
        "pviommu.flush.low-bits",
        "Page-number bits below the shift are ignored.",
        &["IO-4-20", "IO-2-15"],
        low_bits,
    ),
    Check::new(
        "pviommu.flush.part-of-large",
        "A flush of any 4 KiB inside a large page forgets that page.",
        &["IO-6-01", "IO-2-15"],
        part_of_large,
    ),
    Check::new(
        "pviommu.flush.many-elements",
        "A list of any length up to a page is done whole, each element of it.",
        &["HV-3.2-11", "IO-2-15", "IO-6-01"],
        many_elements,
    ),
    Check::new(
        "pviommu.flush.every-device",
        "A flush is for every device in the domain.",
        &["IO-6-01"],
        every_device,
    ),
    Check::new(
        "pviommu.flush.other-domain",
        "A flush of one domain leaves the devices of another at work.",
        &["IO-4-19", "IO-2-14"],
        other_domain,
    ),
    Check::new(
        "pviommu.flush.before-use",
        "A flush before anything was used, twice, and after each use, is always right.",
        &["IO-4-19", "IO-6-01"],
        before_use,
    ),
    Check::new(
        "pviommu.flush.not-kept-by-domain",
        "What a device used in a domain is not there when it comes back to changed tables.",
        &["IO-6-02", "IO-6-01"],
        not_kept,
    ),
];

/// An address of RAM that is a multiple of 2 MiB and that the allocator does not reach.
const LARGE: u64 = 0xc0_0000;

fn size(level: u32) -> u64 {
    1 << (12 + 9 * (level - 1))
}

/// A leaf of `level` that covers [`LARGE`], and where in the page that is.
fn leaf(level: u32) -> (u64, u64) {
    let large = if level > 1 { bit::PS } else { 0 };
    let gpa = LARGE & !(size(level) - 1);
    (gpa | large | bit::PAGE, LARGE - gpa)
}

fn unmapped(context: &Context, level: u32, all: bool) -> Verdict {
    for (setup, levels) in [(setup(), 4), (five_levels(), 5)] {
        let scene = Scene::of(context, &setup)?;
        let tables = scene.paged(1, levels)?;
        let base = IOVA & !(size(3) - 1);
        let (entry, inside) = leaf(level);
        let last = (inside + 0x1f_f000) & (size(level) - 1);
        for used in [inside, last] {
            tables.set(base, level, entry)?;
            let gpa = (LARGE - inside) + used;
            scene.reaches(base + used, gpa)?;
            tables.set(base, level, 0)?;
            match all {
                true => equal("status of FLUSH", scene.iommu.flush(1)?, 0)?,
                // As Linux: one element that covers the page.
                false => scene.iommu.flush_range(1, base, 9 * u64::from(level - 1))?,
            }
            scene.faults(base + used)?;
            scene.faults(base)?;
        }
    }
    Ok(())
}

fn other_page(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let scene = &mapped.scene;
    for round in 0..20 {
        let page = scene.vm().pages(1)?;
        mapped.tables.map(IOVA, page)?;
        match round % 2 {
            0 => scene.iommu.flush_range(1, IOVA, 0)?,
            _ => equal("status of FLUSH", scene.iommu.flush(1)?, 0)?,
        }
        scene.reaches(IOVA, page)?;
    }
    Ok(())
}

fn read_only(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let scene = &mapped.scene;
    for _ in 0..5 {
        scene.reaches(IOVA, mapped.page)?;
        mapped.tables.set(IOVA, 1, mapped.page | bit::READ_ONLY)?;
        scene.iommu.flush_range(1, IOVA, 0)?;
        scene.reads(IOVA, mapped.page)?;
        holds("a write fails", !scene.write(IOVA, 1)?)?;
        mapped.tables.map(IOVA, mapped.page)?;
        scene.iommu.flush_range(1, IOVA, 0)?;
    }
    Ok(())
}

fn non_leaf(context: &Context) -> Verdict {
    for (setup, levels) in [(setup(), 4), (five_levels(), 5)] {
        let scene = Scene::of(context, &setup)?;
        let tables = scene.paged(1, levels)?;
        let (page, other) = (scene.vm().pages(1)?, scene.vm().pages(1)?);
        tables.map(IOVA, page)?;
        for level in 2..=levels {
            scene.reaches(IOVA, page)?;
            let former = tables.entry(IOVA, level)?;
            // Another branch for the same address, then none.
            let branch = Tables::new(scene.vm(), level - 1)?;
            branch.map(IOVA, other)?;
            tables.set(IOVA, level, branch.root() | bit::TABLE)?;
            scene.iommu.flush_range(1, IOVA, 0)?;
            let course = format!("{levels} levels, entry of level {level}");
            let reached = scene.reaches(IOVA, other);
            reached.map_err(|failure| failure.during(&course))?;
            tables.set(IOVA, level, 0)?;
            scene.iommu.flush_range(1, IOVA, 0)?;
            let faulted = scene.faults(IOVA);
            faulted.map_err(|failure| failure.during(&course))?;
            tables.set(IOVA, level, former)?;
        }
        scene.reaches(IOVA, page)?;
    }
    Ok(())
}

fn tables_freed(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let (vm, tables) = (scene.vm(), scene.paged(1, 4)?);
    let page = vm.pages(1)?;
    // A branch from level 3 down.
    let branch = Tables::at(vm, 3, vm.pages(3)?)?;
    branch.map(IOVA, page)?;
    for round in 0..5 {
        tables.set(IOVA, 4, branch.root() | bit::TABLE)?;
        scene.reaches(IOVA, page)?;
        tables.set(IOVA, 4, 0)?;
        match round % 2 {
            0 => scene.iommu.flush_range(1, IOVA & !(size(4) - 1), 27)?,
            _ => equal("status of FLUSH", scene.iommu.flush(1)?, 0)?,
        }
        // The pages of the branch have another use now: data that would be entries, without A.
        let before = vm.read(branch.root(), 3 * PAGE as usize)?;
        let bits = bit::P | bit::RW | bit::US;
        let data = (page | bits).to_le_bytes().repeat(3 * PAGE as usize / 8);
        vm.write(branch.root(), &data)?;
        for offset in [0, PAGE, size(2), size(3)] {
            scene.faults(IOVA + offset)?;
        }
        let after = vm.read(branch.root(), data.len())?;
        holds("nobody wrote to them", after == data)?;
        vm.write(branch.root(), &before)?;
    }
    Ok(())
}

fn every_shift(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let tables = scene.paged(1, 4)?;
    let base = 1 << 46;
    let pages = scene.vm().pages(3)?;
    for shift in 0..=52_u64 {
        // The first, one in the middle and the last of the pages that the element covers.
        let count = 1_u64 << shift.min(33);
        let all = [0, count / 2, count - 1].map(|index| base + index * PAGE);
        for (iova, page) in all.into_iter().zip((pages..).step_by(PAGE as usize)) {
            tables.map(iova, page)?;
        }
        for iova in all {
            let what = format!("a read of {iova:#x} succeeds");
            holds(what, scene.read(iova)?.is_some())?;
        }
        for iova in all {
            tables.unmap(iova)?;
        }
        scene.iommu.flush_range(1, base, shift)?;
        for iova in all {
            let faulted = scene.faults(iova);
            faulted.map_err(|failure| failure.during(format!("shift {shift}")))?;
        }
    }
    Ok(())
}

fn low_bits(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let tables = scene.paged(1, 4)?;
    let page = scene.vm().pages(1)?;
    for shift in [1, 3, 9, 12, 18, 27, 35, 36, 52] {
        let span = PAGE << shift.min(35);
        let base = (1 << 46) & !(span - 1);
        for named in [base, base + PAGE, base + span / 2, base + span - PAGE] {
            for used in [base, base + span - PAGE] {
                tables.map(used, page)?;
                scene.reaches(used, page)?;
                tables.unmap(used)?;
                scene.iommu.flush_range(1, named, shift)?;
                let course = format!("shift {shift} from {named:#x}");
                let faulted = scene.faults(used);
                faulted.map_err(|failure| failure.during(course))?;
            }
        }
    }
    Ok(())
}

fn part_of_large(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let tables = scene.paged(1, 4)?;
    let base = IOVA & !(size(3) - 1);
    for level in [2, 3] {
        let (entry, inside) = leaf(level);
        for named in [0, inside, size(level) - PAGE] {
            tables.set(base, level, entry)?;
            scene.reaches(base + inside, LARGE)?;
            scene.reaches(base + inside + PAGE, LARGE + PAGE)?;
            tables.set(base, level, 0)?;
            scene.iommu.flush_range(1, base + named, 0)?;
            scene.faults(base + inside)?;
            scene.faults(base + inside + PAGE)?;
        }
    }
    Ok(())
}

fn many_elements(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let tables = scene.paged(1, 4)?;
    let page = scene.vm().pages(1)?;
    for count in [1, 2, 63, 64, 65, 128, 300, MOST_ELEMENTS] {
        let iovas = (0..count as u64).map(|index| IOVA + index * 3 * PAGE);
        let ends = [0, count / 2, count - 1].map(|index| IOVA + index as u64 * 3 * PAGE);
        for iova in ends {
            tables.map(iova, page)?;
            scene.reaches(iova, page)?;
        }
        for iova in ends {
            tables.unmap(iova)?;
        }
        let list: Vec<_> = iovas.map(|iova| element(iova, 0)).collect();
        let want = (0, count as u16);
        equal(
            "status and elements",
            scene.iommu.flush_list(1, &list)?,
            want,
        )?;
        for iova in ends {
            let faulted = scene.faults(iova);
            faulted.map_err(|failure| failure.during(format!("{count} elements")))?;
        }
    }
    Ok(())
}

/// Two devices on a bus.
fn pair(context: &Context) -> Result<(Scene, Scene), Failure> {
    let vm = context.machine(&Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: vec![behind(0), behind(1)],
        }],
        ..setup()
    })?;
    let bus = Bus::bring_up(&vm)?;
    Ok((Scene::on(&bus, 0)?, Scene::on(&bus, 1)?))
}

fn every_device(context: &Context) -> Verdict {
    let (one, two) = pair(context)?;
    let tables = one.paged(1, 4)?;
    equal("status of ATTACH", two.iommu.attach(1, two.id)?, 0)?;
    let page = one.vm().pages(1)?;
    for round in 0..6 {
        tables.map(IOVA, page)?;
        one.reaches(IOVA, page)?;
        two.reaches(IOVA, page)?;
        tables.unmap(IOVA)?;
        match round % 2 {
            0 => one.iommu.flush_range(1, IOVA, 0)?,
            _ => equal("status of FLUSH", one.iommu.flush(1)?, 0)?,
        }
        one.faults(IOVA)?;
        two.faults(IOVA)?;
    }
    Ok(())
}

fn other_domain(context: &Context) -> Verdict {
    let (one, two) = pair(context)?;
    let (first, second) = (one.paged(1, 4)?, two.paged(2, 4)?);
    let (page, other) = (one.vm().pages(1)?, one.vm().pages(1)?);
    first.map(IOVA, page)?;
    second.map(IOVA, other)?;
    for number in [1, 2, 1] {
        one.reaches(IOVA, page)?;
        two.reaches(IOVA, other)?;
        equal("status of FLUSH", one.iommu.flush(number)?, 0)?;
        one.iommu.flush_range(number, IOVA, 0)?;
    }
    let default = flush_input(0);
    let flushed = one.iommu.call(code::FLUSH, &default.0)?;
    equal("status of FLUSH of the default domain", flushed.status, 0)?;
    one.reaches(IOVA, page)?;
    two.reaches(IOVA, other)
}

fn before_use(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let tables = scene.paged(1, 4)?;
    let page = scene.vm().pages(1)?;
    let flush = || -> Verdict {
        scene.iommu.flush_range(1, IOVA, 0)?;
        equal("status of FLUSH", scene.iommu.flush(1)?, 0)?;
        let twice = flush_input(first_stage(1));
        let flushed = scene.iommu.call(code::FLUSH, &twice.0)?;
        equal("status of FLUSH", flushed.status, 0)
    };
    flush()?;
    scene.faults(IOVA)?;
    tables.map(IOVA, page)?;
    flush()?;
    scene.reaches(IOVA, page)?;
    flush()?;
    scene.reaches(IOVA, page)?;
    tables.unmap(IOVA)?;
    flush()?;
    scene.faults(IOVA)
}

fn not_kept(context: &Context) -> Verdict {
    let mapped = Mapped::new(context)?;
    let scene = &mapped.scene;
    scene.domain(2, 4)?;
    for round in 0..4 {
        scene.reaches(IOVA, mapped.page)?;
        match round % 2 {
            0 => equal("status of ATTACH", scene.iommu.attach(2, scene.id)?, 0)?,
            _ => equal("status of DETACH", scene.iommu.detach(scene.id)?, 0)?,
        }
        // The device is not in the domain, so this flush is none for it.
        mapped.tables.unmap(IOVA)?;
        scene.iommu.flush_range(1, IOVA, 0)?;
        equal("status of ATTACH", scene.iommu.attach(1, scene.id)?, 0)?;
        scene.faults(IOVA)?;
        mapped.tables.map(IOVA, mapped.page)?;
    }
    Ok(())
}
