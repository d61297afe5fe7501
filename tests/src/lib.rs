//! Conformance suite: does a host show its guests a Hyper-V vPCI bus as `docs/spec` says?
//!
//! | part | what |
//! |---|---|
//! | [`guest`] | what a guest's CPU can do, as one trait |
//! | [`host`] | what a VM is made of, and what its operator can do |
//! | [`bed`], [`beds`] | where a guest runs: `sim` without any CPU, and real ones |
//! | [`model`] | a guest on that trait: kernel, VMBus, bus and device drivers |
//! | [`devices`] | what is plugged in where `testdev` does not do |
//! | [`check`], [`checks`] | a check, its verdict, how it fails; all of them, by area |
//! | [`runner`], [`report`] | runs checks and keeps the results; the formats of a report |
//! | [`storm`] | a guest that means harm, for as long as one likes |
//! | [`trace`], [`decode`] | what was exchanged last, in words |
//! | [`rows`] | which row of docs/spec has which checks |
#![deny(unsafe_code)]

pub mod bed;
pub mod beds;
pub mod check;
pub mod checks;
pub mod decode;
pub mod devices;
pub mod guest;
pub mod host;
pub mod model;
pub mod report;
pub mod rows;
pub mod runner;
pub mod storm;
pub mod trace;
