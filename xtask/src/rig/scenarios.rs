//! The rig's scenarios, as data.
#![forbid(unsafe_code)]

use super::devices;
use crate::failure::Failure;
use crate::kernel;
use guest_images::scenario::Domain;
use guest_images::scenario::Function;
use guest_images::scenario::HostDevice;
use guest_images::scenario::Kind;
use guest_images::scenario::L1;
use guest_images::scenario::Mode;
use guest_images::scenario::PciAddress;
use guest_images::scenario::Refusal;
use guest_images::scenario::Run;
use guest_images::scenario::Scenario;

/// Guest RAM in MiB.
const MEMORY_MIB: u32 = 512;
/// Size of a virtio-blk disk in MiB.
const DISK_MIB: u32 = 64;
/// MiB by which a disk grows where a scenario changes its size.
const GROW_MIB: u32 = 8;
/// Time limit of a run in seconds: many times what it takes on two idle cores.
const RUN_LIMIT_S: u64 = 480;
/// Seconds of undisturbed traffic behind shadowed tables.
const SHADOW_TRAFFIC_S: u32 = 120;
/// Time limit of a VMM that must refuse.
const REFUSAL_LIMIT_S: u64 = 60;
/// Time limit of the conformance suite in seconds.
const CONFORMANCE_LIMIT_S: u64 = 900;
/// Time limit of the calls to the kernel's mock IOMMU in seconds.
const NESTED_MOCK_LIMIT_S: u64 = 60;
/// Seconds that a hostile guest runs for.
const HOSTILE_S: u64 = 240;
/// Time limit of L1's devices without a guest in seconds.
const VFIO_HOST_LIMIT_S: u64 = 240;

/// Bus GUIDs: Data2 is the PCI domain, different for each bus of a guest.
const BUS_A: &str = "6c3a5f2e-1a2b-4c3d-8e4f-5a6b7c8d9e01";
const BUS_B: &str = "6c3a5f2e-2b3c-4c3d-8e4f-5a6b7c8d9e02";
const BUS_C: &str = "6c3a5f2e-3c4d-4c3d-8e4f-5a6b7c8d9e03";

/// A scenario and when it runs.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) scenario: Scenario,
    /// Whether each change must pass it; the others run with `ci --full`.
    pub(crate) required: bool,
}

/// Name of a family's kernel in the shared folder.
pub(crate) fn kernel_file(family: &str) -> String {
    format!("{family}.vmlinuz")
}

/// Name of a family's guest archive in the shared folder.
pub(crate) fn initrd_file(family: &str) -> String {
    format!("{family}.initramfs")
}

/// The kernel families that a scenario boots.
pub(crate) fn families(scenario: &Scenario) -> Vec<&str> {
    let mut names: Vec<_> = scenario
        .runs
        .iter()
        .filter_map(|run| run.kernel.strip_suffix(".vmlinuz"))
        .collect();
    names.dedup();
    names
}

