//! Limits: reached, refused at, and free again.
#![forbid(unsafe_code)]

use vm_vpci::pviommu::IommuConfig;

use super::{IOVA, Mapped, Scene, behind, bus, setup, with};
use crate::check::{Check, Context, Verdict, equal, holds};
use crate::host::{BusSetup, FunctionSetup, Setup};
use crate::model::kernel::{Kernel, status};
use crate::model::pviommu::PvIommu;
use crate::model::vm::PAGE;
use crate::model::vmbus::VmBus;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "pviommu.limit.domains",
        "The limit on domains is exact, refuses with its status, and a DELETE makes room.",
        &["IO-4-12", "IO-7-05", "IO-4-14"],
        domains,
    ),
    Check::new(
        "pviommu.limit.default-domains",
        "Unless configured otherwise there may be 4096 domains, with any numbers.",
        &["IO-4-12", "IO-7-05", "IO-2-08"],
        default_domains,
    ),
    Check::new(
        "pviommu.limit.functions",
        "The limit on functions counts all of them; a bus that meets it is refused whole.",
        &["IO-7-05"],
        functions,
    ),
    Check::new(
        "pviommu.limit.cache",
        "More pages than the cache holds are all reached, and all forgotten by a flush.",
        &["IO-7-05", "IO-6-01"],
        cache,
    ),
];

fn domains(context: &Context) -> Verdict {
    let scene = Scene::of(
        context,
        &with(IommuConfig {
            max_domains: 5,
            ..IommuConfig::default()
        }),
    )?;
    let full = status::INSUFFICIENT_DEVICE_DOMAINS;
    let mapped = Mapped::of(scene)?;
    let (scene, iommu) = (&mapped.scene, &mapped.scene.iommu);
    for number in 2..6 {
        equal("status of CREATE", iommu.create(number)?, 0)?;
    }
    for _ in 0..3 {
        equal("CREATE of one too many", iommu.create(6)?, full)?;
        scene.exists(6, false)?;
    }
    mapped.is_intact()?;
    for number in [3, 5] {
        equal("status of DELETE", iommu.delete(number)?, 0)?;
        equal("CREATE in its place", iommu.create(number + 10)?, 0)?;
        equal("CREATE of one too many", iommu.create(6)?, full)?;
    }
    mapped.is_intact()?;
    if let Some(report) = scene.vm().host().iommu() {
        equal("refusals counted", report.counters.domains_refused, 5)?;
    }
    Ok(())
}

fn default_domains(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let number = |index: u32| 1 + index.wrapping_mul(0x9e37_79b1) % (u32::MAX - 2);
    for index in 0..4096 {
        let made = scene.iommu.create(number(index))?;
        equal(format!("CREATE number {index}"), made, 0)?;
    }
    let full = scene.iommu.create(number(4096))?;
    equal("status", full, status::INSUFFICIENT_DEVICE_DOMAINS)?;
    for index in (0..4096).rev() {
        let deleted = scene.iommu.delete(number(index))?;
        equal(format!("DELETE number {index}"), deleted, 0)?;
    }
    let mapped = Mapped::of(scene)?;
    mapped.is_intact()
}

fn functions(context: &Context) -> Verdict {
    let vm = context.machine(&Setup {
        buses: vec![bus(1), BusSetup::testdev(2)],
        ..with(IommuConfig {
            max_functions: 4,
            ..IommuConfig::default()
        })
    })?;
    let vmbus = VmBus::connect(&Kernel::boot(&vm)?)?;
    equal("number of offers", vmbus.offers()?.len(), 2)?;
    let three = BusSetup {
        instance: BusSetup::instance(3),
        functions: vec![behind(0), behind(1), FunctionSetup::testdev(2)],
    };
    let iommu = PvIommu::new(vmbus.kernel());
    for _ in 0..3 {
        holds("a bus of three is refused", vm.plug(&three).is_err())?;
        vmbus.expect_silence()?;
        for function in 0..3 {
            let got = iommu.is_behind(0x0003_ab78 | function)?;
            let want = Err(status::INVALID_DEVICE_ID);
            equal("property of a function of it", got, want)?;
        }
    }
    // Two are not too many.
    let two = BusSetup {
        functions: three.functions[..2].to_vec(),
        ..three
    };
    vm.plug(&two)?;
    vmbus.expect_offer()?;
    equal("property", iommu.is_behind(0x0003_ab79)?, Ok(1))
}

fn cache(context: &Context) -> Verdict {
    let scene = Scene::of(
        context,
        &Setup {
            iommu: Some(IommuConfig {
                iotlb_entries: 16,
                ..IommuConfig::default()
            }),
            ..setup()
        },
    )?;
    let tables = scene.paged(1, 4)?;
    let count = 100;
    let pages = scene.vm().pages(count)?;
    let places = (0..count).map(|index| (IOVA + index * 33 * PAGE, pages + index * PAGE));
    for (iova, page) in places.clone() {
        tables.map(iova, page)?;
    }
    for _ in 0..2 {
        for (iova, page) in places.clone() {
            scene.reaches(iova, page)?;
        }
    }
    for (iova, _) in places.clone() {
        tables.unmap(iova)?;
    }
    scene.iommu.flush_range(1, IOVA, 52)?;
    for (iova, _) in places {
        scene.faults(iova)?;
    }
    Ok(())
}
