//! Snapshots: a whole VM as a file (`ctl snapshot`), and back (`run --restore`). docs/control.md is
//! the description for users.
//!
//! The file is not trusted. Its checksums find damage; what they cannot find, because somebody made
//! them match, is what each part's own restore looks for: the library's, the devices', KVM's.
#![forbid(unsafe_code)]

mod file;

pub(crate) use file::{Reader, Writer};

use std::io;
use std::path::PathBuf;

use kvm_bindings::{kvm_cpuid_entry2, kvm_irqchip};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vm_vpci::devices::testdev::TestDeviceState;
use vm_vpci::devices::virtio::{BlkState, VirtioState, VirtioStateError};
use vm_vpci::partition::{PartitionState, PartitionStateError, StateInHardware};

use crate::ports::PortsState;
use crate::vcpu_saved::SavedVcpu;
use crate::vcpu_state::VcpuStateError;

/// Parts per million by which two hosts' time stamp counters may differ: what KVM itself tolerates
/// (`tsc_tolerance_ppm` in arch/x86/kvm/x86.c).
const TSC_TOLERANCE_PPM: u64 = 250;

/// Everything but guest RAM.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MachineSnapshot {
    /// What the VM is made of.
    pub(crate) shape: Shape,
    /// The host's time stamp counter when the state was read.
    pub(crate) host_tsc: u64,
    /// The vCPUs by number.
    pub(crate) vcpus: Vec<SavedVcpu>,
    /// Both PICs and the IO-APIC.
    pub(crate) irqchips: Vec<kvm_irqchip>,
    /// I/O ports.
    pub(crate) ports: PortsState,
    /// The library and the devices.
    pub(crate) embedding: EmbeddingState,
}

/// What must be the same where a VM goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Shape {
    /// Bytes of RAM.
    pub(crate) memory: u64,
    /// KVM takes part in answering hypercalls.
    pub(crate) hybrid: bool,
    /// There is a pvIOMMU.
    pub(crate) iommu: bool,
    /// Frequency of the guest's time stamp counter in Hz.
    pub(crate) tsc_hz: u64,
    /// Width of a guest physical address.
    pub(crate) address_bits: u8,
    /// CPUID of each vCPU, by number.
    pub(crate) cpuid: Vec<Vec<CpuidEntry>>,
}

/// An entry of a CPUID table: function, index, flags, EAX, EBX, ECX, EDX.
pub(crate) type CpuidEntry = [u32; 7];

/// The table of a vCPU, in the form of [`Shape`].
pub(crate) fn cpuid_table(entries: &[kvm_cpuid_entry2]) -> Vec<CpuidEntry> {
    let plain = |e: &kvm_cpuid_entry2| [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx];
    entries.iter().map(plain).collect()
}

/// The library and the devices.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EmbeddingState {
    /// The partition's reference time, in units of 100 ns.
    pub(crate) reference_time: u64,
    /// The library.
    pub(crate) partition: PartitionState,
    /// Each function's device.
    pub(crate) devices: Vec<SavedDevice>,
}

/// A device and its place.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedDevice {
    /// Instance GUID of its bus.
    pub(crate) bus: Uuid,
    /// Function number.
    pub(crate) function: u8,
    /// Its state.
    pub(crate) state: DeviceState,
}

/// State of a device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DeviceState {
    /// virtio-blk, without its image.
    Blk(BlkState),
    /// virtio-rng.
    Rng(VirtioState),
    /// The DMA engine for tests.
    Testdev(TestDeviceState),
}

impl DeviceState {
    /// The word of `--vpci`.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Blk(_) => "blk",
            Self::Rng(_) => "rng",
            Self::Testdev(_) => "testdev",
        }
    }
}

