//! The guest's CPUID table: what KVM supports, without its paravirtual interface, with the Hyper-V
//! leaves, and with this vCPU's place in the topology.
//!
//! Pure functions over entries; nothing here asks the host.
#![forbid(unsafe_code)]

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::cpuid::CpuidLeaf;

/// Leaves with features, and the XSAVE leaf.
pub(super) const FEATURES: u32 = 1;
const DETERMINISTIC_CACHE: u32 = 4;
const EXTENDED_FEATURES: u32 = 7;
const EXTENDED_TOPOLOGY: u32 = 0xb;
pub(super) const XSAVE: u32 = 0xd;
const EXTENDED_TOPOLOGY_V2: u32 = 0x1f;
const AMD_FEATURES: u32 = 0x8000_0001;
const POWER_MANAGEMENT: u32 = 0x8000_0007;
const ADDRESS_SIZES: u32 = 0x8000_0008;
const AMD_CACHE: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

/// Bits of leaf 1.
const ECX_FMA: u32 = 1 << 12;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
pub(super) const ECX_XSAVE: u32 = 1 << 26;
const ECX_OSXSAVE: u32 = 1 << 27;
pub(super) const ECX_AVX: u32 = 1 << 28;
const ECX_F16C: u32 = 1 << 29;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
/// Bit of EDX of leaf 0x80000007.
const INVARIANT_TSC: u32 = 1 << 8;

/// A vCPU's place: one package of `count` cores with one thread each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VcpuPlace {
    /// APIC id, below `count` rounded up to a power of two.
    pub apic_id: u32,
    /// Number of vCPUs, at least 1.
    pub count: u32,
}

/// What differs from VM to VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidOptions {
    /// Offer the TSC-deadline timer ([`super::HostSupport::tsc_deadline`]): KVM leaves it out of
    /// its own table, as it depends on the in-kernel local APIC.
    pub tsc_deadline: bool,
    /// Say that the TSC is invariant. Must agree with [`crate::cpuid::Features::tsc_invariant`]:
    /// the bit is there from the start, and KVM hides it itself where it emulates
    /// TSC_INVARIANT_CONTROL (docs/spec/kvm.md, section 4).
    pub tsc_invariant: bool,
    /// Offer XSAVE and what depends on it. Off where [`super::xsave::find_fault`] found something.
    pub xsave: bool,
}

/// The table of one vCPU from `host`, the entries of KVM_GET_SUPPORTED_CPUID, and `hyperv`, the
/// leaves of the partition.
pub fn guest_cpuid(
    host: &[kvm_cpuid_entry2],
    hyperv: &[CpuidLeaf],
    place: VcpuPlace,
    options: CpuidOptions,
) -> Vec<kvm_cpuid_entry2> {
    // KVM's own leaves, whatever their base, must not be seen: Linux would prefer them.
    let mut table: Vec<_> = host
        .iter()
        .copied()
        .filter(|entry| !(0x4000_0000..0x5000_0000).contains(&entry.function))
        .collect();
    if !options.xsave {
        mask_xsave(&mut table);
    }
    for entry in &mut table {
        set_features(entry, place, options);
    }
    set_topology(&mut table, place);
    table.extend(hyperv.iter().map(|leaf| kvm_cpuid_entry2 {
        function: leaf.function,
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
        ..Default::default()
    }));
    table
}

/// Physical address width of the guest in bits: 36 where the host does not say.
pub fn physical_address_bits(host: &[kvm_cpuid_entry2]) -> u8 {
    find(host, ADDRESS_SIZES, 0).map_or(36, |entry| entry.eax as u8)
}

/// True if KVM says that the host's TSC is invariant.
pub fn host_tsc_is_invariant(host: &[kvm_cpuid_entry2]) -> bool {
    find(host, POWER_MANAGEMENT, 0).is_some_and(|entry| entry.edx & INVARIANT_TSC != 0)
}

pub(super) fn find(
    table: &[kvm_cpuid_entry2],
    function: u32,
    index: u32,
) -> Option<&kvm_cpuid_entry2> {
    table
        .iter()
        .find(|entry| entry.function == function && entry.index == index)
}

fn set_features(entry: &mut kvm_cpuid_entry2, place: VcpuPlace, options: CpuidOptions) {
    let set =
        |word: &mut u32, bit: u32, on: bool| *word = if on { *word | bit } else { *word & !bit };
    match entry.function {
        FEATURES => {
            // CLFLUSH line size stays; brand index is 0 anyway.
            entry.ebx = (entry.ebx & 0xffff) | (place.count.min(255) << 16) | (place.apic_id << 24);
            entry.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
            set(&mut entry.ecx, ECX_TSC_DEADLINE, options.tsc_deadline);
            set(&mut entry.edx, EDX_HTT, place.count > 1);
        }
        POWER_MANAGEMENT => set(&mut entry.edx, INVARIANT_TSC, options.tsc_invariant),
        _ => {}
    }
}