/// All scenarios.
pub(crate) fn all() -> Vec<Entry> {
    let required = |scenario| Entry {
        scenario,
        required: true,
    };
    let optional = |scenario| Entry {
        scenario,
        required: false,
    };
    vec![
        required(linux("linux-7")),
        required(linux("linux-6.12")),
        required(linux("linux-6.1")),
        optional(hybrid("linux-7")),
        optional(default_domain("linux-7")),
        optional(default_domain("linux-6.12")),
        optional(default_domain("linux-6.1")),
        required(two_buses("linux-7")),
        required(reboot("linux-7")),
        required(triple_fault("linux-7")),
        required(rebind("linux-7")),
        optional(pviommu_blk()),
        optional(pviommu_strict()),
        optional(pviommu_stray()),
        optional(pviommu_rebind()),
        optional(pviommu_vfio_user()),
        optional(pviommu_map()),
        required(eject("linux-7")),
        optional(surprise()),
        optional(hotplug("linux-7")),
        optional(reuse_id("linux-7")),
        optional(nested_mock()),
        optional(vfio_host("vfio-host", "type1", None)),
        optional(vfio_host(
            "vfio-host-iommufd",
            "iommufd",
            Some("linux-7-pviommu"),
        )),
        optional(multifunction("linux-7")),
        optional(kexec("linux-7")),
        required(snapshot("linux-7")),
        required(passthrough(
            "vfio-nvme",
            "an NVMe controller of the host, by VFIO groups and type 1",
            &["nvme"],
        )),
        optional(passthrough(
            "vfio-e1000e",
            "a network controller of the host, by VFIO groups and type 1",
            &["e1000e"],
        )),
        optional(passthrough(
            "vfio-rng",
            "a virtio-rng of the host, by VFIO groups and type 1",
            &["rng"],
        )),
        optional(passthrough(
            "vfio-edu",
            "an edu of the host, in user space of the guest, which sends it astray",
            &["edu"],
        )),
        optional(vfio_iommufd()),
        required(vfio_unbind("vfio-unbind", "VFIO groups and type 1", None)),
        optional(vfio_unbind(
            "vfio-unbind-iommufd",
            "iommufd",
            Some(kernel::BUILT.name),
        )),
        optional(vfio_group()),
        optional(vfio_shadow()),
        optional(vfio_shadow_nvme()),
        optional(vfio_map()),
        required(conformance("conformance", "user")),
        optional(conformance("conformance-hybrid", "kernel")),
        optional(hostile()),
    ]
}

/// The scenarios of these names, each once, in the order of the names.
pub(crate) fn select(names: &[String]) -> Result<Vec<Scenario>, Failure> {
    let mut selected: Vec<Scenario> = Vec::new();
    for name in names {
        if selected.iter().any(|scenario| scenario.name == *name) {
            continue;
        }
        let entry = all().into_iter().find(|entry| entry.scenario.name == *name);
        let Some(entry) = entry else {
            let text = format!("no scenario {name}; `cargo xtask rig --list` lists them");
            return Err(Failure::Usage(text));
        };
        selected.push(entry.scenario);
    }
    Ok(selected)
}

/// A kernel family with every check, on one and on two vCPUs.
fn linux(family: &str) -> Scenario {
    let run = |cpus| Run {
        functions: vec![disk(BUS_A, 0, cpus, GROW_MIB), entropy(BUS_B, 0)],
        ..run(family, cpus, Mode::Full)
    };
    scenario(
        family,
        "disk, entropy source, interrupts and their moves; 1 and 2 vCPUs",
        vec![run(1), run(2)],
    )
}

/// The same with KVM answering the hypercalls that it can.
fn hybrid(family: &str) -> Scenario {
    let mut scenario = linux(family);
    scenario.name = format!("{family}-hybrid");
    scenario.description += "; --hyperv kernel";
    for run in &mut scenario.runs {
        run.hyperv = Some("kernel".into());
    }
    scenario
}

/// The same with functions behind a pvIOMMU that the kernel has no driver for: they stay in the
/// default domain, and the guest notices nothing but VIRTIO_F_ACCESS_PLATFORM.
fn default_domain(family: &str) -> Scenario {
    let mut scenario = linux(family);
    scenario.name = format!("{family}-iommu");
    scenario.description += "; iommu=on, which this kernel does not know";
    for run in &mut scenario.runs {
        let functions = std::mem::take(&mut run.functions);
        run.functions = functions.into_iter().map(behind_iommu).collect();
    }
    scenario
}

fn two_buses(family: &str) -> Scenario {
    let functions = vec![
        disk(BUS_A, 0, 2, 0),
        entropy(BUS_B, 0),
        disk(BUS_C, 0, 2, 0),
    ];
    scenario(
        "two-buses",
        "two disks and an entropy source, each on a vPCI bus of its own",
        vec![Run {
            functions,
            ..run(family, 2, Mode::Short)
        }],
    )
}

fn reboot(family: &str) -> Scenario {
    scenario(
        "reboot",
        "the guest resets itself twice; each boot finds everything anew",
        vec![Run {
            functions: vec![disk(BUS_A, 0, 2, 0), entropy(BUS_B, 0)],
            repeat: 2,
            time_limit_s: RUN_LIMIT_S * 2,
            ..run(family, 2, Mode::Reboot)
        }],
    )
}

