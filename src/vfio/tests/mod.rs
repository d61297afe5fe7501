//! Units, moves and address spaces over a kernel that behaves as docs/spec/vfio-rig.md#vfio-rig-5 says,
//! and fails where a test wants it to.

mod fake;
mod files;
mod moves;
mod spaces;
mod together;
mod units;
