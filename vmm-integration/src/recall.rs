//! Devices that the host wants back: the guest is asked to let go of each in order, and when it has, or
//! its time is over, the device is taken away, which ends the wait of whoever unbinds it.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::embed::{Ejected, UnplugError};
use crate::incarnation::Incarnation;

/// What a device goes with, and which one that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asked {
    /// The function that goes; none: the whole bus.
    pub(crate) function: Option<u8>,
    /// Tells the bus from a later one of the same name.
    pub(crate) incarnation: Incarnation,
}

/// The functions of a VM.
pub(crate) trait Functions {
    /// Asks the guest to let go of a function, or of its bus where it cannot go alone; `done` is
    /// called once when it has.
    ///
    /// # Errors
    ///
    /// [`UnplugError`]; `done` is not called.
    fn ask_back(&self, bus: &Uuid, function: u8, done: Ejected) -> Result<Asked, UnplugError>;

    /// Takes away what the guest was asked for.
    ///
    /// # Errors
    ///
    /// [`UnplugError`]: it is gone already.
    fn take_back(&self, bus: &Uuid, asked: Asked) -> Result<(), UnplugError>;
}

/// A device that the guest was asked for.
#[derive(Debug)]
struct Recall {
    device: String,
    bus: Uuid,
    function: u8,
    asked: Asked,
    released: Arc<AtomicBool>,
    deadline: Instant,
}

/// All of them, in the hands of the main thread.
#[derive(Debug)]
pub(crate) struct Recalls {
    under_way: Vec<Recall>,
    patience: Duration,
    /// Ends a wait of the main thread when a guest has let go of something.
    wake: Arc<EventFd>,
}

impl Recalls {
    /// None yet; a guest has `patience` to let go of a device.
    ///
    /// # Errors
    ///
    /// No event descriptor to be had.
    pub(crate) fn new(patience: Duration) -> io::Result<Self> {
        Ok(Self {
            under_way: Vec::new(),
            patience,
            wake: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        })
    }

    /// The host wants the device back that is this function. It says so again and again; nothing
    /// changes while the guest has been asked.
    pub(crate) fn begin(
        &mut self,
        vm: &impl Functions,
        device: &str,
        bus: Uuid,
        function: u8,
        now: Instant,
    ) {
        let with_bus = |recall: &Recall| recall.asked.function.is_none();
        let covers = |recall: &Recall| {
            recall.bus == bus && (recall.function == function || with_bus(recall))
        };
        if self.under_way.iter().any(covers) {
            return;
        }
        let released = Arc::new(AtomicBool::new(false));
        let (told, wake) = (released.clone(), self.wake.clone());
        let done = move || {
            told.store(true, Ordering::Release);
            // Fails only when the counter is full, and then it is signalled.
            let _ = wake.write(1);
        };
        let place = format!("function {function} of bus {bus}");
        match vm.ask_back(&bus, function, Box::new(done)) {
            Ok(asked) => {
                let what = match asked.function {
                    Some(_) => place,
                    None => format!("bus {bus}"),
                };
                let seconds = self.patience.as_secs();
                log::warn!(
                    "the host wants {device} back: the guest has {seconds} s to let go of {what}"
                );
                self.under_way.push(Recall {
                    device: device.to_owned(),
                    bus,
                    function,
                    asked,
                    released,
                    deadline: now + self.patience,
                });
            }
            // Somebody else has it ejected, or something beside it; the host says it again.
            Err(UnplugError::Busy) => {
                log::warn!("the host wants {device} back: {place} waits for another ejection");
            }
            // Gone, or not yet there.
            Err(error) => log::debug!("the host wants {device} back, {place}: {error}"),
        }
    }

    /// Takes away what the guest has let go of, and what its time is over for.
    pub(crate) fn end(&mut self, vm: &impl Functions, now: Instant) {
        // Fails only when nothing was written.
        let _ = self.wake.read();
        let is_due =
            |recall: &mut Recall| recall.released.load(Ordering::Acquire) || recall.deadline <= now;
        for recall in self.under_way.extract_if(.., is_due) {
            let device = &recall.device;
            // What somebody else has taken away meanwhile is as good.
            let _ = vm.take_back(&recall.bus, recall.asked);
            match recall.released.load(Ordering::Acquire) {
                true => log::warn!("{device} is given back to the host"),
                false => log::warn!(
                    "{device} is given back to the host, though the guest has not let go of it"
                ),
            }
        }
    }

    /// How long the main thread may wait at most; for ever without a time.
    pub(crate) fn longest_wait(&self, now: Instant) -> Option<Duration> {
        let deadlines = self.under_way.iter().map(|recall| recall.deadline);
        let next = deadlines.min()?;
        Some(next.saturating_duration_since(now))
    }
}

