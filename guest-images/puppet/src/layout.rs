//! Where the puppet lies in the guest's physical memory, and what its pages hold.
//!
//! | address | size | what |
//! |---|---|---|
//! | [`CODE`] | 2 pages | the stub |
//! | [`IDT`] | 1 page | 256 gates |
//! | [`GDT`] | 1 page | descriptors |
//! | [`TABLES`] | 60 pages | page tables; the first is the top level |
//! | [`vp_block`] | 4 pages a VP | [`CommandPage`], [`InterruptLog`], TSS, stacks |
#![forbid(unsafe_code)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Size of a page in bytes.
pub const PAGE: u64 = 4096;
/// Guest physical address of the puppet. The memory is its own, no RAM of the partition: where a
/// PC has its flash.
pub const BASE: u64 = 0xff00_0000;
/// Address of the stub.
pub const CODE: u64 = BASE;
/// Address of the interrupt descriptor table.
pub const IDT: u64 = BASE + 0x2000;
/// Address of the global descriptor table.
pub const GDT: u64 = BASE + 0x3000;
/// Address of the page tables.
pub const TABLES: u64 = BASE + 0x4000;
/// Number of pages for page tables.
pub const TABLE_PAGES: u64 = 60;
/// Address of the first VP's block.
const VP_BLOCKS: u64 = TABLES + TABLE_PAGES * PAGE;
/// Size of a VP's block.
const VP_BLOCK_SIZE: u64 = 4 * PAGE;
/// Most VPs that a puppet has.
pub const MAX_VPS: u32 = 256;

/// Offset of the [`InterruptLog`] in a VP's block.
pub const LOG_OFFSET: u64 = PAGE;
/// Offset of the task state segment in a VP's block.
pub const TSS_OFFSET: u64 = 2 * PAGE;
/// Offset of the stacks in a VP's block.
const STACKS_OFFSET: u64 = 3 * PAGE;
/// Size of each of a VP's stacks.
const STACK_SIZE: u64 = PAGE / 4;

/// Port of one byte that a VP writes when a command is done. The host answers by filling the
/// command page and running the VP again.
pub const DONE_PORT: u8 = 0xf5;
/// Vector that the host raises to end [`Entry::Wait`](crate::Entry::Wait) when it has waited
/// enough. It is counted and logged as any other. Of the lowest priority of all that are not
/// exceptions: when it has been taken, so has everything else that was pending.
pub const WAKE_VECTOR: u8 = 32;
/// Vector of spurious interrupts.
pub const SPURIOUS_VECTOR: u8 = 0x8f;

/// Selector of 64-bit code at CPL 0.
pub const KERNEL_CODE: u16 = 0x10;
/// Selector of the stack at CPL 0.
pub const KERNEL_DATA: u16 = 0x18;
/// Selector of data and stack at CPL 3.
pub const USER_DATA: u16 = 0x23;
/// Selector of 64-bit code at CPL 3.
pub const USER_CODE: u16 = 0x2b;
/// Selector of the task state segment, which the table need not describe.
pub const TSS_SELECTOR: u16 = 0x30;

/// [`CommandPage::status`]: the host has given a command.
pub const STATUS_PENDING: u32 = 0;
/// [`CommandPage::status`]: the command is done.
pub const STATUS_DONE: u32 = 1;
/// [`CommandPage::status`]: the command ended in an exception.
pub const STATUS_EXCEPTION: u32 = 2;
/// [`CommandPage::options`]: load and store XMM registers too.
pub const OPTION_XMM: u8 = 1;

/// RFLAGS with nothing set but the bit that always is.
pub const RFLAGS_FIXED: u64 = 2;
/// Position of the I/O privilege level in RFLAGS.
pub const RFLAGS_IOPL_SHIFT: u32 = 12;

/// Number of vectors in an [`InterruptLog`].
pub const LOG_ENTRIES: usize = 2048;

/// General registers without RSP.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
}

