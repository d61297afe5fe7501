//! The machine under test: a partition with everything around it that a VMM provides.
#![forbid(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use uuid::Uuid;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vm_vpci::cpuid::Features;
use vm_vpci::devices::testdev::TestDevice;
use vm_vpci::mem::GuestRam;
use vm_vpci::msr::DEFAULT_HYPERCALL_PORT;
use vm_vpci::partition::PlugError;
use vm_vpci::pviommu::{IommuConfig, IommuMode};
use vm_vpci::vmbus::{Limits, VmBusConfig};
use vm_vpci::vmm::{Clock, Msi, MsiSink, Trigger, Worker, WorkerHost};
use vm_vpci::{BusSpec, FunctionSpec, Partition, PartitionConfig, PartitionHost};

/// RAM, with a hole.
pub const RAM: [Range<u64>; 2] = [0..0x8_0000, 0xc_0000..0x10_0000];
/// Aperture for config windows.
pub const LOW_MMIO: Range<u64> = 0xf000_0000..0xf010_0000;
/// Aperture for BARs.
pub const HIGH_MMIO: Range<u64> = 0x10_0000_0000..0x10_1000_0000;
/// Number of VPs.
pub const VPS: u32 = 2;
/// Steps after which workers are taken for a loop without an end: the longest jobs of some devices,
/// and then some.
const MOST_STEPS: usize = 200_000;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes interrupts, each of which must be one that a VP can take.
#[derive(Debug, Default)]
pub struct Interrupts(AtomicU64);

