//! Saved form of a function's interrupts.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::handles::{HandleError, Route, Target};
use super::{Entry, Interrupts, VectorCounters};
use crate::vpci::lock;

/// Version of [`InterruptsState`].
const VERSION: u32 = 1;

/// Why a saved state was refused. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The version is not known.
    #[error("interrupt state has the unknown version {version}")]
    Version {
        /// Version found.
        version: u32,
    },
    /// The state is that of a function with another number of vectors.
    #[error("interrupt state of a function with another number of vectors")]
    Vectors,
    /// A message is impossible.
    #[error(transparent)]
    Handle(#[from] HandleError),
}

/// A function's interrupts, without what its configuration space holds.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct InterruptsState {
    /// 1.
    pub version: u32,
    /// Live messages, by data.
    pub messages: Vec<MessageState>,
    /// MSI-X table.
    pub entries: Vec<MsixEntryState>,
    /// Pending MSI messages.
    pub msi_pending: u32,
    /// Counts of each vector.
    pub counters: Vec<VectorCounters>,
}

/// A block of live messages.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct MessageState {
    /// Data of the first message.
    pub data: u32,
    /// Where each message goes.
    pub routes: Vec<RouteState>,
}

/// Where a message goes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct RouteState {
    /// Vector, 0x10 to 0xFF.
    pub vector: u8,
    /// VP indices that all take it, ascending; not empty.
    pub vps: Vec<u32>,
}

/// An entry of the MSI-X table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct MsixEntryState {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Mask bit.
    pub masked: bool,
    /// Pending bit.
    pub pending: bool,
}

impl Interrupts {
    /// The interrupts as plain data. The VM is paused.
    pub(crate) fn save(&self) -> InterruptsState {
        let entries = self.entries.iter().enumerate().map(|(vector, entry)| {
            let entry = *lock(entry);
            let bits = self.pending[vector / 64].load(Ordering::Relaxed);
            MsixEntryState {
                address: entry.address,
                data: entry.data,
                masked: entry.masked,
                pending: bits >> (vector % 64) & 1 != 0,
            }
        });
        let messages = self.handles.save().into_iter().map(|(data, routes)| {
            let routes = routes.into_iter().map(RouteState::from).collect();
            MessageState { data, routes }
        });
        InterruptsState {
            version: VERSION,
            messages: messages.collect(),
            entries: entries.collect(),
            msi_pending: self.msi_pending(),
            counters: self.counters(),
        }
    }

    /// Takes over saved interrupts. Nothing is delivered: the caller restores the configuration
    /// space next, and hands on its MSI and MSI-X registers, which delivers what is due.
    ///
    /// # Errors
    ///
    /// [`StateError`]; the interrupts are then all off.
    pub(crate) fn restore(&self, state: &InterruptsState) -> Result<(), StateError> {
        self.reset();
        if state.version != VERSION {
            return Err(StateError::Version {
                version: state.version,
            });
        }
        if state.entries.len() != self.entries.len() || state.counters.len() != self.counters.len()
        {
            return Err(StateError::Vectors);
        }
        for message in &state.messages {
            let routes: Vec<Route> = message.routes.iter().map(Route::from).collect();
            if let Err(error) = self.handles.restore(message.data, &routes) {
                self.reset();
                return Err(error.into());
            }
        }
        for (vector, saved) in state.entries.iter().enumerate() {
            let mut entry = lock(&self.entries[vector]);
            *entry = Entry {
                address: saved.address & !3,
                data: saved.data,
                masked: saved.masked,
            };
            let bit = u64::from(saved.pending) << (vector % 64);
            self.pending[vector / 64].fetch_or(bit, Ordering::Relaxed);
        }
        if self.msi.is_some() {
            self.msi_pending.store(state.msi_pending, Ordering::Relaxed);
        }
        for (counters, saved) in self.counters.iter().zip(&state.counters) {
            counters.raised.store(saved.raised, Ordering::Relaxed);
            counters
                .suppressed
                .store(saved.suppressed, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl From<Route> for RouteState {
    fn from(route: Route) -> Self {
        Self {
            vector: route.vector,
            vps: match route.target {
                Target::One(vp) => vec![vp],
                Target::All(vps) => vps.to_vec(),
            },
        }
    }
}

impl From<&RouteState> for Route {
    fn from(route: &RouteState) -> Self {
        Self {
            vector: route.vector,
            target: match route.vps[..] {
                [vp] => Target::One(vp),
                _ => Target::All(Arc::from(&route.vps[..])),
            },
        }
    }
}
