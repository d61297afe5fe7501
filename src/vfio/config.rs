//! What of a host device's configuration space a guest sees: its layout on the virtual bus.
//!
//! Nothing is passed through raw. Identity and BAR sizes are the device's; the bus emulates placement,
//! MSI and MSI-X. Of the capabilities, power management and PCI Express are shown with registers that
//! only keep what a guest writes, vendor-specific ones as they are and read-only; others are hidden,
//! and so are all extended ones: the function has the 256 bytes of conventional PCI. Registers are
//! those of the PCI Local Bus Specification 3.0, chapter 6, the PCI Bus Power Management Interface
//! Specification 1.2, chapter 3, and the PCI Express Base Specification 5.0, 7.5.3.
#![forbid(unsafe_code)]

use std::io;

use super::device::{CONFIG_REGION, VfioDevice};
use crate::mem::PAGE_SIZE;
use crate::vpci::function::{
    BAR_COUNT, BarSpec, Capability, FunctionLayout, MsiSpec, MsixSpec, PciIdentity,
};

/// Bytes of the space.
const LEN: usize = 256;
/// First byte that can belong to a capability.
const FIRST_CAPABILITY: usize = 0x40;
/// More cannot be in the space.
const MAX_CAPABILITIES: usize = (LEN - FIRST_CAPABILITY) / 4;

const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const HEADER_TYPE: usize = 0x0e;
const BARS: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITY_POINTER: usize = 0x34;

const CAP_POWER: u8 = 0x01;
const CAP_MSI: u8 = 0x05;
const CAP_VENDOR: u8 = 0x09;
const CAP_EXPRESS: u8 = 0x10;
const CAP_MSIX: u8 = 0x11;

/// Vendor of virtio devices, and the type of their capability that reaches BARs through the
/// configuration space (virtio 1.2, 4.1.4.9), which is of no use where writes do not reach the device.
const VIRTIO_VENDOR: u16 = 0x1af4;
const VIRTIO_PCI_CFG: u8 = 5;

/// Room that the bus takes for MSI and MSI-X.
const MSI_LEN: usize = 24;
const MSIX_LEN: usize = 12;

/// Why a device cannot sit on a virtual bus.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Its configuration space cannot be read.
    #[error("its configuration space cannot be read: {0}")]
    Unreadable(#[source] io::Error),
    /// It does not answer.
    #[error("it does not answer (its vendor id reads 0xffff); reset or reboot the host")]
    Silent,
    /// It is a bridge.
    #[error("it is a bridge, which stays with the host; give the devices behind it")]
    Bridge,
    /// A BAR is larger than the bus can show.
    #[error("its BAR {bar} of {size:#x} bytes is too large for a 32-bit one")]
    Bar {
        /// BAR index.
        bar: usize,
        /// Its size.
        size: u64,
    },
}

/// Reads a device's layout.
///
/// # Errors
///
/// [`ConfigError`].
pub(super) fn read(device: &VfioDevice) -> Result<FunctionLayout, ConfigError> {
    let mut config = [0; LEN];
    device
        .region_read(CONFIG_REGION, 0, &mut config)
        .map_err(ConfigError::Unreadable)?;
    let sizes = std::array::from_fn(|bar| device.regions()[bar].size);
    layout(&config, sizes)
}

/// The layout of a device with this configuration space and BARs of these sizes, 0 for none.
fn layout(config: &[u8; LEN], sizes: [u64; BAR_COUNT]) -> Result<FunctionLayout, ConfigError> {
    if word(config, 0) == 0xffff {
        return Err(ConfigError::Silent);
    }
    if config[HEADER_TYPE] & 0x7f != 0 {
        return Err(ConfigError::Bridge);
    }
    let mut layout = FunctionLayout {
        kind: "vfio",
        identity: PciIdentity {
            vendor: word(config, 0),
            device: word(config, 2),
            revision: config[8],
            prog_if: config[9],
            subclass: config[10],
            base_class: config[11],
            subsystem_vendor: word(config, SUBSYSTEM),
            subsystem: word(config, SUBSYSTEM + 2),
            serial: 0,
        },
        bars: bars(config, sizes)?,
        ..FunctionLayout::default()
    };
    let found = capabilities(config);
    for (id, at) in &found {
        match *id {
            CAP_MSI => layout.msi = Some(msi(config, *at)),
            CAP_MSIX => layout.msix = msix(config, *at).filter(|msix| fits(msix, &layout.bars)),
            _ => {}
        }
    }
    let reserved = layout.msi.map_or(0, |_| MSI_LEN) + layout.msix.map_or(0, |_| MSIX_LEN);
    let mut room = LEN - FIRST_CAPABILITY - reserved;
    for (id, at) in found {
        let shown = match id {
            CAP_POWER => power(config, at),
            CAP_EXPRESS => express(config, at),
            CAP_VENDOR => vendor(config, at),
            _ => None,
        };
        let Some(capability) = shown else { continue };
        let len = (capability.body.len() + 2).next_multiple_of(4);
        match room.checked_sub(len) {
            Some(rest) => {
                room = rest;
                layout.capabilities.push(capability);
            }
            None => log::warn!("capability {id:#04x} at {at:#x} does not fit and is hidden"),
        }
    }
    Ok(layout)
}

