//! Costs of the hot paths (docs/performance.md): `cargo bench -p vm-vpci`.

#[cfg(feature = "devices")]
mod chain;
mod delivery;
mod guest;
mod hypercall;
#[cfg(feature = "kvm")]
mod kvm;
mod pviommu;
mod ring;
mod stock;
mod vpci;

use std::time::Duration;

use criterion::Criterion;

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    hypercall::bench(&mut criterion);
    ring::bench(&mut criterion);
    vpci::bench(&mut criterion);
    delivery::bench(&mut criterion);
    pviommu::bench(&mut criterion);
    #[cfg(feature = "devices")]
    chain::bench(&mut criterion);
    #[cfg(feature = "kvm")]
    kvm::bench(&mut criterion);
    criterion.final_summary();
}
