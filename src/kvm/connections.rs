//! Signals of connections by KVM_HYPERV_EVENTFD.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_HYPERV_CONN_ID_MASK, KVM_HYPERV_EVENTFD_DEASSIGN, KVMIO, kvm_hyperv_eventfd,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::vmm::ConnectionEvents;

ioctl_iow_nr!(KVM_HYPERV_EVENTFD, KVMIO, 0xbd, kvm_hyperv_eventfd);

/// Lets HvSignalEvent ring eventfds in the kernel (docs/spec/kvm.md, section 6.2).
pub struct KvmConnections {
    vm: Arc<VmFd>,
}

impl fmt::Debug for KvmConnections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmConnections").finish_non_exhaustive()
    }
}

impl KvmConnections {
    /// For the VM behind `vm`.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }

    fn call(&self, request: &kvm_hyperv_eventfd) -> io::Result<()> {
        // SAFETY: the descriptor is a KVM VM, and `request` is the initialised structure that this
        // ioctl reads; KVM takes its own reference to the eventfd.
        match unsafe { ioctl_with_ref(&*self.vm, KVM_HYPERV_EVENTFD(), request) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl ConnectionEvents for KvmConnections {
    fn add(&self, connection_id: u32, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        self.call(&request(connection_id, Some(eventfd))?)
    }

    fn remove(&self, connection_id: u32) -> io::Result<()> {
        self.call(&request(connection_id, None)?)
    }
}

/// The request to connect `connection_id`, or to disconnect it without an eventfd.
fn request(connection_id: u32, eventfd: Option<BorrowedFd<'_>>) -> io::Result<kvm_hyperv_eventfd> {
    if connection_id & !KVM_HYPERV_CONN_ID_MASK != 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(kvm_hyperv_eventfd {
        conn_id: connection_id,
        fd: eventfd.map_or(-1, |fd| fd.as_raw_fd()),
        flags: match eventfd {
            Some(_) => 0,
            None => KVM_HYPERV_EVENTFD_DEASSIGN,
        },
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn requests_name_the_connection_and_say_what_to_do() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let add = request(0x2001, Some(file.as_fd())).unwrap();
        assert_eq!((add.conn_id, add.flags), (0x2001, 0));
        assert_eq!(add.fd, file.as_raw_fd());
        let remove = request(0xff_ffff, None).unwrap();
        assert_eq!((remove.conn_id, remove.flags), (0xff_ffff, 1));
        assert!(request(0x100_0000, None).is_err());
        assert_eq!(KVM_HYPERV_EVENTFD(), 0x4018_aebd);
    }
}
