//! Calls while the device is at work: what a call covers is over when it returns.
//!
//! On `sim` a check puts the call between two blocks of a job; on real beds the job runs by itself
//! at the same time.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{IOVA, Scene, behind, setup};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::host::{BusSetup, Setup};
use crate::model::kernel::msr;
use crate::model::pviommu::{Tables, bit, configure};
use crate::model::testdev::{Job, NO_VECTOR, register};
use crate::model::vm::{PAGE, Vm};
use crate::model::vpci::Bus;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "pviommu.race.flush-list",
        "When FLUSH_LIST returns, DMA under way through unmapped pages is over.",
        &["IO-6-01", "IO-3-04"],
        |context| {
            drained(context, |scene, tables| {
                unmap(tables)?;
                scene.iommu.on(1).flush_range(1, IOVA, 8)
            })
        },
    ),
    Check::new(
        "pviommu.race.flush",
        "When FLUSH returns, DMA under way through unmapped pages is over.",
        &["IO-6-01", "IO-3-04"],
        |context| {
            drained(context, |scene, tables| {
                unmap(tables)?;
                equal("status of FLUSH", scene.iommu.on(1).flush(1)?, 0)
            })
        },
    ),
    Check::new(
        "pviommu.race.flush-root",
        "The same when the branch is cut at the root.",
        &["IO-6-01"],
        |context| {
            drained(context, |scene, tables| {
                tables.set(IOVA, 4, 0)?;
                scene
                    .iommu
                    .on(1)
                    .flush_range(1, IOVA & !((1 << 39) - 1), 27)
            })
        },
    ),
    Check::new(
        "pviommu.race.attach",
        "When ATTACH returns, DMA through the former domain is over.",
        &["IO-6-02", "IO-3-03"],
        |context| {
            drained(context, |scene, _| {
                scene.domain(2, 4)?;
                equal("ATTACH", scene.iommu.on(1).attach(2, scene.id)?, 0)
            })
        },
    ),
    Check::new(
        "pviommu.race.detach",
        "When DETACH returns, DMA through the domain is over.",
        &["IO-6-02"],
        |context| {
            drained(context, |scene, _| {
                equal("DETACH", scene.iommu.on(1).detach(scene.id)?, 0)
            })
        },
    ),
    Check::new(
        "pviommu.race.configure",
        "When CONFIGURE returns, DMA through the former tables is over.",
        &["IO-6-02", "IO-3-06"],
        |context| {
            drained(context, |scene, _| {
                let blocked = configure::ENABLED | configure::BLOCKED;
                let configured = scene.iommu.on(1).configure(1, blocked, 0)?;
                equal("CONFIGURE", configured, 0)
            })
        },
    ),
    Check::new(
        "pviommu.race.removal",
        "When the device is taken away its DMA is over.",
        &["IO-6-02", "IO-1-07"],
        |context| drained(context, |scene, _| scene.vm().remove(BusSetup::instance(1))),
    ),
    Check::new(
        "pviommu.race.kexec",
        "When GUEST_OS_ID was cleared, the old kernel's DMA is over.",
        &["IO-7-03", "IO-6-02"],
        |context| {
            drained(context, |scene, _| {
                Ok(scene.vm().wrmsr(1, msr::GUEST_OS_ID, 0)?)
            })
        },
    ),
    Check::new(
        "pviommu.race.move-is-atomic",
        "A device that is moved while it works reaches one domain or the other, never a third.",
        &["IO-3-03", "IO-6-02"],
        |context| {
            switched(context, |scene, number, _| {
                equal("ATTACH", scene.iommu.on(1).attach(number, scene.id)?, 0)
            })
        },
    ),
    Check::new(
        "pviommu.race.configure-is-atomic",
        "The same for a CONFIGURE of its domain.",
        &["IO-3-06", "IO-6-02"],
        |context| {
            switched(context, |scene, _, tables| {
                let configured = scene.iommu.on(1).translate(1, tables)?;
                equal("CONFIGURE", configured, 0)
            })
        },
    ),
    Check::new(
        "pviommu.race.entries-change",
        "The guest's stores to entries in use are atomic: the old page or the new, nothing else.",
        &["IO-5-07"],
        entries_change,
    ),
    Check::new(
        "pviommu.race.entry-stays-cleared",
        "The host never brings an entry back that the guest has cleared.",
        &["IO-5-03", "IO-5-07"],
        stays_cleared,
    ),
    Check::new(
        "pviommu.race.two-vps",
        "Two VPs make, use and delete domains for two devices at the same time.",
        &["IO-2-01", "IO-6-01"],
        two_vps,
    ),
];

