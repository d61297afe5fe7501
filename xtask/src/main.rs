//! Developer tasks: guest images, the nested test rig, continuous integration.

fn main() {}
