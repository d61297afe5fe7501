//! A processor that writes the flags of another one while it runs.
//!
//! Whatever loads the x87 status word without a pending error (FXRSTOR, XRSTOR, FRSTOR, FLDENV:
//! `cpu_set_fpus` in target/i386/tcg/fpu_helper.c, up to 11.1 at least) clears `HF2_IGNNE_MASK` in
//! `hflags2` of the machine's *first* processor, from the thread of whichever processor executes it, by a
//! plain read, AND and write of four bytes (`cpu_clear_ignne` in tcg/system/fpu_helper.c). What the first
//! processor changes in between is undone. Beside a bit for DOS, `hflags2` has whether nested paging is in
//! force, the global interrupt flag, and who owns RFLAGS.IF: after a lost update L1's kernel runs with
//! its guest's nested page tables, or the guest without; or interrupts are held back for good, or come
//! where none may. A kernel that switches FPU states, as one with virtual CPUs does all the time, does
//! that within minutes.
//!
//! The instruction is made one that is atomic: LOCK AND of the one byte. The first processor's own
//! changes are not, but they can only lose the bit for DOS, which nothing here sets.
#![forbid(unsafe_code)]

use super::Functions;
use super::Patch;
use super::decode;
use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use iced_x86::Code;
use iced_x86::Register;

/// The function with the defect.
const FUNCTION: &str = "cpu_clear_ignne";

/// `HF2_IGNNE_MASK` (target/i386/cpu.h), in the lowest byte.
const IGNNE: u8 = 1 << 7;

const LOCK: u8 = 0xf0;
/// Opcode of AND and others of a byte in memory with an immediate byte.
const GROUP_1_BYTE: u8 = 0x80;
/// The same of four bytes.
const GROUP_1_DWORD: u8 = 0x81;
const NOP: u8 = 0x90;

/// What to overwrite.
pub(super) fn find(functions: &Functions<'_>) -> Result<Patch> {
    let function = functions.get(FUNCTION)?;
    atomic(function.code, function.address)
}

/// The one AND of memory, made atomic.
fn atomic(code: &[u8], start: u64) -> Result<Patch> {
    let instructions = decode(code, start);
    let mut ands = instructions
        .iter()
        .filter(|i| i.code() == Code::And_rm32_imm32 && i.op0_register() == Register::None);
    let and = ands.next().context("no bit is cleared")?;
    ensure!(ands.next().is_none(), "more than one AND");
    ensure!(
        and.immediate32() == !u32::from(IGNNE),
        "another bit is cleared"
    );
    let place = usize::try_from(and.ip() - start)?;
    let old = &code[place..place + and.len()];
    // Opcode, ModRM with a 32-bit displacement and no SIB, displacement, immediate.
    ensure!(
        old.len() == 10 && old[0] == GROUP_1_DWORD && old[1] >> 6 == 2 && old[1] & 7 != 4,
        "the AND is encoded in another way"
    );
    let mut bytes = vec![LOCK, GROUP_1_BYTE];
    bytes.extend(&old[1..6]);
    bytes.push(!IGNNE);
    bytes.resize(old.len(), NOP);
    Ok(Patch {
        address: and.ip(),
        bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 0x8c_7fa9;

    /// The end of the function in QEMU 11.1.3 of Debian.
    const CODE: &[u8] = &[
        0xe8, 0x12, 0x30, 0x0c, 0x00, // call object_dynamic_cast_assert
        0x81, 0xa0, 0xa4, 0x41, 0x00, 0x00, 0x7f, 0xff, 0xff,
        0xff, // and dword [rax+0x41a4], 0xffffff7f
        0x48, 0x83, 0xc4, 0x08, // add rsp, 8
        0x31, 0xc0, // xor eax, eax
        0xc3, // ret
    ];

    #[test]
    fn the_bit_is_cleared_by_one_locked_instruction() {
        let patch = atomic(CODE, START).unwrap();
        let expected = [
            0xf0, 0x80, 0xa0, 0xa4, 0x41, 0x00, 0x00,
            0x7f, // lock and byte [rax+0x41a4], 0x7f
            0x90, 0x90,
        ];
        assert_eq!(
            (patch.address, &patch.bytes[..]),
            (0x8c_7fae, &expected[..])
        );
        let instruction = decode(&patch.bytes, patch.address)[0];
        assert_eq!(instruction.code(), Code::And_rm8_imm8);
        assert!(instruction.has_lock_prefix());
        let mut mended = CODE.to_vec();
        mended[5..15].copy_from_slice(&patch.bytes);
        // Once is enough.
        let error = atomic(&mended, START).unwrap_err();
        assert_eq!(error.to_string(), "no bit is cleared");
    }

    #[test]
    fn other_code_is_not_taken_for_it() {
        let with = |at: usize, bytes: &[u8]| {
            let mut code = CODE.to_vec();
            code[at..at + bytes.len()].copy_from_slice(bytes);
            atomic(&code, START).unwrap_err().to_string()
        };
        assert_eq!(with(11, &[0xbf]), "another bit is cleared");
        assert_eq!(with(6, &[0x88]), "no bit is cleared", "an OR");
        let twice = [CODE, CODE].concat();
        let error = atomic(&twice, START).unwrap_err();
        assert_eq!(error.to_string(), "more than one AND");
        assert_eq!(
            atomic(&CODE[..5], START).unwrap_err().to_string(),
            "no bit is cleared"
        );
    }
}
