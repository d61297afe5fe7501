//! How the main thread and the vCPU threads direct each other.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What all vCPU threads are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Command {
    /// Run guest code.
    Run = 0,
    /// Finish the exit under way and wait.
    Pause = 1,
    /// Return to the initial state and wait.
    Reset = 2,
    /// Read the vCPU's state and wait.
    Save = 3,
    /// Take over a saved state and wait.
    Restore = 4,
    /// Tell KVM what the library has taken over, and wait.
    Forward = 5,
    /// End the thread.
    Quit = 6,
}

/// What a guest, or a failing vCPU, asks of the main thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum GuestEvent {
    /// Power the VM off.
    PowerOff,
    /// Reset it.
    Reset(ResetCause),
    /// It cannot go on.
    Failed(String),
}

/// How a guest resets its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResetCause {
    /// By the reset register.
    Register,
    /// By a triple fault of this vCPU. Few guests mean to.
    TripleFault(u32),
}

/// One command for all vCPUs, and how far each has got.
#[derive(Debug)]
pub(crate) struct Control {
    wanted: AtomicU8,
    /// What each thread has carried out and waits in, [`Command::Run`] while it does not wait.
    reached: Mutex<Vec<Command>>,
    changed: Condvar,
    events: Mutex<Vec<GuestEvent>>,
    wake: EventFd,
}

