//! How hypercalls are made and answered, and the life of the hypercall page
//! (docs/spec/hyperv-guest-interface.md, sections 3, 4 and 5).
#![forbid(unsafe_code)]

mod calls;
mod page;

use crate::check::{Check, Context, Failure};
use crate::model::kernel::Kernel;

/// All checks of this area.
pub const CHECKS: [&[Check]; 2] = [calls::CHECKS, page::CHECKS];

fn kernel(context: &Context) -> Result<Kernel, Failure> {
    Kernel::boot(&context.usual()?)
}
