//! HvRetargetDeviceInterrupt (docs/spec/vpci.md, section 7.2).
#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::sync::Arc;

use crate::hv::HvStatus;
use crate::hv::hypercall::{
    INTERRUPT_SOURCE_MSI, PARTITION_SELF, RETARGET_DEVICE_INTERRUPT, RETARGET_MULTICAST,
    RETARGET_PROCESSOR_SET, RetargetInput, VP_SET_SPARSE_4K,
};

use super::{Call, CallFormat, CallGroup, VpSet};

/// Vectors that a device interrupt can have: those below belong to exceptions.
const VECTORS: std::ops::RangeInclusive<u32> = 0x10..=0xff;

/// A request to move a device interrupt, with everything checked that needs no knowledge of the
/// device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetargetInterrupt {
    /// Logical device id as the guest gave it. Its low 32 bits name the device: Linux sign-extends
    /// them (docs/spec/pviommu.md, section 1).
    pub device_id: u64,
    /// Handle of the interrupt: MSI address. Its upper half is zero.
    pub msi_address: u32,
    /// Handle of the interrupt: MSI data.
    pub msi_data: u32,
    /// Vector from now on, 0x10 to 0xFF.
    pub vector: u8,
    /// Deliver to every target instead of one of them.
    pub multicast: bool,
    /// Targets from now on; not empty, and every VP exists.
    pub targets: VpSet,
}

/// Calls about device interrupts. Called on VP threads with the guest's interrupts off: no waiting
/// for a worker.
pub trait InterruptCalls: Send + Sync + Debug {
    /// Moves an interrupt. Effective when this returns: nothing is delivered to the old vector
    /// after that, and nothing is lost in between.
    ///
    /// # Errors
    ///
    /// [`HvStatus::INVALID_DEVICE_ID`] if no device has the id, [`HvStatus::INVALID_PARAMETER`] if
    /// the handle is not one of the device's.
    fn retarget_device_interrupt(&self, request: &RetargetInterrupt) -> Result<(), HvStatus>;
}

/// The [`CallGroup`] of [`InterruptCalls`].
#[derive(Debug)]
pub struct InterruptGroup {
    calls: Arc<dyn InterruptCalls>,
    vp_count: u32,
}

impl InterruptGroup {
    /// Serves the calls with `calls`, in a partition whose VP indices are `0..vp_count`.
    pub fn new(calls: Arc<dyn InterruptCalls>, vp_count: u32) -> Self {
        Self { calls, vp_count }
    }

    fn parse(&self, call: &Call<'_>) -> Result<RetargetInterrupt, HvStatus> {
        let input: RetargetInput = call.header()?;
        if input.partition_id != PARTITION_SELF && !mutant!("retarget-any-partition") {
            return Err(HvStatus::INVALID_PARTITION_ID);
        }
        // Proxy redirection (flag 4) is not offered, hence unknown.
        let unknown_flags = input.flags & !(RETARGET_MULTICAST | RETARGET_PROCESSOR_SET);
        let reserved = u64::from(input.reserved0) | input.reserved1 | u64::from(unknown_flags);
        if input.source != INTERRUPT_SOURCE_MSI
            || (reserved != 0 && !mutant!("retarget-reserved-fields"))
            || (!VECTORS.contains(&input.vector) && !mutant!("retarget-any-vector"))
        {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        let targets = targets(&input, call.variable)
            .filter(|set| set.last().is_some_and(|last| last < self.vp_count))
            .ok_or(HvStatus::INVALID_PARAMETER)?;
        Ok(RetargetInterrupt {
            device_id: input.device_id,
            msi_address: input.msi_address,
            msi_data: input.msi_data,
            vector: input.vector as u8,
            multicast: input.flags & RETARGET_MULTICAST != 0,
            targets,
        })
    }
}

/// The targets, or `None` if the set is malformed.
fn targets(input: &RetargetInput, variable: &[u8]) -> Option<VpSet> {
    if input.flags & RETARGET_PROCESSOR_SET == 0 {
        return variable.is_empty().then(|| VpSet::from_mask(input.target));
    }
    if input.target != VP_SET_SPARSE_4K && !mutant!("retarget-set-format") {
        return None;
    }
    let (chunks, _) = variable.as_chunks::<8>();
    let (valid, banks) = chunks.split_first()?;
    let banks = banks.iter().map(|bank| u64::from_le_bytes(*bank));
    VpSet::from_sparse(u64::from_le_bytes(*valid), banks)
}

impl CallGroup for InterruptGroup {
    fn format(&self, code: u16) -> Option<CallFormat> {
        const RETARGET: CallFormat =
            CallFormat::simple(size_of::<RetargetInput>() as u16).with_variable_header();
        (code == RETARGET_DEVICE_INTERRUPT).then_some(RETARGET)
    }

    fn execute(&self, call: &Call<'_>, _output: &mut [u8]) -> Result<(), HvStatus> {
        self.calls.retarget_device_interrupt(&self.parse(call)?)
    }
}
