//! Rules about the pvIOMMU: which domains functions are in, and what stray DMA came to.

#![forbid(unsafe_code)]

use crate::host::{HostMark, HostReport};
use crate::report::{
    DMA_FAULT, DmaOwner, DmaReport, DmaResult, DmaTest, EDU_COPIES, GuestReport, MapReport,
};
use crate::scenario::{Domain, Function, Kind, Mode, Run, VFIO_CYCLES};

/// Exits to the VMM in a second of a guest that has nothing to do with devices: marks, console
/// output. One in three seconds was seen.
const EXITS_A_SECOND: u64 = 10;

const NS_PER_S: u64 = 1_000_000_000;

/// Each function behind the pvIOMMU is in a domain of the type that was asked for; no other
/// function has one.
pub(super) fn domains(run: &Run, guest: &GuestReport, failures: &mut Vec<String>) {
    for function in &run.functions {
        let address = function.address();
        let Some(seen) = guest.functions.iter().find(|seen| seen.address == address) else {
            // Its absence is a failure of its own.
            continue;
        };
        let asked = run.domain.filter(|_| function.iommu()).map(Domain::as_str);
        if seen.domain.as_deref() != asked {
            let seen = &seen.domain;
            failures.push(format!(
                "{address}: IOMMU domain is {seen:?}, not {asked:?}"
            ));
        }
    }
}

/// Each test device did what it was told where that is in order; nothing else reached memory.
pub(super) fn dma(run: &Run, guest: &GuestReport, failures: &mut Vec<String>) {
    let translated = run.domain.is_some_and(Domain::translates);
    for function in testdevs(run) {
        let address = function.address();
        for (owner, test, times) in asked(run) {
            let mut fail = |what: String| {
                let (owner, test) = (owner.as_str(), test.as_str());
                failures.push(format!("{address}: dma: {test} by {owner}: {what}"));
            };
            if test.must_fault() && !(translated && function.iommu()) {
                fail("there is no translation that could refuse it".into());
            }
            let mut seen = 0;
            for report in reports(guest, function) {
                if report.owner == owner && report.test == test {
                    seen += 1;
                    one_job(test, &report.result, &mut fail);
                }
            }
            if seen != times {
                fail(format!("{seen} times in the report, not {times}"));
            }
        }
    }
}

/// Each educational device moved what it was told to move, and nothing else.
pub(super) fn edu_dma(run: &Run, guest: &GuestReport, failures: &mut Vec<String>) {
    let translated = run.domain.is_some_and(Domain::translates);
    let edus = run.functions.iter().filter(|f| f.kind() == Kind::Edu);
    for function in edus {
        let address = function.address();
        let mut asked = vec![(DmaTest::Copy, EDU_COPIES)];
        if run.mode.strays() {
            asked.extend([(DmaTest::StrayWrite, 1), (DmaTest::StrayRead, 1)]);
            if translated && function.iommu() {
                asked.extend([(DmaTest::ReadOnly, 1), (DmaTest::Stale, 1)]);
            }
        }
        for (test, times) in asked {
            let mut fail =
                |what: String| failures.push(format!("{address}: dma: {}: {what}", test.as_str()));
            let all = reports(guest, function);
            let of_test: Vec<_> = all.filter(|report| report.test == test).collect();
            let seen = of_test.len();
            if seen != times {
                fail(format!("{seen} times in the report, not {times}"));
            }
            for report in of_test.iter().filter(|report| !report.result.intact) {
                let iova = report.result.iova;
                fail(format!(
                    "memory is not as it must be after DMA at {iova:#x}"
                ));
            }
        }
    }
}

/// Who does which test, and how often, in a run.
fn asked(run: &Run) -> Vec<(DmaOwner, DmaTest, usize)> {
    let all = |owner, times| DmaTest::ALL.map(|test| (owner, test, times)).to_vec();
    match run.mode {
        Mode::Surprise => vec![(DmaOwner::Driver, DmaTest::Copy, run.repeat as usize)],
        Mode::Dma => all(DmaOwner::Driver, 1),
        Mode::VfioUser => {
            let mut asked = all(DmaOwner::User, VFIO_CYCLES);
            asked.push((DmaOwner::Driver, DmaTest::Copy, VFIO_CYCLES + 1));
            asked
        }
        _ => Vec::new(),
    }
}

fn one_job(test: DmaTest, result: &DmaResult, fail: &mut impl FnMut(String)) {
    let DmaResult {
        error,
        moved,
        fault,
        iova,
        intact,
    } = *result;
    if !intact {
        fail("memory is not as it must be".into());
    }
    if !test.must_fault() {
        if error != 0 {
            fail(format!("error {error} at {fault:#x}"));
        }
    } else if error != DMA_FAULT || moved != 0 {
        fail(format!("error {error}, {moved} bytes moved"));
    } else if fault != iova {
        fail(format!("fault at {fault:#x}, sent to {iova:#x}"));
    }
}

