//! ACPI tables: processors, power-off and reset, the serial port, and the VMBus device with its
//! MMIO windows (docs/spec/hyperv-guest-interface.md, section 11.1).
//!
//! A hardware-reduced platform: no PM timer, no PIT, no legacy PIC in the guest's view, no
//! keyboard controller. Power-off is the sleep control register, reset the reset register (which Linux passes over on such
//! a platform: see [`crate::firmware`]).
#![forbid(unsafe_code)]

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Name, Package, Path,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::layout::{self, Range};
use crate::ports;

const OEM_ID: [u8; 6] = *b"VMVPCI";
const OEM_TABLE: [u8; 8] = *b"REFVMM  ";
const OEM_REVISION: u32 = 1;
/// Sleep type of S5 in `\_S5`.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;
/// Value that the reset register takes.
pub(crate) const RESET_VALUE: u8 = 1;
/// FADT boot architecture flags: no VGA (bit 2), no CMOS RTC (bit 5), so that no driver waits for its
/// interrupt; and no keyboard controller (bit 1 clear).
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

/// The tables of a VM with `cpus` processors, ready to be copied to `base`; the root pointer comes
/// first. APIC ids are `0..cpus`.
pub(crate) fn build(base: u64, cpus: u8, low_window: Range, high_window: Range) -> Vec<u8> {
    let mut blob = Blob::new(base);
    let root = Rsdp::len();
    blob.bytes.resize(root, 0);
    let dsdt = blob.append(&dsdt(low_window, high_window));
    let fadt = blob.append(&fadt(dsdt));
    let madt = blob.append(&madt(cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = blob.append(&xsdt);
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    blob.bytes[..root].copy_from_slice(&rsdp);
    blob.bytes
}

/// Tables one behind the other.
struct Blob {
    base: u64,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(base: u64) -> Self {
        let bytes = Vec::new();
        Self { base, bytes }
    }

    /// Appends a table and returns its guest physical address.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        let start = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(start, 0);
        self.bytes.extend(bytes(table));
        self.base + start as u64
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn byte_port(port: u16) -> GAS {
    GAS::new(
        GasSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        port.into(),
    )
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = byte_port(ports::RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = byte_port(ports::SLEEP_CONTROL);
    fadt.sleep_status_reg = byte_port(ports::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(cpus: u8) -> impl Aml {
    let local = LocalInterruptController::Address(layout::LOCAL_APIC as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE, OEM_REVISION, local);
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC as u32, 0));
    madt
}

fn dsdt(low: Range, high: Range) -> Sdt {
    let mut body = Vec::new();
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut body);
    Scope::new(Path::new("_SB_"), vec![&vmbus(low, high), &Com1]).to_aml_bytes(&mut body);

    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// The VMBus device below the module device that owns the MMIO windows.
///
/// Linux takes the windows from the first ancestor that has any, but only looks there if the VMBus
/// device has a `_CRS` of its own, which may be empty.
fn vmbus(low: Range, high: Range) -> impl Aml {
    struct Vmod(Range, Range);
    impl Aml for Vmod {
        fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
            let window = |range: Range| {
                let last = range.end() - 1;
                AddressSpace::new_memory(
                    AddressSpaceCacheable::NotCacheable,
                    true,
                    range.start,
                    last,
                    None,
                )
            };
            let (low, high) = (window(self.0), window(self.1));
            Device::new(
                Path::new("VMOD"),
                vec![
                    &Name::new(Path::new("_HID"), &"ACPI0004"),
                    &Name::new(Path::new("_UID"), &ZERO),
                    &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&low, &high])),
                    &Device::new(
                        Path::new("VMBS"),
                        vec![
                            &Name::new(Path::new("_HID"), &"VMBus"),
                            &Name::new(Path::new("_UID"), &ZERO),
                            &Name::new(Path::new("_DDN"), &"VMBUS"),
                            &Name::new(Path::new("_STA"), &0xfu8),
                            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![])),
                        ],
                    ),
                ],
            )
            .to_aml_bytes(sink);
        }
    }
    Vmod(low, high)
}

/// The serial port: on a hardware-reduced platform Linux knows its interrupt only from here.
struct Com1;

