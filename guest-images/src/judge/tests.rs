//! Each rule is broken once, on evidence that passes otherwise.

mod iommu;
mod passthrough;

use super::*;
use crate::allow::AllowList;
use crate::host::{HostDma, HostFunction, HostMark, HostVector};
use crate::report::*;
use crate::scenario::{Domain, Function, Kind};
use std::collections::BTreeMap;

const BLK_BUS: &str = "11111111-1234-4000-8000-000000000001";
const RNG_BUS: &str = "11111111-0042-4000-8000-000000000002";
const DEV_BUS: &str = "11111111-0044-4000-8000-000000000003";
const BLK: &str = "1234:00:00.0";
const RNG: &str = "0042:00:00.0";
const DEV: &str = "0044:00:00.0";
const SIZE: u64 = 64 << 20;
const GROWTH: u64 = 8 << 20;

fn at(text: &str) -> PciAddress {
    text.parse().unwrap()
}

fn run(mode: Mode) -> Run {
    Run {
        name: "2-cpus".into(),
        kernel: "k".into(),
        initrd: "i".into(),
        cmdline: String::new(),
        cpus: 2,
        memory_mib: 512,
        functions: vec![
            Function::Blk {
                bus: BLK_BUS.parse().unwrap(),
                function: 0,
                size_mib: 64,
                queues: 2,
                readonly: false,
                grow_mib: 8,
                iommu: true,
            },
            Function::Rng {
                bus: RNG_BUS.parse().unwrap(),
                function: 0,
                iommu: false,
            },
            Function::Testdev {
                bus: DEV_BUS.parse().unwrap(),
                function: 0,
                iommu: true,
            },
        ],
        substitutes: match mode {
            // A disk in place of the entropy source.
            Mode::ReuseId => vec![Function::Blk {
                bus: RNG_BUS.parse().unwrap(),
                function: 0,
                size_mib: 64,
                queues: 2,
                readonly: false,
                grow_mib: 0,
                iommu: false,
            }],
            _ => Vec::new(),
        },
        mode,
        repeat: match mode {
            Mode::Kexec => 1,
            Mode::Reboot => 2,
            mode if mode.cycles_buses() => 2,
            _ => 0,
        },
        snapshots: 0,
        hyperv: None,
        domain: Some(Domain::Strict),
        refusal: None,
        time_limit_s: 100,
    }
}

fn counts(address: &str, index: u32, per_cpu: &[(u32, u64)]) -> VectorCounts {
    VectorCounts {
        address: at(address),
        index,
        name: format!("vector{index}"),
        irq: 24 + index,
        per_cpu: per_cpu.iter().copied().collect(),
    }
}

fn function(address: &str, kind: Kind, driver: &str, vectors: u32, bus: &str) -> PciFunctionReport {
    PciFunctionReport {
        address: at(address),
        vendor: 0x1af4,
        device_id: 0x1042,
        class: 0x01_00_00,
        kind,
        driver: Some("virtio-pci".into()),
        virtio_driver: Some(driver.into()),
        msix_vectors: vectors,
        vmbus_device: Some(bus.into()),
        domain: None,
    }
}

/// What good evidence has of each test.
fn dma(test: DmaTest) -> DmaReport {
    let fault = |iova| DmaResult {
        error: DMA_FAULT,
        moved: 0,
        fault: iova,
        iova,
        intact: true,
    };
    let result = match test {
        DmaTest::Copy => DmaResult {
            error: 0,
            moved: 4096,
            fault: 0,
            iova: 0xffff_0000,
            intact: true,
        },
        DmaTest::StrayWrite | DmaTest::StrayRead => fault(0x123_4000),
        DmaTest::ReadOnly | DmaTest::Stale => fault(0xffff_1000),
    };
    DmaReport {
        address: at(DEV),
        owner: DmaOwner::Driver,
        test,
        result,
    }
}

fn phase(work: Work, address: &str, cpu: Option<u32>, begin: u8) -> Phase {
    let vectors = match (work, cpu) {
        (Work::Grow, _) => vec![counts(address, 0, &[(0, 1)])],
        (Work::OneOutstanding, Some(1)) => vec![counts(address, 2, &[(1, 16)])],
        (Work::OneOutstanding, _) => vec![counts(address, 1, &[(0, 16)])],
        (Work::Moves, _) => vec![counts(address, 1, &[(0, 8), (1, 8)])],
    };
    Phase {
        name: format!("{work:?} {address} {cpu:?}"),
        work,
        address: at(address),
        cpu,
        begin,
        end: begin + 1,
        requests: if work == Work::Grow { 1 } else { 16 },
        vectors,
    }
}

