//! One capacity change of a disk, asked for and checked.

use crate::bounded::bounded;
use crate::disk::{Disk, Latency};
use crate::interrupts;
use crate::system::{ask, wait_for};
use anyhow::{Context, Result};
use guest_images::report::GrowReport;
use std::time::{Duration, Instant};

/// Limit from the request to the new size.
const LIMIT: Duration = Duration::from_secs(60);

/// Asks for growth and waits for the new size and the interrupt that announces it.
pub(crate) fn grow(disk: &Disk) -> Result<GrowReport> {
    let before = disk.size()?;
    let config_count = || -> Result<u64> {
        let vectors = interrupts::vectors(&disk.function)?;
        let config = vectors.iter().find(|vector| vector.index == 0);
        Ok(config.map_or(0, |vector| vector.total()))
    };
    let count = config_count()?;
    let start = Instant::now();
    ask(&format!("grow {}", disk.address()));
    let what = format!("{}: new size", disk.name);
    let after = wait_for(&what, LIMIT, || {
        let size = disk.size()?;
        Ok((size != before).then_some(size))
    })?;
    let millis = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let what = format!("{}: configuration interrupt", disk.name);
    wait_for(&what, LIMIT, || Ok((config_count()? > count).then_some(())))?;
    Ok(GrowReport {
        address: disk.address(),
        before,
        after,
        verified: 0,
        millis,
    })
}

/// Writes the new end of the disk and reads it back.
pub(crate) fn use_new_end(disk: &Disk, generation: u64, report: &mut GrowReport) -> Result<()> {
    let range = report.before..report.after;
    let disk = disk.clone();
    let what = format!("data check of the new end of {}", disk.name);
    report.verified = bounded(&what, LIMIT, move || {
        disk.write(generation, range.clone())?;
        Ok(disk.verify(generation, range, &mut Latency::default())?.0)
    })
    .context(what)?;
    Ok(())
}