/// As [`reboot`], but the guest's kernel resets the machine by a triple fault.
fn triple_fault(family: &str) -> Scenario {
    let mut scenario = Scenario {
        name: "triple-fault".into(),
        description: "as reboot, by a triple fault of the guest's first CPU".into(),
        ..reboot(family)
    };
    for run in &mut scenario.runs {
        run.cmdline = "reboot=t".into();
    }
    scenario
}

fn rebind(family: &str) -> Scenario {
    scenario(
        "rebind",
        "unbind and bind of the bus's driver, three times",
        vec![Run {
            functions: vec![disk(BUS_A, 0, 2, 0), entropy(BUS_B, 0)],
            repeat: 3,
            ..run(family, 2, Mode::Rebind)
        }],
    )
}

/// A kernel that has a driver for the pvIOMMU, with every check, behind domains with lazy unmaps.
fn pviommu_blk() -> Scenario {
    let run = |cpus| Run {
        functions: vec![
            behind_iommu(disk(BUS_A, 0, cpus, GROW_MIB)),
            behind_iommu(entropy(BUS_B, 0)),
        ],
        ..translated(cpus, Mode::Full, Domain::Lazy)
    };
    scenario(
        "pviommu-blk",
        "disk and entropy source behind translated domains, flushed lazily; 1 and 2 vCPUs",
        vec![run(1), run(2)],
    )
}

/// The same with a flush for each unmap.
fn pviommu_strict() -> Scenario {
    let functions = vec![
        behind_iommu(disk(BUS_A, 0, 2, GROW_MIB)),
        behind_iommu(entropy(BUS_B, 0)),
    ];
    scenario(
        "pviommu-strict",
        "the same with a flush for each unmap",
        vec![Run {
            functions,
            ..translated(2, Mode::Full, Domain::Strict)
        }],
    )
}

/// DMA that must fault, between checks of a disk.
fn pviommu_stray() -> Scenario {
    scenario(
        "pviommu-stray",
        "DMA to pages that are not mapped, read-only or no longer mapped faults and harms nothing",
        vec![
            with_testdev("strict", Mode::Dma, Domain::Strict),
            with_testdev("lazy", Mode::Dma, Domain::Lazy),
        ],
    )
}

/// A function that changes hands.
fn pviommu_vfio_user() -> Scenario {
    scenario(
        "pviommu-vfio-user",
        "a function handed to user space of the guest by VFIO, with stray DMA, and back, twice",
        vec![with_testdev("strict", Mode::VfioUser, Domain::Strict)],
    )
}

/// What a mapping costs.
fn pviommu_map() -> Scenario {
    let run = |name: &str, domain| with_testdev(name, Mode::MapBenchmark, domain);
    scenario(
        "pviommu-map",
        "the kernel's dma_map_benchmark, with exits counted: lazy, strict, passthrough",
        vec![
            run("lazy", Domain::Lazy),
            run("strict", Domain::Strict),
            run("passthrough", Domain::Identity),
        ],
    )
}

/// A test device and a disk behind the pvIOMMU.
fn with_testdev(name: &str, mode: Mode, domain: Domain) -> Run {
    Run {
        name: name.into(),
        functions: vec![
            behind_iommu(disk(BUS_A, 0, 2, 0)),
            behind_iommu(testdev(BUS_B, 0)),
        ],
        ..translated(2, mode, domain)
    }
}

/// As [`rebind`]: each bind finds its function in the blocked domain.
fn pviommu_rebind() -> Scenario {
    let functions = vec![
        behind_iommu(disk(BUS_A, 0, 2, 0)),
        behind_iommu(entropy(BUS_B, 0)),
    ];
    scenario(
        "pviommu-rebind",
        "unbind and bind of the bus's driver, three times, with translated domains",
        vec![Run {
            functions,
            repeat: 3,
            ..translated(2, Mode::Rebind, Domain::Strict)
        }],
    )
}