fn guest(mode: Mode) -> GuestReport {
    GuestReport {
        version: REPORT_VERSION,
        kernel: "7.3.4-amd64".into(),
        mode,
        boot: match mode {
            Mode::Reboot => 3,
            Mode::Kexec => 2,
            _ => 1,
        },
        cpus: 2,
        uptime_s: 20.5,
        functions: vec![
            function(RNG, Kind::Rng, "virtio_rng", 2, RNG_BUS),
            PciFunctionReport {
                domain: Some("DMA".into()),
                ..function(BLK, Kind::Blk, "virtio_blk", 3, BLK_BUS)
            },
            PciFunctionReport {
                driver: Some("vpci-testdev".into()),
                virtio_driver: None,
                domain: Some("DMA".into()),
                ..function(DEV, Kind::Testdev, "", 1, DEV_BUS)
            },
        ],
        disks: vec![DiskReport {
            address: at(BLK),
            name: "vda".into(),
            size: SIZE,
            readonly: false,
            queues: 2,
            initial_ok: SIZE,
            written: SIZE,
            verified: SIZE,
            flushed: true,
            checksum: "0123456789abcdef".into(),
            max_latency_us: 1000,
        }],
        rngs: vec![RngReport {
            address: at(RNG),
            bytes: 1024,
            max_latency_us: 500,
            moves: (0..2)
                .map(|cpu| MoveReport {
                    cpu,
                    effective: Some(cpu),
                    requests: 2,
                    on_new_cpu: 1,
                })
                .collect(),
        }],
        nets: vec![],
        edus: vec![],
        phases: vec![
            phase(Work::OneOutstanding, BLK, Some(0), 1),
            phase(Work::OneOutstanding, BLK, Some(1), 3),
            phase(Work::Moves, RNG, None, 5),
            phase(Work::Grow, BLK, None, 7),
        ],
        loads: vec![LoadReport {
            address: at(BLK),
            threads: 4,
            requests: 1000,
            bad: 0,
            max_latency_us: 9000,
            cpu_cycles: vec![1, 1],
            moves: 4,
        }],
        grows: vec![GrowReport {
            address: at(BLK),
            before: SIZE,
            after: SIZE + GROWTH,
            verified: GROWTH,
            millis: 30,
        }],
        rebinds: (1..=2)
            .flat_map(|cycle| {
                let read = match mode {
                    Mode::ReuseId => SIZE,
                    _ => 0,
                };
                let size = match mode {
                    Mode::EjectFunction => SIZE * 2,
                    _ => SIZE,
                };
                [(BLK_BUS, size), (RNG_BUS, read), (DEV_BUS, 0)].map(|(bus, verified)| {
                    RebindReport {
                        cycle,
                        vmbus_device: bus.into(),
                        gone: true,
                        back: true,
                        millis: 100,
                        verified,
                    }
                })
            })
            .collect(),
        dma: match mode {
            Mode::Dma => DmaTest::ALL.map(dma).into(),
            Mode::Surprise => vec![dma(DmaTest::Copy); 2],
            Mode::VfioUser => {
                let user = |test| DmaReport {
                    owner: DmaOwner::User,
                    ..dma(test)
                };
                let mut all = vec![dma(DmaTest::Copy); 3];
                all.extend(DmaTest::ALL.map(user));
                all.extend(DmaTest::ALL.map(user));
                all
            }
            _ => Vec::new(),
        },
        maps: match mode {
            Mode::MapBenchmark => vec![MapReport {
                address: at(DEV),
                pages: 1,
                seconds: 1,
                map_ns: 300,
                unmap_ns: 90_000,
                begin: 1,
                end: 2,
            }],
            _ => Vec::new(),
        },
        vectors: vec![
            counts(BLK, 0, &[(0, 1)]),
            counts(BLK, 1, &[(0, 100)]),
            counts(BLK, 2, &[(1, 100)]),
            counts(RNG, 1, &[(0, 10), (1, 10)]),
            counts(DEV, 0, &[(0, 6)]),
        ],
        kmsg: KmsgReport {
            records: 500,
            noteworthy: 0,
            lost: 0,
            lines: vec![],
        },
        failures: vec![],
        complete: true,
    }
}

