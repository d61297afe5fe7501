//! The kernel's own benchmark of DMA mappings (`kernel/dma/map_benchmark.c`) on a test device or an
//! educational one.

use crate::ioctl::{self, MapBenchmark};
use crate::marks::Marker;
use crate::pci::{self, Found};
use crate::system::{self, step};
use crate::vfio::bind;
use anyhow::{Context, Result};
use guest_images::report::MapReport;
use guest_images::scenario::{Expected, Kind};
use rustix::mount::MountFlags;
use std::fs::OpenOptions;
use std::path::Path;
use std::time::Duration;

const DEBUGFS: &str = "/sys/kernel/debug";
const NAME: &str = "dma_map_benchmark";
/// Pages of a mapping, one benchmark each.
const PAGES: [u32; 3] = [1, 16, 512];
/// Length of one benchmark.
const SECONDS: u32 = 3;
const PROBE_LIMIT: Duration = Duration::from_secs(30);

/// Runs the benchmark with mappings of several sizes, between two marks each. The device is taken
/// from its driver for the time.
pub(crate) fn run(device: &Found, marker: &mut Marker) -> Result<Vec<MapReport>> {
    system::mount_at("debugfs", "debugfs", DEBUGFS, MountFlags::empty(), None)?;
    bind(device.address, NAME)?;
    let reports = PAGES.into_iter().map(|pages| one(device, marker, pages));
    let reports = reports.collect::<Result<_>>()?;
    if device.kind != Kind::Testdev {
        // No kernel has a driver for it.
        return Ok(reports);
    }
    bind(device.address, "vpci-testdev")?;
    let expected = Expected {
        address: device.address,
        kind: device.kind,
    };
    pci::wait_expected(&[expected], PROBE_LIMIT)?;
    Ok(reports)
}

fn one(device: &Found, marker: &mut Marker, pages: u32) -> Result<MapReport> {
    let mut benchmark = MapBenchmark {
        map_100ns: 0,
        map_deviation: 0,
        unmap_100ns: 0,
        unmap_deviation: 0,
        threads: 1,
        seconds: SECONDS,
        node: -1,
        bits: 64,
        direction: 0,
        hold_ns: 0,
        pages,
        mode: 0,
        reserved: [0; 75],
    };
    let path = Path::new(DEBUGFS).join(NAME);
    let file = OpenOptions::new().read(true).write(true).open(&path);
    let file = file.with_context(|| path.display().to_string())?;
    step(format!(
        "map benchmark of {}, {pages} pages",
        device.address
    ));
    let begin = marker.mark(device)?.id();
    ioctl::run_benchmark(&file, &mut benchmark).context(NAME)?;
    let end = marker.mark(device)?.id();
    let MapBenchmark {
        map_100ns,
        unmap_100ns,
        ..
    } = benchmark;
    step(format!(
        "{pages} pages: map {} ns, unmap {} ns",
        map_100ns * 100,
        unmap_100ns * 100
    ));
    Ok(MapReport {
        address: device.address,
        pages,
        seconds: SECONDS,
        map_ns: map_100ns * 100,
        unmap_ns: unmap_100ns * 100,
        begin,
        end,
    })
}
