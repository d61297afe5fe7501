//! Devices of the host as functions of this VM: how a VMM gives the library what they need.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use kvm_bindings::kvm_irq_routing_entry;
use kvm_ioctls::VmFd;
use uuid::Uuid;
use vm_vpci::backend::PagedBackend;
use vm_vpci::kvm::{DEFAULT_MAX_LINES, KvmBarMapper, KvmLines, KvmRoutes, KvmVfio};
use vm_vpci::mem::GuestRam;
use vm_vpci::pviommu::IommuConfig;
use vm_vpci::vfio::{
    Carrier, Carry, FunctionError, Interface, Nesting, VfioDevice, VfioDma, VfioError,
    VfioFunction, VfioHost,
};

use crate::layout::BAR_SLOTS;
use crate::notices::{About, Notice, Notices, Watch};
use crate::spec::{DmaMode, HostDevice, Kind, PlacedFunction};

/// Why a device of the host is no function.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PassThroughError {
    /// It cannot be had.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// It cannot be shown to a guest.
    #[error(transparent)]
    Function(#[from] FunctionError),
}

/// Looks at a device before anything is created.
///
/// # Errors
///
/// [`VfioError`], saying what to do.
pub(crate) fn check(device: &HostDevice) -> Result<(), VfioError> {
    vm_vpci::vfio::check(Path::new("/"), &device.address, Interface::Auto).map(drop)
}

/// What the VM's passed-through devices share.
#[derive(Debug)]
pub(crate) struct PassThrough {
    vm: Arc<VmFd>,
    ram: GuestRam,
    /// Made for the first device.
    host: OnceLock<Arc<VfioHost>>,
    lines: Arc<KvmLines>,
    /// Maps their BARs.
    pub(crate) bars: Arc<KvmBarMapper>,
    /// Carries first-stage domains by following the guest's tables.
    shadow: Option<Arc<dyn PagedBackend>>,
    /// What the guest is told of its tables.
    guest: OnceLock<IommuConfig>,
    /// Devices that were opened to find that out.
    opened: Mutex<BTreeMap<String, Arc<VfioDevice>>>,
    functions: Mutex<Vec<PassedThrough>>,
    notices: Notices,
    /// Errors of devices that the host has told of.
    errors: AtomicU64,
}

/// A function that is a device of the host, as long as it lives.
#[derive(Debug)]
struct PassedThrough {
    address: String,
    bus: Uuid,
    number: u8,
    function: Weak<VfioFunction>,
    /// Of a function behind the pvIOMMU.
    carrier: Option<Carrier>,
    /// What the host says of it.
    watch: Watch,
}

impl PassThrough {
    /// For a VM with this RAM, whose table of interrupt routes has the entries `routes` on GSIs below
    /// `first_gsi`.
    ///
    /// # Errors
    ///
    /// No descriptor to be had.
    pub(crate) fn new(
        vm: &Arc<VmFd>,
        ram: GuestRam,
        routes: Vec<kvm_irq_routing_entry>,
        first_gsi: u32,
        shadow: Option<Arc<dyn PagedBackend>>,
    ) -> io::Result<Self> {
        let table = KvmRoutes::new(vm.clone(), routes, first_gsi, DEFAULT_MAX_LINES);
        Ok(Self {
            vm: vm.clone(),
            ram,
            host: OnceLock::new(),
            lines: Arc::new(KvmLines::new(vm.clone(), Arc::new(table))),
            bars: Arc::new(KvmBarMapper::new(vm.clone(), BAR_SLOTS)),
            shadow,
            guest: OnceLock::new(),
            opened: Mutex::default(),
            functions: Mutex::default(),
            notices: Notices::new()?,
            errors: AtomicU64::new(0),
        })
    }

    /// What opens devices, with which KVM learns of them where it can.
    fn host(&self) -> &Arc<VfioHost> {
        self.host.get_or_init(|| match KvmVfio::new(&self.vm) {
            Ok(files) => VfioHost::with_files(self.ram.clone(), Arc::new(files)),
            Err(error) => {
                log::warn!(
                    "KVM does not learn of devices of the host: where their DMA does not snoop \
                     caches, they may read stale data: {error}"
                );
                VfioHost::new(self.ram.clone())
            }
        })
    }

    /// What the guest is to be told of its tables: `config`, and no more than the IOMMUs walk that
    /// can be nested on. Opens the devices among `placed`, which [`open`](Self::open) then takes.
    /// One that cannot be opened is left to it, too.
    pub(crate) fn prepare(&self, placed: &[PlacedFunction], config: IommuConfig) -> IommuConfig {
        let mut config = config;
        for function in placed.iter().filter(|function| function.iommu) {
            let Kind::Vfio(device) = &function.kind else {
                continue;
            };
            if device.dma == DmaMode::Shadow {
                continue;
            }
            let Ok(opened) = self.host().open(&device.address, Interface::Auto) else {
                continue;
            };
            if let Ok(found) = opened.nested_capabilities() {
                config.nested = true;
                config.gigabyte_pages &= found.gigabyte_pages;
            }
            lock(&self.opened).insert(device.address.clone(), opened);
        }
        *self.guest.get_or_init(|| config)
    }