fn host_functions(blk: [u64; 3], rng: [u64; 2]) -> Vec<HostFunction> {
    let vectors = |raised: &[u64]| {
        raised
            .iter()
            .zip(0..)
            .map(|(&raised, index)| HostVector {
                index,
                raised,
                suppressed: 0,
            })
            .collect()
    };
    vec![
        HostFunction {
            bus: BLK_BUS.parse().unwrap(),
            function: 0,
            kind: Kind::Blk,
            logical_id: 1,
            domain_hint: 0x1234,
            vectors: vectors(&blk),
            dma: HostDma::default(),
        },
        HostFunction {
            bus: RNG_BUS.parse().unwrap(),
            function: 0,
            kind: Kind::Rng,
            logical_id: 2,
            domain_hint: 0x42,
            vectors: vectors(&rng),
            dma: HostDma::default(),
        },
        HostFunction {
            bus: DEV_BUS.parse().unwrap(),
            function: 0,
            kind: Kind::Testdev,
            logical_id: 3,
            domain_hint: 0x44,
            vectors: vectors(&[0]),
            dma: HostDma::default(),
        },
    ]
}

fn host(mode: Mode) -> HostReport {
    let counts = [
        ([0, 50, 40], [0, 2]),
        ([0, 66, 40], [0, 2]),
        ([0, 66, 50], [0, 2]),
        ([0, 66, 66], [0, 2]),
        ([0, 66, 66], [0, 4]),
        ([0, 66, 66], [0, 20]),
        ([0, 90, 90], [0, 20]),
        ([1, 90, 90], [0, 20]),
    ];
    HostReport {
        version: 1,
        end: "poweroff".into(),
        resets: if mode == Mode::Reboot { 2 } else { 0 },
        functions: {
            let mut functions = host_functions([1, 100, 100], [0, 20]);
            functions[2].dma.faults = match mode {
                Mode::Dma => 4,
                Mode::VfioUser => 8,
                _ => 0,
            };
            functions
        },
        marks: counts
            .into_iter()
            .zip(1..)
            .map(|((blk, rng), id)| HostMark {
                id,
                functions: host_functions(blk, rng),
                exits: 10_010 * u64::from(id),
                flushes: 10_000 * u64::from(id),
                host_maps: 0,
                host_unmaps: 0,
            })
            .collect(),
        counters: BTreeMap::new(),
    }
}

/// What a test may change.
struct Case {
    run: Run,
    guest: GuestReport,
    host: HostReport,
    disks: Vec<DiskAfter>,
    counted: Vec<Counted>,
}

fn case(mode: Mode) -> Case {
    Case {
        run: run(mode),
        guest: guest(mode),
        host: host(mode),
        disks: vec![DiskAfter {
            address: at(BLK),
            contents: Ok("0123456789abcdef".into()),
        }],
        counted: vec![],
    }
}

fn judge(case: Case) -> Vec<String> {
    let allow = AllowList::parse(
        r#"[{"kernels":"7.*","text":"harmless: *","reason":"a line that a test allows"}]"#,
    )
    .unwrap();
    failures(&Evidence {
        run: &case.run,
        vmm: None,
        guest: Ok(case.guest),
        host: Ok(case.host),
        disks: case.disks,
        counted: case.counted,
        allow: &allow,
    })
}

/// Changes good evidence and expects exactly one kind of failure, with `word` in it.
#[track_caller]
fn breaks(mode: Mode, word: &str, change: impl FnOnce(&mut Case)) {
    breaks_case(case(mode), word, change);
}

#[track_caller]
fn breaks_case(mut case: Case, word: &str, change: impl FnOnce(&mut Case)) {
    change(&mut case);
    let failures = judge(case);
    assert!(!failures.is_empty(), "passed without {word:?}");
    for failure in &failures {
        assert!(failure.contains(word), "{failure:?} instead of {word:?}");
    }
}

