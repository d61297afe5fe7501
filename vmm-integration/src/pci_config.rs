//! PCI configuration mechanism #1 with nothing behind it but a host bridge.
//!
//! The machine has no PCI bus of its own. But Linux on Hyper-V looks for a way to reach one, and
//! logs an error when there is none (kernel: arch/x86/pci/direct.c); a host bridge at 00:00.0
//! satisfies it. Firmware describes no root bus, so the guest never enumerates this one.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU32, Ordering};

/// Address register, 4 ports; the data register follows it.
pub(crate) const ADDRESS: u16 = 0xcf8;
/// Data register, 4 ports.
const DATA: u16 = 0xcfc;
/// Last port of both.
pub(crate) const LAST: u16 = 0xcff;

/// Bit of the address register that makes the data register reach configuration space.
const ENABLE: u32 = 1 << 31;
/// Register bits of the address; what is left names bus, device and function.
const REGISTER: u32 = 0xfc;
/// First four dwords of the bridge: Red Hat's id for a PCIe host bridge, class 06/00.
const HOST_BRIDGE: [u32; 4] = [0x0008_1b36, 0, 0x0600_0000, 0];

/// The two registers.
#[derive(Debug, Default)]
pub(crate) struct PciConfig {
    address: AtomicU32,
}

impl PciConfig {
    /// A write to one of the ports. Only whole writes of the address register do anything.
    pub(crate) fn write(&self, port: u16, data: &[u8]) {
        if port == ADDRESS
            && let Ok(bytes) = data.try_into()
        {
            self.address
                .store(u32::from_le_bytes(bytes), Ordering::Relaxed);
        }
    }

    /// The address register.
    pub(crate) fn address(&self) -> u32 {
        self.address.load(Ordering::Relaxed)
    }

    /// Sets the address register.
    pub(crate) fn set_address(&self, address: u32) {
        self.address.store(address, Ordering::Relaxed);
    }

    /// A read from one of the ports.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        let address = self.address.load(Ordering::Relaxed);
        let (value, offset) = if port < DATA {
            (address, port - ADDRESS)
        } else {
            (configuration(address), port - DATA)
        };
        let bytes = value.to_le_bytes();
        for (target, index) in data.iter_mut().zip(usize::from(offset)..) {
            *target = bytes.get(index).copied().unwrap_or(0xff);
        }
    }
}

/// The dword that `address` names; all ones where there is no function.
fn configuration(address: u32) -> u32 {
    if address & !REGISTER != ENABLE {
        return u32::MAX;
    }
    let register = (address & REGISTER) as usize / 4;
    HOST_BRIDGE.get(register).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(pci: &PciConfig, port: u16) -> [u8; N] {
        let mut data = [0; N];
        pci.read(port, &mut data);
        data
    }

    #[test]
    fn linux_finds_the_mechanism_and_a_host_bridge() {
        let pci = PciConfig::default();
        pci.write(0xcfb, &[1]);
        pci.write(ADDRESS, &0x8000_0000u32.to_le_bytes());
        assert_eq!(u32::from_le_bytes(read(&pci, ADDRESS)), 0x8000_0000);
        assert_eq!(u16::from_le_bytes(read(&pci, DATA)), 0x1b36);
        pci.write(ADDRESS, &0x8000_0008u32.to_le_bytes());
        assert_eq!(u16::from_le_bytes(read(&pci, DATA + 2)), 0x0600);
    }

    #[test]
    fn nothing_else_is_there() {
        let pci = PciConfig::default();
        assert_eq!(read::<4>(&pci, DATA), [0xff; 4]);
        for address in [0x8000_0800u32, 0x8001_0000, 0x8000_0100, 0x8000_0001] {
            pci.write(ADDRESS, &address.to_le_bytes());
            assert_eq!(read::<4>(&pci, DATA), [0xff; 4], "{address:#x}");
        }
        pci.write(ADDRESS, &0x8000_00fcu32.to_le_bytes());
        assert_eq!(read::<4>(&pci, DATA), [0; 4]);
        assert_eq!(read::<4>(&pci, LAST), [0, 0xff, 0xff, 0xff]);
    }
}
