//! The interleavings of what the cache and the flush are made of.
#![forbid(unsafe_code)]

use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::sync::{Arc, RwLock};
use loom::thread;

use super::cell::Cell;

/// The tag of some page, and what it translates to.
const PAGE: (u64, u64) = (11, 110);
/// Another page that has the same place in the cache.
const RIVAL: (u64, u64) = (22, 220);

/// Explores every interleaving with at most three preemptions: those that find bugs have fewer.
fn explore(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

#[test]
fn a_value_always_belongs_to_its_tag() {
    explore(|| {
        let cell = Arc::new(Cell::default());
        let writers = [PAGE, RIVAL].map(|(tag, value)| {
            let cell = cell.clone();
            thread::spawn(move || {
                cell.store(tag, value);
            })
        });
        for (tag, value) in [PAGE, RIVAL] {
            if let Some(found) = cell.load(tag) {
                assert_eq!(found, value);
            }
        }
        for writer in writers {
            writer.join().unwrap();
        }
    });
}

#[test]
fn a_value_that_is_replaced_under_its_tag_is_old_or_new() {
    explore(|| {
        let cell = Arc::new(Cell::default());
        cell.store(PAGE.0, 1);
        let writer = {
            let cell = cell.clone();
            thread::spawn(move || {
                cell.store(RIVAL.0, RIVAL.1);
                cell.store(PAGE.0, 2);
            })
        };
        if let Some(found) = cell.load(PAGE.0) {
            assert!(found == 1 || found == 2, "{found}");
        }
        writer.join().unwrap();
    });
}

/// What the guard holds, the table entry that a walk reads, and whether the guest has given the
/// page to somebody else.
struct Model {
    gate: RwLock<Cell>,
    entry: AtomicU64,
    freed: AtomicBool,
}

impl Model {
    /// One access of a device: [`crate::dma`] in small.
    fn access(&self) {
        let cell = self.gate.read().unwrap();
        let translated = cell.load(PAGE.0).or_else(|| {
            let entry = self.entry.load(Ordering::Acquire);
            (entry != 0).then(|| {
                cell.store(PAGE.0, entry);
                entry
            })
        });
        if translated.is_some() {
            assert!(!self.freed.load(Ordering::Relaxed), "a stale access");
        }
    }

    /// Unmap, flush, reuse of the page: what a guest does.
    fn unmap(&self) {
        self.entry.store(0, Ordering::Release);
        self.gate.write().unwrap().remove(PAGE.0);
        self.freed.store(true, Ordering::Relaxed);
    }
}

#[test]
fn no_access_outlives_a_flush() {
    explore(|| {
        let model = Arc::new(Model {
            gate: RwLock::new(Cell::default()),
            entry: AtomicU64::new(PAGE.1),
            freed: AtomicBool::new(false),
        });
        let devices = [(); 2].map(|()| {
            let model = model.clone();
            thread::spawn(move || model.access())
        });
        model.unmap();
        for device in devices {
            device.join().unwrap();
        }
        // Whatever was filled after the flush was walked after the unmap.
        model.access();
    });
}