/// A run of the kernel that has a driver for the pvIOMMU.
fn translated(cpus: u32, mode: Mode, domain: Domain) -> Run {
    let cmdline = match domain {
        Domain::Strict => "iommu.strict=1",
        Domain::Lazy => "iommu.strict=0",
        Domain::Identity => "iommu.passthrough=1",
    };
    Run {
        cmdline: cmdline.into(),
        domain: Some(domain),
        ..run(kernel::BUILT.name, cpus, mode)
    }
}

/// Devices of L1 passed through, each to one run: NVMe, network and virtio-rng to an unmodified
/// kernel, and edu to one whose VFIO gives it to user space without an IOMMU.
fn passthrough(name: &str, description: &str, words: &[&str]) -> Scenario {
    let all: Vec<_> = words.iter().filter_map(|word| host_device(word)).collect();
    let of = |edu: bool| -> Vec<Function> {
        let chosen = all
            .iter()
            .filter(|device| (device.kind == Kind::Edu) == edu);
        passed_through(chosen)
    };
    let kernels = [("linux-7", false), (kernel::BUILT.name, true)];
    let runs = kernels.map(|(family, edu)| Run {
        name: if edu { "edu" } else { "2-cpu" }.into(),
        functions: of(edu),
        ..run(family, 2, Mode::Full)
    });
    let runs = runs.into_iter().filter(|run| !run.functions.is_empty());
    Scenario {
        l1: L1 {
            devices: all.clone(),
            ..L1::default()
        },
        ..scenario(name, description, runs.collect())
    }
}

/// All of them, by iommufd.
fn vfio_iommufd() -> Scenario {
    let mut scenario = passthrough(
        "vfio-iommufd",
        "NVMe, network and virtio-rng of the host at once, then edu, by iommufd",
        &["nvme", "e1000e", "rng", "edu"],
    );
    scenario.l1.kernel = Some(kernel::BUILT.name.into());
    scenario
}

/// Devices that L1 takes from the VMM while the guest uses them, and gives it again.
fn vfio_unbind(name: &str, interface: &str, l1_kernel: Option<&str>) -> Scenario {
    let description = format!(
        "L1 unbinds a virtio-rng and an NVMe controller from vfio-pci while the guest has them, by \
         {interface}; three times"
    );
    let mut scenario = passthrough(name, &description, &["rng", "nvme"]);
    scenario.l1.kernel = l1_kernel.map(String::from);
    for run in &mut scenario.runs {
        run.mode = Mode::HostUnbind;
        run.repeat = 3;
    }
    scenario
}

/// A device of L1 by its word. A guest makes edu reach for memory that is not its own.
fn host_device(word: &str) -> Option<HostDevice> {
    let mut device = devices::named(word)?;
    device.strays = device.kind == Kind::Edu;
    Some(device)
}

/// A function for each device, on a bus of its own.
fn passed_through<'a>(devices: impl Iterator<Item = &'a HostDevice>) -> Vec<Function> {
    let function = |(device, bus): (&HostDevice, &str)| Function::Vfio {
        bus: guid(bus),
        function: 0,
        host: device.address,
        guest: device.kind,
        size_mib: device.size_mib,
        iommu: false,
    };
    devices.zip([BUS_A, BUS_B, BUS_C]).map(function).collect()
}

/// An edu behind translated domains that the VMM keeps up with by watching the guest's tables, in
/// the hands of user space of the guest, which sends it astray.
fn vfio_shadow() -> Scenario {
    shadowed(
        "vfio-shadow",
        "stray DMA of an edu behind translated domains: never mapped, read-only, no longer mapped",
        ["edu", "edu"],
    )
}

/// An NVMe controller behind such domains: whole-disk checks, and then minutes of traffic from two
/// vCPUs, which map and unmap in the same tables.
fn vfio_shadow_nvme() -> Scenario {
    let mut scenario = shadowed(
        "vfio-shadow-nvme",
        "NVMe behind translated domains, with minutes of traffic from two vCPUs: strict and lazy",
        ["nvme", "nvme-2"],
    );
    for run in &mut scenario.runs {
        run.repeat = SHADOW_TRAFFIC_S;
        run.time_limit_s += u64::from(SHADOW_TRAFFIC_S);
        scenario.time_limit_s += u64::from(SHADOW_TRAFFIC_S);
    }
    scenario
}

