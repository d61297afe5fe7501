//! A virtual PCI bus: its identity, its protocol, its configuration window, its BARs
//! (docs/spec/vpci.md). Interrupts, DMA and how a bus is left are areas of their own.
#![forbid(unsafe_code)]

mod bars;
mod config;
mod framing;
mod identity;
mod power;
mod relations;
mod resources;
mod versions;
mod window;

use crate::check::{Check, Context, Failure};
use crate::host::{BusSetup, FunctionSetup, Setup};
use crate::model::kernel::Kernel;
use crate::model::vm::Vm;
use crate::model::vmbus::VmBus;
use crate::model::vpci::{Bus, VERSIONS, nt};

/// All checks of this area.
pub const CHECKS: [&[Check]; 9] = [
    identity::CHECKS,
    versions::CHECKS,
    framing::CHECKS,
    relations::CHECKS,
    resources::CHECKS,
    power::CHECKS,
    window::CHECKS,
    config::CHECKS,
    bars::CHECKS,
];

/// A load of 1, 2 and 4 bytes where nothing answers.
const ONES: [(usize, u64); 3] = [(1, 0xff), (2, 0xffff), (4, 0xffff_ffff)];

/// The machine's only bus with its channel open and nothing sent.
fn open(vm: &Vm) -> Result<Bus, Failure> {
    let vmbus = VmBus::connect(&Kernel::boot(vm)?)?;
    let offer = vmbus.only_offer()?;
    Ok(Bus::new(vmbus.open(&offer)?, 0))
}

/// The usual bus with its channel open and nothing sent.
fn opened(context: &Context) -> Result<Bus, Failure> {
    open(&context.usual()?)
}

/// The usual bus with a version agreed on and nothing else sent.
fn negotiated(context: &Context, version: u32) -> Result<Bus, Failure> {
    let bus = opened(context)?;
    crate::check::equal("status of the query", bus.negotiate(version)?, nt::SUCCESS)?;
    Ok(bus)
}

/// The usual bus in D0.
fn in_d0(context: &Context) -> Result<Bus, Failure> {
    Bus::bring_up(&context.usual()?)
}

/// The usual machine with these functions on its only bus.
fn with(functions: Vec<FunctionSetup>) -> Setup {
    let instance = BusSetup::instance(1);
    Setup {
        buses: vec![BusSetup {
            instance,
            functions,
        }],
        ..Setup::default()
    }
}

/// The usual machine with these functions, its bus in D0.
fn bus_with(context: &Context, functions: Vec<FunctionSetup>) -> Result<Bus, Failure> {
    Bus::bring_up(&context.machine(&with(functions))?)
}

/// The protocol's versions, oldest first.
fn versions() -> impl Iterator<Item = u32> {
    VERSIONS.into_iter().rev()
}