/// RAM of a machine whose pages are many.
const RAM: Range<u64> = 0..32 << 20;
/// Pages of a job.
const PAGES: u64 = 256;

/// Starts a fill of all pages at [`IOVA`].
fn begin(scene: &Scene) -> Verdict {
    scene.device.store(register::PATTERN, 8, u64::MAX)?;
    let job = Job {
        command: 2,
        source: 0,
        destination: IOVA,
        length: (PAGES * PAGE) as u32,
        vector: NO_VECTOR,
    };
    Ok(scene.device.begin(&job)?)
}

fn map(tables: &Tables, pages: u64) -> Verdict {
    for index in 0..PAGES {
        tables.map(IOVA + index * PAGE, pages + index * PAGE)?;
    }
    Ok(())
}

fn unmap(tables: &Tables) -> Verdict {
    for index in 0..PAGES {
        tables.unmap(IOVA + index * PAGE)?;
    }
    Ok(())
}

/// Demands that all bytes of the pages are `byte`.
fn untouched(vm: &Vm, pages: u64, byte: u8) -> Verdict {
    let bytes = vm.read(pages, (PAGES * PAGE) as usize)?;
    let spoilt = bytes.iter().position(|found| *found != byte);
    equal("first byte that was stored since", spoilt, None)
}

/// `end` comes while the device fills pages in domain 1. Nothing is stored afterwards.
fn drained(context: &Context, end: impl Fn(&Scene, &Tables) -> Verdict) -> Verdict {
    for steps in [0, 1, 3, 20] {
        let scene = Scene::of(
            context,
            &Setup {
                ram: Vec::from([RAM]),
                ..setup()
            },
        )?;
        let vm = scene.vm();
        let tables = scene.paged(1, 4)?;
        let pages = vm.pages(PAGES)?;
        map(&tables, pages)?;
        // Once before, so that every translation is known to the host.
        begin(&scene)?;
        vm.settle();
        equal("STATUS", scene.device.load(register::STATUS, 4)?, 2)?;
        begin(&scene)?;
        for _ in 0..steps {
            vm.step();
        }
        end(&scene, &tables)?;
        vm.ram().fill(pages, PAGES * PAGE, 0x11)?;
        vm.settle();
        let late = untouched(vm, pages, 0x11);
        late.map_err(|failure| failure.during(format!("after {steps} steps")))?;
    }
    Ok(())
}

/// `to` switches a device at work between two tables.
fn switched(context: &Context, to: impl Fn(&Scene, u32, &Tables) -> Verdict) -> Verdict {
    let scene = Scene::of(
        context,
        &Setup {
            ram: Vec::from([RAM]),
            ..setup()
        },
    )?;
    let vm = scene.vm();
    let tables = [scene.domain(1, 4)?, scene.domain(2, 4)?];
    let pages = [vm.pages(PAGES)?, vm.pages(PAGES)?];
    for (tables, pages) in tables.iter().zip(pages) {
        map(tables, pages)?;
    }
    equal("ATTACH", scene.iommu.attach(1, scene.id)?, 0)?;
    let mut now = 0;
    for round in 0..30 {
        begin(&scene)?;
        for _ in 0..round % 7 {
            vm.step();
            let next = 1 - now;
            to(&scene, next as u32 + 1, &tables[next])?;
            // Nothing is stored to the former pages any more.
            vm.ram().fill(pages[now], PAGES * PAGE, 0x11)?;
            vm.step();
            untouched(vm, pages[now], 0x11)?;
            now = next;
        }
        vm.settle();
        // No block met a third domain, in which the address is none.
        equal("STATUS", scene.device.load(register::STATUS, 4)?, 2)?;
        let moved = scene.device.load(register::MOVED, 8)?;
        equal("bytes moved", moved, PAGES * PAGE)?;
    }
    Ok(())
}

