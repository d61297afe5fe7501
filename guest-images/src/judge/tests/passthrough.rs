//! Rules about devices of L1 in a guest.

use super::*;

const BUSES: [&str; 4] = [
    "11111111-0051-4000-8000-000000000001",
    "11111111-0052-4000-8000-000000000002",
    "11111111-0053-4000-8000-000000000003",
    "11111111-0054-4000-8000-000000000004",
];
const NVME: &str = "0051:00:00.0";
const NET: &str = "0052:00:00.0";
const EDU: &str = "0053:00:00.0";
const RNG: &str = "0054:00:00.0";
const KINDS: [Kind; 4] = [Kind::Nvme, Kind::E1000e, Kind::Edu, Kind::Rng];
const HOSTS: [&str; 4] = ["00:11.0", "00:13.0", "00:10.0", "00:12.0"];

fn host_address(place: usize) -> PciAddress {
    at(&format!("0000:{}", HOSTS[place]))
}

fn moves() -> Vec<MoveReport> {
    let step = |cpu| MoveReport {
        cpu,
        effective: Some(cpu),
        requests: 1,
        on_new_cpu: 1,
    };
    vec![step(0), step(1), step(0), step(1)]
}

fn edu_dma(test: DmaTest) -> DmaReport {
    DmaReport {
        address: at(EDU),
        owner: DmaOwner::User,
        test,
        result: DmaResult {
            error: 0,
            moved: 8,
            fault: 0,
            iova: 0x1000,
            intact: true,
        },
    }
}

fn moved(address: &str, begin: u8, vectors: Vec<VectorCounts>) -> Phase {
    Phase {
        name: format!("moves {address}"),
        work: Work::Moves,
        address: at(address),
        cpu: None,
        begin,
        end: begin + 1,
        requests: 4,
        vectors,
    }
}

/// Good evidence with the four devices in place of the VMM's own.
fn passed_through(domain: Option<Domain>) -> Case {
    let mut case = case(Mode::Full);
    let place = |place: usize| Function::Vfio {
        bus: BUSES[place].parse().unwrap(),
        function: 0,
        host: host_address(place),
        guest: KINDS[place],
        size_mib: if KINDS[place] == Kind::Nvme { 64 } else { 0 },
        iommu: domain.is_some(),
    };
    case.run.functions = (0..4).map(place).collect();
    case.run.domain = domain;
    let guest = &mut case.guest;
    let drivers = [
        (NVME, "nvme", None, 3),
        (NET, "e1000e", None, 3),
        (EDU, "", None, 0),
        (RNG, "virtio-pci", Some("virtio_rng"), 2),
    ];
    let found = drivers.iter().zip(KINDS).zip(BUSES);
    guest.functions = found
        .map(
            |((&(address, driver, virtio, vectors), kind), bus)| PciFunctionReport {
                driver: Some(driver.into()).filter(|driver: &String| !driver.is_empty()),
                virtio_driver: virtio.map(Into::into),
                domain: domain.map(|domain| domain.as_str().into()),
                ..function(address, kind, "", vectors, bus)
            },
        )
        .collect();
    guest.disks[0].address = at(NVME);
    guest.rngs[0].address = at(RNG);
    guest.loads[0].address = at(NVME);
    guest.grows.clear();
    guest.nets = vec![NetReport {
        address: at(NET),
        name: "eth0".into(),
        answers: 100,
        max_latency_us: 3000,
        moves: [0, 1]
            .map(|index| NetMoves {
                index,
                moves: moves(),
            })
            .into(),
        storm_moves: 60,
        storm_answers: 50,
    }];
    guest.edus = vec![EduReport {
        address: at(EDU),
        id: 0x0100_00ed,
        alive: true,
        factorial: 3_628_800,
        jobs: 12,
        interrupts: 12,
        max_latency_us: 120_000,
        moves: moves(),
    }];
    guest.dma = vec![edu_dma(DmaTest::Copy); 3];
    guest
        .dma
        .extend([DmaTest::StrayWrite, DmaTest::StrayRead].map(edu_dma));
    if domain.is_some() {
        guest
            .dma
            .extend([DmaTest::ReadOnly, DmaTest::Stale].map(edu_dma));
    }
    guest.phases = vec![
        Phase {
            vectors: vec![counts(NVME, 1, &[(0, 16)])],
            ..phase(Work::OneOutstanding, NVME, Some(0), 1)
        },
        Phase {
            vectors: vec![counts(NVME, 2, &[(1, 16)])],
            ..phase(Work::OneOutstanding, NVME, Some(1), 3)
        },
        moved(
            NET,
            5,
            vec![counts(NET, 0, &[(0, 4), (1, 4)]), counts(NET, 1, &[(0, 8)])],
        ),
        moved(EDU, 7, vec![counts(EDU, 0, &[(0, 2), (1, 2)])]),
        moved(RNG, 9, vec![counts(RNG, 1, &[(0, 2), (1, 2)])]),
    ];
    guest.vectors = vec![
        counts(NVME, 0, &[(0, 9)]),
        counts(NVME, 1, &[(0, 90)]),
        counts(NVME, 2, &[(1, 90)]),
        counts(NET, 0, &[(0, 9)]),
        counts(NET, 1, &[(0, 9)]),
        counts(NET, 2, &[(0, 1)]),
        counts(RNG, 1, &[(0, 9)]),
    ];
    let counted = |mark, place: usize, vectors: &[(u32, u64)]| Counted {
        mark,
        host: host_address(place),
        vectors: vectors.iter().copied().collect(),
    };
    case.counted = vec![
        counted(1, 0, &[(0, 5), (1, 40), (2, 40)]),
        counted(2, 0, &[(0, 5), (1, 56), (2, 40)]),
        counted(3, 0, &[(0, 5), (1, 56), (2, 40)]),
        counted(4, 0, &[(0, 5), (1, 56), (2, 56)]),
        counted(5, 1, &[(0, 10), (1, 10), (2, 1)]),
        counted(6, 1, &[(0, 18), (1, 18), (2, 1)]),
        counted(7, 2, &[(0, 7)]),
        counted(8, 2, &[(0, 11)]),
        counted(9, 3, &[(1, 5)]),
        counted(10, 3, &[(1, 9)]),
    ];
    let mut marks = case.host.marks.iter().cloned().cycle();
    case.host.marks = (1..=10)
        .filter_map(|id| {
            Some(HostMark {
                id,
                ..marks.next()?
            })
        })
        .collect();
    case.host.functions = (0..4)
        .map(|place| HostFunction {
            bus: BUSES[place].parse().unwrap(),
            function: 0,
            kind: Kind::Vfio,
            logical_id: place as u64,
            domain_hint: 0x51 + place as u16,
            vectors: vec![],
            dma: HostDma::default(),
        })
        .collect();
    case.host.counters.insert("vfio.failures".into(), 0);
    case.disks.clear();
    case
}

