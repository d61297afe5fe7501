//! Synthetic MSR numbers and fields (docs/spec/hyperv-guest-interface.md, section 2).
#![forbid(unsafe_code)]

/// Identity of the guest; 0 switches the hypercall interface off. Partition-wide.
pub const GUEST_OS_ID: u32 = 0x4000_0000;
/// Hypercall page: [`PAGE_ENABLE`], [`HYPERCALL_LOCKED`], page number. Partition-wide.
pub const HYPERCALL: u32 = 0x4000_0001;
/// Index of the VP; read-only.
pub const VP_INDEX: u32 = 0x4000_0002;
/// Reference time in units of 100 ns; read-only. Partition-wide.
pub const TIME_REF_COUNT: u32 = 0x4000_0020;
/// Reference TSC page: [`PAGE_ENABLE`] and page number. Partition-wide.
pub const REFERENCE_TSC: u32 = 0x4000_0021;
/// Frequency of the guest's TSC in Hz; read-only.
pub const TSC_FREQUENCY: u32 = 0x4000_0022;
/// Frequency of the local APIC timer's input clock in Hz; read-only.
pub const APIC_FREQUENCY: u32 = 0x4000_0023;
/// VP assist page: [`PAGE_ENABLE`] and page number.
pub const VP_ASSIST_PAGE: u32 = 0x4000_0073;
/// SynIC control: bit 0 enables.
pub const SCONTROL: u32 = 0x4000_0080;
/// SynIC version; read-only.
pub const SVERSION: u32 = 0x4000_0081;
/// Event flags page: [`PAGE_ENABLE`] and page number.
pub const SIEFP: u32 = 0x4000_0082;
/// Message page: [`PAGE_ENABLE`] and page number.
pub const SIMP: u32 = 0x4000_0083;
/// A write ends a message; reads 0.
pub const EOM: u32 = 0x4000_0084;
/// First of the 16 synthetic interrupt sources; fields in [`crate::hv::synic`].
pub const SINT0: u32 = 0x4000_0090;
/// Last synthetic interrupt source.
pub const SINT15: u32 = 0x4000_009f;
/// Bit 0 makes the invariant TSC visible in CPUID 0x80000007. Partition-wide.
pub const TSC_INVARIANT_CONTROL: u32 = 0x4000_0118;

/// First MSR of the synthetic range that a VMM routes here.
pub const FIRST: u32 = 0x4000_0000;
/// Last MSR of the synthetic range that a VMM routes here (docs/spec/kvm.md, section 5: one filter
/// range of 512).
pub const LAST: u32 = 0x4000_01ff;

/// Bit 0 of the MSRs that name a page: the page is in force.
pub const PAGE_ENABLE: u64 = 1 << 0;
/// Bits 63:12 of the MSRs that name a page: its guest physical address.
pub const PAGE_ADDRESS: u64 = !0xfff;
/// Bit 1 of [`HYPERCALL`]: the MSR cannot be written until the VM is reset.
pub const HYPERCALL_LOCKED: u64 = 1 << 1;
/// Bit 0 of [`SCONTROL`].
pub const SCONTROL_ENABLE: u64 = 1 << 0;
/// Value of [`SVERSION`].
pub const SYNIC_VERSION: u64 = 1;
/// Bit 0 of [`TSC_INVARIANT_CONTROL`].
pub const TSC_INVARIANT_ENABLE: u64 = 1 << 0;
