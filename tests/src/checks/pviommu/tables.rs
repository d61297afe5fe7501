//! First-stage tables: sizes of pages, permissions, reserved bits, accessed and dirty bits, and
//! where tables may lie.
#![forbid(unsafe_code)]

use vm_vpci::pviommu::IommuConfig;

use super::{IOVA, Scene, five_levels, setup, with};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::host::{LOW_MMIO, Setup};
use crate::model::pviommu::{Tables, bit};
use crate::model::vm::PAGE;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "pviommu.table.page-4k",
        "A leaf of level 1 maps 4 KiB, at either number of levels.",
        &["IO-5-01"],
        |context| each_size(context, 1),
    ),
    Check::new(
        "pviommu.table.page-2m",
        "A leaf of level 2 maps 2 MiB, at either number of levels.",
        &["IO-5-01"],
        |context| each_size(context, 2),
    ),
    Check::new(
        "pviommu.table.page-1g",
        "A leaf of level 3 maps 1 GiB, of which what is RAM is reached.",
        &["IO-5-01", "IO-5-04"],
        |context| each_size(context, 3),
    ),
    Check::new(
        "pviommu.table.five-levels",
        "Tables of 5 levels translate all 57 bits, each level with its own.",
        &["IO-2-20", "IO-2-24", "IO-5-01"],
        fifty_seven_bits,
    ),
    Check::new(
        "pviommu.table.width",
        "An address above the width of the domain's tables is a fault.",
        &["IO-5-04", "IO-2-24"],
        width,
    ),
    Check::new(
        "pviommu.table.present",
        "An entry that is not present, at any level, stops reads and writes.",
        &["IO-5-02"],
        |context| each_level(context, bit::P, false),
    ),
    Check::new(
        "pviommu.table.user",
        "An entry without U/S, at any level, stops reads and writes.",
        &["IO-5-02"],
        |context| each_level(context, bit::US, false),
    ),
    Check::new(
        "pviommu.table.writable",
        "An entry without R/W, at any level, stops writes and lets reads pass.",
        &["IO-5-02"],
        |context| each_level(context, bit::RW, true),
    ),
    Check::new(
        "pviommu.table.execute-disable",
        "XD at any level, and bits that nobody uses, change nothing.",
        &["IO-5-02"],
        ignored_bits,
    ),
    Check::new(
        "pviommu.table.physical-width",
        "An address bit above the guest's physical width, at any level, is a fault.",
        &["IO-5-02"],
        physical_width,
    ),
    Check::new(
        "pviommu.table.leaf-too-high",
        "A leaf at level 4 or 5 is a fault.",
        &["IO-5-02"],
        leaf_too_high,
    ),
    Check::new(
        "pviommu.table.misaligned-leaf",
        "A large leaf with a low address bit set, each by itself, is a fault.",
        &["IO-5-02", "IO-5-01"],
        misaligned_leaf,
    ),
    Check::new(
        "pviommu.table.accessed-and-dirty",
        "The host sets A at every level on use, D on the leaf on a write, and no other bit.",
        &["IO-5-03"],
        accessed_and_dirty,
    ),
    Check::new(
        "pviommu.table.dirty-after-read",
        "A page that was read first gets its dirty bit when it is written.",
        &["IO-5-03"],
        dirty_after_read,
    ),
    Check::new(
        "pviommu.table.no-dirty-without-write",
        "A write that is refused sets no dirty bit, and neither does a read.",
        &["IO-5-03", "IO-5-02"],
        no_dirty_without_write,
    ),
    Check::new(
        "pviommu.table.anywhere",
        "Root, tables and pages may lie in any range of RAM, up to its last page.",
        &["IO-5-07", "IO-5-01"],
        anywhere,
    ),
    Check::new(
        "pviommu.table.outside-ram",
        "A table outside RAM, at any level, is a fault.",
        &["IO-5-04", "IO-5-07"],
        table_outside_ram,
    ),
    Check::new(
        "pviommu.table.leaf-outside-ram",
        "A page outside RAM, also a peer's MMIO, is a fault.",
        &["IO-5-04"],
        leaf_outside_ram,
    ),
    Check::new(
        "pviommu.table.loop",
        "A table that leads to itself is a table like any other.",
        &["IO-5-07"],
        itself,
    ),
    Check::new(
        "pviommu.table.mixed-sizes",
        "Pages of all sizes side by side, and one under another's address after a flush.",
        &["IO-5-01", "IO-6-01"],
        mixed_sizes,
    ),
];

