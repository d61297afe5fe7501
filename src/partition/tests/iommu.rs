//! A function behind the pvIOMMU, from the façade to its DMA.

use super::*;

const ID: u64 = 0x1234_ab78;
const CREATE: u64 = 0xb1;
const ATTACH: u64 = 0xb2;
const CONFIGURE: u64 = 0xce;
const FLUSH: u64 = 0xd0;
/// Where the guest maps the pages that the device copies between.
const IOVA: u64 = 0x7f00_0000_0000;

impl Guest {
    fn behind_iommu() -> Self {
        Self::with_iommu(ram(256), IommuConfig::default())
    }

    /// A call about first-stage domain 1.
    fn domain_call(&self, code: u64, tail: &[u8]) -> u64 {
        let mut input = Vec::new();
        for word in [SELF, 0, 1 << 32 | 1] {
            input.extend(word.to_le_bytes());
        }
        input.extend(tail);
        self.ram.write(0x6000, &input).unwrap();
        self.call(code, 0x6000)
    }

    /// Maps the pages that [`Guest::copy`] uses, from [`IOVA`] on, in a table at 0x40000, and puts
    /// the function into a domain with that table.
    fn translate(&self) {
        let entries = [
            (0x40000 + 0xfe * 8, 0x41027),
            (0x41000, 0x42027),
            (0x42000, 0x43027),
            (0x43000, 0x30067),
            (0x43008, 0x31067),
        ];
        for table in 0x40..0x44 {
            self.ram.fill(table << 12, 0x1000, 0).unwrap();
        }
        for (at, entry) in entries {
            self.ram.store_u64(at, entry, Ordering::SeqCst).unwrap();
        }
        assert_eq!(self.domain_call(CREATE, &[0; 4]), 0);
        let configuration = [1u64.to_le_bytes(), 0x40000u64.to_le_bytes()].concat();
        assert_eq!(self.domain_call(CONFIGURE, &configuration), 0);
        assert_eq!(self.domain_call(ATTACH, &ID.to_le_bytes()), 0);
    }

    /// Has the device copy 64 bytes between two addresses; the ERROR register.
    fn job(&self, from: u64, to: u64) -> u64 {
        self.ram.fill(0x30000, 64, 0x77).unwrap();
        self.ram.fill(0x31000, 64, 0).unwrap();
        self.write::<8>(LOW_BAR + 0x10, from);
        self.write::<8>(LOW_BAR + 0x18, to);
        self.write::<4>(LOW_BAR + 0x20, 64);
        self.write::<4>(LOW_BAR + 0x30, 1);
        self.host.run();
        self.read::<4>(LOW_BAR + 0x38)
    }

    pub(super) fn connect(&mut self) {
        self.boot();
        assert!(self.contact(0x6_0000));
        self.probe(0x1_0004);
        self.enable();
    }
}

#[test]
fn a_guest_without_a_driver_does_the_main_job_behind_a_pviommu() {
    let mut guest = Guest::behind_iommu();
    guest.main_job(0x6_0000, 0x1_0004);
    let leaves = guest.partition.cpuid_leaves();
    let leaf3 = leaves.iter().find(|leaf| leaf.function == 0x4000_0003);
    assert_eq!(leaf3.unwrap().edx >> 24 & 3, 3);
}

#[test]
fn without_a_pviommu_its_calls_are_unknown_and_nothing_can_be_behind_it() {
    let guest = Guest::new();
    guest.boot();
    for code in [0xb1, 0xb2, 0xc4, 0xc5, 0xce, 0xd0, 0x125, 0x127] {
        assert_eq!(guest.domain_call(code, &[0; 16]), 2, "{code:#x}");
    }
    assert_eq!(guest.domain_call(0xd1 | 1 << 32, &[0; 16]), 2);
    assert!(guest.partition.iommu().is_none());
    let device = TestDevice::new(2, &*guest.host).unwrap();
    let spec = BusSpec {
        instance: uuid!("00000002-0002-0000-8000-000000000000"),
        functions: vec![FunctionSpec::new(0, device).with_iommu(IommuMode::On)],
    };
    let error = guest.partition.plug(spec).unwrap_err();
    assert!(matches!(
        error,
        PlugError::Bus(BusError::NoIommu { number: 0 })
    ));
}

