//! Are the host's XSAVE leaves fit for a guest?
//!
//! Operating systems check the leaves against each other and against the CPU, and fail with a
//! warning at best. So where they are wrong, a guest is better off without XSAVE.
#![allow(unsafe_code)]

use std::fmt;

use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::cpuid::{ECX_AVX, ECX_XSAVE, FEATURES, XSAVE, find};

/// Control register bit that enables XSETBV.
const CR4_OSXSAVE: u64 = 1 << 18;
/// Components that the probe enables, as far as the host has them: x87, SSE, AVX.
const PROBED_COMPONENTS: u32 = 7;

/// A contradiction between the host's XSAVE leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XsaveFault {
    /// Leaf 1 has XSAVE, but leaf 0xD is missing or lacks the x87 and SSE states.
    NoLeaf,
    /// A state component is announced without a size or offset.
    NoSize {
        /// Number of the component.
        component: u32,
    },
    /// The announced maximum size of the area does not hold all components.
    TooSmall {
        /// Size needed, in bytes.
        needed: u32,
        /// Size announced, in bytes.
        announced: u32,
    },
    /// The AVX feature and the AVX state component do not go together.
    AvxState,
    /// KVM does not notice when the guest sets XCR0, so that its CPUID shows sizes that are not
    /// those in force. Seen with KVM nested on an emulated CPU.
    UnseenXcr0,
}

impl fmt::Display for XsaveFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoLeaf => write!(f, "CPUID 0xD lacks the x87 and SSE states"),
            Self::NoSize { component } => {
                write!(
                    f,
                    "CPUID 0xD announces component {component} without its size"
                )
            }
            Self::TooSmall { needed, announced } => write!(
                f,
                "CPUID 0xD announces an area of {announced} bytes for components of {needed}"
            ),
            Self::UnseenXcr0 => write!(f, "KVM does not see the guest set XCR0"),
            Self::AvxState => write!(f, "CPUID has AVX without its state component"),
        }
    }
}

/// Looks for a reason to withhold XSAVE from guests: first in `host`, the entries of
/// KVM_GET_SUPPORTED_CPUID, then by letting a vCPU of a scratch VM set XCR0.
pub fn find_fault(kvm: &Kvm, host: &[kvm_cpuid_entry2]) -> Option<XsaveFault> {
    let fault = table_fault(host);
    if fault.is_some() || !has_xsave(host) {
        return fault;
    }
    match xcr0_is_seen(kvm, host) {
        Ok(true) => None,
        Ok(false) => Some(XsaveFault::UnseenXcr0),
        Err(error) => {
            log::debug!("XSAVE probe: {error}");
            Some(XsaveFault::UnseenXcr0)
        }
    }
}

fn has_xsave(table: &[kvm_cpuid_entry2]) -> bool {
    find(table, FEATURES, 0).is_some_and(|entry| entry.ecx & ECX_XSAVE != 0)
}

/// Runs XSETBV in a scratch VM and compares what KVM thinks that XCR0 is.
fn xcr0_is_seen(kvm: &Kvm, host: &[kvm_cpuid_entry2]) -> Result<bool, kvm_ioctls::Error> {
    const PAGE: usize = 4096;
    let wanted = find(host, XSAVE, 0).map_or(0, |leaf| leaf.eax) & PROBED_COMPONENTS;
    // 16-bit code: xor ecx, ecx; xor edx, edx; mov eax, wanted; xsetbv; hlt.
    let mut code = vec![0x66, 0x31, 0xc9, 0x66, 0x31, 0xd2, 0x66, 0xb8];
    code.extend(wanted.to_le_bytes());
    code.extend([0x0f, 0x01, 0xd1, 0xf4]);

    let no_memory = |_| kvm_ioctls::Error::last();
    let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), PAGE)]).map_err(no_memory)?;
    ram.write_slice(&code, GuestAddress(0))
        .map_err(|_| kvm_ioctls::Error::last())?;
    let address = ram
        .get_host_address(GuestAddress(0))
        .map_err(|_| kvm_ioctls::Error::last())?;
    let vm = kvm.create_vm()?;
    let slot = kvm_userspace_memory_region {
        memory_size: PAGE as u64,
        userspace_addr: address as u64,
        ..Default::default()
    };
    // SAFETY: the slot is one page of `ram`, which outlives the vCPU below.
    unsafe { vm.set_user_memory_region(slot)? };
    let mut vcpu = vm.create_vcpu(0)?;
    if let Ok(table) = CpuId::from_entries(host) {
        vcpu.set_cpuid2(&table)?;
    }
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    sregs.cr4 |= CR4_OSXSAVE;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = 0;
    vcpu.set_regs(&regs)?;
    let halted = matches!(vcpu.run()?, VcpuExit::Hlt);
    let xcrs = vcpu.get_xcrs()?;
    let seen = xcrs.nr_xcrs > 0 && xcrs.xcrs[0].xcr == 0 && xcrs.xcrs[0].value == u64::from(wanted);
    Ok(halted && seen)
}

