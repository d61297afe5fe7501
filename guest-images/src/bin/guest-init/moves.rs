//! Moves of an interrupt between CPUs by `/proc/irq/N/smp_affinity_list`.

use crate::system::{read_text, write_text};
use anyhow::{Context, Result};
use guest_images::report::{MoveReport, VectorCounts};
use std::time::{Duration, Instant};

/// Requests after a move within which the new CPU must count an interrupt.
const REQUESTS: u32 = 100;
/// How long to look for the interrupt of a request.
const SEEN_LIMIT: Duration = Duration::from_secs(5);
/// A request may be answered a bit before its interrupt is counted.
const PAUSE: Duration = Duration::from_millis(2);
/// Rounds over all CPUs.
const ROUNDS: usize = 3;

/// Something whose interrupt can be moved.
pub(crate) trait Movable {
    /// The vector's counts.
    fn vector(&self) -> Result<VectorCounts>;

    /// Comes before each move.
    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }

    /// Makes one request, which ends in an interrupt of the vector.
    fn request(&mut self) -> Result<()>;
}

/// Moves the interrupt over `cpus`, making requests until each has counted one. Gives the number
/// of requests.
pub(crate) fn over(
    what: &mut impl Movable,
    cpus: &[u32],
    moves: &mut Vec<MoveReport>,
) -> Result<u64> {
    let mut requests = 0;
    for &cpu in cpus.iter().cycle().take(cpus.len() * ROUNDS) {
        let report = to(what, cpu)?;
        requests += u64::from(report.requests);
        moves.push(report);
    }
    Ok(requests)
}

/// Moves the interrupt to one CPU and makes requests until that CPU has counted one.
pub(crate) fn to(what: &mut impl Movable, cpu: u32) -> Result<MoveReport> {
    what.prepare()?;
    let vector = what.vector()?;
    let on_cpu = |vector: &VectorCounts| vector.per_cpu.get(&cpu).copied().unwrap_or(0);
    let before = on_cpu(&vector);
    set(vector.irq, cpu)?;
    let start = Instant::now();
    let mut requests = 0;
    let mut now = before;
    while now == before && requests < REQUESTS && start.elapsed() < SEEN_LIMIT {
        what.request()
            .with_context(|| format!("request {requests} after the move to CPU {cpu}"))?;
        requests += 1;
        std::thread::sleep(PAUSE);
        now = on_cpu(&what.vector()?);
    }
    let effective = read_text(format!("/proc/irq/{}/effective_affinity_list", vector.irq)).ok();
    Ok(MoveReport {
        cpu,
        effective: effective.and_then(|text| text.parse().ok()),
        requests,
        on_new_cpu: now - before,
    })
}

/// Asks for an interrupt to go to one CPU.
pub(crate) fn set(irq: u32, cpu: u32) -> Result<()> {
    write_text(
        format!("/proc/irq/{irq}/smp_affinity_list"),
        &cpu.to_string(),
    )
}
