//! Interrupts of functions: messages, where they go, what masks them (docs/spec/vpci.md,
//! section 7).
#![forbid(unsafe_code)]

mod create;
mod delete;
mod load;
mod msi;
mod msix;
mod retarget;

use crate::check::{Check, Context, Failure, Verdict, equal};
use crate::host::Setup;
use crate::model::kernel::VMBUS_VECTOR;
use crate::model::testdev::TestDev;
use crate::model::vm::Vm;
use crate::model::vpci::Bus;

/// All checks of this area.
pub const CHECKS: [&[Check]; 6] = [
    create::CHECKS,
    delete::CHECKS,
    retarget::CHECKS,
    msix::CHECKS,
    msi::CHECKS,
    load::CHECKS,
];

/// The usual device, brought up.
fn device(context: &Context) -> Result<TestDev, Failure> {
    TestDev::bring_up(&context.usual()?)
}

/// The usual bus, in D0.
fn bus(context: &Context) -> Result<Bus, Failure> {
    Bus::bring_up(&context.usual()?)
}

/// The usual machine with more VPs.
fn with_vps(vps: u32) -> Setup {
    Setup {
        vps,
        ..Setup::default()
    }
}

/// Vectors that arrived on a VP, without that of VMBus, in ascending order.
fn vectors(vm: &Vm, vp: u32) -> Result<Vec<u8>, Failure> {
    let mut vectors = vm.take_interrupts(vp)?;
    vectors.retain(|vector| *vector != VMBUS_VECTOR);
    vectors.sort_unstable();
    Ok(vectors)
}

/// Demands that these vectors arrive, each on its VP, and no others.
fn arrive(what: &str, vm: &Vm, expected: &[(u32, u8)]) -> Verdict {
    for (vp, vector) in expected {
        let arrived = vm.expect_interrupt(*vp, *vector);
        arrived.map_err(|failure| failure.during(what))?;
    }
    for vp in 0..vm.vps() {
        let what = format!("{what}: further interrupts of VP {vp}");
        equal(what, vectors(vm, vp)?, vec![])?;
    }
    Ok(())
}
