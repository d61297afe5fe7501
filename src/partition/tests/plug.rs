//! Plugging in, and what is left of a bus that was refused.
#![forbid(unsafe_code)]

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use super::*;
use crate::pviommu::{
    Attachment, BackendError, BackendReport, DeviceBackend, FlushRange, Translation,
};
use crate::vpci::function::{FunctionLayout, FunctionResources, PciFunction};

/// A bus with `device` as its functions `numbers`.
fn plug(
    guest: &Guest,
    instance: Uuid,
    device: &Arc<TestDevice>,
    numbers: &[u8],
) -> Result<(), PlugError> {
    let functions = numbers.iter();
    guest.partition.plug(BusSpec {
        instance,
        functions: functions
            .map(|number| FunctionSpec::new(*number, device.clone()))
            .collect(),
    })
}

#[test]
fn a_device_whose_bus_was_refused_can_be_plugged_in_later() {
    let (mut guest, relid) = main_job(0x5_0003, 0x1_0004);
    let device = TestDevice::new(9, &*guest.host).unwrap();
    let twin = plug(&guest, INSTANCE, &device, &[0]);
    assert!(matches!(twin, Err(PlugError::DuplicateId(_))));
    assert!(guest.partition.remove(&INSTANCE));
    guest.host.run();
    guest.expect_message(2);
    let malformed = plug(&guest, INSTANCE, &device, &[0, 8]);
    assert!(matches!(malformed, Err(PlugError::Bus(_))));
    let early = plug(&guest, INSTANCE, &device, &[0]);
    assert!(matches!(early, Err(PlugError::Offer(_))), "{early:?}");
    let release = [13, 0, 0, 0, 0, 0, 0, 0, relid as u8, 0, 0, 0];
    assert_eq!(guest.post(1, &release), 0);
    guest.host.run();
    plug(&guest, INSTANCE, &device, &[0]).unwrap();
    guest.partition.reset();
    guest.rings = None;
    guest.main_job(0x5_0003, 0x1_0004);
}

#[test]
fn a_device_that_the_pviommu_had_no_room_for_can_be_plugged_in_later() {
    let config = IommuConfig {
        max_functions: 2,
        ..IommuConfig::default()
    };
    let mut guest = Guest::with_iommu(ram(256), config);
    let other = uuid!("00000003-0002-0008-8000-000000000000");
    let device = TestDevice::new(9, &*guest.host).unwrap();
    let second = TestDevice::new(10, &*guest.host).unwrap();
    let functions = vec![
        FunctionSpec::new(0, device.clone()),
        FunctionSpec::new(1, second),
    ];
    let spec = BusSpec {
        instance: other,
        functions,
    };
    let full = guest.partition.plug(spec).unwrap_err();
    assert!(matches!(full, PlugError::Iommu(_)), "{full}");
    assert_eq!(guest.partition.iommu().unwrap().devices.len(), 1);
    assert!(guest.partition.remove(&INSTANCE));
    plug(&guest, INSTANCE, &device, &[0]).unwrap();
    guest.main_job(0x5_0003, 0x1_0004);
}

#[test]
fn the_devices_of_a_removed_bus_are_the_callers_again_whatever_the_guest_does() {
    for open in [false, true] {
        let mut guest = Guest::new();
        guest.boot();
        assert!(guest.contact(0x5_0003));
        let relid = if open {
            guest.probe(0x1_0004)
        } else {
            guest.offers()[0].0
        };
        let spare = TestDevice::new(9, &*guest.host).unwrap();
        let device = Arc::downgrade(&std::mem::replace(&mut guest.device, spare));
        assert!(guest.partition.remove(&INSTANCE));
        assert!(device.upgrade().is_none(), "open: {open}");
        // The guest is told, and never answers.
        guest.host.run();
        assert_eq!(word(&guest.expect_message(2), 8), relid);
        let spare = guest.device.clone();
        let early = plug(&guest, INSTANCE, &spare, &[0]);
        assert!(matches!(early, Err(PlugError::Offer(_))), "{early:?}");
    }
}

