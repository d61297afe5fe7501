//! A machine with a guest in it that has done nothing yet.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;
use vm_vpci::mem::{GuestRam, MemError};
use vm_vpci::vpci::Ejected;

use crate::bed::{BedKind, Machine};
use crate::check::Failure;
use crate::guest::{Call, Fault, Returned};
use crate::host::{BusSetup, Host, Setup};
use crate::trace::{Event, Trace};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// How long an interrupt that must come may take. Far more than it takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Interrupts that are taken at a time where they may come without an end.
const MOST_INTERRUPTS: usize = 256;
/// How long to look out for an interrupt that must not come, where that takes time.
pub const GLANCE: Duration = Duration::from_millis(5);

#[derive(Debug)]
struct Inner {
    kind: BedKind,
    machine: Machine,
    setup: Setup,
    trace: Arc<Trace>,
    next_page: AtomicU64,
    /// Vectors that arrived while another one was waited for, by VP.
    arrived: Vec<Mutex<VecDeque<u8>>>,
}

/// A machine.
#[derive(Debug, Clone)]
pub struct Vm(Arc<Inner>);

/// What the one who asked for a bus has heard of it.
#[derive(Debug, Clone, Default)]
pub struct Told(Arc<AtomicU32>);

impl Told {
    /// What the host calls.
    fn counter(&self) -> Ejected {
        let count = self.0.clone();
        Box::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        })
    }

    /// How often he was told that the guest has let go.
    pub fn times(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }
}

impl From<MemError> for Failure {
    fn from(error: MemError) -> Self {
        Self::Host(format!("the check's own access: {error}"))
    }
}

impl Vm {
    /// Wraps a machine that was made from `setup`.
    pub fn new(kind: BedKind, machine: Machine, setup: Setup, trace: Arc<Trace>) -> Self {
        let free = machine.guest.free_ram();
        let arrived = (0..machine.guest.vps()).map(|_| Mutex::default()).collect();
        Self(Arc::new(Inner {
            kind,
            machine,
            setup,
            trace,
            next_page: AtomicU64::new(free.start),
            arrived,
        }))
    }

    /// The bed's kind.
    pub fn bed(&self) -> BedKind {
        self.0.kind
    }

    /// What the machine was made from.
    pub fn setup(&self) -> &Setup {
        &self.0.setup
    }

    /// The operator's side.
    pub fn host(&self) -> &dyn Host {
        &*self.0.machine.host
    }

    /// Number of VPs.
    pub fn vps(&self) -> u32 {
        self.0.machine.guest.vps()
    }

    /// Guest RAM.
    pub fn ram(&self) -> &GuestRam {
        self.0.machine.guest.memory()
    }

    /// Writes down what the guest did, for the report of a failure.
    pub fn trace(&self, event: &Event) {
        self.0.trace.add(event);
    }

    /// Fresh pages in a row, filled with zeros: their GPA.
    ///
    /// # Errors
    ///
    /// [`Failure::Host`] when RAM is used up: a check that does this asks for more in its
    /// [`Setup`].
    pub fn pages(&self, count: u64) -> Result<u64, Failure> {
        let gpa = self.0.next_page.fetch_add(count * PAGE, Ordering::Relaxed);
        if gpa + count * PAGE > self.0.machine.guest.free_ram().end {
            return Err(Failure::Host("the check's RAM is used up".into()));
        }
        self.ram().fill(gpa, count * PAGE, 0)?;
        Ok(gpa)
    }

