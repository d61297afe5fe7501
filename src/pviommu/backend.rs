//! How a domain reaches a device.
#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::iotlb::IotlbCounters;
use super::translation::{Attachment, DmaFault, FlushRange, Translation};
use crate::device_id::LogicalDeviceId;

/// The host could not do what a domain asks for. Nothing has changed.
#[derive(Debug, thiserror::Error)]
#[error("the back end refused")]
pub struct BackendError(#[source] pub Box<dyn Error + Send + Sync>);

/// What a back end tells about its device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BackendReport {
    /// Accesses that did not translate since the function was plugged in.
    pub faults: u64,
    /// The last of them.
    pub last_fault: Option<DmaFault>,
    /// Counts of its cache.
    pub iotlb: IotlbCounters,
}

/// Makes one device's DMA obey its domain.
///
/// Called with the pvIOMMU's lock held, on VP threads: each call is bounded work, and calls nothing
/// of the pvIOMMU. The promise of all three: when a call returns, no access that used an older
/// translation of what it covers is under way or can start (docs/spec/pviommu.md#pviommu-6).
pub trait DeviceBackend: Send + Sync + Debug {
    /// Moves the device to a domain, or to a new configuration of its domain.
    ///
    /// # Errors
    ///
    /// [`BackendError`]; nothing has changed then.
    /// [`Translation::Blocked`] is never refused.
    fn attach(&self, to: &Attachment) -> Result<(), BackendError>;

    /// The function is removed. It was reset, cannot master the bus, and is out of the guest's reach, so
    /// that it stays like that. Whoever has the device may plug it in anew: then it is attached again,
    /// before a guest gets at it.
    ///
    /// Where the host cannot tell devices apart, a device that is blocked blocks others. Such a back end
    /// may let this one be where they are, if it has made sure that the device does no DMA. The others
    /// block it.
    fn removed(&self) {
        // Never refused; a back end that cannot do even that tries again.
        let _ = self.attach(&Attachment {
            translation: Translation::Blocked,
            ..Attachment::DEFAULT
        });
    }

    /// False if blocking it now would block others, because the host's IOMMU cannot tell it from them.
    fn is_alone(&self) -> bool {
        true
    }

    /// Forgets translations of some ranges. A back end that cannot blocks the device instead.
    fn flush(&self, ranges: &[FlushRange]);

    /// Forgets all translations.
    fn flush_all(&self);

    /// Counts.
    fn report(&self) -> BackendReport;
}

/// What the software back end ([`crate::dma::DmaPort`]) of a function needs to know.
#[derive(Debug, Clone)]
pub struct PortSettings {
    /// Id of the function, for logs.
    pub(crate) id: LogicalDeviceId,
    /// Entries of its cache.
    pub(crate) iotlb_entries: u32,
    /// Width of a guest physical address.
    pub(crate) physical_bits: u8,
    /// Width of an I/O virtual address as the guest was told it.
    pub(crate) iova_width: u8,
    /// Faults by domain: see [`Attachment::fault_slot`].
    pub(crate) domain_faults: Arc<[AtomicU64]>,
}
