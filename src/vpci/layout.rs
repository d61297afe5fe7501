//! Checks of what a device says about itself.
#![forbid(unsafe_code)]

use super::function::{BAR_COUNT, BarSpec, FunctionLayout, MsixSpec};
use crate::mem::PAGE_SIZE;

/// Why a function cannot be on a bus: a mistake of the device's author.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Vendor id 0xFFFF says that there is no function.
    #[error("vendor id 0xffff is not a function")]
    NoVendor,
    /// A BAR's size is no power of two, or less than a page.
    #[error("size of BAR {bar} is not a power of two of at least a page")]
    BarSize {
        /// BAR index.
        bar: u8,
    },
    /// A 64-bit BAR is not followed by an unused register.
    #[error("64-bit BAR {bar} leaves no register for its upper half")]
    BarUpperHalf {
        /// BAR index.
        bar: u8,
    },
    /// A capability's mask is not as long as its body.
    #[error("capability {id:#04x} has a mask of another length than its body")]
    CapabilityMask {
        /// Capability id.
        id: u8,
    },
    /// The capabilities do not fit in 256 bytes of configuration space.
    #[error("the capabilities do not fit in the configuration space")]
    CapabilitiesTooLong,
    /// The capability list holds MSI or MSI-X, which the bus makes itself.
    #[error("capability {id:#04x} is made by the bus")]
    ReservedCapability {
        /// Capability id.
        id: u8,
    },
    /// MSI-X has no vector, more than 2048, or its structures are misaligned, overlap, or lie
    /// outside their BAR.
    #[error("the MSI-X structures are not inside their BARs")]
    Msix,
    /// MSI messages are not 1, 2, 4, 8, 16 or 32.
    #[error("the number of MSI messages is not a power of two of at most 32")]
    Msi,
    /// Memory of a BAR that is to be mapped into the guest is not whole pages inside the BAR, or overlaps.
    #[error("memory at BAR {bar} offset {offset:#x} is not whole pages of the BAR")]
    Area {
        /// BAR index.
        bar: u8,
        /// Offset in the BAR.
        offset: u64,
    },
    /// A doorbell lies outside its BAR, or has a bad width.
    #[error("doorbell at BAR {bar} offset {offset:#x} is not a register")]
    Doorbell {
        /// BAR index.
        bar: u8,
        /// Offset in the BAR.
        offset: u64,
    },
}

impl BarSpec {
    /// Size in bytes, 0 when not implemented.
    pub fn size(self) -> u64 {
        match self {
            Self::None => 0,
            Self::Memory32 { size } => u64::from(size),
            Self::Memory64 { size, .. } => size,
        }
    }
}

impl MsixSpec {
    /// Bytes of the table.
    pub(crate) fn table_len(&self) -> u64 {
        u64::from(self.vectors) * 16
    }

    /// Bytes of the pending bit array, whole 64-bit words.
    pub(crate) fn pba_len(&self) -> u64 {
        u64::from(self.vectors).div_ceil(64) * 8
    }
}

/// Checks a layout.
pub(crate) fn validate(layout: &FunctionLayout) -> Result<(), LayoutError> {
    if layout.identity.vendor == 0xffff {
        return Err(LayoutError::NoVendor);
    }
    for (index, spec) in layout.bars.iter().enumerate() {
        let bar = index as u8;
        let size = spec.size();
        if *spec != BarSpec::None && (!size.is_power_of_two() || size < PAGE_SIZE) {
            return Err(LayoutError::BarSize { bar });
        }
        let upper_half_free =
            index + 1 < BAR_COUNT && matches!(layout.bars[index + 1], BarSpec::None);
        if matches!(spec, BarSpec::Memory64 { .. }) && !upper_half_free {
            return Err(LayoutError::BarUpperHalf { bar });
        }
    }
    for capability in &layout.capabilities {
        let id = capability.id;
        if matches!(id, 0x05 | 0x11) {
            return Err(LayoutError::ReservedCapability { id });
        }
        if capability.body.len() != capability.writable.len() {
            return Err(LayoutError::CapabilityMask { id });
        }
    }
    if let Some(msix) = &layout.msix {
        validate_msix(layout, msix)?;
    }
    match layout.msi {
        Some(msi) if !msi.messages.is_power_of_two() || msi.messages > 32 => Err(LayoutError::Msi),
        _ => Ok(()),
    }
}