impl Control {
    /// For `vcpus` threads that start paused.
    ///
    /// # Errors
    ///
    /// No event descriptor to be had.
    pub(crate) fn new(vcpus: usize) -> io::Result<Self> {
        Ok(Self {
            wanted: AtomicU8::new(Command::Pause as u8),
            reached: Mutex::new(vec![Command::Run; vcpus]),
            changed: Condvar::new(),
            events: Mutex::new(Vec::new()),
            wake: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// The command in force. Lock-free: a vCPU thread asks before each entry into the guest.
    pub(crate) fn wanted(&self) -> Command {
        match self.wanted.load(Ordering::Acquire) {
            0 => Command::Run,
            1 => Command::Pause,
            2 => Command::Reset,
            3 => Command::Save,
            4 => Command::Restore,
            5 => Command::Forward,
            _ => Command::Quit,
        }
    }

    /// vCPU thread: `command` is carried out; waits for another one.
    pub(crate) fn carried_out(&self, vcpu: usize, command: Command) {
        let mut reached = lock(&self.reached);
        if let Some(slot) = reached.get_mut(vcpu) {
            *slot = command;
        }
        self.changed.notify_all();
        while self.wanted() == command {
            reached = wait(&self.changed, reached);
        }
        // It must say so anew when the same command comes again. Not cleared where commands are
        // given: a thread that sleeps through Run and finds its command in force again stays here.
        if let Some(slot) = reached.get_mut(vcpu) {
            *slot = Command::Run;
        }
    }

    /// vCPU thread: reports an event and waits for a command other than [`Command::Run`].
    pub(crate) fn report(&self, event: GuestEvent) {
        self.post(event);
        let mut reached = lock(&self.reached);
        while self.wanted() == Command::Run {
            reached = wait(&self.changed, reached);
        }
    }

    /// vCPU thread: reports that it failed, and goes on to take commands.
    pub(crate) fn fail(&self, why: String) {
        self.post(GuestEvent::Failed(why));
    }

    /// vCPU thread: reports an event, and goes on.
    pub(crate) fn post(&self, event: GuestEvent) {
        lock(&self.events).push(event);
        if let Err(error) = self.wake.write(1) {
            log::error!("cannot wake the main thread: {error}");
        }
    }

    /// Main thread: gives a command and does not wait.
    pub(crate) fn order(&self, command: Command) {
        let guard = lock(&self.reached);
        self.wanted.store(command as u8, Ordering::Release);
        drop(guard);
        self.changed.notify_all();
    }

    /// Main thread: gives a command and waits until every vCPU has carried it out. `kick` takes
    /// all of them out of the guest; it is repeated, because a signal that arrives just before
    /// a thread enters the guest has no effect.
    pub(crate) fn order_and_wait(&self, command: Command, kick: impl Fn()) {
        const KICK_AGAIN: Duration = Duration::from_millis(2);
        self.order(command);
        loop {
            kick();
            let reached = lock(&self.reached);
            let result = self
                .changed
                .wait_timeout_while(reached, KICK_AGAIN, |reached| {
                    reached.iter().any(|r| *r != command)
                });
            let (_guard, timeout) = result.unwrap_or_else(|e| e.into_inner());
            if !timeout.timed_out() {
                return;
            }
        }
    }

    /// True if an event waits to be taken.
    pub(crate) fn has_events(&self) -> bool {
        !lock(&self.events).is_empty()
    }

    /// Main thread: the events since the last call, after [`Control`]'s descriptor was ready.
    pub(crate) fn take_events(&self) -> Vec<GuestEvent> {
        // Fails only when nothing was written.
        let _ = self.wake.read();
        std::mem::take(&mut *lock(&self.events))
    }
}

impl AsRawFd for Control {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize};
    use std::thread;

    /// A vCPU thread without a vCPU.
    fn spawn(
        control: &Arc<Control>,
        index: usize,
        log: &Arc<Mutex<Vec<Command>>>,
    ) -> thread::JoinHandle<()> {
        let (control, log) = (control.clone(), log.clone());
        thread::spawn(move || {
            loop {
                match control.wanted() {
                    Command::Run => thread::yield_now(),
                    Command::Quit => return,
                    command => {
                        lock(&log).push(command);
                        control.carried_out(index, command);
                    }
                }
            }
        })
    }

    #[test]
    fn every_thread_carries_out_each_command_once() {
        let control = Arc::new(Control::new(2).unwrap());
        let log = Arc::default();
        let threads = [spawn(&control, 0, &log), spawn(&control, 1, &log)];
        let kicks = AtomicUsize::new(0);
        let kick = || {
            kicks.fetch_add(1, Ordering::Relaxed);
        };
        for _ in 0..20 {
            control.order_and_wait(Command::Pause, kick);
            control.order_and_wait(Command::Reset, kick);
            control.order(Command::Run);
        }
        control.order(Command::Quit);
        for thread in threads {
            thread.join().unwrap();
        }
        let log = lock(&log);
        assert_eq!(log.iter().filter(|c| **c == Command::Reset).count(), 40);
        assert_eq!(log.iter().filter(|c| **c == Command::Pause).count(), 40);
        assert!(kicks.load(Ordering::Relaxed) >= 40);
    }

    const RESET: GuestEvent = GuestEvent::Reset(ResetCause::Register);

    #[test]
    fn a_pause_is_waited_for_however_often_it_is_ordered() {
        let control = Arc::new(Control::new(1).unwrap());
        let in_guest = Arc::new(AtomicBool::new(false));
        let vcpu = {
            let (control, in_guest) = (control.clone(), in_guest.clone());
            thread::spawn(move || {
                loop {
                    match control.wanted() {
                        Command::Run => {
                            in_guest.store(true, Ordering::Release);
                            thread::sleep(Duration::from_millis(20));
                            in_guest.store(false, Ordering::Release);
                        }
                        Command::Quit => return,
                        command => control.carried_out(0, command),
                    }
                }
            })
        };
        for round in 0..4 {
            control.order_and_wait(Command::Pause, || {});
            assert!(!in_guest.load(Ordering::Acquire), "round {round}");
            control.order(Command::Run);
            while !in_guest.load(Ordering::Acquire) {
                thread::yield_now();
            }
        }
        control.order(Command::Quit);
        vcpu.join().unwrap();
    }

    #[test]
    fn an_event_holds_its_vcpu_until_the_next_command() {
        let control = Arc::new(Control::new(1).unwrap());
        control.order(Command::Run);
        let vcpu = {
            let control = control.clone();
            thread::spawn(move || {
                control.report(RESET);
                control.wanted()
            })
        };
        let events = loop {
            let events = control.take_events();
            if !events.is_empty() {
                break events;
            }
            thread::yield_now();
        };
        assert_eq!(events, [RESET]);
        assert!(!vcpu.is_finished());
        control.order(Command::Quit);
        assert_eq!(vcpu.join().unwrap(), Command::Quit);
        assert!(control.take_events().is_empty());
    }
}
