//! What the IOMMU behind a device says of itself (IOMMU_GET_HW_INFO).
#![forbid(unsafe_code)]

use std::mem::offset_of;

use iommufd_bindings::{
    iommu_hw_info_type_IOMMU_HW_INFO_TYPE_AMD as TYPE_AMD,
    iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD as TYPE_VTD, iommu_hw_info_vtd,
};

use crate::backend::nested::NestedCapabilities;

/// Bits of VT-d's extended capability register that nesting needs, with their names
/// (`drivers/iommu/intel/iommu.h`, `ecap_*`).
const NEEDED: [(u32, &str); 5] = [
    (43, "scalable mode (SMTS)"),
    (26, "nested translation (NEST)"),
    (47, "first-stage translation (FSTS)"),
    (46, "second-stage translation (SSTS)"),
    // Linux guests do not flush their caches for tables of the pvIOMMU.
    (48, "coherent walks of tables (SMPWC)"),
];
/// Bits of its capability register: walks of 5 levels, and leaves of 1 GiB, in the first stage.
const FIVE_LEVELS: u32 = 60;
const GIGABYTE_PAGES: u32 = 56;
/// The largest address mask of an invalidation, 6 bits of the same register.
const MAX_MASK: u32 = 48;

/// Why first-stage tables cannot be nested on the IOMMU of a device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CannotNest {
    /// An AMD IOMMU.
    #[error("the host's kernel does not nest guests' tables on AMD IOMMUs")]
    Amd,
    /// An IOMMU whose driver tells nothing, or of a kind that is not known here.
    #[error("the host's IOMMU is of type {kind}, which is not one that can be nested on here")]
    Unknown {
        /// `IOMMU_HW_INFO_TYPE_*`; 0 is none.
        kind: u32,
    },
    /// The kernel's answer is too short.
    #[error("the host's kernel says too little of its IOMMU")]
    CutOff,
    /// VT-d hardware that lacks something.
    #[error("the host's VT-d IOMMU lacks {what}")]
    Lacks {
        /// What.
        what: &'static str,
    },
    /// The device was opened by its group.
    #[error("the device was not opened by iommufd (CONFIG_IOMMUFD, CONFIG_VFIO_DEVICE_CDEV)")]
    NoIommufd,
    /// The kernel refused to make tables, or to say what the IOMMU can do.
    #[error("the host's kernel refused to {what}: {error}")]
    Refused {
        /// What it refused.
        what: &'static str,
        /// Its error.
        error: String,
    },
    /// The guest was told addresses that VT-d does not take.
    #[error("the guest was told addresses of {width} bits, one more than VT-d takes")]
    Width {
        /// Bits of an address.
        width: u8,
    },
    /// Nobody asked for it.
    #[error("it is not asked for")]
    NotWanted,
}

/// What an IOMMU can do with first-stage tables, from the answer of IOMMU_GET_HW_INFO: its type, and
/// what it says of itself.
///
/// # Errors
///
/// [`CannotNest`].
pub fn capabilities(kind: u32, data: &[u8]) -> Result<NestedCapabilities, CannotNest> {
    match kind {
        TYPE_VTD => vtd(data),
        TYPE_AMD => Err(CannotNest::Amd),
        _ => Err(CannotNest::Unknown { kind }),
    }
}

fn vtd(data: &[u8]) -> Result<NestedCapabilities, CannotNest> {
    let register = |at: usize| {
        let bytes = data.get(at..)?.first_chunk()?;
        Some(u64::from_ne_bytes(*bytes))
    };
    let registers = (
        register(offset_of!(iommu_hw_info_vtd, cap_reg)),
        register(offset_of!(iommu_hw_info_vtd, ecap_reg)),
    );
    let (Some(cap), Some(ecap)) = registers else {
        return Err(CannotNest::CutOff);
    };
    for (bit, what) in NEEDED {
        if ecap >> bit & 1 == 0 {
            return Err(CannotNest::Lacks { what });
        }
    }
    let has = |bit: u32| cap >> bit & 1 != 0;
    Ok(NestedCapabilities {
        five_levels: has(FIVE_LEVELS),
        gigabyte_pages: has(GIGABYTE_PAGES),
        max_shift: (cap >> MAX_MASK & 0x3f) as u8,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(cap: u64, ecap: u64) -> Vec<u8> {
        // flags, reserved, cap_reg, ecap_reg
        let parts = [1, cap, ecap];
        parts.into_iter().flat_map(u64::to_ne_bytes).collect()
    }

    const ECAP: u64 = 1 << 43 | 1 << 26 | 1 << 47 | 1 << 46 | 1 << 48;

    #[test]
    fn vtd_hardware_tells_what_it_can_do() {
        let found = capabilities(1, &answer(1 << 56 | 18 << 48, ECAP)).unwrap();
        let expected = NestedCapabilities {
            five_levels: false,
            gigabyte_pages: true,
            max_shift: 18,
        };
        assert_eq!(found, expected);
        let found = capabilities(1, &answer(1 << 60, ECAP)).unwrap();
        assert!(found.five_levels && !found.gigabyte_pages);
        assert_eq!(found.max_shift, 0);
    }

    #[test]
    fn what_is_missing_is_named() {
        for (bit, what) in NEEDED {
            let refused = capabilities(1, &answer(u64::MAX, ECAP & !(1 << bit)));
            assert_eq!(refused, Err(CannotNest::Lacks { what }));
        }
        let cut_off = capabilities(1, &answer(0, ECAP)[..23]);
        assert_eq!(cut_off, Err(CannotNest::CutOff));
        assert_eq!(capabilities(4, &[0; 16]), Err(CannotNest::Amd));
        for kind in [0, 2, 0xfeed_beef] {
            let unknown = capabilities(kind, &answer(u64::MAX, u64::MAX));
            assert_eq!(unknown, Err(CannotNest::Unknown { kind }));
        }
    }
}
