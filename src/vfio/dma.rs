//! The DMA of a passed-through function: its host device obeys the domain that the guest chose.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::carry::{Carrier, Carry, Nesting};
use super::check::Interface;
use super::device::VfioDevice;
use super::error::VfioError;
use super::group::{AnyUnit, Group};
use super::host::VfioHost;
use super::nested::CannotNest;
use super::unit::{Unit, UnitError};
use crate::pviommu::{
    Attachment, BackendError, BackendReport, DeviceBackend, FlushRange, Translation,
};

/// Makes a device of the host obey a domain, until it is dropped; then its DMA is blocked.
///
/// The device is in the default domain at first. Its IOMMU does not tell this process of faults, so
/// none are reported.
///
/// Lock order: that of the device's group, held while devices of the group move or are flushed; then
/// those of what follows a table, then the books of an address space.
#[derive(Debug)]
pub struct VfioDma {
    device: Arc<VfioDevice>,
}

impl VfioDma {
    /// Puts a device into the default domain: all guest RAM, at its guest physical addresses.
    ///
    /// `carry` says what may carry first-stage domains. The devices of a group share what the first of
    /// them was given.
    ///
    /// # Errors
    ///
    /// [`VfioError`]: guest RAM cannot be mapped or locked, or other devices of the group are in
    /// another domain.
    pub fn new(
        host: &VfioHost,
        device: Arc<VfioDevice>,
        carry: impl Into<Carry>,
    ) -> Result<Arc<Self>, VfioError> {
        let group = device.group_handle().clone();
        let mut unit = group.unit();
        let joined = join(host, &group, &mut unit, &device, &carry.into());
        if joined.is_err() {
            group.forget(device.member());
            unit.take_if(|any| any.unit.is_empty());
        }
        drop(unit);
        joined.map(|()| Arc::new(Self { device }))
    }

    /// What carries its first-stage domains.
    pub fn carrier(&self) -> Carrier {
        match &*self.device.group_handle().unit() {
            Some(any) => any.carrier.clone(),
            None => Carrier::Nothing(CannotNest::NotWanted),
        }
    }

    /// The device.
    pub fn device(&self) -> &Arc<VfioDevice> {
        &self.device
    }
}

/// Puts a device into its group's unit, and makes that if it is the first.
fn join(
    host: &VfioHost,
    group: &Group,
    unit: &mut Option<AnyUnit>,
    device: &VfioDevice,
    carry: &Carry,
) -> Result<(), VfioError> {
    let address = device.address();
    let member = device.member();
    let host_error = |error| VfioError::Host {
        address: address.into(),
        what: "asking what its IOMMU can map",
        error,
    };
    group.admit(member, device.file()).map_err(host_error)?;
    let any = match unit {
        Some(any) => any,
        none => {
            let nestable = carry.nestable(|| group.nested_capabilities(member));
            if carry.nesting == Nesting::Required
                && let Err(why) = nestable
            {
                return Err(cannot_nest(address, why));
            }
            let copies = match group.interface() {
                // What a container maps for a domain takes the place of all guest RAM.
                Interface::Type1 | Interface::Auto => 1,
                // All share one copy; a unit that leaves it needs one of its own.
                // Nested tables need none.
                Interface::Iommufd => (nestable.is_err() && carry.shadow.is_some()).into(),
            };
            let mut locked = host.lock_ram(copies)?;
            let limits = group.limits(device.file()).map_err(host_error)?;
            host.check_reach(address, &limits)?;
            let mover = group.mover(member, limits, carry, nestable);
            let (mover, carrier) = mover.map_err(|error| VfioError::Space {
                address: address.into(),
                error,
            })?;
            match &carrier {
                Carrier::Nothing(why) | Carrier::Shadow(why)
                    if carry.nesting == Nesting::Required =>
                {
                    return Err(cannot_nest(address, why.clone()));
                }
                Carrier::Shadow(_) if copies == 0 => locked = host.lock_ram(1)?,
                _ => {}
            }
            none.insert(AnyUnit {
                unit: Unit::new(group.id(), mover),
                carrier,
                _locked: locked,
            })
        }
    };
    let joined = any.unit.join(member, address);
    joined.map_err(|error| match error {
        UnitError::OtherDomain(error) => error,
        UnitError::Refused { error, .. } => VfioError::Move {
            address: address.into(),
            error: error.to_string(),
        },
    })
}

fn cannot_nest(address: &str, why: CannotNest) -> VfioError {
    VfioError::CannotNest {
        address: address.into(),
        why,
    }
}

impl DeviceBackend for VfioDma {
    fn attach(&self, to: &Attachment) -> Result<(), BackendError> {
        let mut unit = self.device.group_handle().unit();
        match &mut *unit {
            Some(any) => any
                .unit
                .attach(self.device.member(), to)
                .map_err(|error| BackendError(Box::new(error))),
            None => Ok(()),
        }
    }

    fn removed(&self) {
        let device = &self.device;
        // By type1 what the others of the group reach stays in reach of this one. So that it was reset
        // and is out of the guest's reach is not enough: the host may have refused both.
        if device.may_master() {
            log::warn!(
                "{} may still do DMA: it is blocked until it is let go of, and its group with it",
                device.address()
            );
            let blocked = Attachment {
                translation: Translation::Blocked,
                ..Attachment::DEFAULT
            };
            // Never refused; what failed is tried again ahead of whatever comes next.
            let _ = self.attach(&blocked);
        } else if let Some(any) = &mut *device.group_handle().unit() {
            any.unit.put_out(device.member());
        }
    }

    fn is_alone(&self) -> bool {
        let unit = self.device.group_handle().unit();
        unit.as_ref()
            .is_none_or(|any| any.unit.is_alone(self.device.member()))
    }

    fn flush(&self, ranges: &[FlushRange]) {
        if let Some(any) = &mut *self.device.group_handle().unit() {
            any.unit.flush(ranges);
        }
    }

    fn flush_all(&self) {
        if let Some(any) = &mut *self.device.group_handle().unit() {
            any.unit.flush_all();
        }
    }

    fn report(&self) -> BackendReport {
        BackendReport::default()
    }
}

impl Drop for VfioDma {
    fn drop(&mut self) {
        let group = self.device.group_handle();
        let mut unit = group.unit();
        if let Some(any) = &mut *unit {
            any.unit.leave(self.device.member());
        }
        unit.take_if(|any| any.unit.is_empty());
        group.forget(self.device.member());
    }
}