#[test]
fn good_evidence_of_host_devices_passes() {
    for domain in [None, Some(Domain::Strict), Some(Domain::Lazy)] {
        assert_eq!(judge(passed_through(domain)), Vec::<String>::new());
    }
}

/// Good evidence of devices that L1 takes from the VMM twice.
fn unbound() -> Case {
    let mut case = passed_through(None);
    case.run.mode = Mode::HostUnbind;
    case.guest.mode = Mode::HostUnbind;
    case.run.repeat = 2;
    case.guest.loads.clear();
    // Nobody is to stray.
    case.guest.dma.retain(|dma| dma.test == DmaTest::Copy);
    let cycles = [1, 2].into_iter();
    let cycle = |cycle: u32| {
        BUSES
            .into_iter()
            .zip(KINDS)
            .map(move |(bus, kind)| RebindReport {
                cycle,
                vmbus_device: bus.into(),
                gone: true,
                back: true,
                millis: 900,
                verified: if kind == Kind::Nvme { 64 << 20 } else { 0 },
            })
    };
    case.guest.rebinds = cycles.flat_map(cycle).collect();
    case
}

#[test]
fn a_device_that_l1_takes_goes_and_comes_back_each_time() {
    assert_eq!(judge(unbound()), Vec::<String>::new());
    let fails = |word: &str, change: fn(&mut Case)| breaks_case(unbound(), word, change);
    fails("cycle 2: not in the report", |c| {
        drop(c.guest.rebinds.pop());
    });
    fails("functions stayed", |c| c.guest.rebinds[3].gone = false);
    fails("bytes right", |c| c.guest.rebinds[0].verified -= 1);
}

#[track_caller]
fn fails(word: &str, change: impl FnOnce(&mut Case)) {
    breaks_case(passed_through(Some(Domain::Strict)), word, change);
}

