//! The rules about the pvIOMMU.

use super::*;

#[test]
fn functions_behind_the_pviommu_must_be_in_the_domain_asked_for() {
    let full = Mode::Full;
    breaks(full, "domain is Some(\"DMA-FQ\")", |c| {
        c.guest.functions[2].domain = Some("DMA-FQ".into())
    });
    breaks(full, "domain is None", |c| {
        c.guest.functions[2].domain = None
    });
    breaks(full, "0042:00:00.0: IOMMU domain", |c| {
        c.guest.functions[0].domain = Some("DMA".into())
    });
    // A kernel without a driver has no domains, and must not show any.
    breaks(full, "not None", |c| c.run.domain = None);
}

#[test]
fn stray_dma_must_fault_and_harm_nothing() {
    let mode = Mode::Dma;
    breaks(mode, "copy by driver: error 2", |c| {
        c.guest.dma[0].result.error = 2;
        c.host.functions[2].dma.faults += 1;
    });
    breaks(mode, "copy by driver: memory", |c| {
        c.guest.dma[0].result.intact = false
    });
    breaks(mode, "stale by driver: memory", |c| {
        c.guest.dma[4].result.intact = false
    });
    breaks(mode, "read-only by driver: error 0", |c| {
        c.guest.dma[3].result.error = 0;
        c.host.functions[2].dma.faults -= 1;
    });
    breaks(mode, "stray-write by driver: error 2, 8 bytes", |c| {
        c.guest.dma[1].result.moved = 8
    });
    breaks(mode, "stray-read by driver: fault at 0x0", |c| {
        c.guest.dma[2].result.fault = 0
    });
    breaks(mode, "0044:00:00.0: vector 0 is not in use", |c| {
        drop(c.guest.vectors.pop())
    });
    breaks(mode, "stray-write by driver: 0 times", |c| {
        c.guest.dma.remove(1);
        c.host.functions[2].dma.faults -= 1;
    });
}

#[test]
fn stray_dma_proves_nothing_without_a_translation() {
    let identity = Some(Domain::Identity);
    breaks(Mode::Dma, "no translation", |c| {
        c.run.domain = identity;
        for function in [1, 2] {
            c.guest.functions[function].domain = Some("identity".into());
        }
    });
}

#[test]
fn the_host_must_count_the_intended_faults_and_no_other() {
    breaks(Mode::Dma, "counted 5 DMA faults, not 4", |c| {
        c.host.functions[2].dma.faults = 5
    });
    breaks(
        Mode::Full,
        "1234:00:00.0: the host counted 1 DMA faults, not 0",
        |c| c.host.functions[0].dma.faults = 1,
    );
}

#[test]
fn a_device_must_come_back_from_user_space_each_time() {
    let mode = Mode::VfioUser;
    breaks(mode, "copy by driver: 2 times", |c| {
        c.guest.dma.remove(0);
    });
    breaks(mode, "copy by user: memory", |c| {
        c.guest.dma[3].result.intact = false
    });
    breaks(mode, "stale by user: 1 times", |c| {
        c.guest.dma.pop();
        c.host.functions[2].dma.faults -= 1;
    });
}

#[test]
fn a_map_must_not_exit() {
    let mode = Mode::MapBenchmark;
    breaks(mode, "no benchmark", |c| c.guest.maps.clear());
    breaks(mode, "10031 exits with 10000 flushes", |c| {
        c.host.marks[1].exits += 21
    });
    // As many as another phase has, between marks that bear the same numbers.
    breaks(mode, "64 flushes with 90300 ns", |c| {
        let mark = &mut c.host.marks[1];
        (mark.flushes, mark.exits) = (10_064, 10_075);
    });
    breaks(mode, "host lacks mark", |c| c.guest.maps[0].end = 99);
}

#[test]
fn a_benchmark_gets_a_line() {
    let case = case(Mode::MapBenchmark);
    let lines = notes(&Evidence {
        run: &case.run,
        vmm: None,
        guest: Ok(case.guest),
        host: Ok(case.host),
        disks: case.disks,
        counted: vec![],
        allow: &AllowList::default(),
    });
    assert_eq!(
        lines,
        ["  1 pages: map 0.3 us, unmap 90.0 us; in 1 s 10000 flushes, 10010 exits"]
    );
}