fn bars(config: &[u8; LEN], sizes: [u64; BAR_COUNT]) -> Result<[BarSpec; BAR_COUNT], ConfigError> {
    let mut bars = [BarSpec::None; BAR_COUNT];
    for (bar, size) in sizes.into_iter().enumerate() {
        let register = config[BARS + 4 * bar];
        let is_port = register & 1 != 0;
        if size == 0 || is_port {
            continue;
        }
        let wide = register >> 1 & 3 == 2 && bar + 1 < BAR_COUNT;
        let too_large = ConfigError::Bar { bar, size };
        let size = size.max(PAGE_SIZE).checked_next_power_of_two();
        let size = size.ok_or(too_large)?;
        bars[bar] = if wide {
            BarSpec::Memory64 {
                size,
                prefetchable: register & 8 != 0,
            }
        } else {
            let size = u32::try_from(size).map_err(|_| ConfigError::Bar { bar, size })?;
            BarSpec::Memory32 { size }
        };
    }
    Ok(bars)
}

/// Id and place of each capability, in list order, each place once.
fn capabilities(config: &[u8; LEN]) -> Vec<(u8, usize)> {
    let mut found: Vec<(u8, usize)> = Vec::new();
    if word(config, STATUS) & STATUS_CAPABILITIES == 0 {
        return found;
    }
    let mut at = usize::from(config[CAPABILITY_POINTER] & !3);
    while at >= FIRST_CAPABILITY && found.len() < MAX_CAPABILITIES {
        if found.iter().any(|(_, place)| *place == at) {
            break;
        }
        found.push((config[at], at));
        at = usize::from(config[at + 1] & !3);
    }
    found
}

fn msi(config: &[u8; LEN], at: usize) -> MsiSpec {
    let multiple = word(config, at + 2) >> 1 & 7;
    MsiSpec {
        messages: 1 << multiple.min(5),
    }
}

fn msix(config: &[u8; LEN], at: usize) -> Option<MsixSpec> {
    let (table, pba) = (double(config, at + 4)?, double(config, at + 8)?);
    Some(MsixSpec {
        vectors: (word(config, at + 2) & 0x7ff) + 1,
        table_bar: (table & 7) as u8,
        table_offset: table & !7,
        pba_bar: (pba & 7) as u8,
        pba_offset: pba & !7,
    })
}

/// False for structures that are not inside memory BARs: such a device is shown without MSI-X.
fn fits(msix: &MsixSpec, bars: &[BarSpec; BAR_COUNT]) -> bool {
    let inside = |bar: u8, offset: u32, len: u64| {
        let size = bars.get(usize::from(bar)).map_or(0, |bar| bar.size());
        u64::from(offset) + len <= size
    };
    inside(msix.table_bar, msix.table_offset, msix.table_len())
        && inside(msix.pba_bar, msix.pba_offset, msix.pba_len())
}

/// Power management: state D0 alone, so that what a guest writes to the state bits changes nothing of
/// the device, whose power is the host's.
fn power(config: &[u8; LEN], at: usize) -> Option<Capability> {
    const NO_SOFT_RESET: u8 = 1 << 3;
    const STATE: u8 = 3;
    let version = config.get(at + 2)? & 7;
    Some(Capability {
        id: CAP_POWER,
        body: vec![version, 0, NO_SOFT_RESET, 0, 0, 0],
        writable: vec![0, 0, STATE, 0, 0, 0],
    })
}

