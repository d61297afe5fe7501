//! An exit of a processor that is in no guest.
//!
//! Once the main loop handled the end of a guest's run twice (`do_vmexit` in
//! target/i386/tcg/system/svm_helper.c): the control block of a virtual CPU then held what the first
//! time had just loaded, the state of L1's own kernel behind its VMRUN, down to CR3 and the stack, with
//! `int_ctl` zero, as the first time leaves it. Run by KVM as the guest's, that ends in a triple fault,
//! or, where L1's page tables are at addresses that the guest has not, in exits without end. Which way
//! the second came about is not known; outside a guest an exit has no meaning.
//!
//! `x86_cpu_do_interrupt` asserts, ahead of the exit, that no exception is on its way to delivery. That
//! test has always held here, and gives its place to another: whether the processor is in a guest
//! (`HF_GUEST_MASK`). If not, the function returns.
#![forbid(unsafe_code)]

use super::Functions;
use super::Patch;
use super::decode;
use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use iced_x86::Code;
use iced_x86::Instruction;
use iced_x86::Register;

/// The function with the test, what it ends in, and its other way.
const FUNCTION: &str = "x86_cpu_do_interrupt";
const EXIT: &str = "do_vmexit";
const DELIVERY: &str = "do_interrupt_all";

/// `HF_GUEST_MASK` (target/i386/cpu.h): bit 21, hence bit 5 of the third byte of `hflags`.
const GUEST_BYTE: u32 = 2;
const GUEST_BIT: u8 = 1 << 5;
/// `HF_INHIBIT_IRQ_MASK`, what an exit looks at first.
const INHIBIT_IRQ: u8 = 1 << 3;

/// What to overwrite.
pub(super) fn find(functions: &Functions<'_>) -> Result<Patch> {
    let function = functions.get(FUNCTION)?;
    let exit = functions.get(EXIT)?;
    let delivery = functions.get(DELIVERY)?;
    let flags = flags_offset(&decode(exit.code, exit.address))?;
    guard(
        function.code,
        function.address,
        exit.address,
        delivery.address,
        flags,
    )
}

/// Where `CPUX86State` has `hflags`: the exit's first test of a byte is one of its bits.
fn flags_offset(exit: &[Instruction]) -> Result<u32> {
    let test = exit
        .iter()
        .find(|instruction| instruction.code() == Code::Test_rm8_imm8);
    let test = test.context("the exit tests nothing")?;
    ensure!(
        test.memory_base() == Register::RDI && test.immediate8() == INHIBIT_IRQ,
        "the exit does not begin with the interrupt shadow"
    );
    Ok(test.memory_displacement32())
}

