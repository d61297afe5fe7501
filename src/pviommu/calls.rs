//! The nine device domain hypercalls (docs/spec/pviommu.md#pviommu-2).
//!
//! Every call is answered in place on the VP that made it: no memory is allocated and no worker
//! waited for.
#![forbid(unsafe_code)]

use std::sync::Arc;

use arrayvec::ArrayVec;
use zerocopy::{FromBytes, IntoBytes};

use super::translation::{FlushRange, Levels, PageTable, Translation};
use super::unit::{DomainName, PvIommu};
use crate::device_id::LogicalDeviceId;
use crate::hv::HvStatus;
use crate::hv::hypercall::PARTITION_SELF;
use crate::hv::pviommu as wire;
use crate::hypercall::{Call, CallFormat, CallGroup, RepProgress};
use crate::mem::PAGE_SIZE;

/// Elements of a flush list that are done before pending interrupts are taken.
const BATCH: usize = 64;

/// The [`CallGroup`] of a [`PvIommu`]. A VM without one does not have this group, so that every
/// call of it is unknown.
#[derive(Debug)]
pub struct IommuGroup {
    iommu: Arc<PvIommu>,
}

impl IommuGroup {
    /// Serves the calls with `iommu`.
    pub fn new(iommu: Arc<PvIommu>) -> Self {
        Self { iommu }
    }

    fn create(&self, call: &Call<'_>) -> Result<(), HvStatus> {
        let input: wire::CreateInput = call.header()?;
        let domain = input.domain;
        let number = first_stage(&domain)?;
        wire::CreateFlags::from_bits(input.flags).ok_or(HvStatus::INVALID_PARAMETER)?;
        self.iommu.create(number)
    }

    fn delete(&self, call: &Call<'_>) -> Result<(), HvStatus> {
        let input: wire::DeleteInput = call.header()?;
        self.iommu.delete(first_stage(&input)?)
    }

    fn configure(&self, call: &Call<'_>) -> Result<(), HvStatus> {
        let input: wire::ConfigureInput = call.header()?;
        let number = first_stage(&input.domain)?;
        let invalid = HvStatus::INVALID_PARAMETER;
        let flags = wire::ConfigureFlags::from_bits(input.flags).ok_or(invalid)?;
        let five = flags.contains(wire::ConfigureFlags::FIVE_LEVELS);
        if five && !self.iommu.has_five_levels() {
            return Err(invalid);
        }
        let enabled = flags.contains(wire::ConfigureFlags::TRANSLATION_ENABLED);
        let translation = match (enabled, flags.contains(wire::ConfigureFlags::BLOCKED)) {
            (true, true) => Translation::Blocked,
            (true, false) => Translation::Paged(PageTable {
                root: input.root,
                levels: if five { Levels::Five } else { Levels::Four },
            }),
            (false, false) => Translation::Identity,
            (false, true) if mutant!("configure-blocked-alone") => Translation::Blocked,
            (false, true) => return Err(invalid),
        };
        self.iommu.configure(number, translation)
    }

    fn attach(&self, call: &Call<'_>) -> Result<(), HvStatus> {
        let input: wire::AttachInput = call.header()?;
        let domain = name(&input.domain)?;
        self.iommu.attach(domain, device(input.device_id)?)
    }

    fn detach(&self, call: &Call<'_>) -> Result<(), HvStatus> {
        let input: wire::DetachInput = call.header()?;
        own(input.partition_id)?;
        self.iommu.detach(device(input.device_id)?)
    }