/// PCI Express: as the device says, without function-level reset, which the guest asks the bus for by
/// letting go of the function. Device control keeps what is written; payload and read request sizes are
/// the host's.
fn express(config: &[u8; LEN], at: usize) -> Option<Capability> {
    /// Offsets in the capability.
    const DEVICE_CAP: usize = 4;
    const DEVICE_CONTROL: usize = 8;
    const DEVICE_STATUS: usize = 10;
    const FUNCTION_RESET: u8 = 1 << 4;
    let version = config.get(at + 2)? & 0xf;
    let len = match version {
        1 => 0x14,
        _ => 0x3c,
    };
    let mut bytes = config.get(at..at + len)?.to_vec();
    let mut writable = vec![0; len];
    bytes[DEVICE_CAP + 3] &= !FUNCTION_RESET;
    bytes[DEVICE_STATUS..DEVICE_STATUS + 2].fill(0);
    writable[DEVICE_CONTROL] = 0xff;
    // The highest bit starts a reset.
    bytes[DEVICE_CONTROL + 1] &= 0x7f;
    writable[DEVICE_CONTROL + 1] = 0x7f;
    Some(Capability {
        id: CAP_EXPRESS,
        body: bytes.split_off(2),
        writable: writable.split_off(2),
    })
}

/// Vendor-specific, which says its own length; read-only.
fn vendor(config: &[u8; LEN], at: usize) -> Option<Capability> {
    let len = usize::from(*config.get(at + 2)?);
    let body = config.get(at + 2..at + len)?;
    let is_window = word(config, 0) == VIRTIO_VENDOR && body.get(1) == Some(&VIRTIO_PCI_CFG);
    (len > 2 && !is_window).then(|| Capability {
        id: CAP_VENDOR,
        body: body.to_vec(),
        writable: vec![0; body.len()],
    })
}

fn word(config: &[u8; LEN], at: usize) -> u16 {
    let byte = |at: usize| u16::from(config.get(at).copied().unwrap_or(0));
    byte(at) | byte(at + 1) << 8
}

