//! A ready-made [`WorkerHost`] on the `event-manager` crate.
//!
//! Each worker gets an eventfd of its own, so that a doorbell (ioeventfd) can wake it without a
//! detour through user space. Workers are dealt out to a fixed number of threads in turn; a worker
//! that has more work signals its own eventfd again and so queues behind the others of its thread.
#![forbid(unsafe_code)]

use std::fmt::{self, Debug};
use std::fs::File;
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::{self, JoinHandle};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
};
use log::{debug, error, warn};
use rustix::event::{EventfdFlags, eventfd};

use crate::vmm::{Trigger, Worker, WorkerHost};

/// An eventfd. Signals add up until they are taken; neither side blocks.
#[derive(Debug)]
struct Signal(File);

impl Signal {
    fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(File::from(fd)))
    }

    fn raise(&self) {
        match (&self.0).write(&1u64.to_ne_bytes()) {
            Ok(_) => {}
            // The counter is at its limit: the signal is set anyway.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => error!("eventfd write: {e}"),
        }
    }

    fn clear(&self) {
        match (&self.0).read(&mut [0; 8]) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => error!("eventfd read: {e}"),
        }
    }
}

/// One worker in a thread's loop.
struct Subscriber {
    signal: Arc<Signal>,
    worker: Weak<dyn Worker>,
    gate: Arc<Gate>,
    /// Held during a step, by its thread; by others to keep the thread from the next one.
    step: Arc<Mutex<()>>,
    /// Why the eventfd could not be watched, for [`EventLoop::adopt`] to return.
    refused: Arc<OnceLock<event_manager::Error>>,
}

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, _events: Events, ops: &mut EventOps<'_>) {
        self.gate.pass();
        let step = self.step.clone();
        let _step = lock(&step);
        // Cleared before the work, so that a trigger during the work causes another run.
        self.signal.clear();
        match self.worker.upgrade() {
            Some(worker) => {
                if worker.process() {
                    self.signal.raise();
                }
            }
            None => {
                let events = Events::new_raw(self.signal.0.as_raw_fd(), EventSet::IN);
                if let Err(e) = ops.remove(events) {
                    warn!("eventfd of a worker that is gone: {e}");
                }
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let events = Events::new_raw(self.signal.0.as_raw_fd(), EventSet::IN);
        if let Err(e) = ops.add(events) {
            let _ = self.refused.set(e);
        }
    }
}

type Manager = EventManager<Subscriber>;
type Endpoint = RemoteEndpoint<Subscriber>;

/// What wakes an adopted worker. The worker leaves the loop when its trigger is dropped.
struct WorkerTrigger {
    signal: Arc<Signal>,
    endpoint: Endpoint,
    id: SubscriberId,
}

impl Debug for WorkerTrigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerTrigger")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Trigger for WorkerTrigger {
    fn trigger(&self) {
        self.signal.raise();
    }

    fn eventfd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.signal.0.as_fd())
    }
}

impl Drop for WorkerTrigger {
    fn drop(&mut self) {
        let id = self.id;
        // Fails only when the loop has stopped, and everything in it is gone then.
        let _ = self.endpoint.fire(move |ops| {
            let _ = ops.remove_subscriber(id);
        });
    }
}

/// Keeps the threads of a loop back: a busy one would take its own lock again before whoever wants it
/// has woken up.
#[derive(Debug, Default)]
struct Gate {
    shut: AtomicBool,
    holder: Mutex<()>,
}

impl Gate {
    /// A thread of the loop waits here while the gate is shut.
    fn pass(&self) {
        if self.shut.load(Ordering::Acquire) {
            drop(lock(&self.holder));
        }
    }
}

fn lock(mutex: &Mutex<()>) -> MutexGuard<'_, ()> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct LoopThread {
    endpoint: Endpoint,
    step: Arc<Mutex<()>>,
    /// Taken when the loop stops.
    handle: Option<JoinHandle<()>>,
}

/// A [`WorkerHost`] with a fixed number of threads. Dropping it stops and joins them: no worker
/// runs afterwards, though triggers may still be signalled.
pub struct EventLoop {
    threads: Vec<LoopThread>,
    next: AtomicUsize,
    stop: Arc<AtomicBool>,
    gate: Arc<Gate>,
}

impl Debug for EventLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLoop")
            .field("threads", &self.threads.len())
            .finish_non_exhaustive()
    }
}

impl EventLoop {
    /// Starts `threads` threads, named `name-0` and so on. Workers that wait for storage hold up
    /// the others of their thread: a VMM wants at least one thread a disk queue beside one for the
    /// buses, up to the number of host CPUs.
    ///
    /// # Errors
    ///
    /// An I/O error for want of file descriptors or threads; nothing is left running then.
    pub fn new(name: &str, threads: NonZeroUsize) -> io::Result<Self> {
        let mut event_loop = Self {
            threads: Vec::with_capacity(threads.get()),
            next: AtomicUsize::new(0),
            stop: Arc::new(AtomicBool::new(false)),
            gate: Arc::default(),
        };
        for index in 0..threads.get() {
            let mut manager = Manager::new().map_err(io::Error::other)?;
            let endpoint = manager.remote_endpoint();
            let stop = event_loop.stop.clone();
            let handle = thread::Builder::new()
                .name(format!("{name}-{index}"))
                .spawn(move || run(&mut manager, &stop))?;
            event_loop.threads.push(LoopThread {
                endpoint,
                step: Arc::default(),
                handle: Some(handle),
            });
        }
        Ok(event_loop)
    }

