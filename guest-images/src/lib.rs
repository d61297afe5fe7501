//! Guest images: the initramfs writer shared by the developer tasks, the static init that runs in
//! both kernels of the rig, and the types and judgement they share.

pub mod host;
pub mod pattern;
pub mod report;
pub mod scenario;
pub mod verdict;
