//! The interrupts of a host device: each vector an eventfd of VFIO that is a line into the guest.
//!
//! MSI-X is on in the device as soon as the guest switches it on. Where vectors can be added later it takes
//! one of the host's interrupts then, and each other vector takes its own when its first message is to be
//! delivered, so that a device with thousands takes those in use. What happens before is kept by the
//! device itself, in its pending bits, because the host masks the entry.
#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::device::{MSI_IRQ, MSIX_IRQ, VfioDevice};
use crate::vmm::{HostLine, HostLines};
use crate::vpci::function::{HostVectors, InterruptMode, VectorRoute};
use crate::vpci::lock;

/// What is asked of the device's interrupts.
pub(super) trait Irqs: Send + Sync + Debug {
    /// As [`VfioDevice::set_irqs`].
    fn set(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> io::Result<()>;
    /// As [`VfioDevice::disable_irqs`].
    fn disable(&self, index: u32) -> io::Result<()>;
}

impl Irqs for VfioDevice {
    fn set(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> io::Result<()> {
        self.set_irqs(index, start, fds)
    }

    fn disable(&self, index: u32) -> io::Result<()> {
        self.disable_irqs(index)
    }
}

/// How many interrupts a device has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counts {
    pub(super) msi: u32,
    pub(super) msix: u32,
    /// MSI-X vectors can be enabled one by one.
    pub(super) dynamic: bool,
}

/// One vector.
#[derive(Debug)]
struct Vector {
    route: VectorRoute,
    /// Present from the first time that something is to be delivered.
    line: Option<Arc<dyn HostLine>>,
}

impl Vector {
    const OFF: Self = Self {
        route: VectorRoute::Dropped,
        line: None,
    };
}

#[derive(Debug, Default)]
struct State {
    mode: InterruptMode,
    /// As many as are on.
    vectors: Vec<Vector>,
    /// The device sends messages of this mode.
    enabled: bool,
}

/// The interrupts of a device.
#[derive(Debug)]
pub(super) struct Vectors {
    name: String,
    irqs: Arc<dyn Irqs>,
    lines: Arc<dyn HostLines>,
    counts: Counts,
    state: Mutex<State>,
    failures: AtomicU64,
}

impl Vectors {
    /// All off.
    pub(super) fn new(
        name: &str,
        irqs: Arc<dyn Irqs>,
        lines: Arc<dyn HostLines>,
        counts: Counts,
    ) -> Self {
        Self {
            name: name.to_owned(),
            irqs,
            lines,
            counts,
            state: Mutex::default(),
            failures: AtomicU64::new(0),
        }
    }

    /// Times that the host could not do what the guest asked for. The vector is dead then.
    pub(super) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    fn failed(&self, what: &str, error: &io::Error) {
        let count = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        // A guest can try as often as it likes: log at powers of two.
        if count.is_power_of_two() {
            log::error!("{}: {what} failed, {count} so far: {error}", self.name);
        }
    }

    fn enable(&self, mode: InterruptMode) -> io::Result<State> {
        let (count, most) = match mode {
            InterruptMode::Off => (0, 0),
            InterruptMode::Msi { messages } => (u32::from(messages), self.counts.msi),
            InterruptMode::Msix => (self.counts.msix, self.counts.msix),
        };
        if count > most {
            return Err(io::Error::other(format!("the device has {most} messages")));
        }
        let mut state = State {
            mode,
            vectors: (0..count).map(|_| Vector::OFF).collect(),
            enabled: false,
        };
        if matches!(mode, InterruptMode::Msi { .. }) {
            // The device cannot mask one, so each must have its line before it is on.
            for vector in &mut state.vectors {
                vector.line = Some(self.lines.add()?);
            }
            let fds: Vec<_> = state.vectors.iter().map(Vector::eventfd).collect();
            self.irqs.set(MSI_IRQ, 0, &fds)?;
            state.enabled = true;
        }
        if mode == InterruptMode::Msix && count > 0 {
            // With no vector; as many as may be needed where more cannot be had later.
            let vectors = if self.counts.dynamic { 1 } else { count };
            match self.irqs.set(MSIX_IRQ, 0, &vec![None; vectors as usize]) {
                Ok(()) => state.enabled = true,
                // The first vector tries again.
                Err(error) => self.failed("switching MSI-X on", &error),
            }
        }
        Ok(state)
    }