#[test]
fn good_evidence_passes_in_every_mode() {
    for mode in [
        Mode::Full,
        Mode::Short,
        Mode::Reboot,
        Mode::Rebind,
        Mode::Dma,
        Mode::VfioUser,
        Mode::MapBenchmark,
        Mode::Eject,
        Mode::EjectFunction,
        Mode::Surprise,
        Mode::HostUnbind,
        Mode::Hotplug,
        Mode::ReuseId,
        Mode::Kexec,
    ] {
        assert_eq!(judge(case(mode)), Vec::<String>::new(), "{mode:?}");
    }
}

#[test]
fn a_missing_report_of_either_side_fails() {
    let case = case(Mode::Full);
    let allow = AllowList::default();
    let mut evidence = Evidence {
        run: &case.run,
        vmm: Some("ended with status 1".into()),
        guest: Err("none was printed".into()),
        host: Err("no such file".into()),
        disks: vec![],
        counted: vec![],
        allow: &allow,
    };
    let lines = failures(&evidence);
    for word in ["vmm: ended", "guest report: none", "host report: no such"] {
        assert!(lines.iter().any(|line| line.contains(word)), "{lines:?}");
    }
    evidence.vmm = None;
    assert_eq!(failures(&evidence).len(), 2);
}

#[test]
fn the_host_must_see_an_orderly_power_off() {
    let full = Mode::Full;
    breaks(full, "version 2", |c| c.host.version = 2);
    breaks(full, "reset-limit", |c| c.host.end = "reset-limit".into());
    breaks(full, "1 resets", |c| c.host.resets = 1);
    breaks(Mode::Reboot, "1 resets", |c| c.host.resets = 1);
    breaks(full, "in domain 1235", |c| {
        c.host.functions[0].domain_hint = 0x1235
    });
    breaks(full, "is rng", |c| c.host.functions[0].kind = Kind::Rng);
    breaks(full, "no function 0", |c| drop(c.host.functions.pop()));
}

#[test]
fn the_guest_must_reach_its_end_as_asked() {
    let full = Mode::Full;
    breaks(full, "version 9", |c| c.guest.version = 9);
    breaks(full, "it broke", |c| {
        c.guest.failures.push("it broke".into())
    });
    breaks(full, "not every step", |c| c.guest.complete = false);
    breaks(full, "no kernel release", |c| c.guest.kernel.clear());
    breaks(full, "ran mode short", |c| c.guest.mode = Mode::Short);
    breaks(full, "1 CPUs online", |c| c.guest.cpus = 1);
    breaks(Mode::Reboot, "boot 2, not 3", |c| c.guest.boot = 2);
}

#[test]
fn functions_must_sit_in_their_domains_with_their_drivers() {
    let full = Mode::Full;
    let moved = |c: &mut Case| {
        c.guest.functions[1].address = at("1235:00:00.0");
        c.guest.functions[1].vmbus_device = None;
    };
    breaks(full, "1234:00:00.0: no such PCI function", moved);
    breaks(full, "is other", |c| {
        c.guest.functions[1].kind = Kind::Other
    });
    breaks(full, "PCI driver", |c| c.guest.functions[1].driver = None);
    breaks(full, "virtio driver", |c| {
        c.guest.functions[0].virtio_driver = None
    });
    breaks(full, "2 MSI-X vectors", |c| {
        c.guest.functions[1].msix_vectors = 2
    });
    breaks(full, "VMBus device", |c| {
        c.guest.functions[1].vmbus_device = Some(RNG_BUS.into())
    });
    breaks(full, "nobody asked", |c| {
        let mut extra = c.guest.functions[0].clone();
        extra.address = at("0043:00:00.0");
        c.guest.functions.push(extra);
    });
}

#[test]
fn disks_must_hold_their_data_on_both_sides() {
    let full = Mode::Full;
    let missing = |c: &mut Case| c.guest.disks.clear();
    breaks(full, "disk: not in the report", missing);
    breaks(full, "512 bytes, not", |c| c.guest.disks[0].size = 512);
    breaks(full, "read-only is true", |c| {
        c.guest.disks[0].readonly = true
    });
    breaks(full, "1 queues in use", |c| c.guest.disks[0].queues = 1);
    breaks(full, "held what was put", |c| {
        c.guest.disks[0].initial_ok -= 512
    });
    breaks(full, "bytes written", |c| c.guest.disks[0].written -= 512);
    breaks(full, "not flushed", |c| c.guest.disks[0].flushed = false);
    breaks(full, "read back right", |c| {
        c.guest.disks[0].verified -= 512
    });
    breaks(full, "took 5000000 us", |c| {
        c.guest.disks[0].max_latency_us = LATENCY_LIMIT_US
    });
    breaks(full, "guest read checksum", |c| {
        c.guest.disks[0].checksum.clear()
    });
    breaks(full, "backing file was not checked", |c| c.disks.clear());
    breaks(full, "wrong at 0x200", |c| {
        c.disks[0].contents = Err("wrong at 0x200".into())
    });
}

