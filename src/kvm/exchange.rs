//! Finds the compare-exchange that KVM has just emulated.
//!
//! KVM reads the memory, computes, and leaves the guest with the result; another vCPU can get in
//! between. Only for CMPXCHG is the value that it read known afterwards, so this is the one locked
//! instruction that can be made good (docs/spec/kvm.md, section 9.3). RIP is past the instruction by
//! then, so it is decoded from its end.
#![forbid(unsafe_code)]

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::mem::PAGE_SIZE;

/// Longest instruction.
pub(super) const MAX_LEN: usize = 15;
/// RFLAGS.ZF.
pub(super) const ZERO_FLAG: u64 = 1 << 6;

const LOCK: u8 = 0xf0;
const OPERAND_SIZE: u8 = 0x66;
const ADDRESS_SIZE: u8 = 0x67;
const FS: u8 = 0x64;
const GS: u8 = 0x65;
/// RAX, RSP and RBP in instructions.
const RAX: u8 = 0;
const RSP: u8 = 4;
const RBP: u8 = 5;

/// A store that left the guest, with the state after the instruction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Store<'a> {
    /// The bytes of code before RIP, 15 at most.
    pub(super) code: &'a [u8],
    pub(super) regs: &'a kvm_regs,
    pub(super) sregs: &'a kvm_sregs,
    /// Where it stores, and what.
    pub(super) gpa: u64,
    pub(super) data: &'a [u8],
}

/// True if the store is that of a LOCK CMPXCHG of 2, 4 or 8 bytes in 64-bit code. Beside the
/// bytes of the instruction, size, value and offset in the page have to be those of the store: what
/// looks like the instruction by chance is not taken for it.
pub(super) fn is_exchange(store: &Store<'_>) -> bool {
    // From ModRM to the end: 1 byte, with SIB and displacement up to 6.
    [1, 2, 3, 5, 6]
        .into_iter()
        .any(|tail| has_tail(store, tail))
}

fn has_tail(store: &Store<'_>, tail: usize) -> bool {
    let Some(opcode) = store.code.len().checked_sub(tail + 2) else {
        return false;
    };
    let (before, rest) = store.code.split_at(opcode);
    let [0x0f, 0xb1, operand @ ..] = rest else {
        return false;
    };
    let Some(memory) = Memory::decode(operand) else {
        return false;
    };
    let (rex, before) = match before.split_last() {
        Some((rex @ 0x40..=0x4f, before)) => (*rex, before),
        _ => (0, before),
    };
    // The first byte that is no prefix belongs to the instruction before. Of those that are, some may
    // as well: so the instruction is tried from the LOCK on, then with each further prefix.
    let mut prefixes = Prefixes::default();
    for byte in before.iter().rev() {
        if !prefixes.take(*byte) {
            break;
        }
        if prefixes.lock && fits(store, &memory, rex, &prefixes) {
            return true;
        }
    }
    false
}

#[derive(Debug, Default)]
struct Prefixes {
    lock: bool,
    operand_size: bool,
    address_size: bool,
    /// The one nearest to the opcode.
    segment: Option<u8>,
}

impl Prefixes {
    /// False if the byte is no prefix.
    fn take(&mut self, byte: u8) -> bool {
        match byte {
            LOCK => self.lock = true,
            OPERAND_SIZE => self.operand_size = true,
            ADDRESS_SIZE => self.address_size = true,
            FS | GS => self.segment = self.segment.or(Some(byte)),
            // Segments that count for nothing in 64-bit code, and hints of lock elision.
            0x26 | 0x2e | 0x36 | 0x3e | 0xf2 | 0xf3 => {}
            _ => return false,
        }
        true
    }
}

/// The memory operand, without the bits of REX.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Memory {
    /// Field `reg` of ModRM: the register that is stored.
    source: u8,
    base: Base,
    /// Register and shift.
    index: Option<(u8, u8)>,
    displacement: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Base {
    None,
    NextInstruction,
    Register(u8),
}

impl Memory {
    /// Decodes ModRM, SIB and displacement, if they are exactly `bytes` and name memory.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (modrm, mut rest) = bytes.split_first()?;
        let (mode, source, rm) = (modrm >> 6, modrm >> 3 & 7, modrm & 7);
        let mut base = Base::Register(rm);
        let mut index = None;
        if rm == RSP && mode != 3 {
            let (sib, after) = rest.split_first()?;
            rest = after;
            base = Base::Register(sib & 7);
            index = Some((sib >> 3 & 7, sib >> 6));
        }
        let displacement = match (mode, rest) {
            (0, [a, b, c, d]) if base == Base::Register(RBP) => {
                base = match index {
                    None => Base::NextInstruction,
                    Some(_) => Base::None,
                };
                i32::from_le_bytes([*a, *b, *c, *d])
            }
            (0, []) if base != Base::Register(RBP) => 0,
            (1, [byte]) => i32::from(*byte as i8),
            (2, [a, b, c, d]) => i32::from_le_bytes([*a, *b, *c, *d]),
            _ => return None,
        };
        Some(Self {
            source,
            base,
            index,
            displacement,
        })
    }
}