#[test]
fn a_host_device_needs_its_driver_and_its_vectors() {
    fails("PCI driver", |c| c.guest.functions[0].driver = None);
    fails("PCI driver", |c| {
        c.guest.functions[2].driver = Some("pci-stub".into());
    });
    fails("MSI-X vectors", |c| c.guest.functions[1].msix_vectors = 1);
    fails("no interrupt on vector 2", |c| {
        c.guest.vectors[2].per_cpu.clear();
    });
    fails("vector 2 is not in use", |c| {
        c.guest.vectors.remove(5);
    });
    fails("host report", |c| c.host.functions[0].kind = Kind::Blk);
    fails("vfio.failures is Some(1)", |c| {
        c.host.counters.insert("vfio.failures".into(), 1);
    });
    fails("vfio.failures is None", |c| c.host.counters.clear());
}

#[test]
fn a_namespace_is_held_to_all_of_a_disk_s_rules() {
    fails("disk", |c| c.guest.disks[0].initial_ok -= 512);
    fails("disk", |c| c.guest.disks[0].verified = 0);
    fails("disk", |c| c.guest.disks[0].queues = 1);
    fails("disk", |c| c.guest.disks.clear());
    fails("CPU 1 was never offline", |c| {
        c.guest.loads[0].cpu_cycles.clear();
    });
    fails("no counted requests", |c| {
        c.guest.phases.remove(0);
    });
    fails("none belong there", |c| {
        c.guest.phases[1].vectors[0].per_cpu = [(0, 16)].into();
    });
    fails("boot", |c| c.guest.boot = 2);
}

#[test]
fn interrupts_are_counted_against_the_host_s_kernel() {
    fails("raised 15, guest counted 16", |c| {
        *c.counted[1].vectors.get_mut(&1).unwrap() -= 1;
        *c.counted[2].vectors.get_mut(&1).unwrap() -= 1;
        *c.counted[3].vectors.get_mut(&1).unwrap() -= 1;
    });
    fails("raised 1, guest counted 0", |c| {
        *c.counted[9].vectors.entry(0).or_default() += 1;
    });
    fails("raised 7, guest counted 8", |c| {
        *c.counted[5].vectors.get_mut(&1).unwrap() -= 1;
    });
    let mut merged = passed_through(None);
    *merged.counted[5].vectors.get_mut(&1).unwrap() += 1;
    assert!(judge(merged).is_empty(), "a network controller's merge");
    fails("fell", |c| {
        c.counted[7].vectors.clear();
    });
    fails("no count of 0000:00:12.0", |c| {
        c.counted.pop();
    });
}

#[test]
fn a_network_needs_answers_and_moves() {
    fails("not in the report", |c| c.guest.nets.clear());
    fails("vector 1: not moved", |c| {
        c.guest.nets[0].moves.pop();
    });
    fails("never moved to CPU 1", |c| {
        c.guest.nets[0].moves[0].moves.retain(|step| step.cpu == 0);
    });
    fails("no interrupt on CPU", |c| {
        c.guest.nets[0].moves[1].moves[1].on_new_cpu = 0;
    });
    fails("an answer took", |c| {
        c.guest.nets[0].max_latency_us = LATENCY_LIMIT_US;
    });
    fails("0 answers during", |c| c.guest.nets[0].storm_answers = 0);
}

#[test]
fn an_educational_device_needs_its_results_and_an_interrupt_for_each() {
    fails("not in the report", |c| c.guest.edus.clear());
    fails("id 0xff", |c| c.guest.edus[0].id = 0xff);
    fails("alive is false", |c| c.guest.edus[0].alive = false);
    fails("computed 0", |c| c.guest.edus[0].factorial = 0);
    fails("11 interrupts of 12", |c| c.guest.edus[0].interrupts = 11);
    fails("a job took", |c| {
        c.guest.edus[0].max_latency_us = LATENCY_LIMIT_US;
    });
    fails("move 1: CPU 1 is Some(0)", |c| {
        c.guest.edus[0].moves[1].effective = Some(0);
    });
}

#[test]
fn its_dma_reaches_what_it_must_and_nothing_else() {
    fails("dma: copy: memory", |c| {
        c.guest.dma[1].result.intact = false
    });
    fails("dma: copy: 2 times", |c| {
        c.guest.dma.remove(0);
    });
    for (index, word) in ["stray-write", "stray-read", "read-only", "stale"]
        .into_iter()
        .enumerate()
    {
        fails(word, |c| c.guest.dma[3 + index].result.intact = false);
        fails(word, |c| {
            c.guest.dma.remove(3 + index);
        });
    }
}
