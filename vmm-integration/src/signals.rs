//! Signals as a pollable descriptor, and the signal that takes a vCPU out of the guest.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_vpci::gate::Kick;

use vmm_sys_util::signal::{SIGRTMIN, create_sigset, register_signal_handler};

/// A signal that the VMM acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// SIGINT or SIGTERM: end the VM.
    Stop(&'static str),
    /// SIGHUP: look at the backing files again.
    Reread,
}

/// The process's signals, blocked everywhere and read from one descriptor.
#[derive(Debug)]
pub(crate) struct Signals(File);

impl Signals {
    /// Takes over SIGINT, SIGTERM and SIGHUP. Call before any thread is started: threads inherit
    /// the mask.
    ///
    /// # Errors
    ///
    /// What the host says.
    pub(crate) fn take() -> io::Result<Self> {
        let set = create_sigset(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
        // SAFETY: the set is initialised, and the old mask is not asked for.
        let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        // SAFETY: the set is initialised; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just created and has no other owner.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// The next pending signal, if any.
    pub(crate) fn next(&self) -> Option<Signal> {
        const SIZE: usize = std::mem::size_of::<libc::signalfd_siginfo>();
        let mut info = [0; SIZE];
        match (&self.0).read(&mut info) {
            // `ssi_signo` is the first field.
            Ok(SIZE) => match u32::from_ne_bytes([info[0], info[1], info[2], info[3]]) as i32 {
                libc::SIGHUP => Some(Signal::Reread),
                libc::SIGINT => Some(Signal::Stop("SIGINT")),
                _ => Some(Signal::Stop("SIGTERM")),
            },
            _ => None,
        }
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Number of the signal that interrupts `KVM_RUN`.
pub(crate) fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// Installs the handler of the kick signal, which does nothing: its arrival is what counts.
///
/// # Errors
///
/// What the host says.
pub(crate) fn install_kick_handler() -> io::Result<()> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(kick_signal(), ignore).map_err(io::Error::from)
}

/// The vCPU threads, to be kicked one by one.
#[derive(Debug, Default)]
pub(crate) struct VcpuThreads {
    /// By number of the vCPU. A thread takes itself off before it ends.
    alive: Mutex<BTreeMap<usize, libc::pthread_t>>,
}

impl VcpuThreads {
    /// Notes the calling thread as that of a vCPU, until the result is dropped on the same thread.
    pub(crate) fn enlist(&self, vcpu: usize) -> Enlisted<'_> {
        // SAFETY: it only tells the number of the calling thread.
        let this = unsafe { libc::pthread_self() };
        self.lock().insert(vcpu, this);
        Enlisted {
            threads: self,
            vcpu,
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, libc::pthread_t>> {
        self.alive.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kick for VcpuThreads {
    fn kick(&self, vcpu: usize) {
        let alive = self.lock();
        if let Some(thread) = alive.get(&vcpu) {
            // SAFETY: the thread is alive: before it ends it takes itself off the list, which is
            // locked. The signal has a handler.
            unsafe { libc::pthread_kill(*thread, kick_signal()) };
        }
    }
}

/// The calling thread can be kicked.
#[derive(Debug)]
pub(crate) struct Enlisted<'a> {
    threads: &'a VcpuThreads,
    vcpu: usize,
}

impl Drop for Enlisted<'_> {
    fn drop(&mut self) {
        self.threads.lock().remove(&self.vcpu);
    }
}
