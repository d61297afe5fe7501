//! Reference VMM: boots Linux guests whose PCI devices sit on a Hyper-V vPCI bus.

fn main() {
    println!("vpci-vmm {}", env!("CARGO_PKG_VERSION"));
}
