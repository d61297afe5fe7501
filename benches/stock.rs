//! The IOMMU of `vm-memory` itself, to compare with: its `IommuMemory` over its `Iotlb`, which holds
//! every mapping, behind the lock that its trait suggests.

use std::sync::{RwLock, RwLockReadGuard};

use vm_memory::iommu::{Error, IotlbIterator, IovaRange};
use vm_memory::{GuestAddress, GuestMemoryMmap, Iommu, IommuMemory, Iotlb, Permissions};

#[derive(Debug)]
pub(crate) struct Stock(RwLock<Iotlb>);

impl Iommu for Stock {
    type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        let iotlb = self.0.read().expect("nobody panicked");
        Iotlb::lookup(iotlb, iova, length, access).map_err(|_| Error::CannotResolve {
            iova_range: IovaRange { base: iova, length },
            reason: "not mapped".into(),
        })
    }
}

/// Memory seen through `pages`: I/O virtual and guest physical address of each.
pub(crate) fn memory(
    map: GuestMemoryMmap,
    pages: impl Iterator<Item = (u64, u64)>,
) -> IommuMemory<GuestMemoryMmap, Stock> {
    let mut iotlb = Iotlb::new();
    for (iova, gpa) in pages {
        let (iova, gpa) = (GuestAddress(iova), GuestAddress(gpa));
        iotlb
            .set_mapping(iova, gpa, 4096, Permissions::ReadWrite)
            .expect("a mapping");
    }
    IommuMemory::new(map, Stock(RwLock::new(iotlb)), true, ())
}