#[test]
fn a_device_obeys_the_guests_table_until_unmap_and_flush() {
    let mut guest = Guest::behind_iommu();
    guest.connect();
    guest.translate();
    assert_eq!(guest.job(IOVA, IOVA + 0x1000), 0);
    assert_eq!(guest.copied(), [0x77; 64]);
    assert_eq!(guest.job(0x30000, 0x31000), 2);
    guest.ram.store_u64(0x43008, 0, Ordering::SeqCst).unwrap();
    assert_eq!(guest.domain_call(FLUSH, &[0; 8]), 0);
    assert_eq!(guest.job(IOVA, IOVA + 0x1000), 2);
    assert_eq!(guest.copied(), [0; 64]);
    let function = &guest.partition.buses()[0].functions[0];
    let fault = function.last_fault.unwrap();
    assert_eq!((fault.domain, fault.iova), (1, IOVA + 0x1000));
    assert_eq!(fault.cause, FaultCause::NotPresent { level: 1 });
    assert_eq!(function.dma.faults, 2);
    let report = guest.partition.iommu().unwrap();
    assert_eq!(
        (report.domains[0].faults, report.domains[0].devices),
        (2, 1)
    );
}

#[test]
fn a_device_that_writes_a_message_raises_its_own_and_no_other() {
    let mut guest = Guest::behind_iommu();
    guest.connect();
    guest.translate();
    let (address, data) = guest.set_up_interrupt(0x1_0004, 0x41, 1);
    guest.interrupts.0.lock().unwrap().clear();
    let fill = |at: u64, pattern: u32| {
        guest.write::<8>(LOW_BAR + 0x18, at);
        guest.write::<4>(LOW_BAR + 0x20, 4);
        guest.write::<4>(LOW_BAR + 0x24, u64::from(u32::MAX));
        guest.write::<4>(LOW_BAR + 0x28, pattern.into());
        guest.write::<4>(LOW_BAR + 0x30, 2);
        guest.host.run();
        guest.read::<4>(LOW_BAR + 0x38)
    };
    assert_eq!(fill(address, data), 0);
    assert_eq!(*guest.interrupts.0.lock().unwrap(), [Msi::fixed(1, 0x41)]);
    // What would be vector 0x41 of every CPU on bare metal, and a message that is not live.
    assert_eq!(fill(0xfee0_0000 | 0xff << 12, 0x41), 2);
    assert_eq!(fill(address, data + 1), 2);
    assert_eq!(guest.interrupts.0.lock().unwrap().len(), 1);
}

#[test]
fn a_kernel_that_is_gone_leaves_no_dma_to_the_next_one() {
    let mut guest = Guest::behind_iommu();
    guest.connect();
    guest.translate();
    guest.set_msr(0, 0x4000_0000, 0);
    assert_eq!(guest.job(IOVA, IOVA + 0x1000), 2);
    assert_eq!(guest.job(0x30000, 0x31000), 2);
    assert!(guest.partition.iommu().unwrap().domains.is_empty());
    // The next kernel comes up; D0 brings the function back, in the default domain.
    guest.rings = None;
    guest.connect();
    assert_eq!(guest.job(0x30000, 0x31000), 0);
    guest.translate();
    assert_eq!(guest.job(IOVA, IOVA + 0x1000), 0);
}

#[test]
fn domains_and_attachments_are_part_of_the_saved_partition() {
    let mut guest = Guest::behind_iommu();
    guest.connect();
    guest.translate();
    let state = guest.partition.save().unwrap();
    guest.partition.reset();
    assert!(guest.partition.iommu().unwrap().domains.is_empty());
    guest.partition.restore(&state).unwrap();
    assert_eq!(guest.partition.save().unwrap().iommu, state.iommu);
    assert_eq!(guest.job(IOVA, IOVA + 0x1000), 0);
    assert_eq!(guest.copied(), [0x77; 64]);
    assert_eq!(guest.job(0x30000, 0x31000), 2);
    let other = Guest::new();
    let error = other.partition.restore(&state).unwrap_err();
    assert!(matches!(error, PartitionStateError::IommuPresence));
}

#[test]
fn a_removed_function_is_forgotten() {
    let mut guest = Guest::behind_iommu();
    guest.connect();
    guest.translate();
    assert!(guest.partition.remove(&INSTANCE));
    let report = guest.partition.iommu().unwrap();
    assert!(report.devices.is_empty());
    assert_eq!(report.domains[0].devices, 0);
    assert_eq!(guest.domain_call(ATTACH, &ID.to_le_bytes()), 0x57);
}
