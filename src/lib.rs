//! Hyper-V virtual PCI bus and pvIOMMU for KVM-based VMMs.
//!
//! A VMM that embeds this library shows its guest PCI devices as Hyper-V does: each on a virtual
//! PCI bus of its own (*vPCI*), which is a channel of the VMBus. A stock Linux finds them with its
//! own `hv_vmbus` and `pci-hyperv` drivers; neither the guest nor the host's kernel is changed.
//! What makes that work on any KVM is that the library owns the guest's *hypercall page*: KVM itself
//! answers the hypercalls in question with an error and never asks the VMM.
//!
//! # Terms
//!
//! - **VP**: a virtual processor, the guest's view of a vCPU; numbered from 0.
//! - **SynIC**: per VP, the message and event-flag pages by which the host tells the guest things.
//! - **VMBus**: offers channels to the guest; a channel is a pair of rings in guest memory.
//! - **vPCI bus**: a channel whose packets carry what a guest does to PCI functions, beside a window
//!   of MMIO for their configuration space. Its instance GUID asks for a PCI domain.
//! - **Logical device id**: how a hypercall names a function: from the bus's GUID and the function
//!   number ([`vpci::device_id`]).
//!
//! # What a VMM does
//!
//! It makes functions ([`vpci::function::PciFunction`]; ready-made ones are in [`devices`]), builds
//! a [`Partition`] with what it provides ([`vmm`]), plugs buses in, merges the CPUID leaves, and
//! hands over exits: MSRs, the hypercall port, MMIO. `docs/embedding.md` tells the order, and the
//! reference VMM's `embed.rs` is an example with KVM.
//!
//! ```
//! use std::io;
//! use std::sync::{Arc, Mutex, Weak};
//!
//! use uuid::Uuid;
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//! use vm_vpci::cpuid::Features;
//! use vm_vpci::devices::testdev::TestDevice;
//! use vm_vpci::mem::GuestRam;
//! use vm_vpci::msr::DEFAULT_HYPERCALL_PORT;
//! use vm_vpci::vmbus::VmBusConfig;
//! use vm_vpci::vmm::{MonotonicClock, Msi, MsiSink, Trigger, Worker, WorkerHost};
//! use vm_vpci::{BusSpec, FunctionSpec, Partition, PartitionConfig, PartitionHost};
//!
//! /// Where interrupts go: on KVM, `vm_vpci::kvm::KvmMsiSink`.
//! #[derive(Debug)]
//! struct Interrupts;
//!
//! impl MsiSink for Interrupts {
//!     fn raise_msi(&self, _msi: Msi) {}
//! }
//!
//! /// The VMM's loop; `vm_vpci::devices::event_loop` is a ready-made one.
//! #[derive(Debug, Default)]
//! struct Loop(Mutex<Vec<Weak<dyn Worker>>>);
//!
//! #[derive(Debug)]
//! struct Wake;
//!
//! impl Trigger for Wake {
//!     fn trigger(&self) {}
//! }
//!
//! impl WorkerHost for Loop {
//!     fn adopt(&self, worker: Weak<dyn Worker>) -> io::Result<Arc<dyn Trigger>> {
//!         self.0.lock().unwrap().push(worker);
//!         Ok(Arc::new(Wake))
//!     }
//! }
//!
//! let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
//! let workers = Arc::new(Loop::default());
//! let partition = Partition::new(
//!     PartitionConfig {
//!         apic_ids: vec![0],
//!         tsc_hz: 2_000_000_000,
//!         apic_hz: 1_000_000_000,
//!         mmio: vec![0xf000_0000..0xf100_0000],
//!         features: Features::default(),
//!         hypercall_port: DEFAULT_HYPERCALL_PORT,
//!         vmbus: VmBusConfig::default(),
//!         iommu: None,
//!     },
//!     PartitionHost {
//!         ram: GuestRam::new(&ram),
//!         msi: Arc::new(Interrupts),
//!         workers: workers.clone(),
//!         clock: Arc::new(MonotonicClock::default()),
//!         doorbells: None,
//!         bars: None,
//!     },
//! )?;
//! partition.plug(BusSpec {
//!     // data2 = 0x1a2b: the guest's PCI domain.
//!     instance: Uuid::parse_str("6c3a5f2e-1a2b-4c3d-8e4f-5a6b7c8d9e01")?,
//!     functions: vec![FunctionSpec::new(0, TestDevice::new(1, &*workers)?)],
//! })?;
//!
//! // The guest reads the leaves of Hyper-V ...
//! assert_eq!(partition.cpuid_leaves()[0].function, 0x4000_0000);
//! // ... and an MSR: its VP index.
//! assert_eq!(partition.read_msr(0, 0x4000_0002).ok(), Some(0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Features
//!
//! `kvm` (the KVM transport), `devices` (virtio-blk and virtio-rng on `event-manager`) and `vfio`
//! (devices of the host) are on by default; without them the portable core remains, which needs no
//! Linux-only crate.
#![deny(unsafe_code)]

/// A place where the mutation check of the conformance suite can break the library
/// (docs/mutants.md): true while the mutant is selected, or the wrong value then instead of the
/// right one. In every build without `--cfg vpci_mutants`, `false` and the right value.
#[cfg(not(vpci_mutants))]
macro_rules! mutant {
    ($name:literal) => {
        false
    };
    ($name:literal, $wrong:expr, $right:expr) => {
        $right
    };
}
#[cfg(vpci_mutants)]
macro_rules! mutant {
    ($name:literal) => {
        $crate::mutants::is_selected($name)
    };
    ($name:literal, $wrong:expr, $right:expr) => {
        match $crate::mutants::is_selected($name) {
            true => $wrong,
            false => $right,
        }
    };
}

pub mod backend;
pub mod cpuid;
pub mod device_id;
pub mod devices;
pub mod dma;
pub mod gate;
pub mod hv;
pub mod hypercall;
#[cfg(feature = "kvm")]
pub mod kvm;
pub mod mem;
pub mod msr;
#[cfg(vpci_mutants)]
pub mod mutants;
pub mod partition;
pub mod pviommu;
pub mod synic;
#[cfg(feature = "vfio")]
pub mod vfio;
pub mod vmbus;
pub mod vmm;
pub mod vpci;

pub use partition::{BusSpec, KernelMode, Partition, PartitionConfig, PartitionHost};
pub use vpci::function::FunctionSpec;