fn validate_msix(layout: &FunctionLayout, msix: &MsixSpec) -> Result<(), LayoutError> {
    let inside = |bar: u8, offset: u32, len: u64| {
        let size = layout.bars.get(usize::from(bar)).map_or(0, |b| b.size());
        offset.is_multiple_of(8) && u64::from(offset) + len <= size
    };
    let (table, pba) = (u64::from(msix.table_offset), u64::from(msix.pba_offset));
    let overlap = msix.table_bar == msix.pba_bar
        && table < pba + msix.pba_len()
        && pba < table + msix.table_len();
    if !(1..=2048).contains(&msix.vectors)
        || !inside(msix.table_bar, msix.table_offset, msix.table_len())
        || !inside(msix.pba_bar, msix.pba_offset, msix.pba_len())
        || overlap
    {
        return Err(LayoutError::Msix);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::function::{Capability, MsiSpec};
    use super::*;

    fn good() -> FunctionLayout {
        let mut layout = FunctionLayout::default();
        layout.bars[0] = BarSpec::Memory64 {
            size: 0x4000,
            prefetchable: false,
        };
        layout.bars[2] = BarSpec::Memory32 { size: 0x1000 };
        layout.msix = Some(MsixSpec {
            vectors: 65,
            table_bar: 0,
            table_offset: 0x2000,
            pba_bar: 0,
            pba_offset: 0x3000,
        });
        layout.msi = Some(MsiSpec { messages: 32 });
        layout
    }

    fn broken(change: impl FnOnce(&mut FunctionLayout)) -> LayoutError {
        let mut layout = good();
        change(&mut layout);
        validate(&layout).unwrap_err()
    }

    #[test]
    fn a_good_layout_passes() {
        validate(&good()).unwrap();
    }

    #[test]
    fn bars_are_powers_of_two_of_at_least_a_page_with_room_for_their_upper_half() {
        for size in [0, 0x800, 0x1800] {
            let error = broken(|l| l.bars[2] = BarSpec::Memory32 { size });
            assert_eq!(error, LayoutError::BarSize { bar: 2 });
        }
        let wide = BarSpec::Memory64 {
            size: 0x1000,
            prefetchable: true,
        };
        assert_eq!(
            broken(|l| l.bars[5] = wide),
            LayoutError::BarUpperHalf { bar: 5 }
        );
        assert_eq!(
            broken(|l| l.bars[1] = BarSpec::Memory32 { size: 0x1000 }),
            LayoutError::BarUpperHalf { bar: 0 }
        );
    }

    #[test]
    fn msix_structures_lie_apart_and_inside_their_bars() {
        let msix = |change: fn(&mut MsixSpec)| {
            broken(|l| change(l.msix.as_mut().expect("the layout has MSI-X")))
        };
        for error in [
            msix(|m| m.vectors = 0),
            msix(|m| m.vectors = 2049),
            msix(|m| m.table_offset = 0x3c00),
            msix(|m| m.table_offset = 0x2004),
            msix(|m| m.pba_offset = 0x2410 - 8),
            msix(|m| m.pba_offset = 0x4000 - 8),
            msix(|m| m.pba_bar = 6),
            msix(|m| m.table_bar = 3),
        ] {
            assert_eq!(error, LayoutError::Msix);
        }
    }

    #[test]
    fn capabilities_have_masks_and_are_not_those_of_the_bus() {
        let capability = |id, body: usize, writable: usize| {
            broken(move |l| {
                l.capabilities.push(Capability {
                    id,
                    body: vec![0; body],
                    writable: vec![0; writable],
                });
            })
        };
        assert_eq!(capability(9, 4, 3), LayoutError::CapabilityMask { id: 9 });
        assert_eq!(
            capability(0x11, 4, 4),
            LayoutError::ReservedCapability { id: 0x11 }
        );
        assert_eq!(
            broken(|l| l.identity.vendor = 0xffff),
            LayoutError::NoVendor
        );
        for messages in [0, 3, 64] {
            assert_eq!(
                broken(|l| l.msi = Some(MsiSpec { messages })),
                LayoutError::Msi
            );
        }
    }
}
