//! Guest images: the initramfs writer shared by the developer tasks, the static init that runs in
//! both kernels of the rig, and the types and judgement they share.

pub mod allow;
pub mod cpio;
pub mod host;
pub mod judge;
pub mod modules;
pub mod pattern;
pub mod report;
pub mod scenario;
pub mod verdict;
