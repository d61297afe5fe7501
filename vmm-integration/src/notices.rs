//! What the host says of a device that this VM has: that it wants it back, or that the device has had
//! an error.
//!
//! Each is an interrupt of VFIO that signals an eventfd. All of them are in one epoll, so that the main
//! thread has a single descriptor to wait for, while devices come and go on other threads.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::epoll;
use rustix::event::{EventfdFlags, eventfd};
use uuid::Uuid;
use vm_vpci::vfio::{ERROR_IRQ, REQUEST_IRQ};

/// Something that the host says of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Notice {
    /// The device's address on the host.
    pub(crate) device: String,
    /// The bus that it is on.
    pub(crate) bus: Uuid,
    /// The function that it is.
    pub(crate) function: u8,
    /// What it is about.
    pub(crate) about: About,
}

/// What a [`Notice`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum About {
    /// The host wants the device back: whoever unbinds it waits. Said again every ten seconds.
    Wanted,
    /// The host has seen so many errors of it that cannot be corrected.
    Errors(u64),
}

/// Ends a wait when the host has something to say.
#[derive(Debug)]
pub(crate) struct Notices {
    epoll: OwnedFd,
}

impl Notices {
    /// Of no device yet.
    ///
    /// # Errors
    ///
    /// No descriptor to be had.
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { epoll })
    }

    /// Listens to what the host says of the device at `address`, until the result is dropped.
    /// `connect` has an interrupt of it, by its index, signal an eventfd; it is false for a device that
    /// has no such interrupt. Whatever cannot be heard of is logged: the device works without.
    pub(crate) fn watch(
        &self,
        address: &str,
        connect: impl Fn(u32, BorrowedFd<'_>) -> io::Result<bool>,
    ) -> Watch {
        let listen = |irq, what| match self.listen(|fd| connect(irq, fd)) {
            Ok(fd) => fd,
            Err(error) => {
                log::warn!("{address}: {what} will go unnoticed: {error}");
                None
            }
        };
        Watch {
            request: listen(REQUEST_IRQ, "that the host wants it back"),
            errors: listen(ERROR_IRQ, "errors of it"),
        }
    }

    fn listen(
        &self,
        connect: impl FnOnce(BorrowedFd<'_>) -> io::Result<bool>,
    ) -> io::Result<Option<OwnedFd>> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        if !connect(fd.as_fd())? {
            return Ok(None);
        }
        // It leaves the epoll when it is closed.
        let unused = epoll::EventData::new_u64(0);
        epoll::add(&self.epoll, &fd, unused, epoll::EventFlags::IN)?;
        Ok(Some(fd))
    }
}

impl AsRawFd for Notices {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

/// What the host has to say of one device.
#[derive(Debug)]
pub(crate) struct Watch {
    request: Option<OwnedFd>,
    errors: Option<OwnedFd>,
}

impl Watch {
    /// What was said since the last call.
    pub(crate) fn take(&self) -> impl Iterator<Item = About> {
        let wanted = count(self.request.as_ref()).map(|_| About::Wanted);
        let errors = count(self.errors.as_ref()).map(About::Errors);
        wanted.into_iter().chain(errors)
    }
}

/// How often an eventfd was signalled since it was last read, if ever.
fn count(eventfd: Option<&OwnedFd>) -> Option<u64> {
    let mut bytes = [0; 8];
    // Fails only when nothing was written.
    rustix::io::read(eventfd?, &mut bytes).ok()?;
    Some(u64::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::cell::RefCell;

    /// VFIO's side of a device: the eventfds that its interrupts signal.
    #[derive(Default)]
    struct Device {
        signals: RefCell<Vec<(u32, OwnedFd)>>,
    }

    impl Device {
        fn connect(&self, irq: u32, fd: BorrowedFd<'_>) -> io::Result<bool> {
            let fd = fd.try_clone_to_owned()?;
            self.signals.borrow_mut().push((irq, fd));
            Ok(true)
        }

        fn signal(&self, irq: u32) {
            let signals = self.signals.borrow();
            let (_, fd) = signals.iter().find(|signal| signal.0 == irq).unwrap();
            rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
        }
    }

    fn is_due(notices: &Notices) -> bool {
        let mut fds = [PollFd::new(&notices.epoll, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).unwrap() == 1
    }

    #[test]
    fn what_is_said_ends_a_wait_and_is_told_once() {
        let notices = Notices::new().unwrap();
        let (first, second) = (Device::default(), Device::default());
        let watches = [&first, &second]
            .map(|device| notices.watch("0000:00:05.0", |irq, fd| device.connect(irq, fd)));
        let said = |index: usize| -> Vec<About> { watches[index].take().collect() };
        assert!(!is_due(&notices) && said(0).is_empty());
        second.signal(REQUEST_IRQ);
        // The host repeats itself.
        second.signal(REQUEST_IRQ);
        assert!(is_due(&notices));
        assert_eq!(said(0), []);
        assert_eq!(said(1), [About::Wanted]);
        assert!(!is_due(&notices) && said(1).is_empty());
        first.signal(ERROR_IRQ);
        first.signal(ERROR_IRQ);
        second.signal(REQUEST_IRQ);
        assert_eq!(said(0), [About::Errors(2)]);
        assert!(is_due(&notices));
        assert_eq!(said(1), [About::Wanted]);
        assert!(!is_due(&notices));
    }

    #[test]
    fn a_device_without_these_interrupts_is_left_alone() {
        let notices = Notices::new().unwrap();
        let watch = notices.watch("0000:00:05.0", |_, _| Ok(false));
        assert_eq!(watch.take().count(), 0);
        // Neither does a refusal of the host keep the device from working.
        let watch = notices.watch("0000:00:05.0", |_, _| Err(io::ErrorKind::Other.into()));
        assert_eq!(watch.take().count(), 0);
        assert!(!is_due(&notices));
    }

    #[test]
    fn a_device_that_is_gone_ends_no_wait() {
        let notices = Notices::new().unwrap();
        let device = Device::default();
        let watch = notices.watch("0000:00:05.0", |irq, fd| device.connect(irq, fd));
        device.signal(REQUEST_IRQ);
        drop(watch);
        // VFIO holds what an eventfd counts, not its file.
        drop(device);
        assert!(!is_due(&notices));
    }
}