/// Whether the instruction makes this very store.
fn fits(store: &Store<'_>, memory: &Memory, rex: u8, prefixes: &Prefixes) -> bool {
    let extended = |bit: u8, register: u8| register | (rex >> bit & 1) << 3;
    let (r, x, b) = (2, 1, 0);
    let size = match (rex & 8 != 0, prefixes.operand_size) {
        (true, _) => 8,
        (false, true) => 2,
        (false, false) => 4,
    };
    if store.data.len() != size {
        return false;
    }
    let exchanged = store.regs.rflags & ZERO_FLAG != 0;
    // What was read is written back if it is not what was expected, and is in RAX then.
    let source = match exchanged {
        true => extended(r, memory.source),
        false => RAX,
    };
    if register(store.regs, source).to_le_bytes()[..size] != *store.data {
        return false;
    }
    let mut registers = Vec::with_capacity(2);
    let mut address = i64::from(memory.displacement) as u64;
    match memory.base {
        Base::None => {}
        Base::NextInstruction => address = address.wrapping_add(store.regs.rip),
        Base::Register(base) => registers.push((extended(b, base), 0)),
    }
    if let Some((index, shift)) = memory.index
        && extended(x, index) != RSP
    {
        registers.push((extended(x, index), shift));
    }
    if !exchanged && registers.iter().any(|(register, _)| *register == RAX) {
        // It held another value when the address was made.
        return true;
    }
    for (number, shift) in registers {
        address = address.wrapping_add(register(store.regs, number) << shift);
    }
    if prefixes.address_size {
        address &= 0xffff_ffff;
    }
    address = match prefixes.segment {
        Some(FS) => address.wrapping_add(store.sregs.fs.base),
        Some(GS) => address.wrapping_add(store.sregs.gs.base),
        _ => address,
    };
    address % PAGE_SIZE == store.gpa % PAGE_SIZE
}

