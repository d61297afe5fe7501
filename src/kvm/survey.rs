//! What of docs/spec/kvm.md, section 2, a host's KVM has, and what follows where it has not.
//!
//! [`CAPABILITIES`] is the one list: [`HostSupport::check`](super::HostSupport::check) demands its
//! required entries, and [`survey`] reads all of them for people to look at.
#![forbid(unsafe_code)]

use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_HYPERV,
    KVM_CAP_HYPERV_EVENTFD, KVM_CAP_HYPERV_SEND_IPI, KVM_CAP_HYPERV_SYNIC2,
    KVM_CAP_HYPERV_TLBFLUSH, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IOEVENTFD,
    KVM_CAP_IOEVENTFD_ANY_LENGTH, KVM_CAP_IRQCHIP, KVM_CAP_IRQFD, KVM_CAP_IRQFD_RESAMPLE,
    KVM_CAP_NR_MEMSLOTS, KVM_CAP_READONLY_MEM, KVM_CAP_SIGNAL_MSI, KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_SYNC_REGS, KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_X2APIC_API, KVM_CAP_X86_MSR_FILTER,
    KVM_CAP_X86_USER_SPACE_MSR, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    KVM_X86_QUIRK_SLOT_ZAP_ALL,
};
use kvm_ioctls::Kvm;

/// What a capability is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Need {
    /// Nothing works without it.
    Required,
    /// Something is slower or coarser without it.
    Improves,
    /// Tables of a guest's first-stage translation can be tracked only with it.
    Tracking,
    /// Hypercalls can be answered in the kernel only with it.
    Hybrid,
}

/// A capability of KVM that this crate has a use for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Its name in `linux/kvm.h`.
    pub name: &'static str,
    /// Its number there.
    pub number: u32,
    /// What it is needed for.
    pub need: Need,
    /// Bits that its value must have; with none, any value above 0 will do.
    pub bits: u32,
    /// What it is used for.
    pub purpose: &'static str,
    /// What follows if it is not there.
    pub without: &'static str,
}

impl Capability {
    /// True if `value`, as KVM_CHECK_EXTENSION returns it, is enough.
    pub fn satisfied_by(&self, value: i32) -> bool {
        let bits = self.bits as i32;
        value > 0 && value & bits == bits
    }

    /// Its value on this host: 0 if KVM does not know it, negative if KVM cannot be asked.
    pub fn value(&self, kvm: &Kvm) -> i32 {
        kvm.check_extension_raw(self.number.into())
    }
}

const NO_GUEST: &str = "no guest can run";
const NO_HYBRID: &str = "hypercalls are answered in user space";

/// An entry of [`CAPABILITIES`], without bits.
const fn entry(
    name: &'static str,
    number: u32,
    need: Need,
    purpose: &'static str,
    without: &'static str,
) -> Capability {
    Capability {
        name,
        number,
        need,
        bits: 0,
        purpose,
        without,
    }
}

const fn required(name: &'static str, number: u32, purpose: &'static str) -> Capability {
    entry(name, number, Need::Required, purpose, NO_GUEST)
}

const fn hybrid(name: &'static str, number: u32, purpose: &'static str) -> Capability {
    entry(name, number, Need::Hybrid, purpose, NO_HYBRID)
}

const fn with_bits(capability: Capability, bits: u32) -> Capability {
    Capability { bits, ..capability }
}