/// What a mapping costs for a device behind such domains.
fn vfio_map() -> Scenario {
    let mut scenario = shadowed(
        "vfio-map",
        "the kernel's dma_map_benchmark on an edu behind translated domains: strict, lazy",
        ["edu", "edu"],
    );
    for run in &mut scenario.runs {
        run.mode = Mode::MapBenchmark;
    }
    // In this mode it is sent nowhere.
    for device in &mut scenario.l1.devices {
        device.strays = false;
    }
    scenario
}

/// A run with strict and one with lazy unmaps, each with a device.
fn shadowed(name: &str, description: &str, words: [&str; 2]) -> Scenario {
    let mut l1 = L1::default();
    let domains = [("strict", Domain::Strict), ("lazy", Domain::Lazy)];
    let runs = domains.into_iter().zip(words).map(|((run, domain), word)| {
        let device = host_device(word);
        let functions = passed_through(device.iter());
        let known = |device: &HostDevice| l1.devices.contains(device);
        l1.devices.extend(device.filter(|device| !known(device)));
        Run {
            name: run.into(),
            functions: functions.into_iter().map(behind_iommu).collect(),
            ..translated(2, Mode::Full, domain)
        }
    });
    let scenario = scenario(name, description, runs.collect());
    Scenario { l1, ..scenario }
}

/// Devices that cannot be had.
fn vfio_group() -> Scenario {
    let left = devices::named("shared-rng").map(|device| HostDevice {
        left: true,
        ..device
    });
    let bound = ["shared-edu-1", "shared-edu-2"].map(devices::named);
    let l1 = L1 {
        devices: bound.into_iter().chain([left]).flatten().collect(),
        ..L1::default()
    };
    let refused = |name: &str, host: &str, words: &[&str]| Run {
        name: name.into(),
        functions: host.parse().ok().map(refused_device).into_iter().collect(),
        refusal: Some(Refusal {
            status: 3,
            words: words.iter().map(|word| word.to_string()).collect(),
        }),
        time_limit_s: REFUSAL_LIMIT_S,
        ..run("linux-7", 1, Mode::Short)
    };
    let in_use = ["0000:01:01.0", "IOMMU group", "0000:01:03.0", "virtio-pci"];
    let not_bound = ["0000:01:03.0", "bound to virtio-pci", "driver_override"];
    Scenario {
        l1,
        ..scenario(
            "vfio-group",
            "devices that cannot be passed through: in a group with one that L1 uses, used, missing",
            vec![
                refused("shared-group", "0000:01:01.0", &in_use),
                refused("not-bound", "0000:01:03.0", &not_bound),
                refused(
                    "not-there",
                    "0000:00:1e.7",
                    &["0000:00:1e.7", "no such PCI device"],
                ),
            ],
        )
    }
}

fn refused_device(host: PciAddress) -> Function {
    Function::Vfio {
        bus: guid(BUS_A),
        function: 0,
        host,
        guest: Kind::Edu,
        size_mib: 0,
        iommu: false,
    }
}

/// Buses go away and come back while the guest runs: in order.
fn eject(family: &str) -> Scenario {
    let mut scenario = rebind(family);
    scenario.name = "eject".into();
    scenario.description = "the VMM ejects each bus and plugs it in again, three times".into();
    for run in &mut scenario.runs {
        run.mode = Mode::Eject;
    }
    scenario
}

/// A test device that is torn out. The kernel is one that has its driver, which survives that.
fn surprise() -> Scenario {
    scenario(
        "surprise",
        "the VMM tears a test device out and plugs it in again, three times, beside a disk",
        vec![Run {
            functions: vec![disk(BUS_A, 0, 2, 0), testdev(BUS_B, 0)],
            repeat: 3,
            ..run(kernel::BUILT.name, 2, Mode::Surprise)
        }],
    )
}

