//! Conformance suite: does a host show its guests a Hyper-V vPCI bus as `docs/spec` says?
//!
//! | part | what |
//! |---|---|
//! | [`guest`] | what a guest's CPU can do, as one trait |
//! | [`host`] | what a VM is made of, and what its operator can do |
//! | [`bed`] | where a guest runs |
//! | [`check`] | a check, its verdict, and how it fails |
#![deny(unsafe_code)]

pub mod bed;
pub mod check;
pub mod guest;
pub mod host;