#[test]
fn a_read_only_disk_need_not_be_written() {
    let mut case = case(Mode::Short);
    if let Function::Blk { readonly, .. } = &mut case.run.functions[0] {
        *readonly = true;
    }
    let disk = &mut case.guest.disks[0];
    (disk.readonly, disk.written, disk.flushed) = (true, 0, false);
    assert_eq!(judge(case), Vec::<String>::new());
}

#[test]
fn entropy_interrupts_must_follow_every_move() {
    let full = Mode::Full;
    breaks(full, "rng: not in the report", |c| c.guest.rngs.clear());
    breaks(full, "no data", |c| c.guest.rngs[0].bytes = 0);
    breaks(full, "a read took", |c| {
        c.guest.rngs[0].max_latency_us = LATENCY_LIMIT_US
    });
    breaks(full, "never moved to CPU 1", |c| {
        c.guest.rngs[0].moves.pop();
    });
    breaks(full, "move 1: no interrupt", |c| {
        c.guest.rngs[0].moves[1].on_new_cpu = 0
    });
    breaks(full, "move 0: no interrupt", |c| {
        c.guest.rngs[0].moves[0].requests = 0
    });
    breaks(full, "move 1: CPU 1 is", |c| {
        c.guest.rngs[0].moves[1].effective = Some(0)
    });
    breaks(full, "move 1: CPU 1 is None", |c| {
        c.guest.rngs[0].moves[1].effective = None
    });
}

#[test]
fn load_must_lose_nothing_while_interrupts_move() {
    let full = Mode::Full;
    breaks(full, "load: not in the report", |c| c.guest.loads.clear());
    breaks(full, "0 requests", |c| c.guest.loads[0].requests = 0);
    breaks(full, "of 1 threads", |c| c.guest.loads[0].threads = 1);
    breaks(full, "3 requests failed", |c| c.guest.loads[0].bad = 3);
    breaks(full, "a request took", |c| {
        c.guest.loads[0].max_latency_us = LATENCY_LIMIT_US
    });
    breaks(full, "CPU 1 was never offline", |c| {
        c.guest.loads[0].cpu_cycles.clear()
    });
    breaks(full, "no interrupt was moved", |c| {
        c.guest.loads[0].moves = 0
    });
}

#[test]
fn growth_must_arrive_and_be_usable() {
    let full = Mode::Full;
    breaks(full, "growth: not in the report", |c| c.guest.grows.clear());
    breaks(full, "growth: 67108864 to", |c| {
        c.guest.grows[0].after += 512
    });
    breaks(full, "new bytes read back", |c| {
        c.guest.grows[0].verified = 0
    });
    breaks(full, "no counted growth", |c| drop(c.guest.phases.pop()));
}

#[test]
fn rebinds_must_bring_everything_back() {
    let rebind = Mode::Rebind;
    breaks(rebind, "cycle 2: not in the report", |c| {
        drop(c.guest.rebinds.pop())
    });
    breaks(rebind, "functions stayed", |c| {
        c.guest.rebinds[0].gone = false
    });
    breaks(rebind, "did not come back", |c| {
        c.guest.rebinds[0].back = false
    });
    breaks(rebind, "bytes right", |c| c.guest.rebinds[0].verified = 0);
    let once = |c: &mut Case| c.guest.rebinds[0].verified /= 2;
    breaks(Mode::EjectFunction, "bytes right", once);
}