/// Every capability that matters here, in the order of docs/spec/kvm.md, section 2.
pub const CAPABILITIES: &[Capability] = &[
    required(
        "KVM_CAP_X86_USER_SPACE_MSR",
        KVM_CAP_X86_USER_SPACE_MSR,
        "synthetic MSRs reach user space",
    ),
    required(
        "KVM_CAP_X86_MSR_FILTER",
        KVM_CAP_X86_MSR_FILTER,
        "synthetic MSRs are taken from KVM",
    ),
    with_bits(
        required(
            "KVM_CAP_SYNC_REGS",
            KVM_CAP_SYNC_REGS,
            "a hypercall needs no register ioctl",
        ),
        KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS,
    ),
    required(
        "KVM_CAP_IMMEDIATE_EXIT",
        KVM_CAP_IMMEDIATE_EXIT,
        "an exit is completed before registers change",
    ),
    required(
        "KVM_CAP_IRQCHIP",
        KVM_CAP_IRQCHIP,
        "local APICs are in the kernel",
    ),
    required(
        "KVM_CAP_SIGNAL_MSI",
        KVM_CAP_SIGNAL_MSI,
        "interrupts of the SynIC and of emulated functions",
    ),
    required("KVM_CAP_IRQFD", KVM_CAP_IRQFD, "interrupts by eventfd"),
    required(
        "KVM_CAP_IOEVENTFD",
        KVM_CAP_IOEVENTFD,
        "doorbells by eventfd",
    ),
    with_bits(
        required(
            "KVM_CAP_X2APIC_API",
            KVM_CAP_X2APIC_API,
            "APIC ids above 255",
        ),
        KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    ),
    entry(
        "KVM_CAP_IRQFD_RESAMPLE",
        KVM_CAP_IRQFD_RESAMPLE,
        Need::Improves,
        "level-triggered interrupts by eventfd",
        "INTx of passed-through functions cannot be used",
    ),
    entry(
        "KVM_CAP_SPLIT_IRQCHIP",
        KVM_CAP_SPLIT_IRQCHIP,
        Need::Improves,
        "a VMM may keep the IO-APIC to itself",
        "only VMMs with KVM's own IO-APIC can embed the library",
    ),
    entry(
        "KVM_CAP_IOEVENTFD_ANY_LENGTH",
        KVM_CAP_IOEVENTFD_ANY_LENGTH,
        Need::Improves,
        "a store of any width rings a doorbell",
        "doorbells are connected for one width, or arrive as MMIO exits",
    ),
    entry(
        "KVM_CAP_TSC_DEADLINE_TIMER",
        KVM_CAP_TSC_DEADLINE_TIMER,
        Need::Improves,
        "guests get the TSC-deadline timer",
        "guests use the APIC timer's counter",
    ),
    entry(
        "KVM_CAP_EXIT_ON_EMULATION_FAILURE",
        KVM_CAP_EXIT_ON_EMULATION_FAILURE,
        Need::Tracking,
        "a store that KVM cannot emulate is completed by user space",
        "such a store to a tracked page kills the guest's process",
    ),
    entry(
        "KVM_CAP_READONLY_MEM",
        KVM_CAP_READONLY_MEM,
        Need::Tracking,
        "stores to page tables are seen before the guest goes on",
        "no shadow domains: passed-through devices need nested translation",
    ),
    entry(
        "KVM_CAP_NR_MEMSLOTS",
        KVM_CAP_NR_MEMSLOTS,
        Need::Tracking,
        "number of memory slots, one or more a tracked table page",
        "the number is not known: few table pages can be tracked",
    ),
    with_bits(
        entry(
            "KVM_CAP_DISABLE_QUIRKS2",
            KVM_CAP_DISABLE_QUIRKS2,
            Need::Tracking,
            "changing a slot leaves KVM's other mappings alone",
            "changing a slot drops all of KVM's mappings of the VM",
        ),
        KVM_X86_QUIRK_SLOT_ZAP_ALL,
    ),
    hybrid(
        "KVM_CAP_HYPERV",
        KVM_CAP_HYPERV,
        "KVM has Hyper-V emulation",
    ),
    hybrid(
        "KVM_CAP_HYPERV_SYNIC2",
        KVM_CAP_HYPERV_SYNIC2,
        "a SynIC in the kernel",
    ),
    hybrid(
        "KVM_CAP_HYPERV_EVENTFD",
        KVM_CAP_HYPERV_EVENTFD,
        "SIGNAL_EVENT rings an eventfd without an exit",
    ),
    hybrid(
        "KVM_CAP_HYPERV_TLBFLUSH",
        KVM_CAP_HYPERV_TLBFLUSH,
        "TLB flush calls in the kernel",
    ),
    hybrid(
        "KVM_CAP_HYPERV_SEND_IPI",
        KVM_CAP_HYPERV_SEND_IPI,
        "IPI calls in the kernel",
    ),
];

/// A capability with its value on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finding {
    /// What was asked for.
    pub capability: &'static Capability,
    /// What KVM_CHECK_EXTENSION returned.
    pub value: i32,
}

impl Finding {
    /// True if the value is enough.
    pub fn satisfied(&self) -> bool {
        self.capability.satisfied_by(self.value)
    }
}

/// Reads the value of every entry of [`CAPABILITIES`].
pub fn survey(kvm: &Kvm) -> Vec<Finding> {
    CAPABILITIES
        .iter()
        .map(|capability| Finding {
            capability,
            value: capability.value(kvm),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_listed_once() {
        for (at, one) in CAPABILITIES.iter().enumerate() {
            for other in &CAPABILITIES[..at] {
                assert_ne!(one.name, other.name);
                assert_ne!(one.number, other.number);
            }
        }
    }

    #[test]
    fn the_numbers_are_those_of_the_specification() {
        for (name, number) in [
            ("KVM_CAP_X86_USER_SPACE_MSR", 188),
            ("KVM_CAP_X86_MSR_FILTER", 189),
            ("KVM_CAP_SYNC_REGS", 74),
            ("KVM_CAP_X2APIC_API", 129),
            ("KVM_CAP_IOEVENTFD_ANY_LENGTH", 122),
            ("KVM_CAP_READONLY_MEM", 81),
            ("KVM_CAP_DISABLE_QUIRKS2", 213),
            ("KVM_CAP_EXIT_ON_EMULATION_FAILURE", 204),
            ("KVM_CAP_HYPERV", 44),
            ("KVM_CAP_HYPERV_SYNIC2", 148),
            ("KVM_CAP_HYPERV_EVENTFD", 154),
            ("KVM_CAP_HYPERV_TLBFLUSH", 155),
            ("KVM_CAP_HYPERV_SEND_IPI", 161),
        ] {
            let found = CAPABILITIES.iter().find(|entry| entry.name == name);
            assert_eq!(found.map(|entry| entry.number), Some(number), "{name}");
        }
    }

    #[test]
    fn a_value_must_have_all_the_bits() {
        let named = |name| {
            CAPABILITIES
                .iter()
                .find(|entry| entry.name == name)
                .unwrap()
        };
        let registers = named("KVM_CAP_SYNC_REGS");
        for (value, enough) in [(7, true), (3, true), (1, false), (0, false), (-1, false)] {
            assert_eq!(registers.satisfied_by(value), enough, "{value}");
        }
        let plain = named("KVM_CAP_SIGNAL_MSI");
        for (value, enough) in [(1, true), (32764, true), (0, false), (-1, false)] {
            assert_eq!(plain.satisfied_by(value), enough, "{value}");
        }
    }
}
