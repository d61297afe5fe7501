//! The code that runs in the guest, as bytes.
//!
//! Position-independent: it addresses its command page through GS and itself relative to RIP. It
//! uses integer instructions, plus MOVUPS where a command asks for XMM registers, so that it also
//! runs on a KVM that emulates the guest's instructions.
#![allow(unsafe_code)]

use std::arch::global_asm;
use std::mem::offset_of;

use crate::layout::{
    CommandPage, DONE_PORT, InterruptLog, KERNEL_DATA, LOG_ENTRIES, LOG_OFFSET, OPTION_XMM,
    STATUS_DONE, STATUS_EXCEPTION, USER_CODE, USER_DATA, WAKE_VECTOR,
};

global_asm!(
    // Data, as far as this program is concerned.
    ".pushsection .rodata.vpci_puppet, \"a\", @progbits",
    ".balign 64",
    ".globl vpci_puppet_start, vpci_puppet_end",
    ".hidden vpci_puppet_start, vpci_puppet_end",
    "vpci_puppet_start:",

    // The table of `Entry`, in its order: offsets from the start.
    ".long .Lvpci_vectors - vpci_puppet_start", // Vectors
    ".long .Lvpci_next - vpci_puppet_start",  // Start
    ".long .Lvpci_call - vpci_puppet_start",  // Call
    ".long .Lvpci_short_call - vpci_puppet_start",  // ShortCall
    ".long .Lvpci_user_call - vpci_puppet_start",  // UserCall
    ".long .Lvpci_wait - vpci_puppet_start",  // Wait
    ".long .Lvpci_rdmsr - vpci_puppet_start", // Rdmsr
    ".long .Lvpci_wrmsr - vpci_puppet_start", // Wrmsr
    ".long .Lvpci_cpuid - vpci_puppet_start", // Cpuid
    ".long .Lvpci_load8 - vpci_puppet_start", // Load8
    ".long .Lvpci_load16 - vpci_puppet_start", // Load16
    ".long .Lvpci_load32 - vpci_puppet_start", // Load32
    ".long .Lvpci_load64 - vpci_puppet_start", // Load64
    ".long .Lvpci_store8 - vpci_puppet_start", // Store8
    ".long .Lvpci_store16 - vpci_puppet_start", // Store16
    ".long .Lvpci_store32 - vpci_puppet_start", // Store32
    ".long .Lvpci_store64 - vpci_puppet_start", // Store64
    ".long .Lvpci_out8 - vpci_puppet_start", // Out8
    ".long .Lvpci_out16 - vpci_puppet_start", // Out16
    ".long .Lvpci_out32 - vpci_puppet_start", // Out32
    ".long .Lvpci_rep_outs32 - vpci_puppet_start", // RepOuts32
    ".long .Lvpci_in32 - vpci_puppet_start", // In32
    ".long .Lvpci_ud - vpci_puppet_start", // UndefinedInstruction

    // A command is done: say how it ended, leave to the host, and take the next.
    ".Lvpci_done:",
    "    mov dword ptr gs:[{status}], {done}",
    ".Lvpci_next:",
    "    mov rsp, gs:[{kernel_stack}]",
    "    out {done_port}, al",
    "    jmp qword ptr gs:[{routine}]",

    // Call: with all registers.
    ".Lvpci_call:",
    "    call .Lvpci_body",
    "    jmp .Lvpci_done",

    // Short call: RAX, RCX, RDX in; these and RBX out.
    ".Lvpci_short_call:",
    "    mov rax, gs:[{rax}]",
    "    mov rcx, gs:[{rcx}]",
    "    mov rdx, gs:[{rdx}]",
    "    call qword ptr gs:[{target}]",
    "    mov gs:[{rax}], rax",
    "    mov gs:[{rcx}], rcx",
    "    mov gs:[{rdx}], rdx",
    "    mov gs:[{rbx}], rbx",
    "    jmp .Lvpci_done",

    // The same as a call, at CPL 3.
    ".Lvpci_user_call:",
    "    push {user_data}",
    "    push qword ptr gs:[{user_stack}]",
    "    push qword ptr gs:[{user_rflags}]",
    "    push {user_code}",
    "    lea rax, [rip + .Lvpci_user_code]",
    "    push rax",
    "    iretq",
    ".Lvpci_user_code:",
    "    call .Lvpci_body",
    ".Lvpci_user_end:",
    // Not INT, which not every KVM that emulates instructions knows.
    "    ud2",

    // Interrupts are taken here only. A pending one ends the HLT at once.
    ".Lvpci_wait:",
    "    sti",
    "    hlt",
    "    cli",
    "    jmp .Lvpci_done",
    // Loads the registers, calls the target, and stores the registers.
    ".Lvpci_body:",
    "    test byte ptr gs:[{call_options}], {option_xmm}",
    "    jz .Lvpci_load",
    "    movups xmm0, gs:[{xmm} + 0x00]",
    "    movups xmm1, gs:[{xmm} + 0x10]",
    "    movups xmm2, gs:[{xmm} + 0x20]",
    "    movups xmm3, gs:[{xmm} + 0x30]",
    "    movups xmm4, gs:[{xmm} + 0x40]",
    "    movups xmm5, gs:[{xmm} + 0x50]",
    ".Lvpci_load:",
    "    mov rax, gs:[{rax}]",
    "    mov rbx, gs:[{rbx}]",
    "    mov rcx, gs:[{rcx}]",
    "    mov rdx, gs:[{rdx}]",
    "    mov rsi, gs:[{rsi}]",
    "    mov rdi, gs:[{rdi}]",
    "    mov rbp, gs:[{rbp}]",
    "    mov r8, gs:[{r8}]",
    "    mov r9, gs:[{r9}]",
    "    mov r10, gs:[{r10}]",
    "    mov r11, gs:[{r11}]",
    "    mov r12, gs:[{r12}]",
    "    mov r13, gs:[{r13}]",
    "    mov r14, gs:[{r14}]",
    "    mov r15, gs:[{r15}]",
    "    mov gs:[{rsp_before}], rsp",
    "    call qword ptr gs:[{target}]",
    "    mov gs:[{rsp_after}], rsp",
    "    mov rsp, gs:[{rsp_before}]",
    "    mov gs:[{rax}], rax",
    "    mov gs:[{rbx}], rbx",
    "    mov gs:[{rcx}], rcx",
    "    mov gs:[{rdx}], rdx",
    "    mov gs:[{rsi}], rsi",
    "    mov gs:[{rdi}], rdi",
    "    mov gs:[{rbp}], rbp",
    "    mov gs:[{r8}], r8",
    "    mov gs:[{r9}], r9",
    "    mov gs:[{r10}], r10",
    "    mov gs:[{r11}], r11",
    "    mov gs:[{r12}], r12",
    "    mov gs:[{r13}], r13",
    "    mov gs:[{r14}], r14",
    "    mov gs:[{r15}], r15",
    "    test byte ptr gs:[{call_options}], {option_xmm}",
    "    jz .Lvpci_stored",
    "    movups gs:[{xmm} + 0x00], xmm0",
    "    movups gs:[{xmm} + 0x10], xmm1",
    "    movups gs:[{xmm} + 0x20], xmm2",
    "    movups gs:[{xmm} + 0x30], xmm3",
    "    movups gs:[{xmm} + 0x40], xmm4",
    "    movups gs:[{xmm} + 0x50], xmm5",
    ".Lvpci_stored:",
    "    ret",

    // Targets.
    ".Lvpci_rdmsr:",
    "    rdmsr",
    "    ret",
    ".Lvpci_wrmsr:",
    "    wrmsr",
    "    ret",
    ".Lvpci_cpuid:",
    "    cpuid",
    "    ret",
    ".Lvpci_load8:",
    "    mov al, [rdx]",
    "    ret",
    ".Lvpci_load16:",
    "    mov ax, [rdx]",
    "    ret",
    ".Lvpci_load32:",
    "    mov eax, [rdx]",
    "    ret",
    ".Lvpci_load64:",
    "    mov rax, [rdx]",
    "    ret",
    ".Lvpci_store8:",
    "    mov [rdx], al",
    "    ret",
    ".Lvpci_store16:",
    "    mov [rdx], ax",
    "    ret",
    ".Lvpci_store32:",
    "    mov [rdx], eax",
    "    ret",
    ".Lvpci_store64:",
    "    mov [rdx], rax",
    "    ret",
    ".Lvpci_out8:",
    "    out dx, al",
    "    ret",
    ".Lvpci_out16:",
    "    out dx, ax",
    "    ret",
    ".Lvpci_out32:",
    "    out dx, eax",
    "    ret",
    ".Lvpci_rep_outs32:",
    "    rep outsd",
    "    ret",
    ".Lvpci_in32:",
    "    in eax, dx",
    "    ret",
    ".Lvpci_ud:",
    "    ud2",

    // Exceptions. Stack: vector, error code or 0, RIP, CS, RFLAGS, RSP, SS.
    ".Lvpci_exception:",
    "    pop qword ptr gs:[{vector}]",
    "    pop qword ptr gs:[{error_code}]",
    "    pop qword ptr gs:[{rip}]",
    "    pop qword ptr gs:[{cs}]",
    "    pop qword ptr gs:[{rflags}]",
    "    pop qword ptr gs:[{rsp}]",
    "    mov eax, {kernel_data}",
    "    mov ss, eax",
    // The call at CPL 3 has come back.
    "    lea rax, [rip + .Lvpci_user_end]",
    "    cmp rax, gs:[{rip}]",
    "    je .Lvpci_done",
    "    mov rax, cr2",
    "    mov gs:[{cr2}], rax",
    "    mov dword ptr gs:[{status}], {exception}",
    "    jmp .Lvpci_next",

    // Interrupts. Stack: vector, then what IRETQ takes.
    ".Lvpci_interrupt:",
    "    push rax",
    "    push rcx",
    "    push rdx",
    "    mov rax, [rsp + 24]",
    "    inc qword ptr gs:[rax * 8 + {counts}]",
    "    mov rcx, gs:[{logged}]",
    "    mov edx, ecx",
    "    and edx, {log_mask}",
    "    mov gs:[rdx + {log}], al",
    "    inc rcx",
    "    mov gs:[{logged}], rcx",
    "    mov rax, gs:[{eoi_register}]",
    "    test rax, rax",
    "    jnz .Lvpci_xapic",
    "    mov ecx, 0x80b", // x2APIC EOI
    "    xor edx, edx",
    "    wrmsr",
    "    jmp .Lvpci_taken",
    ".Lvpci_xapic:",
    "    mov dword ptr [rax], 0",
    ".Lvpci_taken:",
    "    pop rdx",
    "    pop rcx",
    "    pop rax",
    "    add rsp, 8",
    "    iretq",

    // One entry point of 16 bytes a vector.
    ".balign 16",
    ".Lvpci_vectors:",
    ".set vpci_puppet_vector, 0",
    ".rept 256",
    ".balign 16, 0xcc",
    ".if vpci_puppet_vector < {wake_vector}",
    // Vectors without an error code: all but 8, 10 to 14, 17, 21, 29 and 30.
    ".if ((0x60227d00 >> vpci_puppet_vector) & 1) == 0",
    "    push 0",
    ".endif",
    "    .byte 0x68", // push of 32 bits, sign-extended
    "    .long vpci_puppet_vector",
    "    jmp .Lvpci_exception",
    ".else",
    "    .byte 0x68",
    "    .long vpci_puppet_vector",
    "    jmp .Lvpci_interrupt",
    ".endif",
    ".set vpci_puppet_vector, vpci_puppet_vector + 1",
    ".endr",
    "vpci_puppet_end:",
    ".popsection",

    routine = const offset_of!(CommandPage, routine),
    target = const offset_of!(CommandPage, target),
    status = const offset_of!(CommandPage, status),
    call_options = const offset_of!(CommandPage, options),
    kernel_stack = const offset_of!(CommandPage, kernel_stack),
    user_stack = const offset_of!(CommandPage, user_stack),
    user_rflags = const offset_of!(CommandPage, user_rflags),
    eoi_register = const offset_of!(CommandPage, eoi_register),
    logged = const offset_of!(CommandPage, interrupts),
    rax = const offset_of!(CommandPage, registers.rax),
    rbx = const offset_of!(CommandPage, registers.rbx),
    rcx = const offset_of!(CommandPage, registers.rcx),
    rdx = const offset_of!(CommandPage, registers.rdx),
    rsi = const offset_of!(CommandPage, registers.rsi),
    rdi = const offset_of!(CommandPage, registers.rdi),
    rbp = const offset_of!(CommandPage, registers.rbp),
    r8 = const offset_of!(CommandPage, registers.r8),
    r9 = const offset_of!(CommandPage, registers.r9),
    r10 = const offset_of!(CommandPage, registers.r10),
    r11 = const offset_of!(CommandPage, registers.r11),
    r12 = const offset_of!(CommandPage, registers.r12),
    r13 = const offset_of!(CommandPage, registers.r13),
    r14 = const offset_of!(CommandPage, registers.r14),
    r15 = const offset_of!(CommandPage, registers.r15),
    rsp_before = const offset_of!(CommandPage, rsp_before),
    rsp_after = const offset_of!(CommandPage, rsp_after),
    xmm = const offset_of!(CommandPage, xmm),
    vector = const offset_of!(CommandPage, exception.vector),
    error_code = const offset_of!(CommandPage, exception.error_code),
    rip = const offset_of!(CommandPage, exception.rip),
    cs = const offset_of!(CommandPage, exception.cs),
    rflags = const offset_of!(CommandPage, exception.rflags),
    rsp = const offset_of!(CommandPage, exception.rsp),
    cr2 = const offset_of!(CommandPage, exception.cr2),
    counts = const LOG_OFFSET as usize + offset_of!(InterruptLog, counts),
    log = const LOG_OFFSET as usize + offset_of!(InterruptLog, vectors),
    log_mask = const LOG_ENTRIES - 1,
    done_port = const DONE_PORT,
    done = const STATUS_DONE,
    exception = const STATUS_EXCEPTION,
    option_xmm = const OPTION_XMM,
    kernel_data = const KERNEL_DATA,
    user_data = const USER_DATA,
    user_code = const USER_CODE,
    wake_vector = const WAKE_VECTOR,
);

