//! Doorbells by ioeventfd.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::vmm::{Doorbell, Doorbells};

ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

/// Lets guest stores ring eventfds in the kernel (docs/spec/kvm.md, section 8).
pub struct KvmDoorbells {
    vm: Arc<VmFd>,
}

impl fmt::Debug for KvmDoorbells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmDoorbells").finish_non_exhaustive()
    }
}

impl KvmDoorbells {
    /// For the VM behind `vm`.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }

    fn call(&self, doorbell: Doorbell, eventfd: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
        let request = request(doorbell, eventfd, flags)?;
        // SAFETY: the descriptor is a KVM VM, and `request` is the initialised structure that this
        // ioctl reads; KVM takes its own reference to the eventfd.
        match unsafe { ioctl_with_ref(&*self.vm, KVM_IOEVENTFD(), &request) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Doorbells for KvmDoorbells {
    fn add(&self, doorbell: Doorbell, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        self.call(doorbell, eventfd, 0)
    }

    fn remove(&self, doorbell: Doorbell, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        self.call(doorbell, eventfd, 1 << kvm_ioeventfd_flag_nr_deassign)
    }
}

/// kvm-ioctls derives the width from the type of the value to match, so it cannot express a fixed
/// width without a match; hence the request is made here.
fn request(doorbell: Doorbell, eventfd: BorrowedFd<'_>, flags: u32) -> io::Result<kvm_ioeventfd> {
    let matching = doorbell.data.is_some();
    // KVM refuses any-width doorbells that match a value.
    if !matches!(doorbell.len, 0 | 1 | 2 | 4 | 8) || (matching && doorbell.len == 0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(kvm_ioeventfd {
        datamatch: doorbell.data.unwrap_or(0),
        addr: doorbell.gpa,
        len: doorbell.len.into(),
        fd: eventfd.as_raw_fd(),
        flags: flags | u32::from(matching) << kvm_ioeventfd_flag_nr_datamatch,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn doorbell(len: u8, data: Option<u64>) -> Doorbell {
        Doorbell {
            gpa: 0xd000_3004,
            len,
            data,
        }
    }

    #[test]
    fn width_and_match_are_independent() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let make = |len, data| request(doorbell(len, data), file.as_fd(), 0);
        let any = make(0, None).unwrap();
        assert_eq!((any.len, any.flags, any.addr), (0, 0, 0xd000_3004));
        let word = make(2, None).unwrap();
        assert_eq!((word.len, word.flags), (2, 0));
        let exact = make(4, Some(7)).unwrap();
        assert_eq!((exact.len, exact.flags, exact.datamatch), (4, 1, 7));
        assert!(make(0, Some(7)).is_err());
        assert!(make(3, None).is_err());
        assert_eq!(KVM_IOEVENTFD(), 0x4040_ae79);
    }
}