/// Why a VM was not saved. It goes on as before.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SaveError {
    /// The guest is about to be reset or powered off.
    #[error("the guest is resetting the machine or powering it off: try again")]
    Ending,
    /// The state of a function is in hardware.
    #[error("{0}: eject the bus first, and plug it in again after the restore")]
    Hardware(#[from] StateInHardware),
    /// A device is at work though its worker stands still.
    #[error("function {function} of bus {bus}: {source}")]
    Device {
        /// Instance GUID.
        bus: Uuid,
        /// Function number.
        function: u8,
        /// Why.
        source: VirtioStateError,
    },
    /// KVM does not tell a vCPU's state.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// KVM does not tell its interrupt controllers' state.
    #[error("KVM refuses to tell the state of its interrupt controllers: {0}")]
    Irqchip(#[source] kvm_ioctls::Error),
    /// The file cannot be written, or exists.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
}

/// Why a snapshot was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    /// The file cannot be read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Not the file of a snapshot.
    #[error("this is no snapshot")]
    NoSnapshot,
    /// A layout that this program does not know.
    #[error("the snapshot has version {0}, which this program does not know")]
    Version(u32),
    /// A checksum does not match, or something is missing or too much.
    #[error("the snapshot is damaged: {0}")]
    Damaged(&'static str),
    /// The state has no valid form.
    #[error("the state is malformed: {0}")]
    Malformed(#[from] serde_json::Error),
    /// An option has another value than the saved VM's.
    #[error("the saved VM has {saved}, and this one {here}: give the same {option}")]
    Option {
        /// What was saved.
        saved: String,
        /// What was asked for.
        here: String,
        /// The option.
        option: &'static str,
    },
    /// The host is another one.
    #[error("this host is unlike the one where the VM was saved: {0}")]
    Host(String),
    /// The state has a function that the command line lacks.
    #[error(
        "the saved VM has function {function} ({kind}) on bus {bus}: give it by \
         --vpci {kind},bus={bus},fn={function}"
    )]
    Missing {
        /// Instance GUID.
        bus: Uuid,
        /// Function number.
        function: u8,
        /// What it is.
        kind: &'static str,
    },
    /// The command line has a function that the state lacks.
    #[error("the saved VM has no function {function} on bus {bus}: plug it in after the restore")]
    Surplus {
        /// Instance GUID.
        bus: Uuid,
        /// Function number.
        function: u8,
    },
    /// The state of a function that the command line has is in hardware.
    #[error("{0}: plug it in after the restore")]
    Hardware(#[source] StateInHardware),
    /// A device refuses its state.
    #[error("function {function} of bus {bus}: {reason}")]
    Device {
        /// Instance GUID.
        bus: Uuid,
        /// Function number.
        function: u8,
        /// Why.
        reason: String,
    },
    /// The library refuses its state.
    #[error(transparent)]
    Partition(PartitionStateError),
    /// The serial port cannot be so.
    #[error("the state of the serial port is impossible")]
    Serial,
    /// KVM refuses a vCPU's state.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// KVM refuses its interrupt controllers' state.
    #[error("KVM refuses the state of the interrupt controllers: {0}")]
    Irqchip(#[source] kvm_ioctls::Error),
    /// Pages that are not RAM.
    #[error("the snapshot has RAM at {gpa:#x}, where this VM has none")]
    Ram {
        /// Guest physical address.
        gpa: u64,
    },
}

impl From<PartitionStateError> for RestoreError {
    fn from(error: PartitionStateError) -> Self {
        match error {
            PartitionStateError::InHardware(functions) => Self::Hardware(functions),
            other => Self::Partition(other),
        }
    }
}

impl MachineSnapshot {
    /// What can be checked before a VM is built.
    ///
    /// # Errors
    ///
    /// [`RestoreError`].
    pub(crate) fn check_options(&self, cpus: u8, memory: u64) -> Result<(), RestoreError> {
        let saved = self.vcpus.len();
        if saved != usize::from(cpus) {
            return Err(RestoreError::Option {
                saved: format!("{saved} vCPUs"),
                here: format!("{cpus}"),
                option: "--cpus",
            });
        }
        if self.shape.memory != memory {
            return Err(RestoreError::Option {
                saved: format!("{} MiB of RAM", self.shape.memory >> 20),
                here: format!("{}", memory >> 20),
                option: "--memory",
            });
        }
        Ok(())
    }

    /// Whether the VM can go on in one of this shape.
    ///
    /// # Errors
    ///
    /// [`RestoreError`].
    pub(crate) fn check_shape(&self, here: &Shape) -> Result<(), RestoreError> {
        let saved = &self.shape;
        let with = |on: bool, what: &str| match on {
            true => what.to_owned(),
            false => format!("no {what}"),
        };
        let pairs = [
            (
                saved.hybrid,
                here.hybrid,
                "KVM answering hypercalls",
                "--hyperv",
            ),
            (saved.iommu, here.iommu, "pvIOMMU", "iommu=on at --vpci"),
        ];
        for (saved, here, what, option) in pairs {
            if saved != here {
                return Err(RestoreError::Option {
                    saved: with(saved, what),
                    here: with(here, what),
                    option,
                });
            }
        }
        let tolerance = here.tsc_hz / 1_000_000 * TSC_TOLERANCE_PPM;
        if saved.tsc_hz.abs_diff(here.tsc_hz) > tolerance {
            return Err(RestoreError::Host(format!(
                "its time stamp counter runs at {} Hz, that one at {} Hz",
                here.tsc_hz, saved.tsc_hz
            )));
        }
        if saved.address_bits != here.address_bits {
            return Err(RestoreError::Host(format!(
                "physical addresses have {} bits here, {} there",
                here.address_bits, saved.address_bits
            )));
        }
        for (vcpu, (there, here)) in saved.cpuid.iter().zip(&here.cpuid).enumerate() {
            let differs = |entry: &&CpuidEntry| !there.contains(entry);
            if let Some([function, index, ..]) = here.iter().find(differs) {
                return Err(RestoreError::Host(format!(
                    "vCPU {vcpu} would have another CPUID leaf {function:#x}, index {index}"
                )));
            }
        }
        let counts = |shape: &Shape| shape.cpuid.iter().map(Vec::len).collect::<Vec<_>>();
        if counts(saved) != counts(here) {
            let what = "the vCPUs would have other CPUID leaves";
            return Err(RestoreError::Host(what.into()));
        }
        let chips = self.irqchips.iter().map(|chip| chip.chip_id);
        if !chips.eq(0..3) {
            return Err(RestoreError::Damaged("not the three interrupt controllers"));
        }
        Ok(())
    }
}