    /// Gives a vector of MSI-X its line, and has the device signal it.
    fn prepare(&self, state: &mut State, index: usize) -> io::Result<()> {
        if state.vectors[index].line.is_some() {
            return Ok(());
        }
        state.vectors[index].line = Some(self.lines.add()?);
        let one = [state.vectors[index].eventfd()];
        let set = if state.enabled || self.counts.dynamic {
            self.irqs.set(MSIX_IRQ, index as u32, &one)
        } else {
            // All that may be needed, since more cannot be had later.
            let all: Vec<_> = state.vectors.iter().map(Vector::eventfd).collect();
            self.irqs.set(MSIX_IRQ, 0, &all)
        };
        match set {
            Ok(()) => state.enabled = true,
            Err(_) => state.vectors[index].line = None,
        }
        set
    }
}

impl Vector {
    fn eventfd(&self) -> Option<BorrowedFd<'_>> {
        self.line.as_ref().map(|line| line.eventfd())
    }
}

impl HostVectors for Vectors {
    fn set_mode(&self, mode: InterruptMode) {
        let mut state = lock(&self.state);
        if state.mode == mode {
            return;
        }
        let former = std::mem::take(&mut *state);
        let index = match former.mode {
            InterruptMode::Off => None,
            InterruptMode::Msi { .. } => Some(MSI_IRQ),
            InterruptMode::Msix => Some(MSIX_IRQ),
        };
        // Lines first: nothing reaches the guest when this is done.
        for line in former.vectors.iter().filter_map(|v| v.line.as_ref()) {
            line.disconnect();
        }
        if let Some(index) = index.filter(|_| former.enabled)
            && let Err(error) = self.irqs.disable(index)
        {
            self.failed("switching its interrupts off", &error);
        }
        drop(former);
        match self.enable(mode) {
            Ok(new) => *state = new,
            Err(error) => {
                self.failed("switching its interrupts on", &error);
                // Known to be on, without a vector: the guest may switch them off again.
                state.mode = mode;
            }
        }
    }

    fn route(&self, vector: u16, to: VectorRoute) {
        let mut state = lock(&self.state);
        let index = usize::from(vector);
        let Some(former) = state.vectors.get(index).map(|vector| vector.route) else {
            return;
        };
        if former == to {
            return;
        }
        if matches!(to, VectorRoute::To(_))
            && let Err(error) = self.prepare(&mut state, index)
        {
            self.failed("enabling an interrupt", &error);
            return;
        }
        let vector = &mut state.vectors[index];
        vector.route = to;
        let Some(line) = &vector.line else {
            return;
        };
        if former == VectorRoute::Dropped {
            line.discard();
        }
        match to {
            VectorRoute::To(msi) => {
                if let Err(error) = line.connect(msi) {
                    // Nothing leads anywhere now: the guest may try again.
                    vector.route = VectorRoute::Dropped;
                    self.failed("delivering an interrupt", &error);
                }
            }
            VectorRoute::Held | VectorRoute::Dropped => line.disconnect(),
        }
    }

    fn is_pending(&self, vector: u16) -> bool {
        let state = lock(&self.state);
        let vector = state.vectors.get(usize::from(vector));
        vector.is_some_and(|vector| {
            let held = vector.route == VectorRoute::Held;
            held && vector.line.as_ref().is_some_and(|line| line.is_pending())
        })
    }
}

#[cfg(test)]
#[path = "vectors_tests.rs"]
mod tests;
