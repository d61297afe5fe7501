//! CPUID leaves and feature bits (docs/spec/hyperv-guest-interface.md, section 1; TLFS, "Feature
//! discovery").
#![forbid(unsafe_code)]

use bitflags::bitflags;

/// Leaf with the vendor signature; EAX is the highest leaf of the range.
pub const LEAF_VENDOR: u32 = 0x4000_0000;
/// Leaf with the interface signature.
pub const LEAF_INTERFACE: u32 = 0x4000_0001;
/// Leaf with the hypervisor's version.
pub const LEAF_VERSION: u32 = 0x4000_0002;
/// Leaf with privileges (EAX, EBX) and features (EDX).
pub const LEAF_FEATURES: u32 = 0x4000_0003;
/// Leaf with recommendations (EAX), the spin count (EBX) and physical address bits (ECX).
pub const LEAF_RECOMMENDATIONS: u32 = 0x4000_0004;
/// Leaf with implementation limits: EAX is the maximum number of VPs.
pub const LEAF_LIMITS: u32 = 0x4000_0005;
/// Leaf with hardware features in use.
pub const LEAF_HARDWARE: u32 = 0x4000_0006;
/// Leaf with the virtualisation stack's vendor.
pub const LEAF_STACK_VENDOR: u32 = 0x4000_0080;
/// Leaf with the virtualisation stack's interface.
pub const LEAF_STACK_INTERFACE: u32 = 0x4000_0081;
/// Leaf with the virtualisation stack's properties. Linux 7.3 reads it unconditionally.
pub const LEAF_STACK_PROPERTIES: u32 = 0x4000_0082;

/// "Microsoft Hv" in EBX, ECX and EDX of [`LEAF_VENDOR`]: the 12 bytes that Linux compares.
pub const VENDOR: [u32; 3] = [0x7263_694d, 0x666f_736f, 0x7648_2074];
/// "Hv#1" in EAX of [`LEAF_INTERFACE`].
pub const INTERFACE: u32 = 0x3123_7648;
/// "VS#1" in EAX of [`LEAF_STACK_INTERFACE`].
pub const STACK_INTERFACE: u32 = 0x3123_5356;

bitflags! {
    /// Privileges of the partition, low half: EAX of [`LEAF_FEATURES`]
    /// (docs/spec/hyperv-guest-interface.md, section 1.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct PrivilegesLow: u32 {
        /// MSR TIME_REF_COUNT.
        const TIME_REF_COUNT = 1 << 1;
        /// SynIC MSRs.
        const SYNIC = 1 << 2;
        /// MSRs GUEST_OS_ID and HYPERCALL. Linux demands it.
        const HYPERCALL = 1 << 5;
        /// MSR VP_INDEX. Linux demands it.
        const VP_INDEX = 1 << 6;
        /// MSRs TSC_FREQUENCY and APIC_FREQUENCY, together with [`Features::FREQUENCY_MSRS`].
        const FREQUENCY_MSRS = 1 << 11;
        /// MSR TSC_INVARIANT_CONTROL.
        const TSC_INVARIANT = 1 << 15;
    }
}

bitflags! {
    /// Privileges of the partition, high half: EBX of [`LEAF_FEATURES`]
    /// (docs/spec/hyperv-guest-interface.md, section 1.2).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct PrivilegesHigh: u32 {
        /// HvPostMessage.
        const POST_MESSAGES = 1 << 4;
        /// HvSignalEvent.
        const SIGNAL_EVENTS = 1 << 5;
    }
}

bitflags! {
    /// Features: EDX of [`LEAF_FEATURES`] (docs/spec/hyperv-guest-interface.md, section 1.2).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Features: u32 {
        /// Fast hypercall input may extend to XMM0-5.
        const XMM_INPUT = 1 << 4;
        /// See [`PrivilegesLow::FREQUENCY_MSRS`].
        const FREQUENCY_MSRS = 1 << 8;
        /// Fast hypercall output may be returned in registers.
        const XMM_OUTPUT = 1 << 15;
        /// Bit 1 of MSR HYPERCALL locks it.
        const HYPERCALL_MSR_LOCK = 1 << 18;
        /// Device domains (docs/spec/pviommu.md#IO-2-22).
        const DEVICE_DOMAINS = 1 << 24;
        /// First-stage device domains.
        const S1_DEVICE_DOMAINS = 1 << 25;
    }
}

bitflags! {
    /// Recommendations: EAX of [`LEAF_RECOMMENDATIONS`] (docs/spec/hyperv-guest-interface.md,
    /// section 1.3).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Recommendations: u32 {
        /// Flush other VPs' TLBs by hypercall.
        const REMOTE_TLB_FLUSH = 1 << 2;
        /// Relax watchdog timeouts (read by Windows).
        const RELAXED_TIMING = 1 << 5;
        /// Do not use AutoEOI: the handler of a SINT writes EOI itself.
        const DEPRECATE_AUTO_EOI = 1 << 9;
        /// Send IPIs by hypercall.
        const CLUSTER_IPI = 1 << 10;
        /// The calls above take sparse sets of VPs.
        const EX_PROCESSOR_MASKS = 1 << 11;
    }
}

/// EBX of [`LEAF_RECOMMENDATIONS`]: never notify the hypervisor of a spinning VP.
pub const SPIN_NEVER_NOTIFY: u32 = u32::MAX;
/// EBX of [`LEAF_RECOMMENDATIONS`]: attempts to get a spinlock before the hypervisor is notified, as
/// KVM proposes them (kernel: arch/x86/kvm/hyperv.c, kvm_get_hv_cpuid).
pub const SPIN_ATTEMPTS: u32 = 0xfff;

bitflags! {
    /// EAX of [`LEAF_STACK_PROPERTIES`] (docs/spec/hyperv-guest-interface.md, section 1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct StackProperties: u32 {
        /// MSIs and IO-APIC entries carry a 15-bit destination id.
        const EXTENDED_DESTINATION = 1 << 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signatures_spell_what_guests_compare() {
        let bytes: Vec<u8> = VENDOR.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(bytes, b"Microsoft Hv");
        assert_eq!(&INTERFACE.to_le_bytes(), b"Hv#1");
        assert_eq!(&STACK_INTERFACE.to_le_bytes(), b"VS#1");
    }
}
