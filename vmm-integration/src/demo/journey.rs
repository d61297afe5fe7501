//! The steps: what Linux does from its first CPUID to its last interrupt, in its order.
#![forbid(unsafe_code)]

use std::time::Instant;

use uuid::Uuid;
use vm_vpci::pviommu::{IommuConfig, IommuMode};
use vpci_conformance::check::{Context, Failure, equal, holds, is_ud};
use vpci_conformance::host::{BusSetup, FunctionSetup, Setup};
use vpci_conformance::model::kernel::{Kernel, VMBUS_SINT, VMBUS_VECTOR, msr, status};
use vpci_conformance::model::testdev::{self, Interrupt, Job, TestDev, register};
use vpci_conformance::model::vm::{PAGE, PATIENCE, Vm};
use vpci_conformance::model::vmbus::{self, Channel, Contact, Offer, VPCI_CLASS, VmBus};
use vpci_conformance::model::vpci::{self, Bus, Description, WINDOW_SIZE, nt};

use super::iommu;
use super::stage::{Facts, Stage, Step};

/// The number in the bus's GUID that becomes its PCI domain.
const DOMAIN: u16 = 0x5ca1;
/// Vector of the device's interrupt.
const VECTOR: u8 = 0x41;
/// Bytes that the device copies at a time.
const COPIED: u64 = PAGE;
/// Copies with a retarget in flight.
const ROUNDS: u32 = 64;
/// What a load from nothing gives.
const NOTHING: u64 = 0xffff_ffff;
/// A call code that no hypervisor has.
const UNKNOWN_CALL: u64 = 0x7fff;

/// Plays all steps; `None` if one of them did not hold.
pub(super) fn run(stage: &mut Stage, context: &Context) -> Option<()> {
    let vm = stage.step(Step::Machine, |facts| machine(facts, context))?;
    stage.step(Step::Discovery, |facts| discovery(facts, &vm))?;
    let kernel = stage.step(Step::HypercallPage, |facts| hypercall_page(facts, &vm))?;
    let kernel = stage.step(Step::Synic, |facts| synic(facts, &kernel))?;
    let vmbus = stage.step(Step::Contact, |facts| contact(facts, &kernel))?;
    let offer = stage.step(Step::Offer, |facts| offer(facts, &vmbus))?;
    let channel = stage.step(Step::Channel, |facts| channel(facts, &vmbus, &offer))?;
    let (bus, function) = stage.step(Step::Probe, |facts| probe(facts, channel))?;
    stage.step(Step::Domain, |facts| domain(facts, &bus, &function))?;
    let device = stage.step(Step::Bar, |facts| bar(facts, &bus))?;
    let interrupt = stage.step(Step::Msix, |facts| msix(facts, &device))?;
    stage.step(Step::Dma, |facts| dma(facts, &device))?;
    stage.step(Step::Retarget, |facts| retarget(facts, &device, interrupt))?;
    let found = stage.step(Step::PvIommu, |facts| iommu::find(facts, &device))?;
    let space = stage.step(Step::Translate, |facts| {
        iommu::translate(facts, found, &device)
    })?;
    stage.step(Step::Unmap, |facts| iommu::unmap(facts, &space))?;
    let faults = stage.step(Step::Blocked, |facts| iommu::block(facts, &space))?;
    stage.keep_faults(faults);
    let bus = stage.step(Step::Removal, |facts| removal(facts, &device))?;
    stage.step(Step::IdReuse, |facts| {
        iommu::reuse(facts, &space, &bus, &setup().buses[0])
    })?;
    stage.step(Step::Unload, |facts| unload(facts, &vmbus))?;
    stage.step(Step::Reset, |facts| reset(facts, &vm))
}

fn setup() -> Setup {
    Setup {
        buses: vec![BusSetup {
            instance: BusSetup::instance(DOMAIN),
            functions: vec![FunctionSetup::testdev(0).with_iommu(IommuMode::On)],
        }],
        iommu: Some(IommuConfig::default()),
        ..Setup::default()
    }
}