/// Buses that come and go under load.
fn hotplug(family: &str) -> Scenario {
    scenario(
        "hotplug",
        "under load on one disk, another and an entropy source are plugged in and ejected",
        vec![Run {
            functions: vec![
                disk(BUS_A, 0, 2, 0),
                entropy(BUS_B, 0),
                disk(BUS_C, 0, 2, 0),
            ],
            repeat: 3,
            ..run(family, 2, Mode::Hotplug)
        }],
    )
}

/// Other devices under the names of those that were ejected.
fn reuse_id(family: &str) -> Scenario {
    scenario(
        "reuse-id",
        "a disk in place of an entropy source and the reverse, under the same GUID; then back",
        vec![Run {
            functions: vec![disk(BUS_A, 0, 2, 0), entropy(BUS_B, 0)],
            substitutes: vec![entropy(BUS_A, 0), disk(BUS_B, 0, 2, 0)],
            repeat: 2,
            ..run(family, 2, Mode::ReuseId)
        }],
    )
}

/// Another kernel without a reset of the machine.
fn kexec(family: &str) -> Scenario {
    scenario(
        "kexec",
        "the guest starts another kernel by kexec with requests under way; it finds everything anew",
        vec![Run {
            functions: vec![disk(BUS_A, 0, 2, 0), entropy(BUS_B, 0)],
            repeat: 1,
            time_limit_s: RUN_LIMIT_S * 2,
            ..run(family, 2, Mode::Kexec)
        }],
    )
}

/// The operations of nested translation on a real iommufd, with an IOMMU that the kernel makes up.
fn nested_mock() -> Scenario {
    Scenario {
        l1: L1 {
            kernel: Some("linux-7-pviommu".into()),
            ..L1::default()
        },
        exec: Some("/host/nested-mock".into()),
        time_limit_s: NESTED_MOCK_LIMIT_S,
        ..scenario(
            "vfio-nested-mock",
            "nested first-stage tables on the mock IOMMU of L1's kernel, call by call",
            Vec::new(),
        )
    }
}

/// What the DMA of L1's devices reaches, without a guest, by one of the kernel's interfaces.
fn vfio_host(name: &str, interface: &str, kernel: Option<&str>) -> Scenario {
    let words = ["edu", "shared-edu-1", "shared-edu-2"];
    let mut devices: Vec<_> = words.into_iter().filter_map(devices::named).collect();
    for device in &mut devices {
        device.strays = true;
    }
    let addresses: Vec<_> = devices.iter().map(|d| d.address.to_string()).collect();
    Scenario {
        l1: L1 {
            kernel: kernel.map(String::from),
            devices,
            ..L1::default()
        },
        exec: Some(format!(
            "/host/vfio-host {interface} {}",
            addresses.join(" ")
        )),
        time_limit_s: VFIO_HOST_LIMIT_S,
        ..scenario(
            name,
            "devices of L1 through the library alone: domains, moves, groups, limits",
            Vec::new(),
        )
    }
}

/// Two functions on one bus: every check, then ejected, together or one ahead of the other, and plugged
/// in again together.
fn multifunction(family: &str) -> Scenario {
    let functions = || vec![disk(BUS_A, 0, 2, 0), entropy(BUS_A, 1)];
    let with = |name: &str, mode, repeat| Run {
        name: name.into(),
        functions: functions(),
        repeat,
        ..run(family, 2, mode)
    };
    scenario(
        "multifunction",
        "a disk and an entropy source on one bus: every check; ejected, also one alone, and back again",
        vec![
            with("checks", Mode::Full, 0),
            with("eject", Mode::Eject, 2),
            with("eject-function", Mode::EjectFunction, 2),
        ],
    )
}

/// The VM is saved and goes on in another process, at every step of a run.
fn snapshot(family: &str) -> Scenario {
    let with = |name: &str, mode, repeat| Run {
        name: name.into(),
        functions: vec![disk(BUS_A, 0, 2, 0), entropy(BUS_B, 0)],
        repeat,
        snapshots: 12,
        time_limit_s: RUN_LIMIT_S * 2,
        ..run(family, 2, mode)
    };
    // A restore is another one where KVM has SINTs of its own.
    let hybrid = Run {
        snapshots: 6,
        hyperv: Some("kernel".into()),
        ..with("hybrid", Mode::Short, 0)
    };
    scenario(
        "snapshot",
        "saved and restored in a new process at each step: probe, data, load, moves; removal; hybrid mode",
        vec![
            with("checks", Mode::Full, 0),
            with("eject", Mode::Eject, 1),
            hybrid,
        ],
    )
}