/// An exception, as its handler found it.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Exception {
    /// Vector, 0 to 31.
    pub vector: u64,
    /// Error code; 0 where the vector has none.
    pub error_code: u64,
    /// Address of the instruction, or of the next one for a trap.
    pub rip: u64,
    /// Code segment; the privilege level in bits 1:0.
    pub cs: u64,
    /// Flags.
    pub rflags: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// CR2: the address of the last page fault.
    pub cr2: u64,
}

impl Exception {
    /// The error code, if the vector has one.
    pub fn error_code(&self) -> Option<u32> {
        let has = matches!(self.vector, 8 | 10..=14 | 17 | 21 | 29 | 30);
        has.then_some(self.error_code as u32)
    }
}

/// A VP's command and its result, at the start of its block. The host writes it while the VP is at
/// [`DONE_PORT`] and at no other time.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CommandPage {
    /// Address of the routine: one of the routines of [`crate::Entry`].
    pub routine: u64,
    /// Address of what the routine calls: one of the targets of [`crate::Entry`], a hypercall
    /// page, or any code that keeps RSP and ends in RET.
    pub target: u64,
    /// [`STATUS_PENDING`] from the host, then [`STATUS_DONE`] or [`STATUS_EXCEPTION`].
    pub status: u32,
    /// [`OPTION_XMM`] or 0.
    pub options: u32,
    /// Interrupts taken since the start; the low bits are the position in the log.
    pub interrupts: u64,
    /// RSP at CPL 0.
    pub kernel_stack: u64,
    /// RSP at CPL 3.
    pub user_stack: u64,
    /// RFLAGS at CPL 3.
    pub user_rflags: u64,
    /// Address of the local APIC's EOI register, or 0 for the x2APIC's MSR.
    pub eoi_register: u64,
    /// Registers before and after the call.
    pub registers: Registers,
    /// RSP after the call of [`crate::Entry::Call`] and [`crate::Entry::UserCall`].
    pub rsp_after: u64,
    /// XMM0 to XMM5 before and after the call.
    pub xmm: [u128; 6],
    /// The exception, with [`STATUS_EXCEPTION`].
    pub exception: Exception,
    /// RSP before the call.
    pub rsp_before: u64,
}

/// The interrupts that a VP took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InterruptLog {
    /// Number of interrupts by vector.
    pub counts: [u64; 256],
    /// The last vectors in the order in which they came, as a ring of which
    /// [`CommandPage::interrupts`] counts the position.
    pub vectors: [u8; LOG_ENTRIES],
}

/// Address of the block of VP `vp`, which starts with its [`CommandPage`].
pub fn vp_block(vp: u32) -> u64 {
    VP_BLOCKS + u64::from(vp) * VP_BLOCK_SIZE
}

/// Size of the puppet's memory for `vps` VPs, in bytes.
pub fn size(vps: u32) -> u64 {
    vp_block(vps) - BASE
}

/// A VP's stacks: the end of each, where it starts to grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stack {
    /// Commands at CPL 0.
    Kernel,
    /// Exceptions.
    Exception,
    /// Interrupts.
    Interrupt,
    /// Commands at CPL 3.
    User,
}

impl Stack {
    /// First address after the stack of VP `vp`.
    pub fn top(self, vp: u32) -> u64 {
        vp_block(vp) + STACKS_OFFSET + STACK_SIZE * (self as u64 + 1)
    }
}

const _: () = {
    assert!(size_of::<CommandPage>() <= PAGE as usize);
    assert!(size_of::<InterruptLog>() <= PAGE as usize);
    assert!(LOG_ENTRIES.is_power_of_two());
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_puppet_ends_below_what_kvm_keeps_for_itself() {
        // Identity map and TSS of KVM on hosts that need them.
        assert!(BASE + size(MAX_VPS) <= 0xfffb_c000);
        assert_eq!(size(1), 0x44000);
    }

    #[test]
    fn stacks_lie_in_the_block_of_their_vp() {
        let tops = [
            Stack::Kernel,
            Stack::Exception,
            Stack::Interrupt,
            Stack::User,
        ]
        .map(|s| s.top(3));
        assert!(tops.is_sorted());
        assert_eq!(tops[3], vp_block(4));
        assert_eq!(tops[0], vp_block(3) + 0x3400);
    }
}
