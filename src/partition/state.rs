//! The partition as plain data, and back.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::{Arc, PoisonError};

use uuid::Uuid;

use super::{Partition, Plugged};
use crate::msr::{MsrError, PartitionMsrsState};
use crate::pviommu::{IommuState, IommuStateError};
use crate::synic::{SynicState, SynicStateError};
use crate::vmbus::{ChannelDevice, ChannelIdentity, RingsState, VmBusState, VmBusStateError};
use crate::vpci::bus::Bus;
use crate::vpci::{BusState, RestoreError};

/// A [`Partition`] as plain data. Guest RAM and the virtual CPUs are saved by the VMM; the state of
/// a device by the device; counters and the reference time start anew.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct PartitionState {
    /// [`PartitionState::VERSION`].
    pub version: u32,
    /// Synthetic MSRs but for the SynIC's. The VMM forwards `tsc_invariant` as after
    /// [`MsrEffect::TscInvariant`](crate::msr::MsrEffect::TscInvariant).
    pub msrs: PartitionMsrsState,
    /// The SynIC of every VP.
    pub synic: SynicState,
    /// Connection, channels, and messages that were not handled yet.
    pub vmbus: VmBusState,
    /// Buses in the order in which they were plugged in.
    pub buses: Vec<PluggedState>,
    /// Domains and attachments, if the VM has a pvIOMMU.
    pub iommu: Option<IommuState>,
}

impl PartitionState {
    /// Layout version.
    pub const VERSION: u32 = 1;
}

/// A bus that is plugged in, as plain data.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct PluggedState {
    /// Instance GUID.
    pub instance: Uuid,
    /// Protocol, functions, interrupts.
    pub bus: BusState,
    /// Rings, while the guest has the channel open.
    pub rings: Option<RingsState>,
}

/// Functions of a bus whose state is in hardware of the host, which nobody reads: those of which the host's
/// kernel delivers the interrupts or confines the DMA
/// ([`PciFunction::host_vectors`](crate::vpci::function::PciFunction::host_vectors),
/// [`PciFunction::dma_backend`](crate::vpci::function::PciFunction::dma_backend)).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the state of {} of bus {bus} is in hardware of the host, which is neither saved nor restored",
    Named(functions)
)]
pub struct StateInHardware {
    /// Instance GUID of the first bus that has some.
    pub bus: Uuid,
    /// Their numbers.
    pub functions: Vec<u8>,
}

/// Functions by number, as people write them.
struct Named<'a>(&'a [u8]);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<_> = self.0.iter().map(u8::to_string).collect();
        let plural = if numbers.len() == 1 { "" } else { "s" };
        write!(f, "function{plural} {}", numbers.join(", "))
    }
}

