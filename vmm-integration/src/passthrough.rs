//! Devices of the host as functions of this VM: how a VMM gives the library what they need.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kvm_bindings::kvm_irq_routing_entry;
use kvm_ioctls::VmFd;
use vm_vpci::backend::PagedBackend;
use vm_vpci::kvm::{DEFAULT_MAX_LINES, KvmBarMapper, KvmLines, KvmRoutes};
use vm_vpci::mem::GuestRam;
use vm_vpci::vfio::{FunctionError, Interface, VfioDma, VfioError, VfioFunction, VfioHost};

use crate::layout::BAR_SLOTS;
use crate::spec::{DmaMode, HostDevice};

/// Why a device of the host is no function.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PassThroughError {
    /// It cannot be had.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// It cannot be shown to a guest.
    #[error(transparent)]
    Function(#[from] FunctionError),
    /// What was asked for with `dma=` cannot be.
    #[error("{address}: dma={mode} is not possible: {why}")]
    Dma {
        /// Its address.
        address: String,
        /// What was asked for.
        mode: &'static str,
        /// Why not.
        why: &'static str,
    },
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
    host: Arc<VfioHost>,
    lines: Arc<KvmLines>,
    /// Maps their BARs.
    pub(crate) bars: Arc<KvmBarMapper>,
    /// Carries first-stage domains by following the guest's tables.
    shadow: Option<Arc<dyn PagedBackend>>,
    functions: Mutex<Vec<Weak<VfioFunction>>>,
}

impl PassThrough {
    /// For a VM with this RAM, whose table of interrupt routes has the entries `routes` on GSIs below
    /// `first_gsi`.
    pub(crate) fn new(
        vm: &Arc<VmFd>,
        ram: GuestRam,
        routes: Vec<kvm_irq_routing_entry>,
        first_gsi: u32,
        shadow: Option<Arc<dyn PagedBackend>>,
    ) -> Self {
        let table = KvmRoutes::new(vm.clone(), routes, first_gsi, DEFAULT_MAX_LINES);
        Self {
            host: VfioHost::new(ram),
            lines: Arc::new(KvmLines::new(vm.clone(), Arc::new(table))),
            bars: Arc::new(KvmBarMapper::new(vm.clone(), BAR_SLOTS)),
            shadow,
            functions: Mutex::default(),
        }
    }

    /// Opens a device and puts it into the default domain.
    ///
    /// # Errors
    ///
    /// [`PassThroughError`], naming the device.
    pub(crate) fn open(
        &self,
        device: &HostDevice,
        iommu: bool,
    ) -> Result<Arc<VfioFunction>, PassThroughError> {
        let paging = match (iommu, device.dma) {
            (false, _) => None,
            (true, DmaMode::Nested) => {
                return Err(PassThroughError::Dma {
                    address: device.address.clone(),
                    mode: "nested",
                    why: "this program does not nest tables yet; use dma=auto",
                });
            }
            (true, DmaMode::Auto | DmaMode::Shadow) => self.shadow.clone(),
        };
        let opened = self.host.open(&device.address, Interface::Auto)?;
        let dma = VfioDma::new(&self.host, opened.clone(), paging)?;
        let function = VfioFunction::new(opened, dma, self.lines.clone())?;
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        functions.retain(|function| function.strong_count() > 0);
        functions.push(Arc::downgrade(&function));
        Ok(function)
    }

    /// Times that the host could not do what the guest asked of a device.
    pub(crate) fn failures(&self) -> u64 {
        let functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let live = functions.iter().filter_map(Weak::upgrade);
        live.map(|function| function.failures()).sum()
    }
}
