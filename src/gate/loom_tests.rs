//! The interleavings of entering, leaving and closing.
#![forbid(unsafe_code)]

use loom::sync::Arc;
use loom::sync::atomic::AtomicU32;
use loom::thread;

use super::*;

/// Explores every interleaving with at most three preemptions: those that find bugs have fewer.
fn explore(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// A guest leaves by itself after a while here, so kicks are not needed.
#[derive(Debug)]
struct NoKick;

impl Kick for NoKick {
    fn kick(&self, _: usize) {}
}

struct Model {
    gate: RunGate,
    /// Guest memory: changed in two steps while the gate is closed, and read by vCPUs.
    memory: [AtomicU32; 2],
}

impl Model {
    fn new(vcpus: usize) -> Arc<Self> {
        Arc::new(Self {
            gate: RunGate::new(vcpus),
            memory: [AtomicU32::new(0), AtomicU32::new(0)],
        })
    }

    fn run(&self, vcpu: usize) {
        let _entered = self.gate.enter(vcpu);
        let seen = self.memory.each_ref().map(|m| m.load(Ordering::Relaxed));
        assert_eq!(seen[0], seen[1], "a vCPU saw a change under way");
    }

    fn change(&self) {
        let _closed = self.gate.close(&NoKick);
        for word in &self.memory {
            let value = word.load(Ordering::Relaxed);
            word.store(value + 1, Ordering::Relaxed);
        }
    }
}

#[test]
fn no_vcpu_sees_a_change_under_way() {
    explore(|| {
        let model = Model::new(2);
        let vcpus = [0, 1].map(|vcpu| {
            let model = model.clone();
            thread::spawn(move || model.run(vcpu))
        });
        model.change();
        for vcpu in vcpus {
            vcpu.join().unwrap();
        }
    });
}

#[test]
fn two_vcpus_that_trap_at_once_both_get_on() {
    explore(|| {
        let model = Model::new(2);
        // The lock of the engine, held while the gate is closed.
        let engine = Arc::new(Mutex::new(()));
        let trap = |vcpu: usize, model: &Model, engine: &Mutex<()>| {
            model.run(vcpu);
            let guard = engine.lock().unwrap();
            model.change();
            drop(guard);
            model.run(vcpu);
        };
        let other = {
            let (model, engine) = (model.clone(), engine.clone());
            thread::spawn(move || trap(1, &model, &engine))
        };
        trap(0, &model, &engine);
        other.join().unwrap();
        let word = model.memory[0].load(Ordering::Relaxed);
        assert_eq!(word, 2);
    });
}
