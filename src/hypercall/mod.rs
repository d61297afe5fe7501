//! Hypercalls: decoding, dispatch and result (docs/spec/hyperv-guest-interface.md, section 3).
//!
//! A VMM hands the registers of a VP that called to a [`Dispatcher`], which finds the call's
//! [`CallGroup`], checks the control word and the parameter lists against the call's
//! [`CallFormat`], copies the input once to the stack, lets the group execute, and places the
//! output. Nothing on this path allocates or takes a lock.
//!
//! Groups see bytes that cannot change any more. Each group turns them into a typed trait:
//! [`MessageCalls`], [`InterruptCalls`].
#![forbid(unsafe_code)]

mod dispatch;
mod interrupt;
mod message;
mod page;
mod stats;
mod vp_set;

use std::fmt::Debug;

use zerocopy::FromBytes;

use crate::hv::HvStatus;

pub use dispatch::Dispatcher;
pub use interrupt::{InterruptCalls, InterruptGroup, RetargetInterrupt};
pub use message::{MessageCalls, MessageGroup, PostMessage};
pub use page::{CallInstruction, KernelCalls, PageCode};
pub use stats::{CallCount, CallCounters};
pub use vp_set::VpSet;

/// Bytes of XMM0 to XMM5, in order, as they lie in memory.
pub type XmmBlock = [u8; 96];

/// Registers of the VP that calls, by their role (docs/spec/hyperv-guest-interface.md, section
/// 3.2). The implementation knows where they are in 64-bit and in 32-bit mode.
pub trait CallRegisters {
    /// Current privilege level.
    fn cpl(&self) -> u8;
    /// The control word.
    fn control(&self) -> u64;
    /// GPA of the input list, or the first 8 bytes of fast input.
    fn input(&self) -> u64;
    /// GPA of the output list, or the second 8 bytes of fast input.
    fn output(&self) -> u64;
    /// XMM0 to XMM5, fetched when a call needs them; `None` where the transport cannot reach them,
    /// which makes such a call an invalid opcode.
    fn xmm(&mut self) -> Option<XmmBlock> {
        None
    }
    /// Replaces XMM0 to XMM5. Only called after [`CallRegisters::xmm`] returned a value.
    fn set_xmm(&mut self, _xmm: &XmmBlock) {}
}

/// How a call ended, for the VMM to carry out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// The call is done: the result word goes to RAX (EDX:EAX in 32-bit mode).
    Complete {
        /// Status in bits 15:0, elements done in bits 43:32.
        result: u64,
    },
    /// A rep call made progress and is not done: the control word goes to RCX (EDX:EAX), and the
    /// guest enters the hypercall page from its start again, after pending interrupts.
    Restart {
        /// Control word with the new start index.
        control: u64,
    },
    /// The guest gets #UD: wrong privilege level, hypercalls not enabled, or registers used that
    /// are not offered.
    InvalidOpcode,
}

/// Which parts of a call exist, and their sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallFormat {
    fixed: u16,
    variable: bool,
    output: u16,
    rep: Option<RepFormat>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RepFormat {
    input: u16,
    output: u16,
}

impl CallFormat {
    /// A simple call with `fixed` bytes of input (at least 1: every call has input) and no output.
    pub const fn simple(fixed: u16) -> Self {
        assert!(fixed > 0);
        Self {
            fixed,
            variable: false,
            output: 0,
            rep: None,
        }
    }

    /// The same with a variable header behind the fixed one.
    pub const fn with_variable_header(mut self) -> Self {
        self.variable = true;
        self
    }

    /// The same simple call with `output` bytes of output.
    pub const fn with_output(mut self, output: u16) -> Self {
        assert!(self.rep.is_none());
        self.output = output;
        self
    }

    /// The same as a rep call, with `input` bytes of input and `output` bytes of output for each
    /// element.
    pub const fn with_elements(mut self, input: u16, output: u16) -> Self {
        assert!(self.output == 0);
        self.rep = Some(RepFormat { input, output });
        self
    }
}

/// The input of a call, copied out of the guest's reach.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// Call code.
    pub code: u16,
    /// Fixed header, as long as the format says.
    pub fixed: &'a [u8],
    /// Variable header: a multiple of 8 bytes; empty for a call without one.
    pub variable: &'a [u8],
    /// Input of the elements that are still to be done.
    pub elements: &'a [u8],
    /// Number of elements that are still to be done; at least 1 for a rep call, 0 for a simple one.
    pub count: u16,
}

impl Call<'_> {
    /// The fixed header as its wire structure.
    ///
    /// # Errors
    ///
    /// [`HvStatus::INVALID_HYPERCALL_INPUT`] if the structure is longer than the format said.
    pub fn header<T: FromBytes>(&self) -> Result<T, HvStatus> {
        match T::read_from_prefix(self.fixed) {
            Ok((header, _)) => Ok(header),
            Err(_) => Err(HvStatus::INVALID_HYPERCALL_INPUT),
        }
    }
}

/// How far a rep call came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RepProgress {
    /// Elements done now, at most [`Call::count`].
    pub done: u16,
    /// Why it stopped. Success before the last element means "call again": a group bounds the
    /// work of one execution that way, and must then have done at least one element.
    pub status: Result<(), HvStatus>,
}

/// A family of calls.
pub trait CallGroup: Send + Sync + Debug {
    /// The format of a call, or `None` if it does not belong to this group or is not offered.
    fn format(&self, code: u16) -> Option<CallFormat>;

    /// Executes a simple call. `output` is as long as the format says, zeroed, and reaches the
    /// guest only on success. Bounded work, callable from any VP thread.
    ///
    /// # Errors
    ///
    /// The status for the guest; nothing has changed then.
    fn execute(&self, call: &Call<'_>, output: &mut [u8]) -> Result<(), HvStatus>;

    /// Executes elements of a rep call, in order. `output` covers [`Call::count`] elements; what
    /// belongs to the elements done reaches the guest. A group without rep calls keeps the default.
    fn execute_rep(&self, _call: &Call<'_>, _output: &mut [u8]) -> RepProgress {
        RepProgress {
            done: 0,
            status: Err(HvStatus::INVALID_HYPERCALL_CODE),
        }
    }
}

#[cfg(test)]
mod tests;