impl MsiSink for Interrupts {
    fn raise_msi(&self, msi: Msi) {
        let vp = msi.address >> 12 & 0xff;
        assert_eq!(msi.address & !0xf_f000, 0xfee0_0000, "{msi:x?}");
        assert!(vp < VPS.into(), "{msi:x?}: no such VP");
        assert!((16..256).contains(&msi.data), "{msi:x?}: no such vector");
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A clock that ticks at each look, so that runs are alike.
#[derive(Debug, Default)]
struct Ticks(AtomicU64);

impl Clock for Ticks {
    fn reference_time(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
struct Pending(AtomicBool);

impl Trigger for Pending {
    fn trigger(&self) {
        self.0.store(true, Ordering::Release);
    }
}

type Adopted = (Arc<Pending>, Weak<dyn Worker>);

/// Runs workers on the calling thread, when told to.
#[derive(Debug, Default)]
pub struct Workers(Mutex<Vec<Adopted>>);

impl WorkerHost for Workers {
    fn adopt(&self, worker: Weak<dyn Worker>) -> io::Result<Arc<dyn Trigger>> {
        let pending = Arc::new(Pending::default());
        lock(&self.0).push((pending.clone(), worker));
        Ok(pending)
    }
}

impl Workers {
    /// One step of the first worker, from `first` on, that has something to do. False if none has.
    pub fn step(&self, first: usize) -> bool {
        let all: Vec<Adopted> = {
            let mut all = lock(&self.0);
            all.retain(|(_, worker)| worker.strong_count() > 0);
            all.clone()
        };
        let turn = first % all.len().max(1);
        for (pending, worker) in all[turn..].iter().chain(&all[..turn]) {
            if let Some(worker) = worker.upgrade()
                && pending.0.swap(false, Ordering::AcqRel)
            {
                if worker.process() {
                    pending.trigger();
                }
                return true;
            }
        }
        false
    }

    /// Runs all of them until none has anything to do.
    ///
    /// # Panics
    ///
    /// If they do not come to rest.
    pub fn settle(&self) {
        for first in 0..MOST_STEPS {
            if !self.step(first) {
                return;
            }
        }
        panic!("the workers do not come to rest");
    }

    /// Names of those that are still there.
    pub fn alive(&self) -> Vec<String> {
        let all = lock(&self.0);
        let alive = all.iter().filter_map(|(_, worker)| worker.upgrade());
        alive.map(|worker| worker.name()).collect()
    }
}

/// A bus that is plugged in.
#[derive(Debug, Clone)]
pub struct Plugged {
    /// Instance GUID.
    pub instance: Uuid,
    /// Function numbers, and whether they are behind the pvIOMMU.
    pub functions: Vec<(u8, IommuMode)>,
}

/// A partition with what it needs of its VMM.
#[derive(Debug)]
pub struct Machine {
    /// The partition.
    pub partition: Partition,
    /// Its RAM.
    pub ram: GuestRam,
    /// Its workers.
    pub workers: Arc<Workers>,
    /// What is plugged in.
    pub buses: Vec<Plugged>,
}

/// The instance GUID of the bus `number`; its functions have the ids `number << 16 | 0xab78` and
/// up.
pub fn instance(number: u16) -> Uuid {
    Uuid::from_fields(1, number, 0xab78, &[0; 8])
}

/// Guest RAM of zeros.
pub fn ram() -> GuestRam {
    GuestRam::new(&map())
}

/// Memory of zeros for guest RAM.
pub fn map() -> GuestMemoryMmap {
    let regions = RAM.map(|range| {
        let len = (range.end - range.start) as usize;
        (GuestAddress(range.start), len)
    });
    GuestMemoryMmap::from_ranges(&regions).expect("the host has memory")
}

impl Machine {
    /// A machine without any bus.
    pub fn new(ram: GuestRam) -> Self {
        let workers = Arc::new(Workers::default());
        let features = Features {
            xmm_input: true,
            xmm_output: true,
            ..Features::default()
        };
        // Small enough for an input to reach the limits.
        let limits = Limits {
            channels: 4,
            gpadls: 8,
            gpadls_in_progress: 3,
            gpadl_bytes: 4096,
            inbox: 4,
            outbox: 4,
            synic_queue: 16,
        };
        let config = PartitionConfig {
            apic_ids: (0..VPS).collect(),
            tsc_hz: 2_000_000_000,
            apic_hz: 1_000_000_000,
            mmio: vec![LOW_MMIO, HIGH_MMIO],
            features,
            hypercall_port: DEFAULT_HYPERCALL_PORT,
            vmbus: VmBusConfig { limits },
            iommu: Some(IommuConfig {
                max_domains: 4,
                max_functions: 8,
                iotlb_entries: 16,
                five_levels: true,
                ..IommuConfig::default()
            }),
        };
        let host = PartitionHost {
            ram: ram.clone(),
            msi: Arc::new(Interrupts::default()),
            workers: workers.clone(),
            clock: Arc::new(Ticks::default()),
            doorbells: None,
            bars: None,
        };
        Self {
            partition: Partition::new(config, host).expect("a partition like this"),
            ram,
            workers,
            buses: Vec::new(),
        }
    }

    /// Plugs in the bus `number` with a `testdev` for each function.
    ///
    /// # Errors
    ///
    /// The partition's.
    pub fn plug(&mut self, number: u16, functions: &[(u8, IommuMode)]) -> Result<(), PlugError> {
        let plugged = Plugged {
            instance: instance(number),
            functions: functions.to_vec(),
        };
        self.plug_again(plugged)
    }

    fn plug_again(&mut self, plugged: Plugged) -> Result<(), PlugError> {
        let functions = plugged.functions.iter().map(|(number, mode)| {
            let device = TestDevice::new(u32::from(*number), &*self.workers);
            FunctionSpec::new(*number, device.expect("any number of workers")).with_iommu(*mode)
        });
        let spec = BusSpec {
            instance: plugged.instance,
            functions: functions.collect(),
        };
        self.partition.plug(spec)?;
        self.buses.push(plugged);
        Ok(())
    }

    /// Tears a bus out. False if there is none with this GUID.
    pub fn remove(&mut self, instance: &Uuid) -> bool {
        self.buses.retain(|bus| bus.instance != *instance);
        self.partition.remove(instance)
    }

    /// Drops the partition and makes one with the same buses over the same RAM.
    ///
    /// # Panics
    ///
    /// If something of the former one stays behind, or a bus is not taken again.
    #[must_use]
    pub fn replaced(self) -> Self {
        let (ram, buses) = (self.ram.clone(), self.buses.clone());
        self.drop_all();
        let mut machine = Self::new(ram);
        for bus in buses {
            machine.plug_again(bus).expect("what was plugged in before");
        }
        machine
    }

    /// Drops the partition.
    ///
    /// # Panics
    ///
    /// If something of it stays behind.
    pub fn drop_all(self) {
        let Self {
            partition, workers, ..
        } = self;
        drop(partition);
        let alive = workers.alive();
        assert!(alive.is_empty(), "left behind: {alive:?}");
    }
}