/// The conformance suite with its guests on L1's KVM, which takes part in answering hypercalls or
/// does not.
fn conformance(name: &str, hyperv: &str) -> Scenario {
    Scenario {
        exec: Some(format!(
            "/host/vpci-vmm conformance --bed kvm --hyperv {hyperv}"
        )),
        time_limit_s: CONFORMANCE_LIMIT_S,
        ..scenario(
            name,
            &format!("the conformance suite on virtual CPUs of L1's KVM, --hyperv {hyperv}"),
            Vec::new(),
        )
    }
}

/// A guest that means harm, on L1's KVM.
fn hostile() -> Scenario {
    Scenario {
        exec: Some(format!(
            "/host/vpci-vmm hostile --bed kvm --seconds {HOSTILE_S}"
        )),
        time_limit_s: HOSTILE_S + RUN_LIMIT_S,
        ..scenario(
            "hostile",
            "minutes of random traffic from two vCPUs of L1's KVM while functions come and go",
            Vec::new(),
        )
    }
}

fn scenario(name: &str, description: &str, runs: Vec<Run>) -> Scenario {
    Scenario {
        name: name.into(),
        description: description.into(),
        l1: L1::default(),
        time_limit_s: runs.iter().map(|run| run.time_limit_s + 30).sum(),
        runs,
        exec: None,
    }
}

fn run(family: &str, cpus: u32, mode: Mode) -> Run {
    Run {
        name: format!("{cpus}-cpu"),
        kernel: kernel_file(family),
        initrd: initrd_file(family),
        cmdline: String::new(),
        cpus,
        memory_mib: MEMORY_MIB,
        functions: Vec::new(),
        substitutes: Vec::new(),
        mode,
        repeat: 0,
        snapshots: 0,
        hyperv: Some("user".into()),
        domain: None,
        refusal: None,
        time_limit_s: RUN_LIMIT_S,
    }
}

/// A disk with a queue for every vCPU: fewer and the driver would not spread its interrupts.
fn disk(bus: &str, function: u8, cpus: u32, grow_mib: u32) -> Function {
    Function::Blk {
        bus: guid(bus),
        function,
        size_mib: DISK_MIB,
        queues: cpus as u16,
        readonly: false,
        grow_mib,
        iommu: false,
    }
}

fn entropy(bus: &str, function: u8) -> Function {
    Function::Rng {
        bus: guid(bus),
        function,
        iommu: false,
    }
}

fn testdev(bus: &str, function: u8) -> Function {
    Function::Testdev {
        bus: guid(bus),
        function,
        iommu: false,
    }
}

fn behind_iommu(mut function: Function) -> Function {
    match &mut function {
        Function::Blk { iommu, .. }
        | Function::Rng { iommu, .. }
        | Function::Testdev { iommu, .. }
        | Function::Vfio { iommu, .. } => *iommu = true,
    }
    function
}

fn guid(text: &str) -> uuid::Uuid {
    uuid::Uuid::try_parse(text).unwrap_or_default()
}

