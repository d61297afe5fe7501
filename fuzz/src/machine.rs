//! The machine under test: a partition with everything around it that a VMM provides.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use uuid::Uuid;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vm_vpci::cpuid::Features;
use vm_vpci::devices::testdev::TestDevice;
use vm_vpci::devices::virtio::{Blk, BlkConfig, Rng, RngConfig};
use vm_vpci::mem::GuestRam;
use vm_vpci::msr::DEFAULT_HYPERCALL_PORT;
use vm_vpci::partition::PlugError;
use vm_vpci::pviommu::{IommuConfig, IommuMode};
use vm_vpci::vmbus::{Limits, VmBusConfig};
use vm_vpci::vmm::{Clock, Msi, MsiSink, Trigger, Worker, WorkerHost};
use vm_vpci::vpci::function::PciFunction;
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

/// What a function is.
#[derive(Debug, Clone)]
pub enum Device {
    /// A `testdev`.
    Test,
    /// A virtio-blk of two queues.
    Disk {
        /// The image.
        image: Arc<File>,
        /// The disk is offered read-only.
        readonly: bool,
    },
    /// A virtio-rng.
    Entropy,
}

/// A function that is plugged in.
#[derive(Debug, Clone)]
pub struct Function {
    /// Its number.
    pub number: u8,
    /// Whether it is behind the pvIOMMU.
    pub mode: IommuMode,
    /// What it is.
    pub device: Device,
}

/// A bus that is plugged in.
#[derive(Debug, Clone)]
pub struct Plugged {
    /// Instance GUID.
    pub instance: Uuid,
    /// Its functions.
    pub functions: Vec<Function>,
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
    /// The disk that was plugged in last.
    pub disk: Option<Arc<Blk>>,
    /// The source of entropy that was plugged in last.
    pub entropy: Option<Arc<Rng>>,
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
            disk: None,
            entropy: None,
        }
    }

    /// Plugs in the bus `number` with a `testdev` for each function.
    ///
    /// # Errors
    ///
    /// The partition's.
    pub fn plug(&mut self, number: u16, functions: &[(u8, IommuMode)]) -> Result<(), PlugError> {
        let functions = functions.iter().map(|&(number, mode)| Function {
            number,
            mode,
            device: Device::Test,
        });
        self.plug_functions(number, functions.collect())
    }

    /// Plugs in the bus `number` with any functions.
    ///
    /// # Errors
    ///
    /// The partition's.
    pub fn plug_functions(
        &mut self,
        number: u16,
        functions: Vec<Function>,
    ) -> Result<(), PlugError> {
        self.plug_again(Plugged {
            instance: instance(number),
            functions,
        })
    }

    fn plug_again(&mut self, plugged: Plugged) -> Result<(), PlugError> {
        let functions = plugged.functions.iter();
        let functions = functions.map(|function| {
            let device = self.device(function);
            FunctionSpec::new(function.number, device).with_iommu(function.mode)
        });
        let functions = functions.collect();
        let spec = BusSpec {
            instance: plugged.instance,
            functions,
        };
        self.partition.plug(spec)?;
        self.buses.push(plugged);
        Ok(())
    }

    /// Makes the device of a function.
    fn device(&mut self, function: &Function) -> Arc<dyn PciFunction> {
        let iommu = function.mode != IommuMode::Off;
        match &function.device {
            Device::Test => {
                let device = TestDevice::new(u32::from(function.number), &*self.workers);
                device.expect("any number of workers")
            }
            Device::Disk { image, readonly } => {
                let config = BlkConfig {
                    // Another opening of the same file, which need not have a name.
                    file: format!("/proc/self/fd/{}", image.as_raw_fd()).into(),
                    readonly: *readonly,
                    queues: 2,
                    iommu,
                    id: "fuzz".to_owned(),
                };
                let disk = Blk::new(config, &*self.workers).expect("an image that is not in use");
                self.disk = Some(disk.clone());
                disk
            }
            Device::Entropy => {
                let entropy = Rng::new(RngConfig { iommu }, &*self.workers);
                let entropy = entropy.expect("any number of workers");
                self.entropy = Some(entropy.clone());
                entropy
            }
        }
    }

    /// Tears a bus out. False if there is none with this GUID.
    pub fn remove(&mut self, instance: &Uuid) -> bool {
        self.buses.retain(|bus| bus.instance != *instance);
        self.partition.remove(instance)
    }

    /// Tears one function of a bus out. False if it cannot be.
    pub fn remove_function(&mut self, instance: &Uuid, number: u8) -> bool {
        if self.partition.remove_function(instance, number).is_err() {
            return false;
        }
        let of_bus = |bus: &&mut Plugged| bus.instance == *instance;
        if let Some(bus) = self.buses.iter_mut().find(of_bus) {
            bus.functions.retain(|function| function.number != number);
        }
        true
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
            partition,
            workers,
            disk,
            entropy,
            ..
        } = self;
        drop((partition, disk, entropy));
        let alive = workers.alive();
        assert!(alive.is_empty(), "left behind: {alive:?}");
    }
}