#[test]
fn a_function_that_leaves_is_known_to_nobody_and_its_device_comes_back() {
    let guest = Guest::with_iommu(ram(256), IommuConfig::default());
    assert!(guest.partition.remove(&INSTANCE));
    let devices = [9, 10, 11].map(|serial| TestDevice::new(serial, &*guest.host).unwrap());
    let functions = (0..).zip(&devices);
    let functions = functions.map(|(number, device)| {
        FunctionSpec::new(number, device.clone()).with_iommu(IommuMode::On)
    });
    let spec = BusSpec {
        instance: INSTANCE,
        functions: functions.collect(),
    };
    guest.partition.plug(spec).unwrap();
    guest.boot();
    let other = uuid!("00000009-0002-0008-8000-000000000000");
    let remove = |instance, function| {
        guest
            .partition
            .remove_function(instance, function)
            .map(drop)
    };
    assert_eq!(remove(&other, 1), Err(EjectError::NoSuchBus));
    assert_eq!(remove(&INSTANCE, 0), Err(EjectError::Function0));
    let missing = EjectError::NoSuchFunction { number: 3 };
    assert_eq!(remove(&INSTANCE, 3), Err(missing));
    let known = || {
        let devices = guest.partition.iommu().unwrap().devices;
        devices
            .iter()
            .map(|device| device.id.function())
            .collect::<Vec<_>>()
    };
    assert_eq!(known(), [0, 1, 2]);
    drop(guest.partition.remove_function(&INSTANCE, 1).unwrap());
    assert_eq!(known(), [0, 2]);
    assert_eq!(Arc::strong_count(&devices[1]), 1);
    let retarget = |function: u64| {
        let mut input = SELF.to_le_bytes().to_vec();
        input.extend((0x1234_ab78 + function).to_le_bytes());
        put(&mut input, &[1, 0, 0xfee0_0000, 5, 0, 0, 0x41, 0, 1, 0]);
        guest.ram.write(0x6000, &input).unwrap();
        guest.call(0x7e, 0x6000) as u16
    };
    assert_eq!(retarget(1), 0x57, "no such device");
    assert_eq!(retarget(2), 5, "no such message");
    assert!(guest.partition.remove(&INSTANCE));
    assert!(known().is_empty());
}

/// A device that keeps what the bus and the pvIOMMU do with it.
#[derive(Debug)]
struct Watched {
    device: Arc<TestDevice>,
    log: Arc<Log>,
}

#[derive(Debug, Default)]
struct Log {
    told: Mutex<Vec<&'static str>>,
    /// The host's IOMMU cannot tell the device from others.
    shares: bool,
}

impl Log {
    fn push(&self, what: &'static str) {
        self.told.lock().unwrap().push(what);
    }
}

impl PciFunction for Watched {
    fn layout(&self) -> FunctionLayout {
        self.device.layout()
    }

    fn connect(&self, resources: FunctionResources) {
        self.device.connect(resources);
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.device.bar_read(bar, offset, data);
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.device.bar_write(bar, offset, data);
    }

    fn dma_backend(&self) -> Option<Arc<dyn DeviceBackend>> {
        Some(self.log.clone())
    }

    fn set_bus_master(&self, on: bool) {
        self.log.push(if on { "master" } else { "no master" });
    }

    fn reset(&self) {
        self.device.reset();
        self.log.push("reset");
    }
}

impl DeviceBackend for Log {
    fn attach(&self, to: &Attachment) -> Result<(), BackendError> {
        self.push(match to.translation {
            Translation::Blocked => "blocked",
            _ => "attached",
        });
        Ok(())
    }

    fn removed(&self) {
        self.push("removed");
    }

    fn is_alone(&self) -> bool {
        !self.shares
    }

    fn flush(&self, _ranges: &[FlushRange]) {}

    fn flush_all(&self) {}

    fn report(&self) -> BackendReport {
        BackendReport::default()
    }
}

#[test]
fn a_back_end_hears_of_a_removal_when_its_device_is_off_and_not_before() {
    let plugged = |functions: usize, shares: bool, mode: IommuMode| {
        let guest = Guest::with_iommu(ram(256), IommuConfig::default());
        assert!(guest.partition.remove(&INSTANCE));
        let told = Mutex::default;
        let log = |_| {
            Arc::new(Log {
                told: told(),
                shares,
            })
        };
        let logs: Vec<_> = (0..functions).map(log).collect();
        let functions = (0..).zip(&logs).map(|(number, log)| {
            let watched = Watched {
                device: TestDevice::new(9, &*guest.host).unwrap(),
                log: log.clone(),
            };
            FunctionSpec::new(number, Arc::new(watched)).with_iommu(mode)
        });
        let spec = BusSpec {
            instance: INSTANCE,
            functions: functions.collect(),
        };
        guest.partition.plug(spec).unwrap();
        (guest, logs)
    };
    let of = |log: &Log| log.told.lock().unwrap().clone();
    // Others would be blocked with it.
    let (mut guest, logs) = plugged(1, true, IommuMode::On);
    guest.connect();
    assert!(guest.partition.remove(&INSTANCE));
    let life = ["attached", "master", "no master", "reset", "removed"];
    assert_eq!(of(&logs[0]), life);
    let (mut guest, logs) = plugged(1, false, IommuMode::On);
    guest.connect();
    assert!(guest.partition.remove(&INSTANCE));
    let blocked_first = [
        "attached",
        "master",
        "blocked",
        "no master",
        "reset",
        "removed",
    ];
    assert_eq!(of(&logs[0]), blocked_first);
    // The guest never had these.
    let (guest, logs) = plugged(2, true, IommuMode::On);
    guest.partition.remove_function(&INSTANCE, 1).unwrap();
    assert_eq!(of(&logs[1]), ["attached", "removed"]);
    assert_eq!(of(&logs[0]), ["attached"]);
    // Not behind the pvIOMMU: it may come from where it was, and was removed.
    let (guest, logs) = plugged(1, true, IommuMode::Off);
    guest.partition.remove(&INSTANCE);
    assert_eq!(of(&logs[0]), ["attached", "removed"]);
}