    fn flush(&self, call: &Call<'_>) -> Result<(), HvStatus> {
        let input: wire::FlushInput = call.header()?;
        let domain = name(&input.domain)?;
        if input.flags != 0 || input.reserved != 0 {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        self.iommu.flush(domain)
    }

    fn flush_list(&self, call: &Call<'_>) -> RepProgress {
        let stopped = |status| RepProgress {
            done: 0,
            status: Err(status),
        };
        let domain = match flush_header(call) {
            Ok(domain) => domain,
            Err(status) => return stopped(status),
        };
        let mut ranges = ArrayVec::<FlushRange, BATCH>::new();
        let mut status = Ok(());
        for element in call.elements.as_chunks::<8>().0.iter().take(BATCH) {
            match self.range(wire::FlushElement(u64::from_le_bytes(*element))) {
                Ok(range) => ranges.push(range),
                Err(error) => {
                    status = Err(error);
                    break;
                }
            }
        }
        match self.iommu.flush_ranges(domain, &ranges) {
            Ok(()) => RepProgress {
                done: ranges.len() as u16,
                status,
            },
            Err(status) => stopped(status),
        }
    }

    fn range(&self, element: wire::FlushElement) -> Result<FlushRange, HvStatus> {
        let shift = element.shift();
        if shift > wire::FlushElement::MAX_SHIFT {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        let block = element.page() >> shift << shift;
        let first = mutant!("flush-list-low-bits", element.page(), block);
        let pages = 1 << (u32::from(self.iommu.config().iova_width()) - PAGE_SIZE.ilog2());
        if first >= pages {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        Ok(FlushRange {
            first,
            shift: shift as u8,
        })
    }

    fn capabilities(&self, call: &Call<'_>, output: &mut [u8]) -> Result<(), HvStatus> {
        let input: wire::CapabilitiesInput = call.header()?;
        own(input.partition_id)?;
        if input.reserved != 0 {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        let config = self.iommu.config();
        let mut capabilities = wire::Capabilities::PRESENT | wire::Capabilities::S1;
        capabilities.set(wire::Capabilities::S1_5_LEVEL, config.five_levels);
        let answer = wire::CapabilitiesOutput {
            size: size_of::<wire::CapabilitiesOutput>() as u32,
            reserved: 0,
            max_iova_width: config.iova_width(),
            max_pasid_width: 0,
            capabilities: capabilities.bits(),
            page_sizes: config.page_sizes(),
        };
        put(&answer, output)
    }

    fn property(&self, call: &Call<'_>, output: &mut [u8]) -> Result<(), HvStatus> {
        let input: wire::PropertyInput = call.header()?;
        own(input.partition_id)?;
        if input.reserved != 0 {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        if input.code != wire::PROPERTY_PVIOMMU {
            return Err(HvStatus::UNKNOWN_PROPERTY);
        }
        let behind = self.iommu.is_behind(device(input.device_id)?)?;
        let answer = wire::PropertyOutput {
            value: behind.into(),
            reserved: 0,
        };
        put(&answer, output)
    }
}

/// Places the output of a call.
fn put(answer: &(impl IntoBytes + zerocopy::Immutable), output: &mut [u8]) -> Result<(), HvStatus> {
    answer
        .write_to(output)
        .map_err(|_| HvStatus::INVALID_HYPERCALL_INPUT)
}

fn own(partition_id: u64) -> Result<(), HvStatus> {
    match partition_id {
        PARTITION_SELF => Ok(()),
        _ if mutant!("domain-any-partition") => Ok(()),
        _ => Err(HvStatus::INVALID_PARTITION_ID),
    }
}

/// A domain that a call may attach to or flush.
fn name(domain: &wire::DeviceDomain) -> Result<DomainName, HvStatus> {
    own(domain.partition_id)?;
    // Trust level 0 only, whether or not it is "used".
    let level = domain.owner_vtl & !wire::VTL_USE;
    let id = domain.domain_id;
    let number = (id >> 32) as u32;
    match id & 0xffff_ffff {
        _ if level != 0 || (domain.reserved != [0; 7] && !mutant!("domain-reserved-bytes")) => {
            Err(HvStatus::INVALID_PARAMETER)
        }
        wire::DOMAIN_TYPE_S1 => Ok(DomainName::FirstStage(number)),
        wire::DOMAIN_TYPE_S2 if number == wire::DOMAIN_DEFAULT => Ok(DomainName::Default),
        _ => Err(HvStatus::INVALID_PARAMETER),
    }
}

/// A domain that the guest makes itself.
fn first_stage(domain: &wire::DeviceDomain) -> Result<u32, HvStatus> {
    match name(domain)? {
        DomainName::FirstStage(number) => Ok(number),
        DomainName::Default => Err(HvStatus::INVALID_PARAMETER),
    }
}

fn device(device_id: u64) -> Result<LogicalDeviceId, HvStatus> {
    LogicalDeviceId::from_domain_call(device_id).ok_or(HvStatus::INVALID_DEVICE_ID)
}

fn flush_header(call: &Call<'_>) -> Result<DomainName, HvStatus> {
    let input: wire::FlushInput = call.header()?;
    let domain = name(&input.domain)?;
    if input.flags != wire::FLUSH_IOMMU_FORMAT || input.reserved != 0 {
        return Err(HvStatus::INVALID_PARAMETER);
    }
    Ok(domain)
}

/// The format of a simple call with input `T`.
const fn simple<T: FromBytes>() -> CallFormat {
    CallFormat::simple(size_of::<T>() as u16)
}

impl CallGroup for IommuGroup {
    fn format(&self, code: u16) -> Option<CallFormat> {
        use wire::*;
        Some(match code {
            CREATE_DEVICE_DOMAIN => simple::<CreateInput>(),
            DELETE_DEVICE_DOMAIN => simple::<DeleteInput>(),
            ATTACH_DEVICE_DOMAIN => simple::<AttachInput>(),
            DETACH_DEVICE_DOMAIN => simple::<DetachInput>(),
            CONFIGURE_DEVICE_DOMAIN => simple::<ConfigureInput>(),
            FLUSH_DEVICE_DOMAIN => simple::<FlushInput>(),
            FLUSH_DEVICE_DOMAIN_LIST => {
                simple::<FlushInput>().with_elements(size_of::<FlushElement>() as u16, 0)
            }
            GET_IOMMU_CAPABILITIES => {
                simple::<CapabilitiesInput>().with_output(size_of::<CapabilitiesOutput>() as u16)
            }
            GET_LOGICAL_DEVICE_PROPERTY => {
                simple::<PropertyInput>().with_output(size_of::<PropertyOutput>() as u16)
            }
            _ => return None,
        })
    }

    fn execute(&self, call: &Call<'_>, output: &mut [u8]) -> Result<(), HvStatus> {
        match call.code {
            wire::CREATE_DEVICE_DOMAIN => self.create(call),
            wire::DELETE_DEVICE_DOMAIN => self.delete(call),
            wire::ATTACH_DEVICE_DOMAIN => self.attach(call),
            wire::DETACH_DEVICE_DOMAIN => self.detach(call),
            wire::CONFIGURE_DEVICE_DOMAIN => self.configure(call),
            wire::FLUSH_DEVICE_DOMAIN => self.flush(call),
            wire::GET_IOMMU_CAPABILITIES => self.capabilities(call, output),
            wire::GET_LOGICAL_DEVICE_PROPERTY => self.property(call, output),
            _ => Err(HvStatus::INVALID_HYPERCALL_CODE),
        }
    }

    fn execute_rep(&self, call: &Call<'_>, _output: &mut [u8]) -> RepProgress {
        match call.code {
            wire::FLUSH_DEVICE_DOMAIN_LIST => self.flush_list(call),
            _ => RepProgress {
                done: 0,
                status: Err(HvStatus::INVALID_HYPERCALL_CODE),
            },
        }
    }
}
