//! A guest that means harm: two VPs fire random but plausible traffic while the operator plugs buses
//! in, asks for them and tears them out, and resets the VM. The host must live through it, and be as
//! before when it is over.
//!
//! A storm is a row of rounds. In each a VM is made and brought into use; then comes a fixed number of
//! steps; then the VM is reset and must work as on the first day; then it goes. The VM must have no
//! more file descriptors after its steps than before, and the process no more threads and descriptors
//! after the round than before. The memory of the process must not grow from round to round.
//!
//! All chance comes from a seed. On `sim` one thread does everything, so that a seed always means the
//! same storm; on a real CPU each VP and the operator have a thread.
#![forbid(unsafe_code)]

mod attacker;
mod dice;
mod operator;
mod usage;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use vm_vpci::pviommu::IommuConfig;

use crate::bed::{Bed, BedKind};
use crate::check::{Context, Failure, Verdict, equal};
use crate::guest::Fault;
use crate::host::{BusSetup, Setup};
use crate::model::testdev::TestDev;
use crate::model::vm::Vm;
use crate::runner::panic_text;
use crate::trace::Trace;

use attacker::Attacker;
use dice::Dice;
use operator::Operator;
pub use usage::Usage;

/// Steps of each of the two VPs in a round.
const STEPS: u64 = 4000;
/// How long a storm may go without any step before the host counts as hanging.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long what is gone may still be held after a storm.
const LAG: Duration = Duration::from_secs(20);
/// Rounds after which memory should not grow any more.
const WARM_UP: usize = 3;
/// Bytes that the process may grow by after the warm-up: allocators round.
const GROWTH: u64 = 16 << 20;

/// What a round was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Its seed: a storm that begins with it begins with this round.
    pub seed: u64,
    /// What the operator did: buses plugged in, asked for, torn out, resets.
    pub acts: [u64; 4],
    /// Hypercalls that succeeded and that failed, bringing the VM into use included.
    pub calls: [u64; 2],
    /// What the process holds after it.
    pub usage: Usage,
}

/// How a storm ended.
#[derive(Debug)]
pub struct Storm {
    /// The rounds that held.
    pub rounds: Vec<Round>,
    /// The seed of the round that did not hold, and why.
    pub failed: Option<(u64, Failure)>,
    /// The last exchanges of that round, oldest first.
    pub exchanges: Vec<String>,
    /// How long it took.
    pub time: Duration,
}

/// Counts of a round under way.
#[derive(Debug, Default)]
struct Progress {
    steps: AtomicU64,
    acts: [AtomicU64; 4],
    calls: [AtomicU64; 2],
}

/// Storms on `bed` for at least `time`, to the end of a round. `told` hears of each round.
pub fn run(bed: &Arc<dyn Bed>, seed: u64, time: Duration, mut told: impl FnMut(&Round)) -> Storm {
    let start = Instant::now();
    let mut storm = Storm {
        rounds: Vec::new(),
        failed: None,
        exchanges: Vec::new(),
        time: Duration::ZERO,
    };
    let mut seed = seed;
    while storm.failed.is_none() && (storm.rounds.is_empty() || start.elapsed() < time) {
        let trace = Arc::new(Trace::default());
        match guarded(bed, seed, &trace).and_then(|round| storm.holds(&round).map(|()| round)) {
            Ok(round) => {
                told(&round);
                storm.rounds.push(round);
            }
            Err(failure) => {
                storm.exchanges = trace.lines();
                storm.failed = Some((seed, failure));
            }
        }
        seed = Dice::new(seed).roll();
    }
    storm.time = start.elapsed();
    storm
}

impl Storm {
    /// Compares a round with those before.
    fn holds(&self, round: &Round) -> Verdict {
        if let Some(first) = self.rounds.first() {
            let (was, is) = (first.usage, round.usage);
            equal(
                "file descriptors of the process",
                is.descriptors,
                was.descriptors,
            )?;
            equal("threads of the process", is.threads, was.threads)?;
        }
        if let Some(warm) = self.rounds.get(WARM_UP - 1)
            && let (Some(was), Some(is)) = (warm.usage.memory, round.usage.memory)
            && is > was + GROWTH
        {
            let expected = format!("at most {GROWTH} bytes more than {was}");
            return Err(Failure::Unmet {
                what: "memory of the process".into(),
                expected,
                got: format!("{is} bytes"),
            });
        }
        Ok(())
    }
}

/// A round on a thread of its own: one that hangs is left behind.
fn guarded(bed: &Arc<dyn Bed>, seed: u64, trace: &Arc<Trace>) -> Result<Round, Failure> {
    let before = Usage::now();
    let progress = Arc::new(Progress::default());
    let (done, ended) = channel();
    let context = Context::new(bed.clone(), trace.clone());
    let counts = progress.clone();
    let body = move || {
        let result = catch_unwind(AssertUnwindSafe(|| round(&context, seed, &counts)));
        let _ = done.send(result);
    };
    let thread = thread::Builder::new().name("storm".into()).spawn(body);
    let thread = thread.map_err(|error| Failure::Host(format!("a thread: {error}")))?;
    let mut seen = 0;
    let result = loop {
        match ended.recv_timeout(PATIENCE) {
            Ok(result) => break result,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Failure::Host("the thread of the storm died".into()));
            }
            Err(RecvTimeoutError::Timeout) => {
                let steps = progress.steps.load(Ordering::Relaxed);
                if steps == seen {
                    let seconds = PATIENCE.as_secs();
                    let text = format!("no step within {seconds} s, after {steps} of them");
                    return Err(Failure::Host(text));
                }
                seen = steps;
            }
        }
    };
    let _ = thread.join();
    match result {
        Ok(held) => held?,
        Err(panic) => return Err(Failure::Host(format!("panic: {}", panic_text(&*panic)))),
    }
    Ok(Round {
        seed,
        acts: std::array::from_fn(|act| progress.acts[act].load(Ordering::Relaxed)),
        calls: std::array::from_fn(|end| progress.calls[end].load(Ordering::Relaxed)),
        // A thread that was joined may be among those of the process for a moment longer.
        usage: Usage::like(
            &Usage {
                threads: before.threads,
                ..Usage::now()
            },
            LAG,
        ),
    })
}