/// An address of RAM that is a multiple of 2 MiB and that the allocator does not reach.
const LARGE: u64 = 0xc0_0000;

/// Domains with 4 and with 5 levels.
fn both(context: &Context, check: impl Fn(&Scene, &Tables, u32) -> Result<(), Failure>) -> Verdict {
    for (setup, levels) in [(setup(), 4), (five_levels(), 5)] {
        let scene = Scene::of(context, &setup)?;
        let tables = scene.paged(1, levels)?;
        let done = check(&scene, &tables, levels);
        done.map_err(|failure| failure.during(format!("{levels} levels")))?;
    }
    Ok(())
}

fn size(level: u32) -> u64 {
    1 << (12 + 9 * (level - 1))
}

/// An address for leaves of `level`: those of each have 512 GiB of their own.
fn place_for(level: u32) -> u64 {
    (IOVA + u64::from(level) * size(4)) & !(size(3) - 1)
}

/// A leaf of `level` for the page at [`LARGE`], or for the whole first GiB; and where the page is.
fn leaf(level: u32, flags: u64) -> (u64, u64) {
    let large = if level > 1 { bit::PS } else { 0 };
    let gpa = LARGE & !(size(level) - 1);
    (gpa | large | flags, LARGE - gpa)
}

fn each_size(context: &Context, level: u32) -> Verdict {
    both(context, |scene, tables, _| {
        let base = IOVA & !(size(3) - 1);
        let (entry, inside) = leaf(level, bit::PAGE);
        scene.faults(base)?;
        tables.set(base, level, entry)?;
        for offset in [0, 8, PAGE - 8] {
            scene.reaches(base + inside + offset, LARGE + offset)?;
        }
        scene.faults(base + size(level))?;
        scene.faults(base - 8)?;
        if level == 1 {
            return Ok(());
        }
        let more = 0x1f_fff8;
        scene.reaches(base + inside + more, LARGE + more)?;
        if level == 3 {
            let end = scene.vm().setup().ram[0].end;
            scene.reaches(base + end - 8, end - 8)?;
            scene.faults(base + end)?;
            scene.faults(base + LOW_MMIO % size(3))?;
        }
        Ok(())
    })
}

fn fifty_seven_bits(context: &Context) -> Verdict {
    let scene = Scene::of(context, &five_levels())?;
    let tables = scene.paged(1, 5)?;
    let mut all = Vec::new();
    for bit in (12..57).step_by(3).chain([47, 48, 55, 56]) {
        let page = scene.vm().pages(1)?;
        tables.map(1 << bit, page)?;
        all.push((1 << bit, page));
    }
    all.dedup();
    let last = (1 << 57) - PAGE;
    let page = scene.vm().pages(1)?;
    tables.map(last, page)?;
    scene.reaches(last + PAGE - 8, page + PAGE - 8)?;
    for bit in 12..57 {
        // The newest mapping of an address counts.
        match all.iter().rev().find(|(iova, _)| *iova == 1 << bit) {
            Some((iova, page)) => {
                scene.iommu.flush_range(1, *iova, 0)?;
                scene.reaches(*iova, *page)?;
            }
            None => scene.faults(1 << bit)?,
        }
    }
    scene.faults(1 << 57)
}

fn width(context: &Context) -> Verdict {
    both(context, |scene, tables, levels| {
        let end = 1_u64 << (12 + 9 * levels);
        let page = scene.vm().pages(1)?;
        tables.map(0, page)?;
        tables.map(end - PAGE, page)?;
        scene.reaches(0, page)?;
        scene.reaches(end - 8, page + PAGE - 8)?;
        let first = 12 + 9 * levels;
        for bit in first..64 {
            scene.faults(1 << bit)?;
        }
        // Canonical in the eyes of a CPU, but not an address here.
        scene.faults(!(end - 1) | 0x1000)?;
        scene.faults(u64::MAX - 7)?;
        // An access that runs over the end.
        holds("a fill over the end fails", !scene.fill(end - 8, 16, 1)?)?;
        equal("RAM at 0 of the page", scene.peek(page)?, super::STORED)
    })
}