fn machine(facts: &mut Facts<'_>, context: &Context) -> Result<Vm, Failure> {
    let setup = setup();
    let vm = context.machine(&setup)?;
    let ram: u64 = setup.ram.iter().map(|range| range.end - range.start).sum();
    facts.saw(
        format_args!("{} CPUs, {} MiB of RAM", vm.vps(), ram >> 20),
        "no emulated host bridge: config space and BARs live in two plain MMIO ranges",
    );
    facts.saw(
        format_args!("a bus with the GUID {}", BusSetup::instance(DOMAIN)),
        "on it `testdev`, a DMA engine with eight MSI-X vectors, behind a pvIOMMU",
    );
    Ok(vm)
}

/// The text in three registers.
fn text(registers: [u32; 3]) -> String {
    let bytes: Vec<u8> = registers
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn discovery(facts: &mut Facts<'_>, vm: &Vm) -> Result<(), Failure> {
    let [last, vendor @ ..] = vm.cpuid(0, 0x4000_0000)?;
    equal("vendor in CPUID", text(vendor), "Microsoft Hv".to_owned())?;
    facts.saw(
        format_args!(
            "CPUID 0x40000000: {:?}, leaves up to {last:#x}",
            text(vendor)
        ),
        "the guest finds Hyper-V, not KVM, and will look for VMBus",
    );
    let [interface, ..] = vm.cpuid(0, 0x4000_0001)?;
    equal("interface in CPUID", interface.to_le_bytes(), *b"Hv#1")?;
    let [low, high, ..] = vm.cpuid(0, 0x4000_0003)?;
    equal("privilege to use SynIC and hypercalls", low & 0x24, 0x24)?;
    equal("privilege to post messages and signal", high & 0x30, 0x30)?;
    facts.saw(
        format_args!(
            "CPUID 0x40000003: privileges {:#018x}",
            u64::from(high) << 32 | u64::from(low)
        ),
        "it may use hypercalls, the SynIC, messages and events",
    );
    Ok(())
}

fn hypercall_page(facts: &mut Facts<'_>, vm: &Vm) -> Result<Kernel, Failure> {
    let kernel = Kernel::identify(vm)?;
    facts.saw(
        format_args!("GUEST_OS_ID = {:#x}", vm.rdmsr(0, msr::GUEST_OS_ID)?),
        "the guest says that it is Linux 7.3",
    );
    let page = vm.rdmsr(0, msr::HYPERCALL)?;
    equal("hypercall page MSR", page & !0xffe, kernel.page() | 1)?;
    let code = vm.read(kernel.page(), 8)?;
    facts.saw(
        format_args!("code at {:#x}: {}", kernel.page(), hex(&code)),
        "the library's own page; its OUT exits on every KVM, also for calls that KVM answers itself",
    );
    let returned = kernel.call(0, UNKNOWN_CALL, 0, 0)?;
    let want = u64::from(status::INVALID_HYPERCALL_CODE);
    equal("result of an unknown call", returned.rax, want)?;
    holds(
        "registers that a call must keep are kept",
        returned.preserved,
    )?;
    facts.saw(
        format_args!("call {UNKNOWN_CALL:#x} returns {:#x}", returned.rax),
        "calls arrive and come back: HV_STATUS_INVALID_HYPERCALL_CODE for one that does not exist",
    );
    Ok(kernel)
}

fn hex(bytes: &[u8]) -> String {
    let bytes: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}

fn synic(facts: &mut Facts<'_>, kernel: &Kernel) -> Result<Kernel, Failure> {
    let kernel = kernel.start_synics()?;
    let vm = kernel.vm();
    for vp in 0..vm.vps() {
        equal("SCONTROL", vm.rdmsr(vp, msr::SCONTROL)? & 1, 1)?;
        let source = vm.rdmsr(vp, msr::SINT0 + u32::from(VMBUS_SINT))?;
        equal("vector of SINT2", source & 0xff, VMBUS_VECTOR.into())?;
        let (slot, flags) = (kernel.synic(vp).slot(0), kernel.synic(vp).flags(0));
        facts.saw(
            format_args!("CPU {vp}: messages at {slot:#x}, event flags at {flags:#x}"),
            format_args!("SINT{VMBUS_SINT} raises vector {:#x} there", source & 0xff),
        );
    }
    Ok(kernel)
}

/// A version as people write it.
fn dotted(version: u32) -> String {
    format!("{}.{}", version >> 16, version & 0xffff)
}

fn contact(facts: &mut Facts<'_>, kernel: &Kernel) -> Result<VmBus, Failure> {
    let vmbus = VmBus::new(kernel, 0);
    let version = vmbus::VERSIONS[0];
    let response = vmbus.contact(&Contact::linux(kernel.vm(), version, 0)?)?;
    equal("version_supported", response.supported, true)?;
    kernel.vm().expect_interrupt(0, VMBUS_VECTOR)?;
    facts.saw(
        format_args!(
            "INITIATE_CONTACT with version {}: VERSION_RESPONSE, supported",
            dotted(version)
        ),
        format_args!(
            "the host knows the newest version; messages go to connection {:#x} from now on",
            vmbus.connection()
        ),
    );
    facts.saw(
        format_args!("vector {VMBUS_VECTOR:#x} on CPU 0"),
        "the answer was announced by an interrupt, not polled for",
    );
    Ok(vmbus)
}

fn offer(facts: &mut Facts<'_>, vmbus: &VmBus) -> Result<Offer, Failure> {
    let offer = vmbus.only_offer()?;
    equal("class of the offer", offer.class, VPCI_CLASS)?;
    equal(
        "instance of the offer",
        offer.instance,
        BusSetup::instance(DOMAIN),
    )?;
    facts.saw(
        format_args!("OFFER_CHANNEL: class {}", offer.class),
        "a virtual PCI bus: pci-hyperv binds to it",
    );
    facts.saw(
        format_args!(
            "instance {}, channel {}, connection {:#x}",
            offer.instance, offer.relid, offer.connection
        ),
        "the bus of this machine, and where to signal it",
    );
    Ok(offer)
}

fn channel(facts: &mut Facts<'_>, vmbus: &VmBus, offer: &Offer) -> Result<Channel, Failure> {
    let channel = vmbus.open(offer)?;
    facts.saw(
        format_args!(
            "GPADL {:#x} created, channel {} open",
            channel.gpadl, offer.relid
        ),
        "the host reads and writes two rings of four data pages each in the guest's RAM",
    );
    Ok(channel)
}

fn probe(facts: &mut Facts<'_>, channel: Channel) -> Result<(Bus, Description), Failure> {
    let bus = Bus::new(channel, 0);
    let version = vpci::VERSIONS[0];
    let answer = bus.negotiate(version)?;
    equal("status of QUERY_PROTOCOL_VERSION", answer, nt::SUCCESS)?;
    facts.saw(
        format_args!("protocol version {}", dotted(version)),
        "the newest that Linux has",
    );
    let mut functions = bus.relations()?;
    equal("number of functions", functions.len(), 1)?;
    let function = functions.remove(0);
    equal("vendor", function.vendor, testdev::VENDOR)?;
    equal("device", function.device, testdev::DEVICE)?;
    facts.saw(
        format_args!(
            "BUS_RELATIONS2: {:04x}:{:04x} in slot {:#x}",
            function.vendor, function.device, function.slot
        ),
        "one function is on the bus",
    );
    let bars = bus.requirements(function.slot)?;
    facts.saw(
        format_args!("probed BARs: {:#010x} {:#010x}", bars[0], bars[1]),
        format_args!(
            "BAR 0 is 64 bits wide and has {} KiB",
            testdev::BAR_SIZE >> 10
        ),
    );
    let size = !(u64::from(bars[1]) << 32 | u64::from(bars[0] & !0xf)) + 1;
    equal("size of BAR 0", size, testdev::BAR_SIZE)?;
    let answer = bus.d0_entry(bus.window())?;
    equal("status of BUS_D0ENTRY", answer, nt::SUCCESS)?;
    let answer = bus.assigned(function.slot)?;
    equal("status of RESOURCES_ASSIGNED2", answer, nt::SUCCESS)?;
    facts.saw(
        format_args!(
            "BUS_D0ENTRY: window at {:#x}, {} KiB",
            bus.window(),
            WINDOW_SIZE >> 10
        ),
        "the bus is on; a slot in its first page, configuration space in its second",
    );
    Ok((bus, function))
}

/// The PCI domain that Linux takes from the GUID of a bus.
fn domain_of(instance: Uuid) -> u16 {
    let (_, domain, ..) = instance.as_fields();
    domain
}

fn domain(facts: &mut Facts<'_>, bus: &Bus, function: &Description) -> Result<(), Failure> {
    let instance = bus.channel().offer.instance;
    equal("domain in the GUID", domain_of(instance), DOMAIN)?;
    facts.saw(
        format_args!("GUID {instance}"),
        format_args!(
            "Linux puts the function at {:04x}:00:00.0, at each boot",
            domain_of(instance)
        ),
    );
    let ids = bus.config(function.slot, 0, 4)?;
    let want = u64::from(testdev::DEVICE) << 16 | u64::from(testdev::VENDOR);
    equal("ids in configuration space", ids, want)?;
    facts.saw(
        format_args!(
            "its configuration space at {:#x} begins with {ids:#010x}",
            bus.window() + 0x1000
        ),
        "device and vendor are what the bus relations said",
    );
    Ok(())
}

fn bar(facts: &mut Facts<'_>, bus: &Bus) -> Result<TestDev, Failure> {
    let device = TestDev::start(bus, 0)?;
    let magic = device.load(register::MAGIC, 4)?;
    facts.saw(
        format_args!("BAR 0 at {:#x}: first register {magic:#x}", device.bar()),
        "memory decode is on, and the device answers where the guest put it",
    );
    Ok(device)
}

fn msix(facts: &mut Facts<'_>, device: &TestDev) -> Result<Interrupt, Failure> {
    let interrupt = device.interrupt(0, VECTOR, 0)?;
    facts.saw(
        format_args!(
            "CREATE_INTERRUPT3: address {:#x}, data {:#x}",
            interrupt.message.address, interrupt.message.data
        ),
        "an opaque handle: the guest cannot forge an interrupt from it",
    );
    device.raise(0)?;
    device.vm().expect_interrupt(0, VECTOR)?;
    facts.saw(
        format_args!("MSI-X entry 0 raised: vector {VECTOR:#x} on CPU 0"),
        "HvRetargetDeviceInterrupt chose vector and CPU, as Linux does before it unmasks",
    );
    Ok(interrupt)
}

fn dma(facts: &mut Facts<'_>, device: &TestDev) -> Result<(), Failure> {
    let vm = device.vm();
    let source = vm.pages(2)?;
    let destination = source + COPIED;
    let data: Vec<u8> = (0..COPIED).map(|byte| (byte * 7 + 3) as u8).collect();
    vm.write(source, &data)?;
    device.copy(source, destination, COPIED as u32, 0)?;
    equal(
        "bytes that the device copied",
        vm.read(destination, data.len())?,
        data,
    )?;
    vm.expect_interrupt(0, VECTOR)?;
    facts.saw(
        format_args!("{COPIED} bytes copied by the device from {source:#x} to {destination:#x}"),
        "every byte is right",
    );
    facts.saw(
        format_args!("vector {VECTOR:#x} on CPU 0"),
        "the device said that it was done",
    );
    Ok(())
}

/// Interrupts of the device that arrive on each CPU until there is one at least.
fn arrivals(vm: &Vm) -> Result<[usize; 2], Failure> {
    let begin = Instant::now();
    loop {
        let mut counts = [0; 2];
        for (vp, count) in (0..).zip(&mut counts) {
            let vectors = vm.take_interrupts(vp)?;
            *count = vectors.iter().filter(|vector| **vector == VECTOR).count();
        }
        if counts != [0; 2] || begin.elapsed() > PATIENCE {
            return Ok(counts);
        }
    }
}

fn retarget(
    facts: &mut Facts<'_>,
    device: &TestDev,
    mut interrupt: Interrupt,
) -> Result<(), Failure> {
    let vm = device.vm();
    let pages = vm.pages(2)?;
    let job = Job {
        command: 1,
        source: pages,
        destination: pages + COPIED,
        length: COPIED as u32,
        vector: 0,
    };
    let mut arrived = [0; 2];
    for round in 0..ROUNDS {
        device.begin(&job)?;
        interrupt.vp = 1 - interrupt.vp;
        device.retarget(&interrupt)?;
        let counts = arrivals(vm)?;
        let what = format!("interrupts of copy {round}, moved to CPU {}", interrupt.vp);
        equal(what, counts.iter().sum::<usize>(), 1)?;
        for (total, count) in arrived.iter_mut().zip(counts) {
            *total += count;
        }
    }
    facts.saw(
        format_args!("{ROUNDS} copies, each with a retarget while the device worked"),
        format_args!(
            "{} interrupts on CPU 0, {} on CPU 1: none lost, none twice",
            arrived[0], arrived[1]
        ),
    );
    device.raise(0)?;
    vm.expect_interrupt(interrupt.vp, VECTOR)?;
    facts.saw(
        format_args!(
            "raised once more: vector {VECTOR:#x} on CPU {}",
            interrupt.vp
        ),
        "after the hypercall returns nothing goes to the old CPU",
    );
    Ok(())
}

fn removal(facts: &mut Facts<'_>, device: &TestDev) -> Result<Bus, Failure> {
    let (vm, bus) = (device.vm(), device.bus());
    let (vmbus, offer) = (bus.vmbus(), &bus.channel().offer);
    vm.remove(offer.instance)?;
    equal("a load from BAR 0", device.load(0, 4)?, NOTHING)?;
    facts.saw(
        format_args!("the operator takes the bus away: BAR 0 reads {NOTHING:#x}"),
        "the guest's accesses go nowhere, and it does not stop",
    );
    equal(
        "channel that is rescinded",
        vmbus.expect_rescind()?,
        offer.relid,
    )?;
    vmbus.send_close(offer.relid)?;
    vmbus.release(offer.relid)?;
    vmbus.expect_silence()?;
    facts.saw(
        format_args!("RESCIND_CHANNEL_OFFER for channel {}", offer.relid),
        "the guest was told, closed it and let the id go",
    );
    vm.plug(&setup().buses[0])?;
    let again = vmbus.expect_offer()?;
    equal("instance that is offered", again.instance, offer.instance)?;
    let bus = Bus::probe(vmbus, &again, vpci::VERSIONS[0])?;
    let device = TestDev::start(&bus, 0)?;
    facts.saw(
        format_args!(
            "plugged in again: offered by itself as channel {}",
            again.relid
        ),
        format_args!("probed, and the device answers at {:#x}", device.bar()),
    );
    Ok(bus)
}

fn unload(facts: &mut Facts<'_>, vmbus: &VmBus) -> Result<(), Failure> {
    let kernel = vmbus.kernel();
    vmbus.unload()?;
    facts.saw(
        "UNLOAD: UNLOAD_RESPONSE",
        "channels and GPADLs are gone, the rings are the guest's",
    );
    kernel.shut_down()?;
    is_ud(
        "a call of a kernel that shut down",
        kernel.call(0, UNKNOWN_CALL, 0, 0),
    )?;
    facts.saw(
        "GUEST_OS_ID = 0: a call raises #UD",
        "nothing is left that could surprise the next kernel",
    );
    Ok(())
}

fn reset(facts: &mut Facts<'_>, vm: &Vm) -> Result<(), Failure> {
    vm.reset()?;
    equal("GUEST_OS_ID", vm.rdmsr(0, msr::GUEST_OS_ID)?, 0)?;
    equal("hypercall page MSR", vm.rdmsr(0, msr::HYPERCALL)?, 0)?;
    let device = TestDev::bring_up(vm)?;
    facts.saw(
        format_args!(
            "after a reset the same guest comes as far as BAR 0 at {:#x}",
            device.bar()
        ),
        "a machine can boot again and again",
    );
    Ok(())
}
