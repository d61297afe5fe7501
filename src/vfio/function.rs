//! A host device as a function on a virtual PCI bus.
#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::config::{self, ConfigError};
use super::device::{COMMAND, COMMAND_MASTER, CONFIG_REGION, MSI_IRQ, MSIX_IRQ, VfioDevice};
use super::vectors::{Counts, Vectors};
use crate::mem::PAGE_SIZE;
use crate::pviommu::DeviceBackend;
use crate::vmm::HostLines;
use crate::vpci::function::{
    BAR_COUNT, BarArea, FunctionLayout, FunctionResources, HostVectors, PciFunction,
};

/// Bits of the command register.
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_NO_INTX: u16 = 1 << 10;

/// Why a host device is no function.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// Its configuration space says so.
    #[error("{address}: {source}")]
    Config {
        /// Its address on the host.
        address: String,
        /// What is wrong.
        source: ConfigError,
    },
    /// The host refused.
    #[error("{address}: {what} failed: {source}")]
    Host {
        /// Its address on the host.
        address: String,
        /// What was tried.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
}

/// A passed-through device. The bus shows a virtual configuration space; registers are the device's own,
/// reached without an exit where the host can map them; interrupts go from VFIO into the guest by the
/// kernel; DMA obeys the [`DeviceBackend`] that it is made with.
#[derive(Debug)]
pub struct VfioFunction {
    device: Arc<VfioDevice>,
    dma: Arc<dyn DeviceBackend>,
    layout: FunctionLayout,
    areas: [Vec<BarArea>; BAR_COUNT],
    vectors: Arc<Vectors>,
    /// Serialises changes of the command register.
    command: Mutex<()>,
    failures: AtomicU64,
}

impl VfioFunction {
    /// A function of `device`, whose DMA `dma` confines already, with interrupts by `lines`.
    ///
    /// # Errors
    ///
    /// [`FunctionError`], naming the device.
    pub fn new(
        device: Arc<VfioDevice>,
        dma: Arc<dyn DeviceBackend>,
        lines: Arc<dyn HostLines>,
    ) -> Result<Arc<Self>, FunctionError> {
        let address = device.address().to_owned();
        let refused = |what| {
            let address = address.clone();
            move |source| FunctionError::Host {
                address,
                what,
                source,
            }
        };
        let layout = config::read(&device).map_err(|source| FunctionError::Config {
            address: address.clone(),
            source,
        })?;
        let mut areas: [Vec<BarArea>; BAR_COUNT] = Default::default();
        for (bar, areas) in areas.iter_mut().enumerate() {
            *areas = map(&device, bar).map_err(refused("mapping a BAR"))?;
        }
        let irqs = |index| {
            let info = device.irq_info(index);
            info.map_err(refused("asking for its interrupts"))
        };
        let (msi, msix) = (irqs(MSI_IRQ)?, irqs(MSIX_IRQ)?);
        let counts = Counts {
            msi: msi.count,
            msix: msix.count,
            dynamic: msix.dynamic,
        };
        let vectors = Arc::new(Vectors::new(&address, device.clone(), lines, counts));
        let function = Self {
            device,
            dma,
            layout,
            areas,
            vectors,
            command: Mutex::new(()),
            failures: AtomicU64::new(0),
        };
        function
            .update_command(COMMAND_MASTER, false)
            .map_err(refused("writing its command register"))?;
        if !function.device.can_reset() {
            log::warn!(
                "{address} cannot be reset by itself: it keeps its state from one guest to the next, \
                 without bus mastering and interrupts in between"
            );
        }
        Ok(Arc::new(function))
    }

    /// Its address on the host.
    pub fn address(&self) -> &str {
        self.device.address()
    }