/// For each size of page, and each level on its way: the entry without `missing`.
fn each_level(context: &Context, missing: u64, can_read: bool) -> Verdict {
    both(context, |scene, tables, levels| {
        for leaf_level in 1..=3 {
            let base = place_for(leaf_level);
            let (entry, inside) = leaf(leaf_level, bit::PAGE);
            let iova = base + inside;
            tables.set(base, leaf_level, entry)?;
            scene.reaches(iova, LARGE)?;
            for level in leaf_level..=levels {
                let place = tables.place(base, level)?;
                let entry = scene.peek(place)?;
                let set = |entry: u64| scene.vm().write(place, &entry.to_le_bytes());
                set(entry & !missing)?;
                scene.iommu.flush_range(1, iova, 0)?;
                let verdict = if can_read {
                    scene.reads(iova, LARGE)?;
                    holds("a write fails", !scene.write(iova, 1)?)
                } else {
                    scene.faults(iova)
                };
                let course = format!("entry of level {level}, leaf of level {leaf_level}");
                verdict.map_err(|failure| failure.during(course))?;
                set(entry)?;
                scene.iommu.flush_range(1, iova, 0)?;
                scene.reaches(iova, LARGE)?;
            }
        }
        Ok(())
    })
}

fn ignored_bits(context: &Context) -> Verdict {
    both(context, |scene, tables, levels| {
        let page = scene.vm().pages(1)?;
        tables.map(IOVA, page)?;
        // Caching, global, software and key bits.
        let bits = [3, 4, 8, 9, 10, 11, 52, 58, 59, 62, 63];
        for level in 1..=levels {
            let entry = tables.entry(IOVA, level)?;
            for bit in bits {
                tables.set(IOVA, level, entry | 1 << bit)?;
                scene.iommu.flush_range(1, IOVA, 0)?;
                let reached = scene.reaches(IOVA, page);
                let course = format!("bit {bit} of level {level}");
                reached.map_err(|failure| failure.during(course))?;
            }
            let all = bits.iter().fold(bit::XD, |all, bit| all | 1 << bit);
            tables.set(IOVA, level, entry | all)?;
            scene.iommu.flush_range(1, IOVA, 0)?;
            scene.reaches(IOVA, page)?;
        }
        Ok(())
    })
}

fn physical_width(context: &Context) -> Verdict {
    for bits in [36, 40, 46, 52] {
        let scene = Scene::of(
            context,
            &with(IommuConfig {
                physical_bits: bits,
                ..IommuConfig::default()
            }),
        )?;
        let tables = scene.paged(1, 4)?;
        let page = scene.vm().pages(1)?;
        tables.map(IOVA, page)?;
        scene.reaches(IOVA, page)?;
        for level in 1..=4 {
            let place = tables.place(IOVA, level)?;
            let entry = scene.peek(place)?;
            for high in bits..52 {
                let bad = entry | 1 << high;
                scene.vm().write(place, &bad.to_le_bytes())?;
                scene.iommu.flush_range(1, IOVA, 0)?;
                let course = format!("{bits} bits, bit {high} of level {level}");
                let verdict = scene.faults(IOVA).and_then(|()| {
                    let report = scene.vm().host().buses();
                    let cause = report[0].functions[0].last_fault.map(|fault| fault.cause);
                    let reserved = vm_vpci::pviommu::FaultCause::Reserved { level: level as u8 };
                    equal("cause", cause, Some(reserved))
                });
                verdict.map_err(|failure| failure.during(course))?;
            }
            scene.vm().write(place, &entry.to_le_bytes())?;
            scene.iommu.flush_range(1, IOVA, 0)?;
            scene.reaches(IOVA, page)?;
        }
    }
    Ok(())
}

fn leaf_too_high(context: &Context) -> Verdict {
    both(context, |scene, tables, levels| {
        for level in 4..=levels {
            tables.set(IOVA, level, bit::PAGE | bit::PS)?;
            scene.iommu.flush(1)?;
            scene.faults(IOVA)?;
            scene.faults(IOVA & !(size(4) - 1))?;
        }
        Ok(())
    })
}

fn misaligned_leaf(context: &Context) -> Verdict {
    both(context, |scene, tables, _| {
        for level in [2, 3] {
            let base = place_for(level);
            let (entry, inside) = leaf(level, bit::PAGE);
            for low in 12..size(level).trailing_zeros() {
                tables.set(base, level, entry | 1 << low)?;
                scene.iommu.flush_range(1, base + inside, 0)?;
                let faulted = scene.faults(base + inside);
                let course = format!("bit {low} of a leaf of level {level}");
                faulted.map_err(|failure| failure.during(course))?;
            }
            tables.set(base, level, entry)?;
            scene.iommu.flush_range(1, base + inside, 0)?;
            scene.reaches(base + inside, LARGE)?;
        }
        Ok(())
    })
}