/// Each benchmark of mappings ran. But for devices of the host, whose tables are watched, a map left
/// the guest for nothing: exits are those of unmaps, one at most for each flush, and a few of
/// everything else that goes on.
pub(super) fn maps(run: &Run, guest: &GuestReport, host: &HostReport, failures: &mut Vec<String>) {
    if run.mode != Mode::MapBenchmark {
        return;
    }
    let measured = run
        .functions
        .iter()
        .filter(|function| matches!(function.kind(), Kind::Testdev | Kind::Edu));
    for function in measured {
        let address = function.address();
        let mut maps = guest.maps.iter().filter(|map| map.address == address);
        if maps.clone().next().is_none() {
            failures.push(format!("{address}: no benchmark of mappings"));
        }
        for map in &mut maps {
            let mut fail = |what: String| {
                failures.push(format!(
                    "{address}: benchmark of {} pages: {what}",
                    map.pages
                ));
            };
            let (Some(begin), Some(end)) = (host.mark(map.begin), host.mark(map.end)) else {
                fail(format!("host lacks mark {} or {}", map.begin, map.end));
                continue;
            };
            let (exits, flushes) = between(begin, end);
            // Most of the time goes into filling the pages, maps and unmaps: each of these a flush.
            let strict = run.domain == Some(Domain::Strict) && function.iommu();
            let pair_ns = map.map_ns + map.unmap_ns;
            let busy_ns = flushes.saturating_mul(pair_ns);
            if strict && busy_ns < u64::from(map.seconds) * (NS_PER_S / 10) {
                fail(format!(
                    "{flushes} flushes with {pair_ns} ns for a map and unmap"
                ));
            }
            if function.host_kind() == Kind::Vfio {
                continue;
            }
            let others = exits.saturating_sub(flushes);
            let allowed = u64::from(map.seconds + 1) * EXITS_A_SECOND;
            if others > allowed {
                fail(format!("{exits} exits with {flushes} flushes"));
            }
        }
    }
}

/// One line a benchmark of mappings.
pub(super) fn notes(guest: &GuestReport, host: &HostReport) -> Vec<String> {
    let note = |map: &MapReport| {
        let (begin, end) = (host.mark(map.begin)?, host.mark(map.end)?);
        let (exits, flushes) = between(begin, end);
        let host_maps = end.host_maps.saturating_sub(begin.host_maps);
        let host_unmaps = end.host_unmaps.saturating_sub(begin.host_unmaps);
        let calls = match host_maps + host_unmaps {
            0 => String::new(),
            _ => format!(", {host_maps} host maps, {host_unmaps} host unmaps"),
        };
        let micros = |ns: u64| ns as f64 / 1000.0;
        let (map_us, unmap_us) = (micros(map.map_ns), micros(map.unmap_ns));
        Some(format!(
            "{:>3} pages: map {map_us:.1} us, unmap {unmap_us:.1} us; in {} s {flushes} flushes, \
             {exits} exits{calls}",
            map.pages, map.seconds
        ))
    };
    guest.maps.iter().filter_map(note).collect()
}

/// Exits and flushes from one mark to a later one.
fn between(begin: &HostMark, end: &HostMark) -> (u64, u64) {
    (
        end.exits.saturating_sub(begin.exits),
        end.flushes.saturating_sub(begin.flushes),
    )
}

/// The host counted the intended faults of test devices and no other.
pub(super) fn faults(
    run: &Run,
    guest: &GuestReport,
    host: &HostReport,
    failures: &mut Vec<String>,
) {
    // What the IOMMU of L1 refuses, the VMM does not hear of.
    let own = run.functions.iter().filter(|f| f.host_kind() != Kind::Vfio);
    for function in own {
        let faulted = |report: &&DmaReport| report.result.error == DMA_FAULT;
        let intended = reports(guest, function).filter(faulted).count() as u64;
        let (bus, number) = (function.bus(), function.number());
        let mut all = host.functions.iter();
        let seen = all.find(|seen| seen.bus == bus && seen.function == number);
        // A function that the host does not know is a failure of its own.
        let seen = seen.map_or(intended, |seen| seen.dma.faults);
        if seen != intended {
            let address = function.address();
            failures.push(format!(
                "{address}: the host counted {seen} DMA faults, not {intended}"
            ));
        }
    }
}

fn testdevs(run: &Run) -> impl Iterator<Item = &Function> {
    run.functions
        .iter()
        .filter(|function| function.kind() == Kind::Testdev)
}

fn reports<'a>(guest: &'a GuestReport, function: &Function) -> impl Iterator<Item = &'a DmaReport> {
    let address = function.address();
    guest
        .dma
        .iter()
        .filter(move |report| report.address == address)
}