    /// Times that the host could not do what the guest asked for.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed) + self.vectors.failures()
    }

    /// Sets or clears bits of the device's command register. Memory decode stays on, so that the
    /// registers can be reached wherever the guest has placed them, and INTx stays off.
    fn update_command(&self, bits: u16, on: bool) -> io::Result<()> {
        let _guard = self.command.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = [0; 2];
        let device = &self.device;
        device.region_read(CONFIG_REGION, COMMAND, &mut bytes)?;
        let old = u16::from_le_bytes(bytes);
        let new = if on { old | bits } else { old & !bits };
        let new = (new | COMMAND_MEMORY | COMMAND_NO_INTX).to_le_bytes();
        device.region_write(CONFIG_REGION, COMMAND, &new)?;
        // A read pushes the write to the device.
        device.region_read(CONFIG_REGION, COMMAND, &mut bytes)
    }

    fn failed(&self, what: &str, error: &io::Error) {
        let count = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        // A guest can try as often as it likes: log at powers of two.
        if count.is_power_of_two() {
            log::error!(
                "{}: {what} failed, {count} so far: {error}",
                self.device.address()
            );
        }
    }
}

/// Says what it means that a device cannot be reset now: no more than a try is made, because who has it
/// locked may wait for this process (pci_try_reset_function, drivers/pci/pci.c).
fn explain(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => io::Error::other(
            "the host's kernel has the device locked, as it does while its driver is unbound",
        ),
        _ => error,
    }
}

/// The pieces of a BAR that the host maps, cut to whole pages.
fn map(device: &VfioDevice, bar: usize) -> io::Result<Vec<BarArea>> {
    let mut areas = Vec::new();
    for range in &device.regions()[bar].mappable {
        let offset = range.start.next_multiple_of(PAGE_SIZE);
        let end = range.end / PAGE_SIZE * PAGE_SIZE;
        if offset >= end {
            continue;
        }
        let memory = device.map_region(bar, offset, (end - offset) as usize)?;
        areas.push(BarArea {
            offset,
            memory: Arc::new(memory),
        });
    }
    Ok(areas)
}

impl PciFunction for VfioFunction {
    fn layout(&self) -> FunctionLayout {
        self.layout.clone()
    }

    fn connect(&self, _resources: FunctionResources) {}

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        // What is not there reads all ones, as `data` does.
        let region = self.device.regions().get(usize::from(bar));
        if region.is_none_or(|region| offset + data.len() as u64 > region.size) {
            return;
        }
        if let Err(error) = self.device.region_read(bar.into(), offset, data) {
            data.fill(0xff);
            self.failed("reading a register", &error);
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        let region = self.device.regions().get(usize::from(bar));
        if region.is_none_or(|region| offset + data.len() as u64 > region.size) {
            return;
        }
        if let Err(error) = self.device.region_write(bar.into(), offset, data) {
            self.failed("writing a register", &error);
        }
    }

    fn bar_areas(&self, bar: u8) -> Vec<BarArea> {
        let areas = self.areas.get(usize::from(bar));
        areas.cloned().unwrap_or_default()
    }

    fn host_vectors(&self) -> Option<Arc<dyn HostVectors>> {
        Some(self.vectors.clone())
    }

    fn dma_backend(&self) -> Option<Arc<dyn DeviceBackend>> {
        Some(self.dma.clone())
    }

    fn set_bus_master(&self, on: bool) {
        if let Err(error) = self.update_command(COMMAND_MASTER, on) {
            self.failed("switching bus mastering", &error);
        }
    }

    fn reset(&self) {
        if self.device.can_reset()
            && let Err(error) = self.device.reset()
        {
            self.failed("a reset", &explain(error));
        }
        if let Err(error) = self.update_command(COMMAND_MASTER, false) {
            self.failed("writing its command register", &error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_being_unbound_says_why_it_is_not_reset() {
        let locked = explain(io::Error::from_raw_os_error(libc::EAGAIN)).to_string();
        assert!(locked.contains("unbound"), "{locked}");
        let other = explain(io::Error::from_raw_os_error(libc::ENOTTY));
        assert_eq!(other.raw_os_error(), Some(libc::ENOTTY));
    }
}
