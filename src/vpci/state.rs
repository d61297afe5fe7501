//! Saved form of a bus.
//!
//! Covers what the bus emulates: protocol, config window, configuration spaces, interrupts. The
//! channel's rings are saved beside it, a device's own state by the device.
#![forbid(unsafe_code)]

use super::bus::Bus;
use super::config::is_enabled;
use super::interrupts::{InterruptsState, StateError};
use super::lock;
use super::mmio::MmioError;
use crate::hv::vpci::ProtocolVersion;
use crate::vmbus::RingsState;

/// Version of [`BusState`].
const VERSION: u32 = 1;

/// A bus as plain data.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct BusState {
    /// 1.
    pub version: u32,
    /// Protocol version in force, as on the wire.
    pub protocol_version: Option<u32>,
    /// Guest physical address of the config window, while in D0.
    pub window: Option<u64>,
    /// Slot register of the config window.
    pub slot: u32,
    /// A function was taken away, and the guest has not been told yet which are left.
    #[cfg_attr(feature = "serde", serde(default))]
    pub relations_due: bool,
    /// The functions, by number.
    pub functions: Vec<FunctionState>,
}

/// A function as plain data.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct FunctionState {
    /// Function number.
    pub number: u8,
    /// Configuration space, as double words.
    pub config: Vec<u32>,
    /// Interrupts.
    pub interrupts: InterruptsState,
}

/// Why a saved bus was refused. The bus is then as after a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The version of the state is not known.
    #[error("bus state has the unknown version {version}")]
    Version {
        /// Version found.
        version: u32,
    },
    /// The protocol version is not spoken.
    #[error("protocol version {version:#x} is not spoken")]
    ProtocolVersion {
        /// Version found.
        version: u32,
    },
    /// The state is that of a bus with other functions.
    #[error("the state is that of a bus with other functions")]
    Functions,
    /// A configuration space cannot be that of the function.
    #[error("configuration space of function {number} does not match the device")]
    Config {
        /// Function number.
        number: u8,
    },
    /// The config window cannot be where it was.
    #[error(transparent)]
    Window(#[from] MmioError),
    /// A config window without a version of the protocol.
    #[error("the bus is in D0, but no protocol version is in force")]
    Unnegotiated,
    /// A function that decodes, may do DMA or has interrupts on a bus that is not in D0.
    #[error("function {number} is in use, but the bus is not in D0")]
    Power {
        /// Function number.
        number: u8,
    },
    /// A bus that is used over a channel that is not open.
    #[error("the guest uses the bus, but its channel is closed")]
    Closed,
    /// The interrupts of a function are impossible.
    #[error("function {number}: {source}")]
    Interrupts {
        /// Function number.
        number: u8,
        /// What is impossible.
        source: StateError,
    },
}

impl Bus {
    /// The bus as plain data. The VM is paused.
    pub fn save(&self) -> BusState {
        let channel = lock(&self.channel);
        let functions = self.core.functions().map(|slot| FunctionState {
            number: slot.number,
            config: slot.save_config(),
            interrupts: slot.interrupts.save(),
        });
        BusState {
            version: VERSION,
            protocol_version: channel.protocol.version().map(ProtocolVersion::code),
            window: channel.protocol.window(),
            slot: self.core.window.slot(),
            relations_due: channel.relations_due,
            functions: functions.collect(),
        }
    }

    /// The rings of the channel, while it is open. Room that was reserved for answers is not part
    /// of it and is reserved anew.
    pub fn save_rings(&self) -> Option<RingsState> {
        lock(&self.channel).save_rings()
    }

    /// Takes over a saved bus, in a VM that is paused. Its channel is closed afterwards: whoever
    /// restores VMBus opens it again.
    ///
    /// # Errors
    ///
    /// [`RestoreError`]; the bus is then as after a reset.
    pub fn restore(&self, state: &BusState) -> Result<(), RestoreError> {
        self.reset();
        let result = self.adopt_state(state);
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn adopt_state(&self, state: &BusState) -> Result<(), RestoreError> {
        if state.version != VERSION {
            return Err(RestoreError::Version {
                version: state.version,
            });
        }
        let version = match state.protocol_version {
            None => None,
            Some(code) => Some(
                ProtocolVersion::from_code(code)
                    .ok_or(RestoreError::ProtocolVersion { version: code })?,
            ),
        };
        let slots: Vec<_> = self.core.functions().collect();
        let numbers = slots.iter().map(|slot| slot.number);
        if !numbers.eq(state.functions.iter().map(|function| function.number)) {
            return Err(RestoreError::Functions);
        }
        if state.window.is_some() && version.is_none() {
            return Err(RestoreError::Unnegotiated);
        }
        for (slot, saved) in slots.iter().zip(&state.functions) {
            let number = saved.number;
            if !slot.accepts_config(&saved.config) {
                return Err(RestoreError::Config { number });
            }
            let in_use = is_enabled(&saved.config) || !saved.interrupts.messages.is_empty();
            if in_use && state.window.is_none() {
                return Err(RestoreError::Power { number });
            }
        }
        let mut channel = lock(&self.channel);
        channel
            .protocol
            .restore(&self.core, version, state.window)?;
        channel.relations_due = state.relations_due;
        self.core.window.select(state.slot);
        for (slot, saved) in slots.iter().zip(&state.functions) {
            let number = saved.number;
            slot.interrupts
                .restore(&saved.interrupts)
                .map_err(|source| RestoreError::Interrupts { number, source })?;
            slot.restore_config(&saved.config, state.window.is_some());
        }
        Ok(())
    }
}