fn double(config: &[u8; LEN], at: usize) -> Option<u32> {
    let bytes = config.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vpci::layout::{LayoutError, validate};
    use proptest::prelude::*;

    /// An NVMe controller as QEMU makes it.
    fn nvme() -> [u8; LEN] {
        let mut config = [0; LEN];
        config[..4].copy_from_slice(&[0x36, 0x1b, 0x10, 0x00]);
        config[STATUS] = 0x10;
        config[8..12].copy_from_slice(&[2, 2, 8, 1]);
        config[BARS] = 4;
        config[SUBSYSTEM..SUBSYSTEM + 4].copy_from_slice(&[0xf4, 0x1a, 0x00, 0x11]);
        config[CAPABILITY_POINTER] = 0x40;
        // MSI-X: 65 vectors, table at 0x2000 and pending bits at 0x3000 of BAR 0.
        config[0x40..0x4c].copy_from_slice(&[0x11, 0x80, 0x40, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0]);
        // PCI Express, version 2, with function-level reset.
        config[0x80..0x84].copy_from_slice(&[0x10, 0x60, 0x92, 0]);
        config[0x87] = 0x10;
        config[0x89] = 0xa8;
        // Power management.
        config[0x60..0x68].copy_from_slice(&[1, 0x50, 0xc3, 0xff, 0, 1, 0, 0]);
        // Vendor-specific, five bytes long.
        config[0x50..0x55].copy_from_slice(&[9, 0, 5, 0xaa, 0xbb]);
        config
    }

    const SIZES: [u64; BAR_COUNT] = [0x4000, 0, 0, 0, 0, 0];

    #[test]
    fn a_device_is_shown_with_its_identity_and_what_can_be_virtual() {
        let layout = layout(&nvme(), SIZES).unwrap();
        validate(&layout).unwrap();
        let id = layout.identity;
        assert_eq!((id.vendor, id.device, id.base_class), (0x1b36, 0x10, 1));
        assert_eq!((id.subsystem_vendor, id.subsystem), (0x1af4, 0x1100));
        let size = 0x4000;
        let prefetchable = false;
        assert_eq!(layout.bars[0], BarSpec::Memory64 { size, prefetchable });
        let msix = layout.msix.unwrap();
        assert_eq!((msix.vectors, msix.table_offset), (65, 0x2000));
        assert_eq!(layout.msi, None);
        let ids: Vec<_> = layout.capabilities.iter().map(|c| c.id).collect();
        assert_eq!(ids, [CAP_EXPRESS, CAP_POWER, CAP_VENDOR]);
        let [express, power, vendor] = &layout.capabilities[..] else {
            panic!("three capabilities");
        };
        assert_eq!((express.body.len(), express.body[5]), (0x3a, 0));
        assert_eq!((express.body[7], express.writable[7]), (0x28, 0x7f));
        assert_eq!(power.body, [3, 0, 8, 0, 0, 0]);
        assert_eq!(power.writable, [0, 0, 3, 0, 0, 0]);
        assert_eq!(vendor.body, [5, 0xaa, 0xbb]);
        assert_eq!(vendor.writable, [0; 3]);
    }

    #[test]
    fn ports_and_absent_bars_are_left_out_and_small_ones_fill_a_page() {
        let mut config = nvme();
        config[BARS] = 0;
        config[BARS + 4] = 1;
        config[BARS + 8] = 0x0c;
        let layout = layout(&config, [0x100, 0x20, 0x1800, 0, 0, 0]).unwrap();
        assert_eq!(layout.bars[0], BarSpec::Memory32 { size: 0x1000 });
        assert_eq!(layout.bars[1], BarSpec::None);
        let size = 0x2000;
        let prefetchable = true;
        assert_eq!(layout.bars[2], BarSpec::Memory64 { size, prefetchable });
        // The MSI-X structures have no place then.
        assert_eq!(layout.msix, None);
    }

    #[test]
    fn what_is_no_function_for_a_guest_is_refused() {
        let mut config = nvme();
        config[HEADER_TYPE] = 1;
        assert!(matches!(layout(&config, SIZES), Err(ConfigError::Bridge)));
        config[..2].fill(0xff);
        assert!(matches!(layout(&config, SIZES), Err(ConfigError::Silent)));
        let mut config = nvme();
        config[BARS] = 0;
        let huge = layout(&config, [1 << 33, 0, 0, 0, 0, 0]);
        assert!(matches!(huge, Err(ConfigError::Bar { bar: 0, .. })));
    }

    #[test]
    fn the_window_of_a_virtio_device_is_hidden() {
        let mut config = nvme();
        config[..2].copy_from_slice(&VIRTIO_VENDOR.to_le_bytes());
        config[0x53] = VIRTIO_PCI_CFG;
        let layout = layout(&config, SIZES).unwrap();
        assert!(layout.capabilities.iter().all(|c| c.id != CAP_VENDOR));
    }

    proptest! {
        #[test]
        fn no_configuration_space_makes_an_impossible_layout(
            mut config in prop::collection::vec(any::<u8>(), LEN),
            ids in prop::collection::vec((16usize..64, prop::sample::select(
                vec![CAP_POWER, CAP_MSI, CAP_VENDOR, CAP_EXPRESS, CAP_MSIX])), 0..12),
            sizes in prop::array::uniform6(prop::sample::select(
                vec![0u64, 0x20, 0x1000, 0x4000, 0x10_0000, 1 << 33])),
        ) {
            config[HEADER_TYPE] = 0;
            config[STATUS] |= 0x10;
            let mut last = CAPABILITY_POINTER;
            for (dword, id) in ids {
                config[last] = (dword * 4) as u8;
                config[dword * 4] = id;
                last = dword * 4 + 1;
            }
            let config: [u8; LEN] = config.try_into().unwrap();
            // The kernel gives no size to the upper half of a wide BAR.
            let mut sizes = sizes;
            for bar in 0..BAR_COUNT - 1 {
                if sizes[bar] != 0 && config[BARS + 4 * bar] & 7 == 4 {
                    sizes[bar + 1] = 0;
                }
            }
            if let Ok(layout) = layout(&config, sizes) {
                // But for structures that are misaligned or overlap.
                match validate(&layout) {
                    Ok(()) => {}
                    Err(error) => prop_assert_eq!(error, LayoutError::Msix),
                }
            }
        }
    }
}
