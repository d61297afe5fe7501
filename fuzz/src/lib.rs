//! Fuzzing of everything that a guest can write.
//!
//! | part | what |
//! |---|---|
//! | [`targets`] | one function a fuzz target: bytes in, panic if something does not hold |
//! | [`machine`] | a partition whose workers run when told to, and what must hold of it at any time |
//! | [`guest`] | a guest that does everything right, to bring the machine to where a target begins |
//! | [`input`] | what a hostile guest and the VM's operator do, as types that any bytes decode to |
//! | [`values`] | the values in it: mostly such as mean something, sometimes any |
//! | [`edit`] | changes to a saved partition |
//! | [`virtio`] | a guest that drives virtio devices, and what must hold of their queues |
//! | [`mod@unit`] | a pvIOMMU alone, and a plain walk of tables to compare it with |
//!
//! `docs/fuzzing.md` says how to run it.
#![forbid(unsafe_code)]

pub mod edit;
pub mod guest;
pub mod input;
pub mod machine;
pub mod targets;
pub mod unit;
pub mod values;
pub mod virtio;
