//! Tells KVM which devices of the host a VM has.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVM_CAP_DEVICE_CTRL, KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL,
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};

use super::capability::{KvmError, refused};
use crate::vmm::HostFiles;

/// KVM's VFIO device of a VM, of which there is one at most: the list of files of VFIO by which the VM
/// has devices of the host.
///
/// As long as there is a file on it whose device is behind an IOMMU that does not make all DMA snoop
/// the CPU's caches (`IOMMU_CAP_ENFORCE_CACHE_COHERENCY`), KVM heeds the guest's WBINVD, and on Intel
/// its PAT (virt/kvm/vfio.c, kvm_vfio_update_coherency). Without, such a device may read from memory
/// what the guest has only in a cache.
///
/// KVM holds a reference to each file on the list, so that a device stays open until it is off it.
#[derive(Debug)]
pub struct KvmVfio {
    device: DeviceFd,
}

impl KvmVfio {
    /// Makes the device, with an empty list.
    ///
    /// # Errors
    ///
    /// [`KvmError::Missing`] or [`KvmError::Refused`]: the host's KVM has no such device, or the VM has
    /// it already.
    pub fn new(vm: &VmFd) -> Result<Self, KvmError> {
        if vm.check_extension_raw(KVM_CAP_DEVICE_CTRL.into()) <= 0 {
            let missing = vec!["KVM_CAP_DEVICE_CTRL"];
            return Err(KvmError::Missing { missing });
        }
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..Default::default()
        };
        let device = vm.create_device(&mut device);
        let device = device.map_err(refused("make its VFIO device"))?;
        Ok(Self { device })
    }

    fn change(&self, attr: u32, file: BorrowedFd<'_>) -> io::Result<()> {
        let fd: i32 = file.as_raw_fd();
        let attribute = kvm_device_attr {
            flags: 0,
            group: KVM_DEV_VFIO_FILE,
            attr: attr.into(),
            addr: (&raw const fd) as u64,
        };
        Ok(self.device.set_device_attr(&attribute)?)
    }
}

impl HostFiles for KvmVfio {
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.change(KVM_DEV_VFIO_FILE_ADD, file)
    }

    fn remove(&self, file: BorrowedFd<'_>) {
        if let Err(error) = self.change(KVM_DEV_VFIO_FILE_DEL, file) {
            log::error!("KVM keeps a device of the host open: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::Kvm;
    use std::os::fd::AsFd;

    #[test]
    fn the_constants_are_those_of_the_header() {
        assert_eq!(KVM_CAP_DEVICE_CTRL, 89);
        assert_eq!(kvm_device_type_KVM_DEV_TYPE_VFIO, 4);
        let file = [
            KVM_DEV_VFIO_FILE,
            KVM_DEV_VFIO_FILE_ADD,
            KVM_DEV_VFIO_FILE_DEL,
        ];
        assert_eq!(file, [1, 1, 2]);
    }

    #[test]
    fn a_vm_has_one_list_and_only_files_of_vfio_are_on_it() {
        let name = "a_vm_has_one_list_and_only_files_of_vfio_are_on_it";
        let Ok(kvm) = Kvm::new() else {
            println!("SKIPPED {name}: no /dev/kvm");
            return;
        };
        let vm = kvm.create_vm().unwrap();
        let list = match KvmVfio::new(&vm) {
            Ok(list) => list,
            Err(error) => {
                println!("SKIPPED {name}: {error}");
                return;
            }
        };
        let second = KvmVfio::new(&vm).unwrap_err().to_string();
        assert!(second.contains("VFIO device"), "{second}");
        let file = tempfile::tempfile().unwrap();
        let error = list.add(file.as_fd()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        let error = list.change(KVM_DEV_VFIO_FILE_DEL, file.as_fd());
        assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::ENOENT));
        // Another VM has a list of its own.
        KvmVfio::new(&kvm.create_vm().unwrap()).unwrap();
    }
}
