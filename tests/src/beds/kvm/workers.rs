//! The library's workers: one thread runs them, and whoever wants to know that nothing is left to
//! do runs them too.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vm_vpci::vmm::{Trigger, Worker, WorkerHost};

/// An eventfd: a trigger that a doorbell may ring as well.
#[derive(Debug)]
struct Signal(File);

impl Signal {
    fn new() -> io::Result<Arc<Self>> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self(File::from(fd))))
    }

    fn raise(&self) {
        // Fails only where the count is at its limit, and then the signal is set.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    /// True, once, if it was raised.
    fn take(&self) -> bool {
        (&self.0).read(&mut [0; 8]).is_ok()
    }
}

impl Trigger for Signal {
    fn trigger(&self) {
        self.raise();
    }

    fn eventfd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

#[derive(Debug, Clone)]
struct Adopted {
    signal: Arc<Signal>,
    worker: Weak<dyn Worker>,
}

#[derive(Debug)]
struct Shared {
    adopted: Mutex<Vec<Adopted>>,
    /// Held while workers run, so that none runs twice at once.
    running: Mutex<()>,
    /// The list has changed, or the end has come.
    changed: Arc<Signal>,
    stop: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn adopted(&self) -> Vec<Adopted> {
        let mut adopted = lock(&self.adopted);
        adopted.retain(|entry| entry.worker.strong_count() > 0);
        adopted.clone()
    }

    /// Lets each worker that was triggered do one step. False if there was none.
    fn pass(&self) -> bool {
        let _running = lock(&self.running);
        let mut any = false;
        for entry in self.adopted() {
            // Taken before the step, so that a trigger during the step causes another.
            if !entry.signal.take() {
                continue;
            }
            any = true;
            if entry
                .worker
                .upgrade()
                .is_some_and(|worker| worker.process())
            {
                entry.signal.raise();
            }
        }
        any
    }

    fn serve(&self) {
        while !self.stop.load(Ordering::Acquire) {
            let adopted = self.adopted();
            let signals = adopted.iter().map(|entry| &entry.signal);
            let mut fds: Vec<PollFd<'_>> = signals
                .chain([&self.changed])
                .map(|signal| PollFd::new(&signal.0, PollFlags::IN))
                .collect();
            if let Err(error) = poll(&mut fds, None)
                && error != rustix::io::Errno::INTR
            {
                log::error!("the workers stop: {error}");
                return;
            }
            self.changed.take();
            self.pass();
        }
    }
}

/// The workers of one VM and their thread, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Workers {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Workers {
    pub(super) fn new() -> io::Result<Self> {
        let shared = Arc::new(Shared {
            adopted: Mutex::default(),
            running: Mutex::default(),
            changed: Signal::new()?,
            stop: AtomicBool::new(false),
        });
        let served = shared.clone();
        let thread = thread::Builder::new()
            .name("workers".into())
            .spawn(move || served.serve())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Returns once no worker has anything to do.
    pub(super) fn settle(&self) {
        while self.shared.pass() {}
    }
}

impl WorkerHost for Workers {
    fn adopt(&self, worker: Weak<dyn Worker>) -> io::Result<Arc<dyn Trigger>> {
        let signal = Signal::new()?;
        lock(&self.shared.adopted).push(Adopted {
            signal: signal.clone(),
            worker,
        });
        self.shared.changed.raise();
        Ok(signal)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.changed.raise();
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            log::error!("a worker has panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    /// Does a number of steps once it is triggered.
    #[derive(Debug, Default)]
    struct Steps {
        left: AtomicU32,
        busy: AtomicBool,
    }

    impl Worker for Steps {
        fn name(&self) -> String {
            "steps".into()
        }

        fn process(&self) -> bool {
            assert!(!self.busy.swap(true, Ordering::SeqCst), "run twice at once");
            thread::yield_now();
            self.busy.store(false, Ordering::SeqCst);
            self.left.fetch_sub(1, Ordering::SeqCst) > 1
        }
    }

    #[test]
    fn nothing_is_left_to_do_after_settling() {
        let workers = Workers::new().unwrap();
        let all: Vec<Arc<Steps>> = (0..3).map(|_| Arc::default()).collect();
        let triggers: Vec<_> = all
            .iter()
            .map(|steps| {
                let worker: Arc<dyn Worker> = steps.clone();
                workers.adopt(Arc::downgrade(&worker)).unwrap()
            })
            .collect();
        for round in 1..50 {
            for (steps, trigger) in all.iter().zip(&triggers) {
                steps.left.store(round, Ordering::SeqCst);
                trigger.trigger();
            }
            workers.settle();
            let left = |steps: &Arc<Steps>| steps.left.load(Ordering::SeqCst);
            assert!(all.iter().all(|steps| left(steps) == 0));
        }
    }

    #[test]
    fn workers_run_without_being_asked_to_settle() {
        let workers = Workers::new().unwrap();
        let steps: Arc<Steps> = Arc::default();
        let worker: Arc<dyn Worker> = steps.clone();
        let trigger = workers.adopt(Arc::downgrade(&worker)).unwrap();
        steps.left.store(3, Ordering::SeqCst);
        trigger.trigger();
        let start = std::time::Instant::now();
        while steps.left.load(Ordering::SeqCst) > 0 {
            assert!(start.elapsed().as_secs() < 30);
            thread::yield_now();
        }
    }
}