fn accessed_and_dirty(context: &Context) -> Verdict {
    both(context, |scene, tables, levels| {
        for leaf_level in 1..=3 {
            let base = place_for(leaf_level);
            let (entry, inside) = leaf(leaf_level, bit::PAGE);
            tables.set(base, leaf_level, entry)?;
            let mut clean = Vec::new();
            for level in leaf_level..=levels {
                let entry = tables.entry(base, level)? & !(bit::A | bit::D);
                clean.push((level, entry));
            }
            let set_all = || -> Verdict {
                for (level, entry) in clean.iter().rev() {
                    tables.set(base, *level, *entry)?;
                }
                scene.iommu.flush_range(1, base + inside, 0)
            };
            for write in [false, true] {
                set_all()?;
                match write {
                    true => holds("a write succeeds", scene.write(base + inside, 1)?)?,
                    false => scene.reads(base + inside, LARGE)?,
                }
                for (level, entry) in &clean {
                    let dirty = write && *level == leaf_level;
                    let want = entry | bit::A | if dirty { bit::D } else { 0 };
                    let what = format!("entry of level {level} above a leaf of {leaf_level}");
                    equal(what, tables.entry(base, *level)?, want)?;
                }
            }
        }
        Ok(())
    })
}

fn dirty_after_read(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let tables = scene.paged(1, 4)?;
    let page = scene.vm().pages(1)?;
    let clean = page | bit::P | bit::RW | bit::US;
    tables.set(IOVA, 1, clean)?;
    for _ in 0..3 {
        scene.reads(IOVA, page)?;
    }
    equal(
        "the leaf after reads",
        tables.entry(IOVA, 1)?,
        clean | bit::A,
    )?;
    holds("a write succeeds", scene.write(IOVA, 1)?)?;
    let written = clean | bit::A | bit::D;
    equal("the leaf after a write", tables.entry(IOVA, 1)?, written)?;
    // Cleaned by the guest, as for a migration: with a flush the next write shows again.
    tables.set(IOVA, 1, clean | bit::A)?;
    scene.iommu.flush_range(1, IOVA, 0)?;
    holds("a write succeeds", scene.write(IOVA, 1)?)?;
    equal(
        "the leaf after the next write",
        tables.entry(IOVA, 1)?,
        written,
    )
}

fn no_dirty_without_write(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let tables = scene.paged(1, 4)?;
    let page = scene.vm().pages(1)?;
    let read_only = page | bit::P | bit::US;
    tables.set(IOVA, 1, read_only)?;
    scene.reads(IOVA, page)?;
    holds("a write fails", !scene.write(IOVA, 1)?)?;
    let after = tables.entry(IOVA, 1)?;
    equal("the leaf", after & !bit::A, read_only)?;
    // An entry that is not present keeps all its bits.
    for entry in [0, bit::RW | bit::US, 0xdead_beef_0000_0f06] {
        tables.set(IOVA, 1, entry)?;
        scene.iommu.flush_range(1, IOVA, 0)?;
        scene.faults(IOVA)?;
        equal("the leaf", tables.entry(IOVA, 1)?, entry)?;
    }
    Ok(())
}

fn anywhere(context: &Context) -> Verdict {
    let high = 1 << 32;
    let ram = vec![0..16 << 20, 32 << 20..48 << 20, high..high + (16 << 20)];
    let scene = Scene::of(
        context,
        &Setup {
            ram: ram.clone(),
            ..setup()
        },
    )?;
    let vm = scene.vm();
    for (number, range) in (1..).zip(&ram[1..]) {
        // Root and tables are the last four pages of the range.
        let tables = Tables::at(vm, 4, range.end - 4 * PAGE)?;
        equal("status of CREATE", scene.iommu.create(number)?, 0)?;
        let configured = scene.iommu.translate(number, &tables)?;
        equal("status of CONFIGURE", configured, 0)?;
        equal("status of ATTACH", scene.iommu.attach(number, scene.id)?, 0)?;
        let pages = ram
            .iter()
            .flat_map(|range| [range.end - 8 * PAGE, range.start + LARGE]);
        for (iova, page) in (IOVA..).step_by(PAGE as usize).zip(pages) {
            tables.map(iova, page)?;
            scene.reaches(iova, page)?;
            scene.reaches(iova + PAGE - 8, page + PAGE - 8)?;
        }
    }
    Ok(())
}

