//! A guest, written from docs/spec alone, on [`crate::guest::Guest`] alone.
//!
//! Nothing here shares a definition with the library under test. Each layer is a handle that is
//! cheap to clone and uses the one below:
//!
//! | layer | what |
//! |---|---|
//! | [`vm::Vm`] | a machine, its pages and its interrupts; every exchange is traced |
//! | [`kernel::Kernel`] | hypercall page, hypercalls, SynIC of every VP |
//! | [`vmbus::VmBus`] | contact, offers, GPADLs, channels |
//! | [`ring::Ring`] | one ring of a channel |
//! | [`vpci::Bus`] | the messages of a virtual PCI bus, its config window |
//! | [`pviommu::PvIommu`] | the device domain calls, and first-stage tables |
//! | [`testdev::TestDev`] | a driver of the device that the suite plugs in |
//!
//! Methods that a well-behaved guest uses turn anything but success into a
//! [`Failure`](crate::check::Failure). Beside each there is a raw one that takes any bytes and
//! gives back what came.
#![forbid(unsafe_code)]

pub mod kernel;
pub mod pviommu;
pub mod ring;
pub mod synic;
pub mod testdev;
pub mod vm;
pub mod vmbus;
pub mod vpci;
pub mod wire;