impl Aml for Com1 {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let io = IO::new(ports::SERIAL, ports::SERIAL, 0, ports::SERIAL_LEN);
        let irq = Interrupt::new(true, true, false, false, ports::SERIAL_IRQ);
        Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &ZERO),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&irq, &io])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xe_0000;
    const LOW: Range = layout::LOW_WINDOW;
    const HIGH: Range = Range {
        start: 1 << 32,
        size: 1 << 36,
    };

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at a guest physical address, by its own length.
    fn table(blob: &[u8], gpa: u64) -> &[u8] {
        let start = (gpa - BASE) as usize;
        &blob[start..start + u32_at(blob, start + 4) as usize]
    }

    /// FADT, MADT and DSDT, found the way an operating system finds them.
    fn walk(blob: &[u8]) -> [&[u8]; 3] {
        assert_eq!(&blob[..8], b"RSD PTR ");
        assert_eq!((sum(&blob[..20]), sum(&blob[..36])), (0, 0));
        let xsdt = table(blob, u64_at(blob, 24));
        assert_eq!(
            (&xsdt[..4], sum(xsdt), xsdt.len()),
            (&b"XSDT"[..], 0, 36 + 16)
        );
        let (fadt, madt) = (table(blob, u64_at(xsdt, 36)), table(blob, u64_at(xsdt, 44)));
        let dsdt = table(blob, u64_at(fadt, 140));
        for (table, name) in [(fadt, b"FACP"), (madt, b"APIC"), (dsdt, b"DSDT")] {
            assert_eq!((&table[..4], sum(table)), (&name[..], 0));
        }
        [fadt, madt, dsdt]
    }

    fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
        haystack.windows(needle.len()).position(|w| w == needle)
    }

    #[test]
    fn tables_are_reached_from_the_root_and_their_checksums_hold() {
        for cpus in [1, 2, 254] {
            let blob = build(BASE, cpus, LOW, HIGH);
            walk(&blob);
            assert!(blob.len() as u64 <= layout::HIGH_RAM - layout::ACPI_TABLES);
        }
    }

    #[test]
    fn the_platform_is_hardware_reduced_and_says_what_is_missing() {
        let blob = build(BASE, 1, LOW, HIGH);
        let [fadt, ..] = walk(&blob);
        let flags = u32_at(fadt, 112);
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), 0x24);
        let port = |at: usize| (fadt[at], u64_at(fadt, at + 4));
        assert_eq!(port(116), (1, ports::RESET.into()));
        assert_eq!(fadt[128], RESET_VALUE);
        assert_eq!(port(244), (1, ports::SLEEP_CONTROL.into()));
        assert_eq!(port(256), (1, ports::SLEEP_STATUS.into()));
    }

    #[test]
    fn every_processor_and_the_io_apic_are_listed() {
        let blob = build(BASE, 3, LOW, HIGH);
        let [_, madt, _] = walk(&blob);
        assert_eq!(u32_at(madt, 36), 0xfee0_0000);
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
        for cpu in 0..3u8 {
            let at = 44 + usize::from(cpu) * 8;
            assert_eq!(madt[at..at + 8], [0, 8, cpu, cpu, 1, 0, 0, 0]);
        }
        assert_eq!(madt[68..72], [1, 12, 0, 0]);
        assert_eq!(u32_at(madt, 72), 0xfec0_0000);
    }

    #[test]
    fn the_vmbus_device_has_its_own_empty_resources_below_the_windows_of_its_parent() {
        let blob = build(BASE, 1, LOW, HIGH);
        let [.., dsdt] = walk(&blob);
        let module = find(dsdt, b"ACPI0004\0").expect("module device");
        let vmbus = find(dsdt, b"VMBus\0").expect("VMBus device");
        assert!(module < vmbus);
        // QWord memory producers, as 0x8A descriptors with 43 bytes behind the length.
        let parent = &dsdt[module..vmbus];
        let first = find(parent, &[0x8a, 43, 0, 0, 0x0c]).expect("low window");
        assert_eq!(u64_at(parent, first + 14), LOW.start);
        assert_eq!(u64_at(parent, first + 22), LOW.end() - 1);
        assert_eq!(u64_at(parent, first + 38), LOW.size);
        let second = first + 46;
        assert_eq!(parent[second], 0x8a);
        assert_eq!(u64_at(parent, second + 14), HIGH.start);
        assert_eq!(u64_at(parent, second + 22), HIGH.end() - 1);
        // Name (_CRS, Buffer (2) { 0x79, 0 }): a template with nothing but the end tag.
        let child = &dsdt[vmbus..];
        let crs = find(child, b"_CRS").expect("its own _CRS");
        assert_eq!(child[crs + 4..crs + 10], [0x11, 5, 0x0a, 2, 0x79, 0]);
    }

    #[test]
    fn power_off_is_described() {
        let blob = build(BASE, 1, LOW, HIGH);
        let [.., dsdt] = walk(&blob);
        let s5 = find(dsdt, b"_S5_").expect("_S5");
        assert_eq!(dsdt[s5 + 4], 0x12, "a package");
        assert_eq!(dsdt[s5 + 6..s5 + 9], [4, 0x0a, SLEEP_TYPE_S5]);
        assert!(find(dsdt, b"COM1").is_some());
    }
}