fn table_outside_ram(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let tables = scene.paged(1, 4)?;
    let page = scene.vm().pages(1)?;
    tables.map(IOVA, page)?;
    scene.reaches(IOVA, page)?;
    let end = scene.vm().setup().ram[0].end;
    for level in 2..=4 {
        let place = tables.place(IOVA, level)?;
        let entry = scene.peek(place)?;
        for gpa in [end, LOW_MMIO, scene.device.bar(), 1 << 51] {
            let bad = gpa | bit::TABLE;
            scene.vm().write(place, &bad.to_le_bytes())?;
            scene.iommu.flush_range(1, IOVA, 0)?;
            let course = format!("entry of level {level} leads to {gpa:#x}");
            let faulted = scene.faults(IOVA);
            faulted.map_err(|failure| failure.during(course))?;
        }
        scene.vm().write(place, &entry.to_le_bytes())?;
        scene.iommu.flush_range(1, IOVA, 0)?;
        scene.reaches(IOVA, page)?;
    }
    Ok(())
}

fn leaf_outside_ram(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let tables = scene.paged(1, 4)?;
    let end = scene.vm().setup().ram[0].end;
    let (bar, window) = (scene.device.bar(), scene.device.bus().window());
    for gpa in [end, LOW_MMIO, bar, window, 0xfec0_0000, 1 << 51] {
        for level in 1..=3 {
            let place = gpa & !(size(level) - 1);
            if level == 3 && place == 0 {
                continue;
            }
            let base = IOVA & !(size(3) - 1);
            let large = if level > 1 { bit::PS } else { 0 };
            tables.set(base, level, place | large | bit::PAGE)?;
            scene.iommu.flush(1)?;
            let faulted = scene.faults(base + gpa % size(level));
            let course = format!("leaf of level {level} for {gpa:#x}");
            faulted.map_err(|failure| failure.during(course))?;
            tables.set(base, level, 0)?;
            scene.iommu.flush(1)?;
        }
    }
    // A page that is the last of RAM, and an access that leaves it for one that is none.
    tables.map(IOVA, end - PAGE)?;
    tables.map(IOVA + PAGE, end)?;
    scene.reaches(IOVA + PAGE - 8, end - 8)?;
    scene.vm().write(end - 8, &super::BEFORE.to_le_bytes())?;
    holds(
        "a fill over the end fails",
        !scene.fill(IOVA + PAGE - 8, 16, 1)?,
    )?;
    equal("the end of RAM", scene.peek(end - 8)?, super::BEFORE)
}

fn itself(context: &Context) -> Verdict {
    both(context, |scene, tables, levels| {
        // Every entry of the root that is used leads to the root.
        tables.set(0, levels, tables.root() | bit::PAGE)?;
        let vm = scene.vm();
        let other = vm.pages(1)?;
        // Address 0 goes through entry 0 at each level, and ends in the root as a page.
        let what = "the root read as a page";
        let root = vm.read(tables.root(), 8)?;
        equal(what, scene.read(0)?, Some(super::fnv(&root)))?;
        let second = other | bit::PAGE;
        vm.write(tables.root() + 8, &second.to_le_bytes())?;
        scene.reaches(PAGE + 0x100, other + 0x100)?;
        scene.faults(2 * PAGE)
    })
}

fn mixed_sizes(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let tables = scene.paged(1, 4)?;
    let base = IOVA & !(size(3) - 1);
    let page = scene.vm().pages(1)?;
    let (two, inside_two) = leaf(2, bit::PAGE);
    let (one, inside_one) = leaf(3, bit::PAGE);
    tables.set(base, 2, two)?;
    tables.map(base + size(2), page)?;
    tables.set(base + size(3), 3, one)?;
    for _ in 0..3 {
        scene.reaches(base + inside_two + 0x5008, LARGE + 0x5008)?;
        scene.reaches(base + size(2), page)?;
        scene.reaches(base + size(3) + inside_one, LARGE)?;
    }
    // A large page gives way to a table, and comes back.
    let small = Tables::new(scene.vm(), 1)?;
    small.map(base, page)?;
    tables.set(base, 2, small.root() | bit::TABLE)?;
    scene.iommu.flush_range(1, base, 9)?;
    scene.reaches(base, page)?;
    scene.faults(base + PAGE)?;
    tables.set(base, 2, two)?;
    scene.iommu.flush_range(1, base, 9)?;
    scene.reaches(base, LARGE)?;
    scene.reaches(base + PAGE, LARGE + PAGE)?;
    scene.reaches(base + size(2), page)
}