/// Runs `job` over and over on a thread of its own while `f` runs.
fn meanwhile<T>(
    job: impl Fn() -> Verdict + Sync,
    f: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let worker = scope.spawn(|| -> Verdict {
            while !over.load(Ordering::Relaxed) {
                job()?;
            }
            Ok(())
        });
        let result = f();
        over.store(true, Ordering::Relaxed);
        let joined = worker.join();
        joined.map_err(|_| Failure::Host("a thread panicked".into()))??;
        result
    })
}

fn entries_change(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let (vm, tables) = (scene.vm(), scene.paged(1, 4)?);
    // Guard pages around the two that are used.
    let pages = vm.pages(5)?;
    let (one, two) = (pages + PAGE, pages + 3 * PAGE);
    tables.map(IOVA, one)?;
    let fill = || -> Verdict { holds("a fill succeeds", scene.fill(IOVA, PAGE as u32, u64::MAX)?) };
    meanwhile(fill, || {
        for round in 0..2000 {
            let page = if round % 2 == 0 { two } else { one };
            tables.map(IOVA, page)?;
            if round % 16 == 0 {
                scene.iommu.on(1).flush_range(1, IOVA, 0)?;
            }
        }
        Ok(())
    })?;
    for guard in [pages, pages + 2 * PAGE, pages + 4 * PAGE] {
        let bytes = vm.read(guard, PAGE as usize)?;
        holds(
            "pages beside are untouched",
            bytes.iter().all(|byte| *byte == 0),
        )?;
    }
    Ok(())
}

fn stays_cleared(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let tables = scene.paged(1, 4)?;
    let page = scene.vm().pages(1)?;
    // Makes the tables on the way.
    tables.map(IOVA, page)?;
    let clean = page | bit::P | bit::RW | bit::US;
    let access = || -> Verdict {
        // It may fault, or not.
        scene.write(IOVA, 1).map(drop)
    };
    meanwhile(access, || {
        for _ in 0..2000 {
            tables.set(IOVA, 1, clean)?;
            thread::yield_now();
            tables.set(IOVA, 1, 0)?;
            scene.iommu.on(1).flush_range(1, IOVA, 0)?;
            equal("the entry", tables.entry(IOVA, 1)?, 0)?;
        }
        Ok(())
    })
}

fn two_vps(context: &Context) -> Verdict {
    let vm = context.machine(&Setup {
        vps: 3,
        buses: vec![BusSetup {
            instance: BusSetup::instance(1),
            functions: vec![behind(0), behind(1)],
        }],
        ..setup()
    })?;
    let bus = Bus::bring_up(&vm)?;
    let scenes = [Scene::on(&bus, 0)?, Scene::on(&bus, 1)?];
    let both: Verdict = thread::scope(|scope| {
        let threads: Vec<_> = (1..)
            .zip(&scenes)
            .map(|(vp, scene)| scope.spawn(move || busy(scene, vp)))
            .collect();
        for thread in threads {
            let joined = thread.join();
            joined.map_err(|_| Failure::Host("a thread panicked".into()))??;
        }
        Ok(())
    });
    both?;
    for scene in &scenes {
        scene.is_default()?;
    }
    Ok(())
}

/// The life of a driver on one VP.
fn busy(scene: &Scene, vp: u32) -> Verdict {
    let iommu = scene.iommu.on(vp);
    let vm = scene.vm();
    let pages = [vm.pages(1)?, vm.pages(1)?];
    let tables = Tables::new(vm, 4)?;
    for round in 0..40 {
        let number = vp + 2 * (round % 5);
        equal("status of CREATE", iommu.create(number)?, 0)?;
        equal("CONFIGURE", iommu.translate(number, &tables)?, 0)?;
        equal("status of ATTACH", iommu.attach(number, scene.id)?, 0)?;
        for page in pages {
            tables.map(IOVA, page)?;
            scene.reaches(IOVA, page)?;
            tables.unmap(IOVA)?;
            iommu.flush_range(number, IOVA, 0)?;
            scene.faults(IOVA)?;
        }
        equal("status of DETACH", iommu.detach(scene.id)?, 0)?;
        equal("status of DELETE", iommu.delete(number)?, 0)?;
    }
    Ok(())
}
