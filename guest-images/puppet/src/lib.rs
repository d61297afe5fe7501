//! The puppet: a guest of a few pages whose virtual CPUs do single instructions on command.
//!
//! A test on the host says what a VP shall do, in the VP's [`layout::CommandPage`]; the VP does it
//! with the real instruction, stores what came of it, and leaves to the host by an OUT to
//! [`layout::DONE_PORT`]. So the logic of a guest is Rust on the host, and what the VMM sees are
//! the exits of a real CPU. All that the VMM needs is a vCPU, a memory slot for [`image`], and the
//! port.
//!
//! ```text
//!   host                               VP
//!   ----                               --
//!                                 next: out DONE_PORT, al
//!   fill CommandPage  <--------------
//!   run the vCPU      -------------->  jmp [routine]
//!                                        load registers
//!                                        call [target]  (hypercall page, or RDMSR, a load, ...)
//!                                        store registers
//!   take the result   <--------------  next: out DONE_PORT, al
//! ```
//!
//! Interrupts are off but in [`Entry::Wait`]; their handlers count and log the
//! vector and write EOI. Exceptions end the command: the handler stores vector, error code, RIP
//! and CR2.
#![deny(unsafe_code)]

mod image;
#[cfg(feature = "kvm")]
pub mod kvm;
pub mod layout;
mod stub;

pub use image::{AddressError, PageTables, image, io_permission};
pub use stub::{Entry, VECTOR_SIZE, code};