/// Looks for contradictions in the XSAVE leaves: those that Linux checks for when it sets up its
/// XSAVE buffers (kernel: arch/x86/kernel/fpu/xstate.c).
fn table_fault(table: &[kvm_cpuid_entry2]) -> Option<XsaveFault> {
    const LEGACY_AND_HEADER: u32 = 576;
    let ecx = find(table, FEATURES, 0)?.ecx;
    if ecx & ECX_XSAVE == 0 {
        return None;
    }
    let Some(leaf) = find(table, XSAVE, 0).filter(|leaf| leaf.eax & 3 == 3) else {
        return Some(XsaveFault::NoLeaf);
    };
    if (ecx & ECX_AVX != 0) != (leaf.eax & 4 != 0) {
        return Some(XsaveFault::AvxState);
    }
    let components = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
    let mut needed = LEGACY_AND_HEADER;
    for component in (2..63).filter(|bit| components & (1 << bit) != 0) {
        match find(table, XSAVE, component) {
            Some(entry) if entry.eax != 0 && entry.ebx >= LEGACY_AND_HEADER => {
                needed = needed.max(entry.ebx.saturating_add(entry.eax));
            }
            _ => return Some(XsaveFault::NoSize { component }),
        }
    }
    (needed > leaf.ecx).then_some(XsaveFault::TooSmall {
        needed,
        announced: leaf.ecx,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = regs;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    /// XSAVE with AVX, as a real host has it.
    fn host() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(1, 0, [0, 0, ECX_XSAVE | ECX_AVX, 0]),
            entry(0xd, 0, [7, 832, 832, 0]),
            entry(0xd, 1, [1, 832, 0, 0]),
            entry(0xd, 2, [256, 576, 0, 0]),
        ]
    }

    #[test]
    fn a_consistent_host_keeps_xsave() {
        assert_eq!(table_fault(&host()), None);
        let mut none = host();
        none[0].ecx &= !ECX_XSAVE;
        assert_eq!(table_fault(&none), None);
        assert_eq!(table_fault(&[]), None);
    }

    #[test]
    fn contradictions_between_the_xsave_leaves_are_found() {
        let with = |change: &dyn Fn(&mut Vec<kvm_cpuid_entry2>)| {
            let mut table = host();
            change(&mut table);
            table_fault(&table)
        };
        let at = |table: &[kvm_cpuid_entry2], index| {
            let find = |e: &kvm_cpuid_entry2| e.function == 0xd && e.index == index;
            table.iter().position(find).unwrap()
        };
        let fault = with(&|t| t.retain(|e| e.function != 0xd));
        assert_eq!(fault, Some(XsaveFault::NoLeaf));
        let fault = with(&|t| t.retain(|e| e.function != 0xd || e.index != 2));
        assert_eq!(fault, Some(XsaveFault::NoSize { component: 2 }));
        let fault = with(&|t| {
            let leaf = at(t, 0);
            t[leaf].ecx = 576;
        });
        let too_small = XsaveFault::TooSmall {
            needed: 832,
            announced: 576,
        };
        assert_eq!(fault, Some(too_small));
        let fault = with(&|t| {
            let leaf = at(t, 0);
            t[leaf].eax = 3;
        });
        assert_eq!(fault, Some(XsaveFault::AvxState));
        let fault = with(&|t| {
            let leaf = at(t, 2);
            (t[leaf].eax, t[leaf].ebx) = (u32::MAX, u32::MAX);
        });
        assert!(matches!(fault, Some(XsaveFault::TooSmall { .. })));
    }

    #[test]
    fn the_probe_comes_to_a_result_on_any_kvm() {
        let Ok(kvm) = Kvm::new() else {
            println!("SKIPPED the_probe_comes_to_a_result_on_any_kvm: no /dev/kvm");
            return;
        };
        let host = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .unwrap();
        let fault = find_fault(&kvm, host.as_slice());
        assert_eq!(fault, find_fault(&kvm, host.as_slice()));
    }
}
