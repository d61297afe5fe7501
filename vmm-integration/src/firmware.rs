//! All the firmware there is at run time: the code at the real-mode reset vector.
//!
//! On a hardware-reduced ACPI platform Linux ignores the FADT's reset register and asks EFI for the
//! reset; without EFI it jumps to the reset vector (kernel: arch/x86/kernel/reboot.c).
#![forbid(unsafe_code)]

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::Ram;

/// Reset vector of real mode, FFFF:0000.
pub(crate) const RESET_VECTOR: u64 = 0xf_fff0;

/// `mov al, 0xfe; out 0x64, al`: the keyboard controller's reset command, then halt for ever. Means
/// the same in 16-bit, 32-bit and 64-bit mode.
const RESET_CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

/// Writes the code.
///
/// # Errors
///
/// The address is not RAM, which no layout allows.
pub(crate) fn write(ram: &Ram) -> Result<(), GuestMemoryError> {
    ram.write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{ACPI_TABLES, HIGH_RAM, LOW_WINDOW, Range};

    #[test]
    fn the_code_fits_behind_the_largest_acpi_tables() {
        let high = Range {
            start: 1 << 32,
            size: 1 << 36,
        };
        let tables = crate::acpi::build(ACPI_TABLES, 254, LOW_WINDOW, high);
        assert!(ACPI_TABLES + tables.len() as u64 <= RESET_VECTOR);
        assert!(RESET_VECTOR + RESET_CODE.len() as u64 <= HIGH_RAM);
    }
}