    /// Opens the device that a function is, and puts it into the default domain.
    ///
    /// # Errors
    ///
    /// [`PassThroughError`], naming the device.
    pub(crate) fn open(
        &self,
        device: &HostDevice,
        placed: &PlacedFunction,
    ) -> Result<Arc<VfioFunction>, PassThroughError> {
        let address = &device.address;
        let known = lock(&self.opened).remove(address);
        let opened = match known {
            Some(opened) => opened,
            None => self.host().open(address, Interface::Auto)?,
        };
        let carry = match placed.iommu {
            false => Carry::default(),
            true => Carry {
                nesting: match device.dma {
                    DmaMode::Auto => Nesting::IfPossible,
                    DmaMode::Nested => Nesting::Required,
                    DmaMode::Shadow => Nesting::Never,
                },
                guest: self.guest.get().copied().unwrap_or_default(),
                shadow: self.shadow.clone(),
            },
        };
        let dma = VfioDma::new(self.host(), opened.clone(), carry)?;
        let carrier = placed.iommu.then(|| dma.carrier());
        if let Some(carrier) = &carrier {
            match device.dma {
                DmaMode::Shadow => log::info!("{address}: first-stage domains are {carrier}"),
                _ => log::warn!("{address}: first-stage domains are {carrier}"),
            }
        }
        let connect = |irq, fd: BorrowedFd<'_>| connect(&opened, irq, fd);
        let watch = self.notices.watch(address, connect);
        let function = VfioFunction::new(opened, dma, self.lines.clone())?;
        let mut functions = lock(&self.functions);
        functions.retain(|known| known.function.strong_count() > 0);
        functions.push(PassedThrough {
            address: address.clone(),
            bus: placed.bus,
            number: placed.function,
            function: Arc::downgrade(&function),
            carrier,
            watch,
        });
        Ok(function)
    }

    /// A descriptor that can be read from when [`notices`](Self::notices) has something to tell.
    pub(crate) fn notices_fd(&self) -> RawFd {
        self.notices.as_raw_fd()
    }

    /// What the host has said of the devices since the last call; of errors not each time, because a guest
    /// may be able to make its device have as many as it likes.
    pub(crate) fn notices(&self) -> Vec<Notice> {
        let mut functions = lock(&self.functions);
        functions.retain(|known| known.function.strong_count() > 0);
        let mut notices = Vec::new();
        for known in &*functions {
            notices.extend(known.watch.take().map(|about| Notice {
                device: known.address.clone(),
                bus: known.bus,
                function: known.number,
                about,
            }));
        }
        notices.retain(|notice| match notice.about {
            About::Wanted => true,
            About::Errors(count) => {
                let before = self.errors.fetch_add(count, Ordering::Relaxed);
                passes_a_power_of_two(before, before.saturating_add(count))
            }
        });
        notices
    }

    /// Errors of devices that the host has told of.
    pub(crate) fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }

    /// What carries the first-stage domains of a function behind the pvIOMMU that is a device of the
    /// host.
    pub(crate) fn carrier(&self, bus: Uuid, number: u8) -> Option<Carrier> {
        let functions = lock(&self.functions);
        let found = functions.iter().find(|known| {
            let lives = known.function.strong_count() > 0;
            lives && known.bus == bus && known.number == number
        });
        found.and_then(|known| known.carrier.clone())
    }

    /// Times that the host could not do what the guest asked of a device.
    pub(crate) fn failures(&self) -> u64 {
        let functions = lock(&self.functions);
        let live = functions
            .iter()
            .filter_map(|known| known.function.upgrade());
        live.map(|function| function.failures()).sum()
    }
}

/// Has an interrupt of a device signal an eventfd; false if it has no such interrupt.
fn connect(device: &VfioDevice, irq: u32, fd: BorrowedFd<'_>) -> io::Result<bool> {
    if device.irq_info(irq)?.count == 0 {
        return Ok(false);
    }
    device.set_irqs(irq, 0, &[Some(fd)])?;
    Ok(true)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// True if a count reached a power of two, or went past one.
fn passes_a_power_of_two(before: u64, after: u64) -> bool {
    before.checked_ilog2() != after.checked_ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_told_ever_more_rarely() {
        let told = (0..1000).filter(|before| passes_a_power_of_two(*before, before + 1));
        assert!(told.eq([0, 1, 3, 7, 15, 31, 63, 127, 255, 511]));
        assert!(passes_a_power_of_two(5, 9) && !passes_a_power_of_two(5, 7));
    }
}
