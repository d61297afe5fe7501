//! VT-d's first stage, as iommufd takes it.
#![forbid(unsafe_code)]

use iommufd_bindings::{
    iommu_hwpt_data_type_IOMMU_HWPT_DATA_VTD_S1,
    iommu_hwpt_invalidate_data_type_IOMMU_HWPT_INVALIDATE_DATA_VTD_S1, iommu_hwpt_vtd_s1,
    iommu_hwpt_vtd_s1_invalidate,
};

use super::{Driver, InvalidationData, TableData};
use crate::backend::nested::Invalidation;
use crate::mem::PAGE_SIZE;
use crate::pviommu::PageTable;

/// Number of pages that stands for everything, together with the address 0.
const ALL_PAGES: u64 = u64::MAX;

/// VT-d in scalable mode (`include/uapi/linux/iommufd.h`, `iommu_hwpt_vtd_s1`).
#[derive(Debug, Clone, Copy, Default)]
pub struct Vtd;

impl Driver for Vtd {
    /// No flag is set: DMA without a PASID is a user's access, for which neither supervisor requests
    /// (SRE) nor write protection of supervisors (WPE) mean anything, and the pvIOMMU's tables have no
    /// extended accessed bit (EAFE).
    fn table(&self, table: &PageTable) -> TableData {
        let iommu_hwpt_vtd_s1 {
            flags,
            pgtbl_addr,
            addr_width,
            __reserved,
        } = iommu_hwpt_vtd_s1 {
            flags: 0,
            pgtbl_addr: table.root,
            // That of the format. What the guest is told is a bit less.
            addr_width: table.levels.width().into(),
            __reserved: 0,
        };
        let mut data = Vec::with_capacity(size_of::<iommu_hwpt_vtd_s1>());
        data.extend(flags.to_ne_bytes());
        data.extend(pgtbl_addr.to_ne_bytes());
        data.extend(addr_width.to_ne_bytes());
        data.extend(__reserved.to_ne_bytes());
        TableData {
            data_type: iommu_hwpt_data_type_IOMMU_HWPT_DATA_VTD_S1,
            data,
        }
    }

    /// Without the flag for leaves only: the guest frees tables too once its flush has returned. The
    /// kernel invalidates the device's own cache (ATS) with it.
    fn invalidations(&self, entries: &[Invalidation]) -> InvalidationData {
        let entry_len = size_of::<iommu_hwpt_vtd_s1_invalidate>();
        let mut data = Vec::with_capacity(entry_len * entries.len());
        for entry in entries {
            let (addr, npages) = match *entry {
                Invalidation::All => (0, ALL_PAGES),
                Invalidation::Pages { first, shift } => (first * PAGE_SIZE, 1 << shift),
            };
            let iommu_hwpt_vtd_s1_invalidate {
                addr,
                npages,
                flags,
                __reserved,
            } = iommu_hwpt_vtd_s1_invalidate {
                addr,
                npages,
                flags: 0,
                __reserved: 0,
            };
            data.extend(addr.to_ne_bytes());
            data.extend(npages.to_ne_bytes());
            data.extend(flags.to_ne_bytes());
            data.extend(__reserved.to_ne_bytes());
        }
        InvalidationData {
            data_type: iommu_hwpt_invalidate_data_type_IOMMU_HWPT_INVALIDATE_DATA_VTD_S1,
            entry_len: entry_len as u32,
            count: entries.len() as u32,
            data,
        }
    }
}