/// Why a saved partition was refused. The partition is then as after a reset.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PartitionStateError {
    /// A layout that this version of the library does not know.
    #[error("partition state version {0} is not known")]
    Version(u32),
    /// Other buses are plugged in here.
    #[error("the state is that of a partition with other buses")]
    Buses,
    /// A function here would go on with a device that knows nothing of it.
    #[error(transparent)]
    InHardware(#[from] StateInHardware),
    /// A bus was refused.
    #[error("bus {instance}: {source}")]
    Bus {
        /// Instance GUID.
        instance: Uuid,
        /// Why.
        source: RestoreError,
    },
    /// VMBus was refused.
    #[error(transparent)]
    VmBus(#[from] VmBusStateError),
    /// The SynIC was refused.
    #[error(transparent)]
    Synic(#[from] SynicStateError),
    /// The MSRs were refused.
    #[error(transparent)]
    Msr(#[from] MsrError),
    /// The pvIOMMU was refused.
    #[error(transparent)]
    Iommu(#[from] IommuStateError),
    /// One of both partitions has a pvIOMMU, the other has none.
    #[error("the state is that of a partition with a pvIOMMU, or without one, unlike this one")]
    IommuPresence,
}

impl Partition {
    /// The partition as plain data. No virtual CPU and no worker runs. What the VMBus worker owes
    /// to devices, such as closing one, is done first.
    ///
    /// # Errors
    ///
    /// [`StateInHardware`]; nothing has changed then. Take the bus away first, and plug it in again after
    /// the restore.
    pub fn save(&self) -> Result<PartitionState, StateInHardware> {
        let buses = self.buses.lock().unwrap_or_else(PoisonError::into_inner);
        none_in_hardware(&buses)?;
        // First: it may open or close buses.
        let vmbus = self.vmbus.save();
        let plugged = buses.iter().map(|Plugged { bus, .. }| PluggedState {
            instance: bus.config().instance,
            bus: bus.save(),
            rings: bus.save_rings(),
        });
        Ok(PartitionState {
            version: PartitionState::VERSION,
            buses: plugged.collect(),
            vmbus,
            synic: self.synic.save(),
            msrs: self.msrs.save(),
            iommu: self.iommu.as_ref().map(|iommu| iommu.save()),
        })
    }

    /// Takes over a saved partition. This one was built with the same configuration and has the
    /// same buses plugged in; it has not been used, or was reset before guest RAM was restored,
    /// which has happened by now. No virtual CPU and no worker runs. Devices get their own states
    /// afterwards, before workers run.
    ///
    /// Open channels owe the guest an interrupt then, which their workers raise. So local APICs, and in
    /// hybrid mode the kernel's copies ([`Partition::kernel_msrs`]), must be in place before workers run:
    /// an interrupt that comes sooner is lost, and no later one makes up for it.
    ///
    /// # Errors
    ///
    /// [`PartitionStateError`]; the partition is then as after a reset.
    pub fn restore(&self, state: &PartitionState) -> Result<(), PartitionStateError> {
        let result = self.adopt(state);
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn adopt(&self, state: &PartitionState) -> Result<(), PartitionStateError> {
        if state.version != PartitionState::VERSION {
            return Err(PartitionStateError::Version(state.version));
        }
        let mut buses = self.buses.lock().unwrap_or_else(PoisonError::into_inner);
        none_in_hardware(&buses)?;
        let by_instance = |instance: &Uuid| -> Option<&Arc<Bus>> {
            let mut all = buses.iter().map(|plugged| &plugged.bus);
            all.find(|bus| bus.config().instance == *instance)
        };
        // As many, and each of them once: the same.
        let known = |at: usize| {
            let instance = &state.buses[at].instance;
            let mut before = state.buses[..at].iter();
            by_instance(instance).is_some() && before.all(|saved| saved.instance != *instance)
        };
        if state.buses.len() != buses.len() || !(0..buses.len()).all(known) {
            return Err(PartitionStateError::Buses);
        }
        self.msrs.restore(&state.msrs)?;
        for saved in &state.buses {
            let instance = saved.instance;
            let bus = by_instance(&instance).ok_or(PartitionStateError::Buses)?;
            bus.restore(&saved.bus)
                .map_err(|source| PartitionStateError::Bus { instance, source })?;
        }
        let rings = |identity: &ChannelIdentity| {
            let mut saved = state.buses.iter();
            saved
                .find(|saved| saved.instance == identity.instance)?
                .rings
        };
        let result = self.vmbus.restore(&state.vmbus, rings);
        for plugged in &mut *buses {
            // Channels have the ids of the saved partition now, unless they were refused.
            if let Some(channel) = self.vmbus.channel_of(&plugged.bus.identity()) {
                plugged.channel = channel;
            }
        }
        result?;
        // What a guest has switched on ends with its channel, so there must be one.
        for Plugged { bus, .. } in &*buses {
            let instance = bus.config().instance;
            let in_use = |saved: &PluggedState| {
                saved.instance == instance && saved.bus.protocol_version.is_some()
            };
            if state.buses.iter().any(in_use) && bus.save_rings().is_none() {
                let source = RestoreError::Closed;
                return Err(PartitionStateError::Bus { instance, source });
            }
        }
        // After the buses, whose way to D0 has released what was held.
        match (&self.iommu, &state.iommu) {
            (None, None) => {}
            (Some(iommu), Some(state)) => iommu.restore(state)?,
            _ => return Err(PartitionStateError::IommuPresence),
        }
        // Last: taking over VMBus drops the messages that wait in the SynIC.
        self.synic.restore(&state.synic)?;
        for plugged in &*buses {
            plugged.bus.owe_signal();
        }
        Ok(())
    }
}

/// Refuses functions whose state is not the library's and not a device model's.
fn none_in_hardware(buses: &[Plugged]) -> Result<(), StateInHardware> {
    for Plugged { bus, .. } in buses {
        let functions = bus.hosted_functions();
        if !functions.is_empty() {
            let bus = bus.config().instance;
            return Err(StateInHardware { bus, functions });
        }
    }
    Ok(())
}