/// Multiplies the time limits of a scenario, for slow machines.
pub(crate) fn scale(scenario: &mut Scenario, factor: f64) {
    let scaled = |seconds: u64| (seconds as f64 * factor).ceil() as u64;
    scenario.time_limit_s = scaled(scenario.time_limit_s);
    for run in &mut scenario.runs {
        run.time_limit_s = scaled(run.time_limit_s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_distinct_and_kernels_exist() {
        let mut names = BTreeSet::new();
        for entry in all() {
            assert!(names.insert(entry.scenario.name.clone()));
            assert!(!entry.scenario.description.is_empty());
            let has_kernel = !families(&entry.scenario).is_empty();
            assert_ne!(has_kernel, entry.scenario.exec.is_some());
            for family in families(&entry.scenario) {
                kernel::family(family).unwrap();
            }
        }
    }

    #[test]
    fn every_function_of_a_run_has_an_address_of_its_own_in_a_legal_domain() {
        for run in all().iter().flat_map(|entry| &entry.scenario.runs) {
            let mut addresses = BTreeSet::new();
            let mut domains = BTreeSet::new();
            for function in &run.functions {
                assert!(addresses.insert(function.address()), "{}", run.name);
                assert!((1..0x8000).contains(&function.domain()));
                domains.insert(function.domain());
            }
            let buses: BTreeSet<_> = run.functions.iter().map(Function::bus).collect();
            assert_eq!(buses.len(), domains.len(), "a domain names one bus");
        }
    }

    #[test]
    fn each_kernel_runs_on_one_and_two_cpus_with_queues_for_all() {
        for name in ["linux-7", "linux-6.12", "linux-6.1"] {
            let scenario = &select(&[name.into()]).unwrap()[0];
            let cpus: Vec<_> = scenario.runs.iter().map(|run| run.cpus).collect();
            assert_eq!(cpus, [1, 2]);
            for run in &scenario.runs {
                let queues = run.functions.iter().find_map(|function| match function {
                    Function::Blk { queues, .. } => Some(u32::from(*queues)),
                    _ => None,
                });
                assert!(queues.unwrap() >= run.cpus);
            }
        }
    }

    #[test]
    fn functions_behind_the_pviommu_have_a_kernel_with_its_driver() {
        for run in all().iter().flat_map(|entry| &entry.scenario.runs) {
            let behind = run.functions.iter().any(Function::iommu);
            let built = run.kernel == kernel_file(kernel::BUILT.name);
            assert_eq!(run.domain.is_some(), behind && built, "{}", run.name);
        }
    }

    #[test]
    fn each_passed_through_device_is_there_and_goes_to_one_run() {
        for entry in all() {
            let L1 {
                kernel, devices, ..
            } = &entry.scenario.l1;
            if let Some(name) = kernel {
                assert!(
                    kernel::family(name)
                        .unwrap()
                        .roles
                        .contains(&kernel::Role::Rig)
                );
            }
            let mut used = BTreeSet::new();
            let started = |run: &&Run| run.refusal.is_none();
            let runs = entry.scenario.runs.iter().filter(started);
            for function in runs.flat_map(|run| &run.functions) {
                let Function::Vfio {
                    host,
                    guest,
                    size_mib,
                    ..
                } = function
                else {
                    continue;
                };
                let device = devices
                    .iter()
                    .find(|device| device.address == *host)
                    .unwrap();
                assert_eq!((device.kind, device.size_mib), (*guest, *size_mib));
                // A namespace holds what one guest wrote.
                let again = !used.insert(*host);
                assert!(!(again && *guest == Kind::Nvme), "{}", entry.scenario.name);
            }
            // Whoever else strays has nobody to make it, but for a program in L1.
            let by_guest = entry.scenario.exec.is_none();
            let strays = devices.iter().filter(|device| device.strays && by_guest);
            for device in strays {
                assert!(used.contains(&device.address));
                assert!(entry.scenario.runs.iter().any(|run| run.mode.strays()));
            }
        }
    }

    #[test]
    fn selection_keeps_the_order_and_refuses_unknown_names() {
        let names = ["reboot", "linux-7", "reboot"].map(String::from);
        let selected = select(&names).unwrap();
        let selected: Vec<_> = selected.iter().map(|scenario| &scenario.name).collect();
        assert_eq!(selected, ["reboot", "linux-7"]);
        let error = select(&["linux-2.4".into()]).unwrap_err();
        assert!(matches!(error, Failure::Usage(_)), "{error}");
    }

    #[test]
    fn a_factor_stretches_every_limit() {
        let mut scenario = select(&["linux-7".into()]).unwrap().remove(0);
        let before = scenario.clone();
        scale(&mut scenario, 2.5);
        assert_eq!(
            scenario.time_limit_s,
            (before.time_limit_s as f64 * 2.5).ceil() as u64
        );
        assert_eq!(scenario.runs[1].time_limit_s, 1200);
    }
}