/// The machine: RAM for the guest's own pages, and for many rounds of bringing it up.
fn setup() -> Setup {
    Setup {
        iommu: Some(IommuConfig {
            max_domains: 16,
            ..IommuConfig::default()
        }),
        buses: vec![BusSetup::testdev(1)],
        ..Setup::default()
    }
}

fn round(context: &Context, seed: u64, progress: &Progress) -> Verdict {
    let vm = context.machine(&setup())?;
    // Below all that the guest's kernel will have: nothing that is stored there leads further up.
    let arena = vm.pages(attacker::PAGES)?;
    works(&vm)?;
    let before = Usage::now();
    let mut dice = Dice::new(seed);
    let mut attackers = Vec::new();
    for vp in 0..2 {
        attackers.push(Attacker::new(&vm, vp, arena, dice.roll())?);
    }
    let mut operator = Operator::new(&vm, dice.roll());
    match vm.bed() {
        BedKind::Sim => taking_turns(&mut attackers, &mut operator, dice, progress)?,
        BedKind::Kvm => at_once(&mut attackers, &mut operator, progress)?,
    }
    for call in vm.host().counters().hypercalls.calls {
        progress.calls[0].fetch_add(call.succeeded, Ordering::Relaxed);
        progress.calls[1].fetch_add(call.failed, Ordering::Relaxed);
    }
    operator.tidy_up()?;
    vm.ram().fill(arena, attacker::PAGES * 4096, 0)?;
    // A worker or a VP whose thread has panicked is missing.
    let held = Usage::like(&before, LAG);
    let after = "after the storm";
    equal(
        format!("file descriptors {after}"),
        held.descriptors,
        before.descriptors,
    )?;
    equal(format!("threads {after}"), held.threads, before.threads)?;
    works(&vm)
}

/// From boot to data and an interrupt.
fn works(vm: &Vm) -> Verdict {
    let device = TestDev::bring_up(vm)?;
    let pages = vm.pages(2)?;
    vm.write(pages, &[0xa5; 4096])?;
    device.interrupt(0, 0x41, 1)?;
    vm.take_interrupts(1)?;
    device.copy(pages, pages + 4096, 4096, 0)?;
    equal(
        "what the device copied",
        vm.read(pages + 4096, 4096)?,
        vec![0xa5; 4096],
    )?;
    vm.expect_interrupt(1, 0x41)
}

/// Exceptions are what a guest like this gets; what ends it is the host's failure.
fn survived(step: Result<(), Failure>) -> Verdict {
    match step {
        Err(Failure::Fault(Fault::Exception { .. })) => Ok(()),
        other => other,
    }
}

/// One thread does everything, in an order that the dice make.
fn taking_turns(
    attackers: &mut [Attacker],
    operator: &mut Operator,
    mut dice: Dice,
    progress: &Progress,
) -> Verdict {
    let mut steps = 0;
    while steps < STEPS * 2 {
        match dice.roll() % 1024 {
            0..800 => {
                let vp = (dice.roll() % 2) as usize;
                survived(attackers[vp].step())?;
                steps += 1;
                progress.steps.fetch_add(1, Ordering::Relaxed);
            }
            800..1018 => {
                for _ in 0..dice.roll() % 8 {
                    operator.vm().step();
                }
            }
            _ => operator.act(&progress.acts)?,
        }
    }
    Ok(())
}

/// Each VP and the operator on a thread of its own.
fn at_once(attackers: &mut [Attacker], operator: &mut Operator, progress: &Progress) -> Verdict {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let threads: Vec<_> = attackers
            .iter_mut()
            .map(|attacker| {
                scope.spawn(|| -> Verdict {
                    for _ in 0..STEPS {
                        survived(attacker.step())?;
                        progress.steps.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let acts = scope.spawn(|| -> Verdict {
            while !over.load(Ordering::Relaxed) {
                operator.act(&progress.acts)?;
                operator.pause();
            }
            Ok(())
        });
        let mut result = Ok(());
        for thread in threads {
            result = result.and(joined(thread.join()));
        }
        over.store(true, Ordering::Relaxed);
        result.and(joined(acts.join()))
    })
}

fn joined(end: thread::Result<Verdict>) -> Verdict {
    end.unwrap_or_else(|panic| Err(Failure::Host(format!("panic: {}", panic_text(&*panic)))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_and_what_stays_open_are_noticed() {
        let usage = Usage {
            descriptors: Some(10),
            threads: Some(2),
            memory: Some(100 << 20),
        };
        let round = Round {
            seed: 1,
            acts: [0; 4],
            calls: [0; 2],
            usage,
        };
        let storm = Storm {
            rounds: vec![round; WARM_UP],
            failed: None,
            exchanges: Vec::new(),
            time: Duration::ZERO,
        };
        storm.holds(&round).unwrap();
        let with = |usage| Round { usage, ..round };
        for (usage, expected) in [
            (
                Usage {
                    descriptors: Some(11),
                    ..usage
                },
                "file descriptors",
            ),
            (
                Usage {
                    threads: Some(3),
                    ..usage
                },
                "threads",
            ),
            (
                Usage {
                    memory: Some((100 << 20) + GROWTH + 1),
                    ..usage
                },
                "memory",
            ),
        ] {
            let error = storm.holds(&with(usage)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