/// A loop whose threads stand still for one adoption: it says that it has come, and waits for leave.
#[derive(Debug)]
struct Paused {
    workers: Arc<Loop>,
    hold: Mutex<Option<(Sender<()>, Receiver<()>)>>,
}

impl WorkerHost for Paused {
    fn adopt(&self, worker: Weak<dyn Worker>) -> io::Result<Arc<dyn Trigger>> {
        let hold = self.hold.lock().unwrap().take();
        if let Some((come, leave)) = hold {
            come.send(()).unwrap();
            leave.recv().unwrap();
        }
        self.workers.adopt(worker)
    }
}

#[test]
fn a_plug_that_waits_for_a_worker_thread_holds_up_nobody_and_may_come_too_late() {
    const SOON: Duration = Duration::from_secs(10);
    let host = Guest::new().partition.host.clone();
    let workers = Arc::new(Paused {
        workers: Arc::default(),
        hold: Mutex::default(),
    });
    let config = PartitionConfig {
        apic_ids: vec![0],
        tsc_hz: 1_000_000_000,
        apic_hz: 1_000_000_000,
        mmio: Vec::new(),
        features: Features::default(),
        hypercall_port: DEFAULT_HYPERCALL_PORT,
        vmbus: VmBusConfig::default(),
        iommu: Some(IommuConfig::default()),
    };
    let host = PartitionHost {
        workers: workers.clone(),
        ..host
    };
    let partition = Arc::new(Partition::new(config, host).unwrap());
    let plug = |partition: &Partition, instance, device: &Arc<TestDevice>| {
        let function = FunctionSpec::new(0, device.clone()).with_iommu(IommuMode::On);
        partition.plug(BusSpec {
            instance,
            functions: vec![function],
        })
    };
    let [late, first] = [1, 2].map(|serial| TestDevice::new(serial, &*workers.workers).unwrap());
    let (come, has_come) = channel();
    let (leave, waits) = channel();
    *workers.hold.lock().unwrap() = Some((come, waits));
    let held = thread::spawn({
        let (partition, late) = (partition.clone(), late.clone());
        move || plug(&partition, INSTANCE, &late)
    });
    has_come.recv().unwrap();
    // Whoever has paused the loop saves, and meanwhile another takes the name.
    let (done, is_done) = channel();
    let other = thread::spawn({
        let (partition, first) = (partition.clone(), first.clone());
        move || {
            let saved = partition.save().unwrap().buses.len();
            plug(&partition, INSTANCE, &first).unwrap();
            done.send((saved, partition.buses().len())).unwrap();
        }
    });
    let answer = is_done.recv_timeout(SOON);
    leave.send(()).unwrap();
    assert_eq!(answer, Ok((0, 1)), "save and plug wait for a worker thread");
    other.join().unwrap();
    let late_answer = held.join().unwrap();
    assert!(matches!(late_answer, Err(PlugError::DuplicateId(_))));
    // Nothing is left of it: its worker is gone, its device free, and who has the name undisturbed.
    let live = || {
        let workers = workers.workers.workers.lock().unwrap();
        let names = workers.iter().filter_map(|(_, worker)| worker.upgrade());
        let buses = names.filter(|worker| worker.name().starts_with("vpci-"));
        buses.count()
    };
    assert_eq!(live(), 1);
    let devices = || partition.iommu().unwrap().devices.len();
    assert_eq!(devices(), 1);
    let elsewhere = uuid!("00000001-1235-ab78-8000-000000000000");
    plug(&partition, elsewhere, &late).unwrap();
    assert_eq!((live(), devices(), partition.buses().len()), (2, 2, 2));
    assert!(partition.remove(&INSTANCE));
    assert_eq!((live(), devices(), partition.buses().len()), (1, 1, 1));
}