    /// Bytes of RAM.
    ///
    /// # Errors
    ///
    /// [`Failure`] if they are not RAM.
    pub fn read(&self, gpa: u64, len: usize) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; len];
        self.ram().read(gpa, &mut bytes)?;
        Ok(bytes)
    }

    /// Stores bytes to RAM.
    ///
    /// # Errors
    ///
    /// [`Failure`] if they are not RAM.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), Failure> {
        Ok(self.ram().write(gpa, bytes)?)
    }

    /// CPUID with ECX 0.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn cpuid(&self, vp: u32, leaf: u32) -> Result<[u32; 4], Fault> {
        let result = self.0.machine.guest.cpuid(vp, leaf, 0);
        self.trace(&Event::Cpuid {
            vp,
            leaf,
            result: result.clone(),
        });
        result
    }

    /// RDMSR.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn rdmsr(&self, vp: u32, msr: u32) -> Result<u64, Fault> {
        let result = self.0.machine.guest.rdmsr(vp, msr);
        self.trace(&Event::ReadMsr {
            vp,
            msr,
            result: result.clone(),
        });
        result
    }

    /// WRMSR.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn wrmsr(&self, vp: u32, msr: u32, value: u64) -> Result<(), Fault> {
        let result = self.0.machine.guest.wrmsr(vp, msr, value);
        self.trace(&Event::WriteMsr {
            vp,
            msr,
            value,
            result: result.clone(),
        });
        result
    }

    /// A call with these registers.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn hypercall(&self, vp: u32, call: &Call) -> Result<Returned, Fault> {
        let mut input = Vec::new();
        if call.control & 1 << 16 == 0 {
            let room = PAGE - call.rdx % PAGE;
            input = vec![0; room.min(256) as usize];
            if self.ram().read(call.rdx, &mut input).is_err() {
                input.clear();
            }
        }
        let result = self.0.machine.guest.hypercall(vp, call);
        self.trace(&Event::Hypercall {
            vp,
            call: Box::new(*call),
            input,
            result: result
                .as_ref()
                .map(|returned| returned.rax)
                .map_err(Fault::clone),
        });
        result
    }

    /// A load from an address that is not RAM.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn load(&self, vp: u32, gpa: u64, width: usize) -> Result<u64, Fault> {
        let result = self.0.machine.guest.mmio_read(vp, gpa, width);
        self.trace(&Event::MmioRead {
            vp,
            gpa,
            width,
            result: result.clone(),
        });
        result
    }

    /// A store to an address that is not RAM.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn store(&self, vp: u32, gpa: u64, width: usize, value: u64) -> Result<(), Fault> {
        let result = self.0.machine.guest.mmio_write(vp, gpa, width, value);
        self.trace(&Event::MmioWrite {
            vp,
            gpa,
            width,
            value,
            result: result.clone(),
        });
        result
    }

    /// Returns once the host has done all that the guest has asked for so far. What it sends is
    /// there then; what is not there does not come.
    pub fn settle(&self) {
        self.0.machine.host.settle();
    }

    /// Lets one worker of the host do one bounded step, on a bed where nothing happens by itself.
    /// False if there was nothing to do. With it a check puts what a VP does between two steps.
    pub fn step(&self) -> bool {
        self.0.machine.host.step()
    }

    /// Resets the machine. The guest knows nothing of before, but its pages stay taken.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn reset(&self) -> Result<(), Failure> {
        self.trace(&Event::Note("the machine is reset".into()));
        self.0.machine.host.reset()?;
        for arrived in &self.0.arrived {
            lock(arrived).clear();
        }
        Ok(())
    }

    /// Plugs in a bus.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn plug(&self, bus: &BusSetup) -> Result<(), Failure> {
        self.trace(&Event::Note(format!("bus {} is plugged in", bus.instance)));
        Ok(self.0.machine.host.plug(bus)?)
    }

    /// Has the host ask the guest to let go of a bus.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the host refuses.
    pub fn eject(&self, instance: Uuid) -> Result<Told, Failure> {
        self.trace(&Event::Note(format!("bus {instance} is asked for")));
        let told = Told::default();
        self.0.machine.host.eject(instance, told.counter())?;
        Ok(told)
    }

    /// Asks the guest to let go of one function of a bus.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the host refuses.
    pub fn eject_function(&self, instance: Uuid, function: u8) -> Result<Told, Failure> {
        let event = format!("function {function} of bus {instance} is asked for");
        self.trace(&Event::Note(event));
        let told = Told::default();
        let host = &self.0.machine.host;
        host.eject_function(instance, function, told.counter())?;
        Ok(told)
    }

    /// Takes one function of a bus away, whether the guest agrees or not.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn remove_function(&self, instance: Uuid, function: u8) -> Result<(), Failure> {
        let event = format!("function {function} of bus {instance} is taken away");
        self.trace(&Event::Note(event));
        Ok(self.0.machine.host.remove_function(instance, function)?)
    }

    /// Takes a bus away, whether the guest agrees or not.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn remove(&self, instance: Uuid) -> Result<(), Failure> {
        self.trace(&Event::Note(format!("bus {instance} is taken away")));
        Ok(self.0.machine.host.remove(instance)?)
    }

    /// Takes what has arrived on `vp`, and what arrives within `timeout` of the last, and forgets it.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn drain_interrupts(&self, vp: u32, timeout: Duration) -> Result<(), Fault> {
        if let Some(arrived) = self.0.arrived.get(vp as usize) {
            lock(arrived).clear();
        }
        for _ in 0..MOST_INTERRUPTS {
            if self.0.machine.guest.next_interrupt(vp, timeout)?.is_none() {
                break;
            }
        }
        Ok(())
    }

    fn next_interrupt(&self, vp: u32, timeout: Duration) -> Result<Option<u8>, Fault> {
        let vector = self.0.machine.guest.next_interrupt(vp, timeout)?;
        if let Some(vector) = vector {
            self.trace(&Event::Interrupt { vp, vector });
        }
        Ok(vector)
    }

    /// Waits for `vector` on `vp`; others that arrive meanwhile are kept.
    ///
    /// # Errors
    ///
    /// [`Failure::Unmet`] if it does not come.
    pub fn expect_interrupt(&self, vp: u32, vector: u8) -> Result<(), Failure> {
        if self.wait_interrupt(vp, vector, PATIENCE)? {
            return Ok(());
        }
        Err(Failure::Unmet {
            what: format!("interrupts of VP {vp}"),
            expected: format!("vector {vector:#x}"),
            got: "none".into(),
        })
    }

    /// Whether `vector` arrives on `vp` within `timeout`, or had before; others are kept.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn wait_interrupt(&self, vp: u32, vector: u8, timeout: Duration) -> Result<bool, Fault> {
        self.settle();
        let deadline = Instant::now() + timeout;
        let Some(arrived) = self.0.arrived.get(vp as usize) else {
            return Err(Fault::Host(format!("there is no VP {vp}")));
        };
        loop {
            let mut kept = lock(arrived);
            if let Some(index) = kept.iter().position(|kept| *kept == vector) {
                kept.remove(index);
                return Ok(true);
            }
            drop(kept);
            let left = deadline.saturating_duration_since(Instant::now());
            match self.next_interrupt(vp, left)? {
                Some(found) => lock(arrived).push_back(found),
                None => return Ok(false),
            }
        }
    }

    /// All vectors that have arrived on `vp` and were not waited for, in order of arrival, once
    /// the host has come to rest.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn take_interrupts(&self, vp: u32) -> Result<Vec<u8>, Fault> {
        self.settle();
        while let Some(vector) = self.next_interrupt(vp, GLANCE)? {
            lock(&self.0.arrived[vp as usize]).push_back(vector);
        }
        Ok(lock(&self.0.arrived[vp as usize]).drain(..).collect())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