impl AsRawFd for Recalls {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    const BUS: Uuid = Uuid::from_u128(1);
    const PATIENCE: Duration = Duration::from_secs(60);

    /// A VM whose function 0 goes with its bus.
    #[derive(Default)]
    struct Vm {
        asked: RefCell<Vec<(Option<u8>, Option<Ejected>)>>,
        taken: RefCell<Vec<Option<u8>>>,
        refuses: Option<fn() -> UnplugError>,
    }

    impl Vm {
        fn releases(&self, index: usize) {
            let done = self.asked.borrow_mut()[index].1.take();
            done.unwrap()();
        }
    }

    impl Functions for Vm {
        fn ask_back(&self, bus: &Uuid, function: u8, done: Ejected) -> Result<Asked, UnplugError> {
            assert_eq!(*bus, BUS);
            if let Some(error) = self.refuses {
                return Err(error());
            }
            let function = (function != 0).then_some(function);
            self.asked.borrow_mut().push((function, Some(done)));
            Ok(Asked {
                function,
                incarnation: Incarnation::default(),
            })
        }

        fn take_back(&self, _: &Uuid, asked: Asked) -> Result<(), UnplugError> {
            self.taken.borrow_mut().push(asked.function);
            Err(UnplugError::NoSuchBus)
        }
    }

    #[test]
    fn a_device_is_taken_away_when_the_guest_has_let_go_of_it() {
        let (vm, start) = (Vm::default(), Instant::now());
        let mut recalls = Recalls::new(PATIENCE).unwrap();
        assert_eq!(recalls.longest_wait(start), None);
        recalls.begin(&vm, "a", BUS, 2, start);
        recalls.end(&vm, start);
        assert!(vm.taken.borrow().is_empty());
        assert_eq!(recalls.longest_wait(start), Some(PATIENCE));
        vm.releases(0);
        assert_eq!(recalls.wake.read().unwrap(), 1, "the main thread wakes up");
        recalls.end(&vm, start);
        assert_eq!(*vm.taken.borrow(), [Some(2)]);
        assert_eq!(recalls.longest_wait(start), None);
    }

    #[test]
    fn a_guest_that_does_not_answer_loses_it_all_the_same() {
        let (vm, start) = (Vm::default(), Instant::now());
        let mut recalls = Recalls::new(PATIENCE).unwrap();
        recalls.begin(&vm, "a", BUS, 2, start);
        let late = start + PATIENCE;
        recalls.end(&vm, late - Duration::from_millis(1));
        assert!(vm.taken.borrow().is_empty());
        recalls.end(&vm, late);
        assert_eq!(*vm.taken.borrow(), [Some(2)]);
        // The guest answers too late.
        vm.releases(0);
        recalls.end(&vm, late);
        assert_eq!(vm.taken.borrow().len(), 1);
    }

    #[test]
    fn the_guest_is_asked_once_however_often_the_host_says_so() {
        let (vm, start) = (Vm::default(), Instant::now());
        let mut recalls = Recalls::new(PATIENCE).unwrap();
        for second in 0..3 {
            let now = start + Duration::from_secs(second * 10);
            recalls.begin(&vm, "a", BUS, 2, now);
            assert_eq!(recalls.longest_wait(start), Some(PATIENCE));
        }
        assert_eq!(vm.asked.borrow().len(), 1);
        recalls.begin(&vm, "b", BUS, 0, start);
        // Those beside it go with the bus.
        recalls.begin(&vm, "c", BUS, 3, start);
        let asked: Vec<_> = vm.asked.borrow().iter().map(|asked| asked.0).collect();
        assert_eq!(asked, [Some(2), None]);
        vm.releases(1);
        recalls.end(&vm, start);
        assert_eq!(*vm.taken.borrow(), [None]);
    }

    #[test]
    fn what_cannot_be_asked_for_is_tried_when_the_host_says_it_again() {
        let start = Instant::now();
        let mut recalls = Recalls::new(PATIENCE).unwrap();
        for refusal in [|| UnplugError::Busy, || UnplugError::NoSuchBus] {
            let vm = Vm {
                refuses: Some(refusal),
                ..Vm::default()
            };
            recalls.begin(&vm, "a", BUS, 2, start);
            assert_eq!(recalls.longest_wait(start), None);
        }
        let vm = Vm::default();
        recalls.begin(&vm, "a", BUS, 2, start);
        assert_eq!(vm.asked.borrow().len(), 1);
    }
}