/// Bits of the APIC id that tell cores apart.
fn core_bits(place: VcpuPlace) -> u32 {
    place.count.max(1).next_power_of_two().trailing_zeros()
}

fn set_topology(table: &mut Vec<kvm_cpuid_entry2>, place: VcpuPlace) {
    // The newer forms describe the host; without them every system falls back to the older ones.
    table.retain(|entry| {
        ![EXTENDED_TOPOLOGY, EXTENDED_TOPOLOGY_V2, AMD_TOPOLOGY_V2].contains(&entry.function)
    });
    let bits = core_bits(place);
    let last = (1 << bits) - 1;
    for entry in table.iter_mut() {
        match entry.function {
            DETERMINISTIC_CACHE if entry.eax & 0x1f != 0 => {
                let shared = cache_sharers(entry.eax, last);
                entry.eax = (entry.eax & 0x3fff) | shared << 14 | last.min(63) << 26;
            }
            AMD_CACHE if entry.eax & 0x1f != 0 => {
                entry.eax = (entry.eax & 0x3fff) | cache_sharers(entry.eax, last) << 14;
            }
            ADDRESS_SIZES => {
                entry.ecx = (entry.ecx & !0xf0ff) | bits << 12 | (place.count - 1).min(255);
            }
            AMD_TOPOLOGY => {
                entry.eax = place.apic_id;
                entry.ebx = place.apic_id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    // Threads, cores, end of list; only where the host's CPU goes that far.
    let has_leaf = find(table, 0, 0).is_some_and(|entry| entry.eax >= EXTENDED_TOPOLOGY);
    if has_leaf {
        let levels = [(0, 1, 1), (bits, place.count, 2), (0, 0, 0)];
        table.extend(
            (0u32..)
                .zip(levels)
                .map(|(index, (shift, count, kind))| kvm_cpuid_entry2 {
                    function: EXTENDED_TOPOLOGY,
                    index,
                    flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                    eax: shift,
                    ebx: count,
                    ecx: kind << 8 | index,
                    edx: place.apic_id,
                    ..Default::default()
                }),
        );
    }
}

/// Logical processors that share a cache, less one: all of them for level 3, else one.
fn cache_sharers(eax: u32, last: u32) -> u32 {
    if (eax >> 5) & 7 >= 3 {
        last.min(0xfff)
    } else {
        0
    }
}

/// Takes XSAVE away, and everything that depends on it.
fn mask_xsave(table: &mut Vec<kvm_cpuid_entry2>) {
    table.retain(|entry| entry.function != XSAVE);
    for entry in table {
        match (entry.function, entry.index) {
            (FEATURES, _) => {
                entry.ecx &= !(ECX_XSAVE | ECX_OSXSAVE | ECX_AVX | ECX_FMA | ECX_F16C);
            }
            (EXTENDED_FEATURES, 0) => {
                // AVX2; MPX; all of AVX-512; PKU, VAES, VPCLMULQDQ and AVX-512 again; AMX.
                const EBX: u32 = 1 << 5 | 1 << 14 | 0xdc23_0000;
                entry.ebx &= !EBX;
                entry.ecx &=
                    !(1 << 1 | 1 << 3 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 14);
                entry.edx &= !(1 << 2 | 1 << 3 | 1 << 8 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 25);
            }
            (EXTENDED_FEATURES, 1) => {
                // AVX-VNNI, AVX512_BF16, AVX-IFMA, and the EDX AVX extensions.
                entry.eax &= !(1 << 4 | 1 << 5 | 1 << 23);
                entry.edx = 0;
            }
            // XOP and FMA4.
            (AMD_FEATURES, _) => entry.ecx &= !(1 << 11 | 1 << 16),
            _ => {}
        }
    }
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

    /// A host with XSAVE, AVX and AVX2, in the form of a real one.
    fn host() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0, 0, [0xd, 0, 0, 0]),
            entry(
                1,
                0,
                [
                    0x800f12,
                    0x0502_0800,
                    ECX_XSAVE | ECX_AVX | ECX_FMA | 1,
                    EDX_HTT | 1,
                ],
            ),
            entry(4, 0, [0x1c00_4121, 0, 0, 0]),
            entry(4, 3, [0x1c00_4163, 0, 0, 0]),
            entry(7, 0, [0, 1 << 5 | 1 << 3, 0, 0]),
            entry(0xb, 0, [1, 2, 0x100, 5]),
            entry(0xd, 0, [7, 832, 832, 0]),
            entry(0xd, 1, [1, 832, 0, 0]),
            entry(0xd, 2, [256, 576, 0, 0]),
            entry(
                0x4000_0000,
                0,
                [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
            ),
            entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
            entry(0x8000_0007, 0, [0, 0, 0, 0]),
            entry(0x8000_0008, 0, [0x3028, 0, 0x7007, 0]),
            entry(0x8000_001d, 3, [0x1c163, 0, 0, 0]),
            entry(0x8000_001e, 0, [5, 0x102, 0x300, 0]),
        ]
    }

    const HYPERV: [CpuidLeaf; 1] = [CpuidLeaf {
        function: 0x4000_0000,
        eax: 0x4000_0082,
        ebx: 1,
        ecx: 2,
        edx: 3,
    }];

    fn guest(apic_id: u32, count: u32) -> Vec<kvm_cpuid_entry2> {
        let options = CpuidOptions {
            tsc_deadline: true,
            tsc_invariant: true,
            xsave: true,
        };
        guest_cpuid(&host(), &HYPERV, VcpuPlace { apic_id, count }, options)
    }

    fn leaf(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let found = find(table, function, index).expect("leaf");
        [found.eax, found.ebx, found.ecx, found.edx]
    }

    #[test]
    fn kvm_disappears_behind_the_hyperv_leaves() {
        let table = guest(0, 1);
        assert_eq!(leaf(&table, 0x4000_0000, 0), [0x4000_0082, 1, 2, 3]);
        assert!(find(&table, 0x4000_0001, 0).is_none());
        assert_ne!(leaf(&table, 1, 0)[2] & ECX_HYPERVISOR, 0);
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_in_every_leaf_that_shows_one() {
        let table = guest(2, 3);
        assert_eq!(leaf(&table, 1, 0)[1], 0x0203_0800);
        for index in 0..3 {
            assert_eq!(leaf(&table, 0xb, index)[3], 2);
        }
        assert_eq!(leaf(&table, 0xb, 0)[..3], [0, 1, 0x100]);
        assert_eq!(leaf(&table, 0xb, 1)[..3], [2, 3, 0x201]);
        assert_eq!(leaf(&table, 0xb, 2)[..3], [0, 0, 2]);
        assert_eq!(leaf(&table, 0x8000_001e, 0), [2, 2, 0, 0]);
        assert_eq!(leaf(&table, 0x8000_0008, 0)[2], 0x2002);
    }

    #[test]
    fn caches_of_level_three_are_shared_and_others_are_not() {
        let table = guest(0, 4);
        assert_eq!(leaf(&table, 4, 0)[0], 3 << 26 | 0x121);
        assert_eq!(leaf(&table, 4, 3)[0], 3 << 26 | 3 << 14 | 0x163);
        assert_eq!(leaf(&table, 0x8000_001d, 3)[0], 3 << 14 | 0x163);
    }

    #[test]
    fn a_single_vcpu_has_no_neighbours() {
        let table = guest(0, 1);
        assert_eq!(leaf(&table, 1, 0)[3] & EDX_HTT, 0);
        assert_eq!(leaf(&table, 0xb, 1)[..2], [0, 1]);
        assert_eq!(leaf(&table, 4, 3)[0], 0x163);
        assert_eq!(leaf(&table, 0x8000_0008, 0)[2], 0);
    }

    #[test]
    fn timers_are_offered_as_asked() {
        let table = guest(0, 1);
        assert_ne!(leaf(&table, 1, 0)[2] & ECX_TSC_DEADLINE, 0);
        assert_eq!(leaf(&table, 0x8000_0007, 0)[3], INVARIANT_TSC);
        let place = VcpuPlace {
            apic_id: 0,
            count: 1,
        };
        let options = CpuidOptions {
            tsc_deadline: false,
            tsc_invariant: false,
            xsave: true,
        };
        let table = guest_cpuid(&table, &HYPERV, place, options);
        assert_eq!(leaf(&table, 1, 0)[2] & ECX_TSC_DEADLINE, 0);
        assert_eq!(leaf(&table, 0x8000_0007, 0)[3], 0);
    }

    #[test]
    fn masking_takes_everything_that_needs_xsave() {
        let place = VcpuPlace {
            apic_id: 0,
            count: 1,
        };
        let options = CpuidOptions {
            tsc_deadline: true,
            tsc_invariant: true,
            xsave: false,
        };
        let table = guest_cpuid(&host(), &HYPERV, place, options);
        assert!(find(&table, 0xd, 0).is_none());
        let gone = ECX_XSAVE | ECX_OSXSAVE | ECX_AVX | ECX_FMA | ECX_F16C;
        assert_eq!(leaf(&table, 1, 0)[2] & gone, 0);
        assert_eq!(leaf(&table, 7, 0)[1], 1 << 3, "BMI1 stays, AVX2 goes");
        assert_ne!(leaf(&guest(0, 1), 1, 0)[2] & ECX_XSAVE, 0);
    }

    #[test]
    fn widths_and_clocks_are_read_from_the_host() {
        assert_eq!(physical_address_bits(&host()), 0x28);
        assert_eq!(physical_address_bits(&[]), 36);
        assert!(!host_tsc_is_invariant(&host()));
        assert!(host_tsc_is_invariant(&guest(0, 1)));
    }
}