    /// Stops all workers between two steps, until the result is dropped; triggers are kept for
    /// then. No worker can be adopted meanwhile: whoever tries waits. Not to be called from a worker
    /// of this loop, which would wait for itself.
    pub fn pause(&self) -> Paused<'_> {
        let holder = lock(&self.gate.holder);
        self.gate.shut.store(true, Ordering::Release);
        Paused {
            gate: &self.gate,
            _holder: holder,
            _steps: self
                .threads
                .iter()
                .map(|thread| lock(&thread.step))
                .collect(),
        }
    }

    fn is_loop_thread(&self) -> bool {
        let current = thread::current().id();
        self.threads
            .iter()
            .filter_map(|t| t.handle.as_ref())
            .any(|h| h.thread().id() == current)
    }
}

/// No worker of an [`EventLoop`] runs while this lives.
#[derive(Debug)]
#[must_use = "the workers go on when it is dropped"]
pub struct Paused<'a> {
    gate: &'a Gate,
    _holder: MutexGuard<'a, ()>,
    _steps: Vec<MutexGuard<'a, ()>>,
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.gate.shut.store(false, Ordering::Release);
    }
}

/// A thread's loop, until `stop`.
fn run(manager: &mut Manager, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        if let Err(e) = manager.run() {
            error!("event loop stopped: {e}");
            return;
        }
    }
}