unsafe extern "C" {
    static vpci_puppet_start: u8;
    static vpci_puppet_end: u8;
}

/// The code, to be placed at [`crate::layout::CODE`].
pub fn code() -> &'static [u8] {
    let start = &raw const vpci_puppet_start;
    let end = &raw const vpci_puppet_end;
    // SAFETY: both symbols bound the same section fragment above, the end after the start.
    let len = unsafe { end.offset_from(start) };
    // SAFETY: the bytes between the symbols are read-only data of this program.
    unsafe { std::slice::from_raw_parts(start, len.unsigned_abs()) }
}

/// What the code has, at the offset that [`Entry::address`] finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Entry {
    /// Entry points of the 256 vectors, [`VECTOR_SIZE`] bytes each.
    Vectors,
    /// Where a VP starts: it leaves to the host at once, for its first command.
    Start,
    /// Routine: loads all registers, calls the target, stores all registers.
    Call,
    /// Routine: loads RAX, RCX and RDX, calls the target, stores these and RBX.
    ShortCall,
    /// Routine: as [`Entry::Call`], at CPL 3 with the RFLAGS of [`CommandPage::user_rflags`].
    UserCall,
    /// Routine: halts until an interrupt has come. Others may be pending afterwards.
    Wait,
    /// Target: RDMSR.
    Rdmsr,
    /// Target: WRMSR.
    Wrmsr,
    /// Target: CPUID.
    Cpuid,
    /// Target: loads AL from the address in RDX.
    Load8,
    /// Target: loads AX from the address in RDX.
    Load16,
    /// Target: loads EAX from the address in RDX.
    Load32,
    /// Target: loads RAX from the address in RDX.
    Load64,
    /// Target: stores AL to the address in RDX.
    Store8,
    /// Target: stores AX to the address in RDX.
    Store16,
    /// Target: stores EAX to the address in RDX.
    Store32,
    /// Target: stores RAX to the address in RDX.
    Store64,
    /// Target: writes AL to port DX.
    Out8,
    /// Target: writes AX to port DX.
    Out16,
    /// Target: writes EAX to port DX.
    Out32,
    /// Target: REP OUTSD of RCX doublewords from RSI to port DX.
    RepOuts32,
    /// Target: reads EAX from port DX.
    In32,
    /// Target: UD2.
    UndefinedInstruction,
}

/// Distance of the entry points of two vectors, in bytes.
pub const VECTOR_SIZE: u64 = 16;

impl Entry {
    /// Guest address.
    pub fn address(self) -> u64 {
        let at = self as usize * 4;
        let offset = code()[at..].first_chunk().copied().map(u32::from_le_bytes);
        crate::layout::CODE + u64::from(offset.unwrap_or(0))
    }
}