/// The new test, in the place of the assertion.
fn guard(code: &[u8], start: u64, exit: u64, delivery: u64, flags: u32) -> Result<Patch> {
    let instructions = decode(code, start);
    let find = |what: &str, is: &dyn Fn(&Instruction) -> bool| {
        let mut places = (0..instructions.len()).filter(|&at| is(&instructions[at]));
        let place = places.next().with_context(|| format!("no {what}"))?;
        ensure!(places.next().is_none(), "more than one {what}");
        Ok(place)
    };
    let assertion = find("assertion", &|i| {
        i.code() == Code::Cmp_rm32_imm8 && i.immediate8to32() == -1
    })?;
    let failure = instructions.get(assertion + 1).context("no failure")?;
    let jump = find("exit", &|i| {
        i.code() == Code::Jmp_rel32_64 && i.near_branch_target() == exit
    })?;
    let call = find("delivery", &|i| {
        i.code() == Code::Call_rel32_64 && i.near_branch_target() == delivery
    })?;
    let inside = start..start + code.len() as u64;
    ensure!(
        failure.code() == Code::Jne_rel32_64 && !inside.contains(&failure.near_branch_target()),
        "the assertion does not lead out"
    );
    ensure!(assertion < jump && jump < call, "another order");
    // Its argument, from the same register.
    let mut towards = instructions[assertion..jump].iter();
    let argument =
        towards.find(|i| i.code() == Code::Lea_r64_m && i.op0_register() == Register::RDI);
    let argument = argument.context("no argument")?;
    let tested = &instructions[assertion];
    ensure!(
        argument.memory_base() == tested.memory_base(),
        "the argument is of something else"
    );
    // Both ways give the stack back first, and as much.
    let unwinds =
        |i: &&Instruction| i.code() == Code::Add_rm64_imm8 && i.op0_register() == Register::RSP;
    let here = instructions[assertion..jump].iter().find(unwinds);
    let there = instructions[call..].iter().find(unwinds);
    let (here, there) = here.zip(there).context("the stack is not given back")?;
    ensure!(here.immediate8() == there.immediate8(), "the stack differs");

    let place = usize::try_from(tested.ip() - start)?;
    let old = &code[place..place + tested.len()];
    // Opcode, ModRM with a 32-bit displacement and no SIB, displacement, immediate.
    ensure!(
        old.len() == 7 && old[0] == 0x83 && old[1] >> 6 == 2 && old[1] & 7 != 4,
        "the assertion is encoded in another way"
    );
    let offset = argument.memory_displacement32() + flags + GUEST_BYTE;
    let distance = there.ip().wrapping_sub(failure.next_ip());
    // TEST byte, JE.
    let mut bytes = vec![0xf6, old[1] & 0xc7];
    bytes.extend(offset.to_le_bytes());
    bytes.push(GUEST_BIT);
    bytes.extend([0x0f, 0x84]);
    bytes.extend(u32::try_from(distance)?.to_le_bytes());
    ensure!(bytes.len() == old.len() + failure.len(), "it does not fit");
    Ok(Patch {
        address: tested.ip(),
        bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 0x8c_a4cc;
    const VMEXIT: u64 = 0x8c_9980;
    const DELIVER: u64 = 0x93_fa30;

    /// The function in QEMU 11.1.3 of Debian, but for its beginning.
    const CODE: &[u8] = &[
        0x8b, 0xb5, 0xc0, 0x02, 0x00, 0x00, // mov esi, [rbp+0x2c0]
        0x48, 0x89, 0xc3, // mov rbx, rax
        0x81, 0xfe, 0x00, 0x01, 0x00, 0x00, // cmp esi, 0x100
        0x75, 0x23, // jne 8ca500
        0x83, 0xb8, 0x60, 0x75, 0x00, 0x00, 0xff, // cmp dword [rax+0x7560], -1
        0x0f, 0x85, 0xb5, 0x2a, 0xc2, 0xff, // jne 4ecf9f
        0x48, 0x83, 0xc4, 0x08, // add rsp, 8
        0x48, 0x8d, 0xb8, 0x70, 0x40, 0x00, 0x00, // lea rdi, [rax+0x4070]
        0x5b, 0x5d, // pop rbx; pop rbp
        0xe9, 0x84, 0xf4, 0xff, 0xff, // jmp do_vmexit
        0x0f, 0x1f, 0x40, 0x00, // nop
        0x8b, 0x88, 0xf0, 0x74, 0x00, 0x00, // mov ecx, [rax+0x74f0]
        0x8b, 0x90, 0xf4, 0x74, 0x00, 0x00, // mov edx, [rax+0x74f4]
        0x45, 0x31, 0xc9, // xor r9d, r9d
        0x48, 0x89, 0xc7, // mov rdi, rax
        0x4c, 0x8b, 0x80, 0xf8, 0x74, 0x00, 0x00, // mov r8, [rax+0x74f8]
        0xe8, 0x12, 0x55, 0x07, 0x00, // call do_interrupt_all
        0xc7, 0x83, 0x60, 0x75, 0x00, 0x00, 0xff, 0xff, 0xff,
        0xff, // mov dword [rbx+0x7560], -1
        0x48, 0x83, 0xc4, 0x08, // add rsp, 8
        0x5b, 0x5d, 0xc3, // pop rbx; pop rbp; ret
    ];

    fn guarded(code: &[u8]) -> Result<Patch> {
        guard(code, START, VMEXIT, DELIVER, 0x130)
    }

    #[test]
    fn the_assertion_makes_place_for_the_test() {
        let patch = guarded(CODE).unwrap();
        let expected = [
            0xf6, 0x80, 0xa2, 0x41, 0x00, 0x00, 0x20, // test byte [rax+0x41a2], 0x20
            0x0f, 0x84, 0x3e, 0x00, 0x00, 0x00, // je 8ca528
        ];
        assert_eq!(
            (patch.address, &patch.bytes[..]),
            (0x8c_a4dd, &expected[..])
        );
        let mut mended = CODE.to_vec();
        mended[17..30].copy_from_slice(&patch.bytes);
        let jump = decode(&mended, START)[5];
        assert_eq!(jump.near_branch_target(), 0x8c_a528);
        // Once is enough.
        assert_eq!(guarded(&mended).unwrap_err().to_string(), "no assertion");
    }

    #[test]
    fn other_code_is_not_taken_for_it() {
        let text = |code: &[u8]| guarded(code).unwrap_err().to_string();
        let with = |at: usize, bytes: &[u8]| {
            let mut code = CODE.to_vec();
            code[at..at + bytes.len()].copy_from_slice(bytes);
            text(&code)
        };
        assert_eq!(with(44, &[0x85]), "no exit", "a jump to elsewhere");
        assert_eq!(
            with(24, &[0x83, 0x00, 0x00, 0x00]),
            "the assertion does not lead out"
        );
        assert_eq!(with(36, &[0xbb]), "the argument is of something else");
        assert_eq!(with(33, &[0x10]), "the stack differs");
        assert_eq!(text(&CODE[..60]), "no delivery");
    }

    #[test]
    fn the_flags_are_what_an_exit_looks_at_first() {
        let find = |code: &[u8]| flags_offset(&decode(code, VMEXIT));
        // push rbx; test byte [rdi+0x130], 8
        let code = [0x53, 0xf6, 0x87, 0x30, 0x01, 0x00, 0x00, 0x08];
        assert_eq!(find(&code).unwrap(), 0x130);
        let mut other = code;
        other[7] = 4;
        find(&other).unwrap_err();
        find(&code[..1]).unwrap_err();
    }
}