impl WorkerHost for EventLoop {
    /// Adopts a worker. Not to be called from a worker of this loop, which would wait for itself:
    /// that is refused.
    fn adopt(&self, worker: Weak<dyn Worker>) -> io::Result<Arc<dyn Trigger>> {
        if self.is_loop_thread() {
            return Err(io::Error::new(
                io::ErrorKind::Deadlock,
                "a worker cannot add a worker to its own event loop",
            ));
        }
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.threads.len();
        let endpoint = self.threads[index].endpoint.clone();
        let signal = Arc::new(Signal::new()?);
        let refused = Arc::new(OnceLock::new());
        let subscriber = Subscriber {
            signal: signal.clone(),
            worker,
            gate: self.gate.clone(),
            step: self.threads[index].step.clone(),
            refused: refused.clone(),
        };
        let id = endpoint
            .call_blocking(move |ops| Ok::<_, event_manager::Error>(ops.add_subscriber(subscriber)))
            .map_err(io::Error::other)?;
        let trigger = WorkerTrigger {
            signal,
            endpoint,
            id,
        };
        match refused.get() {
            Some(e) => Err(io::Error::other(e.to_string())),
            None => Ok(Arc::new(trigger)),
        }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        let own = thread::current().id();
        self.stop.store(true, Ordering::Release);
        for thread in &self.threads {
            if let Err(e) = thread.endpoint.kick() {
                error!("cannot wake an event loop to stop it: {e}");
            }
        }
        for thread in &mut self.threads {
            let Some(handle) = thread.handle.take() else {
                continue;
            };
            if handle.thread().id() == own {
                debug!("event loop dropped by its own worker; its thread ends by itself");
            } else if handle.join().is_err() {
                error!("an event loop thread had panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    const SOON: Duration = Duration::from_secs(10);

    /// Reports each run, and asks for more until its budget is spent.
    #[derive(Debug)]
    struct Counter {
        name: &'static str,
        more: AtomicUsize,
        runs: Mutex<Sender<&'static str>>,
    }

    impl Counter {
        fn new(name: &'static str, more: usize) -> (Arc<Self>, Receiver<&'static str>) {
            let (sender, receiver) = channel();
            (Self::with(name, more, sender), receiver)
        }

        fn with(name: &'static str, more: usize, sender: Sender<&'static str>) -> Arc<Self> {
            Arc::new(Self {
                name,
                more: AtomicUsize::new(more),
                runs: Mutex::new(sender),
            })
        }
    }

    impl Worker for Counter {
        fn name(&self) -> String {
            self.name.to_owned()
        }

        fn process(&self) -> bool {
            self.runs.lock().unwrap().send(self.name).unwrap();
            self.more
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
                .is_ok()
        }
    }

    fn event_loop(threads: usize) -> EventLoop {
        EventLoop::new("test", NonZeroUsize::new(threads).unwrap()).unwrap()
    }

    fn weak(worker: &Arc<Counter>) -> Weak<dyn Worker> {
        let worker: Arc<dyn Worker> = worker.clone();
        Arc::downgrade(&worker)
    }

    #[test]
    fn a_trigger_runs_the_worker_and_more_work_runs_it_again() {
        let host = event_loop(1);
        let (worker, runs) = Counter::new("a", 2);
        let trigger = host.adopt(weak(&worker)).unwrap();
        assert!(runs.recv_timeout(Duration::from_millis(20)).is_err());
        trigger.trigger();
        for _ in 0..3 {
            runs.recv_timeout(SOON).unwrap();
        }
        assert!(runs.recv_timeout(Duration::from_millis(20)).is_err());
    }

    #[test]
    fn the_eventfd_of_a_trigger_runs_the_worker() {
        let host = event_loop(2);
        let (worker, runs) = Counter::new("a", 0);
        let trigger = host.adopt(weak(&worker)).unwrap();
        let doorbell = trigger.eventfd().unwrap().try_clone_to_owned().unwrap();
        rustix::io::write(&doorbell, &1u64.to_ne_bytes()).unwrap();
        runs.recv_timeout(SOON).unwrap();
    }

    #[test]
    fn a_busy_worker_lets_the_others_of_its_thread_have_their_turn() {
        let host = event_loop(1);
        let (sender, runs) = channel();
        let busy = Counter::with("busy", 10_000, sender.clone());
        let other = Counter::with("other", 0, sender);
        let busy_trigger = host.adopt(weak(&busy)).unwrap();
        let other_trigger = host.adopt(weak(&other)).unwrap();
        busy_trigger.trigger();
        other_trigger.trigger();
        let before = std::iter::from_fn(|| runs.recv_timeout(SOON).ok())
            .take_while(|name| *name != "other")
            .count();
        assert!(before < 10_000, "the other worker starved");
    }

    #[test]
    fn paused_workers_stand_still_however_busy_they_are() {
        let host = event_loop(2);
        let (busy, runs) = Counter::new("busy", usize::MAX);
        let (idle, idle_runs) = Counter::new("idle", 0);
        let trigger = host.adopt(weak(&busy)).unwrap();
        let idle_trigger = host.adopt(weak(&idle)).unwrap();
        trigger.trigger();
        for _ in 0..20 {
            runs.recv_timeout(SOON).unwrap();
            let paused = host.pause();
            while runs.try_recv().is_ok() {}
            idle_trigger.trigger();
            assert!(runs.recv_timeout(Duration::from_millis(5)).is_err());
            assert!(idle_runs.try_recv().is_err());
            drop(paused);
            idle_runs.recv_timeout(SOON).unwrap();
        }
    }

    #[test]
    fn dropping_the_trigger_or_the_worker_ends_the_watch() {
        let host = event_loop(1);
        let (worker, runs) = Counter::new("a", 0);
        let trigger = host.adopt(weak(&worker)).unwrap();
        let doorbell = trigger.eventfd().unwrap().try_clone_to_owned().unwrap();
        drop(trigger);
        // Another adoption goes through the same thread after the removal.
        let (gone, gone_runs) = Counter::new("b", 0);
        let gone_trigger = host.adopt(weak(&gone)).unwrap();
        rustix::io::write(&doorbell, &1u64.to_ne_bytes()).unwrap();
        assert!(runs.recv_timeout(Duration::from_millis(20)).is_err());
        drop(gone);
        gone_trigger.trigger();
        assert!(gone_runs.recv_timeout(SOON).is_err());
        let (last, last_runs) = Counter::new("c", 0);
        let last_trigger = host.adopt(weak(&last)).unwrap();
        last_trigger.trigger();
        last_runs.recv_timeout(SOON).unwrap();
    }

    #[test]
    fn no_worker_runs_after_the_loop_was_dropped() {
        let host = event_loop(3);
        let (worker, runs) = Counter::new("a", usize::MAX);
        let trigger = host.adopt(weak(&worker)).unwrap();
        trigger.trigger();
        runs.recv_timeout(SOON).unwrap();
        drop(host);
        while runs.try_recv().is_ok() {}
        trigger.trigger();
        assert!(runs.recv_timeout(Duration::from_millis(20)).is_err());
    }

    #[test]
    fn adopting_from_a_worker_of_the_same_loop_is_refused() {
        #[derive(Debug)]
        struct Adopter(Arc<EventLoop>, Mutex<Sender<io::ErrorKind>>);
        impl Worker for Adopter {
            fn name(&self) -> String {
                "adopter".to_owned()
            }
            fn process(&self) -> bool {
                let (worker, _runs) = Counter::new("inner", 0);
                let error = self.0.adopt(weak(&worker)).unwrap_err();
                self.1.lock().unwrap().send(error.kind()).unwrap();
                false
            }
        }
        let host = Arc::new(event_loop(1));
        let (sender, receiver) = channel();
        let adopter: Arc<dyn Worker> = Arc::new(Adopter(host.clone(), Mutex::new(sender)));
        let trigger = host.adopt(Arc::downgrade(&adopter)).unwrap();
        trigger.trigger();
        assert_eq!(
            receiver.recv_timeout(SOON).unwrap(),
            io::ErrorKind::Deadlock
        );
    }
}