#[test]
fn buses_that_come_and_go_must_be_those_of_the_mode() {
    fn without(bus: &str) -> impl FnOnce(&mut Case) + '_ {
        move |case| case.guest.rebinds.retain(|seen| seen.vmbus_device != bus)
    }
    for (mode, bus) in [
        (Mode::Surprise, DEV_BUS),
        (Mode::Hotplug, RNG_BUS),
        (Mode::Hotplug, DEV_BUS),
        (Mode::ReuseId, RNG_BUS),
    ] {
        breaks(mode, "not in the report", without(bus));
    }
    for (mode, bus) in [
        (Mode::Surprise, BLK_BUS),
        (Mode::Hotplug, BLK_BUS),
        (Mode::ReuseId, BLK_BUS),
    ] {
        let mut case = case(mode);
        without(bus)(&mut case);
        assert_eq!(judge(case), Vec::<String>::new(), "{mode:?}");
    }
    breaks(Mode::ReuseId, "bytes right", |c| {
        c.guest.rebinds[1].verified = 0
    });
    breaks(Mode::ReuseId, "no bus comes and goes", |c| {
        c.run.substitutes.clear()
    });
    breaks(Mode::Hotplug, "load: not in the report", |c| {
        c.guest.loads.clear()
    });
    breaks(Mode::Surprise, "1 times in the report, not 2", |c| {
        c.guest.dma.pop();
    });
}

#[test]
fn a_kexec_is_a_boot_without_a_reset() {
    breaks(Mode::Kexec, "boot 1, not 2", |c| c.guest.boot = 1);
    breaks(Mode::Kexec, "1 resets, not 0", |c| c.host.resets = 1);
}

#[test]
fn every_vector_must_interrupt() {
    let full = Mode::Full;
    breaks(full, "vector 2 is not in use", |c| {
        drop(c.guest.vectors.remove(2))
    });
    breaks(full, "no interrupt on vector 1", |c| {
        c.guest.vectors[1].per_cpu.clear()
    });
    breaks(full, "no interrupt on vector 0", |c| {
        c.guest.vectors[0].per_cpu.clear()
    });
    breaks(full, "0042:00:00.0: no interrupt", |c| {
        c.guest.vectors[3].per_cpu.clear()
    });
    // Only growth makes a configuration interrupt.
    let mut case = case(Mode::Short);
    case.guest.vectors[0].per_cpu.clear();
    assert_eq!(judge(case), Vec::<String>::new());
}

#[test]
fn phases_must_cover_every_cpu_and_make_interrupts() {
    let full = Mode::Full;
    breaks(full, "no counted requests from CPU 0", |c| {
        drop(c.guest.phases.remove(0))
    });
    breaks(full, "no counted requests from CPU 1", |c| {
        drop(c.guest.phases.remove(1))
    });
    breaks(full, "no counted moves", |c| drop(c.guest.phases.remove(2)));
    breaks(full, "no requests", |c| c.guest.phases[0].requests = 0);
    breaks(full, "interrupts for 17 requests", |c| {
        c.guest.phases[0].requests = 17
    });
    let on_other_cpu = |c: &mut Case| c.guest.phases[0].vectors = vec![counts(BLK, 1, &[(1, 16)])];
    breaks(full, "16 interrupts of vector1 on CPU 1", on_other_cpu);
    breaks(full, "moves", |c| {
        c.guest.phases[2].vectors.clear();
        c.guest.phases[2].name = "moves".into();
    });
    breaks(full, "configuration", |c| {
        c.guest.phases[3].vectors.clear();
        // Nor did the host raise one.
        c.host.marks[7] = HostMark {
            id: 8,
            ..c.host.marks[6].clone()
        };
    });
}

#[test]
fn guest_and_host_must_count_the_same_on_each_vector() {
    let full = Mode::Full;
    breaks(full, "host raised 17, guest counted 16", |c| {
        c.host.marks[1].functions[0].vectors[1].raised += 1;
    });
    breaks(full, "host raised 16, guest counted 17", |c| {
        c.guest.phases[0].vectors = vec![counts(BLK, 1, &[(0, 17)])];
    });
    breaks(full, "vector 2: host raised 1, guest counted 0", |c| {
        c.host.marks[1].functions[0].vectors[2].raised += 1;
    });
    breaks(full, "vector 0: host raised 1, guest counted 0", |c| {
        c.host.marks[3].functions[0].vectors[0].raised += 1;
    });
    breaks(full, "vector 1: host count fell", |c| {
        c.host.marks[1].functions[0].vectors[1].raised = 0;
    });
    breaks(full, "host lacks mark 5 or 6", |c| {
        drop(c.host.marks.remove(5))
    });
    breaks(full, "does not list", |c| {
        drop(c.host.marks[5].functions.remove(1))
    });
    breaks(full, "vector 1 is missing in mark 5", |c| {
        c.host.marks[4].functions[1].vectors.pop();
    });
    breaks(full, "vector 1: unknown to the host", |c| {
        c.host.marks[5].functions[1].vectors.pop();
    });
    breaks(full, "nobody asked", |c| {
        let mut extra = phase(Work::Moves, RNG, None, 5);
        extra.address = at("0043:00:00.0");
        c.guest.phases.push(extra);
    });
}

