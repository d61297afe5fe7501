//! Everything that can end a run, each with its exit status.
#![forbid(unsafe_code)]

use std::io;

use vm_vpci::devices::virtio::BlkError;
use vm_vpci::kvm::hybrid::HybridError;
use vm_vpci::partition::{PartitionError, PlugError};

use crate::api::ApiError;
use crate::image::ImageError;
use crate::kernel::KernelError;
use crate::layout::LayoutError;
use crate::memory::MemoryError;
use crate::passthrough::PassThroughError;
use crate::report::ReportError;
use crate::snapshot::RestoreError;
use crate::spec::SpecError;
use crate::vcpu_state::VcpuStateError;

/// Why a run failed, in one line for the user.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// One `--vpci` is wrong in itself.
    #[error("--vpci {spec}: {source}")]
    Spec {
        /// The option's value.
        spec: String,
        /// What is wrong.
        source: SpecError,
    },
    /// The `--vpci` options do not go together.
    #[error("--vpci: {0}")]
    Placement(#[source] SpecError),
    /// A disk image cannot be used.
    #[error("--vpci {spec}: {source}")]
    Image {
        /// The option's value.
        spec: String,
        /// What is wrong.
        source: ImageError,
    },
    /// A device of the host cannot be passed through.
    #[error("--vpci {spec}: {source}")]
    PassThrough {
        /// The option's value.
        spec: String,
        /// What is wrong, with the device's address.
        source: PassThroughError,
    },
    /// A disk cannot be made.
    #[error("--vpci blk: {0}")]
    Disk(#[source] BlkError),
    /// The library does not take the configuration.
    #[error(transparent)]
    Partition(#[from] PartitionError),
    /// A bus cannot be plugged in.
    #[error("--vpci: {0}")]
    Plug(#[from] PlugError),
    /// Functions that are plugged in together sit on one bus.
    #[error(
        "plug takes the functions of one bus at a time, at least one: give all the same bus=GUID"
    )]
    NotOneBus,
    /// The control socket.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A saved VM cannot go on here.
    #[error("--restore: {0}")]
    Restore(#[from] RestoreError),
    /// The report cannot be written.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// RAM does not fit the address space.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// RAM cannot be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// `--hyperv kernel` is not possible on this host.
    #[error("--hyperv kernel: {0}: use auto or user")]
    NoKernelMode(#[source] HybridError),
    /// `/dev/kvm` cannot be opened.
    #[error("/dev/kvm: {source}: {advice}")]
    KvmOpen {
        /// What the host says.
        source: io::Error,
        /// What to do about it.
        advice: &'static str,
    },
    /// KVM is too old, or refuses something.
    #[error(transparent)]
    Kvm(#[from] vm_vpci::kvm::KvmError),
    /// KVM has no room for that many vCPUs.
    #[error("--cpus {asked}: KVM runs at most {max} here")]
    TooManyCpus {
        /// vCPUs asked for.
        asked: u8,
        /// vCPUs possible.
        max: usize,
    },
    /// KVM refuses a call of this program's own.
    #[error("KVM refuses to {what}: {source}")]
    KvmCall {
        /// What was asked.
        what: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// KVM refuses the state of a vCPU.
    #[error(transparent)]
    VcpuState(#[from] VcpuStateError),
    /// Descriptors or threads cannot be had.
    #[error("the host refuses {what}: {source}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// What the host says.
        source: io::Error,
    },
    /// The VM cannot go on.
    #[error("{0}")]
    Guest(String),
    /// The guest resets again and again.
    #[error("the guest has reset the machine {0} times: it does not get anywhere")]
    ResetLimit(u32),
    /// A signal came.
    #[error("ended by {0}")]
    Interrupted(&'static str),
}

impl Error {
    /// 1 the run failed, 2 the command line asks for something impossible, 3 the host lacks
    /// something.
    pub(crate) fn exit_status(&self) -> u8 {
        match self {
            Self::Spec { .. }
            | Self::Placement(_)
            | Self::Image { .. }
            | Self::Disk(_)
            | Self::Plug(_)
            | Self::NotOneBus
            | Self::Api(_)
            | Self::Restore(_)
            | Self::Kernel(_)
            | Self::Report(_)
            | Self::Layout(_) => 2,
            Self::NoKernelMode(_)
            | Self::PassThrough { .. }
            | Self::Memory(_)
            | Self::KvmOpen { .. }
            | Self::Kvm(_)
            | Self::TooManyCpus { .. } => 3,
            Self::KvmCall { .. }
            | Self::Partition(_)
            | Self::VcpuState(_)
            | Self::Host { .. }
            | Self::Guest(_)
            | Self::ResetLimit(_)
            | Self::Interrupted(_) => 1,
        }
    }

    /// Wraps an error of the host.
    pub(crate) fn host(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }

    /// Wraps an error of KVM.
    pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::KvmCall { what, source }
    }
}