/// A register by the number that instructions have for it.
fn register(regs: &kvm_regs, number: u8) -> u64 {
    match number {
        0 => regs.rax,
        1 => regs.rcx,
        2 => regs.rdx,
        3 => regs.rbx,
        4 => regs.rsp,
        5 => regs.rbp,
        6 => regs.rsi,
        7 => regs.rdi,
        8 => regs.r8,
        9 => regs.r9,
        10 => regs.r10,
        11 => regs.r11,
        12 => regs.r12,
        13 => regs.r13,
        14 => regs.r14,
        _ => regs.r15,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Distinct values, with offsets in the page that tell them apart.
    fn regs() -> kvm_regs {
        kvm_regs {
            rax: 0x1000_0000_0000_a008,
            rcx: 0x1000_0000_0000_c010,
            rdx: 0x1000_0000_0000_d018,
            rbx: 0x1000_0000_0000_b020,
            rsp: 0x1000_0000_0000_e028,
            rbp: 0x1000_0000_0000_f030,
            rsi: 3,
            rdi: 0x1000_0000_0001_0038,
            r8: 0x1000_0000_0001_8040,
            r9: 0x1000_0000_0001_9048,
            r10: 0x1000_0000_0001_a050,
            r11: 0x1000_0000_0001_b058,
            r12: 0x1000_0000_0001_c060,
            r13: 0x1000_0000_0001_d068,
            r14: 0x1000_0000_0001_e070,
            r15: 0x1000_0000_0001_f078,
            rip: 0xffff_ffff_8100_0123,
            rflags: ZERO_FLAG,
        }
    }

    fn check(code: &[u8], regs: &kvm_regs, gpa: u64, data: &[u8]) -> bool {
        let mut sregs = kvm_sregs::default();
        sregs.gs.base = 0xffff_8000_0000_0100;
        is_exchange(&Store {
            code,
            regs,
            sregs: &sregs,
            gpa,
            data,
        })
    }

    /// Encodings as an assembler makes them, behind an instruction that ends in what could be a
    /// prefix, with the register that is stored and the address.
    fn encodings() -> Vec<(&'static [u8], u64, usize, u64)> {
        let r = regs();
        vec![
            // lock cmpxchg [rdi], rcx
            (&[0xf0, 0x48, 0x0f, 0xb1, 0x0f], r.rcx, 8, r.rdi),
            // lock cmpxchg [rdx + rsi*8], rcx
            (&[0xf0, 0x48, 0x0f, 0xb1, 0x0c, 0xf2], r.rcx, 8, r.rdx + 24),
            // lock cmpxchg [r14 + rsi*8], r13
            (&[0xf0, 0x4d, 0x0f, 0xb1, 0x2c, 0xf6], r.r13, 8, r.r14 + 24),
            // lock cmpxchg [r12], r8
            (&[0xf0, 0x4d, 0x0f, 0xb1, 0x04, 0x24], r.r8, 8, r.r12),
            // lock cmpxchg [rsp + 0x10], rbx
            (
                &[0xf0, 0x48, 0x0f, 0xb1, 0x5c, 0x24, 0x10],
                r.rbx,
                8,
                r.rsp + 0x10,
            ),
            // lock cmpxchg [r13 + 0], rdx
            (&[0xf0, 0x49, 0x0f, 0xb1, 0x55, 0x00], r.rdx, 8, r.r13),
            // lock cmpxchg [rbx - 0x100], r9
            (
                &[0xf0, 0x4c, 0x0f, 0xb1, 0x8b, 0x00, 0xff, 0xff, 0xff],
                r.r9,
                8,
                r.rbx - 0x100,
            ),
            // lock cmpxchg [rip + 0x1005], rcx
            (
                &[0xf0, 0x48, 0x0f, 0xb1, 0x0d, 0x05, 0x10, 0, 0],
                r.rcx,
                8,
                r.rip + 0x1005,
            ),
            // lock cmpxchg gs:[0x1000], rdx
            (
                &[0xf0, 0x65, 0x48, 0x0f, 0xb1, 0x14, 0x25, 0, 0x10, 0, 0],
                r.rdx,
                8,
                0x1100,
            ),
            // lock cmpxchg [r10 + rsi*8 + 0x200], r11
            (
                &[0xf0, 0x4d, 0x0f, 0xb1, 0x9c, 0xf2, 0, 2, 0, 0],
                r.r11,
                8,
                r.r10 + 0x218,
            ),
            // lock cmpxchg [rdi], ecx; and cx
            (&[0xf0, 0x0f, 0xb1, 0x0f], r.rcx, 4, r.rdi),
            (&[0x66, 0xf0, 0x0f, 0xb1, 0x0f], r.rcx, 2, r.rdi),
            // xacquire lock cmpxchg [rdi], rcx
            (&[0xf2, 0xf0, 0x48, 0x0f, 0xb1, 0x0f], r.rcx, 8, r.rdi),
        ]
    }

    #[test]
    fn encodings_are_known_by_their_ends() {
        for (code, stored, size, address) in encodings() {
            let data = &stored.to_le_bytes()[..size];
            for before in [&[0x90, 0x89, 0xc3][..], &[0x48, 0x66], &[0x64, 0xf0], &[]] {
                let code = [before, code].concat();
                let code = &code[code.len().saturating_sub(MAX_LEN)..];
                assert!(check(code, &regs(), address, data), "{code:x?}");
                assert!(!check(code, &regs(), address ^ 0x80, data), "{code:x?}");
                assert!(!check(code, &regs(), address, &data[1..]), "{code:x?}");
                let other = (!stored).to_le_bytes();
                assert!(!check(code, &regs(), address, &other[..size]), "{code:x?}");
            }
            // One that failed writes back what it read, which RAX holds.
            let failed = kvm_regs {
                rflags: 0,
                ..regs()
            };
            let read = failed.rax.to_le_bytes();
            assert!(check(code, &failed, address, &read[..size]), "{code:x?}");
            assert!(!check(code, &failed, address, data), "{code:x?}");
        }
    }

    #[test]
    fn other_instructions_are_not_taken_for_it() {
        let r = regs();
        let rcx = r.rcx.to_le_bytes();
        let others: [&[u8]; 6] = [
            // mov [rdi], rcx; without lock; lock xadd; lock xchg; a register operand
            &[0x48, 0x89, 0x0f],
            &[0x48, 0x0f, 0xb1, 0x0f],
            &[0xf0, 0x48, 0x0f, 0xc1, 0x0f],
            &[0xf0, 0x48, 0x87, 0x0f],
            &[0xf0, 0x48, 0x0f, 0xb1, 0xcf],
            // Behind it: mov [rdi], rcx
            &[0xf0, 0x48, 0x0f, 0xb1, 0x0f, 0x48, 0x89, 0x0f],
        ];
        for code in others {
            assert!(!check(code, &r, r.rdi, &rcx), "{code:x?}");
        }
    }

    #[test]
    fn an_address_made_with_rax_is_gone_when_the_exchange_failed() {
        // lock cmpxchg [rax + rsi*8], rcx
        let code = [0xf0, 0x48, 0x0f, 0xb1, 0x0c, 0xf0];
        let failed = kvm_regs {
            rflags: 0,
            ..regs()
        };
        assert!(check(&code, &failed, 0x123, &failed.rax.to_le_bytes()));
        assert!(!check(&code, &regs(), 0x123, &regs().rcx.to_le_bytes()));
        assert!(check(
            &code,
            &regs(),
            regs().rax + 24,
            &regs().rcx.to_le_bytes()
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(
            code in prop::collection::vec(any::<u8>(), 0..=MAX_LEN),
            gpa: u64,
            data in prop::collection::vec(any::<u8>(), 0..=8),
            rflags: u64,
        ) {
            let regs = kvm_regs { rflags, ..regs() };
            check(&code, &regs, gpa, &data);
        }
    }
}
