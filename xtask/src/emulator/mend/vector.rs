//! VMRUN leaves the vector that it injects where an exception is looked for.
//!
//! VMRUN with an interrupt to inject delivers it at once, and besides leaves its vector in
//! `CPUState::exception_index` (`helper_vmrun` in target/i386/tcg/system/svm_helper.c, up to 11.1 at
//! least), where the main loop looks for an exception to deliver. Nothing clears it until the guest's
//! next exit; if another thread asks the CPU to leave its loop before that, the guest takes the
//! interrupt once more, with IF clear, most often in the first instruction of its handler. A kernel
//! that came from user mode then runs with the user's GS base, and ends in a triple fault.
//!
//! The store is of no use, so it is overwritten with NOPs. It is found by what it does: the vector is
//! the second argument of the call that delivers the interrupt, and between the last write of that
//! register and the call there is one store of it.
#![forbid(unsafe_code)]

use super::Functions;
use super::Patch;
use super::decode;
use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use iced_x86::Code;
use iced_x86::FlowControl;
use iced_x86::Instruction;
use iced_x86::InstructionInfoFactory;
use iced_x86::OpAccess;
use iced_x86::Register;

/// The function with the defect, and the one that delivers the interrupt.
const FUNCTION: &str = "helper_vmrun";
const DELIVERY: &str = "do_interrupt_x86_hardirq";

const NOP: u8 = 0x90;

/// What to overwrite.
pub(super) fn find(functions: &Functions<'_>) -> Result<Patch> {
    let function = functions.get(FUNCTION)?;
    let delivery = functions.get(DELIVERY)?.address;
    let store = vector_store(function.code, function.address, delivery)?;
    Ok(Patch {
        address: store.ip(),
        bytes: vec![NOP; store.len()],
    })
}

/// The one store of the second argument ahead of the one call of `delivery`.
fn vector_store(code: &[u8], start: u64, delivery: u64) -> Result<Instruction> {
    let instructions = decode(code, start);
    let is_call = |instruction: &Instruction| {
        instruction.flow_control() == FlowControl::Call
            && instruction.near_branch_target() == delivery
    };
    let mut calls = (0..instructions.len()).filter(|&at| is_call(&instructions[at]));
    let call = calls.next().context("no delivery")?;
    ensure!(calls.next().is_none(), "more than one delivery");
    let mut factory = InstructionInfoFactory::new();
    let mut stores = Vec::new();
    for instruction in instructions[..call].iter().rev() {
        let straight = matches!(
            instruction.flow_control(),
            FlowControl::Next | FlowControl::ConditionalBranch
        );
        ensure!(straight, "the vector is not set in the way to its delivery");
        if instruction.code() == Code::Mov_rm32_r32
            && instruction.op0_register() == Register::None
            && instruction.op1_register() == Register::ESI
        {
            stores.push(*instruction);
        }
        let mut registers = factory.info(instruction).used_registers().iter();
        if registers.any(|used| {
            used.register().full_register() == Register::RSI
                && matches!(used.access(), OpAccess::Write | OpAccess::ReadWrite)
        }) {
            break;
        }
    }
    ensure!(stores.len() == 1, "{} stores of the vector", stores.len());
    Ok(stores[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 0x8c_9797;
    const DELIVER: u64 = 0x94_1650;

    /// The delivery in QEMU 11.1.3 of Debian.
    const CODE: &[u8] = &[
        0x41, 0x0f, 0xb6, 0xf4, // movzx esi, r12b
        0x44, 0x89, 0xab, 0x80, 0x34, 0x00, 0x00, // mov [rbx+0x3480], r13d
        0x89, 0xb3, 0x50, 0xc2, 0xff, 0xff, // mov [rbx-0x3db0], esi
        0xc7, 0x83, 0x84, 0x34, 0x00, 0x00, 0x00, 0x00, 0x00,
        0x00, // mov dword [rbx+0x3484], 0
        0x48, 0xc7, 0x83, 0x88, 0x34, 0x00, 0x00, 0xff, 0xff, 0xff,
        0xff, // mov qword [rbx+0x3488], -1
        0xf6, 0x05, 0xdc, 0x5d, 0x57, 0x01, 0x02, // test byte [rip+0x1575ddc], 2
        0x0f, 0x85, 0xc1, 0x00, 0x00, 0x00, // jne
        0xba, 0x01, 0x00, 0x00, 0x00, // mov edx, 1
        0x48, 0x89, 0xdf, // mov rdi, rbx
        0xe8, 0x79, 0x7e, 0x07, 0x00, // call do_interrupt_x86_hardirq
        0xc3, // ret
    ];

    #[test]
    fn the_store_of_the_vector_is_found() {
        let store = vector_store(CODE, START, DELIVER).unwrap();
        assert_eq!((store.ip(), store.len()), (START + 11, 6));
    }

    #[test]
    fn a_program_without_the_store_is_left_alone() {
        let mut code = CODE.to_vec();
        code[11..17].fill(NOP);
        let error = vector_store(&code, START, DELIVER).unwrap_err();
        assert_eq!(error.to_string(), "0 stores of the vector");
    }

    #[test]
    fn other_code_is_not_taken_for_it() {
        let text = |code: &[u8]| vector_store(code, START, DELIVER).unwrap_err().to_string();
        assert_eq!(text(&CODE[..CODE.len() - 6]), "no delivery");
        assert_eq!(
            text(&[&[0x90], &CODE[4..]].concat()),
            "no delivery",
            "the call goes elsewhere"
        );
        let mut jumps = CODE.to_vec();
        // A jump in place of the vector's last write.
        jumps[..4].copy_from_slice(&[0xeb, 0x02, 0x90, 0x90]);
        jumps[11..17].fill(NOP);
        assert_eq!(
            text(&jumps),
            "the vector is not set in the way to its delivery"
        );
    }
}
