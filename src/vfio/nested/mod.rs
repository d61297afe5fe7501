//! First-stage tables of a guest, nested by iommufd: how [`backend::nested`](crate::backend::nested)
//! reaches the kernel (docs/spec/vfio-rig.md#vfio-rig-6).
//!
//! What an IOMMU's driver wants to be told of a table and of an invalidation is its [`Driver`];
//! how a device is attached is its [`Attachable`]. So the same operations run on VT-d behind a VFIO
//! device and on the kernel's mock device, which has neither.
#![forbid(unsafe_code)]

mod hardware;
mod mover;
mod vtd;

#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

pub use hardware::{CannotNest, capabilities};
pub(super) use mover::{Devices, NestedMover};
pub use vtd::Vtd;

use super::IommuFd;
use crate::backend::nested::{Answer, Host, Invalidation, ObjectId, Operation};
use crate::pviommu::PageTable;

/// Flag of IOMMU_HWPT_ALLOC: others can be nested on the new table.
const NEST_PARENT: u32 = iommufd_bindings::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_NEST_PARENT;

/// What IOMMU_HWPT_ALLOC takes of a first-stage table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableData {
    /// `IOMMU_HWPT_DATA_*`.
    pub data_type: u32,
    /// The structure of that type.
    pub data: Vec<u8>,
}

/// What IOMMU_HWPT_INVALIDATE takes: an array of equal entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidationData {
    /// `IOMMU_HWPT_INVALIDATE_DATA_*`.
    pub data_type: u32,
    /// Bytes of an entry.
    pub entry_len: u32,
    /// Number of entries.
    pub count: u32,
    /// The entries, one behind the other.
    pub data: Vec<u8>,
}

/// What the driver of an IOMMU wants to be told.
pub trait Driver: Send + Sync + Debug {
    /// Of a first-stage table.
    fn table(&self, table: &PageTable) -> TableData;

    /// Of invalidations.
    fn invalidations(&self, entries: &[Invalidation]) -> InvalidationData;
}

impl<D: Driver + ?Sized> Driver for Arc<D> {
    fn table(&self, table: &PageTable) -> TableData {
        (**self).table(table)
    }

    fn invalidations(&self, entries: &[Invalidation]) -> InvalidationData {
        (**self).invalidations(entries)
    }
}

/// A device that is bound to an iommufd.
pub trait Attachable: Send + Sync + Debug {
    /// Its number in the iommufd.
    fn id(&self) -> u32;

    /// Moves its DMA to an address space or table, from wherever it went.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    fn attach(&self, to: ObjectId) -> io::Result<()>;

    /// Blocks its DMA.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    fn detach(&self) -> io::Result<()>;
}

/// Carries operations out on an iommufd, for one of its devices.
#[derive(Debug)]
pub struct IommufdHost<A, D> {
    iommufd: Arc<IommuFd>,
    device: A,
    driver: D,
    /// Address space of all guest RAM, at its GPA.
    ram: ObjectId,
}

impl<A: Attachable, D: Driver> IommufdHost<A, D> {
    /// The host of `device`, which is bound to `iommufd`; `ram` is an address space in it that holds
    /// all guest RAM at its GPA.
    pub fn new(iommufd: Arc<IommuFd>, device: A, driver: D, ram: ObjectId) -> Self {
        Self {
            iommufd,
            device,
            driver,
            ram,
        }
    }

    /// The device.
    pub fn device(&self) -> &A {
        &self.device
    }

    /// The device, for another host.
    pub fn into_device(self) -> A {
        self.device
    }

    fn alloc(&self, below: ObjectId, flags: u32, data: &TableData) -> io::Result<Answer> {
        let TableData { data_type, data } = data;
        let (device, below) = (self.device.id(), below.0);
        let made = self
            .iommufd
            .alloc_hwpt(device, below, flags, *data_type, data)?;
        Ok(Answer::Object(ObjectId(made)))
    }
}

impl<A: Attachable, D: Driver> Host for IommufdHost<A, D> {
    fn execute(&self, operation: &Operation) -> io::Result<Answer> {
        match operation {
            Operation::AllocateParent => {
                let none = TableData {
                    data_type: iommufd_bindings::iommu_hwpt_data_type_IOMMU_HWPT_DATA_NONE,
                    data: Vec::new(),
                };
                self.alloc(self.ram, NEST_PARENT, &none)
            }
            Operation::AllocateNested { parent, table } => {
                self.alloc(*parent, 0, &self.driver.table(table))
            }
            Operation::Attach { to } => self.device.attach(*to).map(|()| Answer::Done),
            Operation::Detach => self.device.detach().map(|()| Answer::Done),
            Operation::Invalidate { table, entries } => {
                let data = self.driver.invalidations(entries);
                let (done, result) = self.iommufd.invalidate(table.0, &data);
                result?;
                if done != data.count {
                    let text = format!("the kernel did {done} of {} invalidations", data.count);
                    return Err(io::Error::other(text));
                }
                Ok(Answer::Done)
            }
            Operation::Destroy { object } => self.iommufd.destroy(object.0).map(|()| Answer::Done),
        }
    }
}
