//! The host's workers, run on the calling thread when told to.
#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_vpci::vmm::{Trigger, Worker, WorkerHost};

/// Steps after which workers that never come to rest are taken for a loop without an end.
const MOST_STEPS: usize = 1_000_000;

#[derive(Debug, Default)]
struct Flag(AtomicBool);

impl Trigger for Flag {
    fn trigger(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

type Adopted = (Weak<dyn Worker>, Arc<Flag>);

/// A loop without a thread of its own.
#[derive(Debug, Default)]
pub struct Workers {
    adopted: Mutex<Vec<Adopted>>,
    /// Where the next step begins to look; held during a step, so that steps do not overlap.
    turn: Mutex<usize>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl WorkerHost for Workers {
    fn adopt(&self, worker: Weak<dyn Worker>) -> io::Result<Arc<dyn Trigger>> {
        let flag = Arc::new(Flag::default());
        lock(&self.adopted).push((worker, flag.clone()));
        Ok(flag)
    }
}

impl Workers {
    /// Lets the next worker with work do one step, each in its turn. False if there was none.
    pub fn step(&self) -> bool {
        let mut turn = lock(&self.turn);
        let adopted = {
            let mut adopted = lock(&self.adopted);
            // Workers of buses that are gone.
            adopted.retain(|(worker, _)| worker.strong_count() > 0);
            adopted.clone()
        };
        for offset in 0..adopted.len() {
            let index = (*turn + offset) % adopted.len();
            let (worker, flag) = &adopted[index];
            if !flag.0.swap(false, Ordering::SeqCst) {
                continue;
            }
            let Some(worker) = worker.upgrade() else {
                continue;
            };
            *turn = index + 1;
            if worker.process() {
                flag.trigger();
            }
            return true;
        }
        false
    }

    /// Runs workers until none has work.
    ///
    /// # Panics
    ///
    /// If they do not come to rest.
    pub fn settle(&self) {
        for _ in 0..MOST_STEPS {
            if !self.step() {
                return;
            }
        }
        panic!("the host's workers do not come to rest");
    }
}