#[test]
fn marks_of_an_earlier_boot_do_not_count() {
    let mut case = case(Mode::Reboot);
    let stale = HostMark {
        id: 1,
        functions: host_functions([9, 9, 9], [9, 9]),
        exits: 0,
        flushes: 0,
        host_maps: 0,
        host_unmaps: 0,
    };
    case.host.marks.insert(0, stale);
    assert_eq!(judge(case), Vec::<String>::new());
}

fn log(lines: &[(u8, &str)]) -> KmsgReport {
    KmsgReport {
        records: 500,
        noteworthy: lines.len() as u64,
        lost: 0,
        lines: lines
            .iter()
            .map(|&(level, text)| KmsgLine {
                level,
                time_us: 0,
                text: text.into(),
            })
            .collect(),
    }
}

#[test]
fn the_kernel_log_must_be_whole_and_clean() {
    let full = Mode::Full;
    breaks(full, "empty", |c| c.guest.kmsg.records = 0);
    breaks(full, "3 records lost", |c| c.guest.kmsg.lost = 3);
    breaks(full, "1 noteworthy lines, 0", |c| {
        c.guest.kmsg.noteworthy = 1
    });
    breaks(full, "<4> odd", |c| c.guest.kmsg = log(&[(4, "odd")]));
    breaks(full, "<0> odd", |c| {
        c.guest.kmsg = log(&[(0, "odd"), (3, "harmless: 1")])
    });
    breaks(full, "Call Trace", |c| {
        c.guest.kmsg = log(&[(6, "Call Trace:")])
    });
    breaks(full, "WARNING", |c| {
        c.guest.kmsg = log(&[(4, "harmless: WARNING: CPU 0")])
    });
    breaks(full, "harmless", |c| {
        c.guest.kmsg = log(&[(4, "harmless: 1")]);
        c.guest.kernel = "6.1.0".into();
    });
    let mut case = case(full);
    case.guest.kmsg = log(&[(4, "harmless: 1"), (3, "harmless: 2")]);
    assert_eq!(judge(case), Vec::<String>::new());
}

#[test]
fn telltale_words_count_only_as_whole_words() {
    for text in [
        "BUG: scheduling",
        "x (WARNING)",
        "Call Trace:",
        "Oops: 0002 [#1]",
    ] {
        assert!(telltale(text).is_some(), "{text}");
    }
    for text in [
        "DEBUG_LOCKS",
        "LOCKDEBUG",
        "warning: small",
        "BUGS are nice",
        "",
    ] {
        assert!(telltale(text).is_none(), "{text}");
    }
}

#[test]
fn a_report_that_lacks_a_field_does_not_parse() {
    let json = serde_json::to_value(guest(Mode::Full)).unwrap();
    for field in json.as_object().unwrap().keys() {
        let mut cut = json.clone();
        cut.as_object_mut().unwrap().remove(field);
        assert!(
            serde_json::from_value::<GuestReport>(cut).is_err(),
            "{field}"
        );
    }
}

#[test]
fn metrics_come_from_both_sides() {
    let case = case(Mode::Full);
    let allow = AllowList::default();
    let metrics = metrics(&Evidence {
        run: &case.run,
        vmm: None,
        guest: Ok(case.guest),
        host: Ok(case.host),
        disks: case.disks,
        counted: case.counted,
        allow: &allow,
    });
    assert_eq!(metrics["max_latency_us"], 9000.0);
    assert_eq!(metrics["interrupts"], 227.0);
    assert_eq!(metrics["host_raised"], 221.0);
    assert_eq!(metrics["moves"], 6.0);
}
